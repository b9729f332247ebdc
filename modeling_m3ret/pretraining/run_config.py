"""Configuration of a pretraining run, which `run_options` fills from a YAML file and command-line options.

The options are grouped as `train.py --help` prints them. The docstring below a field is its help text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ..configuration_m3ret import M3RetConfig
from ..errors import InputError


@dataclass
class OutputOptions:
    """Output and logging"""

    output_dir: str = "m3ret-vitb"
    """Folder of the final checkpoint, for `from_pretrained`. That of another run is replaced only with `restart`."""
    run_dir: str = "runs/vitb"
    """Folder of everything written during the run: `metrics.jsonl`, `summary.json`, `checkpoints/`, tracker files."""
    log_every: int = 10
    """Steps between lines in `metrics.jsonl`."""
    report_to: str | None = None
    """Experiment tracker: trackio, tensorboard or wandb."""
    evaluate_every: int = 0
    """Steps between evaluations on held-out scans; 0 evaluates only after the last step."""
    save_every: int = 1000
    """Steps between checkpoints in `run_dir/checkpoints`."""
    keep_last: int = 2
    """Number of most recent checkpoints to keep, in addition to the one with the best held-out mAP."""
    push_to_hub: str | None = None
    """Hub repository, ORG/NAME, to which each checkpoint is uploaded in the background. A new repository is private."""


@dataclass
class ResumeOptions:
    """Start, stop and resume"""

    initial: str | None = None
    """Checkpoint folder or Hub id to initialise weights from: of an earlier run, or a published 2D vision transformer,
    which is converted (docs/start-from-a-vit.md). Missing parts are initialised randomly."""
    resume: bool = False
    """Continue from the newest checkpoint in `run_dir`."""
    restart: bool = False
    """Start again from step 0 although `run_dir` or `output_dir` holds checkpoints of an earlier run. They are deleted
    when the first new one is saved."""
    stop_after: int | None = None
    """Save a checkpoint and exit after this step, as on SIGTERM. For queues with a time limit."""


@dataclass
class DataOptions:
    """Data"""

    data: str = "phantom"
    """Folder with `manifest.csv` or `data/*.parquet`, Hub dataset ORG/NAME[@REVISION], or phantom[:SUBJECTS[:SEED]].
    Existing train and validation splits are used; a test split is never read."""
    stream: bool = False
    """Fetch rows of a Parquet dataset when they are needed instead of downloading the dataset first."""
    stream_lanes: int = 8
    """Parts of an epoch that each process reads in parallel when streaming: a multiple of `num_workers`, so that no two
    workers fetch the same block. Determines the order of scans."""
    exclude_modalities: list[str] = field(default_factory=lambda: ["mri"])
    """Modalities left out of pretraining, as a YAML list, to evaluate on an unseen one. MRI as in the M3Ret paper."""
    holdout: float = 0.3
    """Fraction of patients held out for evaluation, below 1. Ignored if the dataset has a validation split."""
    mixture_alpha: float = 1.0
    """Sampling exponent: a modality (or a source within it) with n scans is sampled in proportion to n^alpha. 1 keeps
    the distribution of the data, 0 samples all equally; XLM (arXiv 1901.07291) uses 0.5 for languages."""
    num_workers: int = 4
    """Worker processes that decode scans, for each training process."""
    cache_gib: float = 0.0
    """Memory in GiB to cache decoded scans, shared by the workers of a process. Several workers fill it over several
    epochs."""


@dataclass
class ObjectiveOptions:
    """Objective and model"""

    objective: Literal["mae", "simdino", "mae+simdino"] = "mae"
    """Masked autoencoding, self-distillation (SimDINO), or both from one forward pass of the student."""
    preset: Literal["initial", "vitt", "vits", "vitb", "vitl"] = "vitb"
    """Size of the encoder; "initial" takes all of the checkpoint `initial`. A converted 2D encoder always keeps its
    architecture."""
    model: dict[str, Any] = field(default_factory=dict)
    """Overrides of `M3RetConfig` fields, as a YAML mapping."""
    mae_weight: float = 1.0
    """Weight of the MAE loss. Only for mae+simdino."""
    simdino_weight: float = 1.0
    """Weight of the SimDINO loss. Only for mae+simdino."""
    patch_weight: float = 0.0
    """Weight of SimDINOv2's patch loss on masked blocks of the student's global views; 1 as published there, 0 is the
    original SimDINO. Only for simdino."""
    compression_weight: float = 1.0
    """Weight of SimDINO's compression term relative to its maximum; 1 as published."""
    expansion_weight: float = 0.45
    """Weight of SimDINO's expansion term relative to its maximum; 0.45 is the published balance (see `SimDINOLoss`)."""
    teacher_momentum: float | None = None
    """Initial EMA momentum of the SimDINO teacher, which averages over about 1 / (1 - momentum) steps; rises to 1 along
    a cosine. null is 1 - 400 / steps, between 0.95 and 0.996: 0.996 is published for 100,000 steps, and in runs of
    hundreds of steps such a teacher hardly moves, while 0.95 trains well (docs/results.md)."""


@dataclass
class ViewOptions:
    """Input size and views"""

    size: int = 224
    """Image size in pixels: a slice is resized to an area of size x size. Also saved with the processor."""
    num_frames: int = 32
    """Maximum number of slices or frames of a scan. Also saved with the processor."""
    max_patches: int = 2048
    """Maximum number of patches of a scan. Also saved with the processor."""
    views_per_decode: int = 4
    """MAE: random crops from each decoded scan."""
    local_views: int = 10
    """SimDINO: local crops of each scan, besides its two global crops; 10 in the published ViT-B run."""
    local_size: int = 96
    """SimDINO: size of local crops in pixels; 96 as published."""
    global_area: list[float] = field(default_factory=lambda: [0.4, 1.0])
    """SimDINO: range of the fraction of a slice's area in a global crop; [0.4, 1] as published. Smaller crops hide
    marks that a device draws around the image, such as an ultrasound sector."""
    local_area: list[float] = field(default_factory=lambda: [0.05, 0.4])
    """SimDINO: range of the fraction of a slice's area in a local crop; [0.05, 0.4] as published."""
    single_slice_probability: float = 0.5
    """SimDINO: probability that a crop of a volume or video is a single slice or frame. At 0 the student can tell scans
    apart by their depth; docs/experiments.md compares values."""
    flip_probability: float = 0.0
    """Probability of a left-right flip of a view; 0.5 adds variety where the two sides of the body do not differ."""


@dataclass
class OptimisationOptions:
    """Optimisation"""

    steps: int = 100_000
    """Optimiser steps."""
    batch_size: int = 64
    """Scans that each process decodes for one pack (a packed batch)."""
    tokens_per_batch: int | None = None
    """Token budget of a pack, instead of `batch_size`: equal compute and memory in every step, and the same weight for
    each scan. Requires scan sizes in the dataset (Parquet) and an explicit `learning_rate`."""
    accumulate: int = 1
    """Packs whose gradients are averaged for one optimiser step. Equals one larger pack for MAE; SimDINO's expansion
    term is computed for each pack, because a coding rate is not a mean over scans."""
    learning_rate: float | None = None
    """Peak learning rate. null applies the linear scaling rule: 1.5e-4 x views per step / 256 for MAE (arXiv
    2111.06377, table 8), 5e-4 x scans per step / 256 for SimDINO."""
    final_learning_rate: float = 0.0
    """Learning rate at the end of the cosine schedule."""
    weight_decay: float = 0.05
    """Weight decay of AdamW; 0.05 as in MAE."""
    final_weight_decay: float | None = None
    """Weight decay at the end of a cosine schedule; null keeps it constant. SimDINO uses 0.04 to 0.4."""
    layer_decay: float = 1.0
    """Factor on the learning rate for each layer further from the output, in (0, 1]; 1 as in MAE and SimDINO."""
    freeze_layers: int = 0
    """Number of first layers of the encoder that are not trained, together with its embeddings."""
    lora_rank: int = 0
    """Rank of adapters (LoRA, by the package peft), which are trained instead of the weights of the encoder, on all
    linear layers that are not frozen; 0 trains the weights. Heads and decoder are trained as always. Checkpoints hold
    the merged weights."""
    adam_beta2: float = 0.95
    """Second beta of AdamW; 0.95 as in MAE. The first is 0.9."""
    warmup_fraction: float = 0.05
    """Fraction of the steps with a linear learning-rate warm-up; MAE uses 40 of 800 epochs."""
    gradient_clip: float = 3.0
    """Maximum gradient norm; 3 as in SimDINO. MAE does not clip; at 3 only outliers are clipped."""
    precision: Literal["no", "bf16"] | None = None
    """Mixed precision: bf16, or no for float32 (quote "no" in YAML); null follows `accelerate launch`. A CPU without
    instructions for bfloat16 trains in float32. fp16 is not supported: its loss scale is not saved in checkpoints."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None = None
    """Attention kernels, by their names in transformers. null chooses, on CUDA, one variable-length kernel for packs of
    mixed lengths (of PyTorch or else of flash-attn, if installed); otherwise one call for each length."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    compile_layers: bool = False
    """Apply `torch.compile` to the parts of a layer that act on each token alone (all but attention). For GPUs."""
    seed: int = 0
    """Seed of weights, data order, crops and masks."""


class ConfigError(InputError):
    """A configuration value that cannot be used."""

    def __init__(self, key: str, problem: str):
        super().__init__(f"{key}: {problem}")
        self.key = key  # name of the option


# limits of each number. Only gradient_clip may be infinite, which disables clipping
LIMITS: dict[str, str] = {
    **dict.fromkeys(("steps", "batch_size", "tokens_per_batch", "views_per_decode", "accumulate", "log_every"), ">= 1"),
    **dict.fromkeys(("save_every", "keep_last", "size", "num_frames", "max_patches", "local_size"), ">= 1"),
    **dict.fromkeys(("num_workers", "local_views", "cache_gib", "seed", "evaluate_every", "stop_after"), ">= 0"),
    **dict.fromkeys(("freeze_layers", "lora_rank"), ">= 0"),
    **dict.fromkeys(("learning_rate", "final_learning_rate", "weight_decay", "final_weight_decay"), ">= 0"),
    **dict.fromkeys(("mae_weight", "simdino_weight", "patch_weight", "compression_weight", "expansion_weight"), ">= 0"),
    **dict.fromkeys(("flip_probability", "single_slice_probability", "warmup_fraction"), ">= 0 and <= 1"),
    **dict.fromkeys(("teacher_momentum", "adam_beta2"), ">= 0 and <= 1"),
    **{"stream_lanes": ">= 1", "mixture_alpha": ">= 0", "gradient_clip": "> 0"},
    **{"holdout": ">= 0 and < 1", "layer_decay": "> 0 and <= 1"},
}
IS_WITHIN: dict[str, Callable[[float], bool]] = {
    ">= 1": lambda value: 1 <= value < math.inf,
    ">= 0": lambda value: 0 <= value < math.inf,
    "> 0": lambda value: value > 0,
    ">= 0 and <= 1": lambda value: 0 <= value <= 1,
    ">= 0 and < 1": lambda value: 0 <= value < 1,
    "> 0 and <= 1": lambda value: 0 < value <= 1,
}
SIMDINO = ("simdino", "mae+simdino")
# options of some objectives alone; other objectives refuse them. The number and size of views may be set for any
APPLIES_TO: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("mae_weight", "simdino_weight"), ("mae+simdino",)),
    **dict.fromkeys(("global_area", "local_area", "single_slice_probability"), SIMDINO),
    **dict.fromkeys(("compression_weight", "expansion_weight", "teacher_momentum"), SIMDINO),
    "patch_weight": ("simdino",),
}
# never sent to an experiment tracker, which may run on another machine
PATHS = ("data", "initial", "output_dir", "run_dir", "push_to_hub")
# paths, logging, and options that change the speed but not the result
MAY_CHANGE_ON_RESUME = (
    *("output_dir", "run_dir", "data", "initial", "num_workers", "cache_gib", "log_every", "report_to"),
    *("evaluate_every", "save_every", "keep_last", "resume", "restart", "stop_after", "push_to_hub"),
    "attn_implementation",
)
# names in checkpoints of earlier versions -> today's
RENAMED_KEYS = {"flip_part": "flip_probability", "slice_part": "single_slice_probability"}


@dataclass
class RunConfig(OutputOptions, ResumeOptions, DataOptions, ObjectiveOptions, ViewOptions, OptimisationOptions):
    """All options of a pretraining run.

    Raises:
        ConfigError: if a value is out of range, or two options contradict each other.
    """

    def __post_init__(self) -> None:
        self._check_limits()
        self._check_areas()
        self._check_objective()
        self._check_tokens_per_batch()
        if self.resume and self.restart:
            raise ConfigError("restart", "expected only one of resume and restart, got both. Remove one.")
        if unknown := sorted(set(self.model) - {entry.name for entry in fields(M3RetConfig)}):
            raise ConfigError("model", f"expected fields of M3RetConfig, got {', '.join(unknown)}.")
        output, run = Path(self.output_dir).resolve(), Path(self.run_dir).resolve()
        if run.is_relative_to(output):
            problem = (
                f"expected a folder outside output_dir, which the final checkpoint replaces, got {run} in {output}."
            )
            raise ConfigError("run_dir", problem)
        if output.is_relative_to(run / "checkpoints"):
            raise ConfigError("output_dir", f"expected a folder outside {run / 'checkpoints'}, got {output}.")

    def _check_limits(self) -> None:
        for name, limits in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not IS_WITHIN[limits](value):
                raise ConfigError(name, f"expected a number {limits}, got {value}.")

    def _check_areas(self) -> None:
        for name in ("global_area", "local_area"):
            area = getattr(self, name)
            if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
                raise ConfigError(name, f"expected [min, max] with 0 < min <= max <= 1, got {area}.")

    def _check_objective(self) -> None:
        if self.resume:  # an earlier version may have accepted the option; the run must stay resumable
            return
        for entry in fields(self):
            objectives = APPLIES_TO.get(entry.name, (self.objective,))
            default = entry.default_factory() if callable(entry.default_factory) else entry.default
            if getattr(self, entry.name) != default and self.objective not in objectives:
                problem = f"applies only to objective {' and '.join(objectives)}, got objective {self.objective}."
                raise ConfigError(entry.name, f"{problem} Remove it, or change the objective.")

    def _check_tokens_per_batch(self) -> None:
        if self.tokens_per_batch is None:
            return
        if self.learning_rate is None:
            problem = "expected a number with tokens_per_batch, got null. The scaling rule needs a fixed batch_size."
            raise ConfigError("learning_rate", problem)
        if self.accumulate > 1 and "mae" in self.objective and self.model.get("loss_weighting") == "patch":
            problem = f"expected 1 with tokens_per_batch and loss_weighting patch, got {self.accumulate}."
            raise ConfigError("accumulate", f"{problem} Packs are weighted by their number of scans.")

    def as_launched(self, precision: str, processes: int) -> RunConfig:
        """Return the config with the precision that Accelerate resolved, after checking it with the world size.

        Raises:
            ConfigError: if the precision is not supported, or the final learning rate is above the peak.
        """
        if precision not in ("no", "bf16"):
            problem = f"expected bf16 or no, got {precision} from `accelerate launch`."
            raise ConfigError("precision", f"{problem} Its loss scale is not saved in checkpoints.")
        peak = self.peak_learning_rate(processes)
        if peak < self.final_learning_rate and not self.resume:
            problem = f"expected at most the peak learning rate of {peak:.3g}, got {self.final_learning_rate}."
            raise ConfigError("final_learning_rate", problem)
        return replace(self, precision="bf16" if precision == "bf16" else "no")

    def peak_learning_rate(self, processes: int) -> float:
        """Return the learning rate after warm-up: as set, or linear in the views (MAE) or scans (SimDINO) of a step."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.objective != "mae":
            return 5e-4 * self.batch_size * self.accumulate * processes / 256
        return 1.5e-4 * self.batch_size * self.views_per_decode * self.accumulate * processes / 256

    def start_momentum(self) -> float:
        """Return the teacher's momentum at the first step: as set, or by the rule in its help text."""
        if self.teacher_momentum is not None:
            return self.teacher_momentum
        return min(max(1 - 400 / self.steps, 0.95), 0.996)

    def due(self, step: int) -> tuple[bool, bool]:
        """Return whether to evaluate and whether to save after this step; both after the last, if enabled."""
        is_last = step == self.steps
        evaluates = self.evaluate_every > 0 and (is_last or step % self.evaluate_every == 0)
        return evaluates, is_last or step % self.save_every == 0

    def differences(self, checkpoint: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the options that affect the result and differ: name -> (checkpoint's, ours), each may be "absent"."""
        ours = {key: value for key, value in asdict(self).items() if key not in MAY_CHANGE_ON_RESUME}
        theirs = {RENAMED_KEYS.get(key, key): value for key, value in checkpoint.items()}
        theirs = {key: value for key, value in theirs.items() if key not in MAY_CHANGE_ON_RESUME}
        theirs = {"freeze_layers": 0, "lora_rank": 0} | theirs  # later options
        theirs["precision"] = theirs.get("precision") or ours["precision"]  # early checkpoints may lack it
        pairs = {key: (theirs.get(key, "absent"), ours.get(key, "absent")) for key in sorted(ours.keys() | theirs)}
        return {key: (their, our) for key, (their, our) in pairs.items() if their != our}


def format_differences(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Return one line with values that differ between a checkpoint and this run, from name -> (checkpoint's, ours)."""
    return "; ".join(f"{key}: {theirs} in the checkpoint, {ours} now" for key, (theirs, ours) in differences.items())
