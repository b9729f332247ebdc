"""Which scans are there? A collection is a folder with a `manifest.csv`, or the phantom that the project makes itself.

The manifest has a row a scan: `id, file, modality, anatomy, label, group` (further columns are ignored). `file` is
relative to the folder; `group` is the patient, or the video of a frame: scans of one group never count as each other's
match and never stand on both sides of a split.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.constants import HF_HOME


COLUMNS = ("id", "file", "modality", "anatomy", "label", "group")


class CollectionError(ValueError):
    """A collection that cannot be used: names the place, what was found and what was expected."""


@dataclass(frozen=True)
class Record:
    """One scan of a collection. `modality`, `anatomy` and `label` serve sampling and evaluation; no model sees them."""

    id: str
    path: Path
    modality: str
    anatomy: str
    label: str
    group: str


def open_collection(data: str | Path) -> list[Record]:
    """The records of `data`: a folder with a manifest, or `phantom[:SUBJECTS[:SEED]]`, made on first use.

    The phantom is kept under `HF_HOME/m3ret`, where Hugging Face keeps what it downloads.

    Raises:
        CollectionError: if there is no such folder, or its manifest is not one.
    """
    if not Path(data).exists() and is_phantom(data):
        return read_manifest(_phantom_folder(str(data)))
    return read_manifest(Path(data))


def is_phantom(data: str | Path) -> bool:
    """Whether a collection is the synthetic one, by name or as a folder that `write_phantom` made."""
    folder = Path(data)
    return (folder / "phantom.json").is_file() if folder.exists() else str(data).split(":")[0] == "phantom"


def _phantom_folder(data: str) -> Path:
    from .phantom import write_phantom  # loads SciPy and codecs, which no other collection needs

    numbers = data.split(":")[1:]
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise CollectionError(f"{data!r}: expected phantom, phantom:SUBJECTS or phantom:SUBJECTS:SEED")
    # 200 subjects x 5 modalities: made in about a minute on two cores, and enough for 25 subjects a class
    subjects, seed = (*map(int, numbers), *(200, 0)[len(numbers) :])
    return write_phantom(Path(HF_HOME) / "m3ret" / f"phantom-{subjects}-{seed}", subjects=subjects, seed=seed)


def read_manifest(folder: Path) -> list[Record]:
    """The records of a folder's `manifest.csv`, in its order.

    Raises:
        CollectionError: if the manifest is missing, empty or without a needed column, an id repeats, or a row's file
            would lie outside the folder.
    """
    manifest = folder / "manifest.csv"
    if not manifest.is_file():
        raise CollectionError(f"{folder}: found no manifest.csv, expected one with the columns {', '.join(COLUMNS)}")
    try:
        text = manifest.read_text(encoding="utf-8-sig")  # with the mark that spreadsheets put in front, or without
    except UnicodeDecodeError as error:
        raise CollectionError(f"{manifest}: found text that is not UTF-8, expected UTF-8") from error
    with io.StringIO(text, newline="") as lines:
        reader = csv.DictReader(lines)
        if missing := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
            raise CollectionError(
                f"{manifest}: found the columns {reader.fieldnames}, expected also {', '.join(missing)}"
            )
        records = []
        for row in reader:
            if any(row[column] is None for column in COLUMNS) or not row["file"] or not row["modality"]:
                raise CollectionError(
                    f"{manifest}, line {reader.line_num}: found a row without file, modality or other cells"
                )
            path = folder / row["file"]
            if not path.resolve().is_relative_to(folder.resolve()):
                raise CollectionError(f"{manifest}: the row {row['id']!r} names a file outside the folder")
            records.append(
                Record(row["id"], path, row["modality"], row["anatomy"], row["label"], row["group"] or row["id"])
            )
    if not records:
        raise CollectionError(f"{manifest}: found no row, expected one for each scan")
    if len({record.id for record in records}) != len(records):
        raise CollectionError(f"{manifest}: ids repeat, expected a different one in each row")
    return records


def split_by_group(records: Sequence[Record], holdout: float) -> tuple[list[Record], list[Record]]:
    """Training and held-out records. A group falls on its side by a hash of its name alone, so it stays there when data
    is added, and a patient is never on both sides."""
    training: list[Record] = []
    held_out: list[Record] = []
    for record in records:
        digest = hashlib.sha256(f"m3ret-holdout:{record.group}".encode()).digest()
        in_holdout = int.from_bytes(digest[:8], "big") < holdout * 2**64
        (held_out if in_holdout else training).append(record)
    return training, held_out


def without_modalities(records: Iterable[Record], excluded: Sequence[str]) -> list[Record]:
    """The records of all other modalities: what is kept unseen in pretraining leaves here."""
    names = {name.casefold() for name in excluded}
    return [record for record in records if record.modality.casefold() not in names]
