#!/usr/bin/env python3
"""What a method's step costs beside its network: views, pseudo-labels, losses, averages, the optimiser.

    python benchmarks/overhead.py [--methods simclr byol ...] [--dims 2 3] [--batch 32] [--steps 10] [--device cpu|cuda] [--out FILE]

Three times of one training, measured in turns so that a busy machine is unfair to none, medians over --steps rounds:
- encoder: the bare encoder, forward and backward, on as many images as the method shows it;
- network: the same with the heads, decoders and teachers that the paper prescribes (the method's forward and backward on
  views made before);
- step: all of it, from the images to the optimiser's step and the moving averages.
overhead = step / network; the heads are network / encoder.
"""
import argparse
import json
import time
from pathlib import Path

import torch

from methods import PATIENTS, create, machine, modalities_of
from medssl_nb import ssl
from medssl_nb.data import Batch, ImageSet

SPACE = {2: (64, 64), 3: (40, 40, 40)}


def timed(work, device):
    "Seconds of work on the device; on a CPU those of the process, so that what else runs on the machine does not count."
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    start = clock()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - start


def rounds(name, dims, batch, steps, device):
    "Median seconds of encoder, network and step."
    method, network = create(name, dims, 0)
    method.to(device).train()
    channels = len(modalities_of(name)[0])
    x = torch.randn(batch, channels, *SPACE[dims], device=device)
    generator = torch.Generator(device).manual_seed(0)
    if hasattr(method, "refresh"):
        method.refresh(ImageSet(torch.randn(int(PATIENTS[dims][0] * PATIENTS[dims][1][0]), channels, *SPACE[dims])))
    images = Batch(x, index=torch.arange(batch, device=device))  # as `fit` gives them: who they are is known
    pretext = method.pretext(images, generator)
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], fused=device.startswith("cuda"))

    def encoder_only():
        for view in pretext.views:
            if view.ndim == dims + 2 and view.shape[1] == method.encoder.in_channels:
                sum(m.float().mean() for m in method.encoder(view)).backward()
        method.zero_grad()

    def learn(pretext):
        if hasattr(method, "adversary"):
            method.adversary(pretext).backward()
        method(pretext)["loss"].backward()

    def whole_network():
        learn(pretext)
        method.zero_grad()

    def step():
        learn(method.pretext(images, generator))
        optimiser.step()
        optimiser.zero_grad()
        method.after_step(0.5)

    works = {"encoder": encoder_only, "network": whole_network, "step": step}
    seconds = {what: [] for what in works}
    for i in range(steps + 2):
        for what, work in works.items():
            seconds[what].append(timed(work, device))
    return {"model": network, **{what: sorted(values[2:])[steps // 2] for what, values in seconds.items()}}


def table(found):
    "The results as a Markdown table, and the median and worst overhead."
    rows = ["| method | network | encoder (ms) | with heads (ms) | step (ms) | heads | overhead |", "| --- " * 7 + "|"]
    for name, row in found.items():
        rows.append(f"| {name} | {row['model']} | {1e3 * row['encoder']:.0f} | {1e3 * row['network']:.0f} | {1e3 * row['step']:.0f} "
                    f"| {row['network'] / row['encoder']:.2f} | {row['step'] / row['network']:.2f} |")
    ratios = sorted(row["step"] / row["network"] for row in found.values())
    return "\n".join([*rows, f"\nmedian overhead {ratios[len(ratios) // 2]:.2f}, worst {ratios[-1]:.2f}"])


def main():
    names = [card.name for card in ssl.cards()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 3], choices=[2, 3])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overhead.json")
    args = parser.parse_args()
    known, found = {card.name: card for card in ssl.cards()}, {}
    for name in args.methods:
        for dims in [d for d in args.dims if d in known[name].dims]:
            found[f"{name} {dims}D"] = rounds(name, dims, args.batch, args.steps, args.device)
            print(f"{name} {dims}D: {found[f'{name} {dims}D']}", flush=True)
    args.out.write_text(json.dumps({"machine": machine(args.device), "device": args.device, "torch": torch.__version__,
                                    "batch": args.batch, "space": {str(k): v for k, v in SPACE.items()}, "rows": found}, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
