"Small medical files for the tests: one analytic scan, saved in every way."
import json
from pathlib import Path

import numpy as np

SPACING = (3.0, 2.0, 1.5)  # mm: D, H, W


def scan(shape=(10, 12, 14), seed=0):
    "A volume (D, H, W), axes up, back and left, in whole HU, no two voxels of which are alike by symmetry."
    d, h, w = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    noise = np.random.default_rng(seed).integers(-20, 20, shape)
    return (-900 + 37 * d + 11 * h + 5 * w + noise).astype(np.int16)


def affine_of(spacing=SPACING):
    "The affine of an array (X, Y, Z) that runs to the left, the back and up."
    return np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])


def write_nifti(path, volume, spacing=SPACING, axes="LPS"):
    "A volume (D, H, W) as NIfTI whose stored axes run as `axes` says."
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.ascontiguousarray(volume.transpose(2, 1, 0)), affine_of(spacing))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
    nib.save(image.as_reoriented(turn), path)
    return path


def dicom_slice(values, position, spacing, uid, direction=(1, 0, 0, 0, 1, 0), slope=2, intercept=-1000, **fields):
    "One CT slice: values in HU, stored as (HU - intercept) / slope."
    import pydicom

    s = pydicom.Dataset()
    s.PatientName, s.PatientID, s.PatientBirthDate = "DOE^JANE", "MRN4711", "19700102"
    s.SOPClassUID, s.SOPInstanceUID, s.SeriesInstanceUID = "1.2.840.10008.5.1.4.1.1.2", f"{uid}.{abs(hash(tuple(position))) % 10**9}", uid
    s.ImagePositionPatient, s.ImageOrientationPatient = [float(p) for p in position], list(direction)
    s.PixelSpacing, s.RescaleSlope, s.RescaleIntercept = list(spacing), slope, intercept
    s.Rows, s.Columns, s.SamplesPerPixel, s.PhotometricInterpretation = *values.shape, 1, "MONOCHROME2"
    s.BitsAllocated, s.BitsStored, s.HighBit, s.PixelRepresentation = 16, 16, 15, 0
    s.PixelData = ((values.astype(float) - intercept) / slope).round().astype("<u2").tobytes()
    for key, value in fields.items():
        setattr(s, key, value)
    s.file_meta = pydicom.dataset.FileMetaDataset()
    s.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    return s


def write_dicom(folder, volume, spacing=SPACING, uid="1.2.3.4", seed=0, **fields):
    "A volume (D, H, W) in even HU as a DICOM series, the files' names in no order."
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(seed).permutation(len(volume))
    for d, values in enumerate(volume):
        s = dicom_slice(values, (0, 0, d * spacing[0]), spacing[1:], uid, **fields)
        s.save_as(folder / f"IM{names[d]:04}", enforce_file_format=True)
    return [folder / f"IM{n:04}" for n in names]  # in the order of the slices


def write_decathlon(root, n=3, labels=None):
    "A folder as the Decathlon has it."
    cases = []
    for i in range(n):
        volume = scan(seed=i)
        write_nifti(root / "imagesTr" / f"case_{i}.nii.gz", volume)
        write_nifti(root / "labelsTr" / f"case_{i}.nii.gz", (volume > -500).astype(np.uint8) + (volume > -400))
        cases.append({"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labelsTr/case_{i}.nii.gz"})
    labels = labels or {"0": "background", "1": "organ", "2": "tumour"}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "training": cases}))
    return root


def shared_data(name):
    "A folder of real images, beside the checkout or where MEDSSL_NB_DATA says; the test skips where there is none."
    import os

    import pytest

    places = [os.environ.get("MEDSSL_NB_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"]
    for place in filter(None, places):
        if (Path(place) / name).is_dir():
            return Path(place) / name
    pytest.skip(f"{name} is neither in ../shared/data beside the checkout nor where MEDSSL_NB_DATA says")
