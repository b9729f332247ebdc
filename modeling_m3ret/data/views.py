"""Random views of a scan for pretraining: 3D crops, resized by the processor's own size policy, and intensity changes.

A view is a scan like any other; nothing here asks for the modality, and what is done follows from the array alone: only
an array that has colour gets another colour. Many views are cut from one decode, since decoding a CT costs more than a
training step on it. No flips unless asked for (left and right differ in a body), and no solarise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..reading_m3ret import Scan


@dataclass(frozen=True)
class CropRanges:
    """Of what a random crop is drawn, each uniform between its ends.

    area: part of the slice's area that the crop covers, .2 to 1 as in MAE (arXiv 2111.06377, appendix A.1).
    aspect: width over height of the crop relative to the scan's, log-uniform, 3/4 to 4/3 as in Inception and MAE.
    depth: part of the slices; 3DINO crops .5 to 1 of the slices for its global views.
    single_slice_probability: of the crops, how many are a single slice, any of those there are, instead.
    """

    area: tuple[float, float] = (0.2, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    depth: tuple[float, float] = (0.5, 1.0)
    single_slice_probability: float = 0.0


# areas of SimDINO's published 2D command (arXiv 2502.10385), depths of 3DINO's volumes
GLOBAL_CROPS = CropRanges(area=(0.4, 1.0), depth=(0.5, 1.0))
LOCAL_CROPS = CropRanges(area=(0.05, 0.4), depth=(0.2, 0.5))


@dataclass(frozen=True)
class Jitter:
    """Intensity changes: the ranges that each is drawn from, and in `..._part` the part of the views that it befalls.

    contrast, brightness: factor and shift (in parts of the range), .4 and .8 of the views as in SimDINO's colour
    jitter, half of it for the shift, which clips. gamma: .7 to 1.5, nnU-Net's (Isensee et al. 2021), with them.
    white_balance, saturation: of arrays with colour alone, factor of each channel and distance from grey, with them;
    SimDINO's saturation is .2 and its hue .1, and light sources differ by more. grey_probability: SimDINO's.
    noise: standard deviation, of the range; blur: standard deviation in pixels; low_resolution: factor of the size that
    the view is shrunk to and blown up from; parts and ranges nnU-Net's.
    """

    contrast: tuple[float, float] = (0.6, 1.4)
    brightness: tuple[float, float] = (-0.2, 0.2)
    gamma: tuple[float, float] = (0.7, 1.5)
    white_balance: tuple[float, float] = (0.7, 1.4)
    saturation: tuple[float, float] = (0.6, 1.4)
    probability: float = 0.8
    grey_probability: float = 0.2
    noise: tuple[float, float] = (0.0, 0.1)
    noise_probability: float = 0.1
    blur: tuple[float, float] = (0.5, 1.0)
    blur_probability: float = 0.2
    low_resolution: tuple[float, float] = (0.5, 1.0)
    low_resolution_probability: float = 0.25


@dataclass(frozen=True)
class ViewKind:
    """How many views of a kind each decode gives, and what they are. size: as of the processor; None: its own.
    flip_probability: of the views, how many are mirrored left to right."""

    count: int
    ranges: CropRanges = CropRanges()
    size: int | None = None
    jitter: Jitter | None = None
    flip_probability: float = 0.0


def random_crop(scan: Scan, ranges: CropRanges, generator: np.random.Generator) -> Scan:
    """A box of the scan, `(C, D', H', W')`, of the same spacing; a view on the scan's memory, not a copy."""
    _, D, H, W = scan.array.shape
    area = generator.uniform(*ranges.area)
    aspect = math.exp(generator.uniform(math.log(ranges.aspect[0]), math.log(ranges.aspect[1])))
    height = min(H, max(1, round(H * math.sqrt(area / aspect))))
    width = min(W, max(1, round(W * math.sqrt(area * aspect))))
    depth = min(D, max(1, round(D * generator.uniform(*ranges.depth))))
    if ranges.single_slice_probability and generator.random() < ranges.single_slice_probability:
        depth = 1
    starts = [int(generator.integers(whole - part + 1)) for whole, part in ((D, depth), (H, height), (W, width))]
    box = tuple(slice(start, start + part) for start, part in zip(starts, (depth, height, width), strict=True))
    return replace(scan, array=scan.array[(slice(None), *box)])


def random_flip(scan: Scan, probability: float, generator: np.random.Generator) -> Scan:
    """The scan, or for a part of the draws its mirror image."""
    if generator.random() >= probability:
        return scan
    return replace(scan, array=np.ascontiguousarray(scan.array[..., ::-1]))


def random_intensity(volume: Tensor, jitter: Jitter, generator: np.random.Generator) -> Tensor:
    """A resized view `(1 or 3, D, H, W)` in [-1, 1] with its sharpness and its intensities changed: one draw a view.

    In the order of an acquisition: what the optics lose, what light and display make of it, what the sensor adds.
    """
    unit = ((volume + 1) / 2).clamp_(0, 1)
    if generator.random() < jitter.low_resolution_probability:
        unit = _low_resolution(unit, generator.uniform(*jitter.low_resolution))
    if generator.random() < jitter.blur_probability:
        unit = _blur(unit, generator.uniform(*jitter.blur))
    has_colour = len(unit) == 3
    if generator.random() < jitter.probability:
        contrast, brightness, gamma = (
            generator.uniform(*ends) for ends in (jitter.contrast, jitter.brightness, jitter.gamma)
        )
        if has_colour:
            balance = generator.uniform(*jitter.white_balance, size=(3, 1, 1, 1)).astype(np.float32)
            unit = unit * torch.from_numpy(balance)
            grey = unit.mean(0, keepdim=True)
            unit = (grey + (unit - grey) * generator.uniform(*jitter.saturation)).clamp_(0, 1)
        unit = unit.pow(gamma)
        mean = float(unit.numpy().mean(dtype=np.float64))  # torch's sum would depend on its threads, so on the worker
        unit = ((unit - mean) * contrast + mean + brightness).clamp_(0, 1)
    if has_colour and generator.random() < jitter.grey_probability:
        unit = unit.mean(0, keepdim=True).expand(3, -1, -1, -1)
    if generator.random() < jitter.noise_probability:
        noise = torch.from_numpy(generator.standard_normal(unit.shape, dtype=np.float32))
        unit = (unit + noise * generator.uniform(*jitter.noise)).clamp_(0, 1)
    return unit * 2 - 1


def _low_resolution(unit: Tensor, factor: float) -> Tensor:
    """Slices shrunk by a factor and blown up again, as a coarser detector would have seen them."""
    H, W = unit.shape[-2:]
    small = nn.functional.interpolate(unit, size=(max(1, round(H * factor)), max(1, round(W * factor))), mode="nearest")
    return nn.functional.interpolate(small, size=(H, W), mode="bilinear", align_corners=False)


def _blur(unit: Tensor, sigma: float) -> Tensor:
    """Slices under a Gaussian of `sigma` pixels, borders repeated."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(unit.dtype)
    C, D, H, W = unit.shape
    # slices as the channels of one picture, each with its kernel: as a batch of pictures it takes 20 times as long
    slices = unit.reshape(1, C * D, H, W)
    for shape, padding in (((-1, 1), (0, 0, reach, reach)), ((1, -1), (reach, reach, 0, 0))):
        kernels = kernel.view(shape).expand(C * D, 1, *kernel.view(shape).shape)
        slices = nn.functional.conv2d(nn.functional.pad(slices, padding, mode="replicate"), kernels, groups=C * D)
    return slices.view(C, D, H, W)
