"""Searches that look at a part of a large gallery only, how much of the truth they find, and when a file is believed.

`ivf`: the gallery in cells around centroids, of which the nearest are searched (faiss IVF), its vectors in float16.
`rabitq`: the same with one bit a dimension (RaBitQ, Gao and Long 2024, arXiv 2405.12497), 16 times smaller, and the
best few of the codes compared exactly. `hnsw`: a graph of neighbours (Malkov and Yashunin, arXiv 1603.09320): fastest
to add to, slowest to build. Recall is measured when it is built and when scans are added, on scans of the gallery.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from dataclasses import asdict, dataclass, replace
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
AIM = 0.99  # of recall@10: on a mixture of 867,653 x 768, IVF reaches it with 8 of 2048 cells
TRIED_QUERIES = 256  # scans of the gallery: 256 x 10 neighbours tell .99 to within .2 % (one standard error)
TRAINING_ROWS_A_CELL = 64  # that k-means sees; faiss warns below 39 and takes no more than 256
RERANKED = (10, 20, 40, 80)  # codes of one bit a dimension: so many times k are compared exactly, as many as it takes
NO_GAIN = 0.001  # of recall by twice the effort: what is missing then is lost elsewhere
BLOCK_ROWS = 65536


@dataclass(frozen=True)
class Measured:
    """method, cells: what was built; effort: cells searched, or the length of HNSW's list of candidates; reranked: so
    many times k are compared exactly; recall: of the ten nearest, the part found so; aim: what it shall be."""

    method: Method
    cells: int
    effort: int
    reranked: int
    recall: float
    aim: float = AIM


class ApproximateSearch:
    """An approximate index over the rows of a gallery, which it does not hold: hits are compared with it exactly.

    Args:
        gallery: `(n, d)` float16 of norm 1.
    """

    def __init__(self, gallery: Tensor, index: Any, measured: Measured):
        self.gallery = gallery
        self.index = index
        self.measured = measured

    @classmethod
    def build(cls, gallery: Tensor, method: Method = "rabitq", aim: float = AIM, seed: int = 0) -> ApproximateSearch:
        """Train, add, and raise the effort until recall@10 reaches `aim` or all is searched."""
        import faiss

        rows, dimension = gallery.shape
        cells = _cells(rows)
        name = {"ivf": f"IVF{cells},SQfp16", "rabitq": f"IVF{cells},RaBitQ", "hnsw": "HNSW32,SQfp16"}[method]
        index = faiss.index_factory(dimension, name, faiss.METRIC_INNER_PRODUCT)
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randperm(rows, generator=generator)[: cells * TRAINING_ROWS_A_CELL]
        index.train(_numpy(gallery[sample.sort().values]))
        for block in gallery.split(BLOCK_ROWS):
            index.add(_numpy(block))
        built = cls(gallery, index, Measured(method, cells, 16 if method == "hnsw" else 1, 1, 0.0, aim))
        built._raise_effort(generator)
        return built

    def _raise_effort(self, generator: torch.Generator) -> None:
        """From the present effort until the aim is reached, which is measured on scans of this gallery. Warns if it
        can't be."""
        queries = torch.randperm(len(self.gallery), generator=generator)[:TRIED_QUERIES]
        vectors, itself = self.gallery[queries].float(), [row[None] for row in queries]
        k = min(10, len(self.gallery) - 1)
        if k == 0:  # a lone scan has no neighbours to miss
            self.measured = replace(self.measured, recall=1.0)
            return
        truth = search_exactly(self.gallery, vectors, k, itself, bfloat16_rounding(self.gallery)).rows
        method = self.measured.method
        most = self.measured.cells if method != "hnsw" else 4096
        first = self.measured
        for reranked in RERANKED if method == "rabitq" else (1,):
            if reranked < first.reranked:
                continue
            effort, before = first.effort, -1.0
            while True:
                self.measured = replace(self.measured, effort=effort, reranked=reranked)
                found = self.search(vectors, k + 1).rows  # itself, too
                hits = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(truth, found, strict=True))
                self.measured = replace(self.measured, recall=hits / max(1, truth.numel()))
                if self.measured.recall >= self.measured.aim:
                    return
                if effort >= most or (method == "rabitq" and self.measured.recall - before < NO_GAIN):
                    break
                effort, before = min(2 * effort, most), self.measured.recall
        recall, aim = self.measured.recall, self.measured.aim
        logger.warning("%s: recall@10 is %.3f, not %.3f: search exactly", method, recall, aim)

    def search(self, queries: Tensor, k: int) -> Hits:
        """`(q, d)` of norm 1 -> hits, whose scores are exact, as for `search_exactly`."""
        wanted = min(len(self.gallery), k * self.measured.reranked)
        _, found = self.index.search(_numpy(queries), wanted, params=self._parameters(wanted))
        scores = torch.full((len(queries), k), -torch.inf)
        rows = torch.full((len(queries), k), -1, dtype=torch.int64)
        for place, own in enumerate(torch.from_numpy(found)):
            own = own[own >= 0].sort().values
            exact = self.gallery[own].float() @ queries[place].float()
            order = torch.argsort(exact, descending=True, stable=True)[:k]
            scores[place, : len(order)], rows[place, : len(order)] = exact[order], own[order]
        return Hits(scores, rows)

    def _parameters(self, wanted: int) -> Any:
        import faiss

        if self.measured.method == "hnsw":
            parameters: Any = faiss.SearchParametersHNSW()  # type: ignore[attr-defined]  # its stubs miss it
            parameters.efSearch = max(self.measured.effort, wanted)
            return parameters
        parameters = (
            faiss.IVFRaBitQSearchParameters() if self.measured.method == "rabitq" else faiss.SearchParametersIVF()
        )
        parameters.nprobe = self.measured.effort
        return parameters

    def with_more(self, gallery: Tensor, seed: int = 0) -> ApproximateSearch:
        """One for a gallery that begins with this one's rows: not trained anew, but its recall is measured on all of
        them, and its effort raised if that fell below the aim."""
        import faiss

        index = faiss.clone_index(self.index)
        for block in gallery[len(self.gallery) :].split(BLOCK_ROWS):
            index.add(_numpy(block))
        larger = ApproximateSearch(gallery, index, self.measured)
        larger._raise_effort(torch.Generator().manual_seed(seed))
        return larger

    # ------------------------------------------------------------------------------------------------- on this machine

    def save(self, path: Path, gallery_digest: str) -> None:
        """Write the faiss file, and beside it for which gallery it is, signed with this machine's secret.

        Args:
            gallery_digest: sha256 of the embeddings' file.
        """
        import faiss

        content = faiss.serialize_index(self.index).tobytes()
        with atomic_write(path) as stream:
            stream.write(content)
        told = {"gallery": gallery_digest, **asdict(self.measured)}
        told["signature"] = _signature(content, told)
        atomic_write_text(path.with_suffix(".json"), json.dumps(told) + "\n")

    @classmethod
    def load(cls, path: Path, gallery: Tensor, gallery_digest: str) -> ApproximateSearch | None:
        """What was saved here for this gallery; None for anything else, a file from elsewhere above all: build anew."""
        import faiss

        try:
            told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            content = path.read_bytes()
            signature = told.pop("signature")
            if told.pop("gallery") != gallery_digest or not hmac.compare_digest(
                signature, _signature(content, {"gallery": gallery_digest, **told})
            ):
                return None
            measured = Measured(**told)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return cls(gallery, faiss.deserialize_index(np.frombuffer(content, np.uint8)), measured)


def _cells(rows: int) -> int:
    """Some two to three times the root of the rows, a power of two: faiss' own advice, 2048 for 867,653."""
    return min(rows, 2 ** round(np.log2(2.2 * rows**0.5)))


def _numpy(vectors: Tensor) -> np.ndarray:
    return vectors.float().contiguous().numpy()


def _signature(content: bytes, told: dict[str, Any]) -> str:
    """Return the HMAC-SHA256 of an index with this machine's secret key."""
    signed = hmac.new(read_or_create_secret(CACHE_FOLDER / "index_key"), digestmod=hashlib.sha256)
    signed.update(json.dumps(told, sort_keys=True).encode())
    signed.update(content)
    return signed.hexdigest()
