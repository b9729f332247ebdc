"""The k nearest of a gallery by cosine similarity, exactly, at the speed of half precision.

Two steps: similarities in half precision, whose error has a bound; then those that may be among the k best by that
bound once more in float32. So the result is that of float32, at a third of its time: a search of one query is as fast
as memory can be read, and memory holds half as much. Many queries are multiplied in what the processor does fastest.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch
from torch import Tensor


GROUP = 64  # neighbouring rows of which the best alone is looked at first
ROUGH_VALUES = 2**28  # rough similarities at a time: half a GiB
# Of the gallery at a time, as it is multiplied: what the last cache holds, or of the slower float32 each core's own.
BLOCK_BYTES = {torch.bfloat16: 12 * 2**20, torch.float32: 3 * 2**19}
FEW_QUERIES = 4  # up to so many, each is read through memory by itself; more share each block
# Largest errors of rounding to nearest (IEEE 754): relative, and of a similarity, which is at most 1.
HALF_RESULT = 2.0**-12
BRAIN_ROUNDING, BRAIN_RESULT = 2.0**-8, 2.0**-9
SUM_ERROR = 2.0**-12  # of a sum of products in float32: far less for any dimension in use


@dataclass(frozen=True)
class Hits:
    """scores: `(q, k)` float32, cosine similarity, best first; rows: `(q, k)` int64, of the gallery. Where fewer than k
    were allowed, rows end in -1 and scores in -inf. Equal scores come in the order of rows."""

    scores: Tensor
    rows: Tensor


@torch.autocast("cpu", enabled=False)  # within it, no product would be what its bound is of
def search_exactly(
    gallery: Tensor,
    queries: Tensor,
    k: int,
    banned: list[Tensor] | None = None,
    rounding: float = BRAIN_ROUNDING,
    allowed: Tensor | None = None,
) -> Hits:
    """The k most similar rows of each query.

    Args:
        gallery: `(n, d)` float16, rows of norm 1; may be a map of a file. queries: `(q, d)` float32 of norm 1.
        banned: for each query, rows that must not be found. rounding: how far a row may move when rounded to bfloat16;
            `bfloat16_rounding(gallery)` is less than half of what holds for any, and so are the rows to look at twice.
            Where `block_type()` is float32, and of a few queries, it changes nothing.
        allowed: `(n,)` bool, which rows may be found; None for all.

    Raises:
        ValueError: if shapes do not fit, or k is not positive.
    """
    if gallery.ndim != 2 or queries.ndim != 2 or queries.shape[1] != gallery.shape[1] or k < 1:
        raise ValueError(f"gallery {tuple(gallery.shape)} and queries {tuple(queries.shape)} do not fit, or k is {k}")
    scores = torch.full((len(queries), k), -torch.inf)
    rows = torch.full((len(queries), k), -1, dtype=torch.int64)
    together = FEW_QUERIES if len(queries) <= FEW_QUERIES else max(1, ROUGH_VALUES // max(1, len(gallery)))
    for start in range(0, len(queries), together):
        part = queries[start : start + together].float()
        rough, error = (
            _one_by_one(gallery, part)
            if len(queries) <= FEW_QUERIES
            else _in_blocks(gallery, part, rounding, block_type())
        )
        if allowed is not None:
            rough[:, : len(gallery)].masked_fill_(~allowed, -torch.inf)
        for place in range(len(part)):
            if banned is not None:
                rough[place, banned[start + place]] = -torch.inf
        best = rough.unflatten(1, (-1, GROUP)).amax(2)  # (q, groups)
        for place, query in enumerate(part):
            found = _candidates(rough[place], best[place], float(error[place]), k)
            exact = gallery[found].float() @ query
            order = torch.argsort(exact, descending=True, stable=True)[:k]
            scores[start + place, : len(order)] = exact[order]
            rows[start + place, : len(order)] = found[order]
    return Hits(scores, rows)


def bfloat16_rounding(gallery: Tensor) -> float:
    """The largest distance between a row and the same row in bfloat16."""
    distances = [
        (block.float() - block.bfloat16().float()).norm(dim=1).max() for block in _blocks(gallery, torch.float32)
    ]
    return max((float(distance) for distance in distances), default=0.0)


@functools.cache
@torch.autocast("cpu", enabled=False)
def block_type() -> torch.dtype:
    """What blocks are multiplied in: bfloat16 where this processor has instructions for it, else float32.

    Measured, once and in some milliseconds: nothing that PyTorch tells says it of every processor. Without them (one
    with AVX2) 100 queries took five times as long in bfloat16; with AMX large products take some half as long in it.
    """
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        queries, block = torch.ones(64, 768, dtype=dtype), torch.ones(2048, 768, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            queries @ block.T
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return min(seconds, key=lambda dtype: seconds[dtype])


def _blocks(gallery: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return gallery.split(max(1, BLOCK_BYTES[dtype] // (dtype.itemsize * max(1, gallery.shape[1]))))


def _room(queries: int, rows: int, dtype: torch.dtype) -> Tensor:
    """For rough similarities, `(q, n)` and what fills the last group, where nothing is found."""
    rough = torch.empty(queries, -(-rows // GROUP) * GROUP, dtype=dtype)
    rough[:, rows:] = -torch.inf
    return rough


def _one_by_one(gallery: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities in half precision, and of each query how far they can be off."""
    half = queries.half()
    rough = _room(len(queries), len(gallery), torch.float16)
    for place, query in enumerate(half):
        rough[place, : len(gallery)] = torch.mv(gallery, query)
    return rough, (queries - half.float()).norm(dim=1) + HALF_RESULT + SUM_ERROR


def _in_blocks(gallery: Tensor, queries: Tensor, rounding: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As above, of blocks that all queries share. In bfloat16 the gallery is rounded too; in float32 only results."""
    rounded = queries.to(dtype)
    rough = _room(len(queries), len(gallery), torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    start = 0
    for block in _blocks(gallery, dtype):
        rough[:, start : start + len(block)] = rounded @ block.to(dtype).T
        start += len(block)
    error = (queries - rounded.float()).norm(dim=1) + SUM_ERROR
    return rough, error + (rounding + BRAIN_RESULT if dtype == torch.bfloat16 else HALF_RESULT)


def _candidates(rough: Tensor, best: Tensor, error: float, k: int) -> Tensor:
    """Rows that may be among the k best, ascending.

    The k-th best of the groups' best is no better than the k-th best of all, and found in a fraction of the time. What
    is among the k best lies within twice the error of it, or above.
    """
    kth = float(torch.topk(best, k).values[-1]) if len(best) >= k else -torch.inf
    least = kth - 2 * error - BRAIN_RESULT  # a comparison rounds its number to the precision of `rough`
    groups = torch.nonzero(best >= least).flatten()
    rows = (groups[:, None] * GROUP + torch.arange(GROUP)).flatten()
    values = rough[rows]
    return rows[(values >= least) & (values > -torch.inf)]
