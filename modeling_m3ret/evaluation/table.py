"""Evaluate zero-shot retrieval on a labelled collection, by the protocols of `protocols.py`.

A score means little alone: every table also holds chance, pixels and the untrained encoder. To decide whether one
method is better than another, use `paired_difference`: two intervals may overlap although the difference is clear.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..search.embedding import Embedded
from .metrics import DEFINITIONS, KS, METRICS, Ranking, chunks, jackknife_interval, macro_mean
from .probe import DEFINITION, PROBE, constant_accuracy
from .protocols import ACROSS_BY_ANATOMY, DEFAULT, WITHIN_MODALITY, Annotations, Protocol


ALL_MODALITIES = WITHIN_MODALITY.title
ACROSS = ACROSS_BY_ANATOMY.title
MACRO_MAP, MACRO_PROBE = "macro mAP", "macro probe"
IN_TABLE = ("P@1", "R@5", "mAP")  # the JSON holds all metrics
MAX_BLOCKS = 100  # patients are left out in at most this many blocks: memory and time grow with their number


@dataclass(frozen=True)
class Row:
    """One row of the table.

    `scores` are means over queries of each of `METRICS`; `MACRO_MAP`, the mean of mAP over classes; if the gallery
    holds all modalities, `own modality@k`, the fraction of the first k hits from the query's modality; and, if the
    method was probed, `PROBE`, the accuracy of `probe_accuracy`, and `MACRO_PROBE`, its mean over classes.
    """

    protocol: str  # title of the protocol, or of its part, such as a modality
    method: str
    queries: int  # answerable ones
    gallery: int  # scans that are a candidate of any query
    scores: Mapping[str, float]
    interval: tuple[float, float] | None = None  # 95 % interval of mAP, see `jackknife_interval`
    probe_interval: tuple[float, float] | None = None  # the same of the probe, whose classifiers are not trained again
    definition: Protocol | None = None
    # by metric, the mean score without each block of patients, float64 (blocks,)
    leave_one_out: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)


class Difference(NamedTuple):
    """How much the first method's score exceeds the second's on the same scans, with its 95 % interval."""

    value: float
    interval: tuple[float, float]


def evaluate(
    methods: Mapping[str, Embedded],
    protocols: Sequence[Protocol] = DEFAULT,
    jackknife: Sequence[str] = ("mAP",),
    probes: Mapping[str, Tensor] | None = None,
) -> list[Row]:
    """Evaluate several methods, by name, on the same scans, and return the rows of each protocol, chance first.

    A protocol without any answerable query, such as the frames of a single video, gives no row. Leave-one-out values,
    for intervals and paired differences, are computed for the metrics named in `jackknife`.

    `probes` holds `probe_accuracy` of methods, by name. It joins the rows of protocols that search each modality by
    label, because these ask the same question.

    Raises:
        ValueError: if the methods embedded different scans.
    """
    records = next(iter(methods.values())).records
    if any(embedded.records != records for embedded in methods.values()):
        raise ValueError("methods are not comparable: expected embeddings of the same scans, got different scans.")
    annotations = Annotations(records)
    constant = constant_accuracy(records) if probes else None
    rows: list[Row] = []
    for protocol in protocols:
        parts: dict[str, list[list[Row]]] = {}  # by title, those with any answerable query
        for title, queries in protocol.parts(annotations):
            part: list[Row] = []
            for method, embedded in methods.items():
                probe = (probes or {}).get(method) if _is_classification(protocol) else None
                correct = None if probe is None or constant is None else torch.stack([probe, constant], 1)
                pair = _evaluate_method(title, method, protocol, annotations, queries, embedded, jackknife, correct)
                part += pair[1:] if part else pair
            if part:
                parts.setdefault(title, []).append(part)
        means = [_mean_of_parts(title, same_title) for title, same_title in parts.items()]
        rows += [row for part in means for row in part]
        if (protocol.per_modality or protocol.per_source) and means:
            rows += _mean_of_parts(protocol.title, means, same_gallery=False)
    return rows


def paired_difference(first: Row, second: Row, metric: str = "mAP") -> Difference:
    """Return how much better the first method is than the second, with the jackknife interval of the difference itself.

    Queries that are hard for both methods cancel out, so this resolves differences that two separate intervals cannot.
    The rows must be of one call of `evaluate`, and the metric one of its `jackknife`.

    Raises:
        ValueError: if the rows are of different protocols or scans, or the metric has no leave-one-out values.
    """
    if (first.protocol, first.queries, first.gallery) != (second.protocol, second.queries, second.gallery):
        got = " and ".join(f"{row.protocol!r} with {row.queries} queries" for row in (first, second))
        raise ValueError(f"rows are not comparable: expected the same protocol and scans, got {got}.")
    if metric not in first.leave_one_out or metric not in second.leave_one_out:
        got = ", ".join(first.leave_one_out) or "none"
        raise ValueError(f"no leave-one-out values: expected {metric!r} in evaluate(..., jackknife=...), got {got}.")
    value = first.scores[metric] - second.scores[metric]
    leave_one_out = first.leave_one_out[metric] - second.leave_one_out[metric]
    return Difference(value, jackknife_interval(value, leave_one_out, (-1.0, 1.0)))


def differences_from(main: str, rows: Sequence[Row]) -> dict[str, Difference]:
    """Return the paired difference of mAP, mean over modalities, of the main method from each other method.

    Empty if no query within any modality is answerable.
    """
    means = {row.method: row for row in rows if row.protocol == ALL_MODALITIES and row.leave_one_out}
    return {name: paired_difference(means[main], row) for name, row in means.items() if name != main}


def all_differences(main: str, rows: Sequence[Row], metric: str = "mAP") -> dict[str, dict[str, Difference]]:
    """Return the paired differences of the main method from all others: row of the table -> method -> value."""
    differences: dict[str, dict[str, Difference]] = {}
    for title in dict.fromkeys(row.protocol for row in rows):
        methods = {row.method: row for row in rows if row.protocol == title and metric in row.leave_one_out}
        others = {name: row for name, row in methods.items() if main in methods and name != main}
        if others:
            differences[title] = {name: paired_difference(methods[main], row, metric) for name, row in others.items()}
    return differences


def _is_classification(protocol: Protocol) -> bool:
    """Return whether a protocol searches all scans of each modality by any shared label, as a probe classifies them."""
    searched = (protocol.relevant, protocol.labels, protocol.gallery, protocol.query_split, protocol.gallery_split)
    return searched == ("label", "any", "own modality", "", "")


def _evaluate_method(
    title: str,
    method: str,
    protocol: Protocol,
    annotations: Annotations,
    queries: Tensor,
    embedded: Embedded,
    jackknife: Sequence[str],
    correct: Tensor | None = None,
) -> list[Row]:
    """Return the rows of chance and of one method for these queries `(Q,)`, none if no query is answerable.

    `correct` `(n, 2)` holds the accuracies of a probe and of a constant prediction.
    """
    blocks = min(MAX_BLOCKS, int(annotations.group.max()) + 1) if jackknife else 0
    block = annotations.group % max(1, blocks)
    sums, counts = torch.zeros(blocks, len(jackknife), dtype=torch.float64), torch.zeros(blocks, 1, dtype=torch.float64)
    in_gallery = torch.zeros(len(annotations.records), dtype=torch.bool)
    is_mixed = protocol.gallery == "all modalities"
    names = [*METRICS, *(f"own modality@{k}" for k in KS if is_mixed), *([] if correct is None else [PROBE])]
    scores, chance_scores, classes, answered = [], [], [], []
    for rows in chunks(len(queries), len(annotations.records)):  # so that no n x n matrix is held
        chunk = queries[rows]
        relevant, candidate = protocol.masks(annotations, chunk)
        in_gallery |= candidate.any(0)
        ranking = Ranking(embedded.similarities(chunk, candidate), relevant, candidate)
        scored = ranking.scores()
        own_modality = own_modality_chance = torch.empty(len(chunk), 0)
        if is_mixed:
            same = annotations.modality[chunk, None] == annotations.modality
            own_modality, own_modality_chance = ranking.precision_at_k(same)
        scores.append(torch.cat([scored.scores, own_modality[scored.answerable]], 1))
        chance_scores.append(torch.cat([scored.chance, own_modality_chance[scored.answerable]], 1))
        answered.append(chunk[scored.answerable])
        classes += [protocol.classes(annotations.records[index]) for index in answered[-1].tolist()]
        if blocks:
            chunk_sums, chunk_counts = ranking.leave_one_out_sums(block[chunk], block, blocks, jackknife)
            sums, counts = sums + chunk_sums, counts + chunk_counts
    if not classes:
        return []

    def row(name: str, table: Tensor) -> Row:
        means = dict(zip(names, table.mean(0).tolist(), strict=True))
        means[MACRO_MAP] = macro_mean(table[:, METRICS.index("mAP")], classes)
        if correct is not None:
            means[MACRO_PROBE] = macro_mean(table[:, -1], classes)
        return Row(title, name, len(table), int(in_gallery.sum()), means, definition=protocol)

    leave_one_out = dict(zip(jackknife, (sums / counts).unbind(1), strict=True))
    table, chance = torch.cat(scores), torch.cat(chance_scores)
    if correct is not None:
        asked = torch.cat(answered)
        probe, constant = correct[asked].unbind(1)
        table, chance = torch.cat([table, probe[:, None]], 1), torch.cat([chance, constant[:, None]], 1)
        if blocks:
            hits = torch.bincount(block[asked], probe, blocks)
            leave_one_out[PROBE] = (probe.sum() - hits) / (len(probe) - torch.bincount(block[asked], minlength=blocks))
    return [row("chance", chance), _with_interval(row(method, table), leave_one_out)]


def _mean_of_parts(title: str, parts: Sequence[Sequence[Row]], same_gallery: bool = True) -> list[Row]:
    """Average the rows of each method: each part weighs the same, and a patient leaves all of them at once.

    The size of the gallery is the largest of the parts if they search the `same_gallery`, otherwise their sum.
    """
    if len(parts) == 1:
        return [replace(row, protocol=title) for row in parts[0]]
    means = []
    for rows in zip(*parts, strict=True):  # of one method
        scores = {name: sum(row.scores[name] for row in rows) / len(rows) for name in rows[0].scores}
        queries, galleries = sum(row.queries for row in rows), [row.gallery for row in rows]
        gallery = max(galleries) if same_gallery else sum(galleries)
        mean = replace(rows[0], protocol=title, queries=queries, gallery=gallery, scores=scores)
        metrics = rows[0].leave_one_out
        leave_one_out = {m: torch.stack([row.leave_one_out[m] for row in rows]).mean(0) for m in metrics}
        means.append(_with_interval(mean, leave_one_out))
    return means


def _with_interval(row: Row, leave_one_out: Mapping[str, Tensor]) -> Row:
    interval, probe_interval = (
        jackknife_interval(row.scores[metric], leave_one_out[metric]) if metric in leave_one_out else None
        for metric in ("mAP", PROBE)
    )
    return replace(row, interval=interval, probe_interval=probe_interval, leave_one_out=leave_one_out)


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table that is aligned for the terminal, with the columns of a probe if any has."""
    first = max([17, *(len(row.protocol) for row in rows)])
    second = max([9, *(len(row.method) for row in rows)])
    is_probed = any(PROBE in row.scores for row in rows)
    lines = [
        f"| {'protocol':{first}} | {'method':{second}} | queries | gallery |    P@1 |    R@5 |    mAP | mAP, 95 %   |",
        f"|{'-' * (first + 2)}|{'-' * (second + 2)}|--------:|--------:|-------:|-------:|-------:|------------:|",
    ]
    if is_probed:
        lines = [lines[0] + "  probe | probe, 95 % |", lines[1] + "-------:|------------:|"]
    previous = None
    for row in rows:
        name = row.protocol if row.protocol != previous else ""
        scores = " | ".join(f"{row.scores[metric]:6.3f}" for metric in IN_TABLE)
        line = f"| {name:{first}} | {row.method:{second}} | {row.queries:7} | {row.gallery:7} | {scores}"
        line += f" | {_format_interval(row.interval)} |"
        if is_probed:
            probe = f"{row.scores[PROBE]:6.3f}" if PROBE in row.scores else " " * 6
            line += f" {probe} | {_format_interval(row.probe_interval)} |"
        lines.append(line)
        previous = row.protocol
    return "\n".join(lines)


def _format_interval(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:.3f}-{interval[1]:.3f}" if interval else " " * 11


def format_differences(first: str, differences: Mapping[str, Difference]) -> str:
    """Return the differences of `differences_from` as lines of text."""
    lines = [f"Paired difference of mAP (mean over modalities, same scans, 95 % interval): {first} minus"]
    for other, (value, (low, high)) in differences.items():
        verdict = "" if low > 0 or high < 0 else "; not significant"
        lines.append(f"  {other}: {value:+.3f} ({low:+.3f} to {high:+.3f}{verdict})")
    return "\n".join(lines)


def format_all_differences(main: str, differences: Mapping[str, Mapping[str, Difference]], metric: str = "mAP") -> str:
    """Return the differences of `all_differences` as a Markdown table, with their 95 % intervals."""
    others = list(dict.fromkeys(name for row in differences.values() for name in row))
    lines = [f"| {metric} of {main} minus | {' | '.join(others)} |", f"|---|{'---|' * len(others)}"]
    for title, row in differences.items():
        cells = (f"{value:+.3f} ({low:+.3f} to {high:+.3f})" for value, (low, high) in (row[name] for name in others))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def to_json(rows: Sequence[Row], **facts: Any) -> str:
    """Return the rows with all scores, the definitions of metrics and protocols, and further facts as JSON."""
    columns = ("protocol", "method", "queries", "gallery", "scores", "interval", "probe_interval")
    table = [{name: getattr(row, name) for name in columns} for row in rows]
    protocols = {row.protocol: asdict(row.definition) for row in rows if row.definition}
    definitions = DEFINITIONS | ({PROBE: DEFINITION} if any(PROBE in row.scores for row in rows) else {})
    return json.dumps({**facts, "metrics": definitions, "protocols": protocols, "rows": table}, indent=2)
