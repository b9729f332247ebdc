"""The search service behind the page and its endpoints: read a scan, embed it, search, and locate matching regions.

One object holds the model, the gallery and the open scans. A visitor's session stores only a `Query` of a few
kilobytes. The scans themselves are in caches of bounded size, so that memory does not grow with the number of visitors.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from cachetools import TTLCache
from numpy.typing import NDArray
from torch import Tensor

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

Item = TypeVar("Item")
Result = TypeVar("Result")


class ScanExpiredError(LookupError):
    """An uploaded scan is no longer in memory."""


@dataclass(frozen=True, eq=False)
class Query:
    """A search query.

    Attributes:
        key: Cache key of its scan.
        row: Row in the gallery, or None for an upload.
        embedding: `(d,)` float32.
    """

    key: str
    row: int | None
    embedding: Tensor


@dataclass(frozen=True, eq=False)
class Heat:
    """Heatmaps of where a query and a hit match.

    Attributes:
        query, hit: `(D, H, W)` uint8 on the array of each scan, 255 at the most confident voxel.
        query_slice, hit_slice: Indices of the slices that match best.
        confidence: Confidence of the best pair of patches, in [0, 1].
    """

    query: NDArray[np.uint8]
    hit: NDArray[np.uint8]
    query_slice: int
    hit_slice: int
    confidence: float


class HitFacts(Facts):
    """A hit as the endpoints return it. `item` is its row in the gallery, which `/similar` accepts."""

    item: int
    similarity: float


class SearchService:
    """Search a gallery by upload or by row, and compare two scans. All methods are thread-safe.

    Args:
        model: In evaluation mode, on the device where it runs.
        readers: Decode uploads and scans of the gallery.
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
        self._tokenise = on_gpu(model, self._tokenise_here)

    # ------------------------------------------------------------------------------------------------------- queries

    def query_of_files(self, files: Sequence[str | Path]) -> Query:
        """Read and embed uploaded files.

        Raises:
            M3RetReadError: If they cannot be read, or not in time.
        """
        paths = [Path(file) for file in files]
        name = paths[0].name if len(paths) == 1 else f"<{len(paths)} files>"
        # Created here because the reading process may be killed, and next to the upload so that the sweeper finds
        # whatever is left.
        folder = paths[0].parent if paths else None
        with tempfile.TemporaryDirectory(prefix="unpacked-", dir=folder, ignore_cleanup_errors=True) as scratch:
            scan = self.readers.read(name, read_upload, paths, self.processor.num_frames, Path(scratch))
        query = Query(f"upload-{uuid.uuid4().hex}", None, self._encode(scan))
        self._store(self._scans, query.key, scan)
        return query

    def query_of_row(self, row: int) -> Query:
        """Return a scan of the gallery as a query.

        Raises:
            ValueError: If the gallery has no such row.
        """
        if not 0 <= row < len(self.gallery):
            raise ValueError(f"item does not exist: expected a number from 0 to {len(self.gallery) - 1}, got {row}.")
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
        hits = self.gallery.search(
            query.embedding,
            min(max(1, k), MAX_HITS),
            where,
            query_row=query.row,
            exclude_same_patient=exclude_same_patient,
        )
        if rerank and self.has_scans():
            hits = self._reranked(query, hits)
        pairs = zip(hits.scores[0].tolist(), hits.rows[0].tolist(), strict=True)
        return [
            HitFacts(item=row, similarity=round(score, 4), **self.gallery.facts(row))
            for score, row in pairs
            if row >= 0
        ]

    def _reranked(self, query: Query, hits: Hits) -> Hits:
        tokens: dict[int, ScanTokens] = {}
        for row in hits.rows[0].tolist():
            try:
                tokens[row] = self._tokens_of(key_of_row(row))
            except M3RetReadError:
                continue
        is_readable = torch.tensor([row in tokens for row in hits.rows[0].tolist()], dtype=torch.bool)
        readable = Hits(hits.scores[:, is_readable], hits.rows[:, is_readable])
        return rerank_hits([self._tokens_of(query.key)], readable, tokens)

    # --------------------------------------------------------------------------------------------------------- scans

    def has_scans(self) -> bool:
        """Return whether the gallery's scans can be opened. An index alone holds embeddings only."""
        return self.gallery.records is not None

    def scan(self, key: str) -> Scan:
        """Return an open scan. A scan of the gallery is read again if it has expired.

        Raises:
            ScanExpiredError: If an upload has expired.
            M3RetReadError: If a scan of the gallery cannot be read.
        """
        scan = self._cached(self._scans, key)
        if scan is None:
            row = _row_of(key)
            if row is None or self.gallery.records is None:
                raise ScanExpiredError("This scan is no longer in memory. Please upload it again.")
            record = self.gallery.records[row]
            try:
                scan = self.readers.read(f"item {row}", read_record, record, self.processor.num_frames)
            except M3RetReadError as error:  # without the name of the file, which visitors must not see
                raise error.with_file(f"item {row} of the gallery") from error
            self._store(self._scans, key, scan)
        return scan

    def heat(self, query: Query, row: int, region: Region | None = None) -> Heat:
        """Compute where the query, or a region of it, matches a scan of the gallery.

        Args:
            row: Row of the hit.
            region: Box of voxels in the query. The query's heatmap is zero outside of it.

        Raises:
            ScanExpiredError, M3RetReadError: See `scan`.
            ValueError: If the region holds no voxel of the query.
        """
        key = f"{query.key} {row} {region}"
        heat = self._cached(self._heats, key)
        if heat is None:
            match = locate(self._tokens_of(query.key), self._tokens_of(key_of_row(row)), region, pairs=1)
            best = match.pairs[0]
            query_heat, query_slice = match.query_heat, round(best.query[0])
            if region is not None:  # patches cross its edges, and heat is interpolated between patches
                query_heat = torch.zeros_like(query_heat)
                query_heat[region] = match.query_heat[region]
                query_slice = min(max(query_slice, region[0].start), region[0].stop - 1)
            heat = Heat(_to_uint8(query_heat), _to_uint8(match.hit_heat), query_slice, match.hit_slice, best.confidence)
            self._store(self._heats, key, heat)
        return heat

    def slices_in_patch(self, query: Query, slice_index: int) -> slice:
        """Return the slices of the query whose centres lie in the same patch as this slice's centre.

        Raises:
            ScanExpiredError, M3RetReadError: See `scan`.
        """
        edges = self._tokens_of(query.key).edges[0]
        patch = int(torch.searchsorted(edges, slice_index + 0.5, right=True)) - 1
        start, stop = (math.ceil(float(edge) - 0.5) for edge in edges[patch : patch + 2])
        return slice(start, stop)

    def _tokens_of(self, key: str) -> ScanTokens:
        tokens = self._cached(self._tokens, key)
        if tokens is None:
            tokens = self._tokenise(self.scan(key))
            self._store(self._tokens, key, tokens)
        return tokens

    def _cached(self, cache: TTLCache[str, Item], key: str) -> Item | None:
        """Return a cached item and restart its time to live, or None."""
        with self._lock:
            item = cache.get(key)
            if item is not None:
                cache[key] = item
            return item

    def _store(self, cache: TTLCache[str, Item], key: str, item: Item) -> None:
        with self._lock:
            cache[key] = item

    # --------------------------------------------------------------------------------------------------------- model

    def _encode_here(self, scan: Scan) -> Tensor:
        with torch.inference_mode():
            inputs = self.processor.preprocess(scan).to(self.model.device)
            embedding: Tensor = self.model.get_image_features(**inputs)
        return embedding[0].float().cpu().clone()

    def _tokenise_here(self, scan: Scan) -> ScanTokens:
        return scan_tokens(self.model, self.processor, [scan])[0]


def _cache(max_bytes: int, bytes_of: Callable[[Item], int]) -> TTLCache[str, Item]:
    """Create a cache that evicts the least recently used items. An item larger than the limit is cached alone."""
    return TTLCache(max_bytes, RETENTION_SECONDS, getsizeof=lambda item: min(bytes_of(item), max_bytes))


def key_of_row(row: int) -> str:
    """Return the cache key of a scan of the gallery."""
    return f"row-{row}"


def _row_of(key: str) -> int | None:
    return int(key.removeprefix("row-")) if key.startswith("row-") else None


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

    wrapped: Callable[[Scan], Result] = importlib.import_module("spaces").GPU(call_on_gpu)
    return wrapped
