"Candidates and their judgement: places, labels and curves against counting by hand."
import numpy as np
import pytest
import torch

from medssl_nb.data import ImageSet
from medssl_nb.tasks.detection import blobs, candidates, cut, froc, luna_score


def scene(spots, space=(24, 24, 24), edge=3):
    "An image with bright cubes about some centres."
    image = np.zeros((1, *space), np.float32)
    for centre in spots:
        image[(0, *(slice(c - edge // 2, c + edge // 2 + 1) for c in centre))] = 1
    return image


@pytest.mark.parametrize("space", [(24, 24), (24, 24, 24)])
def test_blobs_are_found_at_their_centres(space):
    spots = [(6,) * len(space), (17,) * len(space)]
    assert sorted(map(tuple, blobs(scene(spots, space), most=2).tolist())) == spots


def test_brightness_and_offset_do_not_matter():
    image = scene([(6, 6, 6), (17, 16, 15)])
    assert blobs(image, most=2).tolist() == blobs(7 * image + 300, most=2).tolist()


def test_at_most_so_many_and_apart():
    image = np.random.default_rng(0).normal(size=(2, 32, 32)).astype(np.float32)
    centres = blobs(image, sigma=2, most=5)
    assert len(centres) == 5
    assert min(np.abs(a - b).max() for i, a in enumerate(centres) for b in centres[:i]) >= 4


@pytest.mark.parametrize("centre", [(0, 0), (9, 9), (4, 5), (0, 9)])
def test_cut_by_loops(centre):
    image, size = np.random.default_rng(1).normal(size=(2, 10, 10)), 6
    found = cut(image, centre, size)
    for y in range(size):
        for x in range(size):
            at = centre[0] - 3 + y, centre[1] - 3 + x
            inside = all(0 <= a < 10 for a in at)
            assert (found[:, y, x] == (image[:, at[0], at[1]] if inside else image.min())).all()


def two_patients():
    images = np.stack([scene([(6, 6, 6), (17, 17, 17)]), scene([(12, 12, 12)])])
    masks = np.zeros((2, 24, 24, 24), np.int64)
    masks[0, 16:19, 16:19, 16:19] = 5
    return ImageSet(images, masks=masks, groups=["ann", "bob"], names=["a", "b"])


def test_labels_groups_and_places_of_candidates():
    found = candidates(two_patients(), sought=(5,), size=8, most=2)
    places = {(int(i), *map(int, c)): int(label) for i, c, label in zip(found.image, found.centres, found.patches.labels)}
    assert places[0, 6, 6, 6] == 0 and places[0, 17, 17, 17] == 1 and places[1, 12, 12, 12] == 0
    assert sum(places.values()) == 1
    assert [("ann", "bob")[i] for i in found.image] == list(found.patches.groups)
    middle = [found.patches[i].image for i in range(len(found.patches)) if tuple(found.centres[i].tolist()) == (17, 17, 17)][0]
    assert middle.shape == (1, 8, 8, 8) and float(middle[0, 4, 4, 4]) == 1
    assert "17, 17, 17" in found.patches.names[int(found.patches.labels.argmax())]


def test_a_patient_s_candidates_stay_together():
    images = ImageSet(np.random.default_rng(0).normal(size=(12, 1, 16, 16)).astype(np.float32), masks=np.ones((12, 16, 16), np.int64), groups=[i // 2 for i in range(12)])
    patches = candidates(images, size=4, most=3).patches
    first, second = patches.split((0.5, 0.5), seed=0)
    assert not set(first.groups) & set(second.groups)


def test_images_without_masks_are_refused():
    with pytest.raises(ValueError, match="no masks"):
        candidates(ImageSet(np.zeros((1, 1, 8, 8), np.float32)))


def slow_froc(truth, p, image, lesions):
    "One threshold after the other, one image after the other."
    points = []
    for threshold in sorted(set(p)):
        found = sum(any(t and q >= threshold for t, q, i in zip(truth, p, image) if i == n) for n in set(image))
        false = sum(not t and q >= threshold for t, q in zip(truth, p))
        points.append((false / len(set(image)), found / lesions))
    return points


def test_froc_by_counting():
    rng = np.random.default_rng(2)
    truth, p, image = rng.integers(0, 2, 40), rng.permutation(40) / 40, np.repeat(np.arange(8), 5)
    slow = slow_froc(truth.tolist(), p.tolist(), image.tolist(), 10)
    alarms, found = froc(truth, p, image, 10)
    assert set(zip(alarms.tolist(), found.tolist())) <= {*slow, (0.0, 0.0)}
    assert found.max() == pytest.approx(len(set(image[truth == 1])) / 10)
    assert (np.diff(alarms) <= 0).all() and (np.diff(found) <= 0).all()


def test_several_hits_of_a_lesion_count_once():
    alarms, found = froc([1, 1, 0], [0.9, 0.8, 0.1], [0, 0, 0], lesions=1)
    assert found.max() == 1


def test_luna_score_of_perfect_and_of_late_answers():
    alarms, found = froc([1, 0, 1, 0], [0.9, 0.2, 0.8, 0.1], [0, 0, 1, 1], lesions=2)
    assert luna_score(alarms, found) == 1
    alarms, found = froc(torch.tensor([0, 1]), torch.tensor([0.9, 0.8]), torch.tensor([0, 0]), lesions=1)
    assert luna_score(alarms, found) < 1


@pytest.mark.parametrize("change", [{"lesions": 0}, {"truth": [0, 0]}, {"image": [0]}])
def test_what_cannot_be_counted_is_refused(change):
    given = {"truth": [1, 0], "probabilities": [0.5, 0.4], "image": [0, 0], "lesions": 1, **change}
    with pytest.raises(ValueError, match="one row a candidate"):
        froc(**given)
