#!/usr/bin/env python3
"""Where to pre-train: on the few images that one has, or on more images of other people (Taleb et al. 2020: the larger corpus wins).

    python benchmarks/corpus.py [--methods exemplar_triplet simclr rotation] [--seeds 3] [--out FILE]

A quarter of the training patients of the cohort's 2D board (benchmarks/leaderboard.py) have labels. Each method is pre-trained for the same
number of steps on these patients' images ("own"), or on 480 other patients' ("corpus"), and fine-tuned on the labelled ones, as the board's
rows are; `random` starts without pre-training. Quadratic weighted kappa of the test patients. Finished cells are kept.
"""
import argparse
import warnings
from pathlib import Path

from leaderboard import BOARDS, BUDGETS, model_of, parts, setting_of
from methods import on, opened, save, spread, steps_within

from medssl_nb.evaluate.protocols import finetune
from medssl_nb.train.fit import fit

BOARD, SHARE, BUDGET = "cohort_2d", 0.25, BUDGETS["cpu"]


def score(encoder, seed):
    "The fine-tuning from the labelled quarter."
    _, train, validation, test = parts(BOARD, "simclr")
    options = {**BOARDS[BOARD].tuning, "task": "classification", "kind": BOARDS[BOARD].kind}
    return finetune(encoder, train.fraction(SHARE, seed), validation, test, seed=seed, **on("cpu"), **options).score


def cell(method, seed, steps):
    "Scores of one method and seed, by where it was pre-trained."
    corpus, train, *_ = parts(BOARD, "simclr")
    found = {"random": score(model_of(BOARD, method, seed)[1], seed)}
    for name, images in (("own", train.fraction(SHARE, seed)), ("corpus", corpus)):
        model, encoder, network = model_of(BOARD, method, seed)
        fit(model, images, steps=steps, seed=seed, **on("cpu"), **setting_of(BOARD, method, network))
        found[name] = score(encoder, seed)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["exemplar_triplet", "simclr", "rotation"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "corpus.json")
    args = parser.parse_args()
    images = [len(p) for p in parts(BOARD, "simclr")]
    setting = {"board": BOARD, "share": SHARE, "images": images, "tuning": BOARDS[BOARD].tuning, "seconds": BUDGET["seconds"]}
    found = opened(args.out, setting, steps={}, cells={})
    for seed in map(str, range(args.seeds)):
        for method in args.methods:
            row = found["cells"].setdefault(method, {})
            if seed in row:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a collapse is told by its score
                if method not in found["steps"]:
                    model, _, network = model_of(BOARD, method, 0)
                    found["steps"][method] = steps_within(BUDGET["seconds"], model, parts(BOARD, method)[0], "cpu", **setting_of(BOARD, method, network))
                row[seed] = cell(method, int(seed), found["steps"][method])
            save(found, args.out)
            print(f"{method}, seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in row[seed].items()), flush=True)
    for method, row in found["cells"].items():
        print(f"{method}: " + ", ".join(f"{name} {spread([c[name] for c in row.values()])}" for name in ("random", "own", "corpus")))


if __name__ == "__main__":
    main()
