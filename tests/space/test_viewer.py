"""A slice as a picture: windows in HU, shapes in millimetres, heat where it belongs; and scans that are put away."""

from __future__ import annotations

import time

import numpy as np
import pytest

from modeling_m3ret.reading_m3ret import Scan, read_scan
from modeling_m3ret.space.shelf import Shelf
from modeling_m3ret.space.viewer import WINDOWS, Window, facts_of_scan, is_in_hu, linked, picture, region_of, voxel_at


def ct(hounsfield: np.ndarray) -> Scan:
    """`(D, H, W)` HU as the reader gives them."""
    return read_scan({"volume": hounsfield.astype(np.int16), "intensity": "hounsfield", "spacing": [4.0, 2.0, 1.0]})


@pytest.mark.parametrize("name", [*WINDOWS])
def test_a_window_makes_its_edges_black_and_white(name: str) -> None:
    centre, width = WINDOWS[name]
    values = np.array([centre - width / 2, centre, centre + width / 2]).clip(-1000, 1000)
    slab = np.zeros((2, 3, 30)) - 1000
    slab[:, :, :] = values.repeat(10)
    shown = np.asarray(picture(ct(slab), 0, WINDOWS[name], longest=30))[0, [5, 15, 25], 0]
    expected = ((np.rint(values) - (centre - width / 2)) / width).clip(0, 1) * 255
    np.testing.assert_allclose(shown, expected, atol=2)


def test_a_window_changes_nothing_where_values_are_no_hounsfield_units() -> None:
    scan = read_scan(np.arange(20 * 30, dtype=np.uint16).reshape(20, 30))
    assert not is_in_hu(scan)
    assert picture(scan, 0, Window(40, 80)).tobytes() == picture(scan, 0).tobytes()


def test_pictures_have_the_shape_of_the_body() -> None:
    noise = np.random.default_rng(0).integers(-1000, 1000, (3, 50, 40))
    assert picture(ct(noise), 1, longest=200).size == (80, 200)  # 40 x 1 mm wide, 50 x 2 mm high
    colour = read_scan(np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8))
    assert picture(colour, 0, longest=120).size == (120, 60)


def test_a_picture_is_the_slice() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 24, 32, 3), dtype=np.uint8)
    scan = read_scan(frames)
    for place, expected in ((0, 0), (3, 3), (99, 4), (-7, 0)):
        np.testing.assert_array_equal(np.asarray(picture(scan, place, longest=32)), frames[expected])


def test_heat_colours_what_is_hot_and_nothing_else() -> None:
    scan = read_scan(np.random.default_rng(0).integers(0, 255, (2, 40, 40), dtype=np.uint8))
    heat = np.zeros((2, 40, 40), np.uint8)
    heat[1, 5:15, 20:30] = 255
    plain = np.asarray(picture(scan, 1, longest=40)).astype(int)
    hot = np.asarray(picture(scan, 1, heat=heat, longest=40)).astype(int)
    different = np.abs(plain - hot).sum(-1) > 0
    np.testing.assert_array_equal(different, heat[1] > 0)
    assert (hot[5:15, 20:30, 0] > hot[5:15, 20:30, 2]).all(), "yellow"
    assert picture(scan, 0, heat=heat).tobytes() == picture(scan, 0).tobytes()


@pytest.mark.parametrize("spacing", [[4.0, 2.0, 1.0], [4.0, 0.5, 0.7], [1.0, 1.0, 3.0]])
def test_a_place_in_a_picture_is_the_voxel_that_is_seen_there(spacing: list[float]) -> None:
    """A volume whose values are its own coordinates: what a pixel shows is where it is."""
    rows, columns = np.mgrid[:23, :37]
    for axis, coordinates in enumerate((rows, columns)):
        volume = np.broadcast_to(coordinates * 40 - 900, (2, 23, 37)).astype(np.int16)
        scan = read_scan({"volume": volume, "intensity": "hounsfield", "spacing": spacing})
        last = coordinates.max()
        window = Window((last * 40) / 2 - 900, last * 40)  # black at 0, white at the last one
        shown = np.asarray(picture(scan, 1, window))[..., 0] / 255 * last  # (height, width), in rows or columns
        height, width = shown.shape
        found = np.array([[voxel_at(scan, x, y)[axis] for x in range(0, width, 7)] for y in range(0, height, 5)])
        seen = shown[::5, ::7]
        inner = (seen > 1) & (seen < last - 1)  # what is bicubic at the edge is no longer linear
        assert np.abs(found - seen)[inner].max() < 0.5 + last / 255
        assert inner.mean() > 0.8
        assert found.min() == 0
        assert voxel_at(scan, width - 1, height - 1) == (22, 36)
        assert voxel_at(scan, width + 50, -50) == (0, 36), "beyond the edges it is the one there"


@pytest.mark.parametrize("spacing", [[4.0, 2.0, 1.0], [1.0, 1.0, 3.0]])
def test_a_region_is_framed_where_its_voxels_are(spacing: list[float]) -> None:
    region = (slice(1, 3), slice(4, 12), slice(10, 30))
    volume = np.full((4, 23, 37), -1000, np.int16)
    scan = read_scan({"volume": volume, "intensity": "hounsfield", "spacing": spacing})
    for place in range(4):
        plain, framed = (np.asarray(picture(scan, place, region=which)) for which in (None, region))
        ys, xs = np.nonzero((plain != framed).any(-1))
        if place not in (1, 2):
            assert not len(ys), "the region does not reach this slice"
            continue
        voxels = {voxel_at(scan, x, y) for y, x in zip(ys, xs, strict=True)}
        assert {row for row, _ in voxels} <= set(range(4, 12))
        assert {column for _, column in voxels} <= set(range(10, 30))
        for y, x in ((ys.min(), xs.min()), (ys.max(), xs.max())):
            assert voxel_at(scan, x, y) == ((4, 10) if y == ys.min() else (11, 29))


def test_a_corner_is_marked_on_its_voxel() -> None:
    scan = read_scan(np.zeros((30, 40, 3), np.uint8))
    marked = np.asarray(picture(scan, 0, corner=(12, 33))).any(-1)
    ys, xs = np.nonzero(marked)
    assert voxel_at(scan, xs.mean(), ys.mean()) == (12, 33)


def test_numbers_are_a_region() -> None:
    scan = ct(np.zeros((5, 30, 40)))
    assert region_of(scan, [1, 5, 1, 30, 1, 40]) is None, "the whole scan"
    assert region_of(scan, [None] * 6) is None, "an empty field is the scan's end"
    inner = (slice(1, 3), slice(3, 10), slice(6, 20))
    assert region_of(scan, [2, 3, 4, 10, 7, 20]) == inner
    assert region_of(scan, [3, 2, 10, 4, 20, 7]) == inner, "in either order"
    assert region_of(scan, [2, 99, -4, 10, None, 20]) == (slice(1, 5), slice(0, 10), slice(0, 20)), "within the scan"
    assert region_of(scan, [2, 2, 30, 30, 40, 40]) == (slice(1, 2), slice(29, 30), slice(39, 40)), "one voxel"


def test_facts_are_sizes_and_millimetres() -> None:
    assert facts_of_scan(ct(np.arange(2 * 3 * 5).reshape(2, 3, 5) - 900)) == (
        "2 slices of 5 × 3 px · 1 × 2 mm a pixel · 4 mm between slices"
    )
    clip = read_scan(np.random.default_rng(0).integers(0, 255, (40, 8, 9, 3), dtype=np.uint8), num_frames=10)
    assert facts_of_scan(clip) == "10 frames of 9 × 8 px, of 40 in the file · spacing unknown"
    assert facts_of_scan(read_scan(np.eye(7, 9, dtype=np.uint8))) == "9 × 7 px · spacing unknown"


def test_linked_slices_are_equally_far_along() -> None:
    assert [linked(place, 5, 9) for place in range(5)] == [0, 2, 4, 6, 8]
    assert [linked(place, 9, 5) for place in (0, 8)] == [0, 4]
    assert linked(0, 1, 9) == 0
    assert linked(4, 9, 1) == 0


def test_a_shelf_keeps_what_was_used_last_within_its_bytes() -> None:
    shelf: Shelf[str] = Shelf(100)
    for name in "abc":
        shelf.put(name, name.upper(), 30)
    assert shelf.get("a") == "A"
    shelf.put("d", "D", 30)
    assert [shelf.get(name) for name in "abcd"] == ["A", None, "C", "D"]
    shelf.put("c", "C", 90)
    assert [shelf.get(name) for name in "acd"] == [None, "C", None]
    shelf.put("e", "E", 1000)
    assert [shelf.get(name) for name in "ce"] == [None, "E"], "the newest stays however large"
    shelf.drop("e")
    shelf.drop("e")
    assert shelf.get("e") is None
    for name in "fgh":
        shelf.put(name, name, 33)
    assert [shelf.get(name) for name in "fgh"] == ["f", "g", "h"], "what was dropped takes no room"


def test_what_nobody_asks_for_leaves_the_shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    shelf: Shelf[str] = Shelf(100)
    for name in "abc":
        shelf.put(name, name, 30)
        now += 10
    assert shelf.get("a") == "a"
    shelf.drop_unused(20)  # b was last asked for 20 s ago, c 10 s, a now
    assert [shelf.get(name) for name in "abc"] == ["a", None, "c"]
    now += 60
    shelf.drop_unused(20)
    assert [shelf.get(name) for name in "abc"] == [None] * 3
    for name in "fgh":
        shelf.put(name, name, 33)
    assert [shelf.get(name) for name in "fgh"] == ["f", "g", "h"], "what was dropped takes no room"
