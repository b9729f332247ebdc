"""Adapters, quantised layers and hooks: every way to an embedding calls the modules of the model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from packs import make_model, make_scans, pack
from torch import Tensor, nn
from transformers import AutoModel, TorchAoConfig

from modeling_m3ret import M3RetModel


POOLINGS = ["mean", "cls", "statistics"]


def cosines(first: Tensor, second: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(first.float(), second.float(), dim=-1)


def inputs_of_each_kind() -> list[tuple[Tensor, ...]]:
    """Return dense images, a dense volume, and a pack of scans of different sizes."""
    return [(torch.rand(2, 3, 32, 48),), (torch.rand(1, 3, 8, 32, 32),), pack(make_scans())]


@torch.no_grad()
def assert_embeds_as_forward(model: nn.Module) -> None:
    """Assert that `embed_scans` gives the embedding of the full forward pass, on each kind of input."""
    for inputs in inputs_of_each_kind():
        expected = model.whitening(model(*inputs).pooler_output)
        assert cosines(model.embed_scans(*inputs), expected).min() >= 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["qkv"], "all-linear"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_lora_is_part_of_every_embedding_and_trains(pooling: str, targets: list[str] | str) -> None:
    peft = pytest.importorskip("peft")
    plain = make_model(pooling=pooling)
    config = peft.LoraConfig(target_modules=targets, r=4, lora_alpha=16, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(plain), config)
    assert_embeds_as_forward(adapted.get_base_model())
    adapters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 3 * (1 if targets == ["qkv"] else 4) + 2 * (targets == "all-linear")
    for inputs in inputs_of_each_kind():
        adapted.zero_grad()
        direction = torch.randn(48)
        (adapted.embed_scans(*inputs) @ direction).sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in adapters.values())
    merged = copy.deepcopy(adapted).merge_and_unload()
    with torch.no_grad():
        for inputs in inputs_of_each_kind():
            with_adapter = adapted.embed_scans(*inputs)
            assert cosines(with_adapter, merged.embed_scans(*inputs)).min() >= 0.9999
            assert cosines(with_adapter, plain.embed_scans(*inputs)).max() < 0.9999


@pytest.mark.parametrize("pooling", POOLINGS)
def test_dynamic_int8_runs_on_each_kind_of_input(pooling: str) -> None:
    model = make_model(pooling=pooling)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    assert_embeds_as_forward(quantised)
    with torch.no_grad():
        for inputs in inputs_of_each_kind():
            assert cosines(quantised.embed_scans(*inputs), model.embed_scans(*inputs)).min() >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("pooling", POOLINGS)
def test_torchao_int8_runs_on_each_kind_of_input(pooling: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao, which slows and warns in every import of transformers, is absent")
    from torchao.quantization import Int8WeightOnlyConfig

    model = M3RetModel(tiny_config(pooling=pooling)).eval()
    model.save_pretrained(tmp_path)
    settings = TorchAoConfig(Int8WeightOnlyConfig())
    quantised = AutoModel.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32).eval()
    assert "Int8" in type(quantised.encoder.layers[0].attention.qkv.weight).__name__
    assert_embeds_as_forward(quantised)
    with torch.no_grad():
        for inputs in inputs_of_each_kind():
            assert cosines(quantised.embed_scans(*inputs), model.embed_scans(*inputs)).min() >= 0.999


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_hooks_of_every_module_run(pooling: str, kind: int) -> None:
    model = make_model(pooling=pooling)
    called = set()
    watched = {name: module for name, module in model.named_modules() if name and not name.endswith("layers")}
    del watched["encoder"], watched["whitening"]
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model.embed_scans(*inputs_of_each_kind()[kind])
    assert called == watched.keys()
