"""Compare scans patch by patch: re-rank hits by late interaction, and locate matching regions.

`rerank` orders the hits of a first search by late interaction (ColBERT's MaxSim, Khattab and Zaharia 2020, arXiv
2004.12832): the mean over the query's patches of the best match in the hit. `locate` returns where the matches lie, in
voxels. Nothing is learned: the patch tokens are those of the encoder that embeds.
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
from ..modeling_m3ret import M3RetModel
from ..pooling_m3ret import M3RetWhitening
from ..reading_m3ret import Scan
from .embedding import MAX_TOKENS, Embedded, batched
from .exact import Hits


MAX_SIMILARITIES = 2**24  # similarities of a query's tokens with those of several hits held at a time: 64 MiB

# a token whitening is fitted to 16 patches for each of the 1024 dimensions of a ViT-L, 64 MiB
TOKEN_WHITENING_SCANS, PATCHES_PER_SCAN = 256, 64

# of the dual softmax: 0.01 to 0.03 find correct pairs equally often, 0.1 fewer; 0.03 is the least peaked of these
TEMPERATURE = 0.03


# ---- patch tokens and their positions -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScanTokens:
    """Patch tokens of one scan with the positions of the patches."""

    tokens: Tensor  # (T*h*w, d) float16, L2-normalised, in raster order
    # boundaries of the patches along D, H and W in voxels of the array that the processor reads: (T+1,), (h+1,) and
    # (w+1,) float64
    edges: tuple[Tensor, Tensor, Tensor]
    frames: tuple[int, ...]  # index in the scan of each of the array's D slices; of a clip only some frames are read

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of patches along depth, height and width."""
        T, h, w = (len(edges) - 1 for edges in self.edges)
        return T, h, w

    @property
    def shape(self) -> tuple[int, int, int]:
        """D, H, W of the array that the processor read."""
        D, H, W = (round(float(edges[-1])) for edges in self.edges)
        return D, H, W

    def centres(self) -> Tensor:
        """Return the centre of each patch: `(T*h*w, 3)` float64 voxel coordinates, integers at voxel centres."""
        return torch.cartesian_prod(*((edges[1:] + edges[:-1] - 1) / 2 for edges in self.edges))

    def to_voxels(self, values: Tensor) -> Tensor:
        """Interpolate values of the patches `(T*h*w,)` linearly between their centres: `(D, H, W)` float32."""
        depth, height, width = (_interpolation(edges, size) for edges, size in zip(self.edges, self.shape, strict=True))
        planes = height @ (values.float().view(self.grid) @ width.T)  # (T, H, W)
        return (depth @ planes.flatten(1)).view(self.shape)

    def fraction_inside(self, region: tuple[slice, slice, slice]) -> Tensor:
        """Return the fraction of each patch that lies in a box of voxels: `(T*h*w,)` float32 in [0, 1].

        Raises:
            ValueError: if the box is empty, or a slice has a step.
        """
        bounds = [axis.indices(size) for axis, size in zip(region, self.shape, strict=True)]
        if any(step != 1 or start >= stop for start, stop, step in bounds):
            raise ValueError(f"wrong region: expected three slices of step 1 within {self.shape}, got {region}.")
        fractions = [
            (edges[1:].clamp(max=stop) - edges[:-1].clamp(min=start)).clamp(min=0) / edges.diff()
            for edges, (start, stop, _) in zip(self.edges, bounds, strict=True)
        ]
        return torch.cartesian_prod(*fractions).prod(1).float()


def _interpolation(edges: Tensor, size: int) -> Tensor:
    """Return linear interpolation weights `(size, patches)` float32 at the centres of voxels.

    Beyond the outermost centres the outermost patch has all the weight. Along an axis of equal patches it is bilinear
    resizing.
    """
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
    """Compute the patch tokens of scans: last layer, layer-normalised, whitened, on the CPU.

    A CT of 8 x 14 x 14 patches takes 2.4 MB at a hidden size of 768, an X-ray 0.3 MB. Whitened tokens retrieve and
    localise better than tokens that are not (docs/experiments.md).

    Args:
        model: encoder in evaluation mode.
        sources: scans as the processor takes them, such as `record.open()`.
        whitening: result of `fit_token_whitening`, the same for all scans that will be compared; by default the
            whitening of the embedding.
        max_tokens: patches per forward pass. Tokens do not depend on it.

    Raises:
        M3RetReadError: if a scan cannot be read.
    """
    whitening = whitening or model.whitening
    tokens: list[ScanTokens] = []
    with torch.inference_mode():
        for patches, scan in _encode_patches(model, processor, sources, max_tokens):
            # with statistics pooling, use the columns for the mean: patches that deviate as scans do on average
            width = patches.shape[1]
            whitened = (patches - whitening.mean[:width]) @ whitening.matrix[:, :width].T
            normalized = torch.nn.functional.normalize(whitened, dim=-1).half().cpu()
            tokens.append(ScanTokens(normalized, scan.edges, scan.frames))
    return tokens


def fit_token_whitening(
    model: M3RetModel, processor: M3RetImageProcessor, sources: Iterable[Any], *, max_tokens: int = MAX_TOKENS
) -> M3RetWhitening:
    """Fit a whitening from `(n, d)` to `(n, d)` to patch tokens, for checkpoints that pool the CLS token.

    The whitening of their embedding was fitted to CLS tokens and does not suit patch tokens. Checkpoints that pool the
    mean do not need it (docs/experiments.md).

    Args:
        model: encoder in evaluation mode.
        sources: training scans, or scans of the gallery; at most `PATCHES_PER_SCAN` patches of each are used.

    Raises:
        M3RetReadError: if a scan cannot be read.
        ValueError: if there is no scan.
    """
    with torch.inference_mode():
        encoded = _encode_patches(model, processor, sources, max_tokens)
        sample = [patches[:: -(-len(patches) // PATCHES_PER_SCAN)].cpu() for patches, _ in encoded]
    if not sample:
        raise ValueError("cannot fit a token whitening: expected at least one scan, got none.")
    # a token has hidden_size values, whatever the model pools
    sizes = {name: getattr(model.config, name) for name in ("hidden_size", "num_attention_heads")}
    whitening = M3RetWhitening(M3RetConfig(**sizes, pooling="mean"))
    whitening.fit(torch.cat(sample), shrinkage=0.01)  # as in the measurements of docs/experiments.md
    return whitening.to(model.device)


class _ResizedScan(NamedTuple):
    volume: Tensor  # (C, D, H, W), resized
    edges: tuple[Tensor, Tensor, Tensor]
    frames: tuple[int, ...]
    patches: int


def _encode_patches(
    model: M3RetModel, processor: M3RetImageProcessor, sources: Iterable[Any], max_tokens: int
) -> Iterator[tuple[Tensor, _ResizedScan]]:
    """Yield for each scan the last layer's patch tokens, `(T*h*w, d)` float32 on the model's device."""
    resized = (_resize(processor, processor.read(source)) for source in sources)
    for batch in batched(resized, lambda scan: scan.patches, max_tokens):
        rows, grids = processor.pack([scan.volume for scan in batch])
        outputs = model(rows.to(model.device), grids.to(model.device))
        for tokens, scan in zip(model.split_tokens(outputs.last_hidden_state, grids), batch, strict=True):
            yield tokens[model.config.num_prefix_tokens :].float(), scan


def _resize(processor: M3RetImageProcessor, scan: Scan) -> _ResizedScan:
    """Resize a scan and compute where its patches lie in its array.

    Resizing keeps the corners, so each axis has one scale factor; each frame that is read stands for an equal share of
    the clip. The last patch in depth ends with the slices, not with the padding.
    """
    volume = processor.resize(scan)
    grid = processor.grid_shape(volume.shape)
    steps = (processor.patch_depth, processor.patch_size, processor.patch_size)
    T, h, w = (
        (torch.arange(patches + 1, dtype=torch.float64) * step).clamp(max=resized) * (size / resized)
        for patches, step, resized, size in zip(grid, steps, volume.shape[1:], scan.array.shape[1:], strict=True)
    )
    # a clip is read at the centres of equal intervals
    read = scan.array.shape[1]
    total = scan.description.get("frames_total", read)
    assert isinstance(total, int)
    frames = tuple((2 * index + 1) * total // (2 * read) for index in range(read))
    return _ResizedScan(volume, (T, h, w), frames, math.prod(grid))


# ---- late interaction -----------------------------------------------------------------------------------------------


def late_interaction(query: ScanTokens, hits: Sequence[ScanTokens]) -> Tensor:
    """Return the mean over the query's patches of the largest cosine to any patch of a hit: `(n,)` float32.

    All patches have equal weight, and only the query's patches search. Both directions, and weights by norm or rarity,
    retrieved worse (docs/experiments.md).
    """
    query_tokens = _normalized(query)
    scores = [torch.empty(0)]
    for block in batched(hits, lambda hit: len(hit.tokens) * len(query_tokens), MAX_SIMILARITIES):
        cosines = query_tokens @ torch.cat([_normalized(hit) for hit in block]).T  # (Lq, Lh of the whole block)
        best = [one.amax(1).mean() for one in cosines.split([len(hit.tokens) for hit in block], dim=1)]
        scores.append(torch.stack(best))
    return torch.cat(scores)


def _normalized(scan: ScanTokens) -> Tensor:
    """Return the tokens in float32 of norm 1, without the rounding of float16: a patch is then nearest to itself."""
    return torch.nn.functional.normalize(scan.tokens.float(), dim=-1)


def rerank(queries: Sequence[ScanTokens], hits: Hits, gallery: Sequence[ScanTokens] | Mapping[int, ScanTokens]) -> Hits:
    """Return the same hits ordered by late interaction, which replaces the score of the first search.

    Mixing in the first score retrieved worse (docs/experiments.md). Hits of equal score are in the order of their rows.

    Args:
        queries: tokens of the query of each row of the hits.
        hits: of a first search, as `RetrievalIndex.search` returns them.
        gallery: tokens by row of the gallery, at least of the rows that were hit.

    Raises:
        ValueError: if the number of queries is not the number of rows of hits.
    """
    if len(queries) != len(hits.rows):
        raise ValueError(f"queries do not match hits: expected {len(hits.rows)} queries, got {len(queries)}.")
    reranked = Hits.empty(*hits.rows.shape)
    for index, query in enumerate(queries):
        found = hits.rows[index][hits.rows[index] >= 0]
        reranked.set_best(index, late_interaction(query, [gallery[row] for row in found.tolist()]), found)
    return reranked


@dataclass
class RerankedSearch(Embedded):
    """A search by embeddings whose first candidates are re-ranked, as one method of an evaluation.

    Raises:
        ValueError: if the number of tokens is not the number of records, or the depth is not positive.
    """

    tokens: Sequence[ScanTokens] = field(kw_only=True)  # of each record
    depth: int = field(kw_only=True)  # number of candidates that are re-ranked; the others follow in their order
    # late interaction of a query with its first candidates, which several protocols and figures use
    _cache: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.records):
            raise ValueError(f"tokens do not match records: expected {len(self.records)}, got {len(self.tokens)}.")
        if self.depth < 1:
            raise ValueError(f"depth is out of range: expected at least 1, got {self.depth}.")

    def similarities(self, queries: Tensor, candidate: Tensor) -> Tensor:
        """Return similarities as `Embedded` does; re-ranked candidates have 3 + their score, above all others."""
        similarities = super().similarities(queries, candidate)
        first = similarities.masked_fill(~candidate, -torch.inf).sort(dim=1, descending=True, stable=True)
        for index, query in enumerate(queries.tolist()):
            rows = first.indices[index, : self.depth]
            rows = rows[candidate[index, rows]]
            key = (query, *rows.tolist())
            if key not in self._cache:
                self._cache[key] = late_interaction(self.tokens[query], [self.tokens[row] for row in rows.tolist()])
            similarities[index, rows] = 3 + self._cache[key]
        return similarities


# ---- localisation ---------------------------------------------------------------------------------------------------


class PatchPair(NamedTuple):
    """A patch of the query and the patch of the hit that matches it, by their centres.

    Centres are along D, H, W in voxel coordinates of each scan's array, integers at voxel centres.
    """

    query: tuple[float, ...]
    hit: tuple[float, ...]
    cosine: float  # of the two tokens
    confidence: float  # in [0, 1], see `locate`


@dataclass(frozen=True, eq=False)
class Match:
    """Where two scans match.

    A heat is `(D, H, W)` float32 in [0, 1] on the array that the processor reads: the confidence that a voxel has a
    counterpart in the other scan.
    """

    hit_heat: Tensor
    query_heat: Tensor
    hit_slice: int  # of the hit's array, with the hottest voxel; `frames[hit_slice]` of its tokens is that of the clip
    pairs: tuple[PatchPair, ...]  # most confident first


def locate(
    query: ScanTokens, hit: ScanTokens, region: tuple[slice, slice, slice] | None = None, pairs: int = 10
) -> Match:
    """Find where a hit shows what the query, or a region of it, shows.

    Confidence is the dual softmax of cosines (LoFTR, Sun et al. 2021, arXiv 2104.00680, equation 2): the softmax of a
    pair's cosine over the hit's patches times that over the query's. Repeated content, such as background, shares its
    confidence among its many counterparts. In `pairs` each patch of the query is paired with its nearest by cosine. The
    heat of a patch is the sum of its confidences. A large uniform region is hottest at its border.

    Args:
        region: box in voxels of the query's array, `slice(None)` for a whole axis; None for the whole query. Patches
            count by the fraction inside; patches outside still compete for the hit's patches.
        pairs: maximum number of pairs to return.

    Raises:
        ValueError: if the region is empty, or the tokens are of different models.
    """
    if query.tokens.shape[1] != hit.tokens.shape[1]:
        raise ValueError(
            f"tokens are of different models: expected {query.tokens.shape[1]} dimensions, as in the query, got "
            f"{hit.tokens.shape[1]} in the hit. Compute both with one model."
        )
    cosines = _normalized(query) @ _normalized(hit).T  # (Lq, Lh)
    scaled = cosines / TEMPERATURE
    confidence = scaled.softmax(0) * scaled.softmax(1)
    weights = torch.ones(len(cosines)) if region is None else query.fraction_inside(region)
    confidence *= weights[:, None]
    nearest_cosine, nearest = cosines.max(1)
    pair_confidence = confidence.gather(1, nearest[:, None])[:, 0]
    best = pair_confidence.argsort(descending=True, stable=True)
    best = best[weights[best] > 0][:pairs]
    hit_heat = hit.to_voxels(confidence.sum(0)).clamp(max=1)  # above 1 by rounding only
    query_centres, hit_centres = query.centres()[best].tolist(), hit.centres()[nearest[best]].tolist()
    values = zip(nearest_cosine[best].tolist(), pair_confidence[best].tolist(), strict=True)
    return Match(
        hit_heat=hit_heat,
        query_heat=query.to_voxels(confidence.sum(1)).clamp(max=1),
        hit_slice=int(hit_heat.argmax()) // math.prod(hit.shape[1:]),
        pairs=tuple(
            PatchPair(tuple(query_centre), tuple(hit_centre), *pair)
            for query_centre, hit_centre, pair in zip(query_centres, hit_centres, values, strict=True)
        ),
    )
