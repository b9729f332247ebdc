"""What a browser sends -> what `read_scan` takes: one file, the slices of a DICOM series, or a zip of one.

All of it is hostile until shown otherwise. Names in a zip are never used as paths: its files are numbered. What it
claims to hold is checked before a byte is inflated, and what it really holds while it is.
"""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..data.collection import Record
from ..reading_m3ret import M3RetReadError, ReadLimits, Scan, read_scan


UPLOAD_BYTES = 2**30  # all files together: a CT of 2,000 slices of 512 x 512, not compressed
# a public page holds several scans at once: a quarter of what the reader would allow, 500 CT slices in float32
LIMITS = ReadLimits(max_decoded_bytes=2**30, max_files=2048)
COPY_BYTES = 2**20


def read_upload(files: Sequence[Path], num_frames: int, scratch: Path, limits: ReadLimits = LIMITS) -> Scan:
    """The scan in one file or in several, which are then the slices of a DICOM series.

    Args:
        num_frames: see `read_scan`. scratch: an empty folder, for the files of a zip.

    Raises:
        M3RetReadError: if there is no scan in them, or more than the limits allow.
    """
    if not files:
        raise M3RetReadError("upload", "no file", "a scan: DICOM, NIfTI, video, image, .npy, .npz, or a zip of slices")
    if len(files) > 1:
        return read_scan([*files], num_frames=num_frames, limits=limits)
    (file,) = files
    if not _is_zip_of_files(file):
        return read_scan(file, num_frames=num_frames, limits=limits)
    unpacked = _unpack(file, scratch, limits)
    try:
        return read_scan(unpacked[0] if len(unpacked) == 1 else scratch, num_frames=num_frames, limits=limits)
    except M3RetReadError as error:
        raise M3RetReadError(file.name, error.found, error.expected) from error


def read_record(record: Record, num_frames: int, limits: ReadLimits = LIMITS) -> Scan:
    """A scan of the gallery, within the limits of an upload.

    Raises:
        M3RetReadError: if it can't be read.
    """
    return read_scan(record.open(), num_frames=num_frames, limits=limits)


def _is_zip_of_files(file: Path) -> bool:
    """Whether this is a zip; of arrays alone it is an `.npz`, which the reader takes as it is."""
    if not file.is_file() or not zipfile.is_zipfile(file):
        return False
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":  # a picture or DICOM that ends as a zip does is what it begins as
            return False
    try:
        with zipfile.ZipFile(file) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise M3RetReadError(file.name, f"a damaged zip ({type(error).__name__})", "a zip of a scan's files") from error
    return not names or not all(name.endswith(".npy") for name in names)


def _unpack(file: Path, folder: Path, limits: ReadLimits) -> list[Path]:
    """The files of a zip, numbered in the folder.

    Raises:
        M3RetReadError: if a name leads out of the archive, a file is a link, locked or damaged, or together they are
            too many or too large.
    """

    def refuse(found: str, expected: str) -> M3RetReadError:
        return M3RetReadError(file.name, found, expected)

    try:
        with zipfile.ZipFile(file) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            if not 1 <= len(members) <= limits.max_files:
                raise refuse(f"a zip of {len(members):,} files", f"1 to {limits.max_files:,}, of one scan")
            for info in members:
                if _leads_out(info.filename):
                    raise refuse("a zip with a path that leads out of it", "files within it")
                if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                    raise refuse("a zip with a link or a special file", "plain files")
                if info.flag_bits & 1:
                    raise refuse("a zip with a password", "one without")
            claimed = sum(info.file_size for info in members)
            most = min(limits.max_decoded_bytes, max(2**26, int(limits.max_inflate_ratio * file.stat().st_size)))
            if claimed > most:
                raise refuse(f"a zip that claims to hold {claimed:,} bytes", f"at most {most:,}")
            unpacked, left = [], most
            for number, info in enumerate(members):
                path = folder / f"{number:05d}"
                with archive.open(info) as packed, path.open("wb") as target:
                    while block := packed.read(min(COPY_BYTES, left + 1)):
                        left -= len(block)
                        if left < 0:
                            raise refuse("a zip that holds more than it claims", f"at most {most:,} bytes")
                        target.write(block)
                unpacked.append(path)
            return unpacked
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, M3RetReadError):
            raise
        raise refuse(f"a damaged zip ({type(error).__name__})", "a zip of a scan's files") from error


def _leads_out(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in path.parts[0] if path.parts else True
