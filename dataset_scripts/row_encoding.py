"""How does a scan of any format become a row of a data set, with nothing in it that says whose it is?

JPEG and video keep their bytes, without their headers; everything else is read once and kept as plain voxels that need
no decoding: a picture as PNG that is not deflated, a volume or a stack of frames as NIfTI of 8 or 16 bits. The data set
compresses these columns, by zstd, several times faster to unpack than what the formats have.
`read_scan` of the row gives the scan that `read_scan` of the source gives: the same to the bit where values are whole
numbers of at most 16 bits, else to 1/65535 of the range (1/255 for colour of more than 8 bits, half a Hounsfield unit),
the range of all frames however many are asked for.
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
    PNG_SIGNATURE,
    bare_jpeg,
    bare_png,
    bare_video,
    blank_outside_regions,
    lossless_video,
    unpacked_png,
)
from modeling_m3ret.reading_m3ret import ReadLimits, StoredScan, read_scan, read_stored
from modeling_m3ret.scan_m3ret import ReadRequest, Spacing, display_name, silence_libraries, sniff


@dataclass(frozen=True, eq=False)
class Row:
    """What a scan's own file gives to a row of the schema, and what is known of it besides.

    columns: one of image, video, volume as `{"bytes", "path": None}`; shape, spacing, intensity.
    picture: `(H, W)` of the middle slice or frame, grey; digest: sha256 of the voxels, equal for equal scans in any
        lossless format; burned_in: what DICOM says of text in the pixels, yes, no or unknown; None for other formats.
    """

    columns: dict[str, Any]
    picture: np.ndarray
    digest: str
    burned_in: str | None


def store_scan(
    source: Any, *, max_size: int | None = None, blank_outside: bool = False, limits: ReadLimits = ReadLimits()
) -> Row:
    """Read one scan and give its row.

    Args:
        source: what `read_scan` takes, save a Scan.
        max_size: a slice of more than max_size x max_size pixels in area is made as small; None keeps all sizes.
        blank_outside: blank an ultrasound DICOM outside the regions that its header declares.

    Raises:
        M3RetReadError: for whatever can't be read.
    """
    request = ReadRequest(display_name(source), None, limits)
    with silence_libraries, request.translate_errors():
        file = _single_file(source)
        kind = sniff(file) if file is not None else None
        row = None
        if file is not None and kind == "video":
            row = _video_row(file, request, max_size)
        elif file is not None and kind == "image":
            row = _picture_row(file, request, max_size)
        if row is not None:
            return row
        stored = read_stored(source, limits=limits)
        if blank_outside and str(stored.description.get("format", "")).startswith("dicom"):
            stored = replace(stored, array=blank_outside_regions(stored.array, *_headers(source)))
        if max_size is not None:
            stored = _smaller(stored, max_size)
        return _array_row(stored)


def _single_file(source: Any) -> bytes | Path | None:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, (str, Path)) and Path(source).is_file():
        return Path(source)
    return None


# --------------------------------------------------------------------------------------------------- kept as they are


def _fits(height: int, width: int, max_size: int | None) -> bool:
    return max_size is None or height * width <= max_size**2


def _picture_row(file: bytes | Path, request: ReadRequest, max_size: int | None) -> Row | None:
    """A JPEG or PNG of one upright picture, its compressed pixels as they are; None for all else."""
    from PIL import Image

    data = request.read_bytes(file) if isinstance(file, Path) else file
    if not data.startswith((b"\xff\xd8", PNG_SIGNATURE)):
        return None
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        width, height = image.size
        request.check_pixels(height, width)  # before EXIF, for which a PNG is decoded
        if not _fits(height, width, max_size) or (image.format == "PNG" and getattr(image, "n_frames", 1) > 1):
            return None
        request.check_size((height, width), 4)
        if image.getexif().get(0x0112, 1) != 1:
            return None
    try:
        bare = bare_jpeg(data) if data[:2] == b"\xff\xd8" else unpacked_png(bare_png(data))
    except ValueError:  # a broken file, or one that Pillow forgives
        return None
    return _row("image", bare, read_stored({"bytes": bare, "path": request.name}, limits=request.limits))


def _video_row(file: bytes | Path, request: ReadRequest, max_size: int | None) -> Row | None:
    """The stream as it is, in a new container, if its frames come out of it as they were; else losslessly anew.
    None where it is larger than `max_size`."""
    before = read_scan(file, num_frames=3, limits=request.limits)
    height, width = before.array.shape[2:]
    if not _fits(height, width, max_size):
        return None
    try:
        data = bare_video(file)
        after = read_scan(data, num_frames=3, limits=request.limits)
        same = after.description["frames_total"] == before.description["frames_total"]
        same = same and np.array_equal(after.array, before.array)
    except Exception:  # whatever muxers and FFmpeg raise: there is another way
        same = False
    if not same:
        whole = read_scan(file, limits=request.limits)
        frames = np.broadcast_to(whole.array, (3, *whole.array.shape[1:])).transpose(1, 2, 3, 0)
        data = lossless_video(frames, float(whole.description.get("fps", 25)))
    shape = [int(before.description["frames_total"]), height, width]
    columns = {"video": {"bytes": data, "path": None}, "shape": shape, "spacing": [None] * 3, "intensity": "8-bit"}
    return Row(columns, _grey(before.array), hashlib.sha256(data).hexdigest(), None)


# ------------------------------------------------------------------------------------------------------- written anew


def _array_row(stored: StoredScan) -> Row:
    array = stored.array
    if array.shape[1] == 1 and array.dtype != np.int16:
        return _row("image", png_bytes(array[:, 0]), stored)
    depth = {"sagittal": 0, "coronal": 1}.get(str(stored.description.get("plane")), 2)
    return _row("volume", nifti_bytes(array, stored.spacing, depth), stored)


def _row(media: str, data: bytes, stored: StoredScan) -> Row:
    columns = {
        media: {"bytes": data, "path": None},
        "shape": list(stored.array.shape[1:]),
        "spacing": list(stored.spacing),
        "intensity": stored.intensity,
    }
    digest = hashlib.sha256(f"{stored.array.shape} {stored.array.dtype} {stored.intensity}".encode())
    digest.update(stored.array.data)
    return Row(columns, _grey(stored.array), digest.hexdigest(), _burned_in(stored))


def _burned_in(stored: StoredScan) -> str | None:
    found = stored.description.get("burned_in_annotation")
    return None if found is None else str(found)


def _grey(array: np.ndarray) -> np.ndarray:
    return array[:, array.shape[1] // 2].astype(np.float32).mean(0)


def png_bytes(pixels: np.ndarray) -> bytes:
    """`(1 or 3, H, W)` uint8, or `(1, H, W)` uint16, as PNG, not deflated: it decodes in half of the
    time, and the data set's column, which is compressed, becomes smaller."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(
        stream, format="PNG", compress_level=0
    )
    return stream.getvalue()


def nifti_bytes(array: np.ndarray, spacing: Spacing, depth: int = 2) -> bytes:
    """`(1 or 3, D, H, W)` in the orientation of `read_scan` as one uncompressed NIfTI file, its text fields empty.

    depth: the axis of the body that D runs along: 0 sagittal, 1 coronal, 2 axial slices. Millimetres that are unknown
    stand as 1: the row's spacing knows better.
    """
    from nibabel import Nifti1Header, Nifti2Header

    C, D, H, W = array.shape
    known = [mm for mm in spacing if mm is not None]
    mm = [float(value) for value in known] if len(known) == 3 else [1.0] * 3
    order = {2: (2, 1, 0), 1: (1, 2, 0), 0: (0, 2, 1)}[depth]  # the body's axis of D, H and W, as in `canonical`
    towards = (-1.0, -1.0, 1.0 if depth == 2 else -1.0)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, axis in enumerate((2, 1, 0)):  # the file's i, j, k are W, H, D
        affine[order[axis], column] = towards[order[axis]] * mm[axis]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array([W, H, D]) - 1) / 2)
    first = max(D, H, W) < 2**15  # NIfTI-1 counts in 16 bits
    header = Nifti1Header() if first else Nifti2Header()
    header.set_data_dtype(np.dtype([(colour, "u1") for colour in "RGB"]) if C == 3 else array.dtype)
    header.set_data_shape((W, H, D))
    header.set_zooms(mm[::-1])
    header.set_sform(affine, code=1)
    header.set_xyzt_units("mm")
    header["magic"], header["vox_offset"] = (b"n+1", 352) if first else (b"n+2", 544)
    voxels = array[0] if C == 1 else array.transpose(1, 2, 3, 0)
    return header.binaryblock + b"\0" * 4 + voxels.tobytes()


# ------------------------------------------------------------------------------------------------------------- changed


def _headers(source: Any) -> list[Any]:
    """The data sets of a DICOM source, without their pixels."""
    from pydicom import dcmread

    if hasattr(source, "group_dataset"):
        return [source]
    if isinstance(source, dict):  # a row, or a file in it
        keys = ("bytes", "path", "image", "video", "volume")
        return _headers(next(source[key] for key in keys if source.get(key) is not None))
    if isinstance(source, (list, tuple)):
        return [header for one in source for header in _headers(one)]
    if isinstance(source, (bytes, bytearray, memoryview)):
        return [dcmread(io.BytesIO(bytes(source)), stop_before_pixels=True, force=True)]
    if Path(source).is_dir():
        files = (path for path in sorted(Path(source).rglob("*")) if path.is_file())
        return _headers([path for path in files if sniff(path) == "dicom"])
    return [dcmread(source, stop_before_pixels=True, force=True)]


def _smaller(stored: StoredScan, max_size: int) -> StoredScan:
    """Slices of no more than max_size^2 pixels, averaged down as the processor does; spacing grows with it."""
    import torch

    C, D, H, W = stored.array.shape
    shrink = max_size / math.sqrt(H * W)
    if shrink >= 1:
        return stored
    height, width = max(1, round(H * shrink)), max(1, round(W * shrink))
    limits = np.iinfo(stored.array.dtype)
    smaller = np.empty((C, D, height, width), stored.array.dtype)
    for index in range(D):  # one slice at a time: float32 of all would be twice the volume
        values = torch.from_numpy(stored.array[:, index].astype(np.float32))[None]
        resized = torch.nn.functional.interpolate(values, (height, width), mode="bilinear", antialias=True)[0]
        smaller[:, index] = np.rint(resized.numpy()).clip(limits.min, limits.max).astype(stored.array.dtype)
    through, down, across = stored.spacing
    spacing = (through, down and down * H / height, across and across * W / width)
    return StoredScan(smaller, stored.intensity, spacing, stored.description)
