"""Loading: batches that do not depend on the workers, and unreadable files that do not stop a run."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from itertools import islice, product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dataset_scripts.row_encoding import encode_nifti
from modeling_m3ret import M3RetImageProcessor, M3RetReadError, Scan
from modeling_m3ret.data.collection import Record, open_collection
from modeling_m3ret.data.loading import (
    MAX_CONSECUTIVE_FAILURES,
    Pack,
    PackLoader,
    RandomViews,
    WholeScans,
    embedding_loader,
    expected_tokens,
    training_loader,
)
from modeling_m3ret.data.parquet import ParquetRow
from modeling_m3ret.data.sampler import SeededBatchSampler
from modeling_m3ret.data.schema import CollectionError, features
from modeling_m3ret.data.views import CropRanges, ViewKind
from modeling_m3ret.evaluation.table import evaluate
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.run_config import RunConfig
from modeling_m3ret.search.embedding import embed_records, pixel_embedder
from modeling_m3ret.worker_process import HAS_SIGWAITINFO


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


def load_packs(records: list[Record], batch_size: int, count: int, workers: int = 0) -> list[Pack]:
    views = RandomViews(records, PROCESSOR, views=[ViewKind(2)], seed=3)
    sampler = SeededBatchSampler(["ct"] * len(records), batch_size, seed=3)
    return list(islice(training_loader(views, sampler, workers), count))


def are_equal(first: Pack, second: Pack) -> bool:
    inputs, others = first.inputs(PROCESSOR), second.inputs(PROCESSOR)
    same = first.scans == second.scans and inputs.keys() == others.keys()
    return same and all(torch.equal(inputs[name], others[name]) for name in inputs)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SIGWAITINFO, reason="the sender of a signal is unknown on this platform")
@pytest.mark.parametrize("start_method", ["", "fork", "spawn"])
def test_workers_exit_on_a_sigterm_of_their_parent_only(records: list[Record], start_method: str) -> None:
    """A scheduler signals the whole process group, and the run still saves; a failed run terminates its workers."""
    views = RandomViews(records, PROCESSOR, views=[ViewKind(1)])
    others = multiprocessing.active_children()
    batches = SeededBatchSampler(["ct"] * len(records), 2, seed=0)
    options = {"multiprocessing_context": start_method} if start_method else {}
    packs = iter(PackLoader(views, 1, batch_sampler=batches, **options))
    next(packs)
    (worker,) = [child for child in multiprocessing.active_children() if child not in others]
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    for _ in range(20):
        next(packs)
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=60)
    assert not worker.is_alive()


FORKSERVER = """
import subprocess, sys
from multiprocessing import active_children
from pathlib import Path
from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.data.collection import Record
from modeling_m3ret.data.loading import PackLoader, WholeScans
if __name__ == "__main__":
    records = [Record("0", Path(sys.argv[1]), "ct", "a", "l", "p")] * 40
    options = {"multiprocessing_context": "forkserver", "persistent_workers": True}
    packs = iter(PackLoader(WholeScans(records, M3RetImageProcessor(size=48)), 1, **options))
    next(packs)
    (worker,) = active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert len(list(packs)) == 39
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=60)
    assert not worker.is_alive()
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SIGWAITINFO, reason="the sender of a signal is unknown on this platform")
def test_workers_of_a_forkserver_exit_on_a_sigterm_of_their_parent_only(records: list[Record], tmp_path: Path) -> None:
    """In a process of its own, in which no forkserver runs yet."""
    script = tmp_path / "forkserver.py"
    script.write_text(FORKSERVER)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(records[0].location)]
    subprocess.run(command, env=environment, check=True, timeout=600)


def test_rows_of_a_pack_are_those_of_the_processor() -> None:
    """Grey and coloured images, clips and volumes; alone and mixed; of 8 bits and of floats.

    With a depth that does not fill its last patch, and colour as decoders store it.
    """
    grey, volume = torch.rand(1, 1, 32, 48), torch.rand(1, 6, 32, 32)
    bits = torch.randint(0, 256, (1, 16, 32, 3), dtype=torch.uint8), torch.randint(0, 256, (5, 16, 48, 3))
    colour, clip = (values.to(torch.uint8).permute(3, 0, 1, 2) for values in bits)
    mixed = [grey, volume, colour, clip, volume]
    for volumes in ([grey], [colour], [grey, colour, grey], [volume], [clip, colour], [clip, grey], mixed):
        pack = Pack.concatenate([Pack.from_scan(index, v, PROCESSOR) for index, v in enumerate(volumes)])
        per_channel = M3RetImageProcessor(size=48, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
        for compact, processor in product((False, True), (PROCESSOR, per_channel)):
            inputs = pack.inputs(processor, compact_images=compact)
            rows, grids = processor.pack([processor.normalise(v) for v in volumes], compact)
            assert torch.equal(inputs["pixel_values"], rows)
            assert torch.equal(inputs["grid_thw"], grids)


@pytest.mark.parametrize("objective", ["mae", "simdino", "mae+simdino", "patch term"])
def test_planned_packs_give_the_loss_of_their_grids_and_noise(records: list[Record], objective: str) -> None:
    settings = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    decoder = {"decoder_hidden_size": 36, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 3}
    patch_term = {"objective": "simdino", "patch_weight": 1.0}
    run = {"preset": "vitt", "local_views": 1, "model": settings | decoder | {"drop_path_rate": 0.5}}
    built, _ = build_objective(
        RunConfig(**run | (patch_term if objective == "patch term" else {"objective": objective}))
    )
    built.train()
    views = RandomViews(records, PROCESSOR, views=built.views, seed=3)
    planned, plain = (
        next(iter(training_loader(views, SeededBatchSampler(["ct"] * len(records), 4, seed=3), 0, plan)))
        for plan in (built.plan, None)
    )
    with_plan = built(**planned.inputs(PROCESSOR, compact_images=True))[0]
    assert torch.equal(with_plan, built(**plain.inputs(PROCESSOR, compact_images=True))[0])


@pytest.mark.slow
def test_training_packs_do_not_depend_on_the_workers(records: list[Record]) -> None:
    without, with_workers = load_packs(records, 3, 5), load_packs(records, 3, 5, workers=2)
    assert all(are_equal(first, second) for first, second in zip(without, with_workers, strict=True))


def test_training_packs_hold_all_views_with_their_noise(records: list[Record]) -> None:
    packs = load_packs(records, 3, 3)
    assert not are_equal(packs[0], packs[2])
    for pack in packs:
        inputs = pack.inputs(PROCESSOR)
        assert len(pack.scans) == len(inputs["grid_thw"]) == 6
        assert len(inputs["pixel_values"]) == len(inputs["noise"]) == int(inputs["grid_thw"].prod(-1).sum())


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_views_are_mirrored_with_their_probability_and_leave_the_cached_scan_unchanged(
    tmp_path: Path, dtype: type
) -> None:
    """Whole scans at their own size: a view has exactly the values of the scan, in order or mirrored."""
    values = np.random.default_rng(0).integers(0, 255, (48, 48)) / (1 if dtype == np.uint8 else 255)
    np.save(tmp_path / "scan.npy", values.astype(dtype))
    record = Record("0", tmp_path / "scan.npy", "xray", "", "", "p")
    whole = CropRanges(area=(1.0, 1.0), aspect=(1.0, 1.0))
    expected = Pack.from_scan(0, PROCESSOR.resample(PROCESSOR.read(record.open())), PROCESSOR).values
    mirrored = PROCESSOR.resample(PROCESSOR.read(np.load(record.location)[:, ::-1].copy()))
    mirrored = Pack.from_scan(0, mirrored, PROCESSOR).values
    for probability, wanted in ((0.0, expected), (1.0, mirrored)):
        kinds = [ViewKind(2, whole, jitter=None, flip_probability=probability)]
        views = RandomViews([record], PROCESSOR, views=kinds, cache_bytes=2**20)
        for visit in range(2):
            for view in views[visit, 0].values.split(len(wanted)):
                assert torch.allclose(view, wanted, atol=1e-6)


def test_a_jpeg_keeps_the_pixels_that_the_smallest_crop_of_each_view_needs(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((512, 512), np.uint8)).save(tmp_path / "scan.jpg")
    record = Record("0", tmp_path / "scan.jpg", "xray", "", "", "p")
    read = []

    class Observed(M3RetImageProcessor):
        def resample(self, scan: Scan, **settings: int | None) -> torch.Tensor:
            read.append(scan.array)
            return super().resample(scan, **settings)

    whole = CropRanges(area=(1.0, 1.0), aspect=(1.0, 1.0))
    for area, size, expected in ((1.0, 64, 64), (0.25, 64, 128), (0.24, 64, 256), (1.0, None, 64), (0.05, 96, 512)):
        kinds = [ViewKind(1, whole, 16), ViewKind(1, CropRanges(area=(area, 1.0)), size)]
        views = RandomViews([record], Observed(size=48), views=kinds)
        _ = views[0, 0]
        assert read[-2].shape == (1, 1, expected, expected)


@pytest.mark.slow
def test_expected_tokens_are_the_mean_of_sampled_views(tmp_path: Path) -> None:
    """For an image, a clip of many frames, a volume, and a volume in HU of unknown spacing, which is read whole."""
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
        volume = {"bytes": encode_nifti(voxels, spacing), "path": None}
        declared = {"id": str(len(rows)), "modality": 0, "patient": "p", "shape": shape, "spacing": spacing}
        rows.append({"volume": volume, "intensity": intensity} | declared)
    (tmp_path / "data").mkdir()
    shard = tmp_path / "data" / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows, features().arrow_schema), shard)

    records = open_collection(tmp_path)
    views = RandomViews(records, processor, views=kinds, cache_bytes=2**30)
    expected = expected_tokens(records, processor, kinds, prefix=5)
    for index in range(len(records)):
        counts = [
            sum(5 + np.prod(processor.grid_shape(shape)) for shape in views[visit, index].shapes) for visit in range(40)
        ]
        assert expected[index] == pytest.approx(np.mean(counts), rel=0.1), records[index].id


def test_a_dataset_takes_32_bytes_for_each_row_of_parquet() -> None:
    """Records are objects of hundreds of bytes, and each worker that reads one gets a copy of its memory page."""
    datasets = []
    for count in (1_000, 2_000):
        rows = [ParquetRow(f"train-{i // 500}.parquet", i // 64, i % 64, 10_000 + i) for i in range(count)]
        records = [Record(f"id{i}", row, "xray", "chest", "a", f"p{i}") for i, row in enumerate(rows)]
        datasets.append([RandomViews(records, PROCESSOR, views=[ViewKind(1)]), WholeScans(records, PROCESSOR)])
    for small, large in zip(*datasets, strict=True):
        assert (len(pickle.dumps(large)) - len(pickle.dumps(small))) / 1_000 < 33


def test_expected_tokens_need_the_shape_of_every_scan() -> None:
    with pytest.raises(CollectionError, match="'b'"):
        expected_tokens([Record("b", Path("b"), "ct", "", "", "p")], PROCESSOR, [ViewKind(1)], prefix=5)


def test_an_unreadable_file_is_reported_and_replaced_in_training(records: list[Record]) -> None:
    records[2].location.write_bytes(b"not an array")
    packs = load_packs(records, 4, 2)
    assert [len(pack.scans) for pack in packs] == [8, 8]
    ((index, message),) = [failure for pack in packs for failure in pack.failures]
    assert index == 2
    assert "2.npy" in message


def test_an_unreadable_file_is_reported_and_left_out_in_embedding(records: list[Record]) -> None:
    records[2].location.write_bytes(b"not an array")
    pixels = embed_records([pixel_embedder(PROCESSOR)], PROCESSOR, records, max_tokens=12, progress=False)[0]
    assert [record.id for record in pixels.records] == ["0", "1", "3", "4", "5", "6", "7"]
    assert len(pixels.embeddings) == 7
    assert len(pixels.failures) == 1


def test_many_unreadable_files_in_a_row_stop_the_run(records: list[Record]) -> None:
    for record in records:
        record.location.unlink()
    assert len(records * 4) > MAX_CONSECUTIVE_FAILURES
    with pytest.raises(M3RetReadError):
        RandomViews(records * 4, PROCESSOR, views=[ViewKind(1)])[0, 0]


def test_whole_scans_come_in_order_with_the_values_of_the_processor(records: list[Record]) -> None:
    packs = list(embedding_loader(WholeScans(records, PROCESSOR), 3, 0))
    assert [index for pack in packs for index in pack.scans] == list(range(8))
    inputs = packs[1].inputs(PROCESSOR)
    counts = inputs["grid_thw"].prod(-1).tolist()
    assert torch.equal(inputs["pixel_values"].split(counts)[1], PROCESSOR(records[4].location)["pixel_values"])


def test_embedding_no_records_gives_an_empty_table() -> None:
    pixels = embed_records([pixel_embedder(PROCESSOR)], PROCESSOR, [], progress=False)[0]
    assert (len(pixels.embeddings), pixels.records, pixels.failures) == (0, [], [])
    assert evaluate({"pixels": pixels}) == []


def test_a_cached_scan_is_read_once_and_gives_the_same_views(
    records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    uncached = RandomViews(records, PROCESSOR, views=[ViewKind(2)])
    expected = [uncached[visit, 0] for visit in range(2)]
    read: list[Path] = []
    original = M3RetImageProcessor.read
    monkeypatch.setattr(
        M3RetImageProcessor,
        "read",
        lambda self, source, **options: read.append(source) or original(self, source, **options),
    )
    one_image = 20_000  # bytes: one image of 50 x 60 float32 fits, two do not
    cached = RandomViews(records, PROCESSOR, views=[ViewKind(2)], cache_bytes=one_image)
    for visit in range(2):
        assert are_equal(cached[visit, 0], expected[visit])
    assert len(read) == 1
    for visit in range(2):
        _ = cached[visit, 3]
    assert len(read) == 3
