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
from ..scan_m3ret import Reason


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
        raise M3RetReadError(
            "upload", "not_found", "DICOM, NIfTI, video, image, .npy, .npz, or a zip of DICOM slices", "no file"
        )
    if len(files) > 1:
        return read_scan([*files], num_frames=num_frames, limits=limits)
    (file,) = files
    if not _is_zip_of_files(file):
        return read_scan(file, num_frames=num_frames, limits=limits)
    unpacked = _unpack(file, scratch, limits)
    try:
        return read_scan(unpacked[0] if len(unpacked) == 1 else scratch, num_frames=num_frames, limits=limits)
    except M3RetReadError as error:
        raise error.with_file(file.name) from error


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
        raise M3RetReadError(file.name, "damaged", "a zip archive of one scan", type(error).__name__) from error
    return not names or not all(name.endswith(".npy") for name in names)


def _unpack(file: Path, folder: Path, limits: ReadLimits) -> list[Path]:
    """The files of a zip, numbered in the folder.

    Raises:
        M3RetReadError: if a name leads out of the archive, a file is a link, locked or damaged, or together they are
            too many or too large.
    """

    def refuse(reason: Reason, expected: str, got: str) -> M3RetReadError:
        return M3RetReadError(file.name, reason, expected, got)

    try:
        with zipfile.ZipFile(file) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            if not 1 <= len(members) <= limits.max_files:
                raise refuse("too_large", f"a zip archive of 1 to {limits.max_files:,} files", f"{len(members):,}")
            for info in members:
                if _leads_out(info.filename):
                    raise refuse("unsupported", "paths within the archive", "a path that leads out of it")
                if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                    raise refuse("unsupported", "regular files", "a link or a special file")
                if info.flag_bits & 1:
                    raise refuse("unsupported", "a zip archive without a password", "an encrypted file")
            claimed = sum(info.file_size for info in members)
            most = min(limits.max_decoded_bytes, max(2**26, int(limits.max_inflate_ratio * file.stat().st_size)))
            if claimed > most:
                raise refuse("too_large", f"at most {most:,} bytes once unpacked", f"{claimed:,}")
            unpacked, left = [], most
            for number, info in enumerate(members):
                path = folder / f"{number:05d}"
                with archive.open(info) as packed, path.open("wb") as target:
                    while block := packed.read(min(COPY_BYTES, left + 1)):
                        left -= len(block)
                        if left < 0:
                            raise refuse("too_large", f"at most {most:,} bytes once unpacked", "more")
                        target.write(block)
                unpacked.append(path)
            return unpacked
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, M3RetReadError):
            raise
        raise refuse("damaged", "a zip archive of one scan", type(error).__name__) from error


def _leads_out(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in path.parts[0] if path.parts else True
