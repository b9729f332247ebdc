"""Pixels of DICOM files are decoded and scaled as their headers declare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels import apply_voi_lut, convert_color_space, pixel_array
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless
from scan_files import CINE, CT, MR, dicom, dicom_bytes, percentiles

from modeling_m3ret.image_processing_m3ret import M3RetImageProcessor
from modeling_m3ret.reading_m3ret import M3RetReadError, Scan, read_scan


RNG = np.random.default_rng(11)


def written(pixels: np.ndarray, *raw: tuple[str, str, Any], syntax: str | None = None, **elements: Any) -> Scan:
    """Write a DICOM file and read it. `raw` elements (keyword, VR, value) are written with the given VR."""
    ds = dicom(pixels, **elements)
    for keyword, vr, value in raw:
        ds.add_new(keyword, vr, value)
    if syntax == ExplicitVRBigEndian and pixels.itemsize > 1:
        ds.add_new("PixelData", "OW", pixels.astype(pixels.dtype.newbyteorder(">")).tobytes())
    ds.file_meta.TransferSyntaxUID = syntax or ds.file_meta.TransferSyntaxUID
    return read_scan(dicom_bytes(ds))


def values_of(scan: Scan) -> np.ndarray:
    return scan.array[0] / (255 if scan.array.dtype == np.uint8 else 1)


def refusal(ds: Dataset) -> str | None:
    with pytest.raises(M3RetReadError) as caught:
        read_scan(ds)
    return caught.value.reason


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
LOSSY += [
    "SC_rgb_jpeg.dcm",
    "SC_rgb_jpeg_app14_dcmd.dcm",
    "SC_jpeg_no_color_transform.dcm",
    "SC_rgb_small_odd_jpeg.dcm",
]
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


# ---------------------------------------------------------------------------------------- bits of a word (PS3.5, 8.1.1)


@pytest.mark.parametrize(
    ("allocated", "stored", "high", "syntax"),
    [
        (*bits, syntax)
        for bits in ((16, 12, 15), (16, 12, 13), (16, 16, 15), (16, 5, 4), (32, 20, 27), (8, 6, 7))
        for syntax in (None, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless)
        if (bits[0], syntax) != (32, RLELossless)  # which pydicom does not encode
    ],
)
@pytest.mark.parametrize("signed", [False, True])
def test_pixels_are_the_stored_bits(allocated: int, stored: int, high: int, signed: bool, syntax: str | None) -> None:
    low = -(2 ** (stored - 1)) if signed else 0
    values = RNG.integers(low, low + 2**stored, (9, 14))
    shift = high + 1 - stored
    mask = (2**stored - 1) << shift
    garbage = RNG.integers(0, 2**allocated, values.shape)  # such as overlays, which older files keep in unused bits
    words = (((values << shift) & mask) | (garbage & ~mask)).astype(f"u{allocated // 8}")
    elements = {"BitsStored": stored, "HighBit": high, "PixelRepresentation": int(signed)}
    if syntax == RLELossless:
        ds = dicom(words)
        ds.compress(RLELossless)
        ds.update(dicom(words, **elements)[(0x0028, 0x0100) : (0x0028, 0x0104)])
        scan = read_scan(dicom_bytes(ds))
    else:
        scan = written(words, syntax=syntax, **elements)
    np.testing.assert_allclose(values_of(scan)[0], percentiles(values), atol=1e-6)


def test_words_of_one_bit_and_of_64_bits_are_read() -> None:
    bits = RNG.integers(0, 2, (9, 13), dtype=np.uint8)
    ds = dicom(bits, BitsAllocated=1, BitsStored=1, HighBit=0)
    ds.PixelData = np.packbits(bits, bitorder="little").tobytes() + b"\0"  # PS3.5, 8.1.1: pixels from the lowest bit
    np.testing.assert_array_equal(values_of(read_scan(ds))[0], bits)
    long = RNG.integers(0, 2**40, (9, 14), dtype=np.uint64)
    np.testing.assert_allclose(values_of(read_scan(dicom(long)))[0], percentiles(long), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_pixels_are_read_and_their_padding_is_ignored(dtype: type) -> None:
    pixels = RNG.normal(100, 5, (12, 14)).astype(dtype)
    inside = percentiles(pixels[4:])
    prefix = "Float" if dtype == np.float32 else "DoubleFloat"
    vr = {"Float": "FL", "DoubleFloat": "FD"}[prefix]
    for fill in (np.nan, -1e6):
        pixels[:4] = fill
        ds = dicom(pixels, PixelData=None, BitsStored=None, HighBit=None, PixelRepresentation=None)
        setattr(ds, f"{prefix}PixelData", pixels.tobytes())
        ds.add_new(f"{prefix}PixelPaddingValue", vr, -1e6)
        scan = read_scan(dicom_bytes(ds))
        np.testing.assert_allclose(values_of(scan)[0, 4:], inside, atol=1e-5)
        assert not values_of(scan)[0, :4].any()


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"BitsAllocated": 12}, "unsupported"),
        ({"BitsAllocated": 24}, "unsupported"),
        ({"BitsStored": 17, "HighBit": 16}, "damaged"),
        ({"BitsStored": 0}, "damaged"),
        ({"BitsStored": 12, "HighBit": 7}, "damaged"),
        ({"PixelRepresentation": None}, "damaged"),
        ({"PhotometricInterpretation": None}, "damaged"),
        ({"PhotometricInterpretation": "RGB"}, "unsupported"),
        ({"SamplesPerPixel": 4, "PhotometricInterpretation": "CMYK"}, "unsupported"),
        ({"Rows": 11}, "damaged"),  # pixel data are too short
        ({"Rows": 5}, "damaged"),  # pixel data hold two frames
        ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, "damaged"),
        ({"RescaleSlope": 0, "RescaleIntercept": 3}, "unsupported"),
        ({"RescaleSlope": "NaN", "RescaleIntercept": 0}, "damaged"),
    ],
)
def test_invalid_pixel_descriptions_are_refused(elements: dict[str, Any], reason: str) -> None:
    assert refusal(dicom(RNG.integers(0, 4096, (10, 14), dtype=np.uint16), **elements)) == reason


def test_odd_length_and_trailing_bytes_do_not_change_pixels() -> None:
    pixels = RNG.integers(0, 256, (9, 13), dtype=np.uint8)
    for tail in (b"", b"\0", b"\0" * 30):
        ds = dicom(pixels)
        ds.PixelData = pixels.tobytes() + tail
        np.testing.assert_array_equal(read_scan(ds).array[0, 0], pixels)


# -------------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian])
@pytest.mark.parametrize(
    ("dtype", "stored", "fill", "raw"),
    [
        (np.int16, 16, -2000, [("PixelPaddingValue", "US", 63536)]),
        (np.int16, 12, -2000, [("PixelPaddingValue", "US", 2096)]),  # its 12 bits
        (np.int16, 12, -2000, [("PixelPaddingValue", "US", 63536)]),  # its sign extension
        (np.uint16, 16, 65535, [("PixelPaddingValue", "SS", -1)]),
        (np.uint16, 12, 4095, [("PixelPaddingValue", "SS", -1)]),
        (np.uint8, 8, 255, [("PixelPaddingValue", "US", 65535)]),
        (np.uint16, 16, 63536, [("PixelPaddingValue", "SS", -2000), ("PixelPaddingRangeLimit", "SS", -1100)]),
        (np.int16, 16, -1500, [("PixelPaddingValue", "US", 64436), ("PixelPaddingRangeLimit", "US", 63536)]),
        (np.int32, 32, -2000, [("PixelPaddingValue", "US", 63536)]),
    ],
)
def test_padding_value_of_any_vr_is_found(
    dtype: type, stored: int, fill: int, raw: list[tuple[str, str, int]], syntax: str | None
) -> None:
    pixels = RNG.integers(0, 120, (20, 24)).astype(dtype)
    pixels[:5] = fill
    elements = {"BitsStored": stored, "HighBit": stored - 1, "RescaleSlope": 2, "RescaleIntercept": 1}
    scan = written(pixels, *raw, syntax=syntax, **elements)
    np.testing.assert_allclose(values_of(scan)[0, 5:], percentiles(pixels[5:]), atol=1e-6)
    assert not values_of(scan)[0, :5].any()


def test_padding_outside_the_stored_bits_hides_no_tissue() -> None:
    pixels = RNG.integers(0, 4096, (20, 24), dtype=np.uint16)
    pixels[3, 4] = 2096  # the lower 12 bits of -2000
    elements = {"BitsStored": 12, "HighBit": 11}
    scan = written(pixels, ("PixelPaddingValue", "US", 63536), **elements)
    np.testing.assert_allclose(values_of(scan)[0], percentiles(pixels), atol=1e-6)
    words = pixels.copy()
    words[:5] = 63536  # whole words hold it
    scan = written(words, ("PixelPaddingValue", "SS", -2000), **elements)
    np.testing.assert_allclose(values_of(scan)[0, 5:], percentiles(pixels[5:]), atol=1e-6)
    assert not values_of(scan)[0, :5].any()


def test_colour_has_no_padding() -> None:  # PS3.3, C.7.5.1.1.2: of monochrome images only
    pixels = RNG.integers(0, 4, (8, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(written(pixels, ("PixelPaddingValue", "US", 0)).array, read_scan(pixels).array)


def test_air_of_a_ct_is_black_without_a_declared_padding() -> None:
    hu = RNG.integers(-100, 100, (20, 24)).astype(np.int16)
    hu[:5] = -2000
    scan = written(hu, sop=CT, RescaleSlope=1, RescaleIntercept=0)
    np.testing.assert_allclose(values_of(scan)[0], (hu.clip(-1000, 1000) + 1000) / 2000, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- LUTs and windows


def lut(table: np.ndarray, bits: int, first: int = 0, data: Any = None, vr: str = "US", count: int = -1) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(table) if count < 0 else count, first, bits])
    item.add_new("LUTData", vr, [int(entry) for entry in table] if data is None else data)
    return item


RAMP = (np.arange(1024) ** 2 // 256).astype(int)  # 12 bits


@pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize(
    ("item", "first", "table"),
    [
        (lut(RAMP, 12), 0, RAMP),
        (lut(RAMP, 16), 0, RAMP),
        (lut(RAMP, 10), 0, RAMP),
        (lut(RAMP, 12, first=200), 200, RAMP),
        (lut(RAMP, 12, data=RAMP.astype("<u2").tobytes(), vr="OW"), 0, RAMP),
        (lut(RAMP >> 4, 8, data=(RAMP >> 4).astype("u1").tobytes(), vr="OW"), 0, RAMP >> 4),
        (lut(RAMP >> 4, 8, data=(RAMP >> 4).astype("u1").view("<u2").tolist()), 0, RAMP >> 4),
        (lut(RAMP[:255] + 9, 8, data=(RAMP[:255] % 256).astype("u1").tobytes() + b"\0", vr="OW"), 0, RAMP[:255] % 256),
        (lut(RAMP, 12, count=900), 0, RAMP[:900]),  # longer than declared
        (lut(RAMP, 12, count=1100), 0, RAMP),  # shorter than declared
        (lut(RAMP, 12, count=0, data=RAMP.astype("<u2").tobytes() + bytes(2 * (65536 - 1024)), vr="OW"), 0, RAMP),
    ],
)
def test_lut_of_any_depth_and_length(keyword: str, item: Dataset, first: int, table: np.ndarray) -> None:
    # PS3.3, C.11.1.1 and C.11.2.1.1: values outside the table have its first or last entry
    pixels = RNG.integers(0, len(table) if item.LUTDescriptor[0] == 0 else 1300, (20, 24), dtype=np.uint16)
    looked_up = table[np.clip(pixels.astype(int) - first, 0, len(table) - 1)]
    scan = written(pixels, BitsStored=12, HighBit=11, **{keyword: [item]})
    depth = int(table.max()).bit_length()
    expected = percentiles(looked_up) if keyword == "ModalityLUTSequence" else looked_up / (2.0**depth - 1)
    np.testing.assert_allclose(values_of(scan)[0], expected, atol=1e-6)
    assert ("voi_lut_bits" in scan.description) == (keyword == "VOILUTSequence" and depth != item.LUTDescriptor[2])


@pytest.mark.parametrize("declared", [-1024, 64512])
def test_first_value_of_a_lut_has_the_sign_of_its_input(declared: int) -> None:
    pixels = RNG.integers(-1024, 0, (20, 24)).astype(np.int16)
    expected = RAMP[pixels + 1024]
    for extra in ({}, {"PixelRepresentation": 0, "RescaleSlope": 1, "RescaleIntercept": -1024}):
        stored = (pixels + 1024 if extra else pixels).astype(np.uint16 if extra else np.int16)
        scan = written(stored, VOILUTSequence=[lut(RAMP, 12, declared)], **extra)
        np.testing.assert_allclose(values_of(scan)[0], expected / 4095, atol=1e-6)
    scan = written(pixels, ModalityLUTSequence=[lut(RAMP, 12, declared)])
    np.testing.assert_allclose(values_of(scan)[0], percentiles(expected), atol=1e-6)


def test_window_is_applied_to_rescaled_values() -> None:
    pixels = RNG.integers(0, 4096, (20, 24), dtype=np.uint16)
    for slope, centre in ((2, 500), (-0.5, -900)):
        scan = written(pixels, RescaleSlope=slope, RescaleIntercept=-100, WindowCenter=centre, WindowWidth=801)
        expected = ((pixels.astype(float) * slope - 100 - (centre - 0.5)) / 800 + 0.5).clip(0, 1)  # PS3.3, C.11.2.1.2.1
        np.testing.assert_allclose(values_of(scan)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "is_used"),
    [
        ({"WindowCenter": 500, "WindowWidth": 1}, True),  # a threshold
        ({"WindowCenter": [500, 40], "WindowWidth": [800, 80]}, True),
        ({"WindowCenter": 0.5, "WindowWidth": 0}, False),
        ({"WindowCenter": 500, "WindowWidth": -800}, False),
        ({"WindowCenter": 500, "WindowWidth": 0.5}, False),
        ({"WindowCenter": 500, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"}, True),
        ({"WindowCenter": 500, "WindowWidth": 800, "VOILUTFunction": "LOGARITHMIC"}, False),
        ({"WindowCenter": 60000, "WindowWidth": 100}, False),  # all pixels are black
        ({"WindowCenter": -5000, "WindowWidth": 100}, False),  # all pixels are white
        ({"WindowCenter": 60000, "WindowWidth": 100, "VOILUTFunction": "SIGMOID"}, False),
        ({"WindowCenter": 0, "WindowWidth": 10_000_000}, False),  # all pixels are grey
    ],
)
def test_window_that_shows_nothing_is_replaced_by_percentiles(window: dict[str, Any], is_used: bool) -> None:
    pixels = RNG.integers(0, 1000, (20, 24), dtype=np.uint16)
    scan = written(pixels, BitsStored=12, HighBit=11, **window)
    if is_used:
        ds = dicom(pixels, BitsStored=12, HighBit=11, **window)
        np.testing.assert_allclose(values_of(scan)[0], apply_voi_lut(pixels, ds) / 4095, atol=1e-5)
    else:
        np.testing.assert_allclose(values_of(scan)[0], percentiles(pixels), atol=1e-6)
    assert scan.description["intensity"] == ("window" if is_used else "percentiles 0.5-99.5")
    assert ("window" in scan.description) == (not is_used and abs(window["WindowCenter"]) in (0, 5000, 60000))
    assert scan.description.get("windows", 1) == (2 if isinstance(window["WindowCenter"], list) else 1)


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [("MONOCHROME2", "INVERSE", True), ("MONOCHROME1", "INVERSE", True), ("MONOCHROME2", "IDENTITY", False)],
)
def test_presentation_lut_shape_inverts_once(photometric: str, shape: str, inverted: bool) -> None:
    pixels = RNG.integers(0, 256, (20, 24), dtype=np.uint8)
    scan = read_scan(dicom(pixels, PhotometricInterpretation=photometric, PresentationLUTShape=shape))
    np.testing.assert_array_equal(scan.array[0, 0], 255 - pixels if inverted else pixels)


def test_each_frame_has_its_own_transformations() -> None:
    frames = RNG.integers(0, 1024, (3, 8, 9), dtype=np.uint16)
    groups = []
    for index in range(3):
        group, values, window = Dataset(), Dataset(), Dataset()
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = index + 1, 5, "US"
        window.WindowCenter, window.WindowWidth = 300 + index, 401
        group.PixelValueTransformationSequence, group.FrameVOILUTSequence = [values], [window]
        groups.append(group)
    scan = read_scan(dicom(frames, sop=CINE, PerFrameFunctionalGroupsSequence=groups))
    step = np.arange(3)[:, None, None]
    expected = ((frames * (step + 1) + 5 - (299.5 + step)) / 400 + 0.5).clip(0, 1)
    np.testing.assert_allclose(scan.array[0], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["HU", "hu ", "HU_MOD", "HOUNSFIELD UNITS"])
def test_names_of_hounsfield_units(name: str) -> None:
    scan = read_scan(dicom(np.array([[0, 1000]], np.int16), RescaleSlope=1, RescaleIntercept=-1000, RescaleType=name))
    assert scan.array.ravel().tolist() == [0, 0.5]


# --------------------------------------------------------------------------------------------------------------- colour


@pytest.mark.parametrize("bits", [5, 8, 12, 16])
@pytest.mark.parametrize("planar", [0, 1])
def test_colour_is_scaled_by_its_bits(bits: int, planar: int) -> None:
    pixels = RNG.integers(0, 2**bits, (8, 9, 3)).astype(np.uint8 if bits <= 8 else np.uint16)
    pixels[0, 0] = 0, 1, 2
    ds = dicom(pixels, BitsStored=bits, HighBit=bits - 1, PlanarConfiguration=planar)
    if planar:
        ds.PixelData = np.ascontiguousarray(pixels.transpose(2, 0, 1)).tobytes()
    scan = read_scan(ds)
    values = scan.array[:, 0].transpose(1, 2, 0) / (255 if scan.array.dtype == np.uint8 else 1)
    np.testing.assert_allclose(values, pixels / (2**bits - 1), atol=1e-6)


def test_uncompressed_ybr_becomes_rgb() -> None:
    ybr = RNG.integers(0, 256, (8, 10, 3), dtype=np.uint8)
    ybr[:, 1::2, 1:] = ybr[:, ::2, 1:]  # 4:2:2
    rgb = convert_color_space(ybr, "YBR_FULL", "RGB")
    subsampled = np.stack([ybr[:, ::2, 0], ybr[:, 1::2, 0], ybr[:, ::2, 1], ybr[:, ::2, 2]], -1)  # PS3.3, C.7.6.3.1.2
    for name, data in (("YBR_FULL", ybr), ("YBR_FULL_422", subsampled)):
        ds = dicom(ybr, PhotometricInterpretation=name, PixelData=data.tobytes())
        np.testing.assert_array_equal(read_scan(ds).array[:, 0].transpose(1, 2, 0), rgb)
    for name in ("YBR_RCT", "YBR_ICT", "YBR_PARTIAL_420", "HSV"):
        assert refusal(dicom(ybr, PhotometricInterpretation=name)) == "unsupported"
    assert refusal(dicom(ybr, PhotometricInterpretation="YBR_FULL_422")) == "damaged"  # not subsampled
    assert refusal(dicom(ybr.astype(np.uint16), PhotometricInterpretation="YBR_FULL")) == "unsupported"
    assert refusal(dicom(ybr, PixelRepresentation=1)) == "unsupported"
    assert refusal(dicom(ybr, PlanarConfiguration=None)) == "damaged"


def test_planar_configuration_of_jpeg_has_no_meaning() -> None:
    ds = pydicom.dcmread(packaged("SC_rgb_jpeg_dcmtk.dcm"))
    expected = read_scan(ds).array
    for planar in (1, None):
        ds.PlanarConfiguration = planar
        np.testing.assert_array_equal(read_scan(ds).array, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
@pytest.mark.parametrize("bits", [8, 16])
def test_palette_of_any_first_value(dtype: type, bits: int) -> None:
    table = RNG.integers(0, 256, (101, 3))
    first = -20 if dtype == np.int16 else 40
    pixels = RNG.integers(first - 15, first + 120, (20, 30)).astype(dtype)
    ds = dicom(pixels, PhotometricInterpretation="PALETTE COLOR")
    for channel, name in enumerate(("Red", "Green", "Blue")):
        ds.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [101, first % 65536, bits])
        entries = table[:, channel].astype("u1").tobytes() + b"\0" if bits == 8 else (table[:, channel] << 8)
        data = entries if isinstance(entries, bytes) else entries.astype("<u2").tobytes()
        ds.add_new(f"{name}PaletteColorLookupTableData", "OW", data)
    expected = table[np.clip(pixels.astype(int) - first, 0, 100)]
    np.testing.assert_array_equal(read_scan(dicom_bytes(ds)).array[:, 0].transpose(1, 2, 0), expected)
    del ds.GreenPaletteColorLookupTableData
    assert refusal(ds) == "unsupported"


def test_segmented_palette_is_expanded() -> None:
    pixels = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
    ds = dicom(pixels, PhotometricInterpretation="PALETTE COLOR")
    for name, high in (("Red", 255), ("Green", 128), ("Blue", 0)):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        # PS3.3, C.7.9.2: a discrete segment of one entry, then a linear one of 255 entries
        segments = np.array([0, 1, 0, 1, 255, high << 8], "<u2")
        setattr(ds, f"Segmented{name}PaletteColorLookupTableData", segments.tobytes())
    expected = np.stack([np.round(pixels / 255 * (high << 8)) // 256 for high in (255, 128, 0)])
    assert np.abs(read_scan(ds).array[:, 0] - expected).max() <= 1  # rounding of the ramp


# ------------------------------------------------------------------------------------------- pixels that are not square


def region(across: float, down: float, units: int = 3) -> Dataset:
    item = Dataset()
    item.RegionSpatialFormat, item.PhysicalUnitsXDirection, item.PhysicalUnitsYDirection = 1, units, units
    item.PhysicalDeltaX, item.PhysicalDeltaY = across, down
    return item


@pytest.mark.parametrize(
    ("elements", "spacing", "aspect"),
    [
        ({"PixelAspectRatio": [4, 3]}, (4 / 3, 1), 4 / 3),  # vertical over horizontal (PS3.3, C.7.6.3.1.7)
        ({"PixelAspectRatio": [1, 1]}, (None, None), 1),
        ({"PixelAspectRatio": [0, 1]}, (None, None), 1),
        ({"PixelAspectRatio": [4, 3], "ImagerPixelSpacing": [0.2, 0.1]}, (0.2, 0.1), 2),
        ({"NominalScannedPixelSpacing": [0.3, 0.1]}, (0.3, 0.1), 3),
        ({"SequenceOfUltrasoundRegions": [region(0.01, 0.02)]}, (0.2, 0.1), 2),
        ({"SequenceOfUltrasoundRegions": [region(0.01, -0.02), region(9, 1, units=4)]}, (0.2, 0.1), 2),
        ({"SequenceOfUltrasoundRegions": [region(0.01, 0.02), region(0.01, 0.01)]}, (None, None), 1),
    ],
)
def test_pixels_that_are_not_square(elements: dict[str, Any], spacing: tuple[Any, Any], aspect: float) -> None:
    scan = read_scan(dicom(RNG.integers(0, 256, (120, 120), dtype=np.uint8), **elements))
    assert scan.spacing == (None, *(None if mm is None else pytest.approx(mm) for mm in spacing))
    is_ratio = spacing[1] == 1  # not mm
    assert scan.description.get("pixel_aspect_ratio") == (pytest.approx(aspect, abs=1e-4) if is_ratio else None)
    _, height, width = M3RetImageProcessor(size=192).target_shape(scan.array.shape[1:], scan.spacing)
    assert height / width == pytest.approx(aspect, rel=0.1)
