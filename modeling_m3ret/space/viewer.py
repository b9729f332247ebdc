"""One slice or frame of a scan as a picture: windowed where it is in HU, heat on top, square in millimetres; and which
voxel a place in the picture is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..reading_m3ret import Scan
from ..scan_m3ret import HU_RANGE


class Window(NamedTuple):
    """What becomes black to white, in HU."""

    centre: float
    width: float


WHOLE_RANGE = "whole range"
# the usual ones of CT reading rooms (Radiopaedia, "Windowing (CT)"), within what the reader keeps
WINDOWS = {
    WHOLE_RANGE: Window(0, HU_RANGE[1] - HU_RANGE[0]),
    "soft tissue": Window(50, 400),
    "lung": Window(-600, 1500),
    "bone": Window(400, 1800),
    "brain": Window(40, 80),
}
LONGEST = 640  # px: half of a page of 1280
HEAT_COLOUR = np.array([[0, 0, 0], [180, 30, 60], [255, 120, 0], [255, 235, 90]], np.float32)  # cold to hot
HEAT_OPACITY = 0.65
MARK_COLOUR = "#00e5ff"  # far from the heat's colours and from grey
CORNER_MARK = 7  # px to each side

Region = tuple[slice, slice, slice]  # a box of voxels along D, H and W, as `locate` takes it


def is_in_hu(scan: Scan) -> bool:
    return str(scan.description.get("intensity", "")).startswith("hounsfield")


def slices_of(scan: Scan) -> int:
    return int(scan.array.shape[1])


def facts_of_scan(scan: Scan) -> str:
    """Size and spacing in words; nothing that a header's text says."""
    _, D, H, W = scan.array.shape
    total = scan.description.get("frames_total", D)
    if D == 1:
        size = f"{W} × {H} px"
    elif scan.spacing[0] is None:
        size = f"{D} frames of {W} × {H} px" + (f", of {total} in the file" if total != D else "")
    else:
        size = f"{D} slices of {W} × {H} px"
    through, down, across = scan.spacing
    mm = []
    if across is not None and down is not None:
        mm.append(f"{across:.3g} × {down:.3g} mm a pixel")
    if through is not None and D > 1:
        mm.append(f"{through:.3g} mm between slices")
    return " · ".join([size, *(mm or ["spacing unknown"])])


def picture(
    scan: Scan,
    place: int,
    window: Window | None = None,
    heat: NDArray[np.uint8] | None = None,
    region: Region | None = None,
    corner: tuple[int, int] | None = None,
    longest: int = LONGEST,
) -> Image.Image:
    """A slice or frame in RGB, its longer side `longest` px, its shape that of the body where spacing is known.

    Args:
        place: of the slice, from 0; beyond the ends it is the last one there. window: of a scan in HU.
        heat: `(D, H, W)` on the scan's own array. region: framed, on the slices that it has. corner: row and column of
        a voxel that is marked.
    """
    place = min(max(place, 0), slices_of(scan) - 1)
    plane = scan.array[:, place].astype(np.float32)  # (C, H, W)
    if scan.array.dtype == np.uint8:
        plane /= 255
    if window is not None and is_in_hu(scan):
        hounsfield = plane * (HU_RANGE[1] - HU_RANGE[0]) + HU_RANGE[0]
        plane = (hounsfield - (window.centre - window.width / 2)) / window.width
    grey = np.rint(plane.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)  # (H, W, C)
    size = _size(scan, longest)
    image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(grey, (*grey.shape[:2], 3))))
    image = image.resize(size, Image.Resampling.BICUBIC)
    if heat is not None:
        image = _heated(image, heat[place])
    if region is not None and region[0].start <= place < region[0].stop:
        _frame(image, scan, region)
    if corner is not None:
        _mark(image, scan, corner)
    return image


def voxel_at(scan: Scan, x: float, y: float, longest: int = LONGEST) -> tuple[int, int]:
    """Row and column of the voxel under a pixel of `picture`, counted from 0 as pixels are; beyond the edges the one
    there."""
    width, height = _size(scan, longest)
    _, _, H, W = scan.array.shape
    row, column = int((y + 0.5) * H / height), int((x + 0.5) * W / width)
    return min(max(row, 0), H - 1), min(max(column, 0), W - 1)


def _size(scan: Scan, longest: int) -> tuple[int, int]:
    """Width and height in px."""
    _, _, H, W = scan.array.shape
    _, down, across = scan.spacing
    height, width = (H * down, W * across) if down and across else (float(H), float(W))
    scale = longest / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _heated(image: Image.Image, heat: NDArray[np.uint8]) -> Image.Image:
    """The picture under heat `(H, W)`: what is cold stays as it is."""
    warmth = np.asarray(Image.fromarray(heat).resize(image.size, Image.Resampling.BILINEAR), np.float32) / 255
    steps = np.linspace(0, 1, len(HEAT_COLOUR))
    colour = np.stack([np.interp(warmth, steps, channel) for channel in HEAT_COLOUR.T], axis=-1)
    opacity = (HEAT_OPACITY * warmth)[..., None]
    mixed = np.asarray(image, np.float32) * (1 - opacity) + colour * opacity
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def _frame(image: Image.Image, scan: Scan, region: Region) -> None:
    """The region's outline, just within it, dark on both sides so that it is seen on white."""
    _, _, H, W = scan.array.shape
    _, rows, columns = region
    left, right = (round(edge * image.width / W) for edge in (columns.start, columns.stop))
    top, bottom = (round(edge * image.height / H) for edge in (rows.start, rows.stop))
    draw = ImageDraw.Draw(image)
    for inset, colour in enumerate(("#000000", MARK_COLOUR, MARK_COLOUR, "#000000")):
        if right - left > 2 * inset and bottom - top > 2 * inset:
            draw.rectangle([left + inset, top + inset, right - 1 - inset, bottom - 1 - inset], outline=colour)


def _mark(image: Image.Image, scan: Scan, corner: tuple[int, int]) -> None:
    """A cross on the centre of a voxel."""
    _, _, H, W = scan.array.shape
    y, x = (corner[0] + 0.5) * image.height / H, (corner[1] + 0.5) * image.width / W
    draw = ImageDraw.Draw(image)
    for colour, width in (("#000000", 4), (MARK_COLOUR, 2)):
        draw.line([x - CORNER_MARK, y, x + CORNER_MARK, y], fill=colour, width=width)
        draw.line([x, y - CORNER_MARK, x, y + CORNER_MARK], fill=colour, width=width)


def linked(place: int, slices: int, other_slices: int) -> int:
    """The slice of the other scan at the same part of the way through it."""
    return round(place / max(1, slices - 1) * (other_slices - 1))


def region_of(scan: Scan, numbers: Sequence[float | None]) -> Region | None:
    """The box from the first to the last slice, row and column, counted from 1 as the sliders are: both ends belong to
    it, in either order and within the scan; None is the scan's end. None for the whole scan."""
    axes = []
    for low, high, size in zip(numbers[::2], numbers[1::2], scan.array.shape[1:], strict=True):
        ends = [min(max(int(default if end is None else end), 1), size) for end, default in ((low, 1), (high, size))]
        axes.append(slice(min(ends) - 1, max(ends)))
    depth, rows, columns = axes
    region = (depth, rows, columns)
    return None if region == whole_of(scan) else region


def whole_of(scan: Scan) -> Region:
    _, D, H, W = scan.array.shape
    return slice(0, D), slice(0, H), slice(0, W)
