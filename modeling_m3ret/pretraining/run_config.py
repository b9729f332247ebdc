"""Everything a pretraining run can be told: one dataclass, filled from a YAML file and `--key value` overrides."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from ..configuration_m3ret import M3RetConfig


CHOICES: dict[str, tuple[str | None, ...]] = {
    "objective": ("mae", "simdino", "mae+simdino"),
    "preset": ("vitt", "vits", "vitb", "vitl"),
    "precision": ("no", "bf16", None),
}
AT_LEAST_ONE = (
    *("steps", "batch_size", "views_per_decode", "accumulate", "log_every", "save_every", "keep_last"),
    *("size", "num_frames", "max_patches", "local_size", "stream_lanes"),
)
NOT_NEGATIVE = (
    *("num_workers", "local_views", "cache_gib", "seed", "evaluate_every", "stop_after"),
    *("learning_rate", "final_learning_rate", "weight_decay", "final_weight_decay"),
    *("mae_weight", "simdino_weight", "patch_weight", "compression_weight", "expansion_weight", "mixture_alpha"),
)
PARTS_OF_ONE = (
    *("holdout", "flip_part", "slice_part"),
    *("warmup_fraction", "teacher_momentum", "layer_decay", "adam_beta2"),
)
# objectives that a setting of what they learn belongs to; how many views they take and how large may stand in one file
OBJECTIVES_OF = {
    **dict.fromkeys(("mae_weight", "simdino_weight"), ("mae+simdino",)),
    **dict.fromkeys(("global_area", "local_area", "slice_part"), ("simdino", "mae+simdino")),
    **dict.fromkeys(("compression_weight", "expansion_weight", "teacher_momentum"), ("simdino", "mae+simdino")),
    "patch_weight": ("simdino",),
}
# where things are and how they are shown, and what changes the speed but nothing that is learned
MAY_CHANGE_ON_RESUME = (
    *("output_dir", "run_dir", "data", "initial", "num_workers", "cache_gib", "log_every", "report_to"),
    *("evaluate_every", "save_every", "keep_last", "resume", "restart", "stop_after", "push_to_hub"),
)


@dataclass
class RunConfig:
    """
    output_dir: the checkpoint folder that the run ends with, a name that `from_pretrained` takes.
    run_dir: what the run writes on its way (`metrics.jsonl`, `summary.json`, `checkpoints/`, trackers).
    initial: checkpoint folder or Hub id of an earlier run to start from, with all that both runs have in the same form;
        null starts from random weights.
    data: folder with a `manifest.csv` or `data/*.parquet`, `ORG/NAME[@REVISION]` on the Hub, or
        `phantom[:SUBJECTS[:SEED]]`. Splits that a data set has are kept; a test split is never read.
    stream: fetch the rows of a Parquet data set when they are needed, in blocks of neighbours, instead of downloading
        it first. stream_lanes: pieces of an epoch that a process reads at the same time; a multiple of num_workers, so
        that no two workers fetch the same block. It decides the order of scans, and must stay on `--resume`.
    exclude_modalities: never seen in pretraining; MRI, as in the paper, to have an unseen modality to test on.
    holdout: part of the patients kept out of pretraining, of a collection without a validation split; the closing table
        is theirs.
    mixture_alpha: of each epoch's scans a modality of n, or each of its sources where records name them, gets a part in
        proportion to n^alpha: 1 as the data is, 0 all the same, between them as multilingual models mix languages (XLM,
        arXiv 1901.07291, takes .5).
    objective: what is learned: `mae` (masked autoencoding), `simdino` (self-distillation) or `mae+simdino` (both from
        one pass of the student). mae_weight, simdino_weight: of the sum's two parts. What weighs or crops for another
        objective than this one is refused.
    preset: vitt, vits, vitb or vitl. model: overrides of `M3RetConfig`.
    size, num_frames, max_patches: the processor's size policy, for the views in training and for the checkpoint.
    steps: optimiser steps. batch_size: scans decoded for a pack by each process; views_per_decode: random crops of
        each for MAE, so that a pack holds batch_size x views_per_decode views. accumulate: packs whose gradients are
        averaged for one step, each scan weighing the same. MAE's gradient is then that of one large pack; SimDINO's
        expansion is each pack's own, since a coding rate is not a mean over scans.
    tokens_per_batch: instead of `batch_size`, as many scans as have this many tokens in all their views: equal work and
        memory in every step, whatever the mix. Needs a data set that says how large its scans are (Parquet), and a
        `learning_rate`, since the rule for it counts scans. Ranks and packs may hold different numbers of scans; each
        scan weighs the same.
    flip_part: of the views, how many are mirrored left to right; 0, since a body's sides differ, .5 for more variety
        where they don't matter.
    global_area, local_area: parts of a slice's area that SimDINO's global and local crops cover, .4 to 1 and .05 to .4
        as published. Smaller global crops hide what a device draws around a picture (a sector, a round field).
    slice_part: of SimDINO's crops of volumes and clips, how many are a single slice or frame. Without any, the student
        tells scans apart by their depth, and stills no longer find clips of the same organ. With .5, phantom ultrasound
        rose above the untrained encoder's mAP; with 0 it did not, with .3 not in 300 steps (docs/training.md).
    local_views, local_size: SimDINO's local crops of each scan, and their size (the global ones have `size`); 10 of 96
        in its published command for ViT-B.
    patch_weight: of SimDINOv2's patch term, 1 as published there: blocks of the student's global views are masked and
        its tokens drawn to the teacher's of what was there. 0 is SimDINO as first published. Not with `mae+simdino`,
        which masks by itself.
    compression_weight, expansion_weight: of SimDINO's two terms, as shares of their maxima, see `SimDINOLoss`.
    teacher_momentum: where the cosine to 1 starts, .996 as published for some 100,000 steps. A teacher averages its
        student over some 1 / (1 - momentum) steps, so a run of hundreds of steps needs less, .95 say.
    learning_rate, weight_decay, adam_beta2: AdamW of MAE (arXiv 2111.06377, table 8): 1.5e-4 for 256 views a step,
        times views / 256, is what `learning_rate: null` resolves to (SimDINO: 5e-4 for 256 scans); decay .05; betas .9
        and .95. final_learning_rate: where the cosine ends. final_weight_decay: where its cosine ends, null for no
        change; SimDINO's command goes from .04 to .4. layer_decay: see `learning_rate_scale`; 1 is none, as published
        for pretraining by both.
    warmup_fraction: part of the steps with a linear warm-up; 40 of MAE's 800 epochs.
    gradient_clip: largest norm of the gradient. MAE clips nothing; at 3 (SimDINO's) only an outlier batch is cut.
    precision: bf16 or no; null as `accelerate launch` says, which must stay on `--resume`. Not fp16, whose scale is not
        kept in checkpoints. gradient_checkpointing: layers forget their activations and compute them again, for less
        memory and a third more work. compile_layers: `torch.compile` of what layers do to each token alone, all but
        attention, for GPUs.
    num_workers: processes that decode, beside each training process. cache_gib: memory, in GiB over all workers of a
        process, that keeps decoded scans for the next epoch. Each worker has its own part and meets any scan, so with
        one worker a collection that fits is decoded once, with more it takes some epochs.
    seed: of weights, order, crops and masks.
    log_every: steps between lines in `metrics.jsonl`. report_to: trackio, tensorboard or wandb.
    evaluate_every: steps between measurements on the held-out part; 0 measures at the end alone.
    save_every: steps between checkpoints in `run_dir/checkpoints`, of which the last `keep_last` stay, and the best by
        mAP over all modalities.
    resume: go on from the newest checkpoint in `run_dir`. restart: begin anew where an unfinished run has checkpoints.
    stop_after: save and leave after this step, as SIGTERM does; for queues that cut long runs in pieces.
    push_to_hub: ORG/NAME, a repository that each checkpoint is uploaded to, in the background; private if it is new.
    """

    output_dir: str = "m3ret-vitb"
    run_dir: str = "runs/vitb"
    initial: str | None = None
    data: str = "phantom"
    stream: bool = False
    stream_lanes: int = 8
    exclude_modalities: list[str] = field(default_factory=lambda: ["mri"])
    holdout: float = 0.3
    mixture_alpha: float = 1.0
    objective: str = "mae"
    mae_weight: float = 1.0
    simdino_weight: float = 1.0
    preset: str = "vitb"
    model: dict[str, Any] = field(default_factory=dict)
    size: int = 224
    num_frames: int = 32
    max_patches: int = 2048
    steps: int = 100_000
    batch_size: int = 64
    tokens_per_batch: int | None = None
    views_per_decode: int = 4
    accumulate: int = 1
    flip_part: float = 0.0
    global_area: list[float] = field(default_factory=lambda: [0.4, 1.0])
    local_area: list[float] = field(default_factory=lambda: [0.05, 0.4])
    slice_part: float = 0.5
    local_views: int = 10
    local_size: int = 96
    patch_weight: float = 0.0
    compression_weight: float = 1.0
    expansion_weight: float = 0.45
    teacher_momentum: float = 0.996
    learning_rate: float | None = None
    final_learning_rate: float = 0.0
    weight_decay: float = 0.05
    final_weight_decay: float | None = None
    layer_decay: float = 1.0
    adam_beta2: float = 0.95
    warmup_fraction: float = 0.05
    gradient_clip: float = 3.0
    precision: str | None = None
    gradient_checkpointing: bool = False
    compile_layers: bool = False
    num_workers: int = 4
    cache_gib: float = 0.0
    seed: int = 0
    log_every: int = 10
    report_to: str | None = None
    evaluate_every: int = 0
    save_every: int = 1000
    keep_last: int = 2
    resume: bool = False
    restart: bool = False
    stop_after: int | None = None
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                listed = f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}"
                raise ValueError(f"{name} is {listed}, not {getattr(self, name)!r}")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"{name} is a number from 0 up, not {getattr(self, name)}")
        for name in PARTS_OF_ONE:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a part from 0 to 1, not {getattr(self, name)}")
        for name in ("global_area", "local_area"):
            ends = getattr(self, name)
            if len(ends) != 2 or not 0 < ends[0] <= ends[1] <= 1:
                raise ValueError(f"{name} is two parts of the area, [least, most] above 0 and up to 1, not {ends}")
        if self.holdout == 1:
            raise ValueError("holdout is below 1: something must be left to train on")
        if self.layer_decay == 0:
            raise ValueError("layer_decay is above 0 (1 is none): at 0 no layer would learn")
        if not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip is a norm above 0 (large to clip nothing), not {self.gradient_clip}")
        for entry in () if self.resume else fields(self):  # a run of older code may have been told more, and goes on
            objectives = OBJECTIVES_OF.get(entry.name, (self.objective,))
            default = entry.default_factory() if callable(entry.default_factory) else entry.default
            if getattr(self, entry.name) != default and self.objective not in objectives:
                raise ValueError(
                    f"{entry.name} is a part of objective {' and '.join(objectives)}, and {self.objective} has none"
                )
        if self.tokens_per_batch is not None:
            if self.tokens_per_batch < 1:
                raise ValueError(f"tokens_per_batch is at least 1, not {self.tokens_per_batch}")
            if self.learning_rate is None:
                raise ValueError("tokens_per_batch needs a learning_rate: the rule for null counts scans of a batch")
            if self.accumulate > 1 and "mae" in self.objective and self.model.get("loss_weighting") == "patch":
                raise ValueError(
                    "accumulate weighs packs of tokens_per_batch by their scans: not with loss_weighting patch"
                )
        if self.resume and self.restart:
            raise ValueError("resume goes on from a checkpoint and restart begins anew: one of them")
        if unknown := set(self.model) - {entry.name for entry in fields(M3RetConfig)}:
            raise ValueError(f"model has no {', '.join(sorted(unknown))}; see M3RetConfig")
        output, run = Path(self.output_dir).resolve(), Path(self.run_dir).resolve()
        if run.is_relative_to(output):
            raise ValueError(
                f"run_dir lies in output_dir ({run} in {output}), which the checkpoint replaces as a whole"
            )

    def as_launched(self, precision: str, processes: int) -> RunConfig:
        """The config of the run that was launched: with the precision that null left open, as Accelerate names it.

        Raises:
            ValueError: for a precision that a run cannot be trained at, or a learning rate that ends above its peak.
        """
        if precision not in CHOICES["precision"]:
            raise ValueError(
                f"precision: found {precision}, as `accelerate launch` says, expected bf16 or no: its scale is not "
                "kept in checkpoints"
            )
        peak = self.peak_learning_rate(processes)
        if peak < self.final_learning_rate and not self.resume:
            raise ValueError(f"final_learning_rate is at most the peak of {peak:.3g}, not {self.final_learning_rate}")
        return replace(self, precision=precision)

    def peak_learning_rate(self, processes: int) -> float:
        """The learning rate after warm-up: as set, or linear in the views of a step (MAE) or its scans (SimDINO)."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.objective != "mae":
            return 5e-4 * self.batch_size * self.accumulate * processes / 256
        return 1.5e-4 * self.batch_size * self.views_per_decode * self.accumulate * processes / 256

    def due(self, step: int) -> tuple[bool, bool]:
        """Whether this step ends with a measurement, and whether with a checkpoint; the last one does, if any does."""
        is_last = step == self.steps
        measures = self.evaluate_every > 0 and (is_last or step % self.evaluate_every == 0)
        return measures, is_last or step % self.save_every == 0

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What another run was told differently, a line each, of all that decides what is learned."""
        mine = {key: value for key, value in asdict(self).items() if key not in MAY_CHANGE_ON_RESUME}
        theirs = {key: value for key, value in other.items() if key not in MAY_CHANGE_ON_RESUME}
        theirs["precision"] = theirs.get("precision") or mine["precision"]  # earlier checkpoints may not know theirs
        return [
            f"{key}: {theirs.get(key, 'absent')} in the checkpoint, {mine.get(key, 'absent')} now"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key, "absent") != theirs.get(key, "absent")
        ]


def parse_run_config(arguments: Sequence[str] | None = None, description: str | None = None) -> RunConfig:
    """`--config FILE.yaml [--key value ...]` -> a `RunConfig`; what the command line says wins over the file.

    Lists and mappings are given as YAML: `--exclude_modalities "[mri, ct]"`, `--model "{mask_ratio: 0.9}"`.

    Raises:
        ValueError: for a key that does not exist, or a value of another type, naming both.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file with any of the keys below")
    for entry in fields(RunConfig):
        is_text = entry.type in ("str", "str | None")  # a name stays as it is written, 2024-01-01 and 0012 too
        read = str if is_text else yaml.safe_load
        option = parser.add_argument(f"--{entry.name}", type=read, default=argparse.SUPPRESS, help=str(entry.type))
        if entry.type == "bool":
            option.nargs, option.const = "?", True  # `--resume` alone says yes
    given = vars(parser.parse_args(arguments))
    values: dict[str, Any] = {}
    if path := given.pop("config"):
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return _checked(values | given)


def _checked(values: dict[str, Any]) -> RunConfig:
    types = get_type_hints(RunConfig)
    for key, value in values.items():
        if key not in types:
            raise ValueError(f"there is no key {key!r}; the keys are {', '.join(types)}")
        allowed = get_args(types[key]) if type(None) in get_args(types[key]) else (types[key],)
        kinds = [kind if isinstance(kind, type) else getattr(kind, "__origin__", kind) for kind in allowed]
        if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):  # YAML 1.1 takes 1e-3 for a word; we don't
                values[key] = value = float(value)
        if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(
                f"{key} is {' or '.join(kind.__name__ for kind in kinds)}, not {json.dumps(value, default=str)}"
            )
    return RunConfig(**values)
