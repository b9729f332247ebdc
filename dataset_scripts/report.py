"""Summarise a build: counts for the dataset card, and the skipped and duplicate files for the person who ran it.

`report.json` names files and stays on this machine. The card contains only its numbers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from modeling_m3ret.data.parquet import SHARD_NAME
from modeling_m3ret.data.schema import MODALITIES
from modeling_m3ret.version import __version__

from .builder import ScanBuilder
from .duplicates import Fingerprint, find_exact_duplicates, find_near_duplicates
from .shards import ShardReport


MAX_LISTED_DUPLICATES = 1000  # all of them are counted


def make_report(
    builder: ScanBuilder, reports: Sequence[ShardReport], index: pa.Table | None, parquet_bytes: int
) -> dict[str, Any]:
    """Return the report as a JSON object. It contains no time, so that the same build gives the same report.

    Media bytes and duplicates count all scans that were read, including dropped duplicates. `index` is None if there is
    no row, and `parquet_bytes` is the size of all shards.
    """
    fingerprints = collect_fingerprints(reports)
    files = {name: file for report in reports for name, file in report.files.items()}
    failures = [failure for report in reports for failure in report.failures]
    exact, near = find_exact_duplicates(fingerprints), list(find_near_duplicates(fingerprints))
    columns = ["modality", "anatomy", "labels", "patient", "shard"]
    rows = [] if index is None else index.select(columns).to_pylist()
    dropped = sum(report.rows for report in reports) - len(rows)
    splits = [match["split"] for row in rows if (match := SHARD_NAME.fullmatch(row["shard"]))]
    modalities = [MODALITIES[row["modality"]] for row in rows]
    splits_of_patient: dict[str, set[str]] = defaultdict(set)
    for row, split in zip(rows, splits, strict=True):
        splits_of_patient[row["patient"]].add(split)
    return {
        "m3ret": __version__,
        "source": builder.source.name,
        "scans": {"built": len(rows), "failed": len(failures), "duplicates_dropped": dropped},
        "notes": dict(sorted(builder.source.notes.items())),
        "patients": len(splits_of_patient),
        "patients_in_several_splits": sum(len(splits) > 1 for splits in splits_of_patient.values()),
        "counts": {
            "split": _count(splits),
            "modality": _count(modalities),
            "modality_and_split": {
                modality: _count(split for split, other in zip(splits, modalities, strict=True) if other == modality)
                for modality in sorted(set(modalities))
            },
            "anatomy": _count(row["anatomy"] or "" for row in rows),
            "label": _count(label for row in rows for label in row["labels"] or [""]),
        },
        "bytes": {"parquet": parquet_bytes, "media": sum(report.media_bytes for report in reports)},
        "burned_in_annotation": dict(sum((Counter(report.burned_in) for report in reports), Counter())),
        "duplicates": {
            "exact_groups": len(exact),
            "exact_groups_across_splits": sum(len({scan.split for scan in group}) > 1 for group in exact),
            "near_pairs_across_splits": len(near),
            "exact": [[files[scan.id] for scan in group] for group in exact[:MAX_LISTED_DUPLICATES]],
            "near": [[files[one.id], files[other.id], bits] for one, other, bits in near[:MAX_LISTED_DUPLICATES]],
        },
        "failures": failures,
    }


def collect_fingerprints(reports: Sequence[ShardReport]) -> list[Fingerprint]:
    """Return the fingerprints of all scans that were read."""
    return [Fingerprint(**fields) for report in reports for fields in report.fingerprints]


def format_summary(report: dict[str, Any]) -> str:
    """Return the lines that are printed after a build."""
    scans, duplicates = report["scans"], report["duplicates"]
    modalities = ", ".join(f"{count} {name}" for name, count in report["counts"]["modality"].items())
    lines = [
        f"scans: {scans['built']} of {report['patients']} patients ({modalities})",
        f"skipped: {scans['failed']} (reasons in report.json)",
        f"duplicates: {duplicates['exact_groups']} groups of equal scans "
        f"({duplicates['exact_groups_across_splits']} across splits), {duplicates['near_pairs_across_splits']} pairs "
        f"across splits that look the same; {scans['duplicates_dropped']} dropped",
    ]
    lines += [f"note: {count} {what}" for what, count in report["notes"].items()]
    if several := report["patients_in_several_splits"]:
        lines.append(f"warning: {several} patients are in more than one official split")
    burned_in = sorted(report["burned_in_annotation"].items())
    if counts := ", ".join(f"{count} {answer}" for answer, count in burned_in if answer != "no"):
        lines.append(f"warning: DICOM images may have text burned in ({counts}); inspect them before you share them")
    return "\n".join(lines)


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
