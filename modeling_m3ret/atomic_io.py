"""Write files and folders atomically: complete under their final name, or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary stream that becomes `path` when the block ends, and nothing if the block raises."""
    partial = partial_name(path)
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as stream:
        stream.write(text.encode())


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `path` that is renamed to `path` when the block ends, and removed if it raises.

    Args:
        path: final name. Its parents are created.
        replace: replace an existing folder; without it the rename fails with `OSError` if `path` is not empty.
    """
    partial, replaced = partial_name(path), path.with_name(f".{path.name}.replaced")
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            sync(file)
        sync(partial)
        if replace and path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        partial.rename(path)
        sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_name(path: Path) -> Path:
    """Return a random name under which `path` is written until it is complete.

    A process id would not do: two machines that share a disk may use the same one.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def append_json_line(path: Path, entry: dict[str, Any]) -> None:
    """Append one object to a JSON-lines file with a single write, so that readers never see half a line."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry, allow_nan=False) + "\n")


def read_or_create_secret(path: Path) -> bytes:
    """Return the content of a secret file; create it with 32 random bytes in hex, readable by its owner only.

    If several processes create it at the same time, all of them return the secret of the first.

    Raises:
        InputError: if the file is empty, for example after the disk was full. Anyone could sign with an empty key.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_name(path)
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
                stream.write(secrets.token_hex(32))
                stream.flush()
                os.fsync(stream.fileno())
            with suppress(FileExistsError):
                os.link(partial, path)  # unlike a rename, fails if another process was first
        finally:
            partial.unlink(missing_ok=True)
    if secret := path.read_bytes().strip():
        return secret
    raise InputError(f"{path}: expected a secret key, got an empty file. Delete it; a new key will be created.")


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
