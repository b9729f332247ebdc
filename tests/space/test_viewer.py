"""Rendering a slice: windows in HU, proportions in millimetres, heatmaps, regions and the voxel under a pixel."""

from __future__ import annotations

import numpy as np
import pytest

from modeling_m3ret.reading_m3ret import Scan, read_scan
from modeling_m3ret.space.viewer import (
    WINDOWS,
    Window,
    describe_scan,
    is_hounsfield,
    linked_slice,
    region_from_numbers,
    render_slice,
    voxel_at,
)


def ct(hounsfield: np.ndarray) -> Scan:
    """Return a CT of `(D, H, W)` HU as the reader does."""
    return read_scan({"volume": hounsfield.astype(np.int16), "intensity": "hounsfield", "spacing": [4.0, 2.0, 1.0]})


@pytest.mark.parametrize("name", [*WINDOWS])
def test_a_window_maps_its_edges_to_black_and_white(name: str) -> None:
    level, width = WINDOWS[name]
    values = np.array([level - width / 2, level, level + width / 2]).clip(-1000, 1000)
    volume = np.broadcast_to(values.repeat(10), (2, 3, 30))
    shown = np.asarray(render_slice(ct(volume), 0, WINDOWS[name], long_side=30))[0, [5, 15, 25], 0]
    expected = ((np.rint(values) - (level - width / 2)) / width).clip(0, 1) * 255
    np.testing.assert_allclose(shown, expected, atol=2)


def test_a_window_applies_only_to_hounsfield_units() -> None:
    scan = read_scan(np.arange(20 * 30, dtype=np.uint16).reshape(20, 30))
    assert not is_hounsfield(scan)
    assert render_slice(scan, 0, Window(40, 80)).tobytes() == render_slice(scan, 0).tobytes()


def test_images_have_the_proportions_of_the_body() -> None:
    noise = np.random.default_rng(0).integers(-1000, 1000, (3, 50, 40))
    assert render_slice(ct(noise), 1, long_side=200).size == (80, 200)  # 40 x 1 mm wide, 50 x 2 mm high
    colour = read_scan(np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8))
    assert render_slice(colour, 0, long_side=120).size == (120, 60)


@pytest.mark.parametrize(("index", "expected"), [(0, 0), (3, 3), (99, 4), (-7, 0)])
def test_an_image_shows_the_slice_clipped_to_the_scan(index: int, expected: int) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 24, 32, 3), dtype=np.uint8)
    image = render_slice(read_scan(frames), index, long_side=32)
    np.testing.assert_array_equal(np.asarray(image), frames[expected])


def test_heat_colours_only_the_voxels_that_are_hot() -> None:
    scan = read_scan(np.random.default_rng(0).integers(0, 255, (2, 40, 40), dtype=np.uint8))
    heat = np.zeros((2, 40, 40), np.uint8)
    heat[1, 5:15, 20:30] = 255
    plain = np.asarray(render_slice(scan, 1, long_side=40)).astype(int)
    hot = np.asarray(render_slice(scan, 1, heat=heat, long_side=40)).astype(int)
    np.testing.assert_array_equal(np.abs(plain - hot).sum(-1) > 0, heat[1] > 0)
    assert (hot[5:15, 20:30, 0] > hot[5:15, 20:30, 2]).all(), "yellow"
    assert render_slice(scan, 0, heat=heat).tobytes() == render_slice(scan, 0).tobytes()


@pytest.mark.parametrize("spacing", [[4.0, 2.0, 1.0], [4.0, 0.5, 0.7], [1.0, 1.0, 3.0]])
def test_voxel_at_is_the_voxel_that_the_pixel_shows(spacing: list[float]) -> None:
    """The values of the volume are its coordinates, so a pixel's brightness is its position."""
    for axis, coordinates in enumerate(np.mgrid[:23, :37]):
        volume = np.broadcast_to(coordinates * 40 - 900, (2, 23, 37)).astype(np.int16)
        scan = read_scan({"volume": volume, "intensity": "hounsfield", "spacing": spacing})
        last = coordinates.max()
        window = Window((last * 40) / 2 - 900, last * 40)  # black at the first coordinate, white at the last one
        shown = np.asarray(render_slice(scan, 1, window))[..., 0] / 255 * last  # (height, width)
        height, width = shown.shape
        found = np.array([[voxel_at(scan, x, y)[axis] for x in range(0, width, 7)] for y in range(0, height, 5)])
        seen = shown[::5, ::7]
        inner = (seen > 1) & (seen < last - 1)  # bicubic interpolation is not linear at the edges
        assert np.abs(found - seen)[inner].max() < 0.5 + last / 255
        assert inner.mean() > 0.8
        assert found.min() == 0
        assert voxel_at(scan, width - 1, height - 1) == (22, 36)
        assert voxel_at(scan, width + 50, -50) == (0, 36), "clipped to the scan"


@pytest.mark.parametrize("spacing", [[4.0, 2.0, 1.0], [1.0, 1.0, 3.0]])
def test_a_region_is_outlined_on_its_own_voxels(spacing: list[float]) -> None:
    region = (slice(1, 3), slice(4, 12), slice(10, 30))
    volume = np.full((4, 23, 37), -1000, np.int16)
    scan = read_scan({"volume": volume, "intensity": "hounsfield", "spacing": spacing})
    for index in range(4):
        plain, outlined = (np.asarray(render_slice(scan, index, region=which)) for which in (None, region))
        ys, xs = np.nonzero((plain != outlined).any(-1))
        if index not in (1, 2):
            assert not len(ys), "the region does not include this slice"
            continue
        voxels = {voxel_at(scan, x, y) for y, x in zip(ys, xs, strict=True)}
        assert {row for row, _ in voxels} <= set(range(4, 12))
        assert {column for _, column in voxels} <= set(range(10, 30))
        assert voxel_at(scan, xs.min(), ys.min()) == (4, 10)
        assert voxel_at(scan, xs.max(), ys.max()) == (11, 29)


def test_a_mark_is_centred_on_its_voxel() -> None:
    scan = read_scan(np.zeros((30, 40, 3), np.uint8))
    marked = np.asarray(render_slice(scan, 0, mark=(12, 33))).any(-1)
    ys, xs = np.nonzero(marked)
    assert voxel_at(scan, xs.mean(), ys.mean()) == (12, 33)


@pytest.mark.parametrize(
    ("numbers", "region"),
    [
        ([1, 5, 1, 30, 1, 40], None),
        ([None] * 6, None),
        ([2, 3, 4, 10, 7, 20], (slice(1, 3), slice(3, 10), slice(6, 20))),
        ([3, 2, 10, 4, 20, 7], (slice(1, 3), slice(3, 10), slice(6, 20))),
        ([2, 99, -4, 10, None, 20], (slice(1, 5), slice(0, 10), slice(0, 20))),
        ([2, 2, 30, 30, 40, 40], (slice(1, 2), slice(29, 30), slice(39, 40))),
    ],
    ids=["full", "empty", "in order", "reversed", "clipped", "one voxel"],
)
def test_numbers_become_a_region(numbers: list[float | None], region: tuple[slice, ...] | None) -> None:
    assert region_from_numbers(ct(np.zeros((5, 30, 40))), numbers) == region


def test_a_description_holds_sizes_and_spacings() -> None:
    volume = describe_scan(ct(np.arange(2 * 3 * 5).reshape(2, 3, 5) - 900))
    for fact in ("2 slices", "5 × 3 px", "1 × 2 mm", "4 mm"):
        assert fact in volume
    clip = describe_scan(
        read_scan(np.random.default_rng(0).integers(0, 255, (40, 8, 9, 3), dtype=np.uint8), num_frames=10)
    )
    for fact in ("10 frames", "9 × 8 px", "40"):
        assert fact in clip
    assert " mm" not in clip
    image = describe_scan(read_scan(np.eye(7, 9, dtype=np.uint8)))
    assert "9 × 7 px" in image
    assert " mm" not in image


def test_linked_slices_have_the_same_relative_depth() -> None:
    assert [linked_slice(index, 5, 9) for index in range(5)] == [0, 2, 4, 6, 8]
    assert [linked_slice(index, 9, 5) for index in (0, 8)] == [0, 4]
    assert linked_slice(0, 1, 9) == 0
    assert linked_slice(4, 9, 1) == 0
