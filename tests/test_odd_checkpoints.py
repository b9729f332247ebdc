"""Checkpoint folders that are damaged or of another model: one error each, and no weight is initialised at random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret.errors import InputError
from modeling_m3ret.hub import load_pretrained


Weights = dict[str, Tensor]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "m3ret-tiny"
    M3RetModel(tiny_config()).save_pretrained(folder)
    M3RetImageProcessor(size=48, num_frames=8).save_pretrained(folder)
    return folder


def edit(folder: Path, name: str, **changes: Any) -> None:
    values = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_first(weights: Weights, value: float) -> Weights:
    name = min(weights)
    weights[name] = weights[name].clone()
    weights[name].view(-1)[0] = value
    return weights


WEIGHTS: dict[str, Callable[[Weights], Weights]] = {
    "NaN": lambda weights: with_first(weights, float("nan")),
    "infinity": lambda weights: with_first(weights, float("inf")),
    "one missing": lambda weights: dict(sorted(weights.items())[1:]),
    "all of another model": lambda weights: {f"vit.{name}": tensor for name, tensor in weights.items()},
    "another shape": lambda weights: weights | {max(weights): torch.zeros(7, 7)},
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_missing_or_not_finite_are_refused(checkpoint: Path, kind: str) -> None:
    edit_weights(checkpoint, WEIGHTS[kind])
    with pytest.raises(InputError) as raised:
        load_pretrained(str(checkpoint))
    assert str(checkpoint) in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{}", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "cut"],
    ids=["missing", "empty", "JSON", "LFS pointer", "cut"],
)
def test_damaged_weights_file_is_refused(checkpoint: Path, content: bytes | str | None) -> None:
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(data[:-100] if isinstance(content, str) else content)
    with pytest.raises(InputError):
        load_pretrained(str(checkpoint))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"model_type": "vit"}),
        ("config.json", {"model_type": "no such model"}),
        ("config.json", {"model_type": None}),
        ("config.json", {"model_type": 7}),
        ("config.json", {"model_type": "no such model", "auto_map": {"AutoConfig": "evil.Evil"}}),
        ("config.json", {"hidden_size": "48"}),
        ("config.json", {"hidden_size": -48}),
        ("config.json", {"hidden_size": 0}),
        ("config.json", {"hidden_size": 48.5}),
        ("config.json", {"hidden_size": 96}),
        ("config.json", {"hidden_size": 10**9}),
        ("config.json", {"num_attention_heads": 5}),
        ("config.json", {"num_hidden_layers": 9}),
        ("config.json", {"patch_size": 0}),
        ("config.json", {"pooling": "maximum"}),
        ("preprocessor_config.json", {"size": "big"}),
        ("preprocessor_config.json", {"size": -5}),
        ("preprocessor_config.json", {"size": float("nan")}),
        ("preprocessor_config.json", {"size": float("inf")}),
        ("preprocessor_config.json", {"num_frames": 0}),
    ],
)
def test_settings_of_another_model_or_type_are_refused(checkpoint: Path, name: str, changes: dict[str, Any]) -> None:
    edit(checkpoint, name, **changes)
    with pytest.raises(InputError):
        load_pretrained(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["", "[]", "null", "{", "7", None])
def test_settings_that_are_no_json_object_are_refused(checkpoint: Path, name: str, content: str | None) -> None:
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_text(content)
    with pytest.raises(InputError):
        load_pretrained(str(checkpoint))


@pytest.mark.parametrize("name", ["", "a" * 5000, "a\0b", "../../missing", "config.json"])
def test_names_without_a_checkpoint_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        load_pretrained(name)


def test_unused_weights_and_half_precision_are_accepted(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda weights: {name: tensor.half() for name, tensor in weights.items()})
    edit_weights(checkpoint, lambda weights: weights | {"further": torch.zeros(3)})
    model, processor = load_pretrained(str(checkpoint))
    assert not model.training
    assert (processor.size, processor.num_frames) == (48, 8)
