"""`train.py` and `eval_retrieval.py` as a user runs them: from a phantom to a checkpoint and tables."""

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


pytestmark = pytest.mark.slow

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
    return write_phantom(tmp_path_factory.mktemp("data") / "phantom", subjects=16, workers=2)


def train_command(data: Path, **overrides: object) -> list[str]:
    settings = SMALL_RUN | {"data": data, "output_dir": "m3ret-tiny", "run_dir": "runs/tiny"} | overrides
    return [str(ROOT / "train.py"), *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def launch(folder: Path, options: list[str], words: list[str], fails: bool = False) -> str:
    """Run a script with `accelerate launch` from a shell, check whether it fails, and return its error output."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode != 0) == fails, ran.stdout + ran.stderr
    return ran.stderr


def scores_of(file: Path, method: str) -> dict[str, dict[str, float]]:
    """Return the scores of a method for each protocol, from a JSON file of rows."""
    rows = json.loads(file.read_text())["rows"]
    return {row["protocol"]: row["scores"] for row in rows if row["method"] == method}


def test_training_ends_with_a_checkpoint_whose_evaluation_gives_the_same_table(
    tmp_path: Path, phantom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(tmp_path, [], train_command(phantom, report_to="tensorboard", save_every=2))
    metrics = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics] == [2, 4]
    assert all(0 < entry["loss"] < 3 for entry in metrics)
    assert list((tmp_path / "runs/tiny").rglob("events.out.tfevents*"))
    facts = json.loads((tmp_path / "m3ret-tiny/training.json").read_text())
    assert facts["modalities"] == ["ct", "endoscopy", "ultrasound", "xray"]
    assert facts["unseen_modalities"] == ["mri"]
    assert facts["views"] == 4 * 4 * 2
    assert json.loads((tmp_path / "m3ret-tiny/config.json").read_text())["pooling"] == "mean"
    for text in ("README.md", "training.json", "config.json", "preprocessor_config.json"):
        assert str(tmp_path) not in (tmp_path / "m3ret-tiny" / text).read_text()

    monkeypatch.chdir(tmp_path)
    model, processor = AutoModel.from_pretrained("m3ret-tiny"), AutoImageProcessor.from_pretrained("m3ret-tiny")
    sources = [next(r.location for r in read_manifest(phantom) if r.modality == m) for m in ("ct", "xray", "endoscopy")]
    with torch.no_grad():
        features = model.embed_scans(**processor(sources, return_tensors="pt"))
    assert features.shape == (3, 192)

    options = {"--data": str(phantom), "--holdout": "0.5", "--output": "table", "--rerank": "5"}
    words = [word for option in options.items() for word in option]
    models = ["--model", "m3ret-tiny", "runs/tiny/checkpoints/step-000002"]
    evaluation = Script([str(ROOT / "eval_retrieval.py"), *models, *words, "--probe"], tmp_path)
    assert evaluation.finish() == 0, evaluation.printed

    trained, evaluated = tmp_path / "runs/tiny/retrieval.json", tmp_path / "table/metrics.json"
    assert scores_of(trained, "trained").keys() >= {"ct", "mri", "all modalities", "across modalities"}
    for method, name in (("trained", "m3ret-tiny"), ("untrained, whitened", "untrained, whitened")):
        for protocol, scores in scores_of(trained, method).items():
            found = scores_of(evaluated, name)[protocol]  # holds the probe, too
            assert {metric: found[metric] for metric in scores} == pytest.approx(scores, abs=5e-4)
    for method in ("step-000002", "m3ret-tiny, re-ranked 5", "untrained, whitened, re-ranked 5", "pixels", "chance"):
        assert scores_of(evaluated, method)
    for method in ("chance", "pixels", "untrained, whitened", "m3ret-tiny"):
        assert 0 < scores_of(evaluated, method)["all modalities"]["probe"] <= 1
    assert json.loads(evaluated.read_text())["not_read"] == 0
    assert "LEAK" not in evaluation.printed
    report = (tmp_path / "table" / "report.md").read_text()
    assert "(precision_recall.png)" in report
    assert str(phantom) not in report
    assert not (tmp_path / "table" / "examples.png").exists()


def test_two_processes_of_the_launcher_train_together(tmp_path: Path, phantom: Path) -> None:
    words = train_command(phantom, batch_size=2, objective="simdino", local_views=3, local_size=32)
    launch(tmp_path, ["--config_file", str(ROOT / "configs/accelerate/cpu_2_processes.yaml")], words)
    facts = json.loads((tmp_path / "m3ret-tiny/training.json").read_text())
    assert facts["views"] == 4 * 2 * (2 + 3) * 2  # steps x scans x views x processes
    last = json.loads((tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()[-1])
    assert -1.45 <= last["loss"] == pytest.approx(-last["compression"] - 0.45 * last["expansion_share"], abs=1e-5)
    assert json.loads((tmp_path / "m3ret-tiny/config.json").read_text())["pooling"] == "cls"
    assert (tmp_path / "m3ret-tiny/pretraining/simdino.safetensors").is_file()
    assert scores_of(tmp_path / "runs/tiny/retrieval.json", "trained")


def test_training_is_refused_if_the_launcher_starts_one_process_of_two(tmp_path: Path, phantom: Path) -> None:
    errors = launch(tmp_path, ["--cpu", "--num_processes", "2"], train_command(phantom), fails=True)
    assert "train.py: error: num_processes" in errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--data", "nowhere"],
        ["--report_to", "comet_ml"],
        ["--output_dir", "results"],
        ["--exclude_modalities", "[petct]"],
        ["--initial", "results"],
        ["--resume"],
    ],
)
def test_wrong_input_ends_in_one_line_with_code_2(tmp_path: Path, phantom: Path, options: list[str]) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "years_of_work.txt").write_text("unchanged")
    settings = SMALL_RUN | {"data": phantom}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    script = Script([str(ROOT / "train.py"), *words, *options], tmp_path, ACCELERATE_USE_CPU="true")
    assert script.finish() == 2, script.printed
    assert "Traceback" not in script.printed
    error = script.printed.splitlines()[-1]
    assert error.startswith("train.py: error: ")
    assert options[-1].strip("[]-") in error
    assert (tmp_path / "results" / "years_of_work.txt").read_text() == "unchanged"
    assert not list(tmp_path.glob("m3ret-*"))


def test_diverging_run_stops_without_a_checkpoint(tmp_path: Path, phantom: Path) -> None:
    words = train_command(phantom, learning_rate=1e30, gradient_clip=1e30)
    script = Script(words, tmp_path, ACCELERATE_USE_CPU="true")
    assert script.finish() == 1
    assert json.loads((tmp_path / "runs/tiny/not_finite.json").read_text())["ranks"][0]["not_finite"] == []
    assert not list(tmp_path.glob("m3ret-*"))
