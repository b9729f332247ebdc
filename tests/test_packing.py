"""Test patches, their coordinates, and the layout of a pack."""

from __future__ import annotations

import torch
from packs import largest_difference
from torch import Tensor

from modeling_m3ret.packing_m3ret import PackLayout, grid_coordinates, patch_coordinates, patchify, permute, put, take


def test_patchify_equals_its_definition_by_loops() -> None:
    """Rows are in raster order; a row holds channel, depth, height, width of its patch."""
    volumes = torch.randn(2, 3, 6, 32, 48)
    rows = patchify(volumes, 4, 16)
    padded = torch.cat([volumes, volumes[:, :, -1:], volumes[:, :, -1:]], dim=2)
    assert rows.shape == (2, 2 * 2 * 3, 3 * 4 * 16 * 16)
    for scan in range(2):
        for row, (t, y, x) in enumerate((t, y, x) for t in range(2) for y in range(2) for x in range(3)):
            patch = padded[scan, :, 4 * t : 4 * t + 4, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
            assert torch.equal(rows[scan, row], patch.flatten())


def test_coordinates_are_patch_centres_between_minus_one_and_one() -> None:
    coordinates = patch_coordinates([(1, 2, 4), (1, 1, 1)], torch.device("cpu"))
    assert coordinates.shape == (9, 6)
    assert coordinates[0].tolist() == [0, -0.5, -0.75, 1, 2, 4]
    assert coordinates[7].tolist() == [0, 0.5, 0.75, 1, 2, 4]
    assert coordinates[8].tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(grid_coordinates((1, 2, 4), torch.device("cpu")), coordinates[:8])


def test_layout_splits_what_it_joined() -> None:
    counts = [3, 1, 3, 5, 1]
    layout = PackLayout.from_patch_counts(counts, prefix=2)
    assert layout.groups == ((2, 3), (2, 5), (1, 7))
    prefix, rows = torch.randn(5, 2, 4), torch.randn(sum(counts), 4)
    joined = layout.join(prefix, rows)
    split_prefix, split_rows = layout.split(joined, sum(counts))
    assert torch.equal(split_prefix, prefix.flatten(0, 1))
    assert torch.equal(split_rows, rows)
    expected = torch.cat([torch.cat(scan) for scan in zip(prefix, rows.split(counts), strict=True)])
    assert torch.equal(layout.to_caller_order(joined), expected)


def test_gradients_of_permutations_and_subsets_equal_those_of_indexing() -> None:
    """Against autograd's own indexing, in float64."""
    rows = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    order, indices = torch.randperm(9), torch.tensor([1, 4, 7])
    weights = torch.randn(9, 4, dtype=torch.float64)

    def ours(rows: Tensor) -> Tensor:
        some, others = take(permute(rows, order, order.argsort()), indices)
        return put(others, indices, some.sin())

    def reference(rows: Tensor) -> Tensor:
        moved = rows[order]
        return moved.index_copy(0, indices, moved[indices].sin())

    assert torch.equal(ours(rows), reference(rows))
    (gradient,) = torch.autograd.grad((ours(rows) * weights).sum(), rows)
    (expected,) = torch.autograd.grad((reference(rows) * weights).sum(), rows)
    assert largest_difference(gradient, expected) <= 1e-12
