"""Baseline encoders against the model itself, on pixels prepared with Pillow and NumPy."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import Hub
from huggingface_hub import HfApi
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from modeling_m3ret import encoder_files
from modeling_m3ret.data.collection import Record
from modeling_m3ret.encoder_files import EncoderError, UnsupportedEncoderError, short_name
from modeling_m3ret.evaluation import baselines
from modeling_m3ret.evaluation.baselines import embed_with_baseline, load_baseline
from modeling_m3ret.search import embedding_store
from modeling_m3ret.search.embedding import Embedded, collect


# the real architectures, 2 layers deep and 16 wide
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TOWER = VIT | {"image_size": 32, "patch_size": 8}
TEXT = VIT | {"vocab_size": 9, "max_position_embeddings": 4}
CONV = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
SWIN = {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}

SQUARE = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
CROPPED = SQUARE | {
    "size": {"shortest_edge": 36},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "resample": 3,
}


def embed(name: str, records: list[Record], **options: Any) -> Embedded:
    return collect(load_baseline(name).embed(records, **options), records)[0]


def pooler_output(model: Any, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels).pooler_output


def first_token(model: Any, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels).last_hidden_state[:, 0]


def projection(model: Any, pixels: Tensor) -> Tensor:
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


def attention_pooling(model: Any, pixels: Tensor) -> Tensor:
    return model.vision_model(pixel_values=pixels).pooler_output


def token_mean(model: Any, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels).last_hidden_state.mean(1)


# class of the saved model, its configuration class and settings, the processor's JSON, the expected feature
KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], Callable[[Any, Tensor], Tensor]]] = {
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", TOWER | {"num_register_tokens": 2}, SQUARE, first_token),
    "dinov2": ("Dinov2Model", "Dinov2Config", TOWER, CROPPED, first_token),
    "dinov2-registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", TOWER, CROPPED, first_token),
    "vit": ("ViTModel", "ViTConfig", TOWER, SQUARE | {"size": 32}, pooler_output),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"vision_config": TOWER, "text_config": TEXT},
        SQUARE,
        attention_pooling,
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"vision_config": TOWER, "text_config": TEXT, "projection_dim": 12},
        CROPPED | {"size": 36, "crop_size": 32},
        projection,
    ),
    "convnext": ("ConvNextModel", "ConvNextConfig", CONV, CROPPED | {"crop_pct": 0.875}, pooler_output),
    "swin": ("SwinModel", "SwinConfig", SWIN, SQUARE, token_mean),
    # without a pooler: the class token rather than a randomly initialised pooler
    "vit-classifier": ("ViTForImageClassification", "ViTConfig", TOWER, SQUARE, first_token),
    "mae": ("ViTMAEModel", "ViTMAEConfig", TOWER | {"mask_ratio": 0.75}, SQUARE, first_token),
}


def save_checkpoint(kind: str, folder: Path) -> Any:
    """Save a tiny randomly initialised model with its processor configuration, and return it."""
    model_class, config_class, settings, processor, _ = KINDS[kind]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
    for parameter in model.parameters():  # default initial weights are so small that all images look alike
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "dinov3-tiny"
    save_checkpoint("dinov3", folder)
    return folder


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Return noise as images, clips and a volume: larger and smaller than 32 px, wide and tall, grey and colour."""
    generator = np.random.default_rng(0)

    def scan(*shape: int) -> np.ndarray:
        values = generator.random(shape, dtype=np.float32)
        return (values + values.mean(-2, keepdims=True) * np.linspace(0, 2, shape[-1], dtype=np.float32)) / 3

    hounsfield = np.rint(scan(21, 48, 40) * 2000 - 1000).astype(np.int16)  # the reader returns all slices of a volume
    grey = {"image": scan(45, 70), "image 2": scan(33, 30), "clip": scan(21, 48, 40), "few": scan(5, 20, 24)}
    return grey | {"colour": (scan(40, 51, 3) * 255).astype(np.uint8), "volume": hounsfield}


@pytest.fixture(scope="module")
def records(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Save the arrays as files, with an unreadable file among them."""
    folder = tmp_path_factory.mktemp("scans")
    for name, array in arrays.items():
        if array.dtype == np.uint8:
            Image.fromarray(array).save(folder / f"{name}.png")
        elif name == "volume":
            np.savez(folder / "volume.npz", hu=array)
        else:
            np.save(folder / f"{name}.npy", array)
    (folder / "broken.png").write_bytes(b"no picture at all")
    files = ["volume.npz", "image.npy", "broken.png", "colour.png", "few.npy", "image 2.npy", "clip.npy"]
    return [Record(Path(file).stem, folder / file, "any", "", "", Path(file).stem) for file in files]


READABLE = ["volume", "image", "colour", "few", "image 2", "clip"]
# the centres of 8 equal segments of 21 slices
CENTRES = [1, 3, 6, 9, 11, 14, 17, 19]
SLICES = {"volume": CENTRES, "clip": CENTRES, "few": list(range(5))}


def pixels_by_hand(name: str, array: np.ndarray, processor: dict[str, Any]) -> Tensor:
    """Return pixels `(slices, 3, edge, edge)` prepared with Pillow and NumPy."""
    edge = processor.get("edge", 32)
    low, high = {"uint8": (0, 255), "int16": (-1000, 1000)}.get(str(array.dtype), (0, 1))
    scaled = (array.astype(np.float32) - low) / (high - low)
    slices = scaled[SLICES[name]] if name in SLICES else scaled[None]
    pictures = []
    for picture in slices:
        channels = [picture[..., c] for c in range(3)] if picture.ndim == 3 else [picture] * 3
        resized = [np.asarray(Image.fromarray(c).resize((edge, edge), processor["resample"])) for c in channels]
        clipped = np.clip(np.stack(resized, axis=-1), 0, 1)
        pictures.append(((clipped - processor["image_mean"]) / processor["image_std"]).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(pictures).astype(np.float32))


def embedding_by_hand(
    feature: Callable[[Tensor], Tensor], arrays: dict[str, np.ndarray], processor: dict[str, Any]
) -> Tensor:
    rows = []
    for name in READABLE:
        with torch.no_grad():
            features = feature(pixels_by_hand(name, arrays[name], processor))
        row = features.mean(0)
        rows.append(row / row.norm())
    return torch.stack(rows)


def smallest_distance(embeddings: Tensor) -> float:
    """Return the smallest distance between two embeddings, to compare with the tolerance of a test."""
    return float(torch.pdist(embeddings).min())


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_features_of_the_model(
    kind: str, records: list[Record], arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    save_checkpoint(kind, tmp_path / kind)
    processor, feature = KINDS[kind][3:]
    if kind == "vit-classifier":
        model = transformers.ViTModel.from_pretrained(tmp_path / kind, add_pooling_layer=False)
    elif kind == "mae":
        model = transformers.ViTMAEModel.from_pretrained(tmp_path / kind, mask_ratio=0.0)
    else:
        model = getattr(transformers, KINDS[kind][0]).from_pretrained(tmp_path / kind)
    expected = embedding_by_hand(partial(feature, model.eval()), arrays, processor)
    embedded = embed(str(tmp_path / kind), records)
    assert embedded.embeddings.dtype == torch.float32
    assert smallest_distance(expected) > 1e-3
    torch.testing.assert_close(embedded.embeddings, expected, atol=2e-5, rtol=0)


def test_embeddings_are_in_order_and_unreadable_files_are_reported(dinov3: Path, records: list[Record]) -> None:
    embedded = embed(str(dinov3), records, batch_size=2)
    assert [record.id for record in embedded.records] == READABLE
    assert len(embedded.failures) == 1
    assert "broken.png" in embedded.failures[0]
    backwards = embed(str(dinov3), records[::-1], batch_size=2)
    torch.testing.assert_close(backwards.embeddings.flip(0), embedded.embeddings, atol=1e-5, rtol=0)


def test_embeddings_of_a_baseline_are_cached(
    dinov3: Path, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_store, "CACHE_FOLDER", tmp_path)
    baseline, accelerator = load_baseline(str(dinov3)), Accelerator(cpu=True)
    first = embed_with_baseline(baseline, records, accelerator)
    torch.testing.assert_close(first.embeddings, embed(str(dinov3), records).embeddings)
    monkeypatch.setattr(baselines.Baseline, "embed", lambda *_, **__: pytest.fail("embedded again"))
    again = embed_with_baseline(load_baseline(str(dinov3)), records, accelerator)
    assert torch.equal(again.embeddings, first.embeddings)
    assert [record.id for record in again.records] == READABLE


def test_facts_of_a_baseline_change_with_weights_and_preprocessing(dinov3: Path, tmp_path: Path) -> None:
    facts = load_baseline(str(dinov3)).facts
    other, resized = tmp_path / "other" / dinov3.name, tmp_path / "resized" / dinov3.name
    torch.manual_seed(1)
    save_checkpoint("dinov3", other)
    shutil.copytree(dinov3, resized)
    change("preprocessor_config.json", size={"height": 48, "width": 48})(resized)
    assert replace(load_baseline(str(other)).facts, revision=facts.revision) == facts
    assert replace(load_baseline(str(resized)).facts, processor=facts.processor) == facts
    assert len({facts, load_baseline(str(other)).facts, load_baseline(str(resized)).facts}) == 3


def test_no_readable_scan_gives_no_embedding(dinov3: Path, records: list[Record]) -> None:
    embedded = embed(str(dinov3), records[2:3])
    assert (len(embedded.embeddings), embedded.records, len(embedded.failures)) == (0, [], 1)


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), pytest.param(4, 1, marks=pytest.mark.slow), (64, 0)])
def test_embeddings_do_not_depend_on_batch_size_and_workers(
    batch_size: int, num_workers: int, dinov3: Path, records: list[Record]
) -> None:
    embed_all = partial(embed, str(dinov3), records)
    expected = embed_all(batch_size=3).embeddings
    embedded = embed_all(batch_size=batch_size, num_workers=num_workers)
    assert [record.id for record in embedded.records] == READABLE
    torch.testing.assert_close(embedded.embeddings, expected, atol=1e-5, rtol=0)


def test_bfloat16_embeddings_are_close(dinov3: Path, records: list[Record]) -> None:
    whole = embed(str(dinov3), records).embeddings
    half = embed(str(dinov3), records, dtype=torch.bfloat16).embeddings
    assert half.dtype == torch.float32
    assert 1e-5 < (half - whole).norm(dim=-1).max() < 0.05  # different, within the precision of 8 bits


def test_one_slice_is_the_middle_of_the_volume(dinov3: Path, records: list[Record], tmp_path: Path) -> None:
    middle = np.load(records[0].location)["hu"][10]
    np.savez(tmp_path / "middle.npz", hu=middle)
    alone = [Record("middle", tmp_path / "middle.npz", "any", "", "", "")]
    of_volume = embed(str(dinov3), records[:1], slices=1).embeddings
    torch.testing.assert_close(of_volume, embed(str(dinov3), alone).embeddings)


class Explosive:
    """Fail the test when unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was opened",)


def test_pickled_weights_are_rejected(dinov3: Path, records: list[Record], tmp_path: Path) -> None:
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((dinov3 / file).read_bytes())
    torch.save(Explosive(), tmp_path / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"model\.safetensors.*pytorch_model\.bin") as caught:
        embed(str(tmp_path), records)
    assert caught.value.name == str(tmp_path)


def test_pickled_weights_of_open_clip_are_rejected(records: list[Record], tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="needs the extra `clip`")
    (tmp_path / "open_clip_config.json").write_text("{}")
    torch.save(Explosive(), tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"open_clip_model\.safetensors.*open_clip_pytorch_model\.bin"):
        embed(str(tmp_path), records)


def test_open_clip_must_be_installed_for_its_models(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(EncoderError, match=r"m3ret\[clip\]") as caught:
        embed(str(tmp_path), records)
    assert isinstance(caught.value.__cause__, ImportError)


def test_sharded_weights_are_read(dinov3: Path, records: list[Record], tmp_path: Path) -> None:
    transformers.DINOv3ViTModel.from_pretrained(dinov3).save_pretrained(tmp_path, max_shard_size="5KB")
    (tmp_path / "preprocessor_config.json").write_bytes((dinov3 / "preprocessor_config.json").read_bytes())
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    sharded, whole = (embed(str(folder), records) for folder in (tmp_path, dinov3))
    assert torch.equal(sharded.embeddings, whole.embeddings)


def change(file: str, **settings: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        known = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        (folder / file).write_text(json.dumps(known | settings))

    return write


def replace_by_text_model(folder: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "cause", "identifier"),
    [
        (lambda folder: (folder / "config.json").unlink(), Exception, ""),
        (change("config.json", model_type="no-such-model"), ValueError, "no-such-model"),
        (change("config.json", model_type="x", auto_map={"AutoConfig": "code.C"}), ValueError, ""),
        (replace_by_text_model, Exception, ""),
        (change("config.json", model_type="siglip2"), None, "siglip2"),
        (change("config.json", num_hidden_layers=3), None, "layer.2."),
        (change("config.json", hidden_size=32), RuntimeError, ""),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), None, "preprocessor_config.json"),
        (change("preprocessor_config.json", rescale_factor=1.0), UnsupportedEncoderError, "rescale_factor"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"broken"), SafetensorError, ""),
    ],
)
def test_unsupported_or_damaged_checkpoints_are_rejected(
    damage: Callable[[Path], None],
    cause: type[Exception] | None,
    identifier: str,
    dinov3: Path,
    tmp_path: Path,
) -> None:
    for file in dinov3.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(EncoderError) as caught:
        embed(str(tmp_path), [])
    assert caught.value.name == str(tmp_path)
    assert identifier in str(caught.value)
    assert caught.value.__cause__ is None if cause is None else isinstance(caught.value.__cause__, cause)


def test_the_processor_format_of_newer_transformers_is_read(
    dinov3: Path, tmp_path: Path, records: list[Record]
) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((dinov3 / file).read_bytes())
    change("processor_config.json", image_processor=SQUARE)(tmp_path)
    nested, flat = (embed(str(folder), records) for folder in (tmp_path, dinov3))
    assert torch.equal(nested.embeddings, flat.embeddings)


def test_names_in_the_table_reveal_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "patient-data" / "rad-dino").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "patient-data" / "rad-dino")
    assert short_name(".") == "rad-dino"
    assert short_name(str(tmp_path / "patient-data" / "rad-dino") + "/") == "rad-dino"
    assert short_name("facebook/dinov3-vits16-pretrain-lvd1689m@main") == "dinov3-vits16-pretrain-lvd1689m"
    assert short_name("hf-hub:BIOMEDICA/BMC-CLIP_CF") == "BMC-CLIP_CF"


@pytest.mark.slow
def test_only_json_and_safetensors_are_downloaded(
    hub: Hub, dinov3: Path, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the test server has no Xet
    api = HfApi(hub.endpoint, hub.token)
    repository = hub.new_repository("dinov3-tiny")
    api.create_repo(repository, private=True)
    for file in dinov3.iterdir():
        api.upload_file(path_or_fileobj=file.read_bytes(), path_in_repo=file.name, repo_id=repository)
    for file in ("pytorch_model.bin", "modeling_code.py", "adapter_config.json"):
        api.upload_file(path_or_fileobj=b"{}", path_in_repo=file, repo_id=repository)
    fetch = partial(
        huggingface_hub.snapshot_download, endpoint=hub.endpoint, token=hub.token, cache_dir=tmp_path / "cache"
    )
    monkeypatch.setattr(encoder_files, "snapshot_download", fetch)
    fetched = embed(f"{repository}@{hub.head(repository)}", records)
    assert torch.equal(fetched.embeddings, embed(str(dinov3), records).embeddings)
    files = {file.name for file in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert files == {"config.json", "preprocessor_config.json", "model.safetensors"}
    with pytest.raises(EncoderError) as caught:
        embed("org/no-such-model", records)
    assert caught.value.name == "org/no-such-model"


CLIP_TOWER = {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2}
OPEN_CLIP = {
    "clip": {"embed_dim": 12, "vision_cfg": CLIP_TOWER},
    "coca": {  # returns tokens with its embedding
        "embed_dim": 12,
        "vision_cfg": CLIP_TOWER | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    },
    "timm": {
        "embed_dim": 12,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_vit",
            "timm_model_pretrained": True,
            "timm_pool": "",
            "timm_proj": "linear",
        },
        # as in BiomedCLIP, whose text tower is in another repository
        "text_cfg": {"hf_model_name": "org/no-such-text-model"},
    },
}
PREPROCESSING = {
    "mean": [0.48, 0.46, 0.41],
    "std": [0.27, 0.26, 0.28],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_open_clip_embeddings_are_those_of_encode_image(
    kind: str, records: list[Record], arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    open_clip = pytest.importorskip("open_clip", reason="needs the extra `clip`")
    settings = OPEN_CLIP[kind]
    text = {"context_length": 4, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}
    vision = settings["vision_cfg"] | ({"timm_model_pretrained": False} if kind == "timm" else {})
    model = open_clip.CLIP(settings["embed_dim"], vision, text, quick_gelu=kind == "clip").eval()
    config = {"model_cfg": {"text_cfg": text, "quick_gelu": kind == "clip"} | settings, "preprocess_cfg": PREPROCESSING}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    torch.save(Explosive(), tmp_path / "open_clip_pytorch_model.bin")
    processor = {
        "resample": 3,
        "image_mean": PREPROCESSING["mean"],
        "image_std": PREPROCESSING["std"],
        "edge": vision["image_size"],
    }

    def feature(pixels: Tensor) -> Tensor:
        output = model.encode_image(pixels)
        return output[0] if kind == "coca" else output

    expected = embedding_by_hand(feature, arrays, processor)
    assert smallest_distance(expected) > 1e-3
    for name in (str(tmp_path), f"hf-hub:{tmp_path}"):
        embedded = embed(name, records)
        torch.testing.assert_close(embedded.embeddings, expected, atol=2e-5, rtol=0)
