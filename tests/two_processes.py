"One of two gloo processes: two_processes.py RANK FILE; the first prints how far each method's joined gradient is from one process's."
import json
import sys

import torch
import torch.distributed as dist

from medssl_nb.ssl.base import Pretext, cards
from medssl_nb.train.distributed import join_batchnorm
from small_methods import channels_of, method_of


def part(pretext, rank):
    cut = lambda t: None if t is None else t.chunk(2)[rank]
    return Pretext(tuple(cut(v.double()) for v in pretext.views), cut(pretext.target))


def gradients(method, pretext, world):
    method.zero_grad()
    with join_batchnorm(method, world):
        loss = method(pretext)["loss"]
        loss.backward()
    return [loss.detach(), *(p.grad for p in method.parameters() if p.grad is not None)]


rank, found = int(sys.argv[1]), {}
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
alone = [dist.new_group([r]) for r in (0, 1)]
for card in cards():
    for d in card.dims:
        method = method_of(card.name, d).double()
        x = torch.randn(8, channels_of(card.name), *[16] * d, generator=torch.Generator().manual_seed(1))
        pretext = method.float().pretext(x, torch.Generator().manual_seed(2))
        method.double()
        joined = gradients(method, part(pretext, rank), 2)
        for g in joined:
            dist.all_reduce(g)
            g /= 2
        found[f"{card.name} {d}D"] = joined
dist.barrier()
dist.destroy_process_group()
if rank == 0:
    for card in cards():
        for d in card.dims:
            method = method_of(card.name, d).double()
            x = torch.randn(8, channels_of(card.name), *[16] * d, generator=torch.Generator().manual_seed(1))
            pretext = method.float().pretext(x, torch.Generator().manual_seed(2))
            whole = method.double() and Pretext(tuple(v.double() for v in pretext.views), pretext.target)
            one, key = gradients(method, whole, 1), f"{card.name} {d}D"
            found[key] = max(((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item() for a, b in zip(found[key], one))
    print(json.dumps(found))
