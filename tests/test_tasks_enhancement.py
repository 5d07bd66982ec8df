"Enhancement: the untrained network is the identity, pairs are reproducible, planted degradations are undone, and bad input is refused."
import pytest
import torch
import torch.nn.functional as F

from medssl_nb import nets, ssl
from medssl_nb.data.images import Batch, ImageSet
from medssl_nb.tasks.enhancement import Enhancer, Pair
from medssl_nb.tasks.segmentation import predict_volume
from medssl_nb.train.fit import fit
from medssl_nb.views.intensity import random_noise


def small(dims=2, channels=1, seed=0):
    torch.manual_seed(seed)
    return nets.create("unet", part="encoder", spatial_dims=dims, in_channels=channels, width=4, levels=2)


def noisy(x, generator):
    return random_noise(x, (0.5, 0.5), p=1.0, generator=generator)


@pytest.mark.parametrize("dims", [2, 3])
def test_untrained_it_answers_with_what_it_got(dims):
    model, x = Enhancer(small(dims, 2), noisy), torch.randn(2, 2, *[16] * dims)
    assert torch.equal(model.eval().predict(x), x)
    terms = model(model.pretext(Batch(x), torch.Generator().manual_seed(0)))
    assert terms["loss"] == terms["untouched"] > 0


def test_gradient_reaches_every_weight_after_one_step():
    model, x = Enhancer(small(), noisy), torch.randn(2, 1, 16, 16)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(model.pretext(x, torch.Generator().manual_seed(0)))["loss"].backward()
        optimiser.step()
    assert all(p.grad is not None for p in model.parameters()) and any(p.grad.abs().sum() > 0 for p in model.encoder.parameters())


@pytest.mark.parametrize("loss, error", [("mse", F.mse_loss), ("mae", F.l1_loss)])
def test_loss_by_hand(loss, error):
    model, x = Enhancer(small(), lambda x, g: x - 2, loss=loss), torch.randn(2, 1, 8, 8)
    assert model(model.pretext(x))["loss"].item() == pytest.approx(4 if loss == "mse" else 2)
    free = Enhancer(small(), noisy, residual=False, loss=loss)
    pair = free.pretext(x, torch.Generator().manual_seed(1))
    torch.testing.assert_close(free(pair)["loss"], error(free.network(pair.degraded), x))


def test_the_same_generator_gives_the_same_pair_and_x_stays():
    model, x = Enhancer(small(), noisy), torch.randn(3, 1, 16, 16)
    kept = x.clone()
    a, b, c = (model.pretext(x, torch.Generator().manual_seed(s)).degraded for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(x, kept)
    assert torch.equal(model.pretext(x, torch.Generator().manual_seed(0)).wanted, x)


@pytest.mark.parametrize("name", ["denoising", "super_resolution", "low_light", "artefact"])
def test_pretext_tasks_degrade_for_it(name):
    model, x = Enhancer(small(), ssl.create(name, small()).spoil), torch.randn(4, 1, 16, 16)
    pair = model.pretext(Batch(x), torch.Generator().manual_seed(0))
    assert isinstance(pair, Pair) and pair.degraded.shape == x.shape and not torch.equal(pair.degraded, x)


def test_a_missing_channel_is_completed():
    x = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    images = ImageSet(x.expand(-1, 2, -1, -1) * torch.tensor([1.0, -1.0])[:, None, None])
    model = Enhancer(small(), lambda x, g: x[:, :1], wanted=lambda x: x[:, 1:], residual=False)
    fit(model, images, steps=80, batch_size=8, lr=1e-2, device="cpu", precision="fp32", progress=False)
    x = images.stack().x
    assert F.mse_loss(model.predict(x[:, :1]), x[:, 1:]) < 0.4  # 1 is the answer 0
    two = Enhancer(small(channels=1), lambda x, g: x[:, :1], residual=False, channels=2)
    assert two.predict(x[:, :1]).shape == x.shape and "untouched" not in two(two.pretext(x))


def test_it_learns_to_undo_a_planted_degradation():
    g = torch.Generator().manual_seed(0)
    x = F.avg_pool2d(torch.randn(48, 1, 20, 20, generator=g), 5, 1, 2)
    model = Enhancer(small(), noisy)
    history = fit(model, ImageSet(x), steps=60, batch_size=12, lr=1e-2, device="cpu", precision="fp32", progress=False)
    assert sum(history.terms["loss"][-5:]) < 0.6 * sum(history.terms["untouched"][-5:])


def test_a_frozen_encoder_stays_and_a_whole_network_is_taken_as_it_is():
    encoder = small()
    model = Enhancer(encoder, noisy)
    model.encoder.requires_grad_(False)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    fit(model, ImageSet(torch.randn(8, 1, 16, 16)), steps=2, batch_size=4, device="cpu", precision="fp32", progress=False)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    whole = nets.create("unet", width=4, levels=2, out_channels=1)
    taken = Enhancer(whole, noisy)
    assert taken.network is whole and taken.encoder is whole.encoder and whole.head.weight.abs().sum() > 0


def test_large_images_go_through_in_windows():
    model = Enhancer(small(), noisy)
    image = torch.randn(1, 37, 50)
    torch.testing.assert_close(predict_volume(model, image, 16, 0.25), image, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("call, words", [
    (lambda: Enhancer(small(), noisy, loss="ssim"), "'mse' or 'mae'"),
    (lambda: Enhancer(small(), "noise"), "a function of a batch and a generator"),
    (lambda: Enhancer(small(), lambda x, g: x[:, :1]).pretext(torch.zeros(2, 2, 8, 8)), "residual=False"),
    (lambda: Enhancer(small(), lambda x, g: x[..., ::2], residual=False).pretext(torch.zeros(2, 1, 8, 8)), "the same voxels"),
    (lambda: Enhancer(small(), lambda x, g: x[:1], residual=False).pretext(torch.zeros(2, 1, 8, 8)), "the same voxels"),
])
def test_it_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
