#!/usr/bin/env python3
"""Are the gradients of bf16 convolutions right on this CPU? Random shapes against float32, with free memory full of NaN.

    python benchmarks/bf16_convolutions.py [--dims 2 3] [--seconds 60] [--seed 0] [--small] [--out FILE]

Asked are the shapes that `fit` leaves in bf16. With --small also those that it keeps in float32: on CPUs with AVX-512 oneDNN 3.12 gives
wrong gradients of their weights, and may crash the process. Wrong is a relative error above 3 %; bf16 alone makes 0.2 %.
"""
import argparse
import json
import random
import time
from pathlib import Path

import torch
from methods import machine
from torch import nn

from medssl_nb.train.fit import _map_is_small

KINDS = {(2, False): nn.Conv2d, (3, False): nn.Conv3d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d}


def drawn(dims, rng):
    "A random convolution without bias, and the shape of a batch for it."
    kernel, channels = rng.choice([1, 2, 3, 3, 3, 4, 5, 7]), [rng.choice([1, 3, 8, 16, 32, 64]) for _ in range(2)]
    conv = KINDS[dims, rng.random() < 0.2](*channels, kernel, stride=rng.choice([1, 1, 2, 2, 4]), padding=rng.choice([0, kernel // 2]), bias=False)
    return conv, (rng.choice([1, 4, 16, 64]), channels[0], *(rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 9, 12]) for _ in range(dims)))


def poison():
    "Fill freed memory with NaN, so that what is read without having been written shows."
    held = [torch.full((n,), torch.nan) for n in (1000, 5000, 20000, 100000, 500000) for _ in range(3)]
    del held


def gradients(conv, x, bf16):
    "Gradients of the image and of the weights; the same gradient comes from above."
    conv.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = conv(x)
    poison()
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    return x.grad, conv.weight.grad


def error(conv, x):
    "The largest relative error of bf16 against float32, on numbers that bf16 can hold; of three tries the worst."
    exact = gradients(conv, x, bf16=False)
    tries = [gradients(conv, x, bf16=True) for _ in range(3)]
    found = [((a - b).norm() / b.norm().clamp_min(1e-12)).item() for t in tries for a, b in zip(t, exact)]
    return max(e if e == e else float("inf") for e in found)


def examined(dims, seconds, seed, small):
    "How many shapes were asked, and those that were wrong."
    rng, count, wrong, end = random.Random(seed), 0, [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        conv, shape = drawn(dims, rng)
        kept = _map_is_small(conv, shape[2:])
        fits = conv.transposed or all(n + 2 * p >= k for n, p, k in zip(shape[2:], conv.padding, conv.kernel_size))
        makes = not conv.transposed or all((n - 1) * s - 2 * p + k > 0 for n, s, p, k in zip(shape[2:], conv.stride, conv.padding, conv.kernel_size))
        if not fits or not makes or (kept and not small):
            continue
        conv.weight.data = conv.weight.data.bfloat16().float()
        count += 1
        if (found := error(conv, torch.randn(shape).bfloat16().float())) > 0.03:
            wrong.append({"convolution": str(conv), "batch": shape, "error": str(found), "kept in float32": kept})
    return {"shapes": count, "wrong": wrong}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 3], choices=[2, 3])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bf16_convolutions.json")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    found = {f"{dims}D": examined(dims, args.seconds, args.seed, args.small) for dims in args.dims}
    print("| | shapes | wrong in bf16 |\n| --- | --- | --- |")
    for name, row in found.items():
        print(f"| {name} | {row['shapes']} | {len(row['wrong'])} |")
    setting = {"seconds": args.seconds, "seed": args.seed, "small": args.small, "torch": torch.__version__, "threads": torch.get_num_threads(), "machine": machine("cpu")}
    args.out.write_text(json.dumps({"setting": setting, **found}, indent=1))


if __name__ == "__main__":
    main()
