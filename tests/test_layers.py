"""Test the transformer layer: rotary positions, stochastic depth, attention implementations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from packs import largest_difference, make_model, make_scans, pack
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_m3ret.layers_m3ret import rotary_tables, rotate
from modeling_m3ret.packing_m3ret import PackLayout


def test_rotary_attention_scores_depend_only_on_the_offset() -> None:
    """RoFormer's defining property: <R(a) q, R(b) k> = <R(a + s) q, R(b + s) k> for a shift s along any axis."""
    query, key = torch.randn(2, 64, dtype=torch.float64)

    def score(at_query: Tensor, at_key: Tensor) -> float:
        cosines, sines = rotary_tables(torch.stack([at_query, at_key]).double(), 64, 100.0)
        q, k = rotate(torch.stack([query, key]), cosines, sines)
        return float(q @ k)

    a, b = torch.tensor([0.3, -0.2, 0.9]), torch.tensor([-0.6, 0.1, 0.4])
    for shift in torch.eye(3) * 0.37:
        assert score(a + shift, b + shift) == pytest.approx(score(a, b), abs=1e-5)
        assert score(a + shift, b) != pytest.approx(score(a, b), abs=1e-3)


def test_rotary_equals_multiplication_of_complex_numbers() -> None:
    """RoFormer multiplies the complex number of a pair (i, i + half) by exp(i · 2π · coordinate / period)."""
    coordinates, head_dim, theta = torch.rand(5, 3) * 2 - 1, 64, 100.0
    heads = torch.randn(5, head_dim)
    rotated = rotate(heads, *rotary_tables(coordinates, head_dim, theta))
    pairs = torch.complex(heads[:, :32], heads[:, 32:])
    for axis in range(3):
        for frequency in range(10):
            angles = 2 * math.pi * coordinates[:, axis] * theta ** (-frequency / 10)
            pairs[:, 10 * axis + frequency] *= torch.exp(1j * angles)
    assert largest_difference(rotated, torch.cat([pairs.real, pairs.imag], dim=1)) <= 1e-5
    at_origin = rotate(heads, *rotary_tables(torch.zeros(5, 3), head_dim, theta))
    assert torch.equal(at_origin, heads)


def test_gradient_of_the_rotation_equals_that_of_its_definition() -> None:
    attention = make_model().double().encoder.layers[0].attention
    tokens, tables = torch.randn(7, 48, dtype=torch.float64), rotary_tables(torch.rand(7, 3), 12, 100.0)
    tables = tuple(table.double() for table in tables)
    weights = torch.randn(3, 7, 4, 12, dtype=torch.float64)

    def gradient(qkv: tuple[Tensor, ...]) -> Tensor:
        loss = sum((part * weight).sum() for part, weight in zip(qkv, weights, strict=True))
        return torch.autograd.grad(loss, attention.qkv.weight)[0]

    split = attention.qkv(tokens).view(7, 3, 4, 12)
    query, key = rotate(split[:, :2], *(table[:, None, None] for table in tables)).unbind(1)
    expected = gradient((query, key, split[:, 2]))
    assert largest_difference(gradient(attention.project_qkv(tokens, *tables)), expected) <= 1e-12


@torch.no_grad()
def test_stochastic_depth_drops_an_exact_fraction_and_rescales_the_rest() -> None:
    """At a rate of 1/3, one of three scans is dropped, and the branch of the others is multiplied by 3/2."""
    layer = make_model().encoder.layers[-1].train()
    layout = PackLayout.from_patch_counts([4, 2, 4], prefix=1)
    tokens, rotary = torch.randn(13, 48), rotary_tables(torch.rand(13, 3), 12, 100.0)
    layer.mlp_scale.gain.zero_()  # leaves the attention branch only
    attended = layer.attention(layer.attention_norm(tokens), layout, rotary)[0] * layer.attention_scale.gain
    counts = torch.zeros(3)
    for _ in range(300):
        (subsets,) = layout.sample_subsets([1 / 3], torch.rand(8)).subsets
        added = layer(tokens, layout, rotary, subsets=subsets) - tokens
        dropped = [not added[start:stop].any() for start, stop in ((0, 3), (3, 8), (8, 13))]
        assert sum(dropped) == 1
        counts += torch.tensor(dropped)
        ran = added.abs().sum(1) > 0
        assert largest_difference(added[ran], 1.5 * attended[ran]) <= 1e-5
    assert largest_difference(counts, torch.full((3,), 100)) <= 41  # 5 standard errors of 300 draws
    assert largest_difference(layer(tokens, layout, rotary), tokens + attended) <= 1e-5


@torch.no_grad()
def test_stochastic_depth_of_the_cls_only_layer_drops_an_exact_fraction() -> None:
    layer = make_model().encoder.layers[-1].train()
    layout = PackLayout.from_patch_counts([4, 2, 4], prefix=1)
    (subsets,) = layout.sample_subsets([1 / 3], torch.rand(8)).subsets
    tokens = torch.randn(13, 48)
    layer.mlp_scale.gain.zero_()
    # CLS tokens have coordinates of zero, as in every pack
    rotary = rotary_tables(
        torch.rand(13, 3) * torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1])[:, None], 12, 100.0
    )
    whole = layer(tokens, layout, rotary)[[0, 3, 8]] - tokens[[0, 3, 8]]
    added = layer(tokens, layout, rotary, True, subsets) - tokens[[0, 3, 8]]
    dropped = added.abs().sum(1) == 0
    assert int(dropped.sum()) == 1
    assert largest_difference(added[~dropped], 1.5 * whole[~dropped]) <= 1e-5


@torch.no_grad()
def test_flash_attention_gets_the_cumulative_lengths_of_the_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, a stand-in under a flash name attends within the cumulative lengths it is given."""
    cumulative_lengths: list[list[int]] = []

    def stand_in(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: object):
        starts = kwargs.get("cu_seq_lens_q")
        if starts is None:
            pieces = [(query, key, value)]
        else:
            cumulative_lengths.append(starts.tolist())
            assert kwargs["max_length_q"] == int(starts.diff().max())
            lengths = starts.diff().tolist()
            pieces = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        scaled = [nn.functional.scaled_dot_product_attention(*piece, scale=kwargs["scaling"]) for piece in pieces]
        return torch.cat(scaled, dim=2).transpose(1, 2), None

    rows, grids = pack(make_scans())
    expected = make_model()(rows, grids).pooler_output
    torch.manual_seed(0)
    model = make_model()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_stand_in", stand_in)
    model.config._attn_implementation = "flash_stand_in"  # set_attn_implementation would load the flash kernels
    assert largest_difference(model(rows, grids).pooler_output, expected) <= 1e-5
    assert len(cumulative_lengths) == model.config.num_hidden_layers
    assert cumulative_lengths[0] == [0, *(grids.prod(-1) + 5).sort().values.cumsum(0).tolist()]


@torch.no_grad()
def test_registered_attention_function_gets_its_own_arguments() -> None:
    seen = []

    def attend(*tensors: Any, temperature: float = 1.0, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        seen.append(temperature)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*tensors, **kwargs)

    AttentionInterface.register("with_temperature", attend)
    make_model("with_temperature")(torch.rand(1, 3, 32, 32), temperature=2.0)
    assert seen == [2.0] * 3
