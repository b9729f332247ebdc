"""Evaluated, trained on, or both? On collections whose every patient's side is known."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from modeling_m3ret.data.collection import Record, split_training_and_held_out
from modeling_m3ret.evaluation.leakage import (
    evaluated_part,
    leak_in_words,
    trained_on,
    training_facts,
    training_part,
)


def collection(splits: tuple[str, ...], patients: int = 120) -> list[Record]:
    """Two scans a patient, of three modalities; a patient has one split."""
    return [
        Record(f"{n}", Path("x"), ("ct", "xray", "MRI")[n % 3], "", "", f"p{n // 2}", splits[n // 2 % len(splits)])
        for n in range(2 * patients)
    ]


def facts_of(records: list[Record], holdout: float, modalities: tuple[str, ...] = ("ct", "xray")) -> dict[str, object]:
    """As `train.py` would write them."""
    training = [r for r in split_training_and_held_out(records, holdout)[0] if r.modality in modalities]
    return {"holdout": holdout, "modalities": list(modalities), "training_scans": len(training)}


def groups(records: list[Record]) -> set[str]:
    return {record.group for record in records}


SPLITS = [("",), ("train", "test"), ("train", "train", "validation", "test"), ("test", "validation")]


@pytest.mark.parametrize("splits", SPLITS)
def test_nobody_who_is_evaluated_is_in_the_training_part(splits: tuple[str, ...]) -> None:
    records = collection(splits)
    known = facts_of(records, 0.3)
    unknown = known | {"training_scans": 10**6}
    for split, holdout, facts in itertools.product(
        (None, "train", "validation", "test"), (None, 0.0, 0.2, 0.5, 0.9), ({}, known, unknown)
    ):
        evaluated = evaluated_part(records, split, holdout)
        training = training_part(records, evaluated, holdout, facts)
        assert not groups(training) & groups(evaluated)
        assert all(record.split in ("", "train") for record in training)
        assert not facts or all(record.modality != "MRI" for record in training)


def test_the_rest_of_a_holdout_is_the_training_part() -> None:
    records = collection(("",))
    evaluated = evaluated_part(records, None, 0.4)
    assert 0.25 * len(records) < len(evaluated) < 0.55 * len(records)  # 120 patients: four standard deviations are .18
    training = training_part(records, evaluated, 0.4, {})
    assert sorted([*training, *evaluated], key=lambda record: int(record.id)) == records


def test_of_another_split_the_train_split_is() -> None:
    records = collection(("train", "test"))
    evaluated = evaluated_part(records, "test", None)
    assert evaluated == [record for record in records if record.split == "test"]
    assert training_part(records, evaluated, None, {}) == [record for record in records if record.split == "train"]


@pytest.mark.parametrize(("splits", "split"), [(("",), None), (("train", "test"), None), (("train", "test"), "train")])
def test_where_all_that_was_trained_on_is_evaluated_nothing_is_left(splits: tuple[str, ...], split: str | None) -> None:
    records = collection(splits)
    assert training_part(records, evaluated_part(records, split, None), None, facts_of(records, 0.3)) == []


def test_of_the_checkpoint_s_own_collection_it_is_what_the_checkpoint_was_trained_on() -> None:
    records = collection(("train", "test"))
    facts = facts_of(records, 0.3)
    expected = [r for r in split_training_and_held_out(records, 0.3)[0] if r.modality != "MRI"]
    assert trained_on(records, facts) == expected
    assert training_part(records, evaluated_part(records, "test", None), None, facts) == expected
    for other in (records[:-6], collection(("train",)), collection(("train", "train", "test"))):
        assert trained_on(other, facts) is None


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"holdout": 0.3},
        {"holdout": "0.3", "modalities": ["ct"], "training_scans": 80},
        {"holdout": -1, "modalities": ["ct"], "training_scans": 80},
        {"holdout": 0.3, "modalities": "ct", "training_scans": 80},
        {"holdout": 0.3, "modalities": [["ct"]], "training_scans": None},
    ],
)
def test_facts_that_are_none_know_nothing(facts: dict[str, object]) -> None:
    records = collection(("",))
    assert trained_on(records, facts) is None
    assert leak_in_words("trained", records, records, None, facts) is None


@pytest.mark.parametrize("holdout", [None, 0.1, 0.3, 0.31, 0.5])
def test_a_leak_is_counted(holdout: float | None) -> None:
    records = collection(("",))
    facts = facts_of(records, 0.3)
    evaluated = evaluated_part(records, None, holdout)
    training = [r for r in split_training_and_held_out(records, 0.3)[0] if r.modality != "MRI"]
    leaking = [record for record in evaluated if any(record.group == other.group for other in training)]
    words = leak_in_words("step-000100", records, evaluated, holdout, facts)
    assert bool(leaking) == (holdout is None or holdout > 0.31)
    if leaking:
        assert words is not None
        assert f"step-000100 was trained on the patients of {len(leaking)} of these {len(evaluated)} scans" in words
        assert "--holdout 0.3" in words
    else:
        assert words is None


def test_of_a_training_that_held_out_nobody_no_holdout_is_advised() -> None:
    records = collection(("",))
    words = leak_in_words("trained", records, records, None, facts_of(records, 0.0))
    assert words is not None
    assert words.endswith("scans; it held out nobody.")


def test_the_split_that_training_held_out_leaks_nothing_and_the_train_split_all() -> None:
    records = collection(("train", "validation", "test"))
    facts = facts_of(records, 0.3)
    for split in ("validation", "test"):
        assert leak_in_words("trained", records, evaluated_part(records, split, None), None, facts) is None
    train = evaluated_part(records, "train", None)
    words = leak_in_words("trained", records, train, None, facts)
    assert words is not None
    assert "--split validation has none" in words


def test_of_a_collection_that_may_be_another_a_larger_holdout_is_a_word() -> None:
    records = collection(("",))
    facts = facts_of(records, 0.3) | {"training_scans": 5}
    for holdout, is_told in ((None, False), (0.2, False), (0.3, False), (0.4, True)):
        words = leak_in_words("trained", records, evaluated_part(records, None, holdout), holdout, facts)
        assert (words is not None) == is_told
        assert words is None or "held out 0.3 of the patients, and 0.4 of them" in words


def test_facts_are_read_from_a_checkpoint_or_there_are_none(tmp_path: Path) -> None:
    assert training_facts(str(tmp_path)) == {}
    for text, expected in (("{", {}), ("[1]", {}), ('{"step": 3}', {"step": 3})):
        (tmp_path / "training.json").write_text(text)
        assert training_facts(str(tmp_path)) == expected, json.dumps(text)
