"""In which order are scans trained on, and which of them make a batch? Both follow from the seed, so that a run goes on
from any step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np


Stratum = str | tuple[str, str]  # a modality, or with its source


class SeededBatches:
    """Batches of `(turn, index)` without end, each a function of its number: a run goes on from any of them.

    An epoch is as many scans as there are records, in a random order by (seed, epoch). Of these a deck of n records, of
    one modality from one source, gets a part in proportion to n^alpha (`mixture_alpha` of `RunConfig`). It is dealt out
    like cards, shuffled anew when used up, so that all of its records are seen equally often; `turn` counts how often a
    record was dealt before. Epochs follow each other without a gap, in the middle of a batch if need be: none is left
    out.

    Each of `processes` ranks takes every `processes`-th batch, so that ranks never overlap.

    Streaming (`blocks`, `lanes`): blocks come in random order, and scans are shuffled within `WINDOW` of them. The
    epoch's order is cut into `lanes` equal pieces for each rank, which deal its batches in turn; with `lanes` or a
    divisor of it as number of workers, each worker meets its own pieces alone, and fetches next to no block that
    another does. The order depends on lanes and ranks, not on workers.

    Args:
        strata: of each record; decks are numbered in the order of their names. start: number of the first batch.
        blocks: `(n,)`, of each record, or None.
    """

    WINDOW = 4  # blocks that are shuffled together: of 8 MiB each some hundreds of images

    def __init__(
        self,
        strata: Sequence[Stratum],
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
        records = len(strata)
        if records < batch_size * processes:
            raise ValueError(
                f"{records} training scans do not fill one batch of {batch_size} on each of {processes} processes"
            )
        number_of = {name: number for number, name in enumerate(sorted(set(strata)))}
        numbers = np.array([number_of[name] for name in strata])
        self.decks = [np.flatnonzero(numbers == number) for number in range(len(number_of))]
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


class TokenBatches(SeededBatches):
    """Batches of as many scans as a budget of tokens holds: equal work and memory, whatever the mix.

    The order is that of `SeededBatches`, an epoch cut into a piece for each lane of each rank. A lane's pieces follow
    each other without end, and a batch takes scans from there while their tokens fit; a scan beyond the budget stands
    alone. So about as many tokens pass through every rank, and of scans as many as these are.

    Args:
        tokens: `(n,)`, those that the views of each record are expected to have. budget: most of a batch. order: as of
            `SeededBatches`.
    """

    def __init__(self, strata: Sequence[Stratum], tokens: np.ndarray, budget: int, **order: Any):
        super().__init__(strata, 1, **order)
        if len(strata) < self.lanes * self.processes:
            raise ValueError(
                f"{len(strata)} training scans are less than {self.lanes} lanes x {self.processes} processes"
            )
        self.tokens = tokens
        self.budget = budget

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        lanes = [self._lane(self.process * self.lanes + lane) for lane in range(self.lanes)]
        for number in count():
            batch = next(lanes[number % self.lanes])
            if number >= self.start:
                yield batch

    def _lane(self, lane: int) -> Iterator[list[tuple[int, int]]]:
        batch: list[tuple[int, int]] = []
        filled = 0.0
        for epoch in count():
            for turn, index in np.array_split(self._merged(epoch), self.processes * self.lanes)[lane].tolist():
                if batch and filled + self.tokens[index] > self.budget:
                    yield batch
                    batch, filled = [], 0.0
                batch.append((turn, index))
                filled += self.tokens[index]
