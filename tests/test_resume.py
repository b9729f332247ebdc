"""Runs that are killed, stopped, resumed, not finite or collapsing, in processes of their own on generated scans."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import (
    NAN_IN_SCAN_10,
    ROOT,
    assert_same_tensors,
    command,
    finish,
    metrics_of,
    run,
    start,
    write_scans,
)
from transformers import AutoModel


pytestmark = pytest.mark.slow

TRAIN = ROOT / "train.py"
# train.py with SIGKILL in the middle of saving step 6, when its files are written but the folder is not renamed yet
KILLED_WHILE_SAVING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from modeling_m3ret import atomic_io
sync = atomic_io.sync
def kill(path):
    if ".step-000006." in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)
atomic_io.sync = kill
train.main()
"""


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scans(tmp_path_factory.mktemp("scans"))


@pytest.mark.parametrize(("objective", "ranks"), [("simdino", 1), ("mae", 2)])
def test_run_killed_while_saving_and_resumed_twice_equals_the_uninterrupted_run(
    tmp_path: Path, scans: Path, objective: str, ranks: int
) -> None:
    """The run is killed while saving step 6, resumed from 3 to 7 and from 7 to 12, each time with other workers."""
    killed = tmp_path / "killed.py"
    killed.write_text(KILLED_WHILE_SAVING.format(root=str(ROOT)))
    settings = {"objective": objective, "batch_size": 4 // ranks, "steps": 12}
    run(command(TRAIN, scans, "whole", **settings), tmp_path, ranks)

    code, _ = finish(command(killed, scans, "cut", **settings, num_workers=0), tmp_path, ranks)
    assert code == -signal.SIGKILL
    checkpoints = tmp_path / "run-cut" / "checkpoints"
    assert not (checkpoints / "step-000006").exists()
    (partial,) = checkpoints.glob(".step-000006.*.partial")
    assert (partial / "training_state" / "state.json").is_file()  # the checkpoint was complete except for its name
    printed = run(command(TRAIN, scans, "cut", **settings, num_workers=2, resume=True, stop_after=7), tmp_path, ranks)
    assert "step-000003" in printed
    assert json.loads((checkpoints / "step-000007" / "training.json").read_text())["whitened_at_step"] == 7
    assert not (tmp_path / "m3ret-cut").exists()
    run(command(TRAIN, scans, "cut", **settings, num_workers=1, resume=True), tmp_path, ranks)

    whole, cut = (tmp_path / f"run-{name}" / "checkpoints" / "step-000012" for name in ("whole", "cut"))
    assert_same_tensors(whole, cut)
    assert metrics_of(tmp_path / "run-whole") == metrics_of(tmp_path / "run-cut")
    assert [entry["step"] for entry in metrics_of(tmp_path / "run-cut")] == list(range(1, 13))
    retained = sorted(path.name for path in cut.parent.iterdir())
    best = json.loads((tmp_path / "run-cut" / "summary.json").read_text())["best_step"]
    assert retained == sorted({"step-000009", "step-000012", f"step-{best:06d}"})
    for checkpoint in retained:
        AutoModel.from_pretrained(cut.parent / checkpoint)


def test_sigterm_saves_a_checkpoint_that_only_the_same_run_can_continue(tmp_path: Path, scans: Path) -> None:
    words = command(TRAIN, scans, "stopped", objective="simdino", steps=100_000, evaluate_every=0, save_every=100_000)
    script = start(words, tmp_path)
    run_dir = tmp_path / "run-stopped"
    deadline = time.monotonic() + 600
    while len(metrics_of(run_dir)) < 3:
        assert script.is_running(), script.printed
        assert time.monotonic() < deadline
        time.sleep(0.1)
    script.stop()
    assert script.finish() == 0, script.printed
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert json.loads((checkpoint / "training.json").read_text())["whitened_at_step"] is None  # skipped on SIGTERM
    assert metrics_of(run_dir)[-1]["step"] == step
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["finished"], summary["step"]) == (False, step)

    code, printed = finish(words, tmp_path)
    assert code == 2
    assert all(option in printed for option in ("--resume", "--restart", checkpoint.name))
    changed = command(TRAIN, scans, "stopped", objective="simdino", steps=50, seed=3, precision="bf16", resume=True)
    code, printed = finish(changed, tmp_path)
    assert code == 2
    assert all(option in printed for option in ("precision", "seed", "steps"))
    assert "num_workers" not in printed
    assert checkpoint.is_dir()


def test_scan_with_nan_stops_the_run_before_the_step_and_is_reported(tmp_path: Path, scans: Path) -> None:
    script = tmp_path / "nan.py"
    script.write_text(NAN_IN_SCAN_10.format(root=str(ROOT)))
    code, printed = finish(command(script, scans, "nan", objective="mae+simdino", steps=12, holdout=0), tmp_path)
    assert code != 0
    assert "FloatingPointError" in printed
    report = json.loads((tmp_path / "run-nan" / "not_finite.json").read_text())
    assert report["ranks"][0]["not_finite"] == ["scan-10"]
    assert len(report["ranks"][0]["scans"]) == 4
    assert [entry["step"] for entry in metrics_of(tmp_path / "run-nan")] == list(range(1, report["step"]))
    assert not (tmp_path / "m3ret-nan").exists()


def test_collapse_raises_an_alarm_and_a_healthy_run_does_not(tmp_path: Path, scans: Path) -> None:
    """Compression without expansion maps all scans to one point."""
    collapsing = {"expansion_weight": 0, "learning_rate": 0.003, "teacher_momentum": 0.5, "evaluate_every": 20}
    run(command(TRAIN, scans, "flat", objective="simdino", **collapsing), tmp_path)
    summary = json.loads((tmp_path / "run-flat" / "summary.json").read_text())
    assert summary["alarms"]
    assert summary["last"]["compression"] > 0.99
    run(command(TRAIN, scans, "healthy", objective="simdino", warmup_fraction=0.3), tmp_path)
    assert json.loads((tmp_path / "run-healthy" / "summary.json").read_text())["alarms"] == []
    assert (tmp_path / "run-healthy" / "curves.png").stat().st_size > 10_000


def test_run_starts_from_the_weights_of_a_published_checkpoint(tmp_path: Path, scans: Path) -> None:
    settings = {"steps": 2, "evaluate_every": 0, "objective": "mae+simdino"}
    run(command(TRAIN, scans, "first", **settings), tmp_path)
    published = load_file(tmp_path / "m3ret-first" / "pretraining" / "simdino.safetensors")
    frozen = {"learning_rate": 0, "teacher_momentum": 1}
    run(command(TRAIN, scans, "second", initial="m3ret-first", **settings | frozen), tmp_path)
    second = load_file(tmp_path / "m3ret-second" / "pretraining" / "simdino.safetensors")
    assert published.keys() == second.keys()
    assert {name.split(".")[0] for name in second} == {"student", "teacher", "student_head", "teacher_head", "decoder"}
    assert all(torch.equal(published[name], second[name]) for name in published)
