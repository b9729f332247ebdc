"""Random views of a scan for pretraining: 3D crops, resized by the processor's size policy, and intensity changes.

A view is a scan like any other, and its transforms depend on the array alone, never on the modality: only an array with
colour has its colour changed. Many views come from one decode, since decoding a CT costs more than a training step
on it. Flips are off by default because left and right differ in a body, and there is no solarisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from ..reading_m3ret import Scan


Range = tuple[float, float]
BLURRED_AT_ONCE = 2**15  # values, which fit into the second-level cache with their copies


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
    # one call for all numbers, because a call takes longer than the arithmetic with its result
    for_area, for_aspect, for_depth, for_single, *for_starts = generator.random(7).tolist()
    area = _scaled(for_area, ranges.area)
    aspect = math.exp(_scaled(for_aspect, (math.log(ranges.aspect[0]), math.log(ranges.aspect[1]))))
    height = min(H, max(1, round(H * math.sqrt(area / aspect))))
    width = min(W, max(1, round(W * math.sqrt(area * aspect))))
    depth = min(D, max(1, round(D * _scaled(for_depth, ranges.depth))))
    if for_single < ranges.single_slice_probability:
        depth = 1
    sides = ((D, depth), (H, height), (W, width))
    starts = [int(number * (full - side + 1)) for number, (full, side) in zip(for_starts, sides, strict=True)]
    z, y, x = (slice(start, start + side) for start, (_, side) in zip(starts, sides, strict=True))
    return Scan(scan.array[:, z, y, x], scan.spacing, scan.description)


def _scaled(number: float, limits: Range) -> float:
    """Return a number from [0, 1) scaled to a range."""
    return limits[0] + number * (limits[1] - limits[0])


def random_intensity(values: np.ndarray, jitter: Jitter, generator: np.random.Generator) -> np.ndarray:
    """Change the sharpness and the intensities of a resized view at random.

    The changes follow the order of an acquisition: loss of resolution in the optics, then light and display, then noise
    of the sensor. One draw applies to the whole view.

    NumPy, because its calls cost less than torch's on crops of a few thousand pixels, and because torch's sum depends
    on its number of threads, which differs between workers.

    Args:
        values: `(1 or 3, D, H, W)` float32 in [0, 1]. May be overwritten.
        jitter: ranges and probabilities.
        generator: source of all random numbers.

    Returns:
        Values of the same shape, float32 in [0, 1].
    """
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
            values *= balance
            grey = values.mean(0, keepdims=True)
            values -= grey
            values *= np.float32(generator.uniform(*jitter.saturation))
            values += grey
            np.clip(values, 0, 1, out=values)
        # values ** gamma: `np.power` takes seven times as long. The power of a zero, the background of many scans, is
        # 2^-100, because a subnormal number takes fifty times as long.
        np.log2(np.clip(values, np.float32(2 ** (-100 / gamma)), 1, out=values), out=values)
        values *= np.float32(gamma)
        np.exp2(values, out=values)
        mean = float(values.mean(dtype=np.float64))
        values *= np.float32(contrast)
        values += np.float32(mean - mean * contrast + brightness)
        np.clip(values, 0, 1, out=values)
    if has_colour and generator.random() < jitter.grey_probability:
        values[:] = values.mean(0, keepdims=True)
    if generator.random() < jitter.noise_probability:
        noise = _normal_quantiles().take(generator.integers(0, 2**16, values.shape, dtype=np.uint16))
        noise *= np.float32(generator.uniform(*jitter.noise))
        values += noise
        np.clip(values, 0, 1, out=values)
    return values


@lru_cache(maxsize=1)
def _normal_quantiles() -> np.ndarray:
    """Return 65,536 evenly spaced quantiles of a standard normal distribution, `(65536,)` float32.

    To draw one of them takes a fifth of the time of drawing a normal number.
    """
    levels = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    return torch.special.ndtri(levels).float().numpy()


def lower_resolution(values: np.ndarray, factor: float) -> np.ndarray:
    """Downsample the slices of `(C, D, H, W)` by `factor` and upsample them again, as a coarser detector would."""
    H, W = values.shape[-2:]
    rows, columns = (np.arange(n) * side // n for side in (H, W) for n in [max(1, round(side * factor))])
    small = values.take(rows, axis=2).take(columns, axis=3)  # for small planes, a fifth of the time of torch
    return nn.functional.interpolate(torch.from_numpy(small), size=(H, W), mode="bilinear").numpy()


def gaussian_blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """Blur the slices of `(C, D, H, W)` with a Gaussian of `sigma` pixels; borders are replicated."""
    radius = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    kernel = (kernel / (kernel[0] + 2 * kernel[1:].sum())).astype(np.float32)
    H, W = values.shape[2:]
    blurred = np.empty(values.shape, np.float32)
    inner = slice(radius, -radius)
    at_once = max(1, BLURRED_AT_ONCE // (H * W))
    planes, results = values.reshape(-1, H, W), blurred.reshape(-1, H, W)
    for first in range(0, len(planes), at_once):
        part, result = planes[first : first + at_once], results[first : first + at_once]
        rows = np.empty((len(part), H + 2 * radius, W), np.float32)  # planes with their replicated borders
        columns = np.empty((len(part), H, W + 2 * radius), np.float32)
        rows[:, :radius], rows[:, inner], rows[:, -radius:] = part[:, :1], part, part[:, -1:]
        _convolve([rows[:, start : start + H] for start in range(2 * radius + 1)], kernel, columns[..., inner])
        columns[..., :radius], columns[..., -radius:] = columns[..., radius, None], columns[..., -radius - 1, None]
        _convolve([columns[..., start : start + W] for start in range(2 * radius + 1)], kernel, result)
    return blurred


def _convolve(shifted: list[np.ndarray], kernel: np.ndarray, result: np.ndarray) -> None:
    """Write the sum of an array's shifted copies, weighted by a symmetric kernel `(radius + 1,)`, to `result`."""
    radius = len(kernel) - 1
    np.multiply(shifted[radius], kernel[0], out=result)
    pair = np.empty_like(result)
    for distance in range(1, radius + 1):
        np.add(shifted[radius - distance], shifted[radius + distance], out=pair)
        pair *= kernel[distance]
        result += pair
