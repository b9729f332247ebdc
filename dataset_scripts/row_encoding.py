"""Encode a scan of any format as a row of the dataset, without anything that could identify a patient.

JPEG and video retain their compressed bytes, without metadata. Everything else is read once and stored as plain voxels:
a picture as an uncompressed PNG, a volume or a stack of frames as NIfTI of 8 or 16 bits. Parquet compresses these
columns with zstd, which decodes several times faster than the compression of those formats.

`read_scan` of the row returns the same scan as `read_scan` of the source: bit for bit if values are integers of at most
16 bits, otherwise to 1/65535 of the range of all frames (1/255 for colour of more than 8 bits, 0.5 Hounsfield units).
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataset_scripts.deidentification import (
    blank_outside_regions,
    encode_lossless_video,
    strip_jpeg_metadata,
    strip_video_metadata,
)
from modeling_m3ret.reading_m3ret import ReadLimits, StoredScan, read_scan, read_stored
from modeling_m3ret.scan_m3ret import ReadRequest, Spacing, display_name, silence_libraries, sniff


@dataclass(frozen=True, eq=False)
class EncodedScan:
    """The columns of a row that come from the scan itself, and what duplicate detection and the report need."""

    columns: dict[str, Any]  # one of image, video, volume as {"bytes": ..., "path": None}; shape, spacing, intensity
    picture: np.ndarray  # (H, W) float32, the grey values of the middle slice or frame
    digest: str  # SHA-256 of the voxels; equal scans in lossless formats have equal digests
    burned_in: str | None  # whether DICOM declares text in the pixels: "yes", "no", "unknown"; None for other formats


def encode_scan(
    source: Any, max_size: int | None = None, blank_outside: bool = False, *, limits: ReadLimits = ReadLimits()
) -> EncodedScan:
    """Read one scan and encode it.

    Args:
        source: any input of `read_scan` except a `Scan`.
        max_size: slices or frames of more than max_size**2 pixels are reduced to that area; None keeps all sizes.
        blank_outside: blank an ultrasound DICOM outside the regions that its header declares.
        limits: limits on the decoded size.

    Raises:
        M3RetReadError: if the source cannot be read.
    """
    request = ReadRequest(display_name(source), None, limits)
    with silence_libraries, request.translate_errors():
        if (file := _single_file(source)) is not None:
            encode_copy = {"video": _encode_video, "image": _copy_jpeg}.get(sniff(file) or "")
            if encode_copy and (encoded := encode_copy(file, request, max_size)):
                return encoded
        stored = read_stored(source, limits=limits)
        if blank_outside and str(stored.description.get("format", "")).startswith("dicom"):
            stored = replace(stored, array=blank_outside_regions(stored.array, *_dicom_headers(source)))
        if max_size is not None:
            stored = _downscale(stored, max_size)
        return _encode_array(stored)


def _single_file(source: Any) -> bytes | Path | None:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, (str, Path)) and Path(source).is_file():
        return Path(source)
    return None


def _fits(height: int, width: int, max_size: int | None) -> bool:
    return max_size is None or height * width <= max_size**2


def _copy_jpeg(file: bytes | Path, request: ReadRequest, max_size: int | None) -> EncodedScan | None:
    """Copy the compressed pixels of an upright JPEG; return None for any other image."""
    from PIL import Image

    data = request.read_bytes(file) if isinstance(file, Path) else file
    if not data.startswith(b"\xff\xd8"):
        return None
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        width, height = image.size
        request.check_pixels(height, width)
        request.check_size((height, width), 4)
        if not _fits(height, width, max_size) or image.getexif().get(0x0112, 1) != 1:
            return None
    try:
        stripped = strip_jpeg_metadata(data)
    except ValueError:  # damaged, though Pillow may still decode it
        return None
    return _encoded("image", stripped, read_stored({"bytes": stripped, "path": request.name}, limits=request.limits))


def _encode_video(file: bytes | Path, request: ReadRequest, max_size: int | None) -> EncodedScan | None:
    """Copy the stream, or encode its frames losslessly if the copy decodes to different ones.

    Returns None if the frames are too large or deeper than 8 bits, and are stored as a volume.
    """
    before = read_scan(file, num_frames=3, limits=request.limits)
    height, width = before.array.shape[2:]
    if before.array.dtype != np.uint8 or not _fits(height, width, max_size):  # deep grey is stored as a volume
        return None
    try:
        data = strip_video_metadata(file)
        after = read_scan(data, num_frames=3, limits=request.limits)
        same = after.description["frames_total"] == before.description["frames_total"]
        same = same and np.array_equal(after.array, before.array)
    except Exception:  # FFmpeg and its muxers raise many types
        same = False
    if not same:
        whole = read_scan(file, limits=request.limits)
        frames = np.broadcast_to(whole.array, (3, *whole.array.shape[1:])).transpose(1, 2, 3, 0)
        data = encode_lossless_video(frames, float(whole.description.get("fps", 25)))
    shape = [int(before.description["frames_total"]), height, width]
    spacing = list(before.spacing)
    columns = {"video": {"bytes": data, "path": None}, "shape": shape, "spacing": spacing, "intensity": "8-bit"}
    return EncodedScan(columns, middle_slice(before.array), hashlib.sha256(data).hexdigest(), None)


def _encode_array(stored: StoredScan) -> EncodedScan:
    array = stored.array
    if array.shape[1] == 1 and array.dtype != np.int16:
        return _encoded("image", encode_png(array[:, 0]), stored)
    slice_axis = {"sagittal": 0, "coronal": 1}.get(str(stored.description.get("plane")), 2)
    return _encoded("volume", encode_nifti(array, stored.spacing, slice_axis), stored)


def _encoded(column: str, data: bytes, stored: StoredScan) -> EncodedScan:
    columns = {
        column: {"bytes": data, "path": None},
        "shape": list(stored.array.shape[1:]),
        "spacing": list(stored.spacing),
        "intensity": stored.intensity,
    }
    digest = hashlib.sha256(f"{stored.array.shape} {stored.array.dtype} {stored.intensity}".encode())
    digest.update(stored.array.data)
    burned_in: Any = stored.description.get("burned_in_annotation")
    return EncodedScan(columns, middle_slice(stored.array), digest.hexdigest(), burned_in)


def middle_slice(array: np.ndarray) -> np.ndarray:
    """Return the grey values of the middle slice: `(C, D, H, W)` to `(H, W)` float32."""
    return array[:, array.shape[1] // 2].astype(np.float32).mean(0)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode a picture as PNG without compression, which halves the decoding time; Parquet compresses it instead.

    Args:
        pixels: `(1 or 3, H, W)` uint8, or `(1, H, W)` uint16.
    """
    from PIL import Image

    stream = io.BytesIO()
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    image.save(stream, format="PNG", compress_level=0)
    return stream.getvalue()


def encode_nifti(array: np.ndarray, spacing: Spacing, slice_axis: int = 2) -> bytes:
    """Encode a volume as one uncompressed NIfTI file with empty text fields, centred on the origin.

    Args:
        array: `(1 or 3, D, H, W)` in the orientation of `read_scan`.
        spacing: mm along D, H, W. Unknown values are written as 1; the `spacing` column of the row has the nulls.
        slice_axis: body axis of D: 0 for sagittal, 1 for coronal, 2 for axial slices.
    """
    from nibabel import Nifti1Header, Nifti2Header

    C, D, H, W = array.shape
    known = [float(mm) for mm in spacing if mm is not None]
    mm = known if len(known) == 3 else [1.0] * 3
    axes = {2: (2, 1, 0), 1: (1, 2, 0), 0: (0, 2, 1)}[slice_axis]  # body axis of D, H and W, as in `canonical`
    signs = (-1.0, -1.0, 1.0 if slice_axis == 2 else -1.0)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, axis in enumerate((2, 1, 0)):  # i, j, k of the file are W, H, D
        affine[axes[axis], column] = signs[axes[axis]] * mm[axis]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array([W, H, D]) - 1) / 2)
    is_nifti_1 = max(D, H, W) < 2**15  # NIfTI-1 stores the shape as int16
    header = Nifti1Header() if is_nifti_1 else Nifti2Header()
    header.set_data_dtype(np.dtype([(colour, "u1") for colour in "RGB"]) if C == 3 else array.dtype)
    header.set_data_shape((W, H, D))
    header.set_zooms(mm[::-1])
    header.set_sform(affine, code=1)
    header.set_xyzt_units("mm")
    header["magic"], header["vox_offset"] = (b"n+1", 352) if is_nifti_1 else (b"n+2", 544)
    voxels = array[0] if C == 1 else array.transpose(1, 2, 3, 0)
    return header.binaryblock + b"\0" * 4 + voxels.tobytes()


def _dicom_headers(source: Any) -> list[Any]:
    """Return the headers of a DICOM source, without pixel data."""
    from pydicom import dcmread

    if hasattr(source, "group_dataset"):
        return [source]
    if isinstance(source, dict):  # a row, or one of its files
        keys = ("bytes", "path", "image", "video", "volume")
        return _dicom_headers(next(source[key] for key in keys if source.get(key) is not None))
    if isinstance(source, (list, tuple)):
        return [header for one in source for header in _dicom_headers(one)]
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(bytes(source))
    elif Path(source).is_dir():
        files = (path for path in sorted(Path(source).rglob("*")) if path.is_file())
        return _dicom_headers([path for path in files if sniff(path) == "dicom"])
    return [dcmread(source, stop_before_pixels=True, force=True)]


def _downscale(stored: StoredScan, max_size: int) -> StoredScan:
    """Resize slices of more than max_size**2 pixels to that area, with antialiasing as in the processor."""
    import torch

    C, D, H, W = stored.array.shape
    scale = max_size / math.sqrt(H * W)
    if scale >= 1:
        return stored
    height, width = max(1, round(H * scale)), max(1, round(W * scale))
    limits = np.iinfo(stored.array.dtype)
    downscaled = np.empty((C, D, height, width), stored.array.dtype)
    for index in range(D):  # by slices: float32 of the whole volume would take at least twice its memory
        values = torch.from_numpy(stored.array[:, index].astype(np.float32))[None]
        resized = torch.nn.functional.interpolate(values, (height, width), mode="bilinear", antialias=True)[0]
        downscaled[:, index] = np.rint(resized.numpy()).clip(limits.min, limits.max).astype(stored.array.dtype)
    depth, row, column = stored.spacing
    spacing = (depth, row and row * H / height, column and column * W / width)
    return StoredScan(downscaled, stored.intensity, spacing, stored.description)
