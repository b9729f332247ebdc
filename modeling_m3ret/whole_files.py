"""Nothing written is ever half-written: beside its place, on the disk, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def writing_whole(path: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes become the file when the block ends, and nothing if it ends in an error."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, UTF-8, as a whole."""
    with writing_whole(path) as stream:
        stream.write(text.encode())


def append_json_line(path: Path, entry: dict[str, Any]) -> None:
    """Add one object as a line; a line is written in one go, so that a reader never meets half of one."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry) + "\n")


def sync(path: Path) -> None:
    """Have a file or folder on disk before a rename makes it visible."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
