"""Random checkpoints of published 2D architectures, as transformers saves them, and their tokens for images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
MLP = {"intermediate_size": 48}
TEXT = {**MLP, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50000}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# kind of checkpoint -> model class of transformers, configuration class, settings beside the sizes
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTConfig", {**MLP, "num_register_tokens": 3}),
    "dinov3_vit gated": (
        *("DINOv3ViTModel", "DINOv3ViTConfig"),
        {**MLP, "use_gated_mlp": True, "hidden_act": "silu", "key_bias": True, "mlp_bias": False, "proj_bias": False},
    ),
    "dinov2": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2}),
    "dinov2 gated": ("Dinov2ForImageClassification", "Dinov2Config", {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"mlp_ratio": 2}),
    "vit": ("ViTModel", "ViTConfig", MLP),
    "vit without biases": ("ViTForImageClassification", "ViTConfig", {**MLP, "qkv_bias": False}),
    "vit_mae": (
        *("ViTMAEForPreTraining", "ViTMAEConfig"),
        {**MLP, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
    ),
    "clip": ("CLIPModel", "CLIPConfig", {}),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionConfig", MLP),
    "clip with projection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**MLP, "projection_dim": 24}),
    "siglip": ("SiglipModel", "SiglipConfig", {}),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionConfig", MLP),
    "siglip without head": ("SiglipVisionModel", "SiglipVisionConfig", {**MLP, "vision_use_head": False}),
}


def build_source(kind: str, **sizes: Any) -> nn.Module:
    """Return a model with random values in all weights, so that no weight can be left out without effect."""
    model_class, config_class, settings = KINDS[kind]
    fields = TINY | sizes
    if kind in ("clip", "siglip"):
        vision = fields | MLP | sizes
        given: dict[str, Any] = {"vision_config": vision, "text_config": TEXT, "projection_dim": 24}
    else:
        given = fields | settings | sizes
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**given)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if fields["hidden_size"] > 100 else 0.1))
    return model


def save_source(kind: str, folder: Path, size: int = 32, **sizes: Any) -> nn.Module:
    """Save a random checkpoint with the file of its image processor, and return its model."""
    model = build_source(kind, **sizes)
    model.save_pretrained(folder)
    processor = IMAGENET | {"size": {"height": size, "width": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


@torch.no_grad()
def source_tokens(model: nn.Module, images: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the class tokens `(B, d)`, patch tokens `(B, patches, d)` and pooled features of a source, after its norm.

    CLIP normalises its pooled class token alone; the same norm is applied to its patches. MAE's encoder pools nothing,
    and the mean of its patches is returned. The dense layer after a ViT's class token is left out.
    """
    config = model.config
    kind = config.model_type
    core: Any = model
    for part in ("vision_model", "dinov2", "vit"):
        core = getattr(core, part, core)
    if kind == "vit_mae":
        config.mask_ratio = 0.0
        noise = torch.arange(images.shape[2] * images.shape[3] // config.patch_size**2).expand(len(images), -1)
        tokens = core(images, noise=noise.float(), interpolate_pos_encoding=True).last_hidden_state
        return tokens[:, 0], tokens[:, 1:], tokens[:, 1:].mean(1)
    interpolate = {} if "dino" in kind else {"interpolate_pos_encoding": True}
    output = core(images, **interpolate)
    tokens = output.last_hidden_state
    if "siglip" in kind:
        return None, tokens, tokens.mean(1) if output.pooler_output is None else output.pooler_output
    if "clip" in kind:
        tokens = core.post_layernorm(tokens)
        return tokens[:, 0], tokens[:, 1:], output.pooler_output
    prefix = 1 + getattr(config, "num_register_tokens", 0)
    return tokens[:, 0], tokens[:, prefix:], tokens[:, 0]
