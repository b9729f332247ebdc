"""Test the encoder: batch independence, packed and dense input, positions, pooling, whitening, stochastic depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from torch import Tensor, nn
from transformers import AttentionInterface, BatchFeature, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_m3ret import M3RetConfig, M3RetForPreTraining, M3RetModel
from modeling_m3ret.modeling_m3ret import rotary_tables, rotate
from modeling_m3ret.packing_m3ret import PackLayout, grid_coordinates, patch_coordinates, patchify, permute, put, take


# depth, height and width in voxels; all grids differ, and some depths do not fill their last patch
SHAPES = {
    "xray": (1, 64, 48),
    "ultrasound": (7, 48, 48),
    "endoscopy": (16, 32, 64),
    "ct": (21, 64, 64),
    "mri": (9, 48, 80),
}


def make_scans(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *shape, generator=generator) for shape in SHAPES.values()]


def pack(scans: list[Tensor]) -> tuple[Tensor, Tensor]:
    rows = torch.cat([patchify(scan[None], 4, 16)[0] for scan in scans])
    return rows, torch.tensor([(-(-s.shape[1] // 4), s.shape[2] // 16, s.shape[3] // 16) for s in scans])


def make_model(attention: str = "sdpa", **overrides: object) -> M3RetModel:
    model = M3RetModel(tiny_config(**overrides)).eval()
    model.set_attn_implementation(attention)
    return model


def largest_difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize(
    ("attention", "pooling"), [("sdpa", "mean"), ("sdpa", "cls"), ("sdpa", "statistics"), ("eager", "mean")]
)
@torch.no_grad()
def test_embedding_does_not_depend_on_the_batch(attention: str, pooling: str) -> None:
    model = make_model(attention, pooling=pooling)
    scans = make_scans()
    mixed = model(*pack(scans)).pooler_output
    for index, scan in enumerate(scans):
        alone = model(*pack([scan])).pooler_output[0]
        same_shape = model(*pack([torch.randn_like(scan), scan, torch.randn_like(scan)])).pooler_output[1]
        assert largest_difference(alone, same_shape) <= 1e-5
        assert largest_difference(alone, mixed[index]) <= 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_and_dense_inputs_give_the_same_output(attention: str) -> None:
    model = make_model(attention)
    for scan in make_scans():
        packed = model(*pack([scan]))
        dense = model(scan[None])
        assert largest_difference(packed.pooler_output, dense.pooler_output) <= 1e-5
        assert largest_difference(packed.last_hidden_state, dense.last_hidden_state[0]) <= 1e-5
    images = torch.randn(2, 3, 32, 48)
    assert torch.equal(model(images).pooler_output, model(images[:, :, None]).pooler_output)


@torch.no_grad()
def test_depth_is_padded_with_the_last_slice() -> None:
    """An image therefore has the embedding of four equal slices."""
    model = make_model()
    image = torch.randn(2, 3, 1, 32, 48)
    repeated = model(image.expand(-1, -1, 4, -1, -1)).pooler_output
    assert largest_difference(model(image).pooler_output, repeated) <= 1e-5
    volume = torch.randn(1, 3, 6, 32, 32)
    padded = torch.cat([volume, volume[:, :, -1:], volume[:, :, -1:]], dim=2)
    assert torch.equal(model(volume).pooler_output, model(padded).pooler_output)


@torch.no_grad()
def test_permuting_scans_permutes_outputs() -> None:
    model = make_model()
    scans = make_scans()
    order = [3, 0, 4, 2, 1]
    given, permuted = model(*pack(scans)), model(*pack([scans[scan] for scan in order]))
    assert largest_difference(given.pooler_output[order], permuted.pooler_output) <= 1e-6
    tokens = model.split_tokens(given.last_hidden_state, pack(scans)[1])
    permuted_tokens = model.split_tokens(permuted.last_hidden_state, pack([scans[scan] for scan in order])[1])
    for index, scan in enumerate(order):
        assert largest_difference(tokens[scan], permuted_tokens[index]) <= 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("corruption", [math.nan, 1e4])
@torch.no_grad()
def test_corrupting_one_scan_changes_no_bit_of_the_others(attention: str, corruption: float) -> None:
    model = make_model(attention)
    rows, grids = pack(make_scans())
    starts = [0, *grids.prod(-1).cumsum(0).tolist()]
    clean = model(rows, grids).pooler_output
    for scan in range(len(grids)):
        corrupted = rows.clone()
        corrupted[starts[scan] : starts[scan + 1]] = corruption
        after = model(corrupted, grids).pooler_output
        others = [other for other in range(len(grids)) if other != scan]
        assert torch.equal(clean[others], after[others])
        assert not torch.equal(clean[scan], after[scan])


@torch.no_grad()
def test_embedding_depends_on_every_patch() -> None:
    model = make_model()
    rows, grids = pack(make_scans()[:2])
    clean = model(rows, grids).pooler_output
    counts = grids.prod(-1).tolist()
    for row in range(len(rows)):
        changed = rows.clone()
        changed[row] += 1
        scan = int(row >= counts[0])
        assert largest_difference(clean[scan], model(changed, grids).pooler_output[scan]) > 1e-6


@torch.no_grad()
def test_embedding_depends_on_the_patch_order_along_every_axis() -> None:
    """Attention without positions is invariant to the order of its tokens."""
    model = make_model(initializer_range=0.2)  # larger weights, so that attention of untrained weights has an effect
    grid = torch.tensor([[2, 2, 2]])
    rows = torch.randn(8, 3 * 4 * 16 * 16)
    clean = model(rows, grid).pooler_output
    for axis in range(3):
        swapped = rows.view(2, 2, 2, -1).flip(axis).reshape(8, -1)
        assert largest_difference(clean, model(swapped, grid).pooler_output) > 1e-3


def test_patchify_equals_its_definition_by_loops() -> None:
    """Rows are in raster order; a row holds channel, depth, height, width of its patch."""
    volumes = torch.randn(2, 3, 6, 32, 48)
    rows = patchify(volumes, 4, 16)
    padded = torch.cat([volumes, volumes[:, :, -1:], volumes[:, :, -1:]], dim=2)
    assert rows.shape == (2, 2 * 2 * 3, 3 * 4 * 16 * 16)
    for scan in range(2):
        for row, (t, y, x) in enumerate((t, y, x) for t in range(2) for y in range(2) for x in range(3)):
            patch = padded[scan, :, 4 * t : 4 * t + 4, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
            assert torch.equal(rows[scan, row], patch.flatten())


def test_coordinates_are_patch_centres_between_minus_one_and_one() -> None:
    coordinates = patch_coordinates([(1, 2, 4), (1, 1, 1)], torch.device("cpu"))
    assert coordinates.shape == (9, 6)
    assert coordinates[0].tolist() == [0, -0.5, -0.75, 1, 2, 4]
    assert coordinates[7].tolist() == [0, 0.5, 0.75, 1, 2, 4]
    assert coordinates[8].tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(grid_coordinates((1, 2, 4), torch.device("cpu")), coordinates[:8])


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


def test_layout_splits_what_it_joined() -> None:
    counts = [3, 1, 3, 5, 1]
    layout = PackLayout.from_patch_counts(counts, prefix=2)
    assert layout.groups == ((2, 3), (2, 5), (1, 7))
    prefix, rows = torch.randn(5, 2, 4), torch.randn(sum(counts), 4)
    joined = layout.join(prefix, rows)
    split_prefix, split_rows = layout.split(joined, sum(counts))
    assert torch.equal(split_prefix, prefix.flatten(0, 1))
    assert torch.equal(split_rows, rows)
    expected = torch.cat([torch.cat(scan) for scan in zip(prefix, rows.split(counts), strict=True)])
    assert torch.equal(layout.to_caller_order(joined), expected)


@torch.no_grad()
def test_hidden_states_and_attentions_of_a_pack_equal_the_dense_ones() -> None:
    model = make_model("eager")
    scans = make_scans()
    rows, grids = pack(scans)
    packed = model(rows, grids, output_hidden_states=True, output_attentions=True)
    assert len(packed.hidden_states) == model.config.num_hidden_layers + 1
    assert len(packed.attentions) == model.config.num_hidden_layers
    starts = [0, *(grids.prod(-1) + 5).cumsum(0).tolist()]
    for index, scan in enumerate(scans):
        dense = model(scan[None], output_hidden_states=True, output_attentions=True)
        for in_pack, alone in zip(packed.hidden_states, dense.hidden_states, strict=True):
            assert largest_difference(in_pack[starts[index] : starts[index + 1]], alone[0]) <= 1e-5
        for in_pack, alone in zip(packed.attentions, dense.attentions, strict=True):
            assert largest_difference(in_pack[index], alone[0]) <= 1e-5
            assert largest_difference(alone.sum(-1), torch.ones(())) <= 1e-5
    normalised = model.norm(packed.hidden_states[-1])
    assert largest_difference(normalised, packed.last_hidden_state) <= 1e-6
    as_tuple = model(rows, grids, return_dict=False)
    assert torch.equal(as_tuple[1], packed.pooler_output)


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


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    rows, grids = pack(make_scans())
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(rows, grids).pooler_output.square().sum().backward()
        gradients.append(model.encoder.layers[0].attention.qkv.weight.grad)
    assert largest_difference(*gradients) <= 1e-5


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


def test_stochastic_depth_depends_on_its_noise_alone_and_has_no_effect_in_evaluation() -> None:
    model = make_model(drop_path_rate=0.5)
    rows, grids = pack(make_scans())
    with torch.no_grad():
        expected = model(rows, grids).pooler_output
        layout = PackLayout.from_patch_counts(grids.prod(-1).numpy(), 5).sample_subsets([0, 0.25, 0.5], torch.rand(8))
        coordinates = patch_coordinates(grids.tolist(), rows.device)
        assert torch.equal(model.embed_rows(rows, coordinates, layout), expected)
        model.train()
        first, second = (model.embed_rows(rows, coordinates, layout) for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.equal(first, expected)
        torch.manual_seed(0)
        first = model(rows, grids).pooler_output
        torch.manual_seed(0)
        assert torch.equal(first, model(rows, grids).pooler_output)


def test_gradients_of_permutations_and_subsets_equal_those_of_indexing() -> None:
    """Against autograd's own indexing, in float64."""
    rows = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    order, indices = torch.randperm(9), torch.tensor([1, 4, 7])
    weights = torch.randn(9, 4, dtype=torch.float64)

    def ours(rows: Tensor) -> Tensor:
        some, others = take(permute(rows, order, order.argsort()), indices)
        return put(others, indices, some.sin())

    def reference(rows: Tensor) -> Tensor:
        moved = rows[order]
        return moved.index_copy(0, indices, moved[indices].sin())

    assert torch.equal(ours(rows), reference(rows))
    (gradient,) = torch.autograd.grad((ours(rows) * weights).sum(), rows)
    (expected,) = torch.autograd.grad((reference(rows) * weights).sum(), rows)
    assert largest_difference(gradient, expected) <= 1e-12


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


@pytest.mark.parametrize("pooling", ["cls", "mean", "statistics"])
def test_embed_equals_pooler_output_and_its_gradients(pooling: str) -> None:
    model = make_model(pooling=pooling).double()
    rows, grids = pack(make_scans())
    rows = rows.double()
    gradients = []
    for embed in (lambda: model(rows, grids).pooler_output, lambda: model.embed(rows, grids)):
        model.zero_grad()
        pooled = embed()
        pooled.square().sum().backward()
        gradients.append((pooled.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert len(gradients[0]) == len(gradients[1])
    for one, other in zip(*gradients, strict=True):
        assert largest_difference(one, other) <= 1e-9 * max(1, float(one.abs().max()))


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
def test_compact_rows_of_images_give_the_same_embedding() -> None:
    model = make_model()
    images = torch.randn(2, 3, 32, 48)
    compact = torch.cat([patchify(image[None, :, None], 1, 16)[0] for image in images])
    grids = torch.tensor([[1, 2, 3]] * 2)
    assert compact.shape == (12, 768)
    expected = model(*pack([image[:, None] for image in images])).pooler_output
    assert largest_difference(model(compact, grids).pooler_output, expected) <= 1e-5
    with pytest.raises(ValueError, match="pixel_values"):
        model(compact, torch.tensor([[2, 2, 3]]))


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
def test_bfloat16_autocast_and_weights_stay_close_to_float32() -> None:
    rows, grids = pack(make_scans())
    model = make_model()
    exact = model.embed_scans(rows, grids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model.embed_scans(rows, grids)
    half = model.to(torch.bfloat16).embed_scans(rows, grids)
    for approximate in (autocast, half):
        assert approximate.dtype == torch.float32
        assert (exact * approximate).sum(-1).min() > 0.999


@pytest.mark.slow
@torch.no_grad()
def test_torch_compile_gives_the_same_embeddings() -> None:
    model = make_model()
    images = torch.randn(2, 3, 32, 48)
    rows, grids = pack(make_scans()[:3])
    expected = model(images).pooler_output, model(rows, grids).pooler_output
    dense = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert largest_difference(dense(images).pooler_output, expected[0]) <= 1e-5
    packed = torch.compile(model, backend="aot_eager")
    assert largest_difference(packed(rows, grids).pooler_output, expected[1]) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 32, 48), (3, 8, 32, 32)], ids=["images", "volumes"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "statistics"])
def test_dense_batches_of_any_size_share_two_graphs_with_one_attention_call_per_layer(
    pooling: str, shape: tuple[int, ...]
) -> None:
    """PyTorch specialises a batch of one, so it has a graph of its own."""
    model, graphs = make_model(num_hidden_layers=1, pooling=pooling), []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.compiler.reset()
        graphs.clear()
        return torch.compile(function, dynamic=True, fullgraph=True, backend=keep)

    batches = [torch.randn(batch, *shape) for batch in (2, 3, 1, 5, 8, 64)]
    embed_scans = compiled(model.embed_scans)
    for scans in batches:
        assert largest_difference(embed_scans(scans), model.embed_scans(scans)) <= 1e-5
    assert len(graphs) <= 2
    forward = compiled(model)
    for scans in batches:
        output, expected = forward(scans), model(scans)
        assert largest_difference(output.pooler_output, expected.pooler_output) <= 1e-5
        assert largest_difference(output.last_hidden_state, expected.last_hidden_state) <= 1e-5
    assert len(graphs) <= 2
    for graph in graphs:
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        assert called.count(nn.functional.scaled_dot_product_attention) == model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("pixels", "grid", "argument"),
    [
        ((3, 3072), [[1, 2, 2]], "pixel_values"),  # a grid of four patches
        ((4, 3072), [[0, 2, 2]], "grid_thw"),
        ((4, 3072), [[1.0, 2.0, 2.0]], "grid_thw"),
        ((4, 3072), [1, 2, 2], "grid_thw"),
        ((4, 3072), [], "grid_thw"),
        ((3, 3072), None, "grid_thw"),
        ((1, 1, 32, 32), None, "pixel_values"),
        ((1, 3, 30, 32), None, "patch_size=16"),
    ],
)
def test_wrong_shapes_raise_an_error_that_names_the_argument(
    pixels: tuple[int, ...], grid: list | None, argument: str
) -> None:
    with pytest.raises(ValueError, match=argument):
        make_model()(torch.zeros(pixels), None if grid is None else torch.tensor(grid))


@pytest.mark.parametrize(
    "given", [BatchFeature({"pixel_values": torch.zeros(4, 3072)}), np.zeros((1, 3, 32, 32), np.float32), None]
)
def test_inputs_that_are_no_tensors_are_refused_by_name(given: Any) -> None:
    with pytest.raises(TypeError, match="pixel_values"):
        make_model()(given)
    with pytest.raises(TypeError, match="grid_thw"):
        make_model()(torch.zeros(4, 3072), [[1, 2, 2]])


@pytest.mark.parametrize("make", [make_model, lambda: M3RetForPreTraining(tiny_config())])
def test_arguments_without_an_effect_are_refused(make: Callable[[], PreTrainedModel]) -> None:
    model, images = make(), torch.rand(1, 3, 32, 32)
    with pytest.raises(TypeError, match="got bool_masked_pos"):
        model(images, bool_masked_pos=torch.ones(1, 4, dtype=torch.bool))  # masks patches in DINOv3
    with pytest.raises(ValueError, match=r"got torch\.uint8"):
        model(images.to(torch.uint8))
    # what PEFT passes to every model, and what has its effect always
    model(images, attention_mask=None, inputs_embeds=None, num_items_in_batch=1, interpolate_pos_encoding=True)


@torch.no_grad()
def test_registered_attention_function_gets_its_own_arguments() -> None:
    seen = []

    def attend(*tensors: Any, temperature: float = 1.0, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        seen.append(temperature)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*tensors, **kwargs)

    AttentionInterface.register("with_temperature", attend)
    make_model("with_temperature")(torch.rand(1, 3, 32, 32), temperature=2.0)
    assert seen == [2.0] * 3


def test_presets_have_the_published_sizes() -> None:
    """A ViT layer with biases has 12 d^2 + 13 d parameters; the two layer scales add 2 d."""
    for preset, hidden, layers in (("vitt", 192, 12), ("vits", 384, 12), ("vitb", 768, 12), ("vitl", 1024, 24)):
        config = getattr(M3RetConfig, preset)()
        with torch.device("meta"):
            model = M3RetModel(config)
        parameters = sum(parameter.numel() for parameter in model.encoder.parameters())
        assert parameters == layers * (12 * hidden**2 + 13 * hidden + 2 * hidden)


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", 50), ("pooling", "max"), ("mask_ratio", 1.0), ("loss_weighting", "pixel")]
)
def test_inconsistent_config_is_rejected_by_field_name(field: str, value: object) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=field):
        tiny_config(**{field: value})


def test_config_field_of_wrong_type_is_rejected() -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match="patch_size"):
        tiny_config(patch_size=1.5)
