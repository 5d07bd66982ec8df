"BYOL and SimSiam: closed forms, loops, and where the gradient flows."
import copy

import pytest
import torch
import torch.nn.functional as F

from medssl_nb.nets.base import create_encoder
from medssl_nb.ssl.base import Pretext
from medssl_nb.ssl.distillation import BYOL, SimSiam, both_ways, regression_loss, teacher_momentum


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder(dims=2, seed=0):
    torch.manual_seed(seed)
    return create_encoder("resnet18", dims, width=4, stem="small")


def simsiam(**options):
    return SimSiam(encoder(), **{"hidden": 16, "dim": 8, **options})


def byol(**options):
    return BYOL(encoder(), **{"hidden": 16, "dim": 8, **options})


def views(seed=0, batch=6):
    return Pretext((numbers(seed, batch, 1, 16, 16), numbers(seed + 1, batch, 1, 16, 16)))


# SimSiam's loss

def by_loops(p, z):
    "Chen and He 2021, algorithm 1: half of each direction's mean negative cosine."
    total = 0.0
    for a, b in ((p[0], z[1]), (p[1], z[0])):
        for row, other in zip(a.double(), b.double()):
            total -= (row @ other) / (row.norm() * other.norm()) / len(a) / 2
    return total


@pytest.mark.parametrize("batch, dim", [(2, 3), (7, 5)])
def test_the_loss_by_loops(batch, dim):
    p, z = numbers(0, 2, batch, dim), numbers(1, 2, batch, dim)
    torch.testing.assert_close((both_ways(p, z) / 4 - 1).double(), by_loops(p, z), rtol=1e-5, atol=1e-6)


def test_the_method_computes_that_loss():
    method, pretext = simsiam(), views()
    other = copy.deepcopy(method)
    z = [other.projector(other.embed(v)) for v in pretext.views]
    expected = by_loops([other.predictor(v).detach() for v in z], [v.detach() for v in z])
    torch.testing.assert_close(method(pretext)["loss"].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("turn, expected", [(1.0, -1.0), (-1.0, 1.0)])
def test_the_ends_of_the_scale(turn, expected):
    p = numbers(0, 2, 5, 4)
    torch.testing.assert_close(both_ways(p, 3 * turn * p.flip(0)) / 4 - 1, torch.tensor(expected))


def test_right_angles_and_the_length_do_not_count():
    p, z = numbers(0, 2, 5, 4), numbers(1, 2, 5, 4)
    torch.testing.assert_close(both_ways(p, z), both_ways(0.01 * p, 100 * z))
    z = [b - (a * b).sum(1, keepdim=True) / a.square().sum(1, keepdim=True) * a for a, b in zip(p, z.flip(0))][::-1]
    torch.testing.assert_close(both_ways(p, z) / 4 - 1, torch.tensor(0.0), atol=1e-6, rtol=0)


def test_both_orders_cost_the_same():
    pretext = views()
    for method in (simsiam(), byol()):
        one, two = (copy.deepcopy(method)(Pretext(v))["loss"] for v in (pretext.views, pretext.views[::-1]))
        torch.testing.assert_close(one, two)


# Where the gradient flows

def test_no_gradient_into_the_target():
    p, z = numbers(0, 2, 5, 4).requires_grad_(), numbers(1, 2, 5, 4).requires_grad_()
    both_ways(p, z).backward()
    assert p.grad.abs().max() > 0 and z.grad is None


def test_the_gradient_passes_the_predictor_only():
    "The gradient is that of targets computed beforehand; and a predictor that answers a constant stops it."
    method, pretext = simsiam(), views()
    still = copy.deepcopy(method)
    method(pretext)["loss"].backward()
    with torch.no_grad():
        targets = [still.projector(still.embed(v)) for v in pretext.views]
    predictions = [still.predictor(still.projector(still.embed(v))) for v in pretext.views]
    (both_ways(predictions, targets) / 4 - 1).backward()
    for (name, a), b in zip(method.named_parameters(), still.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    method.zero_grad()
    torch.nn.init.zeros_(method.predictor[-1].weight), torch.nn.init.ones_(method.predictor[-1].bias)
    method(pretext)["loss"].backward()
    assert all(p.grad.abs().max() == 0 for part in (method.encoder, method.projector) for p in part.parameters())
    assert method.predictor[-1].bias.grad.abs().max() > 0


# SimSiam's heads

def test_heads_are_those_of_the_paper():
    method = SimSiam(encoder(), hidden=12, dim=8)
    kinds = [type(layer).__name__ for layer in method.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"] and not method.projector[-1].affine
    sizes = [tuple(layer.weight.shape) for layer in method.projector if isinstance(layer, torch.nn.Linear)]
    assert sizes == [(12, method.encoder.channels[-1]), (12, 12), (8, 12)]
    assert [type(layer).__name__ for layer in method.predictor] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert method.predictor[0].weight.shape == (2, 8) and method.predictor[-1].bias is not None
    assert not any("teacher" in name for name, _ in method.named_modules())


def test_default_sizes():
    method = SimSiam(encoder())
    assert method.projector[-2].weight.shape == (2048, 2048) and method.predictor[0].weight.shape == (512, 2048)


def test_biases_alone_do_not_answer():
    "A head that ignores its input projects everything to 0, and 0 agrees with nothing."
    method = simsiam()
    for layer in method.projector:
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.zeros_(layer.weight)
    assert method(views())["loss"] > -0.05


def test_a_batch_of_two_and_float64():
    method = simsiam()
    loss = method(views(batch=2))["loss"]
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in method.parameters())


# BYOL is what it was

def test_byol_by_the_formula():
    method, pretext = byol(), views()
    student, first, second = copy.deepcopy(method), *pretext.views
    answer = lambda v: F.normalize(student.predictor(student.projector(student.encoder(v)[-1].mean((2, 3)))), dim=1)
    said = lambda v: F.normalize(student.teacher_projector(student.teacher_encoder(v)[-1].mean((2, 3))), dim=1)
    expected = (answer(first) - said(second)).square().sum(1).mean() + (answer(second) - said(first)).square().sum(1).mean()
    torch.testing.assert_close(method(pretext)["loss"], expected)


def test_byol_draws_its_weights_in_the_old_order():
    "Encoder, projector, predictor, each by PyTorch's default: the seed's weights are those of earlier versions."
    method = byol()
    network = encoder()
    sizes = [(network.channels[-1], 16), (16, 8), (8, 16), (16, 8)]
    drawn = [torch.nn.Linear(a, b, bias=i % 2 == 1).weight for i, (a, b) in enumerate(sizes)]
    found = [m.weight for part in (method.projector, method.predictor) for m in part if isinstance(m, torch.nn.Linear)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, found))
    teacher = [*method.teacher_encoder.parameters(), *method.teacher_projector.parameters()]
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(teacher, [*method.encoder.parameters(), *method.projector.parameters()]))


@pytest.mark.parametrize("start", [0.0, 0.9, 0.996])
def test_the_teacher_moves_by_the_schedule(start):
    method = byol(momentum=start)
    with torch.no_grad():
        for p in [*method.encoder.parameters(), *method.projector.parameters()]:
            p.add_(1.0)
    old = copy.deepcopy(method.teacher_projector[0].weight)
    method.after_step(0.25)
    share = teacher_momentum(0.25, start)
    torch.testing.assert_close(method.teacher_projector[0].weight, old + (1 - share))
    before = method.teacher_projector[0].weight.clone()
    method.after_step(1.0)
    assert torch.equal(method.teacher_projector[0].weight, before), "at the end the teacher stands still"


def test_regression_loss_is_bounded_and_sound_for_zeros():
    zero = torch.zeros(3, 4, requires_grad=True)
    loss = regression_loss(zero, numbers(0, 3, 4))
    loss.backward()
    assert loss == 2 and torch.isfinite(zero.grad).all()
