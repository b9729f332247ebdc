"""Parquet datasets: the records of their rows, how many rows are fetched at once, and damaged shards."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel
from PIL import Image

from modeling_m3ret import M3RetReadError
from modeling_m3ret.data import parquet
from modeling_m3ret.data.collection import Record, open_collection, split_training_and_held_out
from modeling_m3ret.data.parquet import (
    ParquetRow,
    ParquetRows,
    RowReader,
    build_index,
    group_into_blocks,
    local_shards,
)
from modeling_m3ret.data.schema import MODALITIES, CollectionError, features
from modeling_m3ret.reading_m3ret import read_scan


TRAIN, VALIDATION, TEST = (f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test"))


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (16, 16), dtype=np.uint8)


def row(number: int) -> dict[str, object]:
    stream = io.BytesIO()
    Image.fromarray(image(number)).save(stream, format="PNG")
    return {
        "image": {"bytes": stream.getvalue(), "path": None},
        "id": f"id-{number}",
        "modality": number % 5,
        "anatomy": "chest",
        "labels": ["b", "a"] if number % 2 else [],
        "patient": f"patient-{(number + 1) // 2}",
        "shape": [1, 16, 16],
        "spacing": [None, 0.25, 0.5],
        "intensity": "8-bit",
        "source": "test",
        "licence": "CC0",
    }


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Ten rows in two shards of two splits, in row groups of two."""
    (tmp_path / "data").mkdir()
    for name, numbers in ((TRAIN, range(7)), (VALIDATION, range(7, 10))):
        table = pa.Table.from_pylist([row(number) for number in numbers], features().arrow_schema)
        pq.write_table(table, tmp_path / name, row_group_size=2)
    return tmp_path


def read_image(record: Record) -> np.ndarray:
    return read_scan(record.open()).array[0, 0]


def test_records_are_the_rows_in_order(dataset: Path) -> None:
    records = open_collection(dataset)
    assert [record.id for record in records] == [f"id-{number}" for number in range(10)]
    assert [record.modality for record in records[:5]] == list(MODALITIES)
    assert [record.label for record in records[:2]] == ["", "a|b"]
    assert [record.group for record in records[:3]] == ["patient-0", "patient-1", "patient-1"]
    assert [record.split for record in records] == ["train"] * 7 + ["validation"] * 3
    for number in (9, 0, 4, 3):
        assert np.array_equal(read_image(records[number]), image(number))
        assert read_scan(records[number].open()).spacing == (None, 0.25, 0.5)


def test_the_index_gives_the_records_without_opening_a_shard(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_shards = open_collection(dataset)
    pq.write_table(build_index(local_shards(dataset)), dataset / "index.parquet")
    opened: list[str] = []
    monkeypatch.setattr(parquet, "open_parquet", opened.append)
    assert open_collection(dataset) == from_shards
    assert opened == []


def test_an_index_of_other_shards_is_ignored(dataset: Path) -> None:
    pq.write_table(build_index(local_shards(dataset)), dataset / "index.parquet")
    copied = dataset / str(TRAIN).replace("train", "test")
    table = pq.read_table(dataset / TRAIN)
    other_ids = pa.array([f"other {id}" for id in table.column("id").to_pylist()])
    pq.write_table(table.set_column(table.column_names.index("id"), "id", other_ids), copied)
    assert len(open_collection(dataset)) == 17


@pytest.mark.parametrize("indexed", [True, False])
def test_missing_shards_are_refused(dataset: Path, indexed: bool) -> None:
    """A partly downloaded dataset would lack training scans, or its validation split."""
    if indexed:
        pq.write_table(build_index(local_shards(dataset)), dataset / "index.parquet")
        (dataset / VALIDATION).unlink()
    else:
        (dataset / TRAIN).rename(dataset / str(TRAIN).replace("of-00001", "of-00002"))
    with pytest.raises(CollectionError):
        open_collection(dataset)


def test_modality_names_come_from_the_file(dataset: Path) -> None:
    """Another project may number its modalities differently; `datasets` writes the names into the file."""
    schema = features()
    schema["modality"] = ClassLabel(names=["ct", "xray"])
    (dataset / VALIDATION).unlink()
    pq.write_table(pa.Table.from_pylist([row(0), row(1)], schema.arrow_schema), dataset / TRAIN)
    assert [record.modality for record in open_collection(dataset)] == ["ct", "xray"]


@pytest.mark.parametrize(
    ("word", "modality"), [("MRI ", "mri"), ("X-ray", "xray"), ("mrri", None), ("", None), (None, None)]
)
def test_words_of_a_dataset_are_read_as_in_a_manifest(tmp_path: Path, word: str | None, modality: str | None) -> None:
    (tmp_path / "data").mkdir()
    columns = {"id": ["a"], "patient": ["p"], "modality": pa.array([word], pa.string()), "anatomy": ["Chest "]}
    pq.write_table(pa.table(columns | {"labels": [["Nodule", "nodule "]]}), tmp_path / TRAIN)
    if modality is None:
        with pytest.raises(CollectionError, match=tmp_path.name):
            open_collection(tmp_path)
        return
    record = open_collection(tmp_path)[0]
    assert (record.modality, record.anatomy, record.label) == (modality, "chest", "Nodule")


def test_files_that_are_not_named_as_shards_are_reported(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    (dataset / VALIDATION).rename(dataset / VALIDATION.replace("validation", "val"))
    assert {record.split for record in open_collection(dataset)} == {"train"}
    assert len(caplog.records) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_dataset_in_the_cache_opens_without_the_hub(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached, commit = tmp_path / "datasets--org--name", "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(dataset / "data", cached / "snapshots" / commit / "data")
    expected = [(record.id, record.split) for record in open_collection(dataset)]
    assert [(record.id, record.split) for record in open_collection("org/name", stream=stream)] == expected
    assert len(caplog.records) == 1
    (cached / "snapshots" / commit / TRAIN).rename(
        cached / "snapshots" / commit / TRAIN.replace("of-00001", "of-00002")
    )
    for name in ("org/name", "org/other", "org/name@v2"):  # downloaded in part, another, another revision
        with pytest.raises(CollectionError, match=name):
            open_collection(name, stream=stream)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(CollectionError, match=tmp_path.name):
        open_collection(tmp_path)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"id": ["a"], "modality": [0]}), tmp_path / TRAIN)
    with pytest.raises(CollectionError, match="patient"):
        open_collection(tmp_path)


def test_official_splits_are_used_and_the_test_split_never(dataset: Path) -> None:
    training, held_out = split_training_and_held_out(open_collection(dataset), 0.9)
    assert [record.split for record in training] == ["train"] * 7
    assert [record.split for record in held_out] == ["validation"] * 3
    (dataset / VALIDATION).rename(dataset / TEST)
    training, held_out = split_training_and_held_out(open_collection(dataset), 0.5)
    assert {record.split for record in [*training, *held_out]} == {"train"}
    assert len(training) + len(held_out) == 7
    assert not {record.group for record in training} & {record.group for record in held_out}


def test_blocks_are_neighbouring_row_groups_of_one_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BLOCK_BYTES", 25)
    rows = [ParquetRow("a", group, row, 10) for group in range(4) for row in range(2)]
    rows += [ParquetRow("b", 0, 0, 10)]
    blocks = group_into_blocks(rows)
    assert blocks.ranges == [("a", 0, 2), ("a", 2, 4), ("b", 0, 1)]
    assert blocks.block_of_row.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert group_into_blocks(rows[5:]).ranges == [("a", 2, 4), ("b", 0, 1)]  # only the row groups that are needed


def test_a_block_is_one_read_and_the_latest_row_groups_are_cached(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[list[int]] = []

    class CountingFile(pq.ParquetFile):
        def read_row_groups(self, groups: list[int], **options: object) -> pa.Table:
            reads.append(list(groups))
            return super().read_row_groups(groups, **options)

    monkeypatch.setattr(parquet, "open_parquet", CountingFile)
    locations = [record.location for record in open_collection(dataset)]
    shard = locations[0].shard
    reads.clear()
    reader = RowReader()
    reader.fetch(shard, 0, 3)
    assert [reader.row(location)["id"] for location in locations[:6]] == [f"id-{number}" for number in range(6)]
    reader.fetch(shard, 1, 4)
    assert reads == [[0, 1, 2], [3]]

    reads.clear()
    tiny = RowReader(cache_bytes=1)  # smaller than one row group: only the latest is cached
    for number in (0, 1, 2, 0):
        tiny.row(locations[number])
    assert reads == [[0], [1], [0]]


def test_a_damaged_row_group_does_not_affect_others(dataset: Path) -> None:
    records = open_collection(dataset)
    shard = dataset / TRAIN
    column = pq.ParquetFile(shard).metadata.row_group(1).column(0)
    content = bytearray(shard.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    shard.write_bytes(content)
    with pytest.raises(M3RetReadError) as raised:
        records[2].open()
    assert (raised.value.file, raised.value.reason) == (shard.name, "undecodable")
    for number in (0, 6):
        assert np.array_equal(read_image(records[number]), image(number))


def test_locations_in_an_array_are_those_of_the_rows() -> None:
    rows = [ParquetRow(f"data/train-{i % 3}.parquet", i, 7 - i, 2**40 + i) for i in range(7)]
    located = ParquetRows.of(rows)
    assert list(located) == rows
    assert list(located[2:5]) == rows[2:5]
    assert located[-1] == rows[-1]
    assert not ParquetRows.of([])
