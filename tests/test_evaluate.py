"Metrics against their libraries, protocols against leaks: patients, test labels, and stale random starts."
import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl_nb.data.images import ImageSet
from medssl_nb.evaluate import metrics, protocols
from medssl_nb.nets.base import Encoder, create

CPU = dict(device="cpu", batch_size=8)
FIT = dict(steps=6, batch_size=8, device="cpu", precision="fp32", progress=False, evaluate_every=2)


def resnet(seed=0):
    torch.manual_seed(seed)
    return create("resnet18", width=4, stem="small")


class Blocks(Encoder):
    "Block means as channels: an encoder without weights that keeps the planted signal."

    def __init__(self):
        super().__init__(2, 1, [4], [8])

    def forward(self, x):
        return [F.adaptive_avg_pool2d(x, 2).flatten(1)[..., None, None]]


def planted(n=60, classes=3, seed=0, groups=None, masks=False, several=False):
    "The class says which quarter is brighter."
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    x = torch.randn(n, 1, 16, 16, generator=g)
    for image, label in zip(x[:, 0], labels.tolist()):
        image[8 * (label // 2):, 8 * (label % 2):][:8, :8] += 1
    truth = (x[:, 0] > 1.5).long() if masks else None
    table = torch.stack([labels > 0, labels > 1], 1).float()
    return ImageSet(x, labels=None if masks else table if several else labels, masks=truth, groups=groups)


def parts(**options):
    return planted(**options).split((0.5, 0.25, 0.25), seed=1)


def with_labels(part, labels):
    "The same part with other labels."
    other = copy.copy(part)
    other.labels = labels
    return other


# metrics

def test_classification_metrics_are_scikit_learns():
    from sklearn import metrics as theirs

    rng = np.random.default_rng(0)
    truth, called = rng.integers(0, 4, 80), rng.integers(0, 4, 80)
    p = rng.dirichlet(np.ones(4), 80)
    assert metrics.accuracy(truth, called) == pytest.approx(theirs.accuracy_score(truth, called))
    assert metrics.balanced_accuracy(truth, called) == pytest.approx(theirs.balanced_accuracy_score(truth, called))
    assert metrics.kappa(truth, called) == pytest.approx(theirs.cohen_kappa_score(truth, called, weights="quadratic"))
    assert metrics.auroc(truth, p) == pytest.approx(theirs.roc_auc_score(truth, p, multi_class="ovr", average="macro"))
    two = truth > 1
    assert metrics.auroc(two, p[:, 0]) == pytest.approx(theirs.roc_auc_score(two, p[:, 0]))
    table = rng.integers(0, 2, (80, 4))
    assert metrics.auroc(table, p) == pytest.approx(theirs.roc_auc_score(table, p, average="macro"))


def test_binary_auroc_takes_two_columns_and_tensors():
    truth, p = torch.tensor([0, 1, 1, 0]), torch.tensor([0.2, 0.9, 0.4, 0.5])
    assert metrics.auroc(truth, torch.stack([1 - p, p], 1)) == metrics.auroc(truth, p) == 0.75


def test_kappa_keeps_absent_grades_on_the_scale_and_says_0_where_undefined():
    assert metrics.kappa([0, 3, 4, 4], [0, 4, 4, 4]) > metrics.kappa([0, 1, 2, 2], [0, 2, 2, 2])
    assert metrics.kappa([2, 2], [2, 2]) == 0 and metrics.kappa([0, 1], [0, 1]) == 1


@pytest.mark.parametrize("space", [(12, 9), (5, 6, 7)])
def test_dice_is_monais_and_a_loops(space):
    from monai.metrics import DiceMetric

    g = torch.Generator().manual_seed(0)
    truth, called = (torch.randint(0, 4, (3, *space), generator=g) for _ in range(2))
    ours = metrics.dice(truth, called, 4)
    one_hot = lambda m: F.one_hot(m, 4).movedim(-1, 1)
    theirs = DiceMetric(include_background=False, reduction="none")(one_hot(called), one_hot(truth))
    torch.testing.assert_close(ours, theirs)
    for n in range(3):
        for k in (1, 2, 3):
            a, b = (truth[n] == k), (called[n] == k)
            assert ours[n, k - 1].item() == pytest.approx(2 * int((a & b).sum()) / int(a.sum() + b.sum()))


def test_dice_of_absent_regions():
    truth, called = torch.zeros(3, 4, 4).long(), torch.zeros(3, 4, 4).long()
    truth[0, 0, 0] = called[1, 0, 0] = 1
    scores = metrics.dice(truth, called, 2).flatten().tolist()
    assert scores[:2] == [0, 0] and math.isnan(scores[2])
    assert metrics.mean_dice(torch.tensor([[1.0, torch.nan], [0.0, 0.5], [torch.nan, torch.nan]])) == pytest.approx((1 + 0.25) / 2)


@pytest.mark.parametrize("call, words", [
    (lambda: metrics.accuracy([0, 1], [0]), "one class a case"),
    (lambda: metrics.auroc([1, 1], [0.2, 0.3]), "class 0 has only one kind"),
    (lambda: metrics.auroc([0, 1, 1], np.full((3, 3), 1 / 3)), "class 2"),
    (lambda: metrics.auroc([[0, 1]], [0.3]), "do not fit"),
    (lambda: metrics.dice(torch.full((1, 4, 4), 3), torch.zeros(1, 4, 4).long(), 3), "whole numbers from 0"),
    (lambda: metrics.dice(torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 5).long(), 2), "one size"),
    (lambda: metrics.mean_and_spread([]), "at least one"),
])
def test_metrics_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# no leak

def test_planted_patient_is_refused_by_every_protocol():
    images = planted(40, groups=[i // 2 for i in range(40)])
    train, validation, test = (images.subset(r) for r in (range(0, 21), range(21, 30), range(30, 40)))  # patient 10 is in two parts
    encoders = {"blocks": Blocks(), "random": resnet}
    for call in (
        lambda: protocols.knn(Blocks(), train, validation, **CPU),
        lambda: protocols.linear_probe(Blocks(), train, validation, test, **CPU),
        lambda: protocols.finetune(resnet(), train, validation, test, **FIT),
        lambda: protocols.finetune(resnet(), test, train, validation, **FIT),
        lambda: protocols.label_efficiency(encoders, train, validation, test, labels=(2,), seeds=(0,), progress=False),
    ):
        with pytest.raises(ValueError, match="10"):
            call()


def test_choices_read_validation_only():
    train, validation, test = parts()
    shuffled = with_labels(test, test.labels.flip(0).roll(1))
    assert not torch.equal(shuffled.labels, test.labels)
    honest, blind = (protocols.linear_probe(Blocks(), train, validation, t, **CPU) for t in (test, shuffled))
    assert honest.chosen == blind.chosen and honest.curve == blind.curve and honest.score != blind.score
    assert torch.equal(honest.predicted, blind.predicted)
    honest, blind = (protocols.finetune(resnet(), train, validation, t, **FIT) for t in (test, shuffled))
    assert honest.chosen == blind.chosen and honest.curve == blind.curve
    assert torch.equal(honest.predicted, blind.predicted)


def test_choices_do_read_validation():
    train, validation, test = parts()
    lied = with_labels(validation, validation.labels.roll(1))
    assert protocols.linear_probe(Blocks(), train, validation, test, **CPU).curve != protocols.linear_probe(Blocks(), train, lied, test, **CPU).curve


def test_the_kept_weights_are_those_of_the_best_step():
    train, validation, test = parts()
    result = protocols.finetune(resnet(), train, validation, test, **{**FIT, "lr": 0.01})
    steps, scores = zip(*result.curve)
    assert steps == (0, 2, 4, 6) and result.chosen == steps[1:][int(np.argmax(scores[1:]))]
    again = protocols._examine(result.model, validation, None, 8)[0]
    assert again == pytest.approx(dict(result.curve)[result.chosen])
    assert protocols._examine(result.model, test, None, 8)[0] == pytest.approx(result.score)


# protocols

def test_knn_equals_a_loop():
    train, _, test = parts()
    result = protocols.knn(Blocks(), train, test, k=4, **CPU)
    a, b = (F.normalize(protocols.embeddings(Blocks(), part, **CPU), dim=1) for part in (train, test))
    for i, row in enumerate(b):
        nearest = sorted(((float(row @ other), int(label)) for other, label in zip(a, train.labels)), reverse=True)[:4]
        votes = [sum(math.exp(s / 0.07) for s, label in nearest if label == k) for k in range(3)]
        assert int(result.predicted[i]) == int(np.argmax(votes))
    assert result.score == pytest.approx(metrics.balanced_accuracy(test.labels, result.predicted))


def test_embeddings_are_in_order_and_leave_the_encoder_alone():
    images, encoder = planted(10), resnet().train()
    before = copy.deepcopy(encoder.state_dict())
    found = protocols.embeddings(encoder, images, batch_size=4, device="cpu")
    assert encoder.training and all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    with torch.no_grad():
        whole = encoder.eval()(images.stack().x)[-1].flatten(2).mean(-1)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind, several, metric", [(None, False, "balanced accuracy"), ("grades", False, "quadratic weighted kappa"), (None, True, "AUROC")])
def test_planted_signal_is_found_by_knn_and_probe(kind, several, metric):
    train, validation, test = parts(several=several)
    for result in (
        protocols.knn(Blocks(), train, test, kind=kind, **CPU),
        protocols.linear_probe(Blocks(), train, validation, test, kind=kind, **CPU),
    ):
        assert result.metric == metric and result.score > 0.8 and len(result.cases) == len(test)
    assert result.chosen in protocols.STRENGTHS


def test_probe_is_scikit_learns_at_the_chosen_strength():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, validation, test = parts()
    result = protocols.linear_probe(Blocks(), train, validation, test, **CPU)
    x = [protocols.embeddings(Blocks(), part, **CPU).numpy() for part in (train, test)]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=result.chosen, max_iter=5000)).fit(x[0], train.labels)
    assert model.predict(x[1]).tolist() == result.predicted.tolist()


def test_probe_with_one_class_among_the_labelled():
    train, validation, test = parts()
    one = train.subset([i for i in range(len(train)) if train.labels[i] == 1])
    result = protocols.linear_probe(Blocks(), one, validation, test, **CPU)
    assert set(result.predicted.tolist()) == {1} and result.score == pytest.approx(1 / 3)


@pytest.mark.parametrize("masks", [False, True])
def test_finetune_repeats_itself_and_leaves_the_encoder_alone(masks):
    train, validation, test = parts(masks=masks, n=24)
    encoder = resnet()
    before = copy.deepcopy(encoder.state_dict())
    first, second = (protocols.finetune(encoder, train, validation, test, seed=3, **FIT) for _ in range(2))
    assert first.score == second.score and first.curve == second.curve
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    moved = first.model.encoder.state_dict()
    assert any(not torch.equal(v, moved[k].cpu()) for k, v in before.items())
    assert first.metric == ("Dice" if masks else "balanced accuracy") and first.history.steps == 6


def test_freeze_keeps_the_encoder():
    train, validation, test = parts(n=24)
    encoder = resnet()
    result = protocols.finetune(encoder, train, validation, test, freeze=True, **FIT)
    assert all(torch.equal(v, result.model.encoder.state_dict()[k]) for k, v in encoder.state_dict().items())
    assert all(p.requires_grad for p in encoder.parameters())


def test_segmentation_in_windows_scores_each_case():
    images = planted(24, masks=True)
    train, validation, test = images.split((0.5, 0.25, 0.25), seed=1)
    result = protocols.finetune(resnet(), train, validation, test, **{**FIT, "steps": 20, "lr": 5e-3}, size=8)
    assert result.cases.shape == (6, 1) and [p.shape for p in result.predicted] == [(16, 16)] * 6
    truth = torch.stack([test[i].mask for i in range(6)])
    torch.testing.assert_close(metrics.dice(truth, torch.stack(result.predicted), 2), result.cases, equal_nan=True)
    assert result.score == pytest.approx(metrics.mean_dice(result.cases))


def test_segmentation_of_images_that_differ_in_size():
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(1, 16 + i, 20, generator=g) for i in range(9)]
    ragged = ImageSet(images, masks=[(i[0] > 0.5).long() for i in images])
    result = protocols.finetune(resnet(), *ragged.split((0.4, 0.3, 0.3)), size=16, **FIT)
    assert 0 <= result.score <= 1


# label efficiency

def test_label_efficiency_is_paired_nested_and_always_has_random():
    train, validation, test = parts()
    drawn = []

    def blocks(seed):
        drawn.append(seed)
        return Blocks()

    rows = protocols.label_efficiency({"ours": blocks, "random": resnet}, train, validation, test, labels=(3, 0.5), seeds=(0, 1), protocol="linear_probe", progress=False, **CPU)
    assert json.loads(json.dumps(rows)) == rows and len(rows) == 8 and drawn == [0, 1]
    assert {(r["encoder"], r["labels"], r["seed"]) for r in rows} == {(e, n, s) for e in ("ours", "random") for n in (3, 0.5) for s in (0, 1)}
    for row in rows:
        part = train.fraction(row["labels"], row["seed"])
        assert row["images"] == len(part) and row["metric"] == "balanced accuracy"
        encoder = Blocks() if row["encoder"] == "ours" else resnet(row["seed"])
        alone = protocols.linear_probe(encoder, part, validation, test, seed=row["seed"], **CPU)
        assert row["score"] == pytest.approx(alone.score) and row["chosen"] == alone.chosen
    added = protocols.label_efficiency({"ours": resnet()}, train, validation, test, labels=(4,), seeds=(0,), protocol="linear_probe", progress=False, **CPU)
    assert [r["encoder"] for r in added] == ["random", "ours"]


def test_label_efficiency_by_finetuning_equals_finetune():
    train, validation, test = parts(n=32)
    encoder = resnet(7)
    rows = protocols.label_efficiency({"ours": encoder}, train, validation, test, labels=(6,), seeds=(2,), **FIT | {"progress": False})
    alone = protocols.finetune(encoder, train.fraction(6, 2), validation, test, seed=2, **FIT)
    scratch = protocols.finetune(protocols.fresh(encoder, 2), train.fraction(6, 2), validation, test, seed=2, **FIT)
    assert [(r["score"], r["curve"]) for r in rows] == [(r.score, [list(c) for c in r.curve]) for r in (scratch, alone)]


class Bare(Encoder):
    "An encoder without a recipe."

    def __init__(self, loose=False):
        super().__init__(2, 1, [4], [2])
        self.layer, self.norm = nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4)
        if loose:
            self.token = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return [self.norm(self.layer(x))]


@pytest.mark.parametrize("make", [resnet, lambda seed: Bare()])
def test_fresh_is_fresh(make):
    trained = make(0)
    with torch.no_grad():
        for p in trained.parameters():
            p.fill_(5)
        for b in trained.buffers():
            b.fill_(3)
    state = torch.random.get_rng_state()
    first, again, other = (protocols.fresh(trained, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, a), b in zip(first.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b) and not (a == (5 if name in dict(first.named_parameters()) else 3)).all(), name
    weights = [next(p for p in e.parameters() if p.ndim > 1) for e in (first, other)]
    assert not torch.equal(*weights) and all((p == 5).all() for p in trained.parameters())


def test_fresh_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="as a function of the seed"):
        protocols.fresh(Bare(loose=True), 0)


def test_random_given_as_a_module_is_drawn_anew_for_each_seed():
    starts = protocols._starts({"random": resnet()})
    first, second = (starts["random"](s).state_dict() for s in (0, 1))
    assert any(not torch.equal(v, second[k]) for k, v in first.items())


@pytest.mark.parametrize("call, words", [
    (lambda p: protocols.knn(Blocks(), p[0], p[2], k=99, **CPU), "k = 99"),
    (lambda p: protocols.linear_probe(Blocks(), *p, kind="labels", **CPU), "does not fit labels"),
    (lambda p: protocols.finetune(resnet(), *p, task="segmentation", **FIT), "needs other images"),
    (lambda p: protocols.label_efficiency({}, *p), "no encoders"),
    (lambda p: protocols.label_efficiency({"a": Blocks()}, *p, protocol="probe"), "linear_probe"),
    (lambda p: protocols.label_efficiency({"a": Blocks()}, *p, labels=(500,), progress=False, **CPU, protocol="linear_probe"), "cannot take 500"),
])
def test_protocols_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call(parts(n=30))


def test_task_of_asks_where_it_is_not_clear():
    x = torch.randn(4, 1, 8, 8)
    both = ImageSet(x, labels=[0, 1, 0, 1], masks=torch.zeros(4, 8, 8).long())
    with pytest.raises(ValueError, match="say task="):
        protocols.task_of(both)
    with pytest.raises(ValueError, match="neither"):
        protocols.task_of(ImageSet(x))
    assert protocols.task_of(both, "segmentation") == "segmentation"


def test_summary_table_and_convergence():
    rows = [dict(encoder=e, labels=n, seed=s, metric="Dice", score=0.1 * s + (e == "ours")) for e in ("random", "ours") for n in (0.1, 0.5) for s in (1, 2, 3)]
    first = protocols.summary(rows)[0]
    assert first == {"encoder": "random", "labels": 0.1, "metric": "Dice", "mean": pytest.approx(0.2), "sd": pytest.approx(0.1), "seeds": 3}
    lines = protocols.to_markdown(rows).splitlines()
    assert lines[0] == "| Dice | 10 % | 50 % |" and lines[3] == "| ours | 1.200 ± 0.100 | 1.200 ± 0.100 |"
    curve = {"curve": [[0, 0.0], [5, 0.5], [10, 0.96], [20, 1.0]]}
    assert protocols.convergence(curve) == {"steps": 10, "area": pytest.approx((1.25 + 3.65 + 9.8) / 20), "final": 1.0}
    assert protocols.convergence(curve, 0.5)["steps"] == 5 and protocols.convergence(curve, target=2)["steps"] is None
    with pytest.raises(ValueError, match="validation curve"):
        protocols.convergence({"curve": [[5, 0.5]]})
