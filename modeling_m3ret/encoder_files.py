"""Find and read the files of a published image encoder: configuration, image transform and weights.

No downloaded code is run and no pickle is opened: only JSON and safetensors files, and the model card, are fetched.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassClassValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .errors import InputError


OPEN_CLIP = "hf-hub:"  # open_clip's own prefix of models on the Hub
# Only these files are fetched. adapter_config.json is not: transformers would load the repository that it names.
CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json")
WEIGHTS = ("model.safetensors", "model-*.safetensors")  # one file, or shards
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip*.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CARD = "README.md"
SHARD = re.compile(r"-of-(\d{5})\.safetensors$")


class EncoderError(InputError):
    """A published encoder cannot be used. `name` is the encoder as the user wrote it."""

    def __init__(self, name: str, problem: str, expected: str, got: str):
        super().__init__(f"{name}: {problem}: expected {expected}, got {got}.")
        self.name = name


class UnsupportedEncoderError(ValueError):
    """The cause of an EncoderError, raised where the name of the encoder is not known."""

    def __init__(self, problem: str, expected: str, got: object):
        super().__init__(f"{problem}: expected {expected}, got {got}.")
        self.problem, self.expected, self.got = problem, expected, str(got)


class ImageTransform(NamedTuple):
    """What the image processor of an encoder does to an image in [0, 1]."""

    size: tuple[int, int]  # height and width in pixels
    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]  # of each channel
    filter: str  # "bilinear" or "bicubic"


@contextmanager
def encoder_errors(name: str, problem: str, expected: str) -> Iterator[None]:
    """Turn any exception of a library into an EncoderError."""
    try:
        yield
    except EncoderError:
        raise
    except UnsupportedEncoderError as error:
        raise EncoderError(name, error.problem, error.expected, error.got) from error
    except StrictDataclassClassValidationError as error:  # its cause is in the words of the configuration
        raise EncoderError(name, problem, expected, str(error.__cause__ or error).rstrip(".")) from error
    except Exception as error:
        reason = shorten(str(error), 400).rstrip(".")  # all lines: the first is often a heading
        raise EncoderError(name, problem, expected, f"{type(error).__name__}: {reason}") from error


def short_name(name: str) -> str:
    """Return the last part of a Hub id or path, without the revision: a name that reveals no folder."""
    return Path(name).resolve().name if Path(name).is_dir() else Path(name.removeprefix(OPEN_CLIP).split("@")[0]).name


def find_files(name: str) -> tuple[Path, bool]:
    """Return the folder with the files of an encoder, and whether they are those of open_clip instead of transformers.

    Args:
        name: folder, or `ORG/NAME[@REVISION]` on the Hub. The prefix `hf-hub:`, or a folder with an
            open_clip_config.json and no config.json, selects open_clip.

    Raises:
        EncoderError: if it does not exist or cannot be downloaded.
    """
    location = name.removeprefix(OPEN_CLIP)
    is_open_clip, folder = location != name, Path(location)
    if folder.is_dir():
        has_config = (folder / "config.json").is_file()
        return folder, is_open_clip or (not has_config and (folder / "open_clip_config.json").is_file())
    repo_id, _, revision = location.partition("@")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:  # its message is about ids, but this was meant to be a folder
        raise EncoderError(name, "not found", "a folder, or ORG/NAME on the Hub", "no such folder") from None
    files = [*CONFIGS, CARD, *(OPEN_CLIP_WEIGHTS if is_open_clip else WEIGHTS)]
    expected = "a folder, or ORG/NAME on the Hub (for a gated one, accept its terms and log in)"
    with encoder_errors(name, "cannot be downloaded", expected):
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=files)), is_open_clip


LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # Git LFS puts a text file in the place of weights


def read_weights(name: str, folder: Path, patterns: Sequence[str]) -> dict[str, Tensor]:
    """Read the tensors of all files that match the first pattern with any match.

    Raises:
        EncoderError: if there is none, a shard is missing, or a file is damaged.
    """
    matching = [sorted(folder.glob(pattern)) for pattern in patterns]
    files = next(filter(None, matching), None)
    if files is None:
        found = sorted(file for file in folder.glob("*") if file.suffix in (*PICKLES, ".safetensors"))
        got = ", ".join(file.name for file in found) or "no weights"
        got += " (pickles are never opened)" if any(file.suffix in PICKLES for file in found) else ""
        raise EncoderError(name, "no safetensors weights", patterns[0], got)
    counts = {match[1] for file in files if (match := SHARD.search(file.name))}
    if counts and counts != {f"{len(files):05}"}:
        got = f"{len(files)} ({files[0].name}, …)"
        raise EncoderError(name, "incomplete weights", f"{' or '.join(sorted(counts))} shards", got)
    weights: dict[str, Tensor] = {}
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise EncoderError(name, f"{file.name} was not fetched", "weights", "a pointer. Run `git lfs pull`")
        with encoder_errors(name, f"damaged {file.name}", "safetensors weights"):
            weights |= load_file(file)
    return weights


def read_transform(name: str, folder: Path) -> ImageTransform:
    """Read the transform from the image processor's JSON; the processor class would need torchvision."""
    nested = read_json(folder / "processor_config.json").get("image_processor")  # written by newer transformers
    settings = nested or read_json(folder / "preprocessor_config.json")
    if not settings:
        expected = "preprocessor_config.json beside config.json, as the image processor of transformers saves it"
        raise EncoderError(name, "no image processor", expected, "none")
    if absent := [key for key in ("size", "image_mean", "image_std") if settings.get(key) is None]:
        got = f"no {', '.join(absent)}"
        raise EncoderError(name, "incomplete preprocessor_config.json", "size, image_mean, image_std", got)
    expected = "size, image_mean, image_std and rescale_factor as transformers writes them"
    with encoder_errors(name, UNSUPPORTED_PROCESSOR, expected):
        return _parse_transform(settings)


UNSUPPORTED_PROCESSOR = "unsupported preprocessor_config.json"
# steps of image processors that are taken into account, or that change only the size
KNOWN_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb", "do_pad")


def _parse_transform(settings: Mapping[str, Any]) -> ImageTransform:
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255.0
    if abs(scale - 1) > 1e-3 or settings.get("do_normalize") is False:
        got = f"images in [0, {scale:g}] (rescale_factor), or do_normalize: false"
        raise UnsupportedEncoderError(UNSUPPORTED_PROCESSOR, "images in [0, 1], normalised", got)
    if others := [key for key, value in settings.items() if key[:3] == "do_" and value and key not in KNOWN_STEPS]:
        expected = f"no steps but {', '.join(KNOWN_STEPS)}"
        raise UnsupportedEncoderError(UNSUPPORTED_PROCESSOR, expected, ", ".join(others))
    crop_size = settings.get("crop_size") if settings.get("do_center_crop", True) else None
    resample = {2: "bilinear", 3: "bicubic"}.get(settings.get("resample", 3), "bicubic")  # Pillow's numbers
    size = height_and_width(crop_size or settings["size"], UNSUPPORTED_PROCESSOR)
    if min(size) < 1:
        raise UnsupportedEncoderError(UNSUPPORTED_PROCESSOR, "a size of at least 1 pixel", f"{size[0]} x {size[1]}")
    mean, std = _statistics(UNSUPPORTED_PROCESSOR, settings["image_mean"], settings["image_std"])
    return ImageTransform(size, mean, std, resample)


def _statistics(problem: str, mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of each channel, after checking them."""
    for name, values, least in (("mean", mean, -math.inf), ("standard deviation", std, 0)):
        is_list = isinstance(values, Sequence) and all(isinstance(value, int | float) for value in values)
        if not is_list or not all(least < value < math.inf for value in values):
            limit = "" if least else " above 0"
            raise UnsupportedEncoderError(problem, f"a {name} for each channel, a finite number{limit}", values)
    return (*mean,), (*std,)


def read_open_clip_transform(folder: Path, size: tuple[int, int]) -> ImageTransform:
    """Read the transform of an open_clip checkpoint with images of `size`, by default with the statistics of CLIP.

    Raises:
        ValueError: if it is not supported.
    """
    settings = read_json(folder / "open_clip_config.json").get("preprocess_cfg", {})
    mean, std = settings.get("mean", OPENAI_CLIP_MEAN), settings.get("std", OPENAI_CLIP_STD)
    resample = "bilinear" if settings.get("interpolation") == "bilinear" else "bicubic"
    return ImageTransform(size, *_statistics("unsupported preprocess_cfg", mean, std), resample)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if the file does not exist.

    Raises:
        ValueError: if the file is damaged, or holds no object.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedEncoderError(f"damaged {file.name}", "a JSON object", error) from error
    if not isinstance(content, dict):
        raise UnsupportedEncoderError(f"damaged {file.name}", "a JSON object", type(content).__name__)
    return content


def height_and_width(
    size: int | Sequence[int] | Mapping[str, int], problem: str = "unsupported size"
) -> tuple[int, int]:
    """Convert a size: n, [height, width], {height, width} or {shortest_edge}.

    Raises:
        UnsupportedEncoderError: if it is another one; `problem` begins the message.
    """
    if isinstance(size, Mapping):
        if "height" not in size and "shortest_edge" not in size:
            raise UnsupportedEncoderError(problem, "a size of height and width, or shortest_edge", ", ".join(size))
        size = [size["height"], size["width"]] if "height" in size else size["shortest_edge"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])
