#!/usr/bin/env python3
"""Views a second, beside MONAI and TorchIO, and the price of a recipe beside a training step.

    python benchmarks/views.py [--device cpu|cuda] [--batch 8] [--seconds 5] [--out views.json]

One run measures all on the same volumes and machine. The 3D pipeline is flip, affine, blur, noise, gamma, swap on
64 × 64 × 32 voxels, each applied to every view. Ours works on whole batches on the device; the others image by image in
as many worker processes as there are cores. MONAI has no patch swap, so its pipeline does without.
"""
import argparse
import json
import math
import os
import platform
import time
import warnings

import torch

from medssl_nb.views import corruption, geometry, intensity, recipes

SPACE = (64, 64, 32)


def ours(x, generator):
    "The pipeline on a batch."
    x, _ = geometry.random_flip(x, axes=(0,), generator=generator)
    x, _ = geometry.random_affine(x, degrees=10, scale=(0.9, 1.1), generator=generator)
    x, _ = intensity.random_blur(x, sigma=(0.0, 2.0), p=1.0, generator=generator)
    x, _ = intensity.random_noise(x, sigma=(0.0, 0.25), p=1.0, generator=generator)
    x, _ = intensity.random_gamma(x, log_gamma=0.3, generator=generator)
    return intensity.random_patch_swap(x, size=(8, 8, 4), count=100, generator=generator)[0]


def monai_pipeline():
    "The same in MONAI, without the swap, which it lacks."
    from monai import transforms as T

    turn = math.radians(10)
    return T.Compose([
        T.RandFlip(prob=0.5, spatial_axis=0),
        T.RandAffine(prob=1.0, rotate_range=(turn,) * 3, scale_range=(0.1,) * 3, padding_mode="border"),
        T.RandGaussianSmooth(prob=1.0, sigma_x=(0.01, 2), sigma_y=(0.01, 2), sigma_z=(0.01, 2)),
        T.RandGaussianNoise(prob=1.0, std=0.25),
        T.RandAdjustContrast(prob=1.0, gamma=(math.exp(-0.3), math.exp(0.3))),
        T.ToTensor(track_meta=False),
    ])


def torchio_pipeline():
    "The same in TorchIO."
    import torchio

    return torchio.Compose([
        torchio.RandomFlip(axes=0, flip_probability=0.5), torchio.RandomAffine(scales=0.1, degrees=10),
        torchio.RandomBlur(std=(0, 2)), torchio.RandomNoise(std=(0, 0.25)), torchio.RandomGamma(log_gamma=0.3),
        torchio.RandomSwap(patch_size=(8, 8, 4), num_iterations=100),
    ])


class Volumes(torch.utils.data.Dataset):
    "An endless data set of transformed volumes."

    def __init__(self, volumes, transform):
        self.volumes, self.transform = volumes, transform

    def __len__(self):
        return 10**6

    def __getitem__(self, i):
        return self.transform(self.volumes[i % len(self.volumes)])


def peer_rate(volumes, transform, batch, seconds):
    "Views a second of an image-by-image pipeline in as many workers as cores, once they run."
    warnings.filterwarnings("ignore")
    loader = torch.utils.data.DataLoader(Volumes(volumes, transform), batch_size=batch, num_workers=os.cpu_count())
    batches = iter(loader)
    for _ in range(2 * os.cpu_count()):
        next(batches)
    begin, made = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        made += len(next(batches))
    return made / (time.perf_counter() - begin)


def per_call(f, device, seconds, repeats=5):
    "Median seconds of a call, after a first one that does not count."
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    f(), wait()
    times, begin = [], time.perf_counter()
    while len(times) < repeats or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        f(), wait()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def step_share(x, device, seconds):
    "Seconds of one recipe view, and of a ResNet-18's forward and backward, on the same batch."
    from medssl_nb.nets.base import embed
    from medssl_nb.nets.resnet import resnet18

    encoder = resnet18(spatial_dims=x.ndim - 2, in_channels=1).to(device)
    generator = torch.Generator(device).manual_seed(0)
    view = per_call(lambda: recipes.augment(x, generator=generator), device, seconds)
    step = per_call(lambda: embed(encoder, x).square().mean().backward(), device, seconds)
    return view, step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="views at once (default: 8 on a CPU, 64 on a GPU)")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", default="views.json")
    o = parser.parse_args()
    o.batch = o.batch or (64 if o.device == "cuda" else 8)
    generator = torch.Generator(o.device).manual_seed(0)
    volumes = torch.randn(o.batch, 1, *SPACE, generator=torch.Generator().manual_seed(0))
    on_device = volumes.to(o.device)
    rates = {"medssl_nb": o.batch / per_call(lambda: ours(on_device, generator), o.device, o.seconds)}
    for name, pipeline in (("MONAI", monai_pipeline), ("TorchIO", torchio_pipeline)):
        try:
            rates[name] = peer_rate(volumes, pipeline(), 4, o.seconds)
        except ImportError:
            print(f"{name} is not installed: left out")
    shares, single = {}, {}
    for shape in ((64, 1, 64, 64), (8, 1, *SPACE)):
        view, step = step_share(torch.randn(shape, device=o.device), o.device, o.seconds / 2)
        shares["x".join(map(str, shape))] = {"view_s": view, "resnet18_step_s": step, "share": view / step}
    four = on_device[:4]
    single["local_shuffle, 4 volumes, p=1"] = per_call(lambda: corruption.random_local_shuffle(four, p=1.0, generator=generator), o.device, o.seconds / 2)
    single["paint, 4 volumes, p=1"] = per_call(lambda: corruption.random_paint(four, p=1.0, generator=generator), o.device, o.seconds / 2)

    device = torch.cuda.get_device_name() if o.device == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"\n3D views of 64 × 64 × 32 a second, on {device} (peers: {os.cpu_count()} workers)")
    for name, rate in rates.items():
        times = "" if name == "medssl_nb" else f"ours is {rates['medssl_nb'] / rate:.1f} times as fast"
        print(f"  {name:10s} {rate:10.1f}   {times}")
    print("\none recipe view beside a ResNet-18's forward and backward, same batch")
    for shape, s in shares.items():
        print(f"  {shape:14s} view {1e3 * s['view_s']:7.1f} ms   step {1e3 * s['resnet18_step_s']:8.1f} ms   {100 * s['share']:5.1f} %")
    print("\ncorruptions")
    for name, s in single.items():
        print(f"  {name:32s} {1e3 * s:7.1f} ms")
    machine = {"device": device, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
    with open(o.out, "w") as f:
        json.dump({"machine": machine, "views_per_second": rates, "recipe": shares, "corruption_s": single}, f, indent=1)
    print(f"\nwrote {o.out}")


if __name__ == "__main__":
    main()
