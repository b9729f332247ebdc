"""How does any medical scan file become one array in [0, 1] with its voxel spacing?

`read_scan` finds out what a source is and answers with a `Scan`: NIfTI, video, pictures and NumPy arrays are read here,
DICOM in `reading_dicom_m3ret`; all end as `(C, D, H, W)`, in the intensities that the file itself declares and in one
orientation (`scan_m3ret`). Files are hostile until shown otherwise: sizes are checked before memory is taken, nothing
is unpickled, and every failure is an `M3RetReadError`. This file travels inside every checkpoint, so it imports NumPy
alone; decoders load when a format needs them.

Order below: interface · what kind of source is it · arrays, pictures, video · NIfTI.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .reading_dicom_m3ret import read_folder, read_series
from .scan_m3ret import (
    INTENSITIES,
    NIFTI_1,
    NIFTI_2,
    Job,
    M3RetReadError,
    ReadLimits,
    Scan,
    Spacing,
    StoredScan,
    canonical,
    is_hu_like,
    name_of,
    quiet,
    sniff,
    unit,
)


__all__ = ["M3RetReadError", "ReadLimits", "Scan", "StoredScan", "read_scan", "read_stored"]

IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
NPZ_KEYS = ("hu", "image", "volume", "imgs")  # "imgs" is MedSAM's; "hu" declares Hounsfield units


# ------------------------------------------------------------------------------------------------------------ interface


def read_scan(source: Any, *, num_frames: int | None = None, limits: ReadLimits = ReadLimits()) -> Scan:
    """Read one scan from whatever holds it.

    source: a path or bytes of DICOM, NIfTI (`.nii`, `.nii.gz`), PNG, JPEG, TIFF, BMP, WebP, GIF, `.npy`, `.npz` or
        video; a folder or a list that is one DICOM series; a PIL image; a NumPy or torch array `H W`, `H W C`, `D H W`,
        `D H W C` (C = 1, 3 or 4, last); a row of `datasets` with one of image, video, volume, whose columns `intensity`
        and `spacing` are believed if it has them (`data/schema.py`); or a `Scan`, given back as it is. The content
        decides what a file is, not its name.
    num_frames: at most so many frames, at the centres of equal segments, where depth has no spacing in mm (video, cine,
        GIF, arrays not in HU). Volumes are always whole. None: all frames.

    Volumes come out as radiologists look at them, in the order of an axial DICOM slice (LPS): axial slices, D from
    inferior to superior, H from anterior to posterior, W from the patient's right to left. Where another axis is more
    than 1.5 times coarser than both others, the slices are that axis': coronal (D anterior to posterior, H superior to
    inferior, W right to left), or sagittal (D right to left, H superior to inferior, W anterior to posterior).
    Arrays, pictures and single DICOM images stay as stored.

    Raises M3RetReadError for whatever can't be read, ValueError for a num_frames below 1.
    """
    # by name too: a checkpoint's copy of the code has a class of its own
    if isinstance(source, Scan) or type(source).__name__ == "Scan":
        return source
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; expected None or at least 1")
    job = Job(name_of(source), num_frames, limits)
    with quiet, job.refusing():
        scan = _read(source, job)
        assert isinstance(scan, Scan)
        return scan


def read_stored(source: Any, *, limits: ReadLimits = ReadLimits()) -> StoredScan:
    """Read one scan, all of its frames, as a data set keeps it: the values that its file declares, in 8 or 16 bits.

    Values are kept exactly where they are whole numbers of 16 bits. HU are rounded to whole ones; other values come
    scaled to [0, 1], in steps of 1/65535.

    Raises M3RetReadError for whatever can't be read.
    """
    job = Job(name_of(source), None, limits, keep_stored=True)
    with quiet, job.refusing():
        stored = _read(source, job)
        assert isinstance(stored, StoredScan)
        return stored


# -------------------------------------------------------------------------------------------- what kind of source is it


def _read(source: Any, job: Job) -> Scan | StoredScan:
    if isinstance(source, dict):
        return _read_row(source, job)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read_file(bytes(source), job)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            return read_folder(path, job)
        if not path.is_file():
            raise job.refuse("no such file", "a file or a folder that exists")
        return _read_file(path, job)
    if isinstance(source, (list, tuple)):
        return read_series(list(source), job, {})
    if hasattr(source, "group_dataset"):  # a pydicom Dataset
        return read_series([source], job, {})
    if hasattr(source, "getbands"):  # a PIL image
        return _read_image(source, job)
    if hasattr(source, "detach"):  # a torch tensor; bfloat16 has no NumPy type
        source = source.detach().cpu()
        source = source.float() if str(source.dtype) == "torch.bfloat16" else source
    if hasattr(source, "__array__"):
        return _from_array(np.asarray(source), job, {"format": "array"})
    raise job.refuse(f"a {type(source).__name__}", "a path, bytes, image, array, DICOM series or datasets row")


def _read_row(row: dict[str, Any], job: Job) -> Scan | StoredScan:
    if "bytes" in row or "path" in row:
        for key in ("bytes", "path"):
            if row.get(key) is not None:
                return _read(row[key], job)
        raise job.refuse("neither bytes nor a path", "one of them")
    given = [key for key in ("image", "video", "volume") if row.get(key) is not None]
    if len(given) != 1:
        raise job.refuse(f"a row with {len(given)} of image, video, volume", "exactly one that is not null")
    intensity = row.get("intensity")
    if intensity not in (None, *INTENSITIES):
        raise job.refuse("an unknown intensity", f"null or one of {', '.join(INTENSITIES)}")
    return _read(row[given[0]], replace(job, intensity=intensity, spacing=_spacing_of(row, job)))


def _spacing_of(row: dict[str, Any], job: Job) -> Spacing | None:
    """What a row declares: nothing where it has no such column, and in it null for what is unknown."""
    if "spacing" not in row:
        return None
    mm = (None, None, None) if row["spacing"] is None else tuple(row["spacing"])
    if len(mm) != 3:
        raise job.refuse(f"a spacing of {len(mm)} numbers", "three, along D, H, W")
    return tuple(None if value is None else float(value) for value in mm)  # type: ignore[return-value]


def _read_file(file: bytes | Path, job: Job) -> Scan | StoredScan:
    """Read a file, given as its path or its bytes."""
    kind = sniff(file)
    if kind == "video":
        return _read_video(file, job)
    data = job.read_bytes(file) if isinstance(file, Path) else file
    if kind == "dicom":
        return read_series([data], job, {})
    if kind == "nifti":
        return _read_nifti(data, job)
    if kind == "npy":
        return _from_array(_read_npy(io.BytesIO(data), job), job, {"format": "npy"})
    if kind == "npz":
        return _read_npz(data, job)
    if kind == "image":
        with job.need("PIL.Image", "pillow").open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            return _read_image(image, job)
    if not data:
        what = "an empty file"
    elif _is_text(data[:512]):
        what = "text"
    else:
        what = "content of an unknown type"
    raise job.refuse(what, "DICOM, NIfTI, PNG, JPEG, TIFF, BMP, WebP, GIF, video, .npy or .npz")


def _is_text(head: bytes) -> bool:
    return all(byte in b"\t\n\r\f\x1b" or 32 <= byte < 127 or byte > 160 for byte in head)


# ---------------------------------------------------------------------------------------------- arrays, pictures, video


def _from_array(array: np.ndarray, job: Job, found: dict[str, Any], hu: bool = False) -> Scan | StoredScan:
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
    hu = hu or is_hu_like(array)
    if array.shape[1] > 1 and not hu:  # may be a clip; what is in HU is a volume
        keep = job.keep(array.shape[1], found)
        array = array if len(keep) == array.shape[1] else array[:, keep]
    return unit(array, (None, None, None), job, found, hu=hu)


def _held(dtype: np.dtype) -> int:
    """Bytes that a voxel takes while it is read: 8-bit pictures stay as they are, all else passes through float32."""
    return 1 if dtype in (np.uint8, bool) else max(4, dtype.itemsize)


def _over_black(array: np.ndarray) -> np.ndarray:
    """`(..., 4)` with alpha as `(..., 3)` on black: what lies under a transparent pixel was never meant to be seen."""
    if array.dtype != np.uint8 or array[..., 3].min() == 255:  # elsewhere alpha's scale is unknown
        return array[..., :3]
    return ((array[..., :3].astype(np.uint16) * array[..., 3:] + 127) // 255).astype(np.uint8)


def _read_npy(stream: Any, job: Job) -> np.ndarray:
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


def _read_npz(data: bytes, job: Job) -> Scan | StoredScan:
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


def _read_image(image: Any, job: Job) -> Scan | StoredScan:
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
    return unit(array, (None, None, None), job, found)


def _pixels(image: Any, job: Job) -> np.ndarray:
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


def _read_video(file: bytes | Path, job: Job) -> Scan | StoredScan:
    """A video through decord, or through PyAV where decord is absent, can't (AV1) or would give other frames."""
    found: dict[str, Any] = {"format": "video"}
    try:
        array = _frames_by_decord(file, job, found)
    except M3RetReadError:
        raise
    except Exception:  # absent, a codec that it lacks, or `_loses_its_place`: PyAV decides
        array = _frames_by_av(file, job, found)
    return unit(array.transpose(3, 0, 1, 2), (None, None, None), job, found)


def _frames_by_decord(file: bytes | Path, job: Job, found: dict[str, Any]) -> np.ndarray:
    decord = importlib.import_module("decord")
    decord.logging.set_level(decord.logging.QUIET)  # it prints the names of files that it can't open
    try:  # the size, from the header; decord alone would have to decode a frame to learn it
        with importlib.import_module("av").open(_openable(file)) as container:
            height, width = container.streams.video[0].height, container.streams.video[0].width
            if _loses_its_place(container):
                raise ValueError("frames that decord would confuse")
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


def _loses_its_place(container: Any) -> bool:
    """Whether decord takes one frame for another: in MPEG's own containers, and of frames that are stored in another
    order than shown, unless they are H.264 or H.265 in a container that tells both orders."""
    context, kind = container.streams.video[0].codec_context, container.format.name
    ordered = context.codec.canonical_name in ("h264", "hevc") and kind != "avi"
    return kind in ("mpeg", "mpegts") or bool(context.has_b_frames and not ordered)


def _frames_by_av(file: bytes | Path, job: Job, found: dict[str, Any]) -> np.ndarray:
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


def _read_nifti(data: bytes, job: Job) -> Scan | StoredScan:
    """NIfTI-1 or -2 in one file, plain or gzipped. The header is judged before any voxel is inflated."""
    nibabel = job.need("nibabel", "nibabel")
    zipped = data[:2] == b"\x1f\x8b"
    head = _gunzip(data, 540) if zipped else data[:540]
    second = head[4:8] in NIFTI_2
    magic = head[4:8] if second else head[344:348]
    if not second and magic not in NIFTI_1:
        raise job.refuse("gzip of something other than NIfTI", "a .nii.gz volume")
    if magic.startswith(b"ni"):
        raise job.refuse("a NIfTI header whose voxels lie in another file", "a single .nii or .nii.gz file")
    header = nibabel.Nifti2Header(head) if second else nibabel.Nifti1Header(head[:348])
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
    colours = len(dtype.names) if dtype.names else 1
    if (dtype.kind not in "iuf" and colours == 1) or offset < 0:
        raise job.refuse(f"NIfTI voxels of type {dtype}", "integer, real or RGB voxels")
    x, y, z = (*shape, 1, 1)[:3]
    job.check((x, y, z, colours, int(all(shape[3:]))), 1 if dtype.names else _held(dtype))
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
    found["affine"] = next((form for form in ("sform", "qform") if header[f"{form}_code"] > 0), "pixdim")
    steps = (header.get_base_affine() if found["affine"] == "pixdim" else header.get_best_affine())[:3, :3]
    mm = {"meter": 1000.0, "micron": 0.001}.get(header.get_xyzt_units()[0], 1.0)
    if not np.isfinite(steps).all() or abs(np.linalg.det(steps)) < 1e-12:
        found["affine"], steps = "none", np.diag([-1.0, 1.0, 1.0])  # the axes that nibabel, too, assumes
    voxels, spacing = canonical(voxels, steps * mm, found)
    spacing = (None, None, None) if found["affine"] == "none" else spacing
    slope, intercept = header.get_slope_inter()
    scale = (1.0, 0.0) if slope is None else (float(slope), float(intercept))  # None, both of them, where not scaled
    if (job.spacing or spacing)[0] is None and voxels.shape[1] > 1:  # frames, not slices, but what is in HU
        measured = voxels if scale == (1.0, 0.0) else voxels * np.float32(scale[0]) + np.float32(scale[1])
        if job.intensity != "hounsfield" if job.intensity else not is_hu_like(measured):
            voxels = voxels[:, job.keep(voxels.shape[1], found)]
    return unit(voxels, spacing, job, found, scale=scale)


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
