"""Batches: the same whatever the workers, disjoint between ranks, and never stopped by one bad file."""

from __future__ import annotations

import signal
import subprocess
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dataset_scripts.row_encoding import nifti_bytes
from modeling_m3ret import M3RetImageProcessor, M3RetReadError
from modeling_m3ret.data.collection import CollectionError, Record, open_collection
from modeling_m3ret.data.loading import (
    MAX_CONSECUTIVE_FAILURES,
    Pack,
    RandomViews,
    WholeScans,
    embedding_loader,
    expected_tokens,
    training_loader,
)
from modeling_m3ret.data.sampler import SeededBatchSampler
from modeling_m3ret.data.schema import features
from modeling_m3ret.data.views import CropRanges, ViewKind
from modeling_m3ret.evaluation.table import evaluate
from modeling_m3ret.search.embedding import embed_records, pixel_embedder


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


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="here a signal does not tell who sent it")
def test_a_worker_ends_by_a_sigterm_of_its_parent_and_of_no_one_else(records: list[Record]) -> None:
    """A scheduler sends it to all of a run, which still saves; a run that fails sends it at its end, and waits."""
    views = RandomViews(records, PROCESSOR, views=[ViewKind(1)])
    packs = iter(training_loader(views, SeededBatchSampler(["ct"] * len(records), 2, seed=0), 1))
    next(packs)
    (worker,) = packs._workers
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    for _ in range(20):
        next(packs)
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=10)
    assert not worker.is_alive()


def test_training_batches_do_not_depend_on_the_workers(records: list[Record]) -> None:
    def packs(workers: int) -> list[Pack]:
        views = RandomViews(records, PROCESSOR, views=[ViewKind(2)], seed=3)
        return list(islice(training_loader(views, SeededBatchSampler(["ct"] * len(records), 3, seed=3), workers), 5))

    alone, with_workers = packs(0), packs(2)
    assert all(equal(one, other) for one, other in zip(alone, with_workers, strict=True))
    assert not equal(alone[0], alone[2])
    for pack in alone:
        inputs = pack.inputs(PROCESSOR)
        assert len(pack.scans) == len(inputs["grid_thw"]) == 6
        assert len(inputs["pixel_values"]) == len(inputs["noise"]) == int(inputs["grid_thw"].prod(-1).sum())


def test_expected_tokens_are_those_that_views_have_on_the_mean(tmp_path: Path) -> None:
    """Of an image, a clip of many frames, a volume, and one in HU of unknown spacing, which reading leaves whole.

    Within a tenth of what 80 draws really have.
    """
    processor = M3RetImageProcessor(size=48, num_frames=16)
    deep, flat = CropRanges((0.4, 1.0)), CropRanges((0.05, 0.4), depth=(0.2, 0.5), single_slice_probability=0.5)
    kinds = [ViewKind(2, deep, 64), ViewKind(3, flat, 32)]
    generator = np.random.default_rng(0)
    unknown = (None, None, None)
    rows = []
    for shape, spacing, intensity in [
        ((1, 60, 80), unknown, "8-bit"),
        ((100, 60, 60), unknown, "8-bit"),
        ((24, 50, 50), (2.0, 1.0, 1.0), "8-bit"),
        ((60, 50, 50), unknown, "hounsfield"),
    ]:
        voxels = generator.integers(0, 255, (1, *shape)).astype(np.int16 if intensity == "hounsfield" else np.uint8)
        volume = {"bytes": nifti_bytes(voxels, spacing), "path": None}
        told = {"id": str(len(rows)), "modality": 0, "patient": "p", "shape": shape, "spacing": spacing}
        rows.append({"volume": volume, "intensity": intensity} | told)
    (tmp_path / "data").mkdir()
    shard = tmp_path / "data" / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows, features().arrow_schema), shard)

    records = open_collection(tmp_path)
    views = RandomViews(records, processor, views=kinds, cache_bytes=2**30)
    expected = expected_tokens(records, processor, kinds, prefix=5)
    for index in range(len(records)):
        drawn = [
            sum(5 + np.prod(processor.grid_shape(view.volume.shape)) for view in views[turn, index])
            for turn in range(80)
        ]
        assert expected[index] == pytest.approx(np.mean(drawn), rel=0.1), records[index].id
    with pytest.raises(CollectionError, match="'b' has no shape"):
        expected_tokens([Record("b", tmp_path / "b", "ct", "", "", "p")], processor, kinds, prefix=5)


def test_one_bad_file_is_counted_and_stops_nothing(records: list[Record]) -> None:
    records[2].location.write_bytes(b"not an array")
    views = RandomViews(records, PROCESSOR, views=[ViewKind(2)])
    packs = list(islice(training_loader(views, SeededBatchSampler(["ct"] * 8, 4, seed=0), 0), 2))
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
        record.location.unlink()
    with pytest.raises(M3RetReadError):
        RandomViews(records * 4, PROCESSOR, views=[ViewKind(1)])[0, 0]
    assert len(records * 4) > MAX_CONSECUTIVE_FAILURES


def test_whole_scans_come_in_order(records: list[Record]) -> None:
    packs = list(embedding_loader(WholeScans(records, PROCESSOR), 3, 2))
    assert [index for pack in packs for index in pack.scans] == list(range(8))
    alone = PROCESSOR(records[4].location)
    together = packs[1].inputs(PROCESSOR)
    counts = together["grid_thw"].prod(-1).tolist()
    assert torch.equal(together["pixel_values"].split(counts)[1], alone["pixel_values"])


def test_nothing_to_embed_gives_nothing() -> None:
    pixels = embed_records([pixel_embedder(PROCESSOR)], PROCESSOR, [], progress=False)[0]
    assert (len(pixels.embeddings), pixels.records, pixels.failures) == (0, [], [])
    assert evaluate({"pixels": pixels}) == []


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
