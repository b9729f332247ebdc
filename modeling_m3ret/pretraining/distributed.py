"""Training on several processes, with the whole model on each (DDP) or its weights sharded (FSDP2).

All that differs under FSDP2 is here: the training loop, the evaluation and the checkpoints are the same for both. The
sums over ranks make the loss and its gradient those of one large batch, however it is split over ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from ..configuration_m3ret import M3RetConfig
from ..cpu import has_bfloat16
from ..errors import InputError
from ..modeling_m3ret import M3RetModel
from .adapters import merge_adapters


logger = logging.getLogger(__name__)
T = TypeVar("T")


class LaunchError(InputError):
    """A setting of `accelerate launch` that training does not support."""

    def __init__(self, setting: str, problem: str):
        super().__init__(f"{setting}: {problem}")
        self.setting = setting  # its name in the Accelerate config file


# FSDP settings of Accelerate that would change the result, and the reason
UNSUPPORTED = {
    "cpu_ram_efficient_loading": "Every process initialises the same weights by itself.",
    "activation_checkpointing": "Recomputed layers would draw another stochastic depth. Use gradient_checkpointing of "
    "the run instead.",
}


def supported_precision(precision: str | None) -> str | None:
    """Return the mixed precision for `Accelerator`: "no" instead of "bf16" on a CPU without instructions for bfloat16.

    Args:
        precision: of the run config; None follows `accelerate launch`.
    """
    requested = precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    uses_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if requested != "bf16" or not uses_cpu or has_bfloat16():
        return precision
    if int(os.environ.get("RANK", "0")) == 0:
        logger.warning(
            "precision bf16 is emulated on this CPU: expected instructions for bfloat16 (AVX-512 BF16, AMX or Arm "
            "BF16), got none. Training in float32 instead, which is several times as fast. Set `--precision no`."
        )
    return "no"


def check_process_count(processes: int) -> None:
    """Check that `accelerate launch` started as many processes as it was asked for.

    Without several GPUs or `--multi_gpu` it starts one, whatever `--num_processes` says, and gives it the address where
    the others would meet, but no world size.

    Args:
        processes: number of processes of this run.

    Raises:
        LaunchError: if this is the only process of several.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if processes == 1 and launched and "WORLD_SIZE" not in os.environ:
        raise LaunchError(
            "num_processes",
            "expected several processes that meet at MASTER_ADDR, got one. `accelerate launch` starts several only for "
            "several GPUs or with --multi_gpu. On CPUs run `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            "--num_processes 2 train.py ...`, without --cpu. For one process unset MASTER_ADDR.",
        )


def prepare_training(
    accelerator: Accelerator, objective: nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Prepare model and optimiser for DDP or FSDP2. Every rank must hold the same weights.

    Under FSDP2 weights, gradients, optimiser and communication stay in float32, and the forward pass runs under
    `accelerator.autocast`, so that every operation has the dtypes it has under DDP. Accelerate's own policy for
    `mixed_precision: bf16` would halve the communication, but would also round the target pixels, the mask noise, the
    residual stream, gradient sums and the loss.

    Raises:
        LaunchError: if an FSDP setting would change the result.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise LaunchError("fsdp_version", f"expected 2, got {plugin.fsdp_version}.")
        for setting, reason in UNSUPPORTED.items():
            if getattr(plugin, setting):
                raise LaunchError(f"fsdp_{setting}", f"expected false, got true. {reason}")
        plugin.mixed_precision_policy = MixedPrecisionPolicy()  # casts nothing
    return accelerator.prepare(objective, optimiser)


def clip_gradient(accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradient to `max_norm`. Return its norm before clipping, over all shards, on every rank."""
    return _whole(accelerator.clip_grad_norm_(model.parameters(), max_norm))


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def gather_encoder(encoder: M3RetModel) -> M3RetModel:
    """Return the whole encoder in eval mode, without adapters, on every rank. All ranks must call it together.

    Sharded weights are gathered and adapters merged. Other tensors are shared, not copied: all weights without FSDP2
    and adapters, and always the whitening, so that fitting it on the returned encoder also fits it on `encoder`.
    """
    state = merge_adapters({name: _whole(value) for name, value in encoder.state_dict().items()})
    with torch.device("meta"):
        whole = M3RetModel(cast(M3RetConfig, encoder.config))
    whole.load_state_dict(state, assign=True)
    return whole.eval()


def decide_on_main(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """Return what `decide` returns on the main rank, on every rank. All ranks must call it together.

    Ranks that decide by themselves may disagree, because they may round a number or see a shared folder differently.

    Raises:
        InputError: on every rank, if `decide` raised one on the main rank.
    """
    outcome: list[tuple[T | None, str | None]] = [(None, None)]
    if accelerator.is_main_process:
        try:
            outcome = [(decide(), None)]
        except InputError as error:
            broadcast_object_list([(None, str(error))])
            raise
    value, problem = broadcast_object_list(outcome)[0]
    if problem is not None:
        raise InputError(problem)
    return cast(T, value)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too, because every rank's loss depends on the inputs of all ranks."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, with its gradient."""
    if world_size() == 1:
        return value
    return _SumOverRanks.apply(value)


def count_over_ranks(count: int, device: torch.device) -> int:
    """Return the sum of a count over all ranks."""
    if world_size() == 1:
        return count
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return int(total)


def rank_weight(count: int, device: torch.device) -> float:
    """Return this rank's count divided by the mean count of all ranks; 0 if all counts are 0.

    Gradients are averaged over ranks. A mean over the scans of each rank, multiplied by this weight, therefore becomes
    the mean over all scans, even if ranks hold different numbers of them.
    """
    return count * world_size() / max(1, count_over_ranks(count, device))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
