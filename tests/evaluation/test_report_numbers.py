"""The numbers behind a report's pictures, against plain loops."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_scans import SECRET_FILE, collection, facts_of_training
from torch import Tensor

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.data.collection import Record
from modeling_m3ret.evaluation import metrics
from modeling_m3ret.evaluation.metrics import interpolated_precision
from modeling_m3ret.evaluation.protocols import MIXED_GALLERY, Annotations
from modeling_m3ret.evaluation.report.numbers import (
    Ranked,
    best_and_worst,
    class_means,
    example_queries,
    first_hits,
    modality_shares,
    principal_components,
    rank_within_modalities,
    scaling_series,
    thumbnail,
)
from modeling_m3ret.evaluation.table import MACRO_MAP, evaluate
from modeling_m3ret.search.embedding import Embedded


def ranked_by_a_loop(embedded: Embedded, query: int, same_modality: bool) -> list[int]:
    """Places of all scans but those of the query's patient, most similar first."""
    records, asked = embedded.records, embedded.records[query]
    similarity = (embedded.embeddings[[query]] @ embedded.embeddings.T)[0].tolist()
    allowed = [
        place
        for place, record in enumerate(records)
        if record.group != asked.group and (record.modality == asked.modality or not same_modality)
    ]
    return sorted(allowed, key=lambda place: -similarity[place])


def relevance_by_a_loop(embedded: Embedded, query: int) -> list[bool]:
    own = set(embedded.records[query].label.split("|"))
    return [
        bool(own & set(embedded.records[place].label.split("|"))) for place in ranked_by_a_loop(embedded, query, True)
    ]


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


def test_interpolated_precision_is_the_best_at_this_recall_or_above() -> None:
    # relevant at ranks 1, 4 and 5: precision 1, 1/2, 3/5 at recall 1/3, 2/3, 1; one relevant, at rank 4
    ranks = torch.tensor([[1.0, 4.0, 5.0], [4.0, torch.inf, torch.inf]], dtype=torch.float64)
    expected = [[1.0] * 4 + [0.6] * 7, [0.25] * 11]
    assert interpolated_precision(ranks).tolist() == expected


def test_curves_and_precisions_are_those_of_a_loop_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = collection()
    whole = rank_within_modalities({"any": embedded})
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 200)
    for found in (whole, rank_within_modalities({"any": embedded})):
        assert list(found) == ["ct", "mri", "xray"]
        for modality, of_methods in found.items():
            ranked = of_methods["any"]
            asked = [place for place, record in enumerate(embedded.records) if record.modality == modality]
            relevance = {place: relevance_by_a_loop(embedded, place) for place in asked}
            assert ranked.queries.tolist() == [place for place in asked if any(relevance[place])]
            for row, place in enumerate(ranked.queries.tolist()):
                assert ranked.precision[row].tolist() == pytest.approx(precision_at_recalls_by_a_loop(relevance[place]))
                assert float(ranked.average_precision[row]) == pytest.approx(
                    average_precision_by_a_loop(relevance[place])
                )


def test_chance_is_the_mean_over_all_orders() -> None:
    """Queries with 2 relevant of 6 candidates, of which all 15 orders can be written down."""
    records = [Record(f"{n}", Path("x"), "ct", "", label, f"p{n}") for n, label in enumerate("aaabbbc")]
    chance = rank_within_modalities({"any": Embedded(torch.rand(7, 3), records)})["ct"]["chance"]
    orders = [[place in pair for place in range(6)] for pair in itertools.combinations(range(6), 2)]
    expected = np.mean([precision_at_recalls_by_a_loop(order) for order in orders], axis=0)
    # 1000 orders of a standard deviation of .25 at most: five standard errors
    assert chance.precision.mean(0).numpy() == pytest.approx(expected, abs=0.04)
    precision = float(np.mean([average_precision_by_a_loop(order) for order in orders]))
    assert chance.average_precision.tolist() == pytest.approx([precision] * 6)


def test_classes_are_means_over_their_queries_and_agree_with_the_table() -> None:
    embedded = collection()
    found = rank_within_modalities({"any": embedded})
    rows = {row.protocol: row for row in evaluate({"any": embedded}) if row.method == "any"}
    for modality, of_methods in found.items():
        means = class_means(embedded.records, of_methods["any"])
        own: dict[str, list[float]] = {}
        for place in of_methods["any"].queries.tolist():
            for label in embedded.records[place].label.split("|"):
                own.setdefault(label, []).append(average_precision_by_a_loop(relevance_by_a_loop(embedded, place)))
        assert {label: count for label, (count, _) in means.items()} == {k: len(v) for k, v in own.items()}
        assert {label: mean for label, (_, mean) in means.items()} == pytest.approx(
            {label: sum(scores) / len(scores) for label, scores in own.items()}
        )
        assert [mean for _, mean in means.values()] == sorted((mean for _, mean in means.values()), reverse=True)
        assert sum(mean for _, mean in means.values()) / len(means) == pytest.approx(rows[modality].scores[MACRO_MAP])
        assert float(of_methods["any"].average_precision.mean()) == pytest.approx(rows[modality].scores["mAP"])


def test_modalities_of_hits_are_counted_by_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = collection(45)
    names, shares, chance = modality_shares(embedded)
    assert names == ["ct", "mri", "xray"]
    counted, everything = np.zeros((2, 3, 3))
    for query, record in enumerate(embedded.records):
        order = ranked_by_a_loop(embedded, query, same_modality=False)
        for counts, places in ((counted, order[:10]), (everything, order)):
            for place in places:
                counts[names.index(record.modality), names.index(embedded.records[place].modality)] += 1
    assert shares.numpy() == pytest.approx(counted / counted.sum(1, keepdims=True))
    assert chance.numpy() == pytest.approx(everything / everything.sum(1, keepdims=True))
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 100)
    assert torch.equal(modality_shares(embedded)[1], shares)


def test_shares_agree_with_the_table_where_all_scans_are_answerable() -> None:
    embedded = collection()
    row = next(row for row in evaluate({"any": embedded}, [MIXED_GALLERY]) if row.method == "any")
    assert row.queries == 60
    assert float(modality_shares(embedded)[1].diag().mean()) == pytest.approx(row.scores["own modality@10"])


def test_a_modality_that_can_find_nothing_has_no_shares() -> None:
    records = [Record(f"{n}", Path("x"), ("ct", "mri")[n], "", "a", "one patient") for n in range(2)]
    assert modality_shares(Embedded(torch.eye(2), records))[1].isnan().all()


@pytest.mark.parametrize("shape", [(50, 7), (5, 12), (30, 2)])
def test_principal_components_are_those_of_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    embeddings = torch.randn(shape) * torch.linspace(3, 0.5, shape[1])
    points, shares = principal_components(embeddings)
    centred = embeddings.double().numpy() - embeddings.double().numpy().mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    expected = (left * singular)[:, :2]
    assert points.shape == (shape[0], 2)
    for component in range(expected.shape[1]):
        ours = points[:, component].numpy()
        sign = np.sign(ours @ expected[:, component])
        assert ours == pytest.approx(sign * expected[:, component], abs=1e-8)
        assert float(shares[component]) == pytest.approx(singular[component] ** 2 / (singular**2).sum())


def test_the_largest_weight_of_a_component_is_positive() -> None:
    for seed in range(5):
        embeddings = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
        points = principal_components(embeddings)[0]
        weights = (embeddings - embeddings.mean(0)).double().T @ points  # a component's direction times its variance
        assert (weights.gather(0, weights.abs().argmax(0)[None]) > 0).all()


def test_a_line_joins_what_differs_in_one_thing_alone() -> None:
    checkpoints = {
        "long": facts_of_training("mae", 500, 1000, 10**7),
        "short": facts_of_training("mae", 100, 1000, 10**7),
        "few scans": facts_of_training("mae", 500, 200, 10**7),
        "large": facts_of_training("mae", 500, 1000, 10**8),
        "other": facts_of_training("simdino", 500, 1000, 10**7),
    }
    series = scaling_series(checkpoints)
    assert list(series) == ["step", "views", "training_scans", "parameters"]
    for quantity, same_axis in (
        ("step", {"step", "views"}),
        ("views", {"step", "views"}),
        ("training_scans", {"training_scans"}),
        ("parameters", {"parameters"}),
    ):
        assert sorted(itertools.chain(*series[quantity].values())) == sorted(checkpoints)
        for members in series[quantity].values():
            kept = [{k: v for k, v in checkpoints[m].items() if k not in same_axis | {"seconds"}} for m in members]
            assert all(one == kept[0] for one in kept)
            values = [checkpoints[member][quantity] for member in members]
            assert values == sorted(values)
    assert ["short", "long"] in series["step"].values()
    assert ["short", "long"] in series["views"].values()
    assert ["few scans", "long"] in series["training_scans"].values()
    assert ["long", "large"] in series["parameters"].values()
    assert sum(len(members) == 1 for members in series["step"].values()) == 3


def test_seeds_of_one_recipe_and_facts_that_are_none_give_no_curve() -> None:
    assert scaling_series({"one": facts_of_training("mae", 5, 5, 5), "two": facts_of_training("mae", 5, 5, 5)}) == {}
    assert scaling_series({"one": {"parameters": 5}, "two": {"parameters": 5}}) == {}
    assert scaling_series({"one": {"step": "/home/anna"}, "two": {"step": -3}, "three": {"step": math.nan}}) == {}
    assert scaling_series({}) == {}
    hostile = {name: facts_of_training(f"/home/{SECRET_FILE}", step, 5, 5) for name, step in (("one", 1), ("two", 2))}
    assert scaling_series(hostile)["step"] == {"checkpoints": ["one", "two"]}


def test_examples_are_taken_at_quantiles_each_once() -> None:
    scores = torch.rand(11, dtype=torch.float64)
    ranked = Ranked(torch.arange(11), scores, scores, torch.empty(11, 11))
    by_score = sorted(range(11), key=lambda place: float(scores[place]))
    assert example_queries(ranked) == {"good": by_score[9], "median": by_score[5], "bad": by_score[1]}
    one = Ranked(torch.arange(1), scores[:1], scores[:1], torch.empty(1, 11))
    assert example_queries(one) == {"good": 0}


def test_first_hits_are_the_first_of_a_loop() -> None:
    embedded = collection()
    for query in (0, 7, 31):
        order, relevance = ranked_by_a_loop(embedded, query, True), relevance_by_a_loop(embedded, query)
        found = first_hits(embedded, Annotations(embedded.records), query)
        assert found == list(zip(order, relevance, strict=True))[:5]


def test_what_reorders_the_hits_is_asked_for_them() -> None:
    """A method that ranks by more than its embeddings, as re-ranking does: the pictures are of its ranking."""

    class Reversed(Embedded):
        def similarities(self, queries: Tensor, candidate: Tensor) -> Tensor:
            return -super().similarities(queries, candidate)

    embedded = collection()
    opposite = Reversed(embedded.embeddings, embedded.records)
    mirrored = Embedded(-embedded.embeddings, embedded.records)
    mirrored.similarities = lambda queries, candidate: -(embedded.embeddings[queries] @ embedded.embeddings.T)  # type: ignore[method-assign]
    ranked = rank_within_modalities({"any": opposite})["ct"]["any"]
    place = int(ranked.queries[0])
    backwards = relevance_by_a_loop(embedded, place)[::-1]
    assert ranked.precision[0].tolist() == pytest.approx(precision_at_recalls_by_a_loop(backwards))
    assert torch.equal(modality_shares(opposite)[1], modality_shares(mirrored)[1])


def test_a_thumbnail_is_the_middle_slice_as_the_encoder_sees_it() -> None:
    volume = np.zeros((9, 64, 64), np.uint8)
    volume[3:6, :, :32] = 255
    picture = np.asarray(thumbnail(M3RetImageProcessor(size=64, num_frames=9), volume))
    assert picture.shape == (64, 64, 3)
    assert abs(picture[:, :30].astype(int) - 255).max() <= 1
    assert picture[:, 34:].max() <= 1


def test_of_many_classes_the_best_and_the_worst_are_shown() -> None:
    names = [f"class {n}" for n in range(40)]
    assert best_and_worst(names[:30]) == names[:30]
    assert best_and_worst(names) == names[:15] + names[-15:]
