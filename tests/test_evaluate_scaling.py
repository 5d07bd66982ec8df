"The power law and its transition, the summed kernels, and the photographs."
import math
import socket
import sys
import types

import numpy as np
import pytest
import torch

from medssl_nb import nets
from medssl_nb.evaluate.scaling import PHOTOGRAPHS, PowerLaw, fit_power_law, generalist, one_channel, photographs, power_law_intervals

SIZES = np.array([1, 3, 10, 30, 100, 300, 1000])


@pytest.mark.parametrize("scale, exponent, floor", [(0.6, 0.5, 0.05), (0.4, 0.2, 0.1), (3.0, 1.3, 0.01), (0.5, 0.8, 0.3)])
def test_a_known_law_is_found(scale, exponent, floor):
    law = PowerLaw(scale, exponent, floor)
    found = fit_power_law(SIZES, law(SIZES))
    assert np.allclose([found.scale, found.exponent, found.floor], [scale, exponent, floor], rtol=1e-3)
    assert math.isclose(found.transition, (scale / floor) ** (1 / exponent), rel_tol=5e-3)


def test_the_transition_is_where_half_is_floor_and_the_slope_is_halved():
    law = PowerLaw(0.6, 0.5, 0.05)
    assert math.isclose(law(law.transition), 2 * law.floor)
    assert math.isclose(law.slope(law.transition), -law.exponent / 2)
    n, step = 30.0, 1e-5
    measured = (math.log(law(n * (1 + step))) - math.log(law(n * (1 - step)))) / (2 * step)
    assert math.isclose(measured, law.slope(n), rel_tol=1e-6)
    assert PowerLaw(0.6, 0.5, 0.0).transition == math.inf and PowerLaw(0.6, 0.5, 0.0).slope(7) == -0.5
    assert PowerLaw(0.6, 1e-4, 1e-9).transition > 1e300  # and no OverflowError


def test_units_of_sizes_and_errors_scale_the_law():
    rng = np.random.default_rng(1)
    errors = PowerLaw(0.6, 0.5, 0.05)(SIZES) * np.exp(0.05 * rng.standard_normal(len(SIZES)))
    one, other = fit_power_law(SIZES, errors), fit_power_law(7 * SIZES, 100 * errors)
    assert math.isclose(one.exponent, other.exponent, rel_tol=1e-3) and math.isclose(100 * one.floor, other.floor, rel_tol=1e-3)
    assert math.isclose(7 * one.transition, other.transition, rel_tol=1e-2)
    mixed = rng.permutation(len(SIZES))
    assert math.isclose(fit_power_law(SIZES[mixed], errors[mixed]).floor, one.floor, rel_tol=1e-3)


def test_the_fit_is_no_worse_than_scipys_curve_fit():
    from scipy.optimize import curve_fit

    rng = np.random.default_rng(2)
    n = np.repeat(SIZES, 3)
    for seed in range(5):
        errors = PowerLaw(0.6, 0.5, 0.05)(n) * np.exp(0.1 * rng.standard_normal(len(n)))
        found = fit_power_law(n, errors)
        theirs, _ = curve_fit(lambda x, a, b, c: np.log(a * x**-b + c), n, np.log(errors), p0=(0.5, 0.5, 0.03), bounds=(1e-9, 10))
        squares = [((np.log(law(n)) - np.log(errors)) ** 2).sum() for law in (found, PowerLaw(*theirs))]
        assert squares[0] <= squares[1] * (1 + 1e-6)


def test_without_a_floor_it_is_a_straight_line():
    errors = 0.6 * SIZES**-0.4
    straight, bent = fit_power_law(SIZES, errors, floor=False), fit_power_law(SIZES, errors)
    assert straight.floor == 0 and math.isclose(straight.exponent, 0.4, rel_tol=1e-9) and math.isclose(straight.scale, 0.6, rel_tol=1e-9)
    assert bent.transition > 1e6 and math.isclose(bent.exponent, 0.4, rel_tol=1e-2)


@pytest.mark.parametrize("sizes, errors, words", [
    ([1, 3, 10, 30], [0.5, 0.4, 0.3], "one size and one error a run"),
    ([[1, 3], [10, 30]], [[0.5, 0.4], [0.3, 0.2]], "one size and one error a run"),
    ([1, 3, 10, 10], [0.5, 0.4, 0.3, 0.3], "3 different sizes"),
    ([0, 3, 10, 30], [0.5, 0.4, 0.3, 0.2], "above 0"),
    ([1, 3, 10, 30], [0.5, 0.4, 0.0, 0.2], "above 0"),
    ([1, 3, 10, 30], [0.5, 0.4, math.nan, 0.2], "finite"),
    ([1, 3, 10, 30], [0.2, 0.3, 0.4, 0.5], "do not fall"),
    ([1, 3, 10, 30], [0.2, 0.2, 0.2, 0.2], "do not fall"),
])
def test_bad_runs_are_refused(sizes, errors, words):
    with pytest.raises(ValueError, match=words):
        fit_power_law(sizes, errors)


def test_intervals_mostly_hold_the_truth_and_may_end_at_infinity():
    law, n, held = PowerLaw(0.6, 0.5, 0.05), np.repeat(SIZES, 3), {"exponent": 0, "floor": 0, "transition": 0}
    for seed in range(10):
        noise = np.exp(0.1 * np.random.default_rng(seed).standard_normal(len(n)))
        found = power_law_intervals(n, law(n) * noise, draws=60)
        for name, truth in (("exponent", 0.5), ("floor", 0.05), ("transition", 144)):
            held[name] += found[name].low < truth < found[name].high
            assert found[name].low <= found[name].high
    assert min(held.values()) >= 6, held  # 95 % of draws of many runs, somewhat fewer of 21
    assert power_law_intervals(n, 0.6 * n**-0.5 * noise, draws=60)["transition"].high == math.inf


def test_summed_kernels_answer_a_grey_image_as_the_colour_network_does():
    torch.manual_seed(0)
    colour = nets.create_encoder("resnet18", in_channels=3, width=4).eval()
    grey, x = one_channel(colour).eval(), torch.randn(2, 1, 48, 40)
    assert grey.in_channels == 1
    with torch.no_grad():
        for mine, theirs in zip(grey(x), colour(x.expand(-1, 3, -1, -1))):
            assert torch.allclose(mine, theirs, atol=1e-5)
    assert torch.equal(grey.stem.conv.weight, colour.stem.conv.weight.sum(1, keepdim=True))
    colour.recipe = None
    with pytest.raises(ValueError, match="create_encoder"):
        one_channel(colour)


class _LikeTimm(torch.nn.Module):
    "A network as timm makes them with features_only=True."

    def __init__(self, in_chans):
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(in_chans, 4, 3, 2, 1), torch.nn.Conv2d(4, 8, 3, 2, 1)
        self.feature_info = types.SimpleNamespace(channels=lambda: [4, 8], reduction=lambda: [2, 4])

    def forward(self, x):
        return [first := self.conv1(x), self.conv2(first.relu())]


@pytest.fixture
def timm(monkeypatch):
    "A stand-in for timm, whose weights can be had (`made`), or not (`offline`)."
    stub = types.ModuleType("timm")
    stub.made, stub.offline = [], False

    def create_model(name, pretrained=False, features_only=True, in_chans=3):
        if pretrained and stub.offline:
            raise OSError("no network")
        stub.made.append((pretrained, _LikeTimm(in_chans)))
        return stub.made[-1][1]

    stub.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", stub)
    return stub


def test_timms_weights_are_summed_too(timm):
    encoder, x = generalist("timm:any"), torch.randn(1, 1, 16, 16)
    colour = next(network for pretrained, network in timm.made if pretrained)
    assert encoder.in_channels == 1 and encoder.channels == [4, 8]
    with torch.no_grad():
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(encoder(x), colour(x.expand(-1, 3, -1, -1))))
    with pytest.raises(ValueError, match="timm:"):
        generalist("resnet18")


def test_weights_that_cannot_be_had_are_told_and_none_are_drawn_in_their_place(timm):
    timm.offline = True
    with pytest.raises(ConnectionError, match="resnet18"):
        generalist("timm:resnet18")
    assert generalist("timm:resnet18", pretrained=False).in_channels == 1  # asked for


def test_photographs_are_fair_repeatable_and_offline(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was asked"))
    crops = photographs(36, size=16, seed=3)
    assert crops.classes == [name.split(".")[0] for name in PHOTOGRAPHS] and torch.bincount(crops.labels).tolist() == [3] * 12
    assert crops.channels == 3 and crops.groups[13] == crops.classes[int(crops.labels[13])]
    assert 0 <= min(s.image.min() for s in crops) and max(s.image.max() for s in crops) <= 1.001
    again, other = photographs(36, size=16, seed=3), photographs(36, size=16, seed=4)
    assert all(torch.equal(a.image, b.image) for a, b in zip(crops, again)) and not torch.equal(crops[0].image, other[0].image)
    camera = crops[crops.classes.index("camera")].image
    assert torch.equal(camera[0], camera[1])  # grey: three equal channels
    for n, size in ((5, 16), (36, 4), (36, 4000)):
        with pytest.raises(ValueError, match="at least 12"):
            photographs(n, size)
