"""Zero-shot retrieval on a labelled collection: within each modality, and across modalities.

Within: query and gallery of one modality, relevant is the same label. Across: the gallery is all other modalities,
relevant is the same anatomy. A scan of the query's own group (patient, or video) is never a candidate. Every table
stands beside chance, pixels and the untrained encoder: a number means little alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .embed import Embedded
from .metrics import jackknife_interval, map_without_each, score_queries


METRICS = ("P@1", "R@5", "mAP")
ALL_MODALITIES = "all modalities"
ACROSS = "across modalities"


@dataclass(frozen=True)
class Row:
    """One line of the table. protocol: a modality, the mean over modalities, or across; method: what embedded; scores:
    of `METRICS`; interval: of 95 % around mAP, see `jackknife_interval`, or None where it wasn't asked for."""

    protocol: str
    method: str
    queries: int
    gallery: int
    scores: tuple[float, float, float]
    interval: tuple[float, float] | None = None


# patients left out together for an interval, where there are more: each block costs a pass over the rankings
MOST_BLOCKS = 100


def evaluate(methods: Mapping[str, Embedded], intervals: bool = True) -> list[Row]:
    """The table's rows for several methods on the same scans; chance comes first under each protocol.

    A protocol in which no query has anything to find is left out: of one video's frames, say, that are all one group.

    Raises:
        ValueError: if the methods embedded different scans.
    """
    records = next(iter(methods.values())).records
    if any(embedded.records != records for embedded in methods.values()):
        raise ValueError("the methods embedded different scans, so their scores would not compare")
    if not records:  # a run that held nobody out
        return []
    modality, anatomy, label, group = (
        torch.tensor(_codes([getattr(record, key) for record in records]))
        for key in ("modality", "anatomy", "label", "group")
    )
    same_modality = modality[:, None] == modality
    foreign = group[:, None] != group
    # what has no label is like nothing, not like everything else that has none
    same_label = (label[:, None] == label) & torch.tensor([bool(record.label) for record in records])
    same_anatomy = (anatomy[:, None] == anatomy) & torch.tensor([bool(record.anatomy) for record in records])
    names = [record.modality for record in records]
    protocols = {
        name: (same_modality, same_label, torch.tensor([other == name for other in names]))
        for name in sorted(set(names))
    }
    protocols[ACROSS] = (~same_modality, same_anatomy, torch.ones(len(names), dtype=torch.bool))

    blocks = min(MOST_BLOCKS, int(group.max()) + 1)
    block = group % blocks
    rows: list[Row] = []
    without_each: dict[tuple[str, str], Tensor] = {}  # of a protocol and method
    for protocol, (candidate, relevant, asked) in protocols.items():
        candidate = (candidate & foreign)[asked]
        gallery = int(candidate.any(0).sum())
        for place, (method, embedded) in enumerate(methods.items()):
            similarity = embedded.embeddings[asked] @ embedded.embeddings.T
            scores, chance, answerable = score_queries(similarity, relevant[asked], candidate)
            queries = int(answerable.sum())
            if not queries:
                break
            if place == 0:
                rows.append(Row(protocol, "chance", queries, gallery, chance.mean()))
            row = Row(protocol, method, queries, gallery, scores.mean())
            if intervals:
                left_out = map_without_each(similarity, relevant[asked], candidate, block[asked], block, blocks)
                without_each[protocol, method] = left_out
                row = replace(row, interval=jackknife_interval(row.scores[2], left_out))
            rows.append(row)
    return _with_mean_over_modalities(rows, without_each)


def _with_mean_over_modalities(rows: list[Row], without_each: Mapping[tuple[str, str], Tensor]) -> list[Row]:
    """Insert, before the rows across modalities, the plain mean over modalities: each weighs the same."""
    within = [row for row in rows if row.protocol != ACROSS]
    means = []
    for method in dict.fromkeys(row.method for row in within):
        own = [row for row in within if row.method == method]
        scores = tuple(sum(row.scores[metric] for row in own) / len(own) for metric in range(len(METRICS)))
        queries, gallery = sum(row.queries for row in own), sum(row.gallery for row in own)
        row = Row(ALL_MODALITIES, method, queries, gallery, scores)  # type: ignore[arg-type]
        if all((row.protocol, method) in without_each for row in own):  # a patient leaves all modalities at once
            left_out = torch.stack([without_each[row.protocol, method] for row in own]).mean(0)
            row = replace(row, interval=jackknife_interval(row.scores[2], left_out))
        means.append(row)
    return within + means + [row for row in rows if row.protocol == ACROSS]


def format_table(rows: list[Row]) -> str:
    """The rows as a Markdown table, which also reads well on a terminal."""
    lines = [
        f"| {'protocol':17} | {'method':9} | queries | gallery |    P@1 |    R@5 |    mAP | mAP, 95 %   |",
        f"|{'-' * 19}|{'-' * 11}|--------:|--------:|-------:|-------:|-------:|------------:|",
    ]
    previous = None
    for row in rows:
        name = row.protocol if row.protocol != previous else ""
        scores = " | ".join(f"{score:6.3f}" for score in row.scores)
        interval = f"{row.interval[0]:.3f}-{row.interval[1]:.3f}" if row.interval else " " * 11
        lines.append(f"| {name:17} | {row.method:9} | {row.queries:7} | {row.gallery:7} | {scores} | {interval} |")
        previous = row.protocol
    return "\n".join(lines)


def to_json(rows: list[Row], **facts: Any) -> str:
    """The rows, and whatever facts of the run are given, as JSON."""
    table = [{**asdict(row), "scores": dict(zip(METRICS, row.scores, strict=True))} for row in rows]
    return json.dumps({**facts, "rows": table}, indent=2)


def _codes(names: list[str]) -> list[int]:
    """A number for each name, equal for equal names."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]
