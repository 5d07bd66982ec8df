#!/usr/bin/env python3
"""Every self-supervised method on the built-in cohort with the same budget: its pretext against chance, its encoder against a random one.

    python benchmarks/methods.py [--methods simclr byol ...] [--dims 2 3] [--seeds 3] [--seconds 20] [--device cpu|cuda] [--out FOLDER]

A training gets --seconds of one core: 2D and 3D with three seeds make two minutes a method (`--dims 2` and `--dims 3` may run side
by side: each has its file). The number of steps is that over the time of a step, measured once a method; it stands in the file.
On a GPU give more: --device cuda --seconds 300.
2D: slices of 48 × 48; 3D: volumes of 64³, of which the methods that answer with an image take crops of 32³, as their papers do.
Linear probe and kNN grade the ventricles (0 to 4) of patients that no training has seen: quadratic weighted kappa, 0 is chance.
Probes choose their strength on validation patients. A gain is the score less that of the same encoder before its training.
Finished cells are kept: a run that was killed goes on where it stopped. Encoders are saved in --weights, for whoever asks more of them.
"""
import argparse
import json
import os
import platform
import time
import warnings
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch

from medssl_nb import nets, ssl
from medssl_nb.data import cohort
from medssl_nb.evaluate.protocols import knn, linear_probe
from medssl_nb.train.fit import fit
from medssl_nb.train.weights import save_encoder

# The networks, and the methods that want another than the first: small patches need a small stem, masked tokens a ViT.
NETWORKS = {
    "resnet18": ("resnet18", {"width": 16}),
    "resnet18, small stem": ("resnet18", {"width": 16, "stem": "small"}),
    "resnet18, group norm": ("resnet18", {"width": 16, "norm": "group"}),
    "unet": ("unet", {"width": 8, "levels": 4}),
    "vit": ("vit", {"width": 96, "depth": 4, "patch": 8, "heads": 4}),
    "vit of pixels": ("vit", {"width": 48, "depth": 4, "patch": 1, "heads": 4}),
}
WANTS = {"relative_location": "resnet18, small stem", "cpc": "resnet18, group norm", "cpc_pyramid": "resnet18, group norm",
         "patch_distance": "resnet18, small stem", "models_genesis": "unet", "transvw": "unet", "pgl": "unet",
         "mae": "vit", "image_gpt": "vit of pixels"}
# Heads and queues for hundreds of images, where the papers' are for a million; the chapters say why each is as it is.
OPTIONS = {
    "dcgan": {"levels": 3, "start": 6, "width": 16}, "vae": {"size": 48},
    "jigsaw": {"permutations": 20}, "rubik_cube": {"permutations": 20, "hidden": 128}, "rubik_cube_plus": {"permutations": 20, "hidden": 128},
    "rubik_cube_pp": {"grid": 2, "width": 8}, "exemplar_cnn": {"classes": 480},
    "mae": {"width": 64, "depth": 2, "heads": 4}, "context_encoder": {"width": 16}, "image_gpt": {"pool": 4},
    "moco_v1": {"queue": 64, "momentum": 0.99}, "moco_v2": {"queue": 64, "momentum": 0.99}, "cpc": {"dim": 64, "hidden": 64}, "cpc_pyramid": {"dim": 64, "hidden": 64},
    "patch_distance": {"patch": 0.33}, "pcrl_v1": {"queue": 64, "momentum": 0.99},
    "medaug": {"queue": 64, "momentum": 0.99}, "c2l": {"queue": 64, "momentum": 0.99}, "global_local": {"dim": 64},
    "deepcluster": {"clusters": 30, "pca": 32, "refresh_every": 25}, "swav": {"prototypes": 30, "hidden": 128, "dim": 32, "epsilon": 0.02},
    "pgl": {"hidden": 128, "dim": 64, "momentum": 0.99},
    "byol": {"hidden": 256, "dim": 64, "momentum": 0.99}, "simsiam": {"hidden": 256, "dim": 64},
    "dino": {"prototypes": 64, "hidden": 256, "bottleneck": 64, "teacher_temperature": 0.02},
    "transvw": {"words": 20, "instances": 100, "hidden": 64}, "colorization": {"width": 8},
    "barlow_twins": {"hidden": 256, "dim": 64}, "vicreg": {"hidden": 256, "dim": 64}, "wmse": {"hidden": 256, "dim": 16},
}
IN_3D = {  # batches of eight, fewer images, and a sequence of 8³ tokens
    "wmse": {"dim": 4, "shrinkage": 0.1}, "exemplar_cnn": {"classes": 168}, "image_gpt": {"pool": 8}, "dcgan": {"start": 8, "width": 8}, "vae": {"size": 32},
}
CROPPED = ("autoencoder", "denoising", "super_resolution", "low_light", "artefact", "context_encoder", "models_genesis", "latent_diffusion", "context_restoration",
           "colorization", "modality_restoration", "cross_modal", "transvw", "rubik_cube_pp", "pgl", "pcrl_v1", "pcrl_v2")
MODALITIES = {name: ("t1", "t2", "flair") for name in ("modality_restoration", "cross_modal", "colorization")}  # else T1 alone
LR = {"vit": 1e-3, "vit of pixels": 1e-3}  # else 3e-3
SIZE = {2: 48, 3: 64}
BATCH = {2: 64, 3: 8}
PATIENTS = {2: (1200, (0.4, 0.25, 0.1, 0.25)), 3: (480, (0.35, 0.25, 0.1, 0.3))}  # unlabelled, training, validation, test


def modalities_of(name):
    "The modalities of a method's images, and those that its encoder sees."
    given = MODALITIES.get(name, ("t1",))
    return given, given[:-1] if name == "cross_modal" else given


@lru_cache(maxsize=4)
def images_for(dims, modalities=("t1",)):
    "Pre-training images, and the three parts of the probes: no patient in two of them, the same patients whatever the modalities."
    count, shares = PATIENTS[dims]
    return cohort(count, size=SIZE[dims], spatial_dims=dims, seed=0, modalities=modalities, progress=False).split(shares, seed=0)


def parts_for(name, dims):
    "Pre-training images of a method, and the three parts of the probes with the modalities that its encoder sees."
    given, seen = modalities_of(name)
    return [images_for(dims, given)[0], *images_for(dims, seen)[1:]]


def encoder_of(network, dims, seed, channels=1):
    "One of the networks, drawn by the seed."
    torch.manual_seed(seed)
    kind, options = NETWORKS[network]
    return nets.create_encoder(kind, spatial_dims=dims, in_channels=channels, **options)


def network_of(name, dims):
    "The name of the network that a method gets."
    return "resnet18" if dims == 3 and name in ("relative_location", "patch_distance") else WANTS.get(name, "resnet18")  # patches of 64³ are large enough


def create(name, dims, seed):
    "The method around its network, drawn by the seed; and that network's name."
    network = network_of(name, dims)
    options = {**OPTIONS.get(name, {}), **(IN_3D.get(name, {}) if dims == 3 else {})}
    return ssl.create(name, encoder_of(network, dims, seed, len(modalities_of(name)[1])), **options), network


def representation(method):
    "What is probed: the encoder, or where a method says so its own features."
    return method.features() if hasattr(method, "features") else method.encoder


def training(name, dims):
    "Batch size and size of the crops, None for whole images."
    cropped = dims == 3 and name in CROPPED
    return {"batch_size": BATCH[dims] * (2 if cropped else 1), "size": (32,) * 3 if cropped else None}


def probes(encoder, parts):
    "Linear probe and kNN on the frozen encoder."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a weak probe does not converge: its score says so
        linear = linear_probe(encoder, *parts, size=None, kind="grades")
        near = knn(encoder, parts[0], parts[2], kind="grades")
    return {"linear_probe": linear.score, "knn": near.score}


def on(device):
    "Options of every training: where, in which precision, without a bar. On a CPU float32, whatever it could do faster: a table begun on one can be finished on another."
    return {"device": device, "precision": "auto" if device.startswith("cuda") else "fp32", "progress": False}


def steps_within(seconds, method, images, device, **setting):
    "How many steps of a training fit into the seconds; the first, slow one is taken by the way."
    setting = {**setting, **on(device)}
    fit(method, images, steps=1, **setting)
    # Processor time on a CPU: what else runs on the machine must not shorten a training.
    clock = time.perf_counter if device.startswith("cuda") else lambda: time.process_time() / torch.get_num_threads()
    start = clock()
    fit(method, images, steps=3, **setting)
    return max(5, int(seconds / ((clock() - start) / 3)))


def steps_for(name, images, dims, seconds, device):
    "How many steps of the method fit into the seconds."
    return steps_within(seconds, create(name, dims, 0)[0], images, device, **training(name, dims))


def cell(name, dims, seed, parts, steps, device, untrained, weights):
    "One training, and the probes before and after it; those before are kept in `untrained`, since many methods share an encoder."
    unlabelled, *labelled = parts
    method, network = create(name, dims, seed)
    start = network, method.encoder.in_channels, seed
    if start not in untrained:
        untrained[start] = probes(representation(method), labelled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = fit(method, unlabelled, steps=steps, lr=LR.get(network, 3e-3), seed=seed, **on(device), **training(name, dims))
    window = max(1, steps // 20)
    terms = {term: [sum(v[:window]) / window, sum(v[-window:]) / window] for term, v in history.terms.items()}
    health = {what: values[-1] for what, values in history.health.items() if what != "step"}
    save_encoder(method.cpu().encoder, weights / f"cohort_{dims}d-{name}-{seed}.safetensors", method=name, steps=steps, seed=seed)
    return {"network": network, "steps": steps, "terms": terms, "collapsed_at": history.collapsed_at, "health": health,
            "random": untrained[start], **probes(representation(method), labelled)}


def machine(device):
    "The name of the GPU, or of the processor and what it computes with."
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    told = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in told if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {torch.backends.cpu.get_cpu_capability()}"


def opened(path, setting, **empty):
    "What a benchmark's file holds, or a new one with the setting, versions and machine; SystemExit if it was made under another setting."
    setting = json.loads(json.dumps(setting))  # as a file has it
    if not path.exists():
        made_with = {"torch": torch.__version__, "medssl_nb": version("medssl_nb"), "threads": torch.get_num_threads(), "machine": machine(str(setting.get("device")))}
        return {"setting": {**setting, **made_with}, **empty}
    found = json.loads(path.read_text())
    if differ := [key for key in setting if found["setting"].get(key) != setting[key]]:
        raise SystemExit(f"{path} was made with another {', '.join(differ)}: give another --out, or remove it")
    return found


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
    "The results of one file as a Markdown table: pretext before → after, probes before → after, and the gain of each seed."
    rows = ["| method | family | steps | pretext: start → end | linear probe: random → trained | gain | kNN: random → trained | gain |", "| --- " * 8 + "|"]
    for card in ssl.cards():
        cells = list(found["cells"].get(card.name, {}).values())
        if not cells:
            continue
        term = "accuracy" if "accuracy" in cells[0]["terms"] else "loss"
        shown = [term + " " + " → ".join(spread([c["terms"][term][i] for c in cells]) for i in (0, 1))]
        for what in ("linear_probe", "knn"):
            before, after = [c["random"][what] for c in cells], [c[what] for c in cells]
            shown += [f"{spread(before)} → {spread(after)}", spread([b - a for a, b in zip(before, after)])]
        rows.append(f"| `{card.name}` | {card.family} | {cells[0]['steps']} | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def measure(dims, names, seeds, seconds, device, path, weights):
    "All cells of one dimension, seed by seed, kept in the file at `path`; returns what the file holds."
    setting = {"dims": dims, "seconds": seconds, "device": device, "size": SIZE[dims], "batch": BATCH[dims], "patients": PATIENTS[dims][0]}
    found = opened(path, setting, steps={}, cells={})
    untrained = {}
    for seed in map(str, range(seeds)):
        for name in names:
            row = found["cells"].setdefault(name, {})
            if seed in row:
                continue
            if name not in found["steps"]:
                found["steps"][name] = steps_for(name, parts_for(name, dims)[0], dims, seconds, device)
            row[seed] = cell(name, dims, int(seed), parts_for(name, dims), found["steps"][name], device, untrained, weights)
            save(found, path)
            print(f"{name}, {dims}D, seed {seed}: {row[seed]['random']['linear_probe']:.3f} → {row[seed]['linear_probe']:.3f} "
                  f"after {row[seed]['steps']} steps", flush=True)
    return found


def main():
    known = {card.name: card for card in ssl.cards()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(known), choices=known)
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 3], choices=[2, 3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "weights")
    args = parser.parse_args()
    args.weights.mkdir(exist_ok=True)
    for dims in args.dims:
        names = [name for name in args.methods if dims in known[name].dims]
        found = measure(dims, names, args.seeds, args.seconds, args.device, args.out / f"methods_{dims}d.json", args.weights)
        print(f"\n{dims}D\n\n{table(found)}\n", flush=True)


if __name__ == "__main__":
    main()
