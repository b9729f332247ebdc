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
from itertools import groupby
from typing import NamedTuple

import torch
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
            f"got {H} x {W}. Resize or pad the volumes"
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
    """Return the patch centres of one scan in raster order: `(T*H*W, 3)` float32 from -1 to 1 along every axis.

    Coordinates relative to the scan (DINOv3, arXiv 2508.10104) keep this range for every grid size and after resizing;
    indices would not.
    """
    axes = [(2 * torch.arange(n, dtype=torch.float32, device=device) + 1) / n - 1 for n in grid]
    return torch.cartesian_prod(*axes)


def patch_coordinates(grids: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """Return the `grid_coordinates` of all scans of a pack, scan after scan: `(P, 3)` float32."""
    coordinates = {grid: grid_coordinates(grid, device) for grid in dict.fromkeys(grids)}  # once for each distinct grid
    return torch.cat([coordinates[grid] for grid in grids])


class PackLayout(NamedTuple):
    """Arrangement of the tokens in a pack: scans sorted by length, so that attention can batch scans of equal length.

    Each scan contributes its prefix tokens (CLS and registers), then its patches. The *position* of a scan is its index
    in the sorted pack; its index in the batch is the *caller's order*.

    Attributes:
        order: index in the batch of the scan at each position, shortest scan first.
        prefix: number of prefix tokens of each scan.
        groups: `(scans, L)` for each run of scans of equal length.
    """

    order: list[int]
    prefix: int
    groups: list[tuple[int, int]]

    @classmethod
    def from_patch_counts(cls, patch_counts: Sequence[int], prefix: int) -> PackLayout:
        """Lay out scans of these numbers of patches, each with `prefix` prefix tokens."""
        order = sorted(range(len(patch_counts)), key=lambda scan: patch_counts[scan])  # stable
        groups = [(len(list(run)), prefix + count) for count, run in groupby(sorted(patch_counts))]
        return cls(order, prefix, groups)

    @property
    def is_uniform(self) -> bool:
        """True if all scans have the same length. Positions and the caller's order are then the same."""
        return len(self.groups) == 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of the scan at each position."""
        return [length for scans, length in self.groups for _ in range(scans)]

    @property
    def positions(self) -> list[int]:
        """Position of each scan, in the caller's order: the inverse of `order`."""
        return sorted(range(len(self.order)), key=lambda position: self.order[position])

    def join(self, prefix: Tensor, rows: Tensor) -> Tensor:
        """Join prefix tokens `(B, prefix, d)` and patches `(P, d)` in the caller's order to `(N, d)` by position."""
        if self.is_uniform:
            return torch.cat([prefix, rows.view(prefix.shape[0], -1, rows.shape[-1])], dim=1).flatten(0, 1)
        lengths = self.lengths
        scans = rows.split([lengths[position] - self.prefix for position in self.positions])
        return torch.cat([piece for scan in self.order for piece in (prefix[scan], scans[scan])])

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Undo `join`: `(N, d)` by position to `(B, prefix, d)` and `(P, d)` in the caller's order."""
        if self.is_uniform:
            (scans,) = self.split_groups(tokens)
            return scans[:, : self.prefix], scans[:, self.prefix :].flatten(0, 1)
        pieces = self.split_scans(tokens)
        return torch.stack([piece[: self.prefix] for piece in pieces]), torch.cat([p[self.prefix :] for p in pieces])

    def split_groups(self, tokens: Tensor) -> list[Tensor]:
        """Return one view `(scans, L, ...)` of tokens `(N, ...)` by position for each group of equal lengths."""
        chunks = tokens.split([scans * length for scans, length in self.groups])
        return [chunk.unflatten(0, group) for chunk, group in zip(chunks, self.groups, strict=True)]

    def split_scans(self, tokens: Tensor) -> list[Tensor]:
        """Return the tokens `(L, ...)` of each scan in the caller's order, given `(N, ...)` by position."""
        sorted_scans = tokens.split(self.lengths)
        return [sorted_scans[position] for position in self.positions]

    def subset(self, positions: Sequence[int]) -> PackLayout:
        """Return the layout of the scans at these positions, given in ascending order."""
        lengths = self.lengths
        return PackLayout.from_patch_counts([lengths[position] - self.prefix for position in positions], self.prefix)

    def token_indices(self, positions: Sequence[int], device: torch.device) -> Tensor:
        """Return the indices in `(N, ...)` of the tokens of the scans at these positions, as one int64 vector."""
        tokens = torch.arange(sum(self.lengths)).split(self.lengths)
        return torch.cat([tokens[position] for position in positions]).to(device, non_blocking=True)

    def to_caller_order(self, tokens: Tensor) -> Tensor:
        """Reorder tokens: `(N, d)` by position -> `(N, d)` with the scans in the caller's order."""
        return tokens if self.is_uniform else torch.cat(self.split_scans(tokens))
