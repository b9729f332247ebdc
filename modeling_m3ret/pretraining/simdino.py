"""Self-distillation by coding rate: SimDINO (arXiv 2502.10385).

Student and teacher see crops of the same scan; their embeddings are drawn together (compression), while the covariance
of the student's is spread out (expansion), which is all that keeps them from collapsing: no prototypes, centring,
sharpening or temperatures. The teacher is a moving average of the student, and what is kept in the end.

`V` views of a scan, the global ones first; `G` = 2 global views, which the teacher sees; `p` size of the projection.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..masked_autoencoder_m3ret import M3RetDecoder, choose_visible, loss_weight, masked_patch_loss
from ..modeling_m3ret import M3RetModel
from ..packing_m3ret import patch_coordinates
from .ranks import part_of_rank, sum_over_ranks, total_over_ranks


@dataclass
class SimDINOTerms:
    """What a batch gives, each a scalar.

    loss: what is minimised, negative by design. compression: mean cosine of teacher and student over different views,
    at most 1. expansion: coding rate of the student's global views. expansion_share: it over its closed-form maximum.
    collapsed_share: what the share is when all features are equal, in closed form. The two that need more than the
    projections: reconstruction, loss of masked autoencoding in the same pass; patch_agreement, mean cosine of the
    student's masked patches with the teacher's, at most 1. None where they were not asked for.
    """

    loss: Tensor
    compression: Tensor
    expansion: Tensor
    expansion_share: Tensor
    collapsed_share: Tensor
    reconstruction: Tensor | None = None
    patch_agreement: Tensor | None = None


class SimDINOLoss(nn.Module):
    r"""Compression and expansion of L2-normalised projections.

        compression = mean over teacher view i, student view j != i, and scans of cos(t_i, s_j)
        expansion   = mean over global views of gamma/2 logdet(I + p / (R eps) Z^T Z),  gamma = (p + R) / (p R)

    with Z the student's `(R, p)` projections of one global view and R the scans **of all ranks**: the covariance is
    summed over ranks with its gradient, so that a batch gives one loss and one gradient, however it is split.

    Args:
        eps: distortion of the coding rate; .05 in every published command (the published parser's default, .5, is not
            what was run).
        coeff: weight of compression; 1 as published.
        expansion_weight: weight of `expansion / max_expansion`, so a number that means the same for any batch and any
            number of ranks. .45 is the largest expansion that the published run can reach (64 scans on each of 8
            ranks, covariance of one rank), so with it the balance of the two terms is the published one. None weighs
            the raw expansion by 1, as in the formula.

    Raises:
        ValueError: if the shapes do not fit, or a view has no other to be compared with.
    """

    def __init__(self, eps: float = 0.05, coeff: float = 1.0, expansion_weight: float | None = 0.45):
        super().__init__()
        self.eps = eps
        self.coeff = coeff
        self.expansion_weight = expansion_weight

    def forward(self, student: Tensor, teacher: Tensor) -> SimDINOTerms:
        """student `(V, B, p)`, teacher `(G, B, p)`, both L2-normalised; the student's first G views are the global."""
        V, B, p = student.shape
        G = teacher.shape[0]
        if teacher.shape[1:] != (B, p) or not 1 <= G <= V or V < 2:
            raise ValueError(
                f"student (V, B, p) and teacher (G, B, p) with G <= V and V >= 2, found {tuple(student.shape)} and "
                f"{tuple(teacher.shape)}"
            )
        with torch.autocast(student.device.type, enabled=False):
            student, teacher = student.float(), teacher.detach().float()
            # sum over all pairs of views, less those of a view with itself; V sums instead of G V products
            pairs = (teacher.sum(0) * student.sum(0)).sum() - (teacher * student[:G]).sum()
            # times this rank's part of the scans, so that the mean over ranks is that over all scans
            compression = pairs / (B * (G * V - G)) * part_of_rank(B, student.device)
            expansion, most, least = coding_rate(student[:G], self.eps)
            share = expansion / most
            spread = expansion if self.expansion_weight is None else self.expansion_weight * share
            floor = share.new_tensor(least / most)
            return SimDINOTerms(-self.coeff * compression - spread, compression, expansion, share, floor)


def coding_rate(views: Tensor, eps: float) -> tuple[Tensor, float, float]:
    """Mean over views `(G, B, p)` of gamma/2 logdet(I + p/(R eps) Z^T Z), and the most and least that it can be.

    The determinant by Cholesky, in float32. At the most all r = min(R, p) eigenvalues share the trace R equally:
    gamma/2 r ln(1 + p / (R eps) R / r). At the least, of equal features, one has it all: r = 1.
    """
    _, B, p = views.shape
    R = total_over_ranks(B, views.device)
    covariance = sum_over_ranks(views.transpose(1, 2) @ views)  # (G, p, p)
    identity = torch.eye(p, dtype=views.dtype, device=views.device)
    factor, failed = torch.linalg.cholesky_ex(identity + p / (R * eps) * covariance)
    half_logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # (G,)
    half_logdet = half_logdet.masked_fill(failed > 0, math.nan)  # features not finite: the loss says so, for all ranks
    gamma = (p + R) / (p * R)
    most, least = (gamma / 2 * rank * math.log1p(p / (rank * eps)) for rank in (min(R, p), 1))
    return gamma * half_logdet.mean(), most, least


class SimDINOHead(nn.Module):
    """MLP in -> hidden -> hidden -> out with GELU, output L2-normalised in float32. 2048 and 256 as published, no
    prototypes."""

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
        return nn.functional.normalize(self.layers(features).float(), dim=-1)  # in bfloat16 a length would be .997


class SimDINO(nn.Module):
    """Student and teacher. All views of all scans go through the student in one packed forward; the teacher sees the
    global ones.

    With a `decoder` the student does masked autoencoding in the same pass: of each global view it sees the visible
    patches alone (a view masked for the student is what iBOT, arXiv 2111.07832, and MSN, 2204.07141, distil into), and
    the decoder predicts the others. The teacher and the local views stay whole.

    With a `patch_weight` the student's global views have blocks masked by one learned patch, and its tokens there, by
    the same head, are drawn to the teacher's, which saw the patches: iBOT's task as SimDINOv2 has it.

    Args:
        encoder: the student's start, and the teacher's.
        views: V, views of each scan, neighbours in the pack, the two global ones first.
        decoder: of `M3RetForPreTraining`, or None.
        patch_weight: of the patch term, 1 in SimDINOv2; 0 masks nothing.

    Raises:
        ValueError: for fewer views than global ones, or two ways of masking at once.
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
            raise ValueError(f"SimDINO takes at least its {self.global_views} global views, not {views}")
        if decoder is not None and patch_weight > 0:
            raise ValueError("found a decoder and a patch_weight, expected one of them: each masks the global views")
        self.views = views
        self.patch_weight = patch_weight
        config = encoder.config
        if patch_weight > 0:  # what stands where a patch was: a picture, so that the encoder knows of no mask
            self.mask_patch = nn.Parameter(torch.zeros(1, config.patch_values // config.patch_depth))
        self.loss = loss
        self.student, self.student_head = encoder, SimDINOHead(encoder.config.pooled_size)
        self.teacher, self.teacher_head = copy.deepcopy(encoder), copy.deepcopy(self.student_head)
        for module in (self.teacher, self.teacher_head):
            module.requires_grad_(False).eval()
        self.decoder = decoder

    def train(self, mode: bool = True) -> SimDINO:
        """The teacher never trains: it drops no path."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, noise: Tensor | None = None) -> SimDINOTerms:
        """Packed views `(P, C*t*p*p)` and grids `(B*V, 3)`, the V views of a scan one after the other; `noise (P,)` for
        the masks."""
        scans, rest = divmod(len(grid_thw), self.views)
        if rest:
            raise ValueError(f"{len(grid_thw)} views in the pack are no multiple of the {self.views} views of a scan")
        noise = torch.rand(len(pixel_values), device=pixel_values.device) if noise is None else noise
        is_global = torch.arange(len(grid_thw), device=grid_thw.device) % self.views < self.global_views
        in_global = is_global.repeat_interleave(grid_thw.prod(-1), output_size=len(pixel_values))
        of_teacher = (pixel_values[in_global], grid_thw[is_global])
        reconstruction = agreement = None
        if self.decoder is not None:
            pooled, reconstruction = self._masked_student(pixel_values, grid_thw, noise, is_global)
        elif self.patch_weight == 0:
            pooled = self.student.embed(pixel_values, grid_thw)
        else:
            hidden = torch.zeros_like(in_global)
            hidden[in_global], views_masked = block_masks(noise[in_global], of_teacher[1])
            mask_row = self.mask_patch.to(pixel_values.dtype)
            if pixel_values.shape[1] != mask_row.shape[1]:
                mask_row = self.student.embeddings.repeat_slices(mask_row)
            pooled, patches = _pooled_and_patches(
                self.student, torch.where(hidden[:, None], mask_row, pixel_values), grid_thw
            )
        with torch.no_grad():
            if self.patch_weight == 0:
                teacher = self.teacher.embed(*of_teacher)
            else:
                teacher, teacher_patches = _pooled_and_patches(self.teacher, *of_teacher)
                target = self.teacher_head(teacher_patches[hidden[in_global]])
            teacher = self.teacher_head(teacher)
        by_view = (
            self.student_head(pooled).view(scans, self.views, -1),
            teacher.view(scans, self.global_views, -1),
        )
        terms = self.loss(*(projections.transpose(0, 1) for projections in by_view))
        if self.patch_weight > 0:
            cosines = (self.student_head(patches[hidden]) * target).sum(-1)  # (masked patches,)
            of_views = cosines.split([count for count in views_masked if count])
            zero = cosines.sum() * 0  # a gradient for other ranks to add to, where no view was masked
            agreement = torch.stack([view.mean() for view in of_views]).mean() if len(of_views) else zero
            # a view that was not masked adds nothing, as published; parts of the rank as in the loss's compression
            share = len(of_views) / len(views_masked) * part_of_rank(len(views_masked), cosines.device)
            terms = replace(terms, loss=terms.loss - self.patch_weight * share * agreement)
            agreement = agreement * part_of_rank(len(of_views), cosines.device)
        return replace(terms, reconstruction=reconstruction, patch_agreement=agreement)

    def _masked_student(
        self, rows: Tensor, grid_thw: Tensor, noise: Tensor, is_global: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pooled views `(B*V, d)` with the global ones masked, and the loss of predicting what was masked."""
        assert self.decoder is not None
        config = self.student.config
        grids = [(t, h, w) for t, h, w in grid_thw.tolist()]
        counts = [math.prod(grid) for grid in grids]
        ratios = [config.mask_ratio if masks else 0.0 for masks in is_global.tolist()]
        places = patch_coordinates(grids, rows.device)
        visible, _, visible_counts = choose_visible(noise, counts, ratios)
        layout, encoded = self.student.encode(rows[visible], places[visible], visible_counts)
        tokens = self.student.norm(encoded.last_hidden_state)
        prefix, patches = layout.split(tokens)

        # of the global views alone: their patches are where `visible` falls into them
        in_global = is_global.repeat_interleave(grid_thw.prod(-1), output_size=len(rows))
        place_in_global = in_global.cumsum(0) - 1  # row of the pack -> row of the global views
        seen = in_global[visible]
        hidden = in_global.clone()
        hidden[visible] = False
        masked = hidden.nonzero()[:, 0]
        global_counts, global_visible = (
            [count for count, masks in zip(of, is_global.tolist(), strict=True) if masks]
            for of in (counts, visible_counts)
        )
        predicted = self.decoder(
            prefix[is_global],
            patches[seen],
            place_in_global[visible[seen]],
            place_in_global[masked],
            places[in_global],
            global_counts,
        )
        masked_counts = [count - left for count, left in zip(global_counts, global_visible, strict=True)]
        target = self.student.embeddings.repeat_slices(rows[masked])
        loss = masked_patch_loss(predicted, target, masked_counts, config.norm_pixel_eps, config.loss_weighting)
        weighed = loss_weight(masked_counts, config.loss_weighting)
        return self.student.pool(tokens, layout), loss * part_of_rank(weighed, rows.device)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum x teacher + (1 - momentum) x student, all weights in one call."""
        teacher: list[Tensor] = [*self.teacher.parameters(), *self.teacher_head.parameters()]
        student: list[Tensor] = [*self.student.parameters(), *self.student_head.parameters()]
        torch._foreach_lerp_(teacher, student, 1 - momentum)


def _pooled_and_patches(encoder: M3RetModel, rows: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled views `(B, d)` and all their normalised patch tokens `(P, d)`."""
    grids = [(t, h, w) for t, h, w in grid_thw.tolist()]
    layout, encoded = encoder.encode(rows, patch_coordinates(grids, rows.device), [math.prod(grid) for grid in grids])
    tokens = encoder.norm(encoded.last_hidden_state)
    return encoder.pool(tokens, layout), layout.split(tokens)[1]


# of DINOv2's published command, as SimDINOv2 keeps them: part of the global views that are masked, and of their patches
MASKED_VIEWS = 0.5
MASKED_PATCHES = (0.1, 0.5)


def block_masks(noise: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[int]]:
    """One block in about half of the views: which patches it hides, bool `(P,)`, and how many of each view.

    All follows from `noise (P,)` in [0, 1): a view is masked if its first number is below `MASKED_VIEWS`, which then
    says how much of it, evenly between the ends of `MASKED_PATCHES`; the block grows, in the shape of the view, around
    the patch with the largest number. A view of one patch stays whole.
    """
    grids = [(t, h, w) for t, h, w in grid_thw.tolist()]
    counts = [math.prod(grid) for grid in grids]
    places = patch_coordinates(grids, noise.device)
    hidden = torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
    masked_counts = []
    least, most = MASKED_PATCHES
    starts = [0, *accumulate(counts)][:-1]
    for start, count, first in zip(starts, counts, noise[starts].tolist(), strict=True):
        ratio = least + (most - least) * first / MASKED_VIEWS
        masked = max(1, round(count * ratio)) if first < MASKED_VIEWS and count > 1 else 0
        masked_counts.append(masked)
        if masked:
            own = slice(start, start + count)
            distance = (places[own] - places[start + int(noise[own].argmax())]).abs().amax(-1)
            hidden[start + distance.argsort(stable=True)[:masked]] = True
    return hidden, masked_counts


def teacher_momentum(step: int, steps: int, start: float = 0.996) -> float:
    """Half a cosine from `start` to 1, as in DINO: late in training the teacher hardly moves."""
    return 1 - (1 - start) * (math.cos(math.pi * step / steps) + 1) / 2
