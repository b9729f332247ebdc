"""Every protocol on six scans, with what it asks, searches and calls right written down by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling_m3ret.data.collection import Record
from modeling_m3ret.evaluation.protocols import (
    ACROSS_BY_ANATOMY,
    ACROSS_BY_LABEL,
    ALL,
    INSTANCE,
    MIXED_GALLERY,
    SAME_SUBJECT,
    UNSEEN_MODALITY,
    WITHIN_MODALITY,
    Annotations,
    Protocol,
    unseen,
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
FACTS = Annotations(RECORDS)


def found(protocol: Protocol, records: list[Record] = RECORDS) -> dict[str, tuple[str, str]]:
    """Of each scan that asks: the names of its candidates, and of the relevant among them."""
    facts = Annotations(records)
    answer = {}
    for _, queries in protocol.parts(facts):
        relevant, candidate = protocol.masks(facts, queries)
        for place, right, searched in zip(queries.tolist(), relevant & candidate, candidate, strict=True):
            names = [
                "".join(r.id for r, chosen in zip(records, mask, strict=True) if chosen) for mask in (searched, right)
            ]
            answer[records[place].id] = (names[0], names[1])
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
    # own patient is what is looked for: only the query and its own modality are no candidates
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
def test_what_is_searched_and_what_is_right(protocol: Protocol) -> None:
    assert found(protocol) == EXPECTED[protocol]


def test_each_has_a_name_and_a_title_of_its_own() -> None:
    assert len({protocol.name for protocol in ALL}) == len({protocol.title for protocol in ALL}) == len(ALL)


def test_parts_are_modalities_where_each_weighs_the_same() -> None:
    def titles(protocol: Protocol) -> list[tuple[str, list[int]]]:
        return [(title, queries.tolist()) for title, queries in protocol.parts(FACTS)]

    assert titles(WITHIN_MODALITY) == [("ct", [0, 2, 3]), ("mri", [1, 4, 5])]
    assert titles(unseen("MRI")) == [("mri (unseen)", [1, 4, 5])]
    assert titles(unseen("pet")) == titles(replace(ACROSS_BY_LABEL, query_split="validation")) == []
    assert titles(ACROSS_BY_LABEL) == [("across, by label", list(range(6)))]


def test_queries_of_one_split_and_gallery_of_another() -> None:
    split = replace(ACROSS_BY_LABEL, query_split="test", gallery_split="train")
    assert found(split) == {"c": ("", ""), "e": ("a", "a"), "f": ("ad", "")}
    # of one split on both sides, still without itself
    assert found(replace(SAME_SUBJECT, query_split="train", gallery_split="train")) == {
        "a": ("b", "b"),
        "b": ("ad", "a"),
        "d": ("b", ""),
    }


def test_several_labels_match_by_any_or_by_half() -> None:
    labels = {"w": "a|b", "x": "b|c", "y": "a|b|c", "z": "a|b|c|d|e", "n": ""}
    records = [record(name, "xray", "chest", label, name) for name, label in labels.items()]
    any_shared = {name: right for name, (_, right) in found(WITHIN_MODALITY, records).items()}
    assert any_shared == {"w": "xyz", "x": "wyz", "y": "wxz", "z": "wxy", "n": ""}
    # w and x share 1 of 3, w and y 2 of 3, w and z 2 of 5, y and z 3 of 5
    by_half = {name: right for name, (_, right) in found(replace(WITHIN_MODALITY, labels="jaccard"), records).items()}
    assert by_half == {"w": "y", "x": "y", "y": "wxz", "z": "y", "n": ""}
    half = [record("p", "ct", "", "a", "p"), record("q", "ct", "", "b|a", "q")]
    assert found(replace(WITHIN_MODALITY, labels="jaccard"), half)["p"] == ("q", "q")  # .5 itself is enough


def test_classes_are_what_hits_share() -> None:
    scan = record("s", "ct", "head", "b|a", "p1")
    assert WITHIN_MODALITY.classes(scan) == ["a", "b"]
    assert MIXED_GALLERY.classes(scan) == ["a in ct", "b in ct"]
    assert ACROSS_BY_ANATOMY.classes(scan) == ["head"]
    assert INSTANCE.classes(scan) == ["p1"]


def test_what_has_no_name_is_like_nothing() -> None:
    nameless = [record(name, modality, "", "", name) for name, modality in (("k", "ct"), ("l", "ct"), ("m", "mri"))]
    for protocol in ALL:
        assert not any(right for _, right in found(protocol, nameless).values())
    facts = Annotations([])
    assert all(protocol.parts(facts) == [] for protocol in ALL)


def test_masks_of_a_few_queries_are_rows_of_those_of_all() -> None:
    everyone, some = torch.arange(6), torch.tensor([4, 0])
    for protocol in ALL:
        for whole, part in zip(protocol.masks(FACTS, everyone), protocol.masks(FACTS, some), strict=True):
            assert torch.equal(whole[some], part)
