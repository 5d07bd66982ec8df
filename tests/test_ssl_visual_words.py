"TransVW: the code, the patients and the places of words by slow references, the loss by loops, what the official code computes, what must not cheat."
import math

import pytest
import torch
import torch.nn.functional as F

from medssl_nb.data.images import ImageSet
from medssl_nb.ssl.restoration import unit_range
from medssl_nb.ssl.visual_words import (
    WAYS, ask_words, find_patients, find_words, linear_code, members, restore_and_name, spoil_one_way, spread_places, thumbnail, word_boxes,
)
from medssl_nb.train.fit import fit
from small_methods import asked, drawn, method_of, small

TINY = {"words": 6, "hidden": 8, "dim": 4}


def test_linear_code_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA

    rows = drawn(30, 12) @ drawn(12, 12, seed=1) + 5
    mean, axes = linear_code(rows, 4)
    other = PCA(4, svd_solver="full").fit(rows.numpy())
    ours, theirs = (rows - mean) @ axes, torch.from_numpy(other.transform(rows.numpy())).float()
    torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [torch.ones(5, 8), drawn(3, 8), drawn(1, 8)])
def test_linear_code_of_too_little_is_finite_and_of_the_same_shape(rows):
    mean, axes = linear_code(rows, 6)
    assert mean.shape == (8,) and axes.shape == (8, 6) and torch.isfinite(axes).all()
    torch.testing.assert_close((rows - mean) @ axes @ axes.T + mean, rows, atol=1e-4, rtol=0)  # what varies is kept


@pytest.mark.parametrize("d", (2, 3))
def test_thumbnails_are_block_means(d):
    x = drawn(2, 3, *[32] * d)
    slow = getattr(F, f"avg_pool{d}d")(x, 2)
    torch.testing.assert_close(thumbnail(x), slow.flatten(1))


def test_patients_of_a_word_are_the_nearest():
    codes = drawn(25, 3)
    reference, radius = find_patients(codes, 8, 5, torch.Generator().manual_seed(0))
    assert reference.unique().numel() == 8  # no reference serves twice
    inside = members(codes, codes[reference], radius)
    for k, r in enumerate(reference.tolist()):
        by_distance = sorted(range(25), key=lambda i: math.dist(codes[i].tolist(), codes[r].tolist()))
        mine = {i for i in by_distance[:5]}
        assert by_distance[0] == r and mine <= set(inside[:, k].nonzero().flatten().tolist())
    none = [i for i in range(25) if not any(math.dist(codes[i].tolist(), codes[r].tolist()) <= radius[k] for k, r in enumerate(reference.tolist()))]
    for i in none:
        nearest = min(range(8), key=lambda k: math.dist(codes[i].tolist(), codes[reference[k]].tolist()))
        assert inside[i].nonzero().flatten().tolist() == [nearest]


def test_more_words_than_patients_share_references():
    reference, radius = find_patients(drawn(3, 2), 7, 10, torch.Generator().manual_seed(0))
    assert torch.bincount(reference).tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3]) and torch.isfinite(radius).all()


@pytest.mark.parametrize("d", (2, 3))
def test_places_keep_their_distance(d):
    places = spread_places(20, d, 0.1, torch.Generator().manual_seed(0))
    assert places.shape == (20, d) and min(math.dist(a, b) for i, a in enumerate(places.tolist()) for b in places.tolist()[:i]) >= 0.1
    crowded = spread_places(50, d, 5.0, torch.Generator().manual_seed(0))
    assert crowded.shape == (50, d) and 0 <= crowded.min() and crowded.max() <= 1


def test_boxes_lie_inside_and_plain_ones_at_their_place():
    x, place = torch.zeros(500, 1, 40, 32), torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    plain = word_boxes(x, place, 0.5, 0.0)
    space, side = torch.tensor([40, 32]), torch.tensor([20, 16])
    assert torch.equal(plain[:, 0], (place * (space - side)).round()) and torch.equal(plain[:, 1] - plain[:, 0], side.float().expand(500, 2))
    varied = word_boxes(x, place, 0.5, 2 / 3, torch.Generator().manual_seed(1))
    assert varied.min() >= 0 and (varied[:, 1] <= space).all()
    moved = (varied != plain).flatten(1).any(1).float().mean()
    assert abs(moved - 2 / 3) < 0.06
    ratio = (varied[:, 1] - varied[:, 0]) / side
    assert ratio.min() >= 50 / 64 - 1e-4 and ratio.max() <= 80 / 64 + 1e-4


def test_each_patch_is_spoiled_in_one_way():
    x = drawn(400, 1, 14, 14)
    spoiled, way = spoil_one_way(x, torch.Generator().manual_seed(0))
    assert (torch.bincount(way, minlength=4) / 400 - 0.25).abs().max() < 0.07 and len(WAYS) == 4
    for image, before, k in zip(spoiled, x, way.tolist()):
        if k == 0:
            assert torch.isin(image, before).all()
        if k == 1:  # a monotone curve: equal values stay equal, the order stays or is turned around
            order = image.flatten()[before.flatten().argsort()].diff()
            assert (order >= -1e-5).all() or (order <= 1e-5).all()
        if k >= 2:
            assert 0 < (image == before).float().mean() < 1 or k == 2


def test_loss_is_that_of_the_loops_and_of_the_official_formula():
    restored, logits = drawn(3, 2, 4, 4).sigmoid(), drawn(3, 5, seed=1)
    word, clean = [4, 0, 2], drawn(3, 2, 4, 4, seed=2).sigmoid()
    target = torch.cat([clean, torch.tensor(word).float().view(3, 1, 1, 1).expand(3, 1, 4, 4)], 1)
    found = restore_and_name(restored, logits, target, 0.01)
    square = sum((a - b) ** 2 for a, b in zip(restored.flatten().tolist(), clean.flatten().tolist())) / clean.numel()
    entropy = -sum(math.log(math.exp(row[k]) / sum(map(math.exp, row))) for row, k in zip(logits.tolist(), word)) / 3
    torch.testing.assert_close(found["loss"].item(), square + 0.01 * entropy, rtol=1e-5, atol=0)
    official = F.mse_loss(restored, clean) + 0.01 * F.cross_entropy(logits.softmax(1).log(), torch.tensor(word))
    torch.testing.assert_close(found["loss"], official)


@pytest.mark.parametrize("d", (2, 3))
def test_a_question_holds_the_clean_patch_and_its_word(d):
    method, x = small("transvw", d, 2, **TINY), drawn(5, 2, *[24] * d)
    pretext = asked(method, x)
    assert pretext.views[0].shape == (5, 2, *[12] * d) and pretext.target.shape == (5, 3, *[12] * d)
    assert torch.equal(pretext.target[:, -1].flatten(1)[:, 0].long(), pretext.drawn["word"])
    plain = ask_words(x, method.words, 0.5, 0.0, torch.Generator().manual_seed(0))
    for b in range(5):
        place = method.words.places[plain.drawn["word"][b]]
        start = (place * 12).round().long().tolist()
        piece = unit_range(x)[b][(slice(None), *(slice(s, s + 12) for s in start))]
        torch.testing.assert_close(plain.target[b, :-1], piece, atol=1e-5, rtol=0)


def test_words_are_found_alike_each_time_and_kept_with_the_weights():
    images = ImageSet(drawn(20, 1, 24, 24))
    first, second = small("transvw", **TINY, instances=5), small("transvw", **TINY, instances=5)
    assert first.words.members(images.stack().x).all()  # nothing was looked for yet
    torch.manual_seed(7)
    first.refresh(images)
    torch.manual_seed(8)
    second.refresh(images)
    assert all(torch.equal(a, b) for a, b in zip(first.words.buffers(), second.words.buffers()))
    mine = first.words.members(images.stack().x)
    assert (mine.sum(0) >= 5).all() and mine.any(1).all() and not mine.all()
    third = small("transvw", **TINY)
    third.load_state_dict(first.state_dict())
    assert torch.equal(third.words.members(images.stack().x), mine)


def test_a_reference_belongs_to_its_own_word():
    method, images = small("transvw", **TINY), ImageSet(drawn(20, 1, 24, 24))
    reference = find_words(method.words, images, 1)
    mine = method.words.members(images.stack().x)
    assert all(mine[r, k] for k, r in enumerate(reference.tolist()))


def test_every_image_is_asked_only_for_its_words():
    method, images = small("transvw", **TINY, instances=4), ImageSet(drawn(20, 1, 24, 24))
    method.refresh(images)
    x = images.stack().x
    mine = method.words.members(x)
    for seed in range(20):
        word = asked(method, x, seed).drawn["word"]
        assert mine[torch.arange(20), word].all()


def test_biases_alone_cannot_name():
    method = small("transvw", **TINY)
    torch.nn.init.zeros_(method.name.weight), torch.nn.init.zeros_(method.name.bias)
    torch.testing.assert_close(method(asked(method, drawn(8, 1, 24, 24)))["word"].item(), math.log(6), rtol=1e-5, atol=0)


def test_constant_images_give_no_word_away():
    pretext = asked(small("transvw", **TINY), torch.zeros(12, 1, 24, 24))
    assert (pretext.views[0] == 0).all() and pretext.target[:, -1].unique().numel() > 1


def test_patches_too_small_to_paint_are_named():
    with pytest.raises(ValueError, match="at least 12 voxels"):
        asked(small("transvw", **TINY), drawn(2, 1, 16, 16))


def test_fit_finds_the_words():
    method = method_of("transvw", 2)
    fit(method, ImageSet(drawn(8, 1, 16, 16)), steps=1, batch_size=4, device="cpu", progress=False)
    assert torch.isfinite(method.words.radius).all() and method.words.axes.abs().sum() > 0
