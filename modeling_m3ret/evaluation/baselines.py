"""Embed scans with image encoders of transformers and open_clip, so that they stand in the same table.

These encoders take 2D images. Our reader gives n evenly spaced slices or frames of a scan (one for an image), scaled to
[0, 1]; the embedding is the mean of their features, L2-normalised. The whole slice is resized to the encoder's square,
as DINOv3, SigLIP and ViT do. Encoders whose processor crops the centre (CLIP, DINOv2, ConvNeXt) get the whole slice
too: a finding may lie at the border, and all encoders should see the same. Size, mean, standard deviation and filter
(bilinear or bicubic, antialiased; bicubic instead of any other) are those of the checkpoint.

The feature depends on the model:

- models aligned with text (CLIP, SigLIP, ...): `get_image_features`, and the same in open_clip;
- `pooler_output`, if it has no weights or the checkpoint holds them: the normalised class token of DINOv2 and DINOv3,
  the mean of ConvNeXt and Swin, the dense layer of a ViT that was trained with one;
- otherwise the class token of the last hidden state: ViT classifiers, DINO, MAE (without masking).

No downloaded code is run and no pickle is opened: only JSON and safetensors files are fetched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import MODEL_MAPPING, AutoConfig

from ..data.collection import Record
from ..data.loading import Pack, WholeScans, embedding_loader
from ..encoder_files import (
    CONFIGS,
    OPEN_CLIP_WEIGHTS,
    WEIGHTS,
    EncoderError,
    ImageTransform,
    encoder_errors,
    find_files,
    height_and_width,
    read_json,
    read_open_clip_transform,
    read_transform,
    read_weights,
    short_name,
)
from ..image_processing_m3ret import M3RetImageProcessor
from ..model_facts import ModelFacts, sha256_of_settings, sha256_of_weights
from ..reading_m3ret import M3RetReadError, Scan
from ..search.embedding import Embedded, EmbeddedBatch
from ..search.embedding_store import embed_cached


SLICES = 8  # the depth of our encoder's patch grid of a CT: 32 slices in patches of 4
# from normalised images (N, 3, height, width) to features (N, d)
Encoder = Callable[[Tensor], Tensor]


def resize(scan: Scan, transform: ImageTransform, slices: int) -> Tensor:
    """Return the centres of up to `slices` equal depth segments, float32 `(1 or 3, n, height, width)` in [0, 1]."""
    depth = scan.array.shape[1]
    count = min(slices, depth)
    centres = torch.from_numpy(scan.array[:, [(2 * i + 1) * depth // (2 * count) for i in range(count)]])
    values = centres.float() / 255 if centres.dtype == torch.uint8 else centres.float()
    # Antialiased, torch's bicubic filter is Pillow's, with which these encoders were trained. Bicubic overshoot is
    # clamped, as it is in 8-bit images.
    mode, size = transform.filter, transform.size
    return torch.nn.functional.interpolate(values, size, mode=mode, antialias=True).clamp_(0, 1)


def normalise(volumes: Sequence[Tensor], transform: ImageTransform) -> Tensor:
    """Normalise the images of scans `(1 or 3, n, height, width)` and join them to `(N, 3, height, width)`."""
    images = torch.cat([volume.expand(3, -1, -1, -1).transpose(0, 1) for volume in volumes])
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (transform.mean, transform.std))
    return (images - mean) / std


class SliceDataset(WholeScans):
    """The resized slices of each record."""

    def __init__(self, records: Sequence[Record], transform: ImageTransform, slices: int):
        super().__init__(records, M3RetImageProcessor(num_frames=slices))  # used for reading only
        self.transform = transform

    def __getitem__(self, index: int) -> Pack:
        try:
            scan = self.processor.read(self.sources[index].open())
        except M3RetReadError as error:
            return Pack(failures=[(index, str(error))])
        volume = resize(scan, self.transform, self.processor.num_frames)
        return Pack(volume.flatten(), [(*volume.shape,)], [index])


@dataclass(frozen=True)
class Baseline:
    """A loaded baseline encoder."""

    name: str  # as the user wrote it
    facts: ModelFacts
    transform: ImageTransform
    encode: Encoder
    device: torch.device

    def embed(
        self,
        records: Sequence[Record],
        *,
        slices: int = SLICES,
        batch_size: int = 16,
        num_workers: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[EmbeddedBatch]:
        """Embed every readable scan lazily, in order; vectors are L2-normalised float32 `(n, d)`.

        Args:
            slices: largest number of slices per scan.
            batch_size: scans per forward pass, each of up to `slices` images.
            num_workers: processes that decode.
            dtype: bfloat16 runs the encoder under autocast; weights and embeddings stay float32.

        Raises:
            EncoderError: if an embedding is not finite.
        """
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
        for pack in embedding_loader(SliceDataset(records, self.transform, slices), batch_size, num_workers):
            vectors = []
            if pack.scans:
                values = pack.values.to(self.device, non_blocking=True).split([*map(math.prod, pack.shapes)])
                volumes = [voxels.view(shape) for voxels, shape in zip(values, pack.shapes, strict=True)]
                with torch.inference_mode(), autocast:
                    features = self.encode(normalise(volumes, self.transform)).float()
                pooled = torch.stack([of_scan.mean(0) for of_scan in features.split([n for _, n, _, _ in pack.shapes])])
                vectors = [torch.nn.functional.normalize(pooled, dim=-1).cpu()]
            if not all(batch.isfinite().all() for batch in vectors):
                raise EncoderError(self.name, "invalid embeddings", "finite features", "NaN or infinity")
            yield EmbeddedBatch(pack.scans, vectors, pack.failures)


def embed_with_baseline(
    baseline: Baseline,
    records: Sequence[Record],
    accelerator: Accelerator,
    *,
    dtype: torch.dtype = torch.float32,
    num_workers: int = 0,
    bar: Any = None,
) -> Embedded:
    """Embed all readable records with a baseline encoder, see `embed_cached`; the options are those of `embed`."""
    identity = asdict(baseline.facts) | {"dtype": str(dtype), "slices": SLICES}
    del identity["model"]
    embed = partial(baseline.embed, dtype=dtype, num_workers=num_workers)
    return embed_cached(embed, records, accelerator, identity, bar=bar)


def load_baseline(name: str, device: torch.device | str = "cpu") -> Baseline:
    """Load a baseline encoder with its image transform.

    Args:
        name: folder, or `ORG/NAME[@REVISION]` on the Hub. The prefix `hf-hub:`, or a folder with an
            open_clip_config.json and no config.json, selects open_clip instead of transformers.

    Raises:
        EncoderError: if it does not exist, is not an image encoder, or its weights are not in safetensors.
    """
    folder, is_open_clip = find_files(name)
    with encoder_errors(name, "cannot be loaded", "a vision model of transformers or open_clip without custom code"):
        load = _load_open_clip if is_open_clip else _load_transformers
        transform, encode, weights = load(name, folder, torch.device(device))
        with torch.inference_mode():  # a test image fails now rather than after hours of reading
            shape = tuple(encode(torch.zeros(1, 3, *transform.size, device=device)).shape)
    if len(shape) != 2:
        raise EncoderError(name, "not an image encoder", "one feature vector (1, d) per image", f"shape {shape}")
    # with the configuration: two numbers of heads have weights of the same shapes
    settings = transform._asdict() | {file: read_json(folder / file) for file in CONFIGS}
    facts = ModelFacts(short_name(name), sha256_of_weights(weights), sha256_of_settings(settings))
    return Baseline(name, facts, transform, encode, torch.device(device))


def _load_transformers(
    name: str, folder: Path, device: torch.device
) -> tuple[ImageTransform, Encoder, dict[str, Tensor]]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type.startswith("siglip2"):
        raise EncoderError(name, "unsupported SigLIP 2", "a fixed image size (...-patch16-224)", "siglip2 (NaFlex)")
    if hasattr(config, "mask_ratio"):  # MAE's encoder masks in inference, too
        config.mask_ratio = 0.0
    transform = read_transform(name, folder)
    model_class: Any = MODEL_MAPPING[type(config)]
    # given a state dict, transformers looks for no other file: no pickle, no adapter
    weights = read_weights(name, folder, WEIGHTS)
    settings = {"config": config, "state_dict": weights, "dtype": torch.float32}
    model, loading = model_class.from_pretrained(None, **settings, output_loading_info=True)
    missing = [key for key in sorted(loading["missing_keys"]) if not key.startswith("pooler.")]
    has_pooler = len(missing) == len(loading["missing_keys"])  # otherwise it is randomly initialised
    if missing:
        raise EncoderError(name, "missing weights", "all of the model", f"none for {', '.join(missing[:3])}")
    has_class_token = any(key.endswith(("cls_token", "class_embedding")) for key, _ in model.named_parameters())
    model = model.to(device).eval()

    def encode(pixels: Tensor) -> Tensor:
        if hasattr(model, "get_image_features"):
            return model.get_image_features(pixel_values=pixels).pooler_output
        output = model(pixel_values=pixels)
        if has_pooler and getattr(output, "pooler_output", None) is not None:
            return output.pooler_output
        if not has_class_token:
            raise EncoderError(name, "unsupported features", "a pooled output or a class token", "neither")
        return output.last_hidden_state[:, 0]

    return transform, encode, weights


def _load_open_clip(name: str, folder: Path, device: torch.device) -> tuple[ImageTransform, Encoder, dict[str, Tensor]]:
    """Load the vision tower only, since a text tower may fetch its configuration from another repository.

    open_clip's own loaders fall back to pickles if a repository has no safetensors, so weights are read here.
    """
    try:
        import open_clip
    except ImportError as error:
        expected = "the package open_clip (pip install 'm3ret[clip]')"
        raise EncoderError(name, "open_clip is not installed", expected, "none") from error
    weights = read_weights(name, folder, OPEN_CLIP_WEIGHTS)
    model = read_json(folder / "open_clip_config.json")["model_cfg"]
    # do not fetch ImageNet weights (timm), return the embedding without tokens (CoCa)
    vision = model["vision_cfg"] | {"timm_model_pretrained": False, "output_tokens": False}
    minimal_text = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    clip = open_clip.CLIP(model["embed_dim"], vision, minimal_text, quick_gelu=model.get("quick_gelu", False))
    tower = clip.visual
    visual = {key: value for key, value in weights.items() if key.startswith("visual.")}
    tower.load_state_dict({key.removeprefix("visual."): value for key, value in visual.items()})
    transform = read_open_clip_transform(folder, height_and_width(tower.image_size))
    return transform, tower.to(device).eval(), weights
