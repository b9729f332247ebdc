"""Interleaved timing, shared by the benchmarks: a machine that slows down slows both sides of a comparison."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that a call takes."""
    start = clock()
    call()
    return clock() - start


def interleaved_seconds(
    calls: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round. All are called once before, to warm up."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, clock))
    return times


def speed_ratio(ours: Sequence[float], others: Sequence[float]) -> str:
    """Format the median of the ratios of speeds, round by round, with the smallest and the largest."""
    ratios = [other / our for our, other in zip(ours, others, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def compare(calls: Mapping[str, Callable[[], object]], pairs: Sequence[tuple[str, str]], rounds: int) -> None:
    """Time calls in interleaved rounds; print the median time of each, and the ratio of speeds of each pair."""
    times = interleaved_seconds(calls, rounds)
    for name, taken in times.items():
        print(f"{name:28s} {statistics.median(taken) * 1e3:9.1f} ms")
    for ours, other in pairs:
        print(f"{ours} over {other}: speed ratio {speed_ratio(times[ours], times[other])}", flush=True)


def pad_to_longest(scans: Sequence[Tensor]) -> Tensor:
    """Return one dense tensor of the largest depth, height and width, as a model without packing needs it."""
    shape = [max(scan.shape[axis] for scan in scans) for axis in range(1, 4)]
    batch = torch.zeros(len(scans), scans[0].shape[0], *shape)
    for index, scan in enumerate(scans):
        batch[index, :, : scan.shape[1], : scan.shape[2], : scan.shape[3]] = scan
    return batch
