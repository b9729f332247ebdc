"""Do two scans match part by part, and where? The patch tokens of a query meet those of the hits of a first search.

`rerank` orders hits by late interaction (ColBERT's MaxSim, Khattab and Zaharia 2020, arXiv 2004.12832): each patch of
the query looks for its best counterpart anywhere in the hit. `locate` tells where the counterparts lie, in voxels of
the two scans. Nothing here is learned: tokens are those of the encoder that embeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..configuration_m3ret import M3RetConfig
from ..image_processing_m3ret import M3RetImageProcessor
from ..modeling_m3ret import M3RetModel, M3RetWhitening
from ..reading_m3ret import Scan
from .embedding import MAX_TOKENS, Embedded
from .exact import Hits


SIMILARITIES = 2**24  # of a query's tokens with those of some hits, at a time: 64 MiB

# a whitening of patch tokens is fitted to 16 patches for each of a ViT-L's 1024 dimensions, 64 MiB
TOKEN_WHITENING_SCANS, PATCHES_OF_SCAN = 256, 64

# Of the dual softmax. On shifted crops of phantom scans .01 to .03 found right pairs equally often (.506 to .511 of the
# first ten), .1 fewer (.487), and .03 spreads confidence most of these.
TEMPERATURE = 0.03


# ---------------------------------------------------------------------------------------------------------------------
# Patch tokens, and where their patches lie
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScanTokens:
    """One scan's patches as vectors.

    tokens: `(T*h*w, d)` float16, L2-normalised, in raster order. edges: where the T, h and w patches begin and the last
    one ends along D, H and W, in voxels of the array that the processor reads: `(T+1,)`, `(h+1,)`, `(w+1,)` float64.
    frames: of each of that array's D slices its number among all of the scan's, since of a clip a part is read.
    """

    tokens: Tensor
    edges: tuple[Tensor, Tensor, Tensor]
    frames: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along depth, height and width."""
        T, h, w = (len(edges) - 1 for edges in self.edges)
        return T, h, w

    @property
    def shape(self) -> tuple[int, int, int]:
        """D, H, W of the array that the processor read."""
        D, H, W = (round(float(edges[-1])) for edges in self.edges)
        return D, H, W

    def centres(self) -> Tensor:
        """Of each patch, `(T*h*w, 3)` float64, in voxel coordinates: whole numbers are voxels' centres."""
        return torch.cartesian_prod(*((edges[1:] + edges[:-1] - 1) / 2 for edges in self.edges))

    def on_voxels(self, values: Tensor) -> Tensor:
        """Values of the patches `(T*h*w,)` -> `(D, H, W)` float32, linear between the patches' centres."""
        depth, height, width = (_interpolation(edges, size) for edges, size in zip(self.edges, self.shape, strict=True))
        planes = height @ (values.float().view(self.grid) @ width.T)  # (T, H, W)
        return (depth @ planes.flatten(1)).view(self.shape)

    def part_inside(self, region: tuple[slice, slice, slice]) -> Tensor:
        """Which part of each patch lies in a box of voxels: `(T*h*w,)` float32 in [0, 1].

        Raises:
            ValueError: if no voxel of the scan lies in the box.
        """
        bounds = [axis.indices(size) for axis, size in zip(region, self.shape, strict=True)]
        if any(step != 1 or start >= stop for start, stop, step in bounds):
            raise ValueError(f"found the region {region}, expected three slices within {self.shape}, of step 1")
        parts = [
            (edges[1:].clamp(max=stop) - edges[:-1].clamp(min=start)).clamp(min=0) / edges.diff()
            for edges, (start, stop, _) in zip(self.edges, bounds, strict=True)
        ]
        return torch.cartesian_prod(*parts).prod(1).float()


def _interpolation(edges: Tensor, size: int) -> Tensor:
    """Weights `(size, patches)` float32 of the patches at each voxel's centre; beyond the outermost centres it's theirs
    alone. Along an axis of equal patches that is bilinear resizing, as the processor's, the other way."""
    centres = ((edges[1:] + edges[:-1]) / 2).numpy()
    one_patch = np.eye(len(centres))
    weights = [np.interp(np.arange(size) + 0.5, centres, values) for values in one_patch]
    return torch.from_numpy(np.stack(weights, axis=1)).float()


def scan_tokens(
    model: M3RetModel,
    processor: M3RetImageProcessor,
    sources: Iterable[Any],
    *,
    whitening: M3RetWhitening | None = None,
    max_tokens: int = MAX_TOKENS,
) -> list[ScanTokens]:
    """The patch tokens of each scan: last layer, normed, whitened, on the CPU.

    A CT of 8 x 14 x 14 patches takes 2.4 MB at a hidden size of 768, an X-ray .3 MB.

    Args:
        model: in evaluation. sources: whatever the processor takes, one by one; `record.open()` for a collection's.
        whitening: of `fit_token_whitening`, one for all scans that will be compared; by default that of the embedding.
        max_tokens: scans are encoded together up to so many patches. Tokens do not depend on it.

    Raises:
        M3RetReadError: for a scan that cannot be read.
    """
    # Whitened: late interaction with all of a modality had, on held-out phantom scans, mAP .404, .394, .383 (three MAE
    # checkpoints) with whitened tokens, .349, .338, .347 with tokens as they are, .345 and .346 (two of them) centred;
    # earlier layers as they are had .290 to .349. Localisation prefers whitened ones too: of the patches of a shifted
    # crop .404 found their own place, as they are .371. A CLS checkpoint's is that of other vectors and changes nothing
    # (.327 to .326): `fit_token_whitening`.
    whitening = whitening or model.whitening
    tokens: list[ScanTokens] = []
    with torch.inference_mode():
        for patches, (edges, frames) in _patch_tokens(model, processor, sources, max_tokens):
            # of statistics pooling the columns for the mean: patches that deviate as scans do on average
            width = patches.shape[1]
            whitened = (patches - whitening.mean[:width]) @ whitening.matrix[:, :width].T
            tokens.append(ScanTokens(torch.nn.functional.normalize(whitened, dim=-1).half().cpu(), edges, frames))
    return tokens


def fit_token_whitening(
    model: M3RetModel, processor: M3RetImageProcessor, sources: Iterable[Any], *, max_tokens: int = MAX_TOKENS
) -> M3RetWhitening:
    """A whitening by the statistics of patch tokens themselves, for checkpoints that pool the CLS token: the whitening
    of their embedding is that of other vectors.

    Re-ranking by such a checkpoint (SimDINO, 2 layers, 40 steps) had, on 305 held-out phantom scans, mAP .366 with it,
    fitted to 112 training scans, .288 with the whitening of the embedding (paired: +.077, .052 to .103), .301 with
    tokens as they are. Fitted to the gallery it had .367, so it needs none of the scans that are compared. Checkpoints
    that pool the mean don't need it: on 297 real scans, MAE, .568 and .561 (paired +.007, -.004 to .019).

    Args:
        sources: of training scans, or of a gallery; of each at most `PATCHES_OF_SCAN` patches are taken, evenly spaced.

    Returns:
        From `(n, d)` to `(n, d)`, on the model's device.

    Raises:
        M3RetReadError: for a scan that cannot be read.
        ValueError: if there is no scan.
    """
    sample = []
    with torch.inference_mode():
        for patches, _ in _patch_tokens(model, processor, sources, max_tokens):
            sample.append(patches[:: -(-len(patches) // PATCHES_OF_SCAN)].cpu())
    if not sample:
        raise ValueError("found no scan, expected some to fit a whitening of patch tokens to")
    # patches are as wide as their mean, whatever the model pools
    sizes = {name: getattr(model.config, name) for name in ("hidden_size", "num_attention_heads")}
    whitening = M3RetWhitening(M3RetConfig(**sizes, pooling="mean"))
    whitening.fit(torch.cat(sample))
    return whitening.to(model.device)


_Place = tuple[tuple[Tensor, Tensor, Tensor], tuple[int, ...]]  # edges and frames of a `ScanTokens`


def _patch_tokens(
    model: M3RetModel, processor: M3RetImageProcessor, sources: Iterable[Any], max_tokens: int
) -> Iterator[tuple[Tensor, _Place]]:
    """Of each scan `(T*h*w, d)` float32, last layer, normed, on the model's device, and where its patches lie."""
    for volumes, places in _together(processor, sources, max_tokens):
        rows, grids = processor.pack(volumes)
        outputs = model(rows.to(model.device), grids.to(model.device))
        for own, place in zip(model.split_tokens(outputs.last_hidden_state, grids), places, strict=True):
            yield own[model.config.num_prefix_tokens :].float(), place


def _together(
    processor: M3RetImageProcessor, sources: Iterable[Any], max_tokens: int
) -> Iterator[tuple[list[Tensor], list[_Place]]]:
    """Neighbouring scans, resized, and their places, up to a number of patches."""
    volumes: list[Tensor] = []
    places: list[_Place] = []
    patches = 0
    for source in sources:
        scan = processor.read(source)
        volume = processor.resize(scan)
        own = math.prod(processor.grid_shape(volume.shape))
        if volumes and patches + own > max_tokens:
            yield volumes, places
            volumes, places, patches = [], [], 0
        volumes.append(volume)
        places.append((_edges(processor, scan, volume), _frames(scan)))
        patches += own
    if volumes:
        yield volumes, places


def _edges(processor: M3RetImageProcessor, scan: Scan, volume: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the patches of a resized scan `(C, D, H, W)` begin and end in the voxels of its array.

    Resizing keeps the corners, so it is one factor along each axis; frames that are taken as they are stand each for an
    equal part of the clip. The last patch in depth ends where the slices end, not where their repetition fills it.
    """
    steps = (processor.patch_depth, processor.patch_size, processor.patch_size)
    T, h, w = (
        (torch.arange(patches + 1, dtype=torch.float64) * step).clamp(max=resized) * (size / resized)
        for patches, step, resized, size in zip(
            processor.grid_shape(volume.shape), steps, volume.shape[1:], scan.array.shape[1:], strict=True
        )
    )
    return T, h, w


def _frames(scan: Scan) -> tuple[int, ...]:
    """Of each slice of a scan's array its number among all: of a clip the reader keeps the centres of equal parts."""
    kept = scan.array.shape[1]
    total = scan.description.get("frames_total", kept)
    assert isinstance(total, int)
    return tuple((2 * place + 1) * total // (2 * kept) for place in range(kept))


# ---------------------------------------------------------------------------------------------------------------------
# How alike: late interaction
# ---------------------------------------------------------------------------------------------------------------------


def late_interaction(query: ScanTokens, hits: Sequence[ScanTokens]) -> Tensor:
    """Mean over the query's patches of the largest cosine to any patch of a hit: `(n,)` float32 for n hits.

    Every patch of the query weighs the same, and only the query asks. On held-out phantom scans (mAP .404, .394, .383)
    both directions gave less (.394, .382, .379), and so did weights by a token's norm before it is normalised (.384,
    .376, .363) and by how few patches of its own scan are like it (.374, .355, .340): how much of a scan is background
    is part of what it looks like.
    """
    asking = _unit(query)
    scores: list[Tensor] = []
    start = 0
    while start < len(hits):
        stop, rows = start, 0
        while stop < len(hits) and (stop == start or (rows + len(hits[stop].tokens)) * len(asking) <= SIMILARITIES):
            rows += len(hits[stop].tokens)
            stop += 1
        block = hits[start:stop]
        cosines = asking @ torch.cat([_unit(hit) for hit in block]).T  # (Lq, Lh of all in the block)
        scores += [own.amax(1).mean() for own in cosines.split([len(hit.tokens) for hit in block], dim=1)]
        start = stop
    return torch.stack(scores) if scores else torch.empty(0)


def _unit(scan: ScanTokens) -> Tensor:
    """Tokens in float32, of norm 1 again: then a patch is nearest to itself."""
    return torch.nn.functional.normalize(scan.tokens.float(), dim=-1)


def rerank(queries: Sequence[ScanTokens], hits: Hits, gallery: Sequence[ScanTokens] | Mapping[int, ScanTokens]) -> Hits:
    """The same hits of each query, in the order of late interaction, which becomes their score.

    The first search's similarity has no part in it: mixed in by a fifth it cost .04, .01 and .02 of mAP on held-out
    phantom scans. Equal scores stay in the order of the first search.

    Args:
        queries: of each row of the hits. hits: of a first search, as `RetrievalIndex.search` gives them. gallery:
            tokens by row of the gallery, of those rows at least that were hit.

    Raises:
        ValueError: if there are not as many queries as rows of hits.
    """
    if len(queries) != len(hits.rows):
        raise ValueError(f"found {len(queries)} queries and hits of {len(hits.rows)}, expected as many of both")
    scores, rows = torch.full_like(hits.scores, -torch.inf), torch.full_like(hits.rows, -1)
    for place, query in enumerate(queries):
        found = hits.rows[place][hits.rows[place] >= 0]
        own = late_interaction(query, [gallery[row] for row in found.tolist()])
        order = own.argsort(descending=True, stable=True)
        scores[place, : len(order)], rows[place, : len(order)] = own[order], found[order]
    return Hits(scores, rows)


@dataclass
class Reranked(Embedded):
    """An embedding's search whose first `depth` candidates are re-ranked, for the table of an evaluation.

    tokens: of each record. Those beyond `depth` follow in the order that they had.

    Raises:
        ValueError: if there are not as many tokens as records, or the depth is not positive.
    """

    tokens: Sequence[ScanTokens] = field(kw_only=True)
    depth: int = field(kw_only=True)
    _known: dict[tuple[int, ...], Hits] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.records) or self.depth < 1:
            raise ValueError(
                f"found tokens of {len(self.tokens)} scans for {len(self.records)} records and depth {self.depth}; "
                "expected as many, and at least 1"
            )

    def similarities(self, queries: Tensor, candidate: Tensor) -> Tensor:
        """As `Embedded.similarities`; of the re-ranked 3 + their cosine, which is above all others."""
        similarities = super().similarities(queries, candidate)
        first = similarities.masked_fill(~candidate, -torch.inf).sort(dim=1, descending=True, stable=True)
        for place, query in enumerate(queries.tolist()):
            rows = first.indices[place, : self.depth]
            rows = rows[candidate[place, rows]]
            key = (query, *rows.tolist())  # the table and each difference ask the same again
            if key not in self._known:
                found = Hits(similarities[place, rows][None], rows[None])
                self._known[key] = rerank([self.tokens[query]], found, self.tokens)
            best = self._known[key]
            similarities[place, best.rows[0]] = 3 + best.scores[0]
        return similarities


# ---------------------------------------------------------------------------------------------------------------------
# Where: heat maps and pairs
# ---------------------------------------------------------------------------------------------------------------------


class PatchPair(NamedTuple):
    """A patch of the query and its counterpart in the hit.

    query, hit: their centres along D, H, W in voxel coordinates of each scan's own array, where whole numbers are
    voxels' centres. cosine: of their tokens. confidence: in [0, 1], see `locate`.
    """

    query: tuple[float, float, float]
    hit: tuple[float, float, float]
    cosine: float
    confidence: float


@dataclass(frozen=True, eq=False)
class Match:
    """Where two scans match.

    hit_heat, query_heat: `(D, H, W)` float32 in [0, 1], on the array that the processor reads of each scan: how surely
    what lies there has a counterpart in the other. hit_slice: the slice of the hit's array that holds the hottest
    voxel; its number among all of a clip is `frames[hit_slice]` of the hit's tokens. pairs: the surest first.
    """

    hit_heat: Tensor
    query_heat: Tensor
    hit_slice: int
    pairs: tuple[PatchPair, ...]


def locate(
    query: ScanTokens, hit: ScanTokens, region: tuple[slice, slice, slice] | None = None, pairs: int = 10
) -> Match:
    """Where in the hit is what the query shows?

    Confidence is the dual softmax of cosines (LoFTR, Sun et al. 2021, arXiv 2104.00680, equation 2): the softmax of a
    pair's cosine over the hit's patches times that over the query's. What repeats, background above all, shares its
    confidence among its many counterparts: of the first ten pairs of two phantom CTs of one class 2 % join empty
    patches, by cosine alone 28 %. On shifted crops .511, .506, .571 of the first ten pairs are right (three
    checkpoints), by cosine alone .485, .468, .553. Each patch's counterpart in the pairs is its nearest by cosine.

    The heat of a patch is the sum of its confidences. Of regions of those crops the hottest patch of the hit lies in
    the right place in .557, .547, .637 of the cases, by the largest cosine in .493, .464, .568 (chance .146). A large
    region that looks the same all over is hottest at its rim.

    Args:
        region: a box in voxels of the query's array, `slice(None)` for all of an axis; only patches in it ask, each by
            the part of it that lies inside. Others still compete for the hit's patches. None: the whole query.
        pairs: how many to give at most.

    Raises:
        ValueError: if the region holds no voxel of the query, or the tokens are of models of different size.
    """
    if query.tokens.shape[1] != hit.tokens.shape[1]:
        raise ValueError(
            f"found tokens of {query.tokens.shape[1]} and {hit.tokens.shape[1]} values, expected those of one model"
        )
    cosines = _unit(query) @ _unit(hit).T  # (Lq, Lh)
    scaled = cosines / TEMPERATURE
    confidence = scaled.softmax(0) * scaled.softmax(1)
    asking = torch.ones(len(cosines)) if region is None else query.part_inside(region)
    confidence *= asking[:, None]
    nearest, counterpart = cosines.max(1)
    sure = confidence.gather(1, counterpart[:, None])[:, 0]
    best = sure.argsort(descending=True, stable=True)
    best = best[asking[best] > 0][:pairs]
    hit_heat = hit.on_voxels(confidence.sum(0)).clamp(max=1)  # but for rounding it is no more
    hottest = int(hit_heat.argmax())
    return Match(
        hit_heat=hit_heat,
        query_heat=query.on_voxels(confidence.sum(1)).clamp(max=1),
        hit_slice=hottest // math.prod(hit.shape[1:]),
        pairs=tuple(
            PatchPair(_point(here), _point(there), cosine, confidence)
            for here, there, cosine, confidence in zip(
                query.centres()[best].tolist(),
                hit.centres()[counterpart[best]].tolist(),
                nearest[best].tolist(),
                sure[best].tolist(),
                strict=True,
            )
        ),
    )


def _point(coordinates: Sequence[float]) -> tuple[float, float, float]:
    z, y, x = coordinates
    return z, y, x
