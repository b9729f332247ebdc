"""What a checkpoint says of itself, while a run goes on, after it was stopped and resumed, and at its end."""

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
from modeling_m3ret.pretraining.objectives import MaskedAutoencoding
from modeling_m3ret.pretraining.optimisation import build_optimiser
from modeling_m3ret.pretraining.quality import OnlineQuality
from modeling_m3ret.pretraining.run_config import RunConfig
from modeling_m3ret.pretraining.saving import RunSaver


ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        output_dir=str(tmp_path / "m3ret-tiny"), run_dir=str(tmp_path / "run"), steps=10, num_workers=0, keep_last=10
    )


def saver_of(config: RunConfig, records: list[Record], training: int = 6) -> RunSaver:
    accelerator, processor = Accelerator(cpu=True), M3RetImageProcessor(size=32)
    objective = MaskedAutoencoding(config, tiny_config())
    saver = RunSaver(
        *(config, accelerator, objective, build_optimiser(objective, config), objective, tiny_config(), processor),
        *(records[:training], OnlineQuality(records[:training], records[training:], processor, accelerator)),
        *([], ROOT / "model_card.md"),
    )
    saver.resume_or_begin()
    return saver


def save(saver: RunSaver, step: int) -> tuple[dict[str, Any], str]:
    """Facts and card of the checkpoint of this step."""
    saver.progress.step = step
    saver.save_step()
    place = saver.checkpoints.place(step)
    return json.loads((place / "training.json").read_text()), (place / "README.md").read_text()


def test_a_checkpoint_says_of_which_step_its_whitening_is(config: RunConfig, records: list[Record]) -> None:
    saver = saver_of(config, records)
    facts, card = save(saver, 1)  # stopped before anything was due
    assert facts["whitened_at_step"] is None
    assert "had not yet fitted" in card
    saver.progress.step = 2
    saver.fit_whitening(saver.objective.encoder)
    assert "by statistics of training scans" in save(saver, 2)[1]
    facts, card = save(saver, 3)
    assert facts["whitened_at_step"] == 2
    assert "at step 2 of these 3" in card
    resumed = saver_of(replace(config, resume=True), records)
    assert torch.equal(resumed.objective.encoder.whitening.matrix, saver.objective.encoder.whitening.matrix)
    facts, card = save(resumed, 4)
    assert facts["whitened_at_step"] == 2
    assert "at step 2 of these 4" in card


def test_a_checkpoint_on_the_way_has_the_latest_numbers(config: RunConfig, records: list[Record]) -> None:
    saver = saver_of(config, records, training=3)
    assert save(saver, 1)[0]["online"] is None
    saver.progress.step = 2
    numbers = saver.quality.measure(saver.objective.encoder)
    saver.note_quality(numbers | {"loss": 1.0})
    saver.progress.step = 3
    saver.note_quality({"loss": 0.5})
    save(saver, 3)
    facts, card = save(saver_of(replace(config, resume=True), records, training=3), 4)
    latest = {name: numbers[f"held_out/mAP/{name}"] for name in ("ct", "xray", "all", "across")}
    assert facts["online"] == {"step": 2, "mAP": latest}
    assert f"measured online at step 2: ct {latest['ct']:.3f}, xray {latest['xray']:.3f}," in card
    assert facts["scans_of_modality"] == {"ct": 1, "xray": 2}
    assert facts["best_step"] == 2


def test_a_whitening_that_could_not_be_fitted_is_none(config: RunConfig, records: list[Record]) -> None:
    for record in records[:6]:
        record.location.unlink()
    saver = saver_of(config, records)
    saver.fit_whitening(saver.objective.encoder)
    assert save(saver, 1)[0]["whitened_at_step"] is None


def test_the_closing_table_is_of_the_sample_that_is_measured_online(
    config: RunConfig, records: list[Record], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("modeling_m3ret.pretraining.quality.measured_sample", lambda held_out: held_out[1:])
    records[-1].location.unlink()
    saver = saver_of(config, records)
    saver.fit_whitening(saver.objective.encoder)
    save(saver, 10)
    place = Path(config.output_dir)
    saver.save_result(place, {})
    facts = json.loads((place / "training.json").read_text())
    assert (facts["held_out_scans"], facts["measured_scans"], facts["unreadable_scans"]) == (6, 4, 1)
    assert "On 4 of the 6 held-out scans" in (place / "README.md").read_text()
    assert "on 4 of 6 held-out scans:" in capsys.readouterr().out
    rows = json.loads((Path(config.run_dir) / "retrieval.json").read_text())["rows"]
    assert {row["queries"] for row in rows if row["protocol"] == "across modalities"} == {4}
