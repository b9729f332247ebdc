"""Embeddings kept on disk: the same from one process or two, after a cut, and never another model's."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from processes import Script

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret.data.collection import Record
from modeling_m3ret.model_facts import model_facts
from modeling_m3ret.search import embedding_store
from modeling_m3ret.search.embedding import embed_records, encoder_embedder, pooled_embedder
from modeling_m3ret.search.embedding_store import embed_collection, fingerprint


ROOT = Path(__file__).parents[2]
PROCESSOR = M3RetImageProcessor(size=32, num_frames=8)


def model(seed: int = 0, **overrides: object) -> M3RetModel:
    torch.manual_seed(seed)
    return M3RetModel(tiny_config(**overrides)).eval()


def whitened() -> M3RetModel:
    encoder = model()
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
    made[5].location.write_bytes(b"cut")  # type: ignore[union-attr]
    return made


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_store, "SHARD_SCANS", 5)


def test_kept_embeddings_are_those_of_a_plain_run_and_are_not_made_twice(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = embed_records([encoder_embedder(model())], PROCESSOR, records, progress=False)[0]
    settings = {"name": "m3ret-tiny", "folder": tmp_path / "kept"}
    first = embed_collection(model(), PROCESSOR, records, Accelerator(cpu=True), **settings)
    assert torch.allclose(first.embeddings, expected.embeddings, atol=1e-6)
    assert first.records == expected.records
    assert len(first.records) == 11
    assert first.failures == expected.failures
    assert "5.npy" in first.failures[0]

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr(embedding_store, "embed_records", refuse)
    again = embed_collection(model(), PROCESSOR, records, Accelerator(cpu=True), **settings)
    assert torch.equal(again.embeddings, first.embeddings)
    assert (again.records, again.failures) == (first.records, first.failures)
    renamed = embed_collection(model(), PROCESSOR, records, Accelerator(cpu=True), **settings | {"name": "step-000100"})
    assert torch.equal(renamed.embeddings, first.embeddings)
    same_weights = model(pooling="cls")
    assert all(torch.equal(a, b) for a, b in zip(same_weights.parameters(), model().parameters(), strict=True))
    for other in (
        {"model": model(seed=1)},
        {"model": same_weights},
        {"model": model(num_attention_heads=2)},
        {"model": whitened()},
        {"pooled": True},
        {"processor": M3RetImageProcessor(size=48, num_frames=8)},
        {"records": records[:-1]},
        {"dtype": torch.bfloat16},
    ):
        changed = {"model": model(), "processor": PROCESSOR, "records": records} | other
        with pytest.raises(AssertionError, match="embedded again"):
            embed_collection(accelerator=Accelerator(cpu=True), **changed, **settings)  # type: ignore[arg-type]


def test_pooled_features_are_kept_as_they_are_before_whitening(records: list[Record], tmp_path: Path) -> None:
    expected = embed_records([pooled_embedder(model())], PROCESSOR, records, progress=False)[0].embeddings
    kept = embed_collection(
        whitened(), PROCESSOR, records, Accelerator(cpu=True), name="m", folder=tmp_path / "kept", pooled=True
    )
    assert torch.allclose(kept.embeddings, expected, atol=1e-5)


def test_a_collection_of_which_nothing_can_be_read_has_no_embeddings(tmp_path: Path) -> None:
    missing = [Record("x", tmp_path / "x.npy", "ct", "", "", "p")]
    kept = embed_collection(model(), PROCESSOR, missing, Accelerator(cpu=True), name="m", folder=tmp_path / "kept")
    assert (len(kept.embeddings), kept.records, len(kept.failures)) == (0, [], 1)


def test_a_file_that_changed_is_embedded_anew(records: list[Record]) -> None:
    before = fingerprint(records)
    assert fingerprint(records) == before
    np.save(records[3].location, np.zeros((4, 40, 36), np.uint8))  # type: ignore[arg-type]
    assert fingerprint(records) != before


def test_facts_are_those_of_the_weights_wherever_they_lie(tmp_path: Path) -> None:
    first = model()
    first.save_pretrained(tmp_path / "here" / "m3ret-tiny")
    loaded = M3RetModel.from_pretrained(tmp_path / "here" / "m3ret-tiny")
    facts = model_facts(first, PROCESSOR, "m3ret-tiny")
    assert model_facts(loaded, PROCESSOR, str(tmp_path / "here" / "m3ret-tiny")) == facts
    assert str(tmp_path) not in json.dumps(facts.__dict__)
    with torch.no_grad():
        next(loaded.parameters()).view(-1)[0] += 1e-3
    assert model_facts(loaded, PROCESSOR, "m3ret-tiny").revision != facts.revision


def test_bfloat16_gives_nearly_the_same_directions(records: list[Record], tmp_path: Path) -> None:
    full, half = (
        embed_collection(
            model(), PROCESSOR, records, Accelerator(cpu=True), name="m", folder=tmp_path / "kept", dtype=dtype
        ).embeddings
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert not torch.equal(full, half)
    assert (full * half).sum(1).min() > 0.99


PROCESS = """
import os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/retrieval"]
from pathlib import Path
import torch
from accelerate import Accelerator
from test_embedding_store import PROCESSOR, model
from modeling_m3ret.data.collection import Record
from modeling_m3ret.model_facts import model_facts
from modeling_m3ret.search import embedding_store
embedding_store.SHARD_SCANS = 5
places = sorted(Path(sys.argv[1]).iterdir(), key=lambda path: int(path.stem))
records = [Record(f"id-{{p.stem}}", p, "ct", "chest", "l", f"p{{p.stem}}") for p in places]
write = embedding_store.write_shard
def die_in_the_second(place, *arguments):
    if sys.argv[3] == "die" and place.name.startswith("000000005"):
        os.kill(os.getpid(), signal.SIGKILL)
    write(place, *arguments)
embedding_store.write_shard = die_in_the_second
accelerator = Accelerator(cpu=True)
torch.set_num_threads(1)
settings = {{"name": "m3ret-tiny", "folder": Path(sys.argv[2])}}
embedded = embedding_store.embed_collection(model(), PROCESSOR, records, accelerator, **settings)
if accelerator.is_main_process:
    torch.save([embedded.embeddings, [record.id for record in embedded.records]], sys.argv[4])
"""


def test_two_processes_and_a_run_that_was_killed_give_the_same(records: list[Record], tmp_path: Path) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(root=str(ROOT)))
    scans = str(records[0].location.parent)  # type: ignore[union-attr]

    def run(ranks: int, folder: str, what: str, result: str) -> int:
        words = [str(script), scans, str(tmp_path / folder), what, str(tmp_path / result)]
        return Script(words, tmp_path, ranks, ACCELERATE_USE_CPU="true").finish()

    assert run(1, "one", "live", "one.pt") == 0
    assert run(2, "two", "live", "two.pt") == 0
    assert run(1, "cut", "die", "none.pt") == -signal.SIGKILL
    assert len(list((tmp_path / "cut").rglob("*.safetensors"))) == 1  # the first shard
    assert run(1, "cut", "live", "cut.pt") == 0
    one, two, cut = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two", "cut"))
    assert len(one[1]) == 11
    for other in (two, cut):
        assert torch.equal(other[0], one[0])
        assert other[1] == one[1]
