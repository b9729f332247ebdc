"""Rows of a Parquet data set: where they lie, how many are fetched at once, and what happens when they can't be."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modeling_m3ret import M3RetReadError
from modeling_m3ret.data import parquet
from modeling_m3ret.data.collection import CollectionError, open_collection, split_training_and_held_out
from modeling_m3ret.data.parquet import (
    ParquetRow,
    RowReader,
    add_location_columns,
    group_into_blocks,
    local_shards,
    read_locations,
)
from modeling_m3ret.data.schema import features
from modeling_m3ret.reading_m3ret import read_scan


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (16, 16), dtype=np.uint8)


def row(number: int) -> dict[str, object]:
    stream = io.BytesIO()
    Image.fromarray(picture(number)).save(stream, format="PNG")
    return {
        "image": {"bytes": stream.getvalue(), "path": None},
        "id": f"id-{number}",
        "modality": number % 5,
        "anatomy": "chest",
        "labels": ["b", "a"] if number % 2 else [],
        "patient": f"patient-{number // 2}",
        "shape": [1, 16, 16],
        "spacing": [None, 0.25, 0.5],
        "intensity": "8-bit",
        "source": "test",
        "licence": "CC0",
    }


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Ten rows in two shards of two splits, row groups of two."""
    (tmp_path / "data").mkdir()
    schema = features().arrow_schema
    for name, numbers in (("train-00000-of-00001", range(7)), ("validation-00000-of-00001", range(7, 10))):
        table = pa.Table.from_pylist([row(number) for number in numbers], schema)
        pq.write_table(table, tmp_path / "data" / f"{name}.parquet", row_group_size=2)
    return tmp_path


def write_index(dataset: Path) -> None:
    parts = []
    for file in sorted((dataset / "data").iterdir()):
        shard = pq.ParquetFile(file)
        small = [name for name in shard.schema_arrow.names if name not in ("image", "video", "volume")]
        parts.append(add_location_columns(file.name, shard, shard.read(columns=small)))
    pq.write_table(pa.concat_tables(parts), dataset / "index.parquet")


def test_records_are_the_rows_in_order_each_with_its_own_picture(dataset: Path) -> None:
    records = open_collection(dataset)
    assert [record.id for record in records] == [f"id-{number}" for number in range(10)]
    assert [record.modality for record in records[:5]] == ["xray", "ultrasound", "endoscopy", "ct", "mri"]
    assert [record.label for record in records[:2]] == ["", "a|b"]
    assert [record.group for record in records[:3]] == ["patient-0", "patient-0", "patient-1"]
    assert [record.split for record in records] == ["train"] * 7 + ["validation"] * 3
    for number in (9, 0, 4, 3):
        scan = read_scan(records[number].open())
        assert np.array_equal(scan.array[0, 0], picture(number))
        assert scan.spacing == (None, 0.25, 0.5)


def test_the_index_saves_reading_the_shards_and_says_the_same(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_shards = open_collection(dataset)
    write_index(dataset)

    def refuse(shard: str) -> None:
        raise AssertionError("a shard was opened")

    monkeypatch.setattr(parquet, "open_parquet", refuse)
    assert open_collection(dataset) == from_shards


def test_an_index_of_other_shards_is_not_believed(dataset: Path) -> None:
    write_index(dataset)
    (dataset / "data" / "validation-00000-of-00001.parquet").unlink()
    assert len(open_collection(dataset)) == 7


def test_numbers_of_modalities_mean_what_the_file_says(dataset: Path) -> None:
    """Another project's order of class names, as `datasets` writes it into the file."""
    from datasets import ClassLabel

    told = features()
    told["modality"] = ClassLabel(names=["ct", "xray"])
    (dataset / "data" / "validation-00000-of-00001.parquet").unlink()
    table = pa.Table.from_pylist([row(0), row(1)], told.arrow_schema)
    pq.write_table(table, dataset / "data" / "train-00000-of-00001.parquet")
    assert [record.modality for record in open_collection(dataset)] == ["ct", "xray"]


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(CollectionError, match="found no Parquet file, expected data/SPLIT"):
        open_collection(tmp_path)
    pq.write_table(pa.table({"id": ["a"], "modality": [0]}), tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(CollectionError, match="expected also patient"):
        open_collection(tmp_path)


def test_official_splits_are_kept_and_a_test_split_is_in_neither(dataset: Path) -> None:
    records = open_collection(dataset)
    training, held_out = split_training_and_held_out(records, 0.9)
    assert [r.split for r in training] == ["train"] * 7
    assert [r.split for r in held_out] == ["validation"] * 3
    (dataset / "data" / "validation-00000-of-00001.parquet").rename(dataset / "data" / "test-00000-of-00001.parquet")
    training, held_out = split_training_and_held_out(open_collection(dataset), 0.5)
    assert len(training) + len(held_out) == 7
    assert not {r.group for r in training} & {r.group for r in held_out}


def test_blocks_are_neighbouring_row_groups_of_one_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "BLOCK_BYTES", 25)
    rows = [ParquetRow("a", group, place, 10) for group in range(4) for place in range(2)]
    rows += [ParquetRow("b", 0, 0, 10)]
    blocks = group_into_blocks(rows)
    assert blocks.ranges == [("a", 0, 2), ("a", 2, 4), ("b", 0, 1)]
    assert blocks.block_of_row.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert group_into_blocks(rows[5:]).ranges == [("a", 2, 4), ("b", 0, 1)]  # of a subset, only what it needs


def test_a_block_is_one_read_and_the_latest_are_kept(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[list[int]] = []

    class Counted(pq.ParquetFile):
        def read_row_groups(self, groups: list[int], **options: object) -> pa.Table:
            reads.append(list(groups))
            return super().read_row_groups(groups, **options)

    monkeypatch.setattr(parquet, "open_parquet", Counted)
    places = [place for place, _, _ in read_locations(local_shards(dataset))]
    reader = RowReader()
    reader.fetch(places[0].shard, 0, 3)
    assert [reader.row(place)["id"] for place in places[:6]] == [f"id-{number}" for number in range(6)]
    reader.fetch(places[0].shard, 1, 4)
    assert reads == [[0, 1, 2], [3]]

    reads.clear()
    small = RowReader(kept_bytes=1)  # not even one: the one in use stays
    for place in (places[0], places[1], places[2], places[0]):
        small.row(place)
    assert reads == [[0], [1], [0]]


def test_a_shard_that_went_bad_is_an_unreadable_scan_and_others_are_read(dataset: Path) -> None:
    records = open_collection(dataset)
    shard = dataset / "data" / "train-00000-of-00001.parquet"
    facts = pq.ParquetFile(shard).metadata.row_group(1).column(0)
    content = bytearray(shard.read_bytes())
    content[facts.data_page_offset : facts.data_page_offset + 40] = b"\xff" * 40
    shard.write_bytes(content)
    parquet._readers.clear()
    with pytest.raises(M3RetReadError, match=r"train-00000-of-00001\.parquet: found rows that could not be fetched"):
        records[2].open()
    assert np.array_equal(read_scan(records[0].open()).array[0, 0], picture(0))
    assert np.array_equal(read_scan(records[6].open()).array[0, 0], picture(6))
