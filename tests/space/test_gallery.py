"""The gallery is embedded once, resumed after a kill, and holds no names."""

from __future__ import annotations

import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from processes import forks
from space_server import small_gallery, small_phantom

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret.data.collection import Record
from modeling_m3ret.search import embedding_store
from modeling_m3ret.search.filters import MetadataFilter
from modeling_m3ret.search.index import IndexFormatError, RetrievalIndex
from modeling_m3ret.search.thumbnails import THUMBNAIL_SIZE
from modeling_m3ret.space import gallery as gallery_module
from modeling_m3ret.space.gallery import Gallery, embed_gallery, open_gallery


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gallery")


@pytest.fixture(scope="module")
def records(folder: Path) -> list[Record]:
    return small_phantom(folder / "secret-ward", subjects=2)


@pytest.fixture(scope="module")
def opened(folder: Path, records: list[Record]) -> tuple[M3RetModel, M3RetImageProcessor, Gallery]:
    """A model, its processor, and the gallery of all records."""
    torch.manual_seed(0)
    return small_gallery(folder / "galleries", records)


def test_filtered_search_equals_brute_force(
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery], records: list[Record]
) -> None:
    gallery = opened[2]
    embeddings = gallery.index.embeddings.float()
    query = torch.nn.functional.normalize(torch.randn(embeddings.shape[1]), dim=0)
    similarities = embeddings @ query
    for filters, allowed in {
        MetadataFilter(): lambda record: True,
        MetadataFilter(modality=("ct", "xray")): lambda record: record.modality in ("ct", "xray"),
        MetadataFilter(anatomy=(records[7].anatomy,)): lambda record: record.anatomy == records[7].anatomy,
        MetadataFilter(modality=()): lambda record: False,
    }.items():
        expected = [row for row in similarities.argsort(descending=True).tolist() if allowed(records[row])][:5]
        assert gallery.search(query, 5, filters).rows[0].tolist() == expected


def test_gallery_is_read_from_the_cache(
    folder: Path,
    records: list[Record],
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor, first = opened
    monkeypatch.setattr(gallery_module, "write_shards", lambda *_, **__: pytest.fail("embedded again"))
    again = embed_gallery(records, model, processor, "renamed", folder=folder / "galleries")
    torch.testing.assert_close(again.index.embeddings, first.index.embeddings, rtol=0, atol=0)
    assert again.records == first.records
    relabelled = [replace(record, anatomy="heart") for record in records]
    words = embed_gallery(relabelled, model, processor, "renamed", folder=folder / "galleries").index.metadata
    assert set(words.column("anatomy").to_pylist()) == {"heart"}, "words of a manifest are not cached"


def test_index_of_another_model_is_refused(
    folder: Path, opened: tuple[M3RetModel, M3RetImageProcessor, Gallery]
) -> None:
    model, processor, gallery = opened
    gallery.index.save(folder / "index")
    found = open_gallery(str(folder / "index"), model, processor, "m3ret-tiny")
    assert (len(found), found.records) == (len(gallery), None)
    torch.manual_seed(1)
    other = M3RetModel(model.config).eval()
    with pytest.raises(IndexFormatError) as raised:
        open_gallery(str(folder / "index"), other, processor, "m3ret-tiny")
    assert raised.value.reason == "other_model"


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """The records that the test embeds, in order."""
    embed, embedded = gallery_module.embed_batches, []

    def record(embedders: Any, processor: Any, records: list[Record], **options: Any) -> Any:
        embedded.extend(records)
        return embed(embedders, processor, records, **options)

    monkeypatch.setattr(gallery_module, "embed_batches", record)
    return embedded


def embed_and_die(
    records: list[Record], model: M3RetModel, processor: M3RetImageProcessor, cache: Path, shard: int, done: int
) -> None:
    """Embed a gallery in shards of `shard` scans, and kill this process when shard number `done` is written."""
    write, written = embedding_store.atomic_write, []

    def die_after_some(path: Path) -> Any:
        if len(written) == done:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        return write(path)

    gallery_module.SHARD_SCANS, embedding_store.atomic_write = shard, die_after_some
    embed_gallery(records, model, processor, "tiny", folder=cache)


@pytest.mark.slow
def test_killed_embedding_is_resumed(
    records: list[Record],
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    embedded: list[Record],
) -> None:
    model, processor, _ = opened
    cache, shard, done = tmp_path / "galleries", 3, 2
    monkeypatch.setattr(gallery_module, "SHARD_SCANS", shard)

    killed = forks().Process(target=embed_and_die, args=(records, model, processor, cache, shard, done))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not list(cache.glob("*/gallery.json"))
    resumed = embed_gallery(records, model, processor, "tiny", folder=cache)
    assert embedded == records[done * shard :]
    whole = embed_gallery(records, model, processor, "tiny", folder=tmp_path / "whole")
    assert resumed.records == whole.records == records
    torch.testing.assert_close(resumed.index.embeddings, whole.index.embeddings, rtol=0, atol=1e-3)
    for row in range(len(records)):
        one, other = (np.asarray(gallery.thumbnail(row), int) for gallery in (resumed, whole))
        assert np.abs(one - other).max() <= 2
    assert resumed.index.metadata.equals(whole.index.metadata)
    assert not list(cache.glob("*/shards"))


def test_concurrent_starts_embed_once(
    records: list[Record],
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery],
    tmp_path: Path,
    embedded: list[Record],
) -> None:
    model, processor, gallery = opened
    with ThreadPoolExecutor(2) as starts:
        both = [starts.submit(embed_gallery, records, model, processor, "tiny", folder=tmp_path) for _ in range(2)]
    assert embedded == records
    for start in both:
        torch.testing.assert_close(start.result().index.embeddings, gallery.index.embeddings, rtol=0, atol=1e-3)


def test_unreadable_scans_are_left_out(folder: Path, records: list[Record], tmp_path: Path) -> None:
    (tmp_path / "damaged.png").write_bytes(b"nothing")
    damaged = Record("damaged", tmp_path / "damaged.png", "xray", "chest", "", "patient-of-damaged")
    _, _, gallery = small_gallery(tmp_path / "galleries", [records[0], damaged, records[1]])
    assert gallery.records == [records[0], records[1]]
    assert gallery.index.metadata.column("id").to_pylist() == ["0", "2"]
    files = [path for path in (tmp_path / "galleries").rglob("*") if path.is_file()]
    assert not any(b"damaged" in path.read_bytes() for path in files)


def test_gallery_stores_no_name_of_a_file_or_patient(folder: Path, records: list[Record], opened: object) -> None:
    files = [path for path in (folder / "galleries").rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        for name in (records[0].id, records[0].group, "secret-ward", str(folder)):
            assert name.encode() not in content, (path.name, name)


def test_scans_of_one_patient_share_a_patient_in_the_index(
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery], records: list[Record]
) -> None:
    patients = opened[2].index.metadata.column("patient").to_pylist()
    for row, record in enumerate(records):
        assert [patient == patients[row] for patient in patients] == [r.group == record.group for r in records]


def test_thumbnail_is_the_middle_slice_on_a_black_square(tmp_path: Path) -> None:
    pixels = np.zeros((24, 48), np.uint8)
    pixels[:, :24] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    _, _, gallery = small_gallery(tmp_path, [Record("half", tmp_path / "half.png", "xray", "", "", "")])
    thumbnail = gallery.thumbnail(0)
    assert thumbnail is not None
    shown = np.asarray(thumbnail)[..., 0]
    quarter = THUMBNAIL_SIZE // 4
    assert shown[2 * quarter - 8 : 2 * quarter + 8, 8 : 2 * quarter - 8].min() > 200
    assert shown[2 * quarter - 8 : 2 * quarter + 8, 2 * quarter + 8 : -8].max() < 50
    assert shown[: quarter - 8].max() < 50  # above the picture


def test_filter_names_are_those_of_the_gallery(
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery], records: list[Record]
) -> None:
    assert opened[2].counts("modality") == Counter(sorted(record.modality for record in records))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("gallery.json", b""),
        ("gallery.json", b"[]"),
        ("gallery.json", b"7"),
        ("gallery.json", b'{"collection": 7}'),
        ("gallery.json", b'{"collection": ["phantom"]}'),
        ("gallery.json", b'{"collection": null, "show_labels": "false"}'),  # would be true
        ("gallery.json", b'{"collection": null, "show_labels": 1}'),
        ("gallery.json", b"[" * 10**5),
        ("gallery.json", b"\xff"),
        ("thumbnails.parquet", b""),
        ("thumbnails.parquet", b"PAR1"),
    ],
)
def test_damaged_file_of_a_gallery_is_named(
    file: str, content: bytes, opened: tuple[M3RetModel, M3RetImageProcessor, Gallery], tmp_path: Path
) -> None:
    model, processor, gallery = opened
    gallery.save(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(IndexFormatError) as raised:
        open_gallery(str(tmp_path), model, processor, "m3ret-tiny")
    assert (raised.value.reason, raised.value.file) == ("damaged", file)


def test_gallery_of_other_scans_than_its_collection_is_refused(
    opened: tuple[M3RetModel, M3RetImageProcessor, Gallery], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, gallery = opened
    for ids in (["-1"], ["1" * 5000], ["one"], [str(len(gallery.records or ()))], [None]):
        metadata = gallery.index.metadata.slice(0, 1).drop_columns("id").add_column(0, "id", pa.array(ids, pa.string()))
        index = RetrievalIndex(gallery.index.embeddings[:1], metadata, gallery.index.facts)
        Gallery(index, collection="phantom:1").save(tmp_path)
        monkeypatch.setattr(gallery_module, "open_collection", lambda name: gallery.records)
        with pytest.raises(IndexFormatError) as raised:
            open_gallery(str(tmp_path), model, processor, "m3ret-tiny")
        assert raised.value.reason == "damaged"
