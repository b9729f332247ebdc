"""Every protocol on six scans, with queries, candidates and relevant scans written out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling_m3ret.data.collection import Record
from modeling_m3ret.errors import InputError
from modeling_m3ret.evaluation.protocols import (
    ACROSS_BY_ANATOMY,
    ACROSS_BY_LABEL,
    ALL,
    ANATOMY_OVER_SOURCES,
    INSTANCE,
    LABEL_OVER_SOURCES,
    LABEL_WITHIN_SOURCE,
    MIXED_GALLERY,
    SAME_SUBJECT,
    SOURCE_WITHIN_MODALITY,
    SOURCES,
    UNSEEN_MODALITY,
    WITHIN_MODALITY,
    Annotations,
    Protocol,
)


def record(name: str, modality: str, anatomy: str, label: str, group: str, split: str = "") -> Record:
    return Record(name, Path(name), modality, anatomy, label, group, split)


# a and b: CT and MRI of patient 1; c: a second CT of patient 1; d: CT, e: MRI of patient 2; f: MRI of patient 3
RECORDS = [
    record("a", "ct", "head", "tumour", "1", "train"),
    record("b", "mri", "head", "tumour", "1", "train"),
    record("c", "ct", "head", "bleeding", "1", "test"),
    record("d", "ct", "neck", "tumour", "2", "train"),
    record("e", "mri", "head", "tumour", "2", "test"),
    record("f", "mri", "neck", "", "3", "test"),
]
ANNOTATIONS = Annotations(RECORDS)


def retrieved(protocol: Protocol, records: list[Record] = RECORDS) -> dict[str, tuple[str, str]]:
    """Return by query the names of its candidates, and of the relevant ones among them."""
    annotations = Annotations(records)

    def names(mask: Tensor) -> str:
        return "".join(record.id for record, selected in zip(records, mask, strict=True) if selected)

    answer = {}
    for _, queries in protocol.parts(annotations):
        relevant, candidate = protocol.masks(annotations, queries)
        for index, hits, candidates in zip(queries.tolist(), relevant & candidate, candidate, strict=True):
            answer[records[index].id] = (names(candidates), names(hits))
    return answer


EXPECTED = {
    WITHIN_MODALITY: {
        "a": ("d", "d"),
        "b": ("ef", "e"),
        "c": ("d", ""),
        "d": ("ac", "a"),
        "e": ("bf", "b"),
        "f": ("be", ""),
    },
    UNSEEN_MODALITY: {"b": ("ef", "e"), "e": ("bf", "b"), "f": ("be", "")},
    ACROSS_BY_ANATOMY: {
        "a": ("ef", "e"),
        "b": ("d", ""),
        "c": ("ef", "e"),
        "d": ("bf", "f"),
        "e": ("ac", "ac"),
        "f": ("acd", "d"),
    },
    ACROSS_BY_LABEL: {
        "a": ("ef", "e"),
        "b": ("d", "d"),
        "c": ("ef", ""),
        "d": ("bf", "b"),
        "e": ("ac", "a"),
        "f": ("acd", ""),
    },
    # the patient is searched for: only the query's modality is excluded
    SAME_SUBJECT: {
        "a": ("bef", "b"),
        "b": ("acd", "ac"),
        "c": ("bef", "b"),
        "d": ("bef", "e"),
        "e": ("acd", "d"),
        "f": ("acd", ""),
    },
    MIXED_GALLERY: {
        "a": ("def", "d"),
        "b": ("def", "e"),
        "c": ("def", ""),
        "d": ("abcf", "a"),
        "e": ("abcf", "b"),
        "f": ("abcde", ""),
    },
    INSTANCE: {
        "a": ("cd", "c"),
        "b": ("ef", ""),
        "c": ("ad", "a"),
        "d": ("ac", ""),
        "e": ("bf", ""),
        "f": ("be", ""),
    },
}


@pytest.mark.parametrize("protocol", ALL, ids=[protocol.name for protocol in ALL])
def test_candidates_and_relevant_scans(protocol: Protocol) -> None:
    assert retrieved(protocol) == EXPECTED[protocol]


@pytest.mark.parametrize("protocols", [ALL, SOURCES])
def test_names_and_titles_are_unique(protocols: tuple[Protocol, ...]) -> None:
    assert len({p.name for p in protocols}) == len({p.title for p in protocols}) == len(protocols)


# CT of two sources, only p with several classes; X-rays of one source; two scans of one patient (a, b)
OF_SOURCES = [
    replace(record(name, modality, anatomy, label, group), source=source)
    for name, modality, anatomy, label, group, source in (
        ("a", "ct", "chest", "mass", "1", "p"),
        ("b", "ct", "chest", "mass", "1", "p"),
        ("c", "ct", "chest", "mass", "2", "p"),
        ("d", "ct", "chest", "cyst", "3", "p"),
        ("e", "ct", "chest", "mass", "4", "q"),
        ("f", "ct", "head", "mass", "5", "q"),
        ("g", "xray", "chest", "mass", "6", "p"),
        ("h", "xray", "chest", "mass", "7", "p"),
    )
]


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        (
            LABEL_OVER_SOURCES,
            {
                "ct by label": {
                    "a": ("cdef", "cef"),
                    "b": ("cdef", "cef"),
                    "c": ("abdef", "abef"),
                    "d": ("abcef", ""),
                    "e": ("abcdf", "abcf"),
                    "f": ("abcde", "abce"),
                },
                "xray by label": {"g": ("h", "h"), "h": ("g", "g")},
            },
        ),
        (  # X-rays have one source
            SOURCE_WITHIN_MODALITY,
            {
                "ct by source": {
                    "a": ("cdef", "cd"),
                    "b": ("cdef", "cd"),
                    "c": ("abdef", "abd"),
                    "d": ("abcef", "abc"),
                    "e": ("abcdf", "f"),
                    "f": ("abcde", "e"),
                }
            },
        ),
        (  # q has one class, and the X-rays of p, too
            LABEL_WITHIN_SOURCE,
            {"inside p": {"a": ("cd", "c"), "b": ("cd", "c"), "c": ("abd", "ab"), "d": ("abc", "")}},
        ),
        (
            ANATOMY_OVER_SOURCES,
            {
                "across modalities": {
                    **{name: ("gh", "gh") for name in "abcde"},
                    "f": ("gh", ""),
                    "g": ("abcdef", "abcde"),
                    "h": ("abcdef", "abcde"),
                }
            },
        ),
    ],
    ids=[protocol.title for protocol in SOURCES],
)
def test_protocols_of_several_sources(protocol: Protocol, expected: dict[str, dict[str, tuple[str, str]]]) -> None:
    found = retrieved(protocol, OF_SOURCES)
    assert found == {name: answer for queries in expected.values() for name, answer in queries.items()}
    titles = {OF_SOURCES[i].id: title for title, queries in protocol.parts(Annotations(OF_SOURCES)) for i in queries}
    assert titles == {name: title for title, queries in expected.items() for name in queries}


def test_sources_are_separate_parts_of_a_mean_over_sources_unless_they_are_small() -> None:
    sizes = {("ct", "p"): 25, ("ct", "q"): 40, ("ct", "r"): 24, ("ct", "s"): 1, ("xray", "p"): 3, ("xray", "r"): 60}
    records = [
        replace(record(f"{modality} {source} {i}", modality, "chest", "mass", str(i)), source=source)
        for (modality, source), size in sizes.items()
        for i in range(size)
    ]

    def parts(protocol: Protocol) -> list[tuple[str, set[str]]]:
        found = protocol.parts(Annotations(records))
        return [(title, {records[i].id.rsplit(" ", 1)[0] for i in queries}) for title, queries in found]

    of_ct, of_xray = [{"ct r", "ct s"}, {"ct p"}, {"ct q"}], [{"xray p"}, {"xray r"}]
    assert parts(LABEL_OVER_SOURCES) == [("ct by label", p) for p in of_ct] + [("xray by label", p) for p in of_xray]
    across = [{"ct r", "ct s", "xray p"}, {"ct p"}, {"ct q"}, {"xray r"}]
    assert parts(ANATOMY_OVER_SOURCES) == [("across modalities", p) for p in across]
    plain = replace(LABEL_OVER_SOURCES, mean_over_sources=False)
    assert parts(plain) == [("ct by label", {"ct p", "ct q", "ct r", "ct s"}), ("xray by label", {"xray p", "xray r"})]


def test_parts_are_the_modalities_of_the_queries() -> None:
    def titles(protocol: Protocol) -> list[tuple[str, list[int]]]:
        return [(title, queries.tolist()) for title, queries in protocol.parts(ANNOTATIONS)]

    assert titles(WITHIN_MODALITY) == [("ct", [0, 2, 3]), ("mri", [1, 4, 5])]
    assert titles(replace(UNSEEN_MODALITY, modalities=("MRI",))) == [("mri (unseen)", [1, 4, 5])]
    assert titles(replace(UNSEEN_MODALITY, modalities=("endoscopy",))) == []
    assert titles(replace(ACROSS_BY_LABEL, query_split="validation")) == []
    assert titles(ACROSS_BY_LABEL) == [("across, by label", list(range(6)))]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"modalities": ("pet",)}, {"modalities": "mri"}, {"query_split": "tset"}, {"gallery_split": "held out"}),
        *({"relevant": "labels"}, {"gallery": "own modalities"}, {"labels": "jacard"}),
    ],
)
def test_unknown_words_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(WITHIN_MODALITY, **wrong)


def test_queries_and_gallery_can_be_splits() -> None:
    split = replace(ACROSS_BY_LABEL, query_split="test", gallery_split="train")
    assert retrieved(split) == {"c": ("", ""), "e": ("a", "a"), "f": ("ad", "")}
    # the query itself is excluded if both are the same split
    assert retrieved(replace(SAME_SUBJECT, query_split="train", gallery_split="train")) == {
        "a": ("b", "b"),
        "b": ("ad", "a"),
        "d": ("b", ""),
    }


def test_several_labels_match_by_any_or_by_jaccard_index() -> None:
    labels = {"w": "a|b", "x": "b|c", "y": "a|b|c", "z": "a|b|c|d|e", "n": ""}
    records = [record(name, "xray", "chest", label, name) for name, label in labels.items()]
    any_shared = {name: relevant for name, (_, relevant) in retrieved(WITHIN_MODALITY, records).items()}
    assert any_shared == {"w": "xyz", "x": "wyz", "y": "wxz", "z": "wxy", "n": ""}
    # w and x share 1 of 3, w and y 2 of 3, w and z 2 of 5, y and z 3 of 5
    by_jaccard = {
        name: relevant for name, (_, relevant) in retrieved(replace(WITHIN_MODALITY, labels="jaccard"), records).items()
    }
    assert by_jaccard == {"w": "y", "x": "y", "y": "wxz", "z": "y", "n": ""}
    half = [record("p", "ct", "", "a", "p"), record("q", "ct", "", "b|a", "q")]
    assert retrieved(replace(WITHIN_MODALITY, labels="jaccard"), half)["p"] == (
        "q",
        "q",
    )  # an index of exactly 0.5 matches


def test_classes_are_the_values_that_relevant_scans_share() -> None:
    scan = record("s", "ct", "head", "b|a", "p1")
    assert WITHIN_MODALITY.classes(scan) == ["a", "b"]
    assert MIXED_GALLERY.classes(scan) == ["a in ct", "b in ct"]
    assert ACROSS_BY_ANATOMY.classes(scan) == ["head"]
    assert INSTANCE.classes(scan) == ["p1"]


def test_empty_annotations_match_nothing() -> None:
    unannotated = [record(name, modality, "", "", name) for name, modality in (("k", "ct"), ("l", "ct"), ("m", "mri"))]
    for protocol in ALL:
        assert not any(relevant for _, relevant in retrieved(protocol, unannotated).values())
    annotations = Annotations([])
    assert all(protocol.parts(annotations) == [] for protocol in ALL)


def test_masks_of_some_queries_are_rows_of_the_masks_of_all() -> None:
    every, some = torch.arange(6), torch.tensor([4, 0])
    for protocol in ALL:
        for whole, part in zip(protocol.masks(ANNOTATIONS, every), protocol.masks(ANNOTATIONS, some), strict=True):
            assert torch.equal(whole[some], part)
