"""What a run needs to go on as if it had never stopped: weights, optimiser, random numbers, and where it stands.

Safetensors and JSON only. Where the data stands needs no file: batches are a function of their number
(`SeededBatchSampler`), and crops and masks of (seed, turn, index).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..data.collection import Record
from .run_config import RunConfig


STATE_FOLDER = "training_state"
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # all that is sharded, on the main rank alone
WHOLE = StateDictOptions(full_state_dict=True)  # on every rank


class ResumeError(ValueError):
    """A checkpoint that a run cannot go on from: says what differs."""


@dataclass
class Progress:
    """Where a run stands.

    step: steps done. views: seen by all ranks. seconds: of training, over all its starts. best_score, best_step: the
    highest mAP over all modalities so far. unreadable: message of each file that could not be read, by its index.
    """

    step: int = 0
    views: int = 0
    seconds: float = 0.0
    best_score: float | None = None
    best_step: int | None = None
    unreadable: dict[int, str] = field(default_factory=dict)


@dataclass
class TrainingState:
    """Gathered from all ranks by `gather_state`, on the main one: all tensors on the CPU."""

    weights: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    random: dict[str, Tensor]


def gather_state(accelerator: Accelerator, model: nn.Module, optimiser: torch.optim.Optimizer) -> TrainingState:
    """To be called by all ranks at once."""
    weights: dict[str, Any] = get_model_state_dict(model, options=GATHERED)
    of_parameter: Any = get_optimizer_state_dict(model, optimiser, options=GATHERED).get("state", {})
    moments = {
        f"{parameter}/{name}": torch.as_tensor(value)
        for parameter, state in of_parameter.items()
        for name, value in state.items()
    }
    streams = {f"cpu.{accelerator.process_index}": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        streams[f"cuda.{accelerator.process_index}"] = torch.cuda.get_rng_state()
    random = {name: stream for rank in gather_object([streams]) for name, stream in rank.items()}
    return TrainingState(weights, moments, random)


def write_state(
    folder: Path, state: TrainingState, progress: Progress, config: RunConfig, records: Sequence[Record], processes: int
) -> None:
    """Into a checkpoint that is being written; the weights are written by the objective."""
    folder.mkdir(parents=True)
    save_file(state.optimiser, folder / "optimiser.safetensors")
    save_file(state.random, folder / "random.safetensors")
    told = {"config": asdict(config), "processes": processes, "training_scans": fingerprint(records, config)}
    text = json.dumps({"progress": asdict(progress), **told}, indent=2)
    (folder / "state.json").write_text(text + "\n", encoding="utf-8")


def read_progress(checkpoint: Path, config: RunConfig, records: Sequence[Record], processes: int) -> Progress:
    """Where the checkpoint's run stood, if this run is the same.

    Raises:
        ResumeError: if what decides the result differs; names each difference.
    """
    told = json.loads((checkpoint / STATE_FOLDER / "state.json").read_text(encoding="utf-8"))
    differences = config.differences(told["config"])
    if told["processes"] != processes:
        differences.append(f"processes: {told['processes']} in the checkpoint, {processes} now")
    if told["training_scans"] != fingerprint(records, config):
        differences.append("data: the checkpoint's run was trained on other scans, or in another order")
    if differences:
        raise ResumeError(
            "\n  ".join([f"{checkpoint}: its run was another one, and cannot be gone on with as this:", *differences])
        )
    progress = told["progress"]
    unreadable = {int(index): message for index, message in progress.pop("unreadable").items()}
    return Progress(**progress, unreadable=unreadable)


def restore_state(
    checkpoint: Path,
    weights: Mapping[str, Tensor],
    accelerator: Accelerator,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Give model, optimiser and random numbers what the checkpoint holds, on every rank."""
    folder = checkpoint / STATE_FOLDER
    set_model_state_dict(model, dict(weights), options=WHOLE)
    of_parameter: dict[str, dict[str, Any]] = {}
    for key, value in load_file(folder / "optimiser.safetensors").items():
        parameter, name = key.rsplit("/", 1)
        of_parameter.setdefault(parameter, {})[name] = value
    restored: dict[str, Any] = get_optimizer_state_dict(model, optimiser)
    restored["state"] = of_parameter  # and the groups as they are: their settings follow from the run's config
    set_optimizer_state_dict(model, optimiser, restored, options=WHOLE)
    streams = load_file(folder / "random.safetensors")
    torch.set_rng_state(streams[f"cpu.{accelerator.process_index}"])
    if (stream := streams.get(f"cuda.{accelerator.process_index}")) is not None and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(stream)


def fingerprint(records: Sequence[Record], config: RunConfig) -> str:
    """A hash of what the order of training follows from: the scans' ids in their order, their modality, its sources
    where it has several, and their sizes where those fill batches. The folder may have moved, the scans may not."""
    sources = Counter(modality for modality, _ in {(record.modality, record.source) for record in records})
    lines = []
    for record in records:
        told = [record.id, record.modality]
        if sources[record.modality] > 1:
            told.append(record.source)
        if config.tokens_per_batch is not None:
            told.append(f"{record.shape} {record.spacing} {record.is_clip}")
        lines.append("\t".join(told))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
