"""Readers in processes of their own: whatever a file does to one, the next file is read."""

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


PATIENCE = 300.0  # s, of a machine that is busy with other things


@pytest.fixture
def readers() -> IsolatedReaders:
    return IsolatedReaders(at_once=1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "scan.npy"
    np.save(path, np.arange(64 * 64, dtype=np.uint16).reshape(64, 64))
    return path


def is_read(readers: IsolatedReaders, file: Path) -> bool:
    scan = readers.read("scan.npy", read_upload, [file], 8, file.parent)
    return bool((scan.array == read_upload([file], 8, file.parent).array).all())


def crash(file: Path) -> None:
    """As native code does that follows a wrong pointer."""
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(file: Path) -> None:
    """Without an end, and without listening to anybody."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    file.write_text(str(os.getpid()))
    while True:
        time.sleep(0.01)


def test_a_reader_that_crashes_is_told_and_replaced(readers: IsolatedReaders, file: Path) -> None:
    for _ in range(3):
        with pytest.raises(M3RetReadError, match=r"evil\.mp4: data cannot be decoded"):
            readers.read("evil.mp4", crash, file)
    assert is_read(readers, file)


def test_a_reader_that_hangs_is_ended_and_replaced(readers: IsolatedReaders, file: Path, tmp_path: Path) -> None:
    assert is_read(readers, file)
    readers.seconds = 1
    with pytest.raises(M3RetReadError, match=r"slow\.dcm: reading timed out: expected at most 1 s"):
        readers.read("slow.dcm", hang, tmp_path / "pid")
    readers.seconds = 60
    assert is_read(readers, file)
    wait_for_end_of(int((tmp_path / "pid").read_text()))


def die_while_sending(file: Path) -> Any:
    """As when memory ends, which is most in use then: the result is on its way, and larger than a pipe holds."""
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return Slow()


class Slow:
    def __reduce__(self) -> Any:
        time.sleep(5)
        return (Slow, ())


def test_a_reader_that_dies_disturbs_no_other(file: Path, tmp_path: Path) -> None:
    readers = IsolatedReaders(at_once=2)
    assert is_read(readers, file)
    with ThreadPoolExecutor(2) as visitors:
        dying = [visitors.submit(readers.read, "evil.mp4", die_while_sending, file) for _ in range(2)]
    for visitor in dying:
        with pytest.raises(M3RetReadError, match="cannot be decoded"):
            visitor.result()
    begun = time.monotonic()
    assert is_read(readers, file)
    assert time.monotonic() - begun < 30


def test_a_reader_ends_with_a_page_that_is_killed(tmp_path: Path) -> None:
    page = tmp_path / "page.py"
    page.write_text(
        f"import sys\nfrom pathlib import Path\nsys.path[:0] = {[*sys.path]!r}\n"
        "from test_isolation import IsolatedReaders, hang\n"
        "if __name__ == '__main__':\n"
        "    IsolatedReaders().read('slow.dcm', hang, Path(sys.argv[1]))\n"
    )
    running = Script([str(page), str(tmp_path / "pid")], tmp_path)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert running.is_running(), running.printed
        assert time.monotonic() < deadline
        time.sleep(0.05)
    reader = int((tmp_path / "pid").read_text())
    for process in running.processes:
        process.kill()
    wait_for_end_of(reader)


def wait_for_end_of(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} goes on")


def test_what_a_reader_raises_comes_in_its_own_words(readers: IsolatedReaders, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(M3RetReadError) as here:
        read_upload([tmp_path / "broken.png"], 8, tmp_path)
    with pytest.raises(M3RetReadError) as there:
        readers.read("broken.png", read_upload, [tmp_path / "broken.png"], 8, tmp_path)
    assert str(there.value) == str(here.value)
    assert (there.value.file, there.value.got) == (here.value.file, here.value.got)


def test_who_waits_in_vain_takes_no_turn_later(readers: IsolatedReaders, file: Path, tmp_path: Path) -> None:
    """While all readers are busy, others give up; what they asked for is not done when a reader is free again."""
    with ThreadPoolExecutor(1) as others:
        busy = others.submit(readers.read, "long.dcm", time.sleep, 2)
        time.sleep(0.5)
        readers.seconds = 0.5
        with pytest.raises(M3RetReadError, match="timed out"):
            readers.read("waiting.dcm", Path.touch, tmp_path / "read")
        busy.result()
    readers.seconds = 60
    assert is_read(readers, file)
    assert not (tmp_path / "read").exists()
