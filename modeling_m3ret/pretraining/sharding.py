"""Training on several processes: each holds the whole model (DDP) or a part of every weight (FSDP2), as launched.

What is different under FSDP2 is here, so that the loop, the measurements and the checkpoints read the same for both.
"""

from __future__ import annotations

from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from ..configuration_m3ret import M3RetConfig
from ..modeling_m3ret import M3RetModel


# settings of Accelerate's FSDP that would train something else, and what to do instead
REFUSED = {
    "cpu_ram_efficient_loading": "every process makes the same weights by itself",
    "activation_checkpointing": "layers computed again would draw another stochastic depth; the run's "
    "gradient_checkpointing keeps it",
}


def prepare_training(
    accelerator: Accelerator, objective: nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimiser for as many processes as there are, on their devices; every rank must hold the same weights.

    Under FSDP2 weights, their gathering, gradients and optimiser stay in float32, and the forward is to run under
    `accelerator.autocast`: so every operation meets the dtypes that it has under DDP. The policy that Accelerate makes
    of `mixed_precision: bf16` would halve what is sent, but rounds more than weights: the pixels that are predicted,
    the noise that masks are drawn from, the residual stream, sums of gradients and the loss.

    Raises:
        ValueError: for settings of FSDP that would not train what DDP trains.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"fsdp_version: found {plugin.fsdp_version}, expected 2, which shards weight by weight")
        for setting, instead in REFUSED.items():
            if getattr(plugin, setting):
                raise ValueError(f"fsdp_{setting}: found true, expected false: {instead}")
        plugin.mixed_precision_policy = MixedPrecisionPolicy()  # nothing is cast
    return accelerator.prepare(objective, optimiser)


def clip_gradient(accelerator: Accelerator, model: nn.Module, largest_norm: float) -> Tensor:
    """Scale the gradient down to `largest_norm` if it is longer; its norm before, over all shards, on every rank."""
    norm = accelerator.clip_grad_norm_(model.parameters(), largest_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def whole_encoder(encoder: M3RetModel) -> M3RetModel:
    """The encoder to embed with on each rank by itself, in eval mode; to be called by all ranks at once.

    Sharded weights are gathered into it. All that is whole on each rank is not copied but shared: every weight without
    FSDP2, and always the whitening, so that what is fitted to the one is in the other.
    """
    state: dict[str, Tensor] = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in encoder.state_dict().items()
    }
    with torch.device("meta"):
        whole = M3RetModel(cast(M3RetConfig, encoder.config))
    whole.load_state_dict(state, assign=True)
    return whole.eval()
