"""DICOM series are read in the order and orientation of their headers, without anything that identifies the patient."""

from __future__ import annotations

import logging
import random
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless
from scan_files import CINE, CT, PLANTED, dicom, dicom_bytes, nifti_bytes, percentiles, reorient, series

from modeling_m3ret.reading_m3ret import M3RetReadError, Scan, read_scan


RNG = np.random.default_rng(11)
VOLUME = RNG.integers(0, 2500, (16, 12, 10)).astype(np.int16)
AFFINE = np.diag([0.8, 0.9, 1.2, 1.0])
AFFINE[:3, 3] = [-40, 25, -300]


def write(folder: Path, slices: list[Dataset], seed: int = 0) -> Path:
    """Write slices to a folder under shuffled names."""
    names = list(range(len(slices)))
    random.Random(seed).shuffle(names)
    for name, ds in zip(names, slices, strict=True):
        (folder / f"{name:03d}").write_bytes(dicom_bytes(ds))
    return folder


# --------------------------------------------------------------------------------------------------------------- series


def test_shuffled_series_is_sorted(tmp_path: Path) -> None:
    scan = read_scan(write(tmp_path, series(VOLUME, AFFINE)))
    np.testing.assert_allclose(scan.array[0], percentiles(VOLUME[::-1, ::-1].transpose(2, 1, 0)), atol=1e-6)
    assert scan.spacing == pytest.approx((1.2, 0.9, 0.8))
    assert {key: scan.description[key] for key in ("format", "slices", "missing_slices", "duplicates")} == {
        "format": "dicom series",
        "slices": 10,
        "missing_slices": 0,
        "duplicates": 0,
    }


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "ASL", "RSA", "SPR"])
def test_series_and_nifti_give_the_same_scan(codes: str, tmp_path: Path) -> None:
    volume, affine = reorient(VOLUME, AFFINE, codes)
    a, b = read_scan(nifti_bytes(volume, affine)), read_scan(write(tmp_path, series(volume, affine)))
    assert a.array.dtype == b.array.dtype == np.float32
    np.testing.assert_allclose(a.array, b.array, atol=1e-6)
    assert a.spacing == pytest.approx(b.spacing)
    assert a.description["plane"] == b.description["plane"] == "axial"
    np.testing.assert_allclose(a.array, read_scan(nifti_bytes(VOLUME, AFFINE)).array, atol=1e-6)


def test_thick_sagittal_series_and_nifti_give_the_same_scan(tmp_path: Path) -> None:
    volume, affine = reorient(VOLUME, np.diag([5.0, 0.9, 0.8, 1.0]), "PIR")  # slices along R, rows down, columns back
    a, b = read_scan(nifti_bytes(volume, affine)), read_scan(write(tmp_path, series(volume, affine)))
    np.testing.assert_allclose(a.array, b.array, atol=1e-6)
    assert b.array.shape == (1, 16, 10, 12)
    assert b.spacing == pytest.approx((5, 0.8, 0.9))
    assert b.description["plane"] == "sagittal"


def test_oblique_series_and_nifti_give_the_same_scan(tmp_path: Path) -> None:
    rotation = np.eye(4)
    rotation[:3, :3] = nib.quaternions.quat2mat([0.97, 0.15, 0.12, 0.1])
    volume, affine = reorient(VOLUME, rotation @ AFFINE, "LPS")
    a, b = read_scan(nifti_bytes(volume, affine)), read_scan(write(tmp_path, series(volume, affine)))
    np.testing.assert_allclose(a.array, b.array, atol=1e-6)
    assert a.spacing == pytest.approx(b.spacing, rel=1e-4)
    assert b.description["gantry_tilt_degrees"] == 0


def test_hounsfield_series_and_nifti_give_the_same_scan(tmp_path: Path) -> None:
    hu = RNG.integers(-1000, 2000, (16, 12, 10)).astype(np.int16)
    slices = series((hu + 1024).astype(np.uint16), AFFINE, sop=CT, RescaleSlope=1, RescaleIntercept=-1024)
    nifti = nifti_bytes(hu, AFFINE, zipped=True)
    a, b = read_scan(nifti, intensity="hounsfield"), read_scan(write(tmp_path, slices))
    np.testing.assert_array_equal(a.array, b.array)


def test_windows_that_differ_between_slices_do_not_change_a_volume(tmp_path: Path) -> None:
    slices = series(VOLUME, AFFINE)
    for index, ds in enumerate(slices):
        ds.WindowCenter, ds.WindowWidth = 300 + 40 * index, 100
    np.testing.assert_allclose(read_scan(slices).array, read_scan(nifti_bytes(VOLUME, AFFINE)).array, atol=1e-6)


def test_rescale_that_differs_between_slices_is_applied_per_slice() -> None:
    slices = series(VOLUME, AFFINE)
    for index, ds in enumerate(slices):
        ds.RescaleSlope, ds.RescaleIntercept = 1 + index, 5
    truth = VOLUME[::-1, ::-1].transpose(2, 1, 0) * np.arange(1, 11)[:, None, None] + 5
    np.testing.assert_allclose(read_scan(slices).array[0], percentiles(truth), atol=1e-5)


def test_tilted_gantry_is_reported(tmp_path: Path) -> None:
    slices = series(VOLUME, AFFINE)
    for index, ds in enumerate(slices):
        x, y, z = ds.ImagePositionPatient
        ds.ImagePositionPatient = [x, y + 1.2 * index * np.tan(np.deg2rad(15)), z]
    scan = read_scan(slices)
    assert scan.description["gantry_tilt_degrees"] == pytest.approx(15, abs=0.1)
    assert scan.spacing[0] == pytest.approx(1.2 / np.cos(np.deg2rad(15)), rel=1e-4)
    np.testing.assert_allclose(scan.array, read_scan(series(VOLUME, AFFINE)).array, atol=1e-6)


def test_gaps_and_duplicates_are_counted() -> None:
    slices = series(VOLUME, AFFINE)
    scan = read_scan(slices[:4] + slices[6:] + slices[:1])
    assert scan.array.shape[1] == 8
    assert (scan.description["missing_slices"], scan.description["duplicates"]) == (2, 1)
    assert scan.spacing[0] == pytest.approx(1.2)


def test_localiser_keeps_its_largest_set_of_parallel_slices() -> None:
    axial, (reoriented, affine) = series(VOLUME, AFFINE), reorient(VOLUME, AFFINE, "PIR")
    scan = read_scan(series(reoriented, affine)[:4] + axial + [dicom(VOLUME[:5, :, 0])])
    assert scan.description["slices_left_out"] == 5
    np.testing.assert_allclose(scan.array, read_scan(axial).array)


def test_slices_without_positions_follow_instance_numbers() -> None:
    slices = [dicom(VOLUME[:, :, k], InstanceNumber=k) for k in range(10)]
    scan = read_scan([slices[k] for k in (3, 0, 9, 1, 2, 8, 7, 6, 5, 4)])
    np.testing.assert_allclose(scan.array[0], percentiles(VOLUME.transpose(2, 0, 1)), atol=1e-6)
    assert scan.spacing == (None, None, None)
    assert "InstanceNumber" in str(scan.description["order"])


def test_two_series_in_one_folder_are_refused(tmp_path: Path) -> None:
    slices = series(VOLUME, AFFINE)
    slices[3].SeriesInstanceUID = "1.2.99"
    with pytest.raises(M3RetReadError) as caught:
        read_scan(write(tmp_path, slices))
    assert (caught.value.file, caught.value.reason, caught.value.got) == (tmp_path.name, "unsupported", "2 series")
    assert read_scan(tmp_path, series=np.int64(1)).array.shape[1] == 1  # type: ignore[arg-type]  # as of an array


def test_files_that_are_not_dicom_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, series(VOLUME, AFFINE))
    (tmp_path / "notes.txt").write_text("text")
    report = dicom(VOLUME[:, :, 0], series="1.2.77", PixelData=None)
    (tmp_path / "DICOMDIR").write_bytes(dicom_bytes(report))
    scan = read_scan(tmp_path)
    assert (scan.description["files_ignored"], scan.array.shape[1]) == (2, 10)


def test_single_slice_stays_as_stored() -> None:
    (reoriented, affine) = reorient(VOLUME, AFFINE, "ASL")
    ds = series(reoriented, affine)[2]
    scan = read_scan([ds])
    np.testing.assert_allclose(scan.array[0, 0], percentiles(ds.pixel_array), atol=1e-6)
    assert scan.spacing == pytest.approx((None, *ds.PixelSpacing))
    projected = read_scan(dicom(VOLUME[:, :, 0], ImagerPixelSpacing=[0.2, 0.1]))
    assert projected.spacing == (None, 0.2, 0.1)


# ---------------------------------------------------------------------------------------------------------- multi-frame


def enhanced(volume: np.ndarray, order: list[int], **elements: Any) -> Dataset:
    """Return frames in the given order, each with a functional group as in enhanced MR and CT."""
    ds = dicom(np.stack([volume[:, :, k].T for k in order]), **elements)
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing = [0.9, 0.8]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    ds.SharedFunctionalGroupsSequence, groups = [shared], []
    for k in order:
        group, position, values = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [-100, -80, 1.2 * k]
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 2, 10, "US"
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [position], [values]
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = groups
    return ds


def test_enhanced_frames_become_a_sorted_volume() -> None:
    ds = enhanced(VOLUME, [4, 0, 9, 1, 2, 8, 7, 6, 5, 3])
    scan = read_scan(dicom_bytes(ds), num_frames=3)
    np.testing.assert_allclose(scan.array[0], percentiles(VOLUME.transpose(2, 1, 0)), atol=1e-6)
    assert scan.spacing == pytest.approx((1.2, 0.9, 0.8))


def test_cine_frames_are_evenly_spaced() -> None:
    frames = RNG.integers(0, 256, (20, 16, 12, 3), dtype=np.uint8)
    ds = dicom(frames, sop=CINE)
    compressed = dicom(frames, sop=CINE)
    compressed.compress(RLELossless)
    for source in (dicom_bytes(ds), dicom_bytes(compressed)):
        whole, few = read_scan(source), read_scan(source, num_frames=4)
        np.testing.assert_array_equal(whole.array, frames.transpose(3, 0, 1, 2))
        np.testing.assert_array_equal(few.array, whole.array[:, [2, 7, 12, 17]])
        assert (few.description["frames_total"], few.description["frames_dropped"]) == (20, 16)
        assert whole.spacing == (None, None, None)


# -------------------------------------------------------------------------------------------------------------- privacy


def test_identifiers_are_never_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    slices = series(VOLUME, AFFINE, BurnedInAnnotation="YES", RescaleType=PLANTED, ImageComments=PLANTED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns while the file is written
        slices[0].PatientAge = PLANTED  # an invalid age, which pydicom quotes in a warning
        slices[0].PatientWeight = "1"
        folder = write(tmp_path, slices)
    broken = dicom_bytes(slices[0])
    capfd.readouterr()
    caplog.clear()
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        scan = read_scan(folder)
        with pytest.raises(M3RetReadError) as caught:
            read_scan(broken[:-100])
    out = capfd.readouterr()
    text = " ".join(
        [repr(scan.description), str(caught.value), out.out, out.err, caplog.text, *(str(w.message) for w in seen)]
    )
    assert PLANTED not in text
    assert "1.2.3" not in repr(scan.description)
    assert scan.description["burned_in_annotation"] == "yes"


def test_reading_restores_warning_filters_and_loggers() -> None:
    before = (list(warnings.filters), logging.getLogger("pydicom").disabled)
    read_scan(dicom(VOLUME[:, :, 0]))
    assert (list(warnings.filters), logging.getLogger("pydicom").disabled) == before


# --------------------------------------------------------------------------------------------------------------- devset


def test_devset_series_agree_with_pydicom(devset: Path) -> None:
    folder = devset / "dicom" / "mr_48-fov-loc_9"
    scan = read_scan(folder)
    files = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda ds: ds.ImagePositionPatient[0])
    truth = np.stack([ds.pixel_array for ds in files])  # right to left: x increases to the left in DICOM
    assert files[0].PixelPaddingValue == 0
    low, high = np.percentile(truth[truth > 0], [0.5, 99.5])
    np.testing.assert_allclose(scan.array[0], ((truth - low) / (high - low)).clip(0, 1), atol=5e-3)  # from a sample
    assert scan.description["plane"] == "sagittal"
    assert scan.spacing == pytest.approx((6, 0.9375, 0.9375))


def test_devset_localiser_keeps_one_plane(devset: Path) -> None:
    scan = read_scan(devset / "dicom" / "mr_3-plane-loc_15")
    assert (scan.description["slices"], scan.description["slices_left_out"], scan.description["plane"]) == (
        5,
        10,
        "axial",
    )


@pytest.mark.slow
def test_devset_ct_series_has_air_and_tissue(devset: Path) -> None:
    scan: Scan = read_scan(devset / "dicom" / "ct_series_98")
    ds = pydicom.dcmread(devset / "dicom" / "ct_series_98" / "000.dcm")
    hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    expected = ((hu.clip(-1000, 1000) + 1000) / 2000).astype(np.float32)
    assert min(np.abs(scan.array[0, k] - expected).max() for k in range(98)) < 1e-6
    assert scan.spacing == pytest.approx((3, 1.074219, 1.074219))


def test_file_without_preamble_or_extension_is_read(tmp_path: Path) -> None:
    ds = dicom(VOLUME[:, :, 0])
    whole = dicom_bytes(ds)
    (tmp_path / "IM0001").write_bytes(whole[132:])
    for source in (whole, whole[132:], tmp_path / "IM0001", ds):
        np.testing.assert_array_equal(read_scan(source).array, read_scan(ds).array)


def test_deflated_file_equals_the_plain_one() -> None:
    ds = dicom(VOLUME[:, :, 0])
    plain = dicom_bytes(ds)
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    np.testing.assert_array_equal(read_scan(dicom_bytes(ds)).array, read_scan(plain).array)
