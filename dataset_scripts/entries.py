"""What a source of scans declares: its licence and origin, and one `Entry` per scan.

A `Source` finds the scans of one collection in its published layout and says which patient each belongs to. It reads
tables and lists folders but never opens a scan. Reading, hashing, splitting and de-identification happen in
`builder.py`.
"""

import csv
import gzip
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TextIO

from modeling_m3ret.data.paths import stays_inside
from modeling_m3ret.data.schema import MODALITIES, SPLITS
from modeling_m3ret.errors import InputError


MAX_LINE_CHARACTERS = 2**20  # of a table: bounds the memory that a damaged or compressed table can take
MAX_JSON_BYTES = 2**28


class SourceError(InputError):
    """A folder, table or entry (`location`) that does not have the layout of its collection."""

    def __init__(self, location: Path | str, expected: str, got: str):
        super().__init__(location, expected, got)  # the arguments, for pickle
        self.location, self.expected, self.got = str(location), expected, got

    def __str__(self) -> str:
        return f"{self.location}: expected {self.expected}, got {self.got}"


@dataclass(frozen=True)
class Entry:
    """One scan of a collection, not yet opened."""

    id: str  # unique in its collection. Only a hash of it is published; the same holds for `patient`
    files: tuple[Path, ...]  # the file, or the slices of one DICOM series; a folder stands for the series in it
    modality: str  # one of `MODALITIES`; empty if unknown, in which case the scan is reported and skipped
    anatomy: str = ""
    labels: tuple[str, ...] = ()  # findings as the collection names them
    patient: str = ""  # empty if the collection does not say; the scan then counts as a patient of its own
    split: str | None = None  # the official split; if None, the builder splits by a hash of the patient
    member: str | None = None  # which scan of a file that holds several, for `Source.open`
    licence: str = ""  # of this scan, if it differs from that of the collection
    intensity: str | None = None  # of files that do not declare it, see `read_scan`

    def __post_init__(self) -> None:
        if self.modality not in ("", *MODALITIES):
            raise SourceError(self.id, f"a modality out of {', '.join(MODALITIES)}", repr(self.modality))
        if self.split is not None and self.split not in SPLITS:
            raise SourceError(self.id, f"a split out of {', '.join(SPLITS)}", repr(self.split))


class Source(ABC):
    """One collection. A subclass sets the attributes below and implements `find_entries`.

    Title, homepage, licence and citation are as the authors of the collection state them, for the dataset card.
    """

    name: ClassVar[str]  # value of `--source`
    title: ClassVar[str]
    homepage: ClassVar[str]
    licence: ClassVar[str]
    citation: ClassVar[str]
    layout: ClassVar[str]  # the files that the folder should hold, for error messages
    evaluation_only: ClassVar[bool] = False  # every scan goes to the test split: its modality stays unseen in training

    def entries(self, root: Path) -> Iterator[Entry]:
        """Yield all scans under `root`, in the same order every time.

        Raises:
            SourceError: if the folder is missing, holds no scan, or does not have the layout of the collection.
        """
        if not root.is_dir():
            raise SourceError(root, self.layout, "no such folder")
        entry = None
        for entry in self.find_entries(root):
            yield entry
        if entry is None:
            raise SourceError(root, self.layout, f"no scan of {self.name}")

    @abstractmethod
    def find_entries(self, root: Path) -> Iterator[Entry]:
        """Yield the entries of an existing folder, in the same order every time."""

    def folder(self, root: str) -> Path:
        """Return the folder that `--root` refers to."""
        return Path(root)

    def open(self, entry: Entry) -> Any:
        """Return the input of `read_scan`. Sources whose files hold several scans override this."""
        source = entry.files[0] if len(entry.files) == 1 else list(entry.files)
        return source if entry.intensity is None else {"volume": source, "intensity": entry.intensity}


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
        open_file: Callable[..., TextIO] = gzip.open if path.suffix == ".gz" else open
        with open_file(path, "rt", encoding="utf-8-sig", newline="") as stream:
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


def _bounded_lines(stream: TextIO, path: Path) -> Iterator[str]:
    while line := stream.readline(MAX_LINE_CHARACTERS):
        if len(line) == MAX_LINE_CHARACTERS:
            raise SourceError(path, f"lines of fewer than {MAX_LINE_CHARACTERS:,} characters", "a longer line")
        yield line


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raise `SourceError` if it is missing, not JSON, or larger than any list."""
    if not path.is_file():
        raise SourceError(path, "a JSON file", "no such file")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise SourceError(path, f"at most {MAX_JSON_BYTES:,} bytes", f"{size:,}")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(path, "JSON", "other content") from error


def path_inside(folder: Path, name: str) -> Path:
    """Return the path that a table names; raise `SourceError` if it is empty, absolute, or contains `..`."""
    if not stays_inside(name):
        raise SourceError(folder, "file names relative to this folder, without '..'", repr(name))
    return folder / name


def descend(root: Path, name: str) -> Path:
    """Enter the named subfolder, if it exists: `--root` may be the folder of the collection or its parent."""
    return root / name if (root / name).is_dir() else root


def list_folders(folder: Path) -> list[Path]:
    """Return the visible subfolders of `folder`, sorted; none if there is no such folder."""
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir())


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
