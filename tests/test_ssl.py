"Every self-supervised method, by the contract: closed forms live in its chapter, what all must hold lives here."
import copy
import math

import pytest
import torch
import torch.nn.functional as F

from medssl_nb.data.images import ImageSet
from medssl_nb.nets.base import create_encoder
from medssl_nb.ssl.base import FAMILIES, Card, Method, Pretext, cards, create, mlp, register, table
from medssl_nb.ssl.contrastive import nt_xent
from medssl_nb.ssl.distillation import move_average, regression_loss, teacher_momentum
from medssl_nb.train.fit import fit
from small_methods import channels_of, method_of

EVERY = [pytest.param(c.name, d, id=f"{c.name}-{d}d") for c in cards() for d in c.dims]


def batch_of(spatial_dims, batch=4, channels=1, seed=0):
    return torch.randn(batch, channels, *[32 if spatial_dims == 2 else 16] * spatial_dims, generator=torch.Generator().manual_seed(seed))


def question(method, x, seed=0):
    return method.pretext(x, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name, d", EVERY)
def test_contract(name, d):
    method, x = method_of(name, d), batch_of(d, channels=channels_of(name))
    before = x.clone()
    pretext = question(method, x)
    assert torch.equal(x, before), "the batch was changed in place"
    assert all(torch.isfinite(v).all() and not v.requires_grad for v in pretext.views)
    again = question(method, x)
    assert all(torch.equal(a, b) for a, b in zip(pretext.views, again.views)), "a generator does not fix the views"
    terms = method(pretext)
    assert terms["loss"].ndim == 0 and torch.isfinite(terms["loss"])
    terms["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.encoder.parameters())
    method.after_step(0.5)


@pytest.mark.parametrize("name, d", EVERY)
def test_takes_a_batch_and_several_channels(name, d):
    method, x = method_of(name, d, channels=2), batch_of(d, channels=2)
    images = ImageSet(x)
    batch = next(images.batches(4))
    a, b = question(method, batch), question(method, batch.x)
    assert all(torch.equal(p, q) for p, q in zip(a.views, b.views))
    assert torch.isfinite(method(a)["loss"])


@pytest.mark.parametrize("name, d", EVERY)
def test_bf16_stays_near_float32(name, d):
    method, pretext = method_of(name, d), None
    pretext = question(method, batch_of(d, channels=channels_of(name)))
    exact = method(pretext)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = method(pretext)["loss"]
    assert rough.dtype == torch.float32
    assert abs(rough - exact) < 0.05 * exact.abs() + 0.05


@pytest.mark.parametrize("name, d", EVERY)
def test_constant_images_do_not_break_it(name, d):
    method = method_of(name, d)
    terms = method(question(method, torch.zeros_like(batch_of(d, 2, channels_of(name)))))
    terms["loss"].backward()
    assert torch.isfinite(terms["loss"])
    assert all(torch.isfinite(p.grad).all() for p in method.encoder.parameters() if p.grad is not None)


@pytest.mark.parametrize("name, d", EVERY)
def test_picture_shows_every_view(name, d):
    method, x = method_of(name, d), batch_of(d, channels=channels_of(name))
    figure = method.picture(x)
    images = [axis for axis in figure.axes if axis.images]
    assert len(images) == len(x) + sum(min(len(v), len(x)) for v in question(method, x).views)


@pytest.mark.parametrize("name", [c.name for c in cards()])
def test_learns_a_little(name):
    "Forty steps lower the loss on the same few images."
    torch.manual_seed(0)
    coarse = F.interpolate(torch.randn(16, channels_of(name), 5, 5), size=(16, 16), mode="bicubic")
    method = method_of(name, 2)
    history = fit(method, ImageSet(coarse), steps=40, batch_size=16, lr=5e-3, device="cpu", precision="fp32", progress=False)
    first, last = (sum(part) / 5 for part in (history.terms["loss"][:5], history.terms["loss"][-5:]))
    assert last < 0.95 * first, (first, last)


def test_cannot_cheat_by_biases():
    "With the image taken away, the best answer is that of guessing."
    method = method_of("rotation", 2)
    torch.nn.init.zeros_(method.head.weight), torch.nn.init.zeros_(method.head.bias)
    pretext = method.pretext(batch_of(2, 64), torch.Generator().manual_seed(1))
    torch.testing.assert_close(method(pretext)["loss"], torch.tensor(4.0).log())


def nt_xent_by_loops(first, second, temperature):
    z, n, total = [v / v.norm() for v in torch.cat([first, second]).double()], len(first), 0.0
    for i in range(2 * n):
        others = sum(math.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(z[i] @ z[(i + n) % (2 * n)] / temperature) / others)
    return total / (2 * n)


@pytest.mark.parametrize("n, temperature", [(2, 0.1), (5, 0.5), (7, 0.07)])
def test_nt_xent_equals_the_loops(n, temperature):
    first, second = torch.randn(n, 6), torch.randn(n, 6)
    torch.testing.assert_close(nt_xent(first, second, temperature).item(), nt_xent_by_loops(first, second, temperature), rtol=1e-4, atol=1e-5)


def test_nt_xent_is_sound_at_the_edges():
    z = F.normalize(torch.randn(2, 8), dim=1).requires_grad_()
    for temperature in (0.01, 0.1):
        loss = nt_xent(z, z.detach(), temperature)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(z.grad).all()
    same = torch.ones(4, 8)
    torch.testing.assert_close(nt_xent(same, same, 0.01), torch.tensor(7.0).log())


def test_nt_xent_in_bf16_is_computed_in_float32():
    first, second = torch.randn(64, 32), torch.randn(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(first, second, 0.05)
    torch.testing.assert_close(loss, nt_xent(first, second, 0.05), rtol=1e-6, atol=1e-6)


def test_byol_loss_by_loops_and_its_gradient():
    prediction, target = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = regression_loss(prediction, target)
    slow = sum((p / p.norm() - t / t.norm()).square().sum() for p, t in zip(prediction, target)) / 5
    torch.testing.assert_close(loss, slow)
    loss.backward()
    assert target.grad is None


def test_byol_teacher_follows_parameters_only():
    method = method_of("byol", 2)
    student = dict(method.encoder.named_parameters())
    old = {k: v.clone() for k, v in method.teacher_encoder.named_parameters()}
    with torch.no_grad():
        for p in student.values():
            p.add_(1.0)
    statistics = {k: v.clone() for k, v in method.teacher_encoder.named_buffers()}
    method.after_step(0.0)
    for k, v in method.teacher_encoder.named_parameters():
        torch.testing.assert_close(v, 0.996 * old[k] + 0.004 * student[k])
    assert all(torch.equal(v, statistics[k]) for k, v in method.teacher_encoder.named_buffers())
    assert [round(teacher_momentum(p), 4) for p in (0, 0.5, 1)] == [0.996, 0.998, 1.0]


def test_byol_is_the_same_for_both_orders():
    method, x = method_of("byol", 2), batch_of(2)
    pretext = question(method, x)
    swapped = Pretext(pretext.views[::-1])
    torch.testing.assert_close(copy.deepcopy(method)(pretext)["loss"], copy.deepcopy(method)(swapped)["loss"])


def test_genesis_target_is_the_flipped_image_and_never_the_view():
    method, x = method_of("models_genesis", 3), batch_of(3)
    pretext = question(method, x)
    target = pretext.target
    assert target.min() == 0 and target.max() == 1
    for image, goal in zip(x, target):
        unit = (image - image.min()) / (image.max() - image.min())
        turns = [unit.flip(axes) if axes else unit for axes in ([], [1], [2], [3], [1, 2], [1, 3], [2, 3], [1, 2, 3])]
        assert any(torch.allclose(t, goal, atol=1e-6) for t in turns)
    assert not torch.allclose(pretext.views[0], x)


def test_genesis_frequencies():
    method = method_of("models_genesis", 2)
    drawn = method.pretext(torch.randn(3000, 1, 16, 16), torch.Generator().manual_seed(0)).drawn
    outside = drawn["outside"].float().mean()
    assert abs(outside - 0.72) < 0.03  # 0.9 · 0.8
    inverted = drawn["decreasing"].float().mean()
    assert abs(inverted - 0.45) < 0.03  # 0.9 · 0.5


def test_cards_are_complete_and_the_table_has_them_all():
    names = [c.name for c in cards()]
    assert len(set(names)) == len(names) and {"rotation", "simclr", "byol", "models_genesis"} <= set(names)
    assert [FAMILIES.index(c.family) for c in cards()] == sorted(FAMILIES.index(c.family) for c in cards())
    assert all(f"`{name}`" in table() for name in names)


@pytest.mark.parametrize("make, said", [
    (lambda e: create("simclear", e), "simclr"),
    (lambda e: create("byol", e, tau=1), "no option tau"),
    (lambda e: Card("x", "magic", 2020, "", (2,), ""), "magic"),
    (lambda e: create("simclr", e).pretext(torch.zeros(3, 32, 32)), "(B, C, H, W)"),
    (lambda e: create("rotation", create_encoder("resnet18", 3, width=4)).pretext(torch.zeros(1, 1, 8, 16, 16)), "cube"),
])
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        make(create_encoder("resnet18", 2, width=4, stem="small"))


def test_a_name_cannot_be_taken_twice():
    with pytest.raises(ValueError, match="already"):
        @register
        class Twin(Method):
            card = Card("byol", "distillation", 2020, "", (2,), "")


def test_mlp_ends_as_asked():
    assert isinstance(mlp(4, 8, 2, last_norm=True)[-1], torch.nn.BatchNorm1d) and mlp(4, 8, 2, last_norm=True)[-2].bias is None
