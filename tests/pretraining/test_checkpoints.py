"""A checkpoint folder is whole or not there, loads by its name, and its card says nothing of the machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.evaluation.table import Row
from modeling_m3ret.pretraining.checkpoints import (
    CheckpointFolder,
    CheckpointPlaceError,
    checkpoint_place,
    save_checkpoint,
)
from modeling_m3ret.pretraining.model_card import write_card
from modeling_m3ret.pretraining.objectives import MaskedAutoencoding
from modeling_m3ret.pretraining.run_config import RunConfig


FACTS = {
    "training_scans": 3,
    "held_out_scans": 2,
    "measured_scans": 2,
    "unreadable_scans": 1,
    "step": 4,
    "steps": 4,
    "views": 5,
    "whitened_at_step": 4,
    "scans_of_modality": {"ct": 1, "xray": 2},
    "mixture_alpha": 1.0,
    "unseen_modalities": ["mri"],
}


def save(folder: Path, objective: MaskedAutoencoding, processor: M3RetImageProcessor, card: str, facts: dict) -> None:
    save_checkpoint(folder, objective, objective.state_dict(), processor, card, facts)


@torch.no_grad()
def test_checkpoint_loads_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    objective = MaskedAutoencoding(RunConfig(), tiny_config()).eval()
    model = objective.model
    save(Path("m3ret-tiny"), objective, M3RetImageProcessor(size=64), "# card", {"steps": 1})
    encoder = AutoModel.from_pretrained("m3ret-tiny").eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(images).pooler_output, model.m3ret(images).pooler_output)
    pretraining = AutoModelForPreTraining.from_pretrained("m3ret-tiny", subfolder="pretraining").eval()
    noise = torch.rand(8)
    assert torch.equal(pretraining(images, noise=noise).logits, model(images, noise=noise).logits)
    assert AutoImageProcessor.from_pretrained("m3ret-tiny").size == 64
    for code in (
        "configuration",
        "modeling",
        "masked_autoencoder",
        "image_processing",
        "reading",
        "reading_dicom",
        "scan",
    ):
        assert (tmp_path / "m3ret-tiny" / f"{code}_m3ret.py").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name != "m3ret-tiny"]
    assert not list((tmp_path / "m3ret-tiny").rglob("*.bin"))


def test_a_save_that_fails_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "m3ret-tiny"
    model, processor = MaskedAutoencoding(RunConfig(), tiny_config()), M3RetImageProcessor()
    save(folder, model, processor, "# older", {})
    monkeypatch.setattr(processor, "save_pretrained", lambda folder: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(folder, model, processor, "# newer", {})
    assert (folder / "README.md").read_text() == "# older"
    monkeypatch.undo()
    save(folder, model, processor, "# newest", {"steps": 2})
    assert (folder / "README.md").read_text() == "# newest"
    assert json.loads((folder / "training.json").read_text()) == {"steps": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["m3ret-tiny"]


def test_the_card_is_filled_in_and_names_no_path(tmp_path: Path) -> None:
    template = Path(__file__).parents[2] / "model_card.md"
    run = RunConfig(output_dir=str(tmp_path / "secret-hospital" / "m3ret-x"), data=str(tmp_path / "secret-ward"))
    rows = [Row("ct", "trained", 10, 11, {"P@1": 0.5, "R@5": 0.75, "mAP": 0.625}, (0.5, 0.7))]
    card = write_card(template, run, tiny_config(), 1_234_567, FACTS, rows)
    assert "secret" not in card
    assert str(tmp_path) not in card
    assert "# m3ret-x" in card
    assert "| ct                | trained   |      10 |      11 |  0.500 |  0.750 |  0.625 | 0.500-0.700 |" in card
    assert "1.2 M" in card
    assert "license: apache-2.0" in card
    assert "{{" not in card
    assert "{%" not in card
    assert "synthetic" not in card
    assert "synthetic" in write_card(template, RunConfig(), tiny_config(), 1, FACTS | {"synthetic": True}, rows)
    assert "simdino.safetensors" in write_card(template, RunConfig(objective="simdino"), tiny_config(), 1, FACTS, rows)
    mae = write_card(template, RunConfig(), tiny_config(), 1, FACTS | {"objective": "mae"}, rows)
    assert "AutoModelForPreTraining" in mae
    assert "Zero-shot" not in write_card(template, RunConfig(), tiny_config(), 1, FACTS, [])
    assert "On the 2 held-out scans" in card
    sampled = write_card(template, run, tiny_config(), 1, FACTS | {"held_out_scans": 5000}, rows)
    assert "On 2 of the 5000 held-out scans" in sampled
    assert "The embedding is centred and whitened by statistics of training scans, no labels." in card
    for step, words in ((3, "by what training scans gave at step 3 of these 4,"), (None, "had not yet fitted")):
        stopped = write_card(template, run, tiny_config(), 1, FACTS | {"whitened_at_step": step}, [])
        assert words in stopped
        assert "by statistics of training scans" not in stopped
        assert "\n`model.whitening.fit(" in stopped
    assert "| scans | 3 (ct 1, xray 2); unseen: mri |" in card
    mixed = write_card(template, run, tiny_config(), 1, FACTS | {"mixture_alpha": 0.5}, rows)
    assert "| scans | 3 (ct 1, xray 2; n of a modality and source drawn in proportion to n^0.5); unseen: mri |" in mixed
    online = FACTS | {"online": {"step": 2, "mAP": {"ct": 0.25, "all": 0.125}}}
    on_the_way = write_card(template, run, tiny_config(), 1, online, [])
    assert "measured online at step 2: ct 0.250, all 0.125." in on_the_way
    assert "measured online" not in write_card(template, run, tiny_config(), 1, online, rows)
    assert 'name = "m3ret-x"' in card
    pushed = write_card(template, replace(run, push_to_hub="clinic/encoder"), tiny_config(), 1, FACTS, rows)
    assert 'name = "clinic/encoder"' in pushed
    assert "# m3ret-x" in pushed


def test_nothing_but_an_older_checkpoint_is_ever_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("also work")
    for place in ("thesis", "file", ".", "thesis/.."):
        with pytest.raises(CheckpointPlaceError):
            checkpoint_place(Path(place))
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "m3ret-x").symlink_to(tmp_path / "big-disk")
    for _ in range(2):  # an empty folder, then an older checkpoint, through a link that stays one
        place = checkpoint_place(Path("m3ret-x"))
        save(place, MaskedAutoencoding(RunConfig(), tiny_config()), M3RetImageProcessor(), "# card", {})
        assert (tmp_path / "m3ret-x").is_symlink()
        assert (tmp_path / "big-disk" / "model.safetensors").is_file()


def test_the_last_few_and_the_best_are_kept_and_half_written_ones_never_count(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    for step in (5, 100, 20, 1_000_000):
        (checkpoints.place(step) / "training_state").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-000300.partial" / "training_state").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000200").mkdir()  # no state: nothing to go on from
    assert [CheckpointFolder.step(path) for path in checkpoints.all()] == [5, 20, 100, 1_000_000]
    checkpoints.prune(keep_last=2, best_step=5)
    assert [CheckpointFolder.step(path) for path in checkpoints.all()] == [5, 100, 1_000_000]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert checkpoints.newest() == checkpoints.place(1_000_000)
