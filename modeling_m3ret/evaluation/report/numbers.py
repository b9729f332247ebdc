"""The numbers that a report's pictures show: where precision is lost, in which classes, to which modality, and with how
much training. `plots.py` draws them and computes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...data.collection import Record
from ...image_processing_m3ret import M3RetImageProcessor
from ...search.embedding import Embedded
from ..metrics import METRICS, Ranking, chunks, interpolated_precision, scores_from_ranks
from ..protocols import MIXED_GALLERY, WITHIN_MODALITY, Annotations


CHANCE_ORDERS = 1000  # random orders a modality: one standard error of the mean precision is then below .01
FIRST = 10  # hits whose modality is counted: one page of results, as in `own modality@10`
MOST_CLASSES = 30  # of a modality in the picture: the 15 worst and the 15 best
EXAMPLES = {"good": 0.9, "median": 0.5, "bad": 0.1}  # quantiles of average precision at which examples are taken
EXAMPLE_HITS = 5


class Ranked(NamedTuple):
    """The A queries of a modality that have something to find.

    queries: int64 `(A,)`, their places among the records. average_precision, expected: float64 `(A,)`, and what chance
    gives. precision: float64 `(A, 11)`, interpolated, at recall 0 to 1.
    """

    queries: Tensor
    average_precision: Tensor
    expected: Tensor
    precision: Tensor


def rank_within_modalities(methods: Mapping[str, Embedded]) -> dict[str, dict[str, Ranked]]:
    """By modality and method, chance first, in the protocol within each modality by label.

    Chance's curve is the mean of random orders, since its highest precision from some recall on has no closed form.
    """
    facts = Annotations(next(iter(methods.values())).records)
    count = len(facts.records)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, Ranked]] = {}
    for modality, queries in WITHIN_MODALITY.parts(facts):
        of_methods = {name: _rank(facts, queries, embedded.similarities) for name, embedded in methods.items()}
        first = next(iter(of_methods.values()))
        if not len(first.queries):
            continue
        asked_often = first.queries.repeat(-(-CHANCE_ORDERS // len(first.queries)))
        drawn = _rank(facts, asked_often, lambda asked, _: torch.rand(len(asked), count, generator=generator))
        chance = first._replace(average_precision=first.expected, precision=drawn.precision)
        found[modality] = {"chance": chance, **of_methods}
    return found


def _rank(facts: Annotations, queries: Tensor, similarities: Callable[[Tensor, Tensor], Tensor]) -> Ranked:
    parts = []
    for rows in chunks(len(queries), len(facts.records)):
        asked = queries[rows]
        relevant, candidate = WITHIN_MODALITY.masks(facts, asked)
        ranking = Ranking(similarities(asked, candidate), relevant, candidate)
        answerable = ranking.num_relevant > 0
        ranks = ranking.relevant_ranks[answerable]
        expected = ranking.scores().chance[:, METRICS.index("mAP")]
        parts.append(
            Ranked(asked[answerable], scores_from_ranks(ranks, ("mAP",))[:, 0], expected, interpolated_precision(ranks))
        )
    return Ranked(*(torch.cat(column) for column in zip(*parts, strict=True)))


def class_means(records: Sequence[Record], ranked: Ranked) -> dict[str, tuple[int, float]]:
    """Of each label the number of its queries and their mean average precision, best first; a query with several
    labels counts in each."""
    own: dict[str, list[float]] = {}
    for place, score in zip(ranked.queries.tolist(), ranked.average_precision.tolist(), strict=True):
        for label in WITHIN_MODALITY.classes(records[place]):
            own.setdefault(label, []).append(score)
    means = {label: (len(scores), sum(scores) / len(scores)) for label, scores in own.items()}
    return dict(sorted(means.items(), key=lambda item: (-item[1][1], item[0])))


def modality_shares(embedded: Embedded) -> tuple[list[str], Tensor, Tensor]:
    """What modalities the first ten hits are of, in the mixed gallery of all modalities without the query's group.

    Returns:
        The modalities' names, sorted; of their queries the share of hits of each, float64 `(M, M)` whose rows add up to
        1, or are not a number where nothing can be found; and the same of all candidates, which is chance.
    """
    records, facts = embedded.records, Annotations(embedded.records)
    names = sorted({record.modality for record in records})
    modality = torch.tensor([names.index(record.modality) for record in records])
    hits, candidates = torch.zeros(2, len(names), len(names), dtype=torch.float64)
    for rows in chunks(len(records), len(records)):
        asked = torch.arange(len(records))[rows]
        relevant, candidate = MIXED_GALLERY.masks(facts, asked)
        ranking = Ranking(embedded.similarities(asked, candidate), relevant, candidate)
        first = ranking.candidate & (ranking.rank <= FIRST)
        cell = modality[asked, None] * len(names) + modality[ranking.order]  # (q, n)
        for counts, counted in ((hits, first), (candidates, ranking.candidate)):
            counts += torch.bincount(cell[counted], minlength=len(names) ** 2).view_as(counts)
    return names, hits / hits.sum(1, keepdim=True), candidates / candidates.sum(1, keepdim=True)


def principal_components(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """The first two principal components of embeddings `(n, d)`: coordinates float64 `(n, 2)`, and the shares of the
    variance that they hold `(2,)`. Of a component's two signs it has the one whose largest weight is positive."""
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
SAME_AXIS = ("step", "views")  # both are the length of a training


def scaling_series(checkpoints: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """For each quantity that differs among checkpoints, those that a line may join, since they have everything else in
    common: titles by what that is, as far as it differs; sorted by the quantity. Arguments as for `report_pictures`."""
    quantities: dict[str, dict[str, list[str]]] = {}
    for quantity in QUANTITIES:
        having = [title for title, facts in checkpoints.items() if _quantity(facts, quantity) is not None]
        if len({checkpoints[title][quantity] for title in having}) < 2:
            continue
        own_axis = SAME_AXIS if quantity in SAME_AXIS else (quantity,)
        told = {title: _in_common(checkpoints[title], own_axis) for title in having}
        differing = [place for place, words in enumerate(zip(*told.values(), strict=True)) if len(set(words)) > 1]
        series: dict[str, list[str]] = {}
        for title in having:  # in their order, so that what has a colour in one picture has it in the next
            words = [told[title][place] for place in differing if told[title][place]]
            series.setdefault(", ".join(words) or "checkpoints", []).append(title)
        for members in series.values():
            members.sort(key=lambda title: float(checkpoints[title][quantity]))
        quantities[quantity] = series
    return quantities


def _in_common(facts: Mapping[str, Any], without: Sequence[str]) -> list[str]:
    objective = str(facts.get("objective", ""))
    objective = objective if re.fullmatch(r"[\w+-]{1,32}", objective) else ""  # a word, not whatever a file may hold
    words = {"step": "steps", "training_scans": "scans", "parameters": "parameters"}
    numbers = [(_quantity(facts, name), word) for name, word in words.items() if name not in without]
    return [objective, *(f"{engineering(number)} {word}" if number else "" for number, word in numbers)]


def _quantity(facts: Mapping[str, Any], name: str) -> float | None:
    """A positive number, or None where the facts, which may be anyone's file, hold none."""
    value = facts.get(name)
    return float(value) if isinstance(value, int | float) and 0 < value < float("inf") else None


def example_queries(ranked: Ranked) -> dict[str, int]:
    """Places in `ranked` of the queries at `EXAMPLES`' quantiles of average precision, each once."""
    order = ranked.average_precision.argsort(stable=True)
    places: dict[str, int] = {}
    for name, quantile in EXAMPLES.items():
        place = int(order[round(quantile * (len(order) - 1))])
        if place not in places.values():
            places[name] = place
    return places


def first_hits(embedded: Embedded, facts: Annotations, query: int) -> list[tuple[int, bool]]:
    """Places of the query's first hits of its own modality, and whether each is relevant."""
    asked = torch.tensor([query])
    relevant, candidate = WITHIN_MODALITY.masks(facts, asked)
    ranking = Ranking(embedded.similarities(asked, candidate), relevant, candidate)
    hits = ranking.candidate[0].nonzero()[:EXAMPLE_HITS, 0]
    return [(int(ranking.order[0, place]), bool(ranking.hits[0, place])) for place in hits]


def thumbnail(processor: M3RetImageProcessor, source: object) -> Image.Image:
    """The middle slice or frame of a scan, as the encoder sees it. Raises M3RetReadError if it can't be read."""
    volume = processor.resize(processor.read(source)) * processor.image_std + processor.image_mean  # (C, D, H, W)
    middle = volume[:, volume.shape[1] // 2].clamp(0, 1).mul(255).byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(middle.expand(-1, -1, 3)))


def engineering(number: float) -> str:
    """3 digits and k, M or G: 32.0 k."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def best_and_worst(labels: list[str]) -> list[str]:
    half = MOST_CLASSES // 2
    return labels if len(labels) <= MOST_CLASSES else labels[:half] + labels[-half:]
