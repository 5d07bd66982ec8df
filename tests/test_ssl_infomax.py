"Information maximisation: closed forms, loops, published scales, and the edges where statistics break."
import math

import pytest
import torch
import torch.nn.functional as F

from medssl_nb.nets.base import create_encoder
from medssl_nb.ssl.base import Pretext, create
from medssl_nb.ssl.infomax import (
    barlow_terms, covariance_term, cross_correlation, deal, projector, squared_off_diagonal, variance_term, vicreg_terms, whiten, whitened_distance,
)
from small_methods import drawn

NAMES = ("barlow_twins", "vicreg", "wmse")


def small(name, **options):
    torch.manual_seed(0)
    options = {"hidden": 32, "dim": 4, **options}
    return create(name, create_encoder("resnet18", 2, width=4, stem="small"), **options)


def barlow_by_loops(first, second):
    n, d = first.shape
    columns = lambda z: [[(v - sum(c) / n) / math.sqrt(sum((u - sum(c) / n) ** 2 for u in c) / n + 1e-5) for v in c] for c in z.T.tolist()]
    a, b = columns(first), columns(second)
    C = [[sum(p * q for p, q in zip(a[i], b[j])) / n for j in range(d)] for i in range(d)]
    return sum((1 - C[i][i]) ** 2 for i in range(d)), sum(C[i][j] ** 2 for i in range(d) for j in range(d) if i != j)


@pytest.mark.parametrize("n, d", [(2, 3), (7, 5), (40, 4)])
def test_barlow_equals_the_loops(n, d):
    first, second = 3 * drawn(n, d, dtype=torch.float64) + 1, drawn(n, d, seed=1, dtype=torch.float64)
    terms = barlow_terms(first, second)
    invariance, redundancy = barlow_by_loops(first, second)
    torch.testing.assert_close(terms["invariance"].item(), invariance, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(terms["redundancy"].item(), redundancy, rtol=1e-6, atol=1e-9)


def test_barlow_ignores_shift_and_stretch_and_transposes():
    first, second = drawn(64, 6), drawn(64, 6, seed=1)
    stretch = torch.tensor([1, 10, 0.5, 3, 100, 2.0])
    C = cross_correlation(first, second)
    torch.testing.assert_close(cross_correlation(first * stretch + 5, second), C, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(cross_correlation(second, first), C.T)


def test_barlow_weight_is_that_of_the_code_and_terms_are_sums():
    method = small("barlow_twins", dim=8)
    assert method.weight == 0.0051
    terms = method(method.pretext(drawn(6, 1, 16, 16), torch.Generator().manual_seed(0)))
    torch.testing.assert_close(terms["loss"], terms["invariance"] + 0.0051 * terms["redundancy"])
    uncorrelated = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    copies = uncorrelated[:, :1].expand(4, 10)
    torch.testing.assert_close(barlow_terms(copies, copies)["redundancy"], torch.tensor(90.0), atol=1e-2, rtol=0)


def test_off_diagonal_is_exact_beside_a_large_diagonal():
    matrix = 1e6 * torch.eye(50)
    matrix[3, 4] = 1e-3
    torch.testing.assert_close(squared_off_diagonal(matrix), torch.tensor(1e-6))


def vicreg_by_loops(first, second):
    n, d = first.shape
    invariance = sum((p - q) ** 2 for a, b in zip(first.tolist(), second.tolist()) for p, q in zip(a, b)) / (n * d)
    variance = covariance = 0.0
    for z in (first, second):
        columns = [[v - sum(c) / n for v in c] for c in z.T.tolist()]
        S = [[sum(p * q for p, q in zip(a, b)) / (n - 1) for b in columns] for a in columns]
        variance += sum(max(0.0, 1 - math.sqrt(S[i][i] + 1e-4)) for i in range(d)) / d / 2  # halved a view, as the authors' code does
        covariance += sum(S[i][j] ** 2 for i in range(d) for j in range(d) if i != j) / d
    return {"invariance": invariance, "variance": variance, "covariance": covariance}


@pytest.mark.parametrize("n, d", [(2, 3), (7, 5), (30, 4)])
def test_vicreg_equals_the_loops(n, d):
    first, second = drawn(n, d, dtype=torch.float64), 0.5 * drawn(n, d, seed=1, dtype=torch.float64)
    for name, value in vicreg_by_loops(first, second).items():
        torch.testing.assert_close(vicreg_terms(first, second)[name].item(), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (0.0, 25.0, 1.0), (25.0, 0.0, 1.0), (25.0, 25.0, 0.0)])
def test_vicreg_weighs_each_term(weights):
    method = small("vicreg", weights=weights)
    terms = method(method.pretext(drawn(6, 1, 16, 16), torch.Generator().manual_seed(0)))
    expected = sum(w * terms[name] for w, name in zip(weights, ("invariance", "variance", "covariance")))
    torch.testing.assert_close(terms["loss"], expected)
    assert small("vicreg").weights == {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}


def test_vicreg_gradient_is_sound_where_the_variance_is_zero():
    z = torch.zeros(4, 3, requires_grad=True)
    (variance_term(z) + covariance_term(z)).backward()
    assert torch.isfinite(z.grad).all()


def whiten_by_loops(z):
    n, d = z.shape
    centred = z - z.mean(0)
    S = [[float((centred[:, i] * centred[:, j]).sum() / (n - 1)) for j in range(d)] for i in range(d)]
    L = [[0.0] * d for _ in range(d)]
    for i in range(d):
        for j in range(i + 1):
            rest = S[i][j] - sum(L[i][k] * L[j][k] for k in range(j))
            L[i][j] = math.sqrt(rest) if i == j else rest / L[j][j]
    rows = []
    for row in centred.tolist():
        w = []
        for i in range(d):
            w.append((row[i] - sum(L[i][k] * w[k] for k in range(i))) / L[i][i])
        rows.append(w)
    return torch.tensor(rows, dtype=torch.float64)


def test_whiten_equals_the_loops_and_is_white():
    z = drawn(12, 4, dtype=torch.float64) @ drawn(4, 4, seed=1, dtype=torch.float64) + 7
    torch.testing.assert_close(whiten(z), whiten_by_loops(z))
    torch.testing.assert_close(torch.cov(whiten(z).T), torch.eye(4, dtype=torch.float64))


def test_whiten_stays_exact_where_float32_would_not():
    z = (drawn(200, 16, dtype=torch.float64) * torch.logspace(-2.5, 1, 16)) @ drawn(16, 16, seed=1, dtype=torch.float64)
    torch.testing.assert_close(torch.cov(whiten(z).T), torch.eye(16, dtype=torch.float64), atol=1e-6, rtol=0)


def test_whitening_undoes_any_lower_triangular_map_and_no_other():
    z = drawn(50, 5, dtype=torch.float64)
    lower = drawn(5, 5, seed=2, dtype=torch.float64).tril(-1) + torch.diag(torch.tensor([1, 2, 0.1, 5, 3.0], dtype=torch.float64))
    torch.testing.assert_close(whiten(z @ lower.T + 3), whiten(z))
    assert not torch.allclose(whiten(z @ lower), whiten(z), atol=0.1)


def test_a_slice_of_one_image_more_than_dimensions_is_a_simplex():
    cosine = F.normalize(whiten(drawn(6, 5)), dim=1)
    torch.testing.assert_close(cosine @ cosine.T, torch.where(torch.eye(6, dtype=torch.bool), 1.0, -0.2).double())


def test_every_slice_is_whitened_by_itself():
    stack = torch.stack([drawn(20, 3), 4 * drawn(20, 3, seed=1) + 2])
    for alone, together in zip(stack, whiten(stack)):
        torch.testing.assert_close(whiten(alone), together)


@pytest.mark.parametrize("n, size, slices, each", [(8, 4, 2, 4), (9, 4, 2, 4), (11, 4, 2, 5), (3, 4, 1, 3), (300, 128, 2, 150)])
def test_deal_gives_equal_slices_without_repeats(n, size, slices, each):
    dealt = deal(torch.rand(n, 3, generator=torch.Generator().manual_seed(0)), size)
    assert dealt.shape == (3 * slices, each)
    for one_round in dealt.reshape(3, -1):
        assert len(set(one_round.tolist())) == slices * each and one_round.max() < n


def test_whitened_distance_equals_the_loops():
    first, second, keys = drawn(12, 3, dtype=torch.float64), drawn(12, 3, seed=1, dtype=torch.float64), torch.rand(12, 2, generator=torch.Generator().manual_seed(3))
    total = 0.0
    for column in keys.T:
        order = sorted(range(12), key=lambda i: column[i].item())
        for part in (order[:6], order[6:]):
            a, b = whiten_by_loops(first[part]), whiten_by_loops(second[part])
            total += sum((p / p.norm() - q / q.norm()).square().sum().item() for p, q in zip(a, b))
    torch.testing.assert_close(whitened_distance(first, second, keys, 6).item(), total / 24)


def test_whitened_distance_by_hand():
    z, keys = drawn(40, 4), torch.rand(40, 1, generator=torch.Generator().manual_seed(0))
    for other, expected in ((z, 0.0), (2 * z + 1, 0.0), (-z, 4.0), (torch.zeros(40, 4), 2.0)):
        torch.testing.assert_close(whitened_distance(z, other, keys, 20, shrinkage=1e-6), torch.tensor(expected), atol=1e-3, rtol=0)


def test_wmse_slices_are_twice_the_dimension_unless_told():
    assert small("wmse").slice_size == 8 and small("wmse", slice_size=20).slice_size == 20
    method = small("wmse", rounds=3, shrinkage=0.1)
    pretext = method.pretext(drawn(6, 1, 16, 16), torch.Generator().manual_seed(0))
    assert pretext.target.shape == (6, 3) and torch.isfinite(method(pretext)["loss"])


@pytest.mark.parametrize("n, said", [(4, "more than 4 images"), (3, "smaller dim")])
def test_wmse_says_when_a_batch_is_too_small(n, said):
    method = small("wmse")
    with pytest.raises(ValueError, match=said):
        method(method.pretext(drawn(n, 1, 16, 16), torch.Generator().manual_seed(0)))


def test_a_singular_covariance_is_named_and_shrinkage_goes_on():
    flat = drawn(20, 3)
    flat[:, 1] = 0
    with pytest.raises(ValueError, match="singular"):
        whiten(flat)
    assert torch.isfinite(whiten(flat, shrinkage=1e-3)).all()
    z = torch.ones(4, 3, requires_grad=True)
    loss = whitened_distance(z, z + 1, torch.rand(4, 1), 4, shrinkage=0.1)
    loss.backward()
    torch.testing.assert_close(loss.item(), 2.0) and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("name, solved", [("barlow_twins", 3.0), ("vicreg", 20.0), ("wmse", 1.0)])
def test_biases_alone_do_not_solve_it(name, solved):
    "Without an image to see, the loss stays at its price for silence: d, 25 · 0.99, 2."
    method = small(name, **({"shrinkage": 0.1} if name == "wmse" else {}))
    nothing = Pretext((torch.zeros(16, 1, 16, 16),) * 2, torch.rand(16, 1) if name == "wmse" else None)
    for p in method.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p)
    assert method(nothing)["loss"] > solved


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_images_and_of_views_does_not_matter(name):
    method = small(name).double()
    views = (drawn(10, 1, 16, 16, dtype=torch.float64), drawn(10, 1, 16, 16, seed=1, dtype=torch.float64))
    target = torch.rand(10, 1, generator=torch.Generator().manual_seed(0)) if name == "wmse" else None
    order = torch.randperm(10, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        loss = method(Pretext(views, target))["loss"]
        shuffled = method(Pretext(tuple(v[order] for v in views), None if target is None else target[order]))["loss"]
        swapped = method(Pretext(views[::-1], target))["loss"]
    torch.testing.assert_close(shuffled, loss)
    torch.testing.assert_close(swapped, loss)


@pytest.mark.parametrize("function", [
    lambda a, b: barlow_terms(a, b)["redundancy"], lambda a, b: vicreg_terms(a, b)["covariance"], lambda a, b: vicreg_terms(a, b)["variance"],
    lambda a, b: whitened_distance(a, b, torch.rand(64, 1, generator=torch.Generator().manual_seed(0)), 32),
], ids=["barlow", "covariance", "variance", "whitening"])
def test_statistics_are_not_taken_in_half_precision(function):
    first, second = 0.3 * drawn(64, 8) + 1, 0.3 * drawn(64, 8, seed=1) + 1
    with torch.autocast("cpu", torch.bfloat16):
        loss = function(first, second)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, function(first, second), rtol=1e-6, atol=1e-6)
    assert function(first.bfloat16(), second.bfloat16()).dtype == torch.float32


def test_projectors_are_those_of_the_papers():
    linear = [m for m in projector(512, 8192 // 64, 96) if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is None) for m in linear] == [(512, 128, True), (128, 128, True), (128, 96, True)]
    assert not isinstance(projector(4, 8, 2)[-1], torch.nn.BatchNorm1d)
