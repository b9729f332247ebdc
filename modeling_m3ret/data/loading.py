"""Load records as packed batches: random views for training, whole scans in order for embedding.

A scan that cannot be read does not stop a run: the batch lists its index and error instead.
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
from .collection import Record
from .parquet import Blocks, process_reader
from .sampler import SeededBatchSampler
from .schema import CollectionError
from .views import ViewKind, random_crop, random_flip, random_intensity


# so many unreadable records in a row mean that the disk or the manifest is wrong, not a file
MAX_CONSECUTIVE_FAILURES = 16


@dataclass
class Pack:
    """A batch of resized scans, as workers send it to the training process.

    It holds each voxel once. The model's rows repeat a grey image twelve times (three channels, four slices), so they
    are made on the device by `inputs`.

    Args:
        values: voxels of all scans, float32, flattened and concatenated.
        shapes: `(1 or 3, D, H, W)` of each scan.
        scans: index of each scan in the records.
        noise: `(P,)` random numbers for MAE's mask, or None.
        failures: index and message of each scan that could not be read.
    """

    values: Tensor
    shapes: list[tuple[int, int, int, int]]
    scans: list[int]
    noise: Tensor | None = None
    failures: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def concatenate(cls, packs: Sequence[Pack]) -> Pack:
        """Return one pack with the scans of several, in their order."""
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
        """Return the inputs of the model.

        Args:
            processor: processor with the model's patch size.
            device: device of the inputs.
            compact_images: if all scans are images, hold each slice once, which is embedded at a quarter of the cost.

        Returns:
            `pixel_values (P, C*t*p*p)`, or `(P, C*p*p)` for compact images; `grid_thw (B, 3)`; and `noise (P,)` if the
            pack has any.
        """
        volumes = self.values.to(device, non_blocking=True).split([math.prod(shape) for shape in self.shapes])
        views = [volume.view(shape) for volume, shape in zip(volumes, self.shapes, strict=True)]
        rows, grids = processor.pack(views, compact_images)
        inputs = {"pixel_values": rows, "grid_thw": grids}
        return inputs if self.noise is None else inputs | {"noise": self.noise.to(device, non_blocking=True)}


@dataclass(frozen=True)
class Resized:
    """A resized scan or view.

    Args:
        index: index of its record.
        volume: `(1 or 3, D, H, W)` float32.
        noise: a number in [0, 1) for each patch, in training only.
    """

    index: int
    volume: Tensor
    noise: Tensor | None = None


@dataclass(frozen=True)
class ReadFailure:
    """A record that could not be read: its index and the message of the error."""

    index: int
    message: str


def collate(items: Sequence[Sequence[Resized | ReadFailure]]) -> Pack:
    """Collate items of a data set, each the views of one scan and its failures, into one pack."""
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
    """Whole scans, resized by the processor, for embedding."""

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
    """Random views of scans, with the noise of their masks, for pretraining.

    All views of an item come from one decode. Its key is `(visit, index)`, see `SeededBatchSampler`. Crops and noise
    depend on the seed and the key alone, so they are the same in every worker and in a resumed run.

    A record that cannot be read is replaced by the next one, so that batches stay full.

    Args:
        records: records to train on.
        processor: processor that reads and resizes.
        views: kinds of views, in the order in which an item holds them.
        seed: seed of crops and noise.
        cache_bytes: bytes of decoded scans that each worker caches for later epochs.
        blocks: blocks of rows that are fetched together when streaming.
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
        """Return the failures, if any, and the views of one item.

        Raises:
            M3RetReadError: if `MAX_CONSECUTIVE_FAILURES` records in a row cannot be read.
        """
        visit, index = key
        generator = np.random.default_rng([self.seed, visit, index])  # a replacement uses the requested key
        failures: list[Resized | ReadFailure] = []
        while True:
            try:
                scan = self._read(index)
                break
            except M3RetReadError as error:
                failures.append(ReadFailure(index, str(error)))
                if len(failures) == MAX_CONSECUTIVE_FAILURES:
                    raise
                index = (index + 1) % len(self.records)
        return failures + [self._view(index, scan, kind, generator) for kind in self.kinds]

    def _view(self, index: int, scan: Scan, kind: ViewKind, generator: np.random.Generator) -> Resized:
        view = random_flip(random_crop(scan, kind.ranges, generator), kind.flip_probability, generator)
        volume = self.processor.resize(view, size=kind.size)
        if kind.jitter:
            volume = random_intensity(volume, kind.jitter, generator)
        noise = generator.random(math.prod(self.processor.grid_shape(volume.shape)), dtype=np.float32)
        return Resized(index, volume, torch.from_numpy(noise))

    def _read(self, index: int) -> Scan:
        if index in self._cache:
            return self._cache[index]
        if self.blocks is not None:
            process_reader().fetch(*self.blocks.ranges[self.blocks.block_of_row[index]])
        scan = self.processor.read(self.records[index].open())
        if scan.array.nbytes <= self.cache_bytes:
            self.cache_bytes -= scan.array.nbytes
            self._cache[index] = scan
        return scan


def expected_tokens(
    records: Sequence[Record], processor: M3RetImageProcessor, kinds: Sequence[ViewKind], prefix: int
) -> np.ndarray:
    """Return the expected number of tokens of all views of each record, estimated from crops of mean size.

    Args:
        records: records with a shape.
        processor: processor that resizes the views.
        kinds: kinds of views.
        prefix: prefix tokens (CLS and registers) per view.

    Returns:
        `(n,)` float64.

    Raises:
        CollectionError: if a record has no shape.
    """
    counts = np.zeros(len(records))
    for number, record in enumerate(records):
        if record.shape is None:
            raise CollectionError(
                f"tokens_per_batch needs the shape of every scan: expected one for {record.id!r}, got none. Build a "
                "Parquet data set from the collection with dataset_scripts/build.py, or set batch_size instead."
            )
        D, H, W = record.shape
        D = min(D, processor.num_frames) if record.is_clip else D
        for kind in kinds:
            side = math.sqrt(sum(kind.ranges.area) / 2)
            mean_depth = max(1, round(D * sum(kind.ranges.depth) / 2))
            single = kind.ranges.single_slice_probability
            for depth, probability in ((1, single), (mean_depth, 1 - single)):
                crop = (depth, max(1, round(H * side)), max(1, round(W * side)))
                shape = processor.target_shape(crop, record.spacing, size=kind.size)
                tokens = prefix + math.prod(processor.grid_shape((1, *shape)))
                counts[number] += probability * kind.count * tokens
    return counts


class PackLoader(DataLoader[Pack]):
    """A data loader whose workers survive a SIGTERM to the process group, so that the run can save first."""

    def __iter__(self) -> Any:
        with block_sigterm_in_workers():
            return super().__iter__()


def training_loader(dataset: RandomViews, batches: SeededBatchSampler, num_workers: int) -> DataLoader[Pack]:
    """Return a loader of endless packs of random views."""
    return PackLoader(
        dataset,  # type: ignore[arg-type]  # torch types a loader by its items; collate makes them packs
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_initialise_worker,
        persistent_workers=num_workers > 0,
        # a loader draws a seed when it starts: taken from the global generator, a resumed run would draw one more
        generator=torch.Generator(),
    )


def embedding_loader(dataset: WholeScans, batch_size: int, num_workers: int) -> DataLoader[Pack]:
    """Return a loader of packs of whole scans, in the order of the records."""
    return PackLoader(
        dataset,  # type: ignore[arg-type]  # as above
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_initialise_worker,
        generator=torch.Generator(),  # as above: an evaluation during training must not change the global generator
    )


def _initialise_worker(worker: int) -> None:
    """Limit a worker to one thread, since workers share the cores, and reuse memory, since scans are large blocks."""
    torch.set_num_threads(1)
    keep_freed_memory()
    exit_on_sigterm_from_parent()
