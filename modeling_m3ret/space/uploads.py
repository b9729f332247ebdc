"""Uploaded files: how they are read, and when they are deleted.

An upload is one file, the slices of a DICOM series, or a zip of either. It is untrusted. Names in a zip are never used
as paths, its declared size is checked before it is decompressed, and its real size while it is.

Gradio's own `delete_cache` removes only the files that it has registered. It leaves the part of an upload that was
refused for its size, and an empty file for each one that a page accepted. `start_sweeper` deletes these too.
"""

from __future__ import annotations

import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from threading import Event, Thread

from ..data.collection import Record
from ..reading_m3ret import M3RetReadError, ReadLimits, Scan, read_scan
from ..scan_m3ret import Reason


UPLOAD_BYTES = 2**30  # all files together; an uncompressed CT of 2,000 slices of 512 x 512 has this size
# a public page holds several scans at once: a quarter of the reader's own limit, 500 CT slices in float32
LIMITS = ReadLimits(max_decoded_bytes=2**30, max_files=2048)
COPY_BYTES = 2**20
RETENTION_SECONDS = 1800.0  # of uploads, open scans and rendered images; an open page has its own copies of images
SWEEP_INTERVAL_SECONDS = 300.0


# -------------------------------------------------------------------------------------------------------------- reading


def read_upload(files: Sequence[Path], num_frames: int, scratch: Path, limits: ReadLimits = LIMITS) -> Scan:
    """Read the scan in one file, in a zip, or in several files, which must be the slices of one DICOM series.

    Args:
        num_frames: Number of frames to sample from a video, see `read_scan`.
        scratch: Empty folder for the contents of a zip.

    Raises:
        M3RetReadError: If the files hold no scan, or exceed the limits.
    """
    if not files:
        expected = "DICOM, NIfTI, video, image, .npy, .npz, or a zip of DICOM slices"
        raise M3RetReadError("upload", "not_found", expected, "no file")
    file = files[0]
    if len(files) > 1 or not _is_zip_of_files(file):
        return read_scan([*files] if len(files) > 1 else file, num_frames=num_frames, limits=limits)
    unpacked = _unpack(file, scratch, limits)
    if len(unpacked) == 1 and _is_zip_of_files(unpacked[0]):
        raise M3RetReadError(file.name, "unsupported", "a zip archive of one scan", "an archive inside an archive")
    try:
        return read_scan(unpacked[0] if len(unpacked) == 1 else scratch, num_frames=num_frames, limits=limits)
    except M3RetReadError as error:
        raise error.with_file(file.name) from error


def read_record(record: Record, num_frames: int, limits: ReadLimits = LIMITS) -> Scan:
    """Read a scan of the gallery within the limits of an upload."""
    return read_scan(record.open(), num_frames=num_frames, limits=limits)


def _is_zip_of_files(file: Path) -> bool:
    """Return whether this is a zip to unpack. A zip of arrays only is an `.npz`, which `read_scan` reads itself."""
    if not file.is_file() or not zipfile.is_zipfile(file):
        return False
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":  # an image or DICOM file with a zip appended is read as image or DICOM
            return False
    try:
        with zipfile.ZipFile(file) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise M3RetReadError(file.name, "damaged", "a zip archive of one scan", type(error).__name__) from error
    return not names or not all(name.endswith(".npy") for name in names)


def _unpack(file: Path, folder: Path, limits: ReadLimits) -> list[Path]:
    """Extract the files of a zip into the folder, under numbers instead of names. Raises `M3RetReadError`."""

    def refusal(reason: Reason, expected: str, got: str) -> M3RetReadError:
        return M3RetReadError(file.name, reason, expected, got)

    try:
        with zipfile.ZipFile(file) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            if not 1 <= len(members) <= limits.max_files:
                raise refusal("too_large", f"a zip archive of 1 to {limits.max_files:,} files", f"{len(members):,}")
            for info in members:
                if _is_outside(info.filename):
                    raise refusal("unsupported", "paths within the archive", "a path outside of it")
                if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                    raise refusal("unsupported", "regular files", "a link or a special file")
                if info.flag_bits & 1:
                    raise refusal("unsupported", "a zip archive without a password", "an encrypted file")
            declared = sum(info.file_size for info in members)
            max_bytes = min(limits.max_decoded_bytes, max(2**26, int(limits.max_inflate_ratio * file.stat().st_size)))
            if declared > max_bytes:
                raise refusal("too_large", f"at most {max_bytes:,} bytes after decompression", f"{declared:,}")
            unpacked, remaining = [], max_bytes
            for number, info in enumerate(members):
                path = folder / f"{number:05d}"
                with archive.open(info) as packed, path.open("wb") as target:
                    while block := packed.read(min(COPY_BYTES, remaining + 1)):
                        remaining -= len(block)
                        if remaining < 0:
                            raise refusal("too_large", f"at most {max_bytes:,} bytes after decompression", "more")
                        target.write(block)
                unpacked.append(path)
            return unpacked
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, M3RetReadError):
            raise
        raise refusal("damaged", "a zip archive of one scan", type(error).__name__) from error


def _is_outside(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in path.parts[0] if path.parts else True


# ------------------------------------------------------------------------------------------------------------- deleting


def delete_old_files(folder: Path, seconds: float) -> None:
    """Delete files that were not written for this many seconds, and folders that have been empty as long."""
    for path in sorted(folder.rglob("*"), reverse=True):  # the contents of a folder come before the folder
        with suppress(OSError):  # deleted by another process, or a folder that is not empty
            if time.time() - path.lstat().st_mtime < seconds:
                continue  # also new empty folders, into which a file may be about to be written
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()


def start_sweeper(folder: Path, registered: Sequence[set[str]], close_idle: Callable[[float], object]) -> Event:
    """Delete old uploads and close idle scans at regular intervals, in a daemon thread, until the event is set.

    Args:
        registered: Gradio's sets of the files that it has written. Paths of deleted files are removed from them.
        close_idle: Called with the retention time in seconds, see `SearchService.close_idle`.
    """
    stop = Event()

    def sweep() -> None:
        while not stop.wait(SWEEP_INTERVAL_SECONDS):
            close_idle(RETENTION_SECONDS)
            with suppress(OSError):  # a folder was deleted while it was listed; the next sweep finds the rest
                delete_old_files(folder, RETENTION_SECONDS)
            for paths in registered:
                paths.difference_update([path for path in paths.copy() if not Path(path).exists()])

    Thread(target=sweep, name="m3ret-sweeper", daemon=True).start()
    return stop
