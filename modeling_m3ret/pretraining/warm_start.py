"""Warm start: begin a run with the encoder of an earlier checkpoint, or of a published 2D one (`--initial`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..configuration_m3ret import ENCODER_FIELDS, M3RetConfig
from ..convert import convert_vit, is_convertible
from ..encoder_files import read_json
from ..errors import InputError
from ..modeling_m3ret import M3RetModel
from .run_config import ConfigError, RunConfig, format_differences


logger = logging.getLogger(__name__)

# further fields that a run takes over together with those of the encoder
KEPT_FIELDS = (
    *("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads"),
    *("converted_from", "converted_license"),
)


class WarmStartError(InputError):
    """A checkpoint that cannot initialise this run."""

    def __init__(self, source: str, problem: str, differences: dict[str, tuple[Any, Any]] | None = None):
        super().__init__(f"initial: {problem}")
        self.source = source
        self.differences = differences or {}  # field of M3RetConfig -> (value in the checkpoint, value in this run)


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run begins with or continues."""

    config: M3RetConfig
    statistics: dict[str, Any] = field(default_factory=dict)  # `image_mean` and `image_std` of its image processor
    converted: Mapping[str, Tensor] | None = None  # weights of a 2D encoder; those of our checkpoints are read later

    def fields(self, run: RunConfig) -> dict[str, Any] | None:
        """Return the fields of `M3RetConfig` that the run takes from here, or None if its preset sets them.

        An encoder that was converted keeps its architecture, which no preset has.
        """
        if run.preset != "initial" and self.config.converted_from is None:
            return None
        return {name: getattr(self.config, name) for name in (*ENCODER_FIELDS, *KEPT_FIELDS)}


def read_start(run: RunConfig) -> Start | None:
    """Return the checkpoint that `run` begins with, if any; for a resumed run, the newest one in its `run_dir`.

    Raises:
        ConfigError: if the preset is "initial" without such a checkpoint.
        WarmStartError: if `run.initial` is not a checkpoint.
        EncoderError: if it is a 2D encoder that cannot be converted.
    """
    start = None
    if run.resume:
        folders = sorted(Path(run.run_dir, "checkpoints").glob("step-*"), reverse=True)
        start = next(filter(None, map(_read_config, folders)), None)
    elif run.initial and is_convertible(run.initial):
        model, processor = convert_vit(run.initial)
        statistics = {"image_mean": processor.image_mean, "image_std": processor.image_std}
        return Start(model.config, statistics, model.state_dict())  # type: ignore[arg-type]
    elif run.initial:
        start = _read_config(_find_checkpoint(run.initial))
        if start is None:
            kinds = "an M3Ret checkpoint or a 2D vision transformer that can be converted (docs/start-from-a-vit.md)"
            raise WarmStartError(run.initial, f"expected {kinds}, got {run.initial} with another config.json.")
    if start is None and run.preset == "initial":
        problem = "expected a checkpoint to take the encoder of, got none. Set initial"
        raise ConfigError("preset", f"{problem}, or choose one of vitt, vits, vitb and vitl.")
    return start


def _read_config(folder: Path) -> Start | None:
    """Return the configuration of a checkpoint folder of ours, or None if it cannot be read."""
    try:
        if read_json(folder / "config.json").get("model_type") != M3RetConfig.model_type:
            return None
        config = M3RetConfig.from_pretrained(folder)
        settings = read_json(folder / "preprocessor_config.json")
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError):
        return None
    return Start(config, {name: settings[name] for name in ("image_mean", "image_std") if name in settings})


def _find_checkpoint(source: str) -> Path:
    """Return the folder of a checkpoint of ours, given by folder or Hub id."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise WarmStartError(source, f"expected a checkpoint folder or Hub id, got {source} ({error}).") from error
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise WarmStartError(source, f"expected a checkpoint, got {source} without {' and '.join(missing)}.")
    return folder


def load_initial(model: nn.Module, config: M3RetConfig, weights_file: str, source: str, start: Start) -> None:
    """Load all parts of a checkpoint (folder or Hub id) that `model` also has, in the same shape.

    Parts are the children of `model`. If the checkpoint holds `weights_file` (it was trained with the same family of
    objectives), they are student, teacher and heads, or encoder and decoder. Otherwise the published encoder
    initialises all encoders. The pooling may differ. Parts that are missing or differ are initialised randomly, with a
    warning. The whitening is statistics, not weights; it is loaded if the pooling is the same.

    Raises:
        WarmStartError: if its encoder differs from this run's.
    """
    theirs = start.config
    pairs = {name: (getattr(theirs, name), getattr(config, name)) for name in ENCODER_FIELDS}
    if differences := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
        listed = format_differences(differences)
        problem = f"the encoder of {source} differs from this run's ({listed}). Set `--preset initial --model {{}}`."
        raise WarmStartError(source, problem, differences)

    encoders = [name for name, part in model.named_children() if isinstance(part, M3RetModel)]
    folder = None if start.converted is not None else _find_checkpoint(source)
    if folder is not None and (folder / weights_file).is_file():
        loaded = load_file(folder / weights_file)
    else:
        published = start.converted if folder is None else load_file(folder / "model.safetensors")
        assert published is not None
        loaded = {f"{encoder}.{name}": value for encoder in encoders for name, value in published.items()}
    ours = model.state_dict()
    # a pooling head belongs to the pooling, which may differ
    loaded = {name: value for name, value in loaded.items() if name in ours or ".pooler." not in name}
    if theirs.pooling != config.pooling:  # the whitening was fitted to other features
        loaded = {name: value for name, value in loaded.items() if ".whitening." not in name}
    fitting = {name: value for name, value in loaded.items() if name in ours and ours[name].shape == value.shape}
    learned = {name for name in ours if ".whitening." not in name}
    parts = {_part(name) for name in learned}
    different = {_part(name) for name in loaded.keys() - ours.keys()} & parts
    if theirs.decoder_num_attention_heads != config.decoder_num_attention_heads:
        different |= {"decoder"} & parts
    random = different | {_part(name) for name in learned - fitting.keys()}
    if incomplete := sorted(random & set(encoders)):
        raise WarmStartError(source, f"expected all weights of {' and '.join(incomplete)}, got {source} without some.")
    if random:
        logger.warning("re-initialised (missing from %s or different shape): %s", source, ", ".join(sorted(random)))
    model.load_state_dict({name: value for name, value in fitting.items() if _part(name) not in random}, strict=False)


def _part(name: str) -> str:
    return name.split(".", 1)[0]
