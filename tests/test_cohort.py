"The built-in cohort: the same voxels everywhere, invertible deformations, nested lesions, a cache that mends itself."
import hashlib
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from medssl_nb.data.cohort import MODALITIES, NESTED, anatomy, cohort, flow, grid, jacobian, look_up, place, scan, smooth_field, template

module = sys.modules["medssl_nb.data.cohort"]  # the package's name `cohort` may be the function


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDSSL_NB_CACHE", str(tmp_path / "cache"))


def make(n=2, size=24, spatial_dims=3, seed=0, **options):
    return cohort(n, size, spatial_dims, seed, progress=False, **options)


def test_the_voxels_of_a_seed_are_pinned():
    # Every operation is an exactly rounded one in a fixed order, so no tolerance is needed: the bytes themselves are pinned.
    images = make(n=2, size=32, seed=11, lesions=True, modalities=MODALITIES, scans=2, cache=False)
    digest = hashlib.sha256(np.ascontiguousarray(images.images).tobytes() + np.ascontiguousarray(images.masks).tobytes())
    assert digest.hexdigest()[:16] == "4c3b0d3642c464f2"
    slices = make(n=3, size=64, spatial_dims=2, seed=11, cache=False)
    digest = hashlib.sha256(np.ascontiguousarray(slices.images).tobytes() + np.ascontiguousarray(slices.masks).tobytes())
    assert digest.hexdigest()[:16] == "1c3eb234ca8e0857"


def test_vector_instructions_and_threads_do_not_change_a_voxel():
    code = (
        "import hashlib, numpy as np; from medssl_nb.data.cohort import anatomy, scan;"
        "i, m = scan(anatomy(4, 1, True), 4, 1, 0, 24, 3, ('t1', 't2')); print(hashlib.sha256(i.tobytes() + m.tobytes()).hexdigest())"
    )
    features = "X86_V3 X86_V4" if np.lib.NumpyVersion(np.__version__) >= "2.4.0" else "AVX2 FMA3 AVX512F"
    plain = {**os.environ, "NPY_DISABLE_CPU_FEATURES": features, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=plain, capture_output=True, text=True, check=True)
    image, mask = scan(anatomy(4, 1, True), 4, 1, 0, 24, 3, ("t1", "t2"))
    assert ran.stdout.strip() == hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest()


@pytest.mark.parametrize("spatial_dims", (2, 3))
def test_a_volume_depends_on_nothing_but_seed_and_patient(spatial_dims):
    options = dict(spatial_dims=spatial_dims, lesions=True, modalities=("t1", "flair"))
    many, few = make(n=5, **options), make(n=3, **options)
    for i in range(3):
        assert torch.equal(many[i].image, few[i].image) and torch.equal(many[i].mask, few[i].mask) and many[i].label == few[i].label
    flair = make(n=2, **{**options, "modalities": "flair"})
    assert torch.equal(flair[1].image[0], many[1].image[1])
    twice = make(n=2, scans=2, **options)
    assert torch.equal(twice[2].image, many[1].image) and twice.groups == [0, 0, 1, 1]
    assert not torch.equal(twice[2].image, twice[3].image) and not torch.equal(many[0].image, many[1].image)
    assert not torch.equal(make(n=1, seed=1, **options)[0].image, many[0].image)


@pytest.mark.parametrize("lesions", (False, True))
def test_every_deformation_is_invertible(lesions):
    nodes = grid(40)
    for patient in range(12):
        body = anatomy(5, patient, lesions, deformation=1 + patient % 2)
        assert jacobian(nodes + body.warp[:3], 5).min() > 0
    extreme = anatomy(5, 0, lesions, deformation=2.0, severity=0.999)
    _, there, _ = place(extreme, module.draws(5, 0, 2, 0), 64)  # pose and head size included, voxel by voxel
    assert jacobian(there.reshape(3, 64, 64, 64), 200 / 64).min() > 0
    assert extreme.grade == 4 and anatomy(5, 0, lesions, severity=0.0).grade == 0


def test_the_inverse_flow_brings_every_point_home():
    velocity = smooth_field(np.random.default_rng(0).uniform(-20, 20, (3, 8, 8, 8)).astype(np.float32), 40)
    start = grid(20)[:, 4:-4, 4:-4, 4:-4].reshape(3, -1)
    away = start + look_up(flow(velocity), start)
    home = away + look_up(flow(-velocity), away)
    assert np.abs(away - start).max() > 5 and np.abs(home - start).max() < 0.3
    assert jacobian(grid(40) * np.float32(0.5), 5) == pytest.approx(0.125, rel=1e-4)
    folded = grid(40).copy()
    folded[2] = 200 - folded[2]
    assert jacobian(folded, 5).max() < 0  # a mirror image is no flow


def test_look_up_agrees_with_scipy():
    rng = np.random.default_rng(2)
    table = rng.normal(size=(2, 8, 10, 20)).astype(np.float32)
    points = rng.uniform(-10, 210, (3, 500)).astype(np.float32)
    voxels = [points[k] * (n / 200) - 0.5 for k, n in enumerate(table.shape[1:])]
    expected = [map_coordinates(channel.astype(float), voxels, order=1, mode="nearest") for channel in table]
    np.testing.assert_allclose(look_up(table, points), expected, atol=2e-5)


def test_the_template_comes_without_a_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    module._millimetres.cache_clear(), template.cache_clear()
    t1, fluid, grey, white = template(4)
    assert t1.shape == (50, 50, 50) and (fluid + grey + white).max() <= 1 + 1e-6
    litres = [float(part.sum()) * 4**3 / 1e6 for part in (fluid, grey, white)]
    assert 0.1 < litres[0] < 0.4 and 0.7 < litres[1] < 1.3 and 0.4 < litres[2] < 0.8  # a head's volumes
    assert t1[white > 0.9].mean() > t1[grey > 0.9].mean() > t1[fluid > 0.9].mean()
    assert abs(np.argwhere(white > 0.5).mean(0)[2] - 24.5) < 1  # left and right in balance


def test_lesions_are_nested_and_graded():
    images = make(n=14, size=64, lesions=True, modalities=("t1ce",))
    assert images.regions[4:] == ("oedema", "necrotic core", "enhancing core") and len(images.classes) == 5
    volumes = []
    for i in range(len(images)):
        mask = images[i].mask
        whole, core, enhancing = (torch.isin(mask, torch.tensor(v)) for v in NESTED.values())
        assert (whole >= core).all() and (core >= enhancing).all() and whole.sum() > core.sum() > enhancing.sum() > 0
        volumes.append(float(whole.sum()))
    ranks = np.argsort(np.argsort(volumes))
    assert np.corrcoef(ranks, images.labels)[0, 1] > 0.8
    assert {0, 4} <= set(images.labels.tolist()) <= {0, 1, 2, 3, 4}


def test_the_ventricles_tell_the_grade_and_the_brightness_does_not():
    images = make(n=40, size=32)
    assert images.regions == ("background", "cerebrospinal fluid", "grey matter", "white matter")
    samples = [images[i] for i in range(len(images))]
    share = [float((s.mask[8:24, 8:24, 8:24] == 1).sum() / (s.mask > 0).sum()) for s in samples]
    light = [float(s.image[0][s.mask > 0].mean() / s.image[0][s.mask > 0].quantile(0.9)) for s in samples]
    told, guessed = (np.corrcoef(np.argsort(np.argsort(x)), images.labels)[0, 1] for x in (share, light))
    assert told > 0.8 and abs(guessed) < 0.4


def test_a_lesion_does_not_change_the_brain_far_from_it():
    without, with_lesion = anatomy(3, 2), anatomy(3, 2, lesions=True)
    far = np.sqrt(((grid(40) - with_lesion.focus.reshape(3, 1, 1, 1)) ** 2).sum(0)) > 2 * with_lesion.radius + 25
    assert far.any()
    assert np.abs(without.warp - with_lesion.warp)[:3, far].max() < np.abs(without.warp - with_lesion.warp)[:3].max() / 20


@pytest.mark.parametrize("spatial_dims", (2, 3))
def test_shapes_units_and_background(spatial_dims):
    images = make(n=2, size=32, spatial_dims=spatial_dims, modalities=("t1", "t2", "flair"))
    sample = images[1]
    assert sample.image.shape == (3,) + (32,) * spatial_dims and sample.mask.shape == (32,) * spatial_dims
    assert sample.spacing == (6.25,) * spatial_dims and sample.group == 1 and sample.name == "patient 1 scan 0"
    assert (sample.image[:, sample.mask == 0] == 0).all() and sample.image.min() >= 0
    mean = [[float(channel[sample.mask == tissue].mean()) for tissue in (1, 2, 3)] for channel in sample.image]
    assert np.argsort(mean[0]).tolist() == [0, 1, 2] and np.argsort(mean[1]).tolist() == [2, 1, 0] and np.argmin(mean[2]) == 0


def test_the_cache_is_used_and_a_broken_one_is_made_again(tmp_path, monkeypatch):
    first = make(n=2, size=16)
    (folder,) = (tmp_path / "cache").iterdir()
    assert isinstance(first.images, np.memmap)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_made", lambda *_: pytest.fail("made again"))
        assert torch.equal(make(n=2, size=16)[1].image, first[1].image)
    expected = first[1].image.clone()
    del first

    def flip(part):
        data = bytearray((folder / part).read_bytes())
        data[-1] ^= 1
        return bytes(data)

    for part, content in (("images.npy", flip("images.npy")), ("masks.npy", b""), ("grades.npy", b"\x93NUMPY"), ("card.json", b"{"), ("card.json", b"[]")):
        (folder / part).unlink()
        (folder / part).write_bytes(content)
        assert module._opened(folder) is None, part
        assert torch.equal(make(n=2, size=16)[1].image, expected)
        assert module._opened(folder) is not None
    (folder / "masks.npy").unlink()
    assert torch.equal(make(n=2, size=16)[1].image, expected)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]  # nothing unfinished is left


def test_the_faster_of_two_writers_wins(tmp_path, monkeypatch):
    arrays, folder = (np.arange(4), np.zeros(2), np.ones(2)), tmp_path / "kept"
    module._stored(folder, arrays, {})
    opened = iter([True])  # the check before the rename sees nothing broken; then the rename finds the other's folder
    with monkeypatch.context() as patch:
        patch.setattr(module, "_opened", lambda _: next(opened, arrays))
        assert module._stored(folder, arrays, {}) is arrays
    assert [p.name for p in tmp_path.iterdir()] == ["kept"] and module._opened(folder)[0].tolist() == [0, 1, 2, 3]


def test_other_parameters_have_another_cache(tmp_path):
    for options in ({}, dict(seed=1), dict(lesions=True), dict(scans=2), dict(deformation=0.5), dict(modalities="t2"), dict(spatial_dims=2)):
        make(n=1, size=16, **options)
    assert len(list((tmp_path / "cache").iterdir())) == 7
    make(n=1, size=16, seed=2, cache=False)
    assert len(list((tmp_path / "cache").iterdir())) == 7


def test_a_folder_that_cannot_be_written_is_no_disaster(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MEDSSL_NB_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="MEDSSL_NB_CACHE"):
        assert len(make(n=1, size=16)) == 1


def test_progress_goes_to_stderr_and_can_be_silenced(capfd):
    make(n=1, size=16, cache=False)
    assert capfd.readouterr() == ("", "")
    cohort(1, 16, progress=True, cache=False)
    out, err = capfd.readouterr()
    assert out == "" and "patients" in err


@pytest.mark.parametrize("wrong, says", [
    (dict(n=0), "at least 1"), (dict(scans=0), "at least 1"), (dict(size=8), "16 to 200"), (dict(size=300), "16 to 200"),
    (dict(spatial_dims=1), "spatial_dims"), (dict(modalities=()), "modalities"), (dict(modalities=("t1", "ct")), "flair"),
    (dict(modalities=("t1", "t1")), "once"), (dict(deformation=-1), "deformation"),
])
def test_bad_input_gives_one_clear_error(wrong, says):
    with pytest.raises(ValueError, match=says):
        make(**{**dict(n=1, size=16), **wrong})
