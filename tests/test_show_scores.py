"Figures of scores: what they draw is what they were given, and what was not measured is not drawn."
import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from medssl_nb.evaluate.statistics import Interval, ranking
from medssl_nb.show import scores as s
from medssl_nb.show.figures import RANDOM, Picture

CURVES = {"random": [[(0, 0.0), (10, 0.4), (20, 0.5)], [(0, 0.2), (10, 0.6), (20, 0.7)]], "byol": [[(0, 0.1), (5, 0.79), (20, 0.8)]]}
RNG = np.random.default_rng(0)
MANY, FEW = RNG.normal(size=20), [0.1, 0.2, 0.3]


def texts(picture):
    return [t.get_text() for axis in picture.axes for t in [*axis.texts, *axis.get_xticklabels(), *axis.get_yticklabels()]]


def bands(axis):
    return [c for c in axis.collections if isinstance(c, PolyCollection)]


@pytest.mark.parametrize("make", [
    lambda: s.learning_curves(CURVES), lambda: s.violins({"a": MANY, "random": FEW}), lambda: s.forest({"a": (0.1, 0.0, 0.2)}),
    lambda: s.critical_differences({"a": 1.0, "b": 2.0, "c": 3.0}, 1.5),
])
def test_a_picture_that_shows_itself(make):
    picture = make()
    assert isinstance(picture, Picture) and picture.png() == make().png()


def test_learning_curves_show_mean_band_and_ring():
    axis = s.learning_curves(CURVES).axes[0]
    lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    assert set(lines) == {"random (2 seeds)", "byol (1 seed)"}
    assert lines["random (2 seeds)"].get_ydata() == pytest.approx([0.1, 0.5, 0.6]) and lines["random (2 seeds)"].get_color() == RANDOM
    assert len(bands(axis)) == 1  # one seed has no spread
    low, high = bands(axis)[0].get_datalim(axis.transData).intervaly
    assert low == pytest.approx(0.1 - 0.2 / np.sqrt(2)) and high == pytest.approx(0.6 + 0.2 / np.sqrt(2))
    rings = [tuple(map(float, (line.get_xdata()[0], line.get_ydata()[0]))) for line in axis.lines if line.get_marker() == "o"]
    assert rings == [(20, pytest.approx(0.6)), (5, pytest.approx(0.79))]
    assert not [line for line in s.learning_curves(CURVES, fraction=None).axes[0].lines if line.get_marker() == "o"]


def test_the_ring_is_convergences_step():
    from medssl_nb.evaluate.protocols import convergence

    steps, mean = s._stacked("byol", CURVES["byol"])
    assert s._reaches(steps, mean[0], 0.95)[0] == convergence({"curve": CURVES["byol"][0]})["steps"]


def test_few_scores_get_no_violin_and_nan_no_dot():
    picture = s.violins({"many": [*MANY, np.nan], "few": FEW, "same": [0.5] * 10}, unit="Dice")
    axis = picture.axes[0]
    assert len(bands(axis)) == 1 and [text for text in texts(picture) if "n =" in text] == ["many\n(n = 20)", "few\n(n = 3)", "same\n(n = 10)"]
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert sorted(dots[0].get_ydata()) == pytest.approx(sorted(MANY)) and dots[1].get_ydata() == pytest.approx(FEW)
    medians = [line.get_ydata()[0] for line in axis.lines if line.get_marker() == "None"]
    assert medians == pytest.approx([np.median(MANY), 0.2, 0.5])


def test_forest_colours_what_excludes_zero():
    axis = s.forest({"up": Interval(0.2, 0.1, 0.3), "down": (-0.2, -0.3, -0.1), "open": (0.1, -0.1, 0.3)}).axes[0]
    intervals = [line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"]
    assert [tuple(line.get_xdata()) for line in intervals] == [(0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3)]
    assert [line.get_color() == RANDOM for line in intervals] == [False, False, True]
    assert [t.get_text() for t in axis.get_yticklabels()][0] == "up   +0.200 [+0.100, +0.300]"


def test_bars_join_what_the_ranking_joins():
    rng = np.random.default_rng(1)
    for k in range(20):
        found = ranking({name: rng.normal(0.3 * i, 1, 6) for i, name in enumerate("abcdefg")})
        names, values = list(found.ranks), np.array(list(found.ranks.values()))
        distance = found.distance * (0.2 + 0.05 * k)
        joined = [names[i : j + 1] for i, j in s._bars(values, distance)]
        for i, a in enumerate(names):
            for j, b in enumerate(names):
                assert any(a in bar and b in bar for bar in joined) == (i != j and abs(values[i] - values[j]) <= distance) or i == j
        if k == 16:
            assert joined == found.groups


def test_every_method_hangs_at_its_rank():
    ranked = {f"m{i}": float(i + 1) for i in range(9)}
    picture = s.critical_differences(dict(reversed(ranked.items())), 2.0)
    said = " ".join(texts(picture))
    assert all(f"m{i} {i + 1:.2f}" in said or f"{i + 1:.2f} m{i}" in said for i in range(9)) and "critical difference 2.00" in said
    stems = [line.get_xdata() for line in picture.axes[0].lines if len(line.get_xdata()) == 3]
    assert sorted(float(stem[0]) for stem in stems) == list(ranked.values())


@pytest.mark.parametrize("call, words", [
    (lambda: s.learning_curves({}), "at least one name"),
    (lambda: s.learning_curves({"a": []}), "one a seed"),
    (lambda: s.learning_curves({"a": [[(0, 1.0)], [(1, 1.0)]]}), "same steps"),
    (lambda: s.learning_curves({"a": [(0, 1.0), (1, 1.0)]}), "list of curves"),
    (lambda: s.violins({}), "scores"),
    (lambda: s.violins({"a": [np.nan]}), "finite"),
    (lambda: s.forest({}), "at least one difference"),
    (lambda: s.forest({"a": (0.5, 0.6, 0.7)}), "low <= value"),
    (lambda: s.critical_differences({"a": 1.0}, 1.0), "two average ranks"),
    (lambda: s.critical_differences({"a": 1.0, "b": np.nan}, 1.0), "finite"),
])
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
