"""A checkpoint folder is whole or not there, loads by its name, and its card says nothing of the machine."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from modeling_m3ret import M3RetForPreTraining, M3RetImageProcessor
from modeling_m3ret.pretraining.checkpoints import CheckpointPlaceError, checkpoint_place, save_checkpoint
from modeling_m3ret.pretraining.model_card import write_card
from modeling_m3ret.pretraining.objectives import MaskedAutoencoding
from modeling_m3ret.pretraining.optimisation import build_optimiser, warmup_cosine
from modeling_m3ret.pretraining.run_config import RunConfig
from modeling_m3ret.retrieval.evaluation import Row


FACTS = {
    "training_scans": 3,
    "held_out_scans": 2,
    "unreadable_scans": 1,
    "steps": 4,
    "views": 5,
    "modalities": ["ct"],
    "unseen_modalities": ["mri"],
}


@torch.no_grad()
def test_checkpoint_loads_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    objective = MaskedAutoencoding(RunConfig(), tiny_config()).eval()
    model = objective.model
    save_checkpoint(Path("m3ret-tiny"), objective, M3RetImageProcessor(size=64), "# card", {"steps": 1})
    encoder = AutoModel.from_pretrained("m3ret-tiny").eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(images).pooler_output, model.m3ret(images).pooler_output)
    pretraining = AutoModelForPreTraining.from_pretrained("m3ret-tiny", subfolder="pretraining").eval()
    noise = torch.rand(8)
    assert torch.equal(pretraining(images, noise=noise).logits, model(images, noise=noise).logits)
    assert AutoImageProcessor.from_pretrained("m3ret-tiny").size == 64
    for code in ("configuration", "modeling", "image_processing", "reading", "reading_dicom", "scan"):
        assert (tmp_path / "m3ret-tiny" / f"{code}_m3ret.py").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name != "m3ret-tiny"]
    assert not list((tmp_path / "m3ret-tiny").rglob("*.bin"))


def test_a_save_that_fails_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "m3ret-tiny"
    model, processor = MaskedAutoencoding(RunConfig(), tiny_config()), M3RetImageProcessor()
    save_checkpoint(folder, model, processor, "# older", {})
    monkeypatch.setattr(processor, "save_pretrained", lambda folder: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(folder, model, processor, "# newer", {})
    assert (folder / "README.md").read_text() == "# older"
    monkeypatch.undo()
    save_checkpoint(folder, model, processor, "# newest", {"steps": 2})
    assert (folder / "README.md").read_text() == "# newest"
    assert json.loads((folder / "training.json").read_text()) == {"steps": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["m3ret-tiny"]


def test_the_card_is_filled_in_and_names_no_path(tmp_path: Path) -> None:
    template = Path(__file__).parents[2] / "model_card.md"
    run = RunConfig(output_dir=str(tmp_path / "secret-hospital" / "m3ret-x"), data=str(tmp_path / "secret-ward"))
    rows = [Row("ct", "trained", 10, 11, (0.5, 0.75, 0.625))]
    card = write_card(template, run, tiny_config(), 1_234_567, FACTS, rows)
    assert "secret" not in card
    assert str(tmp_path) not in card
    assert "# m3ret-x" in card
    assert "| ct                | trained   |      10 |      11 |  0.500 |  0.750 |  0.625 |" in card
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
        save_checkpoint(place, MaskedAutoencoding(RunConfig(), tiny_config()), M3RetImageProcessor(), "# card", {})
        assert (tmp_path / "m3ret-x").is_symlink()
        assert (tmp_path / "big-disk" / "model.safetensors").is_file()


def test_schedule_rises_to_the_peak_and_falls_to_nothing() -> None:
    factors = [warmup_cosine(step, 100, 10) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0, abs=1e-3)
    assert all(later < earlier for earlier, later in pairwise(factors[10:]))


def test_weight_decay_is_on_matrices_alone() -> None:
    model = M3RetForPreTraining(tiny_config())
    optimiser = build_optimiser(model, RunConfig(), 1e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in optimiser.param_groups)
    assert decayed | kept == set(names.values())
    assert decayed == {name for name in names.values() if name.endswith(".weight") and "norm" not in name}
    assert optimiser.param_groups[1]["weight_decay"] == 0
