"""Zip archives: hostile ones are refused without taking memory, and names in an archive are never used as paths."""

from __future__ import annotations

import io
import json
import lzma
import stat
import struct
import subprocess
import sys
import textwrap
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scan_files import dicom_bytes, series, zip_bytes

from modeling_m3ret.reading_m3ret import M3RetReadError, ReadLimits, read_scan


MIB = 2**20
MAX_PEAK = 40 * MIB  # the largest archive below has 14 MiB
STORED, DEFLATE, DEFLATE64, BZIP2, LZMA, ZSTANDARD = 0, 8, 9, 12, 14, 93
ROOT = Path(__file__).resolve().parents[1]


def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30)).save(stream, "PNG")
    return stream.getvalue()


def deflated(pieces: Iterable[bytes]) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join(map(packer.compress, pieces)) + packer.flush()


def zeros(size: int) -> Iterable[bytes]:
    return (bytes(MIB) for _ in range(size // MIB))


@dataclass(frozen=True)
class Member:
    """A member whose header declares what the test wants, whatever its content is."""

    name: bytes
    packed: bytes
    size: int  # once inflated
    method: int = DEFLATE
    crc: int = 0
    extra: bytes = b""
    flags: int = 0
    attributes: int = 0
    packed_size: int | None = None  # None is the true one

    def local(self) -> bytes:
        return (
            struct.pack("<4s5H3L2H", b"PK\3\4", 20, self.flags, self.method, *self._common()) + self.name + self.packed
        )

    def entry(self, offset: int) -> bytes:
        middle = (0, 0, 0, self.attributes, offset)
        head = struct.pack("<4s6H3L", b"PK\1\2", 20, 20, self.flags, self.method, *self._common()[:5])
        return head + struct.pack("<5H2L", len(self.name), len(self.extra), *middle) + self.name + self.extra

    def _common(self) -> tuple[int, ...]:
        packed_size = len(self.packed) if self.packed_size is None else self.packed_size
        return (0, 0, self.crc, packed_size, self.size, len(self.name), 0)


def archive_of(members: list[Member], offsets: list[int] | None = None, comment: bytes = b"") -> bytes:
    """Return a zip archive; entries with the same offset share their content."""
    content, found = b"", []
    for member in members if offsets is None else members[:1]:
        found.append(len(content))
        content += member.local()
    places = offsets or found
    directory = b"".join(member.entry(offset) for member, offset in zip(members, places, strict=True))
    count = min(len(members), 0xFFFF)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(content), len(comment))
    return content + directory + end + comment


def zip64(data: bytes, size: int, offset: int) -> bytes:
    """Replace the end of an archive by one in ZIP64 that declares a directory of this size and offset."""
    start = data.rfind(b"PK\5\6")
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, offset)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, start, 1)
    return (
        data[:start] + end64 + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *[0xFFFF] * 2, *[0xFFFFFFFF] * 2, 0)
    )


def lzma_with_dictionary(size: int) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA1, "dict_size": MIB}]
    packed = lzma.compress(bytes(1000), lzma.FORMAT_RAW, filters=filters)
    return struct.pack("<BBHBL", 9, 4, 5, 0x5D, size) + packed


def npz_of(shape: tuple[int, ...], size: int) -> bytes:
    """Return an `.npz` with zeros for this shape, whose directory declares `size` bytes."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    head = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode()
    return archive_of([Member(b"hu.npy", deflated([head, *zeros(4 * int(np.prod(shape)))]), size)])


def hostile() -> dict[str, tuple[bytes, str]]:
    """Return archives, and why each is refused."""
    import bz2

    packer = bz2.BZ2Compressor()
    bzip2 = b"".join(map(packer.compress, zeros(96 * MIB))) + packer.flush()
    bomb = deflated(zeros(96 * MIB))
    picture, checksum = deflated([png()]), zlib.crc32(png())
    good = Member(b"x.png", picture, len(png()), crc=checksum)
    member = Member(b"x.png", bomb, 96 * MIB)
    overlapping = Member(b"x.png", deflated(zeros(32 * MIB)), 32 * MIB)
    inner = archive_of([good])
    nested = archive_of([Member(b"x.zip", inner, len(inner), STORED, zlib.crc32(inner))])
    fields = struct.pack("<HH", 0xCAFE, 0) * 16_000
    return {
        "bzip2": (archive_of([Member(b"x.png", bzip2, 100, BZIP2)]), "unsupported"),
        "lzma": (archive_of([Member(b"x.png", lzma_with_dictionary(1500 * MIB), 1000, LZMA)]), "unsupported"),
        "lzma.npz": (archive_of([Member(b"hu.npy", lzma_with_dictionary(1500 * MIB), 1000, LZMA)]), "unsupported"),
        "deflate64": (archive_of([Member(b"x.png", picture, 100, DEFLATE64)]), "unsupported"),
        "zstandard": (archive_of([Member(b"x.png", picture, 100, ZSTANDARD)]), "unsupported"),
        "declared": (archive_of([member]), "too_large"),
        "false_size": (archive_of([Member(b"x.png", bomb, 100)]), "damaged"),
        "false_packed_size": (archive_of([Member(b"x.png", bomb, 96 * MIB, packed_size=0x7FFFFFFF)]), "too_large"),
        "false_size.npz": (npz_of((24 * MIB,), 200), "damaged"),
        "false_packed_size.npz": (
            archive_of([Member(b"hu.npy", bomb, 96 * MIB, packed_size=0x7FFFFFFF)]),
            "too_large",
        ),
        "overlapping": (archive_of([overlapping] * 250, [0] * 250), "too_large"),
        "many_entries": (archive_of([Member(b"", b"", 0, STORED)] * 300_000, [0] * 300_000), "too_large"),
        "many_folders": (archive_of([Member(b"a/", b"", 0, STORED)] * 300_000, [0] * 300_000), "too_large"),
        "nested": (nested, "unsupported"),
        "encrypted": (archive_of([Member(b"x.png", bomb, 100, flags=1)]), "unsupported"),
        "strong_encryption": (archive_of([Member(b"x.png", picture, 100, flags=0x41)]), "unsupported"),
        "patched": (archive_of([Member(b"x.png", picture, 100, flags=0x20)]), "unsupported"),
        "extra_fields": (
            archive_of([Member(b"x.png", picture, len(png()) + 1, extra=fields)] * 50, [0] * 50),
            "damaged",
        ),
        "extra_cut": (archive_of([Member(b"x.png", picture, 100, extra=struct.pack("<HH", 1, 900))]), "damaged"),
        "extra_zip64": (
            archive_of([Member(b"x.png", picture, 0xFFFFFFFF, extra=struct.pack("<HHQ", 1, 8, 2**63))]),
            "too_large",
        ),
        "directory_size": (zip64(archive_of([good]), 2**62, 0), "damaged"),
        "directory_offset": (zip64(archive_of([good]), 2**63 + 5, 2**64 - 1), "damaged"),
        "name_not_utf8": (archive_of([Member(b"\xff\xfe.png", picture, 100, flags=0x800)]), "damaged"),
        "only_comment": (archive_of([], comment=b"c" * 0xFFFF), "unsupported"),
        "no_content": (archive_of([Member(b"x.png", b"", 0, STORED)]), "unsupported"),
        "offset": (archive_of([good], [2**31 - 1]), "damaged"),
        "link": (
            archive_of([Member(b"x.png", picture, len(png()), crc=checksum, attributes=stat.S_IFLNK << 16)]),
            "unsupported",
        ),
    }


@pytest.mark.slow
def test_hostile_archives_are_refused_without_taking_memory(tmp_path: Path) -> None:
    archives = hostile()
    for name, (data, _) in archives.items():
        (tmp_path / name).write_bytes(data)
        assert len(data) < 15 * MIB
    code = """
        import json, re, sys, types
        from pathlib import Path
        package = types.ModuleType("alone")  # the readers without the rest of the package
        package.__path__ = ["modeling_m3ret"]
        sys.modules["alone"] = package
        from alone.reading_m3ret import M3RetReadError, read_scan

        def memory(kind):
            return 1024 * int(re.search(kind + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

        for path in sorted(Path(sys.argv[1]).iterdir()):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak; getrusage keeps that of the parent process
            before, reason = memory("VmRSS"), None
            try:
                read_scan(path)
            except M3RetReadError as error:
                reason = error.reason
            print(json.dumps([path.name, reason, memory("VmHWM") - before]))
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of each read is taken from /proc")
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = {name: (reason, peak) for name, reason, peak in map(json.loads, run.stdout.splitlines())}
    assert {name: reason for name, (reason, _) in found.items()} == {name: why for name, (_, why) in archives.items()}
    assert max(peak for _, peak in found.values()) < MAX_PEAK, found


@pytest.mark.parametrize(("method", "name"), [(zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "LZMA")])
def test_other_compression_is_refused_by_name(method: int, name: str) -> None:
    with pytest.raises(M3RetReadError) as caught:
        read_scan(zip_bytes({"x.png": png()}, method))
    assert caught.value.reason == "unsupported"
    assert name in caught.value.got
    assert "deflate" in caught.value.advice


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/x.png", "..\\x.png", "C:\\x.png", "\\\\host\\x.png"])
def test_paths_outside_of_an_archive_are_refused(name: str) -> None:
    with pytest.raises(M3RetReadError) as caught:
        read_scan(zip_bytes({name: png()}))
    assert caught.value.reason == "unsupported"


def test_slices_of_the_same_name_are_all_read() -> None:
    volume = np.random.default_rng(0).integers(0, 4000, (20, 16, 3), dtype=np.uint16)
    slices = [dicom_bytes(ds) for ds in series(volume, np.diag([0.5, 0.5, 2.0, 1.0]))]
    members = [Member(b"IM1", deflated([data]), len(data), crc=zlib.crc32(data)) for data in slices]
    np.testing.assert_array_equal(read_scan(archive_of(members)).array, read_scan(slices).array)


def test_an_archive_may_hold_folders_sidecars_and_a_comment() -> None:
    limits = ReadLimits(max_files=1)
    files = {f"folder {number}/": b"" for number in range(100)} | {"__MACOSX/._x.png": b"x", "a/x.png": png()}
    data = zip_bytes(files)
    np.testing.assert_array_equal(read_scan(data, limits=limits).array, read_scan(png()).array)
    end = data.rfind(b"PK\5\6")
    commented = data[: end + 20] + struct.pack("<H", 5) + b"notes"
    np.testing.assert_array_equal(read_scan(commented).array, read_scan(png()).array)
