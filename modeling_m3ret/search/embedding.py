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


@dataclass
class EmbeddedBatch:
    """Consecutive records that were embedded together."""

    rows: list[int]  # indices of the readable records
    vectors: list[Tensor]  # (len(rows), d) of each embedder, on the CPU; without readable records, none
    failures: list[tuple[int, str]]  # index and message of each record that could not be read

    def __len__(self) -> int:
        return len(self.rows) + len(self.failures)


# embeds records lazily, in order
BatchEmbedder = Callable[[Sequence[Record]], Iterator[EmbeddedBatch]]


def embed_batches(
    embedders: Sequence[Embedder],
    processor: M3RetImageProcessor,
    records: Sequence[Record],
    *,
    max_tokens: int = MAX_TOKENS,
    num_workers: int = 0,
) -> Iterator[EmbeddedBatch]:
    """Embed every readable scan lazily, in order, with one or several embedders that share each decode.

    Args:
        embedders: such as `encoder_embedder(model)`. Vectors are float32, or of the embedder's own integer dtype.
        max_tokens: patches per forward pass. Embeddings do not depend on it.
        num_workers: processes that decode ahead.

    Raises:
        ValueError: if an embedding is not finite.
    """

    def tokens(pack: Pack) -> int:
        return sum(math.prod(processor.grid_shape(shape)) for shape in pack.shapes)

    loader = embedding_loader(WholeScans(records, processor), 1, num_workers)
    for pack in map(Pack.concatenate, batched(loader, tokens, max_tokens)):
        vectors = []
        if pack.scans:
            with torch.inference_mode():
                inputs = pack.inputs(processor)
                vectors = [embedder(inputs).cpu() for embedder in embedders]
        vectors = [batch.float() if batch.is_floating_point() else batch for batch in vectors]
        if not all(batch.isfinite().all() for batch in vectors):
            raise ValueError("embeddings are not finite: the encoder's weights have diverged. Use another checkpoint.")
        yield EmbeddedBatch(pack.scans, vectors, pack.failures)


def collect(
    batches: Iterable[EmbeddedBatch], records: Sequence[Record], embedders: int = 1, bar: Any = None
) -> list[Embedded]:
    """Join the batches of some records to one `Embedded` per embedder. `bar`, a tqdm bar, counts the records."""
    rows: list[int] = []
    vectors: list[list[Tensor]] = [[] for _ in range(embedders)]
    failures: list[str] = []
    for batch in batches:
        if bar is not None:
            bar.update(len(batch))
        rows += batch.rows
        failures += [message for _, message in batch.failures]
        for joined, part in zip(vectors, batch.vectors, strict=bool(batch.rows)):
            joined.append(part)
    return [
        Embedded(torch.cat(joined) if joined else torch.empty(0, 0), [records[row] for row in rows], list(failures))
        for joined in vectors
    ]


def embed_records(
    embedders: Sequence[Embedder],
    processor: M3RetImageProcessor,
    records: Sequence[Record],
    *,
    progress: bool = True,
    bar: Any = None,
    **options: Any,
) -> list[Embedded]:
    """Embed every readable scan as `embed_batches` does, which takes `options`. Return one `Embedded` per embedder.

    `bar` is a tqdm bar to advance instead of showing one.
    """
    if bar is None:
        bar = tqdm(total=len(records), desc="embedding", unit="scan", disable=not progress)
    else:
        bar = nullcontext(bar)  # its owner closes it
    with bar as shown:
        return collect(embed_batches(embedders, processor, records, **options), records, len(embedders), shown)


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
