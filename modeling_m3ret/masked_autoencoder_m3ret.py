"""Masked autoencoding (MAE, arXiv 2111.06377) of packed scans: the decoder, the masks and the loss.

`B` scans, `P` patches in the pack, `K` of them visible and `M` masked, `d` hidden size; other letters as in
`modeling_m3ret`. This file travels inside every checkpoint and imports nothing of the rest of the project.
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
from .packing_m3ret import PackLayout, patch_places


class M3RetDecoder(M3RetPreTrainedModel):
    """Light decoder of MAE (arXiv 2111.06377, section 3): fills in mask tokens and predicts their pixels."""

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
        places: Tensor,
        patch_counts: Sequence[int],
    ) -> Tensor:
        """Encoded prefix `(B, prefix, d)`, visible patches `(K, d)` -> pixels of masked patches `(M, C*t*p*p)`."""
        prefix, visible_patches = self.input_proj(prefix), self.input_proj(visible_patches)
        rows = self.mask_token.to(visible_patches.dtype).repeat(places.shape[0], 1)
        rows = rows.index_copy(0, visible, visible_patches)  # (P, width)
        layout = PackLayout.of(patch_counts, prefix.shape[1])
        config = self.config
        rotary = rotary_tables(
            layout.join(places.new_zeros(*prefix.shape[:2], 3), places),
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
    """
    loss: scalar; mean squared error over normalised pixels of masked patches, weighed as `loss_weighting` says.
    logits: predicted pixels of the masked patches, `(M, C*t*p*p)`.
    masked: their rows in the pack, int64 `(M,)`.
    weight: of how many scans, or patches, the loss is the mean; see `loss_weight`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    masked: Tensor | None = None
    weight: int | None = None


class M3RetForPreTraining(M3RetPreTrainedModel):
    """Masked autoencoding (MAE, arXiv 2111.06377) of packed scans; the encoder sees a quarter of each scan."""

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
        """
        Args:
            pixel_values, grid_thw: as for [`M3RetModel`].
            noise: float `(P,)` in [0, 1), one number a patch; the lowest of each scan stay visible. Drawn here when
                absent; given, it makes the mask a property of the sample.
        """
        rows, grids = self.m3ret.rows_and_grids(pixel_values, grid_thw)
        counts = [math.prod(grid) for grid in grids]
        places = patch_places(grids, rows.device)
        noise = torch.rand(rows.shape[0], device=rows.device) if noise is None else noise
        visible, masked, visible_counts = choose_visible(noise, counts, [self.config.mask_ratio] * len(counts))

        layout, encoded = self.m3ret.encode(rows[visible], places[visible], visible_counts, **kwargs)
        prefix, patches = layout.split(self.m3ret.norm(encoded.last_hidden_state))
        predicted = self.decoder(prefix, patches, visible, masked, places, counts)  # (M, C*t*p*p)

        target = self.m3ret.embeddings.repeat_slices(rows[masked])
        masked_counts = [count - seen for count, seen in zip(counts, visible_counts, strict=True)]
        config = self.config
        loss = masked_patch_loss(predicted, target, masked_counts, config.norm_pixel_eps, config.loss_weighting)
        weight = loss_weight(masked_counts, config.loss_weighting)
        return M3RetForPreTrainingOutput(loss=loss, logits=predicted, masked=masked, weight=weight)


def choose_visible(
    noise: Tensor, patch_counts: Sequence[int], mask_ratios: Sequence[float]
) -> tuple[Tensor, Tensor, list[int]]:
    """Random masking per scan: visible rows `(K,)`, masked rows `(M,)`, both scan after scan, and visible of each scan.

    Of a scan's n patches round(n * its mask ratio) are masked, but one always stays visible.
    """
    visible_counts = [max(1, n - round(n * ratio)) for n, ratio in zip(patch_counts, mask_ratios, strict=True)]
    device = noise.device
    counts = torch.tensor(patch_counts, device=device)
    scan = torch.arange(len(patch_counts), device=device).repeat_interleave(counts, output_size=noise.shape[0])
    shuffled = (scan + noise.double()).argsort()  # rows of scan 0 in random order, then of scan 1, ...
    rank = torch.arange(noise.shape[0], device=device) - (counts.cumsum(0) - counts)[scan]
    seen = rank < torch.tensor(visible_counts, device=device)[scan]
    return shuffled[seen], shuffled[~seen], visible_counts


def normalise_patches(rows: Tensor, eps: float) -> Tensor:
    """Each patch `(M, n)` to mean 0 and unbiased variance 1 in float32: (x - mean) / sqrt(var + eps), MAE, section 4.1.

    A layer norm, so one pass over memory; its biased variance is (n - 1) / n of the unbiased one.
    """
    n = rows.shape[-1]
    biased = (n - 1) / n
    gain = torch.full((n,), math.sqrt(biased), device=rows.device)
    return nn.functional.layer_norm(rows.float(), (n,), weight=gain, eps=eps * biased)


def masked_patch_loss(
    predicted: Tensor, target: Tensor, masked_counts: Sequence[int], eps: float, weighting: str = "scan"
) -> Tensor:
    """Mean squared error of predicted `(M, C*t*p*p)` against normalised target pixels, as a scalar in float32.

    By `scan` the mean over each scan's masked patches, then over scans that have any: by patches, one CT would outweigh
    eight X-rays, and a mix of modalities be a training on CT. By `patch` the mean over all masked patches.
    """
    target = normalise_patches(target, eps)
    errors = nn.functional.mse_loss(predicted.float(), target, reduction="none").mean(-1)  # (M,)
    if not len(errors):  # scans of one patch each: nothing to learn, but a gradient that other ranks can add to theirs
        return predicted.sum() * 0
    if weighting == "patch":
        return errors.mean()
    return torch.stack([scan.mean() for scan in errors.split(list(masked_counts)) if len(scan)]).mean()


def loss_weight(masked_counts: Sequence[int], weighting: str = "scan") -> int:
    """Of how many scans, or patches, `masked_patch_loss` is the mean: its weight beside that of another pack."""
    return sum(masked_counts) if weighting == "patch" else sum(count > 0 for count in masked_counts)


__all__ = ["M3RetForPreTraining"]
