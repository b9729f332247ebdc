"""Random views of a scan for pretraining: 3D crops, resized by the processor's own size policy.

A view is a scan like any other; nothing here asks for the modality. Many views are cut from one decode, since decoding
a CT costs more than a training step on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

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
