"""Read a medical scan in any supported format into one array in [0, 1] with its voxel spacing.

`read_scan` detects what a source is. Images, NumPy arrays and archives are read here, other formats in
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
import sys
import tempfile
import zipfile
import zlib
from contextlib import closing
from dataclasses import replace
from numbers import Integral
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import numpy as np

from .intensity_m3ret import INTENSITIES, blend_over_black, bytes_per_voxel, to_unit_range
from .reading_dicom_m3ret import read_folder, read_series
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
    spacing_of_aspect,
    unsupported_format,
)


__all__ = ["M3RetReadError", "ReadLimits", "Scan", "StoredScan", "read_scan", "read_stored"]

IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "AVIF", "JPEG2000")
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
EXIF_ORIENTATION = 0x0112
IMAGEJ_STACK = re.compile(r"ImageJ=.*^images=(\d+)", re.DOTALL | re.MULTILINE)
# TIFF tags
NEW_SUBFILE_TYPE, BITS_PER_SAMPLE, PHOTOMETRIC, DESCRIPTION, STRIP_OFFSETS, PLANAR = 254, 258, 262, 270, 273, 284
SAMPLE_FORMAT = 339
NATIVE_ORDER = {"I;16BS": "I;16S", "I;32BS": "I;32S", "F;32BF": "F;32F"} if sys.byteorder == "little" else {}
URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
STRIP_BYTE_COUNTS, TILE_OFFSETS, TILE_BYTE_COUNTS = 279, 324, 325


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
        return _read_image(source, replace(request, min_pixels=None))  # the caller's image must not be changed
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
    mm = (None, None, None) if row["spacing"] is None else tuple(row["spacing"])
    if len(mm) != 3:
        raise request.error("unsupported", "a spacing of 3 numbers, along D, H, W", f"{len(mm)} numbers")
    return tuple(None if value is None else float(value) for value in mm)  # type: ignore[return-value]


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
        return _read_encoded_image(data, request)
    if kind == "heif":
        request.import_decoder("pillow_heif", "pillow-heif").register_heif_opener(thumbnails=False)
        return _read_encoded_image(data, request, ("HEIF",))
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


# --------------------------------------------------------------------------------------------------------------- images


def _read_encoded_image(data: bytes, request: ReadRequest, formats: tuple[str, ...] = IMAGE_FORMATS) -> AnyScan:
    """Read the content of an image file, and tell a damaged file from one that Pillow does not support."""
    pillow = request.import_decoder("PIL.Image", "pillow")
    opened = False
    try:
        with pillow.open(io.BytesIO(data), formats=formats) as image:
            opened = True
            return _read_image(image, request)
    except M3RetReadError:
        raise
    except pillow.DecompressionBombError as error:
        expected, advice = f"at most {request.limits.max_pixels_per_image:,} pixels per image", "Reduce the image."
        raise request.error("too_large", expected, "more pixels than Pillow opens", advice) from error
    except (pillow.UnidentifiedImageError, OSError, SyntaxError, EOFError, ValueError) as error:
        complete = _is_complete(data)
        if complete and not opened:
            expected = "a variant of this image format that Pillow reads"
            raise request.error("unsupported", expected, "another pixel type or compression") from error
        reason = "undecodable" if complete else "damaged"
        raise request.error(reason, "a complete image", type(error).__name__) from error  # type: ignore[arg-type]


def _is_complete(data: bytes) -> bool:
    """Return whether a JPEG, BMP or TIFF file is not truncated; False for formats that Pillow reads in all variants."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" in data[-1024:]
    if data.startswith(b"BM"):
        return int.from_bytes(data[2:6], "little") <= len(data)
    if data.startswith(b"MM\0+"):  # Pillow reads BigTIFF in little-endian order only
        return True
    if not data.startswith((b"II", b"MM")):
        return False
    from PIL import TiffImagePlugin

    try:
        stream = io.BytesIO(data)
        tags = TiffImagePlugin.ImageFileDirectory_v2(stream.read(16 if data[2:4] in (b"+\0", b"\0+") else 8))
        stream.seek(tags.next)
        tags.load(stream)
        pairs = ((STRIP_OFFSETS, STRIP_BYTE_COUNTS), (TILE_OFFSETS, TILE_BYTE_COUNTS))
        offsets, counts = next((tags[first], tags[second]) for first, second in pairs if first in tags)
        return all(offset + count <= len(data) for offset, count in zip(offsets, counts, strict=True))
    except Exception:  # any tag may be cut or malformed
        return False


def _read_image(image: Any, request: ReadRequest) -> AnyScan:
    """Read a PIL image, whose pixels need not be loaded yet. Pages and animation frames become depth."""
    description: Description = {"format": (image.format or "image").lower()}
    pages = _pages(image, request, description)
    if len(pages) > 1:
        pages = [pages[index] for index in request.select_frames(len(pages), description)]
    if image.tell() != pages[0]:
        image.seek(pages[0])
    width, height = image.size
    request.check_pixels(height, width)
    request.check_size((len(pages), height, width), 4)
    spacing = _pixel_aspect(image, description)
    if request.min_pixels is not None and image.format == "JPEG" and image.mode in ("L", "RGB"):
        spacing = _reduce_jpeg(image, request.min_pixels, spacing, description)
        width, height = image.size
    frames, kinds = [], set()
    for page in pages:
        if page != pages[0]:
            image.seek(page)
            if image.size != (width, height):
                raise request.error("unsupported", "pages of one size", "pages of several sizes")
        pixels, inverted = _image_pixels(image, request)
        frames.append(pixels)
        kinds.add((pixels.dtype, inverted))
    if len(kinds) > 1:
        raise request.error("unsupported", "pages of one data type and polarity", "pages that differ in one of them")
    if len({frame.ndim for frame in frames}) > 1:  # an animation with grey and colour frames
        frames = [np.repeat(frame[..., None], 3, axis=2) if frame.ndim == 2 else frame for frame in frames]
    array = frames[0][None] if len(frames) == 1 else np.stack(frames)
    array = array[None] if array.ndim == 3 else array.transpose(3, 0, 1, 2)
    return to_unit_range(array, spacing, request, description, inverted=inverted)


def _reduce_jpeg(image: Any, min_pixels: int, spacing: Spacing, description: Description) -> Spacing:
    """Have a JPEG that is not decoded yet decoded at the smallest size of at least `min_pixels`.

    The decoder leaves out high frequencies and rounds up sides that the factor does not divide. The returned spacing
    accounts for that, so that the scan has the same shape and number of patches as when it is decoded whole.
    """
    width, height = image.size
    factor = next((n for n in (8, 4, 2) if (width // n) * (height // n) >= min_pixels), 1)
    if factor == 1 or not image.draft(image.mode, (width // factor, height // factor)) or image.size == (width, height):
        return spacing
    description["decoded_at"] = f"1/{factor}"
    stretch = (height * image.width) / (width * image.height)  # of a pixel along a column
    if stretch == 1:
        return spacing
    turned = image.getexif().get(EXIF_ORIENTATION, 1) > 4  # by 90 degrees
    _, row, column = spacing
    return None, (row or 1.0) * (1 / stretch if turned else stretch), column or 1.0


def _pages(image: Any, request: ReadRequest, description: Description) -> list[int]:
    """Return the indices of the pages or frames of an image, without previews, masks and reduced copies."""
    total, kind = getattr(image, "n_frames", 1), description["format"]
    pages = list(range(total))
    if kind in ("jpeg", "mpo", "heif"):  # further images in a camera file are previews
        pages = [image.tell() if kind == "heif" else 0]
    elif kind == "png" and image.info.get("default_image"):  # the first image is for viewers without animation
        pages = pages[1:]
    elif kind == "tiff" and total == 1 and (images := IMAGEJ_STACK.match(str(image.tag_v2.get(DESCRIPTION, "")))):
        if int(images.group(1)) > 1:  # all slices follow the first one, without pages of their own
            advice = "Save the stack again with one page per slice."
            raise request.error("unsupported", "one page per slice", "an ImageJ stack in one page", advice)
    elif kind == "tiff" and total > 1:
        reduced = []
        for page in pages:
            image.seek(page)
            reduced.append(int(image.tag_v2.get(NEW_SUBFILE_TYPE, 0)) & 0b101)  # a reduced copy, or a mask
        pages = [page for page in pages if not reduced[page]] or pages
    if len(pages) < total:
        description["pages_left_out"] = total - len(pages)
    return pages


def _pixel_aspect(image: Any, description: Description) -> Spacing:
    """Return the ratio of a pixel's sides as spacing. The scale of a declared resolution is for print, so not used."""
    if image.format == "TIFF" and not {282, 283} <= set(image.tag_v2):  # Pillow invents a missing one
        return (None, None, None)
    # pixels per unit along a row and along a column
    keys = ("dpi", "resolution", "aspect", "jfif_density") if image.format else ()  # a derived image may be resampled
    density = next((image.info[key] for key in keys if image.info.get(key)), (1, 1))
    across, down = (float(value) for value in density[:2])
    if not (0 < across < math.inf and 0 < down < math.inf):
        return (None, None, None)
    turned = image.getexif().get(EXIF_ORIENTATION, 1) > 4  # by 90 degrees
    return spacing_of_aspect(down / across if turned else across / down, description)


def _image_pixels(image: Any, request: ReadRequest) -> tuple[np.ndarray, bool]:
    """Return `(H, W)` at the bit depth of the image or `(H, W, 3)` uint8, and whether low values are bright.

    EXIF rotation and alpha are applied.
    """
    tags = getattr(image, "tag_v2", {})
    bits, kind, planar = (int(np.ravel(tags.get(tag, 1))[0]) for tag in (BITS_PER_SAMPLE, SAMPLE_FORMAT, PLANAR))
    if bits > 8 and planar == 2 and len(image.getbands()) > 1:  # Pillow would read it as 8 bits
        expected = "interleaved colour channels, or 8 bits per channel"
        raise request.error("unsupported", expected, "separate colour planes of more than 8 bits")
    if tags:  # libtiff returns native order, though Pillow takes some types for big-endian
        image.tile = [
            tile._replace(args=(NATIVE_ORDER.get(tile.args[0], tile.args[0]), *tile.args[1:]))
            if tile.codec_name == "libtiff"
            else tile
            for tile in image.tile
        ]
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = request.import_decoder("PIL.ImageOps", "pillow").exif_transpose(image)
    if image.mode == "1":
        return np.asarray(image.convert("L")), False
    transparent = "transparency" in image.info and image.mode in ("P", "RGB", "L")
    if (image.mode in ("L", "F") and not transparent) or image.mode[0] == "I":  # "I", "I;16" and its byte orders
        pixels = np.asarray(image)
        if (bits, kind) == (32, 1) and image.mode == "I":  # Pillow reads uint32 as int32, and int8 as uint8
            pixels = pixels.view(np.uint32)
        elif (bits, kind) == (8, 2):
            pixels = pixels.view(np.int8)
        # Pillow inverts WhiteIsZero only for up to 8 bits
        return pixels, image.mode != "L" and tags.get(PHOTOMETRIC) == 0
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or transparent:  # in LAB, "A" is a colour
        return blend_over_black(np.asarray(image.convert("RGBA"))), False
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB")), False  # palette, CMYK, YCbCr, HSV
