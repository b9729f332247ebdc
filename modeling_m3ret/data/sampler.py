"""Batch samplers: the order in which scans are trained on, and which of them form a batch.

Both follow from the seed alone, so a run resumes from any step with the batches it would have had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from itertools import count
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError


Stratum = str | tuple[str, str]  # a modality, or (modality, source)


@dataclass(eq=False)
class SeededBatchSampler:
    """Yield endless batches of `(visit, index)` that depend on the seed and the number of the batch alone.

    An epoch has as many samples as there are records. A stratum of n records gets a share in proportion to n^alpha
    (`mixture_alpha` of `RunConfig`). Its records are drawn without replacement and reshuffled once all have been drawn,
    so all are seen equally often; `visit` counts how often a record was drawn before. Epochs follow each other without
    a gap, within a batch if necessary, so no sample is dropped.

    Each of `world_size` ranks takes every `world_size`-th batch, so ranks never share a sample.

    When streaming (`blocks`), blocks come in random order and scans are shuffled within windows of `WINDOW` blocks.
    An epoch is cut into `lanes` contiguous pieces per rank, and a rank takes its batches from its lanes in rotation.
    If `num_workers` divides `lanes`, each worker has lanes of its own, and hardly any block is fetched by two workers.
    The order depends on the numbers of lanes and ranks, not on the number of workers.

    Raises:
        InputError: if the records do not fill one batch on each rank.
    """

    strata: InitVar[Sequence[Stratum]]  # of each record; strata are numbered in sorted order
    batch_size: int  # scans per batch and rank
    _: KW_ONLY
    seed: int  # of all shuffles
    alpha: float = 1.0  # 1 samples strata in proportion to their size, 0 samples all equally
    start: int = 0  # number of the first batch of this rank
    rank: int = 0
    world_size: int = 1
    blocks: np.ndarray | None = None  # (n,) block of each record when streaming
    lanes: int = 1  # per rank; ignored unless streaming

    WINDOW: ClassVar = 4  # blocks shuffled together: at 8 MiB a block, several hundred images

    def __post_init__(self, strata: Sequence[Stratum]) -> None:
        self.records = len(strata)
        self._require_scans(self.batch_size, "batch_size")
        number_of = {stratum: number for number, stratum in enumerate(sorted(set(strata)))}
        numbers = np.array([number_of[stratum] for stratum in strata])
        self.members = [np.flatnonzero(numbers == number) for number in range(len(number_of))]
        self.samples = _apportion(self.records, np.array([len(members) ** self.alpha for members in self.members]))
        if self.blocks is None:
            self.lanes = 1
        self._epochs: dict[int, np.ndarray] = {}  # the latest two: a batch may need both

    def _require_scans(self, per_rank: int, option: str) -> None:
        required = per_rank * self.world_size
        if self.records < required:
            raise InputError(
                f"too few training scans: expected at least {required} ({option}={per_rank} on each of "
                f"{self.world_size} ranks), got {self.records}. Reduce {option} or add scans."
            )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in count(self.start):
            first = (number * self.world_size + self.rank) * self.batch_size
            positions = range(first, first + self.batch_size)
            samples = [self.epoch(position // self.records)[position % self.records] for position in positions]
            yield [(int(visit), int(index)) for visit, index in samples]

    def epoch(self, epoch: int) -> np.ndarray:
        """Return the samples of an epoch, `(n, 2)` of visit and index, in the order in which all ranks take them."""
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = self._arrange_by_lane(epoch, self._shuffle_epoch(epoch))
        return self._epochs[epoch]

    def _shuffle_epoch(self, epoch: int) -> np.ndarray:
        """Return the samples of an epoch, `(n, 2)`: strata mixed at random, each in its own order."""
        generator = np.random.default_rng([self.seed, epoch])
        drawn = [self._draw(stratum, epoch * n, (epoch + 1) * n) for stratum, n in enumerate(self.samples)]
        positions = [np.sort(generator.random(n)) for n in self.samples]
        return np.concatenate(drawn)[np.argsort(np.concatenate(positions), kind="stable")]

    def _draw(self, stratum: int, first: int, end: int) -> np.ndarray:
        """Return samples `first` to `end` of a stratum, counted from the start of training, as `(n, 2)`."""
        size = len(self.members[stratum])
        visits = range(first // size, -(-end // size))
        orders = [np.empty(0, np.int64), *(self._shuffle_stratum(stratum, visit) for visit in visits)]
        indices = np.concatenate(orders)[first % size :][: end - first]
        return np.stack([np.arange(first, end) // size, indices], axis=1)

    def _shuffle_stratum(self, stratum: int, visit: int) -> np.ndarray:
        """Return the indices of a stratum's records in the order of one visit to each."""
        members = self.members[stratum]
        generator = np.random.default_rng([self.seed, stratum, visit])
        if self.blocks is None:
            return generator.permutation(members)
        # one order of the blocks for all strata, so that all scans of a block are used at about the same time
        order = np.random.default_rng([self.seed, visit]).permutation(int(self.blocks.max()) + 1)
        window = order[self.blocks[members]] // self.WINDOW
        return members[np.argsort(window + generator.random(len(members)), kind="stable")]

    def _arrange_by_lane(self, epoch: int, shuffled: np.ndarray) -> np.ndarray:
        """Return the samples rearranged so that the batches of each lane take a contiguous piece of `shuffled`."""
        if self.lanes == 1 and (self.world_size == 1 or self.blocks is None):
            return shuffled
        batch = np.arange(epoch * self.records, (epoch + 1) * self.records) // self.batch_size
        lane = batch % self.world_size * self.lanes + batch // self.world_size % self.lanes
        arranged = np.empty_like(shuffled)
        arranged[np.argsort(lane, kind="stable")] = shuffled
        return arranged


def _apportion(total: int, weights: np.ndarray) -> np.ndarray:
    """Split `total` into whole numbers in proportion to `weights`, by the largest-remainder method."""
    shares = total * weights / weights.sum()
    counts = np.floor(shares).astype(int)
    by_remainder = np.argsort(counts - shares, kind="stable")
    counts[by_remainder[: total - counts.sum()]] += 1
    return counts


class TokenBatchSampler(SeededBatchSampler):
    """Yield batches that fill a budget of tokens, so that every step costs about the same time and memory.

    Epochs are ordered as by `SeededBatchSampler` and cut into one contiguous piece per lane of each rank. A lane's
    pieces follow each other without end; a batch takes scans from its lane while their tokens fit. A scan larger than
    the budget forms a batch of its own. Each rank processes about the same number of tokens, not of scans.

    Args:
        strata: stratum of each record.
        tokens: `(n,)` expected number of tokens of all views of each record, see `expected_tokens`.
        budget: maximum number of tokens per batch.
        order: other arguments of `SeededBatchSampler`.

    Raises:
        InputError: if there are fewer records than lanes of all ranks.
    """

    def __init__(self, strata: Sequence[Stratum], tokens: np.ndarray, budget: int, **order: Any):
        super().__init__(strata, 1, **order)
        self._require_scans(self.lanes, "stream_lanes")
        self.tokens = tokens
        self.budget = budget

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        lanes = [self._fill_batches(self.rank * self.lanes + lane) for lane in range(self.lanes)]
        for number in count():
            batch = next(lanes[number % self.lanes])
            if number >= self.start:
                yield batch

    def _fill_batches(self, lane: int) -> Iterator[list[tuple[int, int]]]:
        """Yield the batches of one lane, numbered over all ranks."""
        batch: list[tuple[int, int]] = []
        filled = 0.0
        for epoch in count():
            pieces = np.array_split(self._shuffle_epoch(epoch), self.world_size * self.lanes)
            for visit, index in pieces[lane].tolist():
                if batch and filled + self.tokens[index] > self.budget:
                    yield batch
                    batch, filled = [], 0.0
                batch.append((visit, index))
                filled += self.tokens[index]
