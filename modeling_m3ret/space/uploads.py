"""Uploaded files: how they are read, and when they are deleted.

An upload is one file, the slices of a DICOM series, or a zip of either. It is read by `read_scan` within `LIMITS`.
Gradio's own `delete_cache` removes only the files that it has registered. It leaves the part of an upload that was
refused for its size, and an empty file for each one that a page accepted. `start_sweeper` deletes these too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from PIL import Image

from ..data.collection import Record
from ..reading_m3ret import FORMATS, M3RetReadError, ReadLimits, Scan, read_scan
from ..scan_m3ret import sniff
from .pixels import describe_scan, preview


UPLOAD_BYTES = 2**30  # all files together; an uncompressed CT of 2,000 slices of 512 x 512 has this size
# a public page holds several scans at once: a quarter of the reader's own limit, 500 CT slices in float32
LIMITS = ReadLimits(max_decoded_bytes=2**30, max_files=2048)
RETENTION_SECONDS = 1800.0  # of uploads, open scans and rendered images; an open page has its own copies of images
SWEEP_INTERVAL_SECONDS = 300.0
MAX_CHOICES = 12  # scans of one upload that are offered; each is read to show a picture of it


@dataclass(frozen=True, eq=False)
class Choice:
    """One of several scans in an upload."""

    files: tuple[Path, ...]
    series: int | None  # index of a DICOM series, as `read_scan` takes it
    description: str
    picture: Image.Image

    @property
    def name(self) -> str:
        """What visitors call it."""
        is_file = len(self.files) == 1 and self.series is None
        return self.files[0].name if is_file else f"Series {(self.series or 0) + 1}"


def read_upload(files: Sequence[Path], num_frames: int, limits: ReadLimits = LIMITS, series: int | None = None) -> Scan:
    """Read the scan in one file, in an archive, or in several files, which must be the slices of one DICOM series.

    Raises:
        M3RetReadError: If the files hold no scan or several, or exceed the limits. `series` chooses one of several.
    """
    if not files:
        raise M3RetReadError("upload", "not_found", f"{FORMATS}, or a zip archive of DICOM slices", "no file")
    source = [*files] if len(files) > 1 else files[0]
    return read_scan(source, num_frames=num_frames, limits=limits, series=series)


def read_or_list(files: Sequence[Path], num_frames: int, limits: ReadLimits = LIMITS) -> Scan | list[Choice]:
    """Read an upload, or list its scans if it holds several. Raises `M3RetReadError` if none can be read."""
    try:
        return read_upload(files, num_frames, limits)
    except M3RetReadError:
        dicom = [file for file in files if sniff(file) == "dicom"]
        sources = [(file,) for file in files if file not in dicom] if len(files) > 1 else [tuple(files)]
        choices: list[Choice] = []
        for source in filter(None, [*sources, tuple(dicom) if len(files) > 1 else ()]):
            with suppress(M3RetReadError):
                choices += _choices(source, num_frames, limits, MAX_CHOICES - len(choices))
        if not choices:
            raise
        return choices


def _choices(files: tuple[Path, ...], num_frames: int, limits: ReadLimits, count: int) -> list[Choice]:
    """Return at most `count` scans from uploaded files. DICOM files may hold several series."""
    choices: list[Choice] = []
    total = 1
    while len(choices) < min(count, total):
        scan = read_upload(files, num_frames, limits, series=len(choices))
        total = scan.description.get("series_total", 1)
        series = len(choices) if total > 1 else None
        choices.append(Choice(files, series, describe_scan(scan), preview(scan, 160)))
    return choices


def read_record(record: Record, num_frames: int, limits: ReadLimits = LIMITS) -> Scan:
    """Read a scan of the gallery within the limits of an upload."""
    return read_scan(record.open(), num_frames=num_frames, limits=limits)


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

    Paths of deleted files are removed from Gradio's sets of `registered` files.
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
