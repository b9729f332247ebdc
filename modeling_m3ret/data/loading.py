"""Records -> packed batches, for training (random views) and for embedding (whole scans, in order).

A file that cannot be read never stops a run: its place in the batch holds the error, which the caller counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..cpu import keep_freed_memory
from ..image_processing_m3ret import M3RetImageProcessor
from ..reading_m3ret import M3RetReadError, Scan
from .collection import Record
from .parquet import Blocks, reader
from .views import ViewKind, random_crop, random_flip, random_intensity


# more unreadable neighbours than chance would bring say that the disk or the manifest is wrong, not a file
MOST_FAILURES_IN_A_ROW = 16


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
    def joined(cls, packs: Sequence[Pack]) -> Pack:
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
        self, processor: M3RetImageProcessor, device: torch.device | str = "cpu", slices_once: bool = False
    ) -> dict[str, Tensor]:
        """What the model takes, on its device: `pixel_values (P, C*t*p*p)`, `grid_thw (B, 3)`, `noise (P,)` if any.

        slices_once: if all scans are images, `pixel_values (P, C*p*p)`, embedded at a quarter of the work.
        """
        volumes = self.values.to(device, non_blocking=True).split([math.prod(shape) for shape in self.shapes])
        views = [volume.view(shape) for volume, shape in zip(volumes, self.shapes, strict=True)]
        rows, grids = processor.rows(views, slices_once)
        inputs = {"pixel_values": rows, "grid_thw": grids}
        return inputs if self.noise is None else inputs | {"noise": self.noise.to(device, non_blocking=True)}


@dataclass(frozen=True)
class Resized:
    """One scan by the size policy, `(1 or 3, D, H, W)` float32, and in training a number in [0, 1) for each patch."""

    index: int
    volume: Tensor
    noise: Tensor | None = None


@dataclass(frozen=True)
class Failure:
    index: int
    message: str


def collate(items: Sequence[Sequence[Resized | Failure]]) -> Pack:
    """Items of a data set, each some views of one scan or its failure, to one pack."""
    resized = [entry for item in items for entry in item if isinstance(entry, Resized)]
    noises = [entry.noise for entry in resized if entry.noise is not None]
    return Pack(
        values=torch.cat([entry.volume.flatten() for entry in resized]) if resized else torch.empty(0),
        shapes=[(*entry.volume.shape,) for entry in resized],
        scans=[entry.index for entry in resized],
        noise=torch.cat(noises) if noises else None,
        failures=[(entry.index, entry.message) for item in items for entry in item if isinstance(entry, Failure)],
    )


class WholeScans(Dataset[list[Resized | Failure]]):
    """Each record once, whole, by the processor: for embedding."""

    def __init__(self, records: Sequence[Record], processor: M3RetImageProcessor):
        self.records = records
        self.processor = processor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> list[Resized | Failure]:
        try:
            volume = self.processor.resize(self.processor.read(self.records[index].open()))
        except M3RetReadError as error:
            return [Failure(index, str(error))]
        return [Resized(index, volume)]


class RandomViews(Dataset[list[Resized | Failure]]):
    """Random views of a record, kind after kind, all from one decode, with the noise of their masks: for pretraining.

    An item is asked for by `(turn, index)`, see `SeededBatches`. Crops and noise follow from (seed, turn, index) alone,
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

    def __getitem__(self, key: tuple[int, int]) -> list[Resized | Failure]:
        turn, index = key
        generator = np.random.default_rng([self.seed, turn, index])  # of the asked one: a stand-in gets other views
        failures: list[Resized | Failure] = []
        while True:
            try:
                scan = self._read(index)
                break
            except M3RetReadError as error:
                failures.append(Failure(index, str(error)))
                if len(failures) == MOST_FAILURES_IN_A_ROW:
                    raise
                index = (index + 1) % len(self.records)  # its neighbour stands in, so that the batch stays full
        views = failures
        for kind in self.kinds:
            view = random_flip(random_crop(scan, kind.ranges, generator), kind.flip_part, generator)
            volume = self.processor.resize(view, size=kind.size)
            if kind.jitter:
                volume = random_intensity(volume, kind.jitter, generator)
            noise = generator.random(math.prod(self.processor.grid(volume)), dtype=np.float32)
            views.append(Resized(index, volume, torch.from_numpy(noise)))
        return views

    def _read(self, index: int) -> Scan:
        if index in self._cache:
            return self._cache[index]
        if self.blocks is not None:
            reader().fetch(*self.blocks.ranges[self.blocks.of_row[index]])
        scan = self.processor.read(self.records[index].open())
        if scan.array.nbytes <= self.cache_bytes:
            self.cache_bytes -= scan.array.nbytes
            self._cache[index] = scan
        return scan


class SeededBatches:
    """Batches of `(turn, index)` without end, each a function of its number: a run goes on from any of them.

    An epoch is as many scans as there are records, in a random order by (seed, epoch). Of these a modality of n records
    gets a part in proportion to n^alpha (`mixture_alpha` of `RunConfig`). It deals its records out like a deck of
    cards, shuffled anew when used up, so that all of them are seen equally often; `turn` counts how often a record was
    dealt before. Epochs follow each other without a gap, in the middle of a batch if need be: none is left out.

    Each of `processes` ranks takes every `processes`-th batch, so that ranks never overlap.

    Streaming (`blocks`, `lanes`): blocks come in random order, and scans are shuffled within `WINDOW` of them. The
    epoch's order is cut into `lanes` equal pieces for each rank, which deal its batches in turn; with `lanes` or a
    divisor of it as number of workers, each worker meets its own pieces alone, and fetches next to no block that
    another does. The order depends on lanes and ranks, not on workers.

    Args:
        modalities: of each record. start: number of the first batch. blocks: `(n,)`, of each record, or None.
    """

    WINDOW = 4  # blocks that are shuffled together: of 8 MiB each some hundreds of images

    def __init__(
        self,
        modalities: Sequence[str],
        batch_size: int,
        *,
        seed: int,
        alpha: float = 1.0,
        start: int = 0,
        process: int = 0,
        processes: int = 1,
        blocks: np.ndarray | None = None,
        lanes: int = 1,
    ):
        records = len(modalities)
        if records < batch_size * processes:
            raise ValueError(
                f"{records} training scans do not fill one batch of {batch_size} on each of {processes} processes"
            )
        self.decks = [np.flatnonzero(np.asarray(modalities) == name) for name in sorted(set(modalities))]
        weights = np.array([len(deck) ** alpha for deck in self.decks])
        shares = records * weights / weights.sum()
        self.dealt = np.floor(shares).astype(int)  # of each deck in an epoch
        largest_rests = np.argsort(self.dealt - shares, kind="stable")
        self.dealt[largest_rests[: records - self.dealt.sum()]] += 1
        self.records = records
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.process = process
        self.processes = processes
        self.blocks = blocks
        self.lanes = lanes if blocks is not None else 1
        self._epochs: dict[int, np.ndarray] = {}  # the latest two, of which a batch may need both

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        number = self.start
        while True:
            yield self.batch(number * self.processes + self.process)
            number += 1

    def batch(self, number: int) -> list[tuple[int, int]]:
        """The `(turn, index)` of one batch, `number` counting those of all ranks."""
        cards = range(number * self.batch_size, (number + 1) * self.batch_size)
        places = (divmod(card, self.records) for card in cards)
        return [(int(turn), int(index)) for turn, index in (self.epoch(epoch)[place] for epoch, place in places)]

    def epoch(self, epoch: int) -> np.ndarray:
        """`(n, 2)`, the turn and index of each scan of an epoch, in the order in which all ranks' batches take them."""
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = self._in_lanes(epoch, self._merged(epoch))
        return self._epochs[epoch]

    def _merged(self, epoch: int) -> np.ndarray:
        """The decks' cards, each deck in its own order, at random places among each other: `(n, 2)`."""
        generator = np.random.default_rng([self.seed, epoch])
        hand, places = [], []
        for number, dealt in enumerate(self.dealt):
            hand.append(self._dealt(number, epoch * dealt, (epoch + 1) * dealt))
            places.append(np.sort(generator.random(dealt)))
        return np.concatenate(hand)[np.argsort(np.concatenate(places), kind="stable")]

    def _dealt(self, number: int, first: int, end: int) -> np.ndarray:
        """Cards `first` to `end` of a deck since the run began, as `(turn, index)`."""
        deck = self.decks[number]
        cards = [np.empty((0, 2), np.int64)]
        for turn in range(first // len(deck), -(-end // len(deck))):
            begin = turn * len(deck)
            indices = self._shuffled(number, turn)[max(first - begin, 0) : end - begin]
            cards.append(np.stack([np.full(len(indices), turn), indices], axis=1))
        return np.concatenate(cards)

    def _shuffled(self, number: int, turn: int) -> np.ndarray:
        deck = self.decks[number]
        generator = np.random.default_rng([self.seed, number, turn])
        if self.blocks is None:
            return generator.permutation(deck)
        # one order of blocks for all decks, so that what lies in one block is used at one time
        blocks = np.random.default_rng([self.seed, turn]).permutation(int(self.blocks.max()) + 1)
        window = blocks[self.blocks[deck]] // self.WINDOW
        return deck[np.argsort(window + generator.random(len(deck)), kind="stable")]

    def _in_lanes(self, epoch: int, merged: np.ndarray) -> np.ndarray:
        """Reorder so that each lane's batches take its own piece, in order."""
        if self.lanes == 1 and (self.processes == 1 or self.blocks is None):
            return merged
        batch = np.arange(epoch * self.records, (epoch + 1) * self.records) // self.batch_size
        lane = batch % self.processes * self.lanes + batch // self.processes % self.lanes
        ordered = np.empty_like(merged)
        ordered[np.argsort(lane, kind="stable")] = merged
        return ordered


def training_loader(dataset: RandomViews, batches: SeededBatches, num_workers: int) -> DataLoader[Pack]:
    """Endless packs of random views."""
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # torch types a loader by its items; collate makes them packs
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_one_thread,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # its own: a loader draws a number when it starts, and a resumed run starts twice
    )


def embedding_loader(dataset: WholeScans, batch_size: int, num_workers: int) -> DataLoader[Pack]:
    """Packs of whole scans, in the order of the records."""
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # as above
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),  # its own: to measure draws no number of the training that it interrupts
    )


def _one_thread(worker: int) -> None:
    """Workers beside a training process share its cores: a pool of threads in each would only make them wait. Scans are
    large blocks, one after the other: a worker keeps what it frees for the next."""
    torch.set_num_threads(1)
    keep_freed_memory()
