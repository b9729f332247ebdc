"""Retrieval metrics for the `evaluate` library, over the functions that the project itself measures with.

    metric = evaluate.load("./metrics/m3ret_retrieval")
    metric.compute(predictions=labels_in_ranked_order, references=labels_of_queries)  # {"P@1": ..., "mAP": ..., ...}
    metric.compute(predictions=similarities, references=relevant)  # rows of floats (NaN: no candidate) and of bools

It needs the package installed, and no network.
"""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
import torch

# `evaluate` finds what a module needs by reading it line by line, so no import may go over several lines
from modeling_m3ret.evaluation.metrics import DEFINITIONS, METRICS, macro_mean, score_queries
from modeling_m3ret.evaluation.protocols import split_labels


_DESCRIPTION = (
    "How well is each query's gallery ranked? Means over the queries that have something to find, of:\n\n"
    + "".join(f"- {name}: {words}\n" for name, words in DEFINITIONS.items())
    + "- macro mAP: mean over the references' labels of a label's queries' mean (label lists only)\n"
    + "- chance mAP: mAP expected of a random order\n"
    + "- queries: how many had something to find"
)

_KWARGS_DESCRIPTION = """
Args:
    predictions: of each query either the labels of its gallery in ranked order, all of it (a relevant item that isn't
        in the list counts as not existing), or the similarity to each item of one gallery, NaN for what is no candidate
        (the query itself, its own patient).
    references: of each query its label, or, for similarities, whether each item is relevant. Several labels of a scan
        are joined by `|`; a shared one makes it relevant.
Returns:
    a number by metric.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("./metrics/m3ret_retrieval")
    >>> ranked = [["ct chest", "ct head", "ct chest"], ["ct head", "ct chest", "ct chest"]]
    >>> scores = metric.compute(predictions=ranked, references=["ct chest", "ct chest"])
    >>> round(scores["mAP"], 4), scores["P@1"]
    (0.7083, 0.5)
    >>> scores = metric.compute(predictions=[[float("nan"), 0.9, 0.2]], references=[[True, False, True]])
    >>> scores["MRR"], scores["chance mAP"]
    (0.5, 0.75)
"""

_CITATION = """\
@book{manning2008introduction,
  title = {Introduction to Information Retrieval},
  author = {Manning, Christopher D. and Raghavan, Prabhakar and Schütze, Hinrich},
  publisher = {Cambridge University Press},
  year = {2008}
}
@article{jarvelin2002cumulated,
  title = {Cumulated gain-based evaluation of {IR} techniques},
  author = {Järvelin, Kalervo and Kekäläinen, Jaana},
  journal = {ACM Transactions on Information Systems},
  volume = {20},
  number = {4},
  pages = {422--446},
  year = {2002}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class M3RetRetrieval(evaluate.Metric):
    """Means of `METRICS` over queries."""

    def _info(self) -> evaluate.MetricInfo:
        number, text = datasets.Value("float64"), datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[  # the first that fits is taken, and everything fits text
                datasets.Features(
                    {"predictions": datasets.Sequence(number), "references": datasets.Sequence(datasets.Value("bool"))}
                ),
                datasets.Features({"predictions": datasets.Sequence(text), "references": text}),
            ],
        )

    def _compute(self, predictions: list[list[Any]], references: list[Any]) -> dict[str, float]:
        of_labels = isinstance(references[0], str)
        similarity, relevant, candidate = (_of_labels if of_labels else _of_similarities)(predictions, references)
        scored = score_queries(similarity, relevant, candidate)
        queries = len(scored.scores)
        if not queries:
            raise ValueError("found no query with anything relevant, expected one")
        results = dict(zip(METRICS, scored.scores.mean(0).tolist(), strict=True))
        precisions, chance = (values[:, METRICS.index("mAP")] for values in (scored.scores, scored.chance))
        if of_labels:
            asked = [reference for reference, kept in zip(references, scored.answerable.tolist(), strict=True) if kept]
            results["macro mAP"] = macro_mean(precisions, [split_labels(reference) for reference in asked])
        return results | {"chance mAP": float(chance.mean()), "queries": queries}


def _of_labels(ranked: list[list[str]], references: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Falling similarities down each list; lists may differ in length."""
    most = max(1, *(len(labels) for labels in ranked))
    relevant, candidate = torch.zeros(2, len(ranked), most, dtype=torch.bool)
    for query, (labels, reference) in enumerate(zip(ranked, references, strict=True)):
        candidate[query, : len(labels)] = True
        own = set(split_labels(reference))
        relevant[query, : len(labels)] = torch.tensor(
            [not own.isdisjoint(split_labels(label)) for label in labels], dtype=torch.bool
        )
    return torch.arange(most, 0, -1.0).expand(len(ranked), -1), relevant, candidate


def _of_similarities(
    rows: list[list[float]], references: list[list[bool]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if len({len(row) for row in [*rows, *references]}) != 1:
        raise ValueError("found rows of several lengths, expected one of the gallery's for similarities and relevance")
    numbers = [[math.nan if number is None else number for number in row] for row in rows]
    similarity = torch.tensor(numbers, dtype=torch.float64)
    candidate = ~similarity.isnan()
    return similarity.masked_fill(~candidate, -torch.inf), torch.tensor(references, dtype=torch.bool), candidate
