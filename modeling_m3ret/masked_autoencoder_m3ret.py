"""Masked autoencoding (MAE, arXiv 2111.06377) of packed scans: decoder, masks and loss.

Of the `P` patches in the pack, `K` are visible and `M` masked; all other shapes are as in `packing_m3ret`. This file is
copied into every checkpoint and imports nothing else of the project.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import logging
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_m3ret import M3RetConfig
from .layers_m3ret import M3RetLayer, rotary_tables
from .modeling_m3ret import M3RetModel, M3RetPreTrainedModel, drop_path_rates, recorded
from .packing_m3ret import Movable, PackLayout, patch_coordinates


logger = logging.get_logger(__name__)


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

    def forward(self, encoded: Tensor, layout: PackLayout, coordinates: Tensor) -> Tensor:
        """Predict the pixels of the masked patches: `(M, C*t*p*p)`.

        Mask tokens follow the encoded tokens of their scan: coordinates alone carry the position.

        Args:
            encoded: CLS, registers and visible patches of each scan `(N - M, d)`.
            layout: arrangement of the scans, with the encoded tokens as first tokens and M masked patches.
            coordinates: of all tokens by position, `(N, 6)`.
        """
        config = self.config
        encoded = self.input_proj(encoded)
        masks = self.mask_token.to(encoded.dtype).expand(len(coordinates) - len(encoded), -1)
        heads = config.decoder_num_attention_heads
        rotary = rotary_tables(coordinates, config.decoder_hidden_size // heads, float(config.rope_theta))
        tokens = layout.join(encoded, masks)
        for layer in self.layers:
            tokens = layer(tokens, layout, rotary)
        _, masked = layout.split(tokens, len(masks))
        return self.output_proj(self.norm(masked))


@dataclass
class MaskPlan(Movable):
    """Indices for masked autoencoding of one pack, see `plan_masks`.

    Attributes:
        visible: rows of the visible patches in the pack, scan after scan, int64 `(K,)`.
        masked: rows of the masked patches, int64 `(M,)`.
        visible_coordinates: of the visible patches, `(K, 6)`.
        encoder: layout of the visible patches.
        decoded: indices of the encoder's tokens that the decoder gets; None for all.
        decoder: layout of these tokens and the masked patches.
        coordinates: of the decoder's tokens by position, `(N, 6)`.
        row_weights: weight of each masked patch in the loss, float32 `(M,)`.
        weight: number of scans, or of patches, that the loss averages over.
    """

    visible: Tensor
    masked: Tensor
    visible_coordinates: Tensor
    encoder: PackLayout
    decoded: Tensor | None
    decoder: PackLayout
    coordinates: Tensor
    row_weights: Tensor
    weight: int


def plan_masks(
    grids: Sequence[tuple[int, int, int]], noise: Tensor, config: M3RetConfig, is_decoded: np.ndarray | None = None
) -> MaskPlan:
    """Mask patches at `config.mask_ratio`, and lay out encoder and decoder. All tensors are on the CPU.

    Args:
        grids: patches of each scan along depth, height and width.
        noise: float `(P,)` in [0, 1), see `choose_visible`.
        config: the encoder's.
        is_decoded: bool `(B,)`, whether a scan is masked and decoded; by default all are.
    """
    counts = np.asarray(grids).prod(1)
    is_decoded = np.ones(len(counts), dtype=bool) if is_decoded is None else is_decoded
    prefix, ratios = config.num_prefix_tokens, config.mask_ratio * is_decoded
    visible, masked, visible_counts = choose_visible(noise, counts, ratios)
    masked_counts = (counts - visible_counts)[is_decoded]
    encoder = PackLayout.from_patch_counts(visible_counts, prefix)
    if config.drop_path_rate > 0:
        encoder = encoder.sample_subsets(drop_path_rates(config), noise)

    # encoded tokens of the decoded scans, by position of the encoder
    order = np.arange(len(counts)) if encoder.order is None else encoder.order.numpy()
    lengths = visible_counts + prefix
    taken = order[is_decoded[order]]
    starts = np.zeros(len(counts), dtype=np.int64)
    starts[taken] = lengths[taken].cumsum() - lengths[taken]
    decoder = PackLayout.from_patch_counts(masked_counts, lengths[is_decoded], starts[is_decoded])
    decoded = None
    if not is_decoded.all():
        decoded = torch.from_numpy(np.flatnonzero(is_decoded[order].repeat(lengths[order])))

    coordinates = patch_coordinates(grids, noise.device)
    encoded = encoder.join(coordinates.new_zeros(len(counts), prefix, coordinates.shape[1]), coordinates[visible])
    encoded = encoded if decoded is None else encoded[decoded]
    row_weights, weight = loss_weights(masked_counts, config.loss_weighting)
    return MaskPlan(
        visible=visible,
        masked=masked,
        visible_coordinates=coordinates[visible],
        encoder=encoder,
        decoded=decoded,
        decoder=decoder,
        coordinates=decoder.join(encoded, coordinates[masked]),
        row_weights=row_weights,
        weight=weight,
    )


@dataclass
class M3RetForPreTrainingOutput(ModelOutput):
    """Output of [`M3RetForPreTraining`]. Hidden states and attentions are the encoder's, of CLS, registers and visible
    patches, in the form that [`M3RetModel`] returns them.
    """

    loss: Tensor | None = None  # scalar, see `masked_patch_loss`
    logits: Tensor | None = None  # predicted pixels of the masked patches, `(M, C*t*p*p)`
    masked: Tensor | None = None  # rows of the masked patches in the pack, int64 `(M,)`
    weight: Tensor | None = None  # number of scans, or of patches, that the loss averages over, int64 scalar
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Any, ...] | None = None


class M3RetForPreTraining(M3RetPreTrainedModel):
    """Masked autoencoder (MAE, arXiv 2111.06377) for packed scans. The encoder sees only the visible patches."""

    def __init__(self, config: M3RetConfig):
        super().__init__(config)
        self.m3ret = M3RetModel(config)
        self.decoder = M3RetDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.m3ret.get_input_embeddings()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a pretraining checkpoint, as every model does, and warn if it holds an encoder only."""
        with_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if {f"decoder.{name}" for name in model.decoder.state_dict()} <= set(info["missing_keys"]):
            logger.warning(
                "no decoder found: expected a pretraining checkpoint, got an encoder, so the decoder is initialised at "
                "random. Pass subfolder='pretraining' for the decoder of a masked autoencoder."
            )
        return (model, info) if with_info else model

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, grid_thw: Tensor | None = None, noise: Tensor | None = None, **kwargs: Any
    ) -> M3RetForPreTrainingOutput:
        """Mask patches, predict them and compute the loss.

        `pixel_values` and `grid_thw` are those of [`M3RetModel`]. The `noise` of `choose_visible`, `(P,)` or for
        dense input `(B, patches)`, is sampled if None; pass it to make the mask reproducible.
        """
        rows, grids = self.m3ret.prepare_rows(pixel_values, grid_thw)
        grids = grids if grid_thw is not None else grids * len(pixel_values)
        patches = rows.shape[0]
        noise = torch.rand(patches) if noise is None else noise.cpu().flatten()
        if len(noise) != patches:
            raise ValueError(
                f"noise does not fit pixel_values: expected {patches} numbers, one for each patch, got {len(noise)}. "
                "Leave it out to sample it."
            )
        plan = plan_masks(grids, noise, cast(M3RetConfig, self.config)).to(rows.device)
        return self.predict(rows, plan, grid_thw is None, **kwargs)

    def predict(self, rows: Tensor, plan: MaskPlan, dense: bool = False, **kwargs: Any) -> M3RetForPreTrainingOutput:
        """Predict the masked patches of a pack of `rows` and compute the loss.

        `dense` selects the form of the recorded states, as in [`M3RetModel`].
        """
        tokens, encoded = self.m3ret.encode(rows[plan.visible], plan.visible_coordinates, plan.encoder, **kwargs)
        predicted = self.decoder(tokens, plan.decoder, plan.coordinates)  # (M, C*t*p*p)
        loss = masked_patch_loss(predicted, rows[plan.masked], plan.row_weights, cast(M3RetConfig, self.config))
        return M3RetForPreTrainingOutput(
            loss=loss,
            logits=predicted,
            masked=plan.masked,
            weight=torch.full((), plan.weight, device=rows.device),  # a tensor, as `Trainer.predict` gathers outputs
            **recorded(encoded, plan.encoder, dense),
        )


def choose_visible(noise: Tensor, patch_counts: ArrayLike, mask_ratios: ArrayLike) -> tuple[Tensor, Tensor, np.ndarray]:
    """Select the visible patches of each scan: those of lowest noise.

    Of n patches of a scan, round(n * mask ratio) are masked, but at least one stays visible.

    Args:
        noise: float `(P,)` in [0, 1), on the CPU.
        patch_counts: patches of each scan.
        mask_ratios: mask ratio of each scan.

    Returns:
        Rows of the visible patches, int64 `(K,)`, and of the masked patches, int64 `(M,)`, both scan after scan; and
        the number of visible patches of each scan.
    """
    counts = np.asarray(patch_counts)
    visible_counts = np.maximum(1, counts - np.rint(counts * np.asarray(mask_ratios)).astype(np.int64))
    scan = np.arange(len(counts)).repeat(counts)
    shuffled = np.lexsort((noise.numpy(), scan))  # rows of scan 0 in random order, then of scan 1, ...
    rank = np.arange(len(scan)) - (counts.cumsum() - counts)[scan]
    is_visible = rank < visible_counts[scan]
    return torch.from_numpy(shuffled[is_visible]), torch.from_numpy(shuffled[~is_visible]), visible_counts


def normalise_patches(rows: Tensor, eps: float, patch_values: int | None = None) -> Tensor:
    """Normalise each patch to mean 0 and unbiased variance 1: (x - mean) / sqrt(var + eps), as in MAE, section 3.

    Computed in float32 as a layer norm, in one pass over memory. Layer norm uses the biased variance, which is
    (n - 1) / n of the unbiased one. `patch_values` is n if rows hold the values of a patch once instead of several
    times, by default their width.
    """
    n = patch_values or rows.shape[-1]
    biased = (n - 1) / n
    gain = torch.full((rows.shape[-1],), math.sqrt(biased), device=rows.device)
    return nn.functional.layer_norm(rows.float(), gain.shape, weight=gain, eps=eps * biased)


def loss_weights(masked_counts: ArrayLike, weighting: str) -> tuple[Tensor, int]:
    """Return the weight of each masked patch in the loss, float32 `(M,)` with sum 1, and the weight of the loss.

    The latter is the number of scans, or of patches, that the loss averages over. Weighted by it, the mean loss of
    several packs equals the loss of one large pack.

    Args:
        masked_counts: masked patches of each scan.
        weighting: `"scan"` averages over the masked patches of each scan, then over the scans that have any. `"patch"`
            averages over all masked patches.
    """
    counts = np.asarray(masked_counts, dtype=np.int64)
    weight = int(counts.sum() if weighting == "patch" else np.count_nonzero(counts))
    of_scan = 1.0 if weighting == "patch" else 1 / counts.clip(1)
    weights = np.broadcast_to(of_scan, counts.shape).repeat(counts) / max(1, weight)
    return torch.from_numpy(weights.astype(np.float32)), weight


def masked_patch_loss(predicted: Tensor, target: Tensor, row_weights: Tensor, config: M3RetConfig) -> Tensor:
    """Return the weighted mean squared error of the predictions against normalised pixels, a float32 scalar.

    Without masked patches it is 0, with a zero gradient that other ranks can add to theirs.

    Args:
        predicted: `(M, C*t*p*p)`.
        target: pixels of the same patches, not yet normalised; compact rows `(M, C*p*p)` count for every slice.
        row_weights: `(M,)`, see `loss_weights`.
        config: sets the shape of a patch, and what is added to its variance.
    """
    # the statistics of equal slices are those of one slice, up to the factor (n - 1) / n of the unbiased variance
    normalised = normalise_patches(target, config.norm_pixel_eps, config.patch_values)
    pixels = normalised.unflatten(1, (config.num_channels, -1, config.patch_size**2))
    predicted = predicted.float().unflatten(1, (config.num_channels, config.patch_depth, config.patch_size**2))
    squares = nn.functional.mse_loss(predicted, pixels.expand_as(predicted), reduction="none")
    return squares.sum((1, 2, 3)) @ (row_weights / config.patch_values)


__all__ = ["M3RetForPreTraining"]
