"""`fine_tune.py` as a user runs it: each method on X-rays of the phantom, which are DICOM files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from processes import Script
from scan_files import dicom, dicom_bytes
from transformers import AutoImageProcessor, AutoModelForImageClassification

from modeling_m3ret import M3RetForImageClassification, M3RetImageProcessor, M3RetModel
from modeling_m3ret.data.collection import read_manifest, split_by_group
from modeling_m3ret.phantom.dataset import write_phantom


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "fine_tune.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a phantom and an encoder that is not trained."""
    folder = tmp_path_factory.mktemp("fine_tune")
    write_phantom(folder / "phantom", subjects=24, workers=1)
    torch.manual_seed(0)
    M3RetModel(tiny_config(pooling="statistics")).save_pretrained(folder / "encoder")
    M3RetImageProcessor(size=48).save_pretrained(folder / "encoder")
    return folder


def words(folder: Path, **options: object) -> list[str]:
    settings = {"model": folder / "encoder", "data": folder / "phantom", "modality": "xray", "epochs": 2} | options
    return [SCRIPT, *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


@torch.no_grad()
@pytest.mark.parametrize("method", ["probe", "lora", "full"])
def test_reported_accuracy_is_that_of_the_saved_classifier(folder: Path, tmp_path: Path, method: str) -> None:
    script = Script(words(folder, method=method, output=tmp_path / "tuned"), tmp_path)
    assert script.finish() == 0, script.printed
    # progress bars may be printed after the result
    result = json.loads(next(line for line in script.printed.splitlines() if line.startswith('{"')))
    records = [record for record in read_manifest(folder / "phantom") if record.modality == "xray"]
    assert any(str(record.location).endswith(".dcm") for record in records)
    training, held_out = split_by_group(records, 0.3)
    held_out = [record for record in held_out if record.label in {record.label for record in training}]
    assert (result["training_scans"], result["held_out_scans"]) == (len(training), len(held_out))

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "tuned")
    predicted = model(**processor([record.location for record in held_out])).logits.argmax(1).tolist()
    correct = [model.config.id2label[number] == r.label for number, r in zip(predicted, held_out, strict=True)]
    assert result["accuracy"] == pytest.approx(sum(correct) / len(correct), abs=1e-3)
    labels = [record.label for record in held_out]
    assert result["chance"] == pytest.approx(max(map(labels.count, labels)) / len(labels), abs=1e-3)
    of_label = [[c for c, label in zip(correct, labels, strict=True) if label == name] for name in {*labels}]
    balanced = sum(sum(part) / len(part) for part in of_label) / len(of_label)
    assert result["balanced_accuracy"] == pytest.approx(balanced, abs=1e-3)

    before = M3RetModel.from_pretrained(folder / "encoder").state_dict()
    changed = {name for name, value in model.m3ret.state_dict().items() if not torch.equal(value, before[name])}
    assert bool(changed) == (method != "probe")
    assert not [name for name in changed if name.startswith("whitening")]
    head, everything = model.classifier.weight.numel() + len(model.config.id2label), model.num_parameters()
    trained = result["trained_parameters"]
    assert {"probe": trained == head, "lora": head < trained < everything, "full": trained == everything}[method]


@pytest.mark.parametrize("options", [{"data": "nowhere"}, {"modality": "ct", "holdout": 0.999}, {"output": "."}])
def test_wrong_input_ends_in_one_line_with_code_2(folder: Path, tmp_path: Path, options: dict[str, object]) -> None:
    (tmp_path / "a file").touch()
    script = Script(words(folder, **options), tmp_path)
    assert script.finish() == 2, script.printed
    assert script.printed.splitlines()[-1].startswith("fine_tune.py: error: ")
    assert "Traceback" not in script.printed


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
