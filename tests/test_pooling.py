"""Test pooling and whitening of features."""

from __future__ import annotations

import pytest
import torch
from packs import largest_difference, make_model, make_scans, pack
from torch import nn


@torch.no_grad()
def test_pooling_follows_the_config() -> None:
    rows, grids = pack(make_scans())
    for pooling in ("mean", "cls", "statistics"):
        model = make_model(pooling=pooling)
        output = model(rows, grids)
        assert output.pooler_output.shape[1] == model.config.pooled_size
        for scan, tokens in enumerate(model.split_tokens(output.last_hidden_state, grids)):
            patches = tokens[5:]
            deviation = ((patches - patches.mean(0)).square().mean(0) + 1e-6).sqrt()
            expected = {
                "mean": patches.mean(0),
                "cls": tokens[0],
                "statistics": torch.cat([patches.mean(0), deviation]),
            }[pooling]
            assert largest_difference(output.pooler_output[scan], expected) <= 1e-5
        features = model.embed_scans(rows, grids)
        assert features.shape[1] == model.config.hidden_size
        assert largest_difference(features, nn.functional.normalize(output.pooler_output[:, :48], dim=-1)) <= 1e-6


def test_statistics_of_equal_patches_have_a_gradient() -> None:
    model = make_model(pooling="statistics")
    for volume in (torch.zeros(1, 3, 4, 32, 32), torch.rand(1, 3, 4, 16, 16)):  # equal patches, and a single patch
        model.zero_grad()
        model.embed(volume).square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_whitening_is_the_identity_until_fitted_and_then_gives_unit_covariance() -> None:
    model = make_model()
    rows, grids = pack(make_scans())
    pooled = model(rows, grids).pooler_output
    features = model.embed_scans(rows, grids)
    assert largest_difference(features, nn.functional.normalize(pooled, dim=-1)) <= 1e-6
    samples = torch.randn(4000, 48) @ torch.randn(48, 48) + 5
    model.whitening.fit(samples, shrinkage=0)
    white = model.whitening(samples)
    assert largest_difference(white.mean(0), torch.zeros(48)) <= 1e-3
    assert largest_difference(white.T @ white / 4000, torch.eye(48)) <= 1e-3
    # with shrinkage e, a direction of variance c keeps the variance c / (c + e * largest variance)
    model.whitening.fit(torch.randn(100_000, 48) * torch.tensor([3.0] + [1.0] * 47), shrinkage=0.5)
    left = model.whitening(torch.randn(100_000, 48) * torch.tensor([3.0] + [1.0] * 47)).var(0)
    assert left.max().item() == pytest.approx(1 / 1.5, rel=0.05)
    assert left.min().item() == pytest.approx(1 / 5.5, rel=0.05)
    assert left.argmax() == 0  # so that the first columns hold most of an embedding
    model.whitening.fit(samples[:5])  # fewer scans than dimensions
    assert model.embed_scans(rows, grids).isfinite().all()


@torch.no_grad()
def test_whitening_reduces_wide_features_to_the_directions_of_largest_variance() -> None:
    model = make_model(pooling="statistics")
    deviations = torch.cat([torch.full((48,), 0.1), torch.linspace(1, 2, 48)])
    directions, _ = torch.linalg.qr(torch.randn(96, 96))
    coordinates = torch.randn(50_000, 96) * deviations
    model.whitening.fit(coordinates @ directions.T + 3, shrinkage=0)
    white = model.whitening(coordinates @ directions.T + 3)
    assert largest_difference(white.T @ white / len(white), torch.eye(48)) <= 1e-2
    # setting the 48 directions of small variance to zero changes nothing
    without = model.whitening((coordinates * (deviations > 0.5)) @ directions.T + 3)
    assert (white - without).norm() / white.norm() <= 0.02
