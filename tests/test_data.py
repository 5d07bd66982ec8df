"ImageSet: parts by patient, batches, windows, and what it refuses."
import itertools

import numpy as np
import pytest
import torch

from medssl_nb.data.images import Batch, ImageSet, fair_order, fit_to_size, normalise


def ramps(n=6, size=(8, 10)):
    "Images of growing height, each its own ramp."
    return [torch.arange(float((size[0] + i) * size[1])).reshape(1, size[0] + i, size[1]) + 100 * i for i in range(n)]


def test_normalise_by_hand():
    x = torch.tensor([[[1.0, 3.0]], [[5.0, 5.0]]])
    assert normalise(x).tolist() == [[[-1.0, 1.0]], [[0.0, 0.0]]]
    batch = torch.randn(3, 2, 5, 5) * 7 + 2
    torch.testing.assert_close(normalise(batch, dims=2), torch.stack([normalise(b) for b in batch]))


@pytest.mark.parametrize("space, size", [((5,), (3,)), ((3,), (5,)), ((4, 7), (6, 2)), ((3, 4, 5), (5, 4, 3))])
def test_fit_to_size_against_numpy(space, size):
    x = torch.arange(float(np.prod(space))).reshape(1, *space)
    start = tuple((n - s) // 2 for n, s in zip(space, size))
    padded = np.pad(x.numpy(), [(0, 0), *[(9, 9)] * len(space)], constant_values=-1)
    expected = padded[(slice(None), *[slice(9 + a, 9 + a + s) for a, s in zip(start, size)])]
    assert np.array_equal(fit_to_size(x, size, start, fill=-1).numpy(), expected)


def test_fair_order_holds_each_class_in_every_prefix():
    strata = [0] * 70 + [1] * 20 + [2] * 10
    order = fair_order(strata, seed=4)
    assert sorted(order) == list(range(100))
    for prefix in range(10, 101, 10):
        counts = np.bincount(np.array(strata)[order[:prefix]], minlength=3)
        assert (abs(counts - prefix * np.array([0.7, 0.2, 0.1])) <= 1).all()


@pytest.fixture
def patients():
    group = np.repeat(np.arange(30), 3)
    return ImageSet(torch.randn(90, 1, 6, 6), labels=(group % 3).tolist(), groups=[f"p{g}" for g in group])


def test_split_never_divides_a_patient(patients):
    for seed in range(5):
        parts = patients.split((0.5, 0.2, 0.3), seed)
        for a, b in itertools.combinations(parts, 2):
            assert not set(a.groups) & set(b.groups)
        assert sum(map(len, parts)) == 90
        assert all(torch.bincount(p.labels).tolist() == [len(p) // 3] * 3 for p in parts[:1])
    assert patients.split((0.5, 0.5), 1)[0].groups == patients.split((0.5, 0.5), 1)[0].groups
    assert patients.split((0.5, 0.5), 1)[0].groups != patients.split((0.5, 0.5), 2)[0].groups


def test_fractions_are_nested(patients):
    sets = [set(patients.fraction(f, seed=2).groups) for f in (0.05, 3, 0.2, 0.5, 1.0)]
    assert all(a <= b for a, b in zip(sets, sets[1:])) and [len(s) for s in sets] == [2, 3, 6, 15, 30]


def test_subset_of_a_subset(patients):
    part = patients.subset(range(10, 40)).subset([0, 5, -1])
    assert [part[i].image is not None and part.names[i] for i in range(3)] == ["image 10", "image 15", "image 39"]
    assert torch.equal(part[1].image, patients[15].image) and part.labels.tolist() == patients.labels[[10, 15, 39]].tolist()


def test_every_epoch_shows_every_image_once(patients):
    stream = patients.batches(18, seed=3)
    for _ in range(3):
        epoch = torch.cat([next(stream).index for _ in range(5)])
        assert sorted(epoch.tolist()) == list(range(90))


def test_batches_start_anywhere_with_the_same_images():
    images = ImageSet(ramps())
    run = list(itertools.islice(images.batches(4, size=6, seed=1), 7))
    for start in (1, 4, 6):
        again = next(images.batches(4, size=6, seed=1, start=start))
        assert torch.equal(run[start].x, again.x)
    other = next(images.batches(4, size=6, seed=2))
    assert not torch.equal(run[0].x, other.x)


def test_two_shares_make_the_whole_batch():
    images = ImageSet(torch.randn(12, 1, 5, 5))
    whole = next(images.batches(8, seed=5)).x
    halves = [next(images.batches(8, seed=5, share=(rank, 2))).x for rank in (0, 1)]
    assert torch.equal(whole, torch.cat(halves))


def test_per_group_draws_two_different_images_of_each_patient(patients):
    batch = next(patients.batches(8, per_group=2, seed=0))
    pairs = batch.group.reshape(4, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all() and len(pairs[:, 0].unique()) == 4
    index = batch.index.reshape(4, 2)
    assert (index[:, 0] != index[:, 1]).all()


def test_windows_are_normalised_by_the_whole_volume_and_padded_dark():
    volume = torch.zeros(1, 4, 4)
    volume[0, 0, 0] = 16.0
    whole = normalise(volume)
    batch = ImageSet([volume]).stack(6)
    torch.testing.assert_close(batch.x[0, :, 1:5, 1:5], whole)
    assert (batch.x[0, 0, 0] == whole.min()).all()
    corner = ImageSet([volume]).stack((2, 2))
    torch.testing.assert_close(corner.x[0], whole[:, 1:3, 1:3])


def test_masks_move_with_their_images():
    images = ramps()
    masks = [(i[0] % 7 == 0).long() for i in images]
    batch = next(ImageSet(images, masks=masks).batches(12, size=(12, 5), seed=0))
    for x, mask, i in zip(batch.x, batch.masks, batch.index):
        std, mean = torch.std_mean(images[i], correction=0)
        values = (x[0] * std + mean).round()
        inside = values > images[i].min()  # padding has the lowest value
        assert inside.sum() > 20 and torch.equal(mask[inside], (values[inside] % 7 == 0).long())


def test_lazy_images_are_read_when_asked():
    read = []

    class Lazy:
        def __len__(self):
            return 50

        def __getitem__(self, i):
            read.append(int(i))
            return np.full((1, 4, 4), i, dtype=np.int16) + np.eye(4, dtype=np.int16)

    images = ImageSet(Lazy())
    assert read == [0]
    images.subset(range(40, 50)).stack()
    assert set(read) == {0, *range(40, 50)}


def test_memory_mapped_volume_is_not_written(tmp_path):
    np.save(tmp_path / "v.npy", np.arange(32, dtype=np.uint16).reshape(2, 1, 4, 4))
    images = ImageSet(np.load(tmp_path / "v.npy", mmap_mode="r"))
    batch = images.stack()
    batch.x.zero_()
    assert np.load(tmp_path / "v.npy").max() == 31


def test_labels_of_several_kinds():
    x = torch.randn(4, 1, 3, 3)
    assert ImageSet(x, labels=[0.0, 1.0, 2.0, 1.0]).labels.dtype == torch.int64
    assert ImageSet(x, labels=[[0, 1], [1, 1], [0, 0], [1, 0]]).labels.dtype == torch.float32
    assert isinstance(next(ImageSet(x, labels=[0, 1, 0, 1]).batches(2)), Batch)


@pytest.mark.parametrize("make, said", [
    (lambda: ImageSet([]), "no images"),
    (lambda: ImageSet(torch.zeros(2, 5, 5)), "add the channel axis"),
    (lambda: ImageSet(torch.zeros(2, 1, 5, 5), labels=[0]), "labels: 1 given for 2"),
    (lambda: ImageSet(torch.zeros(2, 1, 5, 5), labels=[0, 3], classes=["a", "b"]), "image 1 has label 3"),
    (lambda: ImageSet(torch.zeros(2, 1, 5, 5), labels=[0, -1]), "image 1 has label -1"),
    (lambda: ImageSet(torch.zeros(2, 1, 5, 5), labels=[0, 0.5]), "whole numbers"),
    (lambda: ImageSet(torch.zeros(2, 1, 5, 5), masks=torch.zeros(3, 5, 5)), "masks: 3 given for 2"),
    (lambda: ImageSet(torch.zeros(2, 1, 5, 5), masks=torch.zeros(2, 5, 4))[1], "image 1: its mask is"),
    (lambda: ImageSet([torch.zeros(1, 5, 5), torch.zeros(2, 5, 5)])[1], "image 1 has shape"),
    (lambda: ImageSet([torch.zeros(1, 5, 5), torch.zeros(1, 6, 5)]).stack(), "differ in size"),
    (lambda: ImageSet(torch.full((1, 1, 5, 5), torch.nan), names=["scan 7"]).stack(), "scan 7 holds NaN"),
    (lambda: ImageSet(torch.zeros(4, 1, 5, 5)).split((0.9, 0.01)), "too few"),
    (lambda: ImageSet(torch.zeros(4, 1, 5, 5)).split((0.9, 0.9)), "sum to at most 1"),
    (lambda: ImageSet(torch.zeros(4, 1, 5, 5)).fraction(5), "cannot take 5"),
    (lambda: ImageSet(torch.zeros(4, 1, 5, 5)).fraction(1.5), "cannot take 1.5"),
    (lambda: ImageSet(torch.zeros(4, 1, 5, 5)).stack((3, 3, 3)), "does not fit images with 2 axes"),
    (lambda: next(ImageSet(torch.zeros(4, 1, 5, 5)).batches(3, share=(0, 2))), "multiple of 2"),
])
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
