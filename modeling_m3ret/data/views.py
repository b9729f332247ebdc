"""Random views of a scan for pretraining: 3D crops, resized by the processor's own size policy, and intensity jitter.

A view is a scan like any other; nothing here asks for the modality. Many views are cut from one decode, since decoding
a CT costs more than a training step on it. No flips (left and right differ in a body), no hue or solarise (a Hounsfield
unit has no colour).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..reading_m3ret import Scan


@dataclass(frozen=True)
class CropRanges:
    """Of what a random crop is drawn, each uniform between its ends.

    area: part of the slice's area that the crop covers, .2 to 1 as in MAE (arXiv 2111.06377, appendix A.1).
    aspect: width over height of the crop relative to the scan's, log-uniform, 3/4 to 4/3 as in Inception and MAE.
    depth: part of the slices; 3DINO crops .5 to 1 of the slices for its global views.
    """

    area: tuple[float, float] = (0.2, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    depth: tuple[float, float] = (0.5, 1.0)


# areas of SimDINO's published 2D command (arXiv 2502.10385), depths of 3DINO's volumes
GLOBAL_CROPS = CropRanges(area=(0.4, 1.0), depth=(0.5, 1.0))
LOCAL_CROPS = CropRanges(area=(0.05, 0.4), depth=(0.2, 0.5))


@dataclass(frozen=True)
class Jitter:
    """Ranges of an intensity change, and the part of the views that it befalls.

    contrast and brightness: factor and shift (in parts of the range), .4 as in SimDINO's colour jitter, half of it for
    the shift, which clips. gamma: .7 to 1.5, nnU-Net's. part: .8, SimDINO's.
    """

    contrast: tuple[float, float] = (0.6, 1.4)
    brightness: tuple[float, float] = (-0.2, 0.2)
    gamma: tuple[float, float] = (0.7, 1.5)
    part: float = 0.8


@dataclass(frozen=True)
class ViewKind:
    """How many views of a kind each decode gives, and what they are. size: as of the processor; None: its own."""

    count: int
    ranges: CropRanges = CropRanges()
    size: int | None = None
    jitter: Jitter | None = None


def random_crop(scan: Scan, ranges: CropRanges, generator: np.random.Generator) -> Scan:
    """A box of the scan, `(C, D', H', W')`, of the same spacing; a view on the scan's memory, not a copy."""
    _, D, H, W = scan.array.shape
    area = generator.uniform(*ranges.area)
    aspect = math.exp(generator.uniform(math.log(ranges.aspect[0]), math.log(ranges.aspect[1])))
    height = min(H, max(1, round(H * math.sqrt(area / aspect))))
    width = min(W, max(1, round(W * math.sqrt(area * aspect))))
    depth = min(D, max(1, round(D * generator.uniform(*ranges.depth))))
    starts = [int(generator.integers(whole - part + 1)) for whole, part in ((D, depth), (H, height), (W, width))]
    box = tuple(slice(start, start + part) for start, part in zip(starts, (depth, height, width), strict=True))
    return replace(scan, array=scan.array[(slice(None), *box)])


def random_intensity(volume: Tensor, jitter: Jitter, generator: np.random.Generator) -> Tensor:
    """Contrast, brightness and gamma of a resized view in [-1, 1], the same for all its voxels and channels."""
    if generator.random() >= jitter.part:
        return volume
    contrast, brightness, gamma = (
        generator.uniform(*ends) for ends in (jitter.contrast, jitter.brightness, jitter.gamma)
    )
    unit = ((volume + 1) / 2).clamp_(0, 1).pow_(gamma)
    mean = unit.mean()
    return ((unit - mean) * contrast + mean + brightness).clamp_(0, 1) * 2 - 1
