"""The identity of a model: which weights and preprocessing made an embedding.

Indices, exported graphs and cached embeddings store it, so that vectors of different models are never compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .image_processing_m3ret import M3RetImageProcessor
from .modeling_m3ret import M3RetModel


@dataclass(frozen=True)
class ModelFacts:
    """Identity of a model."""

    model: str  # name of the checkpoint; the last part of a path or Hub id
    revision: str  # SHA-256 of the weights, in hex
    processor: str  # SHA-256 of the image processor's settings, in hex


def model_facts(model: M3RetModel, processor: M3RetImageProcessor, name: str) -> ModelFacts:
    """Return the identity of a loaded model; of its name, path or Hub id only the last part is stored."""
    # `auto_map` says where the class comes from, and differs between a new, a saved and a downloaded processor
    settings = {k: value for k, value in processor.to_dict().items() if not k.startswith("_") and k != "auto_map"}
    return ModelFacts(Path(name).name, sha256_of_weights(model.state_dict()), sha256_of_settings(settings))


def sha256_of_weights(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, shapes and values of weights in hex."""
    digest = hashlib.sha256()
    for key, tensor in sorted(weights.items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256_of_settings(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of settings in hex, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
