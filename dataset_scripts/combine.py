"""Combine folders with a manifest.csv into one collection with splits and without duplicates.

    m3ret combine --config configs/data/combine.yaml
    m3ret combine --config configs/data/combine.yaml --output combined --num_proc 4

The new folder holds a manifest.csv, a link to each of the folders, and combine.json, which counts the scans of each
split and lists those that were left out. Scans are neither copied nor changed. docs/evaluation.md shows a benchmark
that is made this way.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from dataset_scripts.duplicates import Fingerprint, choose_duplicates_to_drop, perceptual_hash
from dataset_scripts.row_encoding import middle_slice
from modeling_m3ret.atomic_io import atomic_folder, atomic_write_text
from modeling_m3ret.command_line import CommandLine, user_errors
from modeling_m3ret.data.collection import NO_UNITS, Record, split_by_group
from modeling_m3ret.data.schema import SPLITS, clean, fold, parse_modality, require_words
from modeling_m3ret.data.table import (
    COLUMNS,
    MANIFEST,
    OPTIONAL_COLUMNS,
    ManifestRow,
    TableError,
    read_manifest_rows,
    read_table,
)
from modeling_m3ret.errors import InputError
from modeling_m3ret.intensity_m3ret import INTENSITIES
from modeling_m3ret.reading_m3ret import read_scan
from modeling_m3ret.scan_m3ret import M3RetReadError


REPORT = "combine.json"
FRAMES = 3  # of a clip that are read to compare it; the middle one is hashed
CONDITION = re.compile(r"\s*(\w+)\s*(==|!=)\s*(.*)")


@dataclass
class Part:
    """One folder with a manifest.csv, and the splits of its scans. Splits of the manifest itself are not used."""

    folder: str
    """Folder with a manifest.csv."""
    name: str = ""
    """Name of the part, which starts the ids and groups of its scans; by default that of the folder."""
    source: str = ""
    """Source of all scans; by default the column `source` of the manifest."""
    train_if: str = ""
    """Condition on a column of the manifest, `COLUMN == VALUE` or `COLUMN != VALUE`. Scans that are not held out and do
    not satisfy it are in the test split."""
    holdout: float = 0.1
    """Expected fraction of the groups that is held out, by the hash of the group that `--holdout` of train.py uses."""
    held_out_split: Literal["validation", "test"] = "validation"
    """Split of the groups that are held out."""
    volume_intensity: str = ""
    """Intensity of CT volumes whose format declares none, for example hounsfield, unless their row states another."""

    def __post_init__(self) -> None:
        self.name = self.name or Path(self.folder).resolve().name
        if not re.fullmatch(r"\w[\w.-]*", self.name) or self.name in (MANIFEST, REPORT):
            raise InputError(f"name: expected letters, digits, '_', '-' and '.', got {self.name!r}. Set `name`.")
        if not 0 <= self.holdout < 1:
            raise InputError(f"holdout: expected a number >= 0 and < 1, got {self.holdout}.")
        if self.train_if and not CONDITION.fullmatch(self.train_if):
            raise InputError(f"train_if: expected COLUMN == VALUE or COLUMN != VALUE, got {self.train_if!r}.")
        if self.volume_intensity not in ("", *INTENSITIES):
            expected = f"empty, or one of {', '.join(INTENSITIES)}"
            raise InputError(f"volume_intensity: expected {expected}, got {self.volume_intensity!r}.")


@dataclass
class CombineOptions:
    """Folders to combine"""

    output: str
    """New folder. Links in it are relative, so it can be moved together with the folders that it links to."""
    parts: list[Part] = field(default_factory=list)
    """Folders to combine, as a YAML list of mappings."""
    exclude_modalities: list[str] = field(default_factory=lambda: ["mri"])
    """Modalities whose scans are never in the train split: they are in the test split, unless they are held out."""
    num_proc: int = 1
    """Processes that read scans to find duplicates."""


def combine(options: CombineOptions, progress: bool = False) -> dict[str, Any]:
    """Write the combined collection and return the content of its combine.json.

    Raises:
        InputError: if the output exists, an option is out of range, or two parts have the same name.
        CollectionError: if a manifest does not match its format.
    """
    output, names = Path(options.output), [part.name for part in options.parts]
    if not names or len(set(names)) < len(names):
        got = ", ".join(names) or "none"
        raise InputError(f"parts: expected folders with distinct names, got {got}. Set `name` of each part.")
    if options.num_proc < 1:
        raise InputError(f"num_proc: expected at least 1, got {options.num_proc}.")
    if output.exists():
        raise InputError(f"output: expected a new folder, got {output}, which exists. Remove it, or choose another.")
    excluded = {parse_modality(word) for word in require_words("exclude_modalities", options.exclude_modalities)}
    rows = {part.name: list(_split(part, excluded)) for part in options.parts}
    every = [row for part_rows in rows.values() for row in part_rows]
    fingerprints, unreadable = _read_fingerprints(every, options.num_proc, progress)
    duplicates = choose_duplicates_to_drop(fingerprints)
    left_out = {*duplicates, *unreadable}
    kept = [row for row in every if row.id not in left_out]
    report = {
        "scans": len(kept),
        "splits": _count(row.split for row in kept),
        "groups": {split: len({row.group for row in kept if row.split == split}) for split in SPLITS},
        "modalities": {split: _count(row.modality for row in kept if row.split == split) for split in SPLITS},
        "sources": {split: _count(row.source for row in kept if row.split == split) for split in SPLITS},
        "duplicates": sorted(duplicates),
        "unreadable": dict(sorted(unreadable.items())),
    }
    with atomic_folder(output) as folder:
        for part in options.parts:
            (folder / part.name).symlink_to(os.path.relpath(Path(part.folder).resolve(), output.resolve()))
        with (folder / MANIFEST).open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, (*COLUMNS, *OPTIONAL_COLUMNS), lineterminator="\n")
            table.writeheader()
            for part in options.parts:
                table.writerows(_cells(row, part) for row in rows[part.name] if row.id not in left_out)
        atomic_write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _split(part: Part, excluded: set[str]) -> Iterator[ManifestRow]:
    """Yield the rows of a part with their split, and with ids and groups that are unique among parts."""
    folder = Path(part.folder)
    rows = list(read_manifest_rows(folder))
    may_train = _satisfying(folder, part.train_if)
    # held out by the group's own name, as train.py would hold out this folder alone
    records = [Record(row.id, row.file, row.modality, row.anatomy, "", row.group or row.id) for row in rows]
    held_out = {record.id for record in split_by_group(records, part.holdout)[1]}
    for row in rows:
        if not row.modality:
            raise TableError(row.location, "a modality", "an empty cell", "Complete the row or remove it.")
        trains = row.modality not in excluded and (may_train is None or row.id in may_train)
        no_units = row.modality == "ct" and row.intensity is None and str(row.file).endswith(NO_UNITS)
        yield replace(
            row,
            id=f"{part.name}/{row.id}",
            group=f"{part.name}/{row.group or row.id}",
            split=part.held_out_split if row.id in held_out else "train" if trains else "test",
            source=part.source or row.source or part.name,
            intensity=part.volume_intensity or None if no_units else row.intensity,
        )


def _satisfying(folder: Path, condition: str) -> set[str] | None:
    """Return the ids of the rows that satisfy the condition, or None without a condition."""
    if not (match := CONDITION.fullmatch(condition)):
        return None
    column, operator, value = match.groups()
    return {
        clean(cells["id"])
        for cells in read_table(folder / MANIFEST, ("id", column))
        if (fold(cells[column]) == fold(value)) == (operator == "==")
    }


def _read_fingerprints(
    rows: Sequence[ManifestRow], num_proc: int, progress: bool
) -> tuple[list[Fingerprint], dict[str, str]]:
    """Return the fingerprints of all readable scans, and by id why the others could not be read."""
    fingerprints: list[Fingerprint] = []
    unreadable: dict[str, str] = {}
    with ProcessPoolExecutor(num_proc, mp_context=get_context("spawn")) as pool:
        results = map(_fingerprint, rows) if num_proc <= 1 else pool.map(_fingerprint, rows, chunksize=16)
        for row, result in zip(rows, tqdm(results, total=len(rows), unit="scan", disable=not progress), strict=True):
            if isinstance(result, Fingerprint):
                fingerprints.append(result)
            else:
                unreadable[row.id] = result
    return fingerprints, unreadable


def _fingerprint(row: ManifestRow) -> Fingerprint | str:
    try:
        array = read_scan(row.file, intensity=row.intensity, num_frames=FRAMES).array
    except M3RetReadError as error:
        return error.detail
    digest = hashlib.sha256(f"{array.shape} {array.dtype}".encode() + array.tobytes()).hexdigest()
    return Fingerprint(row.id, row.split, row.group, digest, perceptual_hash(middle_slice(array)))


def _cells(row: ManifestRow, part: Part) -> dict[str, str]:
    return {
        "id": row.id,
        "file": f"{part.name}/{row.file.relative_to(part.folder).as_posix()}",
        "modality": row.modality,
        "anatomy": row.anatomy,
        "label": "|".join(row.labels),
        "group": row.group,
        "split": row.split,
        "source": row.source,
        "licence": row.licence,
        "intensity": row.intensity or "",
    }


def _count(words: Iterator[str]) -> dict[str, int]:
    return dict(sorted(Counter(words).items()))


def format_summary(report: dict[str, Any]) -> str:
    """Return the counts of a report as lines of text."""
    lines = []
    for split, count in report["splits"].items():
        modalities = ", ".join(f"{name} {number:,}" for name, number in report["modalities"][split].items())
        lines.append(f"{split}: {count:,} scans of {report['groups'][split]:,} groups ({modalities})")
    left_out = f"{len(report['duplicates'])} duplicates and {len(report['unreadable'])} unreadable scans left out"
    return "\n".join([*lines, left_out])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandLine(__doc__)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(CombineOptions)
    values = parser.parse_args(argv)
    with user_errors(parser.prog):
        options = parser.instantiate(values).as_dict()
        del options["config"]
        print(format_summary(combine(CombineOptions(**options), progress=True)))


if __name__ == "__main__":
    main()
