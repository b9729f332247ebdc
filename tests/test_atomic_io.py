"""Files and secrets that appear complete or not at all, also if several processes write them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from modeling_m3ret.atomic_io import atomic_folder, atomic_write, partial_name, read_or_create_secret
from modeling_m3ret.errors import InputError


def test_partial_files_of_two_machines_have_different_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both may write with the same process id."""
    monkeypatch.setattr(os, "getpid", lambda: 1234)
    assert partial_name(tmp_path / "x") != partial_name(tmp_path / "x")
    with atomic_write(tmp_path / "x") as first:
        with atomic_write(tmp_path / "x") as second:
            second.write(b"second")
        first.write(b"first")
    assert (tmp_path / "x").read_bytes() == b"first"
    with atomic_folder(tmp_path / "y", replace=True) as outer:
        with atomic_folder(tmp_path / "y", replace=True) as inner:
            (inner / "file").write_text("inner")
        (outer / "file").write_text("outer")
    assert (tmp_path / "y" / "file").read_text() == "outer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


@pytest.mark.skipif(os.name == "nt", reason="no file modes")
def test_secret_is_never_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while it is written, with the most permissive umask."""
    modes = []
    link = os.link

    def record(source: Path, target: Path) -> None:
        modes.append(source.stat().st_mode & 0o777)
        link(source, target)

    monkeypatch.setattr(os, "link", record)
    before = os.umask(0)
    try:
        secret = read_or_create_secret(tmp_path / "new" / "key")
    finally:
        os.umask(before)
    assert len(secret) == 64
    assert modes == [0o600]
    assert (tmp_path / "new" / "key").stat().st_mode & 0o777 == 0o600
    assert read_or_create_secret(tmp_path / "new" / "key") == secret


def test_processes_that_create_a_secret_at_once_get_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(4)  # after all have seen that there is no key
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (fsync(handle), barrier.wait(60)))
    secrets: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: secrets.append(read_or_create_secret(tmp_path / "key"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(secrets) == {(tmp_path / "key").read_bytes()}
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_empty_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\n")
    with pytest.raises(InputError):
        read_or_create_secret(tmp_path / "key")
