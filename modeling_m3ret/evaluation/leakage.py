"""Which scans of a collection are evaluated, which was a checkpoint trained on, and do the two meet?

A checkpoint's `training.json` says its holdout, its modalities and how many scans it was trained on; a collection in
which these give exactly that many scans is taken for the one that it was trained on. (Patients are held out by a hash,
so the same holdout gives the same ones, and a smaller one some of those of a larger.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..data.collection import Record, split_by_group, split_training_and_held_out


def training_facts(checkpoint: str) -> dict[str, Any]:
    """What a checkpoint's `training.json` says that it was trained with; nothing where there is none.

    Args:
        checkpoint: a folder or Hub id.
    """
    try:
        facts = json.loads(Path(cached_file(checkpoint, "training.json") or "").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def evaluated_part(records: Sequence[Record], split: str | None, holdout: float | None) -> list[Record]:
    """The scans of a split, and of these the held-out patients; all where it is None."""
    of_split = [record for record in records if split is None or record.split == split]
    return of_split if holdout is None else split_by_group(of_split, holdout)[1]


def trained_on(records: Sequence[Record], facts: Mapping[str, Any]) -> list[Record] | None:
    """The scans that `train.py` trained the checkpoint of these facts on, in its order, or None where this is another
    collection, or its facts say too little."""
    holdout, modalities = _holdout(facts), _modalities(facts)
    if holdout is None or not modalities:
        return None
    training = _of_modalities(split_training_and_held_out(records, holdout)[0], modalities)
    return training if len(training) == facts.get("training_scans") else None


def training_part(
    records: Sequence[Record], evaluated: Sequence[Record], holdout: float | None, facts: Mapping[str, Any]
) -> list[Record]:
    """Scans that an untrained encoder's whitening may be fitted to: none of a patient who is evaluated.

    Those that the checkpoint was trained on where this is its collection. Else what this collection has for training:
    its train split and what has no split, without the patients of the holdout; of the modalities that the checkpoint
    was trained on, as far as it says so, since its own whitening knows no other.

    Args:
        records: the whole collection. evaluated: of `evaluated_part`. facts: of `training_facts`.
    """
    training = trained_on(records, facts)
    if training is None:
        training, _ = split_by_group([record for record in records if record.split in ("", "train")], holdout or 0.0)
        if modalities := _modalities(facts):
            training = _of_modalities(training, modalities)
    patients = {record.group for record in evaluated}
    return [record for record in training if record.group not in patients]


def leak_in_words(
    title: str, records: Sequence[Record], evaluated: Sequence[Record], holdout: float | None, facts: Mapping[str, Any]
) -> str | None:
    """A warning if the checkpoint was, or may have been, trained on patients who are evaluated; None where nothing says
    so.

    Args:
        title: what the table calls the checkpoint. Others as for `training_part`.
    """
    training, without = trained_on(records, facts), _holdout(facts)
    if training is not None:
        patients = {record.group for record in training}
        seen = sum(record.group in patients for record in evaluated)
        if not seen:
            return None
        better = "it held out nobody"
        if any(record.split == "validation" for record in records):
            better = "--split validation has none"
        elif without:
            better = f"--holdout {without} has none"
        return f"LEAK: {title} was trained on the patients of {seen} of these {len(evaluated)} scans; {better}."
    if holdout is not None and without is not None and holdout > without:
        return (
            f"LEAK if {title} was trained on this collection: it held out {without} of the patients, and {holdout} "
            "of them are evaluated."
        )
    return None


def _holdout(facts: Mapping[str, Any]) -> float | None:
    value = facts.get("holdout")
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 else None


def _modalities(facts: Mapping[str, Any]) -> set[str]:
    """Their names without case; none where the facts, which may be anyone's file, hold none."""
    names = facts.get("modalities")
    return {str(name).casefold() for name in names} if isinstance(names, list) else set()


def _of_modalities(records: Sequence[Record], names: set[str]) -> list[Record]:
    return [record for record in records if record.modality.casefold() in names]
