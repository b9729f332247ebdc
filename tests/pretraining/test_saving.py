"""Facts and card of checkpoints: during a run, after it was resumed, and at its end."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from filelock import FileLock

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.data.collection import Record
from modeling_m3ret.pretraining import saving
from modeling_m3ret.pretraining.checkpoints import OutputFolderError
from modeling_m3ret.pretraining.objectives import MaskedAutoencoding
from modeling_m3ret.pretraining.optimisation import build_optimiser
from modeling_m3ret.pretraining.quality import OnlineQuality
from modeling_m3ret.pretraining.run_config import RunConfig
from modeling_m3ret.pretraining.run_log import RunLog
from modeling_m3ret.pretraining.saving import RunSaver
from modeling_m3ret.pretraining.training_state import (
    DamagedCheckpointError,
    ResumeError,
    check_intact,
    read_progress,
)


ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        output_dir=str(tmp_path / "m3ret-tiny"), run_dir=str(tmp_path / "run"), steps=10, num_workers=0, keep_last=10
    )


def saver_of(config: RunConfig, records: list[Record], training: int = 6) -> RunSaver:
    """Return the started saver of a run that trains on the first `training` records."""
    accelerator, processor = Accelerator(cpu=True), M3RetImageProcessor(size=32)
    objective = MaskedAutoencoding(config, tiny_config())
    saver = RunSaver(
        config=config,
        accelerator=accelerator,
        model=objective,
        optimiser=build_optimiser(objective, config),
        objective=objective,
        processor=processor,
        training=records[:training],
        unseen=[],
        quality=OnlineQuality(records[:training], records[training:], processor, accelerator),
        card_template=ROOT / "model_card.md",
    )
    saver.start()
    return saver


def save(saver: RunSaver, step: int) -> tuple[dict[str, Any], str]:
    """Save a checkpoint at this step. Return its facts and its card."""
    saver.progress.step = step
    saver.save_step()
    checkpoint = saver.checkpoints.path(step)
    return json.loads((checkpoint / "training.json").read_text()), (checkpoint / "README.md").read_text()


def test_checkpoint_records_the_step_of_its_whitening(config: RunConfig, records: list[Record]) -> None:
    saver = saver_of(config, records)
    assert save(saver, 1)[0]["whitened_at_step"] is None
    saver.progress.step = 2
    saver.fit_whitening(saver.objective.encoder)
    assert save(saver, 2)[0]["whitened_at_step"] == 2
    assert save(saver, 3)[0]["whitened_at_step"] == 2
    resumed = saver_of(replace(config, resume=True), records)
    assert resumed.progress.step == 3
    assert torch.equal(resumed.objective.encoder.whitening.matrix, saver.objective.encoder.whitening.matrix)
    assert save(resumed, 4)[0]["whitened_at_step"] == 2


def test_checkpoint_records_the_latest_metrics_and_the_best_step(config: RunConfig, records: list[Record]) -> None:
    saver = saver_of(config, records, training=3)
    assert save(saver, 1)[0]["online"] is None
    saver.progress.step = 2
    metrics = saver.quality.measure(saver.objective.encoder)
    saver.record_quality(metrics | {"loss": 1.0})
    assert saver.is_new_best
    saver.progress.step = 3
    saver.record_quality({"loss": 0.5})
    save(saver, 3)
    facts, card = save(saver_of(replace(config, resume=True), records, training=3), 4)
    latest = {name: metrics[f"held_out/mAP/{name}"] for name in ("ct", "xray", "all", "across")}
    assert facts["online"] == {"step": 2, "mAP": latest}
    assert all(f"{name} {value:.3f}" in card for name, value in latest.items())
    assert facts["scans_of_modality"] == {"ct": 1, "xray": 2}
    assert facts["best_step"] == 2


def test_checkpoints_of_an_unfinished_run_are_deleted_only_on_restart(config: RunConfig, records: list[Record]) -> None:
    with pytest.raises(OutputFolderError):
        saver_of(replace(config, resume=True), records)
    save(saver_of(config, records), 1)
    with pytest.raises(OutputFolderError) as error:
        saver_of(config, records)
    assert error.value.folder.name == "step-000001"
    with pytest.raises(ResumeError) as refused:
        saver_of(replace(config, resume=True, seed=3), records)
    assert refused.value.differences == {"seed": (0, 3)}
    restarted = saver_of(replace(config, restart=True), records)
    assert restarted.checkpoints.newest() == error.value.folder  # until there is something better
    save(restarted, 4)
    assert [path.name for path in restarted.checkpoints.all()] == ["step-000004"]


@pytest.mark.slow  # saves and evaluates several times
def test_finished_run_is_not_started_again(config: RunConfig, records: list[Record]) -> None:
    """It would delete the checkpoints in `run_dir` when it starts, and replace the published one when it ends."""
    saver = saver_of(config, records)
    for step in (3, 10):
        save(saver, step)
    saver.save_result(Path(config.output_dir), {})
    RunLog(Path(config.run_dir), saver.accelerator).write_summary(True, saver.facts())
    before = contents(Path(config.run_dir).parent)
    with pytest.raises(OutputFolderError) as error:
        saver_of(config, records)
    assert error.value.folder.name == "step-000010"
    with pytest.raises(OutputFolderError) as error:
        saver_of(replace(config, run_dir=f"{config.run_dir}-2"), records)
    assert error.value.folder == Path(config.output_dir)
    with pytest.raises(ResumeError):
        saver_of(replace(config, resume=True, steps=20), records)
    assert saver_of(replace(config, resume=True), records).progress.step == 10
    assert contents(Path(config.run_dir).parent) == before
    saver_of(replace(config, resume=True), records).save_result(Path(config.output_dir), {})  # its own may be replaced
    saver_of(replace(config, restart=True, run_dir=f"{config.run_dir}-2"), records)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.slow
def test_checkpoint_published_by_another_run_is_not_replaced(config: RunConfig, records: list[Record]) -> None:
    first, second = (saver_of(replace(config, run_dir=f"{config.run_dir}-{n}"), records) for n in (1, 2))
    for saver in (first, second):
        save(saver, 10)
    first.save_result(Path(config.output_dir), {})
    before = contents(Path(config.output_dir))
    with pytest.raises(OutputFolderError):
        second.save_result(Path(config.output_dir), {})
    assert contents(Path(config.output_dir)) == before


def test_two_runs_cannot_use_one_folder_at_once(
    config: RunConfig, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "LOCK_SECONDS", 0)
    Path(config.run_dir).mkdir()
    with FileLock(Path(config.run_dir) / ".lock"):
        for options in ({}, {"resume": True}, {"restart": True}):
            with pytest.raises(OutputFolderError) as error:
                saver_of(replace(config, **options), records)
            assert error.value.folder == Path(config.run_dir)
    saver_of(config, records)


STATE = "training_state/state.json"
DAMAGES: dict[str, tuple[str, Any]] = {
    "truncated weights": ("pretraining/model.safetensors", lambda content: content[:-100]),
    "truncated optimiser": ("training_state/optimiser.safetensors", lambda content: content[: len(content) // 2]),
    "changed bit": ("training_state/optimiser.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "changed encoder": ("model.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "empty file": ("training_state/random.safetensors", lambda content: b""),
    "missing weights": ("pretraining/model.safetensors", None),
    "missing facts": ("training.json", None),
    "missing state": (STATE, None),
    "empty JSON": (STATE, lambda content: b""),
    "JSON without entries": (STATE, lambda content: b"{}"),
    "JSON of another kind": (STATE, lambda content: b"[1]"),
    "half JSON": (STATE, lambda content: content[: len(content) // 2]),
    "binary JSON": (STATE, lambda content: b"\xff\x00"),
}


def damage_file(checkpoint: Path, damage: str) -> str:
    """Damage a file of a checkpoint, and return its name."""
    name, change = DAMAGES[damage]
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).unlink()
    if change:
        (checkpoint / name).write_bytes(change(content))
    return name


def test_damaged_file_is_named(config: RunConfig, records: list[Record], tmp_path: Path) -> None:
    """Checkpoints of earlier versions hold no SHA-256, so only some kinds of damage are found."""
    saver = saver_of(config, records)
    save(saver, 2)

    def read(checkpoint: Path) -> None:
        read_progress(checkpoint, config, records[:6], 1)
        check_intact(checkpoint, saver.objective.weights_file)

    for old in (False, True):
        for damage in DAMAGES if not old else DAMAGES.keys() - {"changed bit", "changed encoder"}:
            checkpoint = shutil.copytree(saver.checkpoints.path(2), tmp_path / f"{damage} {old}")
            state = json.loads((checkpoint / STATE).read_text())
            if old:
                del state["files"], state["progress"]["run_id"]
                (checkpoint / STATE).write_text(json.dumps(state))
            read(checkpoint)
            name = damage_file(checkpoint, damage)
            with pytest.raises(DamagedCheckpointError) as error:
                read(checkpoint)
            assert (error.value.checkpoint, error.value.file) == (checkpoint, name)


def test_run_resumes_from_the_checkpoint_before_a_damaged_one(
    config: RunConfig, records: list[Record], caplog: pytest.LogCaptureFixture
) -> None:
    saver = saver_of(config, records)
    for step in (5, 7, 8):
        save(saver, step)
    folder = saver.checkpoints.folder
    names = [damage_file(folder / "step-000008", "changed bit"), damage_file(folder / "step-000007", "missing state")]
    resumed = saver_of(replace(config, resume=True, keep_last=1), records)
    assert resumed.progress.step == 5
    errors = [record.args[0] for record in caplog.records if isinstance(record.args, tuple) and record.args]
    damaged = [error for error in errors if isinstance(error, DamagedCheckpointError)]
    assert [(error.checkpoint.name, error.file) for error in damaged] == [
        *zip(("step-000008", "step-000007"), names, strict=True)
    ]
    assert (folder / "damaged-step-000008").is_dir()  # not deleted, and not counted as the last one
    save(resumed, 6)
    assert [path.name for path in resumed.checkpoints.all()] == ["step-000006"]


def test_run_without_an_intact_checkpoint_is_not_resumed(config: RunConfig, records: list[Record]) -> None:
    saver = saver_of(config, records)
    for step in (2, 5):
        save(saver, step)
        (saver.checkpoints.path(step) / STATE).write_text("")
    with pytest.raises(OutputFolderError) as error:
        saver_of(replace(config, resume=True), records)
    assert error.value.folder == saver.checkpoints.folder
    with pytest.raises(OutputFolderError):  # they may still hold weights
        saver_of(config, records)
    assert len(saver.checkpoints.all()) == 2


def test_score_that_is_not_finite_is_never_the_best(config: RunConfig, records: list[Record]) -> None:
    saver = saver_of(config, records)
    for step, score, best in ((1, math.nan, None), (2, 0.25, 2), (3, math.inf, 2), (4, math.nan, 2), (5, 0.5, 5)):
        saver.progress.step = step
        saver.record_quality({"held_out/mAP/all": score})
        assert (saver.is_new_best, saver.progress.best_step) == (best == step, best)
        saver.is_new_best = False
    assert saver.facts()["best_map"] == 0.5


def test_whitening_that_could_not_be_fitted_is_not_recorded(config: RunConfig, records: list[Record]) -> None:
    for record in records[:6]:
        record.location.unlink()
    saver = saver_of(config, records)
    saver.fit_whitening(saver.objective.encoder)
    assert save(saver, 1)[0]["whitened_at_step"] is None


def test_final_table_covers_the_readable_scans_of_the_sample(
    config: RunConfig, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling_m3ret.pretraining.quality.measured_sample", lambda held_out: held_out[1:])
    records[-1].location.unlink()
    saver = saver_of(config, records)
    saver.fit_whitening(saver.objective.encoder)
    save(saver, 10)
    output = Path(config.output_dir)
    remains, other = (output.with_name(f".{name}.1234.partial") for name in ("m3ret-tiny", "m3ret-tiny.other"))
    for folder in (remains, other):
        folder.mkdir()
    saver.save_result(output, {})
    assert other.is_dir()
    assert not remains.exists()  # left by a killed run
    facts = json.loads((output / "training.json").read_text())
    assert (facts["held_out_scans"], facts["measured_scans"], facts["unreadable_scans"]) == (6, 4, 1)
    assert "4 of 6 held-out scans" in (output / "README.md").read_text()
    rows = json.loads((Path(config.run_dir) / "retrieval.json").read_text())["rows"]
    assert {row["queries"] for row in rows if row["protocol"] == "across modalities"} == {4}
