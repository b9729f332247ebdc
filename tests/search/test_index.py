"""The index: filters that stay exact, changes that disturb nobody, and files that are whole, ours, or refused."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from processes import Script
from safetensors.torch import load_file
from torch import Tensor

from modeling_m3ret.model_facts import ModelFacts
from modeling_m3ret.search import approximate
from modeling_m3ret.search.approximate import ApproximateSearch
from modeling_m3ret.search.index import FILTERS_KEPT, IndexFormatError, MetadataFilter, RetrievalIndex


ROOT = Path(__file__).parents[2]
NO_MILVUS = "pip install m3ret[milvus]"
FACTS = ModelFacts("m3ret-tiny", "0" * 40, "1" * 64)


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


@pytest.fixture
def index() -> RetrievalIndex:
    return RetrievalIndex.build(embeddings(), metadata(), FACTS)


@pytest.fixture(autouse=True)
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "CACHE_FOLDER", tmp_path / "cache")


def expected(query: Tensor, allowed: list[int], k: int) -> list[int]:
    vectors = torch.nn.functional.normalize(embeddings(), dim=1).half().float()
    scores = vectors @ torch.nn.functional.normalize(query, dim=0)
    return sorted(allowed, key=lambda row: -float(scores[row]))[:k]


@pytest.fixture(scope="module", params=["exact", "ivf", "milvus"])
def searched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An index of each kind, of the same scans, for tests that only search it."""
    if request.param == "milvus":
        module = pytest.importorskip("modeling_m3ret.search.milvus", reason=NO_MILVUS, exc_type=ImportError)
        place = tmp_path_factory.mktemp("milvus") / "gallery.db"
        index = module.MilvusIndex.build(embeddings(), metadata(), FACTS, str(place), "scans")
        yield index
        index.close()
    else:
        yield RetrievalIndex.build(embeddings(), metadata(), FACTS, request.param)


@pytest.mark.parametrize(
    ("where", "allowed"),
    [
        (MetadataFilter(modality=["ct"]), lambda n: n % 3 == 0),
        (MetadataFilter(modality=["ct", "mri"], anatomy=["head"]), lambda n: n % 3 != 1 and n % 2 == 1),
        (
            MetadataFilter(modality=["xray"], excluded_patients=["patient-0", "patient-7"]),
            lambda n: n % 3 == 1 and n not in (1, 22),
        ),
        (MetadataFilter(excluded_patients=["patient-0", "patient-7"]), lambda n: n // 3 not in (0, 7)),
        (MetadataFilter(source=["elsewhere"]), lambda n: False),
        (MetadataFilter(modality=[]), lambda n: False),
        (MetadataFilter(), lambda n: True),
    ],
)
@pytest.mark.parametrize("gathered", [0.0, 1.0], ids=["by a mask", "side by side"])
@pytest.mark.parametrize("queries", [[4, 90, 7], [4, 90, 7, 8, 9, 10]], ids=["few queries", "more queries"])
def test_a_filter_gives_the_best_of_what_it_allows(
    searched: Any,
    where: MetadataFilter,
    allowed: Any,
    gathered: float,
    queries: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("modeling_m3ret.search.index.GATHERED", gathered)
    if isinstance(searched, RetrievalIndex):
        searched._filters.clear()
    vectors = embeddings()[queries]
    hits = searched.search(vectors, 7, where=where)
    own = searched.search(
        vectors, 7, where=where, query_patients=["patient-1", "", "nobody", *[""] * (len(queries) - 3)]
    )
    for place, query in enumerate(vectors):
        rows = [n for n in range(600) if allowed(n)]
        assert [row for row in hits.rows[place].tolist() if row >= 0] == expected(query, rows, 7)
        foreign = [n for n in rows if place or n // 3 != 1]
        assert [row for row in own.rows[place].tolist() if row >= 0] == expected(query, foreign, 7)
        assert (hits.rows[place] < 0).equal(hits.scores[place].isinf())
    everything = searched.search(vectors[:1], 600, where=where, query_patients=["patient-1"]).rows[0]
    assert set(everything.tolist()) - {-1} == {n for n in range(600) if allowed(n) and n // 3 != 1}


STRANGE = ['it\'s "so"', "back\\", "{word}", 'x" or row >= 0 or "', "a\nb\r\x00", "胸部", "", None]


def test_words_of_any_kind_are_filtered_by_and_come_back(strange: Any) -> None:
    """Quotes and such, which could end a word in an expression, and words that are not there."""
    index, table = strange
    rows = table.to_pylist()
    queries = embeddings(len(rows))[:2]
    for word in STRANGE[:-1]:
        for column in ("modality", "anatomy", "source"):
            found = index.search(queries, len(rows), where=MetadataFilter(**{column: [word]})).rows[1]
            assert set(found.tolist()) - {-1} == {n for n, row in enumerate(rows) if row[column] == word}
        found = index.search(queries, len(rows), where=MetadataFilter(excluded_patients=[word])).rows[1]
        assert set(found.tolist()) - {-1} == {n for n, row in enumerate(rows) if row["patient"] != word}
        found = index.search(queries, len(rows), query_patients=["", word]).rows[1]
        assert set(found.tolist()) - {-1} == {n for n, row in enumerate(rows) if not word or row["patient"] != word}
    assert index.rows(torch.tensor([5, -1, 0, 5, 7])) == [rows[5], rows[0], rows[5], rows[7]]


@pytest.fixture(params=["disk", "milvus"])
def strange(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, pa.Table]]:
    """Eight scans whose every column holds other words of those."""
    turned = [[*STRANGE[n:], *STRANGE[:n]] for n in range(4)]
    table = pa.table(
        {
            "id": [f"{word}-{n}" for n, word in enumerate(STRANGE)],
            **dict(zip(("patient", "modality", "anatomy"), turned, strict=False)),
            "labels": pa.array([[word] if word else None for word in STRANGE], pa.list_(pa.string())),
            "source": turned[3],
        }
    )
    if request.param == "disk":
        yield RetrievalIndex.build(embeddings(8), table, FACTS), table
        return
    module = pytest.importorskip("modeling_m3ret.search.milvus", reason=NO_MILVUS, exc_type=ImportError)
    index = module.MilvusIndex.build(embeddings(8), table, FACTS, str(tmp_path / "strange.db"), "scans")
    yield index, table
    index.close()


@pytest.mark.parametrize("method", ["exact", "ivf", "rabitq", "hnsw"])
def test_the_query_s_own_patient_is_not_found(method: str) -> None:
    index = RetrievalIndex.build(embeddings(), metadata(), FACTS, method)  # type: ignore[arg-type]
    patients = [f"patient-{n // 3}" for n in range(20)]
    hits = index.search(embeddings()[:20], 10, query_patients=patients)
    for own, rows in zip(patients, hits.rows, strict=True):
        found = [row["patient"] for row in index.rows(rows)]
        assert len(found) == 10
        assert own not in found


@pytest.mark.parametrize("method", ["ivf", "rabitq", "hnsw"])
def test_an_approximate_index_tells_the_recall_that_it_has(method: str) -> None:
    vectors = embeddings(4000)
    index = RetrievalIndex.build(vectors, metadata(4000), FACTS, method, aim=0.95)  # type: ignore[arg-type]
    exact = RetrievalIndex.build(vectors, metadata(4000), FACTS, "exact")
    queries = embeddings(200, seed=0)[:100] + 0.05 * torch.randn(100, 32)
    found, truth = index.search(queries, 10), exact.search(queries, 10)
    recall = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found.rows, truth.rows, strict=True)) / 1000
    assert index.approximate is not None
    assert index.approximate.measured.recall >= 0.95
    assert recall == pytest.approx(
        index.approximate.measured.recall, abs=0.04
    )  # of other queries; four standard errors
    best = found.rows[:, 0] == truth.rows[:, 0]
    assert torch.equal(found.scores[best, 0], truth.scores[best, 0])  # scores are exact whatever found the row


def test_large_galleries_are_searched_approximately_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_m3ret.search.index.EXACT_UP_TO", 599)
    large = RetrievalIndex.build(embeddings(), metadata(), FACTS)
    assert large.approximate is not None
    assert large.approximate.measured.method == "rabitq"
    assert RetrievalIndex.build(embeddings(599), metadata(599), FACTS).approximate is None
    assert RetrievalIndex.build(embeddings(), metadata(), FACTS, "exact").approximate is None


@pytest.mark.parametrize("method", ["exact", "ivf"])
def test_adding_and_removing_give_new_indices_that_find_what_they_hold(method: str) -> None:
    index = RetrievalIndex.build(embeddings(), metadata(), FACTS, method)  # type: ignore[arg-type]
    new = embeddings(30, seed=5)
    larger = index.add(new, metadata(30, first=600))
    assert [row["id"] for row in larger.rows(larger.search(new[3:4], 1).rows)] == ["id-603"]
    smaller = larger.remove(["id-603", "no such id"])
    assert (len(index), len(larger)) == (600, 630)
    assert len(smaller) == 629
    assert "id-603" not in [row["id"] for row in smaller.rows(smaller.search(new[3:4], 20).rows)]
    with pytest.raises(ValueError, match="all different"):
        index.add(new, metadata(30, first=590))


@pytest.mark.parametrize("method", ["ivf", "rabitq", "hnsw"])
def test_an_approximate_index_of_a_few_scans_finds_them_and_can_lose_them_all(method: Any) -> None:
    gallery = embeddings(3)
    index = RetrievalIndex.build(gallery, metadata(3), FACTS, method)
    for left in (3, 2, 1):
        ids = index.metadata.column("id").to_pylist()
        found = index.search(gallery[3 - left :], k=3).rows
        assert [sorted(rows.tolist()) for rows in found] == [[-1] * (3 - left) + list(range(left))] * left
        index = index.remove(ids[:1])
    assert len(index) == 0
    assert (index.search(gallery, k=2).rows == -1).all()
    assert index.add(gallery, metadata(3)).search(gallery, k=1).rows.flatten().tolist() == [0, 1, 2]


def uniform(rows: int, seed: int) -> Tensor:
    """Directions spread evenly, which no cell holds together."""
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


def test_what_is_added_is_measured_too() -> None:
    """Cells were trained on clusters; of what is added, spread evenly, few neighbours share one. Looking at as many
    cells as before would find far less than before: the recall that is told is that of the gallery as it is."""
    index = RetrievalIndex.build(embeddings(2000), metadata(2000), FACTS, "ivf", aim=0.95)
    larger = index.add(uniform(2000, seed=9), metadata(2000, first=2000))
    assert index.approximate is not None
    assert larger.approximate is not None
    before, now = index.approximate.measured, larger.approximate.measured
    tried = torch.randperm(4000, generator=torch.Generator().manual_seed(3))[:200]
    vectors = larger.embeddings[tried].float()
    truth = (vectors @ larger.embeddings.float().T).topk(10).indices

    def recall(searched: ApproximateSearch) -> float:
        found = searched.search(vectors, 10).rows
        return sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, truth, strict=True)) / truth.numel()

    as_before = ApproximateSearch(larger.embeddings, larger.approximate.index, before)
    assert recall(as_before) < before.recall - 0.1
    assert now.effort > before.effort
    assert now.recall >= 0.95
    assert recall(larger.approximate) == pytest.approx(now.recall, abs=0.04)


def test_an_addition_that_cannot_be_found_again_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index = RetrievalIndex.build(embeddings(2000), metadata(2000), FACTS, "rabitq", aim=0.95)
    assert index.approximate is not None
    assert not caplog.records
    monkeypatch.setattr(approximate, "RERANKED", (index.approximate.measured.reranked,))
    larger = index.add(uniform(4000, seed=9), metadata(4000, first=2000))
    assert larger.approximate is not None
    assert larger.approximate.measured.recall < 0.95
    assert "not 0.950: search exactly" in caplog.text


def test_what_is_no_gallery_is_refused() -> None:
    vectors = embeddings(3)
    for wrong, table, message in (
        (vectors, metadata(2), "expected 3 with an id"),
        (vectors * torch.tensor([[1.0], [0.0], [1.0]]), metadata(3), "no direction"),
        (vectors / torch.tensor([[1.0], [0.0], [1.0]]), metadata(3), "finite"),
        (vectors, metadata(3).set_column(0, "id", pa.array(["a", "a", "b"])), "all different"),
        (vectors, metadata(3).drop(["id"]), "with an id"),
        (vectors, metadata(3).set_column(4, "labels", pa.array(["a", "b", "c"])), "lists of them as labels"),
    ):
        with pytest.raises(ValueError, match=message):
            RetrievalIndex.build(wrong, table, FACTS)


@pytest.mark.parametrize(
    "words", [pa.nulls(3), pa.array(["a"] * 3, pa.large_string()), pa.array(["a"] * 3).dictionary_encode()]
)
def test_words_of_any_type_are_added_to(words: pa.Array) -> None:
    table = metadata(3).set_column(5, "source", words)
    larger = RetrievalIndex.build(embeddings(3), table, FACTS).add(embeddings(5), metadata(5, first=3))
    assert larger.metadata.column("source").to_pylist() == [*words.to_pylist(), *["phantom"] * 5]
    assert larger.search(embeddings(1), 8, where=MetadataFilter(source=["phantom"])).rows.sort().values.tolist() == [
        [-1, -1, -1, 3, 4, 5, 6, 7]
    ]


def test_an_index_begins_with_nothing_and_is_added_to() -> None:
    nothing = RetrievalIndex.build(torch.empty(0, 32), pa.table({"id": pa.array([], pa.string())}), FACTS)
    assert nothing.search(embeddings(1), 2).rows.tolist() == [[-1, -1]]
    assert nothing.add(embeddings(3), metadata(3)).search(embeddings(3), 1).rows.flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("method", ["exact", "ivf", "rabitq", "hnsw"])
def test_queries_that_do_not_fit_are_refused_and_none_find_nothing(method: str) -> None:
    index = RetrievalIndex.build(embeddings(60), metadata(60), FACTS, method)  # type: ignore[arg-type]
    queries = embeddings()[:2]
    for patients in (None, []):
        hits = index.search(queries[:0], 3, query_patients=patients)
        assert hits.rows.shape == hits.scores.shape == (0, 3)
    for wrong, k, patients, message in (
        (queries[:, :8], 3, None, "do not fit 32 dimensions"),
        (queries[0], 3, None, "do not fit 32 dimensions"),
        (queries, 0, ["a", "b"], "or k is 0"),
        (queries, 3, ["a"], "found 1 patients, expected one of each of 2 queries"),
        (queries, 3, ["a", "b", "c"], "found 3 patients"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(wrong, k, query_patients=patients)


@pytest.mark.parametrize("method", ["exact", "ivf", "rabitq", "hnsw"])
def test_a_saved_index_is_the_same_when_loaded(method: str, tmp_path: Path) -> None:
    index = RetrievalIndex.build(embeddings(), metadata(), FACTS, method)  # type: ignore[arg-type]
    index.save(tmp_path / "gallery")
    loaded = RetrievalIndex.load(tmp_path / "gallery", FACTS)
    assert torch.equal(loaded.embeddings, index.embeddings)
    assert loaded.metadata.equals(index.metadata)
    queries = embeddings(seed=2)[:8]
    assert torch.equal(loaded.search(queries, 5).rows, index.search(queries, 5).rows)
    assert len(list((tmp_path / "gallery").glob("version-*"))) == 1
    index.save(tmp_path / "gallery")
    assert len(list((tmp_path / "gallery").glob("version-*"))) == 1
    assert torch.equal(loaded.search(queries, 5).rows, index.search(queries, 5).rows)  # who had it open reads on


def damage(folder: Path, what: str) -> None:
    version = next(folder.glob("version-*"))
    file = version / ("metadata.parquet" if "metadata" in what else "embeddings.safetensors")
    content = bytearray(file.read_bytes())
    if "byte" in what:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif "cut" in what:
        file.write_bytes(content[:-100])
    elif "gone" in what:
        file.unlink()
    elif what == "no manifest":
        (folder / "current.json").unlink()
    else:
        manifest = json.loads((folder / "current.json").read_text())
        manifest |= {"format": {"format": 99}, "path": {"version": "../../etc"}, "scans": {"scans": 7}}[what]
        (folder / "current.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("byte", "found embeddings.safetensors changed or cut"),
        ("metadata byte", "found metadata.parquet changed or cut"),
        ("cut", "found embeddings.safetensors changed or cut"),
        ("gone", "found no embeddings.safetensors"),
        ("metadata gone", "found no metadata.parquet"),
        ("no manifest", "found no current.json"),
        ("format", "found format 99, expected 1"),
        ("path", "found a current.json that is none"),
        ("scans", r"expected \(7, 32\) float16"),
    ],
)
def test_what_is_damaged_is_refused_in_words(index: RetrievalIndex, tmp_path: Path, what: str, message: str) -> None:
    index.save(tmp_path / "gallery")
    damage(tmp_path / "gallery", what)
    with pytest.raises(IndexFormatError, match=message):
        RetrievalIndex.load(tmp_path / "gallery", FACTS)


def test_another_model_s_index_is_refused(index: RetrievalIndex, tmp_path: Path) -> None:
    index.save(tmp_path)
    other = ModelFacts("m3ret-tiny", "f" * 40, FACTS.processor)
    with pytest.raises(IndexFormatError, match="expected those of"):
        RetrievalIndex.load(tmp_path, other)
    assert len(RetrievalIndex.load(tmp_path)) == 600  # who does not say, is not asked


def test_a_faiss_file_from_elsewhere_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with a manifest of its own either: the signature needs this machine's secret. It is built anew."""
    import faiss

    RetrievalIndex.build(embeddings(), metadata(), FACTS, "ivf").save(tmp_path / "gallery")
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
sys.path[:0] = [{root!r}, {root!r} + "/tests/retrieval"]
from pathlib import Path
from test_index import FACTS, embeddings, metadata
from modeling_m3ret.search import index
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(index, {step!r}, die)
index.RetrievalIndex.build(embeddings(50), metadata(50), FACTS).save(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("step", ["save_file", "sha256_of", "sync", "atomic_write_text"])
def test_a_save_that_is_killed_leaves_the_old_index(index: RetrievalIndex, tmp_path: Path, step: str) -> None:
    index.save(tmp_path / "gallery")
    script = tmp_path / "save_and_die.py"
    script.write_text(SAVE_AND_DIE.format(root=str(ROOT), step=step))
    died = Script([str(script), str(tmp_path / "gallery")], tmp_path).finish()
    assert died == -signal.SIGKILL
    assert len(RetrievalIndex.load(tmp_path / "gallery", FACTS)) == 600
    index.remove(["id-0"]).save(tmp_path / "gallery")  # and what the killed one left goes with the next save
    assert len(RetrievalIndex.load(tmp_path / "gallery", FACTS)) == 599
    assert len(list((tmp_path / "gallery").glob("version-*"))) == 1


def test_the_file_holds_what_the_index_does(index: RetrievalIndex, tmp_path: Path) -> None:
    index.save(tmp_path)
    stored = load_file(next(tmp_path.glob("version-*")) / "embeddings.safetensors")["embeddings"]
    directions = torch.nn.functional.normalize(embeddings(), dim=1)
    assert (stored.float() - directions).abs().max() < 2**-11


def test_the_latest_filters_are_remembered_and_many_threads_may_ask(index: RetrievalIndex) -> None:
    """More filters than are kept, by threads at once: each gets its own rows, and no more than eight stay."""
    wanted = [MetadataFilter(excluded_patients=[f"patient-{number}"]) for number in range(40)]

    def ask(number: int) -> set[int]:
        return set(index.search(embeddings()[:1], k=600, where=wanted[number % 40]).rows[0].tolist())

    with ThreadPoolExecutor(8) as threads:
        for number, rows in enumerate(threads.map(ask, range(400))):
            assert rows - {-1} == {row for row in range(600) if row // 3 != number % 40}
    ask(0)
    assert len(index._filters) <= FILTERS_KEPT
    for number in (1, 2, 0):  # few are all kept
        ask(number)
    assert {wanted[number] for number in (0, 1, 2)} <= index._filters.keys()


def test_filters_are_remembered_within_a_bound_of_bytes(index: RetrievalIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 200 rows of 64 + 8 bytes: two fit, and what is larger than all is searched all the same."""
    monkeypatch.setattr("modeling_m3ret.search.index.FILTERS_KEPT_BYTES", 30_000)
    monkeypatch.setattr("modeling_m3ret.search.index.GATHERED", 1.0)
    for turn in range(2):
        for name, residue in (("ct", 0), ("xray", 1), ("mri", 2)):
            rows = index.search(embeddings()[:1], 600, where=MetadataFilter(modality=[name])).rows[0]
            assert set(rows.tolist()) - {-1} == {n for n in range(600) if n % 3 == residue}
            assert sum(part.nbytes for part in index._filters.values()) <= 30_000
        assert len(index._filters) == 2
        assert (index.search(embeddings()[:1], 600, where=MetadataFilter(anatomy=["chest", "head"])).rows >= 0).all(), (
            turn
        )
        assert len(index._filters) == 2  # and nothing left for it
        large = index.search(embeddings()[:1], 600, where=MetadataFilter(modality=["ct", "mri"])).rows[0]
        assert set(large.tolist()) - {-1} == {n for n in range(600) if n % 3 != 1}
        assert sum(part.nbytes for part in index._filters.values()) <= 30_000
