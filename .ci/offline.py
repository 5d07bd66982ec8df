#!/usr/bin/env python3
"""After the site is built: pages that need no network.

Mathematics become MathML, which browsers draw themselves; the badge of Colab becomes a plain button; fonts of other
hosts are dropped; the site's root leads to the book's first page. Quarto and smalldocs both run this as `post-render`.
"""
import os
import re
import sys
from html import escape, unescape
from pathlib import Path

from math_core import LatexError, LatexToMathML

SITE = Path(os.environ.get("QUARTO_PROJECT_DIR", ".")) / os.environ.get("QUARTO_PROJECT_OUTPUT_DIR", "_site")
MATHS = re.compile(r'<span class="math (inline|display)">\\[\[(](.*?)\\[\])]</span>', re.S)
KATEX = re.compile(r"<(script|link)\b[^>]*katex[^>]*>(\s*</script>)?", re.I)
BADGE = re.compile(r'<img\b[^>]*colab-badge\.svg[^>]*>')
FONTS = re.compile(r"""@import\s*(url\(\s*)?(["']?)https?://[^"')]*\2\)?\s*;""")
OUTSIDE = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?https?://[^"'\s>]+|<link\b[^>]*\brel=["']?stylesheet[^>]*https?://[^"'\s>]+""", re.I)
ROOT = '<!doctype html><meta charset="utf-8"><title>medssl_nb</title><meta http-equiv="refresh" content="0; url={0}"><a href="{0}">medssl_nb</a>\n'
converter = LatexToMathML()


def mathml(match):
    "One formula, as the page holds it, in MathML; one that cannot be read stops the build."
    latex = unescape(match[2]).strip()
    return converter.convert_with_local_state(latex, displaystyle=match[1] == "display")


def offline(page):
    "Rewrites one page; returns what is wrong with it."
    before = page.read_text(encoding="utf-8")
    try:
        text = KATEX.sub("", MATHS.sub(mathml, before))
    except LatexError as error:
        return [f"{page}: a formula is not LaTeX: {error}"]
    text = BADGE.sub('<span class="btn btn-sm btn-outline-primary">Open in Colab</span>', text)
    if text != before:
        page.write_text(text, encoding="utf-8")
    return [f"{page}: needs the network: {escape(found[:120])}" for found in OUTSIDE.findall(text)]


def main():
    problems = [problem for page in sorted(SITE.rglob("*.html")) for problem in offline(page)]
    for sheet in SITE.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        sheet.write_text(FONTS.sub("", text), encoding="utf-8")
    if not (SITE / "index.html").exists():
        (SITE / "index.html").write_text(ROOT.format("nbs/index.html"), encoding="utf-8")
    print("\n".join(problems) or f"{SITE}: no page needs the network")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
