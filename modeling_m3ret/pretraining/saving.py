"""Checkpoints during a run, and the published checkpoint with its retrieval table at the end."""

from __future__ import annotations

import json
import logging
import math
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor, nn

from ..atomic_io import atomic_folder, atomic_write_text
from ..configuration_m3ret import M3RetConfig
from ..data.collection import Record
from ..evaluation.table import Row, evaluate, format_table, to_json
from ..image_processing_m3ret import M3RetImageProcessor
from ..modeling_m3ret import M3RetModel
from ..phantom import SYNTHETIC_SOURCE
from ..search.embedding import embed_records, encoder_embedder, pixel_embedder
from ..version import __version__
from .adapters import merge_adapters
from .checkpoints import CheckpointFolder, OutputFolderError, write_checkpoint
from .distributed import decide_on_main, gather_encoder
from .hub_upload import HubUpload
from .model_card import write_card
from .objectives import Objective
from .quality import OnlineQuality
from .run_config import RunConfig
from .training_state import (
    STATE_FOLDER,
    UNMERGED_FILE,
    DamagedCheckpointError,
    Progress,
    check_intact,
    gather_state,
    read_progress,
    restore_state,
    write_state,
)


logger = logging.getLogger(__name__)

LOCK_SECONDS = 30.0  # how long a run waits for the workers of a killed one, which end within seconds
MAP_PREFIX = "held_out/mAP/"


@dataclass(kw_only=True)
class RunSaver:
    """Save and resume one run. All ranks must call its methods together."""

    config: RunConfig
    accelerator: Accelerator
    model: nn.Module  # the objective as prepared by Accelerate
    optimiser: torch.optim.Optimizer
    objective: Objective
    processor: M3RetImageProcessor  # saved with the encoder
    training: Sequence[Record]
    unseen: Sequence[str]  # modalities without training scans
    quality: OnlineQuality
    card_template: Path  # the project's model_card.md
    progress: Progress = field(default_factory=Progress, init=False)
    is_new_best: bool = field(default=False, init=False)  # the latest evaluation gave the highest mAP; not saved yet

    def __post_init__(self) -> None:
        self.optimiser = getattr(self.optimiser, "optimizer", self.optimiser)  # without Accelerate's wrapper
        self.checkpoints = CheckpointFolder(Path(self.config.run_dir) / "checkpoints")
        self.upload: HubUpload | None = None
        self._saved_step = 0
        self._has_saved = False
        self._whitened_at_step: int | None = None
        self._online: dict[str, Any] | None = None  # {"step": 400, "mAP": {"ct": 0.5, "all": 0.4, "across": 0.3}}

    def start(self) -> Progress:
        """Restore the newest intact checkpoint if the run resumes. No other run can use `run_dir` until this one ends.

        Nothing is deleted unless the run restarts, and then only before its first checkpoint is saved.

        Raises:
            ResumeError: if the checkpoint is incompatible with this run.
            OutputFolderError: if another run uses `run_dir`, there is no checkpoint to resume from, or the run would
                replace checkpoints of another one.
        """
        checkpoint = decide_on_main(self.accelerator, self._checkpoint_to_resume)
        if checkpoint is None:
            self.progress.run_id = uuid.uuid4().hex
            decide_on_main(self.accelerator, lambda: self._check_output(Path(self.config.output_dir)))
        else:
            self._restore(checkpoint)
        if self.config.push_to_hub and self.accelerator.is_main_process:
            self.upload = HubUpload(self.config.push_to_hub, Path(self.config.run_dir) / "uploading")
        return self.progress

    def _checkpoint_to_resume(self) -> Path | None:
        run_dir = Path(self.config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(run_dir / ".lock", is_singleton=True)
        try:
            self._lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            problem = "expected a folder of its own, got that of a run in progress. Choose another run_dir."
            raise OutputFolderError(run_dir, problem) from error
        newest = self.checkpoints.newest()
        if not self.config.resume:
            if newest is not None and not self.config.restart:
                if self._is_finished():
                    problem = "expected no checkpoints, got those of a finished run. Choose another run_dir"
                else:
                    problem = "expected no checkpoints, got those of an unfinished run. Continue it with --resume"
                raise OutputFolderError(newest, f"{problem}, or delete its checkpoints and start again with --restart.")
            return None
        for checkpoint in reversed(self.checkpoints.all()):
            try:
                progress = read_progress(checkpoint, self.config, self.training, self.accelerator.num_processes)
                check_intact(checkpoint, self.objective.weights_file)
            except DamagedCheckpointError as error:
                logger.warning("%s Trying the checkpoint before it.", error)
                continue
            self.progress.run_id = progress.run_id
            self._check_output(Path(self.config.output_dir))
            self.checkpoints.set_aside_after(progress.step)
            return checkpoint
        found = "only damaged ones" if newest else "none"
        problem = f"expected a checkpoint to resume from, got {found}. Start without --resume"
        raise OutputFolderError(self.checkpoints.folder, f"{problem}{', but with --restart' if newest else ''}.")

    def _check_output(self, output: Path) -> None:
        """Raise OutputFolderError if the final checkpoint would replace that of another run."""
        facts = output / "training.json"
        if self.config.restart or not facts.is_file():
            return
        try:
            run_id = json.loads(facts.read_text(encoding="utf-8")).get("run")
        except (ValueError, AttributeError):
            run_id = "damaged"
        if run_id != self.progress.run_id:
            problem = "expected a new or empty folder, got the checkpoint of another run. Choose another output_dir"
            raise OutputFolderError(output, f"{problem}, or replace it with --restart.")

    def _restore(self, checkpoint: Path) -> None:
        self.progress = read_progress(checkpoint, self.config, self.training, self.accelerator.num_processes)
        restore_state(checkpoint, self._weights(checkpoint), self.accelerator, self.model, self.optimiser)
        self._saved_step = self.progress.step
        facts = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))
        self._whitened_at_step = facts.get("whitened_at_step", facts["step"])
        self._online = facts.get("online")
        self.accelerator.print(f"resumed from {checkpoint}")

    def _weights(self, checkpoint: Path) -> dict[str, Tensor]:
        with_adapters = checkpoint / UNMERGED_FILE
        if with_adapters.is_file():
            return load_file(with_adapters)
        return {f"model.{name}": value for name, value in load_file(checkpoint / self.objective.weights_file).items()}

    def _is_finished(self) -> bool:
        summary = Path(self.config.run_dir) / "summary.json"
        try:
            return bool(json.loads(summary.read_text(encoding="utf-8"))["finished"])
        except (OSError, ValueError, KeyError):
            return False

    def fit_whitening(self, encoder: M3RetModel) -> None:
        """Fit the whitening of the next checkpoint, and record the step: a stopped run may be saved at a later step."""
        if self.quality.fit_whitening(encoder):
            self._whitened_at_step = self.progress.step

    def record_quality(self, metrics: Mapping[str, float]) -> None:
        """Record the latest held-out mAP, and the best over all modalities."""
        latest = {name.removeprefix(MAP_PREFIX): mean for name, mean in metrics.items() if name.startswith(MAP_PREFIX)}
        if latest:
            self._online = {"step": self.progress.step, "mAP": latest}
        score = latest.get("all", math.nan)
        if math.isfinite(score) and (self.progress.best_score is None or score > self.progress.best_score):
            self.progress.best_score, self.progress.best_step = score, self.progress.step
            self.is_new_best = True

    def save_step(self) -> None:
        """Save a checkpoint of this step unless it is saved already, and prune older ones."""
        self.is_new_best = False
        progress = self.progress
        if self._saved_step == progress.step:
            return
        self._saved_step = progress.step
        state = gather_state(self.accelerator, self.model, self.optimiser)
        progress.unreadable = dict(gather_object(list(progress.unreadable.items())))  # of all ranks
        if self.accelerator.is_main_process:
            if self.config.restart and not self._has_saved:
                self.checkpoints.delete_all()
            self._has_saved = True
            checkpoint, processes = self.checkpoints.path(progress.step), self.accelerator.num_processes
            with atomic_folder(checkpoint, replace=True) as folder:
                self._write(folder, state.weights, self.facts())
                write_state(folder / STATE_FOLDER, state, progress, self.config, self.training, processes)
            self.checkpoints.prune(self.config.keep_last, progress.best_step)
            if self.upload and checkpoint.is_dir():
                self.upload.submit(checkpoint, f"step {progress.step}")
        self.accelerator.wait_for_everyone()

    def save_result(self, output: Path, unreadable: Mapping[int, str]) -> None:
        """Publish the final checkpoint, with its retrieval table beside chance, pixels and untrained weights.

        Args:
            output: from `validate_output_folder`.
            unreadable: like `Progress.unreadable`, of all ranks.

        Raises:
            OutputFolderError: if another run published there in the meantime.
        """
        decide_on_main(self.accelerator, lambda: self._check_output(output))
        facts = self.facts() | {"unreadable_scans": len(unreadable)}
        if self.accelerator.is_main_process:  # before the evaluation, whose failure must not cost the weights
            for partial in output.parent.glob(".*.partial"):
                if partial.name.rsplit(".", 2)[0] == f".{output.name}":  # left by a killed run
                    shutil.rmtree(partial, ignore_errors=True)
            with atomic_folder(output, replace=True) as folder:
                self._write(folder, self._weights(self.checkpoints.path(self.progress.step)), facts)
        trained = gather_encoder(self.objective.encoder)
        set_seed(self.config.seed)
        untrained = M3RetModel(cast(M3RetConfig, trained.config)).eval().to(trained.device)
        self.quality.fit_whitening(untrained)
        if not self.accelerator.is_main_process:
            return
        embedders = {
            "pixels": pixel_embedder(self.processor),
            "untrained, whitened": encoder_embedder(untrained),
            "trained": encoder_embedder(trained),
        }
        measured, workers = self.quality.held_out.records, self.config.num_workers
        embedded = embed_records(list(embedders.values()), self.processor, measured, num_workers=workers)
        rows = evaluate(dict(zip(embedders, embedded, strict=True)))
        facts["measured_scans"] = len(embedded[0].records)
        facts["unreadable_scans"] += len(embedded[0].failures)
        run_dir = Path(self.config.run_dir)
        atomic_write_text(output / "README.md", self._card(facts, rows))
        atomic_write_text(output / "training.json", json.dumps(facts, indent=2) + "\n")
        atomic_write_text(run_dir / "retrieval.json", to_json(rows, **facts) + "\n")
        print(f"retrieval on {facts['measured_scans']} of {facts['held_out_scans']} held-out scans:")
        print(format_table(rows))
        for message in [*unreadable.values(), *embedded[0].failures]:
            print(f"could not be read: {message}")
        print(f"checkpoint: {self.config.output_dir}   metrics: {run_dir / 'metrics.jsonl'}")
        if self.upload:
            self.upload.submit(output, f"step {self.progress.step}, with its retrieval table")

    def close(self) -> None:
        """Wait for uploads."""
        if self.upload:
            self.upload.close()

    def facts(self) -> dict[str, Any]:
        """Return the content of `training.json`. It is published, so it holds no path and no file name."""
        config = self.config
        scans_of = Counter(record.modality for record in self.training)
        return {
            "objective": config.objective,
            "preset": config.preset,
            "run": self.progress.run_id,
            "step": self.progress.step,
            "steps": config.steps,
            "views": self.progress.views,
            "whitened_at_step": self._whitened_at_step,
            "online": self._online,
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

    def _write(self, folder: Path, weights: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        merged = merge_adapters(weights)
        write_checkpoint(folder, self.objective, merged, self.processor, self._card(facts, []), facts)

    def _card(self, facts: dict[str, Any], rows: list[Row]) -> str:
        return write_card(self.card_template, self.config, self.objective.encoder, facts, rows)
