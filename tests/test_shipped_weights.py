"""`m3ret-vitt/`: weights that a fresh clone loads without a network, and their size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret.data.collection import open_collection
from modeling_m3ret.search.embedding import Embedded, embed_records, encoder_embedder


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "m3ret-vitt"


@pytest.fixture(scope="module")
def encoder() -> tuple[M3RetModel, M3RetImageProcessor]:
    return M3RetModel.from_pretrained(FOLDER).eval(), M3RetImageProcessor.from_pretrained(FOLDER)


def test_weights_are_half_precision_and_compute_in_float32(encoder: tuple[M3RetModel, M3RetImageProcessor]) -> None:
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 50e6
    with safe_open(weights, "pt") as stored:
        types = {name: stored.get_tensor(name).dtype for name in stored.keys()}  # noqa: SIM118
    assert {dtype for name, dtype in types.items() if not name.startswith("whitening.")} == {torch.float16}
    assert {dtype for name, dtype in types.items() if name.startswith("whitening.")} == {torch.float32}
    assert {parameter.dtype for parameter in encoder[0].parameters()} == {torch.float32}
    assert not torch.equal(encoder[0].whitening.matrix, M3RetModel(encoder[0].config).whitening.matrix), "fitted"


def test_code_is_that_of_the_package(encoder: tuple[M3RetModel, M3RetImageProcessor], tmp_path: Path) -> None:
    """Links, so that the repository holds the code once. They are the files that saving writes."""
    model, processor = encoder
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    code = {path.name: path.read_bytes() for path in tmp_path.glob("*.py")}
    assert {path.name: path.read_bytes() for path in FOLDER.glob("*.py")} == code
    assert all(path.resolve().parent == ROOT / "modeling_m3ret" for path in FOLDER.glob("*.py"))
    for name in ("config.json", "preprocessor_config.json"):
        assert (FOLDER / name).read_text() == (tmp_path / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("remote_code", [False, True])
def test_it_loads_without_a_network(remote_code: bool, tmp_path: Path) -> None:
    script = f"""
import sys
if {remote_code}:  # the package is not installed
    sys.path[:] = [path for path in sys.path if path not in ("", {str(ROOT)!r})]
    sys.modules["modeling_m3ret"] = None
else:
    import modeling_m3ret
import torch
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained("m3ret-vitt", trust_remote_code={remote_code}).eval()
processor = AutoImageProcessor.from_pretrained("m3ret-vitt", trust_remote_code={remote_code})
with torch.no_grad():
    print(model.embed_scans(**processor("space/gallery/hc18_01.jpg", return_tensors="pt")).shape)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "torch.Size([1, 192])"


@pytest.mark.slow
def test_the_example_of_the_readme_prints_what_the_readme_says(tmp_path: Path) -> None:
    blocks = re.compile(r"^```python\n(.*?)^```$.*?^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = blocks.search((ROOT / "README.md").read_text())
    assert found is not None
    code, printed = found.groups()
    assert "m3ret-vitt" in code
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[1:] for line in ran.stdout.splitlines()] == [line.split()[1:] for line in printed.splitlines()]
    scores = [[float(line.split()[0]) for line in text.splitlines()] for text in (ran.stdout, printed)]
    assert scores[0] == pytest.approx(scores[1], abs=0.011), "machines round differently"


@pytest.fixture(scope="module")
def gallery(encoder: tuple[M3RetModel, M3RetImageProcessor]) -> Embedded:
    model, processor = encoder
    records = open_collection(ROOT / "space" / "gallery")
    return embed_records([encoder_embedder(model)], processor, records, progress=False)[0]


@pytest.mark.slow
def test_the_nearest_scan_of_another_patient_shows_the_same_anatomy(gallery: Embedded) -> None:
    names = {name: [getattr(record, name) for record in gallery.records] for name in ("group", "anatomy")}
    same = {name: torch.tensor([[a == b for b in of_all] for a in of_all]) for name, of_all in names.items()}
    similarity = (gallery.embeddings @ gallery.embeddings.T).masked_fill(same["group"], -2)
    answerable = (same["anatomy"] & ~same["group"]).any(1)
    hits = same["anatomy"].gather(1, similarity.argmax(1, keepdim=True))[answerable]
    assert answerable.sum() >= 150
    assert hits.float().mean() >= 0.9, "random weights reach 0.73"
