"""Write the shards of a dataset so that an interrupted build can be resumed.

The entries of each shard are planned before the first scan is read, and the plan is stored. Each shard is written
atomically. A build that is started again writes the missing shards only, and ends with the same bytes as one that was
never interrupted. Memory is bounded by one row group and one scan.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from modeling_m3ret.atomic_io import atomic_write, atomic_write_text
from modeling_m3ret.data.parquet import INDEX, add_location_columns
from modeling_m3ret.data.schema import MEDIA, SPLITS, features, media_column
from modeling_m3ret.errors import InputError
from modeling_m3ret.version import __version__
from modeling_m3ret.worker_process import initialise_worker, worker_context

from .builder import ScanBuilder, SkippedEntry
from .duplicates import Fingerprint
from .entries import Entry


LAYOUT = 2  # increase it when the bytes of a shard change: a build cannot be resumed with another layout
STATE_FOLDER = ".build"  # in the output folder; names files of this machine, so it is never pushed
SHARD_BYTES = 500 * 2**20  # as `Dataset.push_to_hub`
# Reading a random row means reading its row group: about ten images, or one larger scan.
ROW_GROUP_BYTES = 2**20
EXPANSION = 3  # estimated size of plain voxels relative to a compressed file, for planning
COMPRESSED_SUFFIXES = (".gz", ".dcm", ".npz", "")
# zstd for volumes and PNG, which are plain voxels, and for JPEG, which it skips quickly. Videos are compressed already.
COMPRESSION = {"video.bytes": "none"}
COMPRESSION_LEVEL = 1


class BuildError(InputError):
    """A build in `output` that cannot start or continue. `differences` from another build there: {name: (old, new)}."""

    def __init__(self, output: Path, problem: str, differences: dict[str, tuple[Any, Any]] | None = None):
        super().__init__(f"{output}: {problem}")
        self.output, self.differences = output, differences or {}


@dataclass(frozen=True)
class Shard:
    """The plan of one Parquet file."""

    name: str
    split: str
    entries: list[Entry] = field(repr=False)


@dataclass
class ShardReport:
    """What a shard contains and which entries were skipped. It is stored, so that a resumed build can report on all."""

    rows: int = 0
    media_bytes: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    fingerprints: list[dict[str, str]] = field(default_factory=list)
    burned_in: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # file of each id, for the list of duplicates


def plan_shards(splits: dict[str, list[Entry]], shard_bytes: int | None = None) -> list[Shard]:
    """Distribute the entries of each split over shards of about `shard_bytes`, estimated from file sizes."""
    shard_bytes = shard_bytes or SHARD_BYTES
    shards = []
    for split in SPLITS:
        groups: list[list[Entry]] = []
        size = shard_bytes
        for entry in splits.get(split, []):
            if size >= shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(entry)
            size += _estimate_bytes(entry)
        for number, entries in enumerate(groups):
            shards.append(Shard(f"{split}-{number:05d}-of-{len(groups):05d}", split, entries))
    return shards


def _estimate_bytes(entry: Entry) -> int:
    """Return the estimated bytes of a row, from the sizes of its files."""
    size = 0
    if entry.member is None:  # the size of one scan in a file of many is unknown
        for file in entry.files:
            for path in file.rglob("*") if file.is_dir() else [file]:
                with contextlib.suppress(OSError):  # reported when the builder reads the file
                    size += path.stat().st_size * (EXPANSION if path.suffix in COMPRESSED_SUFFIXES else 1)
    return max(size, 2**16)


def build_shards(builder: ScanBuilder, output: Path, shards: Sequence[Shard], num_proc: int = 1) -> list[ShardReport]:
    """Write the missing shards, with a progress bar, and return the reports of all shards in order.

    Raises:
        BuildError: if `output` holds another build or other files, or a process died.
    """
    _check_plan(builder, output, shards)
    for partial in output.rglob(".*.partial"):  # left by a killed build
        partial.unlink()
    missing = [shard for shard in shards if _read_report(output, shard) is None]
    total, left = (sum(len(shard.entries) for shard in some) for some in (shards, missing))
    with tqdm(total=total, initial=total - left, desc="building", unit="scan") as bar:
        if num_proc == 1 or len(missing) < 2:
            for shard in missing:
                write_shard(builder, output, shard, bar.update)
        else:
            _write_in_parallel(builder, output, missing, min(num_proc, len(missing)), bar)
    return [report for shard in shards if (report := _read_report(output, shard))]


def _write_in_parallel(builder: ScanBuilder, output: Path, missing: Sequence[Shard], num_proc: int, bar: Any) -> None:
    context = worker_context([__name__])
    counter = context.Value("q", 0)
    try:
        with ProcessPoolExecutor(
            num_proc, mp_context=context, initializer=_initialise_worker, initargs=(counter, builder, output)
        ) as pool:
            pending = {pool.submit(_write_in_worker, shard) for shard in missing}
            try:
                while pending:
                    done, pending = wait(pending, 0.1)
                    for future in done:
                        future.result()
                    bar.update(counter.value - bar.n + bar.initial)
            finally:
                pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, start no further shard
    except BrokenExecutor as error:
        problem = "a worker process died, possibly for lack of memory. Run again with a smaller --num_proc."
        raise BuildError(output, problem) from error


_worker: dict[str, Any] = {}  # set once per worker process


def _initialise_worker(counter: Any, builder: ScanBuilder, output: Path) -> None:
    _worker.update(counter=counter, builder=builder, output=output)
    initialise_worker()


def _write_in_worker(shard: Shard) -> None:
    def count(scans: int) -> None:
        with _worker["counter"].get_lock():
            _worker["counter"].value += scans

    write_shard(_worker["builder"], _worker["output"], shard, count)


def write_shard(builder: ScanBuilder, output: Path, shard: Shard, progress: Callable[[int], Any]) -> None:
    """Write one shard, then its report, which marks the shard as complete; call `progress(1)` after each scan."""
    report = ShardReport()

    def rows() -> Iterator[dict[str, Any]]:
        for entry in shard.entries:
            row = builder.build_row(entry)
            progress(1)
            if isinstance(row, SkippedEntry):
                report.failures.append(asdict(row))
                continue
            columns = row.columns
            report.files[columns["id"]] = os.path.relpath(entry.files[0], builder.root)
            fingerprint = Fingerprint(columns["id"], shard.split, columns["patient"], row.digest, row.picture_hash)
            report.fingerprints.append(asdict(fingerprint))
            report.media_bytes += len(columns[media_column(columns)]["bytes"])
            if row.burned_in is not None:
                report.burned_in[row.burned_in] = report.burned_in.get(row.burned_in, 0) + 1
            yield columns

    report.rows = write_parquet(shard_path(output, shard), rows())
    atomic_write_text(_report_path(output, shard), json.dumps(asdict(report)) + "\n")


def write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Write rows atomically as one Parquet file of the schema, and return their number. Without rows, write no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = features().arrow_schema
    count = 0
    with (
        atomic_write(path) as stream,
        pq.ParquetWriter(
            stream,
            schema,
            compression={name: COMPRESSION.get(name, "zstd") for name in _leaf_columns(schema)},
            compression_level={"volume.bytes": COMPRESSION_LEVEL},
            use_dictionary=["anatomy", "intensity", "source", "licence"],
            write_statistics=False,  # those of the media columns would contain whole files
        ) as writer,
    ):
        for row_group in _row_groups(rows):
            writer.write_table(pa.Table.from_pylist(row_group, schema), row_group_size=len(row_group))
            count += len(row_group)
    if not count:
        path.unlink()
    return count


def _row_groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Group rows up to `ROW_GROUP_BYTES` of media. A yielded list is emptied when the next one is requested."""
    row_group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        row_group.append(row)
        size += len(row[media_column(row)]["bytes"])
        if size >= ROW_GROUP_BYTES:
            yield row_group
            row_group.clear()  # frees the memory before the next scan is read
            size = 0
    if row_group:
        yield row_group


def _leaf_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the columns in Parquet, where struct fields and list elements are columns."""
    empty = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), empty)
    leaves = pq.ParquetFile(pa.BufferReader(empty.getvalue())).schema
    return [leaves.column(index).path for index in range(len(leaves.names))]


def shard_path(output: Path, shard: Shard) -> Path:
    """Return the path of the Parquet file."""
    return output / "data" / f"{shard.name}.parquet"


def _report_path(output: Path, shard: Shard) -> Path:
    return output / STATE_FOLDER / f"{shard.name}.json"


def _read_report(output: Path, shard: Shard) -> ShardReport | None:
    """Return the report of a complete shard, or None. A shard without any readable scan has a report but no file."""
    try:
        report = ShardReport(**json.loads(_report_path(output, shard).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return report if report.rows == 0 or shard_path(output, shard).is_file() else None


def _check_plan(builder: ScanBuilder, output: Path, shards: Sequence[Shard]) -> None:
    """Store the plan, or compare it with that of the build in the output folder."""
    digest = hashlib.sha256()
    for shard in shards:
        for entry in shard.entries:
            files = [os.path.relpath(file, builder.root) for file in entry.files]
            planned = {"files": files, "shard": shard.name, "patient": builder.pseudonyms.patient(entry)}
            digest.update(json.dumps(asdict(entry) | planned, sort_keys=True).encode())
    plan = {
        "layout": LAYOUT,
        "m3ret": __version__,
        "source": builder.source.name,
        "options": asdict(builder.options),
        "shards": len(shards),
        "scans": sum(len(shard.entries) for shard in shards),
        "entries": digest.hexdigest(),  # salted, because it includes the pseudonyms
    }
    path = output / STATE_FOLDER / "plan.json"
    if output.exists() and not output.is_dir():
        raise BuildError(output, "expected a folder, got a file. Choose another --output.")
    if path.is_file():
        _compare_plans(output, json.loads(path.read_text()), plan)
        return
    if output.exists() and any(path.name != STATE_FOLDER for path in output.iterdir()):
        raise BuildError(output, "expected an empty folder or a build, got other files. Choose another --output.")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(plan, indent=2) + "\n")


def _compare_plans(output: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise BuildError if two plans differ."""
    differences = {key: (old.get(key), value) for key, value in new.items() if old.get(key) != value}
    if "layout" in differences or "m3ret" in differences:
        problem = (
            f"expected a build of M3Ret {new['m3ret']} (layout {new['layout']}), got one of {old.get('m3ret')} (layout "
            f"{old.get('layout')}). It can still be read. To build again, choose another --output; to resume it, use "
            "the version that started it."
        )
        raise BuildError(output, problem, differences)
    if differences:
        changed = "; ".join(f"{key}: {before} -> {now}" for key, (before, now) in differences.items())
        problem = f"holds a build with other settings ({changed}). Choose another --output."
        raise BuildError(output, problem, differences)


def written_shards(output: Path, shards: Sequence[Shard]) -> list[Path]:
    """Return the files of the shards that have at least one row."""
    return [path for shard in shards if (path := shard_path(output, shard)).is_file()]


def drop_rows(output: Path, shards: Sequence[Shard], ids: set[str]) -> int:
    """Rewrite the shards that contain any of these rows without them, and return the number of dropped rows."""
    dropped = 0
    for path in written_shards(output, shards):
        with pq.ParquetFile(path) as parquet:
            unwanted = ids & set(parquet.read(columns=["id"]).column("id").to_pylist())
            if unwanted:
                dropped += len(unwanted)
                rows = (row for batch in parquet.iter_batches(batch_size=1) for row in batch.to_pylist())
                write_parquet(path, (row for row in rows if row["id"] not in unwanted))
    return dropped


def write_index(output: Path, shards: Sequence[Shard]) -> pa.Table | None:
    """Write the index: all columns but the media, and the location of each row, sorted by shard name.

    Training reads it instead of opening every shard. Return None, and write no file, if there is no row.
    """
    tables = []
    for path in sorted(written_shards(output, shards)):
        with pq.ParquetFile(path) as parquet:
            columns = [name for name in parquet.schema_arrow.names if name not in MEDIA]
            tables.append(add_location_columns(path.name, parquet, parquet.read(columns=columns)))
    if not tables:
        return None
    table = pa.concat_tables(tables)
    with atomic_write(output / INDEX) as stream:
        pq.write_table(table, stream, compression="zstd")
    return table
