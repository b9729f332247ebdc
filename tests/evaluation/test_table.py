"""The table: own group excluded, label within a modality, anatomy across, baselines on the same scans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from modeling_m3ret.data.collection import Record
from modeling_m3ret.evaluation import metrics
from modeling_m3ret.evaluation.metrics import METRICS
from modeling_m3ret.evaluation.protocols import (
    ACROSS_BY_LABEL,
    ALL,
    INSTANCE,
    MIXED_GALLERY,
    SAME_SUBJECT,
    UNSEEN_MODALITY,
    WITHIN_MODALITY,
    Protocol,
)
from modeling_m3ret.evaluation.table import (
    ACROSS,
    ALL_MODALITIES,
    IN_TABLE,
    MACRO_MAP,
    Row,
    evaluate,
    format_table,
    paired_difference,
    to_json,
)
from modeling_m3ret.search.embedding import Embedded


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


def scores_of(rows: list[Row], protocol: str, method: str) -> dict[str, float]:
    return dict(next(row.scores for row in rows if (row.protocol, row.method) == (protocol, method)))


def test_an_encoder_that_knows_the_class_is_perfect_and_one_that_knows_the_subject_gains_nothing() -> None:
    by_class = embedded(RECORDS, [[1.0, 0.0] if r.label == "head" else [0.0, 1.0] for r in RECORDS])
    # every subject a direction of its own: all that is near a query is its own group, which is excluded
    by_subject = embedded(RECORDS, [[float(r.group == f"s{s}") for s in range(1, 5)] for r in RECORDS])
    rows = evaluate({"class": by_class, "subject": by_subject})
    for protocol in ("ct", "mri", ALL_MODALITIES, ACROSS):
        assert {scores_of(rows, protocol, "class")[metric] for metric in (*IN_TABLE, "nDCG@10", MACRO_MAP)} == {1}
    # three foreign candidates of which one is relevant, all equally far: the tie goes to the earlier in the gallery
    assert scores_of(rows, "ct", "subject")["P@1"] == 0.5
    assert scores_of(rows, "ct", "chance")["P@1"] == pytest.approx(1 / 3)


def test_one_that_knows_the_subject_is_perfect_where_the_subject_is_asked_for() -> None:
    by_subject = embedded(RECORDS, [[float(r.group == f"s{s}") for s in range(1, 5)] for r in RECORDS])
    rows = evaluate({"subject": by_subject}, [SAME_SUBJECT])
    assert scores_of(rows, SAME_SUBJECT.title, "subject")["mAP"] == 1
    assert scores_of(rows, SAME_SUBJECT.title, "chance")["P@1"] == 1 / 4


def test_galleries_are_the_modality_and_across_all_others() -> None:
    rows = evaluate({"any": embedded(RECORDS, torch.rand(8, 3).tolist())})
    counts = {row.protocol: (row.queries, row.gallery) for row in rows if row.method == "any"}
    assert counts == {"ct": (4, 4), "mri": (4, 4), ALL_MODALITIES: (8, 8), ACROSS: (8, 8)}


def test_all_protocols_and_all_metrics_of_each() -> None:
    rows = evaluate({"any": embedded(RECORDS, torch.rand(8, 3).tolist())}, ALL)
    titles = ["ct", "mri", ALL_MODALITIES, "mri (unseen)", UNSEEN_MODALITY.title, ACROSS, ACROSS_BY_LABEL.title]
    # of a subject there is one scan a modality, so the same instance is nowhere to be found
    titles += [SAME_SUBJECT.title, MIXED_GALLERY.title]
    assert list(dict.fromkeys(row.protocol for row in rows)) == titles
    assert [row.method for row in rows] == ["chance", "any"] * len(titles)
    for row in rows:
        own = {f"own modality@{k}" for k in (1, 5, 10)} if row.definition == MIXED_GALLERY else set()
        assert set(row.scores) == {*METRICS, MACRO_MAP} | own
    assert scores_of(rows, "mri (unseen)", "any") == scores_of(rows, "mri", "any")


def test_frames_of_one_video_find_each_other() -> None:
    frames = [record(f"{video}{n}", "endoscopy", "", video) for video in ("u", "v") for n in range(3)]
    rows = evaluate({"video": embedded(frames, [[1.0, 0.1 * n] for n in range(6)])}, [INSTANCE])
    # the angle between neighbours shrinks, so each of the first five is nearest to the next: 2 to 3, of another video
    assert scores_of(rows, INSTANCE.title, "video")["P@1"] == pytest.approx(5 / 6)
    assert scores_of(rows, INSTANCE.title, "chance")["P@1"] == pytest.approx(2 / 5)


def test_a_mixed_gallery_tells_how_much_the_modality_draws() -> None:
    by_modality = embedded(RECORDS, [[float(r.modality == "ct"), float(r.modality == "mri")] for r in RECORDS])
    rows = evaluate({"modality": by_modality}, [MIXED_GALLERY])
    # of six candidates three are of the query's modality, of which one has its label
    own, chance = (scores_of(rows, MIXED_GALLERY.title, method) for method in ("modality", "chance"))
    assert [own[f"own modality@{k}"] for k in (1, 5, 10)] == pytest.approx([1, 3 / 5, 3 / 10])
    assert [chance[f"own modality@{k}"] for k in (1, 5, 10)] == pytest.approx([1 / 2, 1 / 2, 3 / 10])
    assert chance["P@1"] == pytest.approx(1 / 6)


def test_the_mean_over_modalities_weighs_each_the_same() -> None:
    extra = [record(f"x{n}", "xray", "chest", f"x{n}") for n in range(5)]
    records = RECORDS + extra
    rows = evaluate({"any": embedded(records, torch.rand(13, 3).tolist())})
    within = [scores_of(rows, modality, "any")["mAP"] for modality in ("ct", "mri", "xray")]
    assert scores_of(rows, ALL_MODALITIES, "any")["mAP"] == pytest.approx(sum(within) / 3)


def test_rare_classes_weigh_as_much_in_the_macro_mean() -> None:
    """Six heads that find each other, two knees at right angles, with the heads between."""
    records = [record(f"h{n}", "ct", "head", f"h{n}") for n in range(6)]
    records += [record(f"k{n}", "ct", "knee", f"k{n}") for n in range(2)]
    vectors = [[1.0, 1.0]] * 6 + [[1.0, 0.0], [0.0, 1.0]]
    scores = scores_of(evaluate({"any": embedded(records, vectors)}), "ct", "any")
    assert scores["mAP"] == pytest.approx((6 * 1 + 2 * 1 / 7) / 8)
    assert scores[MACRO_MAP] == pytest.approx((1 + 1 / 7) / 2)


def test_a_modality_with_nothing_to_find_is_left_out() -> None:
    frames = [record(f"f{n}", "endoscopy", "video", "video") for n in range(4)]
    rows = evaluate({"any": embedded(RECORDS + frames, torch.rand(12, 3).tolist())})
    assert "endoscopy" not in {row.protocol for row in rows}


def test_scans_without_a_label_match_nothing() -> None:
    unlabelled = [record(f"u{n}", "ct", "", f"u{n}") for n in range(5)]
    assert evaluate({"any": embedded(unlabelled, torch.rand(5, 3).tolist())}) == []
    rows = evaluate({"any": embedded(RECORDS + unlabelled, torch.rand(13, 3).tolist())})
    assert next(row.queries for row in rows if row.protocol == "ct") == 4
    assert evaluate({"any": embedded([], [])}) == []


def test_methods_on_different_scans_do_not_compare() -> None:
    whole, part = embedded(RECORDS, [[1.0]] * 8), embedded(RECORDS[:7], [[1.0]] * 7)
    with pytest.raises(ValueError, match="different scans"):
        evaluate({"a": whole, "b": part})
    with pytest.raises(ValueError, match="different scans"):
        paired_difference(whole, part)


@pytest.mark.parametrize("protocol", ALL, ids=[protocol.name for protocol in ALL])
def test_chunks_of_queries_change_nothing(protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record(f"{n}", ("ct", "mri")[n % 2], "abc"[n % 3], f"p{n // 3}") for n in range(30)]
    methods = {"any": embedded(records, torch.rand(30, 4).tolist())}
    whole = evaluate(methods, [protocol])
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 100)
    chunked = evaluate(methods, [protocol])
    assert len(whole) >= 2
    for one, two in zip(whole, chunked, strict=True):
        assert one.scores == pytest.approx(two.scores)
        assert one.interval == (two.interval and pytest.approx(two.interval))
        assert (one.queries, one.gallery) == (two.queries, two.gallery)


def test_table_and_json_say_the_same() -> None:
    rows = evaluate({"any": embedded(RECORDS, torch.rand(8, 3).tolist())}, [*ALL])
    table = format_table(rows)
    assert len(table.splitlines()) == 2 + len(rows)
    assert len({len(line) for line in table.splitlines()}) == 1
    answer = json.loads(to_json(rows, model="tiny"))
    assert answer["model"] == "tiny"
    assert [row["scores"] for row in answer["rows"]] == [row.scores for row in rows]
    assert f"{rows[0].scores['mAP']:6.3f}" in table.splitlines()[2]
    for row in answer["rows"]:
        assert answer["protocols"][row["protocol"]]["name"] in {protocol.name for protocol in ALL}
    assert "any of the first k" in answer["metrics"]["R@k"]


def test_intervals_hold_the_mean_and_cover_it_as_often_as_they_say() -> None:
    """Of 100 collections drawn with a known expected mAP (chance: embeddings without any sense), some 95 cover it."""
    covered = []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        records = [record(f"s{n}", "ct", "ab"[n % 2], f"p{n}") for n in range(40)]
        rows = evaluate({"any": embedded(records, torch.randn(40, 8, generator=generator).tolist())})
        row = next(row for row in rows if (row.protocol, row.method) == ("ct", "any"))
        chance = scores_of(rows, "ct", "chance")["mAP"]
        covered.append(row.interval[0] <= chance <= row.interval[1])
    assert 90 <= sum(covered) <= 100


def test_a_difference_is_covered_as_often_as_its_interval_says_and_is_narrower_than_two_intervals() -> None:
    """Two methods that are equally good, each the same signal under noise of which half is shared: the difference is 0,
    and some 95 of 100 collections, of two scans a patient, should not tell them apart."""
    covered, widths = [], []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        records = [record(f"s{n}", ("ct", "mri")[n % 2], "ab"[n // 2 % 2], f"p{n // 2}") for n in range(60)]
        signal = torch.randn(2, 8, generator=generator)[torch.arange(60) // 2 % 2]
        shared, *own = torch.randn(3, 60, 8, generator=generator)
        one, two = (embedded(records, (0.5 * signal + shared + noise).tolist()) for noise in own)
        value, (low, high) = paired_difference(one, two)
        rows = evaluate({"one": one, "two": two}, [WITHIN_MODALITY])
        of_mean = {row.method: row for row in rows if row.protocol == ALL_MODALITIES}
        assert value == pytest.approx(of_mean["one"].scores["mAP"] - of_mean["two"].scores["mAP"])
        covered.append(low <= 0 <= high)
        widths.append((high - low) / (of_mean["one"].interval[1] - of_mean["one"].interval[0]))
    assert 90 <= sum(covered) <= 100
    assert sum(widths) / 100 < 2**0.5  # what independent methods would have


def test_a_difference_knows_its_sign_its_metric_and_when_there_is_none() -> None:
    by_class = embedded(RECORDS, [[1.0, 0.0] if r.label == "head" else [0.0, 1.0] for r in RECORDS])
    value, interval = paired_difference(by_class, by_class, ACROSS_BY_LABEL, "nDCG@5")
    assert (value, interval) == (0, (0, 0))
    opposite = embedded(RECORDS, torch.rand(8, 3).tolist())
    there, back = (paired_difference(a, b, metric="P@1") for a, b in ((by_class, opposite), (opposite, by_class)))
    assert there.value == -back.value
    assert there.interval == (-back.interval[1], -back.interval[0])
    with pytest.raises(ValueError, match="expected one of P@1"):
        paired_difference(by_class, by_class, metric="nDCG")
    with pytest.raises(ValueError, match="nothing to retrieve"):
        paired_difference(by_class, by_class, INSTANCE)


def test_intervals_are_given_where_asked_for() -> None:
    methods = {"any": embedded(RECORDS, torch.rand(8, 3).tolist())}
    for row in evaluate(methods):
        assert (row.interval is None) == (row.method == "chance")
        assert row.interval is None or row.interval[0] <= row.scores["mAP"] <= row.interval[1]
    assert all(row.interval is None for row in evaluate(methods, intervals=False))
