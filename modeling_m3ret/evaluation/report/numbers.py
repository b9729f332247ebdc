"""The numbers in the figures of a report; `plots.py` draws them.

They show at which recall, in which classes and to which modalities precision is lost, and how it grows with training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.collection import Record
from ...search.embedding import Embedded
from ..metrics import METRICS, Ranking, chunks, interpolated_precision
from ..protocols import MIXED_GALLERY, WITHIN_MODALITY, Annotations


MAP = METRICS.index("mAP")
CHANCE_RANKINGS = 1000  # per modality: the standard error of the mean precision is then below 0.01
TOP_K = 10  # hits whose modality is counted, as in `own modality@10`
MAX_CLASSES = 30  # shown per modality: the 15 best and the 15 worst
EXAMPLES = {"good": 0.9, "median": 0.5, "bad": 0.1}  # quantiles of average precision
EXAMPLE_HITS = 5


class QueryResults(NamedTuple):
    """Results of the A answerable queries of a modality."""

    queries: Tensor  # record indices, int64 (A,)
    average_precision: Tensor  # float64 (A,)
    expected: Tensor  # average precision of a random ranking, float64 (A,)
    precision: Tensor  # interpolated at recall 0, 0.1, ..., 1, float64 (A, 11)


def rank_within_modalities(methods: Mapping[str, Embedded]) -> dict[str, dict[str, QueryResults]]:
    """Rank the queries of each modality within it, by label; return results by modality and method, chance first.

    The precision of chance is a mean over random rankings, since interpolated precision has no closed form.
    """
    annotations = Annotations(next(iter(methods.values())).records)
    count = len(annotations.records)
    generator = torch.Generator().manual_seed(0)
    results: dict[str, dict[str, QueryResults]] = {}
    for modality, queries in WITHIN_MODALITY.parts(annotations):
        by_method = {name: _rank(annotations, queries, embedded.similarities) for name, embedded in methods.items()}
        first = next(iter(by_method.values()))
        if not len(first.queries):
            continue
        repeated = first.queries.repeat(-(-CHANCE_RANKINGS // len(first.queries)))
        random = _rank(annotations, repeated, lambda chunk, _: torch.rand(len(chunk), count, generator=generator))
        chance = first._replace(average_precision=first.expected, precision=random.precision)
        results[modality] = {"chance": chance, **by_method}
    return results


def _rank(annotations: Annotations, queries: Tensor, similarities: Callable[[Tensor, Tensor], Tensor]) -> QueryResults:
    chunk_results = []
    for rows in chunks(len(queries), len(annotations.records)):
        chunk = queries[rows]
        relevant, candidate = WITHIN_MODALITY.masks(annotations, chunk)
        ranking = Ranking(similarities(chunk, candidate), relevant, candidate)
        scores, chance, answerable = ranking.scores()
        precision = interpolated_precision(ranking.relevant_ranks[answerable])
        chunk_results.append(QueryResults(chunk[answerable], scores[:, MAP], chance[:, MAP], precision))
    return QueryResults(*(torch.cat(column) for column in zip(*chunk_results, strict=True)))


def class_means(records: Sequence[Record], results: QueryResults) -> dict[str, tuple[int, float]]:
    """Return by label the number of its queries and their mean average precision, best first.

    A query with several labels counts in each of them.
    """
    by_label: dict[str, list[float]] = {}
    for index, score in zip(results.queries.tolist(), results.average_precision.tolist(), strict=True):
        for label in WITHIN_MODALITY.classes(records[index]):
            by_label.setdefault(label, []).append(score)
    means = {label: (len(scores), sum(scores) / len(scores)) for label, scores in by_label.items()}
    return dict(sorted(means.items(), key=lambda item: (-item[1][1], item[0])))


def modality_fractions(embedded: Embedded) -> tuple[list[str], Tensor, Tensor]:
    """Count the modalities of the first `TOP_K` hits in the gallery of all modalities, without the query's group.

    Returns the M sorted names of the modalities; by modality of the query, the fraction of hits of each modality,
    float64 `(M, M)`, whose rows add up to 1, or are NaN without any candidate; and the same of all candidates (chance).
    """
    records, annotations = embedded.records, Annotations(embedded.records)
    names = sorted({record.modality for record in records})
    modality = torch.tensor([names.index(record.modality) for record in records])
    hits, candidates = torch.zeros(2, len(names), len(names), dtype=torch.float64)
    for rows in chunks(len(records), len(records)):
        chunk = torch.arange(len(records))[rows]
        relevant, candidate = MIXED_GALLERY.masks(annotations, chunk)
        ranking = Ranking(embedded.similarities(chunk, candidate), relevant, candidate)
        first = ranking.candidate & (ranking.rank <= TOP_K)
        cell = modality[chunk, None] * len(names) + modality[ranking.order]  # (q, n)
        for counts, counted in ((hits, first), (candidates, ranking.candidate)):
            counts += torch.bincount(cell[counted], minlength=len(names) ** 2).view_as(counts)
    return names, hits / hits.sum(1, keepdim=True), candidates / candidates.sum(1, keepdim=True)


def principal_components(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Project embeddings `(n, d)` on their first two principal components, whose largest weights are positive.

    Returns coordinates, float64 `(n, 2)`, and fractions of the variance, float64 `(2,)`.
    """
    centred = embeddings.double() - embeddings.double().mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    directions = directions[:, -2:].flip(1)  # (d, 2)
    directions = directions * directions.gather(0, directions.abs().argmax(0)[None]).sign()
    return centred @ directions, variances[-2:].flip(0).clamp(min=0) / variances.sum().clamp(min=1e-12)


QUANTITIES = {
    "step": "training steps",
    "views": "views seen in training",
    "training_scans": "scans trained on",
    "parameters": "parameters of the encoder",
}
TRAINING_LENGTH = ("step", "views")  # two measures of the same quantity


def scaling_series(checkpoints: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Group checkpoints, given as for `draw_pictures`, that differ in one quantity only, so that a line may join them.

    Returns, for each quantity that differs among checkpoints, the series by name: names of checkpoints in ascending
    order of the quantity. The name of a series states how it differs from the others.
    """
    quantities: dict[str, dict[str, list[str]]] = {}
    for quantity in QUANTITIES:
        having = [title for title, facts in checkpoints.items() if _quantity(facts, quantity) is not None]
        if len({checkpoints[title][quantity] for title in having}) < 2:
            continue
        ignored = TRAINING_LENGTH if quantity in TRAINING_LENGTH else (quantity,)
        settings = {title: _settings(checkpoints[title], ignored) for title in having}
        varying = [column for column, values in enumerate(zip(*settings.values(), strict=True)) if len(set(values)) > 1]
        series: dict[str, list[str]] = {}
        for title in having:  # in this order, so that colours are the same for all quantities
            values = [settings[title][column] for column in varying if settings[title][column]]
            series.setdefault(", ".join(values) or "checkpoints", []).append(title)
        for members in series.values():
            members.sort(key=lambda title: float(checkpoints[title][quantity]))
        quantities[quantity] = series
    return quantities


def _settings(facts: Mapping[str, Any], ignored: Sequence[str]) -> list[str]:
    """Return the settings of a checkpoint that a series must share, without the ignored quantities."""
    objective = str(facts.get("objective", ""))
    objective = objective if re.fullmatch(r"[\w+-]{1,32}", objective) else ""  # the file is untrusted
    units = {"step": "steps", "training_scans": "scans", "parameters": "parameters"}
    numbers = [(_quantity(facts, name), unit) for name, unit in units.items() if name not in ignored]
    return [objective, *(f"{with_prefix(number)} {unit}" if number else "" for number, unit in numbers)]


def _quantity(facts: Mapping[str, Any], name: str) -> float | None:
    """Return a positive number, or None if the facts, which are not trusted, hold none of this name."""
    value = facts.get(name)
    return float(value) if isinstance(value, int | float) and 0 < value < float("inf") else None


def example_queries(results: QueryResults) -> dict[str, int]:
    """Return the distinct indices into the results of the queries at the quantiles `EXAMPLES`."""
    order = results.average_precision.argsort(stable=True)
    indices: dict[str, int] = {}
    for name, quantile in EXAMPLES.items():
        index = int(order[round(quantile * (len(order) - 1))])
        if index not in indices.values():
            indices[name] = index
    return indices


def first_hits(embedded: Embedded, annotations: Annotations, query: int) -> list[tuple[int, bool]]:
    """Return the record indices of the query's first hits in its modality, and whether each is relevant."""
    queries = torch.tensor([query])
    relevant, candidate = WITHIN_MODALITY.masks(annotations, queries)
    ranking = Ranking(embedded.similarities(queries, candidate), relevant, candidate)
    positions = ranking.candidate[0].nonzero()[:EXAMPLE_HITS, 0]
    return [(int(ranking.order[0, position]), bool(ranking.hits[0, position])) for position in positions]


def with_prefix(number: float) -> str:
    """Format a number with three digits and the prefix k, M or G: `32.1 k`."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def best_and_worst(labels: list[str]) -> list[str]:
    """Return at most `MAX_CLASSES` labels: the first and the last half of them."""
    half = MAX_CLASSES // 2
    return labels if len(labels) <= MAX_CLASSES else labels[:half] + labels[-half:]
