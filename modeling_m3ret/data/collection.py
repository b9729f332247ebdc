"""Collections of scans: a folder with a `manifest.csv`, a Parquet dataset in a folder or on the Hub, or the phantom.

A manifest has one row per scan with the columns `id, file, modality, anatomy, label, group` and optionally `source`;
other columns are ignored. `file` is relative to the folder. `group` is the patient, or the video of a frame: scans of
one group never count as matches of each other and are never on both sides of a split. A Parquet dataset has the schema
of `schema.py`; its patient is the group, and its splits are retained.
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
from .parquet import ParquetRow, Shards, hub_shards, local_shards, read_locations
from .paths import stays_inside
from .schema import MODALITIES, CollectionError


COLUMNS = ("id", "file", "modality", "anatomy", "label", "group")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True, slots=True)
class Record:
    """One scan of a collection. `modality`, `anatomy` and `label` serve sampling and evaluation; no model sees them."""

    id: str  # unique in the collection
    location: Path | ParquetRow  # file or folder of the scan, or its row in a Parquet dataset
    modality: str  # `xray`, `ultrasound`, `endoscopy`, `ct`, `mri`, or another name
    anatomy: str  # body part, or empty
    label: str  # labels, joined by `|`, or empty
    group: str  # patient, or `id` if unknown
    split: str = ""  # `train`, `validation`, `test`, or empty if the collection has no splits
    source: str = ""  # name of the public collection that the scan comes from, or empty
    shape: tuple[int, int, int] | None = None  # slices, rows and columns in voxels, if the collection states them
    spacing: tuple[float | None, float | None, float | None] = (None, None, None)  # mm along `shape`, None if unknown
    is_clip: bool = False  # whether the slices are frames, from which the processor samples `num_frames`
    intensity: str | None = None  # of a file that does not declare it, see `read_scan`

    def open(self) -> Path | dict[str, Any]:
        """Return what `read_scan` takes: a path, or the fetched row. A failed fetch raises `M3RetReadError`."""
        if isinstance(self.location, ParquetRow):
            return self.location.open()
        return self.location if self.intensity is None else {"volume": self.location, "intensity": self.intensity}


def open_collection(data: str | Path, *, stream: bool = False) -> list[Record]:
    """Return the records of a collection.

    Args:
        data: a folder with a `manifest.csv` or with `data/*.parquet`; `ORG/NAME[@REVISION]` on the Hub; or
            `phantom[:SUBJECTS[:SEED]]`, which is made on first use and cached in `HF_HOME/m3ret`.
        stream: fetch rows of a dataset on the Hub when they are read, instead of downloading it first.

    Raises:
        CollectionError: if there is no such collection, it does not match its format, or it cannot be streamed.
    """
    if not Path(data).exists():
        if str(data).split(":")[0] == "phantom" and not stream:
            return read_manifest(phantom_folder(str(data)))
        if HUB_NAME.fullmatch(str(data)):
            try:
                return _read_parquet(hub_shards(str(data), stream))
            except HfHubHTTPError as error:
                status = getattr(error.response, "status_code", "no answer")
                raise CollectionError(
                    f"cannot open {data}: expected a folder or a dataset on the Hub, got no such folder, and from the "
                    f"Hub the status {status}. Check the name; if the dataset is private, log in with `hf auth login`."
                ) from error
    elif (Path(data) / "data").is_dir() and not (Path(data) / "manifest.csv").is_file():
        return _read_parquet(local_shards(Path(data)))
    if stream:
        raise CollectionError(
            f"cannot stream {data}: expected a Parquet dataset (ORG/NAME on the Hub or a folder with data/*.parquet), "
            "got none. Build one with dataset_scripts/build.py, or do not stream."
        )
    return read_manifest(Path(data))


def _read_parquet(shards: Shards) -> list[Record]:
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
            shape=_triple(row.get("shape")),
            spacing=_triple(row.get("spacing")) or (None, None, None),
            # the same rule as in `read_scan`
            is_clip=(row.get("spacing") or [None])[0] is None and row.get("intensity") != "hounsfield",
        )
        for location, split, row in read_locations(shards)
    ]


def _triple(values: Sequence[Any] | None) -> Any:
    return tuple(values) if values is not None and len(values) == 3 else None


def phantom_folder(data: str) -> Path:
    """Return the folder of `phantom[:SUBJECTS[:SEED]]`, and make the phantom if it does not exist yet."""
    from ..phantom.dataset import write_phantom  # loads SciPy and codecs, which no other collection needs

    numbers = data.split(":")[1:]
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise CollectionError(
            f"unknown phantom: expected phantom[:SUBJECTS[:SEED]] with whole numbers, got {data!r}. "
            "For example, phantom:50:1 has 50 subjects."
        )
    # 200 subjects x 5 modalities take about a minute on two cores, and give 25 subjects per class
    subjects, seed = (*map(int, numbers), *(200, 0)[len(numbers) :])
    return write_phantom(CACHE_FOLDER / f"phantom-{subjects}-{seed}", subjects=subjects, seed=seed)


def read_manifest(folder: Path) -> list[Record]:
    """Return the records of a folder's `manifest.csv`, in its order.

    Raises:
        CollectionError: if the manifest is missing, empty or not UTF-8, lacks a column or a cell, repeats an id, or
            names a file outside the folder.
    """
    manifest = folder / "manifest.csv"
    columns = ", ".join(COLUMNS)

    def error(problem: str, expected: str, got: str, advice: str) -> CollectionError:
        return CollectionError(f"{manifest}{problem}: expected {expected}, got {got}. {advice}")

    if not manifest.is_file():
        expected = f"manifest.csv or data/*.parquet in {folder}"
        raise error(
            " is missing", expected, "neither", f"Check the path, or write a manifest with the columns {columns}."
        )
    try:
        text = manifest.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as wrong:
        got = f"byte {wrong.object[wrong.start]:#04x} at {wrong.start}"
        raise error(" cannot be decoded", "UTF-8", got, "Save it as UTF-8.") from wrong
    reader = csv.DictReader(io.StringIO(text, newline=""))
    present = reader.fieldnames or ()
    if missing := [column for column in COLUMNS if column not in present]:
        raise error(" lacks columns", columns, ", ".join(present), f"Add {', '.join(missing)}.")
    records: dict[str, Record] = {}
    for row in reader:
        line = f", line {reader.line_num}"
        if any(row[column] is None for column in COLUMNS) or not row["file"] or not row["modality"]:
            expected = f"a cell in each of the columns {columns}, file and modality not empty"
            raise error(f"{line} is incomplete", expected, "fewer", "Complete the row or remove it.")
        if not stays_inside(row["file"]):
            expected = f"a path inside {folder}"
            raise error(
                f"{line} names a file outside the folder", expected, row["file"], "Move the file into the folder."
            )
        if row["id"] in records:
            raise error(f"{line} repeats an id", "a unique id", repr(row["id"]), "Rename it.")
        labels = (row["modality"], row["anatomy"], row["label"], row["group"] or row["id"])
        records[row["id"]] = Record(row["id"], folder / row["file"], *labels, source=row.get("source") or "")
    if not records:
        raise error(" is empty", "one row per scan", "none", "Add rows.")
    return list(records.values())


def split_training_and_held_out(records: Sequence[Record], holdout: float) -> tuple[list[Record], list[Record]]:
    """Split a collection into records for training and records for validation.

    The collection's own training and validation splits are used if it has them. Otherwise a fraction of the patients of
    its training split, or of the whole collection if it has no splits, is held out. A test split is never used.
    """
    usable = [record for record in records if record.split in ("", "train")]
    validation = [record for record in records if record.split == "validation"]
    return (usable, validation) if validation else split_by_group(usable, holdout)


def split_by_group(records: Sequence[Record], holdout: float) -> tuple[list[Record], list[Record]]:
    """Split records into training and held-out ones, with all records of a group on the same side.

    The side depends on a hash of the group's name alone, so a group keeps its side when data is added. `holdout` is the
    expected fraction of the groups that is held out.
    """
    training: list[Record] = []
    held_out: list[Record] = []
    for record in records:
        digest = hashlib.sha256(f"m3ret-holdout:{record.group}".encode()).digest()
        is_held_out = int.from_bytes(digest[:8], "big") < holdout * 2**64
        (held_out if is_held_out else training).append(record)
    return training, held_out


def check_modalities(names: Sequence[str], records: Iterable[Record]) -> None:
    """Raise a `CollectionError` for modalities that are neither in the schema nor in the records. Case is ignored."""
    known = {*MODALITIES, *(record.modality for record in records)}
    if unknown := sorted({name.casefold() for name in names} - {name.casefold() for name in known}):
        raise CollectionError(
            f"unknown modality: expected some of {', '.join(sorted(known))}, got {', '.join(unknown)}. "
            "Check the spelling."
        )


def exclude_modalities(records: Iterable[Record], excluded: Sequence[str]) -> list[Record]:
    """Return the records of all other modalities. Case is ignored."""
    names = {name.casefold() for name in excluded}
    return [record for record in records if record.modality.casefold() not in names]
