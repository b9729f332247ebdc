"""Low-rank adapters (LoRA, arXiv 2106.09685) of an encoder: PEFT adds them, and checkpoints hold the merged weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..modeling_m3ret import M3RetModel
from .run_config import ConfigError


SCALE = 2  # alpha divided by the rank, as in fine_tune.py


def add_adapters(trained: M3RetModel, published: M3RetModel, rank: int, frozen_layers: int = 0) -> None:
    """Add adapters to all linear layers of an encoder, and exclude its own weights from training.

    Args:
        trained: encoder with gradients.
        published: the same encoder, or its moving average, which gets equal adapters without gradients.
        rank: of the adapters. They change nothing before the first step.
        frozen_layers: number of first layers without adapters.

    Raises:
        ConfigError: if PEFT is not installed, or no layer is left.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("lora_rank", "expected the package peft, got none. Run `pip install peft`.") from error
    layers = range(frozen_layers, len(trained.encoder.layers))
    if not layers:
        raise ConfigError("lora_rank", f"expected layers to adapt, got freeze_layers {frozen_layers}.")
    numbers = "|".join(map(str, layers))
    targets = rf"encoder\.layers\.({numbers})\.(attention\.(qkv|out_proj)|mlp\.(gate|up|down)_proj)"
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=targets)
    inject_adapter_in_model(config, trained)
    if published is not trained:
        inject_adapter_in_model(config, published)
        adapters = {name: value for name, value in trained.state_dict().items() if is_adapter(name)}
        published.load_state_dict(adapters, strict=False)
        published.requires_grad_(False)


def is_adapter(name: str) -> bool:
    """Return whether a tensor of a state dict belongs to an adapter."""
    return ".lora_" in name


def merge_adapters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with its adapters merged, under the names it has without; others are returned unchanged."""
    merged = {}
    for name, value in weights.items():
        module, is_adapted, kind = name.partition(".base_layer.")
        if is_adapter(name):
            continue
        if is_adapted and kind == "weight":
            down, up = (weights[f"{module}.lora_{part}.default.weight"] for part in ("A", "B"))
            value = value + SCALE * (up @ down)
        merged[f"{module}.{kind}" if is_adapted else name] = value
    return merged
