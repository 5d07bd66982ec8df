"Reading good files: orientation, units, spacing, layouts, the cache and privacy."
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from example_files import SPACING, affine_of, dicom_slice, scan, shared_data, write_decathlon, write_dicom, write_nifti
from PIL import Image

from medssl_nb.data import files
from medssl_nb.data.files import canonical, find, folder, read_array, read_dicom, read_nifti, read_picture, resample


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MEDSSL_NB_CACHE", str(place))
    return place


def read(path, **options):
    return folder(path, progress=False, **options)


# ---- orientation and units

@pytest.mark.parametrize("axes", ["RAS", "LPS", "LSA", "PIR", "SRP", "AIL", "IPR"])
def test_every_orientation_gives_the_same_array(tmp_path, axes):
    volume = scan()
    image, spacing = read_nifti(write_nifti(tmp_path / "x.nii.gz", volume, axes=axes))
    assert np.array_equal(image, volume[None]) and spacing == SPACING and image.flags.c_contiguous


def test_up_back_left_in_the_room():
    "A voxel one step further along each axis lies higher, further back and further left: checked by the affine alone."
    rng = np.random.default_rng(0)
    for _ in range(20):
        matrix = np.eye(4)
        matrix[:3, :3] = rng.permutation(np.diag(rng.choice([-1, 1], 3) * rng.uniform(0.5, 3, 3)))
        shape = (4, 5, 6)
        room = np.einsum("ij,jxyz->xyzi", matrix[:3, :3], np.indices(shape))  # right, anterior, superior of each voxel
        turned, spacing = canonical(room, matrix)
        for axis, (direction, sign) in enumerate([(2, 1), (1, -1), (0, -1)]):
            steps = np.diff(turned[..., direction], axis=axis)
            assert np.allclose(steps, sign * spacing[axis], atol=1e-4)


def test_oblique_axes_go_to_the_nearest():
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ np.diag([-1.5, -2, 3])
    data = scan().transpose(2, 1, 0)
    volume, spacing = canonical(data, matrix)
    assert np.array_equal(volume, scan()) and np.allclose(spacing, SPACING, atol=1e-4)


def test_dicom_and_nifti_of_one_scan_agree(tmp_path):
    volume = scan() // 2 * 2
    series = write_dicom(tmp_path / "dicom", volume)
    one, one_spacing = read_dicom(sorted(series))
    two, two_spacing = read_nifti(write_nifti(tmp_path / "x.nii", volume, axes="RAS"))
    assert one_spacing == two_spacing == SPACING
    assert np.array_equal(one, two) and np.array_equal(one[0], volume)  # HU by slope 2, intercept -1000


@pytest.mark.parametrize("direction", [(1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)], ids=["coronal", "sagittal"])
def test_dicom_in_other_planes(tmp_path, direction):
    "Slices of a volume written in another plane come back as the same volume."
    volume = scan((6, 7, 8)) // 2 * 2
    d, h, w = SPACING
    series, flipped = [], volume[::-1]  # rows run down
    for k in range(volume.shape[1] if direction[0] else volume.shape[2]):
        values = flipped[:, k] if direction[0] else flipped[:, :, k]
        position = (0, k * h, 5 * d) if direction[0] else (k * w, 0, 5 * d)
        s = dicom_slice(values, position, (d, w if direction[0] else h), "1.2.3", direction)
        s.save_as(tmp_path / f"{97 - k}.dcm", enforce_file_format=True)
        series.append(tmp_path / f"{97 - k}.dcm")
    image, spacing = read_dicom(sorted(series))
    assert np.array_equal(image[0], volume) and spacing == SPACING


def test_single_radiograph_and_monochrome1(tmp_path):
    values = np.arange(12).reshape(3, 4) * 2
    s = dicom_slice(values, (0, 0, 0), (0.2, 0.3), "1.2", slope=1, intercept=0)
    s.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    s.PhotometricInterpretation, s.BitsStored = "MONOCHROME1", 8
    s.save_as(tmp_path / "b.dcm", enforce_file_format=True)
    (one, spacing), (two, _) = (read_dicom([tmp_path / f"{n}.dcm"]) for n in "ab")
    assert one.shape == (1, 3, 4) and spacing == (0.2, 0.3) and np.array_equal(one[0], values)
    assert np.array_equal(two, 255 - one)


def test_nifti_scaling_and_kinds(tmp_path):
    import nibabel as nib

    data = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    plain = nib.Nifti1Image(data, np.eye(4))
    nib.save(plain, tmp_path / "plain.nii")
    plain.header.set_slope_inter(0.5, -3)
    nib.save(plain, tmp_path / "scaled.nii")
    one, two = (read_nifti(tmp_path / f"{n}.nii")[0] for n in ("plain", "scaled"))
    assert one.dtype == np.int16 and two.dtype == np.float32
    assert np.allclose(two, np.asarray(nib.load(tmp_path / "scaled.nii").dataobj)[::-1, ::-1].transpose(2, 1, 0)[None])


def test_four_d(tmp_path):
    import nibabel as nib

    volumes = np.stack([scan(seed=k).transpose(2, 1, 0) for k in range(3)], -1)
    nib.save(nib.Nifti1Image(volumes, affine_of()), tmp_path / "x.nii")
    nib.save(nib.Nifti1Image(volumes[:, :, :, None], affine_of()), tmp_path / "vector.nii")
    for name in ("x", "vector"):
        channels, _ = read_nifti(tmp_path / f"{name}.nii", four_d="channels")
        assert np.array_equal(channels, np.stack([scan(seed=k) for k in range(3)]))
        assert np.array_equal(read_nifti(tmp_path / f"{name}.nii", four_d=-1)[0], channels[2:])
    nib.save(nib.Nifti1Image(volumes[..., :1], affine_of()), tmp_path / "one.nii")
    assert read_nifti(tmp_path / "one.nii")[0].shape == (1, *scan().shape)


# ---- spacing

def test_resampled_ramp_is_the_same_ramp_in_mm():
    "Values are a plane in mm about the centre; they still are on every other grid, away from the rim."
    old, shape, slopes = (3.0, 2.0, 1.0), (12, 15, 20), (1.0, -2.0, 0.5)

    def plane(shape, spacing):
        grids = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing)), indexing="ij")
        return sum(k * g for k, g in zip(slopes, grids)).astype(np.float32)[None]

    for new in ((1.0, 1.0, 1.0), (2.5, 3.3, 0.7), (3.0, 2.0, 1.0), (4.0, 4.0, 4.0)):
        result = resample(plane(shape, old), old, new)
        assert result.shape[1:] == tuple(round(n * a / b) for n, a, b in zip(shape, old, new))
        inner = (slice(None),) + tuple(slice(max(1, int(np.ceil(a / b))), -max(1, int(np.ceil(a / b)))) for a, b in zip(old, new))
        assert np.allclose(result[inner], plane(result.shape[1:], new)[inner], atol=1e-4)


def test_masks_keep_their_labels_and_their_volume():
    mask = np.zeros((1, 20, 20, 20), np.uint8)
    mask[0, 5:15, 5:15, 5:15] = 3
    fine = resample(mask, (2.0, 2.0, 2.0), 1.0, nearest=True)
    assert fine.dtype == np.uint8 and set(np.unique(fine)) == {0, 3} and (fine > 0).sum() == 8 * (mask > 0).sum()


def test_folder_at_a_spacing(tmp_path):
    write_decathlon(tmp_path / "d")
    images = read(tmp_path / "d", spacing=(3, 4, 3))
    assert images[0].spacing == (3.0, 4.0, 3.0) and images[0].image.shape == (1, 10, 6, 7) == (1, *images[0].mask.shape)
    assert set(torch.unique(images[1].mask).tolist()) <= {0, 1, 2} and images.images[0].dtype == np.float32
    assert read(tmp_path / "d").images[0].dtype == np.int16  # read as stored, kept apart in the cache
    with pytest.raises(ValueError, match="spacing"):
        read(tmp_path / "d", spacing=(1, 1))


# ---- pictures and arrays

def test_picture_modes(tmp_path):
    grey = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
    rgb = np.stack([grey, grey[::-1], 255 - grey], -1)
    deep = grey.astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    Image.fromarray(grey.astype(np.float32) / 7).save(tmp_path / "float.tiff")
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(rgb).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "grey_palette.png")
    Image.fromarray(grey > 100).save(tmp_path / "bits.png")
    alpha = np.full_like(grey, 255)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "opaque.png")
    Image.fromarray(np.dstack([grey, alpha * (grey > 50)]), "LA").save(tmp_path / "holes.png")
    read = {p.stem + p.suffix: read_picture(p)[0] for p in tmp_path.iterdir() if p.is_file()}
    assert np.array_equal(read["grey.png"][0], grey) and read["grey.png"].dtype == np.uint8
    assert np.array_equal(read["deep.png"][0], deep) and np.array_equal(read["deep.tif"][0], deep)
    assert np.allclose(read["float.tiff"][0], grey / 7, rtol=1e-6)
    assert np.array_equal(read["rgb.png"], rgb.transpose(2, 0, 1)) and np.array_equal(read["opaque.png"], read["rgb.png"])
    assert len(read["palette.png"]) == 3 and np.array_equal(read["grey_palette.png"][0], grey)
    assert set(np.unique(read["bits.png"])) == {0, 255}
    assert np.array_equal(read["holes.png"][0], np.where(grey > 50, grey, 0))


def test_jpeg_is_turned_as_the_camera_was(tmp_path):
    picture = Image.fromarray(np.repeat(np.arange(16, dtype=np.uint8) * 16, 32).reshape(16, 32))
    exif = Image.Exif()
    exif[274] = 6  # rotate by 90 degrees to see it upright
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg")[0].shape == (1, 32, 16)


def test_arrays(tmp_path):
    for name, shape, expected in (("a", (9, 8), (1, 9, 8)), ("b", (3, 9, 8), (3, 9, 8)), ("c", (9, 8, 3), (3, 9, 8)),
                                  ("d", (9, 8, 7), (1, 9, 8, 7)), ("e", (2, 9, 8, 7), (2, 9, 8, 7))):
        np.save(tmp_path / f"{name}.npy", np.arange(np.prod(shape)).reshape(shape).astype(">f8"))
        image, spacing = read_array(tmp_path / f"{name}.npy")
        assert image.shape == expected and image.dtype == np.float32 and spacing is None and image.max() == np.prod(shape) - 1


def test_grey_and_colour_made_one(tmp_path):
    grey = np.full((8, 8), 90, np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(np.stack([grey, 0 * grey, 0 * grey], -1)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="channels=1 or 3"):
        read(tmp_path)
    assert read(tmp_path, channels=3).channels == 3
    assert torch.allclose(read(tmp_path, channels=1)[1].image, torch.full((1, 8, 8), 0.299 * 90), rtol=1e-4)


# ---- layouts

def picture(path, value=0, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size), value, np.uint8)).save(path)


def test_class_folders(tmp_path):
    for label, n in (("well", 3), ("ill", 2)):
        for i in range(n):
            picture(tmp_path / label / f"{i}.png", i)
    (tmp_path / "readme.txt").write_text("not an image")
    picture(tmp_path / "well" / "._3.png")
    images = read(tmp_path)
    assert images.classes == ["ill", "well"] and images.labels.tolist() == [0, 0, 1, 1, 1]
    assert images.names[:2] == ["ill/0", "ill/1"] and images.spacing == [None] * 5
    assert read(tmp_path, layout="plain").labels is None
    patients = read(tmp_path, layout="patients")
    assert patients.groups == ["patient 1"] * 2 + ["patient 2"] * 3 and patients.labels is None


def test_masks_beside_by_folder_and_by_suffix(tmp_path):
    for i in range(2):
        for image, mask in ((tmp_path / "one/images", tmp_path / "one/masks"), (tmp_path / "two", tmp_path / "two")):
            picture(image / f"case{i}.png", 100)
            name = f"case{i}.png" if image != mask else f"case{i}_mask.png"
            mask.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.eye(8, dtype=np.uint8) * (255 if i else 1)).save(mask / name)
    for place in ("one", "two"):
        images = read(tmp_path / place)
        assert images.names == ["case0", "case1"] and images.labels is None
        assert all(torch.equal(images[i].mask, torch.eye(8).long()) for i in range(2))  # 0 and 255 mean 0 and 1


def test_class_folders_with_masks(tmp_path):
    for label in ("benign", "malignant"):
        for i in range(2):
            picture(tmp_path / label / f"{i}.png", 50)
            picture(tmp_path / label / f"{i}_seg.png", 1)
    images = read(tmp_path, regions=["background", "lump"])
    assert images.labels.tolist() == [0, 0, 1, 1] and images.regions == ["background", "lump"] and images[3].mask.sum() == 64


def test_palette_masks_keep_their_numbers(tmp_path):
    labels = (np.arange(64).reshape(8, 8) % 3).astype(np.uint8)
    mask = Image.fromarray(labels, "P")
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture(tmp_path / "a.png")
    mask.save(tmp_path / "a_label.png")
    assert np.array_equal(read(tmp_path)[0].mask, labels)


def test_decathlon_layout(tmp_path):
    images = read(write_decathlon(tmp_path / "Task99"))
    assert images.regions == ["background", "organ", "tumour"] and images.names == ["case_0", "case_1", "case_2"]
    assert torch.equal(images[1].mask, torch.from_numpy((scan(seed=1) > -500).astype(int) + (scan(seed=1) > -400)))
    (tmp_path / "Task99" / "dataset.json").unlink()
    assert read(tmp_path / "Task99").masks is not None  # imagesTr and labelsTr are known without it


def test_several_series_and_patients(tmp_path):
    volume = scan() // 2 * 2
    write_dicom(tmp_path / "a", volume, uid="1.1")
    write_dicom(tmp_path / "b", volume[:5], uid="1.2", seed=1)
    for k, file in enumerate(write_dicom(tmp_path / "c", volume[:7] + 2, uid="1.3", PatientID="MRN4712")):
        file.rename(tmp_path / "b" / f"other{k}.dcm")  # two series in one folder
    images = read(tmp_path)
    assert [tuple(i.shape) for i in images.images] == [(1, 10, 12, 14), (1, 5, 12, 14), (1, 7, 12, 14)]
    assert images.groups == ["patient 1", "patient 1", "patient 2"] and len(set(images.names)) == 3


# ---- the cache

def test_second_pass_reads_the_cache_and_an_edit_is_seen(tmp_path, cache, monkeypatch):
    write_nifti(tmp_path / "d" / "a.nii.gz", scan())
    first = read(tmp_path / "d")
    assert isinstance(first.images[0], np.memmap)
    monkeypatch.setattr(files, "read_nifti", lambda *a: pytest.fail("read again"))
    assert np.array_equal(read(tmp_path / "d").images[0], scan()[None])
    monkeypatch.undo()
    write_nifti(tmp_path / "d" / "a.nii.gz", scan(seed=1))
    assert np.array_equal(folder(tmp_path / "d", cache=cache, progress=False).images[0], scan(seed=1)[None])


def test_writing_to_an_image_does_not_touch_the_cache(tmp_path):
    write_nifti(tmp_path / "d" / "a.nii.gz", scan())
    images = read(tmp_path / "d")
    images.images[0][:] = 0
    assert np.array_equal(images.images[0], scan()[None])
    assert np.array_equal(pickle.loads(pickle.dumps(images.images))[0], scan()[None])


def test_a_killed_first_pass_leaves_nothing_half_read(tmp_path, cache, monkeypatch):
    write_nifti(tmp_path / "d" / "a.nii.gz", scan())
    monkeypatch.setattr(files.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path / "d")
    monkeypatch.undo()
    assert not list(cache.rglob("*.npy")) and not list(cache.rglob("*.json"))
    assert np.array_equal(folder(tmp_path / "d", cache=cache, progress=False).images[0], scan()[None])


def test_a_mistake_in_the_layout_is_not_hidden_by_the_cache(tmp_path):
    picture(tmp_path / "images" / "a.png")
    read(tmp_path / "images")
    (tmp_path / "masks").mkdir()
    picture(tmp_path / "masks" / "b.png")
    with pytest.raises(ValueError, match="a has no mask"):
        read(tmp_path)


def test_batches_come_from_the_disk(tmp_path):
    images = read(write_decathlon(tmp_path / "d"))
    batch = next(images.batches(2, size=(8, 8, 8), seed=0))
    assert batch.x.shape == (2, 1, 8, 8, 8) and batch.masks.shape == (2, 8, 8, 8)


# ---- privacy

PERSONAL = ["doe", "jane", "mrn4711", "19700102", "1970"]


@pytest.mark.parametrize("place", ["series", "DOE_JANE/CT", "study/doe jane MRN4711"])
def test_no_personal_word_gets_out(tmp_path, cache, place):
    volume = scan() // 2 * 2
    write_dicom(tmp_path / "d" / place / "one", volume, uid="1.1")
    broken = write_dicom(tmp_path / "d" / place / "two", volume, uid="1.2")
    broken[4].unlink()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        images = read(tmp_path / "d", on_bad="report")
    with pytest.raises(ValueError) as strict:
        read(tmp_path / "d")
    said = [repr(images), images.names, images.groups, images.bad, [str(w.message) for w in told], repr(images[0]), images.classes]
    text = json.dumps(said, default=str).lower() + str(strict.value).lower()
    kept = b"".join(p.name.encode() + p.read_bytes() for p in cache.rglob("*") if p.is_file()).lower()
    assert len(images) == 1 and "slice is missing" in text
    assert not [word for word in PERSONAL if word in text or word.encode() in kept]


def test_patients_folders_are_no_classes(tmp_path):
    for n, name in enumerate(("DOE_JANE", "ROE_RICHARD")):
        for k in range(2):
            write_dicom(tmp_path / name / f"CT{k}", scan() // 2 * 2, uid=f"1.{n}.{k}", PatientName=name.replace("_", "^"), PatientID=f"MRN{n}")
    images = read(tmp_path)
    assert images.labels is None and images.groups == ["patient 1"] * 2 + ["patient 2"] * 2
    one, two = images.split((0.5, 0.5))
    assert not set(one.groups) & set(two.groups)


def test_finding_reads_no_pixels(tmp_path):
    write_decathlon(tmp_path / "d", n=1)
    for file in (tmp_path / "d").rglob("*.gz"):
        file.write_bytes(b"not an image")
    found, regions = find(tmp_path / "d")
    assert len(found) == 1 and regions[2] == "tumour"


# ---- real images

def test_chest_xray():
    images = read(shared_data("chest_xray"))
    assert len(images) == 1124 and images.classes == ["covid19", "no_finding", "pneumonia"] and images.channels == 1
    assert images.labels.bincount().tolist() == [124, 500, 500]
    assert {tuple(image.shape) for image in images.images} == {(1, 160, 160)}
