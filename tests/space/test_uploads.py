"""Uploads: which files are read, which are refused, and when they are deleted."""

from __future__ import annotations

import asyncio
import io
import os
import pickle
import stat
import struct
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scan_files
from PIL import Image
from scan_files import dicom_bytes


pytest.importorskip("gradio", reason="the Space needs gradio: pip install m3ret[app]")

import gradio
from starlette.responses import PlainTextResponse

from modeling_m3ret import M3RetReadError
from modeling_m3ret.reading_m3ret import ReadLimits, Scan, read_scan
from modeling_m3ret.space import request_gate, uploads
from modeling_m3ret.space.uploads import (
    LIMITS,
    RETENTION_SECONDS,
    SWEEP_INTERVAL_SECONDS,
    delete_old_files,
    read_upload,
    start_sweeper,
)


TIMEOUT = 300.0  # s; generous, for a busy machine
FRAMES = 8


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A folder with a DICOM series of three slices."""
    folder = tmp_path / "series"
    folder.mkdir()
    volume = np.random.default_rng(0).integers(0, 4000, (20, 16, 3), dtype=np.uint16)
    for number, dataset in enumerate(scan_files.series(volume, np.diag([0.5, 0.5, 2.0, 1.0]))):
        (folder / f"{number}.dcm").write_bytes(dicom_bytes(dataset))
    return folder


def png(value: int = 90) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((20, 30), value, np.uint8) + np.arange(30, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def read(files: list[Path], limits: ReadLimits = LIMITS) -> Scan:
    return read_upload(files, FRAMES, limits)


def refusal(files: list[Path], limits: ReadLimits = LIMITS) -> M3RetReadError:
    with pytest.raises(M3RetReadError) as raised:
        read(files, limits)
    return raised.value


# -------------------------------------------------------------------------------------------------------------- reading


def test_slices_and_a_zip_of_them_are_read_as_the_series(series: Path, tmp_path: Path) -> None:
    expected = read_scan(series)
    files = sorted(series.iterdir())
    members = {f"a/b/{path.name}": path.read_bytes() for path in files} | {"a/notes.txt": b"not a slice"}
    for scan in (read(files), read([write_zip(tmp_path / "s.zip", members)])):
        np.testing.assert_array_equal(scan.array, expected.array)
        assert scan.spacing == expected.spacing


def test_a_zip_of_one_file_is_read_as_that_file(tmp_path: Path) -> None:
    scan = read([write_zip(tmp_path / "one.zip", {"folder/x.png": png()})])
    np.testing.assert_array_equal(scan.array, read_scan(png()).array)


def test_nothing_is_written_when_an_archive_is_read(series: Path, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "s.zip", {f"a/{file.name}": file.read_bytes() for file in series.iterdir()})
    opened: list[str] = []

    def record(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir") and watched:
            writes = event == "os.mkdir" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            opened.extend([str(arguments[0])] if writes else [])

    watched = [True]
    sys.addaudithook(record)
    read([path])
    watched.clear()  # hooks cannot be removed
    assert not opened


def test_a_header_and_its_data_in_a_zip_are_read_as_one_scan(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK", reason="reads MetaImage: pip install m3ret[itk]")
    voxels = np.random.default_rng(0).integers(0, 255, (3, 4, 5), dtype=np.uint8)
    header = b"ObjectType = Image\nNDims = 3\nDimSize = 5 4 3\nElementType = MET_UCHAR\nElementDataFile = scan.raw\n"
    scan = read([write_zip(tmp_path / "scan.zip", {"scan.mhd": header, "scan.raw": voxels.tobytes()})])
    np.testing.assert_array_equal(scan.array[0], voxels)


def test_an_npz_file_is_not_unpacked(tmp_path: Path) -> None:
    array = np.arange(4 * 6 * 7, dtype=np.uint8).reshape(4, 6, 7)
    np.savez(tmp_path / "a.npz", volume=array)
    np.testing.assert_array_equal(read([tmp_path / "a.npz"]).array[0], array)


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/etc/x.png", "..\\x.png", "C:\\x.png", "\\\\host\\x.png"]
)
def test_a_path_outside_the_zip_is_refused(name: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "evil.zip", {name: png()})  # a readable scan but for its name
    error = refusal([path])
    assert (error.file, error.reason) == ("evil.zip", "unsupported")
    assert [found.name for found in tmp_path.iterdir()] == ["evil.zip"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_a_link_or_special_file_is_refused(kind: int, tmp_path: Path) -> None:
    path = tmp_path / "link.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("slice.png")
        info.create_system, info.external_attr = 3, (kind | 0o777) << 16
        archive.writestr(info, png())  # a readable scan but for its type
    error = refusal([path])
    assert (error.file, error.reason) == ("link.zip", "unsupported")


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "locked.zip", {"x.png": png()})
    content = bytearray(path.read_bytes())
    content[6] |= 1  # the flag in the local header, and in the directory
    content[content.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    error = refusal([path])
    assert (error.file, error.reason) == ("locked.zip", "unsupported")


def test_a_zip_bomb_is_refused_by_its_declared_size(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "bomb.zip", {f"{number}.dcm": bytes(2**22) for number in range(17)})
    assert path.stat().st_size < 2**18
    error = refusal([path])
    assert (error.file, error.reason) == ("bomb.zip", "too_large")
    assert f"{17 * 2**22:,}" in error.got
    assert f"{LIMITS.max_inflate_ratio:g}" in error.expected


def test_a_zip_bomb_with_a_false_declared_size_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "false.zip", {"a.dcm": bytes(2**21), "b.dcm": bytes(2**21)})
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = -1
        while (start := content.find(signature, start + 1)) >= 0:
            content[start + offset : start + offset + 4] = struct.pack("<I", 100)
    path.write_bytes(content)
    error = refusal([path], ReadLimits(max_decoded_bytes=2**20))
    assert (error.file, error.reason) == ("false.zip", "damaged"), "its contents do not match its directory"


def test_a_zip_with_too_many_files_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "many.zip", {f"{number}.dcm": b"x" for number in range(11)})
    error = refusal([path], ReadLimits(max_files=10))
    assert error.reason == "too_large"
    assert "11" in error.got
    assert "10" in error.expected


def test_a_zip_in_a_zip_is_refused(tmp_path: Path) -> None:
    inner = write_zip(tmp_path / "inner.zip", {"x.png": png()}).read_bytes()
    assert refusal([write_zip(tmp_path / "outer.zip", {"inner.zip": inner})]).file == "outer.zip"


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_an_error_about_a_zip_names_the_zip(damage: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "damaged.zip", {"x.png": png(), "y.png": png(91)} if damage != "empty" else {})
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[60] ^= 255
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    assert refusal([path]).file == "damaged.zip"


class Pickled:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("unpickled"),)  # type: ignore[return-value]


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("evil.npy", np.array([Pickled()], dtype=object), allow_pickle=True)
    Path("evil.pkl").write_bytes(pickle.dumps(Pickled()))
    for name in ("evil.npy", "evil.pkl"):
        assert name in refusal([tmp_path / name]).file
    assert not Path("unpickled").exists()


def test_an_upload_without_files_is_refused() -> None:
    assert refusal([]).reason == "not_found"


# ------------------------------------------------------------------------------------------------------------- deleting


def test_new_empty_folders_are_not_deleted(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    new.mkdir()
    old.mkdir()
    os.utime(old, (time.time() - 1000,) * 2)
    delete_old_files(tmp_path, 600)
    assert [*tmp_path.iterdir()] == [new]


def test_the_sweeper_deletes_old_files_and_closes_idle_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "SWEEP_INTERVAL_SECONDS", 0.01)
    old, new = tmp_path / "a" / "old", tmp_path / "a" / "new"
    new.parent.mkdir()
    old.write_text("x")
    new.write_text("x")
    os.utime(old, (time.time() - RETENTION_SECONDS - 1,) * 2)
    registered = {str(old), str(new)}
    idle: list[float] = []
    swept = threading.Event()

    def close_idle(seconds: float) -> None:
        idle.append(seconds)
        if len(idle) == 2:  # the first sweep is complete
            swept.set()

    stop = start_sweeper(tmp_path, [registered], close_idle)
    assert swept.wait(TIMEOUT)
    stop.set()
    assert not old.exists()
    assert new.exists()
    assert registered == {str(new)}
    assert set(idle) == {RETENTION_SECONDS}


def test_uploads_are_deleted_within_one_hour() -> None:
    assert RETENTION_SECONDS + SWEEP_INTERVAL_SECONDS <= 3600


def test_uploads_in_progress_count_towards_the_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two uploads of 40 bytes only one fits into half of 100 free bytes."""
    monkeypatch.setattr(request_gate.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    statuses: list[int] = []

    async def upload_three() -> None:
        started, finish = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            started.set()
            await finish.wait()
            await PlainTextResponse("written")(scope, receive, send)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        gate = request_gate.RequestGate(app, tmp_path, 50, page=gradio.Blocks())
        headers = [(b"content-length", b"40"), (b"content-type", b"multipart/form-data; boundary=x")]
        scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}
        first = asyncio.create_task(gate(scope, None, send))
        await started.wait()
        await gate(scope, None, send)
        finish.set()
        await first
        await gate(scope, None, send)

    asyncio.run(upload_three())
    assert statuses == [507, 200, 200]
