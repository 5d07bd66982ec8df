"Designs of comparisons: no patient in two parts, no choice on the test set, no random encoder in another's name."
import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl_nb import nets
from medssl_nb.data.images import ImageSet
from medssl_nb.evaluate import designs, metrics, protocols
from medssl_nb.train import load_encoder, save_encoder

CPU = dict(device="cpu", batch_size=8)
FIT = dict(steps=4, batch_size=8, device="cpu", precision="fp32", progress=False, evaluate_every=2)


def resnet(seed=0, **options):
    torch.manual_seed(seed)
    return nets.create("resnet18", width=4, stem="small", **options)


class Blocks(nets.Encoder):
    "Block means as channels: an encoder without weights that keeps the planted signal."

    def __init__(self, *unused):
        super().__init__(2, 1, [4], [8])

    def forward(self, x):
        return [F.adaptive_avg_pool2d(x, 2).flatten(1)[..., None, None]]


def planted(n=60, masks=False, images_each=2, several=False):
    "The class says which quarter is brighter; so many images a patient."
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) // images_each % 3
    x = torch.randn(n, 1, 16, 16, generator=g)
    for image, label in zip(x[:, 0], labels.tolist()):
        image[8 * (label // 2):, 8 * (label % 2):][:8, :8] += 1
    groups = [f"patient {i // images_each}" for i in range(n)]
    if masks:
        return ImageSet(x, masks=(x[:, 0] > 1.5).long(), groups=groups)
    return ImageSet(x, labels=torch.stack([labels > 0, labels > 1], 1).float() if several else labels, groups=groups)


def lied(part):
    "The same part with its labels, or its masks, handed to other images."
    other = copy.copy(part)
    if part.labels is not None:
        other.labels = part.labels.roll(3).flip(0)
        assert not torch.equal(other.labels, part.labels)
    else:
        other.masks = part.masks.flip(0)
    return other


def finetuned(**options):
    return lambda *parts: protocols.finetune(resnet(), *parts, **{**FIT, **options})


PROTOCOLS = {
    "knn": lambda train, validation, test: protocols.knn(Blocks(), train, test, **CPU),
    "linear_probe": lambda *parts: protocols.linear_probe(Blocks(), *parts, **CPU),
    "finetune": finetuned(), "frozen": finetuned(freeze=True), "warm_up": finetuned(warm_up=2),
}


# no leak

@pytest.mark.parametrize("name", [*PROTOCOLS, "label_efficiency", "label_efficiency of probes"])
def test_a_patient_in_two_parts_is_refused(name):
    images = planted()
    parts = [images.subset(r) for r in (range(0, 30), range(30, 45), range(45, 60))]  # image 44 and 45 are of patient 22
    run = PROTOCOLS.get(name) or (lambda *parts: protocols.label_efficiency(
        {"blocks": Blocks(), "random": resnet}, *parts, labels=(2,), seeds=(0,), progress=False, protocol="linear_probe" if "probes" in name else "finetune"
    ))
    if name == "knn":
        parts = [parts[1], None, parts[2]]
    with pytest.raises(ValueError, match="patient 22"):
        run(*parts)


@pytest.mark.parametrize("name, masks", [(name, masks) for name in PROTOCOLS for masks in (False, True) if not masks or name not in ("knn", "linear_probe")])
def test_test_labels_change_the_score_and_nothing_else(name, masks):
    train, validation, test = planted(36, masks).split((0.5, 0.25, 0.25), seed=1)
    true, blind = (PROTOCOLS[name](train, validation, part) for part in (test, lied(test)))
    assert true.chosen == blind.chosen and true.curve == blind.curve
    assert all(torch.equal(a, b) for a, b in zip(true.predicted, blind.predicted))
    if true.model is not None:
        assert all(torch.equal(v, blind.model.state_dict()[k]) for k, v in true.model.state_dict().items())
        assert true.history.terms == blind.history.terms
    assert not torch.equal(true.cases, blind.cases)


@pytest.mark.parametrize("protocol, options", [("linear_probe", CPU), ("finetune", FIT)])
def test_label_efficiency_chooses_without_the_test_labels(protocol, options):
    train, validation, test = planted(48).split((0.5, 0.25, 0.25), seed=1)
    options = {**options, "progress": False} | ({} if protocol == "linear_probe" else {"steps": 2})
    true, blind = (
        protocols.label_efficiency({"ours": resnet()}, train, validation, part, labels=(4,), seeds=(0, 1), protocol=protocol, **options) for part in (test, lied(test))
    )
    for key in ("encoder", "seed", "patients", "images", "chosen", "curve"):
        assert [row[key] for row in true] == [row[key] for row in blind]


# folds

def test_folds_keep_patients_together_and_test_each_once():
    images = planted(90, images_each=3)
    seen = []
    for parts in designs.folds_of(images, 5, seed=2):
        protocols.check_disjoint(*parts)
        assert sum(map(len, parts)) == 90 and min(map(len, parts)) > 0
        assert torch.bincount(parts[2].labels, minlength=3).tolist() == [6, 6, 6]
        seen += parts[2].names
    assert sorted(seen) == sorted(images.names)


def test_folds_are_scikit_learns_and_repeat():
    from sklearn.model_selection import StratifiedGroupKFold

    images = planted(45, images_each=3)
    theirs = [test.tolist() for _, test in StratifiedGroupKFold(3, shuffle=True, random_state=4).split(images.labels, images.labels, images.group_numbers)]
    for _ in range(2):
        assert [part[2].order.tolist() for part in designs.folds_of(images, 3, seed=4)] == theirs
    assert [part[2].order.tolist() for part in designs.folds_of(images, 3, seed=5)] != theirs


def test_folds_without_classes_and_with_a_rare_one():
    for images in (planted(20, masks=True), planted(20, several=True)):
        assert sorted(i for *_, test in designs.folds_of(images, 5) for i in test.order) == list(range(20))
    rare = ImageSet(torch.zeros(30, 1, 4, 4), labels=[1, 1] + [0] * 28)
    assert sum(1 in test.labels for *_, test in designs.folds_of(rare, 5)) == 2


@pytest.mark.parametrize("protocol, options", [("linear_probe", CPU), ("finetune", {**FIT, "steps": 2, "warm_up": 1})])
def test_cross_validation_is_the_protocol_in_each_fold_and_never_sees_its_test_labels(protocol, options):
    images = planted(36)
    rows = designs.cross_validate({"ours": resnet(1)}, images, 3, seed=5, protocol=protocol, **{**options, "progress": False})
    assert json.loads(json.dumps(rows)) == rows and [(r["fold"], r["encoder"]) for r in rows] == [(f, e) for f in range(3) for e in ("random", "ours")]
    alone = getattr(protocols, protocol)
    for fold, (train, validation, test) in enumerate(designs.folds_of(images, 3, seed=5)):
        encoders = {"random": protocols.fresh(resnet(1), 15 + fold), "ours": resnet(1)}
        for row in (r for r in rows if r["fold"] == fold):
            for part in (test, lied(test)):
                found = alone(encoders[row["encoder"]], train, validation, part, seed=15 + fold, **options)
                assert (row["chosen"], row["curve"], row["predicted"]) == (found.chosen, [list(c) for c in found.curve], found.predicted.tolist())
                assert part is not test or row["score"] == found.score
            assert row["truth"] == test.labels.tolist() and [images.names[i] for i in row["index"]] == test.names


def test_cross_validation_of_a_subset_knows_its_places():
    images = planted(60).subset([*range(59, 30, -1)])
    rows = designs.cross_validate({"blocks": Blocks(), "random": resnet}, images, 3, protocol="linear_probe", progress=False, **CPU)
    columns = designs.out_of_fold(rows, "blocks")
    assert columns["index"].tolist() == list(range(29)) and columns["truth"].tolist() == images.labels.tolist()
    assert columns["cases"].tolist() == (columns["truth"] == columns["predicted"]).tolist()
    found = {row["encoder"]: row for row in designs.pooled(rows, images, draws=50)}["blocks"]
    assert found["pooled"].value == pytest.approx(metrics.balanced_accuracy(columns["truth"], columns["predicted"])) and found["pooled"].value > 0.8
    assert found["mean"] == pytest.approx(np.mean([r["score"] for r in rows if r["encoder"] == "blocks"]))


def test_cross_validation_of_one_encoder_masks_and_tables():
    rows = designs.cross_validate(resnet(), planted(18, masks=True), 2, **{**FIT, "steps": 2})
    assert [row["encoder"] for row in rows] == ["random", "given"] * 2 and "truth" not in rows[0]
    found = designs.pooled(rows, planted(18, masks=True), draws=20)[1]
    assert found["metric"] == "Dice" and found["pooled"].value == pytest.approx(np.mean([c for r in rows if r["encoder"] == "given" for c in r["cases"]]))
    images = planted(120, several=True)
    tables = designs.cross_validate({"b": Blocks(), "random": resnet}, images, 2, protocol="linear_probe", progress=False, **CPU)
    assert designs.pooled(tables, images)[0]["pooled"] is None


# the encoder that was asked for

WRONG = {
    "None": (None, "None"), "path": ("no/such/simclr.safetensors", "load_encoder"), "class": (Blocks, "Blocks, which would make"),
    "weights": ({"stem.weight": torch.zeros(1)}, "weights without a network"), "pair": ((Blocks(), {}), "first of the two"),
    "layer": (nn.Linear(2, 2), "without channels"), "number": (3, "of type int"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["knn", "linear_probe", "finetune", "segment", "embeddings", "fresh", "label_efficiency", "cross_validate", "promised"])
def test_no_protocol_takes_anything_for_an_encoder(name, wrong):
    given, words = WRONG[wrong]
    train, validation, test = parts = planted(24, masks=name == "segment").split((0.5, 0.25, 0.25))
    if name == "cross_validate" and wrong == "weights":
        given = {"ours": given}
    with pytest.raises(ValueError, match=words):
        {
            "knn": lambda: protocols.knn(given, train, test, **CPU), "linear_probe": lambda: protocols.linear_probe(given, *parts, **CPU),
            "finetune": lambda: protocols.finetune(given, *parts, **FIT), "segment": lambda: protocols.finetune(given, *parts, **FIT),
            "embeddings": lambda: protocols.embeddings(given, train), "fresh": lambda: protocols.fresh(given, 0),
            "label_efficiency": lambda: protocols.label_efficiency({"ours": given}, *parts, labels=(2,), progress=False),
            "cross_validate": lambda: designs.cross_validate(given, planted(24), 2, progress=False),
            "promised": lambda: protocols.label_efficiency({"random": resnet, "ours": lambda seed: given}, *parts, labels=(2,), seeds=(0,), progress=False, steps=1),
        }[name]()


def test_a_function_alone_is_no_encoder():
    with pytest.raises(ValueError, match="resnet, which would make an encoder with random weights"):
        protocols.linear_probe(resnet, *planted(24).split((0.5, 0.25, 0.25)), **CPU)


def test_weights_that_are_not_there_are_not_invented(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_encoder(tmp_path / "simclr.safetensors", nets.create_encoder)
    trained = resnet(3)
    save_encoder(trained, tmp_path / "simclr.safetensors", method="simclr")
    read, _ = load_encoder(tmp_path / "simclr.safetensors", nets.create_encoder)
    parts = planted(24).split((0.5, 0.25, 0.25))
    assert torch.equal(protocols.embeddings(read, parts[0]), protocols.embeddings(trained, parts[0]))
    with pytest.raises(ValueError, match="not all weights fit|no weight"):
        load_encoder(tmp_path / "simclr.safetensors", nets.create("resnet18", width=6, stem="small"))


def test_broken_weights_are_named():
    broken = resnet()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    train, validation, test = planted(24).split((0.5, 0.25, 0.25))
    for call in (lambda: protocols.knn(broken, train, test, **CPU), lambda: protocols.linear_probe(broken, train, validation, test, **CPU)):
        with pytest.raises(ValueError, match="nan or infinity"):
            call()


def test_a_whole_segmentation_network_is_taken_where_masks_are_learned():
    network = nets.create("unet", width=4, levels=2, out_channels=2)
    parts = planted(24, masks=True).split((0.5, 0.25, 0.25))
    assert protocols.finetune(network, *parts, **{**FIT, "steps": 1}).metric == "Dice"
    with pytest.raises(ValueError, match="without channels"):
        protocols.finetune(network, *planted(24).split((0.5, 0.25, 0.25)), **FIT)


# warm-up

def test_warm_up_freezes_then_frees_with_a_fresh_optimiser(monkeypatch):
    train, validation, test = planted(24).split((0.5, 0.25, 0.25))
    encoder, seen, calls = resnet(), [], []
    real = protocols.fit

    def spying(model, images, *, steps, on_step, **options):
        calls.append((steps, [p.requires_grad for p in model.encoder.parameters()][0], options["lr"]))

        def look(step, model):
            seen.append((copy.deepcopy(model.encoder.state_dict()), model.head.weight.detach().clone()))
            on_step(step, model)

        return real(model, images, steps=steps, on_step=look, **options)

    monkeypatch.setattr(protocols, "fit", spying)
    result = protocols.finetune(encoder, train, validation, test, **{**FIT, "steps": 5, "warm_up": 3})
    assert calls == [(3, False, 1e-3), (2, True, 1e-3)]
    before = encoder.state_dict()
    same = [all(torch.equal(v, before[k]) for k, v in state.items()) for state, _ in seen]
    assert same == [True] * 3 + [False] * 2  # running statistics, too
    heads = [head for _, head in seen]
    assert all(not torch.equal(a, b) for a, b in zip(heads, heads[1:]))
    assert [step for step, _ in result.curve] == [0, 2, 4, 5] and result.history.steps == 5 and result.history.settings["warm_up"] == 3


def test_warm_up_starts_as_freeze_does():
    parts = planted(24).split((0.5, 0.25, 0.25))
    frozen = protocols.finetune(resnet(), *parts, **{**FIT, "steps": 3, "freeze": True})
    warm = protocols.finetune(resnet(), *parts, **{**FIT, "steps": 5, "warm_up": 3})
    assert warm.history.terms["loss"][:3] == frozen.history.terms["loss"]


@pytest.mark.parametrize("options", [{"warm_up": 4}, {"warm_up": -1}, {"warm_up": 2, "freeze": True}])
def test_warm_up_that_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError, match="warm_up"):
        protocols.finetune(resnet(), *planted(24).split((0.5, 0.25, 0.25)), **{**FIT, **options})


# what protocols report is what the libraries say

@pytest.mark.parametrize("kind", ["classes", "grades"])
def test_scores_are_scikit_learns_of_the_predictions(kind):
    from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score

    train, validation, test = planted(60).split((0.5, 0.2, 0.3))
    for result in (
        protocols.knn(resnet(), train, test, kind=kind, **CPU), protocols.linear_probe(resnet(), train, validation, test, kind=kind, **CPU),
        protocols.finetune(resnet(), train, validation, test, kind=kind, **{**FIT, "lr": 0.01}),
    ):
        theirs = balanced_accuracy_score(test.labels, result.predicted) if kind == "classes" else cohen_kappa_score(test.labels, result.predicted, weights="quadratic")
        assert result.score == pytest.approx(0.0 if np.isnan(theirs) else theirs)
        assert result.cases.tolist() == (result.predicted == test.labels).tolist()


# slices

def solid(n=3):
    return ImageSet(torch.arange(n * 2 * 6 * 4 * 5.0).reshape(n, 2, 6, 4, 5) ** 0.5, labels=[0, 2, 1][:n], groups=["a", "b", "a2"][:n], classes=("x", "y", "z"))


@pytest.mark.parametrize("axis, shape", [(0, (2, 4, 5)), (1, (2, 6, 5)), (2, (2, 6, 4))])
def test_slices_are_those_of_the_volumes(axis, shape):
    volumes = solid()
    cut = designs.slices_of(volumes, axis)
    depth = volumes[0].image.shape[axis + 1]
    assert len(cut) == 3 * depth and cut.spatial_dims == 2 and cut.classes == volumes.classes
    for i in range(len(cut)):
        volume, position = divmod(i, depth)
        assert torch.equal(cut[i].image, volumes[volume].image.select(axis + 1, position)) and cut[i].image.shape == shape
        assert cut.groups[i] == volumes.groups[volume] and cut.labels[i] == volumes.labels[volume]


def test_slices_with_a_margin_and_steps_of_a_subset():
    cut = designs.slices_of(solid().subset([2, 0]), margin=1 / 3, every=1)
    assert len(cut) == 4 and torch.equal(cut[0].image, solid()[2].image[:, 2]) and cut.groups == ["a2", "a2", "a", "a"]
    assert len(designs.slices_of(solid(), every=4)) == 6
    protocols.check_disjoint(*designs.slices_of(solid()).split((0.34, 0.66)))


def test_by_patient_is_the_median_or_the_most_frequent():
    images = ImageSet(torch.zeros(8, 1, 4, 4), labels=[1, 1, 1, 2, 2, 2, 2, 0], groups=list("aaabbbbc"))
    truth, decided = designs.by_patient(images, [0, 1, 4, 1, 1, 2, 2, 3])
    assert truth.tolist() == [1, 2, 0] and decided.tolist() == [1, 2, 3]  # 1.5 goes up
    assert designs.by_patient(images, [0, 4, 4, 1, 1, 2, 2, 3], "classes")[1].tolist() == [4, 1, 3]
    part = images.subset([6, 7, 0])
    assert designs.by_patient(part, torch.tensor([2, 0, 1]))[0].tolist() == [2, 0, 1]


@pytest.mark.parametrize("call, words", [
    (lambda: designs.folds_of(planted(20), 1), "from 2 folds"),
    (lambda: designs.folds_of(planted(20), 11), "from 2 folds"),
    (lambda: designs.cross_validate(Blocks(), planted(20), protocol="probe"), "linear_probe"),
    (lambda: designs.cross_validate(Blocks(), planted(20).subset([0, 0, 1, 2, 3, 4, 5, 6]), 2), "occur twice"),
    (lambda: designs.out_of_fold([{"encoder": "a"}], "a"), "cross_validate"),
    (lambda: designs.slices_of(planted(4)), "give volumes"),
    (lambda: designs.slices_of(solid(), margin=0.5), "margin"),
    (lambda: designs.by_patient(planted(4), [1, 2]), "2 decisions"),
    (lambda: designs.by_patient(ImageSet(torch.zeros(2, 1, 4, 4), labels=[0, 1], groups=["a", "a"]), [1, 1]), "different labels"),
])
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
