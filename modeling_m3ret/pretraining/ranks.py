"""Sums over all processes of a training, of tensors with their gradient and of counts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too: every rank's loss depends on every rank's part."""

    @staticmethod
    def forward(ctx: object, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(part: Tensor) -> Tensor:
    """The sum of all ranks' parts; alone, the part itself."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return part
    return _SumOverRanks.apply(part)


def total_over_ranks(count: int, device: torch.device) -> int:
    """The sum of all ranks' counts; alone, the count itself."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return int(total)


def part_of_rank(count: int, device: torch.device) -> float:
    """This rank's count over the mean of all ranks'. Gradients are averaged over ranks: a mean over this rank's scans
    times its part makes that the mean over all scans, where ranks hold different numbers of them. 0 if none has any."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return count * ranks / max(1, total_over_ranks(count, device))
