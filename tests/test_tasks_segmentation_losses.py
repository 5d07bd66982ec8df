"The losses of a Segmenter: loops, the form of segmentation-models-pytorch, edges, and the choice by name."
import pytest
import torch
import torch.nn.functional as F

from medssl_nb.data.images import Batch
from medssl_nb.nets.base import create
from medssl_nb.tasks.segmentation import (
    LOSSES, Segmenter, focal_tversky, jaccard_loss, loss_terms, segmentation_loss, segmentation_terms, soft_dice, soft_jaccard, tversky,
)


def drawn(seed=0, classes=3, space=(4, 5)):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, classes, *space, generator=g), torch.randint(0, classes, (2, *space), generator=g)


@pytest.mark.parametrize("background", [False, True])
def test_soft_jaccard_equals_a_loop(background):
    logits, masks = drawn()
    p, scores = logits.softmax(1), []
    for k in range(0 if background else 1, 3):
        overlap = union = 0.0
        for b in range(2):
            for i in range(4):
                for j in range(5):
                    true, q = float(masks[b, i, j] == k), p[b, k, i, j].item()
                    overlap += q * true
                    union += q + true - q * true
        scores.append((overlap + 1) / (union + 1))
    assert soft_jaccard(p, masks, background).tolist() == pytest.approx(scores, rel=1e-5)
    assert jaccard_loss(logits, masks, background).item() == pytest.approx(1 - sum(scores) / len(scores), rel=1e-5)


def test_jaccard_tends_to_the_published_form_on_large_images():
    logits, masks = drawn(1, 4, (64, 64))
    p, truth = logits.softmax(1).movedim(1, 0).flatten(1), F.one_hot(masks, 4).movedim(-1, 0).flatten(1)
    overlap = (p * truth).sum(1)
    theirs = 1 - overlap / (p.sum(1) + truth.sum(1) - overlap)  # all classes present: the mean over all, background included
    assert jaccard_loss(logits, masks, background=True).item() == pytest.approx(theirs.mean().item(), abs=1e-3)


def test_jaccard_edges():
    masks = torch.zeros(1, 8, 8, dtype=torch.long)
    sure = lambda labels: 40.0 * F.one_hot(labels, 2).movedim(-1, 1).float() - 20
    assert jaccard_loss(sure(masks), masks).item() == pytest.approx(0, abs=1e-5)  # absent, and not called
    assert jaccard_loss(sure(1 - masks), masks).item() == pytest.approx(1 - 1 / 65, abs=1e-5)  # absent, and called everywhere
    masks[0, :2] = 1
    assert jaccard_loss(sure(masks), masks).item() == pytest.approx(0, abs=1e-5)
    assert jaccard_loss(torch.zeros(1, 2, 512, 512, dtype=torch.float16), torch.ones(1, 512, 512, dtype=torch.long)).item() == pytest.approx(0.5, rel=1e-3)


def test_jaccard_and_dice_agree_up_to_their_epsilon():
    logits, masks = drawn(2, 3, (96, 96))
    d = soft_dice(logits.softmax(1), masks)
    torch.testing.assert_close(soft_jaccard(logits.softmax(1), masks), d / (2 - d), atol=1e-3, rtol=0)


def test_each_loss_is_the_sum_of_its_terms():
    logits, masks = drawn()
    terms = segmentation_terms(logits, masks)
    expected = {
        "dice_cross_entropy": terms["cross_entropy"] + terms["dice"], "dice": terms["dice"], "cross_entropy": terms["cross_entropy"],
        "jaccard": jaccard_loss(logits, masks), "focal_tversky": focal_tversky(logits, masks),
    }
    assert set(expected) == set(LOSSES)
    for name, value in expected.items():
        found = loss_terms(logits, masks, name)
        torch.testing.assert_close(found["loss"], value)
        assert {"cross_entropy", "dice"} <= set(found)
    torch.testing.assert_close(loss_terms(logits, masks)["loss"], segmentation_loss(logits, masks))
    assert (tversky(logits.softmax(1), masks) < 1).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_segmenter_trains_with_each_loss(loss):
    torch.manual_seed(0)
    model = Segmenter(create("resnet18", width=4, stem="small"), 3, loss=loss)
    batch = Batch(torch.randn(2, 1, 16, 16), masks=drawn(3, 3, (16, 16))[1])
    terms = model(model.pretext(batch))
    terms["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    torch.testing.assert_close(terms["loss"], loss_terms(model.logits(batch.x), batch.masks, loss)["loss"])


def test_default_is_what_it_was_and_unknown_is_refused():
    encoder = create("resnet18", width=4, stem="small")
    assert Segmenter(encoder, 2).loss == "dice_cross_entropy"
    with pytest.raises(ValueError, match="use one of dice_cross_entropy, dice, jaccard, cross_entropy, focal_tversky"):
        Segmenter(encoder, 2, loss="iou")


def test_deep_supervision_takes_the_mean_of_the_named_loss():
    torch.manual_seed(0)
    network = create("unet_pp", width=4, levels=3, out_channels=2)
    model = Segmenter(network, 2, loss="jaccard").eval()
    x, masks = torch.randn(2, 1, 16, 16), drawn(4, 2, (16, 16))[1]
    answers = network.all_logits(x)
    torch.testing.assert_close(model(Batch(x, masks=masks))["loss"], sum(jaccard_loss(a, masks) for a in answers) / len(answers))
