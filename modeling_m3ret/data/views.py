"""Random views of a scan for pretraining: 3D crops, resized by the processor's size policy, and intensity changes.

A view is a scan like any other, and its transforms depend on the array alone, never on the modality: only an array with
colour has its colour changed. Many views come from one decode, since decoding a CT costs more than a training step
on it. Flips are off by default because left and right differ in a body, and there is no solarisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..reading_m3ret import Scan


Range = tuple[float, float]


@dataclass(frozen=True)
class CropRanges:
    """Ranges from which crops are sampled, uniformly unless stated otherwise."""

    area: Range = (0.2, 1.0)  # fraction of the slice's area, as in MAE (arXiv 2111.06377, appendix A.1)
    aspect: Range = (3 / 4, 4 / 3)  # width over height relative to the scan's, log-uniform, as in Inception and MAE
    depth: Range = (0.5, 1.0)  # fraction of the slices, as for the global views of 3DINO
    single_slice_probability: float = 0.0  # of taking a single slice from anywhere in the scan, instead of `depth`


# areas of SimDINO's published 2D command (arXiv 2502.10385), depths of 3DINO's volumes
GLOBAL_CROPS = CropRanges(area=(0.4, 1.0), depth=(0.5, 1.0))
LOCAL_CROPS = CropRanges(area=(0.05, 0.4), depth=(0.2, 0.5))


@dataclass(frozen=True)
class Jitter:
    """Ranges of the intensity changes, and the probability of applying each to a view.

    Contrast to saturation are applied together, with `probability`. Defaults of these and of `grey_probability` follow
    SimDINO unless stated otherwise; those of noise, blur and low resolution are nnU-Net's (Isensee et al. 2021).
    """

    contrast: Range = (0.6, 1.4)  # factor; SimDINO's colour jitter has a strength of 0.4
    brightness: Range = (-0.2, 0.2)  # fraction of the intensity range; half of SimDINO's 0.4, because a shift clips
    gamma: Range = (0.7, 1.5)  # exponent, as in nnU-Net
    white_balance: Range = (0.7, 1.4)  # factor of each channel; SimDINO's hue shift of 0.1 is less than endoscopes vary
    saturation: Range = (0.6, 1.4)  # factor of the distance from grey; SimDINO's strength is 0.2
    probability: float = 0.8
    grey_probability: float = 0.2  # of removing the colour
    noise: Range = (0.0, 0.1)  # standard deviation of Gaussian noise as a fraction of the intensity range
    noise_probability: float = 0.1
    blur: Range = (0.5, 1.0)  # standard deviation of the Gaussian in pixels
    blur_probability: float = 0.2
    low_resolution: Range = (0.5, 1.0)  # factor by which slices are downsampled before they are upsampled again
    low_resolution_probability: float = 0.25


@dataclass(frozen=True)
class ViewKind:
    """One kind of view."""

    count: int  # views of this kind per decoded scan
    ranges: CropRanges = CropRanges()
    size: int | None = None  # `size` for the processor's resize, by default the processor's own
    jitter: Jitter | None = None
    flip_probability: float = 0.0  # of mirroring a view left to right


def random_crop(scan: Scan, ranges: CropRanges, generator: np.random.Generator) -> Scan:
    """Return a random box of the scan, `(C, D', H', W')`, with the same spacing. It shares the scan's memory."""
    _, D, H, W = scan.array.shape
    area = generator.uniform(*ranges.area)
    aspect = math.exp(generator.uniform(math.log(ranges.aspect[0]), math.log(ranges.aspect[1])))
    height = min(H, max(1, round(H * math.sqrt(area / aspect))))
    width = min(W, max(1, round(W * math.sqrt(area * aspect))))
    depth = min(D, max(1, round(D * generator.uniform(*ranges.depth))))
    if ranges.single_slice_probability and generator.random() < ranges.single_slice_probability:
        depth = 1
    sides = ((D, depth), (H, height), (W, width))
    starts = [int(generator.integers(full - side + 1)) for full, side in sides]
    box = tuple(slice(start, start + side) for start, (_, side) in zip(starts, sides, strict=True))
    return replace(scan, array=scan.array[(slice(None), *box)])


def random_flip(scan: Scan, probability: float, generator: np.random.Generator) -> Scan:
    """Return the scan, mirrored left to right with the given probability."""
    if generator.random() >= probability:
        return scan
    return replace(scan, array=np.ascontiguousarray(scan.array[..., ::-1]))


def random_intensity(volume: Tensor, jitter: Jitter, generator: np.random.Generator) -> Tensor:
    """Change the sharpness and the intensities of a resized view `(1 or 3, D, H, W)`, float32 in [-1, 1], at random.

    The changes follow the order of an acquisition: loss of resolution in the optics, then light and display, then noise
    of the sensor. One draw applies to the whole view.
    """
    values = ((volume + 1) / 2).clamp_(0, 1)
    if generator.random() < jitter.low_resolution_probability:
        values = lower_resolution(values, generator.uniform(*jitter.low_resolution))
    if generator.random() < jitter.blur_probability:
        values = gaussian_blur(values, generator.uniform(*jitter.blur))
    has_colour = len(values) == 3
    if generator.random() < jitter.probability:
        ranges = (jitter.contrast, jitter.brightness, jitter.gamma)
        contrast, brightness, gamma = (generator.uniform(*limits) for limits in ranges)
        if has_colour:
            balance = generator.uniform(*jitter.white_balance, size=(3, 1, 1, 1)).astype(np.float32)
            values = values * torch.from_numpy(balance)
            grey = values.mean(0, keepdim=True)
            values = (grey + (values - grey) * generator.uniform(*jitter.saturation)).clamp_(0, 1)
        values = values.pow(gamma)
        # NumPy, because torch's sum depends on its number of threads, which differs between workers
        mean = float(values.numpy().mean(dtype=np.float64))
        values = ((values - mean) * contrast + mean + brightness).clamp_(0, 1)
    if has_colour and generator.random() < jitter.grey_probability:
        values = values.mean(0, keepdim=True).expand(3, -1, -1, -1)
    if generator.random() < jitter.noise_probability:
        noise = torch.from_numpy(generator.standard_normal(values.shape, dtype=np.float32))
        values = (values + noise * generator.uniform(*jitter.noise)).clamp_(0, 1)
    return values * 2 - 1


def lower_resolution(volume: Tensor, factor: float) -> Tensor:
    """Downsample the slices of `(C, D, H, W)` by `factor` and upsample them again, as a coarser detector would."""
    H, W = volume.shape[-2:]
    size = (max(1, round(H * factor)), max(1, round(W * factor)))
    small = nn.functional.interpolate(volume, size=size, mode="nearest")
    return nn.functional.interpolate(small, size=(H, W), mode="bilinear", align_corners=False)


def gaussian_blur(volume: Tensor, sigma: float) -> Tensor:
    """Blur the slices of `(C, D, H, W)` with a Gaussian of `sigma` pixels; borders are replicated."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(volume.dtype)
    C, D, H, W = volume.shape
    # slices as channels of one image with a grouped convolution: as a batch of images it takes 20 times as long
    slices = volume.reshape(1, C * D, H, W)
    for shape, padding in (((-1, 1), (0, 0, radius, radius)), ((1, -1), (radius, radius, 0, 0))):
        kernels = kernel.view(shape).expand(C * D, 1, *kernel.view(shape).shape)
        slices = nn.functional.conv2d(nn.functional.pad(slices, padding, mode="replicate"), kernels, groups=C * D)
    return slices.view(C, D, H, W)
