"""Readers in processes of their own: whatever a file does to one, the next file is read."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest


pytest.importorskip("pebble", reason="the Space needs pebble: pip install m3ret[app]")

from modeling_m3ret.reading_m3ret import M3RetReadError
from modeling_m3ret.space.isolation import IsolatedReaders
from modeling_m3ret.space.uploads import read_upload


@pytest.fixture
def readers() -> Iterator[IsolatedReaders]:
    readers = IsolatedReaders(processes=1, seconds=60)
    yield readers
    readers.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "scan.npy"
    np.save(path, np.arange(64 * 64, dtype=np.uint16).reshape(64, 64))
    return path


def is_read(readers: IsolatedReaders, file: Path) -> bool:
    scan = readers.read("scan.npy", read_upload, [file], 8)
    return bool((scan.array == read_upload([file], 8).array).all())


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
        with pytest.raises(M3RetReadError, match=r"evil\.mp4: found a file on which its reader broke down"):
            readers.read("evil.mp4", crash, file)
    assert is_read(readers, file)


def test_a_reader_that_hangs_is_ended_and_replaced(readers: IsolatedReaders, file: Path, tmp_path: Path) -> None:
    assert is_read(readers, file)
    readers.seconds = 1
    with pytest.raises(M3RetReadError, match=r"slow\.dcm: found a scan that took more than 1 s to read"):
        readers.read("slow.dcm", hang, tmp_path / "pid")
    readers.seconds = 60
    assert is_read(readers, file)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_reader_that_ends_while_it_waits_is_replaced(readers: IsolatedReaders, file: Path) -> None:
    """As the kernel may do when memory is short."""
    idle = readers.read("pid", os.getpid)
    os.kill(idle, signal.SIGKILL)
    time.sleep(1)  # until it is noticed
    assert is_read(readers, file)


def test_what_a_reader_raises_comes_in_its_own_words(readers: IsolatedReaders, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(M3RetReadError) as here:
        read_upload([tmp_path / "broken.png"], 8)
    with pytest.raises(M3RetReadError) as there:
        readers.read("broken.png", read_upload, [tmp_path / "broken.png"], 8)
    assert str(there.value) == str(here.value)
    assert (there.value.source, there.value.found) == (here.value.source, here.value.found)


def test_who_waits_in_vain_takes_no_turn_later(readers: IsolatedReaders, file: Path, tmp_path: Path) -> None:
    """While all readers are busy, others give up; what they asked for is not done when a reader is free again."""
    with ThreadPoolExecutor(1) as others:
        busy = others.submit(readers.read, "long.dcm", time.sleep, 2)
        time.sleep(0.5)
        readers.seconds = 0.5
        with pytest.raises(M3RetReadError, match="took more than"):
            readers.read("waiting.dcm", Path.touch, tmp_path / "read")
        busy.result()
    readers.seconds = 60
    assert is_read(readers, file)
    assert not (tmp_path / "read").exists()
