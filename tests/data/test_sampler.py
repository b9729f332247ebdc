"""The order of training: each scan once an epoch, a function of the seed alone; batches of a size or of a budget."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from modeling_m3ret.data.sampler import SeededBatches, TokenBatches


@pytest.mark.parametrize("blocks", [None, np.arange(20) // 3], ids=["map style", "streamed"])
@pytest.mark.parametrize(("processes", "lanes"), [(1, 1), (2, 1), (2, 4), (3, 2)])
def test_each_scan_is_seen_once_an_epoch_by_one_rank(blocks: np.ndarray | None, processes: int, lanes: int) -> None:
    """Epochs follow each other in the middle of a batch: 20 scans, 3 a batch, so 60 are three epochs of 20 batches."""
    ranks = [
        SeededBatches(["ct"] * 14 + ["xray"] * 6, 3, seed=1, process=p, processes=processes, blocks=blocks, lanes=lanes)
        for p in range(processes)
    ]
    by_turn: list[list[list[tuple[int, int]]]] = list(zip(*(islice(rank, 20) for rank in ranks), strict=True))
    keys = [key for step in by_turn for batch in step for key in batch]
    for epoch in range(len(keys) // 20):
        assert sorted(keys[20 * epoch : 20 * epoch + 20]) == [(epoch, index) for index in range(20)]
    assert [index for _, index in keys[:20]] != [index for _, index in keys[20:40]]


def test_too_few_scans_for_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fill one batch"):
        SeededBatches(["ct"] * 5, 3, seed=0, processes=2)


def test_map_style_batches_do_not_depend_on_the_number_of_ranks() -> None:
    """Two ranks with half the batch see together what one sees."""
    alone = islice(SeededBatches(["ct"] * 22, 4, seed=1), 11)
    pair = [SeededBatches(["ct"] * 22, 2, seed=1, process=rank, processes=2) for rank in range(2)]
    for batch, *halves in zip(alone, *pair, strict=False):
        assert batch == halves[0] + halves[1]


def test_streaming_fetches_each_block_by_one_worker_and_at_one_time() -> None:
    """400 scans in 40 blocks of 10 that hold two modalities each; 2 ranks of 4 lanes, batch 5, 2 workers.

    A piece of an epoch is 50 scans, five blocks and two that it shares with its neighbours at the ends.
    """
    blocks = np.arange(400) // 10
    modalities = ["ct", "xray"] * 200
    of_worker: dict[tuple[int, int], list[int]] = {}
    for rank in range(2):
        batches = SeededBatches(modalities, 5, seed=3, process=rank, processes=2, blocks=blocks, lanes=4)
        for number, batch in enumerate(islice(batches, 40)):
            of_worker.setdefault((rank, number % 2), []).extend(int(blocks[index]) for _, index in batch)
    assert [len(seen) for seen in of_worker.values()] == [100] * 4
    # a window of 4 blocks and those at the ends of two pieces: 10 to read, and at most some of three windows more
    assert all(len(set(seen)) <= 10 + 3 * SeededBatches.WINDOW for seen in of_worker.values())
    # where all workers share one sequence, each meets nearly all blocks
    shared = SeededBatches(modalities, 5, seed=3, blocks=blocks, lanes=1)
    halves = [[int(blocks[i]) for batch in list(islice(shared, 80))[w::2] for _, i in batch] for w in range(2)]
    assert all(len(set(half)) == 40 for half in halves)
    # one time: from a block's first scan to its last, in the sequence of one lane, no more than two windows pass
    lane = [int(blocks[i]) for batch in list(islice(shared, 80)) for _, i in batch]
    for block in range(40):
        places = [place for place, own in enumerate(lane) if own == block]
        assert places[-1] - places[0] < 2 * SeededBatches.WINDOW * 10


def test_the_streaming_order_is_a_shuffle() -> None:
    """Neither blocks nor the scans within a window come in their order, and it differs between epochs and seeds."""
    blocks = np.arange(300) // 10

    def order(seed: int, epoch: int) -> np.ndarray:
        return SeededBatches(["ct"] * 300, 5, seed=seed, blocks=blocks, lanes=2).epoch(epoch)[:, 1]

    one = order(0, 0)
    assert abs(np.corrcoef(one, np.arange(300))[0, 1]) < 0.4  # of 30 blocks: two standard errors
    assert (np.diff(blocks[one]) != 0).mean() > 0.6  # of four blocks, three of four neighbours lie in another
    assert (one != order(0, 1)).mean() > 0.9
    assert (one != order(1, 0)).mean() > 0.9


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_batches_go_on_from_any_number(alpha: float) -> None:
    modalities = ["ct"] * 13 + ["xray"] * 5
    for blocks in (None, np.arange(18) // 4):
        settings = {"seed": 4, "alpha": alpha, "process": 1, "processes": 2, "blocks": blocks, "lanes": 2}
        whole = list(islice(SeededBatches(modalities, 2, **settings), 20))
        for start in (1, 4, 7, 13):
            rest = SeededBatches(modalities, 2, **settings, start=start)
            assert list(islice(rest, 20 - start)) == whole[start:]


def test_a_mixture_gives_each_modality_its_power_and_no_record_more_than_another() -> None:
    """64 CTs and 4 X-rays: parts of 64:4, 8:2 and 1:1 for alpha 1, 1/2 and 0, of epochs of 68."""
    modalities = ["ct"] * 64 + ["xray"] * 4
    for alpha, of_ct in ((1.0, 64), (0.5, 54), (0.0, 34)):
        batches = SeededBatches(modalities, 1, seed=0, alpha=alpha)
        epochs = [[tuple(key) for key in batches.epoch(number).tolist()] for number in range(10)]
        assert [sum(index < 64 for _, index in epoch) for epoch in epochs] == [of_ct] * 10
        keys = [key for epoch in epochs for key in epoch]
        assert len(set(keys)) == len(keys)  # a record that comes again comes with other views
        for deck in (range(64), range(64, 68)):
            times = [sum(index == record for _, index in keys) for record in deck]
            assert max(times) - min(times) <= 1


def test_a_mixture_gives_each_source_of_a_modality_its_power() -> None:
    """64 CTs of one source, 4 of another, 16 X-rays: parts of 8:2:4 for alpha 1/2, of epochs of 84."""
    decks = [("ct", "large")] * 64 + [("ct", "small")] * 4 + [("xray", "large")] * 16
    dealt = SeededBatches(decks, 1, seed=0, alpha=0.5).epoch(3)[:, 1]
    assert [((first <= dealt) & (dealt < end)).sum() for first, end in ((0, 64), (64, 68), (68, 84))] == [48, 12, 24]


@pytest.mark.parametrize(
    ("alpha", "recorded"),
    [(0.5, [0, 0, 5, 4, 1, 6, 7, 2]), (1.0, [4, 1, 6, 7, 0, 2, 3, 5])],
)
def test_one_source_a_modality_changes_nothing(alpha: float, recorded: list[int]) -> None:
    """Whatever its name: the order is the one recorded before sources counted, so that runs from then go on."""
    by_modality = SeededBatches(["xray"] * 2 + ["ct"] * 6, 1, seed=1, alpha=alpha)
    by_source = SeededBatches([("xray", "a")] * 2 + [("ct", "b")] * 6, 1, seed=1, alpha=alpha)
    for epoch in range(3):
        assert np.array_equal(by_source.epoch(epoch), by_modality.epoch(epoch))
    assert by_source.epoch(1)[:, 1].tolist() == recorded


# 30 scans of which every third has ten times the tokens of the others, as a CT beside X-rays
TOKENS = np.array([100.0, 10.0, 10.0] * 10)


@pytest.mark.parametrize("blocks", [None, np.arange(30) // 4], ids=["map style", "streamed"])
@pytest.mark.parametrize(("processes", "lanes"), [(1, 1), (2, 1), (2, 3)])
def test_a_budget_fills_batches_with_tokens_and_leaves_no_scan_out(
    blocks: np.ndarray | None, processes: int, lanes: int
) -> None:
    keys: list[tuple[int, int]] = []
    whole_epochs = []
    for process in range(processes):
        settings = {"process": process, "processes": processes, "blocks": blocks, "lanes": lanes}
        own = list(islice(TokenBatches(["ct"] * 30, TOKENS, 150, seed=2, **settings), 60))
        sums = [sum(TOKENS[index] for _, index in batch) for batch in own]
        assert max(sums) <= 150
        # greedy: a batch and the first scan of its lane's next one are too much together
        step = lanes if blocks is not None else 1
        for batch, following in zip(own, own[step:], strict=False):
            assert sum(TOKENS[index] for _, index in batch) + TOKENS[following[0][1]] > 150
        keys += [key for batch in own for key in batch]
        whole_epochs += [max(turn for batch in own[lane::step] for turn, _ in batch) for lane in range(step)]
    assert len(set(keys)) == len(keys)
    epochs = min(whole_epochs)  # the slowest lane is in this one, so all before it are over in every lane
    assert epochs >= 2
    assert sorted(key for key in keys if key[0] < epochs) == [
        (turn, scan) for turn in range(epochs) for scan in range(30)
    ]


def test_a_scan_beyond_the_budget_stands_alone_and_a_batch_is_never_empty() -> None:
    batches = list(islice(TokenBatches(["ct"] * 30, TOKENS, 50, seed=2), 40))
    assert all(batches)
    assert all(len(batch) == 1 for batch in batches if any(TOKENS[index] == 100 for _, index in batch))
    assert max(len(batch) for batch in batches) > 1


def test_budget_batches_go_on_from_any_number() -> None:
    settings = {"seed": 4, "process": 1, "processes": 2, "blocks": np.arange(30) // 4, "lanes": 2}
    whole = list(islice(TokenBatches(["ct"] * 30, TOKENS, 150, **settings), 20))
    for start in (1, 4, 13):
        rest = TokenBatches(["ct"] * 30, TOKENS, 150, **settings, start=start)
        assert list(islice(rest, 20 - start)) == whole[start:]


def test_fewer_scans_than_lanes_are_refused() -> None:
    with pytest.raises(ValueError, match="less than 4 lanes x 2 processes"):
        TokenBatches(["ct"] * 7, np.ones(7), 10, seed=0, processes=2, blocks=np.zeros(7, int), lanes=4)
