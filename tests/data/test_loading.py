"""Batches: the same whatever the workers, disjoint between ranks, and never stopped by one bad file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_m3ret import M3RetImageProcessor, M3RetReadError, Scan
from modeling_m3ret.data.collection import Record
from modeling_m3ret.data.loading import (
    MOST_FAILURES_IN_A_ROW,
    Pack,
    RandomViews,
    SeededBatches,
    WholeScans,
    embedding_loader,
    training_loader,
)
from modeling_m3ret.data.views import CropRanges, ViewKind, random_crop
from modeling_m3ret.retrieval.embed import embed_records, pixel_embedder
from modeling_m3ret.retrieval.evaluation import evaluate


PROCESSOR = M3RetImageProcessor(size=48, num_frames=8)


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    generator = np.random.default_rng(0)
    made = []
    for number in range(8):
        path = tmp_path / f"{number}.npy"
        np.save(path, generator.random((1 + 3 * (number % 3), 50, 60), dtype=np.float32))
        made.append(Record(str(number), path, "ct", "a", "l", f"p{number}"))
    return made


def equal(one: Pack, other: Pack) -> bool:
    mine, theirs = one.inputs(PROCESSOR), other.inputs(PROCESSOR)
    return (
        one.scans == other.scans and mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    )


def test_training_batches_do_not_depend_on_the_workers(records: list[Record]) -> None:
    def packs(workers: int) -> list[Pack]:
        views = RandomViews(records, PROCESSOR, views=[ViewKind(2)], seed=3)
        return list(islice(training_loader(views, SeededBatches(["ct"] * len(records), 3, seed=3), workers), 5))

    alone, with_workers = packs(0), packs(2)
    assert all(equal(one, other) for one, other in zip(alone, with_workers, strict=True))
    assert not equal(alone[0], alone[2])
    for pack in alone:
        inputs = pack.inputs(PROCESSOR)
        assert len(pack.scans) == len(inputs["grid_thw"]) == 6
        assert len(inputs["pixel_values"]) == len(inputs["noise"]) == int(inputs["grid_thw"].prod(-1).sum())


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


def test_one_bad_file_is_counted_and_stops_nothing(records: list[Record]) -> None:
    records[2].place.write_bytes(b"not an array")
    views = RandomViews(records, PROCESSOR, views=[ViewKind(2)])
    packs = list(islice(training_loader(views, SeededBatches(["ct"] * 8, 4, seed=0), 0), 2))
    assert [len(pack.scans) for pack in packs] == [8, 8]  # the neighbour stands in
    failures = [failure for pack in packs for failure in pack.failures]
    assert [index for index, _ in failures] == [2]
    assert "2.npy" in failures[0][1]

    pixels = embed_records([pixel_embedder(PROCESSOR)], PROCESSOR, records, max_tokens=12, progress=False)[0]
    assert [record.id for record in pixels.records] == ["0", "1", "3", "4", "5", "6", "7"]
    assert len(pixels.embeddings) == 7
    assert len(pixels.failures) == 1


def test_a_disk_that_is_gone_does_stop_the_run(records: list[Record]) -> None:
    for record in records:
        record.place.unlink()
    with pytest.raises(M3RetReadError):
        RandomViews(records * 4, PROCESSOR, views=[ViewKind(1)])[0, 0]
    assert len(records * 4) > MOST_FAILURES_IN_A_ROW


def test_whole_scans_come_in_order(records: list[Record]) -> None:
    packs = list(embedding_loader(WholeScans(records, PROCESSOR), 3, 2))
    assert [index for pack in packs for index in pack.scans] == list(range(8))
    alone = PROCESSOR(records[4].place)
    together = packs[1].inputs(PROCESSOR)
    counts = together["grid_thw"].prod(-1).tolist()
    assert torch.equal(together["pixel_values"].split(counts)[1], alone["pixel_values"])


def test_nothing_to_embed_gives_nothing() -> None:
    pixels = embed_records([pixel_embedder(PROCESSOR)], PROCESSOR, [], progress=False)[0]
    assert (len(pixels.embeddings), pixels.records, pixels.failures) == (0, [], [])
    assert evaluate({"pixels": pixels}) == []


def test_crops_lie_inside_and_span_their_ranges() -> None:
    scan = Scan(np.arange(20 * 60 * 80, dtype=np.float32).reshape(1, 20, 60, 80), (1.0, 1.0, 1.0), {})
    generator = np.random.default_rng(0)
    areas, depths = [], []
    for _ in range(300):
        crop = random_crop(scan, CropRanges(), generator)
        _, depth, height, width = crop.array.shape
        assert np.shares_memory(crop.array, scan.array)
        assert crop.spacing == scan.spacing
        areas.append(height * width / 4800)
        depths.append(depth / 20)
    assert 0.15 < min(areas) < 0.25
    assert 0.9 < max(areas) <= 1
    assert 0.5 <= min(depths) < 0.6
    assert 0.9 < max(depths) <= 1
    assert np.mean(areas) == pytest.approx(0.6, abs=0.05)


def test_a_cached_scan_is_read_once_and_gives_the_same_views(
    records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = RandomViews(records, PROCESSOR, views=[ViewKind(2)])
    expected = [fresh[epoch, 0] for epoch in range(2)]
    read: list[Path] = []
    original = M3RetImageProcessor.read
    monkeypatch.setattr(M3RetImageProcessor, "read", lambda self, source: read.append(source) or original(self, source))
    one_image = 20_000  # bytes: holds one of 50 x 60 float32, not two
    cached = RandomViews(records, PROCESSOR, views=[ViewKind(2)], cache_bytes=one_image)
    for epoch in range(2):
        for mine, theirs in zip(cached[epoch, 0], expected[epoch], strict=True):
            assert torch.equal(mine.volume, theirs.volume)
            assert torch.equal(mine.noise, theirs.noise)
    assert len(read) == 1
    for epoch in range(2):
        _ = cached[epoch, 3]
    assert len(read) == 3
