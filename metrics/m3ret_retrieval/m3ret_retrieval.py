"""Retrieval metrics for the `evaluate` library, computed by the functions of `modeling_m3ret.evaluation`.

    metric = evaluate.load("./metrics/m3ret_retrieval")
    metric.compute(predictions=labels_in_ranked_order, references=labels_of_queries)  # {"P@1": ..., "mAP": ..., ...}
    metric.compute(predictions=similarities, references=relevant)  # rows of floats (NaN: no candidate) and of bools

It requires the installed package, and no network.
"""

from __future__ import annotations

import itertools
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

# `evaluate` parses the imports of a module line by line, so none may span several lines
from modeling_m3ret.evaluation.metrics import DEFINITIONS, METRICS, macro_mean, score_queries
from modeling_m3ret.evaluation.protocols import split_labels


_DESCRIPTION = (
    "Quality of rankings of a gallery, averaged over the queries that have at least one relevant item:\n\n"
    + "".join(f"- {name}: {definition}\n" for name, definition in DEFINITIONS.items())
    + "- macro mAP: mAP averaged over the queries of each label, then over the labels (label lists only)\n"
    + "- chance mAP: expected mAP of a random order\n"
    + "- queries: number of queries with at least one relevant item"
)

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each query, either the labels of its whole gallery in ranked order, or the similarity to each item
        of one gallery. Relevant items that are missing from a list of labels are not counted. NaN marks items that are
        not candidates, such as the query itself and scans of the same patient.
    references: for each query, its label or, for similarities, whether each item is relevant. Several labels are joined
        by `|`; an item is relevant if it shares one with the query.
Returns:
    A dictionary of metric names and numbers.
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
  publisher = {Cambridge University Press}, year = {2008}
}
@article{jarvelin2002cumulated,
  title = {Cumulated gain-based evaluation of {IR} techniques},
  author = {Järvelin, Kalervo and Kekäläinen, Jaana},
  journal = {ACM Transactions on Information Systems}, volume = {20}, number = {4}, pages = {422--446}, year = {2002}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class M3RetRetrieval(evaluate.Metric):
    """Means of `METRICS` over the queries."""

    def _info(self) -> evaluate.MetricInfo:
        number, text, boolean = (datasets.Value(name) for name in ("float64", "string", "bool"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[  # the first match is used, and text matches everything
                datasets.Features({"predictions": datasets.Sequence(number), "references": datasets.Sequence(boolean)}),
                datasets.Features({"predictions": datasets.Sequence(text), "references": text}),
            ],
        )

    def _compute(self, predictions: list[list[Any]], references: list[Any]) -> dict[str, float]:
        are_labels = isinstance(references[0], str)
        parse = _parse_labels if are_labels else _parse_similarities
        similarity, relevant, candidate = parse(predictions, references)
        scored = score_queries(similarity, relevant, candidate)
        queries = len(scored.scores)
        if not queries:
            raise ValueError(
                "no query can be scored: expected at least one with a relevant candidate, got none. "
                "Check that labels in predictions and references are spelled alike."
            )
        results = dict(zip(METRICS, scored.scores.mean(0).tolist(), strict=True))
        precisions, chance = (values[:, METRICS.index("mAP")] for values in (scored.scores, scored.chance))
        if are_labels:
            labels = [split_labels(reference) for reference in itertools.compress(references, scored.answerable)]
            results["macro mAP"] = macro_mean(precisions, labels)
        return results | {"chance mAP": float(chance.mean()), "queries": queries}


def _parse_labels(ranked: list[list[str]], references: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return similarity, relevance and candidates `(Q, G)` of ranked lists, which may differ in length."""
    longest = max(1, *(len(labels) for labels in ranked))
    relevant, candidate = torch.zeros(2, len(ranked), longest, dtype=torch.bool)
    for query, (labels, reference) in enumerate(zip(ranked, references, strict=True)):
        candidate[query, : len(labels)] = True
        query_labels = set(split_labels(reference))
        hits = [not query_labels.isdisjoint(split_labels(label)) for label in labels]
        relevant[query, : len(labels)] = torch.tensor(hits, dtype=torch.bool)
    return torch.arange(longest, 0, -1.0).expand(len(ranked), -1), relevant, candidate


def _parse_similarities(rows: list[list[float]], references: list[list[bool]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return similarity, relevance and candidates `(Q, G)`."""
    lengths = {len(row) for row in [*rows, *references]}
    if len(lengths) != 1:
        raise ValueError(
            f"rows differ in length: expected the size of the gallery for all, got {sorted(lengths)}. "
            "Pad predictions with NaN and references with False."
        )
    similarity = torch.from_numpy(np.array(rows, dtype=np.float64))  # None, from JSON, becomes NaN
    candidate = ~similarity.isnan()
    return similarity.masked_fill(~candidate, -torch.inf), torch.tensor(references, dtype=torch.bool), candidate
