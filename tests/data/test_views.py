"""Random views: which values each transform changes, and that transforms depend on the array alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import kstest
from torch import nn

from modeling_m3ret import Scan
from modeling_m3ret.data.views import (
    CropRanges,
    Jitter,
    gaussian_blur,
    lower_resolution,
    random_crop,
    random_intensity,
)


def jitter_of(*names: str) -> Jitter:
    """Return a jitter that always applies the named changes and never the others."""
    every = ("probability", "grey_probability", "noise_probability", "blur_probability", "low_resolution_probability")
    return Jitter(**{name: float(name in names) for name in every})  # type: ignore[arg-type]


def random_values(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).random(shape, dtype=np.float32)


def test_jitter_of_probability_zero_changes_nothing() -> None:
    values = random_values(3, 2, 16, 16)
    assert np.array_equal(random_intensity(values.copy(), jitter_of(), np.random.default_rng(0)), values)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_jitter_keeps_shape_and_range_and_follows_from_its_generator(channels: int, seed: int) -> None:
    everything = jitter_of(
        "probability", "grey_probability", "noise_probability", "blur_probability", "low_resolution_probability"
    )
    values = random_values(channels, 3, 17, 23)
    values[:, :, :5] = 0
    changed, again = (random_intensity(values.copy(), everything, np.random.default_rng(seed)) for _ in range(2))
    assert changed.shape == values.shape
    assert changed.dtype == np.float32
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert np.array_equal(changed, again)


def test_intensity_changes_follow_their_formula() -> None:
    """Gamma, then contrast around the mean, then brightness, in float64; zeros stay exact."""
    values = random_values(1, 2, 16, 16)
    values[:, :, :8] = 0
    jitter = replace(jitter_of("probability"), gamma=(1.3, 1.3), contrast=(0.7, 0.7), brightness=(0.1, 0.1))
    changed = random_intensity(values.copy(), jitter, np.random.default_rng(0))
    expected = values.astype(np.float64) ** 1.3
    expected = np.clip((expected - expected.mean()) * 0.7 + expected.mean() + 0.1, 0, 1)
    assert np.abs(changed - expected).max() <= 2e-6


@pytest.mark.parametrize(("sigma", "shape"), [(0.5, (2, 2, 20, 24)), (0.9, (2, 2, 20, 24)), (0.9, (1, 5, 130, 120))])
def test_gaussian_blur_matches_scipy(sigma: float, shape: tuple[int, ...]) -> None:
    image = random_values(*shape)
    options = {"mode": "nearest", "radius": math.ceil(3 * sigma)}
    planes = image.reshape(-1, *shape[2:]).astype(np.float64)
    expected = np.stack([gaussian_filter(plane, sigma, **options) for plane in planes]).reshape(image.shape)
    assert np.abs(gaussian_blur(image, sigma) - expected).max() <= 1e-6


def test_only_arrays_with_colour_change_their_colour() -> None:
    grey = random_values(1, 1, 16, 16)
    colour = np.repeat(grey, 3, axis=0)
    changed = random_intensity(colour, jitter_of("probability"), np.random.default_rng(1))
    assert np.abs(changed[0] - changed[1]).max() > 0.02
    to_grey = random_intensity(random_values(3, 1, 16, 16), jitter_of("grey_probability"), np.random.default_rng(1))
    assert np.array_equal(to_grey[0], to_grey[2])
    both = jitter_of("probability", "grey_probability")
    assert random_intensity(grey, both, np.random.default_rng(1)).shape == grey.shape


def test_noise_is_normal() -> None:
    flat = np.full((1, 1, 256, 256), 0.5, np.float32)
    jitter = replace(jitter_of("noise_probability"), noise=(0.1, 0.1))
    noise = (random_intensity(flat, jitter, np.random.default_rng(3)) - 0.5) / 0.1
    assert kstest(noise.ravel(), "norm").pvalue > 0.01
    assert np.abs(np.corrcoef(noise[0, 0, 1:].ravel(), noise[0, 0, :-1].ravel())[0, 1]) < 0.02


def test_low_resolution_removes_detail() -> None:
    checkerboard = ((np.arange(32)[:, None] + np.arange(32)) % 2).astype(np.float32)
    jitter = jitter_of("low_resolution_probability")
    coarse = random_intensity(checkerboard[None, None].copy(), jitter, np.random.default_rng(3))
    assert np.abs(np.diff(coarse)).mean() < np.abs(np.diff(checkerboard)).mean()


@pytest.mark.parametrize("factor", [0.5, 0.83])
def test_lower_resolution_drops_pixels_and_interpolates_the_rest(factor: float) -> None:
    values = random_values(3, 2, 40, 25)
    small = nn.functional.interpolate(torch.from_numpy(values), (round(40 * factor), round(25 * factor)))
    expected = nn.functional.interpolate(small, (40, 25), mode="bilinear").numpy()
    assert np.array_equal(lower_resolution(values, factor), expected)


def test_crops_lie_inside_the_scan_and_span_their_ranges() -> None:
    scan = Scan(np.arange(20 * 60 * 80, dtype=np.float32).reshape(1, 20, 60, 80), (1.0, 1.0, 1.0), {})
    generator = np.random.default_rng(0)
    areas, depths = [], []
    for _ in range(300):
        crop = random_crop(scan, CropRanges(), generator)
        _, depth, height, width = crop.array.shape
        assert np.shares_memory(crop.array, scan.array)
        assert crop.spacing == scan.spacing
        areas.append(height * width / 4800)
        depths.append(depth / 20)
    assert 0.15 < min(areas) < 0.25
    assert 0.9 < max(areas) <= 1
    assert 0.5 <= min(depths) < 0.6
    assert 0.9 < max(depths) <= 1
    assert np.mean(areas) == pytest.approx(0.6, abs=0.05)


def test_single_slice_crops_come_from_anywhere_in_the_scan() -> None:
    volume = np.broadcast_to(np.arange(10, dtype=np.float32)[:, None, None], (1, 10, 8, 8))  # values are slice numbers
    scan = Scan(volume, (2.0, 1.0, 1.0), {})
    generator = np.random.default_rng(0)
    crops = [random_crop(scan, CropRanges(single_slice_probability=0.5), generator).array for _ in range(400)]
    slices = [int(crop[0, 0, 0, 0]) for crop in crops if crop.shape[1] == 1]
    # the standard deviation of binomial(400, 1/2) is 10; each of ten slices is expected 20 times of 200
    assert 160 <= len(slices) <= 240
    assert set(slices) == set(range(10))
    assert max(slices.count(number) for number in range(10)) <= 40
    assert all(crop.shape[1] >= 5 for crop in crops if crop.shape[1] > 1)
    assert all(random_crop(scan, CropRanges(), generator).array.shape[1] >= 5 for _ in range(50))
