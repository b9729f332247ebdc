"""Patch rows and pack layouts: scans of any size in one matrix, without padding.

A *row* is one flattened patch. A *pack* holds the rows of all scans of a batch, scan after scan. The encoder adds CLS
and register tokens to each scan, sorts the scans by length and attends to each one separately.

Shapes, here and in the other files of the model: `B` scans, `P` patches in the pack, `L` tokens of one scan, `N` tokens
in the pack, `C` channels, `d` hidden size. A patch spans `t` slices and `p` x `p` pixels. A volume `(C, D, H, W)`
counts voxels; a grid `(T, H, W)` counts patches.

This file is copied into every checkpoint and imports nothing else of the project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def split_into_patches(volumes: Tensor, patch_depth: int, patch_size: int) -> Tensor:
    """Split volumes of equal shape into patches, as a view where possible.

    A depth that does not fill its last patch is padded by repeating the last slice.

    Args:
        volumes: `(B, C, D, H, W)` of any dtype; H and W are multiples of `patch_size`.
        patch_depth: slices of a patch, t.
        patch_size: edge of a patch in pixels, p.

    Returns:
        `(B, ceil(D/t), H/p, W/p, C, t, p, p)` of the same dtype.
    """
    B, C, D, H, W = volumes.shape
    if H % patch_size or W % patch_size:
        raise ValueError(
            f"height and width do not divide into patches: expected multiples of patch_size={patch_size}, "
            f"got {H} x {W}. Resize or pad the volumes."
        )
    if missing := -D % patch_depth:
        last = volumes[:, :, -1:].expand(-1, -1, missing + (D == 1), -1, -1)
        volumes = last if D == 1 else torch.cat([volumes, last], dim=2)
    T, h, w = (D + missing) // patch_depth, H // patch_size, W // patch_size
    patches = volumes.view(B, C, T, patch_depth, h, patch_size, w, patch_size)
    return patches.permute(0, 2, 4, 6, 1, 3, 5, 7)


def patchify(volumes: Tensor, patch_depth: int, patch_size: int) -> Tensor:
    """Flatten the patches of `split_into_patches` into rows `(B, patches of a scan, C*t*p*p)`.

    Rows are in raster order (depth, height, width). The values of a row are in the order channel, depth, height, width.
    """
    return split_into_patches(volumes, patch_depth, patch_size).flatten(4).flatten(1, 3)


def grid_coordinates(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return the coordinates of the patches of one scan in raster order: `(T*H*W, 6)` float32.

    The first three columns are the centre of the patch along depth, height and width, from -1 to 1; the last three are
    T, H and W. Coordinates relative to the scan (DINOv3, arXiv 2508.10104) keep this range for every grid size and
    after resizing; indices would not. Tables of positions are interpolated by both.
    """
    axes = [(2 * torch.arange(n, dtype=torch.float32, device=device) + 1) / n - 1 for n in grid]
    sizes = [torch.ones_like(axis) * n for axis, n in zip(axes, grid, strict=True)]
    return torch.cat([torch.cartesian_prod(*axes), torch.cartesian_prod(*sizes)], dim=1)


def patch_coordinates(grids: ArrayLike, device: torch.device) -> Tensor:
    """Return the `grid_coordinates` of all scans of a pack, scan after scan: `(P, 6)` float32."""
    sizes = np.asarray(grids, dtype=np.int64).reshape(-1, 3)  # (B, 3)
    counts = sizes.prod(1)
    sizes = np.repeat(sizes, counts, axis=0)  # (P, 3)
    _, H, W = sizes.T
    patch = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)  # index within the scan
    indices = np.stack([patch // (H * W), patch // W % H, patch % W], axis=1).astype(np.float32)
    coordinates = np.concatenate([(2 * indices + 1) / sizes.astype(np.float32) - 1, sizes.astype(np.float32)], axis=1)
    return torch.from_numpy(coordinates).to(device, non_blocking=True)


class _Permute(torch.autograd.Function):
    """Reorder rows. The gradient is reordered by the inverse, without a zero-filled buffer, scatter or atomic sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, *ctx.saved_tensors), None, None


class _Take(torch.autograd.Function):
    """Return some rows, and all rows. Pass the latter to `_Put` only, which replaces the rows taken."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices)
        return rows.index_select(0, indices), rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, of_taken: Tensor, of_rows: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return of_rows.index_copy(0, indices, of_taken), None


class _Put(torch.autograd.Function):
    """Replace the rows that `_Take` returned. Their gradient with respect to the replaced values is left to `_Take`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        return rows.index_copy(0, indices, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        return gradient, None, gradient.index_select(0, *ctx.saved_tensors)


def permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return `rows[order]`, given the inverse of the permutation."""
    return _Permute.apply(rows, order, inverse)


def take(rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return `rows[indices]`, for distinct indices, and `rows` to be passed to `put` with the same indices."""
    return _Take.apply(rows, indices)


def put(rows: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Return a copy of the second result of `take` with the rows at `indices` replaced."""
    return _Put.apply(rows, indices, values)


@dataclass
class Movable:
    """A dataclass whose fields are tensors, nested `Movable` objects, tuples of these, or other values."""

    def to(self, device: torch.device | str) -> Any:
        """Return a copy whose tensors are on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Any:
        """Return a copy in pinned memory, from which a GPU can copy while it computes."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Any) -> Any:
        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, Movable):
                return value._map(function)
            return tuple(map(apply, value)) if isinstance(value, tuple) else value

        return replace(self, **{entry.name: apply(getattr(self, entry.name)) for entry in fields(self)})


@dataclass
class ScanSubset(Movable):
    """Scans of a pack on which a residual branch runs: stochastic depth (arXiv 1603.09382) that skips the others."""

    layout: PackLayout  # of the scans that run, for attention only
    tokens: Tensor  # indices of their tokens in the pack, int64, ascending
    weight: Tensor  # (B, 1) float32 by position: 1 / fraction of scans that run, and 0 for the others
    rescale: float  # 1 / fraction of scans that run


@dataclass
class PackLayout(Movable):
    """Arrangement of the tokens in a pack: scans sorted by length, so that attention can batch scans of equal length.

    Each scan contributes its first tokens (CLS and registers; in a decoder, the encoded tokens), then its patches. The
    *position* of a scan is its index in the sorted pack; its index in the batch is the *caller's order*. All indices
    are made at once on the CPU, in the loader during training; the number of operations does not depend on B.

    Attributes:
        groups: `(scans, L)` for each run of scans of equal length, shortest first.
        prefix: number of first tokens of each scan, 0 if it varies.
        order: index in the batch of the scan at each position, int64 `(B,)`. None, like all tensors below, if all scans
            have equal numbers of first tokens and of patches: positions and the caller's order are then the same.
        positions: position of each scan, int64 `(B,)`: the inverse of `order`.
        joining: index in `[first tokens, patches]` of each token by position, int64 `(N,)`.
        splitting: inverse of `joining`.
        starts: index of the first token of each scan by position, then N, int32 `(B + 1,)`.
        subsets: for each layer, the scans on which attention and MLP run, None for all.
    """

    groups: tuple[tuple[int, int], ...]
    prefix: int
    order: Tensor | None = None
    positions: Tensor | None = None
    joining: Tensor | None = None
    splitting: Tensor | None = None
    starts: Tensor | None = None
    subsets: tuple[tuple[ScanSubset | None, ScanSubset | None], ...] = ()

    @classmethod
    def from_patch_counts(
        cls, patch_counts: ArrayLike, prefix: int | ArrayLike, first_starts: ArrayLike | None = None
    ) -> PackLayout:
        """Lay out scans of these numbers of patches.

        Args:
            patch_counts: patches of each scan.
            prefix: first tokens of each scan; one number if all have the same.
            first_starts: index of the first token of each scan in the first tokens that `join` gets; by default they
                are in the caller's order.
        """
        patches = np.asarray(patch_counts, dtype=np.int64)
        first = np.broadcast_to(np.asarray(prefix, dtype=np.int64), patches.shape)
        B, lengths = len(patches), first + patches
        if B and (first == first[0]).all() and (patches == patches[0]).all():
            return cls(((B, int(lengths[0])),), int(first[0]))
        order = lengths.argsort(kind="stable")
        starts = np.concatenate([[0], lengths[order].cumsum()])
        scan = order.repeat(lengths[order])  # of each token by position
        token = np.arange(len(scan)) - starts[:-1].repeat(lengths[order])  # index within its scan
        first_starts = first.cumsum() - first if first_starts is None else np.asarray(first_starts)
        patch_starts = first.sum() + patches.cumsum() - patches - first
        joining = np.where(token < first[scan], first_starts[scan], patch_starts[scan]) + token
        sizes, scans = np.unique(lengths, return_counts=True)
        return cls(
            groups=tuple(zip(scans.tolist(), sizes.tolist(), strict=True)),
            prefix=prefix if isinstance(prefix, int) else 0,
            order=torch.from_numpy(order),
            positions=torch.from_numpy(order.argsort()),
            joining=torch.from_numpy(joining),
            splitting=torch.from_numpy(joining.argsort()),
            starts=torch.from_numpy(starts.astype(np.int32)),
        )

    @property
    def scans(self) -> int:
        """Number of scans, B."""
        return sum(scans for scans, _ in self.groups)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the scan at each position."""
        scans, lengths = zip(*self.groups, strict=True)
        return np.repeat(lengths, scans)

    def join(self, first: Tensor, patches: Tensor) -> Tensor:
        """Join first tokens `(B, prefix, d)` or `(first tokens of all scans, d)` and patches `(P, d)` to `(N, d)`.

        The result is by position. Patches, and first tokens unless `first_starts` was given, are in the caller's order.
        """
        if self.joining is None or self.splitting is None:
            ((B, L),) = self.groups
            first = first if first.ndim == 3 else first.unflatten(0, (B, self.prefix))
            return torch.cat([first, patches.unflatten(0, (B, L - self.prefix))], dim=1).flatten(0, 1)
        return permute(torch.cat([first.flatten(0, -2), patches]), self.joining, self.splitting)

    def split(self, tokens: Tensor, patches: int) -> tuple[Tensor, Tensor]:
        """Undo `join`: `(N, d)` by position to the first tokens of all scans `(N - P, d)` and the `P` patches."""
        if self.joining is None or self.splitting is None:
            ((B, L),) = self.groups
            first, rest = tokens.unflatten(0, (B, L)).split([self.prefix, L - self.prefix], dim=1)
            return first.flatten(0, 1), rest.flatten(0, 1)
        first, rest = permute(tokens, self.splitting, self.joining).split([len(tokens) - patches, patches])
        return first, rest

    def split_groups(self, tokens: Tensor) -> list[Tensor]:
        """Return one view `(scans, L, ...)` of tokens `(N, ...)` by position for each group of equal lengths."""
        chunks = tokens.split([scans * length for scans, length in self.groups]) if len(self.groups) > 1 else [tokens]
        return [chunk.unflatten(0, group) for chunk, group in zip(chunks, self.groups, strict=True)]

    def first_tokens(self, tokens: Tensor) -> Tensor:
        """Return the first token, CLS, of each scan: `(N, d)` -> `(B, d)`, both by position."""
        if self.starts is None:
            return tokens.unflatten(0, self.groups[0])[:, 0]
        return take(tokens, self.starts[:-1].long())[0]

    def scans_to_caller_order(self, scans: Tensor) -> Tensor:
        """Reorder one row per scan: `(B, d)` by position -> `(B, d)` in the caller's order."""
        if self.order is None or self.positions is None:
            return scans
        return permute(scans, self.positions, self.order)

    def to_caller_order(self, tokens: Tensor) -> Tensor:
        """Reorder tokens: `(N, d)` by position -> `(N, d)` with the scans in the caller's order."""
        if self.order is None or self.positions is None:
            return tokens
        positions = self.positions.cpu()
        scans = torch.arange(len(tokens)).split(self.lengths.tolist())
        return tokens[torch.cat([scans[position] for position in positions]).to(tokens.device)]

    def sample_subsets(self, rates: Sequence[float], noise: Tensor) -> PackLayout:
        """Return this layout with random scans for attention and MLP of each layer to run on.

        Args:
            rates: fraction of the scans that each layer skips; at least one scan runs.
            noise: at least eight random numbers on the CPU, which seed the draw. The result depends on nothing else, so
                it is the same in every loader worker and in a resumed run.
        """
        lengths, sizes = self.lengths, np.array([scans for scans, _ in self.groups])
        B, scan = len(lengths), np.arange(len(lengths)).repeat(lengths)  # scan of each token
        generator = np.random.default_rng(np.frombuffer(noise[:8].numpy().tobytes(), dtype=np.uint32))
        ranks = generator.random((len(rates), 2, B)).argsort(-1).argsort(-1)

        def subset(runs: np.ndarray) -> ScanSubset | None:  # (B,) bool
            if runs.all():
                return None
            rescale = B / runs.sum()
            scans = np.add.reduceat(runs, sizes.cumsum() - sizes)
            groups = tuple((int(n), L) for n, (_, L) in zip(scans, self.groups, strict=True) if n)
            starts = np.concatenate([[0], lengths[runs].cumsum()]).astype(np.int32)
            layout = PackLayout(groups, self.prefix, starts=torch.from_numpy(starts))
            weight = torch.from_numpy((runs * rescale).astype(np.float32))[:, None]
            return ScanSubset(layout, torch.from_numpy(np.flatnonzero(runs[scan])), weight, float(rescale))

        running = [ranks[layer] < max(1, B - round(B * rate)) for layer, rate in enumerate(rates)]  # (2, B) each
        return replace(self, subsets=tuple((subset(attention), subset(mlp)) for attention, mlp in running))
