"""What the page and its endpoints do: open a scan, embed it, search, and see where two scans match.

One object holds the model, the gallery and the scans that are open. What a visitor's session keeps is a `Query`, some
kilobytes; the scans themselves lie on one shelf of bounded size, so that memory does not grow with the visitors.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..image_processing_m3ret import M3RetImageProcessor
from ..modeling_m3ret import M3RetModel
from ..reading_m3ret import M3RetReadError, Scan
from ..search.exact import Hits
from ..search.index import MetadataFilter
from ..search.matching import ScanTokens, locate, scan_tokens
from ..search.matching import rerank as rerank_hits
from .gallery import Facts, Gallery
from .isolation import IsolatedReaders
from .shelf import Shelf
from .uploads import read_record, read_upload
from .viewer import Region


SCANS_BYTES = 2**31  # of all open scans: two of the largest that are let in, or hundreds of the usual kind
HEATS_BYTES = 2**28
TOKENS_BYTES = 2**28  # a hundred CTs of a ViT-B
MOST_HITS = 48

Result = TypeVar("Result")


class PutAwayError(LookupError):
    """A visitor's own scan is no longer open."""


@dataclass(frozen=True, eq=False)
class Query:
    """What is searched for. key: of its scan on the shelf. row: of a scan of the gallery. embedding: `(d,)` float32."""

    key: str
    row: int | None
    embedding: Tensor


@dataclass(frozen=True, eq=False)
class Heat:
    """Where query and hit match: `(D, H, W)` of each one's array, 255 where it is surest; the slices to look at; and in
    [0, 1] how sure the best pair of patches is."""

    query: NDArray[np.uint8]
    hit: NDArray[np.uint8]
    query_slice: int
    hit_slice: int
    confidence: float


class HitFacts(Facts):
    """A hit as the endpoints tell it. item: its row in the gallery, which `/similar` takes."""

    item: int
    similarity: float


class Searching:
    """
    Args:
        model: in evaluation, where it shall run. readers: of all scans. shelf_bytes: see `SCANS_BYTES`.
    """

    def __init__(
        self,
        model: M3RetModel,
        processor: M3RetImageProcessor,
        gallery: Gallery,
        readers: IsolatedReaders,
        shelf_bytes: int = SCANS_BYTES,
    ):
        self.model, self.processor, self.gallery, self.readers = model, processor, gallery, readers
        self._scans: Shelf[Scan] = Shelf(shelf_bytes)
        self._heats: Shelf[Heat] = Shelf(HEATS_BYTES)
        self._tokens: Shelf[ScanTokens] = Shelf(TOKENS_BYTES)
        self._encode = on_gpu(model, self._encode_here)
        self._tokenise = on_gpu(model, self._tokenise_here)

    # ------------------------------------------------------------------------------------------------------- queries

    def query_of_files(self, files: Sequence[str | Path]) -> Query:
        """An upload as a query.

        Raises:
            M3RetReadError: for what cannot be read, or not in time.
        """
        paths = [Path(file) for file in files]
        name = paths[0].name if len(paths) == 1 else f"<{len(paths)} files>"
        # made here, since who reads may be ended; and beside the upload, so that what was left is swept away
        beside = paths[0].parent if paths else None
        with tempfile.TemporaryDirectory(prefix="unpacked-", dir=beside, ignore_cleanup_errors=True) as scratch:
            scan = self.readers.read(name, read_upload, paths, self.processor.num_frames, Path(scratch))
        query = Query(f"upload-{uuid.uuid4().hex}", None, self._encode(scan))
        self._scans.put(query.key, scan, scan.array.nbytes)
        return query

    def query_of_row(self, row: int) -> Query:
        """A scan of the gallery as a query.

        Raises:
            ValueError: if the gallery has no such row.
        """
        if not 0 <= row < len(self.gallery):
            raise ValueError(f"found item {row}, expected one of 0 to {len(self.gallery) - 1}")
        return Query(_key_of(row), row, self.gallery.index.embeddings[row].float())

    def put_away(self, query: Query) -> None:
        """An upload that nobody will look at again."""
        if query.row is None:
            self._scans.drop(query.key)
            self._tokens.drop(query.key)

    def put_away_unused(self, seconds: float) -> None:
        """Whatever nobody looked at for so long."""
        self._scans.drop_unused(seconds)
        self._heats.drop_unused(seconds)
        self._tokens.drop_unused(seconds)

    def search(
        self,
        query: Query,
        k: int,
        where: MetadataFilter | None = None,
        *,
        exclude_same_patient: bool = False,
        rerank: bool = False,
    ) -> list[HitFacts]:
        """The most similar scans, the best first.

        Args:
            k: at most so many, up to `MOST_HITS`.
            where: only scans that match this filter are found.
            exclude_same_patient: leave out scans of the query's patient, if the query is a scan of the gallery.
            rerank: order the hits by late interaction, whose score is then the similarity; hits that cannot be read
                are left out.

        Raises:
            M3RetReadError, PutAwayError: with `rerank`, if the query is not open any more.
        """
        hits = self.gallery.search(
            query.embedding,
            min(max(1, k), MOST_HITS),
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
                tokens[row] = self._tokens_of(_key_of(row))
            except M3RetReadError:
                continue
        keep = torch.tensor([row in tokens for row in hits.rows[0].tolist()], dtype=torch.bool)
        readable = Hits(hits.scores[:, keep], hits.rows[:, keep])
        return rerank_hits([self._tokens_of(query.key)], readable, tokens)

    # ------------------------------------------------------------------------------------------------- looking at scans

    def has_scans(self) -> bool:
        """Whether the gallery's scans can be opened, and not only found."""
        return self.gallery.records is not None

    def scan(self, key: str) -> Scan:
        """An open scan; one of the gallery is opened again where it was put away.

        Raises:
            PutAwayError: for an upload that was put away. M3RetReadError: if a scan cannot be read.
        """
        scan = self._scans.get(key)
        if scan is None:
            row = _row_of(key)
            if row is None or self.gallery.records is None:
                raise PutAwayError("This scan is no longer open. Please upload it again.")
            record = self.gallery.records[row]
            try:
                scan = self.readers.read(f"item {row}", read_record, record, self.processor.num_frames)
            except M3RetReadError as error:  # its name is nobody's business
                raise error.with_file(f"item {row} of the gallery") from error
            self._scans.put(key, scan, scan.array.nbytes)
        return scan

    def heat(self, query: Query, row: int, region: Region | None = None) -> Heat:
        """Where the query, or a region of it, and a scan of the gallery match; outside the region the query is cold.

        Raises:
            PutAwayError, M3RetReadError: as `scan`. ValueError: as `locate`.
        """
        key = f"{query.key} {row} {region}"
        heat = self._heats.get(key)
        if heat is None:
            match = locate(self._tokens_of(query.key), self._tokens_of(_key_of(row)), region, pairs=1)
            best = match.pairs[0]
            query_heat, query_slice = match.query_heat, round(best.query[0])
            if region is not None:  # patches reach over its edges, and heat is interpolated between them
                query_heat = torch.zeros_like(query_heat)
                query_heat[region] = match.query_heat[region]
                query_slice = min(max(query_slice, region[0].start), region[0].stop - 1)
            heat = Heat(_in_bytes(query_heat), _in_bytes(match.hit_heat), query_slice, match.hit_slice, best.confidence)
            self._heats.put(key, heat, heat.query.nbytes + heat.hit.nbytes)
        return heat

    def slab(self, query: Query, place: int) -> slice:
        """The slices that the encoder sees in one patch with this one: those whose middle lies in its patch.

        Raises:
            PutAwayError, M3RetReadError: as `scan`.
        """
        edges = self._tokens_of(query.key).edges[0]
        patch = int(torch.searchsorted(edges, place + 0.5, right=True)) - 1
        start, stop = (math.ceil(float(edge) - 0.5) for edge in edges[patch : patch + 2])
        return slice(start, stop)

    def _tokens_of(self, key: str) -> ScanTokens:
        tokens = self._tokens.get(key)
        if tokens is None:
            tokens = self._tokenise(self.scan(key))
            self._tokens.put(key, tokens, tokens.tokens.nbytes)
        return tokens

    # ----------------------------------------------------------------------------------------------------------- model

    def _encode_here(self, scan: Scan) -> Tensor:
        with torch.inference_mode():
            inputs = self.processor.preprocess(scan).to(self.model.device)
            embedding: Tensor = self.model.get_image_features(**inputs)
        return embedding[0].float().cpu().clone()

    def _tokenise_here(self, scan: Scan) -> ScanTokens:
        return scan_tokens(self.model, self.processor, [scan])[0]


def _key_of(row: int) -> str:
    return f"row-{row}"


def _row_of(key: str) -> int | None:
    return int(key.removeprefix("row-")) if key.startswith("row-") else None


def _in_bytes(heat: Tensor) -> NDArray[np.uint8]:
    """Relative to its hottest voxel: how sure the match is as a whole is told in a number beside it."""
    hottest = float(heat.max())
    return (heat * (255 / hottest if hottest > 0 else 0)).round().byte().numpy()


def on_gpu(model: torch.nn.Module, function: Callable[[Scan], Result]) -> Callable[[Scan], Result]:
    """On a Space with ZeroGPU, a function that is lent a GPU while it runs; elsewhere the function."""
    if importlib.util.find_spec("spaces") is None:
        return function

    def lent(scan: Scan) -> Result:
        if torch.cuda.is_available():
            model.to("cuda")  # in the process that has the GPU: the app's own has none, so the model came on the CPU
        return function(scan)

    wrapped: Callable[[Scan], Result] = importlib.import_module("spaces").GPU(lent)
    return wrapped
