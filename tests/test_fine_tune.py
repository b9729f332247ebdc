"""The examples of the guide on fine-tuning."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config
from scan_files import dicom, dicom_bytes

from modeling_m3ret import M3RetForImageClassification, M3RetImageProcessor, M3RetModel


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def test_examples_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "fine-tuning.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    M3RetModel(tiny_config()).save_pretrained("m3ret-vitb")
    M3RetForImageClassification(tiny_config(num_labels=3)).save_pretrained("classifier")
    for folder in ("m3ret-vitb", "classifier"):
        M3RetImageProcessor(size=32).save_pretrained(folder)
    Path("series_folder").mkdir()
    for number, name in enumerate(["a.dcm", "b.dcm", "chest.dcm", "series_folder/1.dcm"]):
        pixels = np.random.default_rng(number).integers(0, 4000, (40, 50 + 10 * number)).astype(np.uint16)
        Path(name).write_bytes(dicom_bytes(dicom(pixels)))
    for example in examples:
        exec(compile(example, "fine-tuning.md", "exec"), {})
