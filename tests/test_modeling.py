"""Test the encoder: batch independence, packed and dense input, order of patches, stochastic depth, wrong input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from packs import largest_difference, make_model, make_scans, pack
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedModel

from modeling_m3ret import M3RetConfig, M3RetForPreTraining, M3RetModel
from modeling_m3ret.packing_m3ret import PackLayout, patch_coordinates, patchify


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


def test_presets_have_the_published_sizes() -> None:
    """A ViT layer with biases has 12 d^2 + 13 d parameters; the two layer scales add 2 d."""
    for preset, hidden, layers in (("vitt", 192, 12), ("vits", 384, 12), ("vitb", 768, 12), ("vitl", 1024, 24)):
        config = getattr(M3RetConfig, preset)()
        with torch.device("meta"):
            model = M3RetModel(config)
        parameters = sum(parameter.numel() for parameter in model.encoder.parameters())
        assert parameters == layers * (12 * hidden**2 + 13 * hidden + 2 * hidden)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 50),
        ("num_hidden_layers", 1_000_000),  # would take an hour to build
        ("pooling", "max"),
        ("mask_ratio", 1.0),
        ("loss_weighting", "pixel"),
    ],
)
def test_inconsistent_config_is_rejected_by_field_name(field: str, value: object) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=field):
        tiny_config(**{field: value})


def test_config_field_of_wrong_type_is_rejected() -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match="patch_size"):
        tiny_config(patch_size=1.5)
