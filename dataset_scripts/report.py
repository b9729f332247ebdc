"""What came of a build: counts for the card, and for who ran it every file that failed or is there twice.

`report.json` names files and stays on this machine; what the card says of it are numbers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from modeling_m3ret.data.parquet import SHARD_NAME
from modeling_m3ret.data.schema import MODALITIES
from modeling_m3ret.version import __version__

from .builder import ScanBuilder
from .duplicates import Fingerprint, exact_groups, near_pairs
from .shards import ShardReport


MOST_LISTED = 1000  # pairs of duplicates that a report lists; all of them are counted


def write_report(
    builder: ScanBuilder, reports: Sequence[ShardReport], index: pa.Table | None, parquet_bytes: int
) -> dict[str, Any]:
    """The report as one JSON object. The same build gives the same report, so it holds no time.

    Media bytes and duplicates are of all scans that were read, those that were left out as duplicates too.

    Args:
        index: of the rows as they are now. parquet_bytes: of their shards.
    """
    prints = fingerprints(reports)
    files = {name: file for report in reports for name, file in report.files.items()}
    failures = [failure for report in reports for failure in report.failures]
    exact, near = exact_groups(prints), list(near_pairs(prints))
    columns = ["modality", "anatomy", "labels", "patient", "shard"]
    rows = [] if index is None else index.select(columns).to_pylist()
    dropped = sum(report.rows for report in reports) - len(rows)
    splits = [split["split"] for row in rows if (split := SHARD_NAME.fullmatch(row["shard"]))]
    names = [MODALITIES[row["modality"]] for row in rows]
    patients: dict[str, set[str]] = defaultdict(set)
    for row, own in zip(rows, splits, strict=True):
        patients[row["patient"]].add(own)
    return {
        "m3ret": __version__,
        "source": builder.source.name,
        "scans": {"built": len(rows), "failed": len(failures), "duplicates_dropped": dropped},
        "patients": len(patients),
        "patients_in_several_splits": sum(len(found) > 1 for found in patients.values()),
        "counts": {
            "split": _counted(splits),
            "modality": _counted(names),
            "modality_and_split": {
                name: _counted(split for split, other in zip(splits, names, strict=True) if other == name)
                for name in sorted(set(names))
            },
            "anatomy": _counted(row["anatomy"] or "" for row in rows),
            "label": _counted(label for row in rows for label in row["labels"] or [""]),
        },
        "bytes": {
            "parquet": parquet_bytes,
            "media": sum(report.media_bytes for report in reports),
        },
        "burned_in_annotation": dict(sum((Counter(report.burned_in) for report in reports), Counter())),
        "duplicates": {
            "exact_groups": len(exact),
            "exact_groups_across_splits": sum(len({p.split for p in group}) > 1 for group in exact),
            "near_pairs_across_splits": len(near),
            "exact": [[files[p.id] for p in group] for group in exact[:MOST_LISTED]],
            "near": [[files[one.id], files[other.id], bits] for one, other, bits in near[:MOST_LISTED]],
        },
        "failures": failures,
    }


def fingerprints(reports: Sequence[ShardReport]) -> list[Fingerprint]:
    return [Fingerprint(**told) for report in reports for told in report.fingerprints]


def summary(report: dict[str, Any]) -> str:
    """What the terminal says at the end."""
    scans, duplicates = report["scans"], report["duplicates"]
    lines = [
        f"{scans['built']} scans of {report['patients']} patients, "
        + ", ".join(f"{count} {name}" for name, count in report["counts"]["modality"].items()),
        f"{scans['failed']} files failed, each with its reason in report.json",
        f"duplicates: {duplicates['exact_groups']} groups of equal scans "
        f"({duplicates['exact_groups_across_splits']} across splits), {duplicates['near_pairs_across_splits']} pairs "
        f"across splits that look the same; {scans['duplicates_dropped']} dropped",
    ]
    if several := report["patients_in_several_splits"]:
        lines.append(f"{several} patients are in several of the official splits")
    unsure = {name: count for name, count in report["burned_in_annotation"].items() if name != "no"}
    if unsure:
        told = ", ".join(f"{count} {name}" for name, count in sorted(unsure.items()))
        lines.append(f"text may be burned into the pixels of DICOM files ({told}): look before you share them")
    return "\n".join(lines)


def _counted(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
