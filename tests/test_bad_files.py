"Each bad file gives one clear error that names it and says what to do; the good ones can be kept."
import os
import pickle
import resource
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest
from example_files import affine_of, dicom_slice, scan, write_decathlon, write_dicom, write_nifti
from PIL import Image

from medssl_nb.data import files
from medssl_nb.data.files import folder, read_array, read_nifti, read_picture


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MEDSSL_NB_CACHE", str(tmp_path_factory.mktemp("cache")))


def good(root):
    return write_nifti(root / "good.nii.gz", scan())


def truncated(root):
    whole = good(root).read_bytes()
    (root / "bad.nii.gz").write_bytes(whole[: len(whole) // 2])


def truncated_plain(root):
    write_nifti(root / "bad.nii", scan())
    (root / "bad.nii").write_bytes((root / "bad.nii").read_bytes()[:-100])


def flipped_bytes(root):
    whole = bytearray(good(root).read_bytes())
    whole[len(whole) // 2: len(whole) // 2 + 60] = bytes(60)
    (root / "bad.nii.gz").write_bytes(whole)


def text(root):
    (root / "bad.nii").write_text("Dear colleague, thank you for sending me this patient. " * 20)


def all_nan(root):
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), np.nan, np.float32), affine_of()), root / "bad.nii.gz")


def partly_nan(root):
    data = np.ones((8, 8, 8), np.float32)
    data[2, 3, 4], data[5, 5, 5] = np.nan, np.inf
    nib.save(nib.Nifti1Image(data, affine_of()), root / "bad.nii.gz")


def four_d(root):
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8, 5), np.float32), affine_of()), root / "bad.nii.gz")


def flat_affine(root):
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.float32), affine_of()), root / "bad.nii")
    content = bytearray((root / "bad.nii").read_bytes())
    content[280:296] = bytes(16)  # srow_x
    (root / "bad.nii").write_bytes(content)


def huge(root):
    header = nib.Nifti1Header()
    header.set_data_shape((32767, 32767, 32767))
    (root / "bad.nii").write_bytes(header.binaryblock + bytes(100))


def large_and_short(root):
    import gzip

    header = nib.Nifti1Header()
    header.set_data_shape((1000, 1000, 900))
    (root / "bad.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(100)))


def colour_nifti(root):
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")]), affine_of()), root / "bad.nii")


def complex_numbers(root):
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.complex64), affine_of()), root / "bad.nii")


def no_voxels(root):
    np.save(root / "bad.npy", np.zeros((0, 4, 4)))


def zero_bytes(root):
    (root / "bad.png").write_bytes(b"")


def zero_bytes_nifti(root):
    (root / "bad.nii.gz").write_bytes(b"")


def half_a_png(root):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(root / "bad.png")
    (root / "bad.png").write_bytes((root / "bad.png").read_bytes()[:2000])


def half_a_jpeg(root):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(root / "bad.jpg")
    (root / "bad.jpg").write_bytes((root / "bad.jpg").read_bytes()[:1500])


def bomb(root):
    "A PNG of a few hundred bytes that claims 60000 x 60000 pixels."
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    (root / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b""))


def pages(root):
    page = Image.fromarray(np.zeros((8, 8), np.uint8))
    page.save(root / "bad.tif", save_all=True, append_images=[page, page])


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/medssl_nb_was_run",)


def pickled_objects(root):
    np.save(root / "bad.npy", np.array([Bomb()], dtype=object), allow_pickle=True)


def plain_pickle(root):
    (root / "bad.npy").write_bytes(pickle.dumps(Bomb()))


def truncated_array(root):
    np.save(root / "bad.npy", np.ones((40, 40)))
    (root / "bad.npy").write_bytes((root / "bad.npy").read_bytes()[:-500])


def five_axes(root):
    np.save(root / "bad.npy", np.ones((2, 3, 4, 5, 6)))


def missing_slice(root):
    write_dicom(root / "bad", scan() // 2 * 2)[4].unlink()


def slice_twice(root):
    write_dicom(root / "bad", scan() // 2 * 2)
    again = dicom_slice(scan()[3] // 2 * 2, (0, 0, 9.0), (2, 1.5), "1.2.3.4")
    again.save_as(root / "bad" / "again", enforce_file_format=True)


def mixed_directions(root):
    write_dicom(root / "bad", scan() // 2 * 2)
    scout = dicom_slice(scan()[3] // 2 * 2, (0, 0, 50.0), (2, 1.5), "1.2.3.4", (1, 0, 0, 0, 0, -1))
    scout.save_as(root / "bad" / "scout", enforce_file_format=True)


def no_position(root):
    for file in write_dicom(root / "bad", scan()[:3] // 2 * 2):
        import pydicom

        s = pydicom.dcmread(file)
        del s.ImagePositionPatient
        s.save_as(file)


def text_as_dicom(root):
    (root / "bad.dcm").write_text("not DICOM")


def short_pixels(root):
    file = write_dicom(root / "bad", scan() // 2 * 2)[5]
    file.write_bytes(file.read_bytes()[:-50])


def multi_frame(root):
    dicom_slice(scan()[0] // 2 * 2, (0, 0, 0), (2, 1.5), "1.9", NumberOfFrames=4).save_as(root / "bad.dcm", enforce_file_format=True)


def huge_dicom(root):
    dicom_slice(scan()[0] // 2 * 2, (0, 0, 0), (2, 1.5), "1.9", Rows=60000, Columns=60000).save_as(root / "bad.dcm", enforce_file_format=True)


CASES = {
    truncated: ("truncated or damaged", "copy it again"), truncated_plain: ("truncated or damaged", "copy it again"),
    flipped_bytes: ("truncated or damaged", "copy it again"), text: ("not a NIfTI file", "save it as NIfTI"),
    all_nan: ("nothing but NaN", "leave it out"), partly_nan: ("2 of 512 voxels", "repair it"),
    four_d: ("holds 5 volumes", "four_d='channels'"), flat_affine: ("affine", "save it with a valid affine"),
    huge: ("3.52e+13 voxels", "`largest`"), large_and_short: ("too short", "copy it again"),
    colour_nifti: ("not plain numbers", "float32"), complex_numbers: ("complex64", "float32"),
    no_voxels: ("", "leave it out"), zero_bytes: ("is empty (0 bytes)", "copy it again"),
    zero_bytes_nifti: ("is empty (0 bytes)", "copy it again"), half_a_png: ("not a whole picture", "copy it again"),
    half_a_jpeg: ("not a whole picture", "copy it again"), bomb: ("more pixels", "leave it out"),
    pages: ("several pages", "one picture a file"), pickled_objects: ("pickled", "save plain numbers"),
    plain_pickle: ("pickled", "save plain numbers"), truncated_array: ("not a whole .npy", "save it again"),
    five_axes: ("(2, 3, 4, 5, 6)", "save an image as"), missing_slice: ("6 mm between those at 9 and 15 mm", "add it"),
    slice_twice: ("same place (9 mm)", "keep one"), mixed_directions: ("differ in size", "move the odd ones away"),
    no_position: ("lacks ImagePositionPatient", "leave it out"), text_as_dicom: ("not a readable DICOM", "leave it out"),
    short_pixels: ("cannot be decoded", "copy it again"), multi_frame: ("multi-frame", "convert it"),
    huge_dicom: ("60000 x 60000", "leave it out"),
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_one_clear_error_and_the_good_one_is_kept(tmp_path, make):
    good(tmp_path)
    make(tmp_path)
    said, advice = CASES[make]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as strict:
        folder(tmp_path, progress=False)
    message = str(strict.value)
    assert "bad" in message and said in message and advice in message and "on_bad='report'" in message
    assert len(message.splitlines()) == 1 and len(message) < 500 + len(str(tmp_path))
    with pytest.warns(UserWarning, match="1 of 2 images left out"):
        images = folder(tmp_path, on_bad="report", progress=False)
    assert images.names == ["good"] and [name.split("/")[0].split(".")[0] for name, _ in images.bad] == ["bad"]
    assert said in images.bad[0][1]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, f"refusing it took {grown // 1000} MB"
    assert not os.path.exists("/tmp/medssl_nb_was_run")


def test_the_limit_is_the_readers_choice(tmp_path):
    path = good(tmp_path)
    with pytest.raises(ValueError, match="largest=1e"):
        read_nifti(path, largest=1000)
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1.6e"):
        read_picture(tmp_path / "a.png", largest=1000)
    np.save(tmp_path / "a.npy", np.zeros((40, 40)))
    with pytest.raises(ValueError, match="1.6e"):
        read_array(tmp_path / "a.npy", largest=1000)


# ---- folders

def test_no_folder_and_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        folder(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(ValueError, match="holds no images that can be read .*NIfTI"):
        folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        folder(tmp_path / "notes.txt")


def test_nothing_good_left(tmp_path):
    text(tmp_path)
    with pytest.raises(ValueError, match="none of the 1 images"):
        folder(tmp_path, on_bad="report", progress=False)


def test_unreadable_and_vanished_files(tmp_path, monkeypatch):
    good(tmp_path)
    write_nifti(tmp_path / "later.nii", scan())
    found = files.find(tmp_path)
    (tmp_path / "later.nii").unlink()
    monkeypatch.setattr(files, "find", lambda *a: found)
    with pytest.warns(UserWarning, match="later"):
        assert len(folder(tmp_path, on_bad="report", progress=False)) == 1


def test_a_cleared_cache_says_so(tmp_path):
    good(tmp_path)
    images = folder(tmp_path, progress=False)
    os.remove(images.images.files[0])
    with pytest.raises(FileNotFoundError, match="read the folder again"):
        images[0]


def test_an_empty_class_and_a_stray_image(tmp_path):
    for label in ("a", "b"):
        for i in range(2):
            write_nifti(tmp_path / label / f"{i}.nii", scan())
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="c is an empty folder among the classes"):
        folder(tmp_path, progress=False)
    write_nifti(tmp_path / "stray.nii", scan())
    with pytest.raises(ValueError, match="stray lies beside the folders"):
        folder(tmp_path, layout="classes", progress=False)


def test_parts_are_not_classes(tmp_path):
    for part in ("train", "test"):
        for i in range(2):
            write_nifti(tmp_path / part / f"{i}.nii", scan())
    with pytest.raises(ValueError, match="holds parts .*read each by itself"):
        folder(tmp_path, progress=False)


def test_wrong_options(tmp_path):
    good(tmp_path)
    for options in ({"on_bad": "ignore"}, {"layout": "tree"}, {"channels": 2}, {"spacing": 0}, {"spacing": (1, 2)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            folder(tmp_path, progress=False, **options)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "sub.png")
    os.remove(tmp_path / "good.nii.gz")
    with pytest.raises(ValueError, match="does not say its spacing"):
        folder(tmp_path, spacing=1, progress=False)


# ---- masks

MASKS = {
    "negative": (lambda m: m.astype(np.int16) - 1, "has the label -1"),
    "not whole": (lambda m: m * 0.5, "not whole numbers"),
    "NaN": (lambda m: np.where(m > 1, np.nan, m), "6 of 1680 voxels that are NaN"),
    "beyond the classes": (lambda m: m + 1, "has the label 3, but there are 3 regions"),
    "another shape": (lambda m: m[:-1], r"the mask has the shape \(10, 12, 13\), its image \(10, 12, 14\)"),
}


@pytest.mark.parametrize("name", MASKS)
def test_bad_masks(tmp_path, name):
    root = write_decathlon(tmp_path / "d")
    change, said = MASKS[name]
    path = root / "labelsTr" / "case_1.nii.gz"
    mask = nib.load(path)
    changed = change(np.asarray(mask.dataobj).astype(float if name in ("not whole", "NaN") else np.int16))
    nib.save(nib.Nifti1Image(changed.astype(np.float32 if changed.dtype.kind == "f" else np.int16), mask.affine), path)
    with pytest.raises(ValueError, match=f"case_1.*{said}"):
        folder(root, progress=False)
    with pytest.warns(UserWarning, match="1 of 3 images left out"):
        assert folder(root, on_bad="report", progress=False).names == ["case_0", "case_2"]


def test_more_images_than_masks_and_more_masks_than_images(tmp_path):
    root = write_decathlon(tmp_path / "d")
    (root / "dataset.json").unlink()
    (root / "labelsTr" / "case_1.nii.gz").unlink()
    (root / "imagesTr" / "case_2.nii.gz").unlink()
    with pytest.raises(ValueError, match="case_1 has no mask in labelsTr"):
        folder(root, progress=False)
    with pytest.warns(UserWarning, match="2 of 3"):
        images = folder(root, on_bad="report", progress=False)
    assert images.names == ["case_0"] and "mask without an image" in images.bad[1][1]


def test_dataset_json(tmp_path):
    root = write_decathlon(tmp_path / "d")
    listed = (root / "dataset.json").read_text()
    (root / "labelsTr" / "case_1.nii.gz").unlink()
    with pytest.raises(ValueError, match="case_1 is in dataset.json, but case_1.nii.gz is not there"):
        folder(root, progress=False)
    (root / "dataset.json").write_text(listed[:-3])
    with pytest.raises(ValueError, match="dataset.json is not valid JSON"):
        folder(root, progress=False)
    (root / "dataset.json").write_text(listed.replace("./imagesTr/case_0", "../../secret"))
    with pytest.raises(ValueError, match="outside its folder"):
        folder(root, progress=False)


def test_a_jpeg_is_no_mask(tmp_path):
    for name in ("a.png", "a_mask.jpg"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name)
    with pytest.raises(ValueError, match="a_mask.jpg is a mask saved as JPEG"):
        folder(tmp_path, progress=False)
