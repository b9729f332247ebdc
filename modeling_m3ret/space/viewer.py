"""Render one slice or frame of a scan as an image, and find the voxel under one of its pixels.

CT values are windowed. Pixels are square in millimetres. A heatmap, a region and a marked voxel can be drawn on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..intensity_m3ret import HU_RANGE
from ..reading_m3ret import Scan


class Window(NamedTuple):
    """How CT values become grey values, in HU."""

    level: float
    width: float


FULL_RANGE = "full range"
# the usual ones of CT reading rooms (Radiopaedia, "Windowing (CT)"), within the range that the reader keeps
WINDOWS = {
    FULL_RANGE: Window(0, HU_RANGE[1] - HU_RANGE[0]),
    "soft tissue": Window(50, 400),
    "lung": Window(-600, 1500),
    "bone": Window(400, 1800),
    "brain": Window(40, 80),
}
LONG_SIDE = 640  # px: half of a page of 1280
HEAT_COLOURS = np.array([[0, 0, 0], [180, 30, 60], [255, 120, 0], [255, 235, 90]], np.float32)  # cold to hot
HEAT_OPACITY = 0.65
MARK_COLOUR = "#00e5ff"  # differs from the heat colours and from grey
MARK_ARM = 7  # px

Region = tuple[slice, slice, slice]  # a box of voxels along D, H and W, as `locate` takes it


def is_hounsfield(scan: Scan) -> bool:
    """Return whether the scan's values are Hounsfield units."""
    return str(scan.description.get("intensity", "")).startswith("hounsfield")


def num_slices(scan: Scan) -> int:
    return int(scan.array.shape[1])


def describe_scan(scan: Scan) -> str:
    """Describe size and spacing, without any text from a file header."""
    _, D, H, W = scan.array.shape
    total = scan.description.get("frames_total", D)
    if D == 1:
        size = f"{W} × {H} px"
    elif scan.spacing[0] is None:
        size = f"{D} frames of {W} × {H} px" + (f", sampled from {total}" if total != D else "")
    else:
        size = f"{D} slices of {W} × {H} px"
    through, down, across = scan.spacing
    mm = []
    if across is not None and down is not None:
        mm.append(f"{across:.3g} × {down:.3g} mm per pixel")
    if through is not None and D > 1:
        mm.append(f"{through:.3g} mm between slices")
    return " · ".join([size, *(mm or ["spacing unknown"])])


def render_slice(
    scan: Scan,
    index: int,
    window: Window | None = None,
    heat: NDArray[np.uint8] | None = None,
    region: Region | None = None,
    mark: tuple[int, int] | None = None,
    long_side: int = LONG_SIDE,
) -> Image.Image:
    """Render a slice or frame in RGB, with the body's proportions where the spacing is known.

    Args:
        index: Index of the slice, from 0, clipped to the scan.
        window: Applied if the scan is in HU.
        heat: `(D, H, W)` uint8 on the scan's array.
        region: Outlined on the slices that it contains.
        mark: Row and column of a voxel to mark with a cross.
        long_side: Length of the image's longer side in pixels.
    """
    index = min(max(index, 0), num_slices(scan) - 1)
    plane = scan.array[:, index].astype(np.float32)  # (C, H, W)
    if scan.array.dtype == np.uint8:
        plane /= 255
    if window is not None and is_hounsfield(scan):
        hounsfield = plane * (HU_RANGE[1] - HU_RANGE[0]) + HU_RANGE[0]
        plane = (hounsfield - (window.level - window.width / 2)) / window.width
    grey = np.rint(plane.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)  # (H, W, C)
    image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(grey, (*grey.shape[:2], 3))))
    image = image.resize(_image_size(scan, long_side), Image.Resampling.BICUBIC)
    if heat is not None:
        image = _overlay_heat(image, heat[index])
    if region is not None and region[0].start <= index < region[0].stop:
        _draw_region(image, scan, region)
    if mark is not None:
        _draw_mark(image, scan, mark)
    return image


def voxel_at(scan: Scan, x: float, y: float, long_side: int = LONG_SIDE) -> tuple[int, int]:
    """Return row and column of the voxel under a pixel of `render_slice`, clipped to the scan. All count from 0."""
    width, height = _image_size(scan, long_side)
    _, _, H, W = scan.array.shape
    row, column = int((y + 0.5) * H / height), int((x + 0.5) * W / width)
    return min(max(row, 0), H - 1), min(max(column, 0), W - 1)


def _image_size(scan: Scan, long_side: int) -> tuple[int, int]:
    """Return width and height in pixels."""
    _, _, H, W = scan.array.shape
    _, down, across = scan.spacing
    height, width = (H * down, W * across) if down and across else (float(H), float(W))
    scale = long_side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _overlay_heat(image: Image.Image, heat: NDArray[np.uint8]) -> Image.Image:
    """Blend a heatmap `(H, W)` over an image. Where it is 0 the image does not change."""
    warmth = np.asarray(Image.fromarray(heat).resize(image.size, Image.Resampling.BILINEAR), np.float32) / 255
    steps = np.linspace(0, 1, len(HEAT_COLOURS))
    colour = np.stack([np.interp(warmth, steps, channel) for channel in HEAT_COLOURS.T], axis=-1)
    opacity = (HEAT_OPACITY * warmth)[..., None]
    mixed = np.asarray(image, np.float32) * (1 - opacity) + colour * opacity
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def _draw_region(image: Image.Image, scan: Scan, region: Region) -> None:
    """Outline a region from inside, with dark edges so that it is visible on white."""
    _, _, H, W = scan.array.shape
    _, rows, columns = region
    left, right = (round(edge * image.width / W) for edge in (columns.start, columns.stop))
    top, bottom = (round(edge * image.height / H) for edge in (rows.start, rows.stop))
    draw = ImageDraw.Draw(image)
    for inset, colour in enumerate(("#000000", MARK_COLOUR, MARK_COLOUR, "#000000")):
        if right - left > 2 * inset and bottom - top > 2 * inset:
            draw.rectangle([left + inset, top + inset, right - 1 - inset, bottom - 1 - inset], outline=colour)


def _draw_mark(image: Image.Image, scan: Scan, voxel: tuple[int, int]) -> None:
    _, _, H, W = scan.array.shape
    y, x = (voxel[0] + 0.5) * image.height / H, (voxel[1] + 0.5) * image.width / W
    draw = ImageDraw.Draw(image)
    for colour, width in (("#000000", 4), (MARK_COLOUR, 2)):
        draw.line([x - MARK_ARM, y, x + MARK_ARM, y], fill=colour, width=width)
        draw.line([x, y - MARK_ARM, x, y + MARK_ARM], fill=colour, width=width)


def linked_slice(index: int, slices: int, other_slices: int) -> int:
    """Return the slice at the same relative depth in another scan."""
    return round(index / max(1, slices - 1) * (other_slices - 1))


def region_from_numbers(scan: Scan, numbers: Sequence[float | None]) -> Region | None:
    """Return the box between first and last slice, row and column, or None if it is the whole scan.

    Args:
        numbers: First and last along D, H and W, inclusive and counted from 1. The order within a pair does not matter.
            None stands for the scan's edge. Values outside the scan are clipped.
    """
    axes = []
    for low, high, size in zip(numbers[::2], numbers[1::2], scan.array.shape[1:], strict=True):
        ends = [min(max(int(default if end is None else end), 1), size) for end, default in ((low, 1), (high, size))]
        axes.append(slice(min(ends) - 1, max(ends)))
    depth, rows, columns = axes
    region = (depth, rows, columns)
    return None if region == full_region(scan) else region


def full_region(scan: Scan) -> Region:
    _, D, H, W = scan.array.shape
    return slice(0, D), slice(0, H), slice(0, W)
