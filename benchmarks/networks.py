#!/usr/bin/env python3
"""Every segmentation network on the same task with the same budget: what it costs, and the Dice it reaches.

    python benchmarks/networks.py [--data FOLDER] [--steps 200] [--seeds 3] [--networks unet unetr ...] [--device cpu|cuda]
                                  [--lr 5e-3] [--batch 2] [--parameters 250000] [--parts] [--out FILE]

Each network is made as wide as brings it closest to --parameters, with instance norm where it takes a norm. 30 cases train,
8 choose the step (validation), 30 are scored once: Dice a case, foreground only. The seeds change the first weights and the
order of the batches, not the split. All regions count as one (the whole hippocampus); with --parts each is a class of its own.
FOLDER is in the layout of the Medical Segmentation Decathlon (default: Task04_Hippocampus of ../shared/data or of the folder
that MEDSSL_NB_DATA names). Finished cells are kept in the file: a run that was killed goes on where it stopped.
"""
import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from methods import on, opened, save

from medssl_nb import nets
from medssl_nb.data import ImageSet, decathlon
from medssl_nb.evaluate.protocols import finetune
from medssl_nb.nets.inspection import activation_bytes, count_parameters, create_near, multiply_adds, step_seconds

SIZE = (24, 40, 24)  # crop, and window of prediction
OPTIONS = {"unet": {"double_before_pool": False, "levels": 4}, "unetr": {"depth": 4}, "swin_unet": {"heads": 1}}
EVEN = {"s3d_unet"}  # networks whose width must be even


def recipe_of(name, classes, parameters):
    "The recipe of the network of this name that is closest to so many parameters; instance norm, since batches are small."
    options = {"out_channels": classes, **OPTIONS.get(name, {})}
    if "norm" in nets.create(name, spatial_dims=3, width=4, **options).recipe:
        options["norm"] = "instance"
    return create_near(name, parameters, spatial_dims=3, step=2 if name in EVEN else 1, **options).recipe


def whole(images):
    "The same images with all regions joined to one."
    masks = [(np.asarray(mask) > 0).astype(np.int64) for mask in images.masks]
    return ImageSet(images.images, masks=masks, groups=images.groups, names=images.names, spacing=images.spacing,
                    regions=["background", "hippocampus"])


def costs(recipe, batch, device):
    "What the network costs: counted, and the time of a step measured."
    network = nets.create(**recipe)
    seconds = step_seconds(network.to(device).train(), torch.randn(batch, 1, *SIZE, device=device))
    return {
        "parameters": count_parameters(network), "multiply_adds": multiply_adds(network, SIZE),
        "activation_bytes": activation_bytes(network, SIZE), "step_seconds": seconds,
    }


def train_and_score(recipe, parts, seed, steps, lr, batch, device):
    "One training: the mean Dice of the test cases, and each of them."
    torch.manual_seed(seed)
    result = finetune(nets.create(**recipe), *parts, steps=steps, batch_size=batch, size=SIZE, lr=lr, seed=seed,
                      evaluate_every=max(1, steps // 2), **on(device))
    return {"dice": result.score, "cases": [round(float(c), 4) for c in torch.as_tensor(result.cases).float().nanmean(-1)], "step": result.chosen,
            "curve": [[step, round(score, 4)] for step, score in result.curve]}


def table(found):
    "The results as a Markdown table."
    rows = ["| network | parameters | multiply-adds | kept for backward (MiB) | step (s) | Dice, mean ± sd of the seeds |", "| --- " * 6 + "|"]
    for name, row in found["networks"].items():
        dice = torch.tensor([cell["dice"] for cell in row["seeds"].values()])
        spread = f" ± {dice.std():.3f}" if len(dice) > 1 else ""
        rows.append(f"| `{name}` | {row['parameters'] / 1e6:.2f} M | {row['multiply_adds'] / 1e9:.2f} G | {row['activation_bytes'] / 2**20:.0f} "
                    f"| {row['step_seconds']:.2f} | {dice.mean():.3f}{spread} |")
    return "\n".join(rows)


def main():
    here = Path(os.environ.get("MEDSSL_NB_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    names = [card.name for card in nets.cards() if card.kind == "segmentation"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=here / "Task04_Hippocampus")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=names, choices=names)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--parameters", type=int, default=250_000)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.out = args.out or Path(__file__).parent / "results" / f"networks_hippocampus{'_parts' if args.parts else ''}.json"
    if not args.data.is_dir():
        raise SystemExit(f"{args.data} is not there: give --data, a folder of the Medical Segmentation Decathlon")
    images = decathlon(args.data.name, args.data.parent, download=False)
    images = images if args.parts else whole(images)
    train, validation, test, _ = images.split((30 / len(images), 8 / len(images), 30 / len(images), 1 - 68 / len(images)), seed=0)
    setting = {"data": args.data.name, "cases": [len(p) for p in (train, validation, test)], "regions": images.regions, "steps": args.steps,
               "lr": args.lr, "batch": args.batch, "size": SIZE, "target_parameters": args.parameters, "device": args.device}
    found = opened(args.out, setting, networks={})
    for seed in range(args.seeds):
        for name in args.networks:
            row = found["networks"].setdefault(name, {"recipe": recipe_of(name, len(images.regions), args.parameters), "seeds": {}})
            if str(seed) in row["seeds"]:
                continue
            start = time.perf_counter()
            row["seeds"][str(seed)] = train_and_score(row["recipe"], (train, validation, test), seed, args.steps, args.lr, args.batch, args.device)
            save(found, args.out)
            print(f"{name}, seed {seed}: Dice {row['seeds'][str(seed)]['dice']:.3f} in {time.perf_counter() - start:.0f} s", flush=True)
    for row in found["networks"].values():  # last, and in one go: nothing else of ours runs beside them
        row.update(costs(row["recipe"], args.batch, args.device))
    save(found, args.out)
    print(table(found))


if __name__ == "__main__":
    main()
