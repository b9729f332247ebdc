"""Checkpoint folders that load with `from_pretrained`, and the folder that holds those of a run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..image_processing_m3ret import M3RetImageProcessor
from .objectives import Objective, model_weights
from .training_state import STATE_FOLDER


class OutputFolderError(InputError):
    """A folder that must not be overwritten, or that holds no checkpoint to resume from."""

    def __init__(self, folder: Path, problem: str):
        super().__init__(f"{folder}: {problem}")
        self.folder = folder


def validate_output_folder(folder: Path) -> Path:
    """Return the folder with links resolved, and create its parents. Call it before training, to fail early.

    Raises:
        OutputFolderError: if the folder holds anything but a checkpoint, since saving replaces it as a whole.
    """
    resolved = folder.resolve()
    is_checkpoint = (resolved / "training.json").is_file() and (resolved / "config.json").is_file()
    is_empty = resolved.is_dir() and not any(resolved.iterdir())
    if resolved == Path.cwd() or (resolved.exists() and not is_checkpoint and not is_empty):
        raise OutputFolderError(
            folder, "expected a new or empty folder or an older checkpoint, got other files. Choose another output_dir."
        )
    resolved.parent.mkdir(parents=True, exist_ok=True)
    return resolved


def write_checkpoint(
    folder: Path,
    objective: Objective,
    weights: Mapping[str, Tensor],
    processor: M3RetImageProcessor,
    card: str,
    facts: dict[str, Any],
) -> None:
    """Write encoder, processor and their code into a folder, with the objective's further weights in `pretraining/`.

    `AutoModel.from_pretrained(folder)` returns the encoder. `pretraining/` holds, for MAE, the encoder with its decoder
    for `AutoModelForPreTraining`; for SimDINO, student, teacher and heads.

    Args:
        weights: state dict of the objective, on the CPU.
        card: text of `README.md`.
        facts: content of `training.json`.
    """
    of_model = model_weights(weights, "model")
    objective.encoder.save_pretrained(folder, state_dict=model_weights(of_model, objective.encoder_name))
    processor.save_pretrained(folder)
    objective.save(folder, of_model)
    if (folder / "pretraining" / "config.json").is_file():  # a model of transformers, which is then complete
        processor.save_pretrained(folder / "pretraining")
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


class CheckpointFolder:
    """The checkpoints of one run, named `step-000500` and so on."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def all(self) -> list[Path]:
        """Return all checkpoints, oldest first. An interrupted save has another name."""
        named = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
        return sorted(named, key=self.step)

    def newest(self) -> Path | None:
        return next(reversed(self.all()), None)

    @staticmethod
    def step(checkpoint: Path) -> int:
        return int(checkpoint.name.removeprefix("step-"))

    def prune(self, keep_last: int, best_step: int | None) -> None:
        """Delete all checkpoints but the last `keep_last` and the best one, and the remains of interrupted saves.

        A checkpoint whose training state was deleted by a user is kept.
        """
        checkpoints = [path for path in self.all() if (path / STATE_FOLDER).is_dir()]
        self._delete([path for path in checkpoints[:-keep_last] if self.step(path) != best_step])
        for remains in self.folder.glob(".step-*"):
            shutil.rmtree(remains, ignore_errors=True)

    def delete_all(self) -> None:
        self._delete(self.all())

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints of later steps, which are damaged, so that they do not count as the newest ones."""
        for checkpoint in self.all():
            if self.step(checkpoint) > step:
                aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
                shutil.rmtree(aside, ignore_errors=True)
                checkpoint.rename(aside)

    @staticmethod
    def _delete(checkpoints: Sequence[Path]) -> None:
        for checkpoint in checkpoints:
            # rename first: an interrupted deletion must not leave something that looks complete
            deleted = checkpoint.with_name(f".{checkpoint.name}.replaced")
            shutil.rmtree(deleted, ignore_errors=True)
            checkpoint.rename(deleted)
            shutil.rmtree(deleted, ignore_errors=True)
