#!/usr/bin/env python3
"""Every self-supervised method on the built-in cohort with the same budget: its pretext against chance, its encoder against a random one.

    python benchmarks/methods.py [--methods simclr byol ...] [--dims 2 3] [--seeds 3] [--seconds 20] [--device cpu|cuda] [--out FILE]

A training gets --seconds of time (the default makes 2 minutes a method on two CPU cores: 2D and 3D, three seeds); its number of
steps is that over the time of a step, and stands in the file. On a GPU give more: --device cuda --seconds 300.
2D: slices of 48 × 48; 3D: volumes of 64³. Linear probe and kNN grade the ventricles (0 to 4) of patients that no training has seen:
quadratic weighted kappa, 0 is chance. Probes choose their strength on validation patients. The random encoder of each network
is probed in the same way. Finished cells are kept: a run that was killed goes on where it stopped.
"""
import argparse
import copy
import json
import os
import platform
import time
import warnings
from pathlib import Path

import torch

from medssl_nb import nets, ssl
from medssl_nb.data import cohort
from medssl_nb.evaluate.protocols import knn, linear_probe
from medssl_nb.train.fit import fit

# The networks, and the methods that want another than the first: small patches need a small stem, masked tokens a ViT.
NETWORKS = {
    "resnet18": ("resnet18", {"width": 16}),
    "resnet18, small stem": ("resnet18", {"width": 16, "stem": "small"}),
    "resnet18, group norm": ("resnet18", {"width": 16, "norm": "group"}),
    "unet": ("unet", {"width": 8, "levels": 4}),
    "vit": ("vit", {"width": 96, "depth": 4, "patch": 8, "heads": 4}),
    "vit of pixels": ("vit", {"width": 48, "depth": 4, "patch": 1, "heads": 4}),
}
WANTS = {"relative_location": "resnet18, small stem", "cpc": "resnet18, group norm", "models_genesis": "unet", "mae": "vit", "image_gpt": "vit of pixels"}
# Heads and queues for hundreds of images, where the papers' are for a million; the chapters say why each is as it is.
OPTIONS = {
    "jigsaw": {"permutations": 20}, "exemplar_cnn": {"classes": 300},
    "mae": {"width": 64, "depth": 2, "heads": 4}, "context_encoder": {"width": 16}, "image_gpt": {"pool": 4},
    "moco_v1": {"queue": 64, "momentum": 0.99}, "moco_v2": {"queue": 64, "momentum": 0.99}, "cpc": {"dim": 64, "hidden": 64},
    "deepcluster": {"clusters": 30, "pca": 32, "refresh_every": 25}, "swav": {"prototypes": 30, "hidden": 128, "dim": 32, "epsilon": 0.02},
    "byol": {"hidden": 256, "dim": 64, "momentum": 0.99}, "simsiam": {"hidden": 256, "dim": 64},
    "dino": {"prototypes": 64, "hidden": 256, "bottleneck": 64, "teacher_temperature": 0.02},
    "barlow_twins": {"hidden": 256, "dim": 64}, "vicreg": {"hidden": 256, "dim": 64}, "wmse": {"hidden": 256, "dim": 16},
}
IN_3D = {"wmse": {"dim": 4, "shrinkage": 0.1}, "exemplar_cnn": {"classes": 120}}  # batches of eight, and fewer images
LR = {"vit": 1e-3, "vit of pixels": 1e-3}  # else 3e-3
SIZE = {2: 48, 3: 64}
BATCH = {2: 64, 3: 8}


def images_for(dims):
    "Pre-training images, and the three parts of the probes: no patient in two of them."
    images = cohort(600 if dims == 2 else 240, size=SIZE[dims], spatial_dims=dims, seed=0, progress=False)
    return images.split((0.5, 0.2, 0.1, 0.2), seed=0)


def encoder_of(network, dims, seed):
    "One of the networks, drawn by the seed."
    torch.manual_seed(seed)
    kind, options = NETWORKS[network]
    return nets.create_encoder(kind, spatial_dims=dims, **options)


def create(name, dims, seed):
    "The method around its network, drawn by the seed; and that network's name."
    network = WANTS.get(name, "resnet18")
    options = {**OPTIONS.get(name, {}), **(IN_3D.get(name, {}) if dims == 3 else {})}
    return ssl.create(name, encoder_of(network, dims, seed), **options), network


def probes(encoder, parts):
    "Linear probe and kNN on the frozen encoder."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a weak probe does not converge: its score says so
        linear = linear_probe(encoder, *parts, size=None, kind="grades")
        near = knn(encoder, parts[0], parts[2], kind="grades")
    return {"linear_probe": linear.score, "knn": near.score}


def steps_for(method, images, dims, seconds, device):
    "How many steps fit into the seconds, measured on a copy."
    trial = copy.deepcopy(method)
    fit(trial, images, steps=1, batch_size=BATCH[dims], device=device, progress=False)
    # Processor time on a CPU: what else runs on the machine must not shorten a training.
    clock = time.perf_counter if device.startswith("cuda") else lambda: time.process_time() / torch.get_num_threads()
    start = clock()
    fit(trial, images, steps=3, batch_size=BATCH[dims], device=device, progress=False)
    return max(5, int(seconds / ((clock() - start) / 3)))


def cell(name, dims, seed, parts, seconds, device):
    "One training and its probes."
    unlabelled, *labelled = parts
    method, network = create(name, dims, seed)
    steps = steps_for(method, unlabelled, dims, seconds, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = fit(method, unlabelled, steps=steps, batch_size=BATCH[dims], lr=LR.get(network, 3e-3), seed=seed, device=device, progress=False)
    window = max(1, steps // 20)
    terms = {term: [sum(v[:window]) / window, sum(v[-window:]) / window] for term, v in history.terms.items()}
    return {"network": network, "steps": steps, "terms": terms, "collapsed_at": history.collapsed_at, **probes(method.encoder.cpu(), labelled)}


def random_cell(network, dims, seed, parts):
    "The probes of an encoder that has learned nothing."
    return {"network": network, **probes(encoder_of(network, dims, seed), parts[1:])}


def save(found, path):
    "Written beside and renamed: a kill never leaves half a file."
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(found, indent=1))
    os.replace(beside, path)


def spread(values):
    "Mean ± standard deviation over the seeds."
    values = torch.tensor(values)
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


def table(found):
    "The results as a Markdown table: pretext before → after, probes beside those of the random encoder."
    rows = ["| method | family | dims | steps | pretext: start → end | linear probe | random | kNN | random |", "| --- " * 9 + "|"]
    for card in ssl.cards():
        for dims in card.dims:
            cells = found["cells"].get(f"{card.name} {dims}D", {}).values()
            if not cells:
                continue
            first = next(iter(cells))
            term = "accuracy" if "accuracy" in first["terms"] else "loss"
            start, end = (spread([c["terms"][term][i] for c in cells]) for i in (0, 1))
            base = found["cells"][f"random {first['network']} {dims}D"].values()
            scores = [spread([c[what] for c in group]) for what in ("linear_probe", "knn") for group in (cells, base)]
            rows.append(f"| `{card.name}` | {card.family} | {dims}D | {first['steps']} | {term} {start} → {end} | " + " | ".join(scores) + " |")
    return "\n".join(rows)


def main():
    names = [card.name for card in ssl.cards()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 3], choices=[2, 3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "methods.json")
    args = parser.parse_args()
    setting = {"seconds": args.seconds, "device": args.device, "size": {str(k): v for k, v in SIZE.items()}, "batch": {str(k): v for k, v in BATCH.items()},
               "torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.processor() or platform.machine()}
    found = json.loads(args.out.read_text()) if args.out.exists() else {"setting": setting, "cells": {}}
    if any(found["setting"][key] != setting[key] for key in ("seconds", "device", "size", "batch")):
        raise SystemExit(f"{args.out} holds another setting: give another --out, or remove it")
    families = {card.name: card for card in ssl.cards()}
    for dims in args.dims:
        parts = images_for(dims)
        for seed in range(args.seeds):
            for name in [n for n in args.methods if dims in families[n].dims]:
                row = found["cells"].setdefault(f"{name} {dims}D", {})
                if str(seed) not in row:
                    row[str(seed)] = cell(name, dims, seed, parts, args.seconds, args.device)
                base = found["cells"].setdefault(f"random {row[str(seed)]['network']} {dims}D", {})
                if str(seed) not in base:
                    base[str(seed)] = random_cell(row[str(seed)]["network"], dims, seed, parts)
                save(found, args.out)
                print(f"{name}, {dims}D, seed {seed}: {row[str(seed)]['linear_probe']:.3f} after {row[str(seed)]['steps']} steps "
                      f"(random {base[str(seed)]['linear_probe']:.3f})", flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
