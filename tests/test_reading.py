"""Images, arrays and NIfTI are read as the arrays that were written."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scan_files import nifti_bytes, reorient

from modeling_m3ret.reading_m3ret import M3RetReadError, Scan, read_scan


RNG = np.random.default_rng(7)
GREY = RNG.integers(0, 256, (12, 9), dtype=np.uint8)
RGB = RNG.integers(0, 256, (12, 9, 3), dtype=np.uint8)
NONE3 = (None, None, None)


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


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_constant_scan_is_zeros_and_marked(dtype: Any) -> None:
    scan = read_scan(np.full((5, 8, 8), 77, dtype))
    assert scan.description["constant"] is True
    assert not scan.array.any()
    assert "constant" not in read_scan(GREY).description


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


# ---------------------------------------------------------------------------------------------------- rows and the rest


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

MR = RNG.integers(0, 3000, (12, 14, 10)).astype(np.int16)
RAS = np.diag([1.0, 1.25, 1.4, 1.0])
RAS[:3, 3] = [-20, 30, 5]


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
