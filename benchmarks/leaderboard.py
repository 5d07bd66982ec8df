#!/usr/bin/env python3
"""The leaderboard: every method by linear probe, nearest neighbours and fine-tuning, beside random weights and full supervision.

    python benchmarks/leaderboard.py [--boards cohort_2d cohort_3d chest_x_ray hippocampus] [--budget cpu|gpu] [--rows ...] [--seeds 3]

All rows of a board have the same images, the same time of pre-training (20 s of one core; on a GPU 300 s) and the same fine-tuning: so
many steps from each share of the labelled patients, a smaller share lying in each larger one. Validation patients choose the strength
of the probe and the step of the fine-tuning; test patients are scored once. `random` is the network without pre-training; methods that
need another network, or other modalities (see benchmarks/methods.py), have a `random` row of their own. `supervised` is the same network pre-trained for the same time
with the labels of all the images that the others see without.

- cohort_2d, cohort_3d: the built-in cohort; the width of the ventricles, 0 to 4; quadratic weighted kappa. In 3D the questions are asked of
  the middle 40³ of the 64³ voxels, where the ventricles lie: a quarter of the work.
- chest_x_ray: the radiographs of ../shared/data/chest_xray; three classes; balanced accuracy. Its classes come from different sources, so
  that a network can tell them by their borders: a measure of what transfers, not of diagnosis. It names no patients: an image is one.
- hippocampus: benchmarks/hippocampus.py with its own network and score (Dice).

Boards of data that is not there are left out, and said so. A cell is saved when it is finished, so a run that was killed goes on where it
stopped; encoders are kept in --weights. Results: benchmarks/results/leaderboard_<board>.json, with versions, machine and seeds. Boards may
run side by side, each has its file.
"""
import argparse
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from methods import BATCH, LR, MODALITIES, NETWORKS, PATIENTS, create, encoder_of, modalities_of, network_of, on, opened, parts_for, representation, save, spread, steps_within, training

from medssl_nb import ssl
from medssl_nb.data import ImageSet, folder
from medssl_nb.evaluate.protocols import METRICS, finetune, knn, linear_probe
from medssl_nb.tasks import Classifier
from medssl_nb.train.fit import fit
from medssl_nb.train.weights import load_encoder, save_encoder

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("MEDSSL_NB_DATA", HERE.parents[1] / "shared" / "data"))
BUDGETS = {"cpu": {"seconds": 20, "device": "cpu", "more": 1}, "gpu": {"seconds": 300, "device": "cuda", "more": 5}}  # more: times the steps of fine-tuning


@dataclass(frozen=True)
class Board:
    "What all rows of a board share."
    dims: int
    kind: str  # of the labels
    classes: int
    shares: tuple  # of the labelled patients
    tuning: dict  # options of finetune
    middle: int | None = None  # side of the cube that the questions are asked of; None: the whole images


BOARDS = {
    "cohort_2d": Board(2, "grades", 5, (0.05, 0.25, 1.0), {"steps": 100, "batch_size": 16, "evaluate_every": 25}),
    "cohort_3d": Board(3, "grades", 5, (0.1, 1.0), {"steps": 60, "batch_size": 8, "evaluate_every": 30}, middle=40),
    "chest_x_ray": Board(2, "classes", 3, (0.05, 0.25, 1.0), {"steps": 100, "batch_size": 16, "evaluate_every": 25}),
}


@lru_cache(maxsize=1)
def chest_x_rays():
    "The radiographs at the size of the cohort's slices, as pre-training images and the three parts of the probes."
    images = folder(DATA / "chest_xray", channels=1, progress=False)
    x = torch.cat([F.adaptive_avg_pool2d(images.subset([i]).stack().x, (48, 48)) for i in range(len(images))])
    small = ImageSet(x.numpy(), labels=images.labels, names=images.names, classes=images.classes)
    return small.split(PATIENTS[2][1], seed=0)


def middle_of(images, side):
    "The middle cube of each volume, with its label and its patient."
    x = images.stack().x
    start = (x.shape[-1] - side) // 2
    inner = slice(start, start + side)
    return ImageSet(x[:, :, inner, inner, inner].numpy(), labels=images.labels, groups=images.groups, names=images.names, classes=images.classes)


def parts(board, row):
    "Images without labels, and training, validation and test: with the modalities that the row's network sees."
    if board == "chest_x_ray":
        return chest_x_rays()
    dims, side = BOARDS[board].dims, BOARDS[board].middle
    unlabelled, *labelled = parts_for(random_rows(dims).get(row, row), dims)
    return [unlabelled, *(middle_of(part, side) if side else part for part in labelled)]


def start_of(method, dims):
    "The network that a method starts from, and how many modalities it sees if more than one: what its random row must share."
    seen = len(modalities_of(method)[1])
    return network_of(method, dims) + (f", {seen} modalities" if seen > 1 else "")


def random_rows(dims):
    "The rows without pre-training, each with the first of the methods that are compared with it."
    methods = [card.name for card in reversed(ssl.cards()) if dims in card.dims]
    rows = {f"random, {start_of(name, dims)}": name for name in methods}
    return {"random": rows.pop("random, resnet18"), **rows}


def rows_of(board):
    "Every row of a board: random weights, the methods, full supervision."
    dims = BOARDS[board].dims
    methods = [card.name for card in ssl.cards() if dims in card.dims and not (board == "chest_x_ray" and card.name in MODALITIES)]
    starts = [row for row, method in random_rows(dims).items() if method in methods]
    return [*starts, *methods, "supervised"]


def model_of(board, row, seed):
    "What is pre-trained, None for random weights; the encoder that is scored afterwards; and its network before (`start_of`)."
    shape, starts = BOARDS[board], random_rows(BOARDS[board].dims)
    if row in starts:
        return None, representation(create(starts[row], shape.dims, seed)[0]), start_of(starts[row], shape.dims)
    if row == "supervised":
        model = Classifier(encoder_of("resnet18", shape.dims, seed), shape.classes, shape.kind)
        return model, model.encoder, "resnet18"
    model = create(row, shape.dims, seed)[0]
    return model, representation(model), start_of(row, shape.dims)


def setting_of(board, row, network):
    "Batch, crop and learning rate of a pre-training."
    shape = BOARDS[board]
    plain = {"batch_size": BATCH[shape.dims], "size": None}
    return {**(plain if row == "supervised" else training(row, shape.dims)), "lr": LR.get(network, 3e-3)}


def pretrained(board, row, seed, budget, steps, weights):
    "The encoder of a row, pre-trained now or read from its file; its network; and the number of steps."
    model, encoder, network = model_of(board, row, seed)
    if model is None:
        return encoder, network, 0
    path, images = weights / f"{board}-{row}-{seed}.safetensors", parts(board, row)[0]
    if path.exists():
        _, card = load_encoder(path, into=model.encoder)
        return encoder, network, card["steps"]
    setting = setting_of(board, row, network)
    if row not in steps:
        steps[row] = steps_within(budget["seconds"], model_of(board, row, 0)[0], images, budget["device"], **setting)
    fit(model, images, steps=steps[row], seed=seed, **on(budget["device"]), **setting)
    save_encoder(model.cpu().encoder, path, board=board, method=row, steps=steps[row], seed=seed)
    return encoder, network, steps[row]


def tuned(board, encoder, labelled, seed, budget):
    "Fine-tuning from each share of the labelled patients: score, chosen step, and the decision on each test case."
    shape, found = BOARDS[board], {}
    options = {**shape.tuning, **{key: shape.tuning[key] * budget["more"] for key in ("steps", "evaluate_every")}}
    for share in shape.shares:
        part = labelled[0].fraction(share, seed)
        result = finetune(encoder, part, *labelled[1:], task="classification", kind=shape.kind, seed=seed, **on(budget["device"]), **options)
        found[f"{share:g}"] = {"score": result.score, "step": result.chosen, "decided": "".join(map(str, result.predicted.tolist()))}
    return found


def cell(board, row, seed, budget, steps, weights):
    "All scores of one row and seed."
    kind, labelled = BOARDS[board].kind, parts(board, row)[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a collapse, or a probe that does not converge, is told by its score
        encoder, network, done = pretrained(board, row, seed, budget, steps, weights)
        linear, near = linear_probe(encoder, *labelled, kind=kind, device=budget["device"]), knn(encoder, labelled[0], labelled[2], kind=kind, device=budget["device"])
        return {"network": network, "steps": done, "linear_probe": linear.score, "knn": near.score, "finetune": tuned(board, encoder, labelled, seed, budget)}


def board_file(path, board, budget):
    "What the board's file holds, or a new one, with the truth of the test cases beside the cells."
    shape, images = BOARDS[board], parts(board, "simclr")
    setting = {"board": board, "seconds": budget["seconds"], "device": budget["device"], "images": [len(p) for p in images], "shares": shape.shares,
               "tuning": {**shape.tuning, "more": budget["more"]}, "metric": METRICS[shape.kind], "middle": shape.middle, "batch": BATCH[shape.dims], "networks": NETWORKS}
    return opened(path, setting, truth="".join(map(str, images[3].labels.tolist())), steps={}, cells={})


def table(found):
    "The board as a Markdown table, random weights first, then by the fine-tuning from the fewest labels, full supervision last."
    shares = [f"{s:g}" for s in found["setting"]["shares"]]
    score = lambda row, share: [c["finetune"][share]["score"] for c in found["cells"][row].values()]
    mean = lambda row: sum(score(row, shares[0])) / len(score(row, shares[0]))
    order = sorted(found["cells"], key=lambda row: (row == "supervised", not row.startswith("random"), row != "random", -mean(row)))
    lines = [f"| {found['setting']['metric']} | steps | linear probe | kNN | " + " | ".join(f"{float(s):.0%} of the labels" for s in shares) + " |", "| --- " * (4 + len(shares)) + "|"]
    for row in order:
        cells = list(found["cells"][row].values())
        lines.append(f"| `{row}` | {cells[0]['steps']} | " + " | ".join([*(spread([c[w] for c in cells]) for w in ("linear_probe", "knn")), *(spread(score(row, s)) for s in shares)]) + " |")
    return "\n".join(lines)


def measure(board, rows, seeds, budget, path, weights):
    "All cells of a board, seed by seed, kept in the file at `path`."
    found = board_file(path, board, budget)
    for seed in map(str, range(seeds)):
        for row in rows:
            if seed not in found["cells"].get(row, {}):
                made = cell(board, row, int(seed), budget, found["steps"], weights)
                found["cells"].setdefault(row, {})[seed] = made
                save(found, path)
                print(f"{board}, {row}, seed {seed}: probe {made['linear_probe']:.3f}, fine-tuned " + ", ".join(f"{s} {d['score']:.3f}" for s, d in made["finetune"].items()), flush=True)
    print(f"\n{board}\n\n{table(found)}\n", flush=True)


def hippocampus(budget, seeds):
    "The board of real volumes has a script of its own."
    if not (DATA / "Task04_Hippocampus").is_dir():
        return print(f"hippocampus is left out: {DATA / 'Task04_Hippocampus'} is not there (MEDSSL_NB_DATA names another folder)")
    longer = ["--device", "cuda", "--seconds", "600", "--steps", "1000", "--spacing", "1", "--out", str(HERE / "results" / "methods_hippocampus_gpu.json")]
    subprocess.run([sys.executable, HERE / "hippocampus.py", "--seeds", *map(str, range(seeds)), *(longer if budget["device"] == "cuda" else ["--device", "cpu"])], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", nargs="+", default=[*BOARDS, "hippocampus"], choices=[*BOARDS, "hippocampus"])
    parser.add_argument("--rows", nargs="+", help="default: all of each board")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", default="cpu", choices=BUDGETS)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--weights", type=Path, default=HERE / "weights")
    args = parser.parse_args()
    args.weights.mkdir(exist_ok=True)
    budget, ending = BUDGETS[args.budget], "" if args.budget == "cpu" else f"_{args.budget}"
    for board in args.boards:
        if board == "hippocampus":
            hippocampus(budget, args.seeds)
        elif board == "chest_x_ray" and not (DATA / "chest_xray").is_dir():
            print(f"chest_x_ray is left out: {DATA / 'chest_xray'} is not there (MEDSSL_NB_DATA names another folder)")
        else:
            rows = [row for row in rows_of(board) if args.rows is None or row in args.rows]
            measure(board, rows, args.seeds, budget, args.out / f"leaderboard_{board}{ending}.json", args.weights)


if __name__ == "__main__":
    main()
