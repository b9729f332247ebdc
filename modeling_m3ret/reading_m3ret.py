"""How does any medical scan file become one array in [0, 1] with its voxel spacing?

`read_scan` answers with a `Scan`: DICOM (a file, a series, a cine), NIfTI, video, pictures and NumPy arrays all end as
`(C, D, H, W)`, in the intensities that the file itself declares (DICOM PS3.3 C.11, Hounsfield units) and in one
orientation. Files are hostile until shown otherwise: sizes are checked before memory is taken, nothing is unpickled,
and every failure is an `M3RetReadError`. This file travels inside every checkpoint, so it imports NumPy alone; decoders
load when a format needs them.

Order below: interface · which format is it · arrays, pictures, video · NIfTI · DICOM · orientation · intensity.
"""

from __future__ import annotations

import importlib
import io
import logging
import math
import os
import struct
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np


HU_RANGE = (-1000.0, 1000.0)  # air to dense bone, the range of SPECTRE and most CT foundation models
PERCENTILES = (0.5, 99.5)  # per scan, where no unit is declared (nnU-Net's clipping range)
# undeclared integers whose .5 percentile lies below are HU: a CT field of view holds air, MR never goes there
HU_LIKE = -500.0
SAMPLE = 1_000_000  # voxels that percentiles are taken from, at least; more changes them by under .1 %
THICK = 1.5  # an axis this much coarser than both others is the one that slices were acquired along
RATIO_FLOOR = 2**26  # 64 MiB: below this an inflate ratio does no harm (a blank slice compresses 1000 : 1, honestly)
IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
NPZ_KEYS = ("hu", "image", "volume", "imgs")  # "imgs" is MedSAM's; "hu" declares Hounsfield units
CT_STORAGE = tuple("1.2.840.10008.5.1.4.1.1.2" + tail for tail in ("", ".1", ".2"))  # CT, enhanced, legacy enhanced
PIXEL_KEYS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
Spacing = tuple[float | None, float | None, float | None]  # mm between voxel centres along D, H, W
DEFLATED, JPEG_BASELINE, JPEG_EXTENDED = ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")


# ------------------------------------------------------------------------------------------------------------ interface


class M3RetReadError(ValueError):
    """A source that can't be read as a scan: which (`source`), what it holds (`found`), what would do (`expected`).

    Survives pickling, and a DataLoader worker's rebuilding from the message alone.
    """

    def __init__(self, source: str, found: str = "", expected: str = "") -> None:
        super().__init__(source, found, expected)
        self.source, self.found, self.expected = source, found, expected

    def __str__(self) -> str:
        return f"{self.source}: found {self.found}; expected {self.expected}" if self.found else self.source


@dataclass(frozen=True)
class ReadLimits:
    """What a file may ask for, checked before memory is taken. The peak is about twice `max_decoded_bytes`."""

    max_decoded_bytes: int = 2**32  # 4 GiB of `Scan.array`, or of the file; 2,000 CT slices of 512² make 2.1 GB
    max_pixels_per_image: int = 89_478_485  # Pillow's own bound; a mammogram has 14 to 30 million
    max_inflate_ratio: float = 200.0  # deflate can reach 1032; masked CT stays below 100. Applies above RATIO_FLOOR
    max_files: int = 4096  # in one series; a whole-body CT has about 2,000


@dataclass(frozen=True, eq=False)
class Scan:
    """One scan.

    array: `(C, D, H, W)`, C = 1 (grey) or 3 (RGB), C-contiguous; uint8 where 255 means 1.0, or float32 in [0, 1].
    spacing: mm between voxel centres along D, H, W; None where the file doesn't say.
    found: what the file turned out to be, in this file's own words and numbers, never a header's text.
    """

    array: np.ndarray
    spacing: Spacing
    found: dict[str, str | int | float | bool]


def read_scan(source: Any, *, num_frames: int | None = None, limits: ReadLimits = ReadLimits()) -> Scan:
    """Read one scan from whatever holds it.

    source: a path or bytes of DICOM, NIfTI (`.nii`, `.nii.gz`), PNG, JPEG, TIFF, BMP, WebP, GIF, `.npy`, `.npz` or
        video; a folder or a list that is one DICOM series; a PIL image; a NumPy or torch array `H W`, `H W C`, `D H W`,
        `D H W C` (C = 1, 3 or 4, last); a row of `datasets` with one of image, video, volume; or a `Scan`, given back
        as it is. The content decides what a file is, not its name.
    num_frames: at most so many frames, at the centres of equal segments, where depth has no spacing in mm (video, cine,
        GIF, arrays not in HU). Volumes are always whole. None: all frames.

    Volumes come out as radiologists look at them, in the order of an axial DICOM slice (LPS): axial slices, D from
    inferior to superior, H from anterior to posterior, W from the patient's right to left. Where another axis is more
    than 1.5 times coarser than both others, the slices are that axis': coronal (D anterior to posterior, H superior to
    inferior, W right to left), or sagittal (D right to left, H superior to inferior, W anterior to posterior).
    Arrays, pictures and single DICOM images stay as stored.

    Raises M3RetReadError for whatever can't be read, ValueError for a num_frames below 1.
    """
    # by name too: a checkpoint's copy of this file has a class of its own
    if isinstance(source, Scan) or type(source).__name__ == "Scan":
        return source
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; expected None or at least 1")
    job = _Job(_name_of(source), num_frames, limits)
    with _quiet, job.refusing():
        return _read(source, job)


@dataclass(frozen=True)
class _Job:
    """What every reader below needs to know: the source's name for messages, frames wanted, limits."""

    name: str
    num_frames: int | None
    limits: ReadLimits

    def refuse(self, found: str, expected: str) -> M3RetReadError:
        return M3RetReadError(self.name, found, expected)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Turn whatever a library raises into an M3RetReadError. Libraries quote headers: only the type is told."""
        try:
            yield
        except M3RetReadError:
            raise
        except Exception as error:
            raise self.refuse(f"damaged or unsupported data ({type(error).__name__})", "a readable scan") from error

    def need(self, module: str, package: str) -> Any:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise self.refuse(
                "a file that needs a decoder which isn't installed", f"`pip install {package}`"
            ) from error

    def check(self, shape: tuple[int, ...], itemsize: int, packed: int | None = None) -> None:
        """Refuse an array that is empty, larger than the limits, or more than its `packed` bytes can honestly hold."""
        if not shape or min(shape) < 1:
            raise self.refuse(f"an array of shape {shape}", "at least one voxel along every axis")
        size = math.prod(shape) * itemsize
        if size > self.limits.max_decoded_bytes:
            raise self.refuse(
                f"{size:,} bytes once decoded", f"at most {self.limits.max_decoded_bytes:,}; see ReadLimits, num_frames"
            )
        if packed is not None and size > max(RATIO_FLOOR, self.limits.max_inflate_ratio * packed):
            raise self.refuse(
                f"{packed:,} bytes that claim to hold {size:,}", f"a ratio of at most {self.limits.max_inflate_ratio:g}"
            )

    def check_pixels(self, height: int, width: int) -> None:
        if height < 1 or width < 1 or height * width > self.limits.max_pixels_per_image:
            raise self.refuse(
                f"an image of {height} x {width} pixels", f"1 to {self.limits.max_pixels_per_image:,}; see ReadLimits"
            )

    def keep(self, total: int, found: dict[str, Any]) -> list[int]:
        """Which of `total` frames to keep: the centres of num_frames equal segments."""
        kept = min(total, self.num_frames or total)
        found["frames_total"], found["frames_dropped"] = total, total - kept
        return [(2 * i + 1) * total // (2 * kept) for i in range(kept)]

    def read_bytes(self, path: Path) -> bytes:
        self.check((max(1, path.stat().st_size),), 1)
        return path.read_bytes()


class _Quiet:
    """Silence the libraries' warnings and logs: they quote headers. Counted, since threads share both."""

    def __init__(self) -> None:
        self.lock, self.depth = threading.Lock(), 0
        self.catch: Any = None
        self.loggers: list[tuple[logging.Logger, bool]] = []

    def __enter__(self) -> None:
        with self.lock:
            self.depth += 1
            if self.depth == 1:
                self.catch = warnings.catch_warnings()
                self.catch.__enter__()
                warnings.simplefilter("ignore")
                loggers = [logging.getLogger(name) for name in ("pydicom", "nibabel.global", "PIL")]
                self.loggers = [(logger, logger.disabled) for logger in loggers]
                for logger in loggers:
                    logger.disabled = True

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                self.catch.__exit__(None, None, None)
                for logger, disabled in self.loggers:
                    logger.disabled = disabled


_quiet = _Quiet()


# --------------------------------------------------------------------------------------------------- which format is it


def _name_of(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return Path(source).resolve().name
    if isinstance(source, dict):
        inner = [source[key] for key in ("image", "video", "volume", "path") if source.get(key) is not None]
        return _name_of(inner[0]) if inner else "<bytes>" if "bytes" in source else "<row>"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "<bytes>"
    if isinstance(source, (list, tuple)):
        return _name_of(source[0]) if len(source) == 1 else f"<series of {len(source)} files>"
    return (
        "<array>" if hasattr(source, "__array__") and not hasattr(source, "getbands") else f"<{type(source).__name__}>"
    )


def _read(source: Any, job: _Job) -> Scan:
    if isinstance(source, dict):
        return _read_row(source, job)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read_file(bytes(source), job)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            return _read_folder(path, job)
        if not path.is_file():
            raise job.refuse("no such file", "a file or a folder that exists")
        return _read_file(path, job)
    if isinstance(source, (list, tuple)):
        return _read_series(list(source), job, {})
    if hasattr(source, "group_dataset"):  # a pydicom Dataset
        return _read_series([source], job, {})
    if hasattr(source, "getbands"):  # a PIL image
        return _read_image(source, job)
    if hasattr(source, "detach"):  # a torch tensor; bfloat16 has no NumPy type
        source = source.detach().cpu()
        source = source.float() if str(source.dtype) == "torch.bfloat16" else source
    if hasattr(source, "__array__"):
        return _from_array(np.asarray(source), job, {"format": "array"})
    raise job.refuse(f"a {type(source).__name__}", "a path, bytes, image, array, DICOM series or datasets row")


def _read_row(row: dict[str, Any], job: _Job) -> Scan:
    if "bytes" in row or "path" in row:
        inner = row["bytes"] if row.get("bytes") is not None else row.get("path")
        if inner is None:
            raise job.refuse("neither bytes nor a path", "one of them")
        return _read(inner, job)
    given = [key for key in ("image", "video", "volume") if row.get(key) is not None]
    if len(given) != 1:
        raise job.refuse(f"a row with {len(given)} of image, video, volume", "exactly one that is not null")
    return _read(row[given[0]], job)


def _read_file(file: bytes | Path, job: _Job) -> Scan:
    """Read a file, given as its path or its bytes."""
    kind = _sniff(file)
    if kind == "video":
        return _read_video(file, job)
    data = job.read_bytes(file) if isinstance(file, Path) else file
    if kind == "dicom":
        return _read_series([data], job, {})
    if kind == "nifti":
        return _read_nifti(data, job)
    if kind == "npy":
        return _from_array(_read_npy(io.BytesIO(data), job), job, {"format": "npy"})
    if kind == "npz":
        return _read_npz(data, job)
    if kind == "image":
        with job.need("PIL.Image", "pillow").open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            return _read_image(image, job)
    what = "an empty file" if not data else "text" if _is_text(data[:512]) else "content of an unknown type"
    raise job.refuse(what, "DICOM, NIfTI, PNG, JPEG, TIFF, BMP, WebP, GIF, video, .npy or .npz")


def _sniff(file: bytes | Path) -> str | None:
    """What the first bytes say: dicom, nifti, npy, npz, image, video, or None. The name breaks ties only."""
    if isinstance(file, Path):
        with file.open("rb") as stream:
            head = stream.read(600)
    else:
        head = file[:600]
    tiff = head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    if head[128:132] == b"DICM":
        named_tiff = isinstance(file, Path) and file.suffix.lower() in (".tif", ".tiff")
        return "image" if tiff and named_tiff else "dicom"  # a file may be both, in DICOM's preamble
    if head[:2] == b"\x1f\x8b" or head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return "nifti"
    if head[:6] == b"\x93NUMPY":
        return "npy"
    if head[:4] == b"PK\x03\x04":
        return "npz"
    if (
        tiff
        or head[:8] == b"\x89PNG\r\n\x1a\n"
        or head[:3] == b"\xff\xd8\xff"
        or head[:4] == b"GIF8"
        or head[:2] == b"BM"
    ):
        return "image"
    if head[:4] == b"RIFF":
        return {b"WEBP": "image", b"AVI ": "video"}.get(head[8:12])
    boxes = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")  # MP4, QuickTime
    # Matroska, MPEG program and elementary streams, ASF, FLV, Ogg
    magics = (b"\x1a\x45\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3", b"\x30\x26\xb2\x75", b"FLV\1", b"OggS")
    if head[4:8] in boxes or head[:4] in magics or (head[:1] == b"G" and head[188:189] == b"G"):
        return "video"
    if head[:2] in (b"\x08\0", b"\x02\0", b"\0\x08", b"\0\x02"):  # no preamble, but it starts as a data set does
        return "dicom"
    return None


def _is_text(head: bytes) -> bool:
    return all(byte in b"\t\n\r\f\x1b" or 32 <= byte < 127 or byte > 160 for byte in head)


# ---------------------------------------------------------------------------------------------- arrays, pictures, video


def _from_array(array: np.ndarray, job: _Job, found: dict[str, Any], hu: bool = False) -> Scan:
    """`H W`, `H W C`, `D H W` or `D H W C` as a Scan. A last axis of 1, 3 or 4 is colour: no scan is so narrow."""
    if array.dtype.kind not in "biuf":
        raise job.refuse(f"an array of type {array.dtype}", "bool, integer or real voxels")
    if array.ndim not in (2, 3, 4) or (array.ndim == 4 and array.shape[-1] not in (1, 3, 4)):
        raise job.refuse(f"an array of shape {array.shape}", "H W, H W C, D H W or D H W C, with C = 1, 3 or 4 last")
    job.check(array.shape, _held(array.dtype))
    if array.ndim == 2 or array.shape[-1] not in (1, 3, 4):
        array = array[..., None]
    if array.shape[-1] == 4:
        array = _over_black(array)
    if array.ndim == 3:
        array = array[None]
    array = array.transpose(3, 0, 1, 2)
    hu = hu or _is_hu_like(array)
    if array.shape[1] > 1 and not hu:  # may be a clip; what is in HU is a volume
        keep = job.keep(array.shape[1], found)
        array = array if len(keep) == array.shape[1] else array[:, keep]
    return _unit(array, (None, None, None), job, found, hu=hu)


def _held(dtype: np.dtype) -> int:
    """Bytes that a voxel takes while it is read: 8-bit pictures stay as they are, all else passes through float32."""
    return 1 if dtype in (np.uint8, bool) else max(4, dtype.itemsize)


def _over_black(array: np.ndarray) -> np.ndarray:
    """`(..., 4)` with alpha as `(..., 3)` on black: what lies under a transparent pixel was never meant to be seen."""
    if array.dtype != np.uint8 or array[..., 3].min() == 255:  # elsewhere alpha's scale is unknown
        return array[..., :3]
    return ((array[..., :3].astype(np.uint16) * array[..., 3:] + 127) // 255).astype(np.uint8)


def _read_npy(stream: Any, job: _Job) -> np.ndarray:
    """A `.npy` stream, header first. Object arrays, which would be unpickled, are refused."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    read_header = headers.get(np.lib.format.read_magic(stream))
    if read_header is None:
        raise job.refuse("a .npy version for structured types", "version 1 or 2")
    shape, fortran, dtype = read_header(stream)
    if dtype.kind not in "biuf":
        raise job.refuse(f"an array of type {dtype}", "bool, integer or real voxels")
    job.check(shape, _held(dtype))
    size = math.prod(shape) * dtype.itemsize
    data = stream.read(size)
    if len(data) < size:
        raise job.refuse(f"{len(data):,} bytes of voxels", f"{size:,}, as the header says")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _read_npz(data: bytes, job: _Job) -> Scan:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename[:-4]: info for info in archive.infolist() if info.filename.endswith(".npy")}
        key = next((key for key in NPZ_KEYS if key in members), next(iter(members)) if len(members) == 1 else None)
        if key is None:
            raise job.refuse(
                f"a zip archive of {len(members)} arrays", f"one array, or one of the keys {', '.join(NPZ_KEYS)}"
            )
        job.check((members[key].file_size,), 1, packed=members[key].compress_size)
        with archive.open(members[key]) as stream:
            array = _read_npy(stream, job)
    return _from_array(array, job, {"format": "npz"}, hu=key == "hu")


def _read_image(image: Any, job: _Job) -> Scan:
    """A PIL image, not yet loaded: its header has given size and mode. Pages and animation frames become depth."""
    found: dict[str, Any] = {"format": (image.format or "image").lower()}
    width, height = image.size
    job.check_pixels(height, width)
    total = 1 if found["format"] in ("jpeg", "mpo") else getattr(image, "n_frames", 1)  # a camera's MPO holds previews
    keep = job.keep(total, found) if total > 1 else [0]
    job.check((len(keep), height, width), 4)
    frames = []
    for index in keep:
        if total > 1:
            image.seek(index)
            if image.size != (width, height):
                raise job.refuse("pages of several sizes", "pages of one size")
        frames.append(_pixels(image, job))
    if len({frame.ndim for frame in frames}) > 1:  # an animation that is grey in part
        frames = [np.repeat(frame[..., None], 3, axis=2) if frame.ndim == 2 else frame for frame in frames]
    array = frames[0][None] if len(frames) == 1 else np.stack(frames)
    array = array[None] if array.ndim == 3 else array.transpose(3, 0, 1, 2)
    return _unit(array, (None, None, None), job, found)


def _pixels(image: Any, job: _Job) -> np.ndarray:
    """The picture as `(H, W)` in its own depth or `(H, W, 3)` uint8, upright (EXIF), over black."""
    if image.getexif().get(0x0112, 1) != 1:
        image = job.need("PIL.ImageOps", "pillow").exif_transpose(image)
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode in ("L", "F") or image.mode[0] == "I":  # "I;16" and its byte orders, "I"
        return np.asarray(image)
    if "A" in image.getbands() or "a" in image.getbands() or (image.mode == "P" and "transparency" in image.info):
        return _over_black(np.asarray(image.convert("RGBA")))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # palette, CMYK, YCbCr, LAB, HSV


def _read_video(file: bytes | Path, job: _Job) -> Scan:
    """A video through decord, or through PyAV where decord is absent or can't (AV1, some containers)."""
    found: dict[str, Any] = {"format": "video"}
    try:
        array = _frames_by_decord(file, job, found)
    except M3RetReadError:
        raise
    except Exception:  # absent, or a codec that it lacks: PyAV decides
        array = _frames_by_av(file, job, found)
    return _unit(array.transpose(3, 0, 1, 2), (None, None, None), job, found)


def _frames_by_decord(file: bytes | Path, job: _Job, found: dict[str, Any]) -> np.ndarray:
    decord = importlib.import_module("decord")
    decord.logging.set_level(decord.logging.QUIET)  # it prints the names of files that it can't open
    try:  # the size, from the header; decord alone would have to decode a frame to learn it
        with importlib.import_module("av").open(_openable(file)) as container:
            height, width = container.streams.video[0].height, container.streams.video[0].width
        job.check_pixels(height, width)
        reader = decord.VideoReader(_openable(file), ctx=decord.cpu(0))
    except ImportError:
        reader = decord.VideoReader(_openable(file), ctx=decord.cpu(0))
        height, width, _ = reader[0].shape
        job.check_pixels(height, width)
    keep = job.keep(len(reader), found)
    job.check((len(keep), height, width, 3), 1)
    found["fps"] = float(reader.get_avg_fps())
    return reader.get_batch(keep).asnumpy()


def _frames_by_av(file: bytes | Path, job: _Job, found: dict[str, Any]) -> np.ndarray:
    av = job.need("av", "av")
    with av.open(_openable(file)) as container:
        stream = container.streams.video[0]
        job.check_pixels(stream.height, stream.width)
        total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    keep = job.keep(total, found)
    job.check((len(keep), stream.height, stream.width, 3), 1)
    frames, wanted = [], set(keep)
    with av.open(_openable(file)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        found["fps"] = float(stream.average_rate or 0)
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
            if index == keep[-1]:
                break
    if len(frames) < len(keep):
        raise job.refuse("a video that ends early", f"{total} frames, as its header says")
    return np.stack(frames)


def _openable(file: bytes | Path) -> Any:
    """What both decoders open. An absolute path, so that no name reads as a protocol."""
    return str(file.resolve()) if isinstance(file, Path) else io.BytesIO(file)


# ---------------------------------------------------------------------------------------------------------------- NIfTI


def _read_nifti(data: bytes, job: _Job) -> Scan:
    """NIfTI-1 or -2 in one file, plain or gzipped. The header is judged before any voxel is inflated."""
    nifti = job.need("nibabel.nifti1", "nibabel"), job.need("nibabel.nifti2", "nibabel")
    zipped = data[:2] == b"\x1f\x8b"
    head = _gunzip(data, 540) if zipped else data[:540]
    second = head[4:8] in (b"n+2\0", b"ni2\0")
    if not second and head[344:348] not in (b"n+1\0", b"ni1\0"):
        raise job.refuse("gzip of something other than NIfTI", "a .nii.gz volume")
    if head[5 if second else 345 :][:1] == b"i":
        raise job.refuse("a NIfTI header whose voxels lie in another file", "a single .nii or .nii.gz file")
    header = nifti[1].Nifti2Header(head) if second else nifti[0].Nifti1Header(head[:348])
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
    colours = len(dtype.names) if dtype.names else 1
    if (dtype.kind not in "iuf" and colours == 1) or offset < 0:
        raise job.refuse(f"NIfTI voxels of type {dtype}", "integer, real or RGB voxels")
    x, y, z = (*shape, 1, 1)[:3]
    job.check((x, y, z, colours, min(shape[3:], default=1) and 1), 1 if dtype.names else _held(dtype))
    end = offset + x * y * z * dtype.itemsize
    job.check((end,), 1, packed=len(data))
    raw = _gunzip(data, end) if zipped else data
    if len(raw) < end:
        raise job.refuse(f"{len(raw):,} bytes", f"{end:,}, as the NIfTI header says")
    flat = np.frombuffer(raw, dtype, x * y * z, offset)
    flat = flat.view(np.uint8) if colours > 1 else flat
    voxels = flat.reshape(z, y, x, colours)  # x runs fastest in the file
    voxels = (_over_black(voxels) if colours == 4 else voxels).transpose(3, 2, 1, 0)

    found: dict[str, Any] = {"format": "nifti", "volumes": math.prod(shape[3:])}
    found["affine"] = "sform" if header["sform_code"] > 0 else "qform" if header["qform_code"] > 0 else "pixdim"
    steps = (header.get_base_affine() if found["affine"] == "pixdim" else header.get_best_affine())[:3, :3]
    unit = {"meter": 1000.0, "micron": 0.001}.get(header.get_xyzt_units()[0], 1.0)
    if not np.isfinite(steps).all() or abs(np.linalg.det(steps)) < 1e-12:
        found["affine"], steps = "none", np.diag([-1.0, 1.0, 1.0])  # the axes that nibabel, too, assumes
    voxels, spacing = _canonical(voxels, steps * unit, found)
    spacing = (None, None, None) if found["affine"] == "none" else spacing
    slope, intercept = header.get_slope_inter()
    scale = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    return _unit(voxels, spacing, job, found, scale=scale)


def _gunzip(data: bytes, limit: int) -> bytes:
    """The first `limit` bytes of a gzip file, which may have several members (bgzip). Its checksums are verified."""
    pieces, size = [], 0
    while size < limit and data[:2] == b"\x1f\x8b":
        stream = zlib.decompressobj(31)
        pieces.append(stream.decompress(data, limit - size))
        size += len(pieces[-1])
        if not stream.eof:
            stream.decompress(stream.unconsumed_tail, 1)  # reaches the checksum, where the voxels end with the stream
        data = stream.unused_data
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


# ---------------------------------------------------------------------------------------------------------------- DICOM


@dataclass(frozen=True, eq=False)
class _Plane:
    """One frame of one data set, and where it lies (LPS, mm)."""

    name: str  # of the file, for messages
    dataset: Any
    frame: int
    number: int  # InstanceNumber, or else the order of arrival
    position: np.ndarray | None
    orientation: np.ndarray | None  # (2, 3): along a row, down a column
    spacing: tuple[float | None, float | None]  # between rows, between columns
    values: Any  # the item with the rescale: a functional group of the frame, or the data set itself
    window: Any  # the item with the window or VOI LUT

    @property
    def normal(self) -> np.ndarray:
        return np.zeros(3) if self.orientation is None else np.cross(self.orientation[0], self.orientation[1])


def _read_folder(folder: Path, job: _Job) -> Scan:
    """A folder as one DICOM series. Files that aren't DICOM are passed over and counted."""
    files: list[Path] = []
    for root, _, names in os.walk(folder):
        files += [Path(root, name) for name in names]
        if len(files) > job.limits.max_files:
            raise job.refuse(f"more than {job.limits.max_files:,} files", "one DICOM series; see ReadLimits")
    dicom = [path for path in sorted(files) if path.is_file() and _sniff(path) == "dicom"]
    if not dicom:
        raise job.refuse(f"a folder of {len(files)} files, none of them DICOM", "a DICOM series")
    job.check((sum(path.stat().st_size for path in dicom),), 1)
    return _read_series(dicom, job, {"files_ignored": len(files) - len(dicom)})


def _read_series(sources: list[Any], job: _Job, found: dict[str, Any]) -> Scan:
    """DICOM files, or data sets, of one series: a picture, a cine or a volume."""
    if not 1 <= len(sources) <= job.limits.max_files:
        raise job.refuse(f"{len(sources)} slices", f"1 to {job.limits.max_files:,}; see ReadLimits")
    planes: list[_Plane] = []
    for source in sources:
        part = job if len(sources) == 1 else replace(job, name=f"{job.name}/{_name_of(source)}")
        with part.refusing():
            dataset = _parse_dicom(source, part)
            if any(key in dataset for key in PIXEL_KEYS):
                planes += _planes_of(dataset, len(planes), part)
            elif "files_ignored" in found:  # a folder's DICOMDIR, report or structure set
                found["files_ignored"] += 1
            else:
                raise part.refuse("DICOM without pixel data, or cut short", "an image, a cine or a series")
    if not planes:
        raise job.refuse("no DICOM file with pixel data", "a DICOM series")
    series = len({str(plane.dataset.get("SeriesInstanceUID", "")) for plane in planes})
    if series > 1:
        raise job.refuse(f"slices of {series} series", "one series")
    burned = str(planes[0].dataset.get("BurnedInAnnotation", "")).lower()
    found["burned_in_annotation"] = burned if burned in ("yes", "no") else "unknown"
    found["format"] = "dicom"
    if len(planes) > 1:
        found["format"] = "dicom multi-frame" if len(sources) == 1 else "dicom series"
        group = _largest_group(planes)
        found["slices_left_out"], planes = len(planes) - len(group), group
    placed = all(p.position is not None and p.orientation is not None and p.spacing[0] for p in planes)
    if len(sources) == 1 and len({str(plane.position) for plane in planes}) == 1:
        placed = False  # one place: a picture, or frames through time
    if placed:
        planes, step = _stack(planes, found)
        return _dicom_scan(planes, step, job, found)
    if len(planes) > 1:
        planes = sorted(planes, key=lambda plane: (plane.number, plane.frame))
        if len(sources) > 1:
            found["order"] = "InstanceNumber, for lack of positions"
        planes = [planes[index] for index in job.keep(len(planes), found)]
    return _dicom_scan(planes, None, job, found)


def _parse_dicom(source: Any, job: _Job) -> Any:
    """A pydicom Dataset, its pixels not decoded. A deflated one is inflated once more, to see that it keeps limits."""
    if hasattr(source, "group_dataset"):
        return source
    if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise job.refuse(f"a {type(source).__name__}", "a DICOM file or data set")
    file = Path(source) if isinstance(source, (str, os.PathLike)) else bytes(source)
    if isinstance(file, Path) and not file.is_file():
        raise job.refuse("no such file", "a DICOM file")
    if _sniff(file) != "dicom":
        raise job.refuse("a file that isn't DICOM", "a DICOM file or data set")
    stream = io.BytesIO(job.read_bytes(file) if isinstance(file, Path) else file)
    reader = job.need("pydicom.filereader", "pydicom")
    reader.read_preamble(stream, True)
    meta = reader.read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") == DEFLATED:
        packed = stream.read()
        inflate, size, tail = zlib.decompressobj(-15), 0, packed
        while tail and not inflate.eof:
            size += len(inflate.decompress(tail, 2**20))
            tail = inflate.unconsumed_tail
            job.check((max(size, 1),), 1, packed=len(packed))
    stream.seek(0)
    return reader.dcmread(stream, force=True)


def _planes_of(dataset: Any, arrived: int, job: _Job) -> list[_Plane]:
    """The frames of a data set, sizes checked. Enhanced objects place each frame by its functional groups."""
    rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel") or 1)
    frames = int(dataset.get("NumberOfFrames") or 1)
    job.check_pixels(rows, columns)
    job.check((min(frames, job.num_frames or frames), rows, columns, samples), 1)
    packed = len(next(dataset[key].value for key in PIXEL_KEYS if key in dataset))
    job.check((frames, rows, columns, samples), 1, packed=packed)
    number = _numbers(dataset, "InstanceNumber", 1)
    per_frame, shared = (dataset.get(f"{kind}FunctionalGroupsSequence") or [] for kind in ("PerFrame", "Shared"))

    def item(frame: int, sequence: str) -> Any:
        groups = (*per_frame[frame : frame + 1], *shared[:1])
        return next((group[sequence][0] for group in groups if group.get(sequence)), dataset)

    planes = []
    for frame in range(frames):
        place, measures = item(frame, "PlanePositionSequence"), item(frame, "PixelMeasuresSequence")
        # a classic multi-frame image has one position for all frames, which places none of them
        position = _numbers(place, "ImagePositionPatient", 3) if place is not dataset or frames == 1 else None
        orientation = _numbers(item(frame, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
        mm = (_numbers(measures, key, 2) for key in ("PixelSpacing", "ImagerPixelSpacing"))
        spacing = next((pair for pair in mm if pair and min(pair) > 0), (None, None))
        planes.append(
            _Plane(
                name=job.name,
                dataset=dataset,
                frame=frame,
                number=int(number[0]) if number else arrived,
                position=np.array(position) if position else None,
                orientation=np.array(orientation).reshape(2, 3) if orientation and any(orientation) else None,
                spacing=(spacing[0], spacing[1]),
                values=item(frame, "PixelValueTransformationSequence"),
                window=item(frame, "FrameVOILUTSequence"),
            )
        )
    return planes


def _numbers(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """The first `count` numbers of an element, or None where it is absent, short or no number."""
    value = dataset.get(keyword)
    try:
        values = [
            float(v) for v in (value if isinstance(value, (list, tuple)) or hasattr(value, "append") else [value])
        ]
    except (TypeError, ValueError):
        return None
    return tuple(values[:count]) if len(values) >= count and all(map(math.isfinite, values[:count])) else None


def _largest_group(planes: list[_Plane]) -> list[_Plane]:
    """The largest set of parallel planes of one size; of equal sets the most axial (a three-plane localiser)."""
    keys = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation")

    def fit(a: _Plane, b: _Plane) -> bool:
        if a.spacing != b.spacing or any(a.dataset.get(key) != b.dataset.get(key) for key in keys):
            return False
        if a.orientation is None or b.orientation is None:
            return a.orientation is b.orientation
        return bool(np.abs(a.orientation - b.orientation).max() < 0.01)  # about half a degree

    groups: list[list[_Plane]] = []
    for plane in planes:
        home = next((group for group in groups if fit(plane, group[0])), None)
        if home is None:
            groups.append(home := [])
        home.append(plane)
    return max(groups, key=lambda group: (len(group), *np.round(np.abs(group[0].normal[::-1]), 3)))


def _stack(planes: list[_Plane], found: dict[str, Any]) -> tuple[list[_Plane], np.ndarray | None]:
    """Planes in order along their normal, one per position, and the step (LPS mm) from one to the next."""
    normal = planes[0].normal
    heights = np.array([np.dot(plane.position, normal) for plane in planes])  # type: ignore[arg-type]
    order = sorted(range(len(planes)), key=lambda i: (round(float(heights[i]), 3), planes[i].number, planes[i].frame))
    heights = heights[order]
    first = np.concatenate(([True], np.diff(heights) > 0.01))  # closer than 10 µm is the same place
    planes = [planes[i] for i, new in zip(order, first, strict=True) if new]
    found["slices"], found["duplicate_positions"] = len(planes), len(first) - len(planes)
    if len(planes) == 1:
        return planes, None
    places = np.array([plane.position for plane in planes])
    gaps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    distance = float(np.median(gaps))
    line = (places[-1] - places[0]) / np.linalg.norm(places[-1] - places[0])
    cosine = float(line @ normal) / float(np.linalg.norm(normal))
    found["missing_slices"] = int((np.rint(gaps / distance) - 1).clip(0).sum())
    found["gantry_tilt_degrees"] = round(math.degrees(math.acos(min(1.0, cosine))), 1)
    return planes, line * distance


def _dicom_scan(planes: list[_Plane], step: np.ndarray | None, job: _Job, found: dict[str, Any]) -> Scan:
    """Decode the planes, in order, and bring them to [0, 1]. With a step they are a volume, and get oriented."""
    head = planes[0].dataset
    spacing: Spacing = (None, *planes[0].spacing)
    shape = (len(planes), int(head.Rows), int(head.Columns))
    photometric = str(head.get("PhotometricInterpretation", "")).upper()
    bits = int(head.get("BitsStored") or head.get("BitsAllocated") or 32)
    if photometric == "PALETTE COLOR" or int(head.get("SamplesPerPixel") or 1) > 1:
        array = np.empty((3, *shape), np.uint8 if bits <= 8 or photometric == "PALETTE COLOR" else np.float32)
        job.check(array.shape, array.itemsize)
        for index, plane, pixels in _decoded(planes, job):
            pixels = _palette(plane.dataset, pixels.dtype)[pixels] if photometric == "PALETTE COLOR" else pixels
            array[:, index] = pixels[..., :3].transpose(2, 0, 1)
        if array.dtype != np.uint8:
            array /= 2.0**bits - 1
        view = array
        if step is not None:
            view, spacing = _placed(array, planes[0], step, found)
        return _unit(view, spacing, job, found, rule="8-bit" if array.dtype == np.uint8 else "bit depth")

    hounsfield = all(_is_hu(plane) for plane in planes)
    # A window is how one image was to be looked at. It often differs from slice to slice, and NIfTI has none: a volume
    # must not depend on it.
    windowed = not hounsfield and step is None and all(_window_of(plane.window) is not None for plane in planes)
    plain = not (hounsfield or windowed) and all(_is_plain(plane) for plane in planes)
    array = np.empty(shape, np.uint8 if plain else np.float32)
    job.check(shape, array.itemsize)
    padding: np.ndarray | None = None
    for index, plane, pixels in _decoded(planes, job):
        mask = _is_padding(pixels, plane.dataset)
        if mask is not None:
            padding = np.zeros(shape, bool) if padding is None else padding
            padding[index] = mask
        array[index] = pixels
        if not plain:
            _apply_modality(array[index], plane.values, job)
            if windowed:
                _apply_window(array[index], plane.window, job)
    inverted = photometric == "MONOCHROME1" and not hounsfield  # the sign of a physical unit is not a matter of display
    found["inverted"] = inverted
    rule = "hounsfield" if hounsfield else "window" if windowed else "8-bit" if plain else "percentiles"
    view = array[None]
    padding = None if padding is None else padding[None]
    if step is not None:
        padding = None if padding is None else _placed(padding, planes[0], step, found)[0]
        view, spacing = _placed(view, planes[0], step, found)
    return _unit(view, spacing, job, found, rule=rule, padding=padding, inverted=inverted)


def _palette(dataset: Any, dtype: np.dtype) -> np.ndarray:
    """`(256 or 65536, 3)` uint8: the colour of every stored value."""
    values = np.arange(2 ** (8 * dtype.itemsize), dtype=dtype)
    table = importlib.import_module("pydicom.pixels").apply_color_lut(values[None], dataset)[0]
    return (table >> (8 if table.max() > 255 else 0)).astype(np.uint8)  # 16-bit tables often hold 8-bit colours


def _placed(array: np.ndarray, plane: _Plane, step: np.ndarray, found: dict[str, Any]) -> tuple[np.ndarray, Spacing]:
    """A volume of slices in the canonical orientation: DICOM's patient axes (LPS) become RAS, as NIfTI's are."""
    assert plane.orientation is not None
    down, along = plane.orientation[1] * plane.spacing[0], plane.orientation[0] * plane.spacing[1]
    return _canonical(array, np.stack([step, down, along], axis=1) * np.array([[-1.0], [-1.0], [1.0]]), found)


def _decoded(planes: list[_Plane], job: _Job) -> Iterator[tuple[int, _Plane, np.ndarray]]:
    """(place in `planes`, plane, pixels as `(H, W)` or `(H, W, 3)` RGB), in an order that suits the decoder."""
    size = (int(planes[0].dataset.Rows), int(planes[0].dataset.Columns))
    places: dict[int, list[int]] = {}
    for index, plane in enumerate(planes):
        places.setdefault(id(plane.dataset), []).append(index)
    for indices in places.values():
        indices.sort(key=lambda index: planes[index].frame)
        dataset = planes[indices[0]].dataset
        part = replace(job, name=planes[indices[0]].name)
        with part.refusing():
            frames = [planes[index].frame for index in indices]
            for index, pixels in zip(indices, _decode(dataset, frames, part), strict=True):
                if pixels.shape[:2] != size:
                    raise part.refuse(f"a frame of {pixels.shape[:2]} pixels", f"{size}, as in the header")
                yield index, planes[index], pixels


def _decode(dataset: Any, frames: list[int], job: _Job) -> Iterable[np.ndarray]:
    """The given frames, which ascend, of one data set."""
    syntax, total = _transfer_syntax(dataset), int(dataset.get("NumberOfFrames") or 1)
    if syntax.is_encapsulated:
        _check_codestreams(dataset, total, job)
    if syntax == JPEG_EXTENDED and int(dataset.BitsStored) > 8:
        return (_decode_jpeg_12bit(dataset, frame, total, job) for frame in frames)
    decoder = job.need("pydicom.pixels", "pydicom").get_decoder(syntax)
    # Pillow's libjpeg-turbo takes a quarter of GDCM's time; elsewhere pydicom's own order is the faster one
    plugin = "pillow" if syntax == JPEG_BASELINE and "pillow" in decoder.available_plugins else ""
    if frames == list(range(total)):  # all of it: one pass over the fragments
        pixels = decoder.as_array(dataset, decoding_plugin=plugin)[0]
        return pixels if total > 1 else [pixels]
    return (decoder.as_array(dataset, index=frame, decoding_plugin=plugin)[0] for frame in frames)


def _transfer_syntax(dataset: Any) -> Any:
    """The declared syntax; where the file meta is missing, what the data set was read (or would be written) as."""
    uid = importlib.import_module("pydicom.uid")
    declared = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if declared:
        return declared
    implicit, little = getattr(dataset, "original_encoding", (None, None))
    if little is False:
        return uid.ExplicitVRBigEndian
    return uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian


def _check_codestreams(dataset: Any, total: int, job: _Job) -> None:
    """Refuse a compressed frame of another size than the header's: decoders allocate what the codestream asks for."""
    encaps = importlib.import_module("pydicom.encaps")
    for frame in encaps.generate_frames(dataset.PixelData, number_of_frames=total):
        size = _codestream_size(frame)
        if size is not None and size != (int(dataset.Rows), int(dataset.Columns)):
            raise job.refuse(f"a frame of {size[0]} x {size[1]} pixels", "the size in the DICOM header")


def _codestream_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) in a JPEG 2000 SIZ, or a JPEG or JPEG-LS SOF marker; None for anything else, RLE above all."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start >= 0:
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        return bottom - top, right - left
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">HH", frame, at + 5)
        else:
            at += 2 + struct.unpack_from(">H", frame, at + 2)[0]
    return None


def _decode_jpeg_12bit(dataset: Any, frame: int, total: int, job: _Job) -> np.ndarray:
    """A frame of 12-bit JPEG Extended. pydicom leaves it to a GPL decoder and passes over GDCM's, which is right."""
    gdcm = job.need("gdcm", "python-gdcm")
    encaps = importlib.import_module("pydicom.encaps")
    rows, columns, bits = int(dataset.Rows), int(dataset.Columns), int(dataset.BitsStored)
    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(encaps.get_frame(dataset.PixelData, frame, number_of_frames=total))
    fragments.AddFragment(fragment)
    element, image = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010)), gdcm.Image()
    element.SetValue(fragments.__ref__())
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, bits, bits - 1, int(dataset.PixelRepresentation)))
    data = image.GetBuffer().encode("utf-8", "surrogateescape")  # GDCM hands bytes over as text
    return np.frombuffer(data, "<i2" if dataset.PixelRepresentation else "<u2").reshape(rows, columns)


def _is_hu(plane: _Plane) -> bool:
    """Hounsfield units: declared so, or CT with a rescale whose type isn't said ("US" is DICOM for unspecified)."""
    kind = str(plane.values.get("RescaleType") or "").strip().upper()
    is_ct = str(plane.dataset.get("SOPClassUID", "")) in CT_STORAGE and "RescaleSlope" in plane.values
    return kind == "HU" or (is_ct and kind in ("", "US"))


def _is_plain(plane: _Plane) -> bool:
    """8 unsigned bits without a rescale: a picture, to be read as the same picture in PNG is."""
    elements = (plane.dataset.get(key) for key in ("BitsAllocated", "BitsStored", "PixelRepresentation"))
    return tuple(elements) == (8, 8, 0) and _rescale_of(plane.values) == (1.0, 0.0)


def _rescale_of(item: Any) -> tuple[float, float] | None:
    """(slope, intercept); None where a table takes their place."""
    if item.get("ModalityLUTSequence"):
        return None
    slope, intercept = _numbers(item, "RescaleSlope", 1), _numbers(item, "RescaleIntercept", 1)
    return slope[0] if slope else 1.0, intercept[0] if intercept else 0.0


def _apply_modality(values: np.ndarray, item: Any, job: _Job) -> None:
    """Stored values to measured ones (PS3.3 C.11.1), in place."""
    rescale = _rescale_of(item)
    if rescale is None:
        values[...] = job.need("pydicom.pixels", "pydicom").apply_modality_lut(values.astype(np.int32), item)
    elif rescale != (1.0, 0.0):
        values *= np.float32(rescale[0])
        values += np.float32(rescale[1])


def _window_of(item: Any) -> tuple[float, float] | str | None:
    """The first window (centre, width), "lut" where a table is given instead, None where there is neither."""
    if item.get("VOILUTSequence"):
        return "lut"
    centre, width = _numbers(item, "WindowCenter", 1), _numbers(item, "WindowWidth", 1)
    exact = str(item.get("VOILUTFunction") or "LINEAR").upper() != "LINEAR"
    return (centre[0], width[0]) if centre and width and (width[0] >= 1 or (exact and width[0] > 0)) else None


def _apply_window(values: np.ndarray, item: Any, job: _Job) -> None:
    """Measured values to [0, 1] as the image asks to be seen (PS3.3 C.11.2), in place."""
    window = _window_of(item)
    if isinstance(window, tuple):
        centre, width = window
        function = str(item.get("VOILUTFunction") or "LINEAR").upper()
        if function == "SIGMOID":
            np.exp((values - centre) * np.float32(-4 / width), out=values)
            np.divide(1.0, 1.0 + values, out=values)
            return
        if function == "LINEAR":  # the standard's own half-pixel convention
            centre, width = centre - 0.5, max(width - 1, 1e-6)
        values -= np.float32(centre)
        values *= np.float32(1 / width)
        values += np.float32(0.5)
        np.clip(values, 0, 1, out=values)
    else:
        table = job.need("pydicom.pixels", "pydicom").apply_voi(np.rint(values).astype(np.int32), item)
        values[...] = table
        values /= 2.0 ** int(item.VOILUTSequence[0].LUTDescriptor[2]) - 1


def _is_padding(pixels: np.ndarray, dataset: Any) -> np.ndarray | None:
    """Where stored values mark that nothing was measured (PS3.3 C.7.5.1.1.2), or None where no value does."""
    low = _numbers(dataset, "PixelPaddingValue", 1)
    if low is None:
        return None
    high = _numbers(dataset, "PixelPaddingRangeLimit", 1) or low
    return (pixels >= min(low[0], high[0])) & (pixels <= max(low[0], high[0]))


# ---------------------------------------------------------------------------------------------------------- orientation


def _canonical(volume: np.ndarray, steps: np.ndarray, found: dict[str, Any]) -> tuple[np.ndarray, Spacing]:
    """Bring `(C, a, b, c)` to `(C, D, H, W)` as `read_scan` describes it; a view, and the spacing.

    steps: `(3, 3)`, column n the RAS millimetres of one voxel along axis n. As in nibabel, each voxel axis is named
    after the anatomical one that it is closest to, so that nothing is interpolated.
    """
    spacing = np.linalg.norm(steps, axis=0)
    left, _, right = np.linalg.svd(steps / spacing)
    cosines = left @ right  # the rotation nearest to the steps, which a tilted gantry shears
    axis_of, sign_of = [0, 0, 0], [1.0, 1.0, 1.0]
    for axis in np.argsort(-np.abs(cosines).max(axis=0), kind="stable"):
        world = int(np.abs(cosines[:, axis]).argmax())
        axis_of[world], sign_of[world] = int(axis), float(np.sign(cosines[world, axis]))
        cosines[world] = 0
    mm = [float(spacing[axis]) for axis in axis_of]
    flat = [world for world in range(3) if volume.shape[1 + axis_of[world]] == 1]
    thick = [world for world in range(3) if all(mm[world] > THICK * mm[other] for other in range(3) if other != world)]
    depth = flat[0] if len(flat) == 1 else thick[0] if thick else 2
    order = {2: (2, 1, 0), 1: (1, 2, 0), 0: (0, 2, 1)}[depth]
    towards = (-1.0, -1.0, 1.0 if depth == 2 else -1.0)  # left, posterior, and superior for slices, inferior for rows
    view = volume.transpose(0, *(1 + axis_of[world] for world in order))
    flips = tuple(slice(None, None, int(sign_of[world] * towards[world])) for world in order)
    found["plane"] = ("sagittal", "coronal", "axial")[depth]
    return view[(slice(None), *flips)], (mm[order[0]], mm[order[1]], mm[order[2]])


# ------------------------------------------------------------------------------------------------------------ intensity


def _unit(
    values: np.ndarray,
    spacing: Spacing,
    job: _Job,
    found: dict[str, Any],
    *,
    hu: bool | None = None,
    scale: tuple[float, float] = (1.0, 0.0),
    rule: str | None = None,
    padding: np.ndarray | None = None,
    inverted: bool = False,
) -> Scan:
    """Values `(C, D, H, W)` of any real type to a Scan in [0, 1].

    rule: how, where a DICOM header said: hounsfield, window or bit depth (already applied), 8-bit, percentiles; the
    array is then ours to change. None: what the values say, as uint8 over 255, Hounsfield units (`hu`; None: if they
    look like them), floats already within [0, 1], or else percentiles.
    padding: bool, same shape: voxels that were never measured; they don't count, and become 0.
    """
    if values.dtype == bool:
        values = values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8 and scale == (1.0, 0.0) and not hu and rule in (None, "8-bit"):
        array = _one_channel(values)
        found["intensity"] = "8-bit"
        if inverted:
            array = 255 - array
        if padding is not None:
            array = np.where(padding, np.uint8(0), array)
        return _finish(array, spacing, found, _is_constant(array))

    real = values.dtype.kind == "f"
    array = np.array(values, dtype=np.float32, order="C", copy=None if rule else True)
    if scale != (1.0, 0.0):
        array *= np.float32(scale[0])
        array += np.float32(scale[1])
    measured = _sample(array, padding)
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise job.refuse("voxels that are NaN or infinite", "finite voxels")
    constant = measured.size == 0 or low == high or (padding is not None and float(np.ptp(array[~padding])) == 0)
    if rule is None:
        hu = _is_hu_like(array) if hu is None else hu
        rule = "hounsfield" if hu else "unit" if real and low >= 0 and high <= 1 else "percentiles"
    found["intensity"] = {"unit": "already in [0, 1]", "hounsfield": "hounsfield [-1000, 1000]"}.get(rule, rule)
    if rule == "hounsfield":
        low, high = HU_RANGE
    elif rule == "percentiles" and not constant:
        found["intensity"] = "percentiles .5-99.5"
        lower, upper = (float(edge) for edge in np.percentile(measured, PERCENTILES))
        if upper > lower:
            low, high = lower, upper
        elif padding is not None:
            low, high = float(array[~padding].min()), float(array[~padding].max())
    if rule in ("hounsfield", "percentiles") and not constant:
        array -= np.float32(low)
        array *= np.float32(1 / (high - low))
        np.clip(array, 0, 1, out=array)
    if inverted:
        np.subtract(1, array, out=array)
    if padding is not None:
        array[padding] = 0
    return _finish(array, spacing, found, constant)


def _finish(array: np.ndarray, spacing: Any, found: dict[str, Any], constant: bool) -> Scan:
    if constant:  # nothing to see, at whatever level it lies
        found["constant"], array = True, np.zeros_like(array)
    return Scan(np.ascontiguousarray(array), spacing, found)


def _sample(array: np.ndarray, padding: np.ndarray | None = None) -> np.ndarray:
    """At least a million of the measured voxels, evenly spread; an odd step doesn't walk down a column."""
    step = max(1, array.size // SAMPLE) | 1 if array.size >= 2 * SAMPLE else 1
    picked = array.reshape(-1)[::step]
    return picked if padding is None else picked[~padding.reshape(-1)[::step]]


def _is_hu_like(array: np.ndarray) -> bool:
    if array.dtype.kind not in "if":
        return False
    sample = _sample(array)
    return bool(np.percentile(sample, PERCENTILES[0]) <= HU_LIKE and np.array_equal(sample, np.rint(sample)))


def _is_constant(array: np.ndarray) -> bool:
    first = array.flat[0]
    corner = array[:, :1, ::97, ::97]  # nearly always enough to say no
    return bool((corner == first).all() and (array == first).all())


def _one_channel(array: np.ndarray) -> np.ndarray:
    """`(3, D, H, W)` whose channels are equal as `(1, D, H, W)`: a grey picture stored as RGB is grey."""
    if array.shape[0] != 3 or not np.array_equal(array[0, 0], array[1, 0]) or not np.array_equal(array[0], array[1]):
        return array
    return array[:1] if np.array_equal(array[1], array[2]) else array
