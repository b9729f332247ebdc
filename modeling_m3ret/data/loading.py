"""Load records as packed batches: random views for training, whole scans in order for embedding.

A scan that cannot be read does not stop a run: the batch lists its index and error instead.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..cpu import keep_freed_memory
from ..image_processing_m3ret import M3RetImageProcessor, to_unit_floats
from ..packing_m3ret import Movable
from ..reading_m3ret import M3RetReadError, Scan
from ..worker_process import HAS_SIGWAITINFO, block_sigterm_in_workers, exit_on_sigterm_from_parent
from .sampler import SeededBatchSampler
from .schema import CollectionError
from .views import ViewKind, random_crop, random_intensity


if TYPE_CHECKING:  # both need pyarrow
    from .collection import Record
    from .parquet import Blocks, ParquetRow

# this many consecutive unreadable records indicate a faulty disk or manifest, not faulty files
MAX_CONSECUTIVE_FAILURES = 16


# makes all indices that an objective needs for a pack from its grids and noise, see `pretraining.objectives`
Planner = Callable[[Sequence[tuple[int, int, int]], Tensor], Movable]


@dataclass
class Pack(Movable):
    """A batch of resized scans or views, as workers send it to the training process; without arguments, an empty one.

    It holds each voxel once, and 8-bit voxels in 8 bits. The model's rows repeat a grey image twelve times (three
    channels, four slices), so they are normalised and made on the device by `inputs`.
    """

    # voxels of all scans patch by patch: uint8, where 255 means 1, or float32 in [0, 1]
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # (1 or 3, D, H, W), D = 1 or filled to whole patches
    scans: list[int] = field(default_factory=list)  # index of each scan in the records
    noise: Tensor | None = None  # (P,) random numbers in [0, 1) for MAE's mask, in training only
    failures: list[tuple[int, str]] = field(default_factory=list)  # index and message of each scan that was not read
    plan: Movable | None = None  # result of the objective's planner
    blocks: Tensor | None = None  # indices of `row_blocks` with compact images, if there is a plan

    @classmethod
    def from_scan(cls, index: int, volume: Tensor, processor: M3RetImageProcessor, noise: Tensor | None = None) -> Pack:
        """Return a pack of one scan `(1 or 3, D, H, W)`, that of record `index`."""
        return cls.from_volumes(index, [volume], processor, noise)

    @classmethod
    def from_volumes(
        cls, index: int, volumes: Sequence[Tensor], processor: M3RetImageProcessor, noise: Tensor | None = None
    ) -> Pack:
        """Return a pack of several views `(1 or 3, D, H, W)` of record `index`: uint8, or float32 if any is."""
        arrays = [volume.numpy() for volume in _in_one_type(volumes)]
        depths = [1 if array.shape[1] == 1 else processor.patch_depth for array in arrays]
        shapes = [
            (array.shape[0], -(-array.shape[1] // depth) * depth, *array.shape[2:])
            for array, depth in zip(arrays, depths, strict=True)
        ]
        ends = [*accumulate(map(math.prod, shapes))]
        values = np.empty(ends[-1], arrays[0].dtype)
        for start, end, array, depth in zip([0, *ends], ends, arrays, depths, strict=False):
            _write_patches(array, values[start:end], depth, processor.patch_size)
        return cls(torch.from_numpy(values), shapes, [index] * len(volumes), noise)

    @classmethod
    def concatenate(cls, packs: Sequence[Pack]) -> Pack:
        """Return one pack with the scans of several, in their order, and without a plan."""
        noises = [pack.noise for pack in packs if pack.noise is not None]
        return cls(
            values=torch.cat(_in_one_type([pack.values for pack in packs if pack.shapes] or [torch.empty(0)])),
            shapes=[shape for pack in packs for shape in pack.shapes],
            scans=[scan for pack in packs for scan in pack.scans],
            noise=torch.cat(noises) if noises else None,
            failures=[failure for pack in packs for failure in pack.failures],
        )

    def planned(self, plan: Planner, processor: M3RetImageProcessor) -> Pack:
        """Return this pack with everything that depends on its grids and noise alone, made by `plan`."""
        assert self.noise is not None
        grids = [processor.grid_shape(shape) for shape in self.shapes]
        return replace(self, plan=plan(grids, self.noise), blocks=self.row_blocks(processor, compact_images=True))

    def row_blocks(self, processor: M3RetImageProcessor, compact_images: bool) -> Tensor:
        """Return indices of blocks of p*p values, one channel of one slice of a patch: int64 `(P, C, t)`.

        A grey scan has one block for all channels, and an image one for all slices, or with `compact_images` t = 1 if
        all scans are images.
        """
        channels, D, H, W = np.array(self.shapes).T
        p, images = processor.patch_size, D == 1
        slices = np.where(images, 1, processor.patch_depth)
        patches, blocks = D // slices * (H // p) * (W // p), channels * slices  # of a scan, of a patch
        scan = np.arange(len(patches)).repeat(patches)  # of each patch
        first = blocks[scan].cumsum() - blocks[scan]  # block of each patch
        depth = 1 if compact_images and images.all() else processor.patch_depth
        channel = np.where(channels > 1, slices, 0)[:, None, None] * np.arange(processor.num_channels)[:, None]
        slice_in_patch = np.where(images, 0, 1)[:, None, None] * np.arange(depth)
        return torch.from_numpy(first[:, None, None] + (channel + slice_in_patch)[scan])

    def inputs(
        self, processor: M3RetImageProcessor, device: torch.device | str = "cpu", compact_images: bool = False
    ) -> dict[str, Any]:
        """Return the inputs of the model, or of the objective that planned the pack.

        The number of operations does not depend on the number of scans.

        Args:
            processor: processor with the model's patch size.
            device: device of the inputs.
            compact_images: if all scans are images, hold each slice once, which is embedded at a quarter of the cost.

        Returns:
            `pixel_values (P, C*t*p*p)`, or `(P, C*p*p)` for compact images; and the `plan` if the pack has one, else
            `grid_thw (B, 3)`, and `noise (P,)` if the pack has any.
        """
        planned = self.blocks if compact_images else None
        indices = self.row_blocks(processor, compact_images) if planned is None else planned
        values = self.values.to(device, non_blocking=True)
        per_channel = processor.normalises_per_channel
        if not per_channel:  # before values are repeated
            values = processor.normalise(values)
        blocks = values.view(-1, processor.patch_size**2)
        rows = blocks.index_select(0, indices.flatten().to(device, non_blocking=True)).view(len(indices), -1)
        if per_channel:
            rows = processor.normalise(rows.unflatten(1, (processor.num_channels, -1)), channel_dim=-2).flatten(1)
        if self.plan is not None:
            return {"pixel_values": rows, "plan": self.plan.to(device)}
        grids = torch.tensor([processor.grid_shape(shape) for shape in self.shapes], device=device)
        inputs = {"pixel_values": rows, "grid_thw": grids}
        return inputs if self.noise is None else inputs | {"noise": self.noise.to(device, non_blocking=True)}


def locate(records: Sequence[Record]) -> Sequence[Record | ParquetRow]:
    """Return what `open` is called on: the rows of a Parquet dataset, which need less memory, or else the records."""
    rows = getattr(records, "parquet_rows", lambda: None)()  # of `Records`
    if rows is not None:
        return rows
    records = list(records)  # to open an object takes a tenth of the time of making it from columns
    locations: list[Any] = [getattr(record, "location", Path()) for record in records]
    if not locations or any(isinstance(location, Path | tuple) for location in locations):
        return records
    from .parquet import ParquetRows

    return ParquetRows.of(locations)


@dataclass(eq=False)
class WholeScans(Dataset[Pack]):
    """Whole scans, resized by the processor, for embedding."""

    records: InitVar[Sequence[Record]]
    processor: M3RetImageProcessor

    def __post_init__(self, records: Sequence[Record]) -> None:
        self.sources = locate(records)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Pack:
        try:
            pixels = self.processor.size**2
            scan = self.processor.read(self.sources[index].open(), min_pixels=pixels)
            return Pack.from_scan(index, self.processor.resample(scan), self.processor)
        except M3RetReadError as error:
            return Pack(failures=[(index, str(error))])


@dataclass(eq=False)
class RandomViews(Dataset[Pack]):
    """Random views of scans, with the noise of their masks, for pretraining.

    All views of an item come from one decode. Its key is `(visit, index)`, see `SeededBatchSampler`. Crops and noise
    depend on the seed and the key alone, so they are the same in every worker and in a resumed run.

    A record that cannot be read is replaced by the next one, so that batches stay full.
    """

    records: InitVar[Sequence[Record]]
    processor: M3RetImageProcessor
    _: KW_ONLY
    views: Sequence[ViewKind]  # in the order in which an item holds them
    seed: int = 0  # of crops and noise
    cache_bytes: int = 0  # bytes of decoded scans that each worker may still cache for later epochs
    blocks: Blocks | None = None  # rows that are fetched together when streaming

    def __post_init__(self, records: Sequence[Record]) -> None:
        self.sources = locate(records)
        self._cache: dict[int, Scan] = {}
        # a scan of this many pixels is large enough that even the smallest crop of each kind is not enlarged
        sizes = [self.processor.size if kind.size is None else kind.size for kind in self.views]
        self._min_pixels = math.ceil(
            max(size**2 / kind.ranges.area[0] for size, kind in zip(sizes, self.views, strict=True))
        )

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, key: tuple[int, int]) -> Pack:
        """Return the views of one item, and the failures of records before it.

        Raises:
            M3RetReadError: if `MAX_CONSECUTIVE_FAILURES` records in a row cannot be read.
        """
        visit, index = key
        generator = np.random.default_rng([self.seed, visit, index])  # a replacement uses the requested key
        failures: list[tuple[int, str]] = []
        while True:
            try:
                scan = self._read(index)
                break
            except M3RetReadError as error:
                failures.append((index, str(error)))
                if len(failures) == MAX_CONSECUTIVE_FAILURES:
                    raise
                index = (index + 1) % len(self.sources)
        return replace(self._views(index, scan, generator), failures=failures)

    def _views(self, index: int, scan: Scan, generator: np.random.Generator) -> Pack:
        """Return the pack of all views of a scan."""
        kinds = [kind for kind in self.views for _ in range(kind.count)]
        crops = [random_crop(scan, kind.ranges, generator) for kind in kinds]
        # Views of an image are small: most of the time would go to loading the code of each step into caches, so a step
        # is applied to all of them before the next. Views of volumes and clips fill the caches themselves.
        at_once = len(kinds) if scan.array.shape[1] == 1 else 1
        views: list[Tensor] = []
        for first in range(0, len(kinds), at_once):
            part = slice(first, first + at_once)
            views += self._transform(crops[part], kinds[part], generator)
        grids = [self.processor.grid_shape(view.shape) for view in views]
        noise = generator.random(sum(math.prod(grid) for grid in grids), dtype=np.float32)
        return Pack.from_volumes(index, views, self.processor, torch.from_numpy(noise))

    def _transform(
        self, crops: Sequence[Scan], kinds: Sequence[ViewKind], generator: np.random.Generator
    ) -> list[Tensor]:
        """Return the views `(1 or 3, D, H, W)`: resized, mirrored and, as float32 in [0, 1], changed in intensity."""
        resized = [self.processor.resample(crop, size=kind.size) for crop, kind in zip(crops, kinds, strict=True)]
        flips = [generator.random() < kind.flip_probability for kind in kinds]
        views = [view.flip(-1) if is_flipped else view for view, is_flipped in zip(resized, flips, strict=True)]
        return [
            view
            if kind.jitter is None
            else torch.from_numpy(random_intensity(_float_copy(view.numpy()), kind.jitter, generator))
            for view, kind in zip(views, kinds, strict=True)
        ]

    def _read(self, index: int) -> Scan:
        if index in self._cache:
            return self._cache[index]
        if self.blocks is not None:
            from .parquet import process_reader

            process_reader().fetch(*self.blocks.ranges[self.blocks.block_of_row[index]])
        scan = self.processor.read(self.sources[index].open(), min_pixels=self._min_pixels)
        if scan.array.nbytes <= self.cache_bytes:
            self.cache_bytes -= scan.array.nbytes
            self._cache[index] = scan
        return scan


def _float_copy(values: np.ndarray) -> np.ndarray:
    """Return a float32 copy in [0, 1] of uint8 or float32 `(C, D, H, W)`, in C order."""
    copy = np.empty(values.shape, np.float32)
    return np.multiply(values, np.float32(1 / 255 if values.dtype == np.uint8 else 1), out=copy)


def _in_one_type(volumes: Sequence[Tensor]) -> list[Tensor]:
    """Return volumes, all uint8, or all float32 in [0, 1] if any is."""
    if len({volume.dtype for volume in volumes}) <= 1:
        return list(volumes)
    return [to_unit_floats(volume) for volume in volumes]


def _write_patches(volume: np.ndarray, values: np.ndarray, patch_depth: int, patch_size: int) -> None:
    """Write the patches of `(C, D, H, W)` to flat `values`, in the order of `split_into_patches`.

    A row of a patch is copied as one item, which takes half of the time of copying its voxels.
    """
    C, D, H, W = volume.shape
    depth = -(-D // patch_depth) * patch_depth
    planes = volume
    if depth > D or not volume.flags.c_contiguous:
        planes = np.empty((C, depth, H, W), volume.dtype)
        for plane, channel in zip(planes, volume, strict=True):  # interleaved colour is copied channel by channel
            plane[:D], plane[D:] = channel, channel[-1:]
    rows = planes.view(f"V{patch_size * volume.itemsize}")
    T, h, w = depth // patch_depth, H // patch_size, W // patch_size
    patches = rows.reshape(C, T, patch_depth, h, patch_size, w).transpose(1, 3, 5, 0, 2, 4)
    values.view(rows.dtype).reshape(patches.shape)[...] = patches


def expected_tokens(
    records: Sequence[Record], processor: M3RetImageProcessor, kinds: Sequence[ViewKind], prefix: int
) -> np.ndarray:
    """Return the expected number of tokens of all views of each record, `(n,)` float64, from crops of mean size.

    `prefix` tokens (CLS and registers) are added to the patches of each view.

    Raises:
        CollectionError: if a record has no shape.
    """
    counts = np.zeros(len(records))
    for number, record in enumerate(records):
        if record.shape is None:
            raise CollectionError(
                f"tokens_per_batch needs the shape of every scan: expected one for {record.id!r}, got none. Build a "
                "Parquet dataset from the collection with dataset_scripts/build.py, or set batch_size instead."
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

    def __init__(
        self,
        dataset: Dataset[Pack],
        num_workers: int,
        collate_fn: Callable[[Sequence[Pack]], Pack] = Pack.concatenate,
        **options: Any,
    ):
        if num_workers and HAS_SIGWAITINFO:  # Linux: forks start faster than the forkserver (default of Python 3.14)
            options.setdefault("multiprocessing_context", "fork")
        super().__init__(
            dataset,
            num_workers=num_workers,
            collate_fn=collate_fn,
            worker_init_fn=_initialise_worker,
            # a loader draws a seed when it starts; from the global generator, a resumed run would draw one more
            generator=torch.Generator(),
            **options,
        )

    def __iter__(self) -> Any:
        with block_sigterm_in_workers():
            return super().__iter__()


@dataclass
class PlanningCollator:
    """Concatenate packs and plan the result, in the worker."""

    plan: Planner
    processor: M3RetImageProcessor

    def __call__(self, packs: Sequence[Pack]) -> Pack:
        return Pack.concatenate(packs).planned(self.plan, self.processor)


def training_loader(
    dataset: RandomViews, batches: SeededBatchSampler, num_workers: int, plan: Planner | None = None
) -> PackLoader:
    """Return a loader of endless packs of random views, planned by an objective's `plan`."""
    collate = Pack.concatenate if plan is None else PlanningCollator(plan, dataset.processor)
    options = {"persistent_workers": num_workers > 0, "pin_memory": torch.cuda.is_available()}
    return PackLoader(dataset, num_workers, collate, batch_sampler=batches, **options)


def embedding_loader(dataset: WholeScans, batch_size: int, num_workers: int) -> PackLoader:
    """Return a loader of packs of whole scans, in the order of the records."""
    return PackLoader(dataset, num_workers, batch_size=batch_size)


def _initialise_worker(worker: int) -> None:
    """Limit a worker to one thread, since workers share the cores, and reuse memory, since scans are large blocks.

    Garbage collection leaves out the objects of the training process, which it would copy.
    """
    gc.freeze()
    torch.set_num_threads(1)
    keep_freed_memory()
    exit_on_sigterm_from_parent()
