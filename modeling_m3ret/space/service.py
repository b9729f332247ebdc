"""The search service behind the page and its endpoints: read a scan, embed it, search, and locate matching regions.

One object holds the model, the gallery and the open scans. A visitor's session stores only a `Query` of a few
kilobytes. The scans themselves are in caches of bounded size, so that memory does not grow with the number of visitors.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from cachetools import TTLCache
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..image_processing_m3ret import M3RetImageProcessor
from ..modeling_m3ret import M3RetModel
from ..reading_m3ret import M3RetReadError, Scan
from ..search.exact import Hits
from ..search.filters import MetadataFilter
from ..search.matching import ScanTokens, locate, scan_tokens
from ..search.matching import rerank as rerank_hits
from .gallery import Facts, Gallery
from .isolation import IsolatedReaders
from .uploads import RETENTION_SECONDS, read_record, read_upload
from .viewer import Region


SCAN_CACHE_BYTES = 2**31  # two scans of the largest accepted size, or hundreds of typical ones
HEAT_CACHE_BYTES = 2**28
TOKEN_CACHE_BYTES = 2**28  # about 100 CTs with a ViT-B
DEFAULT_HITS = 8  # two rows of the grid
MAX_HITS = 48
ROW_KEY = "row-"  # how the cache keys of the gallery's scans start

Item = TypeVar("Item")
Result = TypeVar("Result")


class ScanExpiredError(InputError):
    """An uploaded scan is no longer in memory."""


@dataclass(frozen=True, eq=False)
class Query:
    """A search query."""

    key: str  # cache key of its scan
    row: int | None  # in the gallery, or None for an upload
    embedding: Tensor  # `(d,)` float32


@dataclass(frozen=True, eq=False)
class Heat:
    """Heatmaps of where a query and a hit match: `(D, H, W)` on the array of each, 255 at the most confident voxel."""

    query: NDArray[np.uint8]
    hit: NDArray[np.uint8]
    query_slice: int  # the slices that match best, from 0
    hit_slice: int
    confidence: float  # of the best pair of patches, in [0, 1]


class HitFacts(Facts):
    """A hit as the endpoints return it. `item` is its row in the gallery, which `/similar` accepts."""

    item: int
    similarity: float


class SearchService:
    """Search a gallery by upload or by row, and compare two scans. All methods are thread-safe.

    Args:
        model: In evaluation mode, on the device where it runs.
        scan_cache_bytes: Memory for decoded scans.
    """

    def __init__(
        self,
        model: M3RetModel,
        processor: M3RetImageProcessor,
        gallery: Gallery,
        readers: IsolatedReaders,
        scan_cache_bytes: int = SCAN_CACHE_BYTES,
    ):
        self.model, self.processor, self.gallery, self.readers = model, processor, gallery, readers
        self._lock = threading.Lock()  # of the caches
        self._scans: TTLCache[str, Scan] = _cache(scan_cache_bytes, lambda scan: scan.array.nbytes)
        self._heats: TTLCache[str, Heat] = _cache(HEAT_CACHE_BYTES, lambda heat: heat.query.nbytes + heat.hit.nbytes)
        self._tokens: TTLCache[str, ScanTokens] = _cache(TOKEN_CACHE_BYTES, lambda tokens: tokens.tokens.nbytes)
        self._encode = on_gpu(model, self._encode_here)
        self._tokenise = on_gpu(model, lambda scan: scan_tokens(model, processor, [scan])[0])

    def query_of_files(self, files: Sequence[str | Path]) -> Query:
        """Read and embed uploaded files. Raises `M3RetReadError` if they cannot be read, or not in time."""
        paths = [Path(file) for file in files]
        name = paths[0].name if len(paths) == 1 else f"<{len(paths)} files>"
        scan = self.readers.read(name, read_upload, paths, self.processor.num_frames)
        query = Query(f"upload-{uuid.uuid4().hex}", None, self._encode(scan))
        self._cached(self._scans, query.key, lambda: scan)
        return query

    def query_of_row(self, row: int) -> Query:
        """Return a scan of the gallery as a query. Raises `InputError` if the gallery has no such row."""
        if not 0 <= row < len(self.gallery):
            raise InputError(f"item does not exist: expected a number from 0 to {len(self.gallery) - 1}, got {row}.")
        return Query(key_of_row(row), row, self.gallery.index.embeddings[row].float())

    def close(self, query: Query) -> None:
        """Release the memory of an upload that is no longer needed."""
        if query.row is None:
            with self._lock:
                self._scans.pop(query.key, None)
                self._tokens.pop(query.key, None)

    def close_idle(self, seconds: float = RETENTION_SECONDS) -> None:
        """Release the memory of everything that has not been used for this many seconds."""
        with self._lock:
            for cache in (self._scans, self._heats, self._tokens):
                cache.expire(cache.timer() + cache.ttl - seconds)

    def search(
        self,
        query: Query,
        k: int,
        where: MetadataFilter | None = None,
        *,
        exclude_same_patient: bool = False,
        rerank: bool = False,
    ) -> list[HitFacts]:
        """Return the most similar scans, best first.

        Args:
            k: Number of hits, limited to `MAX_HITS`.
            where: Which scans may be found. None for all.
            exclude_same_patient: Omit scans of the query's patient, if the query is a scan of the gallery.
            rerank: Order the hits by late interaction, whose score is then the similarity. Hits that cannot be read
                are omitted.

        Raises:
            M3RetReadError, ScanExpiredError: With `rerank`, if the query's scan is no longer available.
        """
        k = min(max(1, k), MAX_HITS)
        hits = self.gallery.search(
            query.embedding, k, where, query_row=query.row, exclude_same_patient=exclude_same_patient
        )
        if rerank and self.has_scans():
            hits = self._reranked(query, hits)
        pairs = zip(hits.scores[0].tolist(), hits.rows[0].tolist(), strict=True)
        found = [(round(score, 4), row) for score, row in pairs if row >= 0]
        return [HitFacts(item=row, similarity=score, **self.gallery.facts(row)) for score, row in found]

    def _reranked(self, query: Query, hits: Hits) -> Hits:
        tokens: dict[int, ScanTokens] = {}
        for row in hits.rows[0].tolist():
            with suppress(M3RetReadError):
                tokens[row] = self._tokens_of(key_of_row(row))
        is_readable = torch.tensor([row in tokens for row in hits.rows[0].tolist()], dtype=torch.bool)
        readable = Hits(hits.scores[:, is_readable], hits.rows[:, is_readable])
        return rerank_hits([self._tokens_of(query.key)], readable, tokens)

    def has_scans(self) -> bool:
        """Return whether the gallery's scans can be opened. An index alone holds embeddings only."""
        return self.gallery.records is not None

    def scan(self, key: str) -> Scan:
        """Return an open scan. A scan of the gallery is read again if it has expired.

        Raises:
            ScanExpiredError: If an upload has expired.
            M3RetReadError: If a scan of the gallery cannot be read.
        """
        return self._cached(self._scans, key, lambda: self._read_again(key))

    def _read_again(self, key: str) -> Scan:
        if not key.startswith(ROW_KEY) or self.gallery.records is None:
            raise ScanExpiredError("This scan is no longer in memory. Please upload it again.")
        row = int(key.removeprefix(ROW_KEY))
        try:
            return self.readers.read(f"item {row}", read_record, self.gallery.records[row], self.processor.num_frames)
        except M3RetReadError as error:  # without the name of the file, which visitors must not see
            raise error.with_file(f"item {row} of the gallery") from error

    def heat(self, query: Query, row: int, region: Region | None = None) -> Heat:
        """Compute where the query, or a region of it, matches the scan of the gallery in this row.

        Args:
            region: Box of voxels in the query. The query's heatmap is zero outside of it.

        Raises:
            ScanExpiredError, M3RetReadError: See `scan`.
            ValueError: If the region holds no voxel of the query.
        """
        return self._cached(self._heats, f"{query.key} {row} {region}", lambda: self._compare(query, row, region))

    def _compare(self, query: Query, row: int, region: Region | None) -> Heat:
        match = locate(self._tokens_of(query.key), self._tokens_of(key_of_row(row)), region, pairs=1)
        best = match.pairs[0]
        query_heat, query_slice = match.query_heat, round(best.query[0])
        if region is not None:  # patches cross its edges, and heat is interpolated between patches
            query_heat = torch.zeros_like(query_heat)
            query_heat[region] = match.query_heat[region]
            query_slice = min(max(query_slice, region[0].start), region[0].stop - 1)
        return Heat(_to_uint8(query_heat), _to_uint8(match.hit_heat), query_slice, match.hit_slice, best.confidence)

    def slices_in_patch(self, query: Query, slice_index: int) -> slice:
        """Return the slices of the query whose centres lie in the same patch as this slice's. Raises as `scan`."""
        edges = self._tokens_of(query.key).edges[0]
        patch = int(torch.searchsorted(edges, slice_index + 0.5, right=True)) - 1
        start, stop = (math.ceil(float(edge) - 0.5) for edge in edges[patch : patch + 2])
        return slice(start, stop)

    def _tokens_of(self, key: str) -> ScanTokens:
        return self._cached(self._tokens, key, lambda: self._tokenise(self.scan(key)))

    def _cached(self, cache: TTLCache[str, Item], key: str, compute: Callable[[], Item]) -> Item:
        """Return an item and restart its time to live. If it is not cached, compute it without holding the lock."""
        with self._lock:
            if (item := cache.get(key)) is not None:
                cache[key] = item
                return item
        item = compute()
        with self._lock:
            cache[key] = item
        return item

    def _encode_here(self, scan: Scan) -> Tensor:
        with torch.inference_mode():
            inputs = self.processor.preprocess(scan).to(self.model.device)
            embedding: Tensor = self.model.embed_scans(**inputs)
        return embedding[0].float().cpu().clone()


def _cache(max_bytes: int, bytes_of: Callable[[Item], int]) -> TTLCache[str, Item]:
    """Create a cache that evicts the least recently used items. An item larger than the limit is cached alone."""
    return TTLCache(max_bytes, RETENTION_SECONDS, getsizeof=lambda item: min(bytes_of(item), max_bytes))


def key_of_row(row: int) -> str:
    """Return the cache key of a scan of the gallery."""
    return f"{ROW_KEY}{row}"


def _to_uint8(heat: Tensor) -> NDArray[np.uint8]:
    """Scale a heatmap so that its maximum is 255. `Heat.confidence` reports the absolute confidence."""
    hottest = float(heat.max())
    return (heat * (255 / hottest if hottest > 0 else 0)).round().byte().numpy()


def on_gpu(model: torch.nn.Module, function: Callable[[Scan], Result]) -> Callable[[Scan], Result]:
    """Wrap a function so that a Space on ZeroGPU assigns it a GPU per call. Elsewhere return it unchanged."""
    if importlib.util.find_spec("spaces") is None:
        return function

    def call_on_gpu(scan: Scan) -> Result:
        if torch.cuda.is_available():
            model.to("cuda")  # ZeroGPU calls this in a separate process; only that one has a GPU
        return function(scan)

    return cast(Callable[[Scan], Result], importlib.import_module("spaces").GPU(call_on_gpu))
