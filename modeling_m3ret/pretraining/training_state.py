"""The state that makes a resumed run bit-identical to an uninterrupted one: optimiser, random numbers and progress.

Only safetensors and JSON are written. The data loader needs no state: a batch is a function of its number
(`SeededBatchSampler`), and crops and masks are functions of the seed and the scan.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from ..errors import InputError
from ..model_facts import sha256_of
from .adapters import is_adapter
from .run_config import RunConfig, format_differences


if TYPE_CHECKING:  # needs pyarrow
    from ..data.collection import Record

STATE_FOLDER = "training_state"
STATE_FILE = f"{STATE_FOLDER}/state.json"
UNMERGED_FILE = f"{STATE_FOLDER}/weights.safetensors"  # with adapters, which cannot be separated from merged weights
FACTS_FILE = "training.json"
ON_MAIN_RANK = StateDictOptions(full_state_dict=True, cpu_offload=True)
ON_EVERY_RANK = StateDictOptions(full_state_dict=True)


class ResumeError(InputError):
    """A checkpoint that is incompatible with this run."""

    def __init__(self, checkpoint: Path, differences: Mapping[str, tuple[Any, Any]]):
        super().__init__(
            f"{checkpoint}: checkpoint is incompatible with this run ({format_differences(differences)}). Resume with "
            "the options of the checkpoint, or train with another run_dir."
        )
        self.checkpoint = checkpoint
        self.differences = dict(differences)  # option -> (value in the checkpoint, value in this run)


class DamagedCheckpointError(InputError):
    """A checkpoint with a file that is missing, truncated or changed."""

    def __init__(self, checkpoint: Path, file: str, problem: str):
        super().__init__(f"{checkpoint} is damaged: {file} {problem}.")
        self.checkpoint, self.file = checkpoint, file


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # completed steps
    run_id: str | None = None  # random, the same for all starts of a run; None for runs of earlier versions
    views: int = 0  # seen by all ranks
    seconds: float = 0.0  # training time, summed over all starts of the run
    best_score: float | None = None  # highest held-out mAP over all modalities
    best_step: int | None = None
    unreadable: dict[int, str] = field(default_factory=dict)  # index of a scan -> error message


@dataclass
class TrainingState:
    """State of all ranks, gathered on the main rank. All tensors are on the CPU."""

    weights: dict[str, Tensor]
    optimiser: dict[str, Tensor]
    random: dict[str, Tensor]


def gather_state(accelerator: Accelerator, model: nn.Module, optimiser: Optimizer) -> TrainingState:
    """Gather the state of all ranks on the main rank. All ranks must call it together."""
    weights: dict[str, Any] = get_model_state_dict(model, options=ON_MAIN_RANK)
    of_parameter: Any = get_optimizer_state_dict(model, optimiser, options=ON_MAIN_RANK).get("state", {})
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
    """Write the state into a checkpoint, with the SHA-256 of all its files. The objective writes the weights first."""
    folder.mkdir(parents=True)
    save_file(state.optimiser, folder / "optimiser.safetensors")
    save_file(state.random, folder / "random.safetensors")
    if any(map(is_adapter, state.weights)):
        save_file(state.weights, folder.parent / UNMERGED_FILE)
    run = {"progress": asdict(progress), "config": asdict(config), "processes": processes}
    run["training_scans"] = training_order_hash(records, config)
    files = sorted(path for path in folder.parent.rglob("*") if path.suffix in (".safetensors", ".json"))
    run["files"] = {path.relative_to(folder.parent).as_posix(): sha256_of(path) for path in files}
    (folder / "state.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def read_progress(checkpoint: Path, config: RunConfig, records: Sequence[Record], processes: int) -> Progress:
    """Return the progress of a checkpoint, after checking that this run would have produced it.

    Raises:
        ResumeError: if an option, the number of processes or the training scans differ.
        DamagedCheckpointError: if the progress cannot be read.
    """
    try:
        run = _read_json(checkpoint, STATE_FILE)
        differences = config.differences(run["config"])
        if run["processes"] != processes:
            differences["processes"] = run["processes"], processes
        if run["training_scans"] != training_order_hash(records, config):
            differences["data"] = "other scans or another order", f"{len(records)} scans"
        progress = run["progress"]
        unreadable = {int(index): message for index, message in progress.pop("unreadable").items()}
        restored = Progress(**progress, unreadable=unreadable)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(checkpoint, STATE_FILE, "lacks entries") from error
    if differences:
        raise ResumeError(checkpoint, differences)
    return restored


def check_intact(checkpoint: Path, weights_file: str) -> None:
    """Verify the SHA-256 of the files of a checkpoint.

    Checkpoints of earlier versions hold no SHA-256. Their safetensors files are checked for completeness.

    Raises:
        DamagedCheckpointError: if a file is missing, truncated or changed.
    """
    digests = _read_json(checkpoint, STATE_FILE).get("files", {})
    state = [f"{STATE_FOLDER}/{name}.safetensors" for name in ("optimiser", "random")]
    for name in {weights_file, FACTS_FILE, *state, *digests}:
        file = checkpoint / name
        if not file.is_file():
            raise DamagedCheckpointError(checkpoint, name, "is missing")
        if name in digests and sha256_of(file) != digests[name]:
            raise DamagedCheckpointError(checkpoint, name, "differs from its SHA-256")
        try:
            if file.suffix == ".safetensors":
                safe_open(file, framework="pt")
        except SafetensorError as error:
            raise DamagedCheckpointError(checkpoint, name, "is truncated") from error
    if "step" not in _read_json(checkpoint, FACTS_FILE):
        raise DamagedCheckpointError(checkpoint, FACTS_FILE, "lacks entries")


def _read_json(checkpoint: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads((checkpoint / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedCheckpointError(checkpoint, name, "is missing") from error
    except ValueError as error:
        raise DamagedCheckpointError(checkpoint, name, "is not JSON") from error
    if not isinstance(values, dict):
        raise DamagedCheckpointError(checkpoint, name, "lacks entries")
    return values


def restore_state(
    checkpoint: Path, weights: Mapping[str, Tensor], accelerator: Accelerator, model: nn.Module, optimiser: Optimizer
) -> None:
    """Load weights, optimiser state and random number generators of a checkpoint, on every rank."""
    folder = checkpoint / STATE_FOLDER
    set_model_state_dict(model, dict(weights), options=ON_EVERY_RANK)
    of_parameter: dict[str, dict[str, Any]] = {}
    for key, value in load_file(folder / "optimiser.safetensors").items():
        parameter, name = key.rsplit("/", 1)
        of_parameter.setdefault(parameter, {})[name] = value
    restored: dict[str, Any] = get_optimizer_state_dict(model, optimiser)
    restored["state"] = of_parameter  # the settings of the groups follow from the config
    set_optimizer_state_dict(model, optimiser, restored, options=ON_EVERY_RANK)
    streams = load_file(folder / "random.safetensors")
    torch.set_rng_state(streams[f"cpu.{accelerator.process_index}"])
    if (stream := streams.get(f"cuda.{accelerator.process_index}")) is not None and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(stream)


def training_order_hash(records: Sequence[Record], config: RunConfig) -> str:
    """Return a hash of everything that determines the order of training scans, but not of the folder they are in."""
    sources = Counter(modality for modality, _ in {(record.modality, record.source) for record in records})
    lines = []
    for record in records:
        columns = [record.id, record.modality]
        if sources[record.modality] > 1:  # each is sampled on its own
            columns.append(record.source)
        if config.tokens_per_batch is not None:
            columns.append(f"{record.shape} {record.spacing} {record.is_clip}")  # they determine the batches
        lines.append("\t".join(columns))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
