"""Evaluation by protocol, chance, intervals and paired differences, and the formats of the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling_m3ret.data.collection import Record
from modeling_m3ret.evaluation import metrics, protocols
from modeling_m3ret.evaluation.metrics import METRICS
from modeling_m3ret.evaluation.protocols import (
    ACROSS_BY_LABEL,
    ALL,
    INSTANCE,
    LABEL_OVER_SOURCES,
    MIXED_GALLERY,
    SAME_SUBJECT,
    SOURCES,
    UNSEEN_MODALITY,
    WITHIN_MODALITY,
    Annotations,
    Protocol,
)
from modeling_m3ret.evaluation.table import (
    ACROSS,
    ALL_MODALITIES,
    IN_TABLE,
    MACRO_MAP,
    Row,
    all_differences,
    differences_from,
    evaluate,
    format_all_differences,
    format_table,
    paired_difference,
    to_json,
)
from modeling_m3ret.search.embedding import Embedded


def record(name: str, modality: str, label: str, group: str) -> Record:
    return Record(name, Path(name), modality, label, label, group)


def embedded(records: list[Record], vectors: list[list[float]]) -> Embedded:
    return Embedded(torch.nn.functional.normalize(torch.tensor(vectors), dim=-1), records)


# two subjects per class, each with a CT and an MRI
RECORDS = [
    record(f"{subject}-{modality}", modality, label, subject)
    for subject, label in (("s1", "head"), ("s2", "head"), ("s3", "knee"), ("s4", "knee"))
    for modality in ("ct", "mri")
]


def scores_of(rows: list[Row], protocol: str, method: str) -> dict[str, float]:
    return dict(next(row.scores for row in rows if (row.protocol, row.method) == (protocol, method)))


def test_encoding_the_class_is_perfect_and_encoding_the_subject_is_useless() -> None:
    by_class = embedded(RECORDS, [[1.0, 0.0] if r.label == "head" else [0.0, 1.0] for r in RECORDS])
    # one direction per subject: the only neighbours of a query are of its own group, which is excluded
    by_subject = embedded(RECORDS, [[float(r.group == f"s{s}") for s in range(1, 5)] for r in RECORDS])
    rows = evaluate({"class": by_class, "subject": by_subject})
    for protocol in ("ct", "mri", ALL_MODALITIES, ACROSS):
        assert {scores_of(rows, protocol, "class")[metric] for metric in (*IN_TABLE, "nDCG@10", MACRO_MAP)} == {1}
    # three equally similar candidates, one relevant: ties rank in gallery order
    assert scores_of(rows, "ct", "subject")["P@1"] == 0.5
    assert scores_of(rows, "ct", "chance")["P@1"] == pytest.approx(1 / 3)


def test_encoding_the_subject_is_perfect_for_subject_retrieval() -> None:
    by_subject = embedded(RECORDS, [[float(r.group == f"s{s}") for s in range(1, 5)] for r in RECORDS])
    rows = evaluate({"subject": by_subject}, [SAME_SUBJECT])
    assert scores_of(rows, SAME_SUBJECT.title, "subject")["mAP"] == 1
    assert scores_of(rows, SAME_SUBJECT.title, "chance")["P@1"] == 1 / 4


def test_rows_count_queries_and_gallery() -> None:
    rows = evaluate({"any": embedded(RECORDS, torch.rand(8, 3).tolist())})
    counts = {row.protocol: (row.queries, row.gallery) for row in rows if row.method == "any"}
    assert counts == {"ct": (4, 4), "mri": (4, 4), ALL_MODALITIES: (8, 8), ACROSS: (8, 8)}


def test_every_protocol_has_rows_with_all_metrics() -> None:
    rows = evaluate({"any": embedded(RECORDS, torch.rand(8, 3).tolist())}, ALL)
    titles = ["ct", "mri", ALL_MODALITIES, "mri (unseen)", UNSEEN_MODALITY.title, ACROSS, ACROSS_BY_LABEL.title]
    # a subject has one scan per modality, so the instance protocol has no answerable query
    titles += [SAME_SUBJECT.title, MIXED_GALLERY.title]
    assert list(dict.fromkeys(row.protocol for row in rows)) == titles
    assert [row.method for row in rows] == ["chance", "any"] * len(titles)
    for row in rows:
        mixed = {f"own modality@{k}" for k in (1, 5, 10)} if row.definition == MIXED_GALLERY else set()
        assert set(row.scores) == {*METRICS, MACRO_MAP} | mixed
    assert scores_of(rows, "mri (unseen)", "any") == scores_of(rows, "mri", "any")


def test_frames_of_a_video_are_instances_of_it() -> None:
    frames = [record(f"{video}{n}", "endoscopy", "", video) for video in ("u", "v") for n in range(3)]
    rows = evaluate({"video": embedded(frames, [[1.0, 0.1 * n] for n in range(6)])}, [INSTANCE])
    # angles shrink along the list: the first five are nearest to their successor, frame 2 to one of another video
    assert scores_of(rows, INSTANCE.title, "video")["P@1"] == pytest.approx(5 / 6)
    assert scores_of(rows, INSTANCE.title, "chance")["P@1"] == pytest.approx(2 / 5)


def test_a_mixed_gallery_reports_the_fraction_of_own_modality_hits() -> None:
    by_modality = embedded(RECORDS, [[float(r.modality == "ct"), float(r.modality == "mri")] for r in RECORDS])
    rows = evaluate({"modality": by_modality}, [MIXED_GALLERY])
    # three of six candidates are of the query's modality, and one of these has its label
    encoded, chance = (scores_of(rows, MIXED_GALLERY.title, method) for method in ("modality", "chance"))
    assert [encoded[f"own modality@{k}"] for k in (1, 5, 10)] == pytest.approx([1, 3 / 5, 3 / 10])
    assert [chance[f"own modality@{k}"] for k in (1, 5, 10)] == pytest.approx([1 / 2, 1 / 2, 3 / 10])
    assert chance["P@1"] == pytest.approx(1 / 6)


def test_the_mean_over_modalities_weighs_modalities_equally() -> None:
    extra = [record(f"x{n}", "xray", "chest", f"x{n}") for n in range(5)]
    records = RECORDS + extra
    rows = evaluate({"any": embedded(records, torch.rand(13, 3).tolist())})
    within = [scores_of(rows, modality, "any")["mAP"] for modality in ("ct", "mri", "xray")]
    assert scores_of(rows, ALL_MODALITIES, "any")["mAP"] == pytest.approx(sum(within) / 3)


def test_the_macro_mean_weighs_rare_classes_equally() -> None:
    """Six equal heads, and two orthogonal knees with the heads between them."""
    records = [record(f"h{n}", "ct", "head", f"h{n}") for n in range(6)]
    records += [record(f"k{n}", "ct", "knee", f"k{n}") for n in range(2)]
    vectors = [[1.0, 1.0]] * 6 + [[1.0, 0.0], [0.0, 1.0]]
    scores = scores_of(evaluate({"any": embedded(records, vectors)}), "ct", "any")
    assert scores["mAP"] == pytest.approx((6 * 1 + 2 * 1 / 7) / 8)
    assert scores[MACRO_MAP] == pytest.approx((1 + 1 / 7) / 2)


def test_a_modality_without_answerable_queries_has_no_row() -> None:
    frames = [record(f"f{n}", "endoscopy", "video", "video") for n in range(4)]
    rows = evaluate({"any": embedded(RECORDS + frames, torch.rand(12, 3).tolist())})
    assert "endoscopy" not in {row.protocol for row in rows}


def test_unlabelled_scans_are_not_answerable() -> None:
    unlabelled = [record(f"u{n}", "ct", "", f"u{n}") for n in range(5)]
    assert evaluate({"any": embedded(unlabelled, torch.rand(5, 3).tolist())}) == []
    rows = evaluate({"any": embedded(RECORDS + unlabelled, torch.rand(13, 3).tolist())})
    assert next(row.queries for row in rows if row.protocol == "ct") == 4
    assert evaluate({"any": embedded([], [])}) == []


def test_methods_on_different_scans_are_rejected() -> None:
    whole, part = embedded(RECORDS, [[1.0]] * 8), embedded(RECORDS[:7], [[1.0]] * 7)
    with pytest.raises(ValueError, match="methods"):
        evaluate({"a": whole, "b": part})


@pytest.mark.parametrize("protocol", ALL, ids=[protocol.name for protocol in ALL])
def test_rows_do_not_depend_on_the_chunk_size(protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> None:
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
        for metric, values in one.leave_one_out.items():
            assert torch.allclose(values, two.leave_one_out[metric], equal_nan=True)


def test_table_and_json_hold_the_rows() -> None:
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
    assert {name.partition("@")[0] for name in answer["metrics"]} == {name.partition("@")[0] for name in METRICS}


@pytest.mark.slow
def test_intervals_cover_the_expected_value_in_95_percent_of_the_collections() -> None:
    """The expected mAP of random embeddings is that of chance."""
    covered = []
    records = [record(f"s{n}", "ct", "ab"[n % 2], f"p{n}") for n in range(40)]
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        rows = evaluate({"any": embedded(records, torch.randn(40, 8, generator=generator).tolist())})
        row = next(row for row in rows if (row.protocol, row.method) == ("ct", "any"))
        chance = scores_of(rows, "ct", "chance")["mAP"]
        covered.append(row.interval[0] <= chance <= row.interval[1])
    assert 90 <= sum(covered) <= 100


@pytest.mark.slow
def test_intervals_of_a_difference_cover_it_and_are_narrower_than_those_of_independent_methods() -> None:
    """Two equally good methods, the same signal under noise that is half shared, two scans per patient: the expected
    difference is 0, and about 95 of 100 intervals cover it."""
    covered, widths = [], []
    records = [record(f"s{n}", ("ct", "mri")[n % 2], "ab"[n // 2 % 2], f"p{n // 2}") for n in range(60)]
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        signal = torch.randn(2, 8, generator=generator)[torch.arange(60) // 2 % 2]
        shared, *noises = torch.randn(3, 60, 8, generator=generator)
        one, two = (embedded(records, (0.5 * signal + shared + noise).tolist()) for noise in noises)
        rows = evaluate({"one": one, "two": two}, [WITHIN_MODALITY])
        value, (low, high) = differences_from("one", rows)["two"]
        mean = {row.method: row for row in rows if row.protocol == ALL_MODALITIES}
        assert value == pytest.approx(mean["one"].scores["mAP"] - mean["two"].scores["mAP"])
        covered.append(low <= 0 <= high)
        widths.append((high - low) / (mean["one"].interval[1] - mean["one"].interval[0]))
    assert 90 <= sum(covered) <= 100
    assert sum(widths) / 100 < 2**0.5  # that of independent methods


def row_of(embeddings: Embedded, protocol: Protocol, metric: str) -> Row:
    return evaluate({"any": embeddings}, [protocol], jackknife=(metric,))[-1]


def test_a_difference_is_zero_for_equal_methods_and_changes_sign_with_their_order() -> None:
    by_class = embedded(RECORDS, [[1.0, 0.0] if r.label == "head" else [0.0, 1.0] for r in RECORDS])
    row = row_of(by_class, ACROSS_BY_LABEL, "nDCG@5")
    assert paired_difference(row, row, "nDCG@5") == (0, (0, 0))
    one, two = (row_of(e, WITHIN_MODALITY, "P@1") for e in (by_class, embedded(RECORDS, torch.rand(8, 3).tolist())))
    there, back = paired_difference(one, two, "P@1"), paired_difference(two, one, "P@1")
    assert there.value == -back.value == pytest.approx(1 - two.scores["P@1"])
    assert there.interval == (-back.interval[1], -back.interval[0])


def test_a_difference_needs_leave_one_out_values_of_the_same_protocol_and_scans() -> None:
    whole, part = embedded(RECORDS, torch.rand(8, 3).tolist()), embedded(RECORDS[:6], torch.rand(6, 3).tolist())
    row = row_of(whole, WITHIN_MODALITY, "mAP")
    with pytest.raises(ValueError, match="'P@1'"):
        paired_difference(row, row, "P@1")
    for other in (row_of(whole, ACROSS_BY_LABEL, "mAP"), row_of(part, WITHIN_MODALITY, "mAP")):
        with pytest.raises(ValueError, match="rows"):
            paired_difference(row, other)


def test_differences_are_those_of_the_main_method_from_each_other_one() -> None:
    methods = {name: embedded(RECORDS, torch.rand(8, 3).tolist()) for name in ("pixels", "main", "other")}
    assert list(differences_from("main", evaluate(methods))) == ["pixels", "other"]
    assert differences_from("main", evaluate(methods, [SAME_SUBJECT])) == {}


def test_intervals_are_computed_only_on_request() -> None:
    methods = {"any": embedded(RECORDS, torch.rand(8, 3).tolist())}
    for row in evaluate(methods):
        assert (row.interval is None) == (row.method == "chance")
        assert row.interval is None or row.interval[0] <= row.scores["mAP"] <= row.interval[1]
    assert all(row.interval is None for row in evaluate(methods, jackknife=()))


def of_sources(large: int = 12) -> list[Record]:
    """Return CT of a large and a small source, and X-rays of one source, with two classes each."""
    sizes = (("ct", "large", large), ("ct", "small", 4), ("xray", "x", 6))
    return [
        replace(record(f"{source}{n}", modality, ("mass", "cyst")[n % 2], f"{source}{n}"), source=source)
        for modality, source, size in sizes
        for n in range(size)
    ]


def test_every_source_weighs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "FEW_QUERIES", 4)
    records = of_sources()
    # only the small source is embedded by its class, so a mean over queries would hardly see it
    vectors = [[float(r.label == "mass"), float(r.label == "cyst"), 0.0] for r in records]
    vectors = [v if r.source == "small" else [0.0, 0.0, 1.0] for r, v in zip(records, vectors, strict=True)]
    by_source = {}
    for source in ("large", "small"):
        parts = LABEL_OVER_SOURCES.parts(Annotations(records))
        queries = next(queries for _, queries in parts if records[queries[0]].source == source)
        masks = LABEL_OVER_SOURCES.masks(Annotations(records), queries)
        similarity = embedded(records, vectors).similarities(queries, masks[1])
        by_source[source] = float(metrics.score_queries(similarity, *masks).scores[:, METRICS.index("mAP")].mean())
    rows = evaluate({"any": embedded(records, vectors)}, [LABEL_OVER_SOURCES, WITHIN_MODALITY])
    assert by_source["small"] > by_source["large"] + 0.1
    assert scores_of(rows, "ct by label", "any")["mAP"] == pytest.approx(sum(by_source.values()) / 2)
    weighted = (12 * by_source["large"] + 4 * by_source["small"]) / 16
    assert scores_of(rows, "ct", "any")["mAP"] == pytest.approx(weighted)
    means = [scores_of(rows, title, "any")["mAP"] for title in ("ct by label", "xray by label")]
    assert scores_of(rows, "by label", "any")["mAP"] == pytest.approx(sum(means) / 2)


def test_differences_of_every_row_are_paired() -> None:
    records = of_sources()
    methods = {name: embedded(records, torch.randn(len(records), 4).tolist()) for name in ("main", "other")}
    rows = evaluate(methods, SOURCES)
    differences = all_differences("main", rows)
    titles = ["ct by label", "xray by label", "by label", "ct by source", "by source"]
    assert list(differences) == [*titles, "inside large", "inside small", "inside x", "inside sources", ACROSS]
    for title, row in differences.items():
        value, (low, high) = row["other"]
        scores = [scores_of(rows, title, method)["mAP"] for method in ("main", "other")]
        assert value == pytest.approx(scores[0] - scores[1])
        assert -1 <= low < value < high <= 1
    assert len(format_all_differences("main", differences).splitlines()) == 2 + len(differences)
    assert all_differences("main", evaluate(methods, SOURCES, jackknife=())) == {}
