#!/usr/bin/env python3
"""The most memory that one step of a method takes: views, loss and gradients, at the finest scale where a method draws one.

    python benchmarks/memory.py [--method pcrl_v2] [--encoders resnet18 "unet 16" "unet 16, recompute" ...] [--size 64 64 32] [--batch 8] [--device cpu|cuda]

An encoder is its name and, if they follow, its width and an option of the method to be switched on. Each runs in a process of its own, so that the peak is its own; on a CPU it holds the
process with PyTorch in it (0.3 GB), on a GPU what PyTorch has allocated. Prints a table and writes benchmarks/results/memory.json.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from medssl_nb import nets, ssl


def step(encoder, method, size, batch, device):
    "One step, and the peak in GB after the views, the loss and the gradients."
    encoder, *options = encoder.split(", ")
    name, *width = encoder.split()
    torch.manual_seed(0)
    model = ssl.create(method, nets.create_encoder(name, spatial_dims=len(size), **({"width": int(width[0])} if width else {})), **dict.fromkeys(options, True)).to(device)
    if hasattr(model, "levels"):
        model.scale_at = lambda step: (model.levels[-1],) * 3
    x = torch.randn(batch, 1, *size, device=device)
    peak = lambda: torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found, start = {}, time.process_time()
    with torch.no_grad():
        pretext = model.pretext(x, torch.Generator(device).manual_seed(0))
    found["views"] = round(peak(), 2)
    loss = model(pretext)["loss"]
    found["loss"] = round(peak(), 2)
    loss.backward()
    return {**found, "gradients": round(peak(), 2), "seconds": round(time.process_time() - start, 1), "parameters": sum(p.numel() for p in model.encoder.parameters())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="pcrl_v2")
    parser.add_argument("--encoders", nargs="+", default=["resnet18", "unet 16", "unet 16, recompute", "unet 32", "unet 32, recompute"])
    parser.add_argument("--size", nargs="+", type=int, default=[64, 64, 32])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--here", action="store_true", help="measure the one encoder in this process, and print JSON")
    args = parser.parse_args()
    setting = {"method": args.method, "size": args.size, "batch": args.batch, "device": args.device}
    if args.here:
        return print(json.dumps(step(args.encoders[0], **setting)))
    rows = {}
    for encoder in args.encoders:
        command = [sys.executable, __file__, "--here", "--method", args.method, "--encoders", encoder, "--size", *map(str, args.size),
                   "--batch", str(args.batch), "--device", args.device]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{encoder}: {done.stderr.strip().splitlines()[-1]}")
        rows[encoder] = json.loads(done.stdout.splitlines()[-1])
    (Path(__file__).parent / "results" / "memory.json").write_text(json.dumps({"setting": {**setting, "torch": torch.__version__}, "encoders": rows}, indent=1))
    print("| encoder | parameters | views | + loss | + gradients (GB) |\n" + "| --- " * 5 + "|")
    for encoder, row in rows.items():
        print(f"| {encoder} | {row['parameters'] / 1e6:.2f} M | {row['views']} | {row['loss']} | {row['gradients']} |")


if __name__ == "__main__":
    main()
