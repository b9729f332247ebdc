"""Embed a collection with the checkpoints of an evaluation, and re-rank their results by patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel

from ..configuration_m3ret import M3RetConfig
from ..data.collection import Record
from ..errors import InputError
from ..image_processing_m3ret import M3RetImageProcessor
from ..model_facts import ModelFacts, model_facts
from ..modeling_m3ret import M3RetModel
from ..search.embedding import MAX_TOKENS, Embedded
from ..search.matching import TOKEN_WHITENING_SCANS, RerankedSearch, fit_token_whitening, scan_tokens
from .baselines import baseline_name
from .leakage import read_training_facts
from .untrained_baseline import whitening_sample


NO_TOKEN_WHITENING = (
    "Re-ranking of checkpoints that pool the CLS token uses the whitening of their embedding: no training scans of "
    "patients outside the evaluation are known, to which a whitening of patch tokens could be fitted."
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint without its weights, many of which would not fit into memory.

    Attributes:
        config: configuration of the model.
        processor: its image processor.
        facts: identity of weights and processor.
        training: content of its `training.json`, and the number of `parameters`.
    """

    config: M3RetConfig
    processor: M3RetImageProcessor
    facts: ModelFacts
    training: dict[str, Any]


def load_checkpoint(name: str, device: torch.device) -> tuple[M3RetModel, Checkpoint]:
    """Load a checkpoint from a folder or the Hub; the model is in evaluation mode on the device.

    Raises:
        InputError: if there is no M3Ret checkpoint.
    """
    if "/" not in name and not Path(name).is_dir():  # a misspelt folder, which the Hub need not be asked for
        raise InputError(f"{name}: no checkpoint: expected an existing folder, or ORG/NAME on the Hub.")
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        model = AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: cannot be loaded: expected a checkpoint folder or ORG/NAME on the Hub, got "
            f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        ) from error
    if not isinstance(model, M3RetModel):
        raise InputError(
            f"{name}: unsupported model: expected M3Ret, got {type(model).__name__}. "
            "Use --baselines for other encoders."
        )
    training = read_training_facts(name) | {"parameters": model.num_parameters()}
    facts, config = model_facts(model, processor, baseline_name(name)), model.config
    assert isinstance(config, M3RetConfig)
    return model.eval().to(device), Checkpoint(config, processor, facts, training)


def method_titles(models: Sequence[str], baselines: Sequence[str]) -> list[str]:
    """Return the names of checkpoints and baselines in the table.

    A single checkpoint is called "trained"; others by the last part of their name, numbered if it occurs twice or is
    the name of another row.
    """
    names = ["trained"] if len(models) == 1 else [baseline_name(name) for name in models]
    names += [baseline_name(name) for name in baselines]
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
    """Re-rank the first candidates of each query by late interaction of patch tokens.

    Args:
        embedded: embeddings of the first search.
        model: in evaluation mode.
        processor: its image processor.
        depth: number of candidates that are re-ranked.
        sample: training scans. If the model pools the CLS token, a whitening of patch tokens is fitted to them; without
            any, the whitening of the embedding is used.
        dtype: bfloat16 runs the encoder under autocast.
        max_tokens: patches that are encoded together.
    """
    whitening = None
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        if model.config.pooling == "cls" and sample:
            scans = (record.open() for record in whitening_sample(sample, TOKEN_WHITENING_SCANS))
            whitening = fit_token_whitening(model, processor, scans, max_tokens=max_tokens)
        sources = (record.open() for record in tqdm(embedded.records, desc="patches", unit="scan"))
        tokens = scan_tokens(model, processor, sources, whitening=whitening, max_tokens=max_tokens)
    return RerankedSearch(**vars(embedded), tokens=tokens, depth=depth)
