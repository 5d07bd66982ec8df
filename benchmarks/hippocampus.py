#!/usr/bin/env python3
"""Every 3D method on real volumes: pre-trained on unlabelled hippocampi, fine-tuned to segment them from 2, 5 and 10 labelled ones.

    python benchmarks/hippocampus.py [--data FOLDER] [--rows random models_genesis ...] [--seeds 0 1 2] [--seconds 10] [--steps 60]
                                     [--spacing 2] [--decoders] [--device cpu|cuda] [--out FILE]

All volumes are brought to voxels of --spacing mm (1, as they are, or 2) and to 48 × 64 × 48 mm about their centres. One network for
all: the U-Net's encoder (three levels from width 4, group norm: batches are of two). A method trains it for --seconds of one core (or of the GPU) on crops of
48 × 48 × 48 mm without labels; the number of steps is that over the time of a step, and stands in the file. Then a U-Net with that
encoder, and a new decoder, is fine-tuned for --steps steps of two volumes on 2, 5 and 10 labelled cases (each set holds the smaller
one); eight other cases choose the step, thirty are scored once: Dice a case of the whole hippocampus. With --decoders a method that trains
one hands on both in a second row, "... + decoder", in a U-Net with or without skips as it was trained. The row `random` starts as the others did
before their pre-training; `supervised` is pre-trained for the same time with the masks of all the volumes that the others see without.
The seeds change first weights, crops and the pre-training, not the split. Methods that need another network (masked tokens) or several
channels are left out. FOLDER is in the layout of the Medical Segmentation Decathlon (default: Task04_Hippocampus of ../shared/data or of
the folder that MEDSSL_NB_DATA names). Finished cells are kept.
"""
import argparse
import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from methods import IN_3D, MODALITIES, OPTIONS, WANTS, on, opened, save, steps_within
from networks import whole

from medssl_nb import nets, ssl
from medssl_nb.data import ImageSet, decathlon
from medssl_nb.evaluate.protocols import finetune
from medssl_nb.nets.unet import Decoder, UNet
from medssl_nb.tasks.segmentation import Segmenter
from medssl_nb.train.fit import fit
from medssl_nb.train.weights import transfer

EXTENT, CUBE = (48, 64, 48), (48, 48, 48)  # mm
CASES = {"labelled": 10, "validation": 8, "test": 30}
LABELLED = (2, 5, 10)
HERE = {"exemplar_cnn": {"classes": 222}}
ABLATION = {  # rows of PCRLv2's Table III that concern volumes
    "pcrl_v2, multi-crop": {"crops": "multi"},
    "pcrl_v2, restoration only": {"scales": 1, "local": 0, "comparison": None},
    "pcrl_v2, comparison only": {"scales": 1, "local": 0, "restoration": False},
    "pcrl_v2, skips": {"skips": True},
}


def rows_of():
    "What can be measured: row -> (method, options); `random` first, `supervised` last."
    names = [card.name for card in ssl.cards() if 3 in card.dims and not WANTS.get(card.name, "").startswith("vit") and card.name not in MODALITIES]
    options = {name: {**OPTIONS.get(name, {}), **IN_3D.get(name, {}), **HERE.get(name, {})} for name in names}
    rows = {name: (name, options[name]) for name in names}
    ablation = {row: ("pcrl_v2", {**options.get("pcrl_v2", {}), **more}) for row, more in ABLATION.items()}
    return {"random": (None, {}), **rows, **ablation, "supervised": ("supervised", {})}


def model_of(method, options, seed):
    "What is pre-trained: a method, or the whole segmentation network."
    if method == "supervised":
        return Segmenter(network_from(encoder_of(seed), None, seed), 2)
    return ssl.create(method, encoder_of(seed), **options)


def encoder_of(seed):
    "The same network for all, drawn by the seed."
    torch.manual_seed(seed)
    return nets.create_encoder("unet", spatial_dims=3, width=4, levels=3, norm="group")


def at_spacing(images, spacing):
    "The images, all of one extent, in voxels of so many mm: means of image and mask, and of the mask what is more than half."
    batch = images.stack(EXTENT)
    x, masks = (F.avg_pool3d(t.float(), spacing) for t in (batch.x, batch.masks[:, None]))
    return ImageSet(x.numpy(), masks=(masks[:, 0] > 0.5).long().numpy(), groups=images.groups, names=images.names, spacing=(float(spacing),) * 3,
                    regions=images.regions)


def parts_for(folder, spacing):
    "Volumes without labels (the labelled ones among them), and labelled, validation and test cases."
    images = at_spacing(whole(decathlon(folder.name, folder.parent, download=False)), spacing)
    counts = [*CASES.values(), len(images) - sum(CASES.values())]
    labelled, validation, test, rest = images.split(tuple(n / len(images) for n in counts), seed=0)
    return images.subset([*labelled.order, *rest.order]), labelled, validation, test


def network_from(encoder, decoder, seed):
    "A U-Net that starts from an encoder and, unless None, its decoder."
    start = encoder_of(seed)
    torch.manual_seed(1000 + seed)  # the new parts of all rows of a seed are alike
    network = UNet(start, 2, skips=decoder is None or decoder.skips, norm="group" if decoder is None else "batch")
    transfer(encoder, network.encoder)
    if decoder is not None:
        transfer(decoder, network.decoder)
    return network


def dice_of(network, parts, seed, steps, device):
    "Dice of the test cases after fine-tuning on each number of labelled cases."
    _, labelled, validation, test = parts
    found = {}
    for count in LABELLED:
        result = finetune(network, labelled.fraction(count), validation, test, steps=steps, batch_size=2, lr=5e-3, seed=seed,
                          evaluate_every=max(1, steps // 2), **on(device))
        found[str(count)] = {"dice": result.score, "step": result.chosen}
    return found


def measured(row, seed, parts, args, found):
    "The cells of a row: one, or a second with its decoder."
    method, options = rows_of()[row]
    score = lambda encoder, decoder=None: {"dice": dice_of(network_from(encoder, decoder, seed), parts, seed, args.steps, args.device)}
    if method is None:
        return {"random": score(encoder_of(seed))}
    setting = {"batch_size": 8, "size": tuple(n // args.spacing for n in CUBE), "lr": 3e-3}
    if row not in found["steps"]:
        found["steps"][row] = steps_within(args.seconds, model_of(method, options, seed), parts[0], args.device, **setting)
    model = model_of(method, options, seed)
    fit(model, parts[0], steps=found["steps"][row], seed=seed, **on(args.device), **setting)
    model.cpu()
    cells = {row: {"steps": found["steps"][row], **score(model.encoder)}}
    if args.decoders and isinstance(getattr(model, "decoder", None), Decoder) and row != "global_local":  # its decoder enlarges in another way
        cells[f"{row} + decoder"] = {"steps": found["steps"][row], **score(model.encoder, model.decoder)}
    return cells


def steps_of(cells):
    "The number of pre-training steps, or its range where the seeds were measured in several runs."
    counts = sorted({cell["steps"] for cell in cells.values() if "steps" in cell})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else ""


def table(found):
    "The results as a Markdown table, best with two labelled cases first."
    def shown(cells, count):
        dice = torch.tensor([cell["dice"][str(count)]["dice"] for cell in cells.values()])
        return f"{dice.mean():.3f}" + (f" ± {dice.std():.3f}" if len(dice) > 1 else "")

    order = sorted(found["cells"], key=lambda row: (row == "supervised", row != "random", -sum(c["dice"]["2"]["dice"] for c in found["cells"][row].values()) / len(found["cells"][row])))
    rows = ["| start | steps of pre-training | " + " | ".join(f"Dice, {n} cases" for n in LABELLED) + " |", "| --- " * (2 + len(LABELLED)) + "|"]
    for row in order:
        cells = found["cells"][row]
        rows.append(f"| `{row}` | {steps_of(cells)} | " + " | ".join(shown(cells, n) for n in LABELLED) + " |")
    return "\n".join(rows)


def main():
    here = Path(os.environ.get("MEDSSL_NB_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=here / "Task04_Hippocampus")
    parser.add_argument("--rows", nargs="+", default=list(rows_of()), choices=rows_of())
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--spacing", type=int, default=2, choices=[1, 2])
    parser.add_argument("--decoders", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "methods_hippocampus.json")
    args = parser.parse_args()
    if not args.data.is_dir():
        raise SystemExit(f"{args.data} is not there: give --data, a folder of the Medical Segmentation Decathlon")
    parts = parts_for(args.data, args.spacing)
    setting = {"data": args.data.name, "cases": [len(p) for p in parts], "labelled": LABELLED, "extent": EXTENT, "cube": CUBE,
               "spacing": args.spacing, "seconds": args.seconds, "steps": args.steps, "device": args.device}
    found = opened(args.out, setting, steps={}, cells={})
    for seed in map(str, args.seeds):
        for row in args.rows:
            if seed in found["cells"].get(row, {}):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a collapse is told by its score
                cells = measured(row, int(seed), parts, args, found)
            for name, cell in cells.items():
                found["cells"].setdefault(name, {})[seed] = cell
                print(f"{name}, seed {seed}: " + ", ".join(f"{n} cases {d['dice']:.3f}" for n, d in cell["dice"].items()), flush=True)
            save(found, args.out)
    print(table(found))


if __name__ == "__main__":
    main()
