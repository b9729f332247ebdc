"""Exact cosine search: the k nearest rows of a gallery, at the speed of half precision.

The search has two steps. The first computes all similarities in half precision, with a known bound of the error. The
second recomputes in float32 those rows that may be among the k best within that bound. The result is that of float32
at a third of the time: one query is as fast as memory can be read, and half precision halves the memory.
"""

from __future__ import annotations

import functools
import timeit
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.schema import require_words
from ..errors import InputError


GROUP = 64  # consecutive rows that are represented by their best similarity at first
APPROXIMATE_VALUES = 2**28  # approximate similarities held at a time: 0.5 GiB
# bytes of the gallery per product: bfloat16 blocks fit the last-level cache, float32 ones a core's own cache
BLOCK_BYTES = {torch.bfloat16: 12 * 2**20, torch.float32: 3 * 2**19}
SCORED_ROWS = 65536  # rows that are copied at a time: in a gallery of equal rows all are candidates
FEW_QUERIES = 4  # up to this number each query reads the gallery by itself; more queries share each block
# largest errors of rounding to nearest (IEEE 754): relative for a value, absolute for a similarity, which is at most 1
FLOAT16_RESULT_ERROR = 2.0**-12
BFLOAT16_ROUNDING, BFLOAT16_RESULT_ERROR = 2.0**-8, 2.0**-9
SUM_ERROR = 2.0**-12  # of a float32 sum of products; generous for any embedding dimension in use


@dataclass(frozen=True)
class Hits:
    """Result of a search. Rows of equal score are in ascending order."""

    scores: Tensor  # (q, k) float32 cosine similarities, best first; -inf where fewer than k rows were allowed
    rows: Tensor  # (q, k) int64 rows of the gallery; -1 where fewer than k rows were allowed

    @classmethod
    def empty(cls, queries: int, k: int) -> Hits:
        """Return hits without a row."""
        return cls(torch.full((queries, k), -torch.inf), torch.full((queries, k), -1, dtype=torch.int64))

    def set_best(self, query: int, scores: Tensor, rows: Tensor) -> None:
        """Set the hits of one query to the k best of some rows."""
        rows, ascending = rows.sort()
        scores = scores[ascending]
        order = torch.argsort(scores, descending=True, stable=True)[: self.rows.shape[1]]
        self.scores[query, : len(order)], self.rows[query, : len(order)] = scores[order], rows[order]


def check_queries(queries: Tensor, dimension: int, k: int, patients: Sequence[str] | None = None) -> None:
    """Raise InputError unless queries are `(q, dimension)`, finite and not zero, k is positive and patients are q."""
    if queries.ndim != 2 or queries.shape[1] != dimension:
        problem = f"queries do not match the index: expected (q, {dimension}), got {tuple(queries.shape)}."
        raise InputError(f"{problem} Embed them with the model of the index.")
    if k < 1:
        raise InputError(f"k is out of range: expected at least 1, got {k}.")
    if patients is not None:
        require_words("query_patients", patients)
        if len(patients) != len(queries):
            raise InputError(f"query_patients does not match queries: expected {len(queries)}, got {len(patients)}.")
    if not (queries.isfinite().all() and queries.ne(0).any(1).all()):
        raise InputError("queries cannot be normalised: expected finite embeddings, got NaN, infinity or only zeros.")


def exact_scores(gallery: Tensor, rows: Tensor, query: Tensor) -> Tensor:
    """Return the similarities of some rows in float32. Unlike in a matrix product, equal rows have equal scores."""
    blocks = [(gallery[block].float() * query).sum(1) for block in rows.split(SCORED_ROWS)]
    return torch.cat(blocks) if blocks else torch.empty(0)


@torch.autocast("cpu", enabled=False)  # autocast would change the precision that the error bounds assume
def search_exactly(
    gallery: Tensor, queries: Tensor, k: int, excluded: list[Tensor] | None = None, allowed: Tensor | None = None
) -> Hits:
    """Return the k most similar rows of each query.

    Args:
        gallery: `(n, d)` float16 rows of norm 1; may be memory-mapped.
        queries: `(q, d)` float32 of norm 1.
        k: number of hits, at least 1.
        excluded: for each query, int64 rows that are left out.
        allowed: `(n,)` bool, rows that may be found; None for all.

    Raises:
        InputError: if the shapes do not match, a query is zero or not finite, or k is not positive.
    """
    check_queries(queries, gallery.shape[1], k)
    hits = Hits.empty(len(queries), k)
    few = len(queries) <= FEW_QUERIES
    batch_size = FEW_QUERIES if few else max(1, APPROXIMATE_VALUES // max(1, len(gallery)))
    for start in range(0, len(queries), batch_size):
        batch = queries[start : start + batch_size].float()
        approximate, errors = _scores_per_query(gallery, batch) if few else _scores_in_blocks(gallery, batch)
        if allowed is not None:
            approximate[:, : len(gallery)].masked_fill_(~allowed, -torch.inf)
        if excluded is not None:
            for index, excluded_rows in enumerate(excluded[start : start + batch_size]):
                approximate[index, excluded_rows] = -torch.inf
        group_best = approximate.unflatten(1, (-1, GROUP)).amax(2)  # (q, groups)
        for index, query in enumerate(batch):
            candidates = _candidates(approximate[index], group_best[index], float(errors[index]), k)
            hits.set_best(start + index, exact_scores(gallery, candidates, query), candidates)
    return hits


@functools.cache
@torch.autocast("cpu", enabled=False)
def block_dtype() -> torch.dtype:
    """Return the dtype in which blocks are multiplied: bfloat16 if it is faster on this processor, else float32.

    It is measured once, in a few milliseconds, because PyTorch does not report it for every processor. With AVX2 only,
    100 queries took five times as long in bfloat16; with AMX large products take about half the time.
    """

    def seconds(dtype: torch.dtype) -> float:
        queries, block = torch.ones(64, 768, dtype=dtype), torch.ones(2048, 768, dtype=dtype)
        return min(timeit.repeat(lambda: queries @ block.T, repeat=4, number=1))

    return min((torch.bfloat16, torch.float32), key=seconds)


def _empty_scores(queries: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Allocate similarities `(q, n)`, padded with -inf to whole groups."""
    scores = torch.empty(queries, -(-rows // GROUP) * GROUP, dtype=dtype)
    scores[:, rows:] = -torch.inf
    return scores


def _scores_per_query(gallery: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return similarities in float16 and, for each query, the bound of their error."""
    half = queries.half()
    scores = _empty_scores(len(queries), len(gallery), torch.float16)
    for index, query in enumerate(half):
        scores[index, : len(gallery)] = torch.mv(gallery, query)
    return scores, (queries - half.float()).norm(dim=1) + FLOAT16_RESULT_ERROR + SUM_ERROR


def _scores_in_blocks(gallery: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for many queries, which share each block of the gallery.

    With bfloat16 the gallery is rounded too; with float32 only the results are.
    """
    dtype = block_dtype()
    bfloat16 = dtype == torch.bfloat16
    rounded = queries.to(dtype)
    scores = _empty_scores(len(queries), len(gallery), torch.bfloat16 if bfloat16 else torch.float16)
    rows = max(1, BLOCK_BYTES[dtype] // (dtype.itemsize * max(1, gallery.shape[1])))
    for start in range(0, len(gallery), rows):
        block = gallery[start : start + rows]
        scores[:, start : start + len(block)] = rounded @ block.to(dtype).T
    error = BFLOAT16_ROUNDING + BFLOAT16_RESULT_ERROR if bfloat16 else FLOAT16_RESULT_ERROR
    return scores, (queries - rounded.float()).norm(dim=1) + SUM_ERROR + error


def _candidates(scores: Tensor, group_best: Tensor, error: float, k: int) -> Tensor:
    """Return the rows that may be among the k best, ascending.

    The k-th best of the groups' best scores is a lower bound of the k-th best score, and much faster to find. A row
    among the k best is at most twice the error below it.
    """
    kth_best = float(torch.topk(group_best, k).values[-1]) if len(group_best) >= k else -torch.inf
    threshold = kth_best - 2 * error - BFLOAT16_RESULT_ERROR  # a comparison rounds it to the precision of `scores`
    groups = torch.nonzero(group_best >= threshold).flatten()
    rows = (groups[:, None] * GROUP + torch.arange(GROUP)).flatten()
    values = scores[rows]
    return rows[(values >= threshold) & (values > -torch.inf)]
