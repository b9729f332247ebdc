"""The masked autoencoder: what is masked, what the encoder sees, what the loss is."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config
from huggingface_hub.errors import StrictDataclassClassValidationError
from test_modeling import largest_difference, make_scans, pack
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from modeling_m3ret import M3RetForPreTraining
from modeling_m3ret.masked_autoencoder_m3ret import choose_visible, masked_patch_loss, normalise_patches
from modeling_m3ret.packing_m3ret import patchify


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_masked_part_is_exact_in_every_scan(ratio: float) -> None:
    counts = [1, 12, 9, 49, 200]
    visible, masked, visible_counts = choose_visible(torch.rand(sum(counts)), counts, [ratio] * 5)
    assert sorted([*visible.tolist(), *masked.tolist()]) == list(range(sum(counts)))
    starts = [sum(counts[:scan]) for scan in range(len(counts))]
    for start, count, seen in zip(starts, counts, visible_counts, strict=True):
        inside = (visible >= start) & (visible < start + count)
        assert int(inside.sum()) == seen == max(1, count - round(count * ratio))
    assert torch.equal(
        visible, torch.cat([visible[(visible >= s) & (visible < s + c)] for s, c in zip(starts, counts, strict=True)])
    )


def test_the_lowest_noise_of_each_scan_stays_visible() -> None:
    noise = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.6, 0.2, 0.8, 0.99])
    visible, masked, _ = choose_visible(noise, [4, 4], [0.5, 0.5])
    assert sorted(visible.tolist()) == [1, 3, 4, 5]
    assert sorted(masked.tolist()) == [0, 2, 6, 7]


@torch.no_grad()
def test_pixels_of_a_masked_patch_reach_no_prediction() -> None:
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
def test_loss_against_vitmae_arithmetic() -> None:
    """transformers' ViTMAE on the same target, prediction and mask: an image, normalised pixels."""
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
    assert masked_patch_loss(predicted, target, [12], 1e-6).item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_every_scan_weighs_the_same() -> None:
    model = M3RetForPreTraining(tiny_config())
    scans = make_scans()
    rows, grids = pack(scans)
    noise = torch.rand(len(rows))
    together = model(rows, grids, noise=noise).loss.item()
    starts = [0, *grids.prod(-1).cumsum(0).tolist()]
    alone = [
        model(*pack([scan]), noise=noise[starts[place] : starts[place + 1]]).loss.item()
        for place, scan in enumerate(scans)
    ]
    assert together == pytest.approx(sum(alone) / len(alone), rel=1e-5)


def test_or_every_patch_does() -> None:
    """Errors 1, 1, 4 (two patches of one scan and one of another): 2 by patch, (1 + 4) / 2 by scan."""
    target = torch.randn(3, 8)
    predicted = normalise_patches(target, 1e-6) + torch.tensor([1.0, 1.0, 2.0])[:, None]
    assert masked_patch_loss(predicted, target, [2, 1], 1e-6, "patch").item() == pytest.approx(2)
    assert masked_patch_loss(predicted, target, [2, 1], 1e-6, "scan").item() == pytest.approx(2.5)
    with pytest.raises(StrictDataclassClassValidationError, match="loss_weighting"):
        tiny_config(loss_weighting="pixel")


def test_dense_images_and_packed_rows_give_one_loss() -> None:
    model = M3RetForPreTraining(tiny_config())
    image = make_scans()[0]
    noise = torch.rand(12)
    packed = model(*pack([image]), noise=noise)
    dense = model(image[:, 0][None], noise=noise)
    assert dense.loss.item() == pytest.approx(packed.loss.item(), rel=1e-5)
    assert largest_difference(dense.logits, packed.logits) <= 1e-5


def test_scans_of_one_patch_have_nothing_to_learn_and_crash_nothing() -> None:
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


def test_all_weights_learn_and_a_batch_can_be_overfitted() -> None:
    model = M3RetForPreTraining(tiny_config()).train()
    rows, grids = pack(make_scans())
    # smooth scans: neighbours tell what a masked patch holds, as in a real scan and not in noise
    rows = rows.cumsum(-1) / 50
    noise: Tensor = torch.rand(len(rows))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(150):
        loss = model(rows, grids, noise=noise).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert losses[-1] < 0.5 * losses[0]
