"""Select the scans to evaluate, find those that a checkpoint was trained on, and warn if the two share patients.

A checkpoint's `training.json` holds its holdout, its modalities and its number of training scans. A collection in which
holdout and modalities give exactly that number of scans is taken to be the one that the checkpoint was trained on.
Patients are held out by a hash, so equal holdouts select equal patients, and a smaller one selects a subset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..data.collection import Record, split_by_group, split_training_and_held_out
from ..data.schema import find_modality, parse_split


def read_training_facts(checkpoint: str) -> dict[str, Any]:
    """Return the content of the `training.json` of a checkpoint (folder or Hub id), empty if there is none."""
    try:
        facts = json.loads(Path(cached_file(checkpoint, "training.json") or "").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def select_records(records: Sequence[Record], split: str | None, holdout: float | None) -> list[Record]:
    """Return the records of a split, or all; with a holdout, only those of patients that training held out.

    Raises:
        CollectionError: if the split is none of `SPLITS`.
    """
    split = None if split is None else parse_split(split)
    in_split = [record for record in records if split is None or record.split == split]
    return in_split if holdout is None else [*split_by_group(in_split, holdout)[1]]


def describe_selection(split: str | None, holdout: float | None) -> str:
    """Describe the selection of `select_records` for the report."""
    patients = "all patients" if holdout is None else f"held-out fraction {holdout} of the patients"
    return patients if split is None else f"{patients} of the {split} split"


def checkpoint_records(records: Sequence[Record], facts: Mapping[str, Any]) -> list[Record] | None:
    """Return the records of a collection that `train.py` trained a checkpoint on, in its order.

    Returns None if the checkpoint was trained on another collection, or its facts are incomplete.
    """
    holdout, modalities = _holdout(facts), _modalities(facts)
    if holdout is None or not modalities:
        return None
    usable = [record for record in records if record.split in ("", "train")]
    has_validation = any(record.split == "validation" for record in records)
    candidates = (
        split_training_and_held_out(records, holdout)[0],
        # earlier versions trained on patients who are in another split too, and ignored the splits of a manifest
        usable if has_validation else split_by_group(usable, holdout)[0],
        split_by_group(records, holdout)[0],
    )
    for candidate in candidates:
        training = _of_modalities(candidate, modalities)
        if len(training) == facts.get("training_scans"):
            return training
    return None


def training_records(
    records: Sequence[Record], evaluated: Sequence[Record], holdout: float | None, facts: Mapping[str, Any]
) -> list[Record]:
    """Return the records to which the whitening of an untrained encoder may be fitted: none of an evaluated patient.

    These are the records of the collection that the checkpoint was trained on, if this is known. Otherwise they are the
    train split and the records without a split, without the patients held out, and only of the modalities that the
    checkpoint was trained on (if known), since its own whitening has seen no other.
    """
    training = checkpoint_records(records, facts)
    if training is None:
        usable = [record for record in records if record.split in ("", "train")]
        training = _of_modalities(split_by_group(usable, holdout or 0.0)[0], _modalities(facts))
    patients = {record.group for record in evaluated}
    return [record for record in training if record.group not in patients]


def leakage_warning(
    title: str, records: Sequence[Record], evaluated: Sequence[Record], holdout: float | None, facts: Mapping[str, Any]
) -> str | None:
    """Return a warning if the checkpoint `title` was, or may have been, trained on evaluated patients, else None."""
    training, trained_holdout = checkpoint_records(records, facts), _holdout(facts)
    if training is not None:
        patients = {record.group for record in training}
        leaked = sum(record.group in patients for record in evaluated)
        if not leaked:
            return None
        advice = "No patient was held out in its training."
        if any(record.split == "validation" for record in records):
            advice = "Use --split validation."
        elif trained_holdout:
            advice = f"Use --holdout {trained_holdout}."
        return f"LEAKAGE: {title} was trained on patients of {leaked} of the {len(evaluated)} evaluated scans. {advice}"
    if holdout is not None and trained_holdout is not None and holdout > trained_holdout:
        return (
            f"POSSIBLE LEAKAGE: {title} held out {trained_holdout} of the patients in training, but {holdout} are "
            f"evaluated. If it was trained on this collection, use --holdout {trained_holdout}."
        )
    return None


def _holdout(facts: Mapping[str, Any]) -> float | None:
    value = facts.get("holdout")
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 else None


def _modalities(facts: Mapping[str, Any]) -> set[str]:
    """Return the modalities of the facts. The file is not trusted: anything but a list gives an empty set."""
    names = facts.get("modalities")
    return {find_modality(str(name)) or str(name) for name in names} if isinstance(names, list) else set()


def _of_modalities(records: Sequence[Record], names: set[str]) -> list[Record]:
    return [record for record in records if not names or record.modality in names]
