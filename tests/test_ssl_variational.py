"The variational autoencoder: both terms against torch.distributions and loops, their scale, and what must not change them."
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from medssl_nb.nets.base import create_encoder
from medssl_nb.ssl.base import Pretext, create
from medssl_nb.ssl.variational import gaussian_nats, kl_to_normal, starts
from small_methods import method_of

drawn_by = lambda seed: torch.Generator().manual_seed(seed)
encoder = lambda dims=2: create_encoder("resnet18", dims, width=4, stem="small")


def images(*shape, seed=0):
    return torch.randn(*shape, generator=drawn_by(seed))


def test_divergence_equals_torchs():
    mean, log_variance = images(5, 3), images(5, 3, seed=1)
    slow = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_to_normal(mean, log_variance), slow)
    assert kl_to_normal(torch.zeros(2, 3), torch.zeros(2, 3)).abs().max() == 0


def test_divergence_in_bf16_is_computed_in_float32():
    mean, log_variance = images(5, 3), 0.01 * images(5, 3, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kl_to_normal(mean, log_variance), kl_to_normal(mean, log_variance).float())
        rough = kl_to_normal(mean.bfloat16(), log_variance.bfloat16())
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, kl_to_normal(mean.bfloat16().float(), log_variance.bfloat16().float()))


@pytest.mark.parametrize("variance", [0.1, 1.0, 3.0])
def test_reconstruction_is_a_log_probability_summed_over_voxels(variance):
    x, guess = images(7, 11), images(7, 11, seed=1)
    slow = -Normal(guess, variance**0.5).log_prob(x).sum(1)
    torch.testing.assert_close(gaussian_nats((x - guess).square().mean(1), 11, variance), slow)


def test_the_errors_own_variance_is_the_most_probable_and_its_gradient_needs_no_detour():
    error = torch.tensor(0.3, requires_grad=True)
    best = gaussian_nats(error, 50)
    assert all(best <= gaussian_nats(error, 50, s) + 1e-4 for s in (0.1, 0.2, 0.29, 0.31, 0.5, 1.0))
    (direct,) = torch.autograd.grad(best, error)
    (held,) = torch.autograd.grad(gaussian_nats(error, 50, 0.3), error)
    torch.testing.assert_close(direct, held)


@pytest.mark.parametrize("options", [{}, {"variance": 0.5}, {"beta": 3.0}])
def test_terms_by_loops(options):
    torch.manual_seed(0)
    method = create("vae", encoder(), code=5, size=16, width=4, **options).eval()
    x = images(3, 1, 16, 16)
    pretext = method.pretext(x, drawn_by(0))
    terms, (mean, log_variance) = method(pretext), method.encode(x)
    error, divergence = 0.0, 0.0
    for i in range(3):
        z = torch.stack([m + math.exp(v / 2) * e for m, v, e in zip(mean[i], log_variance[i].tolist(), pretext.target[i])])
        error += (method.decode(z[None])[0] - x[i]).square().mean().item() / 3
        divergence += sum(-0.5 * (1 + v - m * m - math.exp(v)) for m, v in zip(mean[i].tolist(), log_variance[i].tolist())) / 3
    s = options.get("variance", error)
    nats = 128 * (math.log(2 * math.pi * s) + error / s)
    expected = {"error": error, "divergence": divergence, "reconstruction": nats, "loss": nats + options.get("beta", 1.0) * divergence}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].item(), value, rtol=1e-4, atol=1e-4)


def test_all_randomness_is_in_the_pretext():
    method, x = method_of("vae", 2).eval(), images(4, 1, 16, 16)
    pretext = method.pretext(x, drawn_by(0))
    assert torch.equal(method(pretext)["loss"], method(pretext)["loss"])
    assert torch.equal(pretext.target, pretext.drawn["eps"]) and not torch.equal(pretext.target, method.pretext(x, drawn_by(1)).target)
    other = method(Pretext(pretext.views, -pretext.target))["loss"]
    assert not torch.equal(other, method(pretext)["loss"])


def test_the_order_of_images_does_not_matter():
    method, x = method_of("vae", 2).eval(), images(4, 1, 16, 16)
    pretext = method.pretext(x, drawn_by(0))
    turned = Pretext((x.flip(0),), pretext.target.flip(0))
    torch.testing.assert_close(method(turned)["loss"], method(pretext)["loss"], rtol=1e-5, atol=1e-4)


def test_gradient_reaches_mean_and_variance_through_the_draw():
    method, x = method_of("vae", 2), images(4, 1, 16, 16)
    method(method.pretext(x, drawn_by(0)))["reconstruction"].backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in (method.cloud.mean, method.cloud.log_variance))


def test_without_an_image_nothing_beats_the_mean_image():
    "A code that says nothing has divergence 0, and then the error is at least the variance between images."
    method, x = method_of("vae", 2).eval(), images(32, 1, 16, 16)
    for layer in (method.cloud.mean, method.cloud.log_variance):
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    terms = method(Pretext((x,), torch.zeros(32, method.generator.code)))
    assert terms["divergence"] == 0 and terms["error"] > x.var(0, correction=0).mean()


@pytest.mark.parametrize("dims, space", [(2, (19, 26)), (3, (12, 16, 18))])
def test_images_of_another_size_are_resized(dims, space):
    method, x = method_of("vae", dims).eval(), images(2, 1, *space)
    assert method.decode(torch.zeros(2, method.generator.code), space).shape == (2, 1, *space)
    assert torch.isfinite(method(method.pretext(x, drawn_by(0)))["loss"])


def test_sizes_are_reached_by_doubling():
    for size in ((16, 16), (48, 64), (6, 10), (32, 64, 64)):
        levels, start = starts(size)
        assert tuple(n * 2**levels for n in start) == size and min(start) >= 3
    for wrong in (5, 4, 7):
        with pytest.raises(ValueError, match="even numbers"):
            create("vae", encoder(), size=wrong)


def test_sharp_clouds_and_perfect_images_stay_finite():
    assert kl_to_normal(torch.zeros(1, 2), torch.full((1, 2), -60.0)).isfinite().all()
    assert gaussian_nats(torch.tensor(0.0), 100).isfinite()
