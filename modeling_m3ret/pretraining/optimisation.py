"""AdamW for vision transformers: which weights decay, which learn slower, and how both change over the steps."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from .run_config import RunConfig


def build_optimiser(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """Fused AdamW. Weight decay on matrices only: not on biases, norms, gains and tokens, as in MAE and DINO.

    Each group knows its `learning_rate_scale` and whether it `decays`; `set_schedule` turns them into numbers.
    """
    depth = 1 + max((layer for name, _ in model.named_parameters() if (layer := _encoder_layer(name)) is not None))
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # a teacher learns from its student alone
            is_matrix = parameter.ndim >= 2 and not name.endswith(("_token", "_tokens", "mask_patch"))
            scale = learning_rate_scale(name, depth, config.layer_decay)
            groups.setdefault((scale, is_matrix), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "learning_rate_scale": scale, "decays": decays}
            for (scale, decays), parameters in groups.items()
        ],
        betas=(0.9, config.adam_beta2),
        fused=True,
    )


def learning_rate_scale(name: str, depth: int, layer_decay: float) -> float:
    """`layer_decay` to the power of the layers above a weight: the embeddings learn slowest, what follows the encoder
    (norm, heads, decoder) at the full rate. BEiT (arXiv 2106.08254); SimDINOv2 takes .9."""
    if re.search(r"(^|\.)embeddings\.", name):
        return layer_decay ** (depth + 1)
    layer = _encoder_layer(name)
    return 1.0 if layer is None else layer_decay ** (depth - layer)


def _encoder_layer(name: str) -> int | None:
    found = re.search(r"(^|\.)encoder\.layers\.(\d+)\.", name)
    return int(found[2]) if found else None


def set_schedule(optimiser: torch.optim.Optimizer, config: RunConfig, step: int, processes: int) -> float:
    """Give the optimiser the learning rate and weight decay of `step`; returns the learning rate.

    The learning rate by `warmup_cosine` down to `final_learning_rate`; the weight decay by half a cosine from
    `weight_decay` to `final_weight_decay`, as in DINO, or constant.
    """
    peak, last = config.peak_learning_rate(processes), config.final_learning_rate
    warmup = max(1, round(config.warmup_fraction * config.steps))
    factor = warmup_cosine(step, config.steps, warmup)
    learning_rate = peak * factor if step < warmup else last + (peak - last) * factor
    final_decay = config.weight_decay if config.final_weight_decay is None else config.final_weight_decay
    weight_decay = final_decay + (config.weight_decay - final_decay) * half_cosine(step / config.steps)
    for group in optimiser.param_groups:
        group["lr"] = learning_rate * group["learning_rate_scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    return learning_rate


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on the peak learning rate: linear up to 1 at `warmup`, then half a cosine down to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return half_cosine((step - warmup) / max(1, steps - warmup))


def half_cosine(part: float) -> float:
    """From 1 at 0 down to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * part))
