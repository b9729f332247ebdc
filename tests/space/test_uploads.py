"""What a browser may send: a file, slices, a zip of a series; and what it may not."""

from __future__ import annotations

import io
import pickle
import stat
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_m3ret import M3RetReadError
from modeling_m3ret.phantom.dataset import write_phantom
from modeling_m3ret.reading_m3ret import ReadLimits, Scan, read_scan
from modeling_m3ret.space.uploads import LIMITS, read_upload


FRAMES = 8


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_phantom(tmp_path_factory.mktemp("phantom") / "made", subjects=2, workers=0)
    (found,) = [path for path in (folder / "ct").iterdir() if path.is_dir()]
    return found


def png(value: int = 90) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((20, 30), value, np.uint8) + np.arange(30, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def read(files: list[Path], limits: ReadLimits = LIMITS) -> Scan:
    """With an empty folder of its own for the files of a zip, as the page does."""
    with tempfile.TemporaryDirectory() as scratch:
        return read_upload(files, FRAMES, Path(scratch), limits)


def test_slices_and_a_zip_of_them_are_the_series(series: Path, tmp_path: Path) -> None:
    expected = read_scan(series)
    files = sorted(series.iterdir())
    loose = read(files)
    members = {f"a/b/{path.name}": path.read_bytes() for path in files} | {"a/notes.txt": b"not a slice"}
    packed = read([zipped(tmp_path / "s.zip", members)])
    for scan in (loose, packed):
        np.testing.assert_array_equal(scan.array, expected.array)
        assert scan.spacing == expected.spacing


def test_a_zip_of_one_file_is_that_file(tmp_path: Path) -> None:
    scan = read([zipped(tmp_path / "one.zip", {"folder/x.png": png()})])
    np.testing.assert_array_equal(scan.array, read_scan(png()).array)


def test_an_npz_is_no_zip_of_files(tmp_path: Path) -> None:
    array = np.arange(4 * 6 * 7, dtype=np.uint8).reshape(4, 6, 7)
    np.savez(tmp_path / "a.npz", volume=array)
    np.testing.assert_array_equal(read([tmp_path / "a.npz"]).array[0], array)


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/etc/x.png", "..\\x.png", "C:\\x.png", "a/..", "\\\\host\\x.png"]
)
def test_a_path_out_of_the_zip_is_refused(name: str, tmp_path: Path) -> None:
    path = zipped(tmp_path / "evil.zip", {name: png(), "y.png": png()})
    with pytest.raises(M3RetReadError, match=r"evil\.zip: .* a path that leads out of it"):
        read([path])
    assert [found.name for found in tmp_path.iterdir()] == ["evil.zip"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_a_link_or_special_file_is_refused(kind: int, tmp_path: Path) -> None:
    path = tmp_path / "link.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("slice.dcm")
        info.create_system, info.external_attr = 3, (kind | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(M3RetReadError, match="a link or a special file"):
        read([path])


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    path = zipped(tmp_path / "bomb.zip", {f"{number}.dcm": bytes(2**22) for number in range(40)})
    assert path.stat().st_size < 2**18
    with pytest.raises(M3RetReadError, match=r"bomb\.zip: .* got 167,772,160"):
        read([path])


def test_a_bomb_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "lies.zip", {"a.dcm": bytes(2**24), "b.dcm": bytes(2**24)})
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = -1
        while (start := content.find(signature, start + 1)) >= 0:
            content[start + offset : start + offset + 4] = struct.pack("<I", 100)
    path.write_bytes(content)
    with pytest.raises(M3RetReadError, match=r"lies\.zip"):
        read([path], ReadLimits(max_decoded_bytes=2**20))


def test_too_many_files_and_a_zip_of_zips_are_refused(tmp_path: Path) -> None:
    many = zipped(tmp_path / "many.zip", {f"{number}.dcm": b"x" for number in range(11)})
    with pytest.raises(M3RetReadError, match="1 to 10 files, got 11"):
        read([many], ReadLimits(max_files=10))
    inner = zipped(tmp_path / "inner.zip", {"x.png": png()}).read_bytes()
    with pytest.raises(M3RetReadError, match=r"outer\.zip"):
        read([zipped(tmp_path / "outer.zip", {"inner.zip": inner})])


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_zip_is_told_by_its_own_name(damage: str, tmp_path: Path) -> None:
    path = zipped(tmp_path / "hurt.zip", {"x.png": png(), "y.png": png(91)} if damage != "empty" else {})
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[60] ^= 255
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    with pytest.raises(M3RetReadError, match=r"^hurt\.zip: "):
        read([path])


class Pickled:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("unpickled"),)  # type: ignore[return-value]


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("evil.npy", np.array([Pickled()], dtype=object), allow_pickle=True)
    Path("evil.pkl").write_bytes(pickle.dumps(Pickled()))
    for name in ("evil.npy", "evil.pkl"):
        with pytest.raises(M3RetReadError, match=name):
            read([tmp_path / name])
    assert not Path("unpickled").exists()


def test_no_file_is_told_so() -> None:
    with pytest.raises(M3RetReadError, match="no file"):
        read([])
