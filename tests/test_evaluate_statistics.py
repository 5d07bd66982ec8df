"Intervals, paired differences, ranks and corrections against slow references, SciPy, published tables and known truths."
import inspect
import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from medssl_nb.evaluate import metrics
from medssl_nb.evaluate.statistics import Interval, against, bootstrap, critical_difference, holm, paired_difference, ranking, ranks, student


def bounds(interval):
    return interval.low, interval.high


def by_loops(statistic, columns, groups, draws, level, seed):
    "The bootstrap, spelled out, with the same random places."
    names = list(dict.fromkeys(groups))
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        rows = []
        for place in rng.integers(0, len(names), len(names)):
            rows.extend(i for i, group in enumerate(groups) if group == names[place])
        found.append(statistic(*([column[i] for i in rows] for column in columns)))
    tail = 100 * (1 - level) / 2
    return np.percentile(found, tail), np.percentile(found, 100 - tail)


# bootstrap

def test_bootstrap_equals_loops_at_once_and_one_by_one():
    values = np.random.default_rng(0).normal(size=17)
    expected = by_loops(np.mean, [values], list(range(17)), 200, 0.9, 3)
    for mean in (np.mean, lambda rows: float(np.mean(rows)), lambda rows: sum(rows.tolist()) / len(rows)):
        found = bootstrap(mean, values, draws=200, level=0.9, seed=3)
        assert bounds(found) == pytest.approx(expected) and found.value == pytest.approx(values.mean()) and found.left_out == 0


def test_bootstrap_draws_whole_patients():
    rng = np.random.default_rng(1)
    truth, called = rng.integers(0, 3, 30), rng.integers(0, 3, 30)
    groups = [f"p{i}" for i in rng.integers(0, 6, 30)]
    found = bootstrap(metrics.accuracy, truth, called, groups=groups, draws=100, seed=5)
    assert bounds(found) == pytest.approx(by_loops(metrics.accuracy, [truth, called], groups, 100, 0.95, 5))
    by_mean = bootstrap(np.mean, (truth == called).astype(float), groups=groups, draws=100, seed=5)
    assert bounds(by_mean) == pytest.approx(bounds(found))  # a statistic with an axis, groups that differ in size


def test_groups_of_one_are_no_groups():
    values = np.random.default_rng(2).normal(size=12)
    assert bootstrap(np.median, values, groups=np.arange(12) * 7, draws=50) == bootstrap(np.median, values, draws=50)


def test_copies_of_a_patient_do_not_narrow_the_interval():
    values = np.random.default_rng(3).normal(size=25)
    alone = bootstrap(np.mean, values, draws=400)
    copied = bootstrap(np.mean, np.repeat(values, 8), groups=np.repeat(np.arange(25), 8), draws=400)
    assert bounds(copied) == pytest.approx(bounds(alone))
    blind = bootstrap(np.mean, np.repeat(values, 8), draws=400)
    assert blind.high - blind.low < 0.5 * (alone.high - alone.low)


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(4).exponential(size=60)
    seeded = "rng" if "rng" in inspect.signature(stats.bootstrap).parameters else "random_state"  # its name before SciPy 1.15
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", **{seeded: np.random.default_rng(0)}).confidence_interval
    assert bounds(bootstrap(np.mean, values, draws=20_000)) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_bootstrap_keeps_its_promise():
    rng = np.random.default_rng(5)
    held = [i.low <= 2 <= i.high for i in (bootstrap(np.mean, rng.normal(2, 3, 60), draws=500, seed=s) for s in range(400))]
    assert 0.91 < np.mean(held) < 0.98


def test_bootstrap_repeats_itself_and_leaves_its_input_alone():
    values = np.random.default_rng(6).normal(size=20)
    before = values.copy()
    first, second, other = (bootstrap(np.mean, values, seed=s) for s in (0, 0, 1))
    assert first == second != other and np.array_equal(values, before)


def test_bootstrap_of_tensors_and_tables():
    g = torch.Generator().manual_seed(0)
    dice = torch.rand(15, 3, generator=g)
    dice[3, 1] = torch.nan
    found = bootstrap(metrics.mean_dice, dice, draws=60)
    assert found.value == pytest.approx(metrics.mean_dice(dice)) and found.low < found.value < found.high
    right = torch.tensor([1.0, 0, 1, 1, 0])
    assert bootstrap(np.mean, right) == bootstrap(np.mean, right.numpy())
    truth, p = torch.arange(20) % 2, torch.rand(20, generator=g)
    assert bootstrap(metrics.auroc, truth, p, draws=40).value == pytest.approx(metrics.auroc(truth, p))


def test_draws_without_a_value_are_left_out_and_counted():
    truth, p = np.arange(40) < 2, np.random.default_rng(7).random(40)
    found = bootstrap(metrics.auroc, truth, p, draws=300, seed=1)
    rng = np.random.default_rng(1)
    without = sum(not truth[rng.integers(0, 40, 40)].any() for _ in range(300))
    assert found.left_out == without > 0
    places = np.arange(40.0)
    not_a_number = bootstrap(lambda rows: rows.mean() if 0 in rows or 1 in rows else np.nan, places, draws=300, seed=1)
    assert not_a_number.left_out == without and np.isfinite(not_a_number.low)


def test_mostly_without_a_value_is_refused():
    with pytest.raises(ValueError, match="too few cases of some kind"):
        bootstrap(lambda rows: rows.mean() if (rows == 0).sum() == 1 and (rows == 1).sum() == 1 else np.nan, np.arange(9.0), draws=50)


def test_many_cases_are_drawn_in_blocks():
    values = np.random.default_rng(8).normal(size=400_000)
    found = bootstrap(np.mean, values, draws=5)
    rng = np.random.default_rng(0)
    means = [values[rng.integers(0, 400_000, 400_000)].mean() for _ in range(5)]
    assert bounds(found) == pytest.approx(np.percentile(means, [2.5, 97.5]))


@pytest.mark.parametrize("call, words", [
    (lambda: bootstrap(np.mean, [1.0]), "at least two cases"),
    (lambda: bootstrap(np.mean, [1.0, 2.0], groups=["a", "a"]), "at least two cases"),
    (lambda: bootstrap(np.mean, [1.0, 2.0], groups=["a"]), "one row a case"),
    (lambda: bootstrap(metrics.accuracy, [1, 0], [1, 0, 1]), "one row a case"),
    (lambda: bootstrap(np.mean), "one row a case"),
    (lambda: bootstrap(np.mean, [1.0, 2.0], draws=0), "draws"),
    (lambda: bootstrap(np.mean, [1.0, 2.0], level=95), "between 0 and 1"),
    (lambda: bootstrap(metrics.auroc, [1, 1, 1], [0.1, 0.2, 0.3]), "only one kind"),
    (lambda: student([0.5]), "at least two"),
    (lambda: student([0.5, np.nan]), "finite"),
    (lambda: paired_difference([1.0, 2.0], [1.0]), "paired"),
    (lambda: paired_difference([1.0], [1.0]), "at least two"),
    (lambda: paired_difference([[np.nan, 1.0]], [[1.0, np.nan]]), "no pair"),
    (lambda: ranks([1.0, 2.0]), "full table"),
    (lambda: ranks([[1.0, np.nan]]), "leave out"),
    (lambda: ranking({"a": [1.0], "b": [2.0]}), "three methods"),
    (lambda: ranking({"a": [1.0], "b": [2.0], "c": [1.0, 2.0]}), "three methods"),
    (lambda: critical_difference(1, 5), "at least 2 methods"),
    (lambda: holm([0.1, 1.2]), "between 0 and 1"),
    (lambda: holm([0.1, np.nan]), "between 0 and 1"),
    (lambda: against({"a": [1.0, 2.0]}, "b"), "reference 'b'"),
    (lambda: against({"a": [1.0, 2.0], "b": [1.0, 2.0, 3.0]}, "b"), "different numbers"),
])
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_an_interval_says_itself():
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert Interval(0.1, 0.01, 0.2).excludes_zero and Interval(-0.1, -0.2, -0.01).excludes_zero and not Interval(0.1, -0.01, 0.2).excludes_zero


# paired differences

def test_paired_difference_of_seeds_is_the_bootstrap_of_the_differences():
    rng = np.random.default_rng(9)
    a, b = rng.normal(size=(2, 40))
    expected = bootstrap(np.mean, a - b, draws=20_000)
    found = paired_difference(a, b, draws=20_000)
    assert found.value == pytest.approx((a - b).mean()) and bounds(found) == pytest.approx(bounds(expected), abs=0.02)


def test_three_seeds_by_counting_every_draw():
    a = np.array([0.0, 1.0, 5.0])
    every = [np.mean(draw) for draw in itertools.product(a, repeat=3)]
    found = paired_difference(a, np.zeros(3), draws=40_000, level=0.8)
    assert bounds(found) == pytest.approx(np.quantile(every, [0.1, 0.9], method="inverted_cdf"))
    assert bounds(paired_difference(a, np.zeros(3))) == (0, 5)  # 1 of 27 draws is all zeros: more than 2.5 %


@pytest.mark.parametrize("holes", [False, True])
def test_paired_difference_draws_seeds_and_cases(holes):
    rng = np.random.default_rng(10)
    a, b = rng.normal(size=(4, 12)) + rng.normal(size=12), rng.normal(size=(4, 12))
    if holes:
        a[0, 3] = b[2, 5] = np.nan
    slow = []
    for _ in range(4000):
        seeds, cases = rng.integers(0, 4, 4), rng.integers(0, 12, 12)
        slow.append(np.nanmean([a[s, c] - b[s, c] for s in seeds for c in cases]))
    found = paired_difference(a, b, draws=4000)
    assert found.value == pytest.approx(np.nanmean(a - b)) and bounds(found) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.08)


def test_pairing_cancels_what_is_shared():
    rng = np.random.default_rng(11)
    a, b = rng.normal(size=(3, 20)), rng.normal(size=(3, 20))
    luck = 100 * rng.normal(size=(3, 20))
    assert bounds(paired_difference(a + luck, b + luck)) == pytest.approx(bounds(paired_difference(a, b)), abs=1e-9)
    turned = paired_difference(b, a, draws=999)
    straight = paired_difference(a, b, draws=999)
    assert (turned.low, turned.high) == pytest.approx((-straight.high, -straight.low))


def test_student_is_scipys_and_right_for_three_seeds():
    scores = np.random.default_rng(12).normal(size=(2000, 3))
    assert bounds(student(scores[0])) == pytest.approx(stats.ttest_1samp(scores[0], 0).confidence_interval())
    assert np.mean([i.low <= 0 <= i.high for i in map(student, scores)]) == pytest.approx(0.95, abs=0.015)
    assert student([0.5, 0.5]) == Interval(0.5, 0.5, 0.5)


# ranks

def test_ranks_by_counting():
    scores = np.random.default_rng(13).integers(0, 4, (6, 5)).astype(float)
    for row, ranked in zip(scores, ranks(scores)):
        for value, rank in zip(row, ranked):
            assert rank == (row > value).sum() + ((row == value).sum() + 1) / 2
    assert np.array_equal(ranks(scores, higher_is_better=False), 6 - ranks(scores))


@pytest.mark.parametrize("level, published", [  # Demšar 2006, table 5a: 2 to 10 methods
    (0.95, [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]),
    (0.90, [1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920]),
])
def test_critical_difference_is_demsars(level, published):
    found = [critical_difference(k, 1, level) / np.sqrt(k * (k + 1) / 6) for k in range(2, 11)]
    assert found == pytest.approx(published, abs=1.1e-3)
    assert critical_difference(4, 14, 0.95) == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 14)), abs=1e-3)  # his example: 1.25
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)


def test_ranking_is_friedmans_and_sorts():
    rng = np.random.default_rng(14)
    scores = {name: rng.normal(gain, 1, 10) for name, gain in (("poor", -2), ("good", 2), ("fair", 0), ("fine", 0.2))}
    found = ranking(scores)
    assert found.p == pytest.approx(stats.friedmanchisquare(*scores.values()).pvalue)
    assert list(found.ranks) == sorted(found.ranks, key=found.ranks.get) and sum(found.ranks.values()) == pytest.approx(10)
    table = ranks(np.stack(list(scores.values()), 1))
    assert found.ranks["good"] == pytest.approx(table[:, 1].mean())
    assert ranking(scores, higher_is_better=False).ranks["good"] == pytest.approx(5 - found.ranks["good"])
    for first, second in itertools.combinations(found.ranks, 2):
        together = any(first in group and second in group for group in found.groups)
        assert together == (abs(found.ranks[first] - found.ranks[second]) <= found.distance)
    for one, other in itertools.permutations(found.groups, 2):
        assert not set(one) <= set(other)


def test_ranking_of_equals():
    found = ranking({name: [0.5, 0.6] for name in "abc"})
    assert found.p == 1 and set(found.ranks.values()) == {2} and found.groups == [["a", "b", "c"]]


# corrections

def test_holm_by_its_definition():
    rng = np.random.default_rng(15)
    for p in (rng.random(7), np.array([0.01, 0.01, 0.5]), np.array([0.2]), np.array([0.03, 0.04, 0.03, 0.9]) / 3):
        adjusted = holm(p)
        for alpha in (0.01, 0.05, 0.2, 0.7):
            rejected, still = set(), True
            for k, i in enumerate(np.argsort(p, kind="stable")):
                still = still and p[i] <= alpha / (len(p) - k)
                if still:
                    rejected.add(int(i))
            assert rejected == {i for i in range(len(p)) if adjusted[i] <= alpha + 1e-12}
        assert (adjusted >= p).all() and (adjusted <= np.minimum(1, p * len(p)) + 1e-12).all()
    assert len(holm([])) == 0


def test_against_is_the_paired_t_test():
    rng = np.random.default_rng(16)
    scores = {name: rng.normal(gain, 1, 8) for name, gain in (("random", 0), ("a", 2), ("b", 0))}
    rows = against(scores, "random")
    assert [row["name"] for row in rows] == ["a", "b"]
    assert [row["p"] for row in rows] == pytest.approx([stats.ttest_rel(scores[n], scores["random"]).pvalue for n in "ab"])
    assert [row["p_holm"] for row in rows] == pytest.approx(holm([row["p"] for row in rows]))
    assert rows[0]["difference"] == student(scores["a"] - scores["random"])
    always = against({"random": [0.5, 0.6], "same": [0.5, 0.6], "more": [0.75, 0.85]}, "random")
    assert always[0]["p"] == 1 and always[1]["p"] == pytest.approx(0, abs=1e-6)
