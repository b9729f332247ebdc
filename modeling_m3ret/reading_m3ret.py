"""Read a medical scan in any supported format into one array in [0, 1] with its voxel spacing.

`read_scan` detects what a source is. Images and NumPy arrays are read here, other formats in `reading_dicom_m3ret`,
`reading_video_m3ret` and `reading_volume_m3ret`; `scan_m3ret` and `intensity_m3ret` bring all of them to one
orientation and one intensity scale. Files are not trusted: sizes are checked before memory is allocated, nothing is
unpickled, and every failure is an `M3RetReadError`. This file travels inside every checkpoint and imports only NumPy;
decoders are imported when a format needs them.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .intensity_m3ret import INTENSITIES, blend_over_black, bytes_per_voxel, looks_like_hounsfield, to_unit_range
from .reading_dicom_m3ret import read_folder, read_series
from .reading_video_m3ret import read_video
from .reading_volume_m3ret import read_nifti
from .scan_m3ret import (
    AnyScan,
    Description,
    M3RetReadError,
    ReadLimits,
    ReadRequest,
    Scan,
    Spacing,
    StoredScan,
    display_name,
    silence_libraries,
    sniff,
)


__all__ = ["M3RetReadError", "ReadLimits", "Scan", "StoredScan", "read_scan", "read_stored"]

IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
FORMATS = "DICOM, NIfTI, PNG, JPEG, TIFF, BMP, WebP, GIF, video, .npy or .npz"
NPZ_KEYS = ("hu", "image", "volume", "imgs")  # "hu" declares Hounsfield units; "imgs" is MedSAM's key
VOXEL_TYPES = "bool, integer or floating-point voxels"
EXIF_ORIENTATION = 0x0112


def read_scan(source: Any, *, num_frames: int | None = None, limits: ReadLimits = ReadLimits()) -> Scan:
    """Read one scan from a file or an object in memory.

    Volumes are returned in the order of an axial DICOM slice (LPS): axial slices, D from inferior to superior, H from
    anterior to posterior, W from the patient's right to left. If one axis is more than 1.5 times coarser than both
    others, slices are taken along it: coronal (D anterior to posterior, H superior to inferior, W right to left) or
    sagittal (D right to left, H superior to inferior, W anterior to posterior). Arrays, images and single DICOM images
    keep their orientation.

    Args:
        source: one of
            - the path or bytes of a file: DICOM, NIfTI (`.nii`, `.nii.gz`), PNG, JPEG, TIFF, BMP, WebP, GIF, `.npy`,
              `.npz` or video. The format is detected from the content, not from the name;
            - a folder or a list of files that make up one DICOM series;
            - a PIL image;
            - a NumPy array or torch tensor `(H, W)`, `(H, W, C)`, `(D, H, W)` or `(D, H, W, C)` with C = 1, 3 or 4;
            - a row of a `datasets` dataset with exactly one of the columns image, video, volume. The columns
              intensity and spacing, if present, override what its file declares (see `data/schema.py`);
            - a `Scan`, which is returned unchanged.
        num_frames: maximum number of frames, taken from the centres of equal segments, of sources whose depth has no
            spacing in mm (video, cine, GIF, arrays that are not in HU). Volumes are always read whole. None reads all
            frames.

    Raises:
        M3RetReadError: if the source cannot be read.
        ValueError: if `num_frames` is less than 1.
    """
    # A checkpoint's copy of this code has a class `Scan` of its own, so the name is compared as well.
    if isinstance(source, Scan) or type(source).__name__ == "Scan":
        return source
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames is out of range: expected None or at least 1, got {num_frames}.")
    request = ReadRequest(display_name(source), num_frames, limits)
    with silence_libraries, request.translate_errors():
        scan = _read(source, request)
        assert isinstance(scan, Scan)
        return scan


def read_stored(source: Any, *, limits: ReadLimits = ReadLimits()) -> StoredScan:
    """Read one scan as a dataset stores it: all frames, with the values that the file declares, in 8 or 16 bits.

    Sources and errors are those of `read_scan`, except that a `Scan` cannot be stored. Integers of at most 16 bits are
    stored exactly. Hounsfield units are rounded to integers; other values are scaled to [0, 1] and stored in steps of
    1/65535.
    """
    request = ReadRequest(display_name(source), None, limits, return_stored=True)
    with silence_libraries, request.translate_errors():
        stored = _read(source, request)
        assert isinstance(stored, StoredScan)
        return stored


def _read(source: Any, request: ReadRequest) -> AnyScan:
    if isinstance(source, dict):
        return _read_row(source, request)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read_file(bytes(source), request)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            return read_folder(path, request)
        if not path.is_file():
            raise request.error("not_found", "an existing file or folder", "a path that does not exist")
        return _read_file(path, request)
    if isinstance(source, (list, tuple)):
        return read_series(list(source), request, {})
    if hasattr(source, "group_dataset"):  # a pydicom Dataset
        return read_series([source], request, {})
    if hasattr(source, "getbands"):  # a PIL image
        return _read_image(source, request)
    if hasattr(source, "detach"):  # a torch tensor; NumPy has no bfloat16
        source = source.detach().cpu()
        source = source.float() if str(source.dtype) == "torch.bfloat16" else source
    if hasattr(source, "__array__"):
        return _read_array(np.asarray(source), request, {"format": "array"})
    expected = "a path, bytes, image, array, DICOM series or dataset row"
    raise request.error("unsupported", expected, f"an object of type {type(source).__name__}")


def _read_row(row: dict[str, Any], request: ReadRequest) -> AnyScan:
    """Read a dataset row, or the `{"bytes", "path"}` cell of one."""
    if "bytes" in row or "path" in row:
        for key in ("bytes", "path"):
            if row.get(key) is not None:
                return _read(row[key], request)
        raise request.error("unsupported", "bytes or a path", "null for both")
    media = [key for key in ("image", "video", "volume") if row.get(key) is not None]
    if len(media) != 1:
        expected = "a row with exactly one of image, video, volume"
        raise request.error("unsupported", expected, f"a row with {len(media)} of them")
    intensity = row.get("intensity")
    if intensity not in (None, *INTENSITIES):
        raise request.error("unsupported", f"the intensity null, {', '.join(INTENSITIES)}", "another value")
    return _read(row[media[0]], replace(request, intensity=intensity, spacing=_declared_spacing(row, request)))


def _declared_spacing(row: dict[str, Any], request: ReadRequest) -> Spacing | None:
    """Return the spacing of a row: None without the column, and three times None if the column is null."""
    if "spacing" not in row:
        return None
    mm = (None, None, None) if row["spacing"] is None else tuple(row["spacing"])
    if len(mm) != 3:
        raise request.error("unsupported", "a spacing of 3 numbers, along D, H, W", f"{len(mm)} numbers")
    return tuple(None if value is None else float(value) for value in mm)  # type: ignore[return-value]


def _read_file(file: bytes | Path, request: ReadRequest) -> AnyScan:
    """Read a file from its path or its content."""
    kind = sniff(file)
    if kind == "video":
        return read_video(file, request)
    data = request.read_bytes(file) if isinstance(file, Path) else file
    if kind == "dicom":
        return read_series([data], request, {})
    if kind == "nifti":
        return read_nifti(data, request)
    if kind == "npy":
        return _read_array(_load_npy(io.BytesIO(data), request), request, {"format": "npy"})
    if kind == "npz":
        return _read_npz(data, request)
    if kind == "image":
        with request.import_decoder("PIL.Image", "pillow").open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            return _read_image(image, request)
    if not data:
        raise request.error("damaged", FORMATS, "an empty file")
    is_text = all(byte in b"\t\n\r\f\x1b" or 32 <= byte < 127 or byte > 160 for byte in data[:512])
    got = "text" if is_text else "content of an unknown type"
    raise request.error("unsupported", FORMATS, got, "Convert the file to one of these formats.")


def _read_array(array: np.ndarray, request: ReadRequest, description: Description, hu: bool = False) -> AnyScan:
    """Read `(H, W)`, `(H, W, C)`, `(D, H, W)` or `(D, H, W, C)`. A last axis of 1, 3 or 4 is colour, never a width."""
    if array.dtype.kind not in "biuf":
        raise request.error("unsupported", VOXEL_TYPES, f"an array of type {array.dtype}")
    if array.ndim not in (2, 3, 4) or (array.ndim == 4 and array.shape[-1] not in (1, 3, 4)):
        expected = "(H, W), (H, W, C), (D, H, W) or (D, H, W, C) with C = 1, 3 or 4"
        raise request.error("unsupported", expected, f"an array of shape {array.shape}")
    request.check_size(array.shape, bytes_per_voxel(array.dtype))
    if array.ndim == 2 or array.shape[-1] not in (1, 3, 4):
        array = array[..., None]
    if array.shape[-1] == 4:
        array = blend_over_black(array)
    if array.ndim == 3:
        array = array[None]
    array = array.transpose(3, 0, 1, 2)
    hu = hu or looks_like_hounsfield(array)
    if array.shape[1] > 1 and not hu:  # may be a clip, whereas values in HU are a volume
        indices = request.select_frames(array.shape[1], description)
        array = array if len(indices) == array.shape[1] else array[:, indices]
    return to_unit_range(array, (None, None, None), request, description, hu=hu)


def _load_npy(stream: Any, request: ReadRequest) -> np.ndarray:
    """Load a `.npy` stream after checking its header. Object arrays are refused, as they would be unpickled."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    read_header = headers.get(np.lib.format.read_magic(stream))
    if read_header is None:
        raise request.error("unsupported", ".npy version 1 or 2", "a version for structured types")
    shape, fortran, dtype = read_header(stream)
    if dtype.kind not in "biuf":
        raise request.error("unsupported", VOXEL_TYPES, f"an array of type {dtype}")
    request.check_size(shape, bytes_per_voxel(dtype))
    size = math.prod(shape) * dtype.itemsize
    data = stream.read(size)
    if len(data) < size:
        raise request.error("damaged", f"{size:,} bytes of voxels", f"{len(data):,}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _read_npz(data: bytes, request: ReadRequest) -> AnyScan:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename[:-4]: info for info in archive.infolist() if info.filename.endswith(".npy")}
        key = next((key for key in NPZ_KEYS if key in members), next(iter(members)) if len(members) == 1 else None)
        if key is None:
            expected = f"one array, or one of the keys {', '.join(NPZ_KEYS)}"
            raise request.error("unsupported", expected, f"a zip archive with {len(members)} arrays")
        request.check_size((members[key].file_size,), 1)
        request.check_ratio(members[key].file_size, members[key].compress_size)
        with archive.open(members[key]) as stream:
            array = _load_npy(stream, request)
    return _read_array(array, request, {"format": "npz"}, hu=key == "hu")


def _read_image(image: Any, request: ReadRequest) -> AnyScan:
    """Read a PIL image that is not loaded yet, but whose header is. Pages and animation frames become depth."""
    description: Description = {"format": (image.format or "image").lower()}
    width, height = image.size
    request.check_pixels(height, width)
    # the further frames of a camera's MPO are previews
    total = 1 if description["format"] in ("jpeg", "mpo") else getattr(image, "n_frames", 1)
    indices = request.select_frames(total, description) if total > 1 else [0]
    request.check_size((len(indices), height, width), 4)
    frames = []
    for index in indices:
        if total > 1:
            image.seek(index)
            if image.size != (width, height):
                raise request.error("unsupported", "pages of one size", "pages of several sizes")
        frames.append(_image_pixels(image, request))
    if len({frame.ndim for frame in frames}) > 1:  # an animation with grey and colour frames
        frames = [np.repeat(frame[..., None], 3, axis=2) if frame.ndim == 2 else frame for frame in frames]
    array = frames[0][None] if len(frames) == 1 else np.stack(frames)
    array = array[None] if array.ndim == 3 else array.transpose(3, 0, 1, 2)
    return to_unit_range(array, (None, None, None), request, description)


def _image_pixels(image: Any, request: ReadRequest) -> np.ndarray:
    """Return `(H, W)` at the bit depth of the image or `(H, W, 3)` uint8, with EXIF rotation and alpha applied."""
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = request.import_decoder("PIL.ImageOps", "pillow").exif_transpose(image)
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode in ("L", "F") or image.mode[0] == "I":  # "I", "I;16" and its byte orders
        return np.asarray(image)
    if "A" in image.getbands() or "a" in image.getbands() or (image.mode == "P" and "transparency" in image.info):
        return blend_over_black(np.asarray(image.convert("RGBA")))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # palette, CMYK, YCbCr, LAB, HSV
