"""The numbers in the figures of a report, against plain loops."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_scans import SECRET_FILE, collection, training_facts
from torch import Tensor

from modeling_m3ret.data.collection import Record
from modeling_m3ret.evaluation import metrics
from modeling_m3ret.evaluation.metrics import interpolated_precision
from modeling_m3ret.evaluation.protocols import MIXED_GALLERY, Annotations
from modeling_m3ret.evaluation.report.numbers import (
    QueryResults,
    best_and_worst,
    class_means,
    example_queries,
    first_hits,
    modality_fractions,
    principal_components,
    rank_within_modalities,
    scaling_series,
)
from modeling_m3ret.evaluation.table import MACRO_MAP, evaluate
from modeling_m3ret.search.embedding import Embedded


def ranked_by_a_loop(embedded: Embedded, query: int, same_modality: bool) -> list[int]:
    """Return the indices of all scans of other patients, most similar first."""
    records, query_record = embedded.records, embedded.records[query]
    similarity = (embedded.embeddings[[query]] @ embedded.embeddings.T)[0].tolist()
    allowed = [
        index
        for index, record in enumerate(records)
        if record.group != query_record.group and (record.modality == query_record.modality or not same_modality)
    ]
    return sorted(allowed, key=lambda index: -similarity[index])


def relevance_by_a_loop(embedded: Embedded, query: int) -> list[bool]:
    labels = [set(record.label.split("|")) for record in embedded.records]
    return [bool(labels[query] & labels[index]) for index in ranked_by_a_loop(embedded, query, True)]


def precision_at_recalls_by_a_loop(relevance: list[bool]) -> list[float]:
    points, found = [], 0
    for rank, relevant in enumerate(relevance, start=1):
        found += relevant
        points.append((found, found / rank))
    total = sum(relevance)
    return [max(precision for found, precision in points if 10 * found >= tenth * total) for tenth in range(11)]


def average_precision_by_a_loop(relevance: list[bool]) -> float:
    precisions = [sum(relevance[:rank]) / rank for rank, relevant in enumerate(relevance, start=1) if relevant]
    return sum(precisions) / len(precisions)


def test_interpolated_precision_is_the_highest_at_this_recall_or_above() -> None:
    # relevant at ranks 1, 4 and 5: precision 1, 1/2, 3/5 at recall 1/3, 2/3, 1; one relevant, at rank 4
    ranks = torch.tensor([[1.0, 4.0, 5.0], [4.0, torch.inf, torch.inf]], dtype=torch.float64)
    expected = [[1.0] * 4 + [0.6] * 7, [0.25] * 11]
    assert interpolated_precision(ranks).tolist() == expected


@pytest.mark.slow
def test_precision_matches_a_plain_loop_for_any_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = collection()
    whole = rank_within_modalities({"any": embedded})
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 200)
    relevance = [relevance_by_a_loop(embedded, index) for index in range(len(embedded.records))]
    for results in (whole, rank_within_modalities({"any": embedded})):
        assert list(results) == ["ct", "mri", "xray"]
        for modality, by_method in results.items():
            queries, precisions, _, curves = by_method["any"]
            assert queries.tolist() == [
                index
                for index, record in enumerate(embedded.records)
                if record.modality == modality and any(relevance[index])
            ]
            for index, precision, curve in zip(queries.tolist(), precisions.tolist(), curves.tolist(), strict=True):
                assert curve == pytest.approx(precision_at_recalls_by_a_loop(relevance[index]))
                assert precision == pytest.approx(average_precision_by_a_loop(relevance[index]))


def test_chance_is_the_mean_over_all_rankings() -> None:
    """With 2 relevant of 6 candidates there are 15 rankings."""
    records = [Record(f"{n}", Path("x"), "ct", "", label, f"p{n}") for n, label in enumerate("aaabbbc")]
    chance = rank_within_modalities({"any": Embedded(torch.rand(7, 3), records)})["ct"]["chance"]
    orders = [[position in pair for position in range(6)] for pair in itertools.combinations(range(6), 2)]
    expected = np.mean([precision_at_recalls_by_a_loop(order) for order in orders], axis=0)
    # 1,000 rankings with a standard deviation of at most 0.25: five standard errors
    assert chance.precision.mean(0).numpy() == pytest.approx(expected, abs=0.04)
    precision = float(np.mean([average_precision_by_a_loop(order) for order in orders]))
    assert chance.average_precision.tolist() == pytest.approx([precision] * 6)


def test_class_means_match_a_plain_loop_and_the_table() -> None:
    embedded = collection()
    results = rank_within_modalities({"any": embedded})
    rows = {row.protocol: row for row in evaluate({"any": embedded}) if row.method == "any"}
    for modality, by_method in results.items():
        means = class_means(embedded.records, by_method["any"])
        expected: dict[str, list[float]] = {}
        for index in by_method["any"].queries.tolist():
            for label in embedded.records[index].label.split("|"):
                precision = average_precision_by_a_loop(relevance_by_a_loop(embedded, index))
                expected.setdefault(label, []).append(precision)
        assert {label: count for label, (count, _) in means.items()} == {k: len(v) for k, v in expected.items()}
        assert {label: mean for label, (_, mean) in means.items()} == pytest.approx(
            {label: sum(scores) / len(scores) for label, scores in expected.items()}
        )
        assert [mean for _, mean in means.values()] == sorted((mean for _, mean in means.values()), reverse=True)
        assert sum(mean for _, mean in means.values()) / len(means) == pytest.approx(rows[modality].scores[MACRO_MAP])
        assert float(by_method["any"].average_precision.mean()) == pytest.approx(rows[modality].scores["mAP"])


def test_modality_fractions_match_a_plain_loop_for_any_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = collection(45)
    names, fractions, chance = modality_fractions(embedded)
    assert names == ["ct", "mri", "xray"]
    hits, candidates = np.zeros((2, 3, 3))
    for query, record in enumerate(embedded.records):
        order = ranked_by_a_loop(embedded, query, same_modality=False)
        for counts, indices in ((hits, order[:10]), (candidates, order)):
            for index in indices:
                counts[names.index(record.modality), names.index(embedded.records[index].modality)] += 1
    assert fractions.numpy() == pytest.approx(hits / hits.sum(1, keepdims=True))
    assert chance.numpy() == pytest.approx(candidates / candidates.sum(1, keepdims=True))
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 100)
    assert torch.equal(modality_fractions(embedded)[1], fractions)


def test_modality_fractions_match_the_table_if_all_queries_are_answerable() -> None:
    embedded = collection()
    row = next(row for row in evaluate({"any": embedded}, [MIXED_GALLERY]) if row.method == "any")
    assert row.queries == 60
    assert float(modality_fractions(embedded)[1].diag().mean()) == pytest.approx(row.scores["own modality@10"])


def test_modality_fractions_without_candidates_are_nan() -> None:
    records = [Record(f"{n}", Path("x"), ("ct", "mri")[n], "", "a", "one patient") for n in range(2)]
    assert modality_fractions(Embedded(torch.eye(2), records))[1].isnan().all()


@pytest.mark.parametrize("shape", [(50, 7), (5, 12), (30, 2)])
def test_principal_components_match_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    embeddings = torch.randn(shape) * torch.linspace(3, 0.5, shape[1])
    points, variance = principal_components(embeddings)
    centred = embeddings.double().numpy() - embeddings.double().numpy().mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    expected = (left * singular)[:, :2]
    assert points.shape == (shape[0], 2)
    for component in range(expected.shape[1]):
        coordinates = points[:, component].numpy()
        sign = np.sign(coordinates @ expected[:, component])
        assert coordinates == pytest.approx(sign * expected[:, component], abs=1e-8)
        assert float(variance[component]) == pytest.approx(singular[component] ** 2 / (singular**2).sum())


def test_the_largest_weight_of_a_component_is_positive() -> None:
    for seed in range(5):
        embeddings = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
        points = principal_components(embeddings)[0]
        weights = (embeddings - embeddings.mean(0)).double().T @ points  # direction of a component times its variance
        assert (weights.gather(0, weights.abs().argmax(0)[None]) > 0).all()


def test_a_series_differs_in_one_quantity_only() -> None:
    checkpoints = {
        "long": training_facts("mae", 500, 1000, 10**7),
        "short": training_facts("mae", 100, 1000, 10**7),
        "few scans": training_facts("mae", 500, 200, 10**7),
        "large": training_facts("mae", 500, 1000, 10**8),
        "other": training_facts("simdino", 500, 1000, 10**7),
    }
    series = scaling_series(checkpoints)
    assert list(series) == ["step", "views", "training_scans", "parameters"]
    for quantity, ignored in (
        ("step", {"step", "views"}),
        ("views", {"step", "views"}),
        ("training_scans", {"training_scans"}),
        ("parameters", {"parameters"}),
    ):
        assert sorted(itertools.chain(*series[quantity].values())) == sorted(checkpoints)
        for members in series[quantity].values():
            others = [{k: v for k, v in checkpoints[m].items() if k not in ignored | {"seconds"}} for m in members]
            assert all(facts == others[0] for facts in others)
            values = [checkpoints[member][quantity] for member in members]
            assert values == sorted(values)
    assert ["short", "long"] in series["step"].values()
    assert ["short", "long"] in series["views"].values()
    assert ["few scans", "long"] in series["training_scans"].values()
    assert ["long", "large"] in series["parameters"].values()
    assert sum(len(members) == 1 for members in series["step"].values()) == 3


def test_equal_or_malformed_facts_give_no_series() -> None:
    assert scaling_series({"one": training_facts("mae", 5, 5, 5), "two": training_facts("mae", 5, 5, 5)}) == {}
    assert scaling_series({"one": {"parameters": 5}, "two": {"parameters": 5}}) == {}
    assert scaling_series({"one": {"step": "/home/anna"}, "two": {"step": -3}, "three": {"step": math.nan}}) == {}
    assert scaling_series({}) == {}
    hostile = {name: training_facts(f"/home/{SECRET_FILE}", step, 5, 5) for name, step in (("one", 1), ("two", 2))}
    assert scaling_series(hostile)["step"] == {"checkpoints": ["one", "two"]}


def test_examples_are_distinct_queries_at_quantiles() -> None:
    scores = torch.rand(11, dtype=torch.float64)
    results = QueryResults(torch.arange(11), scores, scores, torch.empty(11, 11))
    by_score = sorted(range(11), key=lambda index: float(scores[index]))
    assert example_queries(results) == {"good": by_score[9], "median": by_score[5], "bad": by_score[1]}
    one = QueryResults(torch.arange(1), scores[:1], scores[:1], torch.empty(1, 11))
    assert example_queries(one) == {"good": 0}


def test_first_hits_match_a_plain_loop() -> None:
    embedded = collection()
    for query in (0, 7, 31):
        order, relevance = ranked_by_a_loop(embedded, query, True), relevance_by_a_loop(embedded, query)
        hits = first_hits(embedded, Annotations(embedded.records), query)
        assert hits == list(zip(order, relevance, strict=True))[:5]


def test_methods_may_override_the_similarities() -> None:
    """Re-ranking does; the numbers are then those of its ranking."""

    class Reversed(Embedded):
        def similarities(self, queries: Tensor, candidate: Tensor) -> Tensor:
            return -super().similarities(queries, candidate)

    embedded = collection()
    opposite = Reversed(embedded.embeddings, embedded.records)
    results = rank_within_modalities({"any": opposite})["ct"]["any"]
    backwards = relevance_by_a_loop(embedded, int(results.queries[0]))[::-1]
    assert results.precision[0].tolist() == pytest.approx(precision_at_recalls_by_a_loop(backwards))
    names, fractions, _ = modality_fractions(opposite)
    counts = np.zeros(len(names))
    for query, record in enumerate(embedded.records):
        if record.modality == "ct":
            for index in ranked_by_a_loop(embedded, query, same_modality=False)[-10:]:
                counts[names.index(embedded.records[index].modality)] += 1
    assert fractions[names.index("ct")].numpy() == pytest.approx(counts / counts.sum())


def test_only_the_first_and_last_of_many_labels_are_shown() -> None:
    names = [f"class {n}" for n in range(40)]
    assert best_and_worst(names[:30]) == names[:30]
    assert best_and_worst(names) == names[:15] + names[-15:]
