"""Runs that are killed, stopped, resumed, poisoned or collapse, as processes of their own on generated scans."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import POISONED, ROOT, command, finish, lines, run, start, write_scans
from transformers import AutoModel


# train.py, killed as by the kernel in the middle of a save: when the files of step 6 are written and not yet renamed
KILLED_WHILE_SAVING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from modeling_m3ret.pretraining import checkpoints
sync = checkpoints.sync
def kill(path):
    if ".step-000006." in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)
checkpoints.sync = kill
train.main()
"""


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scans(tmp_path_factory.mktemp("scans"))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("objective", ["mae", "simdino"])
def test_a_run_killed_while_saving_and_resumed_twice_is_the_uninterrupted_one(
    tmp_path: Path, scans: Path, objective: str, ranks: int
) -> None:
    """6 steps and kill -9 during the save, on from 3 to 13, on to 20, with other numbers of workers each time."""
    killing = tmp_path / "killing.py"
    killing.write_text(KILLED_WHILE_SAVING.format(root=str(ROOT)))
    train = ROOT / "train.py"
    batch = {"objective": objective, "batch_size": 4 // ranks}
    run(command(train, scans, "whole", **batch), tmp_path, ranks)

    code, _ = finish(command(killing, scans, "cut", **batch, num_workers=0), tmp_path, ranks)
    assert code == -signal.SIGKILL
    checkpoints = tmp_path / "run-cut" / "checkpoints"
    assert not (checkpoints / "step-000006").exists()
    assert (checkpoints / ".step-000006.partial" / "training_state" / "state.json").is_file()  # all but the rename
    printed = run(command(train, scans, "cut", **batch, num_workers=2, resume=True, stop_after=13), tmp_path, ranks)
    assert "step-000003" in printed
    assert "stopped after step 13 of 20" in printed
    assert json.loads((checkpoints / "step-000013" / "training.json").read_text())["whitened_at_step"] == 13
    assert not (tmp_path / "m3ret-cut").exists()
    run(command(train, scans, "cut", **batch, num_workers=1, resume=True), tmp_path, ranks)

    whole, cut = (tmp_path / f"run-{name}" / "checkpoints" / "step-000020" for name in ("whole", "cut"))
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert {file.name for file in files} >= {"model.safetensors", "optimiser.safetensors", "random.safetensors"}
    for file in files:
        mine, theirs = load_file(whole / file), load_file(cut / file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), file
    # losses of all steps to the last bit: the same scans, crops and masks in the same order
    assert lines(tmp_path / "run-whole") == lines(tmp_path / "run-cut")
    assert [line["step"] for line in lines(tmp_path / "run-cut")] == list(range(1, 21))
    kept = sorted(path.name for path in cut.parent.iterdir())
    best = json.loads((tmp_path / "run-cut" / "summary.json").read_text())["best_step"]
    assert kept == sorted({"step-000018", "step-000020", f"step-{best:06d}"})
    for checkpoint in kept:
        AutoModel.from_pretrained(cut.parent / checkpoint)


def test_sigterm_saves_and_leaves_and_nothing_unfinished_is_replaced(tmp_path: Path, scans: Path) -> None:
    train = ROOT / "train.py"
    words = command(train, scans, "stopped", objective="simdino", steps=100_000, evaluate_every=0, save_every=100_000)
    script = start(words, tmp_path)
    metrics = tmp_path / "run-stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 3):
        assert script.is_running(), script.printed
        assert time.monotonic() < deadline
        time.sleep(0.1)
    script.stop()
    assert script.finish(timeout=60) == 0, script.printed
    (checkpoint,) = (tmp_path / "run-stopped" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert f"stopped after step {step} of 100000" in script.printed
    assert json.loads((checkpoint / "training.json").read_text())["whitened_at_step"] is None  # no time for that
    assert lines(tmp_path / "run-stopped")[-1]["step"] == step
    summary = json.loads((tmp_path / "run-stopped" / "summary.json").read_text())
    assert (summary["finished"], summary["step"]) == (False, step)

    code, printed = finish(words, tmp_path)
    assert code != 0
    assert "--resume goes on from there, --restart begins anew" in printed
    changed = command(train, scans, "stopped", objective="simdino", steps=50, seed=3, precision="bf16", resume=True)
    code, printed = finish(changed, tmp_path)
    assert code != 0
    assert "precision: no in the checkpoint, bf16 now" in printed  # null at the start, as the launcher said
    assert "seed: 0 in the checkpoint, 3 now" in printed
    assert "steps: 100000 in the checkpoint, 50 now" in printed
    assert "num_workers" not in printed.split("gone on with")[1]
    assert checkpoint.is_dir()


def test_a_poisoned_scan_stops_the_run_before_the_step_and_is_named(tmp_path: Path, scans: Path) -> None:
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED.format(root=str(ROOT)))
    words = command(script, scans, "poisoned", objective="mae+simdino", steps=12, holdout=0)
    code, printed = finish(words, tmp_path)
    assert code != 0
    assert "nothing was updated" in printed
    assert "values that are not finite come with scan-10;" in printed
    told = json.loads((tmp_path / "run-poisoned" / "not_finite.json").read_text())
    assert told["ranks"][0]["not_finite"] == ["scan-10"]
    assert len(told["ranks"][0]["scans"]) == 4
    logged = lines(tmp_path / "run-poisoned") if (tmp_path / "run-poisoned" / "metrics.jsonl").is_file() else []
    assert [line["step"] for line in logged] == list(range(1, told["step"]))
    assert not (tmp_path / "m3ret-poisoned").exists()


def test_a_run_that_is_made_to_collapse_says_so(tmp_path: Path, scans: Path) -> None:
    """Compression alone, without expansion, draws all scans into one point."""
    collapsing = {"expansion_weight": 0, "learning_rate": 0.003, "teacher_momentum": 0.5, "evaluate_every": 20}
    printed = run(command(ROOT / "train.py", scans, "flat", objective="simdino", **collapsing), tmp_path)
    assert "features are collapsing: the expansion is" in printed
    summary = json.loads((tmp_path / "run-flat" / "summary.json").read_text())
    assert summary["alarms"]
    assert summary["last"]["compression"] > 0.99
    healthy = run(command(ROOT / "train.py", scans, "healthy", objective="simdino", warmup_fraction=0.3), tmp_path)
    assert "collapsing" not in healthy
    assert json.loads((tmp_path / "run-healthy" / "summary.json").read_text())["alarms"] == []
    assert (tmp_path / "run-healthy" / "curves.png").stat().st_size > 10_000


def test_training_goes_on_from_a_published_model(tmp_path: Path, scans: Path) -> None:
    train, short = ROOT / "train.py", {"steps": 2, "evaluate_every": 0, "objective": "mae+simdino"}
    run(command(train, scans, "first", **short), tmp_path)
    published = load_file(tmp_path / "m3ret-first" / "pretraining" / "simdino.safetensors")
    still = {"learning_rate": 0, "teacher_momentum": 1} | short
    run(command(train, scans, "second", initial="m3ret-first", **still), tmp_path)
    second = load_file(tmp_path / "m3ret-second" / "pretraining" / "simdino.safetensors")
    assert published.keys() == second.keys()
    assert {name.split(".")[0] for name in second} == {"student", "teacher", "student_head", "teacher_head", "decoder"}
    assert all(torch.equal(published[name], second[name]) for name in published)
