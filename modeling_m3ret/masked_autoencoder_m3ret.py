"""Masked autoencoding (MAE, arXiv 2111.06377) of packed scans: decoder, masks and loss.

Of the `P` patches in the pack, `K` are visible and `M` masked; all other shapes are as in `packing_m3ret`. This file is
copied into every checkpoint and imports nothing else of the project.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_m3ret import M3RetConfig
from .modeling_m3ret import M3RetLayer, M3RetModel, M3RetPreTrainedModel, rotary_tables
from .packing_m3ret import PackLayout, patch_coordinates


class M3RetDecoder(M3RetPreTrainedModel):
    """Light decoder of MAE (arXiv 2111.06377, section 3): predict the pixels of masked patches from visible ones."""

    def __init__(self, config: M3RetConfig):
        super().__init__(config)
        width = config.decoder_hidden_size
        self.input_proj = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.layers = nn.ModuleList(
            M3RetLayer(config, width, config.decoder_num_attention_heads, 4 * width)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.output_proj = nn.Linear(width, config.patch_values)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.trunc_normal_(self.mask_token, mean=0.0, std=self.config.initializer_range)

    def forward(
        self,
        prefix: Tensor,
        visible_patches: Tensor,
        visible: Tensor,
        masked: Tensor,
        coordinates: Tensor,
        patch_counts: Sequence[int],
    ) -> Tensor:
        """Predict the pixels of the masked patches: `(M, C*t*p*p)`.

        Args:
            prefix: encoded CLS and registers `(B, prefix, d)`.
            visible_patches: encoded visible patches `(K, d)`.
            visible: their rows in the pack, int64 `(K,)`.
            masked: rows of the masked patches in the pack, int64 `(M,)`.
            coordinates: `(P, 3)`, from `patch_coordinates`.
            patch_counts: visible and masked patches of each scan together.
        """
        prefix, visible_patches = self.input_proj(prefix), self.input_proj(visible_patches)
        rows = self.mask_token.to(visible_patches.dtype).repeat(coordinates.shape[0], 1)
        rows = rows.index_copy(0, visible, visible_patches)  # (P, width)
        layout = PackLayout.from_patch_counts(patch_counts, prefix.shape[1])
        config = self.config
        rotary = rotary_tables(
            layout.join(coordinates.new_zeros(*prefix.shape[:2], 3), coordinates),
            config.decoder_hidden_size // config.decoder_num_attention_heads,
            float(config.rope_theta),
        )
        tokens = layout.join(prefix, rows)
        for layer in self.layers:
            tokens = layer(tokens, layout, rotary)
        _, rows = layout.split(tokens)
        return self.output_proj(self.norm(rows[masked]))


@dataclass
class M3RetForPreTrainingOutput(ModelOutput):
    """Output of [`M3RetForPreTraining`]."""

    loss: Tensor | None = None  # scalar, see `masked_patch_loss`
    logits: Tensor | None = None  # predicted pixels of the masked patches, `(M, C*t*p*p)`
    masked: Tensor | None = None  # rows of the masked patches in the pack, int64 `(M,)`
    weight: int | None = None  # number of scans, or of patches, that the loss averages over


class M3RetForPreTraining(M3RetPreTrainedModel):
    """Masked autoencoder (MAE, arXiv 2111.06377) for packed scans. The encoder sees only the visible patches."""

    def __init__(self, config: M3RetConfig):
        super().__init__(config)
        self.m3ret = M3RetModel(config)
        self.decoder = M3RetDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.m3ret.get_input_embeddings()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, grid_thw: Tensor | None = None, noise: Tensor | None = None, **kwargs: Any
    ) -> M3RetForPreTrainingOutput:
        """Mask patches, predict them and compute the loss.

        `pixel_values` and `grid_thw` are those of [`M3RetModel`]. The `noise` of `choose_visible` is sampled if None;
        pass it to make the mask reproducible.
        """
        rows, grids = self.m3ret.prepare_rows(pixel_values, grid_thw)
        counts = [math.prod(grid) for grid in grids]
        coordinates = patch_coordinates(grids, rows.device)
        noise = torch.rand(rows.shape[0], device=rows.device) if noise is None else noise
        config = self.config
        visible, masked, visible_counts = choose_visible(noise, counts, [config.mask_ratio] * len(counts))

        layout = PackLayout.from_patch_counts(visible_counts, config.num_prefix_tokens)
        tokens, _ = self.m3ret.encode(rows[visible], coordinates[visible], layout, **kwargs)
        prefix, patches = layout.split(tokens)
        predicted = self.decoder(prefix, patches, visible, masked, coordinates, counts)  # (M, C*t*p*p)

        target = self.m3ret.embeddings.repeat_slices(rows[masked])
        masked_counts = [count - num_visible for count, num_visible in zip(counts, visible_counts, strict=True)]
        loss, weight = masked_patch_loss(predicted, target, masked_counts, config.norm_pixel_eps, config.loss_weighting)
        return M3RetForPreTrainingOutput(loss=loss, logits=predicted, masked=masked, weight=weight)


def choose_visible(
    noise: Tensor, patch_counts: Sequence[int], mask_ratios: Sequence[float]
) -> tuple[Tensor, Tensor, list[int]]:
    """Select the visible patches of each scan: those of lowest noise.

    Of n patches of a scan, round(n * mask ratio) are masked, but at least one stays visible.

    Args:
        noise: float `(P,)` in [0, 1).
        patch_counts: patches of each scan.
        mask_ratios: mask ratio of each scan.

    Returns:
        Rows of the visible patches, int64 `(K,)`, and of the masked patches, int64 `(M,)`, both scan after scan; and
        the number of visible patches of each scan.
    """
    visible_counts = [max(1, n - round(n * ratio)) for n, ratio in zip(patch_counts, mask_ratios, strict=True)]
    device = noise.device
    counts = torch.tensor(patch_counts, device=device)
    scan = torch.arange(len(patch_counts), device=device).repeat_interleave(counts, output_size=noise.shape[0])
    shuffled = noise.argsort()
    shuffled = shuffled[scan[shuffled].argsort(stable=True)]  # rows of scan 0 in random order, then of scan 1, ...
    rank = torch.arange(noise.shape[0], device=device) - (counts.cumsum(0) - counts)[scan]
    is_visible = rank < torch.tensor(visible_counts, device=device)[scan]
    return shuffled[is_visible], shuffled[~is_visible], visible_counts


def normalise_patches(rows: Tensor, eps: float) -> Tensor:
    """Normalise each patch to mean 0 and unbiased variance 1: (x - mean) / sqrt(var + eps), as in MAE, section 3.

    Computed in float32 as a layer norm, in one pass over memory. Layer norm uses the biased variance, which is
    (n - 1) / n of the unbiased one.
    """
    n = rows.shape[-1]
    biased = (n - 1) / n
    gain = torch.full((n,), math.sqrt(biased), device=rows.device)
    return nn.functional.layer_norm(rows.float(), (n,), weight=gain, eps=eps * biased)


def masked_patch_loss(
    predicted: Tensor, target: Tensor, masked_counts: Sequence[int], eps: float, weighting: str
) -> tuple[Tensor, int]:
    """Return the mean squared error of the predictions against normalised pixels, and its weight.

    The weight is the number of scans, or of patches, that the error averages over. Weighted by it, the mean loss of
    several packs equals the loss of one large pack.

    Args:
        predicted: `(M, C*t*p*p)`, scan after scan.
        target: pixels of the same patches, not yet normalised.
        masked_counts: masked patches of each scan.
        eps: added to the variance of a patch, see `normalise_patches`.
        weighting: `"scan"` averages over the masked patches of each scan, then over the scans that have any. `"patch"`
            averages over all masked patches.

    Returns:
        A float32 scalar and the weight.
    """
    by_scan = [count for count in masked_counts if count]
    weight = sum(by_scan) if weighting == "patch" else len(by_scan)
    errors = nn.functional.mse_loss(predicted.float(), normalise_patches(target, eps), reduction="none").mean(
        -1
    )  # (M,)
    if not by_scan:  # every scan is a single patch: a zero gradient, which other ranks can add to theirs
        return predicted.sum() * 0, weight
    if weighting == "patch":
        return errors.mean(), weight
    return torch.stack([scan.mean() for scan in errors.split(by_scan)]).mean(), weight


__all__ = ["M3RetForPreTraining"]
