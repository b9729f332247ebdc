"""Tables of scans: manifests, and the tables of public collections. Training, evaluation and building read them here.

A table is a CSV file in UTF-8. The delimiter (comma, semicolon or tab) is the one with which the header has the
required columns; their case does not matter. A row that does not match the header is an error, never shifted.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import logging
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TextIO

from ..intensity_m3ret import INTENSITIES
from ..phantom import SYNTHETIC_SOURCE
from .schema import SPLITS, CollectionError, UnknownWordError, clean, find_split, fold, parse_modality, parse_split


logger = logging.getLogger(__name__)


MANIFEST = "manifest.csv"
COLUMNS = ("id", "file", "modality", "anatomy", "label", "group")
OPTIONAL_COLUMNS = ("split", "source", "licence", "intensity")
DELIMITERS = (",", ";", "\t")
MAX_LINE_CHARACTERS = 2**20  # of a table: bounds the memory that a damaged or compressed table can take
# Cells that count as missing, as in pandas (`keep_default_na`).
MISSING = {
    *("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
}


class TableError(CollectionError):
    """A folder, a table or one of its rows (`location`) that does not match its format."""

    def __init__(self, location: Path | str, expected: str, got: str, advice: str = ""):
        super().__init__(location, expected, got, advice)  # the arguments, for pickle
        self.location, self.expected, self.got, self.advice = str(location), expected, got, advice

    def __str__(self) -> str:
        return f"{self.location}: expected {self.expected}, got {self.got}. {self.advice}".rstrip()


@dataclass(frozen=True)
class ManifestRow:
    """One scan of a `manifest.csv`."""

    location: str  # manifest and line, for messages
    id: str
    file: Path
    modality: str  # one of `MODALITIES`, or empty
    anatomy: str
    labels: tuple[str, ...]
    group: str
    split: str  # one of `SPLITS`, or empty
    source: str
    licence: str
    intensity: str | None  # one of `INTENSITIES`, of a file that does not declare it


def read_manifest_rows(folder: Path) -> Iterator[ManifestRow]:
    """Yield the rows of a folder's `manifest.csv`, in its order.

    Modality, anatomy and split are words: case, spaces and synonyms do not matter. Labels that differ in case only are
    one label, in the spelling that comes first.

    Raises:
        TableError: if the manifest cannot be read, lacks a column or a cell, repeats an id, holds an unknown modality
            or split, or names a file outside the folder.
    """
    manifest = folder / MANIFEST
    seen: set[str] = set()
    spelling: dict[str, str] = {}
    splits_of_file: dict[Path, set[str]] = defaultdict(set)
    others: dict[str, set[str | None]] = defaultdict(set)  # unknown column -> splits that its cells name
    for location, cells in _read_rows(manifest, COLUMNS, OPTIONAL_COLUMNS):
        row = {name: clean(cells.get(name, "")) for name in (*COLUMNS, *OPTIONAL_COLUMNS)}
        if not row["id"] or row["id"] in seen:
            raise TableError(location, "a unique id in each row", repr(row["id"]), "Give the scan an id of its own.")
        seen.add(row["id"])
        row = {name: cell if name in ("id", "file") or cell not in MISSING else "" for name, cell in row.items()}
        labels = (clean(label) for label in row["label"].split("|"))
        labels = (spelling.setdefault(fold(label), label) for label in labels if label and label not in MISSING)
        try:
            modality = row["modality"] and parse_modality(row["modality"])
            split = row["split"] and parse_split(row["split"])
        except UnknownWordError as error:
            raise TableError(location, error.expected, error.got, error.advice) from error
        is_phantom_ct = modality == "ct" and row["source"] == SYNTHETIC_SOURCE  # in Hounsfield units in every format
        intensity = fold(row["intensity"]) or ("hounsfield" if is_phantom_ct else None)
        if intensity not in (None, *INTENSITIES):
            advice = "Correct it, or leave the cell empty."
            raise TableError(location, f"an intensity out of {', '.join(INTENSITIES)}", repr(intensity), advice)
        file = path_inside(folder, cells["file"], location)
        splits_of_file[file].add(split)
        yield ManifestRow(
            location,
            row["id"],
            file,
            modality,
            fold(row["anatomy"]),
            tuple(dict.fromkeys(labels)),
            *(row["group"], split, row["source"], row["licence"], intensity),
        )
        for name, cell in cells.items() if "split" not in cells else ():
            if name not in row and cell:
                others[name].add(find_split(cell))
    if repeated := sum(len(splits) > 1 for splits in splits_of_file.values()):
        logger.warning("%s: %d files are in more than one split, which leaks between them.", manifest, repeated)
    for name, splits in others.items():
        if len(splits) > 1 and None not in splits:
            logger.warning("%s: the column %r is ignored. If it holds the splits, call it split.", manifest, name)


def path_inside(folder: Path, name: str, location: Path | str | None = None) -> Path:
    """Return the path that a table names; raise `TableError` if it is empty, absolute, or contains `..`.

    Only the name is checked: symbolic links inside the folder are followed, wherever they point, because a collection
    is often a tree of links into an archive. Names are found in any Unicode form.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or set(name) & {"\0", "\\"} or Path(name).is_absolute():
        expected = f"a path inside {folder}, without '..' and with '/' between folders"
        raise TableError(location or folder, expected, repr(name), "Move the file into the folder.")
    if not name.isascii() and not (folder / name).exists():  # macOS decomposes letters with accents
        for form in ("NFC", "NFD"):
            if (path := folder / unicodedata.normalize(form, name)).exists():
                return path
    return folder / name


def read_table(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a table, or of the same file with `.gz` appended, as dictionaries. Empty cells are "".

    Raises:
        TableError: if the file is missing, damaged or not UTF-8, lacks or repeats one of `columns`, or a row has more
            cells than the header.
    """
    for _, row in _read_rows(path, columns):
        yield row


def _read_rows(
    path: Path, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the location of each row, for messages, and its cells, without white space around them.

    If `optional` columns are given, as for a manifest, a row that ends before one of `columns` is an error.
    """
    compressed = path.with_name(path.name + ".gz")
    if not path.is_file() and compressed.is_file():
        path = compressed
    if not path.is_file():
        raise TableError(path, f"a table with the columns {', '.join(columns)}", "no such file")
    try:
        open_file: Callable[..., TextIO] = gzip.open if path.suffix == ".gz" else open
        with open_file(path, "rt", encoding="utf-8-sig", newline="") as stream:  # spreadsheets write a byte order mark
            lines = _bounded_lines(stream, path)
            header, delimiter, skipped = _read_header(path, lines, columns, optional)
            reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
            for row_of_cells in reader:
                cells = [cell.strip() for cell in row_of_cells]
                if not any(cells):
                    continue
                row = dict(zip(header, cells + [""] * (len(header) - len(cells)), strict=False))
                location = f"{path}, line {reader.line_num + skipped}"
                if any(cells[len(header) :]) or (optional and len(cells) <= max(map(header.index, columns))):
                    expected = f"{len(header)} cells, as in the header"
                    raise TableError(location, expected, str(len(cells)), f"Quote cells that hold {delimiter!r}.")
                yield location, row
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise TableError(path, "text encoded as UTF-8", got, "Save it as UTF-8.") from error
    except (csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TableError(path, "a CSV table", f"a damaged file ({error})") from error


def _read_header(
    path: Path, lines: Iterator[str], columns: Sequence[str], optional: Sequence[str]
) -> tuple[list[str], str, int]:
    """Return the column names, the delimiter and the number of lines read. Known names have their own spelling."""
    known = {fold(name): name for name in (*columns, *optional)}
    number, first = next(
        # Excel's first line may name the delimiter
        ((number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("sep=")),
        (0, ""),
    )
    headers = {}
    for delimiter in DELIMITERS:
        cells = next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])
        headers[delimiter] = [known.get(fold(cell), clean(cell)) for cell in cells]
    delimiter = max(DELIMITERS, key=lambda delimiter: len({*headers[delimiter]} & {*columns}))
    header = headers[delimiter]
    if missing := [column for column in columns if column not in header]:
        advice = f"Add {', '.join(missing)}."
        raise TableError(path, f"also the columns {', '.join(missing)}", ", ".join(header) or "none", advice)
    if repeated := [name for name in known.values() if header.count(name) > 1]:
        raise TableError(path, f"one column {repeated[0]}", str(header.count(repeated[0])), "Remove the others.")
    if "split" in {*optional} - {*header} and (typo := difflib.get_close_matches("split", header, 1, 0.8)):
        # without this, test rows would be trained on
        raise TableError(path, "the column split", repr(typo[0]), "Rename it, or remove it.")
    return header, delimiter, number


def _bounded_lines(stream: TextIO, path: Path) -> Iterator[str]:
    while line := stream.readline(MAX_LINE_CHARACTERS):
        if len(line) == MAX_LINE_CHARACTERS:
            raise TableError(path, f"lines of fewer than {MAX_LINE_CHARACTERS:,} characters", "a longer line")
        yield line


def splits_of_patients(patients: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the split of each patient from pairs of patient and split. Both may be empty.

    A patient in several splits belongs to the one that is furthest from training: test, then validation.
    """
    found: dict[str, str] = {}
    for patient, split in patients:
        if patient and split:
            found[patient] = max(split, found.get(patient, split), key=SPLITS.index)
    return found


def count_similar(names: Iterable[str]) -> int:
    """Return how many of these names differ from another in case, spaces or zeros only: "P 1", "p1"; "01", "1.0"."""
    spelled = Counter("".join(fold(name).split()).removesuffix(".0").lstrip("0") for name in {*names})
    return sum(count for count in spelled.values() if count > 1)
