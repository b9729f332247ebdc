"""Other people's encoders on the same scans, so that they stand in the same table: transformers and open_clip models.

All of them see pictures. A scan gives n evenly spaced slices or frames (an image its one), by our reader and in its
[0, 1], and its embedding is the mean or maximum of their features, L2-normalised. A picture is the whole slice, resized
to the encoder's square as DINOv3, SigLIP and ViT prepare theirs; those that crop the centre (CLIP, DINOv2, ConvNeXt)
get it whole too, since a finding may lie at the border and all encoders shall see the same. Size, mean, standard
deviation and filter (bilinear or bicubic, antialiased; bicubic for any other) are the checkpoint's.

The feature, by kind:

- with text aligned (CLIP, SigLIP, ...): `get_image_features`, what the text was aligned with; so in open_clip.
- `pooler_output`, if the checkpoint has its weights or it needs none: the normalised class token of DINOv2 and DINOv3,
  the mean of ConvNeXt and Swin, the dense layer of a ViT that was trained with one.
- else the class token of the last hidden state: a ViT fine-tuned to classify, DINO, MAE (which masks nothing here).

Nothing that is downloaded is unpickled or run: of a repository only JSON and safetensors are fetched, and weights are
read by safetensors alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import MODEL_MAPPING, AutoConfig

from ..data.collection import Record
from ..data.loading import ReadFailure, Resized, WholeScans, embedding_loader
from ..image_processing_m3ret import M3RetImageProcessor
from ..reading_m3ret import M3RetReadError, Scan
from ..search.embedding import Embedded


SLICES = 8  # as many steps in depth as our encoder's grid has of a CT: 32 slices in patches 4 deep
OPEN_CLIP = "hf-hub:"  # how open_clip itself writes a model on the Hub
# all that is ever fetched; not adapter_config.json, which would have transformers load another repository
CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json")
WEIGHTS = ("model.safetensors", "model-*.safetensors")  # in one file, or in shards
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip*.safetensors")

# from normalised pictures (N, 3, height, width) to features (N, d)
Encode = Callable[[Tensor], Tensor]


class BaselineError(ValueError):
    """An encoder that can't be used: which, what was found, what would do."""

    def __init__(self, name: str, found: str, expected: str):
        super().__init__(f"{name}: found {found}; expected {expected}")


@dataclass(frozen=True)
class Pictures:
    """What an encoder takes: height and width in pixels, mean and std of each channel, filter of the resize."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: str = "bicubic"

    def of(self, scan: Scan, slices: int) -> Tensor:
        """The centres of `slices` equal segments in depth, resized: `(1 or 3, n, height, width)` float32 in [0, 1]."""
        depth = scan.array.shape[1]
        count = min(slices, depth)
        picked = torch.from_numpy(scan.array[:, [(2 * i + 1) * depth // (2 * count) for i in range(count)]])
        values = picked.float() / 255 if picked.dtype == torch.uint8 else picked.float()
        # always antialiased, for then torch's bicubic is Pillow's, which these encoders were trained with; and clamped
        # as 8-bit pictures are, where bicubic overshoots
        return torch.nn.functional.interpolate(values, self.size, mode=self.filter, antialias=True).clamp_(0, 1)

    def normalised(self, volumes: Sequence[Tensor]) -> Tensor:
        """All pictures of several scans `(1 or 3, n, height, width)`, one after the other: `(N, 3, height, width)`."""
        pictures = torch.cat([volume.expand(3, -1, -1, -1).transpose(0, 1) for volume in volumes])
        mean, std = (pictures.new_tensor(numbers).view(-1, 1, 1) for numbers in (self.mean, self.std))
        return (pictures - mean) / std


class SliceScans(WholeScans):
    """Each record once, its slices as an encoder of pictures takes them."""

    def __init__(self, records: Sequence[Record], pictures: Pictures, slices: int):
        super().__init__(records, M3RetImageProcessor(num_frames=slices))  # which reads, of a clip no more than these
        self.pictures = pictures

    def __getitem__(self, index: int) -> list[Resized | ReadFailure]:
        try:
            scan = self.processor.read(self.records[index].open())
        except M3RetReadError as error:
            return [ReadFailure(index, str(error))]
        return [Resized(index, self.pictures.of(scan, self.processor.num_frames))]


def embed_with_baseline(
    name: str,
    records: Sequence[Record],
    *,
    slices: int = SLICES,
    pooling: Literal["mean", "max"] = "mean",
    batch_size: int = 16,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Embedded:
    """Embed every readable scan, in order, with the encoder `name`; see `load_baseline`, `baseline_name`.

    Args:
        slices: most of a scan. pooling: over them. batch_size: scans in one pass of the encoder, each up to `slices`
            pictures. dtype: bfloat16 runs under autocast, weights and embeddings staying float32.

    Raises:
        BaselineError: if the encoder can't be used.
    """
    pool = {"mean": lambda part: part.mean(0), "max": lambda part: part.amax(0)}[pooling]
    pictures, encode = load_baseline(name, device)
    loader = embedding_loader(SliceScans(records, pictures, slices), batch_size, num_workers)
    parts: list[Tensor] = []
    kept: list[int] = []
    failures: list[str] = []
    reduced = None if dtype == torch.float32 else dtype
    bar = tqdm(total=len(records), desc=baseline_name(name), unit="scan", disable=not progress, leave=False)
    with bar, torch.inference_mode(), torch.autocast(torch.device(device).type, reduced, reduced is not None):
        for pack in loader:
            bar.update(len(pack.scans) + len(pack.failures))
            failures += [message for _, message in pack.failures]
            if not pack.scans:
                continue
            kept += pack.scans
            values = pack.values.to(device, non_blocking=True).split([math.prod(shape) for shape in pack.shapes])
            volumes = [part.view(shape) for part, shape in zip(values, pack.shapes, strict=True)]
            features = encode(pictures.normalised(volumes)).float().split([shape[1] for shape in pack.shapes])
            parts.append(torch.nn.functional.normalize(torch.stack([pool(part) for part in features]), dim=-1).cpu())
    embeddings = torch.cat(parts) if parts else torch.empty(0, 0)
    if not torch.isfinite(embeddings).all():
        raise BaselineError(name, "embeddings that are not finite", "an encoder whose features are")
    return Embedded(embeddings, [records[index] for index in kept], failures)


def baseline_name(name: str) -> str:
    """The last part of an id or path, without its revision: what the table may show, since it names no folder."""
    if Path(name).is_dir():
        return Path(name).resolve().name
    return name.removeprefix(OPEN_CLIP).split("@")[0].rstrip("/").split("/")[-1]


def load_baseline(name: str, device: torch.device | str = "cpu") -> tuple[Pictures, Encode]:
    """An encoder by a local folder or `ORG/NAME[@REVISION]` on the Hub, with what it takes.

    It is open_clip's with `hf-hub:` before it, or if its folder holds an open_clip_config.json and no config.json.

    Raises:
        BaselineError: if there is none, it isn't one of pictures, or its weights are not in safetensors.
    """
    plain = name.removeprefix(OPEN_CLIP)
    of_open_clip = plain != name
    folder = Path(plain)
    if not folder.is_dir():
        repository, _, revision = plain.partition("@")
        files = [*CONFIGS, *(OPEN_CLIP_WEIGHTS if of_open_clip else WEIGHTS)]
        with _refusing(name, "a folder, or ORG/NAME on the Hub; a gated one needs its terms accepted and a login"):
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    elif not (folder / "config.json").is_file():
        of_open_clip |= (folder / "open_clip_config.json").is_file()
    with _refusing(name, "a vision model of transformers or open_clip that needs no code of its own"):
        pictures, encode = (_open_clip if of_open_clip else _transformers)(name, folder, torch.device(device))
        with torch.inference_mode():  # one black picture, so that what doesn't fit is known before hours of reading
            shape = tuple(encode(torch.zeros(1, 3, *pictures.size, device=device)).shape)
    if len(shape) != 2:
        raise BaselineError(name, f"features of shape {shape} for a picture", "one vector, (1, d)")
    return pictures, encode


@contextmanager
def _refusing(name: str, expected: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads a checkpoint into a BaselineError."""
    try:
        yield
    except BaselineError:
        raise
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        raise BaselineError(name, f"what fails with {type(error).__name__}: {line}", expected) from error


def _weights(name: str, folder: Path, patterns: Sequence[str]) -> dict[str, Tensor]:
    """What all files hold that match the first pattern that any matches."""
    matching = [sorted(folder.glob(pattern)) for pattern in patterns]
    files = next(filter(None, matching), None)
    if files is None:
        others = sorted(file.name for file in folder.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = ", ".join([f"no {patterns[0]}", *others])
        raise BaselineError(name, found, "weights in safetensors: pickles are never opened")
    return {key: value for file in files for key, value in load_file(file).items()}


# -------------------------------------------------------------------------------------------------------- transformers


def _transformers(name: str, folder: Path, device: torch.device) -> tuple[Pictures, Encode]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type.startswith("siglip2"):
        raise BaselineError(name, "a NaFlex SigLIP 2, which takes patches", "one of a fixed size (...-patch16-224)")
    if hasattr(config, "mask_ratio"):  # MAE's encoder hides this part even of what it only embeds
        config.mask_ratio = 0.0
    pictures = _pictures_of_processor(name, folder)
    model_class: Any = MODEL_MAPPING[type(config)]
    # from weights that are already read, so that transformers looks for no other file: no pickle, no adapter
    model, loading = model_class.from_pretrained(
        None, config=config, state_dict=_weights(name, folder, WEIGHTS), dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(loading["missing_keys"])
    has_pooler = not any(key.startswith("pooler.") for key in missing)  # or else random numbers
    if missing := [key for key in missing if not key.startswith("pooler.")]:
        raise BaselineError(name, f"no weights for {missing[0]} and {len(missing) - 1} more", "all of a vision model's")
    has_class_token = any(key.endswith(("cls_token", "class_embedding")) for key, _ in model.named_parameters())
    model = model.to(device).eval()

    def encode(pixels: Tensor) -> Tensor:
        if hasattr(model, "get_image_features"):
            return model.get_image_features(pixel_values=pixels).pooler_output
        output = model(pixel_values=pixels)
        if has_pooler and getattr(output, "pooler_output", None) is not None:
            return output.pooler_output
        if not has_class_token:
            raise BaselineError(name, "neither a pooled feature nor a class token", "one of both")
        return output.last_hidden_state[:, 0]

    return pictures, encode


def _pictures_of_processor(name: str, folder: Path) -> Pictures:
    """From the image processor's JSON: the class itself would need torchvision, and resize in its own way."""
    nested = _json(folder / "processor_config.json").get("image_processor")  # as newer versions of transformers save it
    settings = nested or _json(folder / "preprocessor_config.json")
    if absent := [key for key in ("size", "image_mean", "image_std") if settings.get(key) is None]:
        raise BaselineError(name, f"no {', '.join(absent)} in a preprocessor_config.json", "what pictures it takes")
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255.0
    if abs(scale - 1) > 1e-3 or settings.get("do_normalize") is False:
        raise BaselineError(name, f"pictures from 0 to {scale:g}, or not normalised", "normalised from [0, 1]")
    cropped = settings.get("crop_size") if settings.get("do_center_crop", True) else None
    resample = {2: "bilinear", 3: "bicubic"}.get(settings.get("resample", 3), "bicubic")  # Pillow's numbers
    return Pictures(
        _square(cropped or settings["size"]), (*settings["image_mean"],), (*settings["image_std"],), resample
    )


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _square(size: int | Sequence[int] | Mapping[str, int]) -> tuple[int, int]:
    """Height and width of what processors write as n, [height, width], {height, width} or {shortest_edge}."""
    if isinstance(size, int):
        return size, size
    if not isinstance(size, Mapping):
        return size[0], size[1]
    return (size["height"], size["width"]) if "height" in size else (size["shortest_edge"], size["shortest_edge"])


# ----------------------------------------------------------------------------------------------------------- open_clip


def _open_clip(name: str, folder: Path, device: torch.device) -> tuple[Pictures, Encode]:
    """The vision tower alone: a text tower may fetch its configuration from elsewhere, and no text is embedded.

    open_clip's own loaders fall back to pickles where a repository has no safetensors, so the weights are read here.
    """
    try:
        import open_clip
    except ImportError as error:
        raise BaselineError(name, "no open_clip", "it installed: `pip install m3ret[clip]`") from error
    weights = _weights(name, folder, OPEN_CLIP_WEIGHTS)
    settings = _json(folder / "open_clip_config.json")
    model = settings["model_cfg"]
    # nothing of ImageNet's is fetched for it, and no tokens are given beside the embedding (CoCa)
    vision = model["vision_cfg"] | {"timm_model_pretrained": False, "output_tokens": False}
    smallest = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    clip = open_clip.CLIP(model["embed_dim"], vision, smallest, quick_gelu=model.get("quick_gelu", False))
    tower = clip.visual
    of_tower = {key.removeprefix("visual."): value for key, value in weights.items() if key.startswith("visual.")}
    tower.load_state_dict(of_tower)
    prepared = settings.get("preprocess_cfg", {})
    pictures = Pictures(
        _square(tower.image_size),
        (*prepared.get("mean", open_clip.OPENAI_DATASET_MEAN),),
        (*prepared.get("std", open_clip.OPENAI_DATASET_STD),),
        "bilinear" if prepared.get("interpolation") == "bilinear" else "bicubic",
    )
    return pictures, tower.to(device).eval()
