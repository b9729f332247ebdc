"""What a run keeps: checkpoints on its way, the best of them, and at its end the published one with its table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import nn

from ..atomic_io import atomic_write_text
from ..configuration_m3ret import M3RetConfig
from ..data.collection import Record
from ..evaluation.table import Row, evaluate, format_table, to_json
from ..image_processing_m3ret import M3RetImageProcessor
from ..modeling_m3ret import M3RetModel
from ..phantom import SYNTHETIC_SOURCE
from ..search.embedding import embed_records, encoder_embedder, pixel_embedder
from ..version import __version__
from .checkpoints import CheckpointFolder, CheckpointPlaceError, save_checkpoint
from .hub_upload import HubUpload
from .model_card import write_card
from .objectives import Objective
from .quality import OnlineQuality
from .run_config import RunConfig
from .sharding import whole_encoder
from .training_state import STATE_FOLDER, Progress, gather_state, read_progress, restore_state, write_state


class RunSaver:
    """Checkpoints of one run. Its methods are called by all ranks at once.

    Args:
        model, optimiser: as prepared by Accelerate; objective: the module inside. training: the scans; quality: knows
        those that are held out and measured; unseen: modalities that only those held out have. card_template: the
        project's `model_card.md`.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        objective: Objective,
        model_config: M3RetConfig,
        processor: M3RetImageProcessor,
        training: Sequence[Record],
        quality: OnlineQuality,
        unseen: Sequence[str],
        card_template: Path,
    ):
        self.config, self.accelerator = config, accelerator
        self.model, self.optimiser, self.objective = model, getattr(optimiser, "optimizer", optimiser), objective
        self.processor, self.training, self.quality, self.unseen = processor, training, quality, unseen
        self.card_template, self.model_config = card_template, model_config
        self.progress = Progress()
        self.whitened_at_step: int | None = None
        self.online: dict[str, Any] | None = None  # {"step": 400, "mAP": {"ct": .5, "all": .4, "across": .3}}
        self.is_new_best = False
        self.saved_step = 0
        self.checkpoints = CheckpointFolder(Path(config.run_dir) / "checkpoints")
        self.upload: HubUpload | None = None
        if config.push_to_hub and accelerator.is_main_process:
            self.upload = HubUpload(config.push_to_hub, Path(config.run_dir) / "uploading")

    def resume_or_begin(self) -> Progress:
        """Restore the newest whole checkpoint if the run is to go on, or make sure that a new one replaces nothing.

        Raises:
            ResumeError: if the checkpoint's run was another one.
            CheckpointPlaceError: if there is nothing to go on from, or a new run would replace an unfinished one.
        """
        newest = self.checkpoints.newest()
        if self.config.resume:
            if newest is None:
                raise CheckpointPlaceError(f"{self.checkpoints.folder}: found no whole checkpoint to resume from")
            processes = self.accelerator.num_processes
            self.progress = read_progress(newest, self.config, self.training, processes)
            weights = {
                f"model.{name}": value for name, value in load_file(newest / self.objective.weights_file).items()
            }
            restore_state(newest, weights, self.accelerator, self.model, self.optimiser)
            self.saved_step = self.progress.step
            told = json.loads((newest / "training.json").read_text(encoding="utf-8"))
            self.whitened_at_step, self.online = told.get("whitened_at_step", told["step"]), told.get("online")
            self.accelerator.print(f"resumed from {newest}")
            return self.progress
        if newest is not None and not self.config.restart and not self._finished():
            raise CheckpointPlaceError(
                f"{newest}: found a checkpoint of a run that has not finished; --resume goes on from there, --restart "
                "begins anew and removes it"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.checkpoints.clear()
        return self.progress

    def _finished(self) -> bool:
        try:
            return bool(
                json.loads((Path(self.config.run_dir) / "summary.json").read_text(encoding="utf-8"))["finished"]
            )
        except (OSError, ValueError, KeyError):
            return False

    def fit_whitening(self, encoder: M3RetModel) -> None:
        """Fit the whitening of what is saved next, and remember of which step it is: a stopped run is saved later."""
        if self.quality.fit_whitening(encoder):
            self.whitened_at_step = self.progress.step

    def note_quality(self, numbers: Mapping[str, float]) -> None:
        """Remember the latest mAP, and the best over all modalities so far."""
        start = "held_out/mAP/"
        if latest := {name.removeprefix(start): value for name, value in numbers.items() if name.startswith(start)}:
            self.online = {"step": self.progress.step, "mAP": latest}
        score = latest.get("all")
        if score is not None and (self.progress.best_score is None or score > self.progress.best_score):
            self.progress.best_score, self.progress.best_step = score, self.progress.step
            self.is_new_best = True

    def save_step(self) -> None:
        """A checkpoint of this step, once; older ones go, but for the last few and the best."""
        self.is_new_best = False
        progress = self.progress
        place = self.checkpoints.place(progress.step)
        if self.saved_step == progress.step:
            return
        self.saved_step = progress.step
        state = gather_state(self.accelerator, self.model, self.optimiser)
        if self.accelerator.is_main_process:

            def write_more(folder: Path) -> None:
                processes = self.accelerator.num_processes
                write_state(folder / STATE_FOLDER, state, progress, self.config, self.training, processes)

            facts = self.facts()
            save_checkpoint(
                place, self.objective, state.weights, self.processor, self._card(facts, []), facts, write_more
            )
            self.checkpoints.prune(self.config.keep_last, progress.best_step)
            if self.upload and place.is_dir():
                self.upload.submit(place, f"step {progress.step}")
        self.accelerator.wait_for_everyone()

    def save_result(self, place: Path, unreadable: Mapping[int, str]) -> None:
        """The published checkpoint, and its table beside chance, pixels and untrained weights.

        Args:
            place: from `checkpoint_place`. unreadable: files of training that could not be read, of all ranks.
        """
        facts = self.facts() | {"unreadable_scans": len(unreadable)}
        # first: an evaluation that fails costs no weights
        if self.accelerator.is_main_process:
            newest = self.checkpoints.place(self.progress.step) / self.objective.weights_file
            weights = {f"model.{name}": value for name, value in load_file(newest).items()}
            save_checkpoint(place, self.objective, weights, self.processor, self._card(facts, []), facts)
        trained = whole_encoder(self.objective.encoder)
        set_seed(self.config.seed)
        untrained = M3RetModel(self.model_config).eval().to(trained.device)
        self.quality.fit_whitening(untrained)
        if not self.accelerator.is_main_process:
            return
        embedders = {
            "pixels": pixel_embedder(self.processor),
            "untrained, whitened": encoder_embedder(untrained),
            "trained": encoder_embedder(trained),
        }
        workers = self.config.num_workers
        measured = self.quality.held_out.records
        embedded = embed_records(list(embedders.values()), self.processor, measured, num_workers=workers)
        rows = evaluate(dict(zip(embedders, embedded, strict=True)))
        facts |= {
            "measured_scans": len(embedded[0].records),
            "unreadable_scans": len(unreadable) + len(embedded[0].failures),
        }
        atomic_write_text(place / "README.md", self._card(facts, rows))
        atomic_write_text(place / "training.json", json.dumps(facts, indent=2) + "\n")
        atomic_write_text(Path(self.config.run_dir) / "retrieval.json", to_json(rows, **facts) + "\n")
        print(f"on {facts['measured_scans']} of {facts['held_out_scans']} held-out scans:")
        print(format_table(rows))
        for message in [*unreadable.values(), *embedded[0].failures]:
            print(f"not read: {message}")
        print(f"checkpoint: {self.config.output_dir}   metrics: {Path(self.config.run_dir) / 'metrics.jsonl'}")
        if self.upload:
            self.upload.submit(place, f"step {self.progress.step}, with its retrieval table")

    def close(self) -> None:
        if self.upload:
            self.upload.close()

    def facts(self) -> dict[str, Any]:
        """What the run was, in numbers and words that may leave this machine."""
        config = self.config
        scans_of = Counter(record.modality for record in self.training)
        return {
            "objective": config.objective,
            "preset": config.preset,
            "step": self.progress.step,
            "steps": config.steps,
            "views": self.progress.views,
            "whitened_at_step": self.whitened_at_step,
            "online": self.online,
            "training_scans": len(self.training),
            "modalities": sorted(scans_of),
            "scans_of_modality": dict(sorted(scans_of.items())),
            "mixture_alpha": config.mixture_alpha,
            "unseen_modalities": list(self.unseen),
            "holdout": config.holdout,
            "held_out_scans": self.quality.held_out_scans,
            "measured_scans": len(self.quality.held_out.records),
            "unreadable_scans": len(self.progress.unreadable),
            "synthetic": any(record.source == SYNTHETIC_SOURCE for record in self.training),
            "seed": config.seed,
            "best_step": self.progress.best_step,
            "best_map": self.progress.best_score,
            "m3ret": __version__,
            "torch": torch.__version__,
            "seconds": round(self.progress.seconds, 1),
        }

    def _card(self, facts: dict[str, Any], rows: list[Row]) -> str:
        encoder, config = self.objective.encoder, self.model_config
        return write_card(self.card_template, self.config, config, encoder.num_parameters(), facts, rows)
