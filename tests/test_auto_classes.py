"""Test that checkpoints load by the Auto classes, with the package and as remote code without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from packs import largest_difference, make_scans, pack
from PIL import Image
from remote_code import run_new_process
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from modeling_m3ret import (
    M3RetConfig,
    M3RetForPreTraining,
    M3RetImageProcessor,
    M3RetModel,
    masked_autoencoder_m3ret,
    modeling_m3ret,
)
from modeling_m3ret.pretraining.checkpoints import write_checkpoint
from modeling_m3ret.pretraining.objectives import MaskedAutoencoding
from modeling_m3ret.pretraining.run_config import RunConfig


def save_tiny_checkpoint(folder: Path) -> M3RetModel:
    model = M3RetModel(tiny_config()).eval()
    model.save_pretrained(folder)
    M3RetImageProcessor(size=64, num_frames=8).save_pretrained(folder)
    return model


@torch.no_grad()
def test_saved_model_and_processor_load_unchanged(tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path)
    rows, grids = pack(make_scans())
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is M3RetModel
    assert isinstance(AutoConfig.from_pretrained(tmp_path), M3RetConfig)
    assert torch.equal(loaded(rows, grids).pooler_output, model(rows, grids).pooler_output)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is M3RetImageProcessor
    assert (processor.size, processor.num_frames, processor.max_patches) == (64, 8, 2048)
    assert AutoImageProcessor.from_pretrained(tmp_path, size=32).size == 32


LOAD_REMOTE_CODE = """
import json, logging, sys
import numpy, torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining
folder = sys.argv[1]
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
pretraining = AutoModelForPreTraining.from_pretrained(folder, subfolder="pretraining", trust_remote_code=True)
warnings_of_code = logging.Handler()
warnings_of_code.messages = []
warnings_of_code.emit = lambda record: warnings_of_code.messages.append(record.getMessage())
logging.getLogger("transformers_modules").addHandler(warnings_of_code)
AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
ReadError = get_class_from_dynamic_module("image_processing_m3ret.M3RetReadError", folder)
try:
    processor("no such file.dcm")
    raise SystemExit("a missing file was read")
except ReadError:
    pass
of_pretraining = AutoImageProcessor.from_pretrained(folder, subfolder="pretraining", trust_remote_code=True)
assert of_pretraining.to_dict() == processor.to_dict()
inputs = processor([folder + "/scan.png", numpy.load(folder + "/scan.npy")], return_tensors="pt")
with torch.no_grad():
    features = model.embed_scans(**inputs)
print(json.dumps({
    "module": type(model).__module__, "pretraining": type(pretraining).__name__,
    "packages": [name for name in sys.modules if name.split(".")[0] == "modeling_m3ret"],
    "features": features.tolist(), "warnings": warnings_of_code.messages,
}))
"""


@pytest.mark.slow
@torch.no_grad()
def test_checkpoint_loads_as_remote_code_without_the_package(tmp_path: Path) -> None:
    folder = tmp_path / "m3ret-tiny"
    objective = MaskedAutoencoding(RunConfig(), tiny_config()).eval()
    write_checkpoint(
        folder, objective, objective.state_dict(), M3RetImageProcessor(size=64, num_frames=8), "# card", {}
    )
    model = objective.encoder
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (50, 70), dtype=np.uint8)).save(folder / "scan.png")
    np.save(folder / "scan.npy", generator.random((9, 40, 40), dtype=np.float32))
    loaded = run_new_process(LOAD_REMOTE_CODE, tmp_path, str(folder))
    assert loaded["module"].startswith("transformers_modules.")
    assert loaded["packages"] == []
    assert loaded["pretraining"] == "M3RetForPreTraining"
    assert ["subfolder='pretraining'" in warning for warning in loaded["warnings"]] == [True]  # of the root
    inputs = AutoImageProcessor.from_pretrained(folder)([folder / "scan.png", np.load(folder / "scan.npy")])
    assert largest_difference(torch.tensor(loaded["features"]), model.embed_scans(**inputs)) <= 1e-6


def test_encoder_checkpoint_as_a_pretraining_model_names_the_subfolder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_checkpoint(tmp_path / "encoder")
    M3RetForPreTraining(tiny_config()).save_pretrained(tmp_path / "pretraining")
    warnings: list[str] = []
    monkeypatch.setattr(masked_autoencoder_m3ret.logger, "warning", warnings.append)
    AutoModelForPreTraining.from_pretrained(tmp_path / "pretraining")
    assert not warnings
    AutoModelForPreTraining.from_pretrained(tmp_path / "encoder")
    assert ["subfolder='pretraining'" in warning for warning in warnings] == [True]


@torch.no_grad()
def test_encoder_loads_from_a_pretraining_checkpoint_without_its_decoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pretraining = M3RetForPreTraining(tiny_config()).eval()
    pretraining.save_pretrained(tmp_path)
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path)) is M3RetForPreTraining
    caplog.clear()
    encoder, info = M3RetModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(key.startswith("decoder.") for key in info["unexpected_keys"])
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    rows, grids = pack(make_scans())
    assert torch.equal(encoder.eval()(rows, grids).pooler_output, pretraining.m3ret(rows, grids).pooler_output)
    loaded = dict(encoder.named_parameters())
    dropped = {name for name, _ in pretraining.named_parameters() if name.removeprefix("m3ret.") not in loaded}
    assert dropped == {name for name, _ in pretraining.named_parameters() if name.startswith("decoder.")}


def test_loading_checks_changed_fields_of_the_config(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    for overrides in ({"pooling": "max"}, {"num_attention_heads": 5}):
        with pytest.raises(ValueError, match=next(iter(overrides))):
            AutoModel.from_pretrained(tmp_path, **overrides)


def save_whitened_checkpoint(folder: Path) -> M3RetModel:
    model = M3RetModel(tiny_config(pooling="mean")).eval()
    model.whitening.fit(torch.randn(200, 48))
    model.save_pretrained(folder)
    return model


CHANGED_FEATURES = [{"pooling": "cls"}, {"pooling": "statistics"}, {"rope_theta": 10.0}, {"num_attention_heads": 2}]


@pytest.mark.parametrize("way", ["arguments", "config"])
@pytest.mark.parametrize("changes", CHANGED_FEATURES)
def test_whitening_of_other_features_is_refused_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], way: str
) -> None:
    save_whitened_checkpoint(tmp_path)
    given = changes if way == "arguments" else {"config": AutoConfig.from_pretrained(tmp_path, **changes)}
    with pytest.raises((ValueError, RuntimeError)):
        AutoModel.from_pretrained(tmp_path, **given)
    warnings: list[str] = []
    monkeypatch.setattr(modeling_m3ret.logger, "warning", warnings.append)
    model = AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **given).eval()
    assert len(warnings) == (changes != {"pooling": "statistics"})  # transformers reports other shapes itself
    pooled = model(torch.rand(2, 3, 32, 32)).pooler_output
    assert torch.equal(model.whitening(pooled), pooled[:, :48])


@torch.no_grad()
def test_whitening_is_kept_if_the_features_are_the_same(tmp_path: Path) -> None:
    model = save_whitened_checkpoint(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, pooling="mean", rope_theta=100, drop_path_rate=0.3, num_labels=5)
    loaded = AutoModel.from_pretrained(tmp_path, config=config).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.embed_scans(images), model.embed_scans(images))
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path, config=config)
    assert torch.equal(classifier.m3ret.whitening.matrix, model.whitening.matrix)
    with pytest.raises(ValueError, match="pooling"):
        AutoModelForImageClassification.from_pretrained(tmp_path, pooling="cls")


def test_unfitted_whitening_fits_every_pooling(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, pooling="cls").eval()
    output = model(torch.rand(2, 3, 32, 32))
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])


def test_pooling_of_a_built_model_does_not_change() -> None:
    model = M3RetModel(tiny_config(pooling="mean")).eval()
    model.config.pooling = "cls"
    for method in (model, model.embed_scans):
        with pytest.raises(ValueError, match="pooling"):
            method(torch.rand(2, 3, 32, 32))


@torch.no_grad()
def test_checkpoint_loads_with_device_map_and_dtype(tmp_path: Path) -> None:
    """transformers builds models on the meta device; a tensor that the file lacks would be left uninitialised."""
    model = save_tiny_checkpoint(tmp_path)
    rows, grids = pack(make_scans())
    expected = model(rows, grids).pooler_output
    mapped = AutoModel.from_pretrained(tmp_path, device_map="cpu").eval()
    assert torch.equal(mapped(rows, grids).pooler_output, expected)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {name for name, _ in model.named_buffers()} <= model.state_dict().keys()
