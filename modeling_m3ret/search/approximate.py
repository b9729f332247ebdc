"""Approximate search of a large gallery with faiss, tuned to a target recall.

`ivf` clusters the gallery and searches the nearest clusters only, with float16 vectors. `rabitq` does the same with one
bit per dimension (RaBitQ, Gao and Long 2024, arXiv 2405.12497), which takes 16 times less memory, and compares the best
candidates exactly. `hnsw` is a graph of neighbours (Malkov and Yashunin, arXiv 1603.09320): fast to extend, but slow to
build.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..atomic_io import atomic_write, atomic_write_text, read_or_create_secret
from ..hub import CACHE_FOLDER
from .exact import Hits, bfloat16_rounding, search_exactly


logger = logging.getLogger(__name__)

Method = Literal["ivf", "rabitq", "hnsw"]
TARGET_RECALL = 0.99  # recall@10; IVF reaches it with 8 of 2048 clusters on a mixture of 867,653 x 768
RECALL_QUERIES = 256  # 256 x 10 neighbours give a recall of 0.99 within 0.002 (one standard error)
TRAINING_ROWS_PER_CELL = 64  # for k-means; faiss warns below 39 and uses at most 256
CANDIDATE_FACTORS = (10, 20, 40, 80)  # tried in this order for rabitq: candidates per hit that are compared exactly
MIN_GAIN = 0.001  # gain of recall per doubling of the probes below which more candidates are tried instead
MAX_HNSW_CANDIDATES = 4096
BLOCK_ROWS = 65536


@dataclass(frozen=True)
class ApproximateSettings:
    """Settings of an approximate index and the recall that was measured with them.

    Attributes:
        method: faiss index type.
        cells: number of IVF clusters.
        probes: clusters searched per query (`nprobe`), or length of the candidate list of HNSW (`efSearch`).
        candidate_factor: candidates per hit that are compared exactly.
        recall: measured recall@10.
        target_recall: recall@10 that tuning aims at.
    """

    method: Method
    cells: int
    probes: int
    candidate_factor: int
    recall: float
    target_recall: float = TARGET_RECALL

    def to_dict(self) -> dict[str, Any]:
        """Return the settings under the keys of the index's files."""
        return {key: getattr(self, name) for name, key in DISK_KEYS.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ApproximateSettings:
        """Read what `to_dict` returned.

        Raises:
            TypeError, KeyError: if keys are unknown or missing.
        """
        if unknown := set(values) - set(DISK_KEYS.values()):
            raise TypeError(f"unknown settings of an approximate index: {sorted(unknown)}.")
        return cls(**{name: values[key] for name, key in DISK_KEYS.items()})


# key of each field in the index's files; fixed, so that indices written by older versions can be read
DISK_KEYS = {
    "method": "method",
    "cells": "cells",
    "probes": "effort",
    "candidate_factor": "reranked",
    "recall": "recall",
    "target_recall": "aim",
}


class RecallSample:
    """Scans drawn from a gallery as queries, with their exact neighbours, to measure the recall@10 of a search.

    Args:
        gallery: `(n, d)` float16 of norm 1.
        generator: draws the queries.
    """

    def __init__(self, gallery: Tensor, generator: torch.Generator):
        sample = torch.randperm(len(gallery), generator=generator)[:RECALL_QUERIES]
        self.queries = gallery[sample].float()
        self.neighbours = min(10, len(gallery) - 1)
        if self.neighbours > 0:
            itself = [row[None] for row in sample]
            rounding = bfloat16_rounding(gallery)
            self.truth = search_exactly(gallery, self.queries, self.neighbours, itself, rounding).rows

    def recall(self, search: Callable[[Tensor, int], Hits]) -> float:
        """Return the fraction of exact neighbours that `search(queries, k)` finds; 1 for a gallery of one scan."""
        if self.neighbours < 1:
            return 1.0
        found = search(self.queries, self.neighbours + 1).rows  # each query finds itself, too
        hits = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(self.truth, found, strict=True))
        return hits / self.truth.numel()


class ApproximateSearch:
    """A faiss index over the rows of a gallery; hits are rescored exactly with the gallery's own vectors.

    Args:
        gallery: `(n, d)` float16 of norm 1.
        index: faiss index of the same rows.
        settings: how it is searched.
    """

    def __init__(self, gallery: Tensor, index: Any, settings: ApproximateSettings):
        self.gallery = gallery
        self.index = index
        self.settings = settings

    @classmethod
    def build(
        cls, gallery: Tensor, method: Method = "rabitq", target_recall: float = TARGET_RECALL, seed: int = 0
    ) -> ApproximateSearch:
        """Train an index, add the gallery, and tune the search until it reaches the target recall.

        Args:
            gallery: `(n, d)` float16 of norm 1, at least one row.
            method: faiss index type.
            target_recall: recall@10 to reach. A warning is logged if the index cannot reach it.
            seed: of the training sample and the tuning queries.
        """
        import faiss

        rows, dimension = gallery.shape
        cells = _number_of_cells(rows)
        name = {"ivf": f"IVF{cells},SQfp16", "rabitq": f"IVF{cells},RaBitQ", "hnsw": "HNSW32,SQfp16"}[method]
        index = faiss.index_factory(dimension, name, faiss.METRIC_INNER_PRODUCT)
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randperm(rows, generator=generator)[: cells * TRAINING_ROWS_PER_CELL]
        index.train(_numpy(gallery[sample.sort().values]))
        for block in gallery.split(BLOCK_ROWS):
            index.add(_numpy(block))
        settings = ApproximateSettings(method, cells, 16 if method == "hnsw" else 1, 1, 0.0, target_recall)
        built = cls(gallery, index, settings)
        built._tune(generator)
        return built

    def _tune(self, generator: torch.Generator) -> None:
        """Increase probes and candidates from the present settings until the target recall is reached."""
        sample = RecallSample(self.gallery, generator)
        initial, rabitq = self.settings, self.settings.method == "rabitq"
        max_probes = MAX_HNSW_CANDIDATES if initial.method == "hnsw" else initial.cells
        for factor in CANDIDATE_FACTORS if rabitq else (1,):
            if factor < initial.candidate_factor:
                continue
            probes, previous = initial.probes, -1.0
            while True:
                self.settings = replace(self.settings, probes=probes, candidate_factor=factor)
                recall = sample.recall(self.search)
                self.settings = replace(self.settings, recall=recall)
                if recall >= initial.target_recall:
                    return
                if probes >= max_probes or (rabitq and recall - previous < MIN_GAIN):
                    break
                probes, previous = min(2 * probes, max_probes), recall
        logger.warning(
            "recall@10 of the %s index is too low: expected %.3f, got %.3f. Build the index with method='exact'.",
            initial.method,
            initial.target_recall,
            self.settings.recall,
        )

    def search(self, queries: Tensor, k: int) -> Hits:
        """Return the k most similar rows that the index finds, with exact scores.

        Args:
            queries: `(q, d)` of norm 1.
            k: number of hits.
        """
        candidates = min(len(self.gallery), k * self.settings.candidate_factor)
        _, found = self.index.search(_numpy(queries), candidates, params=self._parameters(candidates))
        scores = torch.full((len(queries), k), -torch.inf)
        rows = torch.full((len(queries), k), -1, dtype=torch.int64)
        for index, candidate_rows in enumerate(torch.from_numpy(found)):
            candidate_rows = candidate_rows[candidate_rows >= 0].sort().values
            exact = self.gallery[candidate_rows].float() @ queries[index].float()
            order = torch.argsort(exact, descending=True, stable=True)[:k]
            scores[index, : len(order)], rows[index, : len(order)] = exact[order], candidate_rows[order]
        return Hits(scores, rows)

    def _parameters(self, candidates: int) -> Any:
        import faiss

        if self.settings.method == "hnsw":
            parameters: Any = faiss.SearchParametersHNSW()  # type: ignore[attr-defined]  # missing in its stubs
            parameters.efSearch = max(self.settings.probes, candidates)
            return parameters
        parameters = (
            faiss.IVFRaBitQSearchParameters() if self.settings.method == "rabitq" else faiss.SearchParametersIVF()
        )
        parameters.nprobe = self.settings.probes
        return parameters

    def extend(self, gallery: Tensor, seed: int = 0) -> ApproximateSearch:
        """Return an index of a larger gallery, tuned again but not retrained.

        Args:
            gallery: `(m, d)` float16 of norm 1, whose first rows are this index's gallery.
            seed: of the tuning queries.
        """
        import faiss

        index = faiss.clone_index(self.index)
        for block in gallery[len(self.gallery) :].split(BLOCK_ROWS):
            index.add(_numpy(block))
        larger = ApproximateSearch(gallery, index, self.settings)
        larger._tune(torch.Generator().manual_seed(seed))
        return larger

    # ---- on disk ----------------------------------------------------------------------------------------------------

    def save(self, path: Path, gallery_digest: str) -> None:
        """Write the faiss file, and a JSON file that signs it with this machine's secret.

        Args:
            path: of the faiss file.
            gallery_digest: SHA-256 of the file of embeddings that it belongs to.
        """
        import faiss

        content = faiss.serialize_index(self.index).tobytes()
        with atomic_write(path) as stream:
            stream.write(content)
        signed = {"gallery": gallery_digest, **self.settings.to_dict()}
        signature = _signature(content, signed)
        atomic_write_text(path.with_suffix(".json"), json.dumps({**signed, "signature": signature}) + "\n")

    @classmethod
    def load(cls, path: Path, gallery: Tensor, gallery_digest: str) -> ApproximateSearch | None:
        """Load a saved index if this machine wrote it for this gallery.

        faiss trusts the bytes that it reads, so a file without a valid signature is never given to it.

        Returns:
            The index; None if it is missing, damaged, or from another machine or gallery. Build it again.
        """
        import faiss

        try:
            signed = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            content = path.read_bytes()
            signature = signed.pop("signature")
            if not hmac.compare_digest(signature, _signature(content, signed)):
                return None
            if signed.pop("gallery") != gallery_digest:
                return None
            settings = ApproximateSettings.from_dict(signed)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return cls(gallery, faiss.deserialize_index(np.frombuffer(content, np.uint8)), settings)


def _number_of_cells(rows: int) -> int:
    """Return about twice the square root of the rows, as a power of two: faiss' guideline; 2048 for 867,653."""
    return min(rows, 2 ** round(np.log2(2.2 * rows**0.5)))


def _numpy(vectors: Tensor) -> np.ndarray:
    return vectors.float().contiguous().numpy()


def _signature(content: bytes, signed: dict[str, Any]) -> str:
    """Return the HMAC-SHA256 of an index and its settings with this machine's secret key."""
    key = read_or_create_secret(CACHE_FOLDER / "index_key")
    signature = hmac.new(key, digestmod=hashlib.sha256)
    signature.update(json.dumps(signed, sort_keys=True).encode())
    signature.update(content)
    return signature.hexdigest()
