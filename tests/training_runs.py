"""Runs of `train.py` as processes of their own, tiny, on scans that the tests make."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from processes import Script

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
# train.py where the scan of one file has a value that is no number, which no reader lets through
POISONED = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
import train
from modeling_m3ret import M3RetImageProcessor
read = M3RetImageProcessor.read
def poisoned(self, source):
    scan = read(self, source)
    if str(source).endswith("scan-10.npy"):
        scan.array[..., 20, 24] = np.nan
    return scan
M3RetImageProcessor.read = poisoned
train.main()
"""


def write_scans(folder: Path) -> Path:
    """30 scans of 15 patients: coarse random images and volumes of three modalities."""
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
    settings = SETTINGS | {"data": scans, "output_dir": f"m3ret-{name}", "run_dir": f"run-{name}"} | overrides
    return [str(script), *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def start(words: list[str], folder: Path, ranks: int = 1) -> Script:
    return Script(words, folder, ranks, ACCELERATE_USE_CPU="true")


def finish(words: list[str], folder: Path, ranks: int = 1) -> tuple[int, str]:
    script = start(words, folder, ranks)
    return script.finish(), script.printed


def run(words: list[str], folder: Path, ranks: int = 1) -> str:
    code, printed = finish(words, folder, ranks)
    assert code == 0, printed
    return printed


def lines(run_dir: Path) -> list[dict]:
    """What was logged, without what depends on the clock."""
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in ("seconds", "views_per_second")} for entry in entries]
