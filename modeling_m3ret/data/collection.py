"""Collections of scans: a folder with a `manifest.csv`, a Parquet dataset in a folder or on the Hub, or the phantom.

A manifest has one row per scan with the columns `id, file, modality, anatomy, label, group` and optionally `split`,
`source`, `licence` and `intensity`; other columns are ignored. `file` is relative to the folder. `group` is the
patient, or the video of a frame: scans of one group never count as matches of each other, and no group that is
validated or tested on is trained on. A Parquet dataset has the schema of `schema.py`; its patient is the group, and its
splits are retained.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from operator import eq, not_
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..hub import CACHE_FOLDER
from .parquet import ParquetRow, ParquetRows, Shards, hub_shards, local_shards, read_locations
from .schema import CollectionError, UnknownWordError, clean, fold, parse_modality, require_words
from .table import COLUMNS, MANIFEST, TableError, count_similar, read_manifest_rows, splits_of_patients


logger = logging.getLogger(__name__)

NO_UNITS = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".npy")  # formats without a unit of intensity
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True, slots=True)
class Record:
    """One scan of a collection. `modality`, `anatomy` and `label` serve sampling and evaluation; no model sees them."""

    id: str  # unique in the collection
    location: Path | tuple[Path, ...] | ParquetRow  # file, folder or files of the scan, or its row in a dataset
    modality: str  # `xray`, `ultrasound`, `endoscopy`, `ct` or `mri`
    anatomy: str  # body part in lower case, or empty
    label: str  # labels, joined by `|`, or empty
    group: str  # patient, or `id` if unknown
    split: str = ""  # `train`, `validation`, `test`, or empty if the collection has no splits
    source: str = ""  # name of the public collection that the scan comes from, or empty
    shape: tuple[int, int, int] | None = None  # slices, rows and columns in voxels, if the collection states them
    spacing: tuple[float | None, float | None, float | None] = (None, None, None)  # mm along `shape`, None if unknown
    is_clip: bool = False  # whether the slices are frames, from which the processor samples `num_frames`
    intensity: str | None = None  # of a file that does not declare it, see `read_scan`

    def open(self) -> Path | list[Path] | dict[str, Any]:
        """Return what `read_scan` takes: paths, or the fetched row. A failed fetch raises `M3RetReadError`."""
        if isinstance(self.location, ParquetRow):
            return self.location.open()
        source = list(self.location) if isinstance(self.location, tuple) else self.location
        return source if self.intensity is None else {"volume": source, "intensity": self.intensity}


_WORD = pa.dictionary(pa.int32(), pa.string())  # few different values
_WORDS = ("modality", "anatomy", "label", "split", "source", "intensity")
_COLUMNS = pa.schema(
    [
        *(("id", pa.string()), ("group", pa.string())),
        *((name, _WORD) for name in _WORDS),
        ("shape", pa.list_(pa.int32())),
        ("spacing", pa.list_(pa.float64())),
        ("is_clip", pa.bool_()),
        *(("paths", pa.list_(pa.string())), ("is_one_path", pa.bool_())),  # null for rows of Parquet
        *(("shard", _WORD), ("row_group", pa.int32()), ("row", pa.int32()), ("size", pa.int64())),  # null for paths
    ]
)
_RECORDS_AT_ONCE = 4096  # are objects at the same time


class Records(Sequence[Record]):
    """Many records in Arrow columns, which take about 130 bytes for each row of Parquet; an object takes 350 or more.

    Forked workers share them, whereas they copy every object that they read.
    """

    def __init__(self, table: pa.Table):
        self.table = table

    @classmethod
    def of(cls, records: Iterable[Record]) -> Records:
        """Return the same records."""
        if isinstance(records, Records):
            return records
        batches = [
            pa.RecordBatch.from_pylist([*map(_to_row, some)], _COLUMNS) for some in _batches(records, _RECORDS_AT_ONCE)
        ]
        return cls(pa.Table.from_batches(batches, _COLUMNS).unify_dictionaries().combine_chunks())

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        index = range(len(self))[index]  # also refuses an index out of range
        return _to_record(self.table.slice(index, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), _RECORDS_AT_ONCE):
            yield from map(_to_record, self.table.slice(start, _RECORDS_AT_ONCE).to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    def __repr__(self) -> str:
        return f"Records({len(self)})"

    def take(self, indices: Sequence[int] | np.ndarray) -> Records:
        """Return the records of these indices, in this order."""
        return Records(self.table.take(pa.array(indices, pa.int64())))

    def where(self, chosen: Iterable[bool]) -> Records:
        """Return the records that are chosen, in their order."""
        return self.take(np.flatnonzero(np.fromiter(chosen, bool)))

    def column(self, name: str) -> list[Any]:
        """Return one field of all records. Equal words are the same object."""
        column = self.table[name].combine_chunks()
        if column.type != _WORD:
            return column.to_pylist()
        words = np.array([*column.dictionary.to_pylist(), None], object)
        return words[column.indices.fill_null(-1).to_numpy()].tolist()

    def parquet_rows(self) -> ParquetRows | None:
        """Return the locations of all records, or None if they are not rows of Parquet."""
        if len(self) == 0 or self.table["shard"].null_count:
            return None
        shards = self.table["shard"].combine_chunks()
        numbers = [shards.indices, *(self.table[name] for name in ("row_group", "row", "size"))]
        return ParquetRows(shards.dictionary.to_pylist(), np.stack([column.to_numpy() for column in numbers], axis=1))


def _to_row(record: Record) -> dict[str, Any]:
    """Return the cells of `_COLUMNS` of a record."""
    row = {field.name: getattr(record, field.name) for field in fields(record) if field.name != "location"}
    location = record.location
    if isinstance(location, ParquetRow):
        place = {"shard": location.shard, "row_group": location.group, "row": location.row, "size": location.size}
    else:
        paths = (location,) if isinstance(location, Path) else location
        place = {"paths": [*map(str, paths)], "is_one_path": paths is not location}
    return row | place


def _to_record(row: dict[str, Any]) -> Record:
    """Return the record of the cells of `_COLUMNS`."""
    place = {name: row.pop(name) for name in ("paths", "is_one_path", "shard", "row_group", "row", "size")}
    row |= {name: sys.intern(row[name]) for name in _WORDS if row[name] is not None}  # few objects in a list of records
    paths = None if place["paths"] is None else tuple(map(Path, place["paths"]))
    location: Any
    if paths is None:
        location = ParquetRow(place["shard"], place["row_group"], place["row"], place["size"])
    else:
        location = paths[0] if place["is_one_path"] else paths
    return Record(**row | {"location": location, "shape": _triple(row["shape"]), "spacing": tuple(row["spacing"])})


def _batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Yield consecutive lists of `size` records; the last may be shorter."""
    iterator = iter(records)
    while some := list(islice(iterator, size)):
        yield some


def open_collection(data: str | Path, *, stream: bool = False) -> Records:
    """Return the records of a collection.

    Args:
        data: a folder with a `manifest.csv` or with `data/*.parquet`; `ORG/NAME[@REVISION]` on the Hub; or
            `phantom[:SUBJECTS[:SEED]]`, which is made on first use and cached in `HF_HOME/m3ret`.
        stream: fetch rows of a dataset on the Hub when they are read, instead of downloading it first.

    Raises:
        CollectionError: if there is no such collection, it does not match its format, or it cannot be streamed.
    """
    records = _open(data, stream)
    groups, splits = records.column("group"), records.column("split")
    split_of = splits_of_patients(zip(groups, splits, strict=True))
    if similar := count_similar(groups):
        logger.warning(
            "%s: %d patients differ from another in case, spaces or zeros only, and count as different.", data, similar
        )
    # a scan without a split follows the other scans of its patient
    completed = [split or split_of.get(group, "") for group, split in zip(groups, splits, strict=True)]
    index = _COLUMNS.get_field_index("split")
    return Records(records.table.set_column(index, _COLUMNS.field(index), pa.array(completed, _WORD)))


def _open(data: str | Path, stream: bool) -> Records:
    try:
        exists = Path(data).exists()
    except OSError as error:  # a name that is too long
        raise CollectionError(
            f"cannot open a collection: expected a folder or a name, got {error.strerror}."
        ) from error
    if not exists:
        if str(data).split(":")[0] == "phantom" and not stream:
            return Records.of(read_manifest(phantom_folder(str(data))))
        if HUB_NAME.fullmatch(str(data)):
            return _read_parquet(hub_shards(str(data), stream))
    elif (Path(data) / "data").is_dir() and not (Path(data) / MANIFEST).is_file():
        return _read_parquet(local_shards(Path(data)))
    if stream:
        raise CollectionError(
            f"cannot stream {data}: expected a Parquet dataset (ORG/NAME on the Hub or a folder with data/*.parquet), "
            "got none. Build one with dataset_scripts/build.py, or do not stream."
        )
    return Records.of(read_manifest(Path(data)))


def _read_parquet(shards: Shards) -> Records:
    try:
        return Records.of(_parquet_records(shards))
    except UnknownWordError as error:
        raise TableError(shards.name, error.expected, error.got, error.advice) from error


def _parquet_records(shards: Shards) -> Iterator[Record]:
    spelling: dict[str, str] = {}  # as in a manifest
    seen: set[str] = set()
    for number, (location, split, row) in enumerate(read_locations(shards)):
        if problem := _wrong_cell(row) or (row["id"] in seen and ("a unique id", "an id of another row")):
            raise TableError(f"{shards.name}, row {number} of all shards", *problem, "Build the dataset again.")
        seen.add(row["id"])
        yield Record(
            id=row["id"],
            location=location,
            modality=parse_modality(row["modality"] or ""),
            anatomy=fold(row.get("anatomy") or ""),
            label="|".join(sorted({spelling.setdefault(fold(word), clean(word)) for word in row.get("labels") or ()})),
            group=row["patient"] or row["id"],
            split=split,
            source=row.get("source") or "",
            shape=_triple(row.get("shape")),
            spacing=_triple(row.get("spacing")) or (None, None, None),
            # the same rule as in `read_scan`
            is_clip=(row.get("spacing") or [None])[0] is None and row.get("intensity") != "hounsfield",
        )


def _wrong_cell(row: dict[str, Any]) -> tuple[str, str] | None:
    """Return the expected and the actual content of the first invalid cell of a Parquet row, or None."""
    if not isinstance(row["id"], str) or not row["id"]:
        return "text as id", repr(row["id"])
    for name in ("modality", "patient", "anatomy", "source", "intensity"):
        if not isinstance(row.get(name), str | None):
            return f"text or null as {name}", repr(row[name])
    labels, shape, spacing = (row.get(name) for name in ("labels", "shape", "spacing"))
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        return "a list of texts or null as labels", repr(labels)
    if shape is not None and not _is_triple_of(shape, lambda side: type(side) is int and side > 0):
        return "three whole numbers above 0 or null as shape", repr(shape)
    if spacing is not None and not _is_triple_of(
        spacing, lambda mm: mm is None or (type(mm) in (int, float) and 0 < mm < math.inf)
    ):
        return "three numbers above 0 or null as spacing", repr(spacing)
    return None


def _is_triple_of(cell: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(cell, list) and len(cell) == 3 and all(map(accepts, cell))


def _triple(values: Sequence[Any] | None) -> Any:
    return None if values is None else tuple(values)


def phantom_folder(data: str) -> Path:
    """Return the folder of `phantom[:SUBJECTS[:SEED]]`, and make the phantom if it does not exist yet."""
    from ..phantom.dataset import write_phantom  # loads SciPy and codecs, which no other collection needs

    numbers = data.split(":")[1:]
    if len(numbers) > 2 or not all(number.isdecimal() and len(number) < 10 for number in numbers):
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
        CollectionError: if the manifest is missing or empty, or does not match its format, see `read_manifest_rows`.
    """
    if not (folder / MANIFEST).is_file():
        advice = f"Check the path, or write a manifest with the columns {', '.join(COLUMNS)}."
        raise TableError(folder / MANIFEST, f"manifest.csv or data/*.parquet in {folder}", "neither", advice)
    records = []
    for row in read_manifest_rows(folder):
        if not row.modality:
            raise TableError(row.location, "a modality", "an empty cell", "Complete the row or remove it.")
        label = "|".join(row.labels)
        record = Record(row.id, row.file, row.modality, row.anatomy, label, row.group or row.id)
        records.append(replace(record, split=row.split, source=row.source, intensity=row.intensity))
    if not records:
        raise TableError(folder / MANIFEST, "one row per scan", "none", "Add rows.")
    undeclared = [r for r in records if r.modality == "ct" and not r.intensity and str(r.location).endswith(NO_UNITS)]
    if undeclared:
        logger.warning(
            "%s: %d CT volumes are of formats that do not declare Hounsfield units, and are scaled by percentiles. If "
            "they are in Hounsfield units, add a column intensity with the word hounsfield.",
            *(folder / MANIFEST, len(undeclared)),
        )
    return records


def split_training_and_held_out(records: Sequence[Record], holdout: float) -> tuple[Records, Records]:
    """Split a collection into records for training and records for validation.

    The collection's own training and validation splits are used if it has them. Otherwise a fraction of the patients of
    its training split, or of the whole collection if it has no splits, is held out. A test split is never used, and
    patients who are in another split too are not in training.
    """
    records = Records.of(records)
    groups, splits = records.column("group"), records.column("split")
    split_of = splits_of_patients(zip(groups, splits, strict=True))
    is_training = [split in ("", "train") for split in splits]
    usable = records.where(
        of_scan and split_of.get(group, "train") == "train" for of_scan, group in zip(is_training, groups, strict=True)
    )
    if left_out := sum(is_training) - len(usable):
        logger.warning("%d training scans are left out: their patients are in the test or validation split.", left_out)
    validation = records.where(split == "validation" for split in splits)
    return (usable, validation) if validation else split_by_group(usable, holdout)


def split_by_group(records: Sequence[Record], holdout: float) -> tuple[Records, Records]:
    """Split records into training and held-out ones, with all records of a group on the same side.

    The side depends on a hash of the group's name alone, so a group keeps its side when data is added. `holdout` is the
    expected fraction of the groups that is held out.
    """
    records = Records.of(records)
    digests = (hashlib.sha256(f"m3ret-holdout:{group}".encode()).digest() for group in records.column("group"))
    held_out = [int.from_bytes(digest[:8], "big") < holdout * 2**64 for digest in digests]
    return records.where(map(not_, held_out)), records.where(held_out)


def exclude_modalities(records: Sequence[Record], excluded: Sequence[str]) -> Records:
    """Return the records of all other modalities.

    Raises:
        InputError: if `excluded` is not a list of modalities. Case and synonyms do not matter.
    """
    names = {parse_modality(name) for name in require_words("exclude_modalities", excluded)}
    records = Records.of(records)
    return records.where(modality not in names for modality in records.column("modality"))
