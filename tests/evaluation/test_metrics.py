"""Metrics against plain loops and scikit-learn, chance against all permutations, intervals against re-computation."""

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
    rank_me,
    score_queries,
    scores_from_ranks,
)


def metric_by_loop(hits: list[bool], metric: str) -> float:
    """Compute a metric of one ranking of the candidates, one rank at a time."""
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


def scores_by_loop(similarity: Tensor, relevant: Tensor, candidate: Tensor) -> list[list[float] | None]:
    """Return all metrics of each query, None for one without a relevant candidate."""
    scores: list[list[float] | None] = []
    for query in range(len(similarity)):
        items = [item for item in range(similarity.shape[1]) if candidate[query, item]]
        ranking = sorted(items, key=lambda item: (-float(similarity[query, item]), item))
        hits = [bool(relevant[query, item]) for item in ranking]
        scores.append([metric_by_loop(hits, metric) for metric in METRICS] if any(hits) else None)
    return scores


def random_task(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a task with ties, queries without a relevant candidate, and often fewer than ten candidates."""
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = 12, int(torch.randint(2, 30, (1,), generator=generator))
    similarity = torch.randint(0, 6, (queries, gallery), generator=generator) / 5
    relevant = torch.rand(queries, gallery, generator=generator) < 0.2
    return similarity, relevant, torch.rand(queries, gallery, generator=generator) < 0.8


@pytest.mark.parametrize("seed", range(20))
def test_scores_match_a_plain_loop_for_any_chunk_size(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    task = random_task(seed)
    expected = scores_by_loop(*task)
    whole = score_queries(*task)
    assert whole.answerable.tolist() == [score is not None for score in expected]
    assert whole.scores.flatten().tolist() == pytest.approx([s for score in expected if score for s in score])
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 50)
    for chunked, unchunked in zip(score_queries(*task), whole, strict=True):
        assert torch.allclose(chunked, unchunked)


@pytest.mark.parametrize("seed", range(5))
def test_scores_match_scikit_learn(seed: int) -> None:
    """Both definitions agree if all scans are candidates and no similarities are equal."""
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(10, 40, generator=generator)
    relevant = torch.rand(10, 40, generator=generator) < 0.3
    scores, _, _ = score_queries(similarity, relevant, torch.ones(10, 40, dtype=torch.bool))
    for query in range(10):
        by_name = dict(zip(METRICS, scores[query].tolist(), strict=True))
        truth, predicted = relevant[query].numpy(), similarity[query].numpy()
        assert by_name["mAP"] == pytest.approx(average_precision_score(truth, predicted))
        for k in (1, 5, 10):
            assert by_name[f"nDCG@{k}"] == pytest.approx(ndcg_score(truth[None], predicted[None], k=k))


def test_scores_of_a_hand_computed_ranking() -> None:
    """Relevant at ranks 2, 3 and 6 of 6, so with fewer than ten candidates."""
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


def test_any_k_is_accepted_and_unknown_metrics_are_rejected() -> None:
    ranks = torch.tensor([[2.0, 3.0, torch.inf]])
    assert scores_from_ranks(ranks, ("P@3", "mAP@2")).tolist() == [pytest.approx([2 / 3, 1 / 4])]
    with pytest.raises(ValueError, match="'P'"):
        scores_from_ranks(ranks, ("P",))


@pytest.mark.parametrize(("relevant", "candidates"), [(1, 1), (1, 4), (2, 6), (3, 7), (6, 6), (4, 12), (11, 12)])
def test_chance_is_the_mean_over_all_permutations(relevant: int, candidates: int) -> None:
    ranks = torch.tensor(list(combinations(range(1, candidates + 1), relevant)), dtype=torch.float64)
    expected = expected_at_random(torch.tensor([relevant]), torch.tensor([candidates]))
    assert expected[0].tolist() == pytest.approx(scores_from_ranks(ranks).mean(0).tolist())


def test_chance_is_the_mean_of_random_similarities() -> None:
    trials = 4000
    relevant = (torch.arange(60) < 9).expand(trials, -1)
    scores, chance, _ = score_queries(torch.rand(trials, 60), relevant, torch.ones(trials, 60, dtype=torch.bool))
    errors = scores.std(0) / trials**0.5
    assert ((scores.mean(0) - chance.mean(0)).abs() < 4 * errors).all()


def test_chance_of_a_large_gallery_is_exact() -> None:
    """With one relevant scan of N, AP is 1/rank, with mean H_N / N; MRR is compared with the hypergeometric sum."""
    N = 100_000
    expected = expected_at_random(torch.tensor([1]), torch.tensor([N]))[0]
    for metric in ("mAP", "MRR"):
        assert float(expected[METRICS.index(metric)]) == pytest.approx(
            math.fsum(1 / rank for rank in range(1, N + 1)) / N
        )
    for R, N in ((40, 300), (299, 300), (150, 5000)):
        first_at = [math.comb(N - rank, R - 1) / math.comb(N, R) for rank in range(1, N - R + 2)]
        expected = expected_at_random(torch.tensor([R]), torch.tensor([N]))[0]
        mean = math.fsum(probability / rank for rank, probability in enumerate(first_at, start=1))
        assert float(expected[METRICS.index("MRR")]) == pytest.approx(mean)


def test_similarity_and_relevance_of_non_candidates_are_ignored() -> None:
    similarity = torch.rand(4, 9)
    relevant, candidate = torch.rand(4, 9) < 0.5, torch.rand(4, 9) < 0.6
    expected = score_queries(similarity, relevant, candidate)
    changed = score_queries(similarity.masked_fill(~candidate, 5.0), relevant | ~candidate, candidate)
    for one, two in zip(expected, changed, strict=True):
        assert torch.equal(one, two)


def test_similarities_may_be_minus_infinity() -> None:
    similarity = torch.full((1, 4), -torch.inf)
    candidate = torch.tensor([[False, True, True, True]])
    scores, _, _ = score_queries(similarity, torch.tensor([[True, False, True, False]]), candidate)
    assert float(scores[0, METRICS.index("MRR")]) == 1 / 2


def test_scores_do_not_depend_on_the_order_of_the_gallery() -> None:
    similarity = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    relevant = torch.tensor([[False, True, False, True]])
    candidate = torch.ones(1, 4, dtype=torch.bool)
    expected = score_queries(similarity, relevant, candidate).scores
    for order in permutations(range(4)):
        assert torch.equal(score_queries(similarity[:, order], relevant[:, order], candidate).scores, expected)


@pytest.mark.parametrize(("queries", "gallery"), [(0, 5), (3, 0), (0, 0)])
def test_no_queries_or_an_empty_gallery_give_no_scores(queries: int, gallery: int) -> None:
    nothing = torch.zeros(queries, gallery, dtype=torch.bool)
    scores, chance, answerable = score_queries(torch.zeros(queries, gallery), nothing, nothing)
    assert scores.shape == chance.shape == (0, len(METRICS))
    assert answerable.shape == (queries,)


def test_precision_of_another_relevance_uses_the_same_ranking() -> None:
    similarity, candidate = torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[True, False, True, True]])
    ranking = Ranking(similarity, torch.zeros(1, 4, dtype=torch.bool), candidate)
    precision, chance = ranking.precision_at_k(torch.tensor([[True, True, False, True]]))
    assert precision[0].tolist() == pytest.approx([1, 2 / 5, 2 / 10])
    assert chance[0].tolist() == pytest.approx([2 / 3, 2 / 5, 2 / 10])


def test_the_macro_mean_weighs_classes_equally() -> None:
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert macro_mean(scores, [["a"], ["a"], ["a"], ["b"]]) == 0.5
    # the first query has both labels, so the mean of b is (1 + 0) / 2
    assert macro_mean(scores, [["a", "b"], ["a"], ["a"], ["b"]]) == 0.75


def test_effective_rank_and_feature_std_of_known_embeddings() -> None:
    assert rank_me(torch.eye(12)) == pytest.approx(12, rel=1e-4)
    point = torch.nn.functional.normalize(torch.ones(20, 16), dim=-1)
    assert rank_me(point) == pytest.approx(1, abs=1e-3)
    assert feature_std(point) == pytest.approx(0, abs=1e-6)
    # singular values 3 and 1: the entropy of (3/4, 1/4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rank_me(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(entropy), rel=1e-4)
    directions = torch.nn.functional.normalize(torch.randn(4000, 64), dim=-1)
    assert feature_std(directions) == pytest.approx(1, abs=0.01)


def test_nearest_neighbours_vote_by_similarity_and_only_candidates_vote() -> None:
    similarity = torch.tensor([[1.0, 0.9, 0.5, 0.5], [0.9, 1.0, 0.2, 0.3], [0.5, 0.2, 1.0, 0.8], [0.5, 0.3, 0.8, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    candidate = ~torch.eye(4, dtype=torch.bool)
    assert knn_accuracy(similarity, labels, candidate, k=3).tolist() == [1, 1, 1, 1]
    # without the nearest neighbour, only scans of the other label are left
    candidate &= ~torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    assert knn_accuracy(similarity, labels, candidate, k=3).tolist() == [0, 0, 0, 0]


def leave_one_out(task: tuple[Tensor, Tensor, Tensor], block: Tensor, blocks: int) -> Tensor:
    sums, counts = Ranking(*task).leave_one_out_sums(block, block, blocks, METRICS)
    return sums / counts


@pytest.mark.parametrize("seed", range(5))
def test_leave_one_out_values_are_the_scores_without_each_block(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(0, 8, (15, 15), generator=generator) / 8
    candidate = torch.rand(15, 15, generator=generator) < 0.8
    relevant = torch.rand(15, 15, generator=generator) < 0.15  # some queries have a single relevant scan
    block = torch.arange(15) % 5
    task = (similarity, relevant, candidate)
    values = leave_one_out(task, block, 5)
    for number in range(5):
        stays = block != number
        scores, _, _ = score_queries(*(x[stays][:, stays] for x in task))
        assert values[number].tolist() == pytest.approx(scores.mean(0).tolist())
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 40)
    assert torch.allclose(leave_one_out(task, block, 5), values)


def test_leave_one_out_values_are_nan_where_no_query_stays_answerable() -> None:
    similarity, relevant = torch.rand(3, 3), torch.eye(3, dtype=torch.bool)[[1, 0, 2]]
    candidate, block = ~torch.eye(3, dtype=torch.bool), torch.arange(3)
    values = leave_one_out((similarity, relevant, candidate), block, 3)[:, METRICS.index("mAP")]
    assert values.isnan().tolist() == [True, True, False]
    assert all(math.isfinite(end) for end in jackknife_interval(0.5, values))


def test_the_jackknife_error_of_a_mean_is_its_standard_error() -> None:
    values = torch.rand(50, dtype=torch.float64)
    low, high = jackknife_interval(float(values.mean()), (values.sum() - values) / 49)
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 50**0.5)
