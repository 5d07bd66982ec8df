"Training: exact resume, checkpoints, precision, transfer of weights, several processes."
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from medssl_nb.data.images import ImageSet
from medssl_nb.nets.base import create_encoder
from medssl_nb.train.fit import choose_device, choose_precision, fit, load_whole, make_optimiser, rate_at, save_whole, seed_of, small_maps_in_float32
from medssl_nb.train.health import CollapseWarning, alignment, diagnosis, effective_rank, health, spread, uniformity
from medssl_nb.train.weights import change_channels, inflate, load_encoder, save_encoder, transfer

HERE = Path(__file__).parent
RUN = dict(batch_size=4, lr=1e-2, device="cpu", precision="fp32", progress=False)


class Mean(nn.Module):
    "Predict each image's mean; noise in the views, dropout in the network."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder_ = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(4, 1)

    def encoder(self, x):
        return [self.encoder_(x)]

    def pretext(self, batch, generator):
        noise = torch.randn(batch.x.shape, generator=generator)
        return SimpleNamespace(views=(batch.x + noise,), target=batch.x.mean((1, 2, 3)))

    def forward(self, pretext):
        z = self.encoder(pretext.views[0])[-1].mean((2, 3))
        return {"loss": (self.head(z)[:, 0] - pretext.target).square().mean()}


@pytest.fixture
def images():
    return ImageSet(torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_a_seed_fixes_everything_and_leaves_the_caller_alone(images):
    a, b, c = Mean(), Mean(), Mean()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(a, images, steps=6, **RUN)
    assert torch.equal(torch.rand(3), expected), "fit moved the caller's random numbers"
    torch.manual_seed(99)
    fit(b, images, steps=6, **RUN)
    fit(c, images, steps=6, seed=1, **RUN)
    assert same(a, b) and not same(a, c)


def test_sigkill_and_resume_ends_with_the_same_weights(tmp_path):
    "A real process, killed with SIGKILL at a random step, goes on to the same weights, bit for bit."
    def start(out, *more):
        return subprocess.Popen([sys.executable, HERE / "killed_run.py", out, *more], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    whole = start(tmp_path / "whole")
    victim = start(tmp_path / "victim", str(tmp_path / "run.safetensors"))
    stop = random.SystemRandom().randint(5, 35)
    for line in victim.stdout:
        if int(line) >= stop:
            victim.send_signal(signal.SIGKILL)
            break
    victim.wait()
    assert victim.returncode == -signal.SIGKILL and not (tmp_path / "victim").exists()
    again = start(tmp_path / "victim", str(tmp_path / "run.safetensors"))
    steps = [int(line) for line in again.stdout]
    assert again.wait() == 0 and (whole.communicate(), whole.returncode)[1] == 0
    assert 1 < steps[0] <= stop + 1 + 3, f"killed at {stop}, went on at {steps[0]}"
    a, b = (load_whole(tmp_path / name)[0] for name in ("whole", "victim"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), f"killed at {stop}"


def test_checkpoint_of_another_run_is_refused(images, tmp_path):
    path = tmp_path / "run.safetensors"
    fit(Mean(), images, steps=3, checkpoint=path, **RUN)
    with pytest.raises(ValueError, match="lr=0.01 there, 0.02 here"):
        fit(Mean(), images, steps=3, checkpoint=path, **{**RUN, "lr": 0.02})
    other = Mean()
    other.head = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="another model"):
        fit(other, images, steps=3, checkpoint=path, **RUN)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        fit(Mean(), images, steps=3, checkpoint=path, **RUN)


def test_finished_run_is_not_trained_again(images, tmp_path):
    first = fit(Mean(), images, steps=3, checkpoint=tmp_path / "run.safetensors", **RUN)
    model = Mean()
    again = fit(model, images, steps=3, checkpoint=tmp_path / "run.safetensors", on_step=lambda *_: pytest.fail("a step"), **RUN)
    assert again.terms == first.terms and not same(model, Mean())


def test_nan_is_named_with_its_step(images):
    class Broken(Mean):
        def forward(self, pretext):
            return {"loss": super().forward(pretext)["loss"] * float("nan")}

    with pytest.raises(FloatingPointError, match="step 1; lower lr"):
        fit(Broken(), images, steps=3, **RUN)


def test_collapse_is_warned_of_once(images):
    class Constant(Mean):
        def encoder(self, x):
            return [super().encoder(x)[-1] * 0 + self.head.weight.view(1, 4, 1, 1)]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = fit(Constant(), images, steps=4, **RUN)
    assert [w.category for w in caught] == [CollapseWarning] and history.collapsed_at == 1


def test_refresh_adversary_and_after_step_are_called(images):
    called = []

    class Full(Mean):
        refresh_every = 3

        def __init__(self):
            super().__init__()
            self.foe = nn.Parameter(torch.ones(1))

        def adversary_parameters(self):
            return [self.foe]

        def adversary(self, pretext):
            called.append("adversary")
            return self.foe.square().sum()

        def refresh(self, images):
            called.append(f"refresh {len(images)}")

        def after_step(self, progress):
            called.append(progress)

    model = Full()
    fit(model, images, steps=4, **RUN)
    assert called == ["refresh 10", "adversary", 0.25, "adversary", 0.5, "adversary", 0.75, "refresh 10", "adversary", 1.0]
    assert model.foe.item() < 1


def test_bf16_trains(images):
    history = fit(Mean(), images, steps=3, **{**RUN, "precision": "bf16"})
    assert all(torch.isfinite(torch.tensor(history.terms["loss"])))


class Watched:
    "A convolution that notes whether autocast was on."

    def forward(self, x):
        self.__dict__.setdefault("seen", set()).add(torch.is_autocast_enabled("cpu"))
        return super().forward(x)


class WatchedConv(Watched, nn.Conv3d):
    pass


class WatchedTransposed(Watched, nn.ConvTranspose3d):
    pass


@pytest.mark.parametrize("space, lowered", [((2, 2, 2), False), ((3, 8, 8), False), ((4, 4, 4), True), ((8, 8, 8), True)])
def test_small_maps_do_without_autocast(space, lowered):
    torch.manual_seed(0)
    conv, x = WatchedConv(4, 16, 3, padding=1), torch.randn(4, 4, *space)
    with small_maps_in_float32(conv), torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
    out.square().mean().backward()
    assert conv.seen == {lowered} and out.dtype == torch.bfloat16
    gradient, conv.weight.grad = conv.weight.grad, None
    conv(x).square().mean().backward()
    assert (gradient - conv.weight.grad).norm() < 0.01 * conv.weight.grad.norm()


def test_small_maps_leave_the_model_as_it_was():
    conv = WatchedConv(1, 2, 3, padding=1)
    with pytest.raises(RuntimeError), small_maps_in_float32(conv), torch.autocast("cpu", torch.bfloat16):
        conv(torch.zeros(1, 2, 2, 2, 2))  # two channels where it wants one
    with torch.autocast("cpu", torch.bfloat16):
        conv(torch.zeros(1, 1, 2, 2, 2))
    assert conv.seen == {False, True}
    with small_maps_in_float32(conv):
        assert conv(torch.zeros(1, 1, 2, 2, 2)).dtype == torch.float32
    assert "forward" not in vars(conv)


def test_a_training_inside_another_leaves_the_outer_one_guarded():
    conv = WatchedConv(1, 2, 3, padding=1)
    with small_maps_in_float32(conv), torch.autocast("cpu", torch.bfloat16):
        with small_maps_in_float32(conv):
            pass
        conv(torch.zeros(1, 1, 2, 2, 2))
    assert conv.seen == {False} and "forward" not in vars(conv)


@pytest.mark.parametrize("n, lowered", [(1, False), (2, True), (3, True)])
def test_a_transposed_convolution_is_asked_for_the_map_it_makes(n, lowered):
    conv = WatchedTransposed(2, 4, 2, stride=2)
    with small_maps_in_float32(conv), torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.zeros(1, 2, n, n, n)).shape[2:] == (2 * n,) * 3
    assert conv.seen == {lowered}


def test_fit_keeps_small_maps_in_float32():
    class Shrinking(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.deep = WatchedConv(1, 4, 3, padding=1), WatchedConv(4, 4, 3, padding=1)

        def pretext(self, batch, generator):
            return batch.x

        def forward(self, x):
            return {"loss": self.deep(nn.functional.avg_pool3d(self.wide(x), 4)).square().mean()}

    model = Shrinking()
    fit(model, ImageSet(torch.randn(4, 1, 8, 8, 8)), steps=1, batch_size=2, device="cpu", precision="bf16", progress=False)
    assert model.wide.seen == {True} and model.deep.seen == {False}


@pytest.mark.parametrize("wrong, said", [(dict(steps=0), "at least 1"), (dict(device="cuda"), "no usable GPU"), (dict(precision="fp16"), "CUDA"), (dict(precision="half"), "unknown")])
def test_unusable_settings_are_named(images, wrong, said):
    if torch.cuda.is_available():
        pytest.skip("asks what happens without a GPU")
    with pytest.raises(ValueError, match=said):
        fit(Mean(), images, **{"steps": 1, **RUN, **wrong})


def test_rate_by_hand():
    assert [rate_at(s, 20) for s in (0, 1)] == [1.0, 1.0] and rate_at(0, 100) == 0.2
    assert abs(rate_at(5 + 95 / 2, 100) - 0.5) < 1e-12
    assert len({seed_of(*k) for k in ((0, 0), (0, 1), (1, 0), (0, 0, 1))}) == 4


def test_health_by_loops():
    z, other = torch.randn(9, 5), torch.randn(9, 5)
    unit = [v / v.norm() for v in z]
    pairs = [torch.exp(-2 * (a - b).square().sum()) for i, a in enumerate(unit) for b in unit[i + 1:]]
    torch.testing.assert_close(uniformity(z), (sum(pairs) / len(pairs)).log())
    torch.testing.assert_close(alignment(z, other), sum((a - b / b.norm()).square().sum() for a, b in zip(unit, other)) / 9)
    torch.testing.assert_close(spread(z), torch.stack(unit).std(0, correction=0).mean() * 5**0.5)
    sigma = torch.linalg.svdvals(z - z.mean(0))
    p = sigma / sigma.sum()
    torch.testing.assert_close(effective_rank(z), torch.exp(-(p * p.log()).sum()))
    assert diagnosis(health(torch.ones(4, 3) + 1e-5 * torch.randn(4, 3))) is not None and diagnosis(health(z)) is None


def test_files_are_written_whole(tmp_path):
    save_whole({"a": torch.ones(2)}, {"n": 1}, tmp_path / "deep" / "x.safetensors")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.safetensors"]
    shared = torch.ones(2)
    save_whole({"a": shared, "b": shared}, {}, tmp_path / "y.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_whole(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, I am not what my name says, and I am long enough to be read")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_whole(tmp_path / "text.safetensors")


def test_encoder_round_trip_and_refusals(tmp_path):
    torch.manual_seed(0)
    encoder = create_encoder("resnet18", 3, 2, width=4, stem="small")
    save_encoder(encoder, tmp_path / "e.safetensors", method="byol", seed=3)
    again, card = load_encoder(tmp_path / "e.safetensors", create_encoder)
    assert same(encoder, again) and card["method"] == "byol" and card["seed"] == 3 and "torch" in card["versions"]
    with pytest.raises(ValueError, match="not all weights fit|no weight"):
        load_encoder(tmp_path / "e.safetensors", create_encoder("resnet18", 3, 2, width=8, stem="small"))
    save_whole({"w": torch.ones(1)}, {"history": {}}, tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match="holds no encoder"):
        load_encoder(tmp_path / "run.safetensors", create_encoder)
    with pytest.raises(ValueError, match="recipe"):
        save_encoder(nn.Linear(1, 1), tmp_path / "x.safetensors")


def test_refused_transfer_changes_nothing():
    a, b = create_encoder("resnet18", 2, width=4), create_encoder("resnet18", 2, width=4)
    weights = dict(a.state_dict())
    weights.pop(list(weights)[-1])
    before = [v.clone() for v in b.state_dict().values()]
    with pytest.raises(ValueError, match="1 missing"):
        transfer(weights, b)
    assert all(torch.equal(x, y) for x, y in zip(before, b.state_dict().values()))
    report = transfer(weights, b, partial=True)
    assert len(report.missing) == 1 and len(report.matched) == len(weights)


@pytest.mark.parametrize("have, want", [(3, 1), (1, 3), (1, 4), (4, 1)])
def test_channels_keep_the_response_to_grey(have, want):
    kernel, grey = torch.randn(2, have, 3, 3), torch.randn(1, 1, 6, 6)
    conv = nn.functional.conv2d
    torch.testing.assert_close(conv(grey.expand(-1, want, -1, -1), change_channels(kernel, want)), conv(grey.expand(-1, have, -1, -1), kernel))
    mean = change_channels(kernel, want, "mean")
    torch.testing.assert_close(mean, kernel.mean(1, keepdim=True) if want == 1 else kernel.expand(-1, want, -1, -1))


def test_inflated_network_agrees_on_a_volume_constant_along_depth():
    kernel = torch.randn(2, 1, 3, 3)
    flat = torch.randn(1, 1, 1, 6, 6)
    deep = nn.functional.conv3d(flat.expand(-1, -1, 3, -1, -1), inflate(kernel, (2, 1, 3, 3, 3)))
    torch.testing.assert_close(deep[:, :, 0], nn.functional.conv2d(flat[:, :, 0], kernel))


def test_two_processes_have_the_gradient_of_one(tmp_path):
    "Every method, 2D and 3D, in two real gloo processes: loss and gradients of the joined batch to 1e-5."
    start = lambda rank: subprocess.Popen([sys.executable, HERE / "two_processes.py", str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    runs = [start(rank) for rank in (0, 1)]
    out = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    differences = json.loads(out[0])
    assert len(differences) >= 8
    assert max(differences.values()) < 1e-5, differences


@pytest.mark.parametrize("kind", (["quiet"], ["quiet", "opposed"]))
def test_fit_in_two_processes_ends_as_in_one(tmp_path, kind):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env["MASTER_PORT"] = str(s.getsockname()[1])
    runs = [subprocess.Popen([sys.executable, HERE / "killed_run.py", tmp_path / f"out{rank}", "", *kind], env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    a, b = (load_whole(tmp_path / f"out{rank}")[0] for rank in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a), "the two processes ended with different weights"
    subprocess.run([sys.executable, HERE / "killed_run.py", tmp_path / "one", "", *kind], check=True)
    one = load_whole(tmp_path / "one")[0]
    for k in one:
        torch.testing.assert_close(a[k], one[k], rtol=1e-3, atol=1e-4)
