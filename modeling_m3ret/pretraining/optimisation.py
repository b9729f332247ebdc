"""The optimiser step: gradients of several packs, AdamW for vision transformers, and its schedules."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..data.loading import Pack
from ..image_processing_m3ret import M3RetImageProcessor
from .distributed import count_over_ranks
from .run_config import RunConfig


def accumulate_gradients(
    accelerator: Accelerator, model: nn.Module, packs: Sequence[Pack], processor: M3RetImageProcessor
) -> tuple[dict[str, Tensor], int]:
    """Add up the gradients of a step's packs so that every view of every rank has the same weight.

    A pack is weighted by its fraction of the step's views over all ranks; within a pack, the objective weights the
    ranks. All ranks must call it together, with the same number of packs. Return `loss` and the objective's terms, as
    weighted means over the packs of this rank; and the number of views of all ranks.
    """
    views = [count_over_ranks(len(pack.scans), accelerator.device) for pack in packs]
    means: dict[str, Tensor] = {}
    for index, pack in enumerate(packs):
        divisor = sum(views) / views[index]
        is_last = index == len(packs) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            with accelerator.autocast():
                loss, terms = model(**pack.inputs(processor, accelerator.device, compact_images=True))
            accelerator.backward(loss / divisor)
        for name, term in {"loss": loss, **terms}.items():
            means[name] = means.get(name, 0) + term.detach() / divisor
    return means, sum(views)


def build_optimiser(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """Build a fused AdamW with weight decay on matrices only, not on biases, norms, gains and tokens (MAE, DINO).

    Each parameter group holds its `learning_rate_scale` and whether it `decays`, for `set_schedule`.
    """
    depth = 1 + max((layer for name, _ in model.named_parameters() if (layer := _encoder_layer(name)) is not None))
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # a teacher has no gradients
            is_matrix = parameter.ndim >= 2 and not name.endswith(("_token", "_tokens", "mask_patch"))
            scale = learning_rate_scale(name, depth, config.layer_decay)
            groups.setdefault((scale, is_matrix), []).append(parameter)
    settings = [
        {"params": parameters, "learning_rate_scale": scale, "decays": decays}
        for (scale, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, betas=(0.9, config.adam_beta2), fused=True)


def learning_rate_scale(name: str, depth: int, layer_decay: float) -> float:
    """Return `layer_decay` to the power of the number of layers above a parameter (BEiT, arXiv 2106.08254).

    The embeddings have the lowest learning rate; norm, heads and decoder have the full one. SimDINOv2 uses 0.9.
    """
    if re.search(r"(^|\.)embeddings\.", name):
        return layer_decay ** (depth + 1)
    layer = _encoder_layer(name)
    return 1.0 if layer is None else layer_decay ** (depth - layer)


def _encoder_layer(name: str) -> int | None:
    found = re.search(r"(^|\.)encoder\.layers\.(\d+)\.", name)
    return int(found[2]) if found else None


def set_schedule(optimiser: torch.optim.Optimizer, config: RunConfig, step: int, processes: int) -> float:
    """Set the learning rate and weight decay of `step`. Return the learning rate.

    The learning rate follows `warmup_cosine` down to `final_learning_rate`. The weight decay follows half a cosine from
    `weight_decay` to `final_weight_decay`, as in DINO, or is constant.
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
    """Return a factor on the peak learning rate: linear to 1 at `warmup`, then half a cosine to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return half_cosine((step - warmup) / max(1, steps - warmup))


def half_cosine(fraction: float) -> float:
    """Return half a cosine, from 1 at 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * fraction))
