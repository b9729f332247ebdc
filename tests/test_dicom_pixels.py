"""Pixels of DICOM files are decoded and scaled as their headers declare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels import apply_voi_lut, pixel_array
from scan_files import CT, MR, dicom, dicom_bytes, percentiles

from modeling_m3ret.reading_m3ret import read_scan


RNG = np.random.default_rng(11)


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
