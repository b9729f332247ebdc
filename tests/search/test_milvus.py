"""The index in Milvus, in a file of Milvus Lite: finds what the one on disk finds, and never what is half there.

What both do alike is tested in `test_index.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_index import FACTS, NO_MILVUS, embeddings, metadata

from modeling_m3ret.model_facts import ModelFacts
from modeling_m3ret.search.index import IndexFormatError, MetadataFilter, RetrievalIndex


milvus = pytest.importorskip("modeling_m3ret.search.milvus", reason=NO_MILVUS, exc_type=ImportError)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("milvus") / "gallery.db")


@pytest.fixture
def index(place: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A collection of its own in a file that all share, since opening one takes a second."""
    name = f"c{abs(hash(request.node.name))}"
    built = milvus.MilvusIndex.build(embeddings(), metadata(), FACTS, place, name)
    yield built
    built.client.drop_collection(name)


def test_it_finds_with_the_same_scores_what_the_index_on_disk_finds(index: Any) -> None:
    on_disk = RetrievalIndex.build(embeddings(), metadata(), FACTS)
    queries = 3 * embeddings(seed=2)[:12]
    patients = [f"patient-{n % 3}" for n in range(12)]
    for options in (
        {},
        {"query_patients": patients},
        {"where": MetadataFilter(modality=["ct"]), "query_patients": patients},
    ):
        hits, expected = index.search(queries, 20, **options), on_disk.search(queries, 20, **options)
        assert torch.allclose(hits.scores, expected.scores, atol=1e-6)
        assert (hits.rows == expected.rows).float().mean() > 0.99  # scores that float32 can't tell apart change places
        assert index.rows(hits.rows[:2]) == index.rows(hits.rows[:1]) + index.rows(hits.rows[1:2])
        assert [row["id"] for row in index.rows(expected.rows[7])] == [
            row["id"] for row in on_disk.rows(expected.rows[7])
        ]
    assert hits.scores.dtype == torch.float32
    assert index.facts == FACTS


def test_many_queries_and_scans_travel_in_several_messages(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = embeddings(seed=2)[:20]
    together = index.search(queries, 5)
    monkeypatch.setattr(milvus, "MESSAGE_BYTES", 3000)  # 23 queries, one row of metadata
    monkeypatch.setattr(milvus, "DIGESTS_TOGETHER", 2)
    apart = index.search(
        queries, 5, where=MetadataFilter(modality=["ct", "xray", "mri"], excluded_patients=["a", "b", "c"])
    )
    assert torch.equal(together.rows, apart.rows)
    assert index.rows(apart.rows)[3] == metadata().to_pylist()[apart.rows[0, 3]]
    larger = index.add(embeddings(9, seed=5), metadata(9, first=600))
    assert len(larger.remove([f"id-{n}" for n in range(5)])) == 604


def test_a_filter_that_no_message_holds_is_refused(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "MESSAGE_BYTES", 3000)
    with pytest.raises(ValueError, match=r"found a filter of .* characters, expected at most 3,000"):
        index.search(embeddings()[:1], 5, where=MetadataFilter(excluded_patients=map(str, range(200))))


def test_metadata_of_a_row_that_was_removed_since_is_refused(index: Any) -> None:
    hits = index.search(embeddings()[3:4], 5)
    gone = index.rows(hits.rows)[0]["id"]
    index.remove([gone])
    with pytest.raises(LookupError, match=rf"row {int(hits.rows[0, 0])} was removed since it was found"):
        index.rows(hits.rows)


def test_what_was_added_is_found_and_what_was_removed_is_not(index: Any, place: str) -> None:
    new = embeddings(30, seed=5)
    larger = index.add(new, metadata(30, first=600))
    assert [row["id"] for row in larger.rows(larger.search(new[3:4], 1).rows)] == ["id-603"]
    assert (len(index), len(larger)) == (600, 630)
    assert index.search(new[3:4], 5).rows.max() < 600  # who has the old one open searches it undisturbed
    smaller = larger.remove(["id-603", "no such id"])
    assert len(smaller) == 629
    assert 603 not in smaller.search(new[3:4], 5).rows
    assert len(milvus.MilvusIndex.load(place, index.collection, FACTS)) == 629
    again = smaller.add(new[3:4], metadata(1, first=603))  # a row is never given to another scan
    assert again.search(new[3:4], 1).rows.tolist() == [[630]]
    for wrong, table, message in (
        (new, metadata(30, first=590), "all different"),
        (new[:, :8], metadata(30, first=700), "32 dimensions"),
        (0 * new, metadata(30, first=700), "no direction"),
    ):
        with pytest.raises(ValueError, match=message):
            again.add(wrong, table)
    assert len(again) == 630


def test_an_addition_to_what_was_opened_before_another_addition_is_refused(index: Any, place: str) -> None:
    """Its rows would be those of the scans that the other added."""
    opened_before = milvus.MilvusIndex.load(place, index.collection)
    new = embeddings(30, seed=5)
    larger = index.add(new, metadata(30, first=600))
    for stale in (index, opened_before):
        with pytest.raises(ValueError, match="found 630 rows, expected 600 as when it was opened"):
            stale.add(embeddings(9, seed=6), metadata(9, first=700))
    assert [row["id"] for row in larger.rows(larger.search(new[7:8], 1).rows)] == ["id-607"]
    assert len(larger) == 630


def test_an_addition_or_a_build_that_is_cut_off_is_never_seen(
    index: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both die after all scans are there and before the collection says so, and can be done again."""
    new, name = embeddings(30, seed=5), index.collection

    def die(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(milvus.MilvusIndex, "_publish", die)
        with pytest.raises(KeyboardInterrupt):
            index.add(new, metadata(30, first=600))
        with pytest.raises(KeyboardInterrupt):
            milvus.MilvusIndex.build(embeddings(), metadata(), FACTS, place, "cut_off")
    loaded = milvus.MilvusIndex.load(place, name, FACTS)
    assert len(loaded) == 600
    assert loaded.search(new, 5).rows.max() < 600
    with pytest.raises(IndexFormatError, match="found cut_off unfinished"):
        milvus.MilvusIndex.load(place, "cut_off")
    larger = loaded.add(new, metadata(30, first=600))
    assert sorted(larger.search(new[:1], 630).rows[0].tolist()) == list(range(630))
    rebuilt = milvus.MilvusIndex.build(embeddings(60), metadata(60), FACTS, place, "cut_off")
    assert len(rebuilt) == 60


def test_what_is_no_index_of_this_model_is_refused(index: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, load = index.collection, milvus.MilvusIndex.load
    with pytest.raises(IndexFormatError, match="expected those of"):
        load(place, name, ModelFacts("m3ret-tiny", "f" * 40, FACTS.processor))
    with pytest.raises(IndexFormatError, match="found no collection nothing"):
        load(place, "nothing")
    with pytest.raises(ValueError, match=f"found a collection {name}, expected none"):
        milvus.MilvusIndex.build(embeddings(), metadata(), FACTS, place, name)
    index.client.create_collection("of_others", dimension=4)
    with pytest.raises(IndexFormatError, match="found a collection of_others of others"):
        load(place, "of_others")
    with pytest.raises(IndexFormatError, match="of_others of others"):  # and never replaced
        milvus.MilvusIndex.build(embeddings(), metadata(), FACTS, place, "of_others")
    index.client.alter_collection_properties(name, {milvus.PROPERTY: index.manifest.text().replace("1", "99", 1)})
    with pytest.raises(IndexFormatError, match="found format 99, expected 1"):
        load(place, name)
    for queries, k in ((embeddings()[:1, :8], 3), (embeddings()[0], 3), (embeddings()[:1], 0), (embeddings(), 16385)):
        with pytest.raises(ValueError, match="do not fit"):
            index.search(queries, k)
    with pytest.raises(ValueError, match="found 1 patients, expected one of each of 2 queries"):
        index.search(embeddings()[:2], 3, query_patients=["patient-1"])


def test_a_gallery_of_one_scan_is_built_and_one_of_none_is_refused(place: str) -> None:
    cells = milvus.MilvusSearch("IVF_FLAT", search={"nprobe": 8})
    one = milvus.MilvusIndex.build(embeddings(1), metadata(1), FACTS, place, "one", cells)
    assert one.search(embeddings(1), 2).rows.tolist() == [[0, -1]]
    with pytest.raises(ValueError, match="found no scan"):
        milvus.MilvusIndex.build(embeddings(0), metadata(0), FACTS, place, "none")
    assert not one.client.has_collection("none")


def test_an_approximate_search_tells_its_recall_and_warns(place: str, caplog: pytest.LogCaptureFixture) -> None:
    vectors = torch.randn(3000, 32, generator=torch.Generator().manual_seed(0))
    normal = torch.nn.functional.normalize(vectors, dim=1).half().float()
    truth = (normal[:150] @ normal.T).topk(11).indices[:, 1:]  # without the query itself
    with caplog.at_level(logging.WARNING, logger=milvus.__name__):
        built = milvus.MilvusIndex.build(
            vectors, metadata(3000), FACTS, place, "cells", milvus.MilvusSearch("IVF_FLAT", search={"nprobe": 8})
        )
    found = built.search(vectors[:150], 11).rows
    recall = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, truth, strict=True)) / truth.numel()
    assert recall < 0.9
    assert built.manifest.recall == pytest.approx(recall, abs=0.08)  # of other queries
    assert "not 0.990" in caplog.text
    assert built.add(vectors[:1], metadata(1, first=3000)).manifest.recall is None


def test_the_token_is_read_from_the_environment_and_written_nowhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = []
    connect = milvus.MilvusClient
    monkeypatch.setattr(milvus, "MilvusClient", lambda uri, token: given.append((uri, token)) or connect(uri))
    milvus.MilvusClient.create_schema = connect.create_schema  # of the class, not of a client
    monkeypatch.setenv("MILVUS_TOKEN", "root:a-secret")
    index = milvus.MilvusIndex.build(embeddings(20), metadata(20), FACTS, str(tmp_path / "own.db"), "scans")
    assert given == [(str(tmp_path / "own.db"), "root:a-secret")]
    assert "a-secret" not in index.manifest.text()
    index.close()
    files = [path for path in (tmp_path / "own.db").rglob("*") if path.is_file()]
    assert files
    assert not any(b"a-secret" in path.read_bytes() for path in files)
