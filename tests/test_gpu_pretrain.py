"""Pretraining on a bare GPU machine: the packed corpus, views rendered on the device, and pieces of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bare_machine import ROOT, make_site, run_bare
from scipy.ndimage import gaussian_filter
from torch import Tensor
from transformers import AutoModel

from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.data.views import GLOBAL_CROPS, Jitter, ViewKind
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.run_config import RunConfig


sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu_corpus import PackedScan, read_corpus, write_corpus
from gpu_pretrain import join_files, split_files
from gpu_views import Store, ViewGroup, ViewSampler, change_intensity, jitter_numbers, render_views


SHAPES = [(1, 1, 48, 32), (3, 1, 32, 48), (1, 8, 32, 32), (3, 4, 16, 32), (1, 1, 48, 32)]


def smooth_volumes() -> list[Tensor]:
    """Return a grey image, a colour image, volumes and a clip, whose neighbouring pixels are similar."""
    coarse = [torch.rand(C, D, H // 8, W // 8) for C, D, H, W in SHAPES]
    fine = [
        torch.nn.functional.interpolate(each, size=shape[2:], mode="bilinear")
        for each, shape in zip(coarse, SHAPES, strict=True)
    ]
    return [(255 * each).round().to(torch.uint8) for each in fine]


def packed_scans() -> list[PackedScan]:
    return [PackedScan(str(number), "xray", "a", shape) for number, shape in enumerate(SHAPES)]


def test_corpus_keeps_scans_up_to_the_compression(tmp_path: Path) -> None:
    volumes, path = smooth_volumes(), tmp_path / "corpus.safetensors"
    write_corpus(path, packed_scans(), iter(volumes), quality=2)
    scans, read = read_corpus(path)
    assert scans == packed_scans()
    for volume, other in zip(volumes, read, strict=True):
        assert other.dtype == torch.uint8
        assert other.shape == volume.shape
        assert (other.float() - volume.float()).pow(2).mean().sqrt() < 8
    assert path.stat().st_size < sum(volume.numel() for volume in volumes)


def test_corpus_of_flat_scans_is_exact(tmp_path: Path) -> None:
    volumes = [torch.full(shape, 8 * number, dtype=torch.uint8) for number, shape in enumerate(SHAPES, 1)]
    write_corpus(tmp_path / "corpus", packed_scans(), iter(volumes), quality=2)
    _, read = read_corpus(tmp_path / "corpus")
    for volume, other in zip(volumes, read, strict=True):
        assert (other.int() - volume.int()).abs().max() <= 1


def test_whole_scans_give_the_rows_of_the_processor() -> None:
    """In the given order, although views of one shape are rendered together."""
    processor, volumes = M3RetImageProcessor(), smooth_volumes()
    store = Store.from_volumes(packed_scans(), volumes, torch.device("cpu"))
    chosen = np.array([3, 0, 2, 1, 4, 0])
    pack = store.render(store.whole_scans(processor, chosen))
    inputs = pack.inputs(processor, compact_images=True)
    rows, grids = processor.pack([volumes[index] / 127.5 - 1 for index in chosen])
    assert torch.equal(inputs["grid_thw"], grids)
    torch.testing.assert_close(inputs["pixel_values"], rows, atol=1e-6, rtol=0)


@pytest.mark.parametrize("flip", [False, True])
def test_crop_is_resized_as_by_torch(flip: bool) -> None:
    """Away from the border of the crop, beyond which the renderer still sees the scan."""
    volume = smooth_volumes()[0]
    store = Store.from_volumes(packed_scans()[:1], [volume], torch.device("cpu"))
    group = ViewGroup(
        (1, 1, 32, 32),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.tensor([[48, 32]]),
        torch.tensor([[8.0, 4.0, 20.0, 24.0]]),
        torch.tensor([flip]),
        None,
    )
    view = render_views(store.voxels, group)[0, :, 0]
    crop = volume[:, :, 8:28, 4:28].float() / 255
    expected = torch.nn.functional.interpolate(crop, size=(32, 32), mode="bilinear")[:, 0]
    expected = expected.flip(-1) if flip else expected
    torch.testing.assert_close(view[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], atol=1e-5, rtol=0)


def test_intensity_changes_are_their_definitions() -> None:
    views = torch.rand(3, 3, 2, 16, 16)
    unchanged = torch.tensor([[1.0, 0, 1, 1, 1, 1, 1, 0, 0, 1e-3]]).repeat(3, 1)
    generator = torch.Generator()
    torch.testing.assert_close(change_intensity(views, unchanged, generator), views, atol=1e-6, rtol=0)
    numbers = unchanged.clone()
    numbers[0, 9] = 1.0  # blur
    numbers[1, 7] = 1.0  # grey
    numbers[2, :3] = torch.tensor([0.5, 0.1, 2.0])  # contrast, brightness, gamma
    blurred, grey, changed = change_intensity(views, numbers, generator)
    expected = torch.from_numpy(gaussian_filter(views[0].numpy(), (0, 0, 1, 1), mode="nearest", truncate=3))
    torch.testing.assert_close(blurred, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(grey, views[1].mean(0, keepdim=True).expand(3, -1, -1, -1), atol=1e-5, rtol=0)
    squares = views[2] ** 2
    expected = ((squares - squares.mean()) * 0.5 + squares.mean() + 0.1).clamp(0, 1)
    torch.testing.assert_close(changed, expected, atol=1e-5, rtol=0)


def test_intensity_changes_are_drawn_as_described() -> None:
    jitter, random = Jitter(), np.random.default_rng(0).random((4000, 2, 14))
    numbers = jitter_numbers(random, [ViewKind(1, jitter=jitter), ViewKind(1)])
    changed, unchanged = numbers[:, 0], numbers[:, 1]
    assert np.ptp(unchanged, axis=0).max() == 0
    ranges = [jitter.contrast, jitter.brightness, jitter.gamma, *[jitter.white_balance] * 3, jitter.saturation]
    for column, (low, high) in enumerate(ranges):
        values = changed[:, column]
        assert low <= values.min() < values.max() <= high
        assert np.mean(values != unchanged[0, column]) == pytest.approx(jitter.probability, abs=0.03)
    for column, probability in (
        (7, jitter.grey_probability),
        (8, jitter.noise_probability),
        (9, jitter.blur_probability),
    ):
        assert np.mean(changed[:, column] != unchanged[0, column]) == pytest.approx(probability, abs=0.03)


def test_drawn_views_stay_inside_their_scan_and_keep_its_aspect() -> None:
    run = RunConfig(objective="simdino", preset="vitt", model={"num_hidden_layers": 1}, size=32, local_size=32)
    objective, _ = build_objective(run)
    store = Store.from_volumes(packed_scans(), smooth_volumes(), torch.device("cpu"))
    sampler = ViewSampler(store.without_voxels(), M3RetImageProcessor(size=32), objective.views, objective.plan, seed=0)
    keys = [(visit, index) for visit in range(8) for index in range(len(SHAPES))]
    batch = sampler[7, keys]
    areas = []
    for group in batch.groups:
        top, left, height, width = group.boxes.T
        assert (group.boxes >= 0).all()
        assert (top + height <= group.sizes[:, 0] + 1e-4).all()
        assert (left + width <= group.sizes[:, 1] + 1e-4).all()
        _, _, h, w = group.shape
        torch.testing.assert_close(height / width, torch.full_like(height, h / w), rtol=1e-4, atol=0)
        areas.append(height * width / group.sizes.prod(1))
    assert torch.cat(areas).max() <= GLOBAL_CROPS.area[1]
    assert {group.shape[1] for group in batch.groups} == {1, 4, 8}
    pack = store.render(batch)
    assert 0 <= pack.values.min() < pack.values.max() <= 1
    assert len(pack.shapes) == len(keys) * (2 + run.local_views)
    again = store.render(sampler[7, keys])
    assert torch.equal(pack.values, again.values)  # all draws follow from seed, batch and keys
    loss, _ = objective(**pack.inputs(sampler.processor, compact_images=True))
    assert torch.isfinite(loss)


def test_joined_files_are_those_that_were_split(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(1000)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "large").write_bytes(content)
    (folder / "small").write_bytes(b"x")
    split_files(folder, limit=300)
    assert all(path.stat().st_size <= 300 for path in folder.iterdir())
    join_files(folder, tmp_path / "joined")
    assert (tmp_path / "joined" / "large").read_bytes() == content
    (folder / "large.part02").unlink()
    with pytest.raises(SystemExit):
        join_files(folder, tmp_path / "again")


OPTIONS = {
    "objective": "simdino",
    "preset": "vitt",
    "model": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96},
    "size": 32,
    "local_size": 16,
    "local_views": 2,
    "batch_size": 4,
    "steps": 6,
    "log_every": 1,
    "precision": "bf16",
}


@pytest.mark.slow
def test_run_in_pieces_exports_the_encoder_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """On a bare machine; then the export becomes a checkpoint for `from_pretrained`."""
    site = make_site(tmp_path / "site")
    script = str(ROOT / "benchmarks" / "gpu_pretrain.py")
    write_corpus(tmp_path / "corpus", packed_scans(), iter(smooth_volumes()), quality=2)

    def train(name: str, workers: int, **options: object) -> str:
        words = ["corpus", f"run-{name}", f"export-{name}", "--options", json.dumps(OPTIONS | options)]
        ran = run_bare(site, [script, "train", *words, "--workers", str(workers), "--minutes", "10"], tmp_path)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.splitlines()[-1]

    assert train("whole", workers=1) == "finished"
    assert train("cut", workers=0, stop_after=2) != "finished"
    assert train("cut", workers=1) == "finished"
    lines = [(tmp_path / f"run-{name}" / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    whole, cut = ([json.loads(line) for line in each] for each in lines)
    assert [entry["step"] for entry in whole] == [entry["step"] for entry in cut] == list(range(1, 7))
    assert [entry["loss"] for entry in whole] == [entry["loss"] for entry in cut]
    exported = [(tmp_path / f"export-{name}" / "encoder.safetensors").read_bytes() for name in ("whole", "cut")]
    assert exported[0] == exported[1]
    assert max(path.stat().st_size for path in (tmp_path / "run-whole").rglob("*") if path.is_file()) < 2**24

    command = [sys.executable, script, "join", "export-cut", "checkpoint"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    model = AutoModel.from_pretrained(tmp_path / "checkpoint").float()
    assert not torch.equal(model.whitening.matrix, torch.eye(48))
    with torch.no_grad():
        features = model.embed_scans(torch.rand(2, 3, 32, 32))
    assert features.shape == (2, 48)


@pytest.mark.slow
def test_packed_collection_holds_its_training_scans_but_mri(tmp_path: Path) -> None:
    lines = ["id,file,modality,anatomy,label,group,split"]
    kinds = (("xray", ""), ("mri", "train"), ("ct", "train"), ("ct", "validation"), ("ct", "test"))
    for number, (modality, split) in enumerate(kinds):
        np.save(tmp_path / f"{number}.npy", np.full((40, 40), 50 * number, dtype=np.uint8))
        lines.append(f"s{number},{number}.npy,{modality},,,p{number},{split}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    script, output = ROOT / "benchmarks" / "gpu_pretrain.sh", tmp_path / "corpus.safetensors"
    python = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["pack", str(tmp_path), "--output", str(output), "--size", "32"]
    subprocess.run([str(script), *words], check=True, capture_output=True, env=python)
    scans, volumes = read_corpus(output)
    assert [(scan.id, scan.modality) for scan in scans] == [("s2", "ct"), ("s0", "xray")]
    assert [tuple(volume.shape) for volume in volumes] == [(1, 1, 32, 32)] * 2
