"""Scores against loops written from the definitions, and chance against what shuffling gives."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor

from modeling_m3ret.retrieval.metrics import (
    expected_at_random,
    feature_std,
    jackknife_interval,
    knn_accuracy,
    map_without_each,
    rank_me,
    score_queries,
)


def loops(similarity: Tensor, relevant: Tensor, candidate: Tensor) -> list[tuple[float, float, float] | None]:
    """P@1, R@5 and AP of each query, one gallery item at a time; None where nothing can be found."""
    scores: list[tuple[float, float, float] | None] = []
    for query in range(len(similarity)):
        items = [item for item in range(similarity.shape[1]) if candidate[query, item]]
        ranking = sorted(items, key=lambda item: (-float(similarity[query, item]), item))
        hits = [bool(relevant[query, item]) for item in ranking]
        if not any(hits):
            scores.append(None)
            continue
        precisions = [sum(hits[: rank + 1]) / (rank + 1) for rank, hit in enumerate(hits) if hit]
        scores.append((float(hits[0]), float(any(hits[:5])), sum(precisions) / sum(hits)))
    return scores


@pytest.mark.parametrize("seed", range(20))
def test_scores_against_loops(seed: int) -> None:
    """Random galleries with ties, queries with nothing to find, and galleries smaller than five."""
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = 12, int(torch.randint(2, 30, (1,), generator=generator))
    similarity = torch.randint(0, 6, (queries, gallery), generator=generator) / 5  # many ties
    relevant = torch.rand(queries, gallery, generator=generator) < 0.2
    candidate = torch.rand(queries, gallery, generator=generator) < 0.8
    expected = loops(similarity, relevant, candidate)
    scores, _, answerable = score_queries(similarity, relevant, candidate)
    assert answerable.tolist() == [score is not None for score in expected]
    for measured, truth in zip(zip(*scores, strict=True), [s for s in expected if s is not None], strict=True):
        assert [float(value) for value in measured] == pytest.approx(truth)


def test_a_textbook_ranking() -> None:
    """Relevant at ranks 1, 3 and 6: AP = (1/1 + 2/3 + 3/6) / 3."""
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
    relevant = torch.tensor([[True, False, True, False, False, True]])
    scores, _, _ = score_queries(similarity, relevant, torch.ones(1, 6, dtype=torch.bool))
    assert float(scores.average_precision) == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    assert (float(scores.precision_at_1), float(scores.recall_at_5)) == (1, 1)


@pytest.mark.parametrize(("relevant", "candidates"), [(1, 1), (1, 4), (2, 6), (3, 7), (6, 6)])
def test_chance_is_the_mean_over_all_orders(relevant: int, candidates: int) -> None:
    """Every set of places that the relevant can take in a ranking is equally likely."""
    places = list(combinations(range(candidates), relevant))
    average_precisions = [sum((hit + 1) / (place + 1) for hit, place in enumerate(hits)) / relevant for hits in places]
    expected = expected_at_random(torch.tensor([relevant]), torch.tensor([candidates]))
    assert float(expected.precision_at_1) == pytest.approx(sum(0 in hits for hits in places) / len(places))
    assert float(expected.recall_at_5) == pytest.approx(sum(hits[0] < 5 for hits in places) / len(places))
    assert float(expected.average_precision) == pytest.approx(sum(average_precisions) / len(places))


def test_chance_of_a_large_gallery_stays_exact() -> None:
    """With one relevant of N, AP is 1/rank: its mean is the harmonic number over N."""
    N = 100_000
    expected = expected_at_random(torch.tensor([1]), torch.tensor([N]))
    assert float(expected.average_precision) == pytest.approx(math.fsum(1 / rank for rank in range(1, N + 1)) / N)


def test_what_is_no_candidate_changes_nothing() -> None:
    similarity = torch.rand(4, 9)
    relevant, candidate = torch.rand(4, 9) < 0.5, torch.rand(4, 9) < 0.6
    scores, chance, _ = score_queries(similarity, relevant, candidate)
    other = similarity.masked_fill(~candidate, 5.0)
    again, chance_again, _ = score_queries(other, relevant | ~candidate, candidate)
    for one, two in zip((*scores, *chance), (*again, *chance_again), strict=True):
        assert torch.equal(one, two)


def test_every_permutation_of_the_gallery_scores_the_same() -> None:
    similarity = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    relevant = torch.tensor([[False, True, False, True]])
    candidate = torch.ones(1, 4, dtype=torch.bool)
    expected = score_queries(similarity, relevant, candidate)[0].mean()
    for order in permutations(range(4)):
        shuffled = score_queries(similarity[:, order], relevant[:, order], candidate)[0].mean()
        assert shuffled == pytest.approx(expected)


def test_rank_and_spread_of_known_shapes() -> None:
    """Orthonormal rows have full rank; one direction has rank 1 and no spread; random directions spread by 1."""
    assert rank_me(torch.eye(12)) == pytest.approx(12, rel=1e-4)
    point = torch.nn.functional.normalize(torch.ones(20, 16), dim=-1)
    assert rank_me(point) == pytest.approx(1, abs=1e-3)
    assert feature_std(point) == pytest.approx(0, abs=1e-6)
    # two directions, one three times as long: entropy of (3/4, 1/4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rank_me(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(entropy), rel=1e-4)
    directions = torch.nn.functional.normalize(torch.randn(4000, 64), dim=-1)
    assert feature_std(directions) == pytest.approx(1, abs=0.01)


def test_nearest_neighbours_vote_with_their_nearness_and_own_group_has_no_vote() -> None:
    similarity = torch.tensor([[1.0, 0.9, 0.5, 0.5], [0.9, 1.0, 0.2, 0.3], [0.5, 0.2, 1.0, 0.8], [0.5, 0.3, 0.8, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    others = ~torch.eye(4, dtype=torch.bool)
    assert knn_accuracy(similarity, labels, others, k=3).tolist() == [1, 1, 1, 1]
    # without the near ones, of the other label all that is left
    others &= ~torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    assert knn_accuracy(similarity, labels, others, k=3).tolist() == [0, 0, 0, 0]


def test_leaving_out_a_block_is_scoring_without_it() -> None:
    similarity, candidate = torch.rand(15, 15), ~torch.eye(15, dtype=torch.bool)
    relevant = torch.randint(0, 2, (15, 15)).bool()
    block = torch.arange(15) % 5
    left_out = map_without_each(similarity, relevant, candidate, block, block, 5)
    for number in range(5):
        stays = block != number
        scores, _, _ = score_queries(*(x[stays][:, stays] for x in (similarity, relevant, candidate)))
        assert float(left_out[number]) == pytest.approx(float(scores.average_precision.mean()))


def test_the_interval_of_a_mean_is_that_of_the_textbook() -> None:
    """For a plain mean the jackknife's standard error is s / sqrt(n)."""
    values = torch.rand(50, dtype=torch.float64)
    without_each = (values.sum() - values) / 49
    low, high = jackknife_interval(float(values.mean()), without_each)
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 50**0.5)
