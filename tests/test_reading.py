"""Images, arrays and NIfTI are read as the arrays that were written."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import fsspec
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file
from scan_files import dicom_bytes, nifti_bytes, reorient, series, zip_bytes

from modeling_m3ret.reading_m3ret import M3RetReadError, Scan, read_scan, read_stored


RNG = np.random.default_rng(7)
GREY = RNG.integers(0, 256, (12, 9), dtype=np.uint8)
RGB = RNG.integers(0, 256, (12, 9, 3), dtype=np.uint8)
NONE3 = (None, None, None)
MR = RNG.integers(0, 3000, (12, 14, 10)).astype(np.int16)
RAS = np.diag([1.0, 1.25, 1.4, 1.0])
RAS[:3, 3] = [-20, 30, 5]


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def percentiles(array: np.ndarray) -> np.ndarray:
    low, high = np.percentile(array, [0.5, 99.5])
    return ((array.astype(np.float64) - low) / (high - low)).clip(0, 1)


# --------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP", "GIF"])
def test_grey_image_equals_its_source(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    scan = read_scan(encode(Image.fromarray(GREY), kind, **options))
    assert scan.array.dtype == np.uint8
    np.testing.assert_array_equal(scan.array, GREY[None, None])
    assert scan.spacing == NONE3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
def test_colour_image_equals_its_source(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    scan = read_scan(encode(Image.fromarray(RGB), kind, **options))
    np.testing.assert_array_equal(scan.array, RGB.transpose(2, 0, 1)[:, None])
    assert scan.array.transpose(1, 2, 3, 0).flags.c_contiguous  # as decoded


def test_grey_stored_as_rgb_jpeg_equals_grey_jpeg() -> None:
    smooth = np.add.outer(np.arange(64), np.arange(48)).astype(np.uint8)
    grey, rgb = (read_scan(encode(Image.fromarray(smooth).convert(mode), "JPEG", quality=90)) for mode in ("L", "RGB"))
    assert rgb.array.shape == (1, 1, 64, 48)
    np.testing.assert_array_equal(grey.array, rgb.array)


def test_sixteen_bit_png_keeps_its_depth() -> None:
    deep = RNG.integers(0, 4000, (40, 30), dtype=np.uint16)
    scan = read_scan(encode(Image.fromarray(deep), "PNG"))
    assert scan.array.dtype == np.float32
    np.testing.assert_allclose(scan.array[0, 0], percentiles(deep), atol=1e-6)


def test_every_pil_mode_becomes_grey_or_rgb() -> None:
    base = Image.fromarray(RGB)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16", "HSV"):
        image = base.convert("L").convert("I").convert(mode) if mode in ("I", "F", "I;16") else base.convert(mode)
        scan = read_scan(image)
        assert scan.array.shape[0] == (1 if mode in ("1", "L", "LA", "I", "F", "I;16") else 3), mode
        assert scan.array.shape[1:] == (1, 12, 9)
    np.testing.assert_array_equal(read_scan(base.convert("1")).array[0, 0], np.asarray(base.convert("1")) * 255)
    np.testing.assert_array_equal(
        read_scan(base.convert("P")).array[:, 0].transpose(1, 2, 0), base.convert("P").convert("RGB")
    )


def test_transparent_pixels_are_black() -> None:
    rgba = np.dstack([RGB, np.full(GREY.shape, 255, np.uint8)])
    rgba[:5, :, 3] = 0
    expected = np.where(np.arange(12)[:, None, None] < 5, 0, RGB).transpose(2, 0, 1)[:, None]
    for source in (Image.fromarray(rgba), encode(Image.fromarray(rgba), "PNG"), rgba):
        np.testing.assert_array_equal(read_scan(source).array, expected)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    scan = read_scan(encode(Image.fromarray(GREY), "PNG", exif=exif))
    np.testing.assert_array_equal(scan.array[0, 0], np.rot90(GREY, -1))


def tiff(
    pixels: np.ndarray, order: str = "<", photometric: int = 1, *, big: bool = False, planar: bool = False, **tags: Any
) -> bytes:
    """Return an uncompressed TIFF of one strip per plane, written as TIFF 6.0 and BigTIFF define it.

    `tags` are further SHORT values, or RATIONAL ones as pairs, by the name t<number>. `deflate` compresses the strips.
    """
    deflate, channels = tags.pop("deflate", False), pixels.shape[2] if pixels.ndim == 3 else 1
    raw = pixels.astype(pixels.dtype.newbyteorder(order))
    planes = [raw[..., channel] for channel in range(channels)] if planar else [raw]
    strips = [zlib.compress(plane.tobytes()) if deflate else plane.tobytes() for plane in planes]
    word, wide = ("Q", 8) if big else ("I", 4)
    start = 16 if big else 8
    offsets = [start + sum(map(len, strips[:index])) for index in range(len(strips))]
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    values = {256: [pixels.shape[1]], 257: [pixels.shape[0]], 258: [pixels.itemsize * 8] * channels}
    values |= {259: [8 if deflate else 1], 262: [photometric], 277: [channels], 278: [pixels.shape[0]]}
    values |= {273: offsets, 279: [len(strip) for strip in strips], 284: [2 if planar else 1], 339: [kind] * channels}
    values |= {int(name[1:]): value for name, value in tags.items()}
    body = b"".join(strips) + b"\0" * (sum(map(len, strips)) % 2)
    entries = b""
    for tag, value in sorted(values.items()):
        pair, long = isinstance(value[0], tuple), tag in (273, 279)
        numbers = [n for item in value for n in item] if pair else value
        data = struct.pack(order + ("I" if pair or long else "H") * len(numbers), *numbers)
        if len(data) > wide:
            body, data = body + data, struct.pack(order + word, start + len(body))
        entries += struct.pack(order + "HH" + word, tag, 5 if pair else 4 if long else 3, len(value))
        entries += data.ljust(wide, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    head += struct.pack(order + ("HHQ" if big else "I"), *((8, 0) if big else ()), start + len(body))
    return head + body + struct.pack(order + ("Q" if big else "H"), len(values)) + entries + bytes(wide)


SAMPLES = [
    RNG.integers(np.iinfo(kind).min, np.iinfo(kind).max, (12, 9), dtype=kind)
    for kind in (np.int8, np.uint16, np.int16, np.int32, np.uint32)
]
SAMPLES.append(RNG.normal(100, 300, (12, 9)).astype(np.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("pixels", SAMPLES, ids=lambda pixels: str(pixels.dtype))
@pytest.mark.parametrize("deflate", [False, True])
def test_tiff_of_any_type_has_its_values_or_is_unsupported(pixels: np.ndarray, order: str, deflate: bool) -> None:
    for big in (False, True):
        for white_is_zero in (False, True):
            data = tiff(pixels, order, int(not white_is_zero), big=big, deflate=deflate)
            expected = 1 - percentiles(pixels) if white_is_zero else percentiles(pixels)
            try:
                array = read_scan(data).array[0, 0]
            except M3RetReadError as error:
                reason = error.reason
            else:
                reason = np.testing.assert_allclose(array, expected, atol=1e-5)
            assert reason in ((None, "unsupported") if order == ">" or white_is_zero else (None,))


def test_tiff_layouts() -> None:
    deep = RNG.integers(0, 65536, (12, 9, 3), dtype=np.uint16)
    for order in "<>":
        np.testing.assert_array_equal(read_scan(tiff(GREY, order, 0)).array[0, 0], 255 - GREY)
        for planar in (False, True):
            array = read_scan(tiff(RGB, order, 2, planar=planar)).array
            np.testing.assert_array_equal(array[:, 0].transpose(1, 2, 0), RGB)
        np.testing.assert_array_equal(read_scan(tiff(deep, order, 2)).array[:, 0].transpose(1, 2, 0), deep >> 8)
        with pytest.raises(M3RetReadError) as caught:  # Pillow would read its planes as bytes
            read_scan(tiff(deep, order, 2, planar=True))
        assert caught.value.reason == "unsupported"


def test_reduced_pages_of_a_tiff_are_left_out() -> None:
    page, small = Image.fromarray(GREY), Image.fromarray(GREY).resize((4, 6))
    small.encoderinfo = {"tiffinfo": {254: 1}}  # NewSubfileType: a reduced copy
    data = encode(page, "TIFF", save_all=True, append_images=[small, page])
    scan = read_scan(data)
    np.testing.assert_array_equal(scan.array[0], [GREY, GREY])
    assert scan.description["pages_left_out"] == 1


def test_pages_of_several_types_are_refused() -> None:
    deep = Image.fromarray(GREY.astype(np.uint16) * 200)
    with pytest.raises(M3RetReadError) as caught:
        read_scan(encode(Image.fromarray(GREY), "TIFF", save_all=True, append_images=[deep]))
    assert caught.value.reason == "unsupported"


def test_imagej_stack_without_pages_is_refused() -> None:
    data = encode(Image.fromarray(GREY), "TIFF", tiffinfo={270: "ImageJ=1.54f\nimages=20\nslices=20\n"})
    with pytest.raises(M3RetReadError) as caught:
        read_scan(data)
    assert caught.value.reason == "unsupported"


def with_physical_pixels(across: int, down: int) -> bytes:
    """Return a PNG with a pHYs chunk without a unit."""
    body = b"pHYs" + struct.pack(">IIB", across, down, 0)
    png = encode(Image.fromarray(GREY), "PNG")
    return png[:33] + struct.pack(">I", 9) + body + struct.pack(">I", zlib.crc32(body)) + png[33:]


def with_jfif_density(unit: int, across: int, down: int) -> bytes:
    jpeg = encode(Image.fromarray(GREY), "JPEG")
    return jpeg[:13] + struct.pack(">BHH", unit, across, down) + jpeg[18:]


@pytest.mark.parametrize(
    ("data", "ratio"),  # height of a pixel / width, from pixels per inch across / down
    [
        (tiff(GREY, t282=[(204, 1)], t283=[(98, 1)], t296=[2]), 204 / 98),  # fax
        (tiff(GREY, t282=[(2, 1)], t283=[(1, 1)], t296=[1]), 2.0),  # without a unit
        (tiff(GREY, t282=[(100, 1)]), None),  # of one axis only
        (tiff(GREY, t282=[(72009, 1000)], t283=[(72, 1)], t296=[2]), None),  # rounded
        (encode(Image.fromarray(GREY), "PNG", dpi=(72, 144)), 0.5),
        (with_physical_pixels(3, 1), 3.0),  # pHYs (PNG, 11.3.5.3): pixels per unit, X then Y; without a unit
        (encode(Image.fromarray(GREY), "JPEG", dpi=(200, 100)), 2.0),
        (encode(Image.fromarray(GREY), "JPEG", dpi=(300, 300)), None),
        (with_jfif_density(0, 1, 4), 0.25),  # Xdensity and Ydensity (JFIF 1.02), without a unit
        (with_jfif_density(2, 100, 50), 2.0),  # per cm
        (encode(Image.fromarray(GREY), "BMP", dpi=(100, 50)), 2.0),
    ],
)
def test_declared_resolution_gives_the_ratio_of_pixel_sides(data: bytes, ratio: float | None) -> None:
    scan = read_scan(data)
    assert scan.spacing == (NONE3 if ratio is None else (None, pytest.approx(ratio, rel=1e-3), 1.0))
    assert scan.description.get("pixel_aspect_ratio") == (ratio and pytest.approx(ratio, rel=1e-3))


def test_rotation_swaps_the_sides_of_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for pixels in (GREY, GREY[:9]):
        jpeg = encode(Image.fromarray(pixels), "JPEG", dpi=(200, 100), exif=exif)
        for data in (jpeg, tiff(pixels, t274=[6], t282=[(200, 1)], t283=[(100, 1)], t296=[2])):
            scan = read_scan(data)
            assert scan.spacing == (None, 0.5, 1.0)
            assert scan.array.shape[2:] == pixels.shape[::-1]


@pytest.mark.parametrize("kind", ["AVIF", "HEIF", "JPEG2000"])
def test_pictures_in_further_formats_are_read_as_pictures(kind: str) -> None:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    smooth = np.add.outer(np.arange(64) * 2, np.arange(48)).astype(np.uint8)
    scan = read_scan(encode(Image.fromarray(np.stack([smooth, smooth, 255 - smooth], -1)), kind, quality=95))
    assert scan.array.shape == (3, 1, 64, 48)
    assert scan.description["format"] == kind.lower()
    assert np.abs(scan.array[0, 0].astype(int) - smooth).max() < 20


@pytest.mark.parametrize("kind", ["AVIF", "WEBP", "PNG"])
def test_animations_have_all_frames(kind: str) -> None:
    frames = [Image.fromarray(np.roll(np.tile(np.arange(64, dtype=np.uint8) * 3, (48, 1)), 9 * i, 1)) for i in range(5)]
    colour = [Image.merge("RGB", (frame, frame.point(lambda v: 255 - v), frame)) for frame in frames]
    options = {"lossless": True} if kind == "WEBP" else {}
    scan = read_scan(encode(colour[0], kind, save_all=True, append_images=colour[1:], duration=90, **options))
    assert scan.array.shape == (3, 5, 48, 64)
    assert np.abs(scan.array[0].astype(int) - np.stack([np.asarray(frame) for frame in frames])).mean() < 6


def test_default_image_of_an_animated_png_is_not_a_frame() -> None:
    frames = [Image.fromarray(np.roll(RGB, i, 0)) for i in range(3)]
    data = encode(Image.fromarray(RGB[::-1].copy()), "PNG", save_all=True, default_image=True, append_images=frames)
    scan = read_scan(data)
    np.testing.assert_array_equal(scan.array.transpose(1, 2, 3, 0), np.stack([np.asarray(f) for f in frames]))


def test_pages_and_animation_frames_become_depth() -> None:
    pages = [Image.fromarray(RNG.integers(0, 256, (8, 6), dtype=np.uint8)) for _ in range(10)]
    for kind in ("TIFF", "GIF"):
        data = encode(pages[0], kind, save_all=True, append_images=pages[1:])
        scan = read_scan(data)
        np.testing.assert_array_equal(scan.array[0], np.stack([np.asarray(page) for page in pages]))
        few = read_scan(data, num_frames=5)
        np.testing.assert_array_equal(few.array[0], scan.array[0, 1::2])
        assert few.description["frames_total"] == 10
        assert few.description["frames_dropped"] == 5


# --------------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("convert", [np.copy, lambda array: torch.from_numpy(array.copy())])
def test_array_layouts(convert: Callable[[np.ndarray], Any]) -> None:
    stack, clip = RNG.integers(0, 256, (5, 12, 9), dtype=np.uint8), RNG.integers(0, 256, (5, 12, 9, 3), dtype=np.uint8)
    cases = [
        (GREY, GREY[None, None]),
        (RGB, RGB.transpose(2, 0, 1)[:, None]),
        (stack, stack[None]),
        (clip, clip.transpose(3, 0, 1, 2)),
        (clip[..., :1], clip[None, ..., 0]),
    ]
    for given, expected in cases:
        scan = read_scan(convert(given))
        np.testing.assert_array_equal(scan.array, expected)
        colour = scan.array.shape[0] == 3 and scan.array.dtype == np.uint8
        assert (scan.array.transpose(1, 2, 3, 0) if colour else scan.array).flags.c_contiguous


def test_channels_first_is_declared_and_never_guessed() -> None:
    first, clip_first = RGB.transpose(2, 0, 1), np.stack([RGB, RGB[::-1]]).transpose(0, 3, 1, 2)
    for array in (first, clip_first, clip_first[:, :1]):
        with pytest.raises(M3RetReadError) as caught:
            read_scan(array)
        assert caught.value.reason == "unsupported"
        assert "input_data_format" in caught.value.advice
    for given in (first, torch.from_numpy(first.copy())):
        colour = read_scan(given, input_data_format="channels_first")
        np.testing.assert_array_equal(colour.array, first[:, None])
    frames = read_scan(clip_first, input_data_format="channels_first").array
    np.testing.assert_array_equal(frames, clip_first.transpose(1, 0, 2, 3))
    np.testing.assert_array_equal(read_scan(first, input_data_format="channels_last").array, first[None])  # slices
    for unambiguous in (first[:1], first[..., None], GREY, np.stack([GREY] * 5)):
        assert read_scan(unambiguous).array.shape[0] == 1
    np.testing.assert_array_equal(read_scan(first[:1], input_data_format="channels_first").array, first[None, :1])
    with pytest.raises(ValueError, match="input_data_format"):
        read_scan(RGB, input_data_format="first")


def test_column_of_a_row_decides_between_slices_and_colours() -> None:
    slices = RGB.transpose(2, 0, 1)
    np.testing.assert_array_equal(read_scan({"volume": slices}).array, slices[None])
    with pytest.raises(M3RetReadError):
        read_scan({"image": slices})


@pytest.mark.parametrize(
    "spacing", [(1, 1), (1.0, -2.0, 1.0), (0, 1, 1), (1, np.nan, 1), (1, np.inf, 1), "abc", 3.0, [1, [2], 3]]
)
def test_spacing_of_a_row_that_is_not_three_lengths_is_refused(spacing: Any) -> None:
    volume = np.zeros((2, 8, 8), np.uint8)
    assert read_scan({"volume": volume, "spacing": (None, np.float32(2), 1)}).spacing == (None, 2.0, 1.0)
    with pytest.raises(M3RetReadError):
        read_scan({"volume": volume, "spacing": spacing})


def test_intensity_of_arrays_is_inferred_from_their_values() -> None:
    in_unit_range = RNG.random((4, 8, 8), dtype=np.float32)
    np.testing.assert_array_equal(read_scan(in_unit_range).array[0], in_unit_range)
    mr = RNG.integers(-3, 1800, (4, 32, 32), dtype=np.int16)
    np.testing.assert_allclose(read_scan(mr).array[0], percentiles(mr), atol=1e-6)
    np.testing.assert_allclose(read_scan(mr.astype(np.float64)).array, read_scan(mr).array, atol=1e-6)
    ct = RNG.integers(-1024, 2000, (4, 16, 16), dtype=np.int16)
    scan = read_scan(ct, intensity="hounsfield")
    assert scan.description["intensity"] == "hounsfield [-1000, 1000]"
    np.testing.assert_allclose(scan.array[0], (ct.clip(-1000, 1000) + 1000) / 2000, atol=1e-6)
    assert read_scan(np.array([[False, True]])).array.tolist() == [[[[0, 255]]]]
    half = torch.tensor([[0.25, 0.5]], dtype=torch.bfloat16)
    assert read_scan(half).array.tolist() == [[[[0.25, 0.5]]]]


def test_reading_does_not_change_the_callers_array() -> None:
    mr = RNG.random((4, 16, 16), dtype=np.float32) * 900
    before = mr.copy()
    read_scan(mr)
    np.testing.assert_array_equal(mr, before)


def test_outliers_do_not_set_the_scale() -> None:
    mr = RNG.integers(100, 200, (64, 64)).astype(np.int16)
    mr[0, 0] = 32000
    assert 0.4 < read_scan(mr).array.mean() < 0.6


def test_values_too_close_for_float32_are_constant_and_do_not_hide_larger_ones() -> None:
    """1 divided by their range is infinite in float32."""
    close = np.random.default_rng(0).integers(0, 2_000, (40, 50)).astype(np.float32) * np.float32(1e-45)
    scan = read_scan(close, intensity="percentiles")
    assert scan.description["constant"]
    assert np.count_nonzero(scan.array) == 0
    close[3, 4] = 7.0
    scan = read_scan(close, intensity="percentiles")
    assert np.argwhere(scan.array[0, 0] > 1e-30).tolist() == [[3, 4]]
    assert scan.array.max() == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_constant_scan_is_zeros_and_marked(dtype: Any) -> None:
    scan = read_scan(np.full((5, 8, 8), 77, dtype))
    assert scan.description["constant"] is True
    assert not scan.array.any()
    assert "constant" not in read_scan(GREY).description


@pytest.mark.parametrize("largest", [0.003, 0.001, 1e-6])  # diffusivity in mm2/s, relaxation in s, susceptibility
def test_maps_of_small_values_show_more_than_one_grey_level(largest: float) -> None:
    values = (RNG.random((8, 9, 10)) * largest).astype(np.float32)
    for source in (values, nifti_bytes(values, np.diag([-1.0, -1, 1, 1]))):
        array = read_scan(source).array[0]
        expected = percentiles(values)
        np.testing.assert_allclose(array, expected if source is values else expected.transpose(2, 1, 0), atol=1e-4)


def test_npz_key_declares_hounsfield_units(tmp_path: Path) -> None:
    soft = RNG.integers(-100, 300, (6, 10, 10)).astype(np.int16)  # an organ crop without air
    np.savez_compressed(tmp_path / "hu.npz", hu=soft)
    np.savez(tmp_path / "imgs.npz", imgs=soft, spacing=np.ones(3))
    np.save(tmp_path / "plain.npy", soft)
    np.testing.assert_allclose(read_scan(tmp_path / "hu.npz").array[0], (soft + 1000) / 2000, atol=1e-6)
    assert read_scan(tmp_path / "hu.npz", num_frames=2).array.shape[1] == 6  # volumes are read whole
    np.testing.assert_allclose(read_scan(tmp_path / "imgs.npz").array[0], percentiles(soft), atol=1e-6)
    np.testing.assert_array_equal(read_scan(tmp_path / "plain.npy").array, read_scan(soft).array)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(soft))
    np.testing.assert_array_equal(read_scan(tmp_path / "fortran.npy").array, read_scan(soft).array)


# a CT with air; the same resampled to floats; an organ of it without air
CT = RNG.normal(40, 20, (12, 14, 10)).round().astype(np.int16)
CT[:, :4] = -1000
SAME_CT = {"int16": CT, "float32": CT * np.float32(1.0001), "float64": CT + 0.25, "organ": CT[:, 5:]}


@pytest.mark.parametrize("voxels", SAME_CT.values(), ids=SAME_CT)
def test_hounsfield_units_are_declared_and_never_guessed(voxels: np.ndarray) -> None:
    for source in (voxels, nifti_bytes(voxels, np.eye(4))):
        guessed, declared = read_scan(source), read_scan(source, intensity="hounsfield")
        assert guessed.description["intensity"].startswith("percentiles")
        assert declared.description["intensity"].startswith("hounsfield")
        expected = (voxels.astype(np.float64) + 1000).clip(0, 2000) / 2000
        expected = expected if source is voxels else expected[::-1, ::-1].transpose(2, 1, 0)
        np.testing.assert_allclose(declared.array[0], expected, atol=1e-6)
    row = {"volume": voxels, "intensity": "percentiles"}  # what a row declares comes before the caller
    assert read_scan(row, intensity="hounsfield").description["intensity"].startswith("percentiles")


@pytest.mark.parametrize(("low", "high"), [(-4096, 4095), (-3142, 3142), (-900, 900), (-150, 150)])
def test_phases_and_field_maps_are_not_hounsfield_units(low: int, high: int) -> None:
    phase = RNG.integers(low, high, (12, 10, 6)).astype(np.int16)
    for dtype in (np.int16, np.float32):
        scan = read_scan(nifti_bytes(phase.astype(dtype), np.diag([-1.0, -1, 1, 1])))
        np.testing.assert_allclose(scan.array[0], percentiles(phase.transpose(2, 1, 0)), atol=1e-5)


def test_intensity_that_does_not_fit_is_refused() -> None:
    for source, intensity in ((RGB, "hounsfield"), (GREY, "hounsfield"), (GREY, "full range"), (CT, "8-bit")):
        with pytest.raises(M3RetReadError) as caught:
            read_scan(source, intensity=intensity)
        assert caught.value.reason == "unsupported"
    with pytest.raises(ValueError, match="intensity"):
        read_scan(GREY, intensity="HU")


@pytest.mark.parametrize("values", [np.arange(99) + 2**30, np.arange(99) + 2.0**40, 1e3 + 1e-7 * np.arange(99)])
def test_large_offsets_do_not_cost_precision(values: np.ndarray) -> None:
    scan = read_scan(values.reshape(9, 11))
    np.testing.assert_allclose(scan.array[0, 0].ravel(), percentiles(np.arange(99.0)), atol=1e-4)


# ---------------------------------------------------------------------------------------------------- rows and the rest


def test_file_objects_are_read_from_their_start_and_left_as_they_were(tmp_path: Path) -> None:
    data, path = encode(Image.fromarray(RGB), "PNG"), tmp_path / "scan"
    path.write_bytes(data)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("folder/image.png", data)
    with (
        zipfile.ZipFile(archive) as file,
        path.open("rb") as opened,
        tempfile.SpooledTemporaryFile() as written,
        file.open("folder/image.png") as member,
    ):
        written.write(data)
        opened.seek(7)
        for source in (
            opened,
            written,
            member,
            io.BytesIO(data),
            gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(data))),
        ):
            position = source.tell()
            np.testing.assert_array_equal(read_scan(source).array[:, 0].transpose(1, 2, 0), RGB)
            assert source.tell() == position
        for source in (zipfile.Path(file, "folder/image.png"), fsspec.open(str(path)), {"image": io.BytesIO(data)}):
            np.testing.assert_array_equal(read_scan(source).array[:, 0].transpose(1, 2, 0), RGB)
    for source in (opened, path.open(encoding="latin-1"), io.StringIO("text")):  # closed, and opened as text
        with pytest.raises(M3RetReadError) as caught:
            read_scan(source)
        assert caught.value.reason == "unsupported"


class Stream:
    """A source of bytes that returns what has arrived, as pipes, sockets and urllib3 do."""

    def __init__(self, data: bytes, at_once: int, rest: Any = b""):
        self.stream, self.at_once, self.rest = io.BytesIO(data), at_once, rest

    def read(self, size: int = -1) -> Any:
        return self.stream.read(min(size, self.at_once)) or (self.rest if size else b"")


@pytest.mark.parametrize("at_once", [1, 100, 2**20])
def test_file_objects_may_return_less_than_asked_for(at_once: int) -> None:
    data = nifti_bytes(MR, RAS)
    np.testing.assert_array_equal(read_scan(Stream(data, at_once)).array, read_scan(data).array)


def test_file_objects_that_do_not_return_bytes_are_refused() -> None:
    class Asynchronous:
        async def read(self, size: int = -1) -> bytes:
            return b""

    for source in (Stream(nifti_bytes(MR, RAS), 100, rest=None), Asynchronous()):  # None: would block
        with pytest.raises(M3RetReadError) as caught:
            read_scan(source)
        assert caught.value.reason == "unsupported"


CLUTTER = {
    "__MACOSX/series/._1": b"\0\5\x16\7" + bytes(90),
    "series/.DS_Store": b"\0\0\0\1Bud1",
    "Thumbs.db": b"\xd0\xcf",
}


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_zip_of_a_series_is_read_as_the_series(separator: str) -> None:
    slices = [dicom_bytes(ds) for ds in series(MR, np.diag([-1.0, -1, 2, 1]))]
    files = (
        {f"series/{number}.dcm": data for number, data in enumerate(slices)} | CLUTTER | {"series/notes.json": b"{}"}
    )
    files["DICOMDIR"] = Path(get_testdata_file("DICOMDIR", download=False)).read_bytes()
    scan = read_scan(zip_bytes({name.replace("/", separator): data for name, data in files.items()}))
    np.testing.assert_array_equal(scan.array, read_scan(slices).array)
    assert scan.description["files_ignored"] == 2


def test_zip_and_gzip_of_one_file_are_read_as_the_file() -> None:
    sources = [nifti_bytes(MR, RAS), encode(Image.fromarray(RGB), "PNG"), dicom_bytes(series(MR, RAS)[0])]
    for data in sources:
        expected = read_scan(data).array
        packed = [
            gzip.compress(data),
            zip_bytes({"a/scan": data} | CLUTTER),
            zip_bytes({"scan.gz": gzip.compress(data)}),
            zip_bytes({"scan": data}, zipfile.ZIP_STORED),
        ]
        for source in packed:
            np.testing.assert_array_equal(read_scan(source).array, expected)


def test_every_kind_of_source_gives_the_same_scan(tmp_path: Path) -> None:
    data = encode(Image.fromarray(RGB), "PNG")
    path = tmp_path / "image.bin"  # the name does not matter
    path.write_bytes(data)
    expected = read_scan(data).array
    row = {"image": None, "video": None, "volume": None, "modality": 2}
    sources: list[Any] = [path, str(path), bytearray(data), Image.open(path), {"bytes": data, "path": "other.jpg"}]
    sources += [{"bytes": None, "path": str(path)}, row | {"image": {"bytes": data, "path": None}}]
    sources += [row | {"image": Image.open(path)}, row | {"image": str(path)}, row | {"volume": {"bytes": data}}]
    for source in sources:
        np.testing.assert_array_equal(read_scan(source).array, expected)
    scan = read_scan(path)
    assert read_scan(scan) is scan


def test_scan_and_error_survive_pickling() -> None:
    scan = pickle.loads(pickle.dumps(read_scan(GREY)))
    assert isinstance(scan, Scan)
    with pytest.raises(M3RetReadError) as caught:
        read_scan("absent.dcm")
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.file, error.reason, str(error)) == ("absent.dcm", "not_found", str(caught.value))
    assert all(text in str(error) for text in (error.file, error.expected, error.got, error.advice))
    assert str(M3RetReadError(str(error))) == str(error)  # how a DataLoader re-creates the error of a worker


def test_num_frames_below_one_is_not_a_read_error() -> None:
    with pytest.raises(ValueError, match="num_frames") as caught:
        read_scan(GREY, num_frames=0)
    assert not isinstance(caught.value, M3RetReadError)


# ---------------------------------------------------------------------------------------------------------------- NIfTI


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "SPL", "ASR", "IRP"])
@pytest.mark.parametrize("zipped", [False, True])
def test_scan_does_not_depend_on_the_orientation_of_the_file(codes: str, zipped: bool) -> None:
    scan = read_scan(nifti_bytes(*reorient(MR, RAS, codes), zipped=zipped))
    expected = percentiles(
        MR[::-1, ::-1].transpose(2, 1, 0)
    )  # inferior to superior, anterior to posterior, right to left
    np.testing.assert_allclose(scan.array[0], expected, atol=1e-6)
    assert scan.spacing == pytest.approx((1.4, 1.25, 1.0))
    assert scan.description["plane"] == "axial"


def test_oblique_volume_is_assigned_to_the_nearest_axes() -> None:
    angle = np.deg2rad(25)
    rotation = np.eye(4)
    rotation[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    scan = read_scan(nifti_bytes(*reorient(MR, rotation @ RAS, "PSR")))
    np.testing.assert_allclose(scan.array[0], percentiles(MR[::-1, ::-1].transpose(2, 1, 0)), atol=1e-6)
    assert scan.spacing == pytest.approx((1.4, 1.25, 1.0))


def test_thick_slices_keep_their_plane() -> None:
    sagittal = read_scan(nifti_bytes(*reorient(MR, np.diag([5.0, 1, 1, 1]), "LSP")))
    assert sagittal.description["plane"] == "sagittal"
    assert sagittal.spacing == pytest.approx((5, 1, 1))
    expected = MR[::-1, ::-1, ::-1].transpose(0, 2, 1)  # right to left, superior to inferior, anterior to posterior
    np.testing.assert_allclose(sagittal.array[0], percentiles(expected), atol=1e-6)
    coronal = read_scan(nifti_bytes(*reorient(MR, np.diag([1.0, 4, 1, 1]), "RSA")))
    assert coronal.description["plane"] == "coronal"
    np.testing.assert_allclose(coronal.array[0], percentiles(MR[::-1, ::-1, ::-1].transpose(1, 2, 0)), atol=1e-6)
    assert (
        read_scan(nifti_bytes(MR, np.diag([1.5, 1, 1, 1]))).description["plane"] == "axial"
    )  # exactly 1.5 times is not thick


def test_nifti_scaling_is_applied() -> None:
    hu = RNG.integers(-1000, 1500, (8, 8, 8)).astype(np.int16)
    image = nib.Nifti1Image((hu + 1024).astype(np.uint16), np.eye(4))
    image.header.set_slope_inter(1, -1024)
    raw = bytearray(image.to_bytes())
    raw[112:120] = np.array([1, -1024], "<f4").tobytes()  # nibabel resets both on writing
    scan = read_scan(bytes(raw), intensity="hounsfield")
    assert scan.description["intensity"] == "hounsfield [-1000, 1000]"
    truth = nib.Nifti1Image.from_bytes(bytes(raw)).get_fdata()[::-1, ::-1].transpose(2, 1, 0)
    np.testing.assert_allclose(scan.array[0], (truth.clip(-1000, 1000) + 1000) / 2000, atol=1e-6)


@pytest.mark.parametrize("singleton", [0, 1, 2])
def test_single_slice_over_time_is_a_clip(singleton: int) -> None:
    shape = [10, 12, 14]
    shape[singleton] = 1
    voxels = RNG.integers(0, 900, (*shape, 8)).astype(np.int16)
    affine = np.diag([-1.0, -1, 1, 1])  # of an axial slice in the order of DICOM
    frames = [read_scan(nifti_bytes(voxels[..., time], affine), intensity="hounsfield") for time in range(8)]
    for given in (voxels, voxels[..., None], voxels[..., None, None, :]):
        scan = read_scan(nifti_bytes(given, affine), intensity="hounsfield")
        np.testing.assert_array_equal(scan.array, np.concatenate([frame.array for frame in frames], axis=1))
        assert scan.spacing == (None, *frames[0].spacing[1:])
        assert (scan.description["frames_total"], scan.description["frames_dropped"]) == (8, 0)
    few = read_scan(nifti_bytes(voxels, affine), num_frames=2, intensity="hounsfield")
    np.testing.assert_array_equal(few.array, scan.array[:, [2, 6]])  # centres of two segments


@pytest.mark.parametrize("intent", [0, 1007, 2003])  # none; vector, as ITK writes colour; RGB
def test_colour_as_the_fifth_dimension_is_colour(intent: int) -> None:
    voxels = RNG.integers(0, 256, (6, 5, 4, 1, 3), dtype=np.uint8)
    scan = read_scan(nifti_bytes(voxels, np.diag([-1.0, -1, 1, 1]), intent_code=intent))
    np.testing.assert_array_equal(scan.array, voxels[:, :, :, 0].transpose(3, 2, 1, 0))


@pytest.mark.parametrize(
    ("shape", "dtype", "intent"),
    [
        ((6, 5, 4, 1, 3), np.float32, 1006),  # displacements
        ((6, 5, 4, 1, 3), np.uint8, 1006),
        ((6, 5, 4, 1, 3), np.float32, 0),
        ((6, 5, 4, 1, 6), np.float32, 1005),  # symmetric matrices, of diffusion
        ((6, 5, 4, 1, 2), np.uint8, 0),
    ],
)
def test_vectors_are_refused(shape: tuple[int, ...], dtype: Any, intent: int) -> None:
    with pytest.raises(M3RetReadError) as caught:
        read_scan(nifti_bytes(np.ones(shape, dtype), np.eye(4), intent_code=intent))
    assert caught.value.reason == "unsupported"


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_nifti_of_any_type_has_the_values_of_nibabel(dtype: Any, order: str) -> None:
    image = nib.Nifti1Image((MR % 120).astype(dtype), RAS, nib.Nifti1Header(endianness=order), dtype=dtype)
    truth = nib.as_closest_canonical(image).get_fdata()[::-1, ::-1].transpose(2, 1, 0)
    np.testing.assert_allclose(read_scan(image.to_bytes()).array[0], percentiles(truth), atol=1e-5)


@pytest.mark.parametrize(("slope", "intercept"), [(0, 5), (np.nan, 5), (np.inf, 0), (-2, 10), (0.5, -100)])
def test_nifti_slope_is_read_as_by_nibabel(slope: float, intercept: float) -> None:
    raw = bytearray(nifti_bytes(MR, np.diag([-1.0, -1, 1, 1])))
    raw[112:120] = np.array([slope, intercept], "<f4").tobytes()
    truth = nib.Nifti1Image.from_bytes(bytes(raw)).get_fdata().transpose(2, 1, 0)
    np.testing.assert_allclose(read_scan(bytes(raw)).array[0], percentiles(truth), atol=1e-5)


def test_voxels_that_are_not_a_number_are_padding() -> None:
    voxels = MR.astype(np.float32)
    voxels[:4] = np.nan
    scan = read_scan(nifti_bytes(voxels, np.diag([-1.0, -1, 1, 1])))
    expected = percentiles(voxels[4:]).transpose(2, 1, 0)
    np.testing.assert_allclose(scan.array[0, :, :, 4:], expected, atol=1e-6)
    assert not scan.array[0, :, :, :4].any()
    assert read_scan(nifti_bytes(np.full_like(voxels, np.nan), np.eye(4))).description["constant"]


def test_one_volume_is_the_same_scan_in_every_format(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    angle = 0.2
    affine = np.array([[-1.5, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = nib.affines.from_matvec(affine * [1, 1.2, 2.0], [10, 20, 30])
    nib.save(nib.Nifti1Image(MR, affine), tmp_path / "scan.nii.gz")
    nib.save(nib.Nifti1Pair(MR, affine), tmp_path / "pair.hdr")
    nib.save(nib.MGHImage(MR, affine), tmp_path / "scan.mgz")
    nib.save(nib.MGHImage(MR, affine), tmp_path / "scan.mgh")
    image = sitk.GetImageFromArray(MR.transpose(2, 1, 0))
    lps = np.diag([-1.0, -1, 1]) @ affine[:3, :3]
    image.SetSpacing(np.linalg.norm(lps, axis=0).tolist())
    image.SetDirection((lps / np.linalg.norm(lps, axis=0)).ravel().tolist())
    for name in ("scan.nrrd", "scan.nhdr", "scan.mha", "detached.mhd"):
        sitk.WriteImage(image, str(tmp_path / name))
        sitk.WriteImage(image, str(tmp_path / f"packed_{name}"), useCompression=True)
    header = (tmp_path / "scan.nhdr").read_bytes()
    (tmp_path / "here.nhdr").write_bytes(header.replace(b"data file: scan", b"data file: ./scan"))
    expected = read_scan(tmp_path / "scan.nii.gz")
    for path in [*tmp_path.glob("*.[nm][!i]*"), tmp_path / "pair.hdr", tmp_path / "pair.img"]:
        scan = read_scan(path)
        np.testing.assert_array_equal(scan.array, expected.array)
        assert scan.spacing == pytest.approx(expected.spacing, rel=1e-5)
        assert scan.description["plane"] == expected.description["plane"]
    for header, voxels in (("detached.mhd", "detached.raw"), ("scan.nhdr", "scan.raw"), ("pair.hdr", "pair.img")):
        files = {f"a/{name}": (tmp_path / name).read_bytes() for name in (header, voxels)}
        np.testing.assert_array_equal(read_scan(zip_bytes(files)).array, expected.array)


@pytest.mark.parametrize("name", ["tiny.mnc", "small.mnc", "minc2_1_scale.mnc", "minc2_baddim.mnc", "test.mgz"])
def test_files_of_nibabel_are_read_as_by_nibabel(name: str) -> None:
    pytest.importorskip("h5py")
    path = Path(nib.__file__).parent / "tests" / "data" / name
    if not path.is_file():
        pytest.skip("needs the test data of nibabel")
    image = nib.as_closest_canonical(nib.load(path))
    truth = np.asarray(image.dataobj, dtype=np.float64)
    truth = (truth[..., 0] if truth.ndim == 4 else truth)[::-1, ::-1].transpose(2, 1, 0)
    scan = read_scan(path)
    expected = truth if scan.description["intensity"] == "already in [0, 1]" else percentiles(truth)
    np.testing.assert_allclose(scan.array[0], expected, atol=1e-4)
    assert scan.spacing == pytest.approx(nib.affines.voxel_sizes(image.affine)[::-1], rel=1e-5)


def test_tiff_in_cielab_is_read_as_pillow_shows_it(tmp_path: Path) -> None:
    image = Image.merge(
        "LAB", [Image.linear_gradient("L"), Image.new("L", (256, 256), 150), Image.radial_gradient("L")]
    )
    image.save(tmp_path / "scan.tif")
    expected = np.asarray(image.convert("RGB"))
    assert len(np.unique(expected)) > 100
    np.testing.assert_array_equal(read_stored(tmp_path / "scan.tif").array[:, 0], expected.transpose(2, 0, 1))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["scan.mha", "scan.mhd", "scan.nrrd"])
def test_dicom_converted_by_simpleitk(name: str, compress: bool, tmp_path: Path) -> None:
    """SimpleITK carries the header over: in MetaImage, as fields such as `0008|0060`."""
    sitk = pytest.importorskip("SimpleITK")
    voxels = np.random.default_rng(0).integers(-1000, 1000, (3, 5, 7)).astype(np.int16)
    image = sitk.GetImageFromArray(voxels)
    for key in ("0008|0060", "field of view (mm)", "a/b", "x.y-z"):
        image.SetMetaData(key, "CT")
    sitk.WriteImage(image, str(tmp_path / name), useCompression=compress)
    assert np.array_equal(read_stored(tmp_path / name).array[0], voxels)


@pytest.mark.parametrize("name", ["colour.mha", "colour.nrrd", "colour.nii.gz"])
def test_colour_and_time_of_simpleitk(name: str, tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    voxels = RNG.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(voxels, isVector=True), str(tmp_path / name))
    np.testing.assert_array_equal(read_scan(tmp_path / name).array, voxels.transpose(3, 0, 1, 2))
    sitk.WriteImage(sitk.GetImageFromArray(voxels / 9.0, isVector=True), str(tmp_path / f"field_{name}"))
    with pytest.raises(M3RetReadError) as caught:
        read_scan(tmp_path / f"field_{name}")
    assert caught.value.reason == "unsupported"
    volumes = [sitk.GetImageFromArray(RNG.integers(0, 900, (4, 5, 6)).astype(np.int16)) for _ in range(3)]
    sitk.WriteImage(sitk.JoinSeries(volumes), str(tmp_path / f"time_{name}"))
    scan = read_scan(tmp_path / f"time_{name}")
    np.testing.assert_allclose(scan.array[0], percentiles(sitk.GetArrayFromImage(volumes[0])), atol=1e-6)
    assert (scan.description["volumes"], scan.description["volume_index"]) == (3, 0)


# of NRRD: spacing along D, H, W, and the flips of D, H, W from the file, http://teem.sourceforge.net/nrrd/format.html
NRRD_HEADERS = {
    "": (NONE3, (1, 1, 1)),
    "spacings: 1 2 3\n": ((3, 2, 1), (1, 1, 1)),
    "spacings: nan nan nan\n": (NONE3, (1, 1, 1)),
    "space: RAS\nspace directions: (1,0,0) (0,1,0) (0,0,2)\n": ((2, 1, 1), (1, -1, -1)),
    "space: left-anterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,-2)\n": ((2, 1, 1), (-1, -1, 1)),
    'space: LPS\nspace directions: (1,0,0) (0,1,0) (0,0,2)\nspace units: "cm" "cm" "cm"\n': ((20, 10, 10), (1, 1, 1)),
}


@pytest.mark.parametrize("header", NRRD_HEADERS)
def test_nrrd_is_oriented_as_its_space_declares(header: str) -> None:
    pytest.importorskip("SimpleITK")
    voxels = RNG.integers(0, 900, (4, 5, 6)).astype(np.int16)
    fixed = "NRRD0004\ntype: short\ndimension: 3\nsizes: 6 5 4\nendian: little\nencoding: raw\n"
    scan = read_scan(f"{fixed}{header}\n".encode() + voxels.tobytes())
    spacing, flips = NRRD_HEADERS[header]
    assert scan.spacing == (NONE3 if spacing == NONE3 else pytest.approx(spacing))
    expected = voxels[tuple(slice(None, None, flip) for flip in flips)]
    np.testing.assert_allclose(scan.array[0], percentiles(expected), atol=1e-6)


def test_list_axis_of_nrrd_holds_volumes() -> None:
    pytest.importorskip("SimpleITK")
    volumes = RNG.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)  # not colour, though they are three of 8 bits
    fixed = "NRRD0004\ntype: uchar\ndimension: 4\nsizes: 3 6 5 4\nencoding: raw\nkinds: list space space space\n"
    scan = read_scan(
        f"{fixed}space: LPS\nspace directions: none (1,0,0) (0,1,0) (0,0,1)\n\n".encode() + volumes.tobytes()
    )
    np.testing.assert_array_equal(scan.array[0], volumes[..., 0])
    assert scan.description["volumes"] == 3


def test_nifti_data_types_and_dimensions() -> None:
    four = RNG.integers(0, 900, (6, 5, 4, 3)).astype(np.float32)
    scan = read_scan(nifti_bytes(four, np.eye(4)), num_frames=2)  # volumes are read whole
    assert scan.description["volumes"] == 3
    np.testing.assert_allclose(scan.array[0], percentiles(four[::-1, ::-1, :, 0].transpose(2, 1, 0)), atol=1e-6)
    assert read_scan(nifti_bytes(MR[:, :, 0], np.eye(4))).array.shape == (1, 1, 14, 12)
    labels = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    np.testing.assert_array_equal(
        read_scan(nifti_bytes(labels, np.eye(4))).array[0], labels[::-1, ::-1].transpose(2, 1, 0)
    )
    rgb = np.zeros((6, 5, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    rgb["R"], rgb["B"] = labels, 255 - labels
    colour = read_scan(nifti_bytes(rgb, np.eye(4)))
    np.testing.assert_array_equal(colour.array[2], 255 - labels[::-1, ::-1].transpose(2, 1, 0))
    big = nib.Nifti1Image(MR, RAS, nib.Nifti1Header(endianness=">"))
    np.testing.assert_allclose(read_scan(big.to_bytes()).array, read_scan(nifti_bytes(MR, RAS)).array)
    np.testing.assert_allclose(
        read_scan(nib.Nifti2Image(MR, RAS).to_bytes()).array, read_scan(nifti_bytes(MR, RAS)).array
    )


def test_nifti_without_an_affine_uses_pixdim() -> None:
    image = nib.Nifti1Image(MR, None)
    image.header.set_zooms((2.0, 2.5, 3.0))
    scan = read_scan(image.to_bytes())
    assert scan.description["affine"] == "pixdim"
    assert scan.spacing == pytest.approx((3.0, 2.5, 2.0))


def test_gzip_members_are_concatenated() -> None:
    plain = nifti_bytes(MR, RAS)
    members = gzip.compress(plain[:900]) + gzip.compress(plain[900:])  # as bgzip writes
    np.testing.assert_array_equal(read_scan(members).array, read_scan(plain).array)


# --------------------------------------------------------------------------------------------------------------- devset


def test_devset_ct_volumes_are_oriented_as_by_nibabel(devset: Path) -> None:
    for path in sorted((devset / "ct_volumes").glob("*.nii.gz"))[:3]:
        image = nib.as_closest_canonical(nib.load(path))
        truth = np.asarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0)
        scan = read_scan(path, intensity="hounsfield")
        np.testing.assert_allclose(scan.array[0], (truth.clip(-1000, 1000) + 1000.0) / 2000, atol=1e-6)
        assert scan.spacing == pytest.approx((2.5, 3.906, 3.906), rel=1e-5)


def test_devset_images_and_clips_agree_with_pil_and_av(devset: Path) -> None:
    for path in [*sorted((devset / "xray").rglob("*.jpg"))[:5], *sorted((devset / "ultrasound").rglob("*.png"))[:5]]:
        truth = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)[:, None]
        np.testing.assert_array_equal(np.broadcast_to(read_scan(path).array, truth.shape), truth)
    path = sorted((devset / "endoscopy_clips").glob("*.mp4"))[0]
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    scan = read_scan(path, num_frames=5)
    assert np.abs(scan.array.transpose(1, 2, 3, 0).astype(int) - frames[2::4]).mean() < 1


def test_devset_npz_slabs_are_in_hounsfield_units(devset: Path) -> None:
    for path in sorted((devset / "ct").rglob("*.npz"))[:5]:
        hu = np.load(path, allow_pickle=False)["hu"]
        np.testing.assert_allclose(read_scan(path).array[0], (hu.clip(-1000, 1000) + 1000.0) / 2000, atol=1e-6)
