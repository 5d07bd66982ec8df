"Image GPT: what only it must hold; the contract of all methods is tested in test_ssl.py."
import math

import pytest
import torch
import torch.nn.functional as F

from medssl_nb import nets
from medssl_nb.nets.base import embed
from medssl_nb.ssl.autoregressive import causal_mask, complete, from_levels, shrink, to_levels
from medssl_nb.ssl.base import create


def batch_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gpt(spatial_dims=2, channels=1, patch=1, class_token=False, **options):
    torch.manual_seed(0)
    encoder = nets.create("vit", spatial_dims, channels, width=16, depth=2, heads=2, patch=patch, class_token=class_token)
    return create("image_gpt", encoder, **{"pool": 2, "levels": 8, **options})


@pytest.mark.parametrize("levels, low, high", [(2, -1, 1), (16, -2, 3), (7, 0, 10)])
def test_levels_there_and_back(levels, low, high):
    every = torch.arange(levels)
    assert torch.equal(to_levels(from_levels(every, levels, low, high), levels, low, high), every)
    x = torch.linspace(low, high - 1e-3, 501)
    back = from_levels(to_levels(x, levels, low, high), levels, low, high)
    assert (back - x).abs().max() <= (high - low) / levels / 2 + 1e-4
    assert to_levels(torch.tensor([low - 100.0, high + 100.0, high]), levels, low, high).tolist() == [0, levels - 1, levels - 1]
    assert (to_levels(x, levels, low, high).diff() >= 0).all()


@pytest.mark.parametrize("space, factor", [((6, 8), 2), ((6, 9), 3), ((4, 6, 8), 2)])
def test_shrinking_is_average_pooling(space, factor):
    x = batch_of(2, 3, *space)
    torch.testing.assert_close(shrink(x, factor), {4: F.avg_pool2d, 5: F.avg_pool3d}[x.ndim](x, factor))
    assert torch.equal(shrink(x, 1), x)


def test_shrinking_repeats_the_last_row_where_it_does_not_divide():
    x = batch_of(1, 1, 5, 4)
    torch.testing.assert_close(shrink(x, 2)[..., 2, :], x[..., 4, :].view(1, 1, 2, 2).mean(-1))


def test_the_mask_hides_the_future_only():
    mask = causal_mask(5)
    assert all((mask[i, j] == 0) if j <= i else (mask[i, j] == -math.inf) for i in range(5) for j in range(5))


@pytest.mark.parametrize("d, patch, class_token", [(2, 1, False), (2, 2, False), (3, 1, False), (3, 2, False), (2, 1, True)])
def test_no_token_sees_its_future(d, patch, class_token):
    "Every patch is changed once: earlier predictions and its own stay, bit for bit, and a later one moves."
    method = gpt(d, patch=patch, class_token=class_token).eval()
    view = method.pretext(batch_of(1, 1, *[8] * d)).views[0]
    grid = [n // patch for n in view.shape[2:]]
    with torch.no_grad():
        before = method.logits(view)
        for n in range(math.prod(grid)):
            changed, place = view.clone(), torch.unravel_index(torch.tensor(n), grid)
            changed[(0, 0, *[slice(int(p) * patch, (int(p) + 1) * patch) for p in place])] += 1
            moved = (method.logits(changed) - before).abs().amax((0, 2, 3))
            assert (moved[: n + 1] == 0).all()
            assert n == len(moved) - 1 or moved[n + 1] > 0


@pytest.mark.parametrize("channels, patch", [(1, 1), (2, 2)])
def test_loss_equals_the_loops(channels, patch):
    method = gpt(channels=channels, patch=patch)
    pretext = method.pretext(batch_of(2, channels, 8, 12))
    with torch.no_grad():
        chances, terms = method.logits(pretext.views[0]).softmax(-1), method(pretext)
    surprise, right = [], []
    for b in range(2):
        for n, (i, j) in enumerate((i, j) for i in range(0, 4, patch) for j in range(0, 6, patch)):
            for v, number in enumerate(pretext.target[b, :, i : i + patch, j : j + patch].flatten().tolist()):
                surprise.append(-math.log(chances[b, n, v, number]))
                right.append(int(chances[b, n, v].argmax()) == number)
    torch.testing.assert_close(terms["loss"].item(), sum(surprise) / len(surprise), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["accuracy"].item(), sum(right) / len(right))


def test_silence_costs_the_log_of_the_levels_and_biases_only_the_entropy():
    "Without the image the best answer is how often each level comes: noise cannot be answered below its entropy."
    method = gpt(levels=4, low=-1.0, high=1.0, pool=1)
    torch.nn.init.zeros_(method.head.weight), torch.nn.init.zeros_(method.head.bias)
    pretext = method.pretext(batch_of(64, 1, 8, 8))
    torch.testing.assert_close(method(pretext)["loss"], torch.tensor(4.0).log())
    share = torch.bincount(pretext.target.flatten(), minlength=4) / pretext.target.numel()
    with torch.no_grad():
        method.head.bias.copy_(share.log())
    torch.testing.assert_close(method(pretext)["loss"], -(share * share.log()).sum(), rtol=1e-4, atol=1e-4)


def test_the_view_holds_the_levels_and_the_target_names_them():
    method = gpt(3, channels=2)
    pretext = method.pretext(batch_of(2, 2, 7, 8, 6))
    assert pretext.views[0].shape == pretext.target.shape == (2, 2, 4, 4, 3) and pretext.target.dtype == torch.int64
    assert torch.equal(to_levels(pretext.views[0], *method.palette), pretext.target)


def test_completion_keeps_what_is_known_and_draws_the_rest():
    method = gpt(patch=2)
    view = method.pretext(batch_of(3, 1, 16, 16)).views[0]
    kept = view.clone()
    first, again = (complete(method, view, 6, torch.Generator().manual_seed(1)) for _ in range(2))
    other = complete(method, view, 6, torch.Generator().manual_seed(2))
    assert torch.equal(view, kept) and torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[:, :, :2], view[:, :, :2]) and torch.equal(first[:, :, 2:4, :4], view[:, :, 2:4, :4])  # six patches of four a row
    assert torch.equal(from_levels(to_levels(first, *method.palette), *method.palette), first)
    assert torch.equal(complete(method, view, 16), view)
    assert torch.equal(complete(gpt(), v := gpt().pretext(batch_of(1, 1, 4, 4)).views[0], 4), v)  # pixels: nothing left to draw


def test_a_cold_completion_takes_the_likeliest():
    method = gpt()
    view = method.pretext(batch_of(1, 1, 8, 8)).views[0]
    cold = complete(method, view, 15, torch.Generator().manual_seed(0), temperature=1e-4)
    likeliest = method.logits(view)[:, 15, 0].argmax(-1)
    assert to_levels(cold, *method.palette).flatten()[15] == likeliest


@pytest.mark.parametrize("d", [2, 3])
def test_features_are_an_encoder_and_causal(d):
    method, x = gpt(d), batch_of(2, 1, *[8] * d)
    for block in (0, 1, 2):
        features = method.features(block).eval()
        maps = features(x)
        assert [m.shape for m in maps] == [(2, 16, *[4] * d)] and (features.channels, features.strides) == ([16], [2])
        other = x.clone()
        other[..., -1] += 3  # the last column: the first token is before it
        assert torch.equal(features(other)[0].flatten(2)[..., 0], maps[0].flatten(2)[..., 0])
        assert not torch.equal(features(other)[0], maps[0])
    assert method.features().block == 1 and embed(method.features(), x).shape == (2, 16)
    assert {id(p) for p in method.encoder.parameters()} <= {id(p) for p in method.features().parameters()}


def test_the_last_features_are_what_the_head_reads():
    method, x = gpt(), batch_of(2, 1, 8, 8)
    tokens = method.features(2)(x)[0].flatten(2).transpose(1, 2)
    logits = method.head(tokens).unflatten(-1, (-1, 8))
    torch.testing.assert_close(logits[:, :-1], method.logits(method.pretext(x).views[0])[:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make, said", [
    (lambda: create("image_gpt", nets.create("resnet18", width=4)), "create a ViT with nets.create"),
    (lambda: create("image_gpt", nets.create("axial_attention", width=16, depth=2, patch=2)), "AxialViT cannot"),
    (lambda: gpt(levels=1), "at least 2 levels"),
    (lambda: gpt(pool=0), "pool at least 1"),
    (lambda: gpt(low=1.0, high=1.0), "low below high"),
    (lambda: gpt().features(3), "choose 0 to 2"),
])
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
