"""Facts and card of checkpoints: during a run, after it was resumed, and at its end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.data.collection import Record
from modeling_m3ret.pretraining.checkpoints import OutputFolderError
from modeling_m3ret.pretraining.objectives import MaskedAutoencoding
from modeling_m3ret.pretraining.optimisation import build_optimiser
from modeling_m3ret.pretraining.quality import OnlineQuality
from modeling_m3ret.pretraining.run_config import RunConfig
from modeling_m3ret.pretraining.saving import RunSaver
from modeling_m3ret.pretraining.training_state import ResumeError


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
    assert saver_of(replace(config, restart=True), records).checkpoints.newest() is None


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
