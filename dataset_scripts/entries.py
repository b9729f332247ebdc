"""What a source of scans declares: its licence and origin, and one `Entry` per scan.

A `Source` finds the scans of one collection in its published layout and says which patient each belongs to. It reads
tables and lists folders but never opens a scan. Reading, hashing, splitting and de-identification happen in
`builder.py`.
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
from pathlib import Path
from typing import Any, ClassVar, TextIO, TypeVar

from modeling_m3ret.data.paths import stays_inside
from modeling_m3ret.data.schema import MODALITIES, SPLITS
from modeling_m3ret.errors import InputError


MAX_LINE_CHARACTERS = 2**20  # of a table: bounds the memory that a damaged or compressed table can take
MAX_JSON_BYTES = 2**28

AnySource = TypeVar("AnySource", bound="Source")


class SourceError(InputError):
    """A folder or table that does not have the layout of its collection.

    Attributes:
        location: the folder, file or entry at fault.
        expected: what the layout requires.
        got: what is there instead.
    """

    def __init__(self, location: Path | str, expected: str, got: str):
        super().__init__(location, expected, got)
        self.location, self.expected, self.got = str(location), expected, got

    def __str__(self) -> str:
        return f"{self.location}: expected {self.expected}, got {self.got}"


@dataclass(frozen=True)
class Entry:
    """One scan of a collection, not yet opened.

    Attributes:
        id: name of the scan, unique in its collection. Only a hash of it is published; the same holds for `patient`.
        files: the file, or the slices of one DICOM series. A folder stands for the series in it.
        modality: one of `MODALITIES`; empty if unknown, in which case the scan is reported and skipped.
        labels: findings as the collection names them; empty if it has none.
        patient: empty if the collection does not say. The scan then counts as a patient of its own.
        split: the official split, or None. The builder then splits by a hash of the patient.
        member: which scan of a file that holds several, for `Source.open`.
        licence: licence of this scan, if it differs from that of the collection.
    """

    id: str
    files: tuple[Path, ...]
    modality: str
    anatomy: str = ""
    labels: tuple[str, ...] = ()
    patient: str = ""
    split: str | None = None
    member: str | None = None
    licence: str = ""

    def __post_init__(self) -> None:
        if self.modality not in ("", *MODALITIES):
            raise SourceError(self.id, f"a modality out of {', '.join(MODALITIES)}", repr(self.modality))
        if self.split is not None and self.split not in SPLITS:
            raise SourceError(self.id, f"a split out of {', '.join(SPLITS)}", repr(self.split))


class Source(ABC):
    """One collection. A subclass sets the attributes below and implements `entries`.

    Attributes:
        name: value of `--source`.
        title, homepage, licence, citation: as the authors of the collection state them, for the data set card.
        evaluation_only: put every scan into the test split, so that the modality stays unseen in pretraining.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    homepage: ClassVar[str]
    licence: ClassVar[str]
    citation: ClassVar[str]
    evaluation_only: ClassVar[bool] = False

    @abstractmethod
    def entries(self, root: Path) -> Iterator[Entry]:
        """Yield all scans under `root`, in the same order every time.

        Raises:
            SourceError: if a table that the layout requires is missing or lacks a column.
        """

    def folder(self, root: str) -> Path:
        """Return the folder that `--root` refers to."""
        return Path(root)

    def open(self, entry: Entry) -> Any:
        """Return the input of `read_scan`: the file, or the list of slices.

        Sources whose files hold several scans override this.
        """
        return entry.files[0] if len(entry.files) == 1 else list(entry.files)


def read_table(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file, or of the same file with `.gz` appended, as dictionaries. Empty cells are "".

    Raises:
        SourceError: if the file is missing, damaged or not UTF-8, or lacks one of `columns`.
    """
    compressed = path.with_name(path.name + ".gz")
    if not path.is_file() and compressed.is_file():
        path = compressed
    if not path.is_file():
        raise SourceError(path, f"a table with the columns {', '.join(columns)}", "no such file")
    try:
        with _open_text(path) as stream:
            reader = csv.DictReader(_bounded_lines(stream, path))
            header = reader.fieldnames or []
            if missing := [column for column in columns if column not in header]:
                raise SourceError(path, f"also the columns {', '.join(missing)}", ", ".join(header) or "none")
            for row in reader:
                yield {key: (value or "").strip() for key, value in row.items() if key is not None}
    except UnicodeDecodeError as error:
        raise SourceError(path, "text encoded as UTF-8", "another encoding") from error
    except (csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceError(path, "a CSV table", f"a damaged file ({error})") from error


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _bounded_lines(stream: TextIO, path: Path) -> Iterator[str]:
    while line := stream.readline(MAX_LINE_CHARACTERS):
        if len(line) == MAX_LINE_CHARACTERS:
            raise SourceError(path, f"lines of fewer than {MAX_LINE_CHARACTERS:,} characters", "a longer line")
        yield line


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        SourceError: if the file is missing, not JSON, or larger than any list of scans.
    """
    if not path.is_file():
        raise SourceError(path, "a JSON file", "no such file")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise SourceError(path, f"at most {MAX_JSON_BYTES:,} bytes", f"{size:,}")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(path, "JSON", "other content") from error


def path_inside(folder: Path, name: str) -> Path:
    """Return the path that a table names relative to `folder`.

    Raises:
        SourceError: if the name is empty, absolute, or contains `..`.
    """
    if not stays_inside(name):
        raise SourceError(folder, "file names relative to this folder, without '..'", repr(name))
    return folder / name


def descend(root: Path, *names: str) -> Path:
    """Enter each of the named subfolders that exists: `--root` may be the folder of the collection or its parent."""
    for name in names:
        root = root / name if (root / name).is_dir() else root
    return root


def list_folders(folder: Path) -> list[Path]:
    """Return the visible subfolders of `folder`, sorted; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def find_files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files below `folder` with one of these lower-case suffixes, sorted within each folder.

    Hidden files and folders are skipped: macOS writes a `._name` for each file. Links to folders are not followed.
    """
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield Path(parent, name)


def positive_labels(row: dict[str, str], columns: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that hold 1. 0 means absent, -1 uncertain and an empty cell not mentioned."""
    return tuple(column for column in columns if row[column] in ("1", "1.0"))


def requires_layout(
    layout: str,
) -> Callable[[Callable[[AnySource, Path], Iterator[Entry]]], Callable[..., Iterator[Entry]]]:
    """Decorate `Source.entries`: a missing folder, or one without any scan, raises a `SourceError`.

    Args:
        layout: the files that the folder should hold, for the message.
    """

    def decorate(entries: Callable[[AnySource, Path], Iterator[Entry]]) -> Callable[..., Iterator[Entry]]:
        @functools.wraps(entries)
        def checked(self: AnySource, root: Path) -> Iterator[Entry]:
            if not root.is_dir():
                raise SourceError(root, layout, "no such folder")
            empty = True
            for entry in entries(self, root):
                empty = False
                yield entry
            if empty:
                raise SourceError(root, layout, f"no scan of {self.name}")

        return checked

    return decorate
