"""Identifiers planted in every input appear in no file that training, evaluation, an index or an export writes.

`test_build.py` checks the same for datasets, `test_deidentification.py` for each format.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from scan_files import PLANTED
from scan_folders import put, write_manifest
from test_build import DATE, NEEDLES, leaves, planted_files, run
from test_deidentification import inflated


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:pydicom")]
ROOT = Path(__file__).parents[2]
MODALITIES = {".png": "xray", ".jpg": "xray", ".gz": "ct", ".mp4": "ultrasound", ".dcm": "xray"}
SETTINGS = {
    "preset": "vitt",
    "model": "{num_hidden_layers: 1, hidden_size: 48, num_attention_heads: 4, intermediate_size: 96, "
    "decoder_hidden_size: 36, decoder_num_hidden_layers: 1}",
    **{"size": 32, "num_frames": 4, "steps": 4, "batch_size": 4, "views_per_decode": 1, "holdout": 0.3},
    **{"num_workers": 1, "log_every": 1, "save_every": 2, "evaluate_every": 2, "report_to": "tensorboard"},
}
INDEX = """
import sys
from pathlib import Path
from modeling_m3ret.data.collection import open_collection
from modeling_m3ret.hub import load_pretrained
from modeling_m3ret.space.gallery import embed_gallery
model, processor = load_pretrained("model")
for data in sys.argv[1:]:
    embed_gallery(open_collection(data), model, processor, "model", None, Path(f"gallery of {Path(data).name}"))
"""


def written_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each file, also decompressed, except those that stay on the machine.

    `training_state` names the scans that a run could not read, for the person who resumes it, and is never uploaded.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not {"training_state", ".build"} & {*path.parts} and path.name != "report.json":
            name, data = path.relative_to(folder).as_posix(), path.read_bytes()
            yield name, name.encode()
            yield name, data
            yield from ((name, content) for content in inflated(data))
            if path.suffix == ".parquet":
                yield from ((name, content) for content in leaves(pq.read_table(path)))


def test_nothing_that_is_written_holds_an_identifier(tmp_path: Path) -> None:
    scans, work = tmp_path / "scans", tmp_path / "work"
    work.mkdir()
    rows = []
    for number in range(6):
        folder = f"patient {number}"
        files = {f"{folder}/{name}": data for name, data in planted_files().items()}
        put(scans, files)
        singles = [name for name in files if "/series/" not in name]
        series = str(Path(singles[0]).parent / "series")
        for name in [series, *singles]:
            identifying = {"id": f"{PLANTED} {number}/{name}", "group": f"{PLANTED} {DATE} {number}", "name": PLANTED}
            words = {"modality": MODALITIES.get(Path(name).suffix, "ct"), "anatomy": "chest", "label": f"l{number % 2}"}
            rows.append({"file": name, "source": "a collection", **words, **identifying})
    write_manifest(scans, rows)
    run(scans, tmp_path / "built")

    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def script(*words: object) -> None:
        command = [sys.executable, *map(str, words)]
        ran = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr

    for data, model in ((scans, "model"), (tmp_path / "built", "model-of-built")):
        options = SETTINGS | {"data": data, "output_dir": model, "run_dir": f"runs/{model}"}
        script(ROOT / "train.py", *(word for key, value in options.items() for word in (f"--{key}", value)))
    script(ROOT / "eval_retrieval.py", "--model", "model", "--data", scans, "--output", "results", "--protocols", "all")
    script("-c", INDEX, scans, tmp_path / "built")
    assert json.loads((work / "model/training.json").read_text())["unreadable_scans"] > 0

    found = dict.fromkeys(name for name, _ in written_files(work))
    for expected in ("model/README.md", "model/model.safetensors", "runs/model/metrics.jsonl", "results/report.md"):
        assert expected in found
    assert any("tfevents" in name for name in found)
    assert any(name.startswith("hf/m3ret/embeddings") for name in found)
    assert any(name.startswith("gallery of") and name.endswith(".parquet") for name in found)
    for folder in (work, tmp_path / "built"):
        for name, content in written_files(folder):
            lower = content.lower()
            for needle in NEEDLES:
                assert needle.lower() not in lower, name
                assert needle.decode().encode("utf-16-le") not in content, name
