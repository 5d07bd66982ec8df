"Masked autoencoder and context encoder: what only they must hold; the contract of all methods is tested in test_ssl.py."
import math

import pytest
import torch
import torch.nn.functional as F

from medssl_nb import nets
from medssl_nb.data.images import ImageSet
from medssl_nb.nets.transformer import sincos_positions
from medssl_nb.ssl.base import create
from medssl_nb.ssl.masked import (
    MAEDecoder, Opponent, border_weights, box_sides, hidden_count, judged, masked_error, normalised_patches, patchify, random_hidden, restored, unpatchify,
)
from medssl_nb.train.fit import fit
from small_methods import asked, method_of


def batch_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("space", [(8, 12), (9, 5), (4, 8, 4), (5, 6, 7)])
def test_patches_come_in_the_order_of_the_tokens(space):
    "Row n of patchify, through the embedding's own weights, is token n: also where the image was padded."
    x, encoder = batch_of(2, 3, *space), nets.create("vit", len(space), 3, width=8, depth=1, patch=4)
    weight, bias = encoder.patch_embedding.conv.weight.flatten(1), encoder.patch_embedding.conv.bias
    tokens, grid = encoder.patches(x)
    torch.testing.assert_close(patchify(x, 4) @ weight.T + bias + sincos_positions(grid, 8), tokens, rtol=1e-4, atol=1e-5)
    assert torch.equal(unpatchify(patchify(x, 4), 4, space), x)


@pytest.mark.parametrize("count, ratio, expected", [(196, 0.75, 147), (36, 0.75, 27), (10, 0.9, 9), (4, 0.01, 1), (4, 0.99, 3), (2, 0.75, 1)])
def test_hidden_patches_are_counted(count, ratio, expected):
    hidden = random_hidden(50, count, ratio, torch.Generator().manual_seed(0))
    assert hidden_count(count, ratio) == expected and (hidden.sum(1) == expected).all()


def test_images_of_a_batch_hide_different_patches():
    hidden = random_hidden(30, 36, 0.75, torch.Generator().manual_seed(0))
    assert len({tuple(h.tolist()) for h in hidden}) == 30
    assert not torch.equal(hidden, random_hidden(30, 36, 0.75, torch.Generator().manual_seed(1)))


def loss_by_loops(prediction, target, patch, normalise):
    "2D, patch by patch: those whose target is not NaN."
    found, (batch, channels, height, width) = [], target.shape
    for b in range(batch):
        for n, (i, j) in enumerate((i, j) for i in range(0, height, patch) for j in range(0, width, patch)):
            p = target[b, :, i : i + patch, j : j + patch].double().flatten()
            if p.isnan().any():
                continue
            if normalise:
                mean = p.sum() / len(p)
                p = (p - mean) / math.sqrt(((p - mean) ** 2).sum() / (len(p) - 1) + 1e-6)
            found.append(((prediction[b, n].double() - p) ** 2).sum() / len(p))
    return sum(found) / len(found)


@pytest.mark.parametrize("normalise", [True, False])
def test_mae_loss_equals_the_loops(normalise):
    torch.manual_seed(0)
    method = create("mae", nets.create("vit", in_channels=2, width=16, depth=1, patch=4), normalise=normalise, width=8, depth=1, heads=1)
    pretext = asked(method, 5 + 3 * batch_of(3, 2, 16, 12))
    prediction = method.predict(pretext.views[0], pretext.drawn["hidden"])
    torch.testing.assert_close(method(pretext)["loss"].double(), loss_by_loops(prediction, pretext.target, 4, normalise), rtol=1e-4, atol=1e-5)


def test_mae_never_shows_the_encoder_what_it_asks():
    for d in (2, 3):
        method, x = method_of("mae", d), batch_of(3, 1, *[12] * d)
        pretext = asked(method, x)
        hidden = pretext.drawn["hidden"]
        assert hidden.float().mean() == hidden_count(hidden.shape[1], 0.75) / hidden.shape[1]
        with torch.no_grad():
            before = method.predict(x, hidden)
            other = torch.where(unpatchify(hidden[..., None].expand(-1, -1, 4**d).float(), 4, x.shape[2:]) > 0, x * -9, x)
            assert torch.equal(method.predict(other, hidden), before) and not torch.equal(other, x)
            assert not torch.equal(method.predict(x + 1, hidden), before)


def test_mae_learns_nothing_from_what_is_visible():
    "The visible part of the answer has no gradient: only hidden patches are asked."
    rows = patchify(batch_of(2, 1, 8, 8), 4)
    hidden = random_hidden(2, 4, 0.5, torch.Generator().manual_seed(0))
    prediction = torch.zeros_like(rows, requires_grad=True)
    masked_error(prediction, rows.masked_fill(~hidden[..., None], torch.nan)).backward()
    assert (prediction.grad[~hidden] == 0).all() and (prediction.grad[hidden] != 0).all()


def test_normalised_patches_forget_brightness_and_contrast_and_survive_emptiness():
    rows = batch_of(4, 9, 16)
    torch.testing.assert_close(normalised_patches(100 * rows - 7), normalised_patches(rows), rtol=1e-3, atol=1e-4)
    assert (normalised_patches(torch.full((2, 16), 3.0)) == 0).all()
    assert normalised_patches(rows.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(normalised_patches(rows).square().mean(-1), torch.full((4, 9), 15 / 16), rtol=1e-3, atol=1e-3)


def test_mae_biases_alone_do_not_solve_it():
    "Without the image the best constant answer to normalised noise is 0, and costs its variance."
    method = method_of("mae", 2)
    for parameter in method.decoder.answer.parameters():
        torch.nn.init.zeros_(parameter)
    pretext = asked(method, batch_of(64, 1, 32, 32))
    assert abs(method(pretext)["loss"].item() - 15 / 16) < 1e-3
    with torch.no_grad():
        for bias in batch_of(20, 16, seed=1):
            method.decoder.answer.bias.copy_(0.3 * bias)
            assert method(pretext)["loss"] > 15 / 16


def test_the_decoder_knows_places_and_needs_the_class_token_not():
    torch.manual_seed(0)
    decoder, order = MAEDecoder(8, 3, 12, 1, 2), torch.tensor([[4, 1, 0, 2, 3, 5]])
    out = decoder(torch.zeros(1, 2, 8), order, 2, (2, 3))
    assert out.shape == (1, 6, 3) and len({tuple(v) for v in out[0].tolist()}) == 6  # same tokens, other places
    assert decoder(torch.zeros(1, 3, 8), order, 2, (2, 3)).shape == (1, 6, 3)  # a class token in front
    method = create("mae", nets.create("vit", width=16, depth=1, patch=4, class_token=True), width=8, depth=1, heads=1)
    method(asked(method, batch_of(2, 1, 16, 16)))["loss"].backward()
    assert method.encoder.class_token.grad.abs().sum() > 0


def test_mae_restores_the_visible_as_it_is():
    for normalise in (True, False):
        method, x = method_of("mae", 3), batch_of(2, 1, 9, 8, 10)
        method.normalise = normalise
        pretext = asked(method, x)
        found, seen = restored(method, pretext), pretext.target.isnan()
        assert torch.equal(found[seen], x[seen]) and torch.isfinite(found).all() and not torch.allclose(found, x)


@pytest.mark.parametrize("make, said", [
    (lambda: create("mae", nets.create("resnet18", width=4)), "create a ViT with nets.create"),
    (lambda: create("mae", nets.create("axial_attention", width=16, depth=2, patch=4)), "AxialViT cannot"),
    (lambda: create("mae", nets.create("vit", width=16, depth=1, patch=4), ratio=1.0), "between 0 and 1"),
    (lambda: create("mae", nets.create("vit", width=16, depth=1, patch=1)), "at least 2 values"),
    (lambda: create("context_encoder", nets.create("resnet18", width=4), hole=1.5), "hole=1.5"),
    (lambda: create("context_encoder", nets.create("resnet18", width=4), overlap=0.5), "overlap=0.5"),
])
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("space, side, band", [((128, 128), (64, 64), 4), ((48, 48), (24, 24), 2), ((16, 16, 16), (8, 8, 8), 1), ((32, 20), (16, 10), 1)])
def test_the_hole_has_the_paper_s_size(space, side, band):
    method = method_of("context_encoder", len(space))
    assert box_sides(space, method.hole, method.overlap) == (side, band)
    pretext = asked(method, batch_of(2, 1, *space))
    assert (~pretext.target.isnan()).sum() == 2 * math.prod(side)
    assert (pretext.views[0] == 0).sum() == 2 * math.prod(s - 2 * band for s in side)


def test_the_hole_is_in_the_middle_or_anywhere():
    x = batch_of(300, 1, 16, 16)
    method = method_of("context_encoder", 2)
    middle = asked(method, x).drawn["box"]
    assert (middle == torch.tensor([[4, 4], [12, 12]])).all()
    method.central = False
    start = asked(method, x).drawn["box"][:, 0]
    assert start.min() == 0 and start.max() == 8 and set(start.flatten().tolist()) == set(range(9))


@pytest.mark.parametrize("central", [True, False])
def test_context_encoder_loss_equals_the_loops(central):
    method = method_of("context_encoder", 2, channels=2)
    method.central = central
    pretext = asked(method, batch_of(3, 2, 16, 16))
    with torch.no_grad():
        painted, terms = method.paint(pretext.views[0]), method(pretext)
    found = []
    for b, ((top, left), (bottom, right)) in enumerate(pretext.drawn["box"].tolist()):
        for c in range(2):
            for i in range(top, bottom):
                for j in range(left, right):
                    border = i in (top, bottom - 1) or j in (left, right - 1)
                    found.append((10 if border else 1) * (painted[b, c, i, j] - pretext.target[b, c, i, j]) ** 2)
    torch.testing.assert_close(terms["reconstruction"], sum(found) / len(found), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["loss"], 0.999 * terms["reconstruction"] + 0.001 * terms["adversarial"])


def test_context_encoder_does_not_see_the_hole():
    method = method_of("context_encoder", 3)
    x = batch_of(2, 1, 16, 16, 16)
    other = x.clone()
    other[..., 5:11, 5:11, 5:11] = 99  # the hole: the box of 4 to 12 without its band
    assert torch.equal(asked(method, x).views[0], asked(method, other).views[0])
    assert not torch.equal(asked(method, x).target.nan_to_num(), asked(method, other).target.nan_to_num())


def test_border_weights_and_judgement():
    weights = border_weights((5, 6, 7), 1)
    assert weights[1:-1, 1:-1, 1:-1].eq(1).all() and weights.sum() == 3 * 4 * 5 + 10 * (5 * 6 * 7 - 3 * 4 * 5)
    assert border_weights((4, 4), 0).eq(1).all()
    logits = batch_of(9)
    for real in (True, False):
        torch.testing.assert_close(judged(logits, real), F.binary_cross_entropy_with_logits(logits, torch.full((9,), float(real))))
    assert torch.isfinite(judged(torch.tensor([1e4, -1e4]), True)) and judged(logits.bfloat16(), True).dtype == torch.float32


def test_the_opponent_has_its_own_loss_and_optimiser():
    method = method_of("context_encoder", 2)
    pretext = asked(method, batch_of(4, 1, 32, 32))
    loss = method.adversary(pretext)
    loss.backward()
    assert all(p.grad is not None for p in method.adversary_parameters())
    assert all(p.grad is None for p in [*method.encoder.parameters(), *method.decoder.parameters(), *method.head.parameters()])
    assert {id(p) for p in method.adversary_parameters()} == {id(p) for p in method.opponent.parameters()}
    before = [p.detach().clone() for p in method.opponent.parameters()]
    fit(method, ImageSet(batch_of(8, 1, 32, 32)), steps=2, batch_size=4, device="cpu", progress=False)
    assert any(not torch.equal(a, b) for a, b in zip(before, method.opponent.parameters()))


def test_the_opponent_learns_to_tell_noise_from_smoothness():
    torch.manual_seed(0)
    opponent = Opponent(2, 1, width=4)
    optimiser = torch.optim.Adam(opponent.parameters(), 1e-2)
    for step in range(30):
        rough = batch_of(16, 1, 12, 12, seed=step)
        smooth = F.avg_pool2d(rough, 3, 1, 1)
        loss = judged(opponent(rough), True) + judged(opponent(smooth), False)
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    assert loss < 0.5 * math.log(4)


def test_without_an_opponent_only_the_reconstruction_is_left():
    torch.manual_seed(0)
    method = create("context_encoder", nets.create("resnet18", width=4, stem="small"), adversarial=0)
    terms = method(asked(method, batch_of(2, 1, 32, 32)))
    assert list(terms) == ["loss"] and method.adversary_parameters() == []
    fit(method, ImageSet(batch_of(4, 1, 32, 32)), steps=1, batch_size=2, device="cpu", progress=False)
