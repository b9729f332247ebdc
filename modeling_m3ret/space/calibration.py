"""What a similarity means in one gallery: its percentile among pairs of scans, and whether it is a match at all.

A cosine says nothing by itself: in one gallery unrelated scans have 0.1, in another 0.9. Two distributions of the
gallery itself give it a meaning. The percentile is taken among the similarities of all pairs. Whether a query has a
match is a conformal test (Vovk et al. 2005, "Algorithmic Learning in a Random World"): each scan of the gallery was
compared with its nearest scan of another patient, and p is the fraction of these similarities, the query's own
included, that are not larger. If the query is like the gallery's scans, p is at most α with probability α.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..search.index import RetrievalIndex


SAMPLE = 2048  # scans that are compared: 2 million pairs, so a percentile is accurate to 0.1
WEAK = 0.05  # the usual level: 1 in 20 scans of a new patient has no match by this test
UNLIKE = 0.01  # needs 99 scans or more, since p is at least 1 / (scans + 1)

Level = Literal["match", "weak", "unlike"]


@dataclass(frozen=True, eq=False)
class Calibration:
    """The gallery's own similarities, in ascending order, float32."""

    pairs: Tensor  # of pairs of different scans
    nearest: Tensor  # of each scan with its nearest scan of another patient

    @classmethod
    def from_index(cls, index: RetrievalIndex) -> Calibration:
        """Compute the similarities of at most `SAMPLE` scans, evenly spaced in the gallery."""
        rows = torch.arange(0, len(index), max(1, -(-len(index) // SAMPLE)))
        sample = index.embeddings[rows].float()
        above = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
        pairs = (sample @ sample.T)[above].sort().values
        patients = None
        if "patient" in index.metadata.column_names:
            patients = index.metadata.column("patient").take(rows.numpy()).to_pylist()
            patients = [patient or "" for patient in patients]
        hits = index.search(sample, min(2, len(index)), query_patients=patients)
        scores = hits.scores.masked_fill(hits.rows == rows[:, None], -torch.inf).amax(1)
        return cls(pairs, scores[scores.isfinite()].sort().values)

    def percentile(self, similarity: float) -> float:
        """Return the percentage of pairs of the gallery that are less alike, from 0 to 100."""
        below = int(torch.searchsorted(self.pairs, torch.tensor(similarity)))
        return 100 * below / len(self.pairs) if len(self.pairs) else 100.0

    def p_value(self, similarity: float) -> float:
        """Return the conformal p-value of a nearest scan of this similarity."""
        not_larger = int(torch.searchsorted(self.nearest, torch.tensor(similarity), right=True))
        return (1 + not_larger) / (1 + len(self.nearest))

    def level(self, similarity: float) -> Level:
        """Return whether this similarity is a match, a weak match, or less than anything in this gallery has."""
        p = self.p_value(similarity)
        return "unlike" if p <= UNLIKE else "weak" if p <= WEAK else "match"
