"""Zero-shot retrieval on a labelled collection, by the protocols of `protocols.py`: by default within each modality by
label, and across modalities by anatomy.

Every table stands beside chance, pixels and the untrained encoder: a number means little alone. Whether one method is
better than another is asked of `paired_difference`: their intervals may overlap though it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..search.embedding import Embedded
from .metrics import DEFINITIONS, KS, METRICS, Ranking, chunks, jackknife_interval, macro_mean
from .protocols import ACROSS_BY_ANATOMY, DEFAULT, WITHIN_MODALITY, Annotations, Protocol


ALL_MODALITIES = WITHIN_MODALITY.title
ACROSS = ACROSS_BY_ANATOMY.title
MACRO_MAP = "macro mAP"
IN_TABLE = ("P@1", "R@5", "mAP")  # the rest is in the JSON


@dataclass(frozen=True)
class Row:
    """One line of the table.

    protocol: its title, or that of its part, a modality say; method: what embedded. scores: the mean over queries of
    each of `METRICS`, and of mAP also that over classes (`MACRO_MAP`); where the gallery is of all modalities, `own
    modality@k` is the part of the first k that is of the query's. interval: of 95 % around mAP, see
    `jackknife_interval`, or None where it wasn't asked for. definition: the protocol in full.
    """

    protocol: str
    method: str
    queries: int
    gallery: int
    scores: Mapping[str, float]
    interval: tuple[float, float] | None = None
    definition: Protocol | None = None


class Difference(NamedTuple):
    """value: how much the first method's score is above the second's; interval: of 95 %, on the same scans."""

    value: float
    interval: tuple[float, float]


# patients left out together for an interval, where there are more: memory and time grow with the blocks
MOST_BLOCKS = 100


def evaluate(
    methods: Mapping[str, Embedded], protocols: Sequence[Protocol] = DEFAULT, intervals: bool = True
) -> list[Row]:
    """The table's rows for several methods on the same scans; chance comes first under each protocol.

    A protocol in which no query has anything to find is left out: of one video's frames, say, that are all one group.

    Raises:
        ValueError: if the methods embedded different scans.
    """
    facts = _annotations(methods.values())
    rows: list[Row] = []
    for protocol in protocols:
        measured = _measure(protocol, facts, methods, ("mAP",) if intervals else ())
        for title, results in measured.items():
            rows += _rows(title, protocol, results)
        if protocol.per_modality and measured:
            rows += _rows(protocol.title, protocol, _mean_over_parts(list(measured.values())))
    return rows


def paired_difference(
    first: Embedded, second: Embedded, protocol: Protocol = WITHIN_MODALITY, metric: str = "mAP"
) -> Difference:
    """How much better the first method is than the second on the same scans, and how sure that is.

    The delete-one jackknife of the difference itself, patients leaving as queries and from the gallery: what both
    methods find hard is no part of it, so it tells apart what two intervals can't. (No bootstrap is offered:
    see `jackknife_interval`.)

    Args:
        protocol: its only row, or the mean over its modalities. metric: of `METRICS`.

    Raises:
        ValueError: if they embedded different scans, nothing can be found, or there is no such metric.
    """
    if metric not in METRICS:
        raise ValueError(f"found the metric {metric!r}, expected one of {', '.join(METRICS)}")
    methods = {"first": first, "second": second}
    measured = _measure(protocol, _annotations(methods.values()), methods, (metric,))
    if not measured:
        raise ValueError(f"found nothing to retrieve in the protocol {protocol.name!r}, expected one relevant scan")
    results = _mean_over_parts(list(measured.values()))
    value = results["first"].scores[metric] - results["second"].scores[metric]
    without_each = results["first"].without_each - results["second"].without_each
    return Difference(value, jackknife_interval(value, without_each[:, 0], (-1.0, 1.0)))


class _Result(NamedTuple):
    """Of a method in a part of a protocol; `without_each (blocks, metrics)`: the means without each block."""

    queries: int
    gallery: int
    scores: Mapping[str, float]
    without_each: Tensor


def _annotations(methods: Collection[Embedded]) -> Annotations:
    records = next(iter(methods)).records
    if any(embedded.records != records for embedded in methods):
        raise ValueError("the methods embedded different scans, so their scores would not compare")
    return Annotations(records)


def _measure(
    protocol: Protocol, facts: Annotations, methods: Mapping[str, Embedded], left_out: Sequence[str]
) -> dict[str, dict[str, _Result]]:
    """Results by part and method, chance first; parts in which nothing can be found are missing.

    Args:
        left_out: metrics whose means without each block of patients are wanted.
    """
    parts: dict[str, dict[str, _Result]] = {}
    for title, queries in protocol.parts(facts):
        results: dict[str, _Result] = {}
        for method, embedded in methods.items():
            pair = _score(protocol, facts, queries, embedded, left_out)
            if pair is None:
                break
            results.setdefault("chance", pair[1])
            results[method] = pair[0]
        if results:
            parts[title] = results
    return parts


def _score(
    protocol: Protocol, facts: Annotations, queries: Tensor, embedded: Embedded, left_out: Sequence[str]
) -> tuple[_Result, _Result] | None:
    """A method and chance on the queries at these places; None where nothing can be found.

    Similarities and masks are made for a chunk of queries at a time, so that no n x n matrix is ever held.
    """
    blocks = min(MOST_BLOCKS, int(facts.group.max()) + 1) if left_out else 0
    block = facts.group % max(1, blocks)
    sums, counts = torch.zeros(blocks, len(left_out), dtype=torch.float64), torch.zeros(blocks, 1, dtype=torch.float64)
    in_gallery = torch.zeros(len(facts.records), dtype=torch.bool)
    names = [*METRICS, *(f"own modality@{k}" for k in KS if protocol.gallery == "all modalities")]
    scores, chance, classes = [], [], []
    for rows in chunks(len(queries), len(facts.records)):
        asked = queries[rows]
        relevant, candidate = protocol.masks(facts, asked)
        in_gallery |= candidate.any(0)
        ranking = Ranking(embedded.similarities(asked, candidate), relevant, candidate)
        scored = ranking.scores()
        own = (torch.empty(len(asked), 0),) * 2
        if protocol.gallery == "all modalities":
            own = ranking.share_of_first(facts.modality[asked, None] == facts.modality)
        scores.append(torch.cat([scored.scores, own[0][scored.answerable]], 1))
        chance.append(torch.cat([scored.chance, own[1][scored.answerable]], 1))
        classes += [protocol.classes(facts.records[place]) for place in asked[scored.answerable].tolist()]
        if blocks:
            more = ranking.sums_without_each(block[asked], block, blocks, left_out)
            sums, counts = sums + more[0], counts + more[1]
    if not classes:
        return None

    def result(table: Tensor, without_each: Tensor) -> _Result:
        means = dict(zip(names, table.mean(0).tolist(), strict=True))
        means[MACRO_MAP] = macro_mean(table[:, METRICS.index("mAP")], classes)
        return _Result(len(table), int(in_gallery.sum()), means, without_each)

    return result(torch.cat(scores), sums / counts), result(torch.cat(chance), torch.empty(0, 0))


def _mean_over_parts(parts: Sequence[Mapping[str, _Result]]) -> dict[str, _Result]:
    """The plain mean over a protocol's parts: each modality weighs the same, and a patient leaves all at once."""
    means = {}
    for method in parts[0]:
        own = [part[method] for part in parts]
        scores = {name: sum(result.scores[name] for result in own) / len(own) for name in own[0].scores}
        queries, gallery = sum(result.queries for result in own), sum(result.gallery for result in own)
        means[method] = _Result(queries, gallery, scores, torch.stack([result.without_each for result in own]).mean(0))
    return means


def _rows(title: str, protocol: Protocol, results: Mapping[str, _Result]) -> list[Row]:
    rows = []
    for method, (queries, gallery, scores, without_each) in results.items():
        interval = jackknife_interval(scores["mAP"], without_each[:, 0]) if without_each.numel() else None
        rows.append(Row(title, method, queries, gallery, scores, interval, protocol))
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, which also reads well on a terminal."""
    first = max([17, *(len(row.protocol) for row in rows)])
    second = max([9, *(len(row.method) for row in rows)])
    lines = [
        f"| {'protocol':{first}} | {'method':{second}} | queries | gallery |    P@1 |    R@5 |    mAP | mAP, 95 %   |",
        f"|{'-' * (first + 2)}|{'-' * (second + 2)}|--------:|--------:|-------:|-------:|-------:|------------:|",
    ]
    previous = None
    for row in rows:
        name = row.protocol if row.protocol != previous else ""
        scores = " | ".join(f"{row.scores[metric]:6.3f}" for metric in IN_TABLE)
        interval = f"{row.interval[0]:.3f}-{row.interval[1]:.3f}" if row.interval else " " * 11
        names = f"| {name:{first}} | {row.method:{second}} "
        lines.append(f"{names}| {row.queries:7} | {row.gallery:7} | {scores} | {interval} |")
        previous = row.protocol
    return "\n".join(lines)


def format_differences(first: str, differences: Mapping[str, Difference]) -> str:
    """How much better the first method is than each other, in words: mean over modalities of mAP, paired."""
    lines = [f"mAP of {first}, mean over modalities, is on the same scans above that of"]
    for other, (value, (low, high)) in differences.items():
        verdict = "" if low > 0 or high < 0 else "; not told apart"
        lines.append(f"  {other}: by {value:+.3f} ({low:+.3f} to {high:+.3f}{verdict})")
    return "\n".join(lines)


def to_json(rows: Sequence[Row], **facts: Any) -> str:
    """The rows with all their scores, what metrics and protocols are, and whatever facts of the run are given."""
    table = [{name: value for name, value in asdict(row).items() if name != "definition"} for row in rows]
    protocols = {row.protocol: asdict(row.definition) for row in rows if row.definition}
    return json.dumps({**facts, "metrics": DEFINITIONS, "protocols": protocols, "rows": table}, indent=2)
