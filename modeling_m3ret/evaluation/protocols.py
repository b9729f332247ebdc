"""Who is asked, among what, and what counts as right? A protocol says so, by a name that a paper can cite.

A scan is never its own candidate. Nor is any scan of the query's group (patient, or video), but where the group is what
is looked for. What has no label is like nothing, not like everything else that has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..data.collection import Record


Relevance = Literal["label", "label and modality", "anatomy", "subject"]
Gallery = Literal["own modality", "other modalities", "all modalities"]
LabelMatch = Literal["any", "jaccard"]


@dataclass(frozen=True)
class Protocol:
    """A task of retrieval on a labelled collection.

    name: to cite; title: in the table. relevant: what a hit has in common with the query (subject: the group); gallery:
    what is searched. labels: how several labels (joined by `|`) compare: `any` shared one, or a `jaccard` index (shared
    over all of both) of .5 and more. modalities: of the queries, all if empty. per_modality: a row for each modality's
    queries, titled so ("{}" is its name), and the title is their plain mean; without it all queries weigh the same.
    query_split, gallery_split: queries of one split, gallery of another; leave-one-out among all scans if empty.
    """

    name: str
    title: str
    relevant: Relevance
    gallery: Gallery
    labels: LabelMatch = "any"
    modalities: tuple[str, ...] = ()
    per_modality: str = ""
    query_split: str = ""
    gallery_split: str = ""

    def parts(self, facts: Annotations) -> list[tuple[str, Tensor]]:
        """What is measured by itself: titles, and the places `(Q,)` of the queries of each; none where nobody asks."""
        wanted = {name.casefold() for name in self.modalities}
        places = [
            place
            for place, record in enumerate(facts.records)
            if self.query_split in ("", record.split) and (not wanted or record.modality.casefold() in wanted)
        ]
        if not self.per_modality:
            return [(self.title, torch.tensor(places))] if places else []
        by_modality: dict[str, list[int]] = {}
        for place in places:
            by_modality.setdefault(facts.records[place].modality, []).append(place)
        return [(self.per_modality.format(name), torch.tensor(own)) for name, own in sorted(by_modality.items())]

    def masks(self, facts: Annotations, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Which scans are relevant to the queries at these places `(q,)`, and which are candidates: bool `(q, n)`."""
        own_modality, own_group = (codes[queries, None] == codes for codes in (facts.modality, facts.group))
        if self.relevant == "subject":
            relevant, candidate = own_group & (facts.group >= 0), torch.ones_like(own_group)
            candidate[torch.arange(len(queries)), queries] = False
        else:
            relevant, candidate = self._alike(facts, queries), ~own_group  # the query itself is of its group
        if self.relevant == "label and modality":
            relevant = relevant & own_modality
        if self.gallery != "all modalities":
            candidate &= own_modality if self.gallery == "own modality" else ~own_modality
        if self.gallery_split:
            candidate &= torch.tensor([record.split == self.gallery_split for record in facts.records])
        return relevant, candidate

    def _alike(self, facts: Annotations, queries: Tensor) -> Tensor:
        if self.relevant == "anatomy":
            return (facts.anatomy[queries, None] == facts.anatomy) & (facts.anatomy >= 0)
        shared = facts.labels[queries] @ facts.labels.T
        if self.labels == "any":
            return shared > 0
        numbers = facts.labels.sum(1)
        # shared / (a + b - shared) >= 1/2, in whole numbers
        return (shared > 0) & (3 * shared >= numbers[queries, None] + numbers)

    def classes(self, record: Record) -> list[str]:
        """Of a query, for means over classes: what its hits share with it."""
        if self.relevant == "anatomy":
            return [record.anatomy]
        if self.relevant == "subject":
            return [record.group]
        modality = f" in {record.modality}" if self.relevant == "label and modality" else ""
        return [label + modality for label in labels_of(record.label)]


class Annotations:
    """What protocols ask of n records, as numbers: codes `(n,)` int64 that are equal for equal names, -1 for none, and
    labels `(n, L)` float32, 1 for each of a record's."""

    def __init__(self, records: Sequence[Record]):
        self.records = records
        self.modality, self.anatomy, self.group = (
            _codes([getattr(record, key) for record in records]) for key in ("modality", "anatomy", "group")
        )
        own = [labels_of(record.label) for record in records]
        numbers = {name: number for number, name in enumerate(sorted({name for names in own for name in names}))}
        self.labels = torch.zeros(len(records), max(1, len(numbers)))
        for place, names in enumerate(own):
            self.labels[place, [numbers[name] for name in names]] = 1


def labels_of(joined: str) -> list[str]:
    """A record's labels, which `|` joins, each once."""
    return sorted({label for label in joined.split("|") if label})


def _codes(names: Sequence[str]) -> Tensor:
    numbers = {"": -1}
    return torch.tensor([numbers.setdefault(name, len(numbers) - 1) for name in names], dtype=torch.int64)


def unseen(*modalities: str) -> Protocol:
    """Within each of these modalities, which pretraining has not seen, by label."""
    return Protocol(
        name="unseen modality by label",
        title="unseen modalities",
        relevant="label",
        gallery="own modality",
        modalities=modalities,
        per_modality="{} (unseen)",
    )


WITHIN_MODALITY = Protocol(
    name="within modality by label",
    title="all modalities",
    relevant="label",
    gallery="own modality",
    per_modality="{}",
)
UNSEEN_MODALITY = unseen("mri")  # as in the paper, arXiv 2509.01360
ACROSS_BY_ANATOMY = Protocol(
    name="across modalities by anatomy",
    title="across modalities",
    relevant="anatomy",
    gallery="other modalities",
)
ACROSS_BY_LABEL = Protocol(
    name="across modalities by label",
    title="across, by label",
    relevant="label",
    gallery="other modalities",
)
SAME_SUBJECT = Protocol(
    name="same subject across modalities",
    title="same subject",
    relevant="subject",
    gallery="other modalities",
)
MIXED_GALLERY = Protocol(
    name="mixed gallery by label and modality",
    title="mixed gallery",
    relevant="label and modality",
    gallery="all modalities",
)
INSTANCE = Protocol(  # frames of one video, say, among those of all videos
    name="instance within modality",
    title="same instance",
    relevant="subject",
    gallery="own modality",
)
DEFAULT = (WITHIN_MODALITY, ACROSS_BY_ANATOMY)
ALL = (
    WITHIN_MODALITY,
    UNSEEN_MODALITY,
    ACROSS_BY_ANATOMY,
    ACROSS_BY_LABEL,
    SAME_SUBJECT,
    MIXED_GALLERY,
    INSTANCE,
)
