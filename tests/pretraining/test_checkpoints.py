"""A checkpoint is written atomically, loads with `from_pretrained`, and its card does not reveal paths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_config
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret.atomic_io import atomic_folder
from modeling_m3ret.evaluation.table import Row
from modeling_m3ret.pretraining.checkpoints import (
    CheckpointFolder,
    OutputFolderError,
    validate_output_folder,
    write_checkpoint,
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
    with atomic_folder(folder, replace=True) as partial:
        write_checkpoint(partial, objective, objective.state_dict(), processor, card, facts)


@torch.no_grad()
def test_checkpoint_loads_with_from_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        "dicom_pixels",
        "scan",
    ):
        assert (tmp_path / "m3ret-tiny" / f"{code}_m3ret.py").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name != "m3ret-tiny"]
    assert not list((tmp_path / "m3ret-tiny").rglob("*.bin"))


def test_failed_save_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "m3ret-tiny"
    model, processor = MaskedAutoencoding(RunConfig(), tiny_config()), M3RetImageProcessor()
    save(folder, model, processor, "# older", {})
    monkeypatch.setattr(processor, "save_pretrained", lambda folder: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):  # noqa: PT011
        save(folder, model, processor, "# newer", {})
    assert (folder / "README.md").read_text() == "# older"
    monkeypatch.undo()
    save(folder, model, processor, "# newest", {"steps": 2})
    assert (folder / "README.md").read_text() == "# newest"
    assert json.loads((folder / "training.json").read_text()) == {"steps": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["m3ret-tiny"]


TEMPLATE = Path(__file__).parents[2] / "model_card.md"
ROWS = [Row("ct", "trained", 10, 11, {"P@1": 0.5, "R@5": 0.75, "mAP": 0.625}, (0.5, 0.7))]


def card_of(run: RunConfig | None = None, rows: list[Row] = ROWS, **facts: object) -> str:
    return write_card(TEMPLATE, run or RunConfig(), M3RetModel(tiny_config()), FACTS | facts, rows)


def test_card_is_filled_in_completely_and_names_no_path(tmp_path: Path) -> None:
    run = RunConfig(output_dir=str(tmp_path / "secret-hospital" / "m3ret-x"), data=str(tmp_path / "secret-ward"))
    card = card_of(run)
    assert "secret" not in card
    assert str(tmp_path) not in card
    assert not {"{{", "{%"} & set(card.split())
    metadata, _, text = card.removeprefix("---").partition("---")
    assert yaml.safe_load(metadata)["license"] == "apache-2.0"
    assert "# m3ret-x" in text
    assert 'name = "m3ret-x"' in text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert ["ct", "trained", "10", "11", "0.500", "0.750", "0.625", "0.500-0.700"] in cells
    assert ["scans", "3 (ct 1, xray 2)"] in cells
    assert ["modalities not seen in training", "mri"] in cells
    pushed = card_of(replace(run, push_to_hub="clinic/encoder"))
    assert 'name = "clinic/encoder"' in pushed
    assert "# m3ret-x" in pushed


def test_card_depends_on_the_facts() -> None:
    """Identifiers and numbers appear only in the cards they belong to."""
    assert "AutoModelForPreTraining" in card_of(objective="mae")
    assert "AutoModelForPreTraining" not in card_of(objective="simdino")
    assert "simdino.safetensors" in card_of(objective="simdino")
    assert "synthetic" in card_of(synthetic=True)
    assert "synthetic" not in card_of()
    assert "5 of 5000" not in card_of()
    assert "2 of 5000 held-out scans" in card_of(held_out_scans=5000)
    assert "n^0.5" in card_of(mixture_alpha=0.5)
    assert "n^" not in card_of()
    assert "## Zero-shot retrieval" not in card_of(rows=[])
    online = {"step": 2, "mAP": {"ct": 0.25, "all": 0.125}}
    assert "ct 0.250, all 0.125" in card_of(rows=[], online=online)
    assert "ct 0.250, all 0.125" not in card_of(online=online)
    cards = {step: card_of(whitened_at_step=step) for step in (None, 3, 4)}
    assert len(set(cards.values())) == 3
    assert "step 3" in cards[3]
    assert all("model.whitening.fit(" in card for card in cards.values())


def test_only_an_older_checkpoint_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("also work")
    for folder in ("thesis", "file", ".", "thesis/.."):
        with pytest.raises(OutputFolderError) as error:
            validate_output_folder(Path(folder))
        assert error.value.folder == Path(folder)
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "m3ret-x").symlink_to(tmp_path / "big-disk")
    for _ in range(2):  # an empty folder, then an older checkpoint; the link stays a link
        folder = validate_output_folder(Path("m3ret-x"))
        save(folder, MaskedAutoencoding(RunConfig(), tiny_config()), M3RetImageProcessor(), "# card", {})
        assert (tmp_path / "m3ret-x").is_symlink()
        assert (tmp_path / "big-disk" / "model.safetensors").is_file()


def test_pruning_keeps_the_last_and_the_best_checkpoints_and_removes_partial_ones(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    for step in (5, 100, 20, 1_000_000):
        (checkpoints.path(step) / "training_state").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-000300.partial" / "training_state").mkdir(parents=True)
    for other in ("step-000200-copy", "step-final", "damaged-step-000300"):
        (tmp_path / "checkpoints" / other / "training_state").mkdir(parents=True)
    assert [CheckpointFolder.step(path) for path in checkpoints.all()] == [5, 20, 100, 1_000_000]
    checkpoints.prune(keep_last=2, best_step=5)
    assert [CheckpointFolder.step(path) for path in checkpoints.all()] == [5, 100, 1_000_000]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 6  # folders with other names are kept
    assert checkpoints.newest() == checkpoints.path(1_000_000)
