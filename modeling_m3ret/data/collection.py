"""Which scans are there? A collection is a folder with a `manifest.csv`, a Parquet data set in a folder or on the Hub,
or the phantom that the project makes itself.

The manifest has a row a scan: `id, file, modality, anatomy, label, group` (further columns are ignored). `file` is
relative to the folder; `group` is the patient, or the video of a frame: scans of one group never count as each other's
match and never stand on both sides of a split. A Parquet data set has the schema of `schema.py`; its patient is the
group, and its splits are kept.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from ..hub import CACHE_FOLDER
from .parquet import ParquetError, ParquetRow, Shards, hub_shards, local_shards, read_locations
from .schema import MODALITIES


COLUMNS = ("id", "file", "modality", "anatomy", "label", "group")


class CollectionError(ValueError):
    """A collection that cannot be used: names the place, what was found and what was expected."""


@dataclass(frozen=True, slots=True)
class Record:
    """One scan of a collection. `modality`, `anatomy` and `label` serve sampling and evaluation; no model sees them.

    location: its file or folder, or where its row is. label: several are joined by `|`. split: train, validation, test
    where the collection says so, else empty. source: of which published collection it is, where that is known. shape,
    spacing: slices, rows and columns, and mm along each, of a data set that says so. is_clip: its slices are frames, of
    which reading takes `num_frames`.
    """

    id: str
    location: Path | ParquetRow
    modality: str
    anatomy: str
    label: str
    group: str
    split: str = ""
    source: str = ""
    shape: tuple[int, int, int] | None = None
    spacing: tuple[float | None, float | None, float | None] = (None, None, None)
    is_clip: bool = False

    def open(self) -> Path | dict[str, Any]:
        """What `read_scan` takes. A row is fetched, which may raise M3RetReadError."""
        return self.location.open() if isinstance(self.location, ParquetRow) else self.location


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def open_collection(data: str | Path, *, stream: bool = False) -> list[Record]:
    """The records of `data`: a folder with a manifest or with `data/*.parquet`, `ORG/NAME[@REVISION]` on the Hub, or
    `phantom[:SUBJECTS[:SEED]]`, made on first use and kept under `HF_HOME/m3ret`.

    Args:
        stream: fetch the rows of a data set on the Hub when they are needed, instead of downloading it first.

    Raises:
        CollectionError: if there is no such collection, or it is not one, or none that can be streamed.
    """
    if not Path(data).exists():
        if str(data).split(":")[0] == "phantom" and not stream:
            return read_manifest(phantom_folder(str(data)))
        if HUB_NAME.fullmatch(str(data)):
            try:
                return read_parquet(hub_shards(str(data), stream))
            except HfHubHTTPError as error:
                status = getattr(error.response, "status_code", "no answer")
                raise CollectionError(
                    f"{data}: found no such folder here, and on the Hub no data set that may be read ({status}); "
                    "expected a folder with a manifest.csv or data/*.parquet, or ORG/NAME of a data set"
                ) from error
    elif (Path(data) / "data").is_dir() and not (Path(data) / "manifest.csv").is_file():
        return read_parquet(local_shards(Path(data)))
    if stream:
        raise CollectionError(
            f"{data}: found no Parquet data set, expected one to stream: ORG/NAME on the Hub or a folder with "
            "data/*.parquet, which dataset_scripts/build.py makes of others"
        )
    return read_manifest(Path(data))


def read_parquet(shards: Shards) -> list[Record]:
    """The records of a Parquet data set, in the order of its shards.

    Raises:
        CollectionError: if it is none of this project's schema.
    """
    try:
        return [
            Record(
                id=row["id"],
                location=location,
                modality=row["modality"],
                anatomy=row.get("anatomy") or "",
                label="|".join(sorted(row.get("labels") or ())),
                group=row["patient"] or row["id"],
                split=split,
                source=row.get("source") or "",
                shape=_three(row.get("shape")),
                spacing=_three(row.get("spacing")) or (None, None, None),
                # as `read_scan` has it
                is_clip=(row.get("spacing") or [None])[0] is None and row.get("intensity") != "hounsfield",
            )
            for location, split, row in read_locations(shards)
        ]
    except ParquetError as error:
        raise CollectionError(str(error)) from error


def _three(values: Sequence[Any] | None) -> Any:
    return tuple(values) if values is not None and len(values) == 3 else None


def phantom_folder(data: str) -> Path:
    """The folder of `phantom[:SUBJECTS[:SEED]]`, made if it isn't there yet.

    Raises:
        CollectionError: if these are no numbers.
    """
    from ..phantom.dataset import write_phantom  # loads SciPy and codecs, which no other collection needs

    numbers = data.split(":")[1:]
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise CollectionError(f"{data!r}: expected phantom, phantom:SUBJECTS or phantom:SUBJECTS:SEED")
    # 200 subjects x 5 modalities: made in about a minute on two cores, and enough for 25 subjects a class
    subjects, seed = (*map(int, numbers), *(200, 0)[len(numbers) :])
    return write_phantom(CACHE_FOLDER / f"phantom-{subjects}-{seed}", subjects=subjects, seed=seed)


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
            columns = (row["modality"], row["anatomy"], row["label"], row["group"] or row["id"])
            records.append(Record(row["id"], path, *columns, source=row.get("source") or ""))
    if not records:
        raise CollectionError(f"{manifest}: found no row, expected one for each scan")
    if len({record.id for record in records}) != len(records):
        raise CollectionError(f"{manifest}: ids repeat, expected a different one in each row")
    return records


def split_training_and_held_out(records: Sequence[Record], holdout: float) -> tuple[list[Record], list[Record]]:
    """What is trained on and what is held out: the collection's own train and validation split where it has them, else
    a part of the patients, of the training split where there is one. A test split is in neither."""
    usable = [record for record in records if record.split in ("", "train")]
    validation = [record for record in records if record.split == "validation"]
    return (usable, validation) if validation else split_by_group(usable, holdout)


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


def check_modalities(names: Sequence[str], records: Iterable[Record]) -> None:
    """Are these modalities, of the schema or of a record?

    Raises:
        CollectionError: for a name that is none.
    """
    known = {*MODALITIES, *(record.modality for record in records)}
    if unknown := sorted({name.casefold() for name in names} - {name.casefold() for name in known}):
        raise CollectionError(f"found no modality {', '.join(unknown)}, expected some of {', '.join(sorted(known))}")


def exclude_modalities(records: Iterable[Record], excluded: Sequence[str]) -> list[Record]:
    """The records of all other modalities: what is kept unseen in pretraining leaves here."""
    names = {name.casefold() for name in excluded}
    return [record for record in records if record.modality.casefold() not in names]
