"""Read a medical scan in any supported format into one array in [0, 1] with its voxel spacing.

`read_scan` detects what a source is. NumPy arrays and archives are read here, other formats in `reading_image_m3ret`,
`reading_dicom_m3ret`, `reading_video_m3ret` and `reading_volume_m3ret`; `scan_m3ret` and `intensity_m3ret` bring all of
them to one orientation and one intensity scale. Files are not trusted: sizes are checked before memory is allocated,
nothing is unpickled, and every failure is an `M3RetReadError`. This file is copied into every checkpoint and imports
only NumPy; decoders are imported when a format needs them.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from contextlib import closing
from dataclasses import replace
from numbers import Integral
from pathlib import Path, PurePath, PurePosixPath
from textwrap import shorten
from typing import Any

import numpy as np

from .intensity_m3ret import INTENSITIES, blend_over_black, bytes_per_voxel, to_unit_range
from .reading_dicom_m3ret import read_folder, read_series
from .reading_image_m3ret import read_encoded_image, read_image
from .reading_video_m3ret import read_video
from .reading_volume_m3ret import VOLUME_READERS, gunzip, read_nifti
from .scan_m3ret import (
    HEAD_BYTES,
    MEDIA_COLUMNS,
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
    unsupported_format,
)


__all__ = ["M3RetReadError", "ReadLimits", "Scan", "StoredScan", "read_scan", "read_stored"]

FORMATS = (  # in messages and on the search page
    "DICOM, NIfTI, NRRD, MetaImage, MGH, MINC, PNG, JPEG, JPEG 2000, TIFF, BMP, WebP, GIF, AVIF, HEIC, HEIF, video, "
    ".npy or .npz"
)
NPZ_KEYS = ("hu", "image", "volume", "imgs")  # "hu" declares Hounsfield units; "imgs" is MedSAM's key
VOXEL_TYPES = "bool, integer or floating-point voxels"
CHANNEL_FORMATS = (None, "channels_first", "channels_last")
PIECE_BYTES = 2**20
ZIP_ENTRY = b"PK\1\2"  # signature of an entry in the directory of a zip archive
ZIP_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard"}  # that are refused
ENTRIES_PER_FILE = 4  # most entries of a zip archive per scan file: folders, resource forks, sidecars
URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


def read_scan(
    source: Any,
    *,
    num_frames: int | None = None,
    limits: ReadLimits = ReadLimits(),
    intensity: str | None = None,
    input_data_format: str | None = None,
    series: str | int | None = None,
    min_pixels: int | None = None,
) -> Scan:
    """Read one scan from a file or an object in memory.

    Volumes are returned in the order of an axial DICOM slice (LPS): axial slices, D from inferior to superior, H from
    anterior to posterior, W from the patient's right to left. If one axis is more than 1.5 times coarser than both
    others, slices are taken along it: coronal (D anterior to posterior, H superior to inferior, W right to left) or
    sagittal (D right to left, H superior to inferior, W anterior to posterior). Arrays, images and single DICOM images
    keep their orientation.

    Args:
        source: one of
            - the path or bytes of a file: DICOM, NIfTI, NRRD, MetaImage, MGH or MGZ, MINC, PNG, JPEG, JPEG 2000, TIFF,
              BMP, WebP, GIF, AVIF, HEIF, `.npy`, `.npz` or video. The format is detected from the content, not from the
              name. Any of them may be compressed with gzip. A zip archive may hold one file or one DICOM series;
            - a binary file object, which is read from its start and left at its position. One that cannot seek is read
              from its position;
            - a folder or a list of files that make up one DICOM series;
            - a PIL image, a nibabel image, a SimpleITK image, or a video decoder of torchcodec;
            - a NumPy array or torch tensor `(H, W)`, `(H, W, C)`, `(D, H, W)` or `(D, H, W, C)` with C = 1, 3 or 4;
            - a row of a `datasets` dataset with exactly one of the columns image, video, volume, nifti. The columns
              intensity and spacing, if present, override what its file declares (see `data/schema.py`);
            - a `Scan`, which is returned unchanged.
        num_frames: maximum number of frames, taken from the centres of equal segments, of sources whose depth has no
            spacing in mm (video, cine, GIF, arrays that are not in HU). Volumes are always read whole. None reads all
            frames.
        intensity: how values map to [0, 1], for files that do not declare it: "hounsfield", "percentiles", "8-bit" or
            "full range", see `INTENSITIES`. Overrides the file, but not the column of a row. Undeclared values are
            never taken for Hounsfield units.
        input_data_format: of arrays, "channels_first" for `(C, H, W)` or `(D, C, H, W)`, "channels_last" for the shapes
            above. Without it, an array `(3, H, W)` is refused, as its first axis may be colours or slices.
        series: which series to read of a folder or list with several DICOM series: its SeriesInstanceUID, its index in
            the order of SeriesNumber (then UID), or "largest" for the one with the most frames. None refuses several.
            Ignored for other formats.
        min_pixels: number of pixels that suffices, such as 224 * 224. A JPEG is decoded at 1/2, 1/4 or 1/8 of its
            height and width if it still has that many, which takes a fraction of the time. None decodes all pixels.

    Raises:
        M3RetReadError: if the source cannot be read.
        ValueError: if an argument is not one of its values, or `num_frames` is less than 1.
    """
    # A checkpoint's copy of this code has a class `Scan` of its own, so the name is compared as well.
    if isinstance(source, Scan) or type(source).__name__ == "Scan":
        return source
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames is out of range: expected None or at least 1, got {num_frames}.")
    if intensity not in (None, *INTENSITIES):
        raise ValueError(f"unknown intensity: expected None or one of {', '.join(INTENSITIES)}, got {intensity!r}.")
    if input_data_format not in CHANNEL_FORMATS:
        raise ValueError(f"unknown input_data_format: expected one of {CHANNEL_FORMATS}, got {input_data_format!r}.")
    if series is not None and (isinstance(series, bool) or not isinstance(series, (str, Integral))):
        raise ValueError(f"series is invalid: expected a UID, an index or 'largest', got {type(series).__name__}.")
    request = ReadRequest(
        display_name(source),
        num_frames,
        limits,
        intensity=intensity,
        input_data_format=input_data_format,
        series=int(series) if isinstance(series, Integral) else series,
        min_pixels=min_pixels,
    )
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
    if isinstance(source, (str, os.PathLike)) and not _is_open_file(source):
        path = Path(source)
        if path.is_dir():
            return read_folder(path, request)
        if not path.is_file():
            url = URL.match(str(source))
            advice = "URLs are not fetched: download the file and pass its path." if url else ""
            got = "a URL" if url else "a path that does not exist"
            raise request.error("not_found", "an existing file or folder", got, advice)
        return _read_file(path, replace(request, open_sibling=lambda name: _read_sibling(path, name, request)))
    if isinstance(source, (list, tuple)):
        files = [_read_stream(item, request) if _is_open_file(item) else item for item in source]
        return read_series(files, request, {})
    if hasattr(source, "group_dataset"):  # a pydicom Dataset
        return read_series([source], request, {})
    if hasattr(source, "getbands"):  # a PIL image
        return read_image(source, replace(request, min_pixels=None))  # the caller's image must not be changed
    if hasattr(source, "dataobj"):  # a nibabel image
        return _read_nibabel(source, request)
    if hasattr(source, "GetNumberOfComponentsPerPixel"):  # a SimpleITK image
        return _read_simpleitk(source, request)
    if hasattr(source, "get_frames_at"):  # a decoder of torchcodec, as `datasets` gives for a Video column
        indices = request.select_frames(len(source), description := {"format": "video"})
        frames = source.get_frames_at(indices=[int(index) for index in indices]).data
        channels_first = replace(request, input_data_format="channels_first", num_frames=None)
        return _read_array(frames.cpu().numpy(), channels_first, description)
    if _is_open_file(source):
        return _read_file(_read_stream(source, request), request)
    if hasattr(source, "detach") and hasattr(source, "cpu"):  # a torch tensor; NumPy has no bfloat16
        source = source.detach().cpu()
        source = source.float() if str(source.dtype) == "torch.bfloat16" else source
    if np.ma.is_masked(source):
        raise request.error("unsupported", "an array without masked voxels", "masked voxels", "Fill them first.")
    if hasattr(source, "__array__"):
        return _read_array(np.asarray(source), request, {"format": "array"})
    expected = "a path, bytes, open file, image, array, DICOM series or dataset row"
    raise request.error("unsupported", expected, f"an object of type {type(source).__name__}")


def _read_nibabel(image: Any, request: ReadRequest) -> AnyScan:
    """Read a nibabel image as the file that it would be saved to, so that the rules for files apply."""
    request.check_size(tuple(image.shape), bytes_per_voxel(image.get_data_dtype()))
    if not hasattr(image, "to_bytes"):
        expected, got = "a nibabel image of NIfTI or MGH in one file", f"a nibabel {type(image).__name__}"
        raise request.error("unsupported", expected, got, "Pass its path, or convert it to NIfTI.")
    return _read_file(image.to_bytes(), request)


def _read_simpleitk(image: Any, request: ReadRequest) -> AnyScan:
    """Read a SimpleITK image as the file that it would be saved to, so that the rules for files apply."""
    request.check_size((*image.GetSize(), image.GetNumberOfComponentsPerPixel()), image.GetSizeOfPixelComponent())
    sitk = request.import_decoder("SimpleITK", "'m3ret[itk]'")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scan.nrrd")
        sitk.WriteImage(image, str(file))
        return _read_file(file.read_bytes(), request)


def _is_open_file(source: Any) -> bool:
    """Return whether this is a file object, or a file of fsspec or a zip archive that is not opened yet."""
    if hasattr(source, "getbands") or isinstance(source, (str, Path)):
        return False
    return callable(getattr(source, "read", None)) or callable(getattr(source, "open", None))


def _read_stream(source: Any, request: ReadRequest) -> bytes:
    """Read a binary file object from its start, or from its position if it cannot seek, and restore its position."""
    if not hasattr(source, "read"):
        # `fsspec.core.OpenFile` opens itself in its own mode
        opened = source.open() if hasattr(source, "mode") else source.open("rb")
        with closing(opened) as stream:
            return _read_stream(stream, request)
    if getattr(source, "closed", False):
        raise request.error("unsupported", "an open file", "a closed file")
    position = None
    if callable(getattr(source, "seekable", None)) and source.seekable():
        position = source.tell()
        source.seek(0)
    rest = request.limits.max_decoded_bytes + 1
    try:
        pieces = [_read_piece(source, 0, request)]  # of text, more may not be decoded
        while rest > 0 and (piece := _read_piece(source, rest, request)):  # pipes and sockets return less
            pieces.append(piece)
            rest -= len(piece)
    finally:
        if position is not None:
            source.seek(position)
    data = b"".join(pieces)
    request.check_size((max(1, len(data)),), 1)
    return data


def _read_piece(source: Any, size: int, request: ReadRequest) -> bytes | bytearray | memoryview:
    piece = source.read(size)
    if not isinstance(piece, (bytes, bytearray, memoryview)):  # text, a coroutine, or None of one that would block
        expected, got = "a file object in binary mode that blocks", f"one that returns {type(piece).__name__}"
        raise request.error("unsupported", expected, got)
    return piece


def _read_sibling(path: Path, name: str, request: ReadRequest) -> bytes | None:
    """Read the file beside `path` that `ReadRequest.open_sibling` describes; return None if there is none."""
    sibling = path.with_name(_sibling_name(path, name))
    return request.read_bytes(sibling) if sibling.is_file() else None


def _sibling_name(path: PurePath, name: str) -> str:
    return re.sub(r"(\.hdr|\.img)?(\.gz)?$", "", path.name, count=1) + name if name.startswith(".img") else name


def _read_row(row: dict[str, Any], request: ReadRequest) -> AnyScan:
    """Read a dataset row, or the `{"bytes", "path"}` cell of one."""
    if "bytes" in row or "path" in row:
        for key in ("bytes", "path"):
            if row.get(key) is not None:
                return _read(row[key], request)
        raise request.error("unsupported", "bytes or a path", "null for both")
    media = [key for key in MEDIA_COLUMNS if row.get(key) is not None]
    if len(media) != 1:
        expected = f"a row with exactly one of {', '.join(MEDIA_COLUMNS)}"
        raise request.error("unsupported", expected, f"a row with {len(media)} of them")
    intensity = row.get("intensity")
    if intensity not in (None, *INTENSITIES):
        raise request.error("unsupported", f"an intensity of null, {', '.join(INTENSITIES)}", "another value")
    request = replace(request, intensity=intensity or request.intensity, spacing=_declared_spacing(row, request))
    if media != ["image"] and request.input_data_format is None:  # the first axis of an array holds frames or slices
        request = replace(request, input_data_format="channels_last")
    return _read(row[media[0]], request)


def _declared_spacing(row: dict[str, Any], request: ReadRequest) -> Spacing | None:
    """Return the spacing of a row: None without the column, and three times None if the column is null."""
    if "spacing" not in row:
        return None
    if row["spacing"] is None:
        return None, None, None
    try:
        mm = tuple(None if value is None else float(value) for value in row["spacing"])
    except (TypeError, ValueError):
        mm = ()
    if len(mm) != 3 or not all(value is None or 0 < value < math.inf for value in mm):
        expected = "a spacing of 3 numbers above 0 or null, in mm along D, H, W"
        raise request.error("unsupported", expected, shorten(repr(row["spacing"]), 80))
    return mm


# --------------------------------------------------------------------------------------------------- files and archives


def _read_file(file: bytes | Path, request: ReadRequest, containers: tuple[str, ...] = ("gzip", "zip")) -> AnyScan:
    """Read a file from its path or its content. `containers` are those that may still be opened."""
    kind = sniff(file)
    if kind == "video":
        return read_video(file, request)
    if kind in ("nrrd", "metaimage"):
        return VOLUME_READERS[kind](file, request)
    if kind is None and isinstance(file, Path) and file.suffix == ".img" and file.with_suffix(".hdr").is_file():
        file = file.with_suffix(".hdr")  # of a NIfTI pair
        kind = sniff(file)
    data = request.read_bytes(file) if isinstance(file, Path) else file
    if kind == "dicom":
        return read_series([data], request, {})
    if kind in VOLUME_READERS:
        return VOLUME_READERS[kind](data, request)
    if kind == "npy":
        return _read_array(_load_npy(io.BytesIO(data), request), request, {"format": "npy"})
    if kind in containers:
        remaining = tuple(name for name in containers if name != kind)
        return (_read_zip if kind == "zip" else _read_gzip)(data, request, remaining)
    if kind == "image":
        return read_encoded_image(data, request)
    if kind == "heif":
        request.import_decoder("pillow_heif", "pillow-heif").register_heif_opener(thumbnails=False)
        return read_encoded_image(data, request, ("HEIF",))
    if not data:
        raise request.error("damaged", FORMATS, "an empty file")
    is_text = all(byte in b"\t\n\r\f\x1b" or 32 <= byte < 127 or byte > 160 for byte in data[:512])
    name = unsupported_format(data[:HEAD_BYTES]) or (f"{kind} inside an archive" if kind else None)
    got = name or ("text" if is_text else "content of an unknown type")
    raise request.error("unsupported", FORMATS, got, "Convert the file to one of these formats.")


def _read_gzip(data: bytes, request: ReadRequest, containers: tuple[str, ...]) -> AnyScan:
    """Read any single file that is compressed with gzip."""
    try:
        if sniff(gunzip(data, HEAD_BYTES)) == "nifti":
            return read_nifti(data, request)  # inflates no more than the header declares
        size = 0
        with gzip.open(io.BytesIO(data)) as stream:
            while piece := stream.read(2**20):  # check the size before memory is allocated for all pieces
                size += len(piece)
                request.check_size((size,), 1)
                request.check_ratio(size, len(data))
        content = gzip.decompress(data)
    except (zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise request.error("damaged", "a complete gzip file", type(error).__name__) from error
    return _read_file(content, request, containers)


def _read_zip(data: bytes, request: ReadRequest, containers: tuple[str, ...]) -> AnyScan:
    """Read an `.npz`, or a zip archive that holds one scan: a file, a header with its data, or a DICOM series."""
    npz_key = None
    try:
        with _open_zip(data, request) as archive:
            members = [info for info in archive.infolist() if not _is_clutter(info)]
            if not members:
                raise request.error("unsupported", "a zip archive of one scan", "an archive without files")
            if all(info.filename.endswith(".npy") for info in members):
                npz_key, members = _select_array(members, request)
            _check_members(members, len(data), request)
            members.sort(key=lambda info: info.filename)
            contents = [(PurePosixPath(info.filename), _inflate(archive, info)) for info in members]
    except M3RetReadError:
        raise
    except NotImplementedError as error:
        raise request.error("unsupported", "a zip archive of version 6.3 or older", "a newer one") from error
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError) as error:
        raise request.error("damaged", "a complete zip archive", type(error).__name__) from error
    if npz_key is not None:
        return _read_npz(contents[0][1], npz_key, request)
    kinds = [sniff(content) for _, content in contents]
    if "dicom" in kinds:
        series = [content for (_, content), kind in zip(contents, kinds, strict=True) if kind == "dicom"]
        return read_series(series, request, {"files_ignored": len(contents) - len(series)})
    scans = [member for member, kind in zip(contents, kinds, strict=True) if kind is not None]
    if len(scans) != 1:
        got = f"a zip archive with {len(scans)} scans in {len(contents)} files"
        raise request.error("unsupported", "a zip archive of one scan", got, "Pass the files one by one.")
    path, scan = scans[0]
    siblings = dict(contents)
    inner = replace(request, open_sibling=lambda name: siblings.get(path.with_name(_sibling_name(path, name))))
    return _read_file(scan, inner, containers)


def _open_zip(data: bytes, request: ReadRequest) -> zipfile.ZipFile:
    """Open an archive after counting its entries, since `zipfile` creates an object of about 1 kB for each."""
    entries = data.count(ZIP_ENTRY)  # the count that the archive declares may be false
    limit = ENTRIES_PER_FILE * request.limits.max_files + 1000
    if entries > limit:
        expected, advice = f"at most {limit:,} entries of a zip archive", "Raise `ReadLimits.max_files`."
        raise request.error("too_large", expected, f"{entries:,}", advice)
    archive = zipfile.ZipFile(io.BytesIO(data))
    for info in archive.infolist():
        info.filename = info.filename.replace("\\", "/")
    return archive


def _is_clutter(info: zipfile.ZipInfo) -> bool:
    """Return whether this is a folder or a file that file managers add: resource fork, `.DS_Store`, `Thumbs.db`."""
    parts = PurePosixPath(info.filename).parts
    is_folder = info.is_dir() or stat.S_ISDIR(info.external_attr >> 16)
    hidden = not parts or parts[0] == "__MACOSX" or (parts[-1].startswith(".") and parts[-1] != "..")
    return is_folder or hidden or parts[-1].lower() in ("thumbs.db", "desktop.ini")


def _check_members(members: list[zipfile.ZipInfo], archive_size: int, request: ReadRequest) -> None:
    """Refuse members that cannot be read, or that declare too large a size. `_inflate` reads no more than declared."""
    if len(members) > request.limits.max_files:
        expected, advice = f"at most {request.limits.max_files:,} files", "Raise `ReadLimits.max_files`."
        raise request.error("too_large", expected, f"{len(members):,}", advice)
    for info in members:
        path = PurePosixPath(info.filename)
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            raise request.error("unsupported", "paths within the zip archive", "a path outside of it")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise request.error("unsupported", "a zip archive of regular files", "a link or a special file")
        if info.flag_bits & 1:
            raise request.error("unsupported", "a zip archive without a password", "an encrypted archive")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # zipfile inflates bzip2 and LZMA without a bound, and LZMA allocates a dictionary of the declared size
            got = ZIP_METHODS.get(info.compress_type, f"method {info.compress_type}")
            advice = "Compress it with deflate, the usual method."
            raise request.error("unsupported", "a zip archive compressed by deflate", f"compression by {got}", advice)
    size = sum(info.file_size for info in members)
    request.check_size((max(1, size),), 1)
    # entries may overlap or declare false sizes, so they are not added up beyond the size of the archive
    request.check_ratio(size, min(archive_size, sum(info.compress_size for info in members)))


def _inflate(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return the content of a member, at most its declared size.

    It is read in pieces: for a longer read, `zipfile` inflates everything before it applies the declared size.
    """
    content = io.BytesIO()
    with archive.open(info) as stream:
        shutil.copyfileobj(stream, content, PIECE_BYTES)
    return content.getvalue()


# --------------------------------------------------------------------------------------------------------------- arrays


def _read_array(array: np.ndarray, request: ReadRequest, description: Description, rule: str | None = None) -> AnyScan:
    """Read `(H, W)`, `(H, W, C)`, `(D, H, W)` or `(D, H, W, C)`. A last axis of 1, 3 or 4 is colour, never a width."""
    if array.dtype.kind not in "biuf":
        raise request.error("unsupported", VOXEL_TYPES, f"an array of type {array.dtype}")
    request.check_size(array.shape, bytes_per_voxel(array.dtype))
    array = _channels_last(array, request)
    if array.shape[-1] == 4:
        array = blend_over_black(array)
    if array.ndim == 3:
        array = array[None]
    array = array.transpose(3, 0, 1, 2)
    is_volume = rule == "hounsfield" or request.intensity == "hounsfield"
    if array.shape[1] > 1 and not is_volume:  # may be a clip, whereas values in HU are a volume
        indices = request.select_frames(array.shape[1], description)
        array = array if len(indices) == array.shape[1] else array[:, indices]
    return to_unit_range(array, (None, None, None), request, description, rule=rule)


def _channels_last(array: np.ndarray, request: ReadRequest) -> np.ndarray:
    """Return `(H, W, C)` or `(D, H, W, C)` of an array in a supported layout."""
    channels, first = (1, 3, 4), request.input_data_format == "channels_first"
    if first and array.ndim in (3, 4) and array.shape[-3] in channels:
        return np.moveaxis(array, -3, -1)
    if not first and array.ndim in (3, 4) and array.shape[-1] in channels:
        return array
    is_ambiguous = request.input_data_format is None and array.ndim in (3, 4) and array.shape[-3] == 3
    if array.ndim == 2 or (array.ndim == 3 and not is_ambiguous and not first):
        return array[..., None]
    expected = "(H, W), (H, W, C), (D, H, W) or (D, H, W, C) with C = 1, 3 or 4"
    advice = "Convert the data to a supported form."
    if first:
        expected = "(H, W), (C, H, W) or (D, C, H, W) with C = 1, 3 or 4"
    elif array.ndim in (3, 4) and array.shape[-3] in channels:
        advice = 'If the channels come first, pass `input_data_format="channels_first"`.'
        if array.ndim == 3:
            advice += ' If the first axis holds slices, pass `input_data_format="channels_last"`.'
    raise request.error("unsupported", expected, f"an array of shape {array.shape}", advice)


def _load_npy(stream: Any, request: ReadRequest) -> np.ndarray:
    """Load a `.npy` stream after checking its header. Object arrays are refused, as they would be unpickled."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        read_header = headers.get(np.lib.format.read_magic(stream))
        if read_header is None:
            raise request.error("unsupported", ".npy version 1 or 2", "a version for structured types")
        shape, fortran, dtype = read_header(stream)
    except M3RetReadError:
        raise
    except ValueError as error:
        raise request.error("damaged", "a valid .npy header", "an invalid one") from error
    if dtype.kind not in "biuf":
        raise request.error("unsupported", VOXEL_TYPES, f"an array of type {dtype}")
    request.check_size(shape, bytes_per_voxel(dtype))
    size = math.prod(shape) * dtype.itemsize
    data = stream.read(size)
    if len(data) < size:
        raise request.error("damaged", f"{size:,} bytes of voxels", f"{len(data):,}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _select_array(members: list[zipfile.ZipInfo], request: ReadRequest) -> tuple[str, list[zipfile.ZipInfo]]:
    """Return which array of an `.npz` is read: its key and, in a list, its member."""
    arrays = {info.filename[:-4]: info for info in members}
    key = next((key for key in NPZ_KEYS if key in arrays), next(iter(arrays)) if len(arrays) == 1 else None)
    if key is None:
        expected = f"one array, or one of the keys {', '.join(NPZ_KEYS)}"
        raise request.error("unsupported", expected, f"a zip archive with {len(arrays)} arrays")
    return key, [arrays[key]]


def _read_npz(content: bytes, key: str, request: ReadRequest) -> AnyScan:
    array = _load_npy(io.BytesIO(content), request)
    if key in ("hu", "volume", "imgs") and array.ndim == 3:  # grey slices by their key
        request = replace(request, input_data_format=request.input_data_format or "channels_last")
    return _read_array(array, request, {"format": "npz"}, rule="hounsfield" if key == "hu" else None)
