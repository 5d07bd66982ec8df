#!/usr/bin/env python3
"""The ablations of PCRLv2 (Tables I to III of Zhou et al. 2023), small, in 2D: each row of them is one option of `pcrl_v2`.

    python benchmarks/pcrl_ablation.py [--rows ...] [--seeds 3] [--device cpu|cuda] [--out FILE]

Every row pre-trains the same U-Net encoder (six levels from width 8, so five scales to restore) for the same number of steps on
the same unlabelled patients of the built-in cohort: slices of 64 × 64, T1 with contrast and FLAIR, a lesion in each. Then two
fine-tunings, each for the same number of steps from a few labelled slices, its step chosen on validation patients:
segmentation (Dice of the whole lesion, large, and of its enhancing core, small; the paper's WT and ET on BraTS), and the grade
of the lesion's size (quadratic weighted kappa; in place of the paper's chest pathologies). Only the encoder goes on, under a new
decoder or head. No patient is in two parts. Finished cells are kept: a run that was killed goes on where it stopped.
The rows in 3D are among those of benchmarks/hippocampus.py.
"""
import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from methods import on, opened, save

from medssl_nb import nets, ssl
from medssl_nb.data import ImageSet, cohort
from medssl_nb.evaluate.metrics import dice, mean_dice
from medssl_nb.evaluate.protocols import finetune
from medssl_nb.train.fit import fit

ALONE = {"scales": 1, "local": 0}
ROWS = {  # options of pcrl_v2; None starts at random
    "random": None,
    "restoration": {**ALONE, "comparison": None},
    "comparison": {**ALONE, "restoration": False},
    "both": ALONE,
    "3 scales": {"scales": 3, "local": 0},
    "5 scales": {"local": 0},
    "multi-crop": {"crops": "multi"},
    "sub-crop": {"crops": "sub"},
    "sub-crop, skips": {"crops": "sub", "skips": True},
    "sub-crop, crossed": {"crops": "sub", "comparison": "crossed"},
}
PRETRAINING = {"steps": 60, "batch_size": 16, "lr": 3e-3}
SEGMENTING = {"task": "segmentation", "steps": 150, "batch_size": 4, "lr": 5e-3, "evaluate_every": 50}
GRADING = {"task": "classification", "kind": "grades", "steps": 100, "batch_size": 16, "lr": 3e-3, "evaluate_every": 25}
CASES = (300, 40, 40, 120)  # unlabelled, training, validation, test
REGIONS = ["background", "lesion outside its enhancing core", "enhancing core"]


def parts_for():
    "Images without labels, and the labelled parts: training, validation, test."
    images = cohort(sum(CASES), size=64, spatial_dims=2, seed=2, modalities=("t1ce", "flair"), lesions=True, progress=False)
    masks = [np.select([np.asarray(m) == 6, np.asarray(m) >= 4], [2, 1], 0).astype(np.int64) for m in images.masks]
    images = ImageSet(images.images, labels=images.labels, masks=masks, groups=images.groups, names=images.names, spacing=images.spacing,
                      classes=images.classes, regions=REGIONS)
    unlabelled, *parts = images.split(tuple(n / sum(CASES) for n in CASES), seed=0)
    return unlabelled, parts


def encoder_of(seed):
    "The same network for all rows, drawn by the seed."
    torch.manual_seed(seed)
    return nets.create_encoder("unet", spatial_dims=2, in_channels=2, width=8, levels=6)


def dice_of(result, test):
    "Dice of the whole lesion and of its enhancing core."
    truth, found = test.stack().masks, torch.stack(list(result.predicted))
    return {"whole lesion": mean_dice(dice(truth.clamp(max=1), found.clamp(max=1), 2)),
            "enhancing core": mean_dice(dice((truth == 2).long(), (found == 2).long(), 2))}


def cell(row, seed, unlabelled, parts, device):
    "One pre-training and two fine-tunings."
    encoder, terms, common = encoder_of(seed), {}, {"seed": seed, **on(device)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a collapse is told by its score
        if ROWS[row] is not None:
            small = {} if ROWS[row].get("local") == 0 else {"local_size": 32}  # 96 of 224 in the official code
            method = ssl.create("pcrl_v2", encoder, **ROWS[row], **small)
            history = fit(method, unlabelled, **PRETRAINING, **common)
            last = PRETRAINING["steps"] // 10
            terms = {term: [sum(v[:last]) / last, sum(v[-last:]) / last] for term, v in history.terms.items()}
        segmented = finetune(encoder.cpu(), *parts, **SEGMENTING, **common)
        graded = finetune(encoder, *parts, **GRADING, **common)
    return {**dice_of(segmented, parts[2]), "grade of its size": graded.score, "terms": terms}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pcrl_ablation.json")
    args = parser.parse_args()
    unlabelled, parts = parts_for()
    setting = {"pretraining": PRETRAINING, "segmenting": SEGMENTING, "grading": GRADING, "cases": CASES, "rows": ROWS, "device": args.device}
    found = opened(args.out, setting, cells={})
    for seed in range(args.seeds):
        for row in args.rows:
            kept = found["cells"].setdefault(row, {})
            if str(seed) not in kept:
                kept[str(seed)] = cell(row, seed, unlabelled, parts, args.device)
                save(found, args.out)
                print(f"seed {seed}, {row}: " + ", ".join(f"{k} {v:.3f}" for k, v in kept[str(seed)].items() if k != "terms"), flush=True)


if __name__ == "__main__":
    main()
