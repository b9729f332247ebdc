"""Define `Scan`, and what all readers share.

A `Scan` is one array in [0, 1] with its voxel spacing; each reader turns one kind of file into one. This file defines
the read limits, format detection by the first bytes and the canonical orientation (NIfTI-1 affines, as in nibabel). It
is copied into every checkpoint and imports only NumPy.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np


THICK_SLICE_RATIO = 1.5  # slices were acquired along an axis whose spacing exceeds both others by this factor
MIN_ASPECT = 1.01  # a ratio of pixel sides below this is rounding
RATIO_FLOOR = 2**26  # 64 MiB: smaller outputs may have any inflate ratio (a blank slice compresses 1000 : 1)
NIFTI_1, NIFTI_2 = (b"n+1\0", b"ni1\0"), (b"n+2\0", b"ni2\0")  # magic numbers: single file, header of a file pair
Spacing = tuple[float | None, float | None, float | None]  # mm between voxel centres along D, H, W
Description = dict[str, Any]  # values are str, int, float or bool

Reason = Literal["not_found", "unsupported", "damaged", "undecodable", "too_large", "no_decoder", "timeout"]

# what is wrong, and what to do about it unless the reader knows better
PROBLEMS: dict[Reason, tuple[str, str]] = {
    "not_found": ("source not found", "Check the path."),
    "unsupported": ("unsupported data", "Convert the data to a supported form."),
    "damaged": ("damaged data", "Replace the file with an intact copy."),
    "undecodable": ("data cannot be decoded", "Check that the file is intact and that other software opens it."),
    "too_large": ("data exceed the read limits", "Reduce the data or raise `ReadLimits`."),
    "no_decoder": ("decoder is not installed", "Install it with pip."),
    "timeout": ("reading timed out", "Reduce the data or raise the time limit."),
}


class M3RetReadError(ValueError):
    """A source that cannot be read as a scan.

    It can be pickled, and re-created from its message alone, as a DataLoader does with the errors of its workers.

    Attributes:
        file: name of the source, without its folder.
        reason: kind of failure, a key of `PROBLEMS`. "damaged" data break their own format; "unsupported" data are
            intact but of a kind that is not read; "undecodable" data made a decoder fail, and may be either.
            None if re-created from a message.
        expected: what can be read instead.
        got: what the source contains. Never quotes text of a header, which may identify a patient.
        advice: what the user can do.
    """

    def __init__(self, file: str, reason: Reason | None = None, expected: str = "", got: str = "", advice: str = ""):
        super().__init__(file, reason, expected, got, advice)
        self.file, self.reason, self.expected, self.got = file, reason, expected, got
        self.advice = advice or (PROBLEMS[reason][1] if reason else "")

    @property
    def detail(self) -> str:
        """The message without the name of the file."""
        if self.reason is None:
            return ""
        return f"{PROBLEMS[self.reason][0]}: expected {self.expected}, got {self.got}. {self.advice}"

    def with_file(self, file: str) -> M3RetReadError:
        """Return the same error for a source that is called `file`."""
        return M3RetReadError(file, self.reason, self.expected, self.got, self.advice)

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}" if self.reason else self.file


@dataclass(frozen=True)
class ReadLimits:
    """Limits that are checked before memory is allocated. Peak memory is about twice `max_decoded_bytes`."""

    max_decoded_bytes: int = 2**32  # of the array, and of the file; 2,000 CT slices of 512 x 512 take 2.1 GB
    max_pixels_per_image: int = 89_478_485  # Pillow's own bound; a mammogram has 14 to 30 million
    max_inflate_ratio: float = 200.0  # for outputs above 64 MiB; deflate can reach 1032, masked CT stays below 100
    max_files: int = 4096  # in one series; a whole-body CT has about 2,000


@dataclass(frozen=True, eq=False)
class Scan:
    """One scan.

    Attributes:
        array: `(C, D, H, W)` with C = 1 (grey) or 3 (RGB); uint8, where 255 means 1.0, or float32 in [0, 1]. In memory,
            8-bit colour is laid out as decoders return it, `(D, H, W, C)`; everything else follows the axes.
        spacing: mm between voxel centres along D, H, W; None where the file does not declare it.
        description: what the file turned out to be (format, plane, frames, how intensities were scaled), in the
            reader's own words and numbers. Never contains text of a header.
    """

    array: np.ndarray
    spacing: Spacing
    description: Description


@dataclass(frozen=True, eq=False)
class StoredScan:
    """One scan as a dataset stores it: oriented and described like a `Scan`, in 8 or 16 bits."""

    array: np.ndarray  # (C, D, H, W), uint8, int16 or uint16
    intensity: str  # how values map to [0, 1], one of `INTENSITIES`
    spacing: Spacing
    description: Description


AnyScan = Scan | StoredScan


@dataclass(frozen=True)
class ReadRequest:
    """Everything a reader needs besides the data."""

    name: str  # of the source, in messages
    num_frames: int | None  # maximum; None reads all
    limits: ReadLimits
    intensity: str | None = None  # one of `INTENSITIES`, declared by a dataset row or the caller
    spacing: Spacing | None = None  # what a dataset row declares
    return_stored: bool = False  # return a `StoredScan` instead of a `Scan`
    input_data_format: str | None = None  # "channels_first" or "channels_last": layout of arrays
    # return the content of a file in the folder of the source, or None. An argument that starts with .img replaces the
    # suffix .hdr of the source; any other one is the name of the file
    open_sibling: Callable[[str], bytes | None] = lambda name: None
    series: str | int | None = None  # UID, index or "largest": which DICOM series of several to read
    min_pixels: int | None = None  # pixels that suffice: a JPEG may be decoded at half its size or less

    def error(self, reason: Reason, expected: str, got: str, advice: str = "") -> M3RetReadError:
        """Return an error that names this request's source."""
        return M3RetReadError(self.name, reason, expected, got, advice)

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Re-raise any exception as an `M3RetReadError` with its type only: messages of libraries quote headers."""
        try:
            yield
        except M3RetReadError:
            raise
        except Exception as error:
            raise self.error("undecodable", "a complete scan in a supported format", type(error).__name__) from error

    def import_decoder(self, module: str, package: str) -> Any:
        """Import a module of an optional package."""
        try:
            return importlib.import_module(module)
        except ImportError as error:
            advice = f"Run `pip install {package}`."
            raise self.error("no_decoder", f"the package {package}", "an import error", advice) from error

    def check_size(self, shape: tuple[int, ...], itemsize: int) -> None:
        """Refuse an array that is empty or exceeds `max_decoded_bytes`, at `itemsize` bytes per element."""
        if not shape or min(shape) < 1:
            raise self.error("unsupported", "at least one voxel along every axis", f"an array of shape {shape}")
        size, limit = math.prod(shape) * itemsize, self.limits.max_decoded_bytes
        if size > limit:
            advice = "Raise `ReadLimits.max_decoded_bytes`, or read fewer frames of a video or cine with `num_frames`."
            raise self.error("too_large", f"at most {limit:,} bytes once decoded", f"{size:,}", advice)

    def check_ratio(self, size: int, compressed_size: int) -> None:
        """Refuse `compressed_size` bytes that inflate by more than `max_inflate_ratio`, to more than `RATIO_FLOOR`."""
        ratio = self.limits.max_inflate_ratio
        if size > max(RATIO_FLOOR, ratio * compressed_size):
            expected, got = f"at most {ratio:g} bytes per compressed byte", f"{size:,} bytes from {compressed_size:,}"
            advice = "If the source is trusted, raise `ReadLimits.max_inflate_ratio`."
            raise self.error("too_large", expected, got, advice)

    def check_pixels(self, height: int, width: int) -> None:
        """Refuse an image that is empty or exceeds `max_pixels_per_image`."""
        limit = self.limits.max_pixels_per_image
        if height < 1 or width < 1:
            raise self.error("unsupported", "at least one pixel along every axis", f"{height} x {width} pixels")
        if height * width > limit:
            advice = "Raise `ReadLimits.max_pixels_per_image`."
            raise self.error("too_large", f"at most {limit:,} pixels per image", f"{height} x {width} pixels", advice)

    def select_frames(self, total: int, description: Description) -> list[int]:
        """Return the indices of the frames to read, at the centres of `num_frames` equal segments, and record them."""
        count = min(total, self.num_frames or total)
        description["frames_total"], description["frames_dropped"] = total, total - count
        return [(2 * i + 1) * total // (2 * count) for i in range(count)]

    def read_bytes(self, path: Path) -> bytes:
        """Read a file after checking its size."""
        self.check_size((max(1, path.stat().st_size),), 1)
        return path.read_bytes()


class _LibrarySilencer:
    """Suppress warnings and log messages of decoders, which quote headers.

    Threads share the filters of both, so entries are counted and the last exit restores them.
    """

    def __init__(self) -> None:
        self.lock, self.depth = threading.Lock(), 0
        self.loggers = [logging.getLogger(name) for name in ("pydicom", "nibabel.global", "PIL", "h5py")]

    def __enter__(self) -> None:
        with self.lock:
            self.depth += 1
            if self.depth == 1:
                self.filters = warnings.catch_warnings(action="ignore")
                self.filters.__enter__()
                self.enabled = [logger for logger in self.loggers if not logger.disabled]
                for logger in self.enabled:
                    logger.disabled = True

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                for logger in self.enabled:
                    logger.disabled = False
                self.filters.__exit__(None, None, None)


silence_libraries = _LibrarySilencer()


def spacing_of_aspect(ratio: float, description: Description) -> Spacing:
    """Return the relative spacing of pixels from their height / width, which is DICOM's Pixel Aspect Ratio.

    It is relative, not in mm, which the key `pixel_aspect_ratio` of the description records.
    """
    if max(ratio, 1 / ratio) < MIN_ASPECT:
        return (None, None, None)
    description["pixel_aspect_ratio"] = round(ratio, 4)
    return (None, ratio, 1.0)


MEDIA_COLUMNS = ("image", "video", "volume", "nifti")  # of a row of `datasets`; `niftifolder` calls its column nifti


def display_name(source: Any) -> str:
    """Return the name of a source in messages: the name of its file, or its type in angle brackets."""
    if isinstance(source, str) and source.startswith("data:"):
        return "<data URL>"
    if isinstance(source, (str, os.PathLike)):
        return Path(source).absolute().name
    if isinstance(source, dict):
        for key in (*MEDIA_COLUMNS, "path"):
            if source.get(key) is not None:
                name = display_name(source[key])
                return f"row {source['id']}" if name == "<bytes>" and source.get("id") else name
        return "<bytes>" if "bytes" in source else "<row>"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "<bytes>"
    if isinstance(source, (list, tuple)):
        return display_name(source[0]) if len(source) == 1 else f"<series of {len(source)} files>"
    if hasattr(source, "__array__") and not hasattr(source, "getbands"):  # PIL images have both
        return "<array>"
    if hasattr(source, "read") and isinstance(getattr(source, "name", None), str):  # an open file
        return Path(source.name).name
    return f"<{type(source).__name__}>"


# brands in the first box of MP4 (video) and of still images (ISO/IEC 23008-12): AVIF, and HEIF with another codec
VIDEO_BRANDS = (b"iso", b"mp4", b"qt", b"M4V", b"3g", b"avc1")
AVIF_BRANDS = (b"avif", b"avis")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1")
IMAGE_MAGICS = (
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8"),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),  # JPEG 2000: file, codestream
)
MAGICS = {  # kinds of files by their first bytes
    "gzip": (b"\x1f\x8b",),
    "npy": (b"\x93NUMPY",),
    "zip": (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"),
    "nrrd": (b"NRRD000",),
    "minc": (b"\x89HDF\r\n\x1a\n", b"CDF\1", b"CDF\2"),
    # Matroska, MPEG program and elementary streams, ASF, FLV, Ogg
    "video": (b"\x1a\x45\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3", b"\x30\x26\xb2\x75", b"FLV\1", b"OggS"),
}
# formats that are named when they are refused
UNSUPPORTED_MAGICS = {
    b"\xff\xd8\xff\xf7": "JPEG-LS",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"II\xbc\x01": "JPEG XR",
    b"v/1\x01": "OpenEXR",
    b"8BPS": "Photoshop",
    b"%PDF": "PDF",
    b"SIMPLE  =": "FITS",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\x5c\x01\0\0": "Analyze 7.5",  # 348, the size of its header
    b"\0\0\x01\x5c": "Analyze 7.5",
}
HEAD_BYTES = 600  # bytes at the start of a file that `sniff` uses


def unsupported_format(head: bytes) -> str | None:
    """Return the name of a known format that is not read, or None."""
    if head[257:262] == b"ustar":
        return "a tar archive"
    return next((name for magic, name in UNSUPPORTED_MAGICS.items() if head.startswith(magic)), None)


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(HEAD_BYTES)


def sniff(file: bytes | Path) -> str | None:
    """Return the kind of a file from its first bytes, or None if it is of no kind that is read.

    Kinds are "dicom", "nifti", "mgh", "minc", "nrrd", "metaimage", "npy", "image", "heif", "video", and the containers
    "zip" and "gzip". The name only decides between formats that the content equally fits.
    """
    head = file[:HEAD_BYTES] if isinstance(file, bytes) else _first_bytes(file)
    is_image = head.startswith(IMAGE_MAGICS) or (head[:2] == b"BM" and head[15:18] == b"\0\0\0")  # BMP: header size
    if head[128:132] == b"DICM":
        named_tiff = isinstance(file, Path) and file.suffix.lower() in (".tif", ".tiff")
        return "image" if is_image and named_tiff else "dicom"  # a TIFF header fits into the preamble of DICOM
    if head[344:348] in NIFTI_1 or head[4:8] in NIFTI_2:
        return "nifti"
    if unsupported_format(head):
        return None
    for kind, magics in MAGICS.items():
        if head.startswith(magics):
            return kind
    if is_image:
        return "image"
    if head.startswith(b"RIFF"):
        return {b"WEBP": "image", b"AVI ": "video"}.get(head[8:12])
    if head[4:8] == b"ftyp":
        size = int.from_bytes(head[:4], "big")
        brands = [head[at : at + 4] for at in (8, *range(16, min(size, len(head)), 4))]
        if brands[0].startswith(VIDEO_BRANDS):
            return "video"
        if any(brand in AVIF_BRANDS for brand in brands):
            return "image"
        return "heif" if any(brand in HEIF_BRANDS for brand in brands) else "video"
    # MPEG transport streams repeat a byte every 188 bytes, or every 192 with time codes
    is_transport = any(head[start : start + 2 * step + 1 : step] == b"GGG" for start, step in ((0, 188), (4, 192)))
    if head[4:8] in (b"moov", b"mdat", b"free", b"skip", b"wide") or is_transport:  # QuickTime
        return "video"
    if re.match(rb"\s*(ObjectType|NDims|Comment)\s*[=:]", head) and b"NDims" in head:
        return "metaimage"
    if head[:4] == b"\0\0\0\1" and len(head) >= 24:  # version, sides, frames and voxel type of MGH
        *sides, code = struct.unpack(">5i", head[4:24])
        if all(0 < side < 2**20 for side in sides) and code in (0, 1, 3, 4, 10):
            return "mgh"
    if head.startswith((b"\x08\0", b"\x02\0", b"\0\x08", b"\0\x02")):  # a DICOM dataset without a preamble
        return "dicom"
    return None


def to_canonical_orientation(
    volume: np.ndarray, steps: np.ndarray, description: Description
) -> tuple[np.ndarray, Spacing]:
    """Reorder and flip the axes of a volume as `read_scan` documents, and add the plane of its slices to `description`.

    As in nibabel, each voxel axis is assigned to the closest anatomical axis, without interpolation.

    Args:
        volume: `(C, a, b, c)`.
        steps: `(3, 3)`; column n is the step of one voxel along axis n, in RAS millimetres.

    Returns:
        A view `(C, D, H, W)`, and its spacing.
    """
    spacing = np.linalg.norm(steps, axis=0)
    left, _, right = np.linalg.svd(steps / spacing)
    cosines = left @ right  # the nearest rotation: a tilted gantry shears the steps
    axis_of, sign_of = [0, 0, 0], [1.0, 1.0, 1.0]
    for axis in np.argsort(-np.abs(cosines).max(axis=0), kind="stable"):
        world = int(np.abs(cosines[:, axis]).argmax())
        axis_of[world], sign_of[world] = int(axis), float(np.sign(cosines[world, axis]))
        cosines[world] = 0
    mm = [float(spacing[axis]) for axis in axis_of]
    flat = [world for world in range(3) if volume.shape[1 + axis_of[world]] == 1]
    # The tolerance keeps a ratio of exactly 1.5 below the bound, whether a file stores decimals, doubles or float32.
    bound = THICK_SLICE_RATIO * (1 + 1e-4)
    thick = [world for world in range(3) if all(mm[world] > bound * mm[other] for other in range(3) if other != world)]
    depth = flat[0] if len(flat) == 1 else thick[0] if thick else 2
    order = {2: (2, 1, 0), 1: (1, 2, 0), 0: (0, 2, 1)}[depth]
    towards = (-1.0, -1.0, 1.0 if depth == 2 else -1.0)  # left, posterior, and superior for slices, inferior for rows
    view = volume.transpose(0, *(1 + axis_of[world] for world in order))
    flips = tuple(slice(None, None, int(sign_of[world] * towards[world])) for world in order)
    description["plane"] = ("sagittal", "coronal", "axial")[depth]
    return view[(slice(None), *flips)], (mm[order[0]], mm[order[1]], mm[order[2]])
