"Latent diffusion: what only it must hold; the contract of all methods is tested in test_ssl.py."
import copy
import math

import pytest
import torch

from medssl_nb.nets.base import create_encoder, embed
from medssl_nb.ssl.diffusion import (
    SCHEDULES, NoiseFeatures, NoisePredictor, add_noise, clean_estimate, noise_schedule, signal_to_noise,
    step_back, walk_back,
)
from small_methods import asked, method_of


def batch_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("steps", [50, 200, 1000, 4000])
def test_schedules_fall_from_nearly_one_to_nearly_none(kind, steps):
    left = noise_schedule(kind, steps)
    assert left.shape == (steps,) and (left.diff() < 0).all() and (left > 0).all() and (left < 1).all()
    assert left[0] > 1 - 0.2 / steps * 10 and left[-1] < 1e-4
    assert (signal_to_noise(left).diff() < 0).all()


def test_the_linear_schedule_by_its_recursion():
    left, product = noise_schedule("linear", 1000), 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert abs(left[t].item() - product) < 1e-6
    assert abs(left[-1].item() - 4.0e-5) < 1e-6  # as published code has it


def test_the_cosine_schedule_by_its_formula():
    left, curve = noise_schedule("cosine", 1000), lambda t: math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    for t in (0, 10, 499, 900, 990):
        assert abs(left[t].item() - curve(t + 1) / curve(0)) < 1e-6
    assert abs(left[499].item() - 0.4939) < 1e-3


def test_both_have_about_one_length():
    "With fewer steps the linear schedule still ends at the same share."
    for steps in (100, 1000):
        assert 1e-5 < noise_schedule("linear", steps)[-1] < 1e-4


def test_variance_is_preserved_and_steps_join_to_one():
    "One step after another, as variances, ends where the closed form is."
    for kind in SCHEDULES:
        left, variance, signal = noise_schedule(kind, 100).double(), 1.0, 1.0
        for before, now in zip([1.0, *left.tolist()], left.tolist()):
            kept = now / before
            variance, signal = kept * variance + (1 - kept), signal * kept
            assert abs(variance - 1) < 1e-9 and abs(signal - now) < 1e-9
    clean, noise = torch.eye(2)[:1], torch.eye(2)[1:]  # orthogonal, so lengths add as variances do
    for share in (0.0, 0.3, 1.0):
        assert abs(add_noise(clean, noise, torch.tensor([share])).norm() - 1) < 1e-6


def test_each_image_has_its_own_level():
    clean, noise, left = batch_of(3, 2, 4, 5), batch_of(3, 2, 4, 5, seed=1), torch.tensor([0.1, 0.5, 0.9])
    noisy = add_noise(clean, noise, left)
    for i in range(3):
        torch.testing.assert_close(noisy[i], left[i].sqrt() * clean[i] + (1 - left[i]).sqrt() * noise[i])
    torch.testing.assert_close(clean_estimate(noisy, noise, left), clean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_who_knows_the_noise_recovers_the_latent(eta, steps):
    "A perfect predictor walks from any noise back to the clean latent, in few steps or many, with fresh noise or without."
    left, clean = noise_schedule("cosine", 100).double(), batch_of(3, 4, 2, 2).clamp(-3, 3).double()

    class Perfect(torch.nn.Module):
        def forward(self, noisy, t):
            share = left[t].view(-1, 1, 1, 1)
            return (noisy - share.sqrt() * clean) / (1 - share).sqrt()

    way = walk_back(Perfect(), batch_of(3, 4, 2, 2, seed=1).double(), left, steps, eta, torch.Generator().manual_seed(0))
    assert len(way) == steps + 1
    torch.testing.assert_close(way[-1], clean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [1, 40, 99])
def test_eta_one_is_ddpm(t):
    "Mean and variance of the step are those of the posterior in Ho et al. 2020, equations 6 and 7."
    left = noise_schedule("linear", 100).double()
    now, before = left[t], left[t - 1]
    clean, noise = batch_of(2, 6).double(), batch_of(2, 6, seed=1).double()
    noisy = now.sqrt() * clean + (1 - now).sqrt() * noise
    added = 1 - now / before
    mean = before.sqrt() * added / (1 - now) * clean + (now / before).sqrt() * (1 - before) / (1 - now) * noisy
    torch.testing.assert_close(step_back(noisy, noise, now, before, eta=1.0), mean)
    deviation = step_back(noisy, noise, now, before, 1.0, torch.ones(2, 6).double()) - mean
    torch.testing.assert_close(deviation.square(), torch.full((2, 6), ((1 - before) / (1 - now) * added).item()).double())


def test_no_clean_value_is_believed_beyond_the_limit():
    left, one = torch.tensor(1e-4), torch.tensor(1.0)
    back = step_back(torch.ones(1, 3), torch.zeros(1, 3), left, one, limit=4.0)
    assert (back == 4).all() and (step_back(torch.ones(1, 3), torch.zeros(1, 3), left, one) > 99).all()


def test_the_blind_answer_costs_the_mean_of_the_schedule():
    "For white latents: no other share of what is seen is cheaper, and its cost is the share of signal."
    left, generator = torch.tensor([0.02, 0.3, 0.8]), torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 200_000, generator=generator) for _ in range(2))
    noisy = add_noise(clean, noise, left)
    cost = ((1 - left).sqrt()[:, None] * noisy - noise).square().mean(1)
    torch.testing.assert_close(cost, left, rtol=0.02, atol=0.002)
    for factor in (0.8, 1.2):
        assert ((factor * (1 - left).sqrt()[:, None] * noisy - noise).square().mean(1) > cost).all()


@pytest.mark.parametrize("d", [2, 3])
def test_a_fresh_predictor_costs_what_answering_nothing_costs(d):
    method = method_of("latent_diffusion", d)
    pretext = asked(method, batch_of(4, 1, *[16] * d))
    terms = method(pretext)
    torch.testing.assert_close(terms["noise"], pretext.drawn["noise"].square().mean())
    torch.testing.assert_close(terms["loss"], terms["noise"] + terms["reconstruction"])


def test_the_noise_stops_at_the_latent():
    method, x = method_of("latent_diffusion", 2), batch_of(4, 1, 16, 16)
    torch.nn.init.normal_(method.predictor.answer.weight)
    touched = lambda: {name.split(".")[0] for name, p in method.named_parameters() if p.grad is not None}
    method(asked(method, x))["noise"].backward()
    assert touched() == {"predictor"}
    method.zero_grad(set_to_none=True)
    method(asked(method, x))["reconstruction"].backward()
    assert touched() == {"encoder", "squeeze", "expand", "decoder", "head"}


def test_the_loss_by_loops():
    "From the target's numbers, image by image."
    method, x = method_of("latent_diffusion", 2).eval(), batch_of(3, 1, 16, 16)
    torch.nn.init.normal_(method.predictor.answer.weight)
    pretext = asked(method, x)
    latent = method.encode(x)[0].detach()
    total = 0.0
    for i in range(3):
        t, noise = int(pretext.target[i, 0]), pretext.target[i, 1:].view(latent.shape[1:])
        assert t == pretext.drawn["t"][i] and torch.equal(noise, pretext.drawn["noise"][i])
        noisy = method.left[t].sqrt() * latent[i] + (1 - method.left[t]).sqrt() * noise
        total += (method.predictor(noisy[None], torch.tensor([t]))[0] - noise).square().mean() / 3
    torch.testing.assert_close(method(pretext)["noise"], total, rtol=1e-4, atol=1e-5)


def test_latents_have_mean_0_and_deviation_1():
    method = method_of("latent_diffusion", 2)
    latent = method.encode(5 + 3 * batch_of(16, 1, 16, 16))[0]
    torch.testing.assert_close(latent.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(latent.var((0, 2, 3), correction=0), torch.ones(4), rtol=0, atol=1e-2)


def test_steps_are_drawn_evenly_and_noise_is_normal():
    method = method_of("latent_diffusion", 2)
    pretext = asked(method, torch.zeros(4000, 1, 16, 16))
    t, noise = pretext.drawn["t"], pretext.drawn["noise"]
    assert t.min() < 5 and t.max() > 994 and abs(t.float().mean() - 499.5) < 20
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1) < 0.02


def test_asking_for_the_grid_leaves_no_trace():
    method = method_of("latent_diffusion", 2)
    before = copy.deepcopy(method.state_dict())
    assert method.grid((17, 30)) == tuple(method.encoder(torch.zeros(2, 1, 17, 30))[-1].shape[2:])
    method = method_of("latent_diffusion", 2)
    method.grid((17, 30))
    assert method.training and method.encoder.training
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())


@pytest.mark.parametrize("space", [(16, 16), (17, 30), (12, 16, 9)])
def test_samples_have_any_size(space):
    method = method_of("latent_diffusion", len(space)).eval()
    draw = lambda seed: method.sample(2, space, steps=3, eta=1.0, generator=torch.Generator().manual_seed(seed))
    assert draw(0).shape == (2, 1, *space) and torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert torch.isfinite(draw(0)).all()


def test_the_predictor_reads_the_step_and_each_image_alone():
    torch.manual_seed(0)
    predictor = NoisePredictor(2, 3, width=8, depth=2, steps=50)
    torch.nn.init.normal_(predictor.answer.weight)
    x, t = batch_of(4, 3, 5, 6), torch.tensor([0, 10, 20, 49])
    whole = predictor(x, t)
    for i in range(4):
        torch.testing.assert_close(predictor(x[i : i + 1], t[i : i + 1])[0], whole[i], rtol=1e-4, atol=1e-5)
    assert (predictor(x, t.flip(0)) - whole).abs().amax((1, 2, 3))[[0, 3]].min() > 1e-2


@pytest.mark.parametrize("d", [2, 3])
def test_features_are_an_encoder(d):
    method, x = method_of("latent_diffusion", d).eval(), batch_of(3, 2 - 1, *[16] * d)
    features = NoiseFeatures(method, 100, block=0)
    with torch.no_grad():
        maps = features(x)
        assert len(maps) == len(features.channels) == 1 and maps[0].shape[1] == features.channels[0]
        torch.testing.assert_close(embed(features, x)[1:2], embed(features, x[1:2]), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(maps[0], NoiseFeatures(method, 900, block=0)(x)[0])


@pytest.mark.parametrize("make, said", [
    (lambda: noise_schedule("square"), "linear or cosine"),
    (lambda: noise_schedule("linear", 1), "at least 2"),
    (lambda: method_of("latent_diffusion", 2).__class__(create_encoder("resnet18", 2, width=4), channels=0), "at least 1 channel"),
    (lambda: NoiseFeatures(method_of("latent_diffusion", 2), 1000), "999"),
    (lambda: NoiseFeatures(method_of("latent_diffusion", 2), 0, block=9), "blocks from 0"),
])
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
