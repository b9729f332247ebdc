"""The untrained encoder, whitened as a trained one is: the baseline that shows what training adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed

from ..configuration_m3ret import M3RetConfig
from ..data.collection import Record
from ..image_processing_m3ret import M3RetImageProcessor
from ..modeling_m3ret import M3RetModel
from ..search.embedding import MAX_TOKENS
from ..search.embedding_store import embed_collection


WHITENING_SCANS = 1024  # at least five training scans for each of the 192 dimensions of ViT-T


def whitening_sample(training: Sequence[Record], max_scans: int = WHITENING_SCANS) -> list[Record]:
    """Return at most `max_scans` of the records, evenly spaced, so that every modality is represented."""
    return list(training[:: max(1, math.ceil(len(training) / max_scans))])


class UntrainedBaseline(NamedTuple):
    """The untrained encoder, in evaluation mode, on the accelerator's device."""

    encoder: M3RetModel
    title: str  # in the table
    note: str  # sentence about its whitening, for the report
    whitening_records: list[Record]  # readable scans to which the whitening was fitted


def build_untrained_baseline(
    config: M3RetConfig,
    processor: M3RetImageProcessor,
    training: Sequence[Record],
    accelerator: Accelerator,
    *,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    num_workers: int = 0,
    bar: Any = None,
) -> UntrainedBaseline:
    """Initialise an encoder randomly and fit its whitening to training scans.

    All processes must call it together; they get the same encoder. If no scan of `training` is readable, the whitening
    stays the identity. The default seed is that of `RunConfig`. `bar` is a tqdm bar to which the scans are added.
    """
    set_seed(seed)
    encoder = M3RetModel(config).eval().to(accelerator.device)
    embed = partial(embed_collection, max_tokens=max_tokens, num_workers=num_workers, pooled=True, bar=bar)
    sample = whitening_sample(training)
    if bar is not None:
        bar.total += len(sample)
    pooled = embed(encoder, processor, sample, accelerator, name="untrained")
    if not pooled.records:
        note = (
            "The untrained encoder is not whitened: no training scans of patients outside the evaluation are known. "
            "Use --holdout, or --split with a dataset that has a train split."
        )
        return UntrainedBaseline(encoder, "untrained", note, [])
    encoder.whitening.fit(pooled.embeddings)
    broadcast(list(encoder.whitening.buffers()))  # machines may round differently
    count = len(pooled.records)
    note = f"The untrained encoder's whitening is fitted to {count} scans of patients outside the evaluation."
    return UntrainedBaseline(encoder, "untrained, whitened", note, pooled.records)
