"""Cached embeddings: independent of the number of processes, resumed after a kill, and never another model's."""

from __future__ import annotations

import io
import json
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from processes import Script
from tqdm import tqdm

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret.data.collection import Record
from modeling_m3ret.model_facts import model_facts
from modeling_m3ret.search import embedding_store
from modeling_m3ret.search.embedding import embed_records, encoder_embedder, pooled_embedder
from modeling_m3ret.search.embedding_store import embed_collection, fingerprint


ROOT = Path(__file__).parents[2]
PROCESSOR = M3RetImageProcessor(size=32, num_frames=8)


def make_model(seed: int = 0, **overrides: object) -> M3RetModel:
    torch.manual_seed(seed)
    return M3RetModel(tiny_config(**overrides)).eval()


def make_whitened() -> M3RetModel:
    encoder = make_model()
    encoder.whitening.fit(torch.randn(100, 48))
    return encoder


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Twelve volumes of two sizes, the sixth unreadable."""
    made = []
    for number in range(12):
        path = tmp_path / "scans" / f"{number}.npy"
        path.parent.mkdir(exist_ok=True)
        depth = 4 if number % 2 else 9
        np.save(path, np.random.default_rng(number).integers(0, 255, (depth, 40, 36), dtype=np.uint8))
        made.append(Record(f"id-{number}", path, "ct", "chest", "l", f"p{number}"))
    made[5].location.write_bytes(b"damaged")  # type: ignore[union-attr]
    return made


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_store, "SHARD_SCANS", 5)


def test_cached_embeddings_are_those_of_a_plain_run(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = embed_records([encoder_embedder(make_model())], PROCESSOR, records, progress=False)[0]
    settings = {"name": "m3ret-tiny", "folder": tmp_path / "cache"}
    first = embed_collection(make_model(), PROCESSOR, records, Accelerator(cpu=True), **settings)
    assert torch.allclose(first.embeddings, expected.embeddings, atol=1e-6)
    assert first.records == expected.records == [*records[:5], *records[6:]]
    assert len(first.failures) == len(expected.failures) == 1
    assert records[5].id in first.failures[0]

    class EmbeddedAgainError(Exception):
        pass

    def refuse(*arguments: object, **options: object) -> None:
        raise EmbeddedAgainError

    monkeypatch.setattr(embedding_store, "embed_batches", refuse)
    for name in ("m3ret-tiny", "step-000100"):  # the name of the checkpoint does not matter
        cached = embed_collection(make_model(), PROCESSOR, records, Accelerator(cpu=True), **settings | {"name": name})
        assert torch.equal(cached.embeddings, first.embeddings)
        assert (cached.records, cached.failures) == (first.records, first.failures)
    same_weights = make_model(pooling="cls")
    assert all(torch.equal(a, b) for a, b in zip(same_weights.parameters(), make_model().parameters(), strict=True))
    for other in (
        {"model": make_model(seed=1)},
        {"model": same_weights},
        {"model": make_model(num_attention_heads=2)},
        {"model": make_whitened()},
        {"pooled": True},
        {"processor": M3RetImageProcessor(size=48, num_frames=8)},
        {"records": records[:-1]},
        {"dtype": torch.bfloat16},
    ):
        changed = {"model": make_model(), "processor": PROCESSOR, "records": records} | other
        with pytest.raises(EmbeddedAgainError):
            embed_collection(accelerator=Accelerator(cpu=True), **changed, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("computed_before", [0, 12])
def test_bar_of_a_job_counts_each_scan_once(records: list[Record], tmp_path: Path, computed_before: int) -> None:
    """It is shared by two collections of 12 scans in 3 shards, one unreadable; the first may be cached."""
    embed = partial(embed_collection, make_model(), PROCESSOR, name="m", folder=tmp_path / "cache")
    embed(records[:computed_before], Accelerator(cpu=True))
    with tqdm(total=24, file=io.StringIO()) as bar:
        counts = []
        for batch in (records, records[::-1]):
            embed(batch, Accelerator(cpu=True), bar=bar)
            counts.append(bar.n)
        assert not bar.disable
    assert counts == [12, 24]


def test_cache_holds_no_names_of_scans(records: list[Record], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    embed_collection(make_model(), PROCESSOR, records, Accelerator(cpu=True), name="m", folder=cache)
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert len(files) == 3
    for path in files:
        content = path.read_bytes()
        for name in ("5.npy", "id-5", "id-4", str(tmp_path)):
            assert name.encode() not in content


def test_pooled_features_are_not_whitened(records: list[Record], tmp_path: Path) -> None:
    expected = embed_records([pooled_embedder(make_model())], PROCESSOR, records, progress=False)[0].embeddings
    cached = embed_collection(
        make_whitened(), PROCESSOR, records, Accelerator(cpu=True), name="m", folder=tmp_path / "cache", pooled=True
    )
    assert torch.allclose(cached.embeddings, expected, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_collection_without_readable_scans_has_no_embeddings(tmp_path: Path, count: int) -> None:
    missing = [Record("x", tmp_path / "x.npy", "ct", "", "", "p")][:count]
    cached = embed_collection(
        make_model(), PROCESSOR, missing, Accelerator(cpu=True), name="m", folder=tmp_path / "cache"
    )
    assert (len(cached.embeddings), cached.records, len(cached.failures)) == (0, [], count)


def test_fingerprint_changes_with_a_file(records: list[Record]) -> None:
    before = fingerprint(records)
    assert fingerprint(records) == before
    np.save(records[3].location, np.zeros((4, 40, 36), np.uint8))  # type: ignore[arg-type]
    assert fingerprint(records) != before


def test_model_facts_do_not_depend_on_the_folder(tmp_path: Path) -> None:
    first = make_model()
    first.save_pretrained(tmp_path / "here" / "m3ret-tiny")
    loaded = M3RetModel.from_pretrained(tmp_path / "here" / "m3ret-tiny")
    facts = model_facts(first, PROCESSOR, "m3ret-tiny")
    assert model_facts(loaded, PROCESSOR, str(tmp_path / "here" / "m3ret-tiny")) == facts
    assert str(tmp_path) not in json.dumps(facts.__dict__)
    with torch.no_grad():
        next(loaded.parameters()).view(-1)[0] += 1e-3
    assert model_facts(loaded, PROCESSOR, "m3ret-tiny").revision != facts.revision


def test_bfloat16_changes_directions_little(records: list[Record], tmp_path: Path) -> None:
    full, half = (
        embed_collection(
            make_model(), PROCESSOR, records, Accelerator(cpu=True), name="m", folder=tmp_path / "cache", dtype=dtype
        ).embeddings
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert not torch.equal(full, half)
    assert (full * half).sum(1).min() > 0.99


PROCESS = """
import os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/search"]
from pathlib import Path
import torch
from accelerate import Accelerator
from test_embedding_store import PROCESSOR, make_model
from modeling_m3ret.data.collection import Record
from modeling_m3ret.search import embedding_store
embedding_store.SHARD_SCANS = 5
paths = sorted(Path(sys.argv[1]).iterdir(), key=lambda path: int(path.stem))
records = [Record(f"id-{{path.stem}}", path, "ct", "chest", "l", f"p{{path.stem}}") for path in paths]
atomic_write, written = embedding_store.atomic_write, []
def die_in_the_second(path):
    if sys.argv[3] == "die" and written:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path)
    return atomic_write(path)
embedding_store.atomic_write = die_in_the_second
accelerator = Accelerator(cpu=True)
torch.set_num_threads(1)
settings = {{"name": "m3ret-tiny", "folder": Path(sys.argv[2])}}
embedded = embedding_store.embed_collection(make_model(), PROCESSOR, records, accelerator, **settings)
if accelerator.is_main_process:
    torch.save([embedded.embeddings, [record.id for record in embedded.records]], sys.argv[4])
"""


@pytest.mark.slow
def test_result_does_not_depend_on_processes_or_a_kill(records: list[Record], tmp_path: Path) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(root=str(ROOT)))
    scans = str(records[0].location.parent)  # type: ignore[union-attr]

    def run(ranks: int, folder: str, end: str, result: str) -> int:
        argv = [str(script), scans, str(tmp_path / folder), end, str(tmp_path / result)]
        return Script(argv, tmp_path, ranks, ACCELERATE_USE_CPU="true").finish()

    assert run(1, "one", "live", "one.pt") == 0
    assert run(2, "two", "live", "two.pt") == 0
    assert run(1, "killed", "die", "none.pt") == -signal.SIGKILL
    assert len(list((tmp_path / "killed").rglob("*.safetensors"))) == 1  # the first shard
    assert run(1, "killed", "live", "resumed.pt") == 0
    one, two, resumed = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two", "resumed"))
    assert len(one[1]) == 11
    for other in (two, resumed):
        assert torch.equal(other[0], one[0])
        assert other[1] == one[1]
