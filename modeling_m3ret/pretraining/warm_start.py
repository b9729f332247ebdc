"""Warm start: initialise the weights of a run from an earlier checkpoint (`--initial`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from torch import nn

from ..configuration_m3ret import M3RetConfig
from ..errors import InputError
from ..modeling_m3ret import M3RetModel
from .run_config import format_differences


logger = logging.getLogger(__name__)

# fields that must be equal for the weights of an encoder to be usable
ENCODER_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("patch_size", "patch_depth", "num_channels", "num_register_tokens", "qkv_bias", "rope_theta"),
)


class WarmStartError(InputError):
    """A checkpoint that cannot initialise this run."""

    def __init__(self, source: str, problem: str, differences: dict[str, tuple[Any, Any]] | None = None):
        super().__init__(f"initial: {problem}")
        self.source = source
        self.differences = differences or {}  # field of M3RetConfig -> (value in the checkpoint, value in this run)


def load_initial(model: nn.Module, config: M3RetConfig, weights_file: str, source: str) -> None:
    """Load all parts of a checkpoint (folder or Hub id) that `model` also has, in the same shape.

    Parts are the children of `model`. If the checkpoint holds `weights_file` (it was trained with the same family of
    objectives), they are student, teacher and heads, or encoder and decoder. Otherwise the published encoder
    initialises all encoders. The pooling may differ. Parts that are missing or differ are initialised randomly, with a
    warning. The whitening is statistics, not weights; it is loaded if its shape is the same.

    Raises:
        WarmStartError: if the source is not a checkpoint, or its encoder differs.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise WarmStartError(source, f"expected a checkpoint folder or Hub id, got {source} ({error}).") from error
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise WarmStartError(source, f"expected a checkpoint, got {source} without {' and '.join(missing)}.")
    theirs = M3RetConfig.from_pretrained(folder)
    pairs = {name: (getattr(theirs, name), getattr(config, name)) for name in ENCODER_FIELDS}
    if differences := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
        listed = format_differences(differences)
        raise WarmStartError(source, f"the encoder of {source} differs from this run's ({listed}).", differences)

    encoders = [name for name, part in model.named_children() if isinstance(part, M3RetModel)]
    if (folder / weights_file).is_file():
        loaded = load_file(folder / weights_file)
    else:
        published = load_file(folder / "model.safetensors")
        loaded = {f"{encoder}.{name}": value for encoder in encoders for name, value in published.items()}
    ours = model.state_dict()
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
