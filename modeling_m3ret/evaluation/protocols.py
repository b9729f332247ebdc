"""Retrieval protocols: which scans are queries, which are candidates, and which of these are relevant.

A scan is never its own candidate. Neither is any scan of the query's group (patient, or video), unless the group itself
is searched for. A scan without a label matches no other scan, not even another one without a label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor

from ..data.collection import Record
from ..data.schema import parse_modality, parse_split, require_words
from ..errors import InputError


# a source with fewer queries has no weight of its own in a mean over sources: the standard error of its mean is above
# 0.05 for the usual standard deviation of average precision, about 0.25
FEW_QUERIES = 25


@dataclass(frozen=True)
class Protocol:
    """A retrieval task on a labelled collection."""

    name: str  # to cite
    title: str  # in the table
    # what a relevant scan shares with the query; "subject" is the group
    relevant: Literal["label", "label and modality", "anatomy", "subject", "source"]
    # the scans that are searched; "own source" is the query's source and modality
    gallery: Literal["own modality", "own source", "other modalities", "all modalities"]
    labels: Literal["any", "jaccard"] = "any"  # any shared label, or a Jaccard index of the labels of at least 0.5
    modalities: tuple[str, ...] = ()  # of the queries; empty for all
    # title of the row of each modality, whose name replaces "{}"; the row `title` is then the mean over modalities
    per_modality: str = ""  # if empty, there is one row, in which all queries weigh the same
    per_source: str = ""  # the same for each source, instead of each modality
    # each row is the mean over the sources of its queries, which all weigh the same; small ones count as one
    mean_over_sources: bool = False
    query_split: str = ""  # split of the queries; empty for all scans (leave-one-out)
    gallery_split: str = ""  # the same for the gallery

    def __post_init__(self) -> None:
        for name in ("relevant", "gallery", "labels"):
            allowed = get_args(get_type_hints(Protocol)[name])
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}.")
        modalities = sorted(map(parse_modality, require_words("modalities", self.modalities)))
        object.__setattr__(self, "modalities", tuple(modalities))
        for name in ("query_split", "gallery_split"):
            object.__setattr__(self, name, parse_split(split) if (split := getattr(self, name)) else "")

    def parts(self, annotations: Annotations) -> list[tuple[str, Tensor]]:
        """Return the title and the record indices `(Q,)` of the queries of each separately measured part.

        Parts with the same title, one for each source, are averaged to one row. Sources with fewer than `FEW_QUERIES`
        are one part together, because a mean over a few queries is mostly noise. Queries whose whole gallery would be
        relevant are left out: those of a source with one class, or of a modality with one source.
        """
        parts: dict[tuple[str, str], list[int]] = {}
        trivial = self._trivial_galleries(annotations.records)
        queries = {
            index: record
            for index, record in enumerate(annotations.records)
            if self.query_split in ("", record.split)
            and (not self.modalities or record.modality in self.modalities)
            and self._gallery_of(record) not in trivial
        }
        sizes = Counter((record.modality, record.source) for record in queries.values())
        for index, record in queries.items():
            title = self.per_source.format(record.source) or self.per_modality.format(record.modality) or self.title
            is_small = sizes[record.modality, record.source] < FEW_QUERIES
            part = "" if is_small or not self.mean_over_sources else record.source
            parts.setdefault((title, part), []).append(index)
        return [(title, torch.tensor(indices)) for (title, _), indices in sorted(parts.items())]

    def _gallery_of(self, record: Record) -> tuple[str, str]:
        """Return modality and source of the gallery that a query searches; the source is empty for all sources."""
        return record.modality, record.source if self.gallery == "own source" else ""

    def _trivial_galleries(self, records: Sequence[Record]) -> set[tuple[str, str]]:
        """Return the galleries with fewer than two classes, in which every scan would be relevant."""
        if self.relevant != "source" and self.gallery != "own source":
            return set()
        classes: dict[tuple[str, str], set[str]] = {}
        for record in records:
            classes.setdefault(self._gallery_of(record), set()).update(self.classes(record))
        return {gallery for gallery, names in classes.items() if len(names) < 2}

    def masks(self, annotations: Annotations, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return which scans are relevant to the queries with these indices `(q,)`, and which are candidates.

        Both masks are bool `(q, n)`. A relevant scan need not be a candidate.
        """
        same_modality = annotations.modality[queries, None] == annotations.modality
        same_group = annotations.group[queries, None] == annotations.group
        if self.relevant == "subject":
            relevant, candidate = same_group & (annotations.group >= 0), torch.ones_like(same_group)
            candidate[torch.arange(len(queries)), queries] = False
        else:
            relevant, candidate = self._matches(annotations, queries), ~same_group  # excludes the query itself, too
        if self.relevant == "label and modality":
            relevant = relevant & same_modality
        if self.gallery == "own source":
            candidate &= annotations.source[queries, None] == annotations.source
        if self.gallery != "all modalities":
            candidate &= ~same_modality if self.gallery == "other modalities" else same_modality
        if self.gallery_split:
            candidate &= torch.tensor([record.split == self.gallery_split for record in annotations.records])
        return relevant, candidate

    def _matches(self, annotations: Annotations, queries: Tensor) -> Tensor:
        """Return which scans match the queries by anatomy, source or label, bool `(q, n)`."""
        if self.relevant in ("anatomy", "source"):
            codes = annotations.anatomy if self.relevant == "anatomy" else annotations.source
            return (codes[queries, None] == codes) & (codes >= 0)
        shared = annotations.labels[queries] @ annotations.labels.T
        if self.labels == "any":
            return shared > 0
        counts = annotations.labels.sum(1)  # shared / (a + b - shared) >= 1/2, without a division:
        return (shared > 0) & (3 * shared >= counts[queries, None] + counts)

    def classes(self, record: Record) -> list[str]:
        """Return the classes of a query, for means over classes: the values that relevant scans share with it."""
        if self.relevant == "anatomy":
            return [record.anatomy]
        if self.relevant == "subject":
            return [record.group]
        if self.relevant == "source":
            return [record.source]
        modality = f" in {record.modality}" if self.relevant == "label and modality" else ""
        return [label + modality for label in split_labels(record.label)]


class Annotations:
    """The annotations of n records as tensors.

    `modality`, `anatomy`, `group` and `source` are int64 codes `(n,)`, equal for equal names and -1 for an empty name.
    `labels` is multi-hot, float32 `(n, number of labels)`.
    """

    def __init__(self, records: Sequence[Record]):
        self.records = records
        self.modality, self.anatomy, self.group, self.source = (
            _encode([getattr(record, key) for record in records]) for key in ("modality", "anatomy", "group", "source")
        )
        labels = [split_labels(record.label) for record in records]
        columns = {name: column for column, name in enumerate(sorted({name for names in labels for name in names}))}
        self.labels = torch.zeros(len(records), max(1, len(columns)))
        for index, names in enumerate(labels):
            self.labels[index, [columns[name] for name in names]] = 1


def split_labels(joined: str) -> list[str]:
    """Return the distinct labels of a record, which are joined by `|`."""
    return sorted({label for label in joined.split("|") if label})


def _encode(names: Sequence[str]) -> Tensor:
    codes = {"": -1}
    return torch.tensor([codes.setdefault(name, len(codes) - 1) for name in names], dtype=torch.int64)


WITHIN_MODALITY = Protocol("within modality by label", "all modalities", "label", "own modality", per_modality="{}")
UNSEEN_MODALITY = Protocol(  # not used in pretraining: MRI, as in the paper, arXiv 2509.01360
    "unseen modality by label",
    "unseen modalities",
    "label",
    "own modality",
    modalities=("mri",),
    per_modality="{} (unseen)",
)
ACROSS_BY_ANATOMY = Protocol("across modalities by anatomy", "across modalities", "anatomy", "other modalities")
ACROSS_BY_LABEL = Protocol("across modalities by label", "across, by label", "label", "other modalities")
SAME_SUBJECT = Protocol("same subject across modalities", "same subject", "subject", "other modalities")
MIXED_GALLERY = Protocol("mixed gallery by label and modality", "mixed gallery", "label and modality", "all modalities")
# for example frames of one video among those of all videos
INSTANCE = Protocol("instance within modality", "same instance", "subject", "own modality")
DEFAULT = (WITHIN_MODALITY, ACROSS_BY_ANATOMY)
ALL = (WITHIN_MODALITY, UNSEEN_MODALITY, ACROSS_BY_ANATOMY, ACROSS_BY_LABEL, SAME_SUBJECT, MIXED_GALLERY, INSTANCE)

# For collections of several sources. A source can often be recognised by its device or format alone.
LABEL_OVER_SOURCES = replace(
    WITHIN_MODALITY,
    name="within modality by label, mean over sources",
    title="by label",
    per_modality="{} by label",
    mean_over_sources=True,
)
SOURCE_WITHIN_MODALITY = Protocol(
    "within modality by source, mean over sources",
    "by source",
    "source",
    "own modality",
    per_modality="{} by source",
    mean_over_sources=True,
)
LABEL_WITHIN_SOURCE = Protocol(
    "within source by label", "inside sources", "label", "own source", per_source="inside {}", mean_over_sources=True
)
ANATOMY_OVER_SOURCES = replace(
    ACROSS_BY_ANATOMY, name="across modalities by anatomy, mean over sources", mean_over_sources=True
)
SOURCES = (LABEL_OVER_SOURCES, SOURCE_WITHIN_MODALITY, LABEL_WITHIN_SOURCE, ANATOMY_OVER_SOURCES)
PROTOCOLS = {"default": DEFAULT, "all": ALL, "sources": SOURCES}  # by the name of the option of eval_retrieval.py
