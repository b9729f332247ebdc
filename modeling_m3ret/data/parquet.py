"""Where do the rows of a Parquet data set lie, on this disk or on the Hub, and how are they fetched?

The small columns of all rows are known from the start, from the `index.parquet` that the builder writes or else from
the shards; the media are fetched when asked for, a row group at a time, or a block of neighbouring row groups where
a round trip costs more than the bytes. Nothing is decoded here.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..hub import hub_retries
from ..scan_m3ret import M3RetReadError
from .schema import MEDIA, MODALITIES, SPLITS


logger = logging.getLogger(__name__)

INDEX = "index.parquet"
SHARD_NAME = re.compile(rf"(?P<split>{'|'.join(SPLITS)})-\d{{5}}-of-\d{{5}}\.parquet")
READ_WITH_MEDIA = ("id", "spacing", "intensity")
# of neighbouring row groups that are fetched at once: at 100 ms a request, 80 MB/s a worker
BLOCK_BYTES = 2**23


class ParquetError(ValueError):
    """A Parquet data set that cannot be used: names the place, what was found and what was expected."""


@dataclass(frozen=True, slots=True)
class ParquetRow:
    """Where a row lies. shard: a path, or `hf://datasets/ORG/NAME@REVISION/data/...`; group, row: the row group and the
    place in it; size: bytes of its media."""

    shard: str
    group: int
    row: int
    size: int

    def open(self) -> dict[str, Any]:
        """The row as `read_scan` takes it: bytes of one of image, video, volume, and what is declared beside them.

        Raises:
            M3RetReadError: if it can't be fetched, on the Hub after a minute of attempts.
        """
        return reader().row(self)


# ---------------------------------------------------------------------------------------------------- finding the rows


@dataclass(frozen=True)
class Shards:
    """The Parquet files of a data set, `data/SPLIT-00000-of-00000.parquet`, and its index where there is one."""

    place: str
    files: list[str]
    index: Path | None


def local_shards(folder: Path) -> Shards:
    """Those of a folder that `dataset_scripts/build.py` wrote, or that was downloaded whole."""
    files = sorted(str(path) for path in (folder / "data").glob("*.parquet") if SHARD_NAME.fullmatch(path.name))
    index = folder / INDEX
    return Shards(folder.name, files, index if index.is_file() else None)


def hub_shards(name: str, stream: bool) -> Shards:
    """Those of a data set on the Hub, `ORG/NAME` or `ORG/NAME@REVISION`; downloaded first unless they are streamed.

    Whatever is pushed meanwhile, all reads are of the one commit that the revision means now.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    repository, _, revision = name.partition("@")
    info = HfApi().dataset_info(repository, revision=revision or None)
    found = [file.rfilename for file in info.siblings or []]
    files = sorted(file for file in found if file.startswith("data/") and SHARD_NAME.fullmatch(Path(file).name))
    if not stream:
        wanted = ["data/*.parquet", INDEX]
        return local_shards(
            Path(snapshot_download(repository, repo_type="dataset", revision=info.sha, allow_patterns=wanted))
        )
    index = None
    if INDEX in found:
        index = Path(hf_hub_download(repository, INDEX, repo_type="dataset", revision=info.sha))
    return Shards(name, [f"hf://datasets/{repository}@{info.sha}/{file}" for file in files], index)


def read_locations(shards: Shards) -> Iterator[tuple[ParquetRow, str, dict[str, Any]]]:
    """Of each row its place, its split and its small columns, in the order of shards and rows.

    Raises:
        ParquetError: if there is no shard, or a needed column is missing.
    """
    if not shards.files:
        raise ParquetError(
            f"{shards.place}: found no Parquet file, expected data/SPLIT-00000-of-00000.parquet, SPLIT one of "
            f"{', '.join(SPLITS)}"
        )
    table = _index_of(shards) or build_index(shards)
    modalities = modality_names(table.schema)
    by_name = {_name(file): file for file in shards.files}
    for row in table.to_pylist():
        place = ParquetRow(by_name[row["shard"]], row["group"], row["row"], row["size"])
        if isinstance(row["modality"], int):
            row["modality"] = modalities[row["modality"]]
        split = SHARD_NAME.fullmatch(row["shard"])
        assert split is not None
        yield place, split["split"], row


def _name(file: str) -> str:
    return file.rsplit("/", 1)[-1]


def _index_of(shards: Shards) -> pa.Table | None:
    if shards.index is None:
        return None
    table = pq.read_table(shards.index)
    names = set(table.column("shard").unique().to_pylist())
    if names != {_name(file) for file in shards.files}:
        logger.warning("%s: the index is of other shards than there are, and is not used", shards.place)
        return None
    return table


def build_index(shards: Shards) -> pa.Table:
    """What the index would hold, from the shards themselves: slower on the Hub, a request and more for each."""
    parts = []
    for file in shards.files:
        parquet = open_parquet(file)
        columns = [name for name in parquet.schema_arrow.names if name not in MEDIA]
        if missing := {"id", "modality", "patient"} - set(columns):
            raise ParquetError(f"{shards.place}: found the columns {columns}, expected also {', '.join(missing)}")
        parts.append(add_location_columns(_name(file), parquet, parquet.read(columns=columns)))
    return pa.concat_tables(parts)


def add_location_columns(shard: str, parquet: pq.ParquetFile, table: pa.Table) -> pa.Table:
    """A shard's small columns with the place of each row: shard, group, row, and the size of its media (those of its
    row group in equal parts, since only reading them would tell)."""
    groups: list[int] = []
    rows: list[int] = []
    sizes: list[int] = []
    for group in range(parquet.metadata.num_row_groups):
        facts = parquet.metadata.row_group(group)
        groups += [group] * facts.num_rows
        rows += range(facts.num_rows)
        size = sum(facts.column(number).total_compressed_size for number in range(facts.num_columns))
        sizes += [size // facts.num_rows] * facts.num_rows
    return (
        table.append_column("shard", pa.array([shard] * len(rows), pa.string()))
        .append_column("group", pa.array(groups, pa.int32()))
        .append_column("row", pa.array(rows, pa.int32()))
        .append_column("size", pa.array(sizes, pa.int64()))
    )


def modality_names(schema: pa.Schema) -> Sequence[str]:
    """What the numbers of the modality column mean, as `datasets` wrote it into the file."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])
        return list(told["info"]["features"]["modality"]["names"])
    except (KeyError, TypeError, ValueError):
        return MODALITIES


# ------------------------------------------------------------------------------------------------------- fetching rows


@dataclass(frozen=True)
class Blocks:
    """Rows that are fetched together. block_of_row: `(n,)` the block of each row; ranges: shard, first group, end."""

    block_of_row: np.ndarray
    ranges: list[tuple[str, int, int]]


def group_into_blocks(rows: Sequence[ParquetRow]) -> Blocks:
    """Neighbouring row groups of a shard make a block, up to some `BLOCK_BYTES`. Rows come in their order."""
    numbers: list[int] = []
    ranges: list[tuple[str, int, int]] = []
    size = 0
    for row in rows:
        shard, first, end = ranges[-1] if ranges else ("", 0, 0)
        if row.shard != shard or (row.group >= end and size >= BLOCK_BYTES):
            ranges.append((row.shard, row.group, row.group + 1))
            size = 0
        elif row.group >= end:
            ranges[-1] = (shard, first, row.group + 1)
        numbers.append(len(ranges) - 1)
        size += row.size
    return Blocks(np.array(numbers, dtype=np.int64), ranges)


class RowReader:
    """Fetches row groups and keeps the latest, up to `kept_bytes`."""

    def __init__(self, kept_bytes: int = 2**29):
        self.kept_bytes = kept_bytes
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._bytes = 0

    def row(self, place: ParquetRow) -> dict[str, Any]:
        key = (place.shard, place.group)
        if key not in self._groups:
            self.fetch(place.shard, place.group, place.group + 1)
        self._groups.move_to_end(key)
        table = self._groups[key].slice(place.row, 1)
        row = {name: table.column(name)[0].as_py() for name in READ_WITH_MEDIA if name in table.column_names}
        for name in MEDIA:
            media = table.column(name)[0] if name in table.column_names else None
            row[name] = media["bytes"].as_py() if media is not None and media.is_valid else None
        return row

    def fetch(self, shard: str, first: int, end: int) -> None:
        """Make sure that these row groups are here, in one read of those that are not."""
        missing = [group for group in range(first, end) if (shard, group) not in self._groups]
        if not missing:
            return
        read = partial(self._read_row_groups, shard, missing)
        try:
            table = hub_retries(f"reading {_name(shard)}")(read) if "://" in shard else read()
        except Exception as error:  # of any HTTP library below
            raise M3RetReadError(
                _name(shard), "undecodable", "an intact Parquet file that can be fetched", type(error).__name__
            ) from error
        start = 0
        for group in missing:
            rows = self._open(shard).metadata.row_group(group).num_rows
            part = table.slice(start, rows)
            start += rows
            self._groups[shard, group] = part
            self._bytes += part.nbytes
        while self._bytes > self.kept_bytes and len(self._groups) > len(missing):
            _, oldest = self._groups.popitem(last=False)
            self._bytes -= oldest.nbytes

    def _read_row_groups(self, shard: str, groups: list[int]) -> pa.Table:
        try:
            parquet = self._open(shard)
            names = [name for name in (*MEDIA, *READ_WITH_MEDIA) if name in parquet.schema_arrow.names]
            return parquet.read_row_groups(groups, columns=names, use_threads=False)
        except Exception:
            self._files.pop(shard, None)  # a broken connection: the next attempt opens the shard again
            raise

    def _open(self, shard: str) -> pq.ParquetFile:
        if shard not in self._files:
            self._files[shard] = open_parquet(shard)
            if len(self._files) > 32:
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return self._files[shard]


def open_parquet(shard: str) -> pq.ParquetFile:
    """A shard by its path or its `hf://` address, of which only what is asked for is transferred."""
    if not shard.startswith("hf://"):
        return pq.ParquetFile(shard, memory_map=True)
    from huggingface_hub import HfFileSystem

    # pyarrow knows which ranges it will want and asks for them whole; a cache between would ask in pieces
    return pq.ParquetFile(HfFileSystem().open(shard, "rb", cache_type="none"), pre_buffer=True)


_readers: dict[int, RowReader] = {}


def reader() -> RowReader:
    """This process's reader. A forked worker opens its own: connections and file positions can't be shared."""
    process = os.getpid()
    if process not in _readers:
        _readers.clear()
        _readers[process] = RowReader()
    return _readers[process]
