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
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..atomic_io import atomic_write, atomic_write_text, read_or_create_secret
from ..hub import CACHE_FOLDER
from .exact import Hits, exact_scores, search_exactly


logger = logging.getLogger(__name__)

Method = Literal["ivf", "rabitq", "hnsw"]
TARGET_RECALL = 0.99  # recall@10; IVF reaches it with 8 of 2048 clusters on a mixture of 867,653 x 768
RECALL_QUERIES = 256  # 256 x 10 neighbours give a recall of 0.99 within 0.002 (one standard error)
TRAINING_ROWS_PER_CELL = 64  # for k-means; faiss warns below 39 and uses at most 256
CANDIDATE_FACTORS = (10, 20, 40, 80)  # tried in this order for rabitq: candidates per hit that are compared exactly
MIN_GAIN = 0.001  # gain of recall per doubling of the probes below which more candidates are tried instead
MAX_HNSW_CANDIDATES = 4096
ROUNDING = 1e-6  # between float32 scores of equal vectors that another program computed
BLOCK_ROWS = 65536


@dataclass(frozen=True)
class ApproximateSettings:
    """Settings of an approximate index and the recall that was measured with them."""

    method: Method
    cells: int  # number of IVF clusters
    probes: int  # clusters searched per query (`nprobe`), or length of the candidate list of HNSW (`efSearch`)
    candidate_factor: int  # candidates per hit that are compared exactly
    recall: float  # measured recall@10
    target_recall: float = TARGET_RECALL  # recall@10 that tuning aims at

    def to_dict(self) -> dict[str, Any]:
        """Return the settings under the keys of the index's files."""
        return {DISK_KEYS.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ApproximateSettings:
        """Read what `to_dict` returned.

        Raises:
            TypeError: if keys are unknown or missing.
            ValueError: if a value is invalid.
        """
        names = {key: name for name, key in DISK_KEYS.items()}
        settings = cls(**{names.get(key, key): value for key, value in values.items()})
        numbers = [value for name, value in asdict(settings).items() if name != "method"]
        valid = all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers)  # false for NaN
        if settings.method not in get_args(Method) or not valid:
            raise ValueError(
                f"settings of an approximate index are invalid: expected a method and numbers, got {values}."
            )
        return settings


# keys in the index's files that differ from the fields' names: those of older versions, so that their files can be read
DISK_KEYS = {"probes": "effort", "candidate_factor": "reranked", "target_recall": "aim"}


class RecallSample:
    """Rows of a gallery `(n, d)` as queries, with their exact neighbours, to measure the recall@10 of a search."""

    def __init__(self, gallery: Tensor):
        sample = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(0))[:RECALL_QUERIES]
        self.queries = gallery[sample].float()
        self.itself = sample if len(gallery) > 1 else torch.full((1,), -1)  # a single scan is its own neighbour
        self.neighbours = min(10, max(1, len(gallery) - 1))
        excluded = [row[row >= 0] for row in self.itself[:, None]]
        self.last_score = search_exactly(gallery, self.queries, self.neighbours, excluded).scores[:, -1:]

    def recall(self, search: Callable[[Tensor, int], Hits]) -> float:
        """Return the fraction of exact neighbours that `search(queries, k)` finds. Rows of equal score count too."""
        found = search(self.queries, self.neighbours + 1)  # each query finds itself, too
        right = (found.scores >= self.last_score - ROUNDING) & (found.rows != self.itself[:, None])
        return float(right.sum(1).clamp(max=self.neighbours).sum() / (self.neighbours * len(self.queries)))


@dataclass
class ApproximateSearch:
    """A faiss index over the rows of a gallery; hits are rescored exactly with the gallery's own vectors."""

    gallery: Tensor  # (n, d) float16 of norm 1
    index: Any
    settings: ApproximateSettings

    @classmethod
    def build(cls, gallery: Tensor, method: Method, target_recall: float = TARGET_RECALL) -> ApproximateSearch:
        """Train an index of at least one row, and tune the search until it reaches the target recall@10.

        A warning is logged if the index cannot reach it.
        """
        import faiss

        rows, dimension = gallery.shape
        # about twice the square root of the rows, as a power of two: faiss' guideline; 2048 for 867,653
        cells = min(rows, 2 ** round(np.log2(2.2 * rows**0.5)))
        name = {"ivf": f"IVF{cells},SQfp16", "rabitq": f"IVF{cells},RaBitQ", "hnsw": "HNSW32,SQfp16"}[method]
        index = faiss.index_factory(dimension, name, faiss.METRIC_INNER_PRODUCT)
        generator = torch.Generator().manual_seed(1)  # other scans than those of the recall sample
        sample = torch.randperm(rows, generator=generator)[: cells * TRAINING_ROWS_PER_CELL]
        index.train(_numpy(gallery[sample.sort().values]))
        settings = ApproximateSettings(method, cells, 16 if method == "hnsw" else 1, 1, 0.0, target_recall)
        return cls(gallery[:0], index, settings).extend(gallery)

    def extend(self, gallery: Tensor) -> ApproximateSearch:
        """Return an index of a larger gallery, whose first rows are this one's; tuned again but not retrained."""
        import faiss

        index = faiss.clone_index(self.index)
        for block in gallery[len(self.gallery) :].split(BLOCK_ROWS):
            index.add(_numpy(block))
        larger = ApproximateSearch(gallery, index, self.settings)
        larger._tune()
        return larger

    def _tune(self) -> None:
        """Increase probes and candidates from the present settings until the target recall is reached."""
        sample = RecallSample(self.gallery)
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
            *(initial.method, initial.target_recall, self.settings.recall),
        )

    def search(self, queries: Tensor, k: int, excluded: list[Tensor] | None = None) -> Hits:
        """Return the k most similar rows that the index finds, with exact scores; see `search_exactly`.

        A query is searched exactly if the index finds fewer than k rows although more exist, or if more rows have the
        score of the last hit than fit, as in a gallery with many equal rows.
        """
        wanted = k + max(map(len, excluded or ()), default=0)
        candidates = min(len(self.gallery), (wanted + 1) * self.settings.candidate_factor)
        _, found = self.index.search(_numpy(queries), candidates, params=self._parameters(candidates))
        hits = Hits.empty(len(queries), k)
        incomplete = []
        for index, rows in enumerate(torch.from_numpy(found)):
            rows, allowed = rows[rows >= 0], len(self.gallery)
            if excluded is not None:
                rows, allowed = rows[~torch.isin(rows, excluded[index])], allowed - len(excluded[index])
            scores = exact_scores(self.gallery, rows, queries[index].float())
            hits.set_best(index, scores, rows)
            if len(rows) < allowed and (scores >= hits.scores[index, -1]).sum() != k:
                incomplete.append(index)
        if incomplete:
            of_incomplete = None if excluded is None else [excluded[index] for index in incomplete]
            exact = search_exactly(self.gallery, queries[incomplete], k, of_incomplete)
            hits.scores[incomplete], hits.rows[incomplete] = exact.scores, exact.rows
        return hits

    def _parameters(self, candidates: int) -> Any:
        import faiss

        if self.settings.method == "hnsw":
            parameters: Any = faiss.SearchParametersHNSW()  # type: ignore[attr-defined]  # missing in its stubs
            parameters.efSearch = max(self.settings.probes, candidates)
            return parameters
        rabitq = self.settings.method == "rabitq"
        parameters = faiss.IVFRaBitQSearchParameters() if rabitq else faiss.SearchParametersIVF()
        parameters.nprobe = self.settings.probes
        return parameters

    # ---- on disk ----------------------------------------------------------------------------------------------------

    def save(self, path: Path, gallery_digest: str) -> None:
        """Write the faiss file, and a JSON file that signs it and its gallery's SHA-256 with this machine's secret."""
        import faiss

        content = faiss.serialize_index(self.index).tobytes()
        with atomic_write(path) as stream:
            stream.write(content)
        signed = {"gallery": gallery_digest, **self.settings.to_dict()}
        signature = _signature(content, signed)
        atomic_write_text(path.with_suffix(".json"), json.dumps({**signed, "signature": signature}) + "\n")

    @classmethod
    def load(cls, path: Path, gallery: Tensor, gallery_digest: str, settings: ApproximateSettings) -> ApproximateSearch:
        """Load an index if this machine saved it for this gallery with these settings; otherwise build it again.

        faiss trusts the bytes that it reads, so a file without a valid signature is never given to it.
        """
        import faiss

        try:
            content = path.read_bytes()
            signature = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["signature"]
            expected = _signature(content, {"gallery": gallery_digest, **settings.to_dict()})
            if hmac.compare_digest(signature, expected):
                return cls(gallery, faiss.deserialize_index(np.frombuffer(content, np.uint8)), settings)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return cls.build(gallery, settings.method, settings.target_recall)


def _numpy(vectors: Tensor) -> np.ndarray:
    return vectors.float().contiguous().numpy()


def _signature(content: bytes, signed: dict[str, Any]) -> str:
    """Return the HMAC-SHA256 of an index and its settings with this machine's secret key."""
    key = read_or_create_secret(CACHE_FOLDER / "index_key")
    signature = hmac.new(key, digestmod=hashlib.sha256)
    signature.update(json.dumps(signed, sort_keys=True).encode())
    signature.update(content)
    return signature.hexdigest()
