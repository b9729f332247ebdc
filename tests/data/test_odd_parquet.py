"""Parquet datasets whose rows or files are not as expected: each is one error that names it, or is read as it is."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modeling_m3ret.data.collection import open_collection
from modeling_m3ret.data.schema import CollectionError, features
from modeling_m3ret.reading_m3ret import M3RetReadError, read_scan


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(GREY).save(stream, "PNG")
    return stream.getvalue()


def table(**cells: Any) -> pa.Table:
    """Return a table of one row with these cells; `missing` leaves a column out."""
    row = {
        **{"image": {"bytes": png(), "path": None}, "video": None, "volume": None, "id": "i", "modality": 0},
        **{"anatomy": "chest", "labels": ["x"], "patient": "p", "shape": [1, 16, 16], "spacing": [None, 1.0, 1.0]},
        **{"intensity": "8-bit", "source": "s", "licence": "l"},
    }
    made = pa.table({name: [value] for name, value in row.items()}, schema=features().arrow_schema)
    for name, value in cells.items():
        made = made.drop_columns(name)
        if value is not missing:
            made = made.append_column(name, value if isinstance(value, pa.Array) else pa.array([value]))
    return made


missing = object()
SHARD = "train-00000-of-00001.parquet"


def write(folder: Path, content: pa.Table | bytes) -> Path:
    (folder / "data").mkdir()
    if isinstance(content, bytes):
        (folder / "data" / SHARD).write_bytes(content)
    else:
        pq.write_table(content, folder / "data" / SHARD)
    return folder


def parquet_bytes(content: pa.Table, **options: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(content, stream, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("id", 5),
        ("id", pa.array([None], pa.string())),
        ("id", ""),
        ("id", b"bytes"),
        ("id", missing),
        ("modality", 7),
        ("modality", -1),  # was taken for the last modality
        ("modality", 1.5),
        ("modality", True),
        ("modality", "pet"),
        ("modality", pa.array([None], pa.int64())),
        ("modality", missing),
        ("patient", 3),
        ("patient", missing),
        ("anatomy", 3),
        ("source", 9),
        ("intensity", 8),
        ("labels", "x"),  # would be read as its letters
        ("labels", [1]),
        ("labels", [None]),
        ("shape", "1,2,3"),
        ("shape", [1, 2]),
        ("shape", [-1, 2, 3]),
        ("shape", [0, 2, 3]),
        ("shape", [1.0, 2.0, 3.0]),
        ("spacing", "a"),
        ("spacing", [1.0]),
        ("spacing", [math.nan] * 3),
        ("spacing", [math.inf, 1.0, 1.0]),
        ("spacing", [-1.0, 1.0, 1.0]),
        ("spacing", [0.0, 1.0, 1.0]),
    ],
)
def test_cell_of_another_type_is_refused_by_name(tmp_path: Path, column: str, value: Any) -> None:
    with pytest.raises(CollectionError) as raised:
        open_collection(write(tmp_path, table(**{column: value})))
    assert column in str(raised.value)
    assert tmp_path.name in str(raised.value)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("modality", "CT"),
        ("modality", pa.array([0], pa.int8())),
        ("patient", pa.array([None], pa.string())),
        ("labels", pa.array([None], pa.list_(pa.string()))),
        ("labels", pa.array([[]], pa.list_(pa.string()))),
        ("anatomy", missing),
        ("shape", missing),
        ("spacing", missing),
        ("spacing", [None, 1, 1]),
        ("licence", 3),
        ("image", png()),  # bytes without a path
        ("id", pa.array(["i"], pa.large_string())),
        ("id", pa.array(["i"]).dictionary_encode()),
    ],
)
def test_cell_that_is_left_out_or_of_an_equal_type_is_read(tmp_path: Path, column: str, value: Any) -> None:
    (record,) = open_collection(write(tmp_path, table(**{column: value})))
    assert record.id == "i"
    assert record.group == ("i" if column == "patient" else "p")
    np.testing.assert_array_equal(read_scan(record.open()).array[0, 0], GREY)


@pytest.mark.parametrize(
    "value",
    ["/etc/hostname", {"bytes": None, "path": "/etc/hostname"}, {"bytes": "text", "path": None}, {"path": "x"}, 3, [1]],
)
def test_media_without_bytes_are_refused_and_paths_are_not_followed(tmp_path: Path, value: Any) -> None:
    (record,) = open_collection(write(tmp_path, table(image=value)))
    with pytest.raises(M3RetReadError) as raised:
        read_scan(record.open())
    assert raised.value.reason == "unsupported"


def test_ids_that_repeat_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match="id"):
        open_collection(write(tmp_path, pa.concat_tables([table(), table()])))


def test_empty_row_groups_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pq.ParquetWriter(tmp_path / "data" / SHARD, table().schema) as writer:
        for part in (table().slice(0, 0), table(), table().slice(0, 0)):
            writer.write_table(part)
    (record,) = open_collection(tmp_path)
    np.testing.assert_array_equal(read_scan(record.open()).array[0, 0], GREY)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"PAR1PAR1",
        b"PAR1" + b"\0" * 8 + b"\xff\xff\xff\x7fPAR1",
        parquet_bytes(table())[:-30],
        parquet_bytes(table())[:200],
        parquet_bytes(table())[:-20] + b"\xff" * 12 + parquet_bytes(table())[-8:],
        b"PAR1" + parquet_bytes(table())[-800:],
    ],
    ids=range(8),
)
@pytest.mark.parametrize("name", [f"data/{SHARD}", "index.parquet"])
def test_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path, table())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CollectionError) as raised:
        open_collection(tmp_path)
    assert Path(name).name in str(raised.value)


def test_index_without_its_columns_is_named(tmp_path: Path) -> None:
    pq.write_table(table(), write(tmp_path, table()) / "index.parquet")
    with pytest.raises(CollectionError, match=r"index\.parquet"):
        open_collection(tmp_path)


def test_shards_of_different_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number, content in enumerate((table(), table(id="j", anatomy=missing))):
        pq.write_table(content, tmp_path / "data" / f"train-0000{number}-of-00002.parquet")
    with pytest.raises(CollectionError):
        open_collection(tmp_path)


@pytest.mark.parametrize("data", ["a" * 5000, "phantom:" + "9" * 5000, "phantom:9999999999", "a\0b"])
def test_names_that_cannot_be_collections_are_refused(data: str) -> None:
    with pytest.raises(CollectionError):
        open_collection(data)
