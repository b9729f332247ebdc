"""Everything a pretraining run can be told: one dataclass, filled from a YAML file and `--key value` overrides."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from ..configuration_m3ret import M3RetConfig


@dataclass
class RunConfig:
    """
    output_dir: the checkpoint folder that the run ends with, a name that `from_pretrained` takes.
    run_dir: what the run writes on its way (`metrics.jsonl`, trackers).
    data: folder with a `manifest.csv`, or `phantom[:SUBJECTS[:SEED]]`.
    exclude_modalities: never seen in pretraining; MRI, as in the paper, to have an unseen modality to test on.
    holdout: part of the patients kept out of pretraining; the closing table is theirs.
    objective: what is learned: `mae` (masked autoencoding) or `simdino` (self-distillation).
    preset: vitt, vits, vitb or vitl. model: overrides of `M3RetConfig`.
    size, num_frames, max_patches: the processor's size policy, for the views in training and for the checkpoint.
    steps: optimiser steps. batch_size: scans decoded in a step by each process; views_per_decode: random crops of
        each for MAE, so that a step learns from batch_size x views_per_decode views.
    local_views, local_size: SimDINO's local crops of each scan, and their size (the global ones have `size`); 10 of 96
        in its published command for ViT-B.
    compression_weight, expansion_weight: of SimDINO's two terms, as shares of their maxima, see `SimDINOLoss`.
    teacher_momentum: where the cosine to 1 starts, .996 as published.
    learning_rate, weight_decay, adam_beta2: AdamW of MAE (arXiv 2111.06377, table 8): 1.5e-4 for 256 views a step,
        times views / 256, is what `learning_rate: null` resolves to; decay .05; betas .9 and .95.
    warmup_fraction: part of the steps with a linear warm-up; 40 of MAE's 800 epochs.
    gradient_clip: largest norm of the gradient. MAE clips nothing; at 3 (SimDINO's) only an outlier batch is cut.
    num_workers: processes that decode, beside each training process. cache_gib: memory, in GiB over all workers of a
        process, that keeps decoded scans for the next epoch. Each worker has its own part and meets any scan, so with
        one worker a collection that fits is decoded once, with more it takes some epochs.
    seed: of weights, order, crops and masks.
    log_every: steps between lines in `metrics.jsonl`. report_to: trackio, tensorboard or wandb.
    """

    output_dir: str = "m3ret-vitb"
    run_dir: str = "runs/vitb"
    data: str = "phantom"
    exclude_modalities: list[str] = field(default_factory=lambda: ["mri"])
    holdout: float = 0.3
    objective: str = "mae"
    preset: str = "vitb"
    model: dict[str, Any] = field(default_factory=dict)
    size: int = 224
    num_frames: int = 32
    max_patches: int = 2048
    steps: int = 100_000
    batch_size: int = 64
    views_per_decode: int = 4
    local_views: int = 10
    local_size: int = 96
    compression_weight: float = 1.0
    expansion_weight: float = 0.45
    teacher_momentum: float = 0.996
    learning_rate: float | None = None
    weight_decay: float = 0.05
    adam_beta2: float = 0.95
    warmup_fraction: float = 0.05
    gradient_clip: float = 3.0
    num_workers: int = 4
    cache_gib: float = 0.0
    seed: int = 0
    log_every: int = 10
    report_to: str | None = None

    def __post_init__(self) -> None:
        if self.objective not in ("mae", "simdino"):
            raise ValueError(f"objective is mae or simdino, not {self.objective!r}")
        if self.preset not in ("vitt", "vits", "vitb", "vitl"):
            raise ValueError(f"preset is vitt, vits, vitb or vitl, not {self.preset!r}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout is a part from 0 to below 1, not {self.holdout}")
        positive = (
            "steps",
            "batch_size",
            "views_per_decode",
            "log_every",
            "size",
            "num_frames",
            "max_patches",
            "local_size",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        for name in (
            "num_workers",
            "local_views",
            "cache_gib",
            "weight_decay",
            "compression_weight",
            "expansion_weight",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is not negative, but {getattr(self, name)} is")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction is a part from 0 to 1, not {self.warmup_fraction}")
        if self.gradient_clip <= 0:
            raise ValueError(f"gradient_clip is a norm above 0 (large to clip nothing), not {self.gradient_clip}")
        if unknown := set(self.model) - {entry.name for entry in fields(M3RetConfig)}:
            raise ValueError(f"model has no {', '.join(sorted(unknown))}; see M3RetConfig")
        output, run = Path(self.output_dir).resolve(), Path(self.run_dir).resolve()
        if run.is_relative_to(output):
            raise ValueError(
                f"run_dir lies in output_dir ({run} in {output}), which the checkpoint replaces as a whole"
            )

    def peak_learning_rate(self, processes: int) -> float:
        """The learning rate after warm-up: as set, or linear in the views of a step (MAE) or its scans (SimDINO)."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.objective == "simdino":
            return 5e-4 * self.batch_size * processes / 256
        return 1.5e-4 * self.batch_size * self.views_per_decode * processes / 256


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
        parser.add_argument(f"--{entry.name}", type=read, default=argparse.SUPPRESS, help=str(entry.type))
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
