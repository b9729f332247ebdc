"""Selected records, training records and leakage, on collections in which the split of every patient is known."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from modeling_m3ret.data.collection import Record, split_training_and_held_out
from modeling_m3ret.evaluation.leakage import (
    checkpoint_records,
    leakage_warning,
    read_training_facts,
    select_records,
    training_records,
)


def collection(splits: tuple[str, ...], patients: int = 120) -> list[Record]:
    """Return two scans per patient, of three modalities; all scans of a patient are in one split."""
    return [
        Record(f"{n}", Path("x"), ("ct", "xray", "MRI")[n % 3], "", "", f"p{n // 2}", splits[n // 2 % len(splits)])
        for n in range(2 * patients)
    ]


def facts_of_training(records: list[Record], holdout: float, modalities: tuple[str, ...] = ("ct", "xray")) -> dict:
    """Return the facts that `train.py` would write."""
    training = [r for r in split_training_and_held_out(records, holdout)[0] if r.modality in modalities]
    return {"holdout": holdout, "modalities": list(modalities), "training_scans": len(training)}


def patients_of(records: list[Record]) -> set[str]:
    return {record.group for record in records}


def integers(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"(?<![\w.-])\d+(?![\w.])", text)}


SPLITS = [("",), ("train", "test"), ("train", "train", "validation", "test"), ("test", "validation")]


@pytest.mark.parametrize("splits", SPLITS)
def test_training_records_share_no_patient_with_evaluated_ones(splits: tuple[str, ...]) -> None:
    records = collection(splits)
    known = facts_of_training(records, 0.3)
    unknown = known | {"training_scans": 10**6}
    for split, holdout, facts in itertools.product(
        (None, "train", "validation", "test"), (None, 0.0, 0.2, 0.5, 0.9), ({}, known, unknown)
    ):
        evaluated = select_records(records, split, holdout)
        training = training_records(records, evaluated, holdout, facts)
        assert not patients_of(training) & patients_of(evaluated)
        assert all(record.split in ("", "train") for record in training)
        assert not facts or all(record.modality != "MRI" for record in training)


def test_holdout_divides_the_collection_into_training_and_evaluated_records() -> None:
    records = collection(("",))
    evaluated = select_records(records, None, 0.4)
    assert 0.25 * len(records) < len(evaluated) < 0.55 * len(records)  # 120 patients: four standard deviations are 0.18
    training = training_records(records, evaluated, 0.4, {})
    assert sorted([*training, *evaluated], key=lambda record: int(record.id)) == records


def test_the_train_split_is_the_training_part_of_another_split() -> None:
    records = collection(("train", "test"))
    evaluated = select_records(records, "test", None)
    assert evaluated == [record for record in records if record.split == "test"]
    assert training_records(records, evaluated, None, {}) == [record for record in records if record.split == "train"]


@pytest.mark.parametrize(("splits", "split"), [(("",), None), (("train", "test"), None), (("train", "test"), "train")])
def test_there_are_no_training_records_if_all_of_them_are_evaluated(splits: tuple[str, ...], split: str | None) -> None:
    records = collection(splits)
    facts = facts_of_training(records, 0.3)
    assert training_records(records, select_records(records, split, None), None, facts) == []


def test_training_records_of_the_checkpoint_s_collection_are_those_it_was_trained_on() -> None:
    records = collection(("train", "test"))
    facts = facts_of_training(records, 0.3)
    expected = [r for r in split_training_and_held_out(records, 0.3)[0] if r.modality != "MRI"]
    assert checkpoint_records(records, facts) == expected
    assert training_records(records, select_records(records, "test", None), None, facts) == expected
    for other in (records[:-6], collection(("train",)), collection(("train", "train", "test"))):
        assert checkpoint_records(other, facts) is None


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
def test_malformed_facts_are_ignored(facts: dict[str, object]) -> None:
    records = collection(("",))
    assert checkpoint_records(records, facts) is None
    assert leakage_warning("trained", records, records, None, facts) is None


@pytest.mark.parametrize("holdout", [None, 0.1, 0.3, 0.31, 0.5])
def test_the_warning_counts_the_scans_of_patients_seen_in_training(holdout: float | None) -> None:
    records = collection(("",))
    facts = facts_of_training(records, 0.3)
    evaluated = select_records(records, None, holdout)
    training = patients_of([r for r in split_training_and_held_out(records, 0.3)[0] if r.modality != "MRI"])
    leaked = [record for record in evaluated if record.group in training]
    warning = leakage_warning("step-000100", records, evaluated, holdout, facts)
    assert bool(leaked) == (holdout is None or holdout > 0.31)
    if not leaked:
        assert warning is None
    else:
        assert warning is not None
        assert integers(warning) == {len(leaked), len(evaluated)}
        assert "step-000100" in warning
        assert "--holdout 0.3" in warning


def test_no_holdout_is_recommended_if_training_held_out_no_patient() -> None:
    records = collection(("",))
    warning = leakage_warning("trained", records, records, None, facts_of_training(records, 0.0))
    assert warning is not None
    assert integers(warning) == {len(records)}
    assert "--holdout" not in warning


def test_held_out_splits_do_not_leak_and_the_train_split_does() -> None:
    records = collection(("train", "validation", "test"))
    facts = facts_of_training(records, 0.3)
    for split in ("validation", "test"):
        assert leakage_warning("trained", records, select_records(records, split, None), None, facts) is None
    train = select_records(records, "train", None)
    warning = leakage_warning("trained", records, train, None, facts)
    assert warning is not None
    assert "--split validation" in warning


@pytest.mark.parametrize(("holdout", "warns"), [(None, False), (0.2, False), (0.3, False), (0.4, True)])
def test_a_larger_holdout_than_in_training_warns_on_an_unknown_collection(holdout: float | None, warns: bool) -> None:
    records = collection(("",))
    facts = facts_of_training(records, 0.3) | {"training_scans": 5}
    warning = leakage_warning("trained", records, select_records(records, None, holdout), holdout, facts)
    assert (warning is not None) == warns
    assert warning is None or ("0.4" in warning and "--holdout 0.3" in warning)


@pytest.mark.parametrize(("text", "expected"), [(None, {}), ("{", {}), ("[1]", {}), ('{"step": 3}', {"step": 3})])
def test_training_facts_are_empty_if_the_file_is_missing_or_malformed(
    text: str | None, expected: dict[str, int], tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "training.json").write_text(text)
    assert read_training_facts(str(tmp_path)) == expected
