"""Configuration of the M3Ret encoder and its masked-autoencoder decoder, with the source of each default.

This file is copied into every checkpoint and imports nothing else of the project.
"""

# no `from __future__ import annotations`: @strict checks values against the annotations, which must not be strings

import copy
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


# with remote code, `pipeline` finds the class of the task here; the package registers it instead
FEATURE_EXTRACTION = {
    "image-feature-extraction": {
        "impl": "pipeline_m3ret.M3RetFeatureExtractionPipeline",
        "pt": ["AutoModel"],
        "type": "image",
    }
}
CLASSIFICATION = {
    "image-classification": {
        "impl": "pipeline_m3ret.M3RetImageClassificationPipeline",
        "pt": ["AutoModelForImageClassification"],
        "type": "image",
    }
}

# Building a layer takes milliseconds, so a million of them would take an hour before any weight is compared. The
# deepest published transformer has 1,000 layers (DeepNet, arXiv 2203.00555).
MAX_LAYERS = 1000

# values of the fields that name one of several methods
CHOICES = {
    "pooling": ("mean", "cls", "statistics", "attention"),
    "rotary_axes": ("separate", "shared", "none"),
    "loss_weighting": ("scan", "patch"),
}

# fields that determine the tokens of a scan; with another value, the weights of an encoder give other tokens
ENCODER_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("patch_size", "patch_depth", "num_channels", "num_register_tokens", "qkv_bias", "rope_theta"),
    *("rotary_axes", "position_grid", "position_antialias", "use_cls_token", "embedding_norm", "gated_mlp"),
)


@strict
class M3RetConfig(PreTrainedConfig):
    """Configuration of [`M3RetModel`] and [`M3RetForPreTraining`].

    The defaults give ViT-B; `vitt()`, `vits()` and `vitl()` give the other sizes. The comments of the fields give their
    meaning and the source of the default.
    """

    model_type = "m3ret"

    # ViT-B/16 (Dosovitskiy et al., arXiv 2010.11929, table 1)
    hidden_size: int = 768  # width of the tokens
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072  # width of the MLP
    patch_size: int = 16  # edge of a patch within a slice, in pixels
    patch_depth: int = 4  # slices or frames of a patch; M3Ret (arXiv 2509.01360) uses patches of 4 x 16 x 16
    num_channels: int = 3  # grey scans are repeated to RGB, so that colour video and CT share one patch embedding
    num_register_tokens: int = 4  # they remove artefacts from the patch features (Darcet et al., arXiv 2309.16588)
    hidden_act: str = "gelu"  # activation of the MLP, as in ViT
    layer_norm_eps: float = 1e-6  # as in ViT and DINOv2
    qkv_bias: bool = True  # whether queries, keys and values have a bias, as in ViT
    attention_dropout: float | int = 0.0  # MAE trains without it (arXiv 2111.06377, table 8)
    # stochastic depth rate of the last layer; rates grow linearly from 0. MAE trains without it; SimDINO runs set 0.1
    drop_path_rate: float | int = 0.0
    # initial gain of the residual branches. CaiT (arXiv 2103.17239, section 2): 0.1 up to 18 layers, 1e-5 up to 24
    layer_scale_init: float | int = 0.1
    # ratio of the longest to the shortest period of the rotary position embedding. DINOv3 (arXiv 2508.10104)
    rope_theta: float | int = 100.0
    # What `pooler_output` holds: the "mean" of a scan's patch tokens, its "cls" token, or "statistics": the mean and
    # standard deviation of its patch tokens, concatenated (statistics pooling, Snyder et al., Interspeech 2017). The
    # standard deviation captures texture, which the mean averages away. Masked autoencoding has no loss on the CLS
    # token, so its checkpoints pool patches (`global_pool` in MAE); SimDINO as published trains the CLS token. See
    # docs/experiments.md for a comparison. "attention" is the pooling head of SigLIP (arXiv 2303.15343): a learned
    # query attends to the patch tokens, and an MLP follows.
    pooling: str = "mean"
    initializer_range: float = 0.02  # standard deviation of the truncated normal that initialises weights, as in ViT

    # What 2D vision transformers have otherwise (docs/start-from-a-vit.md). The defaults are M3Ret's own architecture.
    #
    # How the channel pairs of a head are rotated. "separate": a third of them for each of depth, height and width.
    # "shared": half for height and half for width, as in DINOv3, and every second pair for depth too; the depth of a
    # single slice is zero, so that it is rotated as in DINOv3. "none": positions come from the table below alone.
    rotary_axes: str = "separate"
    # patches along depth, height and width of a learned table of positions, which is interpolated to the grid of each
    # scan and added to its patches, as in ViT; null for none
    position_grid: list[int] | None = None
    position_antialias: bool = False  # whether the table is interpolated with antialiasing, as in DINOv2 with registers
    use_cls_token: bool = True  # SigLIP has none
    embedding_norm: bool = False  # layer norm of the embedded tokens before the first layer, as in CLIP
    gated_mlp: bool = False  # MLP with a gate (SwiGLU, arXiv 2002.05202), as in the largest DINOv2 and DINOv3
    converted_from: str | None = None  # name of the 2D encoder from which the weights were converted
    converted_license: str | None = None  # its licence, as its model card states it

    # masked autoencoding
    mask_ratio: float = 0.75  # fraction of each scan's patches hidden from the encoder; MAE, and SPECTRE for 3D CT
    decoder_hidden_size: int = 512  # MAE-ST (arXiv 2205.09113), which pretrains on video
    decoder_num_hidden_layers: int = 4  # MAE-ST and VideoMAE (arXiv 2203.12602)
    decoder_num_attention_heads: int = 8  # half of MAE's 16, so that a head has 64 channels to rotate in three axes
    norm_pixel_eps: float = 1e-6  # added to the variance of a patch before its pixels are normalised; MAE's code
    # What counts equally in the loss, "scan" or "patch". With "patch", a CT has at least eight times the weight of an
    # X-ray and would dominate the loss.
    loss_weighting: str = "scan"

    def __post_init__(self, **kwargs: Any) -> None:
        if not __name__.startswith("transformers_modules"):  # `pipeline` would insist on remote code
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a config. If `pipeline` asks for a task by name, the config lists the pipelines of all tasks."""
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        pipelines = FEATURE_EXTRACTION | CLASSIFICATION
        if kwargs.get("_from_pipeline") in pipelines and hasattr(config, "custom_pipelines"):
            config.custom_pipelines = copy.deepcopy(pipelines)  # `pipeline` changes it
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """Return all values as for JSON, with the pipelines that a checkpoint brings along."""
        # a single task, so that `pipeline` needs no name of it
        has_head = "M3RetForImageClassification" in (self.architectures or [])
        return super().to_dict() | {"custom_pipelines": CLASSIFICATION if has_head else FEATURE_EXTRACTION}

    def validate_architecture(self) -> None:
        """Check the values of the fields, after `@strict` has checked their types.

        `@strict` raises the `ValueError` as a `StrictDataclassClassValidationError`.
        """
        for prefix in ("", "decoder_"):
            layers = f"{prefix}num_hidden_layers"
            if not 1 <= getattr(self, layers) <= MAX_LAYERS:
                raise ValueError(f"invalid {layers}: expected 1 to {MAX_LAYERS}, got {getattr(self, layers)}.")
            width, heads = f"{prefix}hidden_size", f"{prefix}num_attention_heads"
            head_dim, rest = divmod(getattr(self, width), getattr(self, heads))
            if rest or head_dim % 2 or head_dim < 6:
                raise ValueError(
                    f"{width} does not fit {heads}: expected an even number of channels per head, at least 6 (a rotary "
                    f"pair for each of depth, height and width), got {getattr(self, width)} / {getattr(self, heads)}."
                )
        if self.rotary_axes == "shared" and self.hidden_size // self.num_attention_heads % 4:
            raise ValueError(
                "hidden_size does not fit rotary_axes 'shared': expected a multiple of 4 channels per head, got "
                f"{self.hidden_size} / {self.num_attention_heads}."
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name}: expected {', '.join(map(repr, known))}, got {getattr(self, name)!r}."
                )
        if self.position_grid is not None and (len(self.position_grid) != 3 or min(self.position_grid) < 1):
            raise ValueError(
                f"invalid position_grid: expected [depth, height, width] of at least 1, got {self.position_grid}."
            )
        if self.pooling == "cls" and not self.use_cls_token:
            raise ValueError("pooling 'cls' does not fit use_cls_token: expected true, got false.")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"invalid mask_ratio: expected a number between 0 and 1, got {self.mask_ratio}.")

    @property
    def patch_values(self) -> int:
        """Number of values in one patch row: channels x depth x height x width."""
        return self.num_channels * self.patch_depth * self.patch_size**2

    @property
    def pooled_size(self) -> int:
        """Width of `pooler_output`: the hidden size, or twice that for statistics pooling."""
        return self.hidden_size * (2 if self.pooling == "statistics" else 1)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before a scan's patches: CLS and registers."""
        return int(self.use_cls_token) + self.num_register_tokens

    @classmethod
    def vitt(cls, **overrides: Any) -> Self:
        """Return ViT-Ti of DeiT (arXiv 2012.12877) with a small decoder: 5.4 M parameters in the encoder's layers."""
        encoder = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
        decoder = {"decoder_hidden_size": 192, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 3}
        return cls(**encoder | decoder | overrides)

    @classmethod
    def vits(cls, **overrides: Any) -> Self:
        """Return ViT-S of DeiT (arXiv 2012.12877), 21 M parameters. Its decoder is two thirds as wide."""
        encoder = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
        decoder = {"decoder_hidden_size": 256, "decoder_num_attention_heads": 4}
        return cls(**encoder | decoder | overrides)

    @classmethod
    def vitb(cls, **overrides: Any) -> Self:
        """Return ViT-B (arXiv 2010.11929), 86 M parameters."""
        return cls(**overrides)

    @classmethod
    def vitl(cls, **overrides: Any) -> Self:
        """Return ViT-L (arXiv 2010.11929), 304 M parameters, with the layer scale of CaiT for 24 layers."""
        sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        return cls(**sizes | {"layer_scale_init": 1e-5} | overrides)


__all__ = ["M3RetConfig"]
