"""What must a collection declare to be built? Its scans, one `Entry` each, and where it comes from.

A `Source` finds the scans of one collection in the layout in which it is published, and says whose they are. It reads
tables and lists folders, and never opens a scan: reading, hashing of names, splitting and de-identification are the
builder's (`builder.py`).
"""

from __future__ import annotations

import csv
import functools
import gzip
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TextIO, TypeVar

from modeling_m3ret.data.schema import MODALITIES, SPLITS


LONGEST_LINE = 2**20  # characters; so that a table of any size, packed or not, takes little memory
LARGEST_JSON = 2**28  # bytes

AnySource = TypeVar("AnySource", bound="Source")


class SourceError(ValueError):
    """A folder that is not the collection it should be: names the place, what was found and what was expected."""


@dataclass(frozen=True)
class Entry:
    """One scan of a collection, before it is opened.

    id: as the collection names it, unique in it; hashed before it leaves the machine, as `patient` is.
    files: the file, or the slices of one DICOM series; a folder counts as the series in it.
    labels: words of the collection for what the scan shows, none where it says nothing.
    patient: empty where the collection does not say whose scan it is; the scan is then a patient of its own.
    split: the official one, or None where there is none; the builder then splits by a hash of the patient.
    part: which scan of a file that holds several, for `Source.open`.
    licence: of this scan, where the scans of a collection have several.
    modality: empty where nothing says what it is; such a scan is reported, and not built.
    """

    id: str
    files: tuple[Path, ...]
    modality: str
    anatomy: str = ""
    labels: tuple[str, ...] = ()
    patient: str = ""
    split: str | None = None
    part: int | str | None = None
    licence: str = ""

    def __post_init__(self) -> None:
        if self.modality not in ("", *MODALITIES):
            raise SourceError(
                f"{self.id}: found the modality {self.modality!r}, expected one of {', '.join(MODALITIES)}"
            )
        if self.split is not None and self.split not in SPLITS:
            raise SourceError(f"{self.id}: found the split {self.split!r}, expected one of {', '.join(SPLITS)}")


class Source(ABC):
    """One collection. Subclasses state the facts below and find the entries.

    name: for `--source`. title, homepage (where to get it), licence, citation: as its authors state them, for the card.
    evaluation_only: never part of a pretraining mix, as the unseen modality.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    homepage: ClassVar[str]
    licence: ClassVar[str]
    citation: ClassVar[str]
    evaluation_only: ClassVar[bool] = False

    @abstractmethod
    def entries(self, root: Path) -> Iterator[Entry]:
        """All scans under `root`, in an order that is the same each time.

        Raises:
            SourceError: if a table that the layout needs is missing or lacks a column.
        """

    def folder(self, root: str) -> Path:
        """The folder that `--root` means."""
        return Path(root)

    def open(self, entry: Entry) -> Any:
        """What `read_scan` takes: the file, or the list of slices. A source whose files hold several scans differs."""
        return entry.files[0] if len(entry.files) == 1 else list(entry.files)


def read_table(path: Path, columns: Sequence[str], delimiter: str = ",") -> Iterator[dict[str, str]]:
    """The rows of a CSV file, or of its `.gz`, as dictionaries; empty cells are empty strings.

    Raises:
        SourceError: if there is no such file, it can't be read as UTF-8 text, or it lacks one of `columns`.
    """
    packed = path.with_name(path.name + ".gz")
    if not path.is_file() and packed.is_file():
        path = packed
    if not path.is_file():
        raise SourceError(f"{path}: found no such file, expected a table with the columns {', '.join(columns)}")
    try:
        with _text(path) as stream:
            reader = csv.DictReader(_lines(stream, path), delimiter=delimiter)
            found = reader.fieldnames or []
            if missing := [column for column in columns if column not in found]:
                raise SourceError(f"{path}: found the columns {list(found)}, expected also {', '.join(missing)}")
            for row in reader:
                yield {key: (value or "").strip() for key, value in row.items() if key is not None}
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: found text that is not UTF-8, expected UTF-8") from error
    except (csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceError(f"{path}: found a damaged table ({error}), expected CSV") from error


def _text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _lines(stream: TextIO, path: Path) -> Iterator[str]:
    while line := stream.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE:
            raise SourceError(f"{path}: found a line of {LONGEST_LINE:,} characters or more, expected a table")
        yield line


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        SourceError: if there is no such file, it is not JSON or too large to be a list of scans.
    """
    if not path.is_file():
        raise SourceError(f"{path}: found no such file, expected JSON")
    if path.stat().st_size > LARGEST_JSON:
        raise SourceError(f"{path}: found {path.stat().st_size:,} bytes, expected at most {LARGEST_JSON:,}")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: found text that is not JSON, expected JSON") from error


def inside(folder: Path, name: str) -> Path:
    """The file that a table names, under `folder`. Tables are hostile until shown otherwise: none may point elsewhere.

    Raises:
        SourceError: if the name is empty or absolute, or leads up and out.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or "\0" in name or "\\" in name or Path(name).is_absolute():
        raise SourceError(f"{folder}: found the file name {name!r} in a table, expected one under this folder")
    return folder.joinpath(*parts)


def within(root: Path, *names: str) -> Path:
    """`root`, or the folder of the collection in it: archives are unpacked in it as often as beside it."""
    for name in names:
        root = root / name if (root / name).is_dir() else root
    return root


def folders_in(folder: Path) -> list[Path]:
    """The folders in one, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def files_under(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The files at any depth with one of these endings (lower case), folder by folder, sorted, without hidden ones:
    macOS leaves a `._name` beside each file."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield Path(place, name)


def positive(row: dict[str, str], columns: Iterable[str]) -> tuple[str, ...]:
    """The columns that hold a 1. A 0 is "no", a -1 "uncertain", an empty cell "not mentioned": none of them a label."""
    return tuple(column for column in columns if row[column] in ("1", "1.0"))


def expecting(what: str) -> Callable[[Callable[[AnySource, Path], Iterator[Entry]]], Callable[..., Iterator[Entry]]]:
    """For `Source.entries`: a folder that is missing, or without any scan, is an error that says what was expected."""

    def wrap(entries: Callable[[AnySource, Path], Iterator[Entry]]) -> Callable[..., Iterator[Entry]]:
        @functools.wraps(entries)
        def found(self: AnySource, root: Path) -> Iterator[Entry]:
            if not root.is_dir():
                raise SourceError(f"{root}: found no such folder, expected {what}")
            none = True
            for entry in entries(self, root):
                none = False
                yield entry
            if none:
                raise SourceError(f"{root}: found no scan of {self.name}, expected {what}")

        return found

    return wrap
