"""The gradient of one step from several packs: that of all their scans, each weighing the same."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from accelerate import Accelerator
from torch import Tensor, nn

from ..data.loading import Pack
from ..image_processing_m3ret import M3RetImageProcessor
from .ranks import total_over_ranks


def accumulate_gradients(
    accelerator: Accelerator, model: nn.Module, packs: Sequence[Pack], processor: M3RetImageProcessor
) -> tuple[dict[str, Tensor], int]:
    """Add the gradients of a step's packs, to be called by all ranks at once with as many.

    A pack weighs by its part of the step's views, over all ranks: within it the objective sees to the ranks' parts.

    Returns:
        The `loss` and the objective's terms, means over the packs of this rank with the same weights, and the number of
        views of all ranks.
    """
    views = [total_over_ranks(len(pack.scans), accelerator.device) for pack in packs]
    means: dict[str, Tensor] = {}
    for number, pack in enumerate(packs):
        as_many_packs = sum(views) / views[number]  # that the step would be, were all like this one
        in_between = accelerator.no_sync(model) if number < len(packs) - 1 else contextlib.nullcontext()
        with in_between:
            with accelerator.autocast():
                loss, terms = model(**pack.inputs(processor, accelerator.device, compact_images=True))
            accelerator.backward(loss / as_many_packs)
        for name, term in {"loss": loss, **terms}.items():
            means[name] = means.get(name, 0) + term.detach() / as_many_packs
    return means, sum(views)
