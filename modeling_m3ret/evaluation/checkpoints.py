"""Embed a collection with the checkpoints of an evaluation, and re-rank their results by patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from ..configuration_m3ret import M3RetConfig
from ..data.collection import Record
from ..encoder_files import short_name
from ..hub import load_pretrained
from ..image_processing_m3ret import M3RetImageProcessor
from ..model_facts import ModelFacts, model_facts
from ..modeling_m3ret import M3RetModel
from ..search.embedding import MAX_TOKENS, Embedded
from ..search.matching import TOKEN_WHITENING_SCANS, RerankedSearch, fit_token_whitening, scan_tokens
from .leakage import read_training_facts
from .untrained_baseline import whitening_sample


NO_TOKEN_WHITENING = (
    "Re-ranking of checkpoints that pool the CLS token uses the whitening of their embedding: no training scans of "
    "patients outside the evaluation are known, to which a whitening of patch tokens could be fitted."
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint without its weights: those of many checkpoints would not fit into memory."""

    config: M3RetConfig
    processor: M3RetImageProcessor
    facts: ModelFacts
    training: dict[str, Any]  # content of its training.json, and the number of `parameters`


def load_checkpoint(name: str) -> tuple[M3RetModel, Checkpoint]:
    """Load a checkpoint from a folder or the Hub, with the errors of `load_pretrained`."""
    model, processor = load_pretrained(name)
    training = read_training_facts(name) | {"parameters": model.num_parameters()}
    assert isinstance(model.config, M3RetConfig)
    return model, Checkpoint(model.config, processor, model_facts(model, processor, short_name(name)), training)


def method_titles(models: Sequence[str], baselines: Sequence[str]) -> list[str]:
    """Return the names of checkpoints and baselines in the table.

    A single checkpoint is called "trained"; others by the last part of their name, numbered if another row has it.
    """
    names = ["trained"] if len(models) == 1 else [short_name(name) for name in models]
    names += [short_name(name) for name in baselines]
    taken = [*names, "chance", "pixels", "untrained", "untrained, whitened"]
    return [f"{name} ({number})" if taken.count(name) > 1 else name for number, name in enumerate(names, start=1)]


def rerank_embedded(
    embedded: Embedded,
    model: M3RetModel,
    processor: M3RetImageProcessor,
    *,
    depth: int,
    sample: Sequence[Record],
    dtype: torch.dtype = torch.float32,
    max_tokens: int = MAX_TOKENS,
) -> RerankedSearch:
    """Re-rank the first `depth` candidates of each query by late interaction of patch tokens.

    If the model pools the CLS token, a whitening of patch tokens is fitted to the training scans `sample`; without any,
    the whitening of the embedding is used. With bfloat16, the encoder runs under autocast.
    """
    whitening = None
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        if model.config.pooling == "cls" and sample:
            scans = (record.open() for record in whitening_sample(sample, TOKEN_WHITENING_SCANS))
            whitening = fit_token_whitening(model, processor, scans, max_tokens=max_tokens)
        sources = (record.open() for record in tqdm(embedded.records, desc="patches", unit="scan"))
        tokens = scan_tokens(model, processor, sources, whitening=whitening, max_tokens=max_tokens)
    return RerankedSearch(**vars(embedded), tokens=tokens, depth=depth)
