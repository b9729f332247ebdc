"""A collection -> one embedding a scan, by the encoder or by the pixel baseline that every report stands beside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.collection import Record
from ..data.loading import Pack, WholeScans, embedding_loader
from ..image_processing_m3ret import M3RetImageProcessor
from ..modeling_m3ret import M3RetModel


# 20 X-rays or two CTs: both cores of a small machine are busy, and a ViT-B's activations take some 100 MB
MAX_TOKENS = 4096

# from pixel_values (P, C*t*p*p) and grid_thw (B, 3) to embeddings (B, d)
Embedder = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass
class Embedded:
    """embeddings: `(n, d)` float32, L2-normalised; records: those n, all that could be read; failures: a line each."""

    embeddings: Tensor
    records: list[Record]
    failures: list[str] = field(default_factory=list)

    def similarities(self, queries: Tensor, candidate: Tensor) -> Tensor:
        """Of the scans at these places `(q,)` with all n, `(q, n)` float32: what ranks them.

        Args:
            candidate: bool `(q, n)`, those that will be ranked. A method that looks twice looks at these alone.
        """
        return self.embeddings[queries] @ self.embeddings.T


def embed_records(
    embedders: Sequence[Embedder],
    processor: M3RetImageProcessor,
    records: Sequence[Record],
    *,
    max_tokens: int = MAX_TOKENS,
    num_workers: int = 0,
    progress: bool = True,
) -> list[Embedded]:
    """Embed every readable scan, in order, with one or several embedders that share each decode.

    Args:
        embedders: each from the model's inputs to `(B, d)`: `encoder_embedder(model)`, `pixel_embedder(processor)`.
        max_tokens: scans are embedded together up to so many patches. An embedding does not depend on it.
        num_workers: processes that decode ahead.

    Returns:
        An `Embedded` for each embedder.
    """
    parts: list[list[Tensor]] = [[] for _ in embedders]
    kept: list[int] = []
    failures: list[str] = []
    loader = embedding_loader(WholeScans(records, processor), 1, num_workers)
    with torch.inference_mode(), tqdm(total=len(records), desc="embedding", unit="scan", disable=not progress) as bar:
        for pack in _together(loader, processor, max_tokens):
            bar.update(len(pack.scans) + len(pack.failures))
            failures += [message for _, message in pack.failures]
            if pack.scans:
                kept += pack.scans
                inputs = pack.inputs(processor)
                for part, embedder in zip(parts, embedders, strict=True):
                    vectors = embedder(inputs).cpu()
                    part.append(vectors.float() if vectors.is_floating_point() else vectors)
    if any(not torch.isfinite(embeddings).all() for part in parts for embeddings in part):
        raise ValueError("an encoder gave embeddings that are not finite: its weights have diverged")
    return [
        Embedded(torch.cat(part) if part else torch.empty(0, 0), [records[index] for index in kept], failures)
        for part in parts
    ]


def _together(packs: Iterable[Pack], processor: M3RetImageProcessor, max_tokens: int) -> Iterator[Pack]:
    """Neighbouring packs as one, up to a number of patches: an image and a CT differ by a factor of ten."""
    waiting: list[Pack] = []
    tokens = 0
    for pack in packs:
        own = sum(math.prod(processor.grid_shape(shape)) for shape in pack.shapes)
        if waiting and tokens + own > max_tokens:
            yield Pack.concatenate(waiting)
            waiting, tokens = [], 0
        waiting.append(pack)
        tokens += own
    if waiting:
        yield Pack.concatenate(waiting)


def encoder_embedder(model: M3RetModel) -> Embedder:
    """The model's retrieval embedding, on the model's device."""
    return lambda inputs: model.get_image_features(**{name: value.to(model.device) for name, value in inputs.items()})


def pooled_embedder(model: M3RetModel) -> Embedder:
    """The model's pooled features before whitening, on the model's device."""
    return lambda inputs: model(**{name: value.to(model.device) for name, value in inputs.items()}).pooler_output


# depth x height x width of the pixel baseline's thumbnail: 16 x 16 as in tiny images (Torralba et al. 2008 use 32 x 32
# and find 16 to 32 alike), and 4 in depth for volumes and clips
THUMBNAIL = (4, 16, 16)


def pixel_embedder(processor: M3RetImageProcessor) -> Embedder:
    """The scan itself as its embedding: a 4 x 16 x 16 thumbnail in colour, minus its mean, L2-normalised."""

    def embed(inputs: Mapping[str, Tensor]) -> Tensor:
        grids = inputs["grid_thw"]
        thumbnails = []
        for rows, grid in zip(inputs["pixel_values"].split(grids.prod(-1).tolist()), grids.tolist(), strict=True):
            volume = unpatchify(rows, grid, processor)
            thumbnails.append(torch.nn.functional.adaptive_avg_pool3d(volume, THUMBNAIL).flatten())
        stacked = torch.stack(thumbnails)
        return torch.nn.functional.normalize(stacked - stacked.mean(-1, keepdim=True), dim=-1)

    return embed


def unpatchify(rows: Tensor, grid: Sequence[int], processor: M3RetImageProcessor) -> Tensor:
    """Rows `(T*h*w, C*t*p*p)` of one scan -> `(C, T*t, h*p, w*p)`: undoes `patchify`, padding of the depth included."""
    (T, h, w), t, p = grid, processor.patch_depth, processor.patch_size
    patches = rows.view(T, h, w, -1, t, p, p).permute(3, 0, 4, 1, 5, 2, 6)  # (C, T, t, h, p, w, p)
    return patches.reshape(-1, T * t, h * p, w * p)
