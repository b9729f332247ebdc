"""The scripts as a user runs them: phantom in, checkpoint and tables out, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import Script
from transformers import AutoImageProcessor, AutoModel

from modeling_m3ret.data.collection import read_manifest
from modeling_m3ret.phantom.dataset import write_phantom


ROOT = Path(__file__).parents[1]
SMALL_RUN = {
    "preset": "vitt",
    "model": "{num_hidden_layers: 2}",
    "size": 48,
    "num_frames": 8,
    "steps": 4,
    "batch_size": 4,
    "views_per_decode": 2,
    "holdout": 0.5,
    "num_workers": 1,
    "log_every": 2,
}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("data") / "phantom", subjects=24, workers=2)


def refused_by_train(options: list[str], cwd: Path) -> str:
    ran = Script([str(ROOT / "train.py"), *options], cwd, ACCELERATE_USE_CPU="true")
    assert ran.finish() == 1
    return ran.printed


def words_of(data: Path, **overrides: object) -> list[str]:
    settings = SMALL_RUN | {"data": data, "output_dir": "m3ret-tiny", "run_dir": "runs/tiny"} | overrides
    return [str(ROOT / "train.py"), *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def launch(folder: Path, options: list[str], words: list[str]) -> str:
    """As from a shell, `accelerate launch`: what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_train_ends_with_a_checkpoint_and_a_table(
    tmp_path: Path, phantom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = launch(tmp_path, [], words_of(phantom, report_to="tensorboard", save_every=2))
    for word in ("| ct", "| mri", "all modalities", "across modalities", "untrained", "pixels", "chance"):
        assert word in printed
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(0 < line["loss"] < 3 for line in lines)
    assert list((tmp_path / "runs/tiny").rglob("events.out.tfevents*"))
    facts = json.loads((tmp_path / "m3ret-tiny/training.json").read_text())
    assert facts["modalities"] == ["ct", "endoscopy", "ultrasound", "xray"]
    assert facts["unseen_modalities"] == ["mri"]
    assert facts["views"] == 4 * 4 * 2
    for text in ("README.md", "training.json", "config.json", "preprocessor_config.json"):
        assert str(tmp_path) not in (tmp_path / "m3ret-tiny" / text).read_text()

    monkeypatch.chdir(tmp_path)
    model, processor = AutoModel.from_pretrained("m3ret-tiny"), AutoImageProcessor.from_pretrained("m3ret-tiny")
    sources = [next(r.location for r in read_manifest(phantom) if r.modality == m) for m in ("ct", "xray", "endoscopy")]
    with torch.no_grad():
        features = model.get_image_features(**processor(sources, return_tensors="pt"))
    assert features.shape == (3, 192)

    options = {"--data": str(phantom), "--holdout": "0.5", "--output": "table", "--rerank": "5"}
    words = [word for option in options.items() for word in option]
    models = ["--model", "m3ret-tiny", "runs/tiny/checkpoints/step-000002"]
    evaluation = Script([str(ROOT / "eval_retrieval.py"), *models, *words], tmp_path)
    assert evaluation.finish() == 0, evaluation.printed
    evaluated = evaluation.printed

    # the same patients, the same scores as at the end of training, of the untrained encoder too
    assert rows_of("trained", printed)
    assert rows_of("m3ret-tiny", evaluated) == rows_of("trained", printed)
    assert rows_of("untrained, whitened", evaluated) == rows_of("untrained, whitened", printed)
    assert rows_of("step-000002", evaluated)
    assert rows_of("m3ret-tiny, re-ranked 5", evaluated)
    assert rows_of("untrained, whitened, re-ranked 5", evaluated)
    assert "LEAK" not in evaluated
    assert json.loads((tmp_path / "table" / "metrics.json").read_text())["not_read"] == 0
    report = (tmp_path / "table" / "report.md").read_text()
    assert "(precision_recall.png)" in report
    assert "training steps, checkpoints: 2 " in report  # the curve, from each checkpoint's training.json
    assert "views seen in training, checkpoints: 16 " in report
    assert f"whitening is fitted to {facts['training_scans']} scans" in report
    assert str(phantom) not in report
    assert not (tmp_path / "table" / "examples.png").exists()


def rows_of(method: str, text: str) -> list[list[str]]:
    """A method's numbers, row by row."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return [row[2:] for row in rows if row[1] == method]


@pytest.mark.parametrize("objective", ["mae", "simdino"])
def test_two_processes_train_together(tmp_path: Path, phantom: Path, objective: str) -> None:
    words = words_of(phantom, batch_size=2, objective=objective, local_views=3, local_size=32)
    if objective == "mae":
        printed = launch(tmp_path, ["--config_file", str(ROOT / "configs/accelerate/cpu_2_processes.yaml")], words)
    else:
        script = Script(words, tmp_path, 2, ACCELERATE_USE_CPU="true")
        assert script.finish() == 0, script.printed
        printed = script.printed
    assert "all modalities" in printed
    facts = json.loads((tmp_path / "m3ret-tiny/training.json").read_text())
    views = 2 if objective == "mae" else 2 + 3
    assert facts["views"] == 4 * 2 * views * 2  # steps x scans x views x processes
    last = json.loads((tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()[-1])
    config = json.loads((tmp_path / "m3ret-tiny/config.json").read_text())
    if objective == "simdino":
        assert -1.45 <= last["loss"] == pytest.approx(-last["compression"] - 0.45 * last["expansion_share"], abs=1e-5)
        assert config["pooling"] == "cls"
        assert (tmp_path / "m3ret-tiny/pretraining/simdino.safetensors").is_file()
    else:
        assert config["pooling"] == "mean"
        assert (tmp_path / "m3ret-tiny/pretraining/model.safetensors").is_file()


def test_a_wrong_word_ends_in_one_clear_line(tmp_path: Path) -> None:
    assert "nowhere: found no manifest.csv" in refused_by_train(["--data", "nowhere"], tmp_path)
    assert not list(tmp_path.glob("m3ret-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--report_to", "comet_ml"], "needs `pip install comet_ml`"),
        (["--output_dir", "results"], "results: found something else there"),
        (["--learning_rate", "1e30", "--gradient_clip", "1e30"], "not finite"),
    ],
)
def test_what_would_end_badly_ends_early(tmp_path: Path, phantom: Path, options: list[str], message: str) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "years_of_work.txt").write_text("kept")
    words = [word for key, value in (SMALL_RUN | {"data": phantom}).items() for word in (f"--{key}", str(value))]
    assert message in refused_by_train([*words, *options], tmp_path)
    assert (tmp_path / "results" / "years_of_work.txt").read_text() == "kept"
    assert not list(tmp_path.glob("m3ret-*"))
