"A run for the tests to kill: killed_run.py OUT [CHECKPOINT] [quiet] [opposed]; prints each step."
import sys

import torch
from torch import nn

from medssl_nb.data.images import ImageSet
from medssl_nb.train.fit import fit, save_whole


class Noisy(nn.Module):
    "Batch norm, noise in the views, dropout: everything that remembers or draws. Quiet: only what two processes can share."

    def __init__(self, quiet):
        super().__init__()
        torch.manual_seed(0)
        self.quiet = quiet
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.0 if quiet else 0.2))
        self.head = nn.Linear(4, 1)
        self.register_buffer("average", torch.zeros(4, 1, 3, 3))

    def pretext(self, batch, generator):
        noise = 0 if self.quiet else torch.randn(batch.x.shape, generator=generator)
        return batch.x + noise, batch.x.std((1, 2, 3))

    def forward(self, pretext):
        return {"loss": (self.head(self.body(pretext[0]).mean((2, 3)))[:, 0] - pretext[1]).square().mean()}

    def after_step(self, progress):
        self.average.lerp_(self.body[0].weight.detach(), 0.1)


class Opposed(Noisy):
    "Has an opponent, who guesses the same from the same maps, and whose error the model raises."

    def __init__(self, quiet):
        super().__init__(quiet)
        self.opponent = nn.Linear(4, 1)

    def adversary_parameters(self):
        return self.opponent.parameters()

    def error(self, pretext, weight, bias):
        maps = self.body(pretext[0]).mean((2, 3))
        return (nn.functional.linear(maps, weight, bias)[:, 0] - pretext[1]).square().mean()

    def adversary(self, pretext):
        return self.error(pretext, self.opponent.weight, self.opponent.bias)

    def forward(self, pretext):
        own = super().forward(pretext)["loss"]
        return {"loss": own - 0.1 * self.error(pretext, self.opponent.weight.detach(), self.opponent.bias.detach())}


out, checkpoint, quiet = sys.argv[1], (sys.argv[2:] or [None])[0] or None, "quiet" in sys.argv
images = ImageSet(torch.randn(12, 1, 12, 12, generator=torch.Generator().manual_seed(0)))
model = (Opposed if "opposed" in sys.argv else Noisy)(quiet)
on_step = None if quiet else lambda step, model: print(step, flush=True)
fit(model, images, steps=40, batch_size=4, size=None if quiet else 8, lr=1e-2, device="cpu", precision="fp32", checkpoint=checkpoint, checkpoint_every=3, progress=False, on_step=on_step)
save_whole(model.state_dict(), {}, out)
