"""Test the conversion of 2D vision transformers: equal tokens for one slice, inflation, and files that are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from remote_code import run_new_process
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vit_sources import IMAGENET, KINDS, save_source, source_tokens

from modeling_m3ret import M3RetConfig, M3RetImageProcessor, M3RetModel
from modeling_m3ret.convert import convert_vit, export_vit, is_convertible
from modeling_m3ret.convert_command import fit_whitening
from modeling_m3ret.encoder_files import EncoderError, find_files
from modeling_m3ret.errors import InputError
from modeling_m3ret.export import export
from modeling_m3ret.hub import load_pretrained
from modeling_m3ret.modeling_m3ret import interpolation_weights
from modeling_m3ret.packing_m3ret import grid_coordinates


# of images in pixels: the source's own size, the same number of patches, larger, smaller, and elongated ones
SIZES = ((32, 32), (16, 64), (56, 40), (16, 24), (8, 72))


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    folder = tmp_path_factory.mktemp("source")
    return save_source(request.param, folder), folder


def largest_difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


def assert_same_tokens(model: M3RetModel, source: nn.Module, images: Tensor, atol: float = 1e-5) -> None:
    cls, patches, pooled = source_tokens(source, images)
    with torch.no_grad():
        output, embedded = model(images), model.embed(images)
    if cls is not None:
        assert largest_difference(output.last_hidden_state[:, 0], cls) <= atol
    assert largest_difference(output.last_hidden_state[:, model.config.num_prefix_tokens :], patches) <= atol
    assert largest_difference(output.pooler_output, pooled) <= atol
    assert largest_difference(embedded, pooled) <= atol


def test_one_slice_gives_the_tokens_of_the_source(source: tuple[nn.Module, Path]) -> None:
    theirs, folder = source
    model, _ = convert_vit(str(folder))
    for size in SIZES:
        assert_same_tokens(model, theirs, torch.randn(2, 3, *size))


@torch.no_grad()
def test_packs_of_mixed_sizes_give_the_tokens_of_the_source(source: tuple[nn.Module, Path]) -> None:
    theirs, folder = source
    model, processor = convert_vit(str(folder))
    images = [torch.randn(3, 1, *size) for size in SIZES]
    pooled = model(*processor.pack(images, compact_images=True)).pooler_output
    for index, image in enumerate(images):
        assert largest_difference(pooled[index], source_tokens(theirs, image[None, :, 0])[2][0]) <= 1e-5


@torch.no_grad()
def test_equal_slices_give_the_tokens_of_one(source: tuple[nn.Module, Path]) -> None:
    """For slices of one patch; for any depth if all tokens are patches at equal positions, as attention is an average.

    Otherwise more patches outweigh the class token, or their depths differ.
    """
    model, _ = convert_vit(str(source[1]))
    image = torch.randn(1, 3, 1, 40, 24)
    one = model(image)
    equal = model(image.expand(-1, -1, model.config.patch_depth, -1, -1))
    assert largest_difference(equal.last_hidden_state, one.last_hidden_state) <= 1e-5
    assert largest_difference(equal.pooler_output, one.pooler_output) <= 1e-5
    if model.config.num_prefix_tokens == 0:
        deep = model(image.expand(-1, -1, 12, -1, -1))
        assert largest_difference(deep.last_hidden_state, one.last_hidden_state.repeat(1, 3, 1)) <= 1e-5
        assert largest_difference(deep.pooler_output, one.pooler_output) <= 1e-5


@torch.no_grad()
def test_order_of_slices_matters_once_depths_have_positions(source: tuple[nn.Module, Path]) -> None:
    model, _ = convert_vit(str(source[1]))
    volume = torch.randn(1, 3, 12, 24, 24)
    reversed_patches = volume.unflatten(2, (3, 4)).flip(2).flatten(2, 3)
    if model.embeddings.positions is not None:
        assert largest_difference(model(volume).pooler_output, model(reversed_patches).pooler_output) <= 1e-5
        table = model.embeddings.positions.depth_table
        table.copy_(torch.randn_like(table))
    assert largest_difference(model(volume).pooler_output, model(reversed_patches).pooler_output) > 1e-4


def test_processor_gives_the_pixels_of_the_source(source: tuple[nn.Module, Path]) -> None:
    _, processor = convert_vit(str(source[1]))
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mean, std = (np.array(IMAGENET[key]) for key in ("image_mean", "image_std"))
    expected = torch.from_numpy(((picture / 255 - mean) / std).transpose(2, 0, 1)).float()
    resized = processor.resize(processor.read(picture))
    assert largest_difference(resized[:, 0], expected) <= 1e-5


@pytest.mark.parametrize(("height", "width"), [(400, 400), (24, 40), (40, 8)])
def test_images_of_the_size_of_the_source_are_not_resized(height: int, width: int, tmp_path: Path) -> None:
    """Also if they are no squares, or larger than the limit of other scans."""
    save_source("vit", tmp_path)
    change_processor(size={"height": height, "width": width})(tmp_path)
    _, processor = convert_vit(str(tmp_path))
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = processor.resize(processor.read(picture))
    assert largest_difference(resized[:, 0], processor.normalise(torch.tensor(picture).permute(2, 0, 1), -3)) <= 1e-5


@torch.no_grad()
def test_one_channel_gives_the_tokens_of_grey_pictures(source: tuple[nn.Module, Path]) -> None:
    theirs, folder = source
    model, processor = convert_vit(str(folder), num_channels=1)
    grey = torch.rand(2, 1, 24, 40)
    mean, std = (torch.tensor(IMAGENET[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    expected = source_tokens(theirs, (grey.expand(-1, 3, -1, -1) - mean) / std)[2]
    ours = processor.normalise(grey.clone())
    assert largest_difference(model(ours).pooler_output, expected) <= 1e-5


@pytest.mark.parametrize("kind", ["clip", "clip with projection"])
@torch.no_grad()
def test_embedding_of_clip_has_the_cosines_of_its_image_embeddings(kind: str, tmp_path: Path) -> None:
    theirs = save_source(kind, tmp_path)
    images = torch.randn(4, 3, 32, 32)
    features = theirs.get_image_features(images).pooler_output if kind == "clip" else theirs(images).image_embeds
    features = nn.functional.normalize(features, dim=-1)
    ours = convert_vit(str(tmp_path))[0].embed_scans(images)
    assert largest_difference(ours @ ours.T, features @ features.T) <= 1e-5


CLEAN_PROCESS = """
import json, sys, torch
from transformers import AutoImageProcessor, AutoModel
picture = torch.arange(32 * 32 * 3).view(32, 32, 3).byte().numpy()
embeddings = []
for name in sys.argv[1:]:
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
    with torch.no_grad():
        embeddings.append(model.embed_scans(**processor([picture], return_tensors="pt")).tolist())
print(json.dumps(embeddings))
"""


@pytest.mark.slow
def test_a_process_without_the_package_loads_converted_checkpoints(tmp_path: Path) -> None:
    """One for each kind of positions, and one with a pooling head."""
    picture = torch.arange(32 * 32 * 3).view(32, 32, 3).byte().numpy()
    names, expected = [], []
    for kind in ("dinov3_vit", "dinov2_with_registers", "clip_vision_model", "siglip_vision_model"):
        save_source(kind, tmp_path / "source" / kind)
        model, processor = load_pretrained(tmp_path / "source" / kind)
        for part in (model, processor):
            part.save_pretrained(tmp_path / kind)
        with torch.no_grad():
            expected.append(model.embed_scans(**processor([picture], return_tensors="pt")))
        names.append(kind)
    theirs = torch.tensor(run_new_process(CLEAN_PROCESS, tmp_path, *names))
    assert largest_difference(theirs, torch.stack(expected)) <= 1e-5


def test_loading_the_saved_checkpoint_gives_the_same_encoder(source: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, processor = convert_vit(str(source[1]))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = M3RetModel.from_pretrained(tmp_path)
    assert M3RetImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    images = torch.randn(1, 3, 4, 32, 24)
    with torch.no_grad():
        assert largest_difference(loaded(images).pooler_output, model(images).pooler_output) <= 1e-5
    assert loaded.config.converted_from == source[1].name


def test_weights_are_in_memory_of_their_own(source: tuple[nn.Module, Path]) -> None:
    """So that writing the graph of the encoder saves none twice, and the file of the source is not kept open."""
    for tensor in convert_vit(str(source[1]))[0].state_dict().values():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dinov3_vit gated", "dinov2_with_registers"])
def test_the_encoder_is_exported_as_a_graph(kind: str, tmp_path: Path) -> None:
    save_source(kind, tmp_path / "source")
    model, processor = convert_vit(str(tmp_path / "source"))
    manifest = export(model, processor, tmp_path / "graph", name=kind, format="torch")
    assert max(manifest["largest_difference"].values()) <= 1e-5


def test_names_in_memory_are_understood(source: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """Transformers renames weights when it saves; other tools save them under the names of the modules."""
    theirs, folder = source
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    save_file({key: value.clone() for key, value in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    one, other = (convert_vit(str(path))[0].state_dict() for path in (folder, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def save_timm_vit(folder: Path) -> nn.Module:
    """Save a ViT of transformers under the names that timm's has in open_clip, with a projection, and return it."""
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    model = save_source("vit", folder / "vit", **sizes, image_size=64, patch_size=16, layer_norm_eps=1e-6)
    theirs, timm = load_file(folder / "vit" / "model.safetensors"), {}
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    for kind in ("weight", "bias"):
        names[f"patch_embed.proj.{kind}"] = f"embeddings.patch_embeddings.projection.{kind}"
        names[f"norm.{kind}"] = f"layernorm.{kind}"
    parts = {"norm1": "layernorm_before", "attn.proj": "attention.output.dense", "norm2": "layernorm_after"}
    parts |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for layer in range(12):
        for kind in ("weight", "bias"):
            block, start = f"blocks.{layer}", f"encoder.layer.{layer}"
            names |= {f"{block}.{ours}.{kind}": f"{start}.{part}.{kind}" for ours, part in parts.items()}
            fused = [theirs[f"{start}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            timm[f"visual.trunk.{block}.attn.qkv.{kind}"] = torch.cat(fused)
    timm |= {f"visual.trunk.{ours}": theirs[name].clone() for ours, name in names.items()}
    timm |= {"visual.head.proj.weight": torch.randn(24, 192)}
    timm |= {"text.proj.0.weight": torch.ones(2), "logit_scale": torch.ones(())}  # of the text tower
    save_file(timm, folder / "open_clip_model.safetensors")
    vision = {"timm_model_name": "vit_tiny_patch16_64", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    preprocess = {"mean": IMAGENET["image_mean"], "std": IMAGENET["image_std"]}
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {}}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return model


@torch.no_grad()
def test_a_vit_of_timm_in_open_clip_is_converted(tmp_path: Path) -> None:
    """As in BiomedCLIP. The embedding is open_clip's: the projected class token."""
    theirs = save_timm_vit(tmp_path)
    assert is_convertible(str(tmp_path))
    model, processor = convert_vit(str(tmp_path))
    images = torch.randn(3, 3, 64, 64)
    cls, patches, _ = source_tokens(theirs, images)
    output = model(images)
    assert largest_difference(output.last_hidden_state, torch.cat([cls[:, None], patches], dim=1)) <= 1e-5
    projection = load_file(tmp_path / "open_clip_model.safetensors")["visual.head.proj.weight"]
    expected = nn.functional.normalize(cls @ projection.T, dim=-1)
    ours = model.embed_scans(images)
    assert largest_difference(ours @ ours.T, expected @ expected.T) <= 1e-5
    assert (processor.size, processor.image_mean) == (64, IMAGENET["image_mean"])


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("vision_cfg", {"timm_model_name": "convnext_base"}),
        ("vision_cfg", {"timm_pool": "avg"}),
        ("vision_cfg", {"timm_pool": None}),
        ("vision_cfg", {"timm_proj": "mlp"}),
        ("preprocess_cfg", {"std": [0.2, 0, 0.2]}),
        ("preprocess_cfg", {"mean": "imagenet"}),
    ],
    ids=str,
)
def test_other_and_damaged_checkpoints_of_open_clip_are_refused(
    part: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    save_timm_vit(tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    changed = config["model_cfg"]["vision_cfg"] if part == "vision_cfg" else config[part]
    changed.update(changes)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError):
        convert_vit(str(tmp_path))
    if part == "vision_cfg":
        assert not is_convertible(str(tmp_path))


@torch.no_grad()
def test_embeddings_of_open_clip_are_those_of_its_own_model_and_transform(tmp_path: Path) -> None:
    """As in BiomedCLIP, but smaller."""
    open_clip = pytest.importorskip("open_clip", reason="needs the extra `clip`")
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
    text = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    theirs = open_clip.CLIP(24, vision, text).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    statistics = {"mean": IMAGENET["image_mean"], "std": IMAGENET["image_std"]}
    save_file(
        {key: value.contiguous() for key, value in theirs.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": statistics}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    transform = open_clip.image_transform(224, is_train=False, **statistics)
    pixels = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
    model, processor = convert_vit(str(tmp_path))
    ours = torch.stack([processor.resize(processor.read(picture))[:, 0] for picture in pictures])
    assert largest_difference(ours, pixels) <= 1e-5
    expected = theirs.encode_image(pixels, normalize=True)
    embedded = model.embed_scans(**processor(list(pictures)))
    assert largest_difference(embedded[:, :24], expected) <= 1e-5
    assert not embedded[:, 24:].any()  # the projection is padded to the width of the tokens


WRITTEN = ("dinov3_vit", "dinov3_vit gated", "dinov2", "dinov2 gated", "dinov2_with_registers", "vit", "vit_mae")


@pytest.mark.parametrize("kind", [*WRITTEN, "vit without biases"])
def test_a_2d_checkpoint_of_the_encoder_has_the_tokens_and_weights_of_the_source(kind: str, tmp_path: Path) -> None:
    theirs = save_source(kind, tmp_path / "source")
    model, processor = convert_vit(str(tmp_path / "source"))
    family = export_vit(model, processor, tmp_path / "written")
    assert family == ("vit" if kind.startswith("vit") else kind.split()[0])
    loading: dict[str, Any] = {"output_loading_info": True}
    if family == "vit":
        loading["add_pooling_layer"] = False
    written, info = transformers.AutoModel.from_pretrained(tmp_path / "written", **loading)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images = torch.randn(2, 3, 24, 40)
    for one, other in zip(source_tokens(written.eval(), images)[:2], source_tokens(theirs, images)[:2], strict=True):
        assert largest_difference(one, other) <= 1e-5
    back, same = convert_vit(str(tmp_path / "written"))
    kept = {"converted_from": "source", "pooling": model.config.pooling}
    assert back.config.to_dict() | kept == model.config.to_dict()
    assert same.to_dict() == processor.to_dict()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.state_dict().items())


@torch.no_grad()
def test_a_2d_checkpoint_of_a_trained_encoder_has_its_tokens_for_one_slice(tmp_path: Path) -> None:
    """Training makes the slices of a patch differ, and their depths."""
    save_source("vit", tmp_path / "source")
    model, processor = convert_vit(str(tmp_path / "source"))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    with pytest.raises(InputError):  # gains have changed, and no family with gains has this width
        export_vit(model, processor, tmp_path / "written")
    save_source("dinov2", tmp_path / "dinov2")
    model, processor = convert_vit(str(tmp_path / "dinov2"))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    export_vit(model, processor, tmp_path / "written")
    written = transformers.AutoModel.from_pretrained(tmp_path / "written").eval()
    assert_same_tokens(model, written, torch.randn(2, 3, 24, 40))


def test_encoders_that_no_2d_architecture_has_are_refused(tmp_path: Path) -> None:
    own = M3RetModel(M3RetConfig.vitt(num_hidden_layers=1))
    with pytest.raises(InputError):
        export_vit(own, M3RetImageProcessor(), tmp_path / "written")
    save_source("siglip_vision_model", tmp_path / "source")
    with pytest.raises(InputError):
        export_vit(*convert_vit(str(tmp_path / "source")), tmp_path / "written")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("antialias", [False, True])
def test_interpolation_of_positions_equals_that_of_torch(antialias: bool) -> None:
    table = torch.randn(1, 5, 6, 9)
    for height, width in ((6, 9), (3, 20), (13, 2), (1, 1), (7, 8)):
        coordinates = grid_coordinates((1, height, width), torch.device("cpu"))
        rows = interpolation_weights(coordinates[:, 1], coordinates[:, 4], 6, antialias)
        columns = interpolation_weights(coordinates[:, 2], coordinates[:, 5], 9, antialias)
        ours = torch.einsum("pa,pb,ndab->npd", rows, columns, table).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        theirs = nn.functional.interpolate(table, (height, width), mode="bicubic", antialias=antialias)
        assert largest_difference(ours, theirs) <= 1e-5


def change_config(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def change_weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")

    return damage


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def change_processor(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        settings = json.loads((folder / "preprocessor_config.json").read_text()) | values
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))

    return damage


def write_text(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def write_shards(folder: Path, count: int) -> None:
    """Replace the weights by the first `count` of two shards."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for number in range(count):
        part = {name: weights[name] for name in names[number::2]}
        save_file(part, folder / f"model-{number + 1:05}-of-00002.safetensors")


FIRST_BIAS = "encoder.layer.0.output.dense.bias"
DAMAGES: dict[str, Callable[[Path], None]] = {
    "another family": change_config(model_type="swin"),
    "unknown family": change_config(model_type="no-such-model"),
    "other sizes": change_config(hidden_size=64),
    "more layers": change_config(num_hidden_layers=3),
    "fewer layers": change_config(num_hidden_layers=1),
    "patches that are no squares": change_config(patch_size=[8, 4]),
    "a pickle": only_a_pickle,
    "four channels": change_config(num_channels=4),
    "quantisation": change_config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "heads that do not divide the width": change_config(num_attention_heads=3),
    "unknown activation": change_config(hidden_act="no-such-activation"),
    "patches without pixels": change_config(patch_size=0),
    "config.json without an object": write_text("config.json", "[]"),
    "damaged processor": write_text("preprocessor_config.json", '{"size":'),
    "processor without an object": write_text("preprocessor_config.json", "[1]"),
    "unknown size": change_processor(size={"longest_edge": 32}),
    "negative size": change_processor(size={"height": -32, "width": -32}),
    "no deviation": change_processor(image_std=[0, 0, 0]),
    "numbers for two channels": change_processor(image_mean=[0.4, 0.5]),
    "one number as mean": change_processor(image_mean=0.5),
    "a mean that is no number": change_processor(image_mean=["a", "b", "c"]),
    "channels in another order": change_processor(do_flip_channel_order=True),
    "other range of values": change_processor(rescale_factor=1 / 127.5),
    "no factor": change_processor(rescale_factor=None),
    "a missing shard": lambda folder: write_shards(folder, 1),
    "integers": change_weights(lambda w: {key: value.to(torch.int8) for key, value in w.items()}),
    "floats of 8 bits": change_weights(lambda w: {key: value.to(torch.float8_e4m3fn) for key, value in w.items()}),
    "no processor": lambda folder: (folder / "preprocessor_config.json").unlink(),
    "broken weights": lambda folder: (folder / "model.safetensors").write_bytes(b"broken"),
    "a pointer of Git LFS": write_text(
        "model.safetensors", f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 99\n"
    ),
    "a bias of one layer missing": change_weights(lambda w: {k: v for k, v in w.items() if k != FIRST_BIAS}),
    "no positions": change_weights(lambda w: {k: v for k, v in w.items() if "position" not in k}),
    "an unknown weight": change_weights(lambda w: w | {"encoder.layer.0.adapter.weight": torch.ones(2)}),
    "not finite": change_weights(lambda w: w | {FIRST_BIAS: w[FIRST_BIAS] * float("nan")}),
}


# whose errors are quoted
FOUND_BY_LIBRARIES = ("unknown family", "config.json without an object", "broken weights", "no factor")


@pytest.mark.parametrize("damage", DAMAGES)
def test_other_and_damaged_checkpoints_are_refused(damage: str, tmp_path: Path) -> None:
    save_source("vit", tmp_path)
    DAMAGES[damage](tmp_path)
    with pytest.raises(EncoderError) as caught:
        convert_vit(str(tmp_path))
    assert caught.value.name == str(tmp_path)
    if damage not in FOUND_BY_LIBRARIES:
        assert not re.search(r"\w+Error", str(caught.value))
    with pytest.raises(InputError):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        {"poolng": "mean"},  # misspelt
        {"hidden_size": 64},  # sizes are those of the source
        {"rotary_axes": "shared"},
        {"pooling": "attention"},  # needs a head that the source lacks
        {"num_channels": 2},
        {"patch_depth": 0},
    ],
    ids=str,
)
def test_overrides_that_do_not_fit_the_source_are_refused(overrides: dict[str, Any], tmp_path: Path) -> None:
    save_source("vit", tmp_path)
    with pytest.raises(EncoderError) as caught:
        convert_vit(str(tmp_path), **overrides)
    assert next(iter(overrides)) in str(caught.value)


def test_a_source_without_a_class_token_cannot_pool_it(tmp_path: Path) -> None:
    save_source("siglip_vision_model", tmp_path)
    assert convert_vit(str(tmp_path), pooling="statistics")[0].config.pooling == "statistics"
    with pytest.raises(EncoderError):
        convert_vit(str(tmp_path), pooling="cls")


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"broken"), "model.safetensors"),
        (write_text("preprocessor_config.json", "{"), "preprocessor_config.json"),
        (change_processor(size={"longest_edge": 32}), "preprocessor_config.json"),
    ],
)
def test_errors_name_the_damaged_file(change: Callable[[Path], None], file: str, tmp_path: Path) -> None:
    save_source("vit", tmp_path)
    change(tmp_path)
    with pytest.raises(EncoderError, match=file):
        convert_vit(str(tmp_path))


def test_shards_are_read(tmp_path: Path) -> None:
    theirs = save_source("vit", tmp_path)
    write_shards(tmp_path, 2)
    assert_same_tokens(convert_vit(str(tmp_path))[0], theirs, torch.randn(1, 3, 24, 40))


def test_mean_and_deviation_of_a_grey_source_are_kept(tmp_path: Path) -> None:
    theirs = save_source("vit", tmp_path, num_channels=1)
    change_processor(image_mean=[0.3], image_std=[0.2])(tmp_path)
    model, processor = convert_vit(str(tmp_path))
    assert (processor.image_mean, processor.image_std) == (0.3, 0.2)
    grey = torch.rand(2, 1, 24, 40)
    with torch.no_grad():
        ours = model(processor.normalise(grey.clone())).pooler_output
    assert largest_difference(ours, source_tokens(theirs, (grey - 0.3) / 0.2)[2]) <= 1e-5


def test_whitening_is_fitted_to_a_folder_without_a_manifest(tmp_path: Path) -> None:
    save_source("vit", tmp_path / "source")
    model, processor = convert_vit(str(tmp_path / "source"))
    folder = tmp_path / "scans"
    folder.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        if index == 0:
            with pytest.raises(InputError):
                fit_whitening(model, processor, str(folder))
    assert fit_whitening(model, processor, str(folder)) == 3
    assert model.whitening.mean.abs().max() > 0


def test_licence_and_name_are_those_of_the_source(tmp_path: Path) -> None:
    folder = tmp_path / "hospital" / "tiny-vit"
    save_source("vit", folder)
    assert is_convertible(str(folder))
    assert isinstance(M3RetModel.from_vit(str(folder), pooling="mean"), M3RetModel)
    assert convert_vit(str(folder))[0].config.converted_license is None
    for card, expected in (
        ("---\nlicense: mit\n---\n# Tiny", "mit"),
        ("---\nlicense: other\nlicense_name: dinov3-license\n---\n", "dinov3-license"),
        ("---\nlicense: [\n---\n", None),
        ("no metadata", None),
    ):
        (folder / "README.md").write_text(card)
        config = convert_vit(str(folder))[0].config
        assert (config.converted_from, config.converted_license) == ("tiny-vit", expected)


# ViT-S and ViT-B of each family, at the sizes of the published checkpoints
SMALL = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12}
BASE = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12}
PUBLISHED = [
    ("dinov3_vit", SMALL | {"intermediate_size": 1536, "image_size": 224, "patch_size": 16, "num_register_tokens": 4}),
    ("dinov2", SMALL | {"mlp_ratio": 4, "image_size": 518, "patch_size": 14}),
    ("dinov2_with_registers", SMALL | {"mlp_ratio": 4, "image_size": 518, "patch_size": 14}),
    ("vit", SMALL | {"intermediate_size": 1536, "image_size": 224, "patch_size": 16}),
    ("vit_mae", BASE | {"intermediate_size": 3072, "image_size": 224, "patch_size": 16}),
    ("clip_vision_model", BASE | {"intermediate_size": 3072, "image_size": 224, "patch_size": 16}),
    ("siglip_vision_model", BASE | {"intermediate_size": 3072, "image_size": 224, "patch_size": 16}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sizes"), PUBLISHED, ids=[kind for kind, _ in PUBLISHED])
def test_published_sizes_give_the_tokens_of_the_source(kind: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    theirs = save_source(kind, tmp_path, size=224, **sizes)
    model, _ = convert_vit(str(tmp_path))
    p = sizes["patch_size"]
    for height, width in ((14, 14), (16, 9), (7, 20)):
        assert_same_tokens(model, theirs, torch.randn(1, 3, height * p, width * p))


@pytest.mark.parametrize("name", ["hf-hub:org/no-such-model", "org/no-such-model@v1"])
def test_an_encoder_that_is_not_on_the_hub_is_an_error_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one about the form of its name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as caught:
        load_pretrained(name)
    assert "must use alphanumeric" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./folder", "a/b/c", "C:\\models\\vit", "hf-hub:no/such/folder"])
def test_a_name_that_can_only_be_a_folder_is_not_looked_up_on_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling_m3ret.encoder_files.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(EncoderError) as caught:
        find_files(name)
    assert caught.value.name == name
