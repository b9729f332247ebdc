"""Records -> packed batches, for training (random views) and for embedding (whole scans, in order).

A file that cannot be read never stops a run: its place in the batch holds the error, which the caller counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..cpu import keep_freed_memory
from ..image_processing_m3ret import M3RetImageProcessor
from ..reading_m3ret import M3RetReadError, Scan
from ..worker_process import block_sigterm_in_workers, exit_on_sigterm_from_parent
from .collection import CollectionError, Record
from .parquet import Blocks, reader
from .sampler import SeededBatchSampler
from .views import ViewKind, random_crop, random_flip, random_intensity


# more unreadable neighbours than chance would bring say that the disk or the manifest is wrong, not a file
MAX_CONSECUTIVE_FAILURES = 16


@dataclass
class Pack:
    """A batch on its way from the workers: resized scans without the repetition that the model's rows hold (a grey
    image's rows hold each value twelve times), which is made where they are used.

    values: all scans' voxels, float32, one after the other; shapes: `(1 or 3, D, H, W)` of each; scans: index of each
    in the records; noise: `(P,)` for MAE's mask, or None; failures: (index, message) of those that could not be read.
    """

    values: Tensor
    shapes: list[tuple[int, int, int, int]]
    scans: list[int]
    noise: Tensor | None = None
    failures: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def concatenate(cls, packs: Sequence[Pack]) -> Pack:
        """Several packs as one, in their order."""
        noises = [pack.noise for pack in packs if pack.noise is not None]
        return cls(
            values=torch.cat([pack.values for pack in packs]),
            shapes=[shape for pack in packs for shape in pack.shapes],
            scans=[scan for pack in packs for scan in pack.scans],
            noise=torch.cat(noises) if noises else None,
            failures=[failure for pack in packs for failure in pack.failures],
        )

    def inputs(
        self, processor: M3RetImageProcessor, device: torch.device | str = "cpu", compact_images: bool = False
    ) -> dict[str, Tensor]:
        """What the model takes, on its device: `pixel_values (P, C*t*p*p)`, `grid_thw (B, 3)`, `noise (P,)` if any.

        compact_images: if all scans are images, `pixel_values (P, C*p*p)`, embedded at a quarter of the work.
        """
        volumes = self.values.to(device, non_blocking=True).split([math.prod(shape) for shape in self.shapes])
        views = [volume.view(shape) for volume, shape in zip(volumes, self.shapes, strict=True)]
        rows, grids = processor.pack(views, compact_images)
        inputs = {"pixel_values": rows, "grid_thw": grids}
        return inputs if self.noise is None else inputs | {"noise": self.noise.to(device, non_blocking=True)}


@dataclass(frozen=True)
class Resized:
    """One scan by the size policy, `(1 or 3, D, H, W)` float32, and in training a number in [0, 1) for each patch."""

    index: int
    volume: Tensor
    noise: Tensor | None = None


@dataclass(frozen=True)
class ReadFailure:
    index: int
    message: str


def collate(items: Sequence[Sequence[Resized | ReadFailure]]) -> Pack:
    """Items of a data set, each some views of one scan or its failure, to one pack."""
    resized = [entry for item in items for entry in item if isinstance(entry, Resized)]
    noises = [entry.noise for entry in resized if entry.noise is not None]
    return Pack(
        values=torch.cat([entry.volume.flatten() for entry in resized]) if resized else torch.empty(0),
        shapes=[(*entry.volume.shape,) for entry in resized],
        scans=[entry.index for entry in resized],
        noise=torch.cat(noises) if noises else None,
        failures=[(entry.index, entry.message) for item in items for entry in item if isinstance(entry, ReadFailure)],
    )


class WholeScans(Dataset[list[Resized | ReadFailure]]):
    """Each record once, whole, by the processor: for embedding."""

    def __init__(self, records: Sequence[Record], processor: M3RetImageProcessor):
        self.records = records
        self.processor = processor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> list[Resized | ReadFailure]:
        try:
            volume = self.processor.resize(self.processor.read(self.records[index].open()))
        except M3RetReadError as error:
            return [ReadFailure(index, str(error))]
        return [Resized(index, volume)]


class RandomViews(Dataset[list[Resized | ReadFailure]]):
    """Random views of a record, kind after kind, all from one decode, with the noise of their masks: for pretraining.

    The key of an item is `(visit, index)`, see `SeededBatchSampler`. Crops and noise follow from the seed and the key,
    so that they do not depend on the worker that cuts them or on when a run was resumed.

    Each worker keeps decoded scans for the next epoch, up to `cache_bytes`. blocks: rows that are fetched together.

    Raises:
        M3RetReadError: when 16 records in a row cannot be read.
    """

    def __init__(
        self,
        records: Sequence[Record],
        processor: M3RetImageProcessor,
        *,
        views: Sequence[ViewKind],
        seed: int = 0,
        cache_bytes: int = 0,
        blocks: Blocks | None = None,
    ):
        self.records = records
        self.processor = processor
        self.kinds = [kind for kind in views for _ in range(kind.count)]
        self.seed = seed
        self.cache_bytes = cache_bytes
        self.blocks = blocks
        self._cache: dict[int, Scan] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> list[Resized | ReadFailure]:
        turn, index = key
        generator = np.random.default_rng([self.seed, turn, index])  # of the asked one: a stand-in gets other views
        failures: list[Resized | ReadFailure] = []
        while True:
            try:
                scan = self._read(index)
                break
            except M3RetReadError as error:
                failures.append(ReadFailure(index, str(error)))
                if len(failures) == MAX_CONSECUTIVE_FAILURES:
                    raise
                index = (index + 1) % len(self.records)  # its neighbour stands in, so that the batch stays full
        views = failures
        for kind in self.kinds:
            view = random_flip(random_crop(scan, kind.ranges, generator), kind.flip_probability, generator)
            volume = self.processor.resize(view, size=kind.size)
            if kind.jitter:
                volume = random_intensity(volume, kind.jitter, generator)
            noise = generator.random(math.prod(self.processor.grid_shape(volume.shape)), dtype=np.float32)
            views.append(Resized(index, volume, torch.from_numpy(noise)))
        return views

    def _read(self, index: int) -> Scan:
        if index in self._cache:
            return self._cache[index]
        if self.blocks is not None:
            reader().fetch(*self.blocks.ranges[self.blocks.block_of_row[index]])
        scan = self.processor.read(self.records[index].open())
        if scan.array.nbytes <= self.cache_bytes:
            self.cache_bytes -= scan.array.nbytes
            self._cache[index] = scan
        return scan


def expected_tokens(
    records: Sequence[Record], processor: M3RetImageProcessor, kinds: Sequence[ViewKind], prefix: int
) -> np.ndarray:
    """`(n,)`: tokens of all views of each record, of crops of mean size. `prefix`: tokens in front of a view's patches.

    Raises:
        CollectionError: if the collection does not say how large its scans are.
    """
    counts = np.zeros(len(records))
    for number, record in enumerate(records):
        if record.shape is None:
            raise CollectionError(
                f"the record {record.id!r} has no shape, and a token budget needs that of every scan: make a Parquet "
                "data set of the collection by dataset_scripts/build.py"
            )
        D, H, W = record.shape
        D = min(D, processor.num_frames) if record.is_clip else D
        for kind in kinds:
            side = math.sqrt(sum(kind.ranges.area) / 2)
            slices = max(1, round(D * sum(kind.ranges.depth) / 2))
            for depth, part in (
                (1, kind.ranges.single_slice_probability),
                (slices, 1 - kind.ranges.single_slice_probability),
            ):
                crop = (depth, max(1, round(H * side)), max(1, round(W * side)))
                shape = processor.target_shape(crop, record.spacing, size=kind.size)
                counts[number] += part * kind.count * (prefix + math.prod(processor.grid_shape((1, *shape))))
    return counts


class PackLoader(DataLoader[Pack]):
    """Workers that a SIGTERM to the whole run leaves at work until the run has saved."""

    def __iter__(self) -> Any:
        with block_sigterm_in_workers():
            return super().__iter__()


def training_loader(dataset: RandomViews, batches: SeededBatchSampler, num_workers: int) -> DataLoader[Pack]:
    """Endless packs of random views."""
    return PackLoader(
        dataset,  # type: ignore[arg-type]  # torch types a loader by its items; collate makes them packs
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_begin_worker,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # its own: a loader draws a number when it starts, and a resumed run starts twice
    )


def embedding_loader(dataset: WholeScans, batch_size: int, num_workers: int) -> DataLoader[Pack]:
    """Packs of whole scans, in the order of the records."""
    return PackLoader(
        dataset,  # type: ignore[arg-type]  # as above
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # its own: to measure draws no number of the training that it interrupts
    )


def _begin_worker(worker: int) -> None:
    """Workers beside a training process share its cores: a pool of threads in each would only make them wait. Scans are
    large blocks, one after the other: a worker keeps what it frees for the next."""
    torch.set_num_threads(1)
    keep_freed_memory()
    exit_on_sigterm_from_parent()
