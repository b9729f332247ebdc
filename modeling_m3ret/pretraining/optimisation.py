"""AdamW and its schedule for vision transformers: which weights decay, and the learning rate over the steps."""

from __future__ import annotations

import math

import torch
from torch import nn

from .run_config import RunConfig


def build_optimiser(model: nn.Module, config: RunConfig, learning_rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: no decay on biases, norms, gains and tokens, as in MAE and DINO."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.endswith("_token") and not name.endswith("_tokens")
        (decayed if is_matrix else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, config.adam_beta2), fused=True)


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on the peak learning rate: linear up to 1 at `warmup`, then half a cosine down to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
