"""Interrupted builds end with the bytes of an uninterrupted one, and never change another build."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scan_files import nifti_bytes
from scan_folders import (
    SALT,
    bytes_of,
    noise_collection,
    picture_bytes,
    put,
    rows_of,
    texture,
    video_bytes,
    volume_bytes,
)

from dataset_scripts import shards
from dataset_scripts.build import build
from dataset_scripts.builder import BuildOptions, ScanBuilder
from dataset_scripts.entries import Entry, SourceError
from dataset_scripts.shards import BuildError, drop_rows, plan_shards
from dataset_scripts.sources.folder import Folder
from modeling_m3ret.data.parquet import build_index, local_shards


ROOT = Path(__file__).parents[2]
MIB = 2**20
SMALL = 6 * 2**16  # bytes of a shard with six small scans
# A build that is killed (SIGKILL) after a file is written and before it is renamed; a worker kills its parent.
KILLED_WHILE_WRITING = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from dataset_scripts.build import build
from dataset_scripts.sources.folder import Folder
root, output, salt, size, processes, name = sys.argv[1:]
replace = Path.replace
def kill(self, target):
    if self.name.startswith(name):
        os.kill(multiprocessing.parent_process().pid if processes != "1" else os.getpid(), signal.SIGKILL)
        time.sleep(100)
    return replace(self, target)
Path.replace = kill
if __name__ == "__main__":
    build(Folder(), Path(root), Path(output), salt=salt.encode(), num_proc=int(processes), shard_bytes=int(size))
"""
# Print the peak of memory after few volumes and after many.
MEASURED = """
import resource, sys
from pathlib import Path
from dataset_scripts.build import build
from dataset_scripts.sources.folder import Folder
few, many, output = map(Path, sys.argv[1:])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
build(Folder(), few, output / "few", salt=b"salt")
before = peak()
build(Folder(), many, output / "many", salt=b"salt")
print(before, peak())
"""


class Dying(Folder):
    """A source whose worker process dies when it opens one scan, while the file `trigger` exists."""

    def __init__(self, trigger: Path):
        super().__init__()
        self.trigger = trigger

    def open(self, entry: Entry) -> Any:
        if entry.id == "xray/7.png" and self.trigger.exists():
            os._exit(3)
        return super().open(entry)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 40 scans of several formats, some broken and some duplicated."""
    files = {}
    for number in range(40):
        kind = number % 5
        if kind == 0:
            files[f"mri/{number}.nii.gz"] = volume_bytes(number, zipped=True)[: 40 if number == 20 else None]
        elif kind == 1:
            files[f"us/{number}.mp4"] = video_bytes(number)
        else:
            files[f"xray/{number}.png"] = picture_bytes(texture(0 if number in (3, 18) else number))
    return put(tmp_path_factory.mktemp("scans"), files | {"xray/broken.png": b"\x89PNG\r\n\x1a\n"})


@pytest.fixture(scope="module")
def whole(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build them in one process without interruption."""
    output = tmp_path_factory.mktemp("whole") / "built"
    report = build(Folder(), scans, output, salt=SALT, shard_bytes=SMALL)
    assert report["scans"] == {"built": 39, "failed": 2, "duplicates_dropped": 0}
    assert len(list((output / "data").glob("train-*"))) >= 4
    assert {path.split("/")[0] for path in bytes_of(output)} == {
        *("README.md", "index.parquet", "report.json", "data", ".build")
    }
    return output


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def shard_names(output: Path) -> list[str]:
    return sorted(path.stem for path in (output / "data").glob("*.parquet"))


# -------------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.slow
def test_resumed_build_equals_an_uninterrupted_one(tmp_path: Path, scans: Path, whole: Path) -> None:
    """Kill it in the second shard; resume with two processes and kill it before a report; finish with one."""
    script, output = tmp_path / "killed.py", tmp_path / "built"
    script.write_text(KILLED_WHILE_WRITING)
    names = shard_names(whole)
    train = [name for name in names if name.startswith("train")]

    def kill(processes: int, written: str) -> None:
        command = [sys.executable, script, scans, output, SALT, str(SMALL), str(processes), f".{written}"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=pipe, stderr=pipe) as process:
            try:  # returns when the orphaned workers have closed the pipe, too
                _, errors = process.communicate(timeout=600)  # only so that an error does not hang
            finally:
                process.kill()
        assert process.returncode == -signal.SIGKILL, errors.decode()

    kill(1, f"{train[1]}.parquet")
    assert shard_names(output) == train[:1]
    assert len(list((output / "data").glob(f".{train[1]}.parquet.*.partial"))) == 1
    first = (output / "data" / f"{train[0]}.parquet").stat()

    kill(2, f"{train[2]}.json")
    assert {*train[:1], train[2]} <= set(shard_names(output))
    assert not (output / ".build" / f"{train[2]}.json").exists()
    assert set(shard_names(output)) < set(names)

    build(Folder(), scans, output, salt=SALT, shard_bytes=SMALL)
    assert bytes_of(output) == bytes_of(whole)
    assert (output / "data" / f"{train[0]}.parquet").stat().st_mtime_ns == first.st_mtime_ns  # not written again


@pytest.mark.slow
def test_build_resumes_after_a_worker_died(tmp_path: Path, scans: Path, whole: Path) -> None:
    output, source = tmp_path / "built", Dying(tmp_path / "die")
    source.trigger.touch()
    with pytest.raises(BuildError) as caught:
        build(source, scans, output, salt=SALT, shard_bytes=SMALL, num_proc=2)
    assert isinstance(caught.value.__cause__, BrokenExecutor)
    assert not (output / "report.json").exists()
    source.trigger.unlink()
    build(source, scans, output, salt=SALT, shard_bytes=SMALL, num_proc=2)
    assert bytes_of(output) == bytes_of(whole)


def test_finished_build_is_not_written_again(scans: Path, whole: Path) -> None:
    before = bytes_of(whole)
    times = {path: path.stat().st_mtime_ns for path in (whole / "data").iterdir()}
    build(Folder(), scans, whole, salt=SALT, shard_bytes=SMALL, num_proc=3)
    assert bytes_of(whole) == before
    assert {path: path.stat().st_mtime_ns for path in (whole / "data").iterdir()} == times


def test_missing_shard_and_damaged_report_are_written_again(tmp_path: Path, scans: Path, whole: Path) -> None:
    output = tmp_path / "built"
    build(Folder(), scans, output, salt=SALT, shard_bytes=SMALL)
    (output / "data" / f"{shard_names(output)[1]}.parquet").unlink()
    (output / ".build" / f"{shard_names(output)[2]}.json").write_text("{")
    build(Folder(), scans, output, salt=SALT, shard_bytes=SMALL)
    assert bytes_of(output) == bytes_of(whole)


def test_full_disk_leaves_no_partial_file(
    tmp_path: Path, scans: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    output = tmp_path / "built"
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError) as caught:  # noqa: PT011
            build(Folder(), scans, output, salt=SALT, shard_bytes=SMALL)
    assert caught.value.errno == 28
    assert bytes_of(output) == {}
    build(Folder(), scans, output, salt=SALT, shard_bytes=SMALL)
    assert bytes_of(output) == bytes_of(whole)


# --------------------------------------------------------------------------------------------------------- other builds


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"options": BuildOptions(max_size=64)}, {"options"}),
        ({"shard_bytes": 2 * SMALL}, {"shards", "entries"}),
        ({"salt": b"another salt"}, {"entries"}),
        ({"source": Folder(modality="ct"), "more": "unnamed.png"}, {"scans", "entries"}),
    ],
)
def test_build_with_other_settings_in_the_same_folder_is_refused(
    tmp_path: Path, scans: Path, whole: Path, change: dict[str, Any], differing: set[str]
) -> None:
    before, more = bytes_of(whole), change.pop("more", None)
    root = scans
    if more:
        root = put(tmp_path / "more", {**bytes_of(scans), more: picture_bytes(texture(99))})
    arguments = {"source": Folder(), "salt": SALT, "shard_bytes": SMALL} | change
    with pytest.raises(BuildError) as caught:
        build(arguments.pop("source"), root, whole, **arguments)
    assert set(caught.value.differences) == differing
    if more:
        assert caught.value.differences["scans"] == (41, 42)
    assert bytes_of(whole) == before


def test_other_shard_boundaries_are_another_build(tmp_path: Path) -> None:
    root = noise_collection(tmp_path / "scans", 10, 16)
    options = BuildOptions(validation=0, test=0)
    for five_and_five in (5, 6):
        sizes = [len(shard.entries) for shard in plan_shards(splits_of(root, tmp_path, options), five_and_five * 2**16)]
        assert sizes == [five_and_five, 10 - five_and_five]
    build(Folder(), root, tmp_path / "built", salt=SALT, options=options, shard_bytes=5 * 2**16)
    with pytest.raises(BuildError) as caught:
        build(Folder(), root, tmp_path / "built", salt=SALT, options=options, shard_bytes=6 * 2**16)
    assert set(caught.value.differences) == {"entries"}


def test_folder_with_other_files_is_refused_and_unchanged(tmp_path: Path, scans: Path) -> None:
    others = put(tmp_path / "others", {"thesis.txt": b"years of work", "data/a.parquet": b"other", "empty/.keep": b""})
    file = put(tmp_path, {"file": b"content"}) / "file"
    before = bytes_of(tmp_path), sorted(tmp_path.rglob("*"))
    for root, output in ((scans, others), (scans, file), (others, others / "built")):
        with pytest.raises(BuildError) as caught:
            build(Folder(), root, output, salt=SALT)
        assert caught.value.output == output
        assert caught.value.differences == {}
    with pytest.raises(SourceError):
        build(Folder(), tmp_path / "nowhere", tmp_path / "built", salt=SALT)
    assert (bytes_of(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_build_of_an_older_layout_is_refused_and_unchanged(tmp_path: Path, scans: Path, whole: Path) -> None:
    output = put(tmp_path / "older", bytes_of(whole))
    plan = output / ".build" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"layout": shards.LAYOUT - 1}))
    before = bytes_of(output)
    with pytest.raises(BuildError) as caught:
        build(Folder(), scans, output, salt=SALT, shard_bytes=SMALL)
    assert caught.value.differences == {"layout": (shards.LAYOUT - 1, shards.LAYOUT)}
    assert bytes_of(output) == before


def test_empty_folder_is_accepted(tmp_path: Path, scans: Path, whole: Path) -> None:
    (tmp_path / "built").mkdir()
    build(Folder(), scans, tmp_path / "built", salt=SALT, shard_bytes=SMALL)
    assert bytes_of(tmp_path / "built") == bytes_of(whole)


# ---------------------------------------------------------------------------------------------------- what is in shards


def splits_of(root: Path, tmp_path: Path, options: BuildOptions = BuildOptions()) -> dict[str, list[Entry]]:
    return ScanBuilder(Folder(), root, salt=SALT, options=options, cache_dir=str(tmp_path / "cache")).split_entries()


def test_every_entry_is_in_one_shard_in_order(tmp_path: Path, scans: Path) -> None:
    splits = splits_of(scans, tmp_path)
    planned = plan_shards(splits, SMALL)
    for split, entries in splits.items():
        in_split = [shard for shard in planned if shard.split == split]
        assert [entry for shard in in_split for entry in shard.entries] == entries
        assert [shard.name for shard in in_split] == [
            f"{split}-{n:05}-of-{len(in_split):05}" for n in range(len(in_split))
        ]


def test_shards_and_row_groups_have_the_requested_size(tmp_path: Path) -> None:
    root = noise_collection(tmp_path / "scans", 60, 320)  # 100 KiB each
    options = BuildOptions(validation=0, test=0)
    build(Folder(), root, tmp_path / "built", salt=SALT, options=options, shard_bytes=5 * MIB // 2)
    sizes = [path.stat().st_size / MIB for path in sorted((tmp_path / "built" / "data").iterdir())]
    assert len(sizes) == 3
    assert all(2.5 <= size < 2.7 for size in sizes[:-1])
    for path in (tmp_path / "built" / "data").iterdir():
        metadata = pq.ParquetFile(path).metadata
        groups = [metadata.row_group(number).total_byte_size / MIB for number in range(metadata.num_row_groups)]
        assert all(1 <= size < 1.15 for size in groups[:-1])
        assert groups[-1] < 1.15
        assert all(metadata.row_group(number).num_rows == 11 for number in range(metadata.num_row_groups - 1))


def test_large_scan_has_its_own_row_group(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(0, 900, (128, 64, 70)).astype(np.int16)
    files = {f"mri/{number}.nii": nifti_bytes(voxels + np.int16(number), np.eye(4)) for number in range(5)}
    options = BuildOptions(validation=0, test=0)
    build(Folder(), put(tmp_path / "scans", files), tmp_path / "built", salt=SALT, options=options)
    (shard,) = (tmp_path / "built" / "data").iterdir()
    metadata = pq.ParquetFile(shard).metadata
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [1] * 5


def test_index_equals_the_columns_of_the_shards(whole: Path) -> None:
    index, found = pq.read_table(whole / "index.parquet"), build_index(local_shards(whole))
    assert index.equals(found)
    rows = rows_of(whole)
    locations = [(f"{name}.parquet", row) for name in shard_names(whole) for row in rows_of(whole, name)]
    assert len(rows) == index.num_rows == 39
    for entry, (shard, row) in zip(index.to_pylist(), locations, strict=True):
        assert entry["shard"] == shard
        assert {key: entry[key] for key in row if key in entry} == {key: row[key] for key in row if key in entry}
        group = pq.ParquetFile(whole / "data" / shard).read_row_group(entry["group"])
        assert group.column("id")[entry["row"]].as_py() == row["id"]


def test_dropping_rows_changes_no_other_row(tmp_path: Path, scans: Path, whole: Path) -> None:
    output = put(tmp_path / "copy", bytes_of(whole))
    planned = plan_shards(splits_of(scans, tmp_path), SMALL)
    names = shard_names(output)
    some = {rows_of(output, names[0])[1]["id"], rows_of(output, names[2])[0]["id"]}
    one_shard = {row["id"] for row in rows_of(output, names[-1])}
    before, rows = bytes_of(output), rows_of(output)
    assert drop_rows(output, planned, some | one_shard | {"0" * 16}) == 2 + len(one_shard)
    assert rows_of(output) == [row for row in rows if row["id"] not in some | one_shard]
    changed = {f"data/{name}.parquet" for name in (names[0], names[2], names[-1])}
    after = bytes_of(output)
    assert {name for name in before if after.get(name) != before[name]} == changed
    assert f"data/{names[-1]}.parquet" not in after  # a shard without rows is deleted
    assert drop_rows(output, planned, some | one_shard) == 0


def test_split_without_readable_scan_has_no_shard(tmp_path: Path) -> None:
    """An empty shard would not be in the index, and readers would refuse the index."""
    root = noise_collection(tmp_path / "scans", 30, 16)
    for entry in splits_of(root, tmp_path)["validation"]:
        entry.files[0].write_bytes(b"no picture")
    report = build(Folder(), root, tmp_path / "built", salt=SALT)
    assert report["scans"]["failed"] > 0  # type: ignore[index]
    assert {name.split("-")[0] for name in shard_names(tmp_path / "built")} == {"train", "test"}
    index = pq.read_table(tmp_path / "built" / "index.parquet")
    assert set(index.column("shard").to_pylist()) == {f"{name}.parquet" for name in shard_names(tmp_path / "built")}
    before = bytes_of(tmp_path / "built")
    assert build(Folder(), root, tmp_path / "built", salt=SALT) == report
    assert bytes_of(tmp_path / "built") == before


@pytest.mark.slow
def test_memory_is_bounded_by_a_row_group_and_a_scan(tmp_path: Path) -> None:
    """300 MB of volumes in one shard take little more memory than three volumes."""
    voxels = np.random.default_rng(0).integers(0, 900, (160, 128, 256)).astype(np.int16)
    scan = voxels.nbytes
    volumes = [nifti_bytes(voxels + np.int16(number), np.eye(4)) for number in range(3)]
    few, many = tmp_path / "scans" / "few", tmp_path / "scans" / "many"
    put(few, {f"mri/{number}.nii": data for number, data in enumerate(volumes)})
    for number in range(29):
        put(many, {f"mri/{number}.nii": volumes[number % 3]})
    command = [sys.executable, "-c", MEASURED, str(few), str(many), str(tmp_path)]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    before, after = (int(number) * (1 if sys.platform == "darwin" else 1024) for number in ran.stdout.split()[-2:])
    assert after - before < 3 * scan + shards.ROW_GROUP_BYTES
    assert sum(path.stat().st_size for path in many.rglob("*.nii")) > 300e6
