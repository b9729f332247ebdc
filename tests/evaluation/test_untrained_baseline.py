"""The untrained baseline: random weights with the whitening that training would fit, on any number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from processes import Script

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret.data.collection import Record
from modeling_m3ret.evaluation.untrained_baseline import WHITENING_SCANS, build_untrained_baseline, whitening_sample
from modeling_m3ret.pretraining.quality import OnlineQuality
from modeling_m3ret.search import embedding_store
from modeling_m3ret.search.embedding import embed_records, encoder_embedder, pooled_embedder


ROOT = Path(__file__).parents[2]
PROCESSOR = M3RetImageProcessor(size=32, num_frames=8)


@pytest.fixture(autouse=True)
def _temporary_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_store, "CACHE_FOLDER", tmp_path / "hf" / "m3ret")


def scans(folder: Path, count: int) -> list[Record]:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        np.save(folder / f"{number}.npy", generator.random((1 + 7 * (number % 2), 40, 40), dtype=np.float32))
    return records_of(folder)


def records_of(folder: Path) -> list[Record]:
    files = sorted(folder.iterdir(), key=lambda file: int(file.stem))
    return [Record(file.stem, file, ("xray", "ct")[n % 2], "", "", f"p{n}") for n, file in enumerate(files)]


def test_whitening_is_fitted_to_training_scans_as_in_training(tmp_path: Path) -> None:
    records = scans(tmp_path / "scans", 30)
    training, evaluated = records[:24], records[24:]
    encoder, title, note, whitening_records = build_untrained_baseline(
        tiny_config(), PROCESSOR, training, Accelerator(cpu=True), seed=3
    )
    assert whitening_records == training
    assert title == "untrained, whitened"
    assert "24" in note
    torch.manual_seed(3)
    bare = M3RetModel(tiny_config()).eval()
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), bare.parameters(), strict=True))
    pooled = embed_records([pooled_embedder(bare)], PROCESSOR, training, progress=False)[0].embeddings
    assert encoder.whitening(pooled).mean(0).abs().max() <= 1e-3
    assert encoder.whitening(pooled).std(0).max() > 0.9  # 1 / sqrt(1.01) in the strongest direction
    OnlineQuality(training, [], PROCESSOR, Accelerator(cpu=True)).fit_whitening(bare)
    baseline, expected = embed_records(
        [encoder_embedder(encoder), encoder_embedder(bare)], PROCESSOR, evaluated, progress=False
    )
    # compare cosines: directions without variance are arbitrary
    cosines = [embedded.embeddings @ embedded.embeddings.T for embedded in (baseline, expected)]
    assert (cosines[0] - cosines[1]).abs().max() <= 1e-3
    assert (cosines[0] - 1).abs().max() > 0.1


@pytest.mark.parametrize("known", [True, False])
def test_without_readable_training_scans_it_is_not_whitened(known: bool, tmp_path: Path) -> None:
    training = [Record("x", tmp_path / "missing.npy", "ct", "", "", "p")] if known else []
    baseline = build_untrained_baseline(tiny_config(), PROCESSOR, training, Accelerator(cpu=True))
    assert baseline.whitening_records == []
    assert baseline.title == "untrained"
    assert torch.equal(baseline.encoder.whitening.matrix, torch.eye(48))
    assert not baseline.encoder.whitening.mean.any()


@pytest.mark.parametrize("count", [0, 1, WHITENING_SCANS, WHITENING_SCANS + 1, 5000])
def test_the_whitening_sample_is_bounded_and_the_same_in_training(count: int) -> None:
    records = [Record(f"{n}", Path("x"), ("xray", "ct")[n % 2], "", "", f"p{n}") for n in range(count)]
    sample = whitening_sample(records)
    assert min(count, WHITENING_SCANS // 2) <= len(sample) <= WHITENING_SCANS
    quality = OnlineQuality(records, [], PROCESSOR, Accelerator(cpu=True))
    assert quality.training.records == sample


PROCESS = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/evaluation"]
from pathlib import Path
import torch
from accelerate import Accelerator
from conftest import tiny_config
from test_untrained_baseline import PROCESSOR, records_of
from modeling_m3ret.search import embedding_store
from modeling_m3ret.evaluation.untrained_baseline import build_untrained_baseline
embedding_store.CACHE_FOLDER, embedding_store.SHARD_SCANS = Path(sys.argv[2]), 4
accelerator = Accelerator(cpu=True)
encoder = build_untrained_baseline(tiny_config(), PROCESSOR, records_of(Path(sys.argv[1])), accelerator).encoder
torch.save(encoder.state_dict(), sys.argv[3] + str(accelerator.process_index))
"""


@pytest.mark.slow
def test_two_processes_get_the_same_encoder_as_one(tmp_path: Path) -> None:
    records = scans(tmp_path / "scans", 10)
    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(root=str(ROOT)))
    argv = [str(script), *(str(tmp_path / name) for name in ("scans", "of_two", "encoder"))]
    ran = Script(argv, tmp_path, 2, ACCELERATE_USE_CPU="true")
    assert ran.finish() == 0, ran.printed
    first, second = (torch.load(tmp_path / f"encoder{rank}") for rank in (0, 1))
    alone = build_untrained_baseline(tiny_config(), PROCESSOR, records, Accelerator(cpu=True)).encoder.state_dict()
    assert first.keys() == alone.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name])
    assert torch.allclose(first["whitening.mean"], alone["whitening.mean"], atol=1e-5)
    assert not torch.equal(first["whitening.matrix"], torch.eye(48))
