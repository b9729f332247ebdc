"""Rows of a Parquet dataset, local or on the Hub: where they are, and how they are fetched.

The small columns of all rows are read once, from the `index.parquet` that the builder writes, or from the shards. Media
are fetched when a row is read: one row group at a time, or a block of neighbouring row groups where a round trip costs
more than the bytes. Nothing is decoded here.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..hub import hub_retries
from ..scan_m3ret import M3RetReadError
from .schema import MEDIA, MODALITIES, SPLITS, CollectionError


logger = logging.getLogger(__name__)

INDEX = "index.parquet"
SHARD_NAME = re.compile(rf"(?P<split>{'|'.join(SPLITS)})-\d{{5}}-of-\d{{5}}\.parquet")
FETCHED_COLUMNS = ("id", "spacing", "intensity")  # with the media
BLOCK_BYTES = 2**23  # row groups fetched in one request: at 100 ms per request, 80 MB/s per worker
MAX_OPEN_SHARDS = 32


@dataclass(frozen=True, slots=True)
class ParquetRow:
    """The location of a row."""

    shard: str  # path, or `hf://datasets/ORG/NAME@REVISION/data/...`
    group: int  # index of the row group in the shard
    row: int  # index of the row in the row group
    size: int  # bytes of its media

    def open(self) -> dict[str, Any]:
        """Return the row as `read_scan` takes it: the bytes of its image, video or volume, its spacing and intensity.

        Raises:
            M3RetReadError: if the row cannot be fetched, for a row on the Hub after the retries of `hub_retries`.
        """
        return process_reader().row(self)


@dataclass(frozen=True, eq=False)
class ParquetRows(Sequence[ParquetRow]):
    """The locations of many rows in one array, which forked workers share: they copy every object that they read."""

    shards: list[str]
    numbers: np.ndarray  # (n, 4) int64: index in `shards`, group, row and size

    @classmethod
    def of(cls, rows: Sequence[ParquetRow]) -> ParquetRows:
        """Return the same locations."""
        shards = {shard: number for number, shard in enumerate(dict.fromkeys(row.shard for row in rows))}
        numbers = np.array([(shards[row.shard], row.group, row.row, row.size) for row in rows], np.int64)
        return cls([*shards], numbers.reshape(-1, 4))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ParquetRows(self.shards, self.numbers[index])
        shard, group, row, size = self.numbers[index].tolist()
        return ParquetRow(self.shards[shard], group, row, size)


@dataclass(frozen=True)
class Shards:
    """The Parquet files of a dataset, `data/SPLIT-00000-of-00000.parquet`."""

    name: str  # of the dataset, for messages
    files: list[str]  # paths or `hf://` addresses, sorted
    index: Path | None  # local path of `index.parquet`, if there is one


def local_shards(folder: Path) -> Shards:
    """Return the shards of a folder that `dataset_scripts/build.py` wrote or that was downloaded from the Hub."""
    files = _select_shards(folder.name, [str(path) for path in (folder / "data").glob("*.parquet")])
    index = folder / INDEX
    return Shards(folder.name, files, index if index.is_file() else None)


def hub_shards(name: str, stream: bool) -> Shards:
    """Return the shards of `ORG/NAME[@REVISION]` on the Hub, all from the commit that the revision refers to now.

    If streaming, the shards are addresses on the Hub, otherwise downloaded files. If the Hub cannot be reached, the
    copy in the cache is used.

    Raises:
        CollectionError: if the dataset does not exist or is not accessible, or the Hub cannot be reached and the cache
            holds no copy.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo_id, _, revision = name.partition("@")
    download = partial(
        snapshot_download,
        repo_id,
        repo_type="dataset",
        revision=revision or None,
        allow_patterns=["data/*.parquet", INDEX],
    )
    problem = f"cannot open {name}: expected a folder or a dataset on the Hub, got no such folder"
    try:
        info = HfApi().dataset_info(repo_id, revision=revision or None)
    except Exception as error:  # the HTTP libraries below raise exceptions of many types
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, HFValidationError) or (isinstance(error, HfHubHTTPError) and (status or 404) < 500):
            got = f"status {status} from the Hub" if status else "no such dataset on the Hub"
            advice = "Check the name; if the dataset is private, log in with `hf auth login`."
            raise CollectionError(f"{problem}, and {got}. {advice}") from error
        try:
            folder = Path(download(local_files_only=True))
        except Exception as missing:
            advice = "Check the name, the connection and HF_HUB_OFFLINE."
            got = f"no answer from the Hub ({type(error).__name__}), and no copy in the cache"
            raise CollectionError(f"{problem}, {got}. {advice}") from missing
        logger.warning("%s: the Hub cannot be reached; the copy of commit %s in the cache is used.", name, folder.name)
        return replace(local_shards(folder), name=name)
    if not stream:
        return replace(local_shards(Path(download())), name=name)
    names = [file.rfilename for file in info.siblings or []]
    shards = _select_shards(repo_id, [name for name in names if re.fullmatch(r"data/[^/]+\.parquet", name)])
    index = None
    if INDEX in names:
        index = Path(hf_hub_download(repo_id, INDEX, repo_type="dataset", revision=info.sha))
    return Shards(name, [f"hf://datasets/{repo_id}@{info.sha}/{shard}" for shard in shards], index)


def _select_shards(name: str, files: list[str]) -> list[str]:
    """Return the files that are named as shards, sorted. Warn of others, such as those of a split named "val"."""
    shards = sorted(file for file in files if SHARD_NAME.fullmatch(_file_name(file)))
    if ignored := len(files) - len(shards):
        logger.warning("%s: %d files in data/ are ignored: expected SPLIT-00000-of-00000.parquet.", name, ignored)
    return shards


def read_locations(shards: Shards) -> Iterator[tuple[ParquetRow, str, dict[str, Any]]]:
    """Yield the location, the split and the small columns of each row, in the order of shards and rows.

    Raises:
        CollectionError: if there is no shard, or a required column is missing.
    """
    if not shards.files:
        raise CollectionError(
            f"{shards.name} has no shards: expected data/SPLIT-00000-of-00000.parquet with SPLIT one of "
            f"{', '.join(SPLITS)}, got no such file. Build the dataset with dataset_scripts/build.py."
        )
    table = _read_index(shards) or build_index(shards)
    modalities = _modality_names(table.schema)
    files = {_file_name(file): file for file in shards.files}
    for row in (row for batch in table.to_batches(max_chunksize=4096) for row in batch.to_pylist()):
        location = ParquetRow(files[row["shard"]], row["group"], row["row"], row["size"])
        if type(number := row["modality"]) is int:
            if not 0 <= number < len(modalities):  # -1 is the class of unlabelled rows in `datasets`
                expected = f"a modality from 0 to {len(modalities) - 1}"
                raise CollectionError(f"{row['shard']} of {shards.name}: expected {expected}, got {number}.")
            row["modality"] = modalities[number]
        yield location, row["shard"].split("-")[0], row


def _file_name(file: str) -> str:
    return file.rsplit("/", 1)[-1]


def _read_index(shards: Shards) -> pa.Table | None:
    """Return the table of `index.parquet`, or None if it is missing or lists other shards."""
    if shards.index is None:
        return None
    with _readable(shards, shards.index):
        table = pq.read_table(shards.index)
    if missing_columns := {"shard", "group", "row", "size", "id", "modality", "patient"} - set(table.column_names):
        raise CollectionError(
            f"{INDEX} of {shards.name} lacks columns: expected {', '.join(sorted(missing_columns))}, got "
            f"{', '.join(table.column_names)}. Delete it, or build the dataset again."
        )
    indexed = set(table.column("shard").unique().to_pylist())
    present = {_file_name(file) for file in shards.files}
    if missing := len(indexed - present):
        raise _incomplete(shards, missing, len(indexed))
    if indexed != present:
        logger.warning(
            "%s: %s is ignored: expected the %d shards of data/, got %d others. Build the dataset again.",
            *(shards.name, INDEX, len(shards.files), len(indexed)),
        )
        return None
    return table


def _incomplete(shards: Shards, missing: int, total: int) -> CollectionError:
    return CollectionError(
        f"{shards.name} is incomplete: expected {total} shards, got {total - missing}. "
        "Download the dataset again, or resume its build."
    )


def build_index(shards: Shards) -> pa.Table:
    """Return what `index.parquet` holds, read from the shards: on the Hub this takes several requests per shard.

    Raises:
        CollectionError: if a shard or a required column is missing.
    """
    # without an index, the number in the file names says how many shards each split has
    names = [_file_name(file).removesuffix(".parquet").split("-") for file in shards.files]
    total = sum(int(total) for _, total in {(split, total) for split, _, _, total in names})
    if total != len(names):
        raise _incomplete(shards, total - len(names), total)
    tables = []
    for file in shards.files:
        with _readable(shards, file):
            parquet = open_parquet(file)
        columns = [name for name in parquet.schema_arrow.names if name not in MEDIA]
        if missing := {"id", "modality", "patient"} - set(columns):
            raise CollectionError(
                f"{_file_name(file)} of {shards.name} lacks columns: expected id, modality and patient, got "
                f"{', '.join(columns)}. Add {', '.join(sorted(missing))}, or build the dataset with "
                "dataset_scripts/build.py."
            )
        with _readable(shards, file):
            table = parquet.read(columns=columns)
        tables.append(add_location_columns(_file_name(file), parquet, table))
    try:
        return pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        raise CollectionError(
            f"shards of {shards.name} differ: expected the same columns and types in all of them, got others in at "
            "least one. Build the dataset again."
        ) from error


@contextmanager
def _readable(shards: Shards, file: str | Path) -> Iterator[None]:
    """Raise a `CollectionError` that names the file if it is not a complete Parquet file.

    Other errors, such as those of the network, are raised unchanged.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        is_damaged = isinstance(error, pa.ArrowException) or (error.errno is None and "://" not in str(file))
        if not is_damaged:
            raise
        raise CollectionError(
            f"{_file_name(str(file))} of {shards.name} is damaged: expected a complete Parquet file, got "
            f"{type(error).__name__} when reading it. Download or build the dataset again."
        ) from error


def add_location_columns(shard: str, parquet: pq.ParquetFile, table: pa.Table) -> pa.Table:
    """Append the columns `shard`, `group`, `row` and `size` to a table of all rows of a shard.

    `shard` is the file name. `size` is the mean number of bytes per row of the row group, since the size of a single
    row is known only after reading it.
    """
    groups = [parquet.metadata.row_group(group) for group in range(parquet.metadata.num_row_groups)]
    rows = [(group, row) for group, metadata in enumerate(groups) for row in range(metadata.num_rows)]
    sizes = [
        sum(metadata.column(column).total_compressed_size for column in range(metadata.num_columns))
        // max(1, metadata.num_rows)
        for metadata in groups
    ]
    return (
        table.append_column("shard", pa.array([shard] * len(rows), pa.string()))
        .append_column("group", pa.array([group for group, _ in rows], pa.int32()))
        .append_column("row", pa.array([row for _, row in rows], pa.int32()))
        .append_column("size", pa.array([sizes[group] for group, _ in rows], pa.int64()))
    )


def _modality_names(schema: pa.Schema) -> Sequence[str]:
    """Return the names of the modality column's class indices, from the metadata that `datasets` writes."""
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        return list(metadata["info"]["features"]["modality"]["names"])
    except (KeyError, TypeError, ValueError):
        return MODALITIES


@dataclass(frozen=True)
class Blocks:
    """Row groups that are fetched together."""

    block_of_row: np.ndarray  # (n,) int64 index of the block of each row
    ranges: list[tuple[str, int, int]]  # shard, first row group and end row group of each block


def group_into_blocks(rows: Sequence[ParquetRow]) -> Blocks:
    """Group neighbouring row groups into blocks of about `BLOCK_BYTES`, for rows in the order of shards and rows."""
    block_of_row: list[int] = []
    ranges: list[tuple[str, int, int]] = []
    size = 0
    for row in rows:
        shard, first, end = ranges[-1] if ranges else ("", 0, 0)
        if row.shard != shard or (row.group >= end and size >= BLOCK_BYTES):
            ranges.append((row.shard, row.group, row.group + 1))
            size = 0
        elif row.group >= end:
            ranges[-1] = (shard, first, row.group + 1)
        block_of_row.append(len(ranges) - 1)
        size += row.size
    return Blocks(np.array(block_of_row, dtype=np.int64), ranges)


class RowReader:
    """Fetch row groups and cache the latest.

    Args:
        cache_bytes: limit of the cache. The row groups of the latest fetch are cached even if they exceed it.
    """

    def __init__(self, cache_bytes: int = 2**29):
        self.cache_bytes = cache_bytes
        self._groups: OrderedDict[tuple[str, int], dict[str, pa.ChunkedArray]] = OrderedDict()
        self._bytes = 0
        self._open = lru_cache(MAX_OPEN_SHARDS)(open_parquet)

    def row(self, location: ParquetRow) -> dict[str, Any]:
        """Return a row as `read_scan` takes it, and fetch its row group if it is not cached.

        Raises:
            M3RetReadError: if the row cannot be fetched.
        """
        key = (location.shard, location.group)
        if key not in self._groups:
            self.fetch(location.shard, location.group, location.group + 1)
        self._groups.move_to_end(key)
        columns, index = self._groups[key], location.row
        # PyArrow copies a large value twice if it is indexed, and a slice of all columns takes three times as long
        media = {name: columns[name].slice(index, 1).to_pylist()[0] for name in MEDIA if name in columns}
        row: dict[str, Any] = {name: columns[name][index].as_py() for name in FETCHED_COLUMNS if name in columns}
        return row | {name: _media_bytes(media.get(name)) for name in MEDIA}

    def fetch(self, shard: str, first: int, end: int) -> None:
        """Fetch the row groups `first` to `end` that are not cached, in one read.

        Raises:
            M3RetReadError: if they cannot be fetched.
        """
        missing = [group for group in range(first, end) if (shard, group) not in self._groups]
        if not missing:
            return
        read = partial(self._read_row_groups, shard, missing)
        try:
            tables = hub_retries(f"reading {_file_name(shard)}")(read) if "://" in shard else read()
        except Exception as error:  # the HTTP libraries below raise exceptions of many types
            raise M3RetReadError(
                _file_name(shard),
                "undecodable",
                expected="an intact Parquet file that can be fetched",
                got=type(error).__name__,
                advice="Check the connection, or download the dataset again.",
            ) from error
        for group, table in zip(missing, tables, strict=True):
            filled = [n for n in table.column_names if n not in MEDIA or table[n].null_count < len(table)]
            self._groups[shard, group] = {name: table[name] for name in filled}
            self._bytes += _size(self._groups[shard, group])
        while self._bytes > self.cache_bytes and len(self._groups) > len(missing):
            _, oldest = self._groups.popitem(last=False)
            self._bytes -= _size(oldest)

    def _read_row_groups(self, shard: str, groups: list[int]) -> list[pa.Table]:
        try:
            parquet = self._open(shard)
            names = [name for name in (*MEDIA, *FETCHED_COLUMNS) if name in parquet.schema_arrow.names]
            table = parquet.read_row_groups(groups, columns=names, use_threads=False)
        except Exception:
            self._open.cache_clear()  # the connection may be broken: reopen the shards at the next attempt
            raise
        ends = list(accumulate(parquet.metadata.row_group(group).num_rows for group in groups))
        return [table.slice(start, end - start) for start, end in pairwise([0, *ends])]


def _size(columns: dict[str, pa.ChunkedArray]) -> int:
    return sum(column.nbytes for column in columns.values())


def _media_bytes(cell: Any) -> bytes | None:
    """Return the content of a media cell, or None. A path in it is ignored: it may lead outside the dataset."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else None


def open_parquet(shard: str) -> pq.ParquetFile:
    """Open a shard by its path or its `hf://` address. Of a remote shard, only the requested ranges are transferred."""
    if not shard.startswith("hf://"):
        return pq.ParquetFile(shard, memory_map=True)
    from huggingface_hub import HfFileSystem

    # PyArrow merges the ranges it needs into large requests; a cache in between would split them again
    return pq.ParquetFile(HfFileSystem().open(shard, "rb", cache_type="none"), pre_buffer=True)


def process_reader() -> RowReader:
    """Return the reader of this process. A forked worker gets its own: connections and files cannot be shared."""
    return _reader_of_process(os.getpid())


@lru_cache(maxsize=1)
def _reader_of_process(process: int) -> RowReader:
    return RowReader()
