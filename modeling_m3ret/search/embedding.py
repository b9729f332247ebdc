"""Embed collections: one vector per scan, by the encoder or by the pixel baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.collection import Record
from ..data.loading import Pack, WholeScans, embedding_loader
from ..image_processing_m3ret import M3RetImageProcessor
from ..modeling_m3ret import M3RetModel


T = TypeVar("T")
# patches per forward pass: 20 X-rays or two CTs; keeps two cores busy, and activations of a ViT-B take about 100 MB
MAX_TOKENS = 4096

# maps the model's inputs, pixel_values (P, C*t*p*p) and grid_thw (B, 3), to vectors (B, d)
Embedder = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass
class Embedded:
    """A collection with its embeddings."""

    embeddings: Tensor  # (n, d) float32, L2-normalised
    records: list[Record]  # the n records that could be read
    failures: list[str] = field(default_factory=list)  # one line for each record that could not be read

    def similarities(self, queries: Tensor, candidate: Tensor) -> Tensor:
        """Return the similarities by which queries rank all records: `(q, n)` float32.

        Args:
            queries: `(q,)` int64, indices of records.
            candidate: `(q, n)` bool, records that will be ranked. A re-ranking method compares only these.
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
    bar: Any = None,
    series: str | int | None = None,
) -> list[Embedded]:
    """Embed every readable scan, in order, with one or several embedders that share each decode.

    Args:
        embedders: such as `encoder_embedder(model)`.
        max_tokens: patches per forward pass. Embeddings do not depend on it.
        num_workers: processes that decode ahead.
        bar: a tqdm bar to advance instead of showing one.
        series: which DICOM series to read of a record with several, see `read_scan`.

    Returns:
        One `Embedded` per embedder: float32, or the embedder's own dtype if it is an integer.

    Raises:
        ValueError: if an embedding is not finite.
    """
    vectors: list[list[Tensor]] = [[] for _ in embedders]
    readable: list[int] = []
    failures: list[str] = []

    def tokens(pack: Pack) -> int:
        return sum(math.prod(processor.grid_shape(shape)) for shape in pack.shapes)

    loader = embedding_loader(WholeScans(records, processor, series), 1, num_workers)
    if bar is None:
        bar = tqdm(total=len(records), desc="embedding", unit="scan", disable=not progress)
    else:
        bar = nullcontext(bar)  # its owner closes it
    with torch.inference_mode(), bar as shown:
        for pack in map(Pack.concatenate, batched(loader, tokens, max_tokens)):
            shown.update(len(pack.scans) + len(pack.failures))
            failures += [message for _, message in pack.failures]
            if pack.scans:
                readable += pack.scans
                inputs = pack.inputs(processor)
                for batches, embedder in zip(vectors, embedders, strict=True):
                    batch = embedder(inputs).cpu()
                    batches.append(batch.float() if batch.is_floating_point() else batch)
    if any(not torch.isfinite(batch).all() for batches in vectors for batch in batches):
        raise ValueError("embeddings are not finite: the encoder's weights have diverged. Use another checkpoint.")
    return [
        Embedded(torch.cat(batches) if batches else torch.empty(0, 0), [records[i] for i in readable], list(failures))
        for batches in vectors
    ]


def batched(items: Iterable[T], size: Callable[[T], int], max_size: int) -> Iterator[list[T]]:
    """Batch consecutive items up to a total size; a larger item is a batch of its own."""
    batch: list[T] = []
    total = 0
    for item in items:
        total += size(item)
        if batch and total > max_size:
            yield batch
            batch, total = [], size(item)
        batch.append(item)
    if batch:
        yield batch


def encoder_embedder(model: M3RetModel) -> Embedder:
    """Return an embedder that computes the model's retrieval embedding, on the model's device."""
    return lambda inputs: model.embed_scans(**{name: value.to(model.device) for name, value in inputs.items()})


def pooled_embedder(model: M3RetModel) -> Embedder:
    """Return an embedder that computes the model's pooled features before whitening, on the model's device."""
    return lambda inputs: model(**{name: value.to(model.device) for name, value in inputs.items()}).pooler_output


# depth x height x width of the pixel baseline: 16 x 16 as in tiny images (Torralba et al. 2008 use 32 x 32, and found
# 16 to 32 to perform alike), and 4 in depth for volumes and clips
PIXEL_GRID = (4, 16, 16)


def pixel_embedder(processor: M3RetImageProcessor) -> Embedder:
    """Return the pixel baseline: a scan's 4 x 16 x 16 colour miniature minus its mean, L2-normalised."""

    def embed(inputs: Mapping[str, Tensor]) -> Tensor:
        grids = inputs["grid_thw"]
        miniatures = []
        for rows, grid in zip(inputs["pixel_values"].split(grids.prod(-1).tolist()), grids.tolist(), strict=True):
            volume = unpatchify(rows, grid, processor)
            miniatures.append(torch.nn.functional.adaptive_avg_pool3d(volume, PIXEL_GRID).flatten())
        stacked = torch.stack(miniatures)
        return torch.nn.functional.normalize(stacked - stacked.mean(-1, keepdim=True), dim=-1)

    return embed


def unpatchify(rows: Tensor, grid: Sequence[int], processor: M3RetImageProcessor) -> Tensor:
    """Convert the rows `(T*h*w, C*t*p*p)` of one scan to its volume `(C, T*t, h*p, w*p)`; the inverse of `patchify`."""
    (T, h, w), t, p = grid, processor.patch_depth, processor.patch_size
    patches = rows.view(T, h, w, -1, t, p, p).permute(3, 0, 4, 1, 5, 2, 6)  # (C, T, t, h, p, w, p)
    return patches.reshape(-1, T * t, h * p, w * p)
