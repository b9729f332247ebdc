"""The index in Milvus Lite finds what the index on disk finds, and interrupted changes are never seen.

Properties that both have are tested in `test_index.py`.
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
from modeling_m3ret.search.filters import MetadataFilter
from modeling_m3ret.search.index import IndexFormatError, RetrievalIndex


pytestmark = pytest.mark.slow  # opening a file of Milvus Lite takes a second
milvus = pytest.importorskip("modeling_m3ret.search.milvus", reason=NO_MILVUS, exc_type=ImportError)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("milvus") / "gallery.db")


@pytest.fixture
def index(uri: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A collection for each test, in a file that all share."""
    name = f"c{abs(hash(request.node.name))}"
    built = milvus.MilvusIndex.build(embeddings(), metadata(), FACTS, uri, name)
    yield built
    built.client.drop_collection(name)


def test_hits_and_scores_are_those_of_the_index_on_disk(index: Any) -> None:
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
        assert (hits.rows == expected.rows).float().mean() > 0.99  # scores within float32 rounding may swap
        assert index.lookup(hits.rows[:2]) == index.lookup(hits.rows[:1]) + index.lookup(hits.rows[1:2])
        assert [row["id"] for row in index.lookup(expected.rows[7])] == [
            row["id"] for row in on_disk.lookup(expected.rows[7])
        ]
    assert hits.scores.dtype == torch.float32
    assert index.facts == FACTS


def test_large_requests_are_split_into_messages(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = embeddings(seed=2)[:20]
    whole = index.search(queries, 5)
    monkeypatch.setattr(milvus, "MESSAGE_BYTES", 3000)  # 23 queries, one row of metadata
    monkeypatch.setattr(milvus, "DIGEST_BYTES", 1500)  # two in a list
    split = index.search(
        queries, 5, where=MetadataFilter(modality=["ct", "xray", "mri"], excluded_patients=["a", "b", "c"])
    )
    assert torch.equal(whole.rows, split.rows)
    assert index.lookup(split.rows)[3] == metadata().to_pylist()[split.rows[0, 3]]
    larger = index.add(embeddings(9, seed=5), metadata(9, first=600))
    assert len(larger.remove([f"id-{n}" for n in range(5)])) == 604


def test_filter_longer_than_a_message_is_refused(index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "MESSAGE_BYTES", 3000)
    with pytest.raises(ValueError, match="3,000"):
        index.search(embeddings()[:1], 5, where=MetadataFilter(excluded_patients=map(str, range(200))))


def test_lookup_of_a_removed_row_is_an_error(index: Any) -> None:
    hits = index.search(embeddings()[3:4], 5)
    removed = index.lookup(hits.rows)[0]["id"]
    index.remove([removed])
    with pytest.raises(LookupError, match=rf"\brow {int(hits.rows[0, 0])}\b"):
        index.lookup(hits.rows)


def test_added_scans_are_found_and_removed_ones_are_not(index: Any, uri: str) -> None:
    new = embeddings(30, seed=5)
    larger = index.add(new, metadata(30, first=600))
    assert [row["id"] for row in larger.lookup(larger.search(new[3:4], 1).rows)] == ["id-603"]
    assert (len(index), len(larger)) == (600, 630)
    assert index.search(new[3:4], 5).rows.max() < 600  # an index that is open does not see additions
    smaller = larger.remove(["id-603", "unknown"])
    assert len(smaller) == 629
    assert 603 not in smaller.search(new[3:4], 5).rows
    assert len(milvus.MilvusIndex.load(uri, index.collection, FACTS)) == 629
    again = smaller.add(new[3:4], metadata(1, first=603))  # rows are never reused
    assert again.search(new[3:4], 1).rows.tolist() == [[630]]
    for wrong, table, value in (
        (new, metadata(30, first=590), r"\bids\b"),
        (new[:, :8], metadata(30, first=700), r"\b32\b"),
        (0 * new, metadata(30, first=700), r"\bembedding\b"),
    ):
        with pytest.raises(ValueError, match=value):
            again.add(wrong, table)
    assert len(again) == 630


def test_addition_to_an_outdated_index_is_refused(index: Any, uri: str) -> None:
    """It would overwrite the rows that the other addition took."""
    opened_before = milvus.MilvusIndex.load(uri, index.collection)
    new = embeddings(30, seed=5)
    larger = index.add(new, metadata(30, first=600))
    for stale in (index, opened_before):
        with pytest.raises(ValueError, match=r"\b600\b.*\b630\b"):
            stale.add(embeddings(9, seed=6), metadata(9, first=700))
    assert [row["id"] for row in larger.lookup(larger.search(new[7:8], 1).rows)] == ["id-607"]
    assert len(larger) == 630


def test_interrupted_addition_or_build_is_never_seen_and_can_be_repeated(
    index: Any, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both end after all scans are inserted and before the manifest is written."""
    new, name = embeddings(30, seed=5), index.collection

    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(milvus.MilvusClient, "alter_collection_properties", interrupt)
        with pytest.raises(KeyboardInterrupt):
            index.add(new, metadata(30, first=600))
        with pytest.raises(KeyboardInterrupt):
            milvus.MilvusIndex.build(embeddings(), metadata(), FACTS, uri, "interrupted")
    loaded = milvus.MilvusIndex.load(uri, name, FACTS)
    assert len(loaded) == 600
    assert loaded.search(new, 5).rows.max() < 600
    with pytest.raises(IndexFormatError) as raised:
        milvus.MilvusIndex.load(uri, "interrupted")
    assert raised.value.reason == "unfinished"
    larger = loaded.add(new, metadata(30, first=600))
    assert sorted(larger.search(new[:1], 630).rows[0].tolist()) == list(range(630))
    rebuilt = milvus.MilvusIndex.build(embeddings(60), metadata(60), FACTS, uri, "interrupted")
    assert len(rebuilt) == 60


def reason_of(load: Any) -> str:
    with pytest.raises(IndexFormatError) as raised:
        load()
    return raised.value.reason


def test_collections_that_are_not_an_index_of_this_model_are_refused(index: Any, uri: str) -> None:
    name, load, build = index.collection, milvus.MilvusIndex.load, milvus.MilvusIndex.build
    other = ModelFacts("m3ret-tiny", "f" * 40, FACTS.processor)
    assert reason_of(lambda: load(uri, name, other)) == "other_model"
    assert reason_of(lambda: load(uri, "unknown")) == "not_found"
    with pytest.raises(ValueError, match=name):
        build(embeddings(), metadata(), FACTS, uri, name)
    index.client.create_collection("of_others", dimension=4)
    assert reason_of(lambda: load(uri, "of_others")) == "unsupported"
    assert reason_of(lambda: build(embeddings(), metadata(), FACTS, uri, "of_others")) == "unsupported"
    assert index.client.has_collection("of_others")
    newer = index.manifest.to_json().replace("1", "99", 1)
    index.client.alter_collection_properties(name, {milvus.PROPERTY: newer})
    assert reason_of(lambda: load(uri, name)) == "unsupported"


def test_wrong_queries_are_refused(index: Any) -> None:
    for queries, k, argument in (
        (embeddings()[:1, :8], 3, "queries"),
        (embeddings()[0], 3, "queries"),
        (embeddings()[:1], 0, "k"),
        (embeddings(), 16385, "k"),
    ):
        with pytest.raises(ValueError, match=rf"^{argument}\b"):
            index.search(queries, k)
    with pytest.raises(ValueError, match=r"^query_patients\b"):
        index.search(embeddings()[:2], 3, query_patients=["patient-1"])


def test_gallery_of_one_scan_is_built_and_an_empty_one_is_refused(uri: str) -> None:
    cells = milvus.MilvusSearch("IVF_FLAT", search={"nprobe": 8})
    one = milvus.MilvusIndex.build(embeddings(1), metadata(1), FACTS, uri, "one", cells)
    assert one.search(embeddings(1), 2).rows.tolist() == [[0, -1]]
    with pytest.raises(ValueError, match="none"):
        milvus.MilvusIndex.build(embeddings(0), metadata(0), FACTS, uri, "none")
    assert not one.client.has_collection("none")


def test_approximate_search_reports_its_recall_and_logs_a_low_one(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    vectors = torch.randn(3000, 32, generator=torch.Generator().manual_seed(0))
    normal = torch.nn.functional.normalize(vectors, dim=1).half().float()
    truth = (normal[:150] @ normal.T).topk(11).indices[:, 1:]  # without the query
    with caplog.at_level(logging.WARNING, logger=milvus.__name__):
        built = milvus.MilvusIndex.build(
            vectors, metadata(3000), FACTS, uri, "cells", milvus.MilvusSearch("IVF_FLAT", search={"nprobe": 8})
        )
    found = built.search(vectors[:150], 11).rows
    recall = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, truth, strict=True)) / truth.numel()
    assert recall < 0.9
    assert built.manifest.recall == pytest.approx(recall, abs=0.08)  # of other queries
    (record,) = [record for record in caplog.records if record.name == milvus.__name__]  # pymilvus logs, too
    assert (record.args[0], record.args[2]) == ("cells", built.manifest.recall)
    assert built.add(vectors[:1], metadata(1, first=3000)).manifest.recall is None


def test_token_is_read_from_the_environment_and_never_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = []
    connect = milvus.MilvusClient
    monkeypatch.setattr(milvus, "MilvusClient", lambda uri, token: given.append((uri, token)) or connect(uri))
    milvus.MilvusClient.create_schema = connect.create_schema  # of the class, not of a client
    monkeypatch.setenv("MILVUS_TOKEN", "root:a-secret")
    index = milvus.MilvusIndex.build(embeddings(20), metadata(20), FACTS, str(tmp_path / "gallery.db"), "scans")
    assert given == [(str(tmp_path / "gallery.db"), "root:a-secret")]
    assert "a-secret" not in index.manifest.to_json()
    index.close()
    files = [path for path in (tmp_path / "gallery.db").rglob("*") if path.is_file()]
    assert files
    assert not any(b"a-secret" in path.read_bytes() for path in files)
