"""The encoder before training, whitened as training whitens it: what a trained one is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed

from ..configuration_m3ret import M3RetConfig
from ..data.collection import Record
from ..image_processing_m3ret import M3RetImageProcessor
from ..modeling_m3ret import M3RetModel
from ..search.embedding import MAX_TOKENS
from ..search.embedding_store import embed_collection


# training scans that a whitening is fitted to: five and more for each of a ViT-T's 192 dimensions
WHITENING_SCANS = 1024


def whitening_sample(training: Sequence[Record], most: int = WHITENING_SCANS) -> list[Record]:
    """At most so many of them, evenly spaced in the list, so of all modalities."""
    step = max(1, -(-len(training) // most))
    return list(training[::step])


class Untrained(NamedTuple):
    """encoder: in evaluation, on its device; title: what the table calls it; note: its whitening, in words; fitted_to:
    the scans that it was fitted to, all readable."""

    encoder: M3RetModel
    title: str
    note: str
    fitted_to: list[Record]


def untrained_encoder(
    config: M3RetConfig,
    processor: M3RetImageProcessor,
    training: Sequence[Record],
    accelerator: Accelerator,
    *,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    num_workers: int = 0,
) -> Untrained:
    """Random weights, and the whitening that training scans give them; all processes call at once and get the same.

    Args:
        training: of `training_part`; where none can be read the whitening stays the identity. seed: 0 as `RunConfig`.
    """
    set_seed(seed)
    encoder = M3RetModel(config).eval().to(accelerator.device)
    pooled = embed_collection(
        encoder,
        processor,
        whitening_sample(training),
        accelerator,
        name="untrained",
        max_tokens=max_tokens,
        num_workers=num_workers,
        pooled=True,
    )
    if not pooled.records:
        note = (
            "The untrained encoder is not whitened, as a trained one is: no scan is known to be of training and of a "
            "patient who is not evaluated (--holdout says so, or --split of a data set with a train split)."
        )
        return Untrained(encoder, "untrained", note, [])
    encoder.whitening.fit(pooled.embeddings)
    broadcast(list(encoder.whitening.buffers()))  # machines that round differently shall not make two of it
    note = (
        f"The untrained encoder's whitening is fitted to {len(pooled.records)} scans of patients who are not evaluated."
    )
    return Untrained(encoder, "untrained, whitened", note, pooled.records)
