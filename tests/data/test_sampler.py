"""Batch samplers: every scan once an epoch, an order that depends on the seed alone, and batches that fill a budget."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from modeling_m3ret.data.sampler import SeededBatchSampler, TokenBatchSampler
from modeling_m3ret.errors import InputError


@pytest.mark.parametrize("blocks", [None, np.arange(20) // 3], ids=["map-style", "streamed"])
@pytest.mark.parametrize(("world_size", "lanes"), [(1, 1), (2, 1), (2, 4), (3, 2)])
def test_each_scan_is_seen_once_per_epoch_by_one_rank(blocks: np.ndarray | None, world_size: int, lanes: int) -> None:
    """20 scans in batches of 3: epochs end within a batch, and 20 batches are three epochs."""
    strata = ["ct"] * 14 + ["xray"] * 6
    ranks = [
        SeededBatchSampler(strata, 3, seed=1, rank=rank, world_size=world_size, blocks=blocks, lanes=lanes)
        for rank in range(world_size)
    ]
    steps = zip(*(islice(rank, 20) for rank in ranks), strict=True)
    samples = [sample for step in steps for batch in step for sample in batch]
    for epoch in range(len(samples) // 20):
        assert sorted(samples[20 * epoch : 20 * epoch + 20]) == [(epoch, index) for index in range(20)]
    assert [index for _, index in samples[:20]] != [index for _, index in samples[20:40]]


def test_too_few_scans_for_one_batch_per_rank_are_refused() -> None:
    with pytest.raises(InputError, match="batch_size"):
        SeededBatchSampler(["ct"] * 5, 3, seed=0, world_size=2)
    SeededBatchSampler(["ct"] * 6, 3, seed=0, world_size=2)


def test_map_style_batches_do_not_depend_on_the_number_of_ranks() -> None:
    """Two ranks with half the batch size together see the batch of one rank."""
    single = islice(SeededBatchSampler(["ct"] * 22, 4, seed=1), 11)
    pair = [SeededBatchSampler(["ct"] * 22, 2, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for batch, *halves in zip(single, *pair, strict=False):
        assert batch == halves[0] + halves[1]


def test_streaming_reads_each_block_in_one_worker_and_at_one_time() -> None:
    """400 scans in 40 blocks of 10, each with two modalities; 2 ranks of 4 lanes and 2 workers, batches of 5.

    A lane's piece of an epoch is 50 scans: five blocks, two of them shared with the neighbouring pieces.
    """
    blocks = np.arange(400) // 10
    strata = ["ct", "xray"] * 200
    seen_by_worker: dict[tuple[int, int], list[int]] = {}
    for rank in range(2):
        sampler = SeededBatchSampler(strata, 5, seed=3, rank=rank, world_size=2, blocks=blocks, lanes=4)
        for number, batch in enumerate(islice(sampler, 40)):
            seen_by_worker.setdefault((rank, number % 2), []).extend(int(blocks[index]) for _, index in batch)
    assert [len(seen) for seen in seen_by_worker.values()] == [100] * 4
    # 10 blocks' worth of scans, and at most some of three further windows: their own and those at both ends
    assert all(len(set(seen)) <= 10 + 3 * SeededBatchSampler.WINDOW for seen in seen_by_worker.values())

    # without lanes, each worker reads all blocks
    one_lane = list(islice(SeededBatchSampler(strata, 5, seed=3, blocks=blocks, lanes=1), 80))
    for worker in range(2):
        assert len({int(blocks[index]) for batch in one_lane[worker::2] for _, index in batch}) == 40

    # from the first scan of a block to its last, at most two windows of scans pass
    sequence = [int(blocks[index]) for batch in one_lane for _, index in batch]
    for block in range(40):
        positions = [position for position, other in enumerate(sequence) if other == block]
        assert positions[-1] - positions[0] < 2 * SeededBatchSampler.WINDOW * 10


def test_streamed_order_is_shuffled() -> None:
    """Blocks and the scans within a window come in random order, which differs between epochs and seeds."""
    blocks = np.arange(300) // 10

    def order(seed: int, epoch: int) -> np.ndarray:
        return SeededBatchSampler(["ct"] * 300, 5, seed=seed, blocks=blocks, lanes=2).epoch(epoch)[:, 1]

    first = order(0, 0)
    assert abs(np.corrcoef(first, np.arange(300))[0, 1]) < 0.4  # two standard errors for 30 blocks
    assert (np.diff(blocks[first]) != 0).mean() > 0.6  # expected 3/4 for windows of four blocks
    assert (first != order(0, 1)).mean() > 0.9
    assert (first != order(1, 0)).mean() > 0.9


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("blocks", [None, np.arange(18) // 4], ids=["map-style", "streamed"])
def test_resumed_batches_equal_uninterrupted_ones(alpha: float, blocks: np.ndarray | None) -> None:
    strata = ["ct"] * 13 + ["xray"] * 5
    settings = {"seed": 4, "alpha": alpha, "rank": 1, "world_size": 2, "blocks": blocks, "lanes": 2}
    uninterrupted = list(islice(SeededBatchSampler(strata, 2, **settings), 20))
    for start in (1, 4, 7, 13):
        resumed = SeededBatchSampler(strata, 2, **settings, start=start)
        assert list(islice(resumed, 20 - start)) == uninterrupted[start:]


@pytest.mark.parametrize(("alpha", "ct_per_epoch"), [(1.0, 64), (0.5, 54), (0.0, 34)])
def test_modalities_are_sampled_in_proportion_to_a_power_of_their_size(alpha: float, ct_per_epoch: int) -> None:
    """64 CTs and 4 X-rays in epochs of 68: ratios of 64:4, 8:2 and 1:1 for alpha 1, 1/2 and 0."""
    sampler = SeededBatchSampler(["ct"] * 64 + ["xray"] * 4, 1, seed=0, alpha=alpha)
    epochs = [[tuple(sample) for sample in sampler.epoch(number).tolist()] for number in range(10)]
    assert [sum(index < 64 for _, index in epoch) for epoch in epochs] == [ct_per_epoch] * 10
    samples = [sample for epoch in epochs for sample in epoch]
    assert len(set(samples)) == len(samples)  # a repeated record has another visit number, so other views
    for stratum in (range(64), range(64, 68)):
        counts = [sum(index == record for _, index in samples) for record in stratum]
        assert max(counts) - min(counts) <= 1


def test_sources_of_a_modality_are_strata_of_their_own() -> None:
    """64 CTs of one source, 4 of another and 16 X-rays in epochs of 84: ratios of 8:2:4 for alpha 1/2."""
    strata = [("ct", "large")] * 64 + [("ct", "small")] * 4 + [("xray", "large")] * 16
    indices = SeededBatchSampler(strata, 1, seed=0, alpha=0.5).epoch(3)[:, 1]
    counts = [((first <= indices) & (indices < end)).sum() for first, end in ((0, 64), (64, 68), (68, 84))]
    assert counts == [48, 12, 24]


@pytest.mark.parametrize(
    ("alpha", "recorded"),
    [(0.5, [0, 0, 5, 4, 1, 6, 7, 2]), (1.0, [4, 1, 6, 7, 0, 2, 3, 5])],
)
def test_one_source_per_modality_gives_the_recorded_order_of_modalities(alpha: float, recorded: list[int]) -> None:
    """Runs that were started before sources were strata can be resumed."""
    by_modality = SeededBatchSampler(["xray"] * 2 + ["ct"] * 6, 1, seed=1, alpha=alpha)
    by_source = SeededBatchSampler([("xray", "a")] * 2 + [("ct", "b")] * 6, 1, seed=1, alpha=alpha)
    for epoch in range(3):
        assert np.array_equal(by_source.epoch(epoch), by_modality.epoch(epoch))
    assert by_source.epoch(1)[:, 1].tolist() == recorded


# 30 scans; every third has ten times the tokens of the others, as a CT among X-rays
TOKENS = np.array([100.0, 10.0, 10.0] * 10)


@pytest.mark.parametrize("blocks", [None, np.arange(30) // 4], ids=["map-style", "streamed"])
@pytest.mark.parametrize(("world_size", "lanes"), [(1, 1), (2, 1), (2, 3)])
def test_token_batches_fill_the_budget_and_drop_no_scan(blocks: np.ndarray | None, world_size: int, lanes: int) -> None:
    samples: list[tuple[int, int]] = []
    latest_epochs = []
    for rank in range(world_size):
        settings = {"rank": rank, "world_size": world_size, "blocks": blocks, "lanes": lanes}
        batches = list(islice(TokenBatchSampler(["ct"] * 30, TOKENS, 150, seed=2, **settings), 60))
        sums = [sum(TOKENS[index] for _, index in batch) for batch in batches]
        assert max(sums) <= 150
        # the first scan of a lane's next batch would not have fitted
        step = lanes if blocks is not None else 1
        for total, following in zip(sums, batches[step:], strict=False):
            assert total + TOKENS[following[0][1]] > 150
        samples += [sample for batch in batches for sample in batch]
        latest_epochs += [max(visit for batch in batches[lane::step] for visit, _ in batch) for lane in range(step)]
    assert len(set(samples)) == len(samples)
    complete = min(latest_epochs)  # the slowest lane is in this epoch, so every lane has finished those before
    assert complete >= 2
    assert sorted(sample for sample in samples if sample[0] < complete) == [
        (visit, index) for visit in range(complete) for index in range(30)
    ]


def test_a_scan_larger_than_the_budget_forms_its_own_batch() -> None:
    batches = list(islice(TokenBatchSampler(["ct"] * 30, TOKENS, 50, seed=2), 40))
    assert all(batches)
    assert all(len(batch) == 1 for batch in batches if any(TOKENS[index] == 100 for _, index in batch))
    assert max(len(batch) for batch in batches) > 1


def test_resumed_token_batches_equal_uninterrupted_ones() -> None:
    settings = {"seed": 4, "rank": 1, "world_size": 2, "blocks": np.arange(30) // 4, "lanes": 2}
    uninterrupted = list(islice(TokenBatchSampler(["ct"] * 30, TOKENS, 150, **settings), 20))
    for start in (1, 4, 13):
        resumed = TokenBatchSampler(["ct"] * 30, TOKENS, 150, **settings, start=start)
        assert list(islice(resumed, 20 - start)) == uninterrupted[start:]


def test_fewer_scans_than_lanes_are_refused() -> None:
    with pytest.raises(InputError, match="stream_lanes"):
        TokenBatchSampler(["ct"] * 7, np.ones(7), 10, seed=0, world_size=2, blocks=np.zeros(7, int), lanes=4)
