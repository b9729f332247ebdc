"""The table: own group excluded, label within a modality, anatomy across, baselines on the same scans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from modeling_m3ret.data.collection import Record
from modeling_m3ret.retrieval.embed import Embedded
from modeling_m3ret.retrieval.evaluation import ACROSS, ALL_MODALITIES, evaluate, format_table, to_json


def record(name: str, modality: str, label: str, group: str) -> Record:
    return Record(name, Path(name), modality, label, label, group)


def embedded(records: list[Record], vectors: list[list[float]]) -> Embedded:
    return Embedded(torch.nn.functional.normalize(torch.tensor(vectors), dim=-1), records)


# two subjects a class, each as CT and MRI
RECORDS = [
    record(f"{subject}-{modality}", modality, label, subject)
    for subject, label in (("s1", "head"), ("s2", "head"), ("s3", "knee"), ("s4", "knee"))
    for modality in ("ct", "mri")
]


def scores_of(rows: list, protocol: str, method: str) -> tuple[float, float, float]:
    return next(row.scores for row in rows if (row.protocol, row.method) == (protocol, method))


def test_an_encoder_that_knows_the_class_is_perfect_and_one_that_knows_the_subject_gains_nothing() -> None:
    by_class = embedded(RECORDS, [[1.0, 0.0] if r.label == "head" else [0.0, 1.0] for r in RECORDS])
    # every subject a direction of its own: all that is near a query is its own group, which is excluded
    by_subject = embedded(RECORDS, [[float(r.group == f"s{s}") for s in range(1, 5)] for r in RECORDS])
    rows = evaluate({"class": by_class, "subject": by_subject})
    for protocol in ("ct", "mri", ALL_MODALITIES, ACROSS):
        assert scores_of(rows, protocol, "class") == (1, 1, 1)
    # three foreign candidates of which one is relevant, all equally far: the tie goes to the earlier in the gallery
    assert scores_of(rows, "ct", "subject")[0] == 0.5
    assert scores_of(rows, "ct", "chance")[0] == pytest.approx(1 / 3)


def test_galleries_are_the_modality_and_across_all_others() -> None:
    rows = evaluate({"any": embedded(RECORDS, torch.rand(8, 3).tolist())})
    counts = {row.protocol: (row.queries, row.gallery) for row in rows if row.method == "any"}
    assert counts == {"ct": (4, 4), "mri": (4, 4), ALL_MODALITIES: (8, 8), ACROSS: (8, 8)}


def test_the_mean_over_modalities_weighs_each_the_same() -> None:
    extra = [record(f"x{n}", "xray", "chest", f"x{n}") for n in range(5)]
    records = RECORDS + extra
    rows = evaluate({"any": embedded(records, torch.rand(13, 3).tolist())})
    within = [scores_of(rows, modality, "any")[2] for modality in ("ct", "mri", "xray")]
    assert scores_of(rows, ALL_MODALITIES, "any")[2] == pytest.approx(sum(within) / 3)


def test_a_modality_with_nothing_to_find_is_left_out() -> None:
    frames = [record(f"f{n}", "endoscopy", "video", "video") for n in range(4)]
    rows = evaluate({"any": embedded(RECORDS + frames, torch.rand(12, 3).tolist())})
    assert "endoscopy" not in {row.protocol for row in rows}


def test_scans_without_a_label_match_nothing() -> None:
    unlabelled = [record(f"u{n}", "ct", "", f"u{n}") for n in range(5)]
    assert evaluate({"any": embedded(unlabelled, torch.rand(5, 3).tolist())}) == []
    rows = evaluate({"any": embedded(RECORDS + unlabelled, torch.rand(13, 3).tolist())})
    assert next(row.queries for row in rows if row.protocol == "ct") == 4


def test_methods_on_different_scans_do_not_compare() -> None:
    with pytest.raises(ValueError, match="different scans"):
        evaluate({"a": embedded(RECORDS, [[1.0]] * 8), "b": embedded(RECORDS[:7], [[1.0]] * 7)})


def test_table_and_json_say_the_same() -> None:
    rows = evaluate({"any": embedded(RECORDS, torch.rand(8, 3).tolist())})
    table = format_table(rows)
    assert len(table.splitlines()) == 2 + len(rows)
    answer = json.loads(to_json(rows, model="tiny"))
    assert answer["model"] == "tiny"
    assert [row["scores"]["mAP"] for row in answer["rows"]] == [row.scores[2] for row in rows]
    assert f"{rows[0].scores[2]:6.3f}" in table.splitlines()[2]


def test_intervals_hold_the_mean_and_cover_it_as_often_as_they_say() -> None:
    """Of 100 collections drawn with a known expected mAP (chance: embeddings without any sense), some 95 cover it."""
    covered = []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        records = [record(f"s{n}", "ct", "ab"[n % 2], f"p{n}") for n in range(40)]
        rows = evaluate({"any": embedded(records, torch.randn(40, 8, generator=generator).tolist())})
        row = next(row for row in rows if (row.protocol, row.method) == ("ct", "any"))
        chance = scores_of(rows, "ct", "chance")[2]
        covered.append(row.interval[0] <= chance <= row.interval[1])
    assert 90 <= sum(covered) <= 100


def test_intervals_are_given_where_asked_for() -> None:
    methods = {"any": embedded(RECORDS, torch.rand(8, 3).tolist())}
    for row in evaluate(methods):
        assert (row.interval is None) == (row.method == "chance")
        assert row.interval is None or row.interval[0] <= row.scores[2] <= row.interval[1]
    assert all(row.interval is None for row in evaluate(methods, intervals=False))
