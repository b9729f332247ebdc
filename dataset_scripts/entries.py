"""Sources of scans: licence and origin of a collection, and one `Entry` per scan.

A `Source` finds the scans of one collection in its published layout and says which patient each belongs to. It reads
tables and lists folders but never opens a scan. Reading, hashing, splitting and de-identification happen in
`builder.py`.
"""

import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from modeling_m3ret.data.schema import MODALITIES, SPLITS
from modeling_m3ret.data.table import TableError


MAX_JSON_BYTES = 2**28
SourceError = TableError  # a folder, table or entry (`location`) that does not have the layout of its collection


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
    notes: Counter[str] = Counter()  # what the last listing decided, and how often, for the report; no names

    def entries(self, root: Path) -> Iterator[Entry]:
        """Yield all scans under `root`, in the same order every time.

        Raises:
            SourceError: if the folder is missing, holds no scan, or does not have the layout of the collection.
        """
        if not root.is_dir():
            raise SourceError(root, self.layout, "no such folder")
        self.notes = Counter()
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


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raise `SourceError` if it is missing, not JSON, or above `MAX_JSON_BYTES`."""
    if not path.is_file():
        raise SourceError(path, "a JSON file", "no such file")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise SourceError(path, f"at most {MAX_JSON_BYTES:,} bytes", f"{size:,}")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(path, "JSON", "other content") from error


def descend(root: Path, name: str) -> Path:
    """Enter the named subfolder, if it exists: `--root` may be the folder of the collection or its parent."""
    return root / name if (root / name).is_dir() else root


def list_folders(folder: Path) -> list[Path]:
    """Return the visible subfolders of `folder`, sorted; none if there is no such folder."""
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir())


def find_files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files below `folder` with one of these lower-case suffixes, sorted within each folder.

    Hidden files and folders are skipped: macOS writes a `._name` for each file. Links are followed, as those of a
    manifest are (see `path_inside`). A folder that is reached several ways is listed once.
    """
    pending, seen = [folder], set()
    while pending:
        for parent, subfolders, names in os.walk(pending.pop(0)):
            if (real := os.path.realpath(parent)) in seen:
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            pending += [path for name in subfolders if (path := Path(parent, name)).is_symlink()]
            yield from (
                Path(parent, name)
                for name in sorted(names)
                if name.lower().endswith(suffixes) and not name.startswith(".")
            )


def positive_labels(row: dict[str, str], columns: Iterable[str]) -> tuple[str, ...]:
    """Return the columns that hold 1. 0 means absent, -1 uncertain and an empty cell not mentioned."""
    return tuple(column for column in columns if row[column] in ("1", "1.0"))
