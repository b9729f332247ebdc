"""Scores against loops written from the definitions and against scikit-learn; chance against all orders."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score
from torch import Tensor

from modeling_m3ret.evaluation import metrics
from modeling_m3ret.evaluation.metrics import (
    METRICS,
    Ranking,
    expected_at_random,
    feature_std,
    jackknife_interval,
    knn_accuracy,
    macro_mean,
    means_without_each,
    rank_me,
    score_queries,
    scores_of_ranks,
)


def loop(hits: list[bool], metric: str) -> float:
    """A metric of one ranking of the candidates, one rank at a time."""
    name, _, number = metric.partition("@")
    k, R, score = int(number or len(hits)), sum(hits), 0.0
    for rank, hit in enumerate(hits[:k], start=1):
        if hit and name == "P":
            score += 1 / k
        elif hit and name == "R":
            score = 1
        elif hit and name == "mAP":
            score += sum(hits[:rank]) / rank / min(k, R)
        elif hit and name == "nDCG":
            score += 1 / math.log2(1 + rank) / sum(1 / math.log2(1 + best) for best in range(1, min(k, R) + 1))
        elif hit and name == "MRR":
            return 1 / rank
    return score


def loops(similarity: Tensor, relevant: Tensor, candidate: Tensor) -> list[list[float] | None]:
    """All metrics of each query; None where nothing can be found."""
    scores: list[list[float] | None] = []
    for query in range(len(similarity)):
        items = [item for item in range(similarity.shape[1]) if candidate[query, item]]
        ranking = sorted(items, key=lambda item: (-float(similarity[query, item]), item))
        hits = [bool(relevant[query, item]) for item in ranking]
        scores.append([loop(hits, metric) for metric in METRICS] if any(hits) else None)
    return scores


def random_task(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """With ties, with queries that have nothing to find, and often with galleries smaller than ten."""
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = 12, int(torch.randint(2, 30, (1,), generator=generator))
    similarity = torch.randint(0, 6, (queries, gallery), generator=generator) / 5
    relevant = torch.rand(queries, gallery, generator=generator) < 0.2
    return similarity, relevant, torch.rand(queries, gallery, generator=generator) < 0.8


@pytest.mark.parametrize("seed", range(20))
def test_scores_against_loops(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    task = random_task(seed)
    expected = loops(*task)
    whole = score_queries(*task)
    scores, _, answerable = whole
    assert answerable.tolist() == [score is not None for score in expected]
    assert scores.flatten().tolist() == pytest.approx([s for score in expected if score for s in score])
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 50)  # chunks of a few queries: the same
    for one, two in zip(score_queries(*task), whole, strict=True):
        assert torch.allclose(one, two)


@pytest.mark.parametrize("seed", range(5))
def test_scores_against_scikit_learn(seed: int) -> None:
    """Where its definitions are these: all are candidates, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(10, 40, generator=generator)
    relevant = torch.rand(10, 40, generator=generator) < 0.3
    scores, _, _ = score_queries(similarity, relevant, torch.ones(10, 40, dtype=torch.bool))
    for query in range(10):
        own = dict(zip(METRICS, scores[query].tolist(), strict=True))
        truth, predicted = relevant[query].numpy(), similarity[query].numpy()
        assert own["mAP"] == pytest.approx(average_precision_score(truth, predicted))
        for k in (1, 5, 10):
            assert own[f"nDCG@{k}"] == pytest.approx(ndcg_score(truth[None], predicted[None], k=k))


def test_a_textbook_ranking() -> None:
    """Relevant at ranks 2, 3 and 6 of 6, so fewer candidates than ten."""
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]])
    relevant = torch.tensor([[False, True, True, False, False, True]])
    scores, _, _ = score_queries(similarity, relevant, torch.ones(1, 6, dtype=torch.bool))
    best = 1 + 1 / math.log2(3) + 1 / 2
    assert dict(zip(METRICS, scores[0].tolist(), strict=True)) == pytest.approx(
        {
            **{"P@1": 0, "P@5": 2 / 5, "P@10": 3 / 10, "R@1": 0, "R@5": 1, "R@10": 1},
            **{"mAP@1": 0, "mAP@5": (1 / 2 + 2 / 3) / 3, "mAP@10": (1 / 2 + 2 / 3 + 3 / 6) / 3},
            **{"nDCG@1": 0, "nDCG@5": (1 / math.log2(3) + 1 / 2) / best},
            "nDCG@10": (1 / math.log2(3) + 1 / 2 + 1 / math.log2(7)) / best,
            **{"mAP": (1 / 2 + 2 / 3 + 3 / 6) / 3, "MRR": 1 / 2},
        }
    )


def test_other_ks_can_be_asked_for_and_other_names_not() -> None:
    ranks = torch.tensor([[2.0, 3.0, torch.inf]])
    assert scores_of_ranks(ranks, ("P@3", "mAP@2")).tolist() == [pytest.approx([2 / 3, 1 / 4])]
    with pytest.raises(ValueError, match="expected one like P@1"):
        scores_of_ranks(ranks, ("P",))


@pytest.mark.parametrize(("relevant", "candidates"), [(1, 1), (1, 4), (2, 6), (3, 7), (6, 6), (4, 12), (11, 12)])
def test_chance_is_the_mean_over_all_orders(relevant: int, candidates: int) -> None:
    """Every set of places that the relevant can take in a ranking is equally likely."""
    ranks = torch.tensor(list(combinations(range(1, candidates + 1), relevant)), dtype=torch.float64)
    expected = expected_at_random(torch.tensor([relevant]), torch.tensor([candidates]))
    assert expected[0].tolist() == pytest.approx(scores_of_ranks(ranks).mean(0).tolist())


def test_chance_is_what_shuffling_gives() -> None:
    trials = 4000
    relevant = (torch.arange(60) < 9).expand(trials, -1)
    scores, chance, _ = score_queries(torch.rand(trials, 60), relevant, torch.ones(trials, 60, dtype=torch.bool))
    errors = scores.std(0) / trials**0.5
    assert ((scores.mean(0) - chance.mean(0)).abs() < 4 * errors).all()


def test_chance_of_a_large_gallery_stays_exact() -> None:
    """With one relevant of N, AP is 1/rank: its mean is the harmonic number over N. MRR by the hypergeometric sum."""
    N = 100_000
    expected = expected_at_random(torch.tensor([1]), torch.tensor([N]))[0]
    for metric in ("mAP", "MRR"):
        assert float(expected[METRICS.index(metric)]) == pytest.approx(
            math.fsum(1 / rank for rank in range(1, N + 1)) / N
        )
    for R, N in ((40, 300), (299, 300), (150, 5000)):
        first_at = [math.comb(N - rank, R - 1) / math.comb(N, R) for rank in range(1, N - R + 2)]
        expected = expected_at_random(torch.tensor([R]), torch.tensor([N]))[0]
        summed = math.fsum(share / rank for rank, share in enumerate(first_at, start=1))
        assert float(expected[METRICS.index("MRR")]) == pytest.approx(summed)


def test_what_is_no_candidate_changes_nothing() -> None:
    similarity = torch.rand(4, 9)
    relevant, candidate = torch.rand(4, 9) < 0.5, torch.rand(4, 9) < 0.6
    answer = score_queries(similarity, relevant, candidate)
    other = similarity.masked_fill(~candidate, 5.0)
    for one, two in zip(answer, score_queries(other, relevant | ~candidate, candidate), strict=True):
        assert torch.equal(one, two)


def test_a_candidate_may_be_infinitely_unlike() -> None:
    similarity = torch.full((1, 4), -torch.inf)
    candidate = torch.tensor([[False, True, True, True]])
    scores, _, _ = score_queries(similarity, torch.tensor([[True, False, True, False]]), candidate)
    assert float(scores[0, METRICS.index("MRR")]) == 1 / 2


def test_every_permutation_of_the_gallery_scores_the_same() -> None:
    similarity = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    relevant = torch.tensor([[False, True, False, True]])
    candidate = torch.ones(1, 4, dtype=torch.bool)
    expected = score_queries(similarity, relevant, candidate).scores
    for order in permutations(range(4)):
        assert torch.equal(score_queries(similarity[:, order], relevant[:, order], candidate).scores, expected)


def test_nobody_asks_or_nothing_is_there() -> None:
    for queries, gallery in ((0, 5), (3, 0), (0, 0)):
        nothing = torch.zeros(queries, gallery, dtype=torch.bool)
        scores, chance, answerable = score_queries(torch.zeros(queries, gallery), nothing, nothing)
        assert scores.shape == chance.shape == (0, len(METRICS))
        assert answerable.shape == (queries,)


def test_a_share_of_the_first_is_over_the_scores_own_order() -> None:
    similarity, candidate = torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[True, False, True, True]])
    ranking = Ranking(similarity, torch.zeros(1, 4, dtype=torch.bool), candidate)
    share, chance = ranking.share_of_first(torch.tensor([[True, True, False, True]]))
    assert share[0].tolist() == pytest.approx([1, 2 / 5, 2 / 10])
    assert chance[0].tolist() == pytest.approx([2 / 3, 2 / 5, 2 / 10])


def test_micro_weighs_queries_and_macro_classes() -> None:
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert float(scores.mean()) == 0.75
    assert macro_mean(scores, [["a"], ["a"], ["a"], ["b"]]) == 0.5
    # the first has both labels: b is (1 + 0) / 2
    assert macro_mean(scores, [["a", "b"], ["a"], ["a"], ["b"]]) == 0.75


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


@pytest.mark.parametrize("seed", range(5))
def test_leaving_out_a_block_is_scoring_without_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(0, 8, (15, 15), generator=generator) / 8
    candidate = torch.rand(15, 15, generator=generator) < 0.8
    relevant = torch.rand(15, 15, generator=generator) < 0.15  # of some queries one, which leaves with its block
    block = torch.arange(15) % 5
    task = (similarity, relevant, candidate)
    left_out = means_without_each(*task, block, block, 5, METRICS)
    for number in range(5):
        stays = block != number
        scores, _, _ = score_queries(*(x[stays][:, stays] for x in task))
        assert left_out[number].tolist() == pytest.approx(scores.mean(0).tolist())
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 40)
    assert torch.allclose(means_without_each(*task, block, block, 5, METRICS), left_out)


def test_leaving_out_all_that_can_be_found_is_no_number() -> None:
    similarity, relevant = torch.rand(3, 3), torch.eye(3, dtype=torch.bool)[[1, 0, 2]]
    candidate, block = ~torch.eye(3, dtype=torch.bool), torch.arange(3)
    left_out = means_without_each(similarity, relevant, candidate, block, block, 3)[:, 0]
    assert left_out.isnan().tolist() == [True, True, False]
    assert all(math.isfinite(end) for end in jackknife_interval(0.5, left_out))


def test_the_interval_of_a_mean_is_that_of_the_textbook() -> None:
    """For a plain mean the jackknife's standard error is s / sqrt(n)."""
    values = torch.rand(50, dtype=torch.float64)
    without_each = (values.sum() - values) / 49
    low, high = jackknife_interval(float(values.mean()), without_each)
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 50**0.5)
