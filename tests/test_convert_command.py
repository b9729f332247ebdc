"""Test `m3ret convert`, and the commands that take a published 2D encoder in place of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from test_cli import run as m3ret
from training_runs import ROOT, assert_same_tensors, command, run, write_scans
from vit_sources import IMAGENET, save_source

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret.convert import convert_vit
from modeling_m3ret.data.collection import open_collection
from modeling_m3ret.hub import load_pretrained
from modeling_m3ret.search.embedding import embed_records, pooled_embedder


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scans(tmp_path_factory.mktemp("scans"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_source("dinov2", tmp_path / "dinov2-tiny")
    (tmp_path / "dinov2-tiny" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    return tmp_path / "dinov2-tiny"


def test_the_checkpoint_is_the_converted_source(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert m3ret(monkeypatch, "convert", source, tmp_path / "out") == 0
    (ours, processor), (theirs, same) = load_pretrained(tmp_path / "out"), convert_vit(str(source))
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    assert processor.to_dict().items() >= same.to_dict().items()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    assert "dinov2-tiny" in card.text
    assert str(tmp_path) not in card.text + (tmp_path / "out" / "config.json").read_text()


def test_whitening_is_fitted_to_the_scans(
    source: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--fit_whitening", scans, "--pooling", "statistics")
    assert m3ret(monkeypatch, "convert", source, tmp_path / "out", *options) == 0
    ours, processor = load_pretrained(tmp_path / "out")
    assert ours.config.pooling == "statistics"
    expected, _ = convert_vit(str(source), pooling="statistics")
    (pooled,) = embed_records([pooled_embedder(expected)], processor, open_collection(str(scans)), progress=False)
    expected.whitening.fit(pooled.embeddings)
    torch.testing.assert_close(ours.whitening.mean, expected.whitening.mean)
    # directions of almost no variance, and signs of directions, depend on rounding
    one, other = (model.whitening.matrix.T @ model.whitening.matrix for model in (ours, expected))
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * float(other.abs().max()))


def test_wrong_arguments_are_one_line_and_write_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for wrong in (
        (tmp_path / "missing", tmp_path / "out"),
        (source, tmp_path / "full"),
        (source, tmp_path / "out", "--fit_whitening", tmp_path / "missing"),
    ):
        assert m3ret(monkeypatch, "convert", *wrong) == 2
        assert "m3ret convert: error: " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_embed_converts_the_source_in_memory(
    source: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataset_scripts.builder.CACHE_FOLDER", tmp_path / "cache")
    monkeypatch.setattr("modeling_m3ret.search.embedding_store.CACHE_FOLDER", tmp_path / "cache")
    assert m3ret(monkeypatch, "convert", source, tmp_path / "out") == 0
    vectors = []
    for model in (source, tmp_path / "out"):
        output = tmp_path / f"{model.name}.parquet"
        options = ("--model", model, "-o", output, "--num_workers", 0)
        assert m3ret(monkeypatch, "embed", scans, *options) == 0
        vectors.append(torch.tensor(pq.read_table(output)["vector"].to_pylist()))
    assert vectors[0].shape == (30, 32)
    torch.testing.assert_close(*vectors)


@pytest.mark.slow
def test_training_from_a_source_stops_resumes_and_states_where_it_began(
    source: Path, scans: Path, tmp_path: Path
) -> None:
    """The resumed run takes the architecture from its own checkpoint; the source is not needed any more."""
    script, settings = ROOT / "train.py", {"objective": "simdino", "model": "{drop_path_rate: 0.1}", "steps": 5}
    settings |= {"save_every": 1, "keep_last": 9, "freeze_layers": 1, "layer_decay": 0.8}
    run(command(script, scans, "whole", **settings, initial=source), tmp_path)
    run(command(script, scans, "halves", **settings, initial=source, stop_after=2), tmp_path)
    source.rename(tmp_path / "elsewhere")
    run([*command(script, scans, "halves", **settings), "--resume"], tmp_path)
    for step in (2, 5):
        name = f"checkpoints/step-{step:06d}"
        assert_same_tensors(tmp_path / "run-whole" / name, tmp_path / "run-halves" / name)
    trained = M3RetModel.from_pretrained(tmp_path / "m3ret-halves")
    assert (trained.config.converted_from, trained.config.position_grid) == ("dinov2-tiny", [8, 4, 4])
    published, _ = convert_vit(str(tmp_path / "elsewhere"))
    ours, theirs = trained.state_dict(), published.state_dict()
    frozen = [key for key in ours if key.startswith(("embeddings.", "encoder.layers.0."))]
    assert all(torch.equal(ours[key], theirs[key]) for key in frozen)
    assert not torch.equal(ours["norm.weight"], theirs["norm.weight"])
    assert M3RetImageProcessor.from_pretrained(tmp_path / "m3ret-halves").image_mean == IMAGENET["image_mean"]
    card = ModelCard.load(tmp_path / "m3ret-halves" / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    assert "dinov2-tiny" in card.text
    assert json.loads((tmp_path / "m3ret-halves" / "training.json").read_text())["preset"] == "initial"


@pytest.mark.slow
def test_evaluation_and_fine_tuning_take_a_source(source: Path, scans: Path, tmp_path: Path) -> None:
    words = [str(ROOT / "eval_retrieval.py"), "--model", str(source), "--data", str(scans), "--output", "result"]
    assert "dinov2-tiny" in run([*words, "--baselines", str(source)], tmp_path)
    words = [str(ROOT / "fine_tune.py"), "--model", str(source), "--data", str(scans), "--method", "lora"]
    printed = run([*words, "--epochs", "1", "--output", "classifier"], tmp_path)
    assert '"method": "lora"' in printed
    assert M3RetModel.from_pretrained(tmp_path / "classifier").config.converted_from == "dinov2-tiny"
