"""Test the masked autoencoder: masks, information flow and loss."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config
from packs import largest_difference, make_scans, pack
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from modeling_m3ret import M3RetForPreTraining
from modeling_m3ret.masked_autoencoder_m3ret import choose_visible, loss_weights, masked_patch_loss, normalise_patches
from modeling_m3ret.packing_m3ret import patchify


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_mask_ratio_is_exact_in_every_scan(ratio: float) -> None:
    counts = [1, 12, 9, 49, 200]
    visible, masked, visible_counts = choose_visible(torch.rand(sum(counts)), counts, [ratio] * 5)
    assert sorted([*visible.tolist(), *masked.tolist()]) == list(range(sum(counts)))
    assert visible_counts.tolist() == [max(1, count - round(count * ratio)) for count in counts]
    first = 0
    for scan, count in zip(visible.split(visible_counts.tolist()), counts, strict=True):  # scan after scan
        assert int(scan.min()) >= first
        assert int(scan.max()) < first + count
        first += count


def test_patches_of_lowest_noise_stay_visible_in_each_scan() -> None:
    noise = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.6, 0.2, 0.8, 0.99])
    visible, masked, _ = choose_visible(noise, [4, 4], [0.5, 0.5])
    assert sorted(visible.tolist()) == [1, 3, 4, 5]
    assert sorted(masked.tolist()) == [0, 2, 6, 7]


@torch.no_grad()
def test_predictions_do_not_depend_on_masked_pixels() -> None:
    model = M3RetForPreTraining(tiny_config()).eval()
    rows, grids = pack(make_scans())
    noise = torch.rand(len(rows))
    output = model(rows, grids, noise=noise)
    changed = rows.clone()
    changed[output.masked] += torch.randn_like(changed[output.masked])
    after = model(changed, grids, noise=noise)
    assert torch.equal(output.logits, after.logits)
    assert not torch.equal(output.loss, after.loss)


@torch.no_grad()
def test_loss_equals_that_of_transformers_vitmae() -> None:
    """Both losses get the same image, mask and predictions; pixels are normalised."""
    reference = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=64,
            decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, norm_pix_loss=True,
        )
    )  # fmt: skip
    image = torch.randn(1, 3, 64, 64)
    output = reference(image, noise=torch.rand(1, 16))
    masked = output.mask[0].bool()
    # ViTMAE orders a patch's values height, width, channel; ours are channel, height, width
    predicted = output.logits[0, masked].view(-1, 256, 3).transpose(1, 2).flatten(1)
    target = patchify(image[:, :, None], 1, 16)[0][masked]
    weights, _ = loss_weights([12], "scan")
    loss = masked_patch_loss(predicted, target, weights, tiny_config(patch_depth=1))
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_scan_weighting_gives_every_scan_the_same_weight() -> None:
    model = M3RetForPreTraining(tiny_config())
    scans = make_scans()
    rows, grids = pack(scans)
    noise = torch.rand(len(rows))
    packed = model(rows, grids, noise=noise).loss.item()
    noises = noise.split(grids.prod(-1).tolist())
    alone = [model(*pack([scan]), noise=of_scan).loss.item() for scan, of_scan in zip(scans, noises, strict=True)]
    assert packed == pytest.approx(sum(alone) / len(alone), rel=1e-5)


def test_patch_weighting_gives_every_patch_the_same_weight() -> None:
    """Squared errors 1 and 1 in one scan and 4 in another average to 2 by patch and to (1 + 4) / 2 by scan."""
    config = tiny_config()
    target = torch.randn(3, 3072)
    predicted = normalise_patches(target, 1e-6) + torch.tensor([1.0, 1.0, 2.0])[:, None]
    for weighting, expected, weight in (("patch", 2, 3), ("scan", 2.5, 2)):
        weights, of_pack = loss_weights([2, 0, 1], weighting)
        assert of_pack == weight
        assert masked_patch_loss(predicted, target, weights, config).item() == pytest.approx(expected, rel=1e-5)


def test_loss_of_compact_rows_equals_that_of_repeated_slices() -> None:
    """Against the formula in float64: every pixel counts once for each of the four slices of a patch."""
    compact, predicted = torch.randn(5, 768) * 3 + 1, torch.randn(5, 3072)
    repeated = compact.view(5, 3, 1, 256).expand(-1, -1, 4, -1).flatten(1)
    weights, _ = loss_weights([2, 3], "scan")
    exact = repeated.double()
    exact = (exact - exact.mean(1, keepdim=True)) / (exact.var(1, keepdim=True) + 1e-6).sqrt()
    errors = (predicted - exact).square().mean(1)
    expected = (errors[:2].mean() + errors[2:].mean()).item() / 2
    for target in (compact, repeated):
        assert masked_patch_loss(predicted, target, weights, tiny_config()).item() == pytest.approx(expected, rel=1e-6)


def test_dense_and_packed_images_give_the_same_loss() -> None:
    model = M3RetForPreTraining(tiny_config())
    image = make_scans()[0]
    noise = torch.rand(12)
    packed = model(*pack([image]), noise=noise)
    dense = model(image[:, 0][None], noise=noise)
    assert dense.loss.item() == pytest.approx(packed.loss.item(), rel=1e-5)
    assert largest_difference(dense.logits, packed.logits) <= 1e-5


def test_loss_of_single_patch_scans_is_zero() -> None:
    model = M3RetForPreTraining(tiny_config())
    loss = model(torch.randn(3, 3072), torch.ones(3, 3, dtype=torch.int64)).loss
    loss.backward()
    assert loss.item() == 0


def test_normalised_patches_have_mean_zero_and_variance_one() -> None:
    rows = torch.randn(10, 3072) * 5 + 3
    normalised = normalise_patches(rows, 1e-6)
    assert largest_difference(normalised.mean(-1), torch.zeros(10)) <= 1e-5
    assert largest_difference(normalised.var(-1), torch.ones(10)) <= 1e-4
    assert torch.equal(normalise_patches(torch.full((1, 8), 0.3), 1e-6), torch.zeros(1, 8))


@pytest.mark.slow
def test_all_weights_get_gradients_and_a_batch_can_be_overfitted() -> None:
    model = M3RetForPreTraining(tiny_config()).train()
    rows, grids = pack(make_scans())
    # smooth scans, in which visible patches determine their neighbours; white noise could not be predicted
    rows = rows.cumsum(-1) / 50
    noise: Tensor = torch.rand(len(rows))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(250):
        loss = model(rows, grids, noise=noise).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert losses[-1] < 0.5 * losses[0]
