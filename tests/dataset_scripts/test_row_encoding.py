"""A row gives the scan of its source for every format, and other libraries can read its media."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import nibabel as nib
import numpy as np
import pytest
from file_parts import add_palette, chunk, encode, region
from PIL import Image
from pydicom.config import IGNORE
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless
from scan_files import CINE, CT, dicom, dicom_bytes, nifti_bytes, reorient, series
from test_reading_limits import BAD, png_claiming
from test_reading_video import MATRICES, with_edits, with_matrix
from test_reading_video import clip as coloured_clip

from dataset_scripts.row_encoding import EncodedScan, encode_scan
from modeling_m3ret.reading_m3ret import M3RetReadError, ReadLimits, read_scan


RNG = np.random.default_rng(23)
GREY = RNG.integers(0, 256, (31, 45), dtype=np.uint8)
RGB = RNG.integers(0, 256, (31, 45, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 60_000, (31, 45), dtype=np.uint16)
SMOOTH = np.stack([np.add.outer(np.arange(31), np.arange(45)) * k for k in (1, 2, 3)], axis=2).astype(np.uint8)
FRAMES = RNG.integers(0, 256, (11, 16, 13), dtype=np.uint8)
VOLUME = RNG.integers(0, 2500, (14, 12, 10)).astype(np.int16)
HU = RNG.integers(-1000, 1500, (14, 12, 10)).astype(np.int16)
AFFINE = np.diag([0.8, 0.9, 1.2, 1.0])
AFFINE[:3, 3] = [-40, 25, -300]
ROTATION = np.eye(4)
ROTATION[:3, :3] = nib.quaternions.quat2mat([0.97, 0.15, 0.12, 0.1])
STEP = 1 / 65535  # of stored floats
HALF_HU = 0.5 / 2000 + 1e-6


# --------------------------------------------------------------------------------------------------- files of all kinds


def jpeg(mode: str = "RGB", **options: Any) -> bytes:
    return encode(Image.fromarray(SMOOTH).convert(mode), "JPEG", quality=90, **options)


def jpeg_with_stray_bytes() -> bytes:
    """Insert bytes between two segments, which libjpeg skips with a warning."""
    data = jpeg()
    position = data.index(b"\xff\xdb")
    return data[:position] + b"\0\0\0" + data[position:]


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def png(array: np.ndarray, **options: Any) -> bytes:
    return encode(Image.fromarray(array), "PNG", **options)


def png_by_hand(pixels: np.ndarray, colour: int, interlaced: bool = False) -> bytes:
    """Encode what Pillow cannot write: Adam7 interlacing, and colour of 16 bits."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b""
    for top, left, down, across in passes if interlaced else [(0, 0, 1, 1)]:
        subset = pixels[top::down, left::across]
        rows += b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in subset if subset.shape[1])
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, colour, 0, 0, int(interlaced))
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def pages(arrays: np.ndarray, kind: str, **options: Any) -> bytes:
    images = [Image.fromarray(array) for array in arrays]
    return encode(images[0], kind, save_all=True, append_images=images[1:], **options)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def clip(kind: str, codec: str, height: int = 48, width: int = 64, frames: int = 20, **options: str) -> bytes:
    """Encode a moving texture below a grey level that identifies the frame."""
    stream, texture = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    with av.open(stream, "w", format=kind) as container:
        video = container.add_stream(codec, rate=10, options={"threads": "1", **options})
        video.height, video.width, video.bit_rate = height, width, 4_000_000
        video.pix_fmt = {"mjpeg": "yuvj420p", "rawvideo": "bgr24"}.get(codec, "yuv420p")
        for index in range(frames):
            picture = np.roll(texture, index, axis=1)
            picture[: height // 2] = 10 * index
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()


def rle_cine() -> bytes:
    ds = dicom(RNG.integers(0, 256, (9, 16, 12, 3), dtype=np.uint8), sop=CINE)
    ds.compress(RLELossless)
    return dicom_bytes(ds)


def padded_constant() -> Dataset:
    pixels = np.full((12, 10), 1064, np.uint16)
    pixels[:3] = 0
    return dicom(pixels, sop=CT, RescaleSlope=1, RescaleIntercept=-1024, PixelPaddingValue=0)


def hounsfield_series(**elements: Any) -> list[Dataset]:
    stored = (HU + 1024).astype(np.uint16)
    return series(stored, AFFINE, sop=CT, **({"RescaleSlope": 1, "RescaleIntercept": -1024} | elements))


def without_positions(slices: list[Dataset]) -> list[Dataset]:
    for ds in slices:
        del ds.ImagePositionPatient
    return slices


def patched(data: bytes, offset: int, values: bytes) -> bytes:
    return data[:offset] + values + data[offset + len(values) :]


def rgb_nifti() -> bytes:
    voxels = np.zeros((6, 5, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    for name in "RGB":
        voxels[name] = RNG.integers(0, 256, (6, 5, 4))
    return nifti_bytes(voxels, AFFINE)


def qform_nifti() -> bytes:
    image = nib.Nifti1Image(VOLUME, None)
    image.set_qform(ROTATION @ AFFINE, 1)
    image.set_sform(None, 0)
    return image.to_bytes()


def nifti_without_affine(volume: np.ndarray) -> bytes:
    """Set a singular sform."""
    return patched(nifti_bytes(volume, np.eye(4), sform_code=1), 280, b"\0" * 48)


TWELVE: dict[str, Any] = {"BitsStored": 12, "HighBit": 11}
PLANE = RNG.integers(0, 4096, (31, 45), dtype=np.uint16)
ROTATED = ("90 clockwise", "180", "mirrored")
WINDOW = TWELVE | {"WindowCenter": 1200, "WindowWidth": 900}
# name -> (function that returns the source, tolerance of values in [0, 1]; 0: equal bit for bit)
KINDS: dict[str, tuple[Callable[[], Any], float]] = {
    "jpeg grey": (lambda: jpeg("L"), 0),
    "jpeg rgb": (jpeg, 0),
    "jpeg cmyk": (lambda: jpeg("CMYK"), 0),
    "jpeg progressive": (lambda: jpeg(progressive=True), 0),
    "jpeg optimised 4:4:4": (lambda: jpeg(optimize=True, subsampling=0), 0),
    "jpeg restarts": (lambda: jpeg(restart_marker_blocks=1), 0),
    "jpeg stored as rgb": (lambda: jpeg(keep_rgb=True), 0),
    "jpeg rotated by exif": (lambda: jpeg(exif=rotated()), 0),
    "jpeg with stray bytes": (jpeg_with_stray_bytes, 0),
    "mpo": (lambda: pages(np.stack([SMOOTH, SMOOTH[::-1]]), "MPO"), 0),
    "png grey": (lambda: png(GREY), 0),
    "png rgb": (lambda: png(RGB), 0),
    "png grey as rgb": (lambda: png(np.repeat(GREY[..., None], 3, axis=2)), 0),
    "png 16-bit": (lambda: png(DEEP), 0),
    "png 16-bit rgb": (lambda: png_by_hand(RNG.integers(0, 65536, (9, 7, 3), dtype=np.uint16), 2), 0),
    "png palette": (lambda: encode(Image.fromarray(RGB).quantize(64), "PNG"), 0),
    "png transparent palette": (lambda: encode(Image.fromarray(RGB).quantize(64), "PNG", transparency=3), 0),
    "png rgba": (lambda: png(np.dstack([RGB, GREY])), 0),
    "png la": (lambda: encode(Image.fromarray(np.dstack([RGB, GREY])).convert("LA"), "PNG"), 0),
    "png 1-bit": (lambda: encode(Image.fromarray(GREY).convert("1"), "PNG"), 0),
    "png rotated by exif": (lambda: png(GREY, exif=rotated()), 0),
    "png interlaced": (lambda: png_by_hand(GREY, 0, interlaced=True), 0),
    "png without its end": (lambda: png(GREY)[:-12], 0),
    "png of one value": (lambda: png(np.full_like(GREY, 77)), 0),
    "apng": (lambda: pages(FRAMES, "PNG"), 0),
    "tiff": (lambda: encode(Image.fromarray(RGB), "TIFF"), 0),
    "tiff of 16-bit pages": (lambda: pages(RNG.integers(0, 60_000, (7, 16, 13), dtype=np.uint16), "TIFF"), 0),
    "tiff of int32": (lambda: encode(Image.fromarray(GREY.astype(np.int32) - 50), "TIFF"), 0),
    "tiff of hu": (lambda: encode(Image.fromarray(HU[:, :, 0].astype(np.int32)), "TIFF"), 0),
    "tiff of float": (lambda: encode(Image.fromarray(GREY.astype(np.float32) / 7), "TIFF"), STEP),
    "bmp": (lambda: encode(Image.fromarray(RGB), "BMP"), 0),
    "webp": (lambda: encode(Image.fromarray(SMOOTH), "WEBP"), 0),
    "webp of frames": (lambda: pages(np.repeat(FRAMES[..., None], 3, axis=3), "WEBP", lossless=True), 0),
    "gif": (lambda: pages(FRAMES, "GIF"), 0),
    "gif in colour": (lambda: pages(RNG.integers(0, 256, (5, 9, 7, 3), dtype=np.uint8), "GIF"), 0),
    "npy clip": (lambda: npy(FRAMES), 0),
    "npy rgb clip": (lambda: npy(np.stack([RGB, RGB[::-1], RGB[:, ::-1]])), 0),
    "npy clip longer than NIfTI-1 counts": (lambda: npy(RNG.integers(0, 256, (33_000, 2, 5), dtype=np.uint8)), 0),
    "npy mask": (lambda: npy(GREY > 100), 0),
    "npy in [0, 1]": (lambda: npy(RNG.random((5, 9, 7), dtype=np.float32)), STEP),
    "npy of float": (lambda: npy(RNG.normal(size=(5, 9, 7)) * 300), STEP),
    "npy of whole float": (lambda: npy(VOLUME.astype(np.float64)), 0),
    "npy wider than 16 bits": (lambda: npy(VOLUME.astype(np.int32) * 1000), STEP),
    "npz hu": (lambda: npz(hu=HU[:6].clip(-100, 300)), 0),
    "npz hu of 8 bits": (lambda: npz(hu=FRAMES), 0),
    "npz hu plane": (lambda: npz(hu=HU[0]), 0),
    "npz imgs": (lambda: npz(imgs=VOLUME, spacing=np.ones(3)), 0),
    "array of one value": (lambda: np.full((5, 8, 8), 77, np.int16), 0),
    "bool array": (lambda: GREY > 50, 0),
    "pil image": (lambda: Image.fromarray(RGB), 0),
    "dicom 8-bit": (lambda: dicom_bytes(dicom(GREY)), 0),
    "dicom 8-bit rgb": (lambda: dicom_bytes(dicom(RGB, PixelSpacing=[0.3, 0.7])), 0),
    "dicom 8-bit inverted": (lambda: dicom_bytes(dicom(GREY, PhotometricInterpretation="MONOCHROME1")), 0),
    "dicom 8-bit padded": (lambda: dicom_bytes(dicom(GREY, PixelPaddingValue=200, PixelPaddingRangeLimit=255)), 0),
    "dicom 8-bit windowed": (lambda: dicom_bytes(dicom(GREY, WindowCenter=99, WindowWidth=55)), STEP),
    "dicom 7-bit": (lambda: dicom_bytes(dicom(GREY // 2, BitsStored=7, HighBit=6)), 0),
    "dicom 12-bit": (lambda: dicom_bytes(dicom(PLANE, ImagerPixelSpacing=[0.1, 0.2], **TWELVE)), 0),
    "dicom 12-bit windowed": (lambda: dicom_bytes(dicom(PLANE, **WINDOW)), STEP),
    "dicom 12-bit inverted": (lambda: dicom(PLANE, PhotometricInterpretation="MONOCHROME1", **TWELVE), STEP),
    "dicom inverted, windowed": (lambda: dicom(PLANE, PhotometricInterpretation="MONOCHROME1", **WINDOW), STEP),
    "dicom signed": (lambda: dicom_bytes(dicom(VOLUME[:, :, 0] - np.int16(900))), 0),
    "dicom 16-bit rgb": (lambda: dicom(RNG.integers(0, 65536, (8, 9, 3), dtype=np.uint16)), 1 / 255),
    "dicom hu": (lambda: hounsfield_series()[3], 0),
    "dicom hu, in tenths": (lambda: hounsfield_series(RescaleSlope=0.9, RescaleIntercept=-999.7)[3], HALF_HU),
    "dicom hu padded": (lambda: hounsfield_series(PixelPaddingValue=24, PixelPaddingRangeLimit=60)[3], 0),
    "dicom hu of one value, padded": (padded_constant, 0),
    "dicom padded": (lambda: dicom(VOLUME[:, :, 0], PixelPaddingValue=0, PixelPaddingRangeLimit=300), STEP),
    "dicom rescaled": (lambda: dicom(PLANE, RescaleSlope=0.37, RescaleIntercept=5, **TWELVE), STEP),
    "dicom palette": (lambda: dicom_bytes(add_palette(dicom(GREY), segmented=False)), 0),
    "dicom segmented palette": (lambda: dicom_bytes(add_palette(dicom(GREY), segmented=True)), 0),
    "cine": (lambda: dicom_bytes(dicom(FRAMES, sop=CINE, PixelSpacing=[0.2, 0.3])), 0),
    "cine rgb": (lambda: dicom_bytes(dicom(RNG.integers(0, 256, (9, 16, 12, 3), dtype=np.uint8), sop=CINE)), 0),
    "cine rle": (rle_cine, 0),
    "cine windowed": (lambda: dicom(np.stack([PLANE] * 3 + [PLANE // 2] * 4), sop=CINE, **WINDOW), STEP),
    "cine 16-bit": (lambda: dicom(RNG.integers(0, 3000, (7, 9, 8)).astype(np.int16), sop=CINE), 0),
    "series axial": (lambda: series(*reorient(VOLUME, AFFINE, "LPS")), 0),
    "series read along another axis": (lambda: series(*reorient(VOLUME, AFFINE, "PIR")), 0),
    "series sagittal": (lambda: series(*reorient(VOLUME, np.diag([5.0, 0.9, 0.8, 1.0]), "PIR")), 0),
    "series coronal": (lambda: series(*reorient(VOLUME, np.diag([0.9, 4.5, 0.8, 1.0]), "LIP")), 0),
    "series oblique": (lambda: series(*reorient(VOLUME, ROTATION @ AFFINE, "LPS")), 0),
    "series oblique sagittal": (lambda: series(*reorient(VOLUME, ROTATION @ np.diag([6.0, 0.9, 0.8, 1.0]), "PIR")), 0),
    "series oblique coronal": (lambda: series(*reorient(VOLUME, ROTATION @ np.diag([0.9, 6, 0.8, 1.0]), "LIP")), 0),
    "series of ratio 1.5": (lambda: series(*reorient(VOLUME, np.diag([1.05, 0.7, 0.7, 1.0]), "PIR")), 0),
    "series of ratio 1.5, coronal": (lambda: series(*reorient(VOLUME, np.diag([0.6, 0.9, 0.6, 1.0]), "LIP")), 0),
    "series just above 1.5": (lambda: series(*reorient(VOLUME, np.diag([1.051, 0.7, 0.7, 1.0]), "PIR")), 0),
    "series of one slice": (lambda: series(VOLUME, AFFINE)[:1], 0),
    "series 8-bit": (lambda: series(VOLUME.astype(np.uint8), AFFINE), 0),
    "series hu": (hounsfield_series, 0),
    "series mr rescaled": (lambda: series(VOLUME, AFFINE, RescaleSlope=1.7183, RescaleIntercept=0.5), STEP),
    "series mr padded": (lambda: series(VOLUME, AFFINE, PixelPaddingValue=0, PixelPaddingRangeLimit=200), STEP),
    "series without positions": (lambda: without_positions(series(VOLUME, AFFINE)), 0),
    "series hu without positions": (lambda: without_positions(hounsfield_series()), 0),
    "nifti int16": (lambda: nifti_bytes(VOLUME, AFFINE), 0),
    "nifti hu, gzipped": (lambda: nifti_bytes(HU, AFFINE, zipped=True), 0),
    "nifti uint8": (lambda: nifti_bytes(VOLUME.astype(np.uint8), AFFINE), 0),
    "nifti uint16": (lambda: nifti_bytes((VOLUME.astype(np.int32) * 25).astype(np.uint16), AFFINE), 0),
    "nifti int32": (lambda: nifti_bytes(VOLUME.astype(np.int32), AFFINE), 0),
    "nifti float32": (lambda: nifti_bytes(VOLUME.astype(np.float32) / 7, AFFINE), STEP),
    "nifti float64": (lambda: nifti_bytes(VOLUME / 7, AFFINE), STEP),
    "nifti float in [0, 1]": (lambda: nifti_bytes(VOLUME / 2500, AFFINE), STEP),
    "nifti rgb": (rgb_nifti, 0),
    "nifti scaled": (lambda: patched(nifti_bytes(VOLUME, AFFINE), 112, struct.pack("<ff", 0.37, 12)), STEP),
    "nifti scaled by 2": (lambda: patched(nifti_bytes(VOLUME, AFFINE), 112, struct.pack("<ff", 2, -7)), 0),
    "nifti scaled to hu": (
        lambda: patched(nifti_bytes((HU + 1024).astype(np.uint16), AFFINE), 112, struct.pack("<ff", 1, -1024)),
        0,
    ),
    "nifti 4d": (lambda: nifti_bytes(np.stack([VOLUME, VOLUME // 2], axis=3), AFFINE), 0),
    "nifti plane": (lambda: nifti_bytes(VOLUME[:, :, :1], AFFINE), 0),
    "nifti sagittal plane": (lambda: nifti_bytes(VOLUME[:1], AFFINE), 0),
    "nifti row": (lambda: nifti_bytes(VOLUME[:, :1, :1], AFFINE), 0),
    "nifti sagittal": (lambda: nifti_bytes(*reorient(VOLUME, np.diag([5.0, 1, 1, 1]), "LSP")), 0),
    "nifti coronal": (lambda: nifti_bytes(*reorient(HU, np.diag([1.0, 4, 1, 1]), "RSA")), 0),
    "nifti qform only": (qform_nifti, 0),
    "nifti pixdim only": (lambda: nib.Nifti1Image(VOLUME, None).to_bytes(), 0),
    "nifti without affine": (lambda: nifti_without_affine(VOLUME), 0),
    "nifti hu without affine": (lambda: nifti_without_affine(HU), 0),
    "nifti scaled to hu, without affine": (
        lambda: patched(nifti_without_affine((HU + 1024).astype(np.uint16)), 112, struct.pack("<ff", 1, -1024)),
        0,
    ),
    "nifti in micrometres": (lambda: nifti_bytes(VOLUME, AFFINE, xyzt_units=3), 0),
    "nifti 2": (lambda: nib.Nifti2Image(VOLUME, AFFINE).to_bytes(), 0),
    "nifti big-endian": (lambda: nib.Nifti1Image(VOLUME, AFFINE, nib.Nifti1Header(endianness=">")).to_bytes(), 0),
    "mp4 h264 with b-frames": (lambda: clip("mp4", "libx264", bf="3", g="6"), 0),
    "mp4 h265": (lambda: clip("mp4", "libx265", **{"x265-params": "log-level=0:pools=1"}), 0),
    "mp4 mpeg4 with b-frames": (lambda: clip("mp4", "mpeg4", bf="2"), 0),
    "mp4 of one frame": (lambda: clip("mp4", "libx264", frames=1), 0),
    "avi mpeg4": (lambda: clip("avi", "mpeg4"), 0),
    "avi mpeg4 with b-frames": (lambda: clip("avi", "mpeg4", bf="2", g="6"), 0),
    "avi mpeg4 of odd size": (lambda: clip("avi", "mpeg4", 47, 63), 0),
    "avi h264": (lambda: clip("avi", "libx264"), 0),
    "avi mjpeg": (lambda: clip("avi", "mjpeg", 47, 63), 0),
    "avi raw": (lambda: clip("avi", "rawvideo"), 0),
    "wmv": (lambda: clip("asf", "wmv2"), 0),
    "mpeg 2": (lambda: clip("mpeg", "mpeg2video"), 0),
    "transport stream": (lambda: clip("mpegts", "libx264", bf="2"), 0),
    "mkv vp9": (lambda: clip("matroska", "libvpx-vp9", 47, 63, cpu_used="8"), 0),
    "mkv ffv1": (lambda: clip("matroska", "ffv1"), 0),
    "webm vp8": (lambda: clip("webm", "libvpx"), 0),
    **{f"mp4 {name}": (lambda m=MATRICES[name]: with_matrix(clip("mp4", "libx264"), m), 0) for name in ROTATED},
    "mp4 with an edit list": (lambda: with_edits(clip("mp4", "libx264", bf="2", g="30"), (1500, 5)), 0),
    "mp4 of pixels that are not square": (lambda: coloured_clip(sample_aspect_ratio=Fraction(4, 3)), 0),
    "mkv ffv1 of 16-bit grey": (lambda: coloured_clip("matroska", "ffv1", pixels="gray16le"), 0),
}
# scaled by percentiles of all frames, not of the requested ones
SCALED_AS_A_WHOLE = ("npy of float", "npy wider than 16 bits")
VIDEOS = [*KINDS][[*KINDS].index("mp4 h264 with b-frames") : [*KINDS].index("webm vp8") + 1]


def media(row: EncodedScan) -> bytes:
    (given,) = (row.columns[key] for key in ("image", "video", "volume") if row.columns.get(key) is not None)
    assert given["path"] is None
    return given["bytes"]


@pytest.mark.parametrize("kind", KINDS)
def test_row_gives_the_scan_of_its_source(kind: str) -> None:
    make, tolerance = KINDS[kind]
    source = make()
    row = encode_scan(source)
    for num_frames in (None,) if kind in SCALED_AS_A_WHOLE else (None, 1, 3):
        expected, got = (read_scan(given, num_frames=num_frames) for given in (source, row.columns))
        assert got.array.shape == expected.array.shape
        assert got.spacing == expected.spacing
        assert got.array.dtype == (np.uint8 if tolerance == 1 / 255 else expected.array.dtype)
        if tolerance == 0:
            np.testing.assert_array_equal(got.array, expected.array)
        else:
            values = got.array / 255 if got.array.dtype == np.uint8 else got.array
            np.testing.assert_allclose(values, expected.array, rtol=0, atol=tolerance)
        if "plane" in expected.description and got.array.shape[1] > 1:
            assert got.description["plane"] == expected.description["plane"]
        assert got.description.get("constant") == expected.description.get("constant")
    assert row.columns["shape"] == [*read_scan(source).array.shape[1:]]
    assert row.columns["spacing"] == [*read_scan(source).spacing]
    assert row.picture.shape == (*row.columns["shape"][1:],)
    assert set(row.columns) == {"shape", "spacing", "intensity", *({"image", "video", "volume"} & set(row.columns))}
    again = encode_scan(source)
    assert (again.digest, media(again)) == (row.digest, media(row))


def test_row_can_be_encoded_again() -> None:
    for make in (lambda: jpeg(), lambda: dicom_bytes(dicom(PLANE, **WINDOW)), hounsfield_series):
        row = encode_scan(make())
        again = encode_scan(row.columns)
        np.testing.assert_array_equal(read_scan(again.columns).array, read_scan(row.columns).array)
        assert again.columns["spacing"] == row.columns["spacing"]


def test_path_and_bytes_give_the_same_row(tmp_path: Path) -> None:
    for name, data in (("a.jpg", jpeg()), ("b.dcm", dicom_bytes(dicom(GREY))), ("c.mp4", clip("mp4", "libx264"))):
        (tmp_path / name).write_bytes(data)
        by_path, by_name, by_bytes = (encode_scan(source) for source in (tmp_path / name, str(tmp_path / name), data))
        assert by_path.columns == by_name.columns == by_bytes.columns
        assert by_path.digest == by_bytes.digest


def test_folder_is_read_as_one_series(tmp_path: Path) -> None:
    slices = series(VOLUME, AFFINE)
    for index, ds in enumerate(slices):
        (tmp_path / f"{index}.dcm").write_bytes(dicom_bytes(ds))
    assert encode_scan(tmp_path).columns == encode_scan(slices).columns


# --------------------------------------------------------------------------------------------------- columns and digest


@pytest.mark.parametrize(
    ("kind", "column", "intensity"),
    [
        ("jpeg rgb", "image", "8-bit"),
        ("png 16-bit", "image", "percentiles"),
        ("apng", "volume", "8-bit"),
        ("dicom 8-bit rgb", "image", "8-bit"),
        ("dicom 12-bit", "image", "percentiles"),
        ("dicom 12-bit windowed", "image", "full range"),
        ("dicom hu", "volume", "hounsfield"),
        ("cine rgb", "volume", "8-bit"),
        ("series hu", "volume", "hounsfield"),
        ("series mr rescaled", "volume", "full range"),
        ("nifti int16", "volume", "percentiles"),
        ("avi mjpeg", "video", "8-bit"),
        ("wmv", "video", "8-bit"),
    ],
)
def test_media_column_and_intensity_of_a_source(kind: str, column: str, intensity: str) -> None:
    row = encode_scan(KINDS[kind][0]())
    assert column in row.columns
    assert row.columns["intensity"] == intensity


@pytest.mark.parametrize("kind", ["avi mpeg4", "avi mjpeg", "mp4 h264 with b-frames", "webm vp8", "mkv vp9"])
def test_copied_stream_is_no_larger_than_its_source(kind: str) -> None:
    source = KINDS[kind][0]()
    assert len(media(encode_scan(source))) < 1.1 * len(source)


def test_digest_is_equal_for_equal_voxels_only() -> None:
    lossless = [png(GREY), dicom_bytes(dicom(GREY)), dicom_bytes(dicom(GREY, PixelSpacing=[2, 3])), npy(GREY)]
    lossless += [encode(Image.fromarray(GREY), "TIFF"), png(np.repeat(GREY[..., None], 3, axis=2))]
    assert len({encode_scan(source).digest for source in lossless}) == 1
    deep = [png(PLANE), dicom_bytes(dicom(PLANE, **TWELVE)), npy(PLANE)]
    assert len({encode_scan(source).digest for source in deep}) == 1
    volumes = [nifti_bytes(*reorient(VOLUME, AFFINE, codes)) for codes in ("RAS", "PIR", "LPS")]
    assert len({encode_scan(source).digest for source in (*volumes, series(VOLUME, AFFINE))}) == 1
    other = GREY.copy()
    other[3, 4] ^= 1
    different = [png(GREY), png(other), png(GREY.T), npy(GREY[None].repeat(2, 0)), deep[0], volumes[0], HU, VOLUME]
    assert len({encode_scan(source).digest for source in different}) == len(different)


def test_burned_in_is_read_from_dicom() -> None:
    for declared, expected in (("YES", "yes"), ("NO", "no"), ("Dr. Who", "unknown"), (None, "unknown")):
        ds = dicom(GREY)
        if declared:
            ds.add(DataElement(0x00280301, "CS", declared, validation_mode=IGNORE))
        assert encode_scan(ds).burned_in == expected
    assert encode_scan(png(GREY)).burned_in is None


# ----------------------------------------------------------------------------------------- reading with other libraries


@pytest.mark.parametrize(
    ("affine", "codes", "expected"),
    [
        (AFFINE, "RAS", "LPS"),
        (AFFINE, "PIR", "LPS"),
        (ROTATION @ AFFINE, "LPS", "LPS"),
        (np.diag([5.0, 0.9, 0.8, 1.0]), "RAS", "PIL"),
        (np.diag([0.9, 5.0, 0.8, 1.0]), "IRP", "LIP"),
    ],
)
@pytest.mark.parametrize("values", [HU, VOLUME.astype(np.uint8)], ids=["hu", "uint8"])
def test_nibabel_reads_the_same_anatomy(affine: np.ndarray, codes: str, expected: str, values: np.ndarray) -> None:
    source = nib.Nifti1Image(*reorient(values, affine, codes))
    row = encode_scan(source.to_bytes())
    image = nib.Nifti1Image.from_bytes(media(row))
    assert "".join(nib.aff2axcodes(image.affine)) == expected
    assert image.get_data_dtype() == values.dtype
    ours, reference = nib.as_closest_canonical(image), nib.as_closest_canonical(source)
    np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(reference.dataobj))
    np.testing.assert_allclose(ours.header.get_zooms(), reference.header.get_zooms(), rtol=1e-6)
    np.testing.assert_allclose(image.header.get_zooms()[::-1], row.columns["spacing"], rtol=1e-6)
    assert image.header.get_xyzt_units()[0] == "mm"
    texts = ("descrip", "aux_file", "intent_name", "db_name", "data_type")
    assert [image.header[key].item() for key in texts] == [b""] * 5
    assert not image.header.extensions
    # the volume is centred on the origin
    centre = image.affine @ [*(np.array(image.shape) - 1) / 2, 1]
    np.testing.assert_allclose(centre[:3], 0, atol=1e-4)


def test_nibabel_reads_colour_and_long_clips() -> None:
    image = nib.Nifti1Image.from_bytes(media(encode_scan(dicom(RGB[None].repeat(3, 0), sop=CINE))))
    voxels = np.asarray(image.dataobj)[..., 1].T
    np.testing.assert_array_equal(np.stack([voxels[name] for name in "RGB"], axis=2), RGB)
    long = RNG.integers(0, 256, (33_000, 2, 5), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(nib.Nifti2Image.from_bytes(media(encode_scan(long))).dataobj).T, long)


@pytest.mark.parametrize(
    ("source", "pixels"), [(dicom(GREY), GREY), (dicom(RGB), RGB), (dicom(PLANE, **TWELVE), PLANE), (npy(RGB), RGB)]
)
def test_pillow_reads_the_same_pixels(source: Any, pixels: np.ndarray) -> None:
    with Image.open(io.BytesIO(media(encode_scan(source)))) as image:
        assert image.format == "PNG"
        assert not image.info
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("kind", ["mp4 h264 with b-frames", "avi mpeg4", "avi mjpeg", "webm vp8", "mkv ffv1", "mpeg 2"])
def test_av_reads_the_same_frames(kind: str) -> None:
    source = KINDS[kind][0]()
    frames = []
    for data in (source, media(encode_scan(source))):
        with av.open(io.BytesIO(data)) as container:
            assert len(container.streams) == 1
            rate = float(container.streams.video[0].average_rate)
            frames.append([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert rate == pytest.approx(10, rel=0.02)
    np.testing.assert_array_equal(*frames)


@pytest.mark.slow
@pytest.mark.parametrize("kind", VIDEOS)
def test_requested_frames_are_the_centres_of_equal_segments(kind: str) -> None:
    source = KINDS[kind][0]()
    total = encode_scan(source).columns["shape"][0]
    assert total == (1 if kind == "mp4 of one frame" else 20)
    for count in (1, 2, 3, 7, 12):
        indices = [(2 * i + 1) * total // (2 * min(count, total)) for i in range(min(count, total))]
        for given in (source, encode_scan(source).columns):
            levels = read_scan(given, num_frames=count).array[:, :, :16].mean((0, 2, 3))
            np.testing.assert_allclose(levels, 10 * np.array(indices), atol=4)


# ------------------------------------------------------------------------------------------------------------- max_size


@pytest.mark.parametrize(("shape", "max_size"), [((100, 80), 16), ((31, 222), 40), ((400, 50), 70)])
def test_max_size_limits_the_area_and_preserves_the_aspect_ratio(shape: tuple[int, int], max_size: int) -> None:
    source = dicom(RNG.integers(0, 4096, shape, dtype=np.uint16), PixelSpacing=[0.5, 0.25], **TWELVE)
    row = encode_scan(source, max_size=max_size)
    _, height, width = row.columns["shape"]
    shrink = max_size / np.sqrt(shape[0] * shape[1])
    assert abs(height - shape[0] * shrink) <= 0.5
    assert abs(width - shape[1] * shrink) <= 0.5
    depth, down, across = row.columns["spacing"]
    assert depth is None
    assert (down * height, across * width) == pytest.approx((0.5 * shape[0], 0.25 * shape[1]))  # the same size in mm
    assert read_scan(row.columns).array.shape == (1, 1, height, width)


def test_max_size_averages() -> None:
    blocks = RNG.integers(-900, 900, (4, 5, 6)).astype(np.int16)
    row = encode_scan(nifti_bytes(blocks.repeat(8, 0).repeat(8, 1), np.diag([-1.0, -1, 3, 1])), max_size=20)
    assert row.columns["shape"][0] == 6
    mean = float(np.asarray(nib.Nifti1Image.from_bytes(media(row)).dataobj).mean())
    assert mean == pytest.approx(blocks.mean(), abs=40)
    whole = encode_scan(np.full((64, 64), 90, np.uint8) + np.tri(64, dtype=np.uint8), max_size=16)
    with Image.open(io.BytesIO(media(whole))) as image:
        assert set(np.unique(np.asarray(image))) <= {90, 91}


@pytest.mark.parametrize("kind", ["jpeg rgb", "png 16-bit", "mp4 h264 with b-frames", "series hu", "cine rgb"])
def test_max_size_does_not_change_smaller_scans(kind: str) -> None:
    source = KINDS[kind][0]()
    height, width = encode_scan(source).columns["shape"][1:]
    fits = int(np.ceil(np.sqrt(height * width)))
    assert encode_scan(source, max_size=fits).columns == encode_scan(source).columns
    assert encode_scan(source, max_size=10_000).columns == encode_scan(source).columns


@pytest.mark.parametrize("kind", ["jpeg rgb", "jpeg rotated by exif", "png palette", "mp4 h264 with b-frames", "gif"])
def test_max_size_applies_to_compressed_files_too(kind: str) -> None:
    source = KINDS[kind][0]()
    small, whole = read_scan(encode_scan(source, max_size=8).columns), read_scan(source)
    assert small.array.shape[:2] == whole.array.shape[:2]
    assert small.array.shape[2] * small.array.shape[3] <= 72
    np.testing.assert_allclose(small.array.mean(), whole.array.mean(), atol=4)


# --------------------------------------------------------------------------------------------------- outside of regions


def test_every_form_of_source_is_blanked_outside_its_regions(tmp_path: Path) -> None:
    frames = RNG.integers(1, 256, (5, 16, 12), dtype=np.uint8)
    ds = dicom(frames, sop=CINE, SequenceOfUltrasoundRegions=[region(2, 3, 7, 10)])
    data = dicom_bytes(ds)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "IM1").write_bytes(data)
    path = tmp_path / "alone" / "IM1"
    expected = np.full_like(frames, frames.min())
    expected[:, 3:11, 2:8] = frames[:, 3:11, 2:8]
    row = {"image": {"bytes": data, "path": None}}
    for source in (ds, data, path, str(path), [path], [data], path.parent, {"bytes": data}, {"path": path}, row):
        blanked = read_scan(encode_scan(source, blank_outside=True).columns)
        np.testing.assert_array_equal(blanked.array[0], expected)
        np.testing.assert_array_equal(read_scan(encode_scan(source).columns).array[0], frames)


def test_slices_with_different_regions_retain_the_intersection() -> None:
    frames = RNG.integers(1, 256, (3, 16, 12), dtype=np.uint8)
    slices = [dicom(frame, InstanceNumber=index) for index, frame in enumerate(frames)]
    slices[0].SequenceOfUltrasoundRegions = [region(2, 3, 7, 10)]
    slices[2].SequenceOfUltrasoundRegions = [region(0, 5, 6, 15)]
    got = read_scan(encode_scan(slices, blank_outside=True).columns).array[0]
    np.testing.assert_array_equal(got[:, 5:11, 2:7], frames[:, 5:11, 2:7])
    assert (got != frames.min()).sum() <= 3 * 6 * 5


def test_blanking_does_not_change_scans_without_valid_regions() -> None:
    empty = dicom(GREY, sop=CINE, SequenceOfUltrasoundRegions=[region(None, None, None, None), Dataset()])
    zipped = nifti_bytes(VOLUME, AFFINE, zipped=True)
    for source in (png(GREY), dicom(GREY), series(VOLUME, AFFINE), npy(FRAMES), zipped, dicom_bytes(empty)):
        assert encode_scan(source, blank_outside=True).columns == encode_scan(source).columns


# ---------------------------------------------------------------------------------------------------------- bad sources


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("bomb") else name for name in BAD]
)
def test_bad_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    data = BAD[name]
    path = tmp_path / name
    path.write_bytes(data() if callable(data) else data)
    for options in ({}, {"max_size": 16, "blank_outside": True}):
        with pytest.raises(M3RetReadError) as caught:
            encode_scan(path, **options)  # type: ignore[arg-type]
        assert caught.value.file == name
    with pytest.raises(M3RetReadError):
        encode_scan(path.read_bytes())


@pytest.mark.parametrize("source", ["absent.dcm", "a\0b.png", [], None, 3.5, {"image": None}, np.zeros(5)])
def test_bad_source_is_refused(source: Any) -> None:
    with pytest.raises(M3RetReadError):
        encode_scan(source, blank_outside=True)


@pytest.mark.parametrize("fraction", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["jpeg rgb", "jpeg progressive", "png rgb", "dicom 12-bit", "gif", "nifti rgb"])
def test_truncated_file_is_refused_or_encoded_as_it_is_read(kind: str, fraction: float) -> None:
    source = KINDS[kind][0]()
    cut = source[: int(len(source) * fraction)]
    try:
        expected = read_scan(cut)
    except M3RetReadError:
        with pytest.raises(M3RetReadError):
            encode_scan(cut)
    else:
        np.testing.assert_array_equal(read_scan(encode_scan(cut).columns).array, expected.array)
        assert kind == "gif" or fraction > 0.9


def test_size_is_checked_before_pixels_are_decoded() -> None:
    with pytest.raises(M3RetReadError) as caught:
        encode_scan(png_claiming(10_000, 10_000))
    assert "10000 x 10000 pixels" in caught.value.got  # decoding would fail with another error
    for limits in (ReadLimits(max_pixels_per_image=1000), ReadLimits(max_decoded_bytes=1000)):
        for source in (png(GREY), jpeg(), dicom(GREY), clip("mp4", "mpeg4")):
            encode_scan(source)
            with pytest.raises(M3RetReadError):
                encode_scan(source, limits=limits)
