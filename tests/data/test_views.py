"""Random views: which values each transform changes, and that transforms depend on the array alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from modeling_m3ret import Scan
from modeling_m3ret.data.views import CropRanges, Jitter, gaussian_blur, random_crop, random_flip, random_intensity


def jitter_of(*names: str) -> Jitter:
    """Return a jitter that always applies the named changes and never the others."""
    every = ("probability", "grey_probability", "noise_probability", "blur_probability", "low_resolution_probability")
    return Jitter(**{name: float(name in names) for name in every})  # type: ignore[arg-type]


def test_jitter_of_probability_zero_changes_nothing() -> None:
    volume = torch.rand(3, 2, 16, 16) * 2 - 1
    changed = random_intensity(volume, jitter_of(), np.random.default_rng(0))
    assert (changed - volume).abs().max() <= 1e-6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_jitter_keeps_shape_and_range_and_does_not_modify_its_input(channels: int, seed: int) -> None:
    everything = jitter_of(
        "probability", "grey_probability", "noise_probability", "blur_probability", "low_resolution_probability"
    )
    volume = torch.rand(channels, 3, 17, 23) * 2 - 1
    before = volume.clone()
    changed = random_intensity(volume, everything, np.random.default_rng(seed))
    assert changed.shape == volume.shape
    assert changed.dtype == torch.float32
    assert changed.min() >= -1
    assert changed.max() <= 1
    assert torch.equal(volume, before)
    assert torch.equal(changed, random_intensity(volume, everything, np.random.default_rng(seed)))


def test_gaussian_blur_matches_scipy() -> None:
    image = torch.rand(1, 2, 20, 24)
    expected = np.stack([gaussian_filter(s, 0.9, mode="nearest", radius=3) for s in image[0].double().numpy()])
    assert np.abs(gaussian_blur(image, 0.9)[0].numpy() - expected).max() <= 1e-5


def test_only_arrays_with_colour_change_their_colour() -> None:
    grey = torch.rand(1, 1, 16, 16) * 2 - 1
    colour = grey.expand(3, -1, -1, -1)
    changed = random_intensity(colour, jitter_of("probability"), np.random.default_rng(1))
    assert (changed[0] - changed[1]).abs().max() > 0.05
    to_grey = random_intensity(torch.rand(3, 1, 16, 16), jitter_of("grey_probability"), np.random.default_rng(1))
    assert torch.equal(to_grey[0], to_grey[2])
    both = jitter_of("probability", "grey_probability")
    assert random_intensity(grey, both, np.random.default_rng(1)).shape == grey.shape


def test_noise_stays_within_its_range() -> None:
    noisy = random_intensity(torch.zeros(1, 1, 64, 64), jitter_of("noise_probability"), np.random.default_rng(3))
    assert 0 < noisy.std() <= 0.2  # at most a tenth of the range of 2


def test_low_resolution_removes_detail() -> None:
    checkerboard = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1
    jitter = jitter_of("low_resolution_probability")
    coarse = random_intensity(checkerboard[None, None], jitter, np.random.default_rng(3))
    assert coarse.diff(dim=-1).abs().mean() < checkerboard.diff(dim=-1).abs().mean()


def test_flip_mirrors_left_to_right_with_its_probability() -> None:
    scan = Scan(np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4), (1.0, 1.0, 1.0), {})
    assert all(random_flip(scan, 0.0, np.random.default_rng(seed)).array is scan.array for seed in range(20))
    mirrored = random_flip(scan, 1.0, np.random.default_rng(0))
    assert np.array_equal(mirrored.array, scan.array[:, :, :, ::-1])
    assert mirrored.spacing == scan.spacing


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
