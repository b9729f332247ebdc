"""The shape of an M3Ret encoder and of its masked-autoencoder decoder, with where each default comes from.

This file travels inside every checkpoint, so it imports nothing of the rest of the project. (No postponed annotations
here: `@strict` checks values against the types that it finds, and would take a string for one that allows anything.)
"""

from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class M3RetConfig(PreTrainedConfig):
    r"""
    Configuration of [`M3RetModel`] and [`M3RetForPreTraining`]. The defaults give ViT-B; `vitt()`, `vits()` and
    `vitl()` give the other sizes.

    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`):
        Width, depth, heads and MLP width. ViT-B of Dosovitskiy et al., arXiv 2010.11929, table 1.
    patch_size (`int`, defaults to 16):
        Edge of a patch within a slice, in pixels (ViT-B/16).
    patch_depth (`int`, defaults to 4):
        Slices or frames in a patch. M3Ret, arXiv 2509.01360, cuts every scan into 4x16x16 patches.
    num_channels (`int`, defaults to 3):
        Grey scans are repeated to RGB, so that one patch embedding serves colour video and CT alike.
    num_register_tokens (`int`, defaults to 4):
        Darcet et al., arXiv 2309.16588: four registers take the artefacts out of the patch features.
    hidden_act, layer_norm_eps:
        GELU and 1e-6, as in ViT and DINOv2.
    qkv_bias (`bool`, defaults to `True`):
        As in ViT.
    attention_dropout, drop_path_rate (`float`, default to 0):
        MAE trains without either (arXiv 2111.06377, table 8); SimDINO sets `drop_path_rate` to 0.1.
    layer_scale_init (`float`, defaults to 0.1):
        Start of the per-channel residual gain, CaiT, arXiv 2103.17239, section 2: 0.1 up to 18 layers, 1e-5 up to 24.
    rope_theta (`float`, defaults to 100):
        Longest over shortest period of the rotary position, DINOv3, arXiv 2508.10104.
    pooling (`"mean"`, `"cls"` or `"statistics"`, defaults to `"mean"`):
        What `pooler_output` is: the mean of a scan's patch tokens, its CLS token, or mean and standard deviation of its
        patch tokens side by side (statistics pooling, Snyder et al., Interspeech 2017), twice as wide. Masked
        autoencoding gives the CLS token no target of its own, so its checkpoints pool patches (He et al. call it
        `global_pool`); SimDINO as published trains the CLS token. The deviation
        sees texture, which a mean over patches averages away; README, Results, has both.
    initializer_range (`float`, defaults to 0.02):
        Standard deviation of the truncated normal of ViT.
    mask_ratio (`float`, defaults to 0.75):
        Part of each scan's patches that the encoder does not see in pretraining (MAE 2D; SPECTRE 3D CT uses the same).
    decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads:
        512 wide, 4 blocks as for video in MAE-ST (arXiv 2205.09113) and VideoMAE (arXiv 2203.12602). Eight heads
        and not MAE's 16, so that a head has 64 channels to turn in three axes.
    norm_pixel_eps (`float`, defaults to 1e-6):
        Added to each patch's variance before its pixels are normalised (MAE reference code).
    loss_weighting (`"scan"` or `"patch"`, defaults to `"scan"`):
        What weighs the same in the loss of masked autoencoding. By scan, since a CT has eight times the patches of an
        X-ray and more, and would outweigh it so.
    """

    model_type = "m3ret"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    patch_size: int = 16
    patch_depth: int = 4
    num_channels: int = 3
    num_register_tokens: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    attention_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    layer_scale_init: float | int = 0.1
    rope_theta: float | int = 100.0
    pooling: str = "mean"
    initializer_range: float = 0.02
    mask_ratio: float = 0.75
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 4
    decoder_num_attention_heads: int = 8
    norm_pixel_eps: float = 1e-6
    loss_weighting: str = "scan"

    def validate_architecture(self) -> None:
        """Cross-checks that single fields cannot express; called by `@strict` after the types are checked."""
        for width, heads in (
            ("hidden_size", "num_attention_heads"),
            ("decoder_hidden_size", "decoder_num_attention_heads"),
        ):
            head_dim, rest = divmod(getattr(self, width), getattr(self, heads))
            if rest or head_dim % 2 or head_dim < 6:
                raise ValueError(
                    f"{width}={getattr(self, width)} over {heads}={getattr(self, heads)} must give each head an even "
                    "number of channels, at least 6 (one rotary pair for each of depth, height and width)"
                )
        if self.pooling not in ("mean", "cls", "statistics"):
            raise ValueError(f"pooling is 'mean', 'cls' or 'statistics', not {self.pooling!r}")
        if self.loss_weighting not in ("scan", "patch"):
            raise ValueError(f"loss_weighting is 'scan' or 'patch', not {self.loss_weighting!r}")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio lies strictly between 0 and 1, not {self.mask_ratio}")

    @property
    def patch_values(self) -> int:
        """Numbers in one patch row: channels x depth x height x width."""
        return self.num_channels * self.patch_depth * self.patch_size**2

    @property
    def pooled_size(self) -> int:
        """Width of `pooler_output`: the hidden size, or of statistics twice that."""
        return self.hidden_size * (2 if self.pooling == "statistics" else 1)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of a scan's patches: CLS and the registers."""
        return 1 + self.num_register_tokens

    @classmethod
    def vitt(cls, **overrides: Any) -> Self:
        """ViT-Ti of DeiT (arXiv 2012.12877), 5.4 M encoder parameters plus the patch embedding; a decoder to match."""
        return cls(
            **{
                "hidden_size": 192,
                "num_attention_heads": 3,
                "intermediate_size": 768,
                "decoder_hidden_size": 192,
                "decoder_num_hidden_layers": 2,
                "decoder_num_attention_heads": 3,
            }
            | overrides
        )

    @classmethod
    def vits(cls, **overrides: Any) -> Self:
        """ViT-S of DeiT (arXiv 2012.12877), 21 M parameters; VideoMAE's decoder of half the encoder's width or more."""
        return cls(
            **{
                "hidden_size": 384,
                "num_attention_heads": 6,
                "intermediate_size": 1536,
                "decoder_hidden_size": 256,
                "decoder_num_attention_heads": 4,
            }
            | overrides
        )

    @classmethod
    def vitb(cls, **overrides: Any) -> Self:
        """ViT-B of arXiv 2010.11929, 86 M parameters."""
        return cls(**overrides)

    @classmethod
    def vitl(cls, **overrides: Any) -> Self:
        """ViT-L of arXiv 2010.11929, 304 M parameters; layer scale 1e-5 as CaiT asks for 24 layers."""
        return cls(
            **{
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
                "layer_scale_init": 1e-5,
            }
            | overrides
        )


__all__ = ["M3RetConfig"]
