"""Readers in separate processes: after any failure of one, the next file is read."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Script


pytest.importorskip("pebble", reason="the Space needs pebble: pip install m3ret[app]")

from modeling_m3ret.reading_m3ret import M3RetReadError
from modeling_m3ret.space.isolation import IsolatedReaders
from modeling_m3ret.space.uploads import read_upload


pytestmark = pytest.mark.slow

TIMEOUT = 300.0  # s; generous, for a busy machine


@pytest.fixture
def readers() -> IsolatedReaders:
    return IsolatedReaders(max_readers=1, seconds=TIMEOUT)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "scan.npy"
    np.save(path, np.arange(64 * 64, dtype=np.uint16).reshape(64, 64))
    return path


def is_read(readers: IsolatedReaders, file: Path) -> bool:
    scan = readers.read("scan.npy", read_upload, [file], 8)
    return bool((scan.array == read_upload([file], 8).array).all())


def crash(file: Path) -> None:
    """End as native code does that follows an invalid pointer."""
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(file: Path) -> None:
    """Never return, and ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    file.write_text(str(os.getpid()))
    while True:
        time.sleep(0.01)


def occupy(folder: Path) -> None:
    """Create the file `started`, and return when there is a file `release`."""
    (folder / "started").touch()
    wait_for(folder / "release")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_reader_that_crashes_is_replaced(readers: IsolatedReaders, file: Path) -> None:
    for _ in range(3):
        with pytest.raises(M3RetReadError) as raised:
            readers.read("evil.mp4", crash, file)
        assert (raised.value.file, raised.value.reason) == ("evil.mp4", "undecodable")
    assert is_read(readers, file)


def test_a_reader_that_exceeds_the_time_limit_is_killed_and_replaced(
    readers: IsolatedReaders, file: Path, tmp_path: Path
) -> None:
    assert is_read(readers, file)
    readers.seconds = 1
    while not (tmp_path / "pid").exists():  # on a busy machine it may be killed before it writes
        with pytest.raises(M3RetReadError) as raised:
            readers.read("slow.dcm", hang, tmp_path / "pid")
        assert (raised.value.file, raised.value.reason) == ("slow.dcm", "timeout")
        readers.seconds *= 2
    readers.seconds = TIMEOUT
    assert is_read(readers, file)
    wait_for_end_of(int((tmp_path / "pid").read_text()))


def test_a_reader_that_is_killed_while_idle_is_replaced(readers: IsolatedReaders, file: Path) -> None:
    os.kill(readers.read("", os.getpid), signal.SIGKILL)
    while readers._free.queue[0].active:  # until its pool has noticed
        time.sleep(0.01)
    assert is_read(readers, file)


def die_while_sending(file: Path) -> Any:
    """Get killed while the result is sent, as happens when memory runs out."""
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return Unsendable()


class Unsendable:
    def __reduce__(self) -> Any:
        threading.Event().wait()
        return (Unsendable, ())


def test_a_reader_that_dies_blocks_no_other(file: Path, tmp_path: Path) -> None:
    readers = IsolatedReaders(max_readers=2, seconds=TIMEOUT)
    assert is_read(readers, file)
    with ThreadPoolExecutor(2) as visitors:
        dying = [visitors.submit(readers.read, "evil.mp4", die_while_sending, file) for _ in range(2)]
    for visitor in dying:
        with pytest.raises(M3RetReadError) as raised:
            visitor.result()
        assert raised.value.reason == "undecodable"
    assert is_read(readers, file)


def test_a_reader_ends_when_the_server_is_killed(tmp_path: Path) -> None:
    server = tmp_path / "server.py"
    server.write_text(
        f"import sys\nfrom pathlib import Path\nsys.path[:0] = {[*sys.path]!r}\n"
        "from test_isolation import IsolatedReaders, hang\n"
        "if __name__ == '__main__':\n"
        f"    IsolatedReaders(seconds={TIMEOUT}).read('slow.dcm', hang, Path(sys.argv[1]))\n"
    )
    running = Script([str(server), str(tmp_path / "pid")], tmp_path)
    deadline = time.monotonic() + TIMEOUT
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert running.is_running(), running.printed
        assert time.monotonic() < deadline
        time.sleep(0.05)
    reader = int((tmp_path / "pid").read_text())
    for process in running.processes:
        process.kill()
    wait_for_end_of(reader)


def wait_for_end_of(pid: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still running")


def test_a_read_error_has_the_same_message_as_without_isolation(readers: IsolatedReaders, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(M3RetReadError) as here:
        read_upload([tmp_path / "broken.png"], 8)
    with pytest.raises(M3RetReadError) as isolated:
        readers.read("broken.png", read_upload, [tmp_path / "broken.png"], 8)
    assert str(isolated.value) == str(here.value)
    assert (isolated.value.file, isolated.value.reason) == (here.value.file, here.value.reason)


def test_a_visitor_who_gave_up_waiting_starts_no_reader(readers: IsolatedReaders, file: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as others:
        busy = others.submit(readers.read, "long.dcm", occupy, tmp_path)
        wait_for(tmp_path / "started")
        readers.seconds = 0.5
        with pytest.raises(M3RetReadError) as raised:
            readers.read("waiting.dcm", Path.touch, tmp_path / "read")
        assert (raised.value.file, raised.value.reason) == ("waiting.dcm", "timeout")
        (tmp_path / "release").touch()
        busy.result()
    readers.seconds = TIMEOUT
    assert is_read(readers, file)
    assert not (tmp_path / "read").exists()
