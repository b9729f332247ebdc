"""What a run leaves behind: a folder for `from_pretrained`, whole or not there at all, and metrics line by line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..atomic_io import sync
from ..image_processing_m3ret import M3RetImageProcessor
from .objectives import Objective, model_weights
from .training_state import STATE_FOLDER


class CheckpointPlaceError(ValueError):
    """A folder that a checkpoint must not be written to."""


def checkpoint_place(folder: Path) -> Path:
    """Where a checkpoint of this name goes, links followed; asked before a run, so that no run ends without a place.

    Raises:
        CheckpointPlaceError: if something is there that is neither an empty folder nor a checkpoint of ours, since
            saving replaces the folder as a whole.
    """
    place = folder.resolve()
    is_ours = (place / "training.json").is_file() and (place / "config.json").is_file()
    if place == Path.cwd() or (place.exists() and not is_ours and not (place.is_dir() and not any(place.iterdir()))):
        raise CheckpointPlaceError(f"{folder}: found something else there, expected nothing, or an older checkpoint")
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def save_checkpoint(
    folder: Path,
    objective: Objective,
    weights: Mapping[str, Tensor],
    processor: M3RetImageProcessor,
    card: str,
    facts: dict[str, Any],
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write the encoder, the processor and their code into `folder`, and below it what training would go on from.

    `AutoModel.from_pretrained(folder)` gives the encoder. In `pretraining/` lie, of MAE, the encoder with its decoder
    for `AutoModelForPreTraining`; of SimDINO student, teacher and heads. Written beside and renamed, so that a folder
    of this name is always whole; an older one is replaced.

    Args:
        folder: from `checkpoint_place` or `CheckpointFolder`. weights: the objective's, on the CPU. card: the model
            card, `README.md`. facts: what the run was, `training.json`. write_more: writes further files into it.
    """
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    of_model = model_weights(weights, "model")
    objective.encoder.save_pretrained(beside, state_dict=model_weights(of_model, objective.encoder_name))
    processor.save_pretrained(beside)
    objective.save(beside, of_model)
    (beside / "README.md").write_text(card, encoding="utf-8")
    (beside / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if write_more:
        write_more(beside)
    for path in (*beside.rglob("*"), beside):
        sync(path)
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    beside.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


class CheckpointFolder:
    """The checkpoints of one run, `step-000500` and so on: each whole, the last few and the best kept."""

    def __init__(self, folder: Path):
        self.folder = folder

    def place(self, step: int) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"step-{step:06d}"

    def all(self) -> list[Path]:
        """Whole ones, oldest first. What a killed save left behind has another name."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else []
        return sorted((path for path in found if (path / STATE_FOLDER).is_dir()), key=self.step)

    def newest(self) -> Path | None:
        return self.all()[-1] if self.all() else None

    @staticmethod
    def step(checkpoint: Path) -> int:
        return int(checkpoint.name.removeprefix("step-"))

    def prune(self, keep_last: int, best_step: int | None) -> None:
        """Remove all but the last `keep_last` and the best, and what killed saves left."""
        for checkpoint in self.all()[:-keep_last]:
            if self.step(checkpoint) != best_step:
                # first its name: a removal that is cut short must not leave something that looks whole
                removed = checkpoint.with_name(f".{checkpoint.name}.replaced")
                checkpoint.rename(removed)
        for rest in self.folder.glob(".step-*"):
            shutil.rmtree(rest, ignore_errors=True)

    def clear(self) -> None:
        """Remove all of them: a new run begins here."""
        shutil.rmtree(self.folder, ignore_errors=True)
