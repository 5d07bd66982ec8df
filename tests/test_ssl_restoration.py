"Context restoration: swaps by a slow reference, its loss by loops, what must not cheat; and that a trained decoder comes along."
import itertools

import pytest
import torch
import torch.nn.functional as F

from medssl_nb.data.images import ImageSet
from medssl_nb.nets.base import create_encoder
from medssl_nb.nets.unet import UNet
from medssl_nb.ssl.base import create
from medssl_nb.ssl.restoration import ContextRestoration, random_genesis
from medssl_nb.train.fit import fit
from medssl_nb.train.weights import transfer
from small_methods import asked, drawn, small


def swapped_slowly(image, first, second, side):
    "One image (C, *space) after each pair in turn changed places, voxel by voxel."
    image = image.clone()
    for p, q in zip(first.tolist(), second.tolist()):
        if p == q:
            continue
        for offset in itertools.product(*(range(s) for s in side)):
            here, there = (tuple(a + o for a, o in zip(start, offset)) for start in (p, q))
            for channel in image:
                channel[here], channel[there] = channel[there].item(), channel[here].item()
    return image


@pytest.mark.parametrize("d, size, side", [(2, (16, 24), (2, 3)), (3, (8, 12, 8), (2, 3, 2))])
def test_patches_change_places_as_by_hand(d, size, side):
    method, x = small("context_restoration", d, 2), drawn(3, 2, *size)
    pretext = asked(method, x)
    assert torch.equal(pretext.target, x)
    for b in range(3):
        slow = swapped_slowly(x[b], pretext.drawn["first"][b], pretext.drawn["second"][b], side)
        assert torch.equal(pretext.views[0][b], slow)


@pytest.mark.parametrize("d", (2, 3))
def test_pairs_are_isolated_and_no_value_is_lost(d):
    method, x = small("context_restoration", d), drawn(20, 1, *[16] * d)
    pretext = asked(method, x)
    gap = (pretext.drawn["first"] - pretext.drawn["second"]).abs()
    side = {2: 2, 3: 4}[d]
    assert pretext.drawn["first"].shape == (20, 10, d)
    assert ((gap >= side).any(-1) | (gap == 0).all(-1)).all() and (gap > 0).any(-1).float().mean() > 0.95
    assert torch.equal(pretext.views[0].flatten(1).sort().values, x.flatten(1).sort().values)


@pytest.mark.parametrize("d", (2, 3))
def test_by_default_about_a_quarter_is_moved(d):
    x = drawn(20, 1, *[32] * d)
    moved = (asked(small("context_restoration", d), x).views[0] != x).float().mean()
    assert 0.17 < moved < 0.3, moved


def test_loss_is_the_mean_square_over_all_voxels():
    method, x = small("context_restoration").eval(), drawn(2, 1, 16, 16)
    pretext = asked(method, x)
    restored = method.restore(pretext.views[0]).flatten().tolist()
    slow = sum((a - b) ** 2 for a, b in zip(restored, x.flatten().tolist())) / x.numel()
    torch.testing.assert_close(method(pretext)["loss"].item(), slow, rtol=1e-4, atol=1e-6)


def test_biases_alone_do_not_restore():
    "Without weights the best answer is one number: the variance of what is asked."
    method, x = small("context_restoration", skips=False), drawn(8, 1, 16, 16)
    torch.nn.init.zeros_(method.head.weight)
    torch.nn.init.constant_(method.head.bias, x.mean().item())
    torch.testing.assert_close(method(asked(method, x))["loss"], x.var(correction=0), rtol=1e-4, atol=0)


def test_constant_images_ask_nothing():
    x = torch.full((2, 1, 16, 16), 3.0)
    assert torch.equal(asked(small("context_restoration"), x).views[0], x)


def test_no_swap_is_no_question_and_patches_must_fit():
    x = drawn(2, 1, 16, 16)
    assert torch.equal(asked(small("context_restoration", swaps=0), x).views[0], x)
    with pytest.raises(ValueError, match="two must fit side by side"):
        asked(small("context_restoration", patch=0.8), x)


def test_a_trained_decoder_fits_a_network_that_segments():
    torch.manual_seed(0)
    method = ContextRestoration(create_encoder("unet", 2, 1, width=4, levels=3))
    fit(method, ImageSet(drawn(4, 1, 16, 16)), steps=2, batch_size=4, device="cpu", progress=False)
    network = UNet(method.encoder, 4)
    report = transfer(method.decoder, network.decoder)
    assert not report.missing and not report.unexpected
    maps = method.encoder(drawn(1, 1, 16, 16))
    method.eval(), network.eval()
    assert torch.equal(network.decoder(maps)[-1], method.decoder(maps)[-1])


@pytest.mark.parametrize("name", ["context_restoration", "models_genesis", "transvw", "skull_reconstruction"])
@pytest.mark.parametrize("channels", (1, 4))
def test_decoders_of_one_to_four_channels(name, channels):
    torch.manual_seed(0)
    method = create(name, create_encoder("unet", 3, channels, width=2, levels=2))
    assert method.decoder.channels[-1] == method.head.in_channels
    assert torch.isfinite(method(asked(method, drawn(2, channels, 24, 24, 24)))["loss"])


def test_genesis_draws_each_spoiling_with_its_probability():
    x = drawn(400, 1, 12, 12)
    untouched = random_genesis(x, 0, 0, 0, generator=torch.Generator().manual_seed(0))[0]
    assert torch.equal(untouched, x)
    shuffled, what = random_genesis(x, 1, 0, 0, generator=torch.Generator().manual_seed(0))
    for image, source, before in zip(shuffled[:5], what["source"], x):
        assert torch.equal(image.flatten(), before.flatten()[source.flatten()])
    painted = random_genesis(x, 0, 0, 0.5, generator=torch.Generator().manual_seed(0))[0]
    assert abs((painted != x).flatten(1).any(1).float().mean() - 0.5) < 0.08


def test_restored_loss_falls_below_passing_through():
    torch.manual_seed(0)
    smooth = F.interpolate(drawn(16, 1, 4, 4), size=(16, 16), mode="bicubic")
    method = ContextRestoration(create_encoder("unet", 2, 1, width=8, levels=3))
    fit(method, ImageSet(smooth), steps=80, batch_size=16, lr=5e-3, device="cpu", precision="fp32", progress=False)
    pretext = asked(method.eval(), ImageSet(smooth).stack().x)
    with torch.no_grad():
        assert method(pretext)["loss"] < F.mse_loss(pretext.views[0], pretext.target)
