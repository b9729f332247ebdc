"""Tiny runs of `train.py` in processes of their own, on generated scans."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch
from processes import Script
from safetensors.torch import load_file

from modeling_m3ret.data.collection import COLUMNS


ROOT = Path(__file__).parents[1]
SETTINGS = {
    "preset": "vitt",
    "model": "{num_hidden_layers: 2, hidden_size: 48, num_attention_heads: 4, intermediate_size: 96, "
    "decoder_hidden_size: 36, decoder_num_hidden_layers: 1, drop_path_rate: 0.1}",
    "size": 32,
    "num_frames": 8,
    "steps": 20,
    "batch_size": 4,
    "views_per_decode": 2,
    "local_views": 2,
    "local_size": 16,
    "learning_rate": 1e-3,
    "holdout": 0.2,
    "num_workers": 1,
    "log_every": 1,
    "save_every": 3,
    "evaluate_every": 8,
}
# train.py with a NaN in one scan, which no reader would let through
NAN_IN_SCAN_10 = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
import train
from modeling_m3ret import M3RetImageProcessor
read = M3RetImageProcessor.read
def read_with_nan(self, source, **options):
    scan = read(self, source, **options)
    if str(source).endswith("scan-10.npy"):
        scan.array[..., 20, 24] = np.nan
    return scan
M3RetImageProcessor.read = read_with_nan
train.main()
"""


def write_scans(folder: Path) -> Path:
    """Write 30 scans of 15 patients: coarse random images and volumes of three modalities."""
    generator = np.random.default_rng(0)
    with (folder / "manifest.csv").open("w", newline="") as lines:
        rows = csv.DictWriter(lines, COLUMNS)
        rows.writeheader()
        for number in range(30):
            shape = (8, 5, 6) if number % 3 == 0 else (5, 6)
            array = np.kron(generator.random(shape, dtype=np.float32), np.ones((8, 8), np.float32))
            np.save(folder / f"scan-{number}.npy", array)
            modality = ("ct", "xray", "mri")[number % 3]
            row = (f"scan-{number}", f"scan-{number}.npy", modality, "chest", f"label-{number % 2}", f"p{number // 2}")
            rows.writerow(dict(zip(COLUMNS, row, strict=True)))
    return folder


def command(script: Path, scans: Path, name: str, **overrides: object) -> list[str]:
    """Return the command line of a run that writes to `m3ret-NAME` and `run-NAME`."""
    settings = SETTINGS | {"data": scans, "output_dir": f"m3ret-{name}", "run_dir": f"run-{name}"} | overrides
    return [str(script), *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def start(words: list[str], folder: Path, ranks: int = 1) -> Script:
    return Script(words, folder, ranks, ACCELERATE_USE_CPU="true")


def finish(words: list[str], folder: Path, ranks: int = 1) -> tuple[int, str]:
    """Return exit code and output."""
    script = start(words, folder, ranks)
    return script.finish(), script.printed


def run(words: list[str], folder: Path, ranks: int = 1) -> str:
    """Return the output of a run that succeeds."""
    code, printed = finish(words, folder, ranks)
    assert code == 0, printed
    return printed


def metrics_of(run_dir: Path) -> list[dict]:
    """Return the logged metrics except times; none if nothing was logged."""
    file = run_dir / "metrics.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [{k: v for k, v in entry.items() if k not in ("seconds", "views_per_second")} for entry in entries]


def assert_same_tensors(folder: Path, other: Path) -> None:
    """Check that two checkpoints hold the same safetensors files, bit for bit."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    assert {file.name for file in files} >= {"model.safetensors", "optimiser.safetensors", "random.safetensors"}
    for file in files:
        ours, theirs = load_file(folder / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file
