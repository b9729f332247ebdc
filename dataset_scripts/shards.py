"""How does a build of hours survive being killed?

What goes into which shard is decided before the first scan is read, and written down. Each shard is written beside its
place and renamed when whole, so that a build started again goes on with the shards that are missing, and ends with the
same bytes as one that was never interrupted. Memory is bounded by a row group and the scan at hand.
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
from modeling_m3ret.version import __version__
from modeling_m3ret.worker_process import initialise_worker, worker_context

from .builder import Built, Failure, ScanBuilder
from .duplicates import Fingerprint
from .entries import Entry


LAYOUT = 1  # raise it when the bytes of a shard change: a build of another layout is not gone on with
STATE = ".build"  # in the output folder; names files of this machine and is never pushed
SHARD_BYTES = 500 * 2**20  # the size that `push_to_hub` of datasets gives its shards
# reading one row at random costs reading its row group: with 1 MiB some ten images, and every larger scan has its own
ROW_GROUP_BYTES = 2**20
# files that are packed become about so much larger as plain voxels: the guess that shards are planned by
UNPACKED = 3
PACKED_SUFFIXES = (".gz", ".dcm", ".npz", "")
# volumes and PNG are plain voxels; videos are compressed already, and so are JPEG, which zstd notices at once
COMPRESSION = {"video.bytes": "none"}
COMPRESSION_LEVEL = 1


class BuildError(RuntimeError):
    """A build that can't go on: says what was found and what to do."""


@dataclass(frozen=True)
class Shard:
    """One Parquet file to be: its name and its entries."""

    name: str
    split: str
    entries: list[Entry] = field(repr=False)


@dataclass
class ShardReport:
    """What became of a shard's entries; written beside it, so that a build that goes on still can report on all."""

    rows: int = 0
    media_bytes: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    fingerprints: list[dict[str, str]] = field(default_factory=list)
    burned_in: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # of each id, for the local report of duplicates


def plan(splits: dict[str, list[Entry]], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Entries -> shards of about `shard_bytes`, judged by the size of their files."""
    shards = []
    for split in SPLITS:
        parts: list[list[Entry]] = []
        size = shard_bytes
        for entry in splits.get(split, []):
            if size >= shard_bytes:
                parts.append([])
                size = 0
            parts[-1].append(entry)
            size += _estimated_bytes(entry)
        for number, entries in enumerate(parts):
            shards.append(Shard(f"{split}-{number:05d}-of-{len(parts):05d}", split, entries))
    return shards


def _estimated_bytes(entry: Entry) -> int:
    size = 0
    if entry.part is None:  # of a file of many scans nobody knows each one's part
        for file in entry.files:
            for path in file.rglob("*") if file.is_dir() else [file]:
                with contextlib.suppress(OSError):  # missing: its turn to be reported comes
                    size += path.stat().st_size * (UNPACKED if path.suffix in PACKED_SUFFIXES else 1)
    return max(size, 2**16)


def build_shards(builder: ScanBuilder, output: Path, shards: Sequence[Shard], num_proc: int = 1) -> list[ShardReport]:
    """Write the shards that are not there yet, with a progress bar; the reports of all, in order.

    Raises:
        BuildError: if the folder holds another build, or a process died.
    """
    _agree_on_plan(builder, output, shards)
    for unfinished in output.rglob(".*.partial"):  # of a build that was killed
        unfinished.unlink()
    missing = [shard for shard in shards if _report_of(output, shard) is None]
    done = sum(len(shard.entries) for shard in shards) - sum(len(shard.entries) for shard in missing)
    total = done + sum(len(shard.entries) for shard in missing)
    with tqdm(total=total, initial=done, desc="building", unit="scan") as bar:
        if num_proc == 1 or len(missing) < 2:
            for shard in missing:
                write_shard(builder, output, shard, bar.update)
        else:
            _in_processes(builder, output, missing, min(num_proc, len(missing)), bar)
    reports = [_report_of(output, shard) for shard in shards]
    assert all(report is not None for report in reports)
    return [report for report in reports if report is not None]


def _in_processes(builder: ScanBuilder, output: Path, missing: Sequence[Shard], num_proc: int, bar: Any) -> None:
    context = worker_context([__name__])
    counter = context.Value("q", 0)
    try:
        with ProcessPoolExecutor(
            num_proc, mp_context=context, initializer=_begin_process, initargs=(counter, builder, output)
        ) as pool:
            jobs = [pool.submit(_write_in_process, shard) for shard in missing]
            try:
                open_jobs = set(jobs)
                while open_jobs:
                    done, open_jobs = wait(open_jobs, 0.1)
                    for job in done:
                        job.result()
                    bar.update(counter.value - bar.n + bar.initial)
            finally:
                pool.shutdown(cancel_futures=True)  # what hasn't begun does not, after an error or Ctrl-C
    except BrokenExecutor as error:
        raise BuildError(
            "a process of the build died, of a lack of memory perhaps: start again with a smaller --num_proc"
        ) from error


_process: dict[str, Any] = {}


def _begin_process(counter: Any, builder: ScanBuilder, output: Path) -> None:
    _process.update(counter=counter, builder=builder, output=output)
    initialise_worker()


def _write_in_process(shard: Shard) -> None:
    def count(scans: int) -> None:
        with _process["counter"].get_lock():
            _process["counter"].value += scans

    write_shard(_process["builder"], _process["output"], shard, count)


def write_shard(builder: ScanBuilder, output: Path, shard: Shard, progress: Callable[[int], Any]) -> None:
    """Read the entries of one shard and write it, then its report: with that it counts as done."""
    report = ShardReport()

    def rows() -> Iterator[dict[str, Any]]:
        for entry in shard.entries:
            built = builder.build_row(entry)
            progress(1)
            if isinstance(built, Failure):
                report.failures.append(asdict(built))
                continue
            columns = built.columns
            report.files[columns["id"]] = os.path.relpath(entry.files[0], builder.root)
            report.fingerprints.append(asdict(_fingerprint(built, shard.split)))
            report.media_bytes += len(columns[media_column(columns)]["bytes"])
            if built.burned_in is not None:
                report.burned_in[built.burned_in] = report.burned_in.get(built.burned_in, 0) + 1
            yield columns

    path = shard_path(output, shard)
    report.rows = write_parquet(path, rows())
    atomic_write_text(_report_path(output, shard), json.dumps(asdict(report)) + "\n")


def _fingerprint(built: Built, split: str) -> Fingerprint:
    columns = built.columns
    return Fingerprint(columns["id"], split, columns["patient"], built.digest, built.picture_hash)


def write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Rows -> one Parquet file of the schema, whole or not at all, and none of no rows; how many there were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = features().arrow_schema
    waiting: list[dict[str, Any]] = []
    count = size = 0
    with (
        atomic_write(path) as stream,
        pq.ParquetWriter(
            stream,
            schema,
            compression={name: COMPRESSION.get(name, "zstd") for name in _leaves(schema)},
            compression_level={"volume.bytes": COMPRESSION_LEVEL},
            use_dictionary=["anatomy", "intensity", "source", "licence"],
            write_statistics=False,  # of bytes that would be the bytes once more
        ) as writer,
    ):
        for row in rows:
            waiting.append(row)
            count += 1
            size += len(row[media_column(row)]["bytes"])
            if size >= ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(waiting, schema), row_group_size=len(waiting))
                waiting, size = [], 0
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, schema), row_group_size=len(waiting))
    if not count:
        path.unlink()
    return count


def _leaves(schema: pa.Schema) -> list[str]:
    """Names of the columns as Parquet has them: those of a struct's fields and a list's elements are longer."""
    names = []
    for entry in schema:
        if pa.types.is_struct(entry.type):
            names += [f"{entry.name}.{child.name}" for child in entry.type]
        elif pa.types.is_list(entry.type):
            names.append(f"{entry.name}.list.element")
        else:
            names.append(entry.name)
    return names


# ----------------------------------------------------------------------------------------------- what is there already


def shard_path(output: Path, shard: Shard) -> Path:
    return output / "data" / f"{shard.name}.parquet"


def _report_path(output: Path, shard: Shard) -> Path:
    return output / STATE / f"{shard.name}.json"


def _report_of(output: Path, shard: Shard) -> ShardReport | None:
    """The report of a shard that is there and whole. Where no scan could be read there is no shard, but a report."""
    try:
        report = ShardReport(**json.loads(_report_path(output, shard).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return report if report.rows == 0 or shard_path(output, shard).is_file() else None


def _agree_on_plan(builder: ScanBuilder, output: Path, shards: Sequence[Shard]) -> None:
    """Write the plan down, or see that it is the one of the build that is there."""
    digest = hashlib.sha256()
    for shard in shards:
        for entry in shard.entries:
            files = [os.path.relpath(file, builder.root) for file in entry.files]
            told = asdict(entry) | {"files": files, "shard": shard.name, "patient": builder.names.patient(entry)}
            digest.update(json.dumps(told, sort_keys=True).encode())
    plan_now = {
        "layout": LAYOUT,
        "m3ret": __version__,
        "source": builder.source.name,
        "options": asdict(builder.options),
        "shards": len(shards),
        "scans": sum(len(shard.entries) for shard in shards),
        "entries": digest.hexdigest(),  # salted: the patients' hashes are in it
    }
    path = output / STATE / "plan.json"
    if output.exists() and not output.is_dir():
        raise BuildError(f"{output} is a file: choose a folder")
    if path.is_file():
        before = json.loads(path.read_text())
        differing = [
            f"{key}: {before.get(key)} -> {plan_now[key]}" for key in plan_now if before.get(key) != plan_now[key]
        ]
        if differing:
            raise BuildError(
                f"{output} holds another build ({'; '.join(differing)}): choose another folder, or remove it yourself"
            )
        return
    if output.exists() and any(path.name != STATE for path in output.iterdir()):
        raise BuildError(f"{output} holds something that is no build: choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(plan_now, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------- when all are written


def written_shards(output: Path, shards: Sequence[Shard]) -> list[Path]:
    """The files of the shards that have any row."""
    return [path for shard in shards if (path := shard_path(output, shard)).is_file()]


def drop_rows(output: Path, shards: Sequence[Shard], ids: set[str]) -> int:
    """Write the shards that hold any of these rows anew without them; how many rows went."""
    dropped = 0
    for path in written_shards(output, shards):
        with pq.ParquetFile(path) as parquet:
            found = ids & set(parquet.read(columns=["id"]).column("id").to_pylist())
            if found:
                dropped += len(found)
                rows = (row for batch in parquet.iter_batches(batch_size=1) for row in batch.to_pylist())
                write_parquet(path, (row for row in rows if row["id"] not in found))
    return dropped


def write_index(output: Path, shards: Sequence[Shard]) -> pa.Table | None:
    """All rows' small columns and where each lies, in one file: what training needs to know before it reads.

    In the order of the shards' names, as who has no index finds them. None, and no file, where there is no row.
    """
    parts = []
    for path in sorted(written_shards(output, shards)):
        with pq.ParquetFile(path) as parquet:
            columns = [name for name in parquet.schema_arrow.names if name not in MEDIA]
            parts.append(add_location_columns(path.name, parquet, parquet.read(columns=columns)))
    if not parts:
        return None
    table = pa.concat_tables(parts)
    with atomic_write(output / INDEX) as stream:
        pq.write_table(table, stream, compression="zstd")
    return table
