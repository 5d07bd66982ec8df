"Classification and segmentation: losses against hand values and loops, freezing, windows, and bad input."
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl_nb.data.images import Batch, ImageSet
from medssl_nb.nets.base import Encoder, create
from medssl_nb.tasks.classification import Classifier, classification_loss, decide, ordinal_targets, probabilities_of
from medssl_nb.tasks.segmentation import Segmenter, predict_volume, segmentation_loss, segmentation_terms, soft_dice
from medssl_nb.train.fit import fit


def small(dims=2, channels=1, seed=0):
    torch.manual_seed(seed)
    return create("resnet18", spatial_dims=dims, in_channels=channels, width=4, stem="small")


class Means(Encoder):
    "One map: block means, then a fixed stack of copies; no weights."

    def __init__(self):
        super().__init__(2, 1, [1], [4])

    def forward(self, x):
        return [F.avg_pool2d(x, 4)]


def planted(n=48, size=16, seed=0):
    "Images with a dark band as wide as their class says, and a bright square under a mask."
    g = torch.Generator().manual_seed(seed)
    x, labels = 0.3 * torch.randn(n, 1, size, size, generator=g), torch.arange(n) % 3
    masks = torch.zeros(n, size, size, dtype=torch.long)
    for i in range(n):
        top, left = torch.randint(0, size - 6, (2,), generator=g).tolist()
        masks[i, top:top + 6, left:left + 6] = 1
        x[i, 0, top:top + 6, left:left + 6] += 1.5
        x[i, 0, :, : 4 * int(labels[i])] -= 1
    return ImageSet(x, labels=labels, masks=masks)


# classification

def test_ladder_and_its_inverse():
    assert ordinal_targets(torch.tensor([0, 2, 4]), 5).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    grades = torch.arange(5)
    assert torch.equal(decide(ordinal_targets(grades, 5), "grades"), grades)


def test_grades_loss_equals_a_loop():
    logits, grades = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 3, 0])
    total = 0.0
    for row, grade in zip(logits.tolist(), grades.tolist()):
        for k, z in enumerate(row, start=1):
            p = 1 / (1 + math.exp(-z))
            total -= math.log(p if grade >= k else 1 - p)
    assert classification_loss(logits, grades, "grades").item() == pytest.approx(total / 18, rel=1e-5)


@pytest.mark.parametrize("kind, labels, loss", [
    ("classes", torch.tensor([0, 2]), math.log(3)), ("labels", torch.tensor([[1.0, 0, 1], [0, 0, 0]]), math.log(2)), ("grades", torch.tensor([0, 3]), math.log(2)),
])
def test_loss_of_knowing_nothing(kind, labels, loss):
    assert classification_loss(torch.zeros(2, 3), labels, kind).item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["classes", "labels", "grades"])
def test_classifier_shapes_gradient_and_probabilities(dims, kind):
    model = Classifier(small(dims), 4, kind, dropout=0.1)
    labels = torch.randint(0, 2, (3, 4)).float() if kind == "labels" else torch.tensor([0, 3, 1])
    batch = Batch(torch.randn(3, 1, *[16] * dims), labels=labels)
    terms = model(model.pretext(batch))
    terms["loss"].backward()
    assert all(p.grad is not None for p in model.parameters()) and 0 <= terms["accuracy"] <= 1
    p = model.eval().predict(batch.x)
    assert p.shape == (3, 3 if kind == "grades" else 4) and p.min() >= 0 and p.max() <= 1
    assert kind != "classes" or torch.allclose(p.sum(1), torch.ones(3))


def test_accuracy_is_the_share_of_right_decisions():
    model = Classifier(Means(), 2)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model.head.bias.zero_()
    x = torch.tensor([1.0, 1, -1, -1]).reshape(4, 1, 1, 1).expand(4, 1, 8, 8)
    assert model(Batch(x, labels=torch.tensor([1, 1, 0, 1])))["accuracy"] == 0.75


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_frozen_encoder_stays_to_the_last_bit(task):
    images, encoder = planted(12), small()
    model = Classifier(encoder, 3) if task == "classification" else Segmenter(encoder, 2)
    model.encoder.requires_grad_(False)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    others = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, images, steps=3, batch_size=4, device="cpu", precision="fp32", progress=False)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert any(not torch.equal(v, others[k]) for k, v in model.state_dict().items())
    model.encoder.requires_grad_(True)
    assert model.train().encoder.training


def test_classifier_learns_a_planted_signal():
    model = Classifier(small(), 3)
    fit(model, planted(96), steps=60, batch_size=16, lr=1e-2, device="cpu", precision="fp32", progress=False)
    fresh = planted(60, seed=5).stack()
    assert (decide(model.predict(fresh.x)) == fresh.labels).float().mean() > 0.8


@pytest.mark.parametrize("arguments, words", [
    ((3, "ordinal"), "3 'ordinal': use one of classes, labels, grades"), ((1, "classes"), "at least 2"), ((1, "grades"), "at least 2"),
])
def test_classifier_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        Classifier(Means(), *arguments)


def test_tasks_refuse_images_without_truth():
    x = torch.randn(2, 1, 16, 16)
    with pytest.raises(ValueError, match="no labels"):
        Classifier(Means(), 2).pretext(Batch(x))
    with pytest.raises(ValueError, match="no masks"):
        Segmenter(small(), 2).pretext(Batch(x))
    with pytest.raises(ValueError, match="at least one region"):
        Segmenter(small(), 1)


# segmentation

def test_soft_dice_equals_a_loop():
    g = torch.Generator().manual_seed(2)
    logits, masks = torch.randn(2, 3, 4, 5, generator=g), torch.randint(0, 3, (2, 4, 5), generator=g)
    p = logits.softmax(1)
    nats, scores = 0.0, []
    for k in (1, 2):
        overlap = sizes = 0.0
        for b in range(2):
            for i in range(4):
                for j in range(5):
                    true = float(masks[b, i, j] == k)
                    overlap += p[b, k, i, j].item() * true
                    sizes += p[b, k, i, j].item() + true
        scores.append((2 * overlap + 1) / (sizes + 1))
    for b in range(2):
        for i in range(4):
            for j in range(5):
                nats -= math.log(p[b, masks[b, i, j], i, j].item()) / 40
    assert soft_dice(p, masks).tolist() == pytest.approx(scores, rel=1e-5)
    assert segmentation_loss(logits, masks).item() == pytest.approx(nats + 1 - sum(scores) / 2, rel=1e-5)


def test_segmentation_loss_by_hand():
    masks = torch.tensor([[[0, 1], [0, 1]]])
    terms = segmentation_terms(torch.zeros(1, 2, 2, 2), masks)  # p = 1/2 in each pixel: 2 · 1 + 1 over 2 + 2 + 1
    assert terms["cross_entropy"].item() == pytest.approx(math.log(2)) and terms["dice"].item() == pytest.approx(1 - 3 / 5)


def test_perfect_and_absent_cost_nothing_and_background_does_not_count():
    masks = torch.zeros(1, 8, 8, dtype=torch.long)
    masks[0, 2:4, 2:4] = 1
    right = 40.0 * F.one_hot(masks, 3).movedim(-1, 1).float() - 20  # class 2 is absent and not predicted
    assert segmentation_loss(right, masks).item() == pytest.approx(0, abs=1e-5)
    empty = 40.0 * F.one_hot(torch.zeros_like(masks), 2).movedim(-1, 1).float() - 20
    assert segmentation_terms(empty, masks)["dice"].item() == pytest.approx(1 - 1 / 5)  # nothing found of 4 pixels: 1 / (4 + 1)


def test_loss_ignores_the_order_of_images_and_voxels():
    g = torch.Generator().manual_seed(3)
    logits, masks = torch.randn(3, 2, 6, 6, generator=g), torch.randint(0, 2, (3, 6, 6), generator=g)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(segmentation_loss(logits[order].flip(-1), masks[order].flip(-1)), segmentation_loss(logits, masks))


def test_half_precision_logits_do_not_overflow():
    logits, masks = torch.zeros(1, 2, 512, 512, dtype=torch.float16), torch.ones(1, 512, 512, dtype=torch.long)
    assert segmentation_loss(logits, masks).item() == pytest.approx(math.log(2) + 1 - 2 / 3, rel=1e-3)


@pytest.mark.parametrize("dims, skips", [(2, True), (2, False), (3, True)])
def test_segmenter_shapes_and_gradient(dims, skips):
    encoder = small(dims, channels=2)
    model = Segmenter(encoder, 3, skips)
    x = torch.randn(2, 2, *[16] * dims)
    terms = model(model.pretext(Batch(x, masks=torch.randint(0, 3, (2, *[16] * dims)))))
    terms["loss"].backward()
    assert terms["loss"].item() == pytest.approx((terms["cross_entropy"] + terms["dice"]).item())
    assert all(p.grad is not None for p in encoder.parameters()) and model.encoder is encoder
    p = model.eval().predict(x)
    assert p.shape == (2, 3, *[16] * dims)
    torch.testing.assert_close(p.sum(1), torch.ones(2, *[16] * dims))


def test_segmenter_learns_a_planted_square():
    model = Segmenter(small(), 2)
    fit(model, planted(64), steps=60, batch_size=16, lr=1e-2, device="cpu", precision="fp32", progress=False)
    fresh = planted(12, seed=9).stack()
    found = model.predict(fresh.x).argmax(1)
    assert 2 * (found * fresh.masks).sum() / (found + fresh.masks).sum() > 0.8


class Local(nn.Module):
    "Answers each voxel by its own value: windows must not matter."

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def predict(self, x):
        return torch.cat([x * self.weight, -x], 1)


@pytest.mark.parametrize("space", [(30, 41), (9, 50), (5, 6), (12, 20, 17), (4, 30, 9)])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
def test_windows_give_back_every_voxel(space, overlap):
    image = torch.randn(1, *space)
    found = predict_volume(Local(), image, 12, overlap)
    assert found.shape == (2, *space)
    torch.testing.assert_close(found, torch.cat([image, -image]), atol=1e-5, rtol=1e-5)


def test_window_larger_than_the_image_pads_with_the_darkest_value():
    seen = []

    class Looks(Local):
        def predict(self, x):
            seen.append(x.clone())
            return x

    predict_volume(Looks(), torch.rand(1, 5, 5) + 3, 9)
    outside = seen[0][0, 0, 0]  # the first row is padding
    assert seen[0].shape[2:] == (9, 9) and outside.min() >= 3 and torch.all(outside == outside[0])


def test_predict_volume_keeps_the_mode_and_predicts_in_inference_mode():
    model = Segmenter(small(), 2).train()
    image = torch.randn(1, 16, 16)
    found = predict_volume(model, image, 16)
    assert model.training
    torch.testing.assert_close(found, model.eval().predict(image[None])[0])


@pytest.mark.parametrize("size, overlap", [((8, 8, 8), 0.25), (0, 0.25), (8, 1.0), (8, -0.1)])
def test_predict_volume_refuses(size, overlap):
    with pytest.raises(ValueError, match="does not fit an image"):
        predict_volume(Local(), torch.zeros(1, 16, 16), size, overlap)
