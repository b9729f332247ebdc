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

from ..image_processing_m3ret import M3RetImageProcessor
from ..reading_m3ret import M3RetReadError, Scan
from .collection import Record
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
            volume = self.processor.resize(self.processor.read(self.records[index].path))
        except M3RetReadError as error:
            return [Failure(index, str(error))]
        return [Resized(index, volume)]


class RandomViews(Dataset[list[Resized | Failure]]):
    """Random views of a record, kind after kind, all from one decode, with the noise of their masks: for pretraining.

    An item is asked for by `(turn, index)`, see `SeededBatches`. Crops and noise follow from (seed, turn, index) alone,
    so that they do not depend on the worker that cuts them or on when a run was resumed.

    Each worker keeps decoded scans for the next epoch, up to `cache_bytes`.

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
    ):
        self.records = records
        self.processor = processor
        self.kinds = [kind for kind in views for _ in range(kind.count)]
        self.seed = seed
        self.cache_bytes = cache_bytes
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
        scan = self.processor.read(self.records[index].path)
        if scan.array.nbytes <= self.cache_bytes:
            self.cache_bytes -= scan.array.nbytes
            self._cache[index] = scan
        return scan


class SeededBatches:
    """Batches of `(turn, index)` without end, each a function of its number: a run goes on from any of them.

    An epoch is as many scans as there are records, in a random order by (seed, epoch). Of these a modality of n records
    gets a part in proportion to n^alpha (`mixture_alpha` of `RunConfig`). It deals its records out like a deck of
    cards, shuffled anew when used up, so that all of them are seen equally often; `turn` counts how often a record was
    dealt before. The last, short batch of an epoch is dropped.

    Each of `processes` ranks takes every `processes`-th of the one order, so that ranks never overlap.

    Args:
        modalities: of each record. start: number of the first batch.
    """

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
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.process = process
        self.processes = processes
        self.batches_in_epoch = records // (batch_size * processes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = divmod(self.start, self.batches_in_epoch)
        while True:
            usable = self.batches_in_epoch * self.batch_size * self.processes
            own = self.epoch(epoch)[:usable][self.process :: self.processes]
            for batch in range(first, self.batches_in_epoch):
                yield own[batch * self.batch_size : (batch + 1) * self.batch_size]
            epoch, first = epoch + 1, 0

    def epoch(self, epoch: int) -> list[tuple[int, int]]:
        """The `(turn, index)` of all ranks in one epoch, in order."""
        hand: list[tuple[int, int]] = []
        for number, (deck, dealt) in enumerate(zip(self.decks, self.dealt, strict=True)):
            shuffled: dict[int, np.ndarray] = {}  # of each turn
            for card in range(epoch * dealt, (epoch + 1) * dealt):
                turn, place = divmod(card, len(deck))
                if turn not in shuffled:
                    shuffled[turn] = np.random.default_rng([self.seed, number, turn]).permutation(deck)
                hand.append((turn, int(shuffled[turn][place])))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(hand))
        return [hand[place] for place in order]


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
    """Workers beside a training process share its cores: a pool of threads in each would only make them wait."""
    torch.set_num_threads(1)
