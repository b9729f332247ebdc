"""Scans of any size as rows of one matrix: their patches, where each lies in its scan, and how a pack is laid out.

`B` scans, `P` patches in the pack, `T, H, W` grid of one scan, `L` tokens of one scan, `N` tokens in the pack, `d`
hidden size. This file travels inside every checkpoint and imports nothing of the rest of the project.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


def cut(volumes: Tensor, patch_depth: int, patch_size: int) -> Tensor:
    """Equal volumes `(B, C, D, H, W)` -> `(B, T, H/p, W/p, C, t, p, p)`, their patches, where possible as a view.

    A depth that does not fill its last patch is padded by repeating the last slice; H and W must be multiples of p.

    Raises:
        ValueError: if H or W is no multiple of `patch_size`.
    """
    B, C, D, H, W = volumes.shape
    if H % patch_size or W % patch_size:
        raise ValueError(f"height and width must be multiples of the patch size {patch_size}, found {H} x {W}")
    if missing := -D % patch_depth:
        last = volumes[:, :, -1:].expand(-1, -1, missing + (D == 1), -1, -1)
        volumes = last if D == 1 else torch.cat([volumes, last], dim=2)
    T, h, w = (D + missing) // patch_depth, H // patch_size, W // patch_size
    patches = volumes.view(B, C, T, patch_depth, h, patch_size, w, patch_size)
    return patches.permute(0, 2, 4, 6, 1, 3, 5, 7)


def patchify(volumes: Tensor, patch_depth: int, patch_size: int) -> Tensor:
    """Equal volumes `(B, C, D, H, W)` -> patch rows `(B, T*H/p*W/p, C*t*p*p)`, as `cut` has them.

    Rows are in raster order (depth, height, width), values of a row in the order channel, depth, height, width.
    """
    patches = cut(volumes, patch_depth, patch_size)
    return patches.reshape(volumes.shape[0], math.prod(patches.shape[1:4]), math.prod(patches.shape[4:]))


def grid_places(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Centre of each patch of one scan, every axis from -1 to 1, as in DINOv3: `(T*H*W, 3)` float32.

    A place relative to the scan and not an index, so that any grid, and a scan resized, keeps the same range.
    """
    axes = [(2 * torch.arange(n, dtype=torch.float32, device=device) + 1) / n - 1 for n in grid]
    return torch.cartesian_prod(*axes)


def patch_places(grids: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """Centre of each patch in its own scan, as `grid_places` has it: `(P, 3)` float32 for `B` grids."""
    places = [grid_places(grid, device) for grid in dict.fromkeys(grids)]  # each different grid once, repeated below
    if len(places) == 1:
        return places[0].repeat(len(grids), 1)
    of_grid = dict(zip(dict.fromkeys(grids), places, strict=True))
    return torch.cat([of_grid[grid] for grid in grids])


class PackLayout(NamedTuple):
    """Where the tokens of each scan stand in the pack. Scans are sorted by length, so that equal ones are neighbours.

    order: the scans, shortest first; rows: first and last+1 patch row of each scan, in the caller's order;
    prefix: tokens in front of each scan's patches; groups: `(scans, tokens of each)` for each run of equal lengths.
    """

    order: list[int]
    rows: list[tuple[int, int]]
    prefix: int
    groups: list[tuple[int, int]]

    @classmethod
    def of(cls, patch_counts: Sequence[int], prefix: int) -> PackLayout:
        order = sorted(range(len(patch_counts)), key=lambda scan: patch_counts[scan])  # stable
        stops = list(accumulate(patch_counts))
        rows = [(stop - count, stop) for stop, count in zip(stops, patch_counts, strict=True)]
        groups: list[tuple[int, int]] = []
        for scan in order:
            length = prefix + patch_counts[scan]
            if groups and groups[-1][1] == length:
                groups[-1] = (groups[-1][0] + 1, length)
            else:
                groups.append((1, length))
        return cls(order, rows, prefix, groups)

    @property
    def uniform(self) -> bool:
        return len(self.groups) == 1

    def join(self, prefix: Tensor, rows: Tensor) -> Tensor:
        """`(B, prefix, d)` and `(P, d)` in the caller's order -> `(N, d)` tokens in the pack's order."""
        if self.uniform:
            return torch.cat([prefix, rows.view(prefix.shape[0], -1, rows.shape[-1])], dim=1).flatten(0, 1)
        pieces = [piece for scan in self.order for piece in (prefix[scan], rows[slice(*self.rows[scan])])]
        return torch.cat(pieces)

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`(N, d)` in the pack's order -> `(B, prefix, d)` and `(P, d)` in the caller's order: undoes `join`."""
        if self.uniform:
            (scans,) = self.views(tokens)
            return scans[:, : self.prefix], scans[:, self.prefix :].flatten(0, 1)
        pieces = self.scans(tokens)
        return torch.stack([piece[: self.prefix] for piece in pieces]), torch.cat([p[self.prefix :] for p in pieces])

    def views(self, tokens: Tensor) -> list[Tensor]:
        """`(N, ...)` in the pack's order -> for each group a view `(scans, L, ...)`."""
        chunks = tokens.split([scans * length for scans, length in self.groups])
        return [chunk.unflatten(0, group) for chunk, group in zip(chunks, self.groups, strict=True)]

    def scans(self, tokens: Tensor) -> list[Tensor]:
        """`(N, ...)` in the pack's order -> each scan's `(L, ...)`, in the caller's order."""
        sorted_scans = tokens.split([length for scans, length in self.groups for _ in range(scans)])
        return [sorted_scans[place] for place in self.places]

    def subset(self, kept: Sequence[int]) -> PackLayout:
        """The layout of some scans alone, given by their places in the pack, ascending."""
        lengths = [length for scans, length in self.groups for _ in range(scans)]
        return PackLayout.of([lengths[place] - self.prefix for place in kept], self.prefix)

    def token_rows(self, kept: Sequence[int], device: torch.device) -> Tensor:
        """Rows in the pack of those scans' tokens, `(N of them,)` int64."""
        lengths = [length for scans, length in self.groups for _ in range(scans)]
        starts = [stop - length for stop, length in zip(accumulate(lengths), lengths, strict=True)]
        runs = [torch.arange(starts[place], starts[place] + lengths[place]) for place in kept]
        return torch.cat(runs).to(device, non_blocking=True)

    def restore(self, tokens: Tensor) -> Tensor:
        """`(N, d)` in the pack's order -> `(N, d)` with the scans in the caller's order."""
        return tokens if self.uniform else torch.cat(self.scans(tokens))

    @property
    def places(self) -> list[int]:
        """Where in the pack each scan stands: the inverse of `order`."""
        places = [0] * len(self.order)
        for place, scan in enumerate(self.order):
            places[scan] = place
        return places
