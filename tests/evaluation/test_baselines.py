"""Other encoders: each gives what its model gives by hand, on pixels prepared by Pillow and NumPy alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from conftest import Hub
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from modeling_m3ret.data.collection import Record
from modeling_m3ret.evaluation import baselines
from modeling_m3ret.evaluation.baselines import BaselineError, baseline_name, embed_with_baseline


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


def pooled(model: Any, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels).pooler_output


def first_token(model: Any, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels).last_hidden_state[:, 0]


def projected(model: Any, pixels: Tensor) -> Tensor:
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


def pooled_by_attention(model: Any, pixels: Tensor) -> Tensor:
    return model.vision_model(pixel_values=pixels).pooler_output


def averaged(model: Any, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels).last_hidden_state.mean(1)


# which class is saved, with which configuration, the processor's JSON, and the feature that a table shall hold
KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], Callable[[Any, Tensor], Tensor]]] = {
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", TOWER | {"num_register_tokens": 2}, SQUARE, first_token),
    "dinov2": ("Dinov2Model", "Dinov2Config", TOWER, CROPPED, first_token),
    "dinov2-registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", TOWER, CROPPED, first_token),
    "vit": ("ViTModel", "ViTConfig", TOWER, SQUARE | {"size": 32}, pooled),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"vision_config": TOWER, "text_config": TEXT},
        SQUARE,
        pooled_by_attention,
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"vision_config": TOWER, "text_config": TEXT, "projection_dim": 12},
        CROPPED | {"size": 36, "crop_size": 32},
        projected,
    ),
    "convnext": ("ConvNextModel", "ConvNextConfig", CONV, CROPPED | {"crop_pct": 0.875}, pooled),
    "swin": ("SwinModel", "SwinConfig", SWIN, SQUARE, averaged),
    # no pooler in these: the class token, and not a pooler of random numbers
    "vit-classifier": ("ViTForImageClassification", "ViTConfig", TOWER, SQUARE, first_token),
    "mae": ("ViTMAEModel", "ViTMAEConfig", TOWER | {"mask_ratio": 0.75}, SQUARE, first_token),
}


def save_checkpoint(kind: str, folder: Path) -> Any:
    """A tiny one of random weights as its authors would publish it; returns the model."""
    model_class, config_class, settings, processor, _ = KINDS[kind]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
    for parameter in model.parameters():  # the initial ones are so small that all pictures look alike
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
    """Scans as the reader will see them: noise, larger and smaller than 32 px, wide and tall, grey and colour."""
    generator = np.random.default_rng(0)

    def scan(*shape: int) -> np.ndarray:
        values = generator.random(shape, dtype=np.float32)
        return (values + values.mean(-2, keepdims=True) * np.linspace(0, 2, shape[-1], dtype=np.float32)) / 3

    hounsfield = np.rint(scan(21, 48, 40) * 2000 - 1000).astype(np.int16)  # a volume, which the reader gives whole
    grey = {"image": scan(45, 70), "image 2": scan(33, 30), "clip": scan(21, 48, 40), "few": scan(3, 20, 24)}
    return grey | {"colour": (scan(40, 51, 3) * 255).astype(np.uint8), "volume": hounsfield}


@pytest.fixture(scope="module")
def records(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Those scans as files, and between them one that holds no scan."""
    folder = tmp_path_factory.mktemp("scans")
    for name, array in arrays.items():
        if array.dtype == np.uint8:
            Image.fromarray(array).save(folder / f"{name}.png")
        else:
            np.save(folder / f"{name}.npy", array)
    (folder / "broken.png").write_bytes(b"no picture at all")
    files = ["volume.npy", "image.npy", "broken.png", "colour.png", "few.npy", "image 2.npy", "clip.npy"]
    return [Record(Path(file).stem, folder / file, "any", "", "", Path(file).stem) for file in files]


READABLE = ["volume", "image", "colour", "few", "image 2", "clip"]
# of 21 slices the centres of 8 equal segments, of 3 all
CENTRES = [1, 3, 6, 9, 11, 14, 17, 19]
SLICES = {"volume": CENTRES, "clip": CENTRES, "few": [0, 1, 2]}


def pixels_by_hand(name: str, array: np.ndarray, processor: dict[str, Any]) -> Tensor:
    """`(slices, 3, edge, edge)` by Pillow and NumPy alone."""
    edge = processor.get("edge", 32)
    low, high = {"uint8": (0, 255), "int16": (-1000, 1000)}.get(str(array.dtype), (0, 1))
    scaled = (array.astype(np.float32) - low) / (high - low)
    slices = scaled[SLICES[name]] if name in SLICES else scaled[None]
    pictures = []
    for picture in slices:
        channels = [picture[..., c] for c in range(3)] if picture.ndim == 3 else [picture] * 3
        resized = [np.asarray(Image.fromarray(c).resize((edge, edge), processor["resample"])) for c in channels]
        unit = np.clip(np.stack(resized, axis=-1), 0, 1)
        pictures.append(((unit - processor["image_mean"]) / processor["image_std"]).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(pictures).astype(np.float32))


def embedding_by_hand(
    feature: Callable[[Tensor], Tensor], arrays: dict[str, np.ndarray], processor: dict[str, Any], pooling: str = "mean"
) -> Tensor:
    rows = []
    for name in READABLE:
        with torch.no_grad():
            features = feature(pixels_by_hand(name, arrays[name], processor))
        row = features.mean(0) if pooling == "mean" else features.max(0).values
        rows.append(row / row.norm())
    return torch.stack(rows)


def spread(embeddings: Tensor) -> float:
    """How far the two most alike of the scans are apart: to compare with a test's tolerance."""
    return float(torch.pdist(embeddings).min())


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_is_what_the_model_gives_by_hand(
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
    embedded = embed_with_baseline(str(tmp_path / kind), records, progress=False)
    assert embedded.embeddings.dtype == torch.float32
    assert spread(expected) > 1e-3
    torch.testing.assert_close(embedded.embeddings, expected, atol=2e-5, rtol=0)


def test_slices_are_pooled_by_their_maximum_too(
    dinov3: Path, records: list[Record], arrays: dict[str, np.ndarray]
) -> None:
    model = transformers.DINOv3ViTModel.from_pretrained(dinov3).eval()
    expected = embedding_by_hand(partial(first_token, model), arrays, SQUARE, "max")
    embedded = embed_with_baseline(str(dinov3), records, pooling="max", progress=False)
    torch.testing.assert_close(embedded.embeddings, expected, atol=2e-5, rtol=0)
    mean = embed_with_baseline(str(dinov3), records, progress=False).embeddings
    alike = (embedded.embeddings - mean).norm(dim=-1) < 1e-5
    assert alike.tolist() == [False, True, True, False, True, False]  # one slice is its own mean and maximum


def test_order_is_kept_and_unreadable_files_are_counted(dinov3: Path, records: list[Record]) -> None:
    embedded = embed_with_baseline(str(dinov3), records, batch_size=2, progress=False)
    assert [record.id for record in embedded.records] == READABLE
    assert len(embedded.failures) == 1
    assert "broken.png" in embedded.failures[0]
    backwards = embed_with_baseline(str(dinov3), records[::-1], batch_size=2, progress=False)
    torch.testing.assert_close(backwards.embeddings.flip(0), embedded.embeddings, atol=1e-5, rtol=0)


def test_nothing_readable_gives_no_embedding(dinov3: Path, records: list[Record]) -> None:
    embedded = embed_with_baseline(str(dinov3), records[2:3], progress=False)
    assert (len(embedded.embeddings), embedded.records, len(embedded.failures)) == (0, [], 1)


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (4, 1), (64, 0)])
def test_batches_and_workers_change_nothing(
    batch_size: int, num_workers: int, dinov3: Path, records: list[Record]
) -> None:
    embed = partial(embed_with_baseline, str(dinov3), records, progress=False)
    expected = embed(batch_size=3).embeddings
    embedded = embed(batch_size=batch_size, num_workers=num_workers)
    assert [record.id for record in embedded.records] == READABLE
    torch.testing.assert_close(embedded.embeddings, expected, atol=1e-5, rtol=0)


def test_bfloat16_is_close(dinov3: Path, records: list[Record]) -> None:
    whole = embed_with_baseline(str(dinov3), records, progress=False).embeddings
    half = embed_with_baseline(str(dinov3), records, dtype=torch.bfloat16, progress=False).embeddings
    assert half.dtype == torch.float32
    assert 1e-5 < (half - whole).norm(dim=-1).max() < 0.05  # 8 bits of mantissa, and really used


def test_fewer_slices_are_the_centres_of_fewer_segments(dinov3: Path, records: list[Record], tmp_path: Path) -> None:
    middle = np.load(records[0].open())[10]
    np.save(tmp_path / "middle.npy", middle)
    alone = [Record("middle", tmp_path / "middle.npy", "any", "", "", "")]
    of_volume = embed_with_baseline(str(dinov3), records[:1], slices=1, progress=False).embeddings
    torch.testing.assert_close(of_volume, embed_with_baseline(str(dinov3), alone, progress=False).embeddings)


class Explosive:
    """Fails the test if it is unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was opened",)


def test_pickled_weights_are_refused(dinov3: Path, records: list[Record], tmp_path: Path) -> None:
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((dinov3 / file).read_bytes())
    torch.save(Explosive(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BaselineError, match=r"found no model.safetensors, pytorch_model.bin; expected .*safetensors"):
        embed_with_baseline(str(tmp_path), records, progress=False)


def test_pickled_weights_of_open_clip_are_refused(records: list[Record], tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="needs the extra `clip`")
    (tmp_path / "open_clip_config.json").write_text("{}")
    torch.save(Explosive(), tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(BaselineError, match=r"found no open_clip_model.safetensors, open_clip_pytorch_model.bin"):
        embed_with_baseline(str(tmp_path), records, progress=False)


def test_open_clip_where_it_is_not_installed_is_asked_for(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(BaselineError, match=r"pip install m3ret\[clip\]"):
        embed_with_baseline(str(tmp_path), records, progress=False)


def test_weights_in_shards_are_read_whole(dinov3: Path, records: list[Record], tmp_path: Path) -> None:
    transformers.DINOv3ViTModel.from_pretrained(dinov3).save_pretrained(tmp_path, max_shard_size="5KB")
    (tmp_path / "preprocessor_config.json").write_bytes((dinov3 / "preprocessor_config.json").read_bytes())
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    sharded, whole = (embed_with_baseline(str(folder), records, progress=False) for folder in (tmp_path, dinov3))
    assert torch.equal(sharded.embeddings, whole.embeddings)


def change(file: str, **settings: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        known = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        (folder / file).write_text(json.dumps(known | settings))

    return write


def as_text_model(folder: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "expected a vision model of transformers or open_clip"),
        (change("config.json", model_type="no-such-model"), "expected a vision model of transformers or open_clip"),
        (change("config.json", model_type="x", auto_map={"AutoConfig": "code.C"}), "needs no code of its own"),
        (as_text_model, "found what fails with .*; expected a vision model of transformers or open_clip"),
        (change("config.json", model_type="siglip2"), "found a NaFlex SigLIP 2"),
        (change("config.json", num_hidden_layers=3), "found no weights for .*; expected all of a vision model's"),
        (change("config.json", hidden_size=32), "expected a vision model of transformers or open_clip"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "found no size, image_mean, image_std"),
        (change("preprocessor_config.json", rescale_factor=1.0), "found pictures from 0 to 255"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"broken"), "found what fails with SafetensorError"),
    ],
)
def test_what_is_no_encoder_of_pictures_is_refused(
    spoil: Callable[[Path], None], message: str, dinov3: Path, tmp_path: Path
) -> None:
    for file in dinov3.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path)
    with pytest.raises(BaselineError, match=message):
        embed_with_baseline(str(tmp_path), [], progress=False)


def test_settings_that_newer_transformers_nest_are_read(dinov3: Path, tmp_path: Path, records: list[Record]) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((dinov3 / file).read_bytes())
    change("processor_config.json", image_processor=SQUARE)(tmp_path)
    nested, flat = (embed_with_baseline(str(folder), records, progress=False) for folder in (tmp_path, dinov3))
    assert torch.equal(nested.embeddings, flat.embeddings)


def test_names_hold_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "patient-data" / "rad-dino").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "patient-data" / "rad-dino")
    assert baseline_name(".") == "rad-dino"
    assert baseline_name(str(tmp_path / "patient-data" / "rad-dino") + "/") == "rad-dino"
    assert baseline_name("facebook/dinov3-vits16-pretrain-lvd1689m@main") == "dinov3-vits16-pretrain-lvd1689m"
    assert baseline_name("hf-hub:BIOMEDICA/BMC-CLIP_CF") == "BMC-CLIP_CF"


def test_of_a_repository_only_json_and_safetensors_are_fetched(
    hub: Hub, dinov3: Path, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # which the Hub on loopback lacks
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
    monkeypatch.setattr(baselines, "snapshot_download", fetch)
    fetched = embed_with_baseline(f"{repository}@{hub.head(repository)}", records, progress=False)
    assert torch.equal(fetched.embeddings, embed_with_baseline(str(dinov3), records, progress=False).embeddings)
    files = {file.name for file in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert files == {"config.json", "preprocessor_config.json", "model.safetensors"}
    with pytest.raises(BaselineError, match="expected a folder, or ORG/NAME on the Hub"):
        embed_with_baseline("org/no-such-model", records, progress=False)


CLIP_TOWER = {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2}
OPEN_CLIP = {
    "clip": {"embed_dim": 12, "vision_cfg": CLIP_TOWER},
    "coca": {  # gives tokens beside its embedding
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
        # BiomedCLIP's kind: its text tower would be fetched from another repository
        "text_cfg": {"hf_model_name": "org/no-such-text-model"},
    },
}
PREPARED = {
    "mean": [0.48, 0.46, 0.41],
    "std": [0.27, 0.26, 0.28],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_open_clip_gives_what_encode_image_gives(
    kind: str, records: list[Record], arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    open_clip = pytest.importorskip("open_clip", reason="needs the extra `clip`")
    settings = OPEN_CLIP[kind]
    text = {"context_length": 4, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}
    vision = settings["vision_cfg"] | ({"timm_model_pretrained": False} if kind == "timm" else {})
    model = open_clip.CLIP(settings["embed_dim"], vision, text, quick_gelu=kind == "clip").eval()
    config = {"model_cfg": {"text_cfg": text, "quick_gelu": kind == "clip"} | settings, "preprocess_cfg": PREPARED}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    torch.save(Explosive(), tmp_path / "open_clip_pytorch_model.bin")
    processor = {
        "resample": 3,
        "image_mean": PREPARED["mean"],
        "image_std": PREPARED["std"],
        "edge": vision["image_size"],
    }

    def feature(pixels: Tensor) -> Tensor:
        given = model.encode_image(pixels)
        return given[0] if kind == "coca" else given

    expected = embedding_by_hand(feature, arrays, processor)
    assert spread(expected) > 1e-3
    for name in (str(tmp_path), f"hf-hub:{tmp_path}"):
        embedded = embed_with_baseline(name, records, progress=False)
        torch.testing.assert_close(embedded.embeddings, expected, atol=2e-5, rtol=0)
