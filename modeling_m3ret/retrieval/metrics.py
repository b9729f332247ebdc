"""How good is a ranking? Precision, hits and average precision per query, and what chance would give, in closed form.

Definitions: Manning, Raghavan, Schütze, "Introduction to Information Retrieval", chapter 8. All functions take what a
query's candidates are (its own group is no candidate) and average nothing, so that callers choose what to average.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class QueryScores(NamedTuple):
    """One number a query: P@1, R@5 (any relevant among the first five) and average precision over the ranking."""

    precision_at_1: Tensor
    recall_at_5: Tensor
    average_precision: Tensor

    def mean(self) -> tuple[float, float, float]:
        return tuple(float(scores.mean()) for scores in self)  # type: ignore[return-value]


def score_queries(similarity: Tensor, relevant: Tensor, candidate: Tensor) -> tuple[QueryScores, QueryScores, Tensor]:
    """Scores of the queries that have something to find.

    Args:
        similarity: `(Q, G)` float, larger is more alike. Of equal ones the earlier in the gallery ranks first.
        relevant: `(Q, G)` bool. candidate: `(Q, G)` bool: what may be returned at all.

    Returns:
        The scores, what a random order of the candidates is expected to score, and which queries (bool `(Q,)`) have at
        least one relevant candidate; the scores are those queries'.
    """
    relevant = relevant & candidate
    answerable = relevant.any(1)
    similarity, relevant, candidate = similarity[answerable], relevant[answerable], candidate[answerable]
    order = similarity.masked_fill(~candidate, -torch.inf).argsort(dim=1, descending=True, stable=True)
    hits = relevant.gather(1, order).double()  # (Q', G), the relevant in ranked order; non-candidates come last
    ranks = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64)
    precision = hits.cumsum(1) / ranks
    scores = QueryScores(hits[:, 0], hits[:, :5].amax(1), (precision * hits).sum(1) / hits.sum(1))
    return scores, expected_at_random(relevant.sum(1), candidate.sum(1)), answerable


def expected_at_random(relevant: Tensor, candidates: Tensor) -> QueryScores:
    """Expected scores of a random order, for R relevant `(Q,)` of N candidates `(Q,)`.

    P@1 = R/N. R@5 = 1 - C(N-R, 5) / C(N, 5). With E[hit at k] = R/N and E[hit at j and k] = R(R-1) / (N(N-1)),
    AP = H_N/N + (R-1)/(N-1) (1 - H_N/N), where H_N is the N-th harmonic number.
    """
    R, N = relevant.double(), candidates.double()
    missed = torch.ones_like(N)
    for drawn in range(5):
        missed = missed * ((N - R - drawn).clamp(min=0) / (N - drawn).clamp(min=1))
    harmonic = torch.digamma(N + 1) + 0.5772156649015329  # Euler's constant: H_N = digamma(N + 1) + gamma
    return QueryScores(R / N, 1 - missed, harmonic / N + (R - 1) / (N - 1).clamp(min=1) * (1 - harmonic / N))
