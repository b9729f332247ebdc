"""Convert published 2D vision transformers to M3Ret encoders, and back: names, configuration and inflation of weights.

The converted encoder gives the tokens of its source for one slice. Clips and volumes follow by inflation (I3D, arXiv
1705.07750): the weights of a patch are divided over its slices, so that equal slices give the tokens of one, and the
positions along depth are zero for a single slice. docs/start-from-a-vit.md says what is exact.

All architectural differences are fields of `M3RetConfig`. Sources are checkpoints of transformers, and of open_clip
with a ViT of timm (BiomedCLIP). Only JSON and safetensors files are read.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    PreTrainedConfig,
    ViTConfig,
)
from transformers.activations import ACT2FN

from .atomic_io import atomic_folder, atomic_write_text
from .configuration_m3ret import M3RetConfig
from .encoder_files import (
    CARD,
    OPEN_CLIP,
    OPEN_CLIP_WEIGHTS,
    UNSUPPORTED_PROCESSOR,
    WEIGHTS,
    EncoderError,
    ImageTransform,
    UnsupportedEncoderError,
    encoder_errors,
    find_files,
    height_and_width,
    read_json,
    read_open_clip_transform,
    read_transform,
    read_weights,
    short_name,
)
from .errors import InputError
from .image_processing_m3ret import M3RetImageProcessor
from .modeling_m3ret import M3RetModel, interpolation_weights


# ---- names of weights -----------------------------------------------------------------------------------------------

# our name -> names in files of transformers (today's and earlier ones) and of timm, outside of the layers
NAMES = {
    "embeddings.cls_token": ("embeddings.cls_token", "embeddings.class_embedding", "cls_token"),
    "embeddings.register_tokens": ("embeddings.register_tokens", "reg_token"),
    "embeddings.patch_embeddings": (
        *("embeddings.patch_embeddings.projection", "embeddings.patch_embeddings"),
        *("embeddings.patch_embedding", "patch_embed.proj"),
    ),
    "positions": ("embeddings.position_embeddings", "embeddings.position_embedding.weight", "pos_embed"),
    "embeddings.norm": ("pre_layrnorm",),
    "norm": ("layernorm", "norm", "post_layernorm"),
    "projection": ("visual_projection.weight", "visual.head.proj.weight"),
    "pooler.probe": ("head.probe",),
    "pooler.in_proj.weight": ("head.attention.in_proj_weight",),
    "pooler.in_proj.bias": ("head.attention.in_proj_bias",),
    "pooler.out_proj": ("head.attention.out_proj",),
    "pooler.norm": ("head.layernorm",),
    "pooler.mlp.up_proj": ("head.mlp.fc1",),
    "pooler.mlp.down_proj": ("head.mlp.fc2",),
}
# the same within a layer
LAYER_NAMES = {
    "attention_norm": ("norm1", "layernorm_before", "layer_norm1"),
    "attention.query": ("attention.attention.query", "attention.q_proj", "self_attn.q_proj"),
    "attention.key": ("attention.attention.key", "attention.k_proj", "self_attn.k_proj"),
    "attention.value": ("attention.attention.value", "attention.v_proj", "self_attn.v_proj"),
    "attention.qkv": ("attn.qkv",),
    "attention.out_proj": ("attention.output.dense", "attention.o_proj", "self_attn.out_proj", "attn.proj"),
    "attention_scale.gain": ("layer_scale1.lambda1", "ls1.gamma"),
    "mlp_norm": ("norm2", "layernorm_after", "layer_norm2"),
    "mlp.gate_proj": ("mlp.gate_proj",),
    "mlp.gate_and_up": ("mlp.weights_in",),
    "mlp.up_proj": ("mlp.fc1", "mlp.up_proj", "intermediate.dense"),
    "mlp.down_proj": ("mlp.fc2", "mlp.down_proj", "mlp.weights_out", "output.dense"),
    "mlp_scale.gain": ("layer_scale2.lambda1", "ls2.gamma"),
}
OUR_NAME = {theirs: ours for ours, names in NAMES.items() for theirs in names}
OUR_LAYER_NAME = {theirs: ours for ours, names in LAYER_NAMES.items() for theirs in names}
# names of the model within a larger one
WRAPPER = re.compile(r"^(vit|dinov2|dinov2_with_registers|vision_model|visual\.trunk|model(?=\.(embeddings|norm)))\.")
LAYER = re.compile(r"^(?:encoder\.|model\.)*(?:layers?|blocks)\.(\d+)\.(.+)$")
# weights of other parts of a model: masked patches, classifiers, ViT's dense pooler, MAE's decoder, text
UNUSED = re.compile(
    r"(^|\.)(mask_token|position_ids|inv_freq|logit_scale|logit_bias)$"
    r"|^(classifier|pooler|decoder|text_model|text_projection)\."
)


def our_name(theirs: str) -> str | None:
    """Return our name of a tensor of a source, or None if the image encoder does not need it."""
    name = WRAPPER.sub("", theirs)
    if UNUSED.search(name):
        return None
    layer = LAYER.match(name)
    known, prefix = (OUR_NAME, "") if layer is None else (OUR_LAYER_NAME, f"encoder.layers.{layer[1]}.")
    name = name if layer is None else layer[2]
    if name in known:
        return prefix + known[name]
    module, _, kind = name.rpartition(".")
    if module not in known:
        raise UnsupportedEncoderError("unknown weights", "those of the image encoder and nothing else", theirs)
    return f"{prefix}{known[module]}.{kind}"


# ---- configuration --------------------------------------------------------------------------------------------------


def _sizes(config: Any, **fields: Any) -> dict[str, Any]:
    """Return the fields that all families have; `fields` override them."""
    height, width = height_and_width(config.patch_size)
    if height != width or height < 1:
        raise UnsupportedEncoderError("unsupported patch_size", "squares of at least 1 pixel", f"{height} x {width}")
    if config.num_channels not in (1, 3):
        raise UnsupportedEncoderError("unsupported num_channels", "1 or 3", config.num_channels)
    if config.hidden_act not in ACT2FN:
        raise UnsupportedEncoderError("unknown hidden_act", "an activation of transformers", repr(config.hidden_act))
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "num_channels")
    sizes = {name: getattr(config, name) for name in same}
    sizes |= {"patch_size": height, "layer_scale_init": 1.0, "num_register_tokens": 0, "pooling": "cls"}
    if "intermediate_size" not in fields:
        sizes["intermediate_size"] = config.intermediate_size
    return sizes | fields


def _with_table(config: Any, **fields: Any) -> dict[str, Any]:
    """Return the fields of a family whose positions are a learned table; its depth is set later."""
    fields = _sizes(config, rotary_axes="none", **fields)
    height, width = (edge // fields["patch_size"] for edge in height_and_width(config.image_size))
    return fields | {"position_grid": [1, height, width]}


def _dinov3(config: Any) -> dict[str, Any]:
    return _sizes(
        config,
        rotary_axes="shared",
        rope_theta=float(config.rope_theta),
        num_register_tokens=config.num_register_tokens,
        gated_mlp=config.use_gated_mlp,
        qkv_bias=config.query_bias or config.key_bias or config.value_bias,
    )


def _dinov2(config: Any) -> dict[str, Any]:
    width = int(config.hidden_size * config.mlp_ratio)
    fields: dict[str, Any] = {"intermediate_size": width, "qkv_bias": config.qkv_bias}
    if config.use_swiglu_ffn:
        fields |= {"intermediate_size": swiglu_width(width), "gated_mlp": True, "hidden_act": "silu"}
    return _with_table(config, **fields)


def swiglu_width(width: int) -> int:
    """Return the width of DINOv2's gated MLP, which has about as many weights as a plain one of `width`."""
    return (int(width * 2 / 3) + 7) // 8 * 8


def _dinov2_with_registers(config: Any) -> dict[str, Any]:
    return _dinov2(config) | {"num_register_tokens": config.num_register_tokens, "position_antialias": True}


def _vit(config: Any) -> dict[str, Any]:
    return _with_table(config, qkv_bias=config.qkv_bias)


def _vit_mae(config: Any) -> dict[str, Any]:
    return _vit(config) | {"pooling": "mean"}  # MAE trains no CLS token


def _clip(config: Any) -> dict[str, Any]:
    return _with_table(config, embedding_norm=True)


def _siglip(config: Any) -> dict[str, Any]:
    return _with_table(config, use_cls_token=False, pooling="attention" if config.vision_use_head else "mean")


# model_type of transformers -> fields of M3RetConfig. A full CLIP or SigLIP gives its vision tower.
FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "dinov3_vit": _dinov3,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2_with_registers,
    "vit": _vit,
    "vit_mae": _vit_mae,
    "clip": _clip,
    "clip_vision_model": _clip,
    "siglip": _siglip,
    "siglip_vision_model": _siglip,
}
# The processor's defaults. NUM_FRAMES gives the table of positions its depth; images of the source's size always fit.
NUM_FRAMES, MAX_PATCHES = 32, 2048
TIMM_VIT = re.compile(r"^vit_(tiny|small|base|large)_patch(\d+)_(\d+)$")
TIMM_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def model_type(name: str) -> str | None:
    """Return the `model_type` in the config.json of a folder or Hub id; None if there is none, or for open_clip.

    Raises:
        OSError: if it cannot be found.
        ValueError: if it is no JSON object.
    """
    repository, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    try:
        config, _ = PreTrainedConfig.get_config_dict(repository, revision=revision or None)
        kind = config.get("model_type")
    except (AttributeError, TypeError) as error:
        raise ValueError(f"damaged config.json: expected a JSON object, got {error}") from error
    return kind if isinstance(kind, str) else None


def is_convertible(name: str) -> bool:
    """Return whether a folder or Hub id is a 2D encoder that `convert_vit` takes. False if it cannot be read."""
    if name.startswith(OPEN_CLIP) or (Path(name).is_dir() and not Path(name, "config.json").is_file()):
        try:
            folder, is_open_clip = find_files(name)
            return is_open_clip and _timm_vit(folder) is not None
        except (InputError, ValueError, AttributeError):
            return False
    try:
        return model_type(name) in FAMILIES
    except (OSError, ValueError):
        return False


def _timm_vit(folder: Path) -> re.Match[str] | None:
    """Return the name of timm's ViT in an open_clip checkpoint, if it has one with a linear projection."""
    vision = read_json(folder / "open_clip_config.json").get("model_cfg", {}).get("vision_cfg", {})
    # open_clip's defaults; without a projection of its own, the trunk has a head
    plain = vision.get("timm_pool", "avg") in ("", "token") and vision.get("timm_proj", "linear") == "linear"
    return TIMM_VIT.match(str(vision.get("timm_model_name"))) if plain else None


# ---- conversion -----------------------------------------------------------------------------------------------------


def convert_vit(name: str, **overrides: Any) -> tuple[M3RetModel, M3RetImageProcessor]:
    """Convert a published 2D vision transformer in memory.

    Args:
        name: folder, or `ORG/NAME[@REVISION]` on the Hub; `hf-hub:ORG/NAME` for open_clip.
        overrides: fields of `M3RetConfig` that do not change the encoder, such as `pooling`, or that the inflation
            uses: `patch_depth`, and `num_channels=1` for a third of the patch weights, exact for grey scans.

    Returns:
        The encoder in evaluation mode, float32, and its image processor. The whitening is that of the source: the
        identity, or for CLIP the projection of its image embeddings.

    Raises:
        EncoderError: if it does not exist, is of no family that is supported, or its files are damaged or incomplete.
    """
    folder, is_open_clip = find_files(name)
    with encoder_errors(name, "cannot be converted", "a 2D vision transformer, see docs/start-from-a-vit.md"):
        fields, transform = _read_open_clip(name, folder) if is_open_clip else _read_transformers(name, folder)
        source = read_weights(name, folder, OPEN_CLIP_WEIGHTS if is_open_clip else WEIGHTS)
        _check_overrides(fields, overrides)
        channels = overrides.get("num_channels", fields["num_channels"])
        depth = overrides.get("patch_depth", M3RetConfig.patch_depth)
        if fields.get("position_grid"):
            fields["position_grid"][0] = -(-NUM_FRAMES // depth)
        location = name.removeprefix(OPEN_CLIP)
        origin = short_name(name) if folder == Path(location) else location
        config = M3RetConfig(**fields | {"converted_from": origin, "converted_license": _license(folder)} | overrides)
        for numbers in (transform.mean, transform.std):
            if len(set(numbers)) > 1 and len(numbers) != fields["num_channels"]:
                expected = f"{fields['num_channels']} means and standard deviations, one for each channel"
                raise EncoderError(name, UNSUPPORTED_PROCESSOR, expected, str(list(numbers)))
        folded = channels == 1 and fields["num_channels"] > 1  # the patch weights then hold mean and deviation
        mean, std = (0.5, 0.5) if folded else (list(transform.mean), list(transform.std))
        height, width = transform.size
        processor = M3RetImageProcessor(
            size=round((height * width) ** 0.5),
            num_frames=NUM_FRAMES,
            max_patches=max(MAX_PATCHES, round(height / config.patch_size) * round(width / config.patch_size)),
            image_mean=mean,
            image_std=std,
            patch_size=config.patch_size,
            patch_depth=config.patch_depth,
            num_channels=channels,
        )
        if is_open_clip:
            source = {key: value for key, value in source.items() if key.startswith("visual.")}
        used = {key: ours for key in source if (ours := our_name(key)) is not None}
        if quantised := [key for key in used if source[key].dtype not in FLOATS]:
            raise EncoderError(name, *QUANTISED, f"{source[quantised[0]].dtype} in {quantised[0]}")
        named = {ours: source[key].float() for key, ours in used.items()}
        if folded:
            _fold_channels(named, transform)
        with torch.device("meta"):
            model = M3RetModel(config)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        try:
            weights = convert_weights(named, model)
            missing = sorted(shapes.keys() - weights.keys())
        except KeyError as error:
            missing = [error.args[0]]
        except RuntimeError as error:  # of torch: a tensor cannot have the expected shape
            raise EncoderError(name, MISFIT, "tensors of its sizes", str(error)) from error
        if missing:
            raise EncoderError(name, "incomplete weights", "all of the encoder", f"none for {missing[0]}")
        for key, value in weights.items():
            if shapes.get(key) != value.shape:
                expected = f"{shapes[key]} in {key}" if key in shapes else f"no {key}"
                raise EncoderError(name, MISFIT, expected, f"{tuple(value.shape)}")
        # each in memory of its own: torch.export cannot save parts of a larger tensor
        model.load_state_dict({key: value.contiguous().clone() for key, value in weights.items()}, assign=True)
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise EncoderError(name, "damaged weights", "finite values", f"NaN or infinity in {key}")
    return model.eval(), processor


MISFIT = "weights do not fit config.json"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
QUANTISED = ("quantised weights are not supported", "float16, bfloat16 or float32")


def _check_overrides(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Check the fields of `M3RetConfig` that shall differ from those of a source."""
    free = {field.name for field in dataclasses.fields(M3RetConfig)} - fields.keys()
    free |= {"pooling", "patch_depth", "num_channels"}
    if fixed := sorted(overrides.keys() - free):
        raise UnsupportedEncoderError("invalid override", "pooling, patch_depth, num_channels", ", ".join(fixed))
    poolings = ["mean", "statistics", *(["cls"] if fields.get("use_cls_token", True) else [])]
    for name, known in (
        ("pooling", [*poolings, *(["attention"] if fields["pooling"] == "attention" else [])]),
        ("num_channels", sorted({1, fields["num_channels"]})),
    ):
        if overrides.get(name, known[0]) not in known:
            raise UnsupportedEncoderError(f"unsupported {name}", " or ".join(map(str, known)), overrides[name])
    if overrides.get("patch_depth", 1) < 1:
        raise UnsupportedEncoderError("unsupported patch_depth", "at least 1", overrides["patch_depth"])


def _read_transformers(name: str, folder: Path) -> tuple[dict[str, Any], ImageTransform]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type not in FAMILIES:
        raise EncoderError(name, "unsupported kind of model", ", ".join(FAMILIES), config.model_type)
    if getattr(config, "quantization_config", None):
        raise EncoderError(name, *QUANTISED, "a quantization_config in config.json")
    return FAMILIES[config.model_type](getattr(config, "vision_config", config)), read_transform(name, folder)


def _read_open_clip(name: str, folder: Path) -> tuple[dict[str, Any], ImageTransform]:
    found = _timm_vit(folder)
    if found is None:
        expected = "vit_{tiny,small,base,large}_patchN_SIZE of timm, pooled by its class token"
        raise EncoderError(name, "unsupported vision tower", expected, "another one")
    (d, layers, heads), p, size = TIMM_SIZES[found[1]], int(found[2]), int(found[3])
    image = ViTConfig(
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * d,
        layer_norm_eps=1e-6,  # timm's
        patch_size=p,
        image_size=size,
    )
    # timm interpolates its table of positions with antialiasing
    return _vit(image) | {"position_antialias": True}, read_open_clip_transform(folder, (size, size))


def _license(folder: Path) -> str | None:
    """Return the licence that a model card states, or None."""
    if not (folder / CARD).is_file():
        return None
    try:
        card = ModelCard((folder / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return None
    named = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return str(named) if named else None


# identifiers of the Hub's model cards; others are named as "other"
KNOWN_LICENSES = (
    *("apache-2.0", "mit", "bsd-3-clause", "openrail"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
)


def license_metadata(config: M3RetConfig) -> dict[str, Any]:
    """Return the licence of a checkpoint, for the metadata of its card: that of the encoder it was converted from."""
    if config.converted_from is None:
        return {"license": "apache-2.0"}
    if config.converted_license in KNOWN_LICENSES:
        return {"license": config.converted_license}
    return {"license": "other", "license_name": config.converted_license or "unknown"}


def convert_weights(named: Mapping[str, Tensor], model: M3RetModel) -> dict[str, Tensor]:
    """Return the weights of a converted encoder from tensors by our names, as far as they exist.

    Biases that no layer of the source has become zero, and missing gains one, which changes nothing.
    """
    config, weights = model.config, dict(named)
    d, layers = config.hidden_size, range(config.num_hidden_layers)
    shapes = {key: value.shape for key, value in model.state_dict().items()}

    convolution = weights["embeddings.patch_embeddings.weight"]  # (d, C, p, p)
    # divided over the slices of a patch, so that equal slices give the tokens of one
    inflated = convolution[:, :, None].expand(-1, -1, config.patch_depth, -1, -1) / config.patch_depth
    weights["embeddings.patch_embeddings.weight"] = inflated.flatten(1)
    weights.setdefault("embeddings.patch_embeddings.bias", torch.zeros(d))
    if "embeddings.cls_token" in weights:
        weights["embeddings.cls_token"] = weights["embeddings.cls_token"].view(1, d)
    registers = weights.get("embeddings.register_tokens", torch.zeros(0, d))
    weights["embeddings.register_tokens"] = registers.view(-1, d)
    if config.position_grid is not None:
        table = weights.pop("positions").view(-1, d)
        if config.use_cls_token:
            weights["embeddings.cls_token"] = weights["embeddings.cls_token"] + table[:1]
            table = table[1:]
        weights["embeddings.positions.plane_table"] = table
        weights["embeddings.positions.depth_table"] = torch.zeros(config.position_grid[0], d)

    has = {re.sub(r"layers\.\d+", "layers", key) for key in named}  # what any layer of the source has
    for layer in layers:
        name = f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            if (fused := weights.pop(f"{name}.mlp.gate_and_up.{kind}", None)) is not None:
                gate, up = fused.chunk(2)
                weights |= {f"{name}.mlp.gate_proj.{kind}": gate, f"{name}.mlp.up_proj.{kind}": up}
            parts = {part: weights.pop(f"{name}.attention.{part}.{kind}", None) for part in ("query", "key", "value")}
            if kind == "bias" and any(value is not None for value in parts.values()):
                for part, value in parts.items():
                    if value is None and f"encoder.layers.attention.{part}.bias" not in has:
                        parts[part] = torch.zeros(d)
            if all(value is not None for value in parts.values()):
                weights[f"{name}.attention.qkv.{kind}"] = torch.cat(
                    [value for value in parts.values() if value is not None]
                )
        for key in ("attention.out_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"):
            if f"{name}.{key}" in shapes and f"encoder.layers.{key}" not in has:
                weights.setdefault(f"{name}.{key}", torch.zeros(shapes[f"{name}.{key}"]))
        for key in ("attention_scale.gain", "mlp_scale.gain"):
            if f"encoder.layers.{key}" not in has:
                weights[f"{name}.{key}"] = torch.ones(d)

    if model.pooler is not None:
        for kind in ("weight", "bias"):
            joined = weights.pop(f"pooler.in_proj.{kind}")
            weights[f"pooler.query.{kind}"], weights[f"pooler.key_value.{kind}"] = joined.split([d, 2 * d])
        weights["pooler.probe"] = weights["pooler.probe"].view(1, d)
    else:
        weights = {key: value for key, value in weights.items() if not key.startswith("pooler.")}
    projection = weights.pop("projection", None)  # (at most d, d)
    matrix = torch.eye(d, config.pooled_size)
    if projection is not None and config.pooling == "cls" and len(projection) <= d:
        matrix = torch.nn.functional.pad(projection, (0, 0, 0, d - len(projection)))  # zeros change no cosine
    return weights | {"whitening.mean": torch.zeros(config.pooled_size), "whitening.matrix": matrix}


def _fold_channels(named: dict[str, Tensor], transform: ImageTransform) -> None:
    """Fold the three equal channels of grey scans, and their means and deviations, into patch weights of one channel.

    The processor then gives 2 x - 1 for a value x, where the source gets (x - mean) / deviation in each channel.
    """
    weight = named["embeddings.patch_embeddings.weight"].double()  # (d, C, p, p)
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (transform.mean, transform.std)
    )
    shift = (weight * (0.5 - mean) / std).sum((1, 2, 3))
    bias = named.get("embeddings.patch_embeddings.bias", torch.zeros(len(weight)))
    named["embeddings.patch_embeddings.weight"] = (weight * 0.5 / std).sum(1, keepdim=True).float()
    named["embeddings.patch_embeddings.bias"] = (bias.double() + shift).float()


# ---- back to a 2D encoder -------------------------------------------------------------------------------------------

# names in the files of the families that can be written: ours -> theirs
_DINO_LAYER = {
    "attention_norm": "norm1",
    "attention_scale.gain": "layer_scale1.lambda1",
    "mlp_norm": "norm2",
    "mlp_scale.gain": "layer_scale2.lambda1",
}
_VIT_ATTENTION = {
    **{f"attention.{part}": f"attention.attention.{part}" for part in ("query", "key", "value")},
    "attention.out_proj": "attention.output.dense",
}
WRITTEN_NAMES: dict[str, dict[str, str]] = {
    "dinov3_vit": {
        **{"embeddings.patch_embeddings": "embeddings.patch_embeddings", "norm": "norm", "layer": "layer"},
        **{f"attention.{part}": f"attention.{part[0]}_proj" for part in ("query", "key", "value")},
        **{"attention.out_proj": "attention.o_proj", **_DINO_LAYER},
        **{f"mlp.{part}_proj": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    },
    "dinov2": {
        **{"embeddings.patch_embeddings": "embeddings.patch_embeddings.projection", "norm": "layernorm"},
        **{"layer": "encoder.layer", **_VIT_ATTENTION, **_DINO_LAYER},
        **{"mlp.gate_and_up": "mlp.weights_in", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"},
    },
    "vit": {
        **{"embeddings.patch_embeddings": "embeddings.patch_embeddings.projection", "norm": "layernorm"},
        **{"layer": "encoder.layer", **_VIT_ATTENTION},
        **{"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after"},
        **{"mlp.up_proj": "intermediate.dense", "mlp.down_proj": "output.dense"},
    },
}


def export_vit(model: M3RetModel, processor: M3RetImageProcessor, output: Path) -> str:
    """Write an encoder as a 2D checkpoint of transformers, which gives the same tokens for one slice.

    The weights of a patch are added up over its slices. Depth, pooling and whitening are left out. A checkpoint that
    was converted and not trained is written with the weights of its source, bit for bit, up to the position of the
    class token, which is added to the token itself.

    Args:
        model: encoder with the architecture of DINOv3, DINOv2 (with registers or not) or ViT.
        processor: its image processor.
        output: folder to create.

    Returns:
        The `model_type` of the checkpoint.

    Raises:
        InputError: if `output` exists, or no 2D architecture has the positions or the MLP of the encoder.
    """
    if output.exists():
        raise InputError(f"--output: expected a new folder, got {output}, which exists. Choose another one.")
    config = _config_2d(model, processor)
    weights = _weights_2d(model, config)
    mean, std = (
        list(value) if isinstance(value, list) else [value] * processor.num_channels
        for value in (processor.image_mean, processor.image_std)
    )
    transform = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": processor.size, "width": processor.size},
        **{"do_resize": True, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255},  # bilinear, as here
        **{"do_normalize": True, "image_mean": mean, "image_std": std},
    }
    with atomic_folder(output) as folder:
        config.save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        atomic_write_text(folder / "preprocessor_config.json", json.dumps(transform, indent=2) + "\n")
    return config.model_type


def _config_2d(model: M3RetModel, processor: M3RetImageProcessor) -> PreTrainedConfig:
    """Return the configuration of the 2D architecture that an encoder has."""
    config = model.config
    grid = config.position_grid
    is_rotary = config.rotary_axes == "shared" and grid is None
    has_table = config.rotary_axes == "none" and grid is not None and grid[1] == grid[2]
    if not (is_rotary or has_table) or not config.use_cls_token or config.embedding_norm:
        raise InputError(
            "no 2D architecture fits this encoder: expected the positions, class token and norms of DINOv3, DINOv2 or "
            f"ViT, got rotary_axes {config.rotary_axes!r}, position_grid {grid}, use_cls_token {config.use_cls_token} "
            f"and embedding_norm {config.embedding_norm}. Encoders that were converted from these can be written."
        )
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "num_channels")
    fields: dict[str, Any] = {name: getattr(config, name) for name in same} | {"patch_size": config.patch_size}
    if is_rotary:
        biases = dict.fromkeys(("query_bias", "key_bias", "value_bias"), config.qkv_bias)
        fields |= {"image_size": processor.size, "intermediate_size": config.intermediate_size, **biases}
        fields |= {"rope_theta": float(config.rope_theta), "use_gated_mlp": config.gated_mlp}
        return DINOv3ViTConfig(
            **fields, num_register_tokens=config.num_register_tokens, architectures=["DINOv3ViTModel"]
        )
    assert grid is not None
    fields |= {"image_size": grid[1] * config.patch_size, "qkv_bias": config.qkv_bias}
    gains = [value for key, value in model.state_dict().items() if key.endswith("_scale.gain")]
    has_gains = any(not gain.eq(1).all() for gain in gains)
    if not (config.num_register_tokens or config.position_antialias or config.gated_mlp or has_gains):
        return ViTConfig(**fields, intermediate_size=config.intermediate_size, architectures=["ViTModel"])
    widths = {ratio: config.hidden_size * ratio for ratio in range(1, 17)}
    if config.gated_mlp and config.hidden_act == "silu":  # DINOv2's gate has no other
        widths = {ratio: swiglu_width(width) for ratio, width in widths.items()}
    ratio = next((ratio for ratio, width in widths.items() if width == config.intermediate_size), None)
    if ratio is None:
        raise InputError(
            f"no 2D architecture fits this encoder: expected the width of DINOv2's MLP, one of {[*widths.values()]}, "
            f"got {config.intermediate_size}."
        )
    fields |= {"mlp_ratio": ratio, "use_swiglu_ffn": config.gated_mlp}
    if config.num_register_tokens or config.position_antialias:
        registers = config.num_register_tokens
        return Dinov2WithRegistersConfig(
            **fields, num_register_tokens=registers, architectures=["Dinov2WithRegistersModel"]
        )
    return Dinov2Config(**fields, architectures=["Dinov2Model"])


def _weights_2d(model: M3RetModel, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Return the weights of an encoder under the names of a 2D architecture."""
    ours, fields = {key: value.detach().cpu() for key, value in model.state_dict().items()}, model.config
    family = config.model_type.removesuffix("_with_registers")
    names, d = WRITTEN_NAMES[family], fields.hidden_size
    patches = ours["embeddings.patch_embeddings.weight"]
    shape = (fields.num_channels, fields.patch_depth, fields.patch_size, fields.patch_size)
    # float64 adds up the equal weights of an inflated patch without rounding
    summed = patches.double().unflatten(1, shape).sum(2).to(patches.dtype)
    written = {
        "embeddings.cls_token": ours["embeddings.cls_token"].view(1, 1, d),
        f"{names['embeddings.patch_embeddings']}.weight": summed,
        f"{names['embeddings.patch_embeddings']}.bias": ours["embeddings.patch_embeddings.bias"],
    }
    if family != "vit":
        written["embeddings.mask_token"] = torch.zeros(1, 1, d) if family == "dinov3_vit" else torch.zeros(1, d)
    if family == "dinov3_vit" or config.model_type == "dinov2_with_registers":
        written["embeddings.register_tokens"] = ours["embeddings.register_tokens"][None]
    if model.embeddings.positions is not None:
        depth, size = ours["embeddings.positions.depth_table"], fields.position_grid[0]
        middle = interpolation_weights(torch.zeros(1), torch.ones(1), size, fields.position_antialias)  # one slice
        plane = ours["embeddings.positions.plane_table"] + middle @ depth
        written["embeddings.position_embeddings"] = torch.cat([torch.zeros(1, d), plane])[None]
    written |= {f"{names['norm']}.{kind}": ours[f"norm.{kind}"] for kind in ("weight", "bias")}
    for layer in range(fields.num_hidden_layers):
        start = f"encoder.layers.{layer}."
        parts = {key.removeprefix(start): value for key, value in ours.items() if key.startswith(start)}
        for kind in ("weight", "bias") if fields.qkv_bias else ("weight",):
            fused = parts.pop(f"attention.qkv.{kind}").chunk(3)
            for part, value in zip(("query", "key", "value"), fused, strict=True):
                parts[f"attention.{part}.{kind}"] = value
        if family == "dinov2" and fields.gated_mlp:
            for kind in ("weight", "bias"):
                halves = [parts.pop(f"mlp.{part}_proj.{kind}") for part in ("gate", "up")]
                parts[f"mlp.gate_and_up.{kind}"] = torch.cat(halves)
                parts[f"mlp.weights_out.{kind}"] = parts.pop(f"mlp.down_proj.{kind}")
        for key, value in parts.items():
            if family == "vit" and key.endswith("_scale.gain"):
                continue  # all are 1
            module, _, kind = key.rpartition(".")
            theirs = names[key] if key in names else f"{names.get(module, module)}.{kind}"
            written[f"{names['layer']}.{layer}.{theirs}"] = value
    return {key: value.contiguous().clone() for key, value in written.items()}
