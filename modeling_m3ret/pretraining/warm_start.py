"""What does a run take over from an earlier checkpoint (`--initial`)?"""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import nn

from ..configuration_m3ret import M3RetConfig
from ..modeling_m3ret import M3RetModel


logger = logging.getLogger(__name__)

# what a trained encoder's weights mean nothing without
ENCODER = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("patch_size", "patch_depth", "num_channels", "num_register_tokens", "qkv_bias", "rope_theta"),
)


def load_initial(model: nn.Module, config: M3RetConfig, weights_file: str, initial: str) -> None:
    """Weights of an earlier run into an objective's `model`: all its parts that the checkpoint has in the same form.

    A checkpoint of the same family (`weights_file` is there) has student, teacher and heads, or encoder and decoder;
    of another the published encoder is taken, for student and teacher alike. Pooling may be another than it was, and
    parts that are not found, or have another form, begin anew, in a warning's words. The whitening, which is fitted to
    scans and not learned, is taken where it fits.

    Raises:
        ValueError: if the encoder is another one, with what differs, or the folder is no checkpoint.
    """
    folder = Path(initial)
    if not folder.is_dir():
        folder = Path(snapshot_download(initial, allow_patterns=["*.safetensors", "*.json"]))
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"initial: found no {' and no '.join(missing)} in {initial}, expected a checkpoint of a run")
    theirs = M3RetConfig.from_pretrained(folder)
    differing = [
        f"{name}: {getattr(theirs, name)} in the checkpoint, {getattr(config, name)} now"
        for name in ENCODER
        if getattr(theirs, name) != getattr(config, name)
    ]
    if differing:
        raise ValueError(f"initial: {initial} does not fit this run's encoder; {'; '.join(differing)}")

    encoders = [name for name, part in model.named_children() if isinstance(part, M3RetModel)]
    if (folder / weights_file).is_file():
        found = load_file(folder / weights_file)
    else:
        published = load_file(folder / "model.safetensors")
        found = {f"{encoder}.{name}": value for encoder in encoders for name, value in published.items()}
    own = model.state_dict()
    fitting = {name: value for name, value in found.items() if name in own and own[name].shape == value.shape}
    learned = {name for name in own if ".whitening." not in name}
    parts = {_part(name) for name in learned}
    other_form = {_part(name) for name in found.keys() - own.keys()} & parts
    if theirs.decoder_num_attention_heads != config.decoder_num_attention_heads:
        other_form |= {"decoder"} & parts
    anew = other_form | {_part(name) for name in learned - fitting.keys()}
    if strangers := sorted(anew & set(encoders)):
        raise ValueError(f"initial: {initial} has not all weights of this run's {' and '.join(strangers)}")
    if anew:
        logger.warning("not in %s, or of another form, so begun anew: %s", initial, ", ".join(sorted(anew)))
    model.load_state_dict({name: value for name, value in fitting.items() if _part(name) not in anew}, strict=False)


def _part(name: str) -> str:
    return name.split(".", 1)[0]
