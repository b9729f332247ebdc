"""Views: what they change, what they leave, and that they ask for nothing but the array."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from modeling_m3ret import Scan
from modeling_m3ret.data.views import CropRanges, Jitter, _blur, random_crop, random_flip, random_intensity


def of(**parts: float) -> Jitter:
    """Only what is named befalls a view."""
    none = {
        "probability": 0.0,
        "grey_probability": 0.0,
        "noise_probability": 0.0,
        "blur_probability": 0.0,
        "low_resolution_probability": 0.0,
    }
    return Jitter(**(none | parts))  # type: ignore[arg-type]


def test_nothing_drawn_changes_nothing() -> None:
    volume = torch.rand(3, 2, 16, 16) * 2 - 1
    changed = random_intensity(volume, of(), np.random.default_rng(0))
    assert (changed - volume).abs().max() <= 1e-6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_a_view_stays_a_view(channels: int, seed: int) -> None:
    everything = of(
        probability=1, grey_probability=1, noise_probability=1, blur_probability=1, low_resolution_probability=1
    )
    volume = torch.rand(channels, 3, 17, 23) * 2 - 1
    before = volume.clone()
    changed = random_intensity(volume, everything, np.random.default_rng(seed))
    assert changed.shape == volume.shape
    assert changed.dtype == torch.float32
    assert changed.min() >= -1
    assert changed.max() <= 1
    assert torch.equal(volume, before)  # the scan's own values stay as they are
    again = random_intensity(volume, everything, np.random.default_rng(seed))
    assert torch.equal(changed, again)


def test_blur_is_the_gaussian() -> None:
    image = torch.rand(1, 2, 20, 24)
    truth = np.stack([gaussian_filter(s, 0.9, mode="nearest", radius=3) for s in image[0].double().numpy()])
    assert np.abs(_blur(image, 0.9)[0].numpy() - truth).max() <= 1e-5


def test_only_what_has_colour_changes_its_colour() -> None:
    grey = torch.rand(1, 1, 16, 16) * 2 - 1
    colour = grey.expand(3, -1, -1, -1)
    changed = random_intensity(colour, of(probability=1), np.random.default_rng(1))
    assert (changed[0] - changed[1]).abs().max() > 0.05
    to_grey = random_intensity(torch.rand(3, 1, 16, 16), of(grey_probability=1), np.random.default_rng(1))
    assert torch.equal(to_grey[0], to_grey[2])
    assert random_intensity(grey, of(probability=1, grey_probability=1), np.random.default_rng(1)).shape == grey.shape


def test_noise_and_low_resolution_do_what_they_say() -> None:
    flat = torch.zeros(1, 1, 64, 64)
    noisy = random_intensity(flat, of(noise_probability=1), np.random.default_rng(3))
    assert 0 < noisy.std() <= 0.2  # at most a tenth of the range of 2
    checkers = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1
    coarse = random_intensity(checkers[None, None], of(low_resolution_probability=1), np.random.default_rng(3))
    assert coarse.diff(dim=-1).abs().mean() < checkers.diff(dim=-1).abs().mean()


def test_flips_are_off_unless_asked_for() -> None:
    scan = Scan(np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4), (1.0, 1.0, 1.0), {})
    assert all(random_flip(scan, 0.0, np.random.default_rng(seed)).array is scan.array for seed in range(20))
    mirrored = random_flip(scan, 1.0, np.random.default_rng(0))
    assert np.array_equal(mirrored.array, scan.array[:, :, :, ::-1])
    assert mirrored.spacing == scan.spacing


def test_a_part_of_the_crops_is_a_single_slice_anywhere_in_the_scan() -> None:
    volume = np.broadcast_to(np.arange(10, dtype=np.float32)[:, None, None], (1, 10, 8, 8))  # each slice its number
    scan = Scan(volume, (2.0, 1.0, 1.0), {})
    generator = np.random.default_rng(0)
    crops = [random_crop(scan, CropRanges(single_slice_probability=0.5), generator).array for _ in range(400)]
    slices = [int(crop[0, 0, 0, 0]) for crop in crops if crop.shape[1] == 1]
    # binomial(400, 1/2) has a standard deviation of 10; ten slices, each expected 20 times of 200
    assert 160 <= len(slices) <= 240
    assert set(slices) == set(range(10))
    assert max(slices.count(number) for number in range(10)) <= 40
    assert all(crop.shape[1] >= 5 for crop in crops if crop.shape[1] > 1)
    assert all(random_crop(scan, CropRanges(), generator).array.shape[1] >= 5 for _ in range(50))
