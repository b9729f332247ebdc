"""The search service behind the page and its endpoints: read a scan, embed it, search, and locate matching regions.

One object holds the model, the gallery and the open scans. A visitor's session stores only a `Query` of a few
kilobytes. The scans themselves are in caches of bounded size, so that memory does not grow with the number of visitors.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from cachetools import Cache, LRUCache, TTLCache
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
from .pixels import body_mask, heat_stride
from .uploads import LIMITS, RETENTION_SECONDS, Choice, read_or_list, read_record, read_upload


SCAN_CACHE_BYTES = 2**31  # two scans of the largest accepted size, or hundreds of typical ones
HEAT_CACHE_BYTES = 2**28
TOKEN_CACHE_BYTES = 2**28  # about 100 CTs with a ViT-B
DEFAULT_HITS = 8  # two rows of the grid
MAX_HITS = 48
REGION_CANDIDATES = 100  # hits of a query that are ordered by a region of it; reading them takes seconds
ROW_KEY = "row-"  # how the cache keys of the gallery's scans start

Voxel = tuple[int, int, int]  # along D, H, W
Region = tuple[slice, slice, slice]  # a box of voxels
Item = TypeVar("Item")


class ScanExpiredError(InputError):
    """An uploaded scan is no longer in memory."""


@dataclass(frozen=True, eq=False)
class Query:
    """A search query."""

    key: str  # cache key of its scan
    row: int | None  # in the gallery, or None for an upload
    embedding: Tensor  # `(d,)` float32
    region: Region | None = None  # box of voxels whose matches are of interest; None for the whole scan
    drawn_on: int = 0  # slice on which the region was drawn


@dataclass(frozen=True, eq=False)
class Heat:
    """Heatmaps of where a query and a hit match, on every `heat_stride`-th row and column of each.

    A value is the confidence, 255 for 1, that a voxel has its counterpart in the other scan, see `locate`. It does not
    depend on other voxels, so that colours of two hits can be compared. Outside of the body it is 0.
    """

    query: NDArray[np.uint8]  # (D, H, W)
    hit: NDArray[np.uint8]
    query_voxel: Voxel  # the best match in voxels of the scan
    hit_voxel: Voxel


class HitFacts(Facts):
    """A hit as the endpoints return it. `item` is its row in the gallery, which `/similar` accepts."""

    item: int
    similarity: float
    percentile: float | None  # pairs of the gallery that are less alike; None for another score than the cosine
    weak: bool  # whether a scan that belongs to the gallery rarely has a nearest one of so little similarity


class SearchService:
    """Search a gallery by upload or by row, and compare two scans. All methods are thread-safe.

    A scan is given by its cache key, see `scan`; methods that need its voxels raise what `scan` raises.
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
        self._frames = processor.num_frames
        self._lock = threading.Lock()  # of the caches
        self._scans: TTLCache[str, Scan] = _cache(scan_cache_bytes, lambda scan: scan.array.nbytes)
        self._heats: TTLCache[str, Heat] = _cache(HEAT_CACHE_BYTES, lambda heat: heat.query.nbytes + heat.hit.nbytes)
        self._tokens: TTLCache[str, ScanTokens] = _cache(TOKEN_CACHE_BYTES, _token_bytes)  # of uploads
        self._gallery_tokens: LRUCache[str, ScanTokens] = LRUCache(TOKEN_CACHE_BYTES, _token_bytes)

    def query_of_files(self, files: Sequence[str | Path], series: int | None = None) -> Query:
        """Read and embed uploaded files. Raises `M3RetReadError` if they cannot be read, or not in time."""
        paths = [Path(file) for file in files]
        return self._query(self.readers.read(_name(paths), read_upload, paths, self._frames, LIMITS, series))

    def query_or_choices(self, files: Sequence[str | Path]) -> Query | list[Choice]:
        """Read and embed uploaded files, or list their scans if there are several. Raises `M3RetReadError`."""
        paths = [Path(file) for file in files]
        found = self.readers.read(_name(paths), read_or_list, paths, self._frames)
        return found if isinstance(found, list) else self._query(found)

    def _query(self, scan: Scan) -> Query:
        with torch.inference_mode():
            inputs = self.processor.preprocess(scan).to(self.model.device)
            embedding = self.model.embed_scans(**inputs)[0].float().cpu().clone()
        query = Query(f"upload-{uuid.uuid4().hex}", None, embedding)
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
        """Return the `k` most similar scans, at most `MAX_HITS`, best first.

        Args:
            exclude_same_patient: Omit scans of the query's patient, if the query is a scan of the gallery.
            rerank: Order the hits by late interaction, whose score is then the similarity. Hits that cannot be read
                are omitted. A query with a region is always re-ranked, and by the patches of the region only, among
                the first `REGION_CANDIDATES`.

        Raises:
            M3RetReadError, ScanExpiredError: When re-ranking, if the query's scan is no longer available.
        """
        k = min(max(1, k), MAX_HITS)
        count = k if query.region is None else max(k, REGION_CANDIDATES)
        hits = self.gallery.search(
            query.embedding, count, where, query_row=query.row, exclude_same_patient=exclude_same_patient
        )
        by_patches = (rerank or query.region is not None) and self.has_scans()
        if by_patches:
            hits = self._reranked(query, hits)
        calibration = self.gallery.calibration
        found: list[HitFacts] = []
        for score, row in zip(hits.scores[0, :k].tolist(), hits.rows[0, :k].tolist(), strict=True):
            percentile = None if by_patches else round(calibration.percentile(score), 2)
            weak = not by_patches and calibration.level(score) != "match"
            facts = self.gallery.facts(row)
            found.append(HitFacts(item=row, similarity=round(score, 4), percentile=percentile, weak=weak, **facts))
        return found

    def _reranked(self, query: Query, hits: Hits) -> Hits:
        query_tokens = self._tokens_of(query.key)
        if query.region is not None:
            inside = query_tokens.fraction_inside(query.region)
            chosen = inside >= min(0.5, float(inside.max()))  # the patches that lie in it for the most part
            query_tokens = replace(query_tokens, tokens=query_tokens.tokens[chosen])
        tokens: dict[int, ScanTokens] = {}
        for row in hits.rows[0].tolist():
            with suppress(M3RetReadError):
                tokens[row] = self._tokens_of(key_of_row(row))
        is_readable = torch.tensor([row in tokens for row in hits.rows[0].tolist()], dtype=torch.bool)
        readable = Hits(hits.scores[:, is_readable], hits.rows[:, is_readable])
        return rerank_hits([query_tokens], readable, tokens)

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
            return self.readers.read(f"item {row}", read_record, self.gallery.records[row], self._frames)
        except M3RetReadError as error:  # without the name of the file, which visitors must not see
            raise error.with_file(f"item {row} of the gallery") from error

    def heat(self, query: Query, row: int) -> Heat:
        """Compute where the query, or its region, matches the scan of the gallery in this row."""
        return self._cached(
            self._heats, f"{query.key} {row} {query.region} {query.drawn_on}", lambda: self._compare(query, row)
        )

    def _compare(self, query: Query, row: int) -> Heat:
        scans = self.scan(query.key), self.scan(key_of_row(row))
        strides = [heat_stride(scan) for scan in scans]
        ours, theirs = (
            _coarse(self._tokens_of(key), stride)
            for key, stride in zip((query.key, key_of_row(row)), strides, strict=True)
        )
        inside = np.ones(ours.shape, dtype=bool)
        box: Region | None = None
        if query.region is not None:
            depth, rows, columns = query.region
            box = (depth, _coarse_slice(rows, strides[0]), _coarse_slice(columns, strides[0]))
            inside[:] = False
            inside[box] = True
        match = locate(ours, theirs, box, pairs=1)
        bodies = body_mask(scans[0], strides[0]) & inside, body_mask(scans[1], strides[1])
        masks = [mask if mask.any() else np.ones_like(mask) for mask in bodies]  # e.g. a region of air
        heats = [heat.numpy() * mask for heat, mask in zip((match.query_heat, match.hit_heat), masks, strict=True)]
        best = [_middle_maximum(heat) for heat in heats]
        if query.region is not None:
            best[0] = (query.drawn_on, *best[0][1:])
        voxels = [(at[0], at[1] * stride, at[2] * stride) for at, stride in zip(best, strides, strict=True)]
        return Heat(*(np.rint(heat * 255).astype(np.uint8) for heat in heats), *voxels)

    def slices_in_patch(self, query: Query, slice_index: int) -> slice:
        """Return the slices of the query whose centres lie in the same patch as this slice's."""
        edges = self._tokens_of(query.key).edges[0]
        patch = int(torch.searchsorted(edges, slice_index + 0.5, right=True)) - 1
        start, stop = (math.ceil(float(edge) - 0.5) for edge in edges[patch : patch + 2])
        return slice(start, stop)

    def with_region(self, query: Query, index: int, top: int, bottom: int, left: int, right: int) -> Query:
        """Return the query with a region: a box of one slice, and of all slices that share a patch with it.

        The slice and the first and last row and column are from 0. All rows and columns are the whole scan.
        """
        _, D, H, W = self.scan(query.key).array.shape
        rows, columns = (
            slice(min(*ends, size - 1), min(max(ends), size - 1) + 1)
            for ends, size in (((top, bottom), H), ((left, right), W))
        )
        if (rows, columns) == (slice(0, H), slice(0, W)):
            return replace(query, region=None)
        index = min(index, D - 1)
        return replace(query, region=(self.slices_in_patch(query, index), rows, columns), drawn_on=index)

    def prepare_regions(self) -> None:
        """Compute the patches of the gallery's scans, as many as fit in memory, so that a search by region is fast."""
        for row in range(len(self.gallery) if self.has_scans() else 0):
            with suppress(M3RetReadError):
                tokens = self._tokens_of(key_of_row(row))
                if self._gallery_tokens.currsize + _token_bytes(tokens) > self._gallery_tokens.maxsize:
                    return

    def _tokens_of(self, key: str) -> ScanTokens:
        if key.startswith(ROW_KEY):  # read again: hundreds of scans would take the place of those in use
            return self._cached(self._gallery_tokens, key, lambda: self._tokenise(self._read_again(key)))
        return self._cached(self._tokens, key, lambda: self._tokenise(self.scan(key)))

    def _cached(self, cache: Cache[str, Item], key: str, compute: Callable[[], Item]) -> Item:
        """Return an item and restart its time to live. If it is not cached, compute it without holding the lock."""
        with self._lock:
            if (item := cache.get(key)) is not None:
                cache[key] = item
                return item
        item = compute()
        with self._lock:
            cache[key] = item
        return item

    def _tokenise(self, scan: Scan) -> ScanTokens:
        return scan_tokens(self.model, self.processor, [scan])[0]


def _cache(max_bytes: int, bytes_of: Callable[[Item], int]) -> TTLCache[str, Item]:
    """Create a cache that evicts the least recently used items. An item larger than the limit is cached alone."""
    return TTLCache(max_bytes, RETENTION_SECONDS, getsizeof=lambda item: min(bytes_of(item), max_bytes))


def _token_bytes(tokens: ScanTokens) -> int:
    return tokens.tokens.nbytes


def key_of_row(row: int) -> str:
    """Return the cache key of a scan of the gallery."""
    return f"{ROW_KEY}{row}"


def _name(paths: Sequence[Path]) -> str:
    """Return the name of an upload in messages."""
    return paths[0].name if len(paths) == 1 else f"{len(paths)} files"


def _coarse(tokens: ScanTokens, stride: int) -> ScanTokens:
    """Return the same tokens on an array of every `stride`-th row and column."""
    depth, *plane = tokens.edges
    height, width = (edges * (math.ceil(float(edges[-1]) / stride) / float(edges[-1])) for edges in plane)
    return replace(tokens, edges=(depth, height, width))


def _middle_maximum(heat: NDArray[np.float32]) -> Voxel:
    """Return a voxel of the largest value. Of several, such as in all slices of one patch, it is the middle one."""
    largest = np.argwhere(heat == heat.max()).tolist()
    depth, row, column = largest[len(largest) // 2]
    return depth, row, column


def _coarse_slice(axis: slice, stride: int) -> slice:
    return slice(axis.start // stride, -(-axis.stop // stride))
