"""The search index: exact filters, immutable changes, and files that are verified before they are used."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from processes import Script
from safetensors.torch import load_file
from torch import Tensor

from modeling_m3ret.errors import InputError
from modeling_m3ret.model_facts import ModelFacts
from modeling_m3ret.search import approximate
from modeling_m3ret.search import index as index_module
from modeling_m3ret.search.approximate import ApproximateSearch, RecallSample
from modeling_m3ret.search.exact import Hits
from modeling_m3ret.search.filters import MetadataFilter
from modeling_m3ret.search.index import IndexFormatError, RetrievalIndex


ROOT = Path(__file__).parents[2]
NO_MILVUS = "pip install m3ret[milvus]"
FACTS = ModelFacts("m3ret-tiny", "0" * 40, "1" * 64)
METHODS = ["exact", "ivf", "rabitq", "hnsw"]


def embeddings(rows: int = 600, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, 32, generator=generator)
    return centres[torch.arange(rows) % 12] + 0.4 * torch.randn(rows, 32, generator=generator)


def metadata(rows: int = 600, first: int = 0) -> pa.Table:
    numbers = range(first, first + rows)
    return pa.table(
        {
            "id": [f"id-{n}" for n in numbers],
            "patient": [f"patient-{n // 3}" for n in numbers],
            "modality": [("ct", "xray", "mri")[n % 3] for n in numbers],
            "anatomy": [("chest", "head")[n % 2] for n in numbers],
            "labels": [[f"label-{n % 5}"] for n in numbers],
            "source": ["phantom"] * rows,
        }
    )


def build(rows: int = 600, method: Any = "auto", **options: Any) -> RetrievalIndex:
    return RetrievalIndex.build(embeddings(rows), metadata(rows), FACTS, method, **options)


def recall(found: Tensor, truth: Tensor) -> float:
    return sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, truth, strict=True)) / truth.numel()


@pytest.fixture(scope="module")
def index() -> RetrievalIndex:
    return build()


@pytest.fixture(autouse=True)
def secret_of_this_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "CACHE_FOLDER", tmp_path / "cache")


# ---- filters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["copied rows", "mask", "ivf", pytest.param("milvus", marks=pytest.mark.slow)])
def searched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The same scans in an index of each kind, for tests that only search; two ways to apply a filter on disk."""
    if request.param == "milvus":
        module = pytest.importorskip("modeling_m3ret.search.milvus", reason=NO_MILVUS, exc_type=ImportError)
        file = tmp_path_factory.mktemp("milvus") / "gallery.db"
        milvus = module.MilvusIndex.build(embeddings(), metadata(), FACTS, str(file), "scans")
        yield milvus
        milvus.close()
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(index_module, "MAX_COPIED_FRACTION", 1.0 if request.param == "copied rows" else 0.0)
        yield build(method="ivf" if request.param == "ivf" else "exact")


def brute_force(query: Tensor, allowed: list[int], k: int) -> list[int]:
    vectors = torch.nn.functional.normalize(embeddings(), dim=1).half().float()
    scores = vectors @ torch.nn.functional.normalize(query, dim=0)
    return sorted(allowed, key=lambda row: -float(scores[row]))[:k]


@pytest.mark.parametrize(
    ("where", "near"),
    [
        ({"modality": "ct"}, ""),  # one word would be read as its letters
        ({"excluded_patients": "patient-0"}, ""),
        ({"excluded_patients": None}, ""),
        *(({"modality": wrong}, "") for wrong in (b"ct", {"ct": 1}, 3, True, [None], [3], [["ct"]])),
        ({"modality": ["mrri"]}, ""),
        ({"anatomy": ["haed"]}, "head"),
        ({"anatomy": ["chest", "hed"]}, "head"),
        ({"source": ["elsewhere"]}, ""),
        ({"source": ["fantom"]}, "phantom"),
        ({"excluded_patients": ["patient-0", "patent-1"]}, "patient-1"),
        ({"excluded_patients": ["Patient-1"]}, "patient-1"),  # names that differ in case are different patients
        ({"excluded_patients": ["smith"]}, ""),
    ],
)
def test_invalid_filter_is_refused(index: RetrievalIndex, where: dict[str, Any], near: str) -> None:
    with pytest.raises(InputError) as raised:
        index.search(embeddings()[:1], 3, where=MetadataFilter(**where))
    assert near in str(raised.value)


@pytest.mark.parametrize("patients", ["p0", [0, 1], "patient-0", {"p0": 1, "p1": 2}])
def test_patients_and_ids_must_be_lists_of_words(index: RetrievalIndex, patients: Any) -> None:
    with pytest.raises(InputError):
        index.search(embeddings()[:2], 3, query_patients=patients)
    with pytest.raises(InputError):
        index.remove(patients)


def test_words_of_a_filter_may_be_spelled_in_any_case(index: RetrievalIndex) -> None:
    for one, other in (({"modality": ["CT"]}, {"modality": ["ct"]}), ({"anatomy": [" Head"]}, {"anatomy": ["head"]})):
        hits = [index.search(embeddings()[:1], 3, where=MetadataFilter(**where)).rows for where in (one, other)]
        assert torch.equal(*hits)
        assert (hits[0] >= 0).all()


def test_patients_are_compared_as_manifests_are_read() -> None:
    patients = ["P 1", " P  1\u200b", "p 1", "P 2", "", None]
    table = pa.table({"id": list("abcdef"), "patient": patients})
    index = RetrievalIndex.build(embeddings(6), table, FACTS)
    for spelling in ("P 1", "P 1 ", " P\t1", "P\u200b 1"):
        found = index.search(embeddings(6)[:1], 6, where=MetadataFilter(excluded_patients=[spelling])).rows[0]
        assert set(found.tolist()) == {2, 3, 4, 5, -1}


@pytest.mark.parametrize(
    ("where", "matches"),
    [
        (MetadataFilter(modality=["ct"]), lambda n: n % 3 == 0),
        (MetadataFilter(modality=["ct", "mri"], anatomy=["head"]), lambda n: n % 3 != 1 and n % 2 == 1),
        (
            MetadataFilter(modality=["xray"], excluded_patients=["patient-0", "patient-7"]),
            lambda n: n % 3 == 1 and n not in (1, 22),
        ),
        (MetadataFilter(excluded_patients=["patient-0", "patient-7"]), lambda n: n // 3 not in (0, 7)),
        (MetadataFilter(modality=["endoscopy"]), lambda n: False),
        (MetadataFilter(modality=["MR", "X-ray"]), lambda n: n % 3 != 0),
        (MetadataFilter(modality=[]), lambda n: False),
        (MetadataFilter(), lambda n: True),
    ],
)
def test_filtered_search_equals_brute_force(
    searched: Any, where: MetadataFilter, matches: Callable[[int], bool]
) -> None:
    allowed = [n for n in range(600) if matches(n)]
    for selection in ([4, 90, 7], [4, 90, 7, 8, 9, 10]):  # few queries and more take different paths
        queries = embeddings()[selection]
        patients = ["patient-1", "", "unknown", *[""] * (len(selection) - 3)]
        hits = searched.search(queries, 7, where=where)
        others = searched.search(queries, 7, where=where, query_patients=patients)
        for index, query in enumerate(queries):
            assert [row for row in hits.rows[index].tolist() if row >= 0] == brute_force(query, allowed, 7)
            not_own = [n for n in allowed if index or n // 3 != 1]
            assert [row for row in others.rows[index].tolist() if row >= 0] == brute_force(query, not_own, 7)
            assert (hits.rows[index] < 0).equal(hits.scores[index].isinf())
    everything = searched.search(queries[:1], 600, where=where, query_patients=["patient-1"]).rows[0]
    assert set(everything.tolist()) - {-1} == {n for n in allowed if n // 3 != 1}


# strings that could end a string in a query language, and empty ones
SPECIAL = ['it\'s "so"', "back\\", "{word}", 'x" or row >= 0 or "', "a\nb\r\x00", "胸部", "", None]


@pytest.fixture(params=["disk", pytest.param("milvus", marks=pytest.mark.slow)])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, pa.Table]]:
    """Eight scans; each column holds the special strings in another order."""
    rotated = [[*SPECIAL[n:], *SPECIAL[:n]] for n in range(4)]
    table = pa.table(
        {
            "id": [f"{value}-{n}" for n, value in enumerate(SPECIAL)],
            **dict(zip(("patient", "modality", "anatomy"), rotated, strict=False)),
            "labels": pa.array([[value] if value else None for value in SPECIAL], pa.list_(pa.string())),
            "source": rotated[3],
        }
    )
    if request.param == "disk":
        yield RetrievalIndex.build(embeddings(8), table, FACTS), table
        return
    module = pytest.importorskip("modeling_m3ret.search.milvus", reason=NO_MILVUS, exc_type=ImportError)
    milvus = module.MilvusIndex.build(embeddings(8), table, FACTS, str(tmp_path / "special.db"), "scans")
    yield milvus, table
    milvus.close()


def test_any_string_can_be_filtered_by_and_looked_up(special: Any) -> None:
    index, table = special
    rows = table.to_pylist()
    queries = embeddings(len(rows))[:2]
    for value in SPECIAL[:-1]:
        for column in ("modality", "anatomy", "source"):
            found = index.search(queries, len(rows), where=MetadataFilter(**{column: [value]})).rows[1]
            assert set(found.tolist()) - {-1} == {n for n, row in enumerate(rows) if row[column] == value}
        found = index.search(queries, len(rows), where=MetadataFilter(excluded_patients=[value])).rows[1]
        assert set(found.tolist()) - {-1} == {n for n, row in enumerate(rows) if row["patient"] != value}
        found = index.search(queries, len(rows), query_patients=["", value]).rows[1]
        assert set(found.tolist()) - {-1} == {n for n, row in enumerate(rows) if not value or row["patient"] != value}
    assert index.lookup(torch.tensor([5, -1, 0, 5, 7])) == [rows[5], rows[0], rows[5], rows[7]]


@pytest.mark.parametrize("method", METHODS)
def test_scans_of_the_query_patient_are_left_out(method: str) -> None:
    index = build(method=method)
    patients = [f"patient-{n // 3}" for n in range(20)]
    hits = index.search(embeddings()[:20], 10, query_patients=patients)
    for patient, rows in zip(patients, hits.rows, strict=True):
        found = [row["patient"] for row in index.lookup(rows)]
        assert len(found) == 10
        assert patient not in found


def test_index_can_be_searched_by_several_threads() -> None:
    index = build()

    def search(number: int) -> set[int]:
        where = MetadataFilter(excluded_patients=[f"patient-{number % 20}"])
        return set(index.search(embeddings()[:1], k=600, where=where).rows[0].tolist())

    with ThreadPoolExecutor(4) as threads:
        for number, rows in enumerate(threads.map(search, range(80))):
            assert rows - {-1} == {row for row in range(600) if row // 3 != number % 20}


# ---- approximate search ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ivf", "rabitq", "hnsw"])
def test_reported_recall_is_that_of_other_queries(method: str) -> None:
    vectors = embeddings(4000)
    index = build(4000, method, target_recall=0.95)
    exact = build(4000, "exact")
    queries = vectors[:100] + 0.05 * torch.randn(100, 32)
    found, truth = index.search(queries, 10), exact.search(queries, 10)
    assert index.approximate is not None
    assert index.approximate.settings.recall >= 0.95
    # four standard errors
    assert recall(found.rows, truth.rows) == pytest.approx(index.approximate.settings.recall, abs=0.04)
    best = found.rows[:, 0] == truth.rows[:, 0]
    assert torch.equal(found.scores[best, 0], truth.scores[best, 0])  # scores are exact


def test_only_large_galleries_are_searched_approximately_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "EXACT_UP_TO", 599)
    large = build(600)
    assert large.approximate is not None
    assert large.approximate.settings.method == "rabitq"
    assert build(599).approximate is None
    assert build(600, "exact").approximate is None


def uniform(rows: int, seed: int) -> Tensor:
    """Directions without clusters, so that few neighbours share a cell."""
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_adding_scans_tunes_the_search_again() -> None:
    """The cells were trained on clusters; the added scans have none, so the previous probes would find far less."""
    index = build(2000, "ivf", target_recall=0.95)
    larger = index.add(uniform(2000, seed=9), metadata(2000, first=2000))
    assert index.approximate is not None
    assert larger.approximate is not None
    before, after = index.approximate.settings, larger.approximate.settings
    sample = torch.randperm(4000, generator=torch.Generator().manual_seed(3))[:200]
    queries = larger.embeddings[sample].float()
    truth = (queries @ larger.embeddings.float().T).topk(10).indices
    untuned = ApproximateSearch(larger.embeddings, larger.approximate.index, before)
    assert recall(untuned.search(queries, 10).rows, truth) < before.recall - 0.1
    assert after.probes > before.probes
    assert after.recall >= 0.95
    assert recall(larger.approximate.search(queries, 10).rows, truth) == pytest.approx(after.recall, abs=0.04)


@pytest.mark.slow
def test_recall_below_the_target_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    index = build(2000, "rabitq", target_recall=0.95)
    assert index.approximate is not None
    assert not caplog.records
    monkeypatch.setattr(approximate, "CANDIDATE_FACTORS", (index.approximate.settings.candidate_factor,))
    larger = index.add(uniform(4000, seed=9), metadata(4000, first=2000))
    assert larger.approximate is not None
    measured = larger.approximate.settings.recall
    assert measured < 0.95
    (record,) = caplog.records
    assert record.args == ("rabitq", 0.95, measured)


@pytest.mark.parametrize("method", ["ivf", "rabitq", "hnsw"])
def test_approximate_index_of_a_few_scans_can_shrink_to_none_and_grow(method: str) -> None:
    gallery = embeddings(3)
    index = build(3, method)
    for remaining in (3, 2, 1):
        ids = index.metadata.column("id").to_pylist()
        found = index.search(gallery[3 - remaining :], k=3).rows
        expected = [-1] * (3 - remaining) + list(range(remaining))
        assert [sorted(rows.tolist()) for rows in found] == [expected] * remaining
        index = index.remove(ids[:1])
    assert len(index) == 0
    assert (index.search(gallery, k=2).rows == -1).all()
    assert index.add(gallery, metadata(3)).search(gallery, k=1).rows.flatten().tolist() == [0, 1, 2]


# ---- equal scans ----------------------------------------------------------------------------------------------------


def degenerate(kind: str, rows: int) -> Tensor:
    torch.manual_seed(0)
    if kind == "one vector":
        return torch.randn(1, 32).repeat(rows, 1)
    if kind == "three vectors":
        return torch.randn(3, 32)[torch.randint(3, (rows,))]
    return torch.tensor([1.0, -1.0])[torch.arange(rows) % 2, None] * torch.randn(1, 32)  # opposite vectors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["one vector", "three vectors", "opposite vectors"])
@pytest.mark.parametrize("rows", [1, 9, 70, pytest.param(300, marks=pytest.mark.slow)])
def test_gallery_of_equal_scans_gives_every_query_its_hits_in_order(method: str, kind: str, rows: int) -> None:
    """Expected hits are Python's sort of all rows by descending score and ascending row."""
    gallery = degenerate(kind, rows)
    index = RetrievalIndex.build(gallery, metadata(rows), FACTS, method)
    queries = torch.nn.functional.normalize(torch.cat([gallery[:2], -gallery[:1], torch.randn(2, 32)]), dim=1)
    vectors = torch.nn.functional.normalize(gallery, dim=1).half().float()
    for k in (1, 10, rows + 3):
        for patients in (None, ["patient-0"] * len(queries)):
            allowed = [row for row in range(rows) if patients is None or row // 3]
            for query, found, scores in zip(queries, *_hits(index, queries, k, patients), strict=True):
                similarity = (vectors * query).sum(1).tolist()
                expected = sorted(allowed, key=lambda row: (-similarity[row], row))[:k]
                assert [row for row in found.tolist() if row >= 0] == expected
                assert scores[: len(expected)].tolist() == pytest.approx([similarity[row] for row in expected])
    if index.approximate is not None:
        assert index.approximate.settings.recall == 1  # and above, everything was found


def _hits(index: RetrievalIndex, queries: Tensor, k: int, patients: list[str] | None) -> tuple[Tensor, Tensor]:
    hits = index.search(queries, k, query_patients=patients)
    return hits.rows, hits.scores


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_recall_of_a_search_that_finds_nothing_is_zero(rows: int) -> None:
    for kind in ("one vector", "three vectors"):
        sample = RecallSample(torch.nn.functional.normalize(degenerate(kind, rows), dim=1).half())
        assert sample.recall(lambda queries, k: Hits.empty(len(queries), k)) == 0


def test_equally_similar_neighbours_count_as_found() -> None:
    """A search may return other rows of the k-th score than the exact one does, but not less similar ones."""
    gallery = torch.nn.functional.normalize(degenerate("opposite vectors", 40), dim=1).half()

    def last_rows_first(queries: Tensor, k: int) -> Hits:
        hits = Hits.empty(len(queries), k)
        for index, query in enumerate(queries):
            scores = gallery.float() @ query
            hits.rows[index] = torch.tensor(
                sorted(range(40), key=lambda row: (-round(float(scores[row]), 4), -row))[:k]
            )
            hits.scores[index] = scores[hits.rows[index]]
        return hits

    def least_similar(queries: Tensor, k: int) -> Hits:
        hits = last_rows_first(-queries, k)
        return Hits(-hits.scores, hits.rows)

    assert RecallSample(gallery).recall(last_rows_first) == 1
    assert RecallSample(gallery).recall(least_similar) == 0


@pytest.mark.parametrize("method", METHODS)
def test_queries_that_are_zero_or_not_finite_are_refused(method: str) -> None:
    index = build(60, method)
    for value in (0.0, torch.nan, torch.inf):
        queries = embeddings()[:3].clone()
        queries[1] = value
        with pytest.raises(InputError):
            index.search(queries, 3)


# ---- building and changing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "ivf"])
def test_add_and_remove_return_new_indices(method: str) -> None:
    index = build(method=method)
    added = embeddings(30, seed=5)
    larger = index.add(added, metadata(30, first=600))
    assert [row["id"] for row in larger.lookup(larger.search(added[3:4], 1).rows)] == ["id-603"]
    smaller = larger.remove(["id-603", "unknown"])
    assert [len(index), len(larger), len(smaller)] == [600, 630, 629]
    assert "id-603" not in [row["id"] for row in smaller.lookup(smaller.search(added[3:4], 20).rows)]
    with pytest.raises(ValueError, match="id"):
        index.add(added, metadata(30, first=590))


@pytest.mark.parametrize(
    ("vectors", "table", "argument"),
    [
        (embeddings(3), metadata(2), "metadata"),
        (embeddings(3).flatten(), metadata(3), "embeddings"),
        (embeddings(3) * torch.tensor([[1.0], [0.0], [1.0]]), metadata(3), "embedding"),
        (embeddings(3) / torch.tensor([[1.0], [0.0], [1.0]]), metadata(3), "embeddings"),
        (embeddings(3), metadata(3).set_column(0, "id", pa.array(["a", "a", "b"])), "ids"),
        (embeddings(3), metadata(3).drop(["id"]), "id"),
        (embeddings(3), metadata(3).set_column(4, "labels", pa.array(["a", "b", "c"])), "labels"),
    ],
)
def test_invalid_galleries_are_refused(vectors: Tensor, table: pa.Table, argument: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        RetrievalIndex.build(vectors, table, FACTS)


@pytest.mark.parametrize(
    "values", [pa.nulls(3), pa.array(["a"] * 3, pa.large_string()), pa.array(["a"] * 3).dictionary_encode()]
)
def test_string_columns_of_any_type_can_be_added_to(values: pa.Array) -> None:
    table = metadata(3).set_column(5, "source", values)
    larger = RetrievalIndex.build(embeddings(3), table, FACTS).add(embeddings(5), metadata(5, first=3))
    assert larger.metadata.column("source").to_pylist() == [*values.to_pylist(), *["phantom"] * 5]
    found = larger.search(embeddings(1), 8, where=MetadataFilter(source=["phantom"])).rows
    assert sorted(found[0].tolist()) == [-1, -1, -1, 3, 4, 5, 6, 7]


def test_empty_index_finds_nothing_and_can_grow() -> None:
    empty = RetrievalIndex.build(torch.empty(0, 32), pa.table({"id": pa.array([], pa.string())}), FACTS)
    hits = empty.search(embeddings(1), 2)
    assert hits.rows.tolist() == [[-1, -1]]
    assert empty.lookup(hits.rows) == []
    assert empty.add(embeddings(3), metadata(3)).search(embeddings(3), 1).rows.flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("method", METHODS)
def test_no_query_finds_nothing_and_wrong_queries_are_refused(method: str) -> None:
    index = build(60, method)
    queries = embeddings()[:2]
    for patients in (None, []):
        hits = index.search(queries[:0], 3, query_patients=patients)
        assert hits.rows.shape == hits.scores.shape == (0, 3)
    for wrong, k, patients, argument in (
        (queries[:, :8], 3, None, "queries"),
        (queries[0], 3, None, "queries"),
        (queries, 0, ["a", "b"], "k"),
        (queries, 3, ["a"], "query_patients"),
        (queries, 3, ["a", "b", "c"], "query_patients"),
    ):
        with pytest.raises(ValueError, match=rf"^{argument}\b"):
            index.search(wrong, k, query_patients=patients)


# ---- on disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_saved_index_is_the_same_when_loaded(method: str, tmp_path: Path) -> None:
    index = build(method=method)
    index.save(tmp_path / "gallery")
    loaded = RetrievalIndex.load(tmp_path / "gallery", FACTS)
    assert torch.equal(loaded.embeddings, index.embeddings)
    assert loaded.metadata.equals(index.metadata)
    queries = embeddings(seed=2)[:8]
    assert torch.equal(loaded.search(queries, 5).rows, index.search(queries, 5).rows)
    assert len(list((tmp_path / "gallery").glob("version-*"))) == 1
    index.save(tmp_path / "gallery")
    assert len(list((tmp_path / "gallery").glob("version-*"))) == 1
    assert torch.equal(loaded.search(queries, 5).rows, index.search(queries, 5).rows)  # it is still open


def test_keys_of_the_manifest_are_those_of_older_versions(tmp_path: Path) -> None:
    build(method="rabitq").save(tmp_path)
    manifest = json.loads((tmp_path / "current.json").read_text())
    assert set(manifest) == {"format", "version", "scans", "dimension", "model", "files", "approximate"}
    assert set(manifest["approximate"]) == {"method", "cells", "effort", "reranked", "recall", "aim"}
    signed = json.loads((tmp_path / manifest["version"] / "approximate.json").read_text())
    assert set(signed) == {"gallery", "signature", *manifest["approximate"]}


def damage(folder: Path, kind: str) -> None:
    version = next(folder.glob("version-*"))
    file = version / ("metadata.parquet" if "metadata" in kind else "embeddings.safetensors")
    content = bytearray(file.read_bytes())
    if "byte" in kind:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif "truncated" in kind:
        file.write_bytes(content[:-100])
    elif "missing" in kind:
        file.unlink()
    elif kind == "no manifest":
        (folder / "current.json").unlink()
    elif kind.startswith("without "):
        manifest = json.loads((folder / "current.json").read_text())
        del manifest[kind.removeprefix("without ")]
        (folder / "current.json").write_text(json.dumps(manifest))
    elif kind.startswith("current.json"):
        (folder / "current.json").write_text(kind.removeprefix("current.json "))
    else:
        manifest = json.loads((folder / "current.json").read_text())
        manifest |= {"format": {"format": 99}, "path": {"version": "../../etc"}, "scans": {"scans": 7}}[kind]
        (folder / "current.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("kind", "reason", "file"),
    [
        ("byte", "damaged", "embeddings.safetensors"),
        ("metadata byte", "damaged", "metadata.parquet"),
        ("truncated", "damaged", "embeddings.safetensors"),
        ("missing", "damaged", "embeddings.safetensors"),
        ("metadata missing", "damaged", "metadata.parquet"),
        ("no manifest", "not_found", "current.json"),
        ("format", "unsupported", "current.json"),
        ("path", "damaged", "current.json"),
        ("scans", "damaged", None),
        *((f"without {key}", "damaged", "current.json") for key in ("format", "version", "scans", "dimension")),
        *((f"without {key}", "damaged", "current.json") for key in ("model", "files", "approximate")),
        *(
            (f"current.json {text}", "damaged", "current.json")
            for text in ("", "{}", "[]", "null", "7", '{"format": 1')
        ),
    ],
)
def test_damaged_index_is_refused(
    index: RetrievalIndex, tmp_path: Path, kind: str, reason: str, file: str | None
) -> None:
    index.save(tmp_path / "gallery")
    damage(tmp_path / "gallery", kind)
    with pytest.raises(IndexFormatError) as raised:
        RetrievalIndex.load(tmp_path / "gallery", FACTS)
    assert (raised.value.reason, raised.value.file) == (reason, file)
    assert raised.value.location == str(tmp_path / "gallery")


@pytest.mark.parametrize(
    "changes",
    [
        {"scans": None},
        {"scans": True},
        {"scans": -1},
        {"scans": 600.0},
        {"scans": float("nan")},
        {"scans": "600"},
        {"dimension": [32]},
        {"dimension": 10.0**300},
        {"version": 5},
        {"version": None},
        {"version": ["version-1"]},
        {"files": ["embeddings.safetensors", "metadata.parquet"]},
        {"files": {"embeddings.safetensors": 1, "metadata.parquet": None}},
        {"files": {"../secret": "0"}},
        {"files": None},
        {"model": {"model": 1, "revision": 2, "processor": 3}},
        {"model": ["m", "r", "p"]},
        {"model": {"model": "m"}},
        {"model": {"model": "m", "revision": "r", "processor": "p", "password": "x"}},
        {"approximate": 7},
        {"approximate": {"method": "ivf"}},
        *(
            {"approximate": {"method": "ivf", "cells": 8, "effort": 2, "reranked": 1, "recall": 1.0, "aim": aim}}
            for aim in (float("nan"), float("inf"), -1, "0.9", None)
        ),
    ],
)
def test_manifest_with_other_types_or_numbers_is_refused(
    index: RetrievalIndex, tmp_path: Path, changes: dict[str, Any]
) -> None:
    index.save(tmp_path)
    path = tmp_path / "current.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(IndexFormatError) as raised:
        RetrievalIndex.load(tmp_path)
    assert (raised.value.reason, raised.value.file) == ("damaged", "current.json")


@pytest.mark.parametrize(
    "content", [b"[" * 10**5, b"\xff\xfe{", b'{"format": 1e999}', b'{"format": ' + b"9" * 5000 + b"}"]
)
def test_manifest_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "current.json").write_bytes(content)
    with pytest.raises(IndexFormatError) as raised:
        RetrievalIndex.load(tmp_path)
    assert raised.value.reason in ("damaged", "unsupported")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    index = build(20)
    index.embeddings[3, 1] = value
    index.save(tmp_path)
    with pytest.raises(IndexFormatError) as raised:
        RetrievalIndex.load(tmp_path)
    assert (raised.value.reason, raised.value.file) == ("damaged", "embeddings.safetensors")


def test_index_of_another_model_is_refused(index: RetrievalIndex, tmp_path: Path) -> None:
    index.save(tmp_path)
    other = ModelFacts("m3ret-tiny", "f" * 40, FACTS.processor)
    with pytest.raises(IndexFormatError) as raised:
        RetrievalIndex.load(tmp_path, other)
    assert raised.value.reason == "other_model"
    assert len(RetrievalIndex.load(tmp_path)) == 600  # without an expected model any is accepted


def test_faiss_file_without_a_valid_signature_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is built again if the file is damaged, missing, or signed by another machine."""
    import faiss

    build(200, "ivf").save(tmp_path / "gallery")
    path = next((tmp_path / "gallery").glob("version-*")) / "approximate.faiss"
    read = []
    deserialize = faiss.deserialize_index
    monkeypatch.setattr(faiss, "deserialize_index", lambda content: read.append(len(content)) or deserialize(content))
    RetrievalIndex.load(tmp_path / "gallery")
    assert len(read) == 1
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    for change in (
        lambda: path.write_bytes(content),
        lambda: path.unlink(),
        lambda: monkeypatch.setattr(approximate, "CACHE_FOLDER", tmp_path / "another machine"),
    ):
        change()
        loaded = RetrievalIndex.load(tmp_path / "gallery")
        assert len(read) == 1
        assert isinstance(loaded.approximate, ApproximateSearch)


SAVE_AND_DIE = """
import os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/search"]
from pathlib import Path
from test_index import build
from modeling_m3ret.search import index
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(index, {step!r}, die)
build(50).save(Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["save_file", "sha256_of", "sync", "atomic_write_text"])
def test_killed_save_leaves_the_previous_index(index: RetrievalIndex, tmp_path: Path, step: str) -> None:
    index.save(tmp_path / "gallery")
    script = tmp_path / "save_and_die.py"
    script.write_text(SAVE_AND_DIE.format(root=str(ROOT), step=step))
    assert Script([str(script), str(tmp_path / "gallery")], tmp_path).finish() == -signal.SIGKILL
    assert len(RetrievalIndex.load(tmp_path / "gallery", FACTS)) == 600
    index.remove(["id-0"]).save(tmp_path / "gallery")  # also deletes what the killed save wrote
    assert len(RetrievalIndex.load(tmp_path / "gallery", FACTS)) == 599
    assert len(list((tmp_path / "gallery").glob("version-*"))) == 1


def test_file_holds_normalised_embeddings(index: RetrievalIndex, tmp_path: Path) -> None:
    index.save(tmp_path)
    stored = load_file(next(tmp_path.glob("version-*")) / "embeddings.safetensors")["embeddings"]
    expected = torch.nn.functional.normalize(embeddings(), dim=1)
    assert (stored.float() - expected).abs().max() < 2**-11
