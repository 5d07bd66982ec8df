#!/usr/bin/env python3
"""How long importing takes beside torch itself: prints a table, writes a JSON.

  python benchmarks/imports.py [--runs 7] [--out imports.json]
"""
import argparse
import json
import statistics
import subprocess
import sys
import time

STATEMENTS = ("import torch", "import medssl_nb", "import medssl_nb.ssl", "import medssl_nb.nets", "import medssl_nb.data")


def seconds(statement):
    "Wall time of a fresh interpreter that runs the statement."
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - begin


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--runs", type=int, default=7)
parser.add_argument("--out", default="imports.json")
args = parser.parse_args()
for statement in STATEMENTS:
    seconds(statement)  # warm the disk's cache
rounds = [{s: seconds(s) for s in STATEMENTS} for _ in range(args.runs)]  # in turn: drift hits all alike
found = {s: statistics.median(r[s] for r in rounds) for s in STATEMENTS}
ratio = {s: statistics.median(r[s] / r["import torch"] for r in rounds) for s in STATEMENTS}
print("| statement | seconds, median | times torch, median |\n| --- | --- | --- |")
for s in STATEMENTS:
    print(f"| `{s}` | {found[s]:.2f} | {ratio[s]:.2f} |")
json.dump({"seconds": found, "ratio": ratio, "runs": args.runs}, open(args.out, "w"), indent=2)
