"""DICOM is read as its header declares: values, order and orientation, without anything that identifies the patient."""

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
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels import apply_voi_lut, pixel_array
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless
from scan_files import CINE, CT, MR, PLANTED, dicom, dicom_bytes, nifti_bytes, reorient, series

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


def percentiles(array: np.ndarray) -> np.ndarray:
    low, high = np.percentile(array, [0.5, 99.5])
    return ((array.astype(np.float64) - low) / (high - low)).clip(0, 1)


# ------------------------------------------------------------------------------------------------------------ intensity


def test_hounsfield_units_at_known_voxels() -> None:
    stored = np.array([[24, 1024, 1064], [2024, 3000, 0]], np.uint16)  # air, water, soft tissue, bone
    for declared in ({"sop": CT}, {"sop": CT, "RescaleType": "US"}, {"sop": MR, "RescaleType": "HU"}):
        scan = read_scan(dicom_bytes(dicom(stored, RescaleSlope=1, RescaleIntercept=-1024, **declared)))
        assert scan.array.dtype == np.float32
        np.testing.assert_allclose(scan.array[0, 0], [[0, 0.5, 0.52], [1, 1, 0]], atol=1e-6)
        assert scan.description["intensity"] == "hounsfield [-1000, 1000]"
    other = read_scan(dicom(stored, sop=CT, RescaleSlope=1, RescaleIntercept=-1024, RescaleType="Z_EFF"))
    assert other.description["intensity"] == "percentiles 0.5-99.5"


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_equals_that_of_pydicom(function: str | None) -> None:
    pixels = RNG.integers(0, 4096, (20, 30), dtype=np.uint16)
    more: dict[str, Any] = {"VOILUTFunction": function} if function else {}
    ds = dicom(pixels, BitsStored=12, HighBit=11, WindowCenter=[1200, 40], WindowWidth=[900, 80], **more)
    scan = read_scan(ds)
    truth = apply_voi_lut(pixels, ds) / 4095
    np.testing.assert_allclose(scan.array[0, 0], truth, atol=1e-5)
    assert scan.description["intensity"] == "window"


def test_voi_lut_equals_that_of_pydicom() -> None:
    pixels = RNG.integers(0, 256, (20, 30), dtype=np.uint16)
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [256, 0, 12], (np.arange(256, dtype=np.uint16) ** 2 // 16).tolist()
    ds = dicom(pixels, VOILUTSequence=[item])
    np.testing.assert_allclose(read_scan(ds).array[0, 0], apply_voi_lut(pixels, ds) / 4095, atol=1e-6)


def test_monochrome1_is_inverted() -> None:
    pixels = RNG.integers(0, 4096, (20, 30), dtype=np.uint16)
    window = {"WindowCenter": 2000, "WindowWidth": 1500, "BitsStored": 12, "HighBit": 11}
    for elements in (window, {}):
        as_is, inverted = (
            read_scan(dicom(pixels, PhotometricInterpretation=name, **elements))
            for name in ("MONOCHROME2", "MONOCHROME1")
        )
        np.testing.assert_allclose(inverted.array, 1 - as_is.array, atol=1e-6)
    plain = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
    scan = read_scan(dicom(plain, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(scan.array[0, 0], 255 - plain)


def test_eight_bit_image_equals_the_same_image_in_png() -> None:
    grey, rgb = (RNG.integers(0, 256, shape, dtype=np.uint8) for shape in ((20, 30), (20, 30, 3)))
    for pixels in (grey, rgb):
        np.testing.assert_array_equal(read_scan(dicom_bytes(dicom(pixels))).array, read_scan(pixels).array)
    same = np.repeat(grey[..., None], 3, axis=2)  # grey stored as RGB
    np.testing.assert_array_equal(read_scan(dicom(same)).array, read_scan(grey).array)


def test_padding_is_ignored_and_black() -> None:
    pixels = RNG.integers(100, 200, (40, 40)).astype(np.int16)
    inside = percentiles(pixels[:, 10:])
    pixels[:, :10] = -2000
    for name, expected in (("MONOCHROME2", inside), ("MONOCHROME1", 1 - inside)):
        scan = read_scan(dicom(pixels, PixelPaddingValue=-2000, PhotometricInterpretation=name))
        np.testing.assert_allclose(scan.array[0, 0, :, 10:], expected, atol=1e-6)
        assert not scan.array[0, 0, :, :10].any()


def test_palette_is_applied() -> None:
    indices = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
    table = RNG.integers(0, 256, (256, 3), dtype=np.uint16)
    for shift in (8, 0):  # as in the standard, and as some software writes it
        ds = dicom(indices, PhotometricInterpretation="PALETTE COLOR")
        for channel, name in enumerate(("Red", "Green", "Blue")):
            setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
            setattr(ds, f"{name}PaletteColorLookupTableData", (table[:, channel] << shift).astype("<u2").tobytes())
        np.testing.assert_array_equal(read_scan(ds).array[:, 0].transpose(1, 2, 0), table[indices])


def test_sixteen_bit_colour_is_scaled_by_its_depth() -> None:
    pixels = RNG.integers(0, 65536, (8, 9, 3), dtype=np.uint16)
    scan = read_scan(dicom(pixels))
    np.testing.assert_allclose(scan.array[:, 0].transpose(1, 2, 0), pixels / 65535, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- transfer syntaxes

REFERENCE = {  # test files of pydicom: compressed file, and the uncompressed original
    "MR_small_RLE.dcm": "MR_small.dcm",
    "MR_small_jp2klossless.dcm": "MR_small.dcm",
    "MR_small_jpeg_ls_lossless.dcm": "MR_small.dcm",
    "MR_small_bigendian.dcm": "MR_small.dcm",
    "MR_small_implicit.dcm": "MR_small.dcm",
    "SC_rgb_jpeg_gdcm.dcm": "SC_rgb_rle.dcm",  # JPEG lossless .70
}
LOSSY = ["SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_gdcm_KY.dcm", "SC_rgb_jls_lossy_line.dcm"]
LOSSY += ["SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_ybr_full_422_uncompressed.dcm", "JPEGLSNearLossless_16.dcm"]
LOSSY += ["JPEGLSNearLossless_08.dcm", "693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm", "image_dfl.dcm"]
LOSSY += ["examples_ybr_color.dcm", "examples_rgb_color.dcm", "GDCMJ2K_TextGBR.dcm"]


def packaged(name: str) -> Path:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str), f"{name} is not part of this pydicom"
    return Path(path)


@pytest.mark.parametrize("name", REFERENCE)
def test_lossless_syntaxes_equal_the_uncompressed_file(name: str) -> None:
    np.testing.assert_array_equal(read_scan(packaged(name)).array, read_scan(packaged(REFERENCE[name])).array)


@pytest.mark.parametrize("name", LOSSY)
def test_every_syntax_decodes_as_pydicom_decodes_it(name: str) -> None:
    ds = pydicom.dcmread(packaged(name))
    scan = read_scan(packaged(name))
    truth = pixel_array(ds).astype(np.float32)
    if scan.array.dtype == np.uint8:
        truth = truth.reshape(-1, *scan.array.shape[2:], scan.array.shape[0]).transpose(3, 0, 1, 2)
        assert np.abs(scan.array - truth).max() <= 3  # libjpeg-turbo and GDCM round differently
    elif str(scan.description["intensity"]).startswith("hounsfield"):
        truth = truth * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        np.testing.assert_allclose(scan.array[0, 0], (truth.clip(-1000, 1000) + 1000) / 2000, atol=1e-6)
    else:
        np.testing.assert_allclose(scan.array[0, 0], percentiles(truth), atol=1e-6)


def test_twelve_bit_jpeg_decodes() -> None:
    ds = pydicom.dcmread(packaged("JPGExtended.dcm"))
    assert (ds.file_meta.TransferSyntaxUID, ds.BitsStored) == ("1.2.840.10008.1.2.4.51", 12)
    twin = pixel_array(packaged("JPEG2000.dcm"))  # the same bone scan; both codecs are lossy, so compare 8 x 8 means
    got, expected = (
        image.reshape(128, 8, 32, 8).mean((1, 3)).ravel()
        for image in (read_scan(packaged("JPGExtended.dcm")).array[0, 0], percentiles(twin))
    )
    assert np.corrcoef(got, expected)[0, 1] > 0.95


def test_file_without_preamble_or_extension_is_read(tmp_path: Path) -> None:
    ds = dicom(VOLUME[:, :, 0])
    whole = dicom_bytes(ds)
    (tmp_path / "IM0001").write_bytes(whole[132:])
    for source in (whole, whole[132:], tmp_path / "IM0001", ds):
        np.testing.assert_array_equal(read_scan(source).array, read_scan(ds).array)


# --------------------------------------------------------------------------------------------------------------- series


def test_shuffled_series_is_sorted(tmp_path: Path) -> None:
    scan = read_scan(write(tmp_path, series(VOLUME, AFFINE)))
    np.testing.assert_allclose(scan.array[0], percentiles(VOLUME[::-1, ::-1].transpose(2, 1, 0)), atol=1e-6)
    assert scan.spacing == pytest.approx((1.2, 0.9, 0.8))
    assert {key: scan.description[key] for key in ("format", "slices", "missing_slices", "duplicate_positions")} == {
        "format": "dicom series",
        "slices": 10,
        "missing_slices": 0,
        "duplicate_positions": 0,
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
    a, b = read_scan(nifti_bytes(hu, AFFINE, zipped=True)), read_scan(write(tmp_path, slices))
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
    assert (scan.description["missing_slices"], scan.description["duplicate_positions"]) == (2, 1)
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


def test_devset_ct_series_has_air_and_tissue(devset: Path) -> None:
    scan: Scan = read_scan(devset / "dicom" / "ct_series_98")
    ds = pydicom.dcmread(devset / "dicom" / "ct_series_98" / "000.dcm")
    hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    expected = ((hu.clip(-1000, 1000) + 1000) / 2000).astype(np.float32)
    assert min(np.abs(scan.array[0, k] - expected).max() for k in range(98)) < 1e-6
    assert scan.spacing == pytest.approx((3, 1.074219, 1.074219))


def test_deflated_file_equals_the_plain_one() -> None:
    ds = dicom(VOLUME[:, :, 0])
    plain = dicom_bytes(ds)
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    np.testing.assert_array_equal(read_scan(dicom_bytes(ds)).array, read_scan(plain).array)
