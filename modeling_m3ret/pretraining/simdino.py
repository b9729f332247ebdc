"""Self-distillation by coding rate: SimDINO (arXiv 2502.10385).

Student and teacher see crops of the same scan. Compression pulls their embeddings together; expansion spreads out the
covariance of the student's embeddings, which alone prevents collapse: there are no prototypes, centring, sharpening or
temperatures. The teacher is an exponential moving average of the student, and is the encoder to publish.

Shapes: `V` views of a scan, global ones first; `G` = 2 global views, which the teacher sees; `p` projection size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ..configuration_m3ret import M3RetConfig
from ..masked_autoencoder_m3ret import M3RetDecoder, MaskPlan, loss_weights, masked_patch_loss, plan_masks
from ..modeling_m3ret import M3RetModel, drop_path_rates
from ..packing_m3ret import Movable, PackLayout, patch_coordinates, take
from .distributed import count_over_ranks, rank_weight, sum_over_ranks


@dataclass
class SimDINOTerms:
    """Scalars of one batch."""

    loss: Tensor  # to minimise, negative by design
    compression: Tensor  # mean cosine similarity of teacher and student over different views, at most 1
    expansion: Tensor  # coding rate of the student's global views
    expansion_share: Tensor  # expansion divided by its closed-form maximum
    collapsed_share: Tensor  # closed-form value of expansion_share if all features are equal
    reconstruction: Tensor | None = None  # loss of masked autoencoding, with a decoder
    patch_agreement: Tensor | None = None  # mean cosine similarity of masked patches with the teacher's, at most 1


class SimDINOLoss(nn.Module):
    r"""Compression and expansion of L2-normalised projections.

        compression = mean over teacher view i, student view j != i, and scans of cos(t_i, s_j)
        expansion   = mean over global views of gamma/2 logdet(I + p / (R eps) Z^T Z),  gamma = (p + R) / (p R)

    Z is the student's `(R, p)` projections of one global view, and R the number of scans of all ranks. The covariance
    is summed over ranks with its gradient, so loss and gradient do not depend on how a batch is split over ranks.

    Args:
        eps: distortion of the coding rate; 0.05 in every published command (the default of the published parser, 0.5,
            was not used).
        coeff: weight of compression; 1 as published.
        expansion_weight: weight of `expansion / max_expansion`, which has the same meaning for any batch size and
            number of ranks. 0.45 is the maximum expansion of the published run (64 scans on each of 8 ranks, covariance
            of one rank) and reproduces its balance of the two terms. None gives the raw expansion weight 1, as in the
            formula.
    """

    def __init__(self, eps: float = 0.05, coeff: float = 1.0, expansion_weight: float | None = 0.45):
        super().__init__()
        self.eps, self.coeff, self.expansion_weight = eps, coeff, expansion_weight

    def forward(self, student: Tensor, teacher: Tensor) -> SimDINOTerms:
        """Compute the loss of L2-normalised projections.

        Args:
            student: `(V, B, p)`; the first G views are the global ones, and V is at least 2.
            teacher: `(G, B, p)`.
        """
        V, B, p = student.shape
        G = teacher.shape[0]
        if teacher.shape[1:] != (B, p) or not 1 <= G <= V or V < 2:
            expected = "student (V, B, p) and teacher (G, B, p) with G <= V and V >= 2"
            raise ValueError(
                f"projections: expected {expected}, got {tuple(student.shape)} and {tuple(teacher.shape)}."
            )
        with torch.autocast(student.device.type, enabled=False):
            student, teacher = student.float(), teacher.detach().float()
            # sum over all pairs of views minus pairs of a view with itself: V sums instead of G V products
            pairs = (teacher.sum(0) * student.sum(0)).sum() - (teacher * student[:G]).sum()
            # weighted so that the mean over ranks is the mean over all scans
            compression = pairs / (B * (G * V - G)) * rank_weight(B, student.device)
            expansion, maximum, minimum = coding_rate(student[:G], self.eps)
            share = expansion / maximum
            weighted = expansion if self.expansion_weight is None else self.expansion_weight * share
            collapsed_share = share.new_tensor(minimum / maximum)
            return SimDINOTerms(-self.coeff * compression - weighted, compression, expansion, share, collapsed_share)


def coding_rate(views: Tensor, eps: float) -> tuple[Tensor, float, float]:
    """Return the mean over views of gamma/2 logdet(I + p/(R eps) Z^T Z), and its maximum and minimum.

    The determinant is computed by Cholesky decomposition in float32. At the maximum, r = min(R, p) eigenvalues share
    the trace R equally: gamma/2 r ln(1 + p / (R eps) R / r). At the minimum, with equal features, r = 1.

    Args:
        views: `(G, B, p)`, L2-normalised.
        eps: distortion.
    """
    _, B, p = views.shape
    R = count_over_ranks(B, views.device)
    covariance = sum_over_ranks(views.transpose(1, 2) @ views)  # (G, p, p)
    identity = torch.eye(p, dtype=views.dtype, device=views.device)
    factor, failed = torch.linalg.cholesky_ex(identity + p / (R * eps) * covariance)
    half_logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # (G,)
    half_logdet = half_logdet.masked_fill(failed > 0, math.nan)  # non-finite features give a NaN loss
    gamma = (p + R) / (p * R)
    maximum, minimum = (gamma / 2 * rank * math.log1p(p / (rank * eps)) for rank in (min(R, p), 1))
    return gamma * half_logdet.mean(), maximum, minimum


class SimDINOHead(nn.Module):
    """MLP in -> hidden -> hidden -> out with GELU and L2-normalised float32 output; 2,048 and 256 as published."""

    def __init__(self, in_size: int, hidden_size: int = 2048, out_size: int = 256):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, out_size),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(self.layers(features).float(), dim=-1)  # bfloat16 would give lengths of 0.997


class SimDINO(nn.Module):
    """Student, teacher and their heads. The student embeds all views in one packed forward; the teacher, global ones.

    With a `decoder` the student also does masked autoencoding in the same pass: it sees only the visible patches of
    each global view (as in iBOT, arXiv 2111.07832, and MSN, arXiv 2204.07141), and the decoder predicts the others. The
    teacher and the local views are not masked.

    With a `patch_weight` blocks of the student's global views are replaced by one learned patch, and its tokens there,
    after the same head, are matched to those of the teacher, which sees the patches: iBOT's task as in SimDINOv2.

    Args:
        encoder: initial student and teacher.
        loss: loss of the projections.
        views: V, the number of views of each scan. They are adjacent in the pack, the two global ones first.
        decoder: decoder of `M3RetForPreTraining`, or None.
        patch_weight: weight of the patch term, 1 in SimDINOv2; 0 disables it. Excludes a decoder.
    """

    global_views = 2

    def __init__(
        self,
        encoder: M3RetModel,
        loss: SimDINOLoss,
        views: int,
        decoder: M3RetDecoder | None = None,
        patch_weight: float = 0.0,
    ):
        super().__init__()
        if views < self.global_views:
            raise ValueError(f"views: expected at least the {self.global_views} global views, got {views}.")
        if decoder is not None and patch_weight > 0:
            raise ValueError("decoder and patch_weight: expected one of them, got both. Each masks the global views.")
        self.loss, self.views, self.patch_weight = loss, views, patch_weight
        config = cast(M3RetConfig, encoder.config)
        self.plan = ViewPlanner(config, views, self.global_views, decoder is not None, patch_weight > 0)
        if patch_weight > 0:  # replaces pixels, so the encoder needs no mask token
            self.mask_patch = nn.Parameter(torch.zeros(1, config.patch_values // config.patch_depth))
        self.student, self.student_head = encoder, SimDINOHead(config.pooled_size)
        self.teacher, self.teacher_head = copy.deepcopy(encoder), copy.deepcopy(self.student_head)
        for module in (self.teacher, self.teacher_head):
            module.requires_grad_(False).eval()
        self.decoder = decoder

    def train(self, mode: bool = True) -> SimDINO:
        """Set the mode of the student; the teacher stays in eval mode, without stochastic depth."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self,
        pixel_values: Tensor,
        grid_thw: Tensor | None = None,
        noise: Tensor | None = None,
        plan: ViewPlan | None = None,
    ) -> SimDINOTerms:
        """Compute all terms of a pack.

        Args:
            pixel_values: float `(P, C*t*p*p)` or compact `(P, C*p*p)`, the V views of a scan one after the other.
            grid_thw: int64 `(B*V, 3)`.
            noise: float `(P,)` in [0, 1), for masks and stochastic depth; drawn here if None.
            plan: result of `self.plan`, instead of grids and noise.
        """
        rows = pixel_values
        if plan is None:
            assert grid_thw is not None
            rows, grids = self.student.prepare_rows(pixel_values, grid_thw)
            noise = torch.rand(len(rows)) if noise is None else noise.cpu()
            plan = self.plan(grids, noise).to(rows.device)
        reconstruction = agreement = None
        if plan.masks is not None:
            pooled, reconstruction = self._masked_student(rows, plan.masks)
        elif plan.hidden is None or plan.is_hidden is None:
            pooled = self.student.embed_rows(rows, plan.coordinates, plan.student)
        else:
            mask_row = self.mask_patch.to(rows.dtype)
            if rows.shape[1] != mask_row.shape[1]:
                mask_row = self.student.embeddings.repeat_slices(mask_row)
            student_rows = torch.where(plan.is_hidden, mask_row, rows)
            pooled, patches = _pooled_and_patches(self.student, student_rows, plan.coordinates, plan.student)
        with torch.no_grad():
            teacher_inputs = (rows[plan.global_rows], plan.coordinates[plan.global_rows], plan.teacher)
            if plan.hidden is None:
                teacher = self.teacher.embed_rows(*teacher_inputs)
            else:
                teacher, teacher_patches = _pooled_and_patches(self.teacher, *teacher_inputs)
                target = self.teacher_head(teacher_patches[plan.hidden_global])
            teacher = self.teacher_head(teacher)
        student_views = self.student_head(pooled).unflatten(0, (-1, self.views)).transpose(0, 1)
        teacher_views = teacher.unflatten(0, (-1, self.global_views)).transpose(0, 1)
        terms = self.loss(student_views, teacher_views)
        if plan.hidden is not None:
            hidden, _ = take(patches, plan.hidden)
            cosines = (self.student_head(hidden) * target).sum(-1)  # (masked patches,)
            # mean over the masked views; 0, with a gradient, if there are none
            agreement = cosines @ plan.hidden_weights
            # a view without a mask contributes 0, as published; weighted over ranks like the compression
            views = plan.teacher.scans
            fraction = plan.masked_views / views * rank_weight(views, cosines.device)
            terms = replace(terms, loss=terms.loss - self.patch_weight * fraction * agreement)
            agreement = agreement * rank_weight(plan.masked_views, cosines.device)
        return replace(terms, reconstruction=reconstruction, patch_agreement=agreement)

    def _masked_student(self, rows: Tensor, plan: MaskPlan) -> tuple[Tensor, Tensor]:
        """Return pooled views `(B*V, d)`, the global ones masked, and the loss of predicting the masked patches."""
        assert self.decoder is not None
        tokens, _ = self.student.encode(rows[plan.visible], plan.visible_coordinates, plan.encoder)
        decoded = tokens if plan.decoded is None else take(tokens, plan.decoded)[0]
        predicted = self.decoder(decoded, plan.decoder, plan.coordinates)
        loss = masked_patch_loss(predicted, rows[plan.masked], plan.row_weights, cast(M3RetConfig, self.student.config))
        return self.student.pool(tokens, plan.encoder), loss * rank_weight(plan.weight, rows.device)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Set teacher = momentum x teacher + (1 - momentum) x student."""
        teacher: list[Tensor] = [*self.teacher.parameters(), *self.teacher_head.parameters()]
        student: list[Tensor] = [*self.student.parameters(), *self.student_head.parameters()]
        torch._foreach_lerp_(teacher, student, 1 - momentum)


def _pooled_and_patches(
    encoder: M3RetModel, rows: Tensor, coordinates: Tensor, layout: PackLayout
) -> tuple[Tensor, Tensor]:
    """Return pooled views `(B, d)` and their normalised patch tokens `(P, d)`."""
    tokens, _ = encoder.encode(rows, coordinates, layout)
    return encoder.pool(tokens, layout), layout.split(tokens, len(rows))[1]


@dataclass
class ViewPlan(Movable):
    """Indices for SimDINO on one pack of views.

    Attributes:
        student: layout of all views.
        teacher: layout of the global views.
        coordinates: of all patches, `(P, 6)`.
        global_rows: rows of the global views' patches in the pack, int64.
        masks: for a decoder, the masks of the student's global views.
        hidden: for the patch term, rows of the hidden patches in the pack; else None, like all below.
        hidden_global: the same patches, as indices in `global_rows`.
        is_hidden: whether a patch is hidden, bool `(P, 1)`.
        hidden_weights: weight of each hidden patch in the mean over views of the mean over a view's hidden patches.
        masked_views: number of views with hidden patches.
    """

    student: PackLayout
    teacher: PackLayout
    coordinates: Tensor
    global_rows: Tensor
    masks: MaskPlan | None = None
    hidden: Tensor | None = None
    hidden_global: Tensor | None = None
    is_hidden: Tensor | None = None
    hidden_weights: Tensor | None = None
    masked_views: int = 0


@dataclass(frozen=True)
class ViewPlanner:
    """Make the `ViewPlan` of a pack, in a loader worker or in the training process."""

    config: M3RetConfig  # of the encoder
    views: int  # of each scan, global ones first
    global_views: int
    decodes: bool  # whether a decoder predicts masked patches
    hides: bool  # whether the patch term hides blocks

    def __call__(self, grids: Sequence[tuple[int, int, int]], noise: Tensor) -> ViewPlan:
        """Return the plan of views of these grids, with `noise (P,)` for their masks and stochastic depth."""
        if len(grids) % self.views:
            raise ValueError(f"grid_thw: expected a multiple of {self.views} views, got {len(grids)}.")
        counts, prefix = np.asarray(grids).prod(1), self.config.num_prefix_tokens
        is_global = np.arange(len(grids)) % self.views < self.global_views
        global_rows = torch.from_numpy(np.flatnonzero(is_global.repeat(counts)))
        student = PackLayout.from_patch_counts(counts, prefix)
        if self.config.drop_path_rate > 0 and not self.decodes:
            student = student.sample_subsets(drop_path_rates(self.config), noise)
        teacher = PackLayout.from_patch_counts(counts[is_global], prefix)
        plan = ViewPlan(student, teacher, patch_coordinates(grids, noise.device), global_rows)
        if self.decodes:
            return replace(plan, masks=plan_masks(grids, noise, self.config, is_global))
        if not self.hides:
            return plan
        hidden, masked_counts = block_masks(noise[global_rows], np.asarray(grids)[is_global])
        is_hidden = torch.zeros(len(noise), 1, dtype=torch.bool)
        is_hidden[global_rows[hidden]] = True
        weights, masked_views = loss_weights(masked_counts, "scan")
        return replace(
            plan,
            hidden=global_rows[hidden],
            hidden_global=hidden.nonzero()[:, 0],
            is_hidden=is_hidden,
            hidden_weights=weights,
            masked_views=masked_views,
        )


# DINOv2's published values, also in SimDINOv2: fraction of global views that are masked, and of their patches
MASKED_VIEWS = 0.5
MASKED_PATCHES = (0.1, 0.5)


def block_masks(noise: Tensor, grid_thw: Tensor | np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Draw one block mask in about half of the views. Return the masked patches, bool `(P,)`, and counts per view.

    The noise of a view's first patch decides whether the view is masked and how much of it. The block is centred on the
    patch with the highest noise and has the shape of the view. A mask thus depends only on the view's own noise. A view
    of one patch is not masked.

    Args:
        noise: float `(P,)` in [0, 1), on the CPU.
        grid_thw: int64 `(B, 3)`.
    """
    grids, values = np.asarray(grid_thw), noise.numpy()
    counts = grids.prod(1)
    starts, view = counts.cumsum() - counts, np.arange(len(counts)).repeat(counts)  # view of each patch
    minimum, maximum = MASKED_PATCHES
    first = values[starts].astype(np.float64)
    masked = np.rint(counts * (minimum + (maximum - minimum) * first / MASKED_VIEWS)).astype(np.int64).clip(1)
    masked = np.where((first < MASKED_VIEWS) & (counts > 1), masked, 0)
    centres = np.lexsort((values, view))[starts + counts - 1]  # patch of highest noise of each view
    coordinates = patch_coordinates(grids, noise.device)[:, :3].numpy()
    distance = np.abs(coordinates - coordinates[centres][view]).max(1)
    nearest = np.lexsort((distance, view))  # stable
    hidden = np.zeros(len(values), dtype=bool)
    hidden[nearest] = np.arange(len(values)) - starts[view] < masked[view]
    return torch.from_numpy(hidden), masked


def teacher_momentum(step: int, steps: int, start: float) -> float:
    """Return the EMA momentum at a step: half a cosine from `start` to 1, as in DINO."""
    return 1 - (1 - start) * (math.cos(math.pi * step / steps) + 1) / 2
