"MedMNIST and the Decathlon: the published files, read, refused where they differ, and asked for where they are missing."
import hashlib
import pickle
import tarfile
import zipfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
from example_files import scan, shared_data, write_decathlon

from medssl_nb.data import published
from medssl_nb.data.published import CLASSES, MEDMNIST, TASKS, decathlon, medmnist, task_name

COUNTS = {"train": 6, "val": 2, "test": 3}


@pytest.fixture(autouse=True)
def places(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MEDSSL_NB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("MEDSSL_NB_DATA", str(tmp_path_factory.mktemp("data")))


@pytest.fixture
def make(tmp_path, monkeypatch):
    "Writes a set in the published format, and registers its hash as the published one."
    def write(name, size=28, colour=False, columns=1, register=True):
        rng, arrays = np.random.default_rng(0), {}
        space = (size,) * 3 if name.endswith("3d") else (size, size) + (3,) * colour
        for part, n in COUNTS.items():
            arrays[f"{part}_images"] = rng.integers(0, 256, (n, *space), dtype=np.uint8)
            arrays[f"{part}_labels"] = rng.integers(0, 2, (n, columns)).astype(np.uint8)
        path = tmp_path / (f"{name}.npz" if size == 28 else f"{name}_{size}.npz")
        np.savez_compressed(path, **arrays)
        if register:
            hashes = MEDMNIST[name][1].split()
            hashes[(28, 64, 128, 224).index(size)] = hashlib.md5(path.read_bytes()).hexdigest()
            monkeypatch.setitem(MEDMNIST, name, (MEDMNIST[name][0], " ".join(hashes)))
        return path, arrays
    return write


# ---- MedMNIST

@pytest.mark.parametrize("name, size, colour", [("pneumoniamnist", 28, False), ("bloodmnist", 64, True), ("nodulemnist3d", 28, False)])
def test_a_set_and_its_official_splits(make, tmp_path, name, size, colour):
    _, arrays = make(name, size, colour)
    for part, n in COUNTS.items():
        images = medmnist(name, size, tmp_path, split=part)
        expected = arrays[f"{part}_images"]
        expected = np.moveaxis(expected, -1, 1) if colour else expected[:, None]
        assert len(images) == n and images.images[0].dtype == np.uint8
        assert all(np.array_equal(images.images[i], expected[i]) for i in range(n))
        assert images.labels.dtype == torch.int64 and images.labels.tolist() == arrays[f"{part}_labels"][:, 0].tolist()
        assert images.classes == list(CLASSES[name]) and images.channels == (3 if colour else 1)
    everything = medmnist(name, size, tmp_path)
    assert len(everything) == 11 and everything.names[6:9] == ["val 0", "val 1", "test 0"]
    assert np.array_equal(everything[8].image, medmnist(name, size, tmp_path, split="test")[0].image)
    assert np.array_equal(pickle.loads(pickle.dumps(everything.images))[-1], everything.images[10])
    assert next(everything.batches(4)).x.shape == (4, everything.channels) + (size,) * everything.spatial_dims


def test_several_labels_an_image(make, tmp_path):
    _, arrays = make("chestmnist", columns=14)
    images = medmnist("chestmnist", root=tmp_path, split="train")
    assert images.labels.dtype == torch.float32 and torch.equal(images.labels, torch.from_numpy(arrays["train_labels"]).float())


def test_the_file_is_mapped_and_read_without_it_later(make, tmp_path):
    path, _ = make("octmnist")
    first = medmnist("octmnist", root=tmp_path)
    assert isinstance(first.images.arrays[0], np.memmap)
    first.images[0][:] = 7  # a private copy
    path.unlink()
    assert not (medmnist("octmnist", root=tmp_path).images[0] == 7).all()


def test_a_wrong_hash_is_refused(make, tmp_path):
    path, _ = make("octmnist", register=False)
    with pytest.raises(ValueError, match=r"octmnist.npz is not the published file \(its MD5 is .*fetch https://zenodo.org/records/10519652"):
        medmnist("octmnist", root=tmp_path)
    path, _ = make("octmnist")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not the published file"):
        medmnist("octmnist", root=tmp_path)


def test_a_missing_file_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as error:
        medmnist("pathmnist", 64, tmp_path)
    for part in ("pathmnist_64.npz", "download=True", "MD5 55aa9c1e0525abe5a6b9d8343a507616", str(tmp_path), "zenodo.org/records/10519652"):
        assert part in str(error.value)
    import pooch

    def no_network(*a, **k):
        raise ConnectionError("no route")
    monkeypatch.setattr(pooch, "retrieve", no_network)
    with pytest.raises(FileNotFoundError, match="could not be downloaded .*ConnectionError.*: fetch https"):
        medmnist("pathmnist", 64, tmp_path, download=True)


def test_a_download_is_checked_and_read(make, tmp_path, monkeypatch):
    import shutil

    import pooch

    path, arrays = make("breastmnist")
    asked = {}

    def retrieve(url, known_hash, fname, path, progressbar):
        asked.update(url=url, known_hash=known_hash)
        path.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "breastmnist.npz", path / fname)
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    images = medmnist("breastmnist", root=tmp_path / "new", download=True, split="test")
    assert len(images) == 3 and asked["url"].endswith("/breastmnist.npz")
    assert asked["known_hash"] == "md5:" + hashlib.md5(path.read_bytes()).hexdigest()


def test_objects_in_an_archive_are_not_unpickled(tmp_path, monkeypatch):
    arrays = {f"{part}_{what}": np.array([{}], dtype=object) for part in COUNTS for what in ("images", "labels")}
    np.savez(tmp_path / "octmnist.npz", **arrays)
    monkeypatch.setitem(MEDMNIST, "octmnist", ("classes", hashlib.md5((tmp_path / "octmnist.npz").read_bytes()).hexdigest()))
    with pytest.raises(ValueError, match="allow_pickle|Object arrays"):
        medmnist("octmnist", root=tmp_path)


def test_an_archive_without_the_arrays(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "octmnist.npz", "w") as archive:
        archive.writestr("../../escaped.npy", b"x")
    monkeypatch.setitem(MEDMNIST, "octmnist", ("classes", hashlib.md5((tmp_path / "octmnist.npz").read_bytes()).hexdigest()))
    with pytest.raises(ValueError, match="octmnist.npz is not a file of MedMNIST"):
        medmnist("octmnist", root=tmp_path)
    assert not list(tmp_path.parent.rglob("escaped.npy"))


def test_wrong_names_sizes_and_splits():
    with pytest.raises(ValueError, match="'mnist' is no set of MedMNIST; choose one of pathmnist"):
        medmnist("mnist")
    with pytest.raises(ValueError, match="nodulemnist3d is published with the sizes 28, 64, not 128"):
        medmnist("nodulemnist3d", 128)
    with pytest.raises(ValueError, match="split 'dev'"):
        medmnist("octmnist", split="dev")


def test_the_table():
    hashes = [md5 for _, row in MEDMNIST.values() for md5 in row.split()]
    assert len(MEDMNIST) == 18 and len(hashes) == len(set(hashes)) == 12 * 4 + 6 * 2
    assert all(len(md5) == 32 and set(md5) <= set("0123456789abcdef") for md5 in hashes)
    assert {name: len(c) for name, c in CLASSES.items()} == {
        "pathmnist": 9, "chestmnist": 14, "dermamnist": 7, "octmnist": 4, "pneumoniamnist": 2, "retinamnist": 5, "breastmnist": 2,
        "bloodmnist": 8, "tissuemnist": 8, "organamnist": 11, "organcmnist": 11, "organsmnist": 11, "organmnist3d": 11,
        "nodulemnist3d": 2, "adrenalmnist3d": 2, "fracturemnist3d": 3, "vesselmnist3d": 2, "synapsemnist3d": 2}


# ---- the Decathlon

def test_names_of_tasks():
    from monai.apps import DecathlonDataset

    assert set(TASKS) == set(DecathlonDataset.resource)
    for number, name in enumerate(TASKS, start=1):
        assert task_name(number) == task_name(name) == task_name(name[7:].lower()) == name
    for wrong in (0, 11, "kidney", "Task04", ""):
        with pytest.raises(ValueError, match="no task of the Decathlon; choose one of Task01"):
            task_name(wrong)


def test_an_unpacked_folder_is_read_without_monai(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "monai.apps", None)
    write_decathlon(tmp_path / "Task09_Spleen")
    images = decathlon("spleen", tmp_path, progress=False)
    assert len(images) == 3 and images.regions[1] == "organ"
    monkeypatch.setenv("MEDSSL_NB_DATA", str(tmp_path))
    assert decathlon(9, spacing=6, progress=False)[0].spacing == (6.0, 6.0, 6.0)


def test_contrasts_become_channels(tmp_path):
    import nibabel as nib
    from example_files import affine_of

    root = write_decathlon(tmp_path / "Task01_BrainTumour", n=1)
    contrasts = np.stack([scan(seed=k) for k in range(4)])
    nib.save(nib.Nifti1Image(contrasts.transpose(3, 2, 1, 0), affine_of()), root / "imagesTr" / "case_0.nii.gz")
    images = decathlon("brain tumour", tmp_path, progress=False)
    assert images.channels == 4 and np.array_equal(images.images[0], contrasts) and images[0].mask.shape == contrasts.shape[1:]


def test_a_tar_file_put_there_by_hand_is_checked_and_unpacked(tmp_path, monkeypatch):
    from monai.apps import DecathlonDataset

    write_decathlon(tmp_path / "made" / "Task02_Heart")
    with tarfile.open(tmp_path / "Task02_Heart.tar", "w") as archive:
        archive.add(tmp_path / "made" / "Task02_Heart", "Task02_Heart")
    with pytest.raises(FileNotFoundError, match="Task02_Heart could not be fetched or unpacked .*hash"):
        decathlon("heart", tmp_path)
    md5 = hashlib.md5((tmp_path / "Task02_Heart.tar").read_bytes()).hexdigest()
    monkeypatch.setitem(DecathlonDataset.md5, "Task02_Heart", md5)
    assert len(decathlon("heart", tmp_path, progress=False)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Task02_Heart", "Task02_Heart.tar", "made"]


def test_no_data_and_no_network(tmp_path, monkeypatch):
    from monai.apps import utils

    with pytest.raises(FileNotFoundError) as error:
        decathlon("hippocampus", tmp_path)
    for part in ("download=True", "Task04_Hippocampus.tar", "MD5 9d24dba78a72977dbd1d2e110310f31b", str(tmp_path), "packed or unpacked"):
        assert part in str(error.value)

    def no_network(*a, **k):
        raise URLError("no route to host")
    monkeypatch.setattr(utils, "urlretrieve", no_network)
    with pytest.raises(FileNotFoundError, match="could not be fetched .*no route to host.*: fetch https.*MD5"):
        decathlon("hippocampus", tmp_path, download=True)


def test_hippocampus():
    images = decathlon("hippocampus", shared_data("Task04_Hippocampus").parent, progress=False)
    assert len(images) == 260 and images.channels == 1 and images.spatial_dims == 3
    assert images.regions == ["background", "Anterior", "Posterior"] and set(images.spacing) == {(1.0, 1.0, 1.0)}
    assert all(image.shape[1:] == mask.shape for image, mask in zip(images.images, images.masks))
    assert {int(label) for mask in images.masks for label in np.unique(mask)} == {0, 1, 2}
    assert all(mask.any() for mask in images.masks) and len(set(images.names)) == len(set(images.groups)) == 260
    batch = next(images.batches(4, size=32))
    assert batch.x.shape == (4, 1, 32, 32, 32) and torch.isfinite(batch.x).all()
