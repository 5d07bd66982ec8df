#!/usr/bin/env python3
"""Generalist, specialist and hierarchical pre-training (Kalapos and Gyires-Tóth 2022), small: what should a segmentation's encoder have seen?

    python benchmarks/hierarchical.py [--seeds 5] [--budget small|long] [--device cpu|cuda] [--seconds 500] [--out FILE]

One network, a ResNet-18 of width 8 with a small stem, starts at random or from: crops of the photographs inside scikit-image (a dozen
pictures, the only natural images without a download; three channels, summed into one when the network goes on), by their labels or by
BYOL; the domain, slices of the built-in cohort without their labels, by BYOL; or the domain after the photographs. Each stage has the same
number of steps. So a hierarchical start has had two stages where a specialist had one: the row "domain, twice as long" has two, too.
Then a U-Net with a small new decoder learns the tissues, by Dice and cross-entropy, from 1 slice to all of them, the same steps for all, its step chosen on validation
slices, and is scored once on test slices: Jaccard a slice and tissue. The seed draws the first weights, the decoder and the subset of slices.
At last, the encoder of BYOL on photographs is handed on after 0, 1, 2, 4, 8 and 16 epochs of the domain. No patient is in two parts.
Finished cells are kept: a run that was killed goes on where it stopped, from the encoders in --weights. --seconds stops it after the cell that reaches them.
"""
import argparse
import copy
import math
import time
import warnings
from pathlib import Path

import torch
from methods import on, opened, save

from medssl_nb import nets, ssl
from medssl_nb.data import cohort
from medssl_nb.evaluate.metrics import dice, jaccard
from medssl_nb.evaluate.scaling import one_channel, photographs
from medssl_nb.nets.unet import UNet
from medssl_nb.tasks.classification import Classifier
from medssl_nb.tasks.segmentation import Segmenter
from medssl_nb.train.fit import fit
from medssl_nb.train.weights import load_encoder, save_encoder

# What an encoder has seen, stage by stage. The last of the labels is all slices.
STARTS = {
    "random": (),
    "photographs, supervised": ("supervised",),
    "photographs, BYOL": ("natural",),
    "domain": ("domain",),
    "photographs supervised, then domain": ("supervised", "domain"),
    "photographs BYOL, then domain": ("natural", "domain"),
    "domain, twice as long": ("domain", "domain"),
}
HIERARCHICAL = "photographs BYOL, then domain"
ONLY_ALL = ("photographs supervised, then domain", "domain, twice as long")  # from all slices alone: what they answer is asked there
EPOCHS = (1, 2, 4, 8)  # 0 and 16 are rows of the table
BUDGETS = {
    "small": {"slices": (400, 40, 100), "labels": (1, 3, 10, 30, 100, 400), "crops": 4000, "view": 32, "batch": 32, "epochs": 16,
              "steps": 200, "slices a step": 8, "lr": 1e-2},
    "long": {"slices": (1600, 200, 400), "labels": (1, 3, 10, 30, 100, 300, 1600), "crops": 16000, "view": 48, "batch": 128, "epochs": 16,
             "steps": 1000, "slices a step": 32, "lr": 3e-3},
}
SIZE = {"small": 48, "long": 64}
NETWORK = {"width": 8, "stem": "small", "norm": "group"}  # group norm: no running statistics that some starts bring and others have yet to find
DECODER = (16, 16, 8, 8)  # channels, coarse to fine
LOSS = "dice_cross_entropy"  # the Dice loss alone leaves one run in five with the air taken for a tissue, from whatever start


def encoder_of(seed, channels=1):
    "The network, drawn by the seed."
    torch.manual_seed(seed)
    return nets.create_encoder("resnet18", spatial_dims=2, in_channels=channels, **NETWORK)


def stage(kind, encoder, seed, images, budget, device, on_step=None):
    "One stage of pre-training, in place; its steps are those of all epochs of the domain, whatever the images."
    steps = budget["epochs"] * math.ceil(budget["slices"][0] / budget["batch"])
    if kind == "supervised":
        model = Classifier(encoder, len(images["natural"].classes))
    else:
        model = ssl.create("byol", encoder, hidden=128, dim=32, momentum=0.99, views={"size": (budget["view"],) * 2, "flip_axes": (1,)})
    fit(model, images["domain" if kind == "domain" else "natural"], steps=steps, batch_size=budget["batch"], lr=3e-3, seed=seed, on_step=on_step,
        **on(device))
    encoder.cpu()


def weights_of(weights, stages, seed, budget):
    "Where the encoder of these stages lies."
    return weights / f"hierarchical-{budget}-{'-'.join(stages)}-{seed}.safetensors"


def encoder_after(stages, seed, images, name, device, weights):
    "The encoder after these stages, from its file or trained now; of the hierarchical start the encoders of some epochs are kept as well."
    if not stages:
        return encoder_of(seed)
    path, budget = weights_of(weights, stages, seed, name), BUDGETS[name]
    if path.exists():
        return load_encoder(path, nets.create_encoder)[0]
    if stages[-1].isdigit():  # kept while the whole stage was trained
        raise SystemExit(f"{path} is missing: remove {weights_of(weights, stages[:-1], seed, name).name} beside it, and this stage is trained again")
    first = len(stages) == 1
    encoder = encoder_of(seed, 1 if stages == ("domain",) else 3) if first else encoder_after(stages[:-1], seed, images, name, device, weights)
    if encoder.in_channels == 3 and not first:
        encoder = one_channel(encoder)
    epoch = math.ceil(budget["slices"][0] / budget["batch"])

    def keep(step, model):
        if stages == STARTS[HIERARCHICAL] and step % epoch == 0 and step // epoch in EPOCHS:
            save_encoder(encoder, weights_of(weights, (*stages, str(step // epoch)), seed, name), epochs=step // epoch, seed=seed)

    stage(stages[-1], encoder, seed + 100 * len(stages), images, budget, device, keep)
    save_encoder(encoder, path, stages=list(stages), seed=seed)
    return encoder


@torch.no_grad()
def examined(model, batch):
    "Jaccard and Dice of a batch, a slice and tissue."
    training = model.training
    found = model.eval().predict(batch.x).argmax(1)
    model.train(training)
    return [score(batch.masks, found, model.classes).cpu() for score in (jaccard, dice)]


def segmented(encoder, images, count, seed, budget, device):
    "One fine-tuning from `count` labelled slices: the test's scores at the step that was best on validation, and the curve of validation."
    if encoder.in_channels == 3:
        encoder = one_channel(encoder)
    torch.manual_seed(1000 + seed)  # the same decoder for every start
    regions = len(images["domain"].regions)
    model = Segmenter(UNet(copy.deepcopy(encoder), regions, channels=DECODER, norm="group"), regions, loss=LOSS).to(device)
    validation, test = (images[part].stack(device=device) for part in ("validation", "test"))
    every = max(1, budget["steps"] // (10 if count == budget["labels"][-1] else 3))
    curve, best = [(0, float(examined(model, validation)[0].nanmean()))], {"score": -1}

    def look(step, model):
        if step % every and step != budget["steps"]:
            return
        curve.append((step, float(examined(model, validation)[0].nanmean())))
        if curve[-1][1] > best["score"]:
            best.update(score=curve[-1][1], step=step, state={k: v.clone() for k, v in model.state_dict().items()})

    fit(model, images["domain"].fraction(count, seed), steps=budget["steps"], batch_size=budget["slices a step"], lr=budget["lr"], seed=seed,
        on_step=look, **on(device))
    model.load_state_dict(best["state"])
    overlap, twice = examined(model, test)
    return {"jaccard": float(overlap.nanmean()), "dice": float(twice.nanmean()), "tissues": overlap.nanmean(0).tolist(), "chosen": best["step"],
            "curve": [[step, round(score, 5)] for step, score in curve]}


def images_for(name):
    "The slices of the domain, those of validation and test, and the photographs."
    budget = BUDGETS[name]
    n = sum(budget["slices"])
    people = cohort(n, size=SIZE[name], spatial_dims=2, seed=6, progress=False)
    parts = people.split(tuple(k / n for k in budget["slices"]), seed=0)
    return {**dict(zip(("domain", "validation", "test"), parts)), "natural": photographs(budget["crops"], budget["view"])}


def cells(seeds, name):
    "All cells, seed by seed: the seed, the row, the number of labelled slices."
    labels = BUDGETS[name]["labels"]
    for seed in map(str, range(seeds)):
        for start in STARTS:
            for count in labels[-1:] if start in ONLY_ALL else labels:
                yield seed, start, count
        for epochs in EPOCHS:
            yield seed, f"{epochs} epochs", labels[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", choices=BUDGETS, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "hierarchical.json")
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "weights")
    args = parser.parse_args()
    args.weights.mkdir(exist_ok=True)
    begin, budget = time.perf_counter(), BUDGETS[args.budget]
    setting = {**budget, "budget": args.budget, "size": SIZE[args.budget], "network": NETWORK, "decoder": DECODER, "loss": LOSS, "starts": STARTS, "device": args.device}
    found = opened(args.out, setting, seconds=0.0, cells={})
    images = images_for(args.budget)
    for seed, row, count in cells(args.seeds, args.budget):
        kept = found["cells"].setdefault(row, {}).setdefault(seed, {})
        if str(count) in kept:
            continue
        if time.perf_counter() - begin > args.seconds:
            return print("time is up: call again to go on")
        spent = time.process_time()
        stages = STARTS[row] if row in STARTS else (*STARTS[HIERARCHICAL], row.split()[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a collapse is told by its score
            encoder = encoder_after(stages, int(seed), images, args.budget, args.device, args.weights)
            kept[str(count)] = segmented(encoder, images, count, int(seed), budget, args.device)
        found["seconds"] = round(found["seconds"] + time.process_time() - spent, 1)  # of processors
        save(found, args.out)
        print(f"seed {seed}, {row}, {count} slices: Jaccard {kept[str(count)]['jaccard']:.3f}", flush=True)


if __name__ == "__main__":
    main()
