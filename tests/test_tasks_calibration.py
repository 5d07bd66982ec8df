"Calibration, temperature and class weights: against scikit-learn, loops and values by hand."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medssl_nb.data.images import Batch
from medssl_nb.nets.base import create
from medssl_nb.tasks.classification import Classifier, best_temperature, calibration_curve, calibration_error, class_weights, classification_loss


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed, bins", [(0, 10), (1, 5), (2, 1), (3, 50)])
def test_curve_equals_scikit_learn_and_error_a_loop(seed, bins):
    from sklearn.calibration import calibration_curve as reference

    rng = np.random.default_rng(seed)
    right, p = rng.integers(0, 2, 200), rng.random(200)
    said, found, cases = calibration_curve(right, p, bins)
    true, predicted = reference(right, p, n_bins=bins)
    np.testing.assert_allclose(found, true, atol=1e-12)
    np.testing.assert_allclose(said, predicted, atol=1e-12)
    assert cases.sum() == 200
    gaps = 0
    for b in range(bins):
        inside = [i for i in range(200) if b / bins < p[i] <= (b + 1) / bins]
        gaps += len(inside) / 200 * abs(np.mean(right[inside]) - np.mean(p[inside])) if inside else 0
    assert calibration_error(right, p, bins) == pytest.approx(gaps)


def test_edges_and_extremes_of_the_curve():
    from sklearn.calibration import calibration_curve as reference

    p = torch.tensor([0, 0.2, 0.4, 0.4, 1, 1], dtype=torch.double)
    said, found, cases = calibration_curve([0, 1, 0, 1, 1, 0], p, 5)
    true, predicted = reference([0, 1, 0, 1, 1, 0], p, n_bins=5)
    np.testing.assert_allclose(found, true)
    np.testing.assert_allclose(said, predicted)
    assert cases.tolist() == [2, 2, 2]
    assert calibration_error([1, 1], [1.0, 1.0]) == 0 and calibration_error([0, 0], [1.0, 1.0]) == 1
    assert calibration_error([True], [torch.tensor(0.25)]) == 0.75


@pytest.mark.parametrize("right, p, bins", [([1], [1.1], 5), ([1], [-0.1], 5), ([1], [float("nan")], 5), ([1, 0], [0.5], 5), ([], [], 5), ([1], [0.5], 0)])
def test_curve_refuses(right, p, bins):
    with pytest.raises(ValueError, match="one probability"):
        calibration_curve(right, p, bins)


@pytest.mark.parametrize("kind", ["classes", "labels", "grades"])
def test_temperature_is_the_best_of_a_grid_and_scales_with_the_logits(kind):
    logits = draw(400, 3)
    labels = (draw(400, 3, seed=1) > 0).float() if kind == "labels" else torch.arange(400) % (3 if kind == "classes" else 4)
    if kind == "classes":
        labels = logits.softmax(1).multinomial(1, generator=torch.Generator().manual_seed(2)).flatten()
    logits = 4 * logits
    T = best_temperature(logits, labels, kind)
    cost = {t: classification_loss(logits.double() / t, labels, kind).item() for t in (T, *np.geomspace(0.06, 19, 60))}
    assert cost[T] <= min(cost.values()) + 1e-6
    if kind == "classes":
        assert T == pytest.approx(4, rel=0.25) and best_temperature(logits / 2, labels) == pytest.approx(T / 2, rel=1e-2)


def test_temperature_keeps_the_answers_and_lowers_the_error_of_the_too_sure():
    logits = draw(3000, 4, seed=3)
    labels = logits.softmax(1).multinomial(1, generator=torch.Generator().manual_seed(4)).flatten()
    sure = 5 * logits
    T = best_temperature(sure[:1500], labels[:1500])
    before, after = ((F.softmax(part, 1).max(1)) for part in (sure[1500:], sure[1500:] / T))
    assert torch.equal(before.indices, after.indices)
    right = after.indices == labels[1500:]
    assert calibration_error(right, after.values) < 0.05 < calibration_error(right, before.values)


def test_temperature_without_an_optimum_stays_in_its_bounds():
    right = 5 * F.one_hot(torch.tensor([0, 1, 2]), 3).float()  # all right: the smaller T, the better
    assert 0.05 <= best_temperature(right, torch.tensor([0, 1, 2])) < 20
    assert best_temperature(right, torch.tensor([1, 2, 0])) == pytest.approx(20, rel=1e-2)


def test_class_weights_equal_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = torch.tensor([0] * 7 + [1] * 2 + [3] * 1)
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels.numpy())
    found = class_weights(labels, 5)
    np.testing.assert_allclose(found[[0, 1, 3]], expected, rtol=1e-6)
    assert found[[2, 4]].tolist() == [0, 0] and found[labels].mean().item() == pytest.approx(1)


@pytest.mark.parametrize("labels, classes", [([0, 5], 3), ([], 3)])
def test_class_weights_refuse(labels, classes):
    with pytest.raises(ValueError, match="whole numbers below the number of classes"):
        class_weights(torch.tensor(labels, dtype=torch.long), classes)


@pytest.mark.parametrize("kind", ["classes", "labels", "grades"])
def test_weighted_loss_equals_a_loop(kind):
    logits, weights = draw(6, 3), torch.tensor([1.0, 2.0, 5.0] + [0.5] * (kind == "grades"))
    labels = (draw(6, 3, seed=1) > 0).float() if kind == "labels" else torch.tensor([0, 1, 2, 2, 0, 3 if kind == "grades" else 1])
    total = share = 0.0
    for z, y in zip(logits, labels):
        if kind == "labels":
            for k in range(3):
                p = torch.sigmoid(z[k])
                total -= (weights[k] * y[k] * p.log() + (1 - y[k]) * (1 - p).log()).item()
                share += 1
        elif kind == "classes":
            total -= (weights[y] * z.log_softmax(0)[y]).item()
            share += weights[y].item()
        else:
            ladder = [math.log(torch.sigmoid(z[k] if y > k else -z[k]).item()) for k in range(3)]
            total -= weights[y].item() * sum(ladder) / 3
            share += weights[y].item()
    assert classification_loss(logits, labels, kind, weights).item() == pytest.approx(total / share, rel=1e-5)
    even = torch.full_like(weights, 1.0)
    assert classification_loss(logits, labels, kind, even).item() == pytest.approx(classification_loss(logits, labels, kind).item(), rel=1e-6)


def test_classifier_uses_its_weights_and_keeps_them_out_of_its_state():
    torch.manual_seed(0)
    model = Classifier(create("resnet18", width=4, stem="small"), 3, weights=[0.0, 1.0, 1.0])
    batch = Batch(draw(4, 1, 16, 16), labels=torch.tensor([0, 0, 0, 1]))
    model.eval()
    assert model(batch)["loss"].item() == pytest.approx(classification_loss(model.logits(batch.x)[3:], batch.labels[3:]).item(), rel=1e-5)
    assert not any("weights" in name for name in model.state_dict())
    for bad in ([1.0, 1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [float("nan"), 1.0, 1.0]):
        with pytest.raises(ValueError, match="give one for each"):
            Classifier(model.encoder, 3, weights=bad)
