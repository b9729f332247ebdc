"""When a run ends before its last step: asked to by SIGTERM, or because a number is not finite."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..atomic_io import atomic_write_text
from ..data.collection import Record
from ..data.loading import Pack


# a scheduler's signal and the launcher's, which passes it on, come at once; a person's second one comes later
ONE_REQUEST_SECONDS = 5.0


class StopSignal:
    """SIGTERM, which schedulers send before they kill, is noted; the loop asks after each step.

    One that comes more than `ONE_REQUEST_SECONDS` after the first ends the process at once.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._heard_at: float | None = None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._heard_at = self._heard_at or now
        if now - self._heard_at > ONE_REQUEST_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self) -> bool:
        """Whether any rank was asked: all ranks get one answer, and leave after the same step."""
        if self._accelerator.num_processes == 1:
            return self._heard_at is not None
        heard = torch.tensor(float(self._heard_at is not None), device=self._accelerator.device)
        return bool(self._accelerator.reduce(heard, "sum") > 0)


def stop_if_not_finite(
    accelerator: Accelerator,
    loss: Tensor,
    gradient_norm: Tensor,
    step: int,
    packs: Sequence[Pack],
    records: Sequence[Record],
    run_dir: Path,
) -> None:
    """Ask before the optimiser steps, on all ranks at once; weights stay as they were after the last good step.

    Raises:
        FloatingPointError: on every rank, if loss or gradient of any is not finite. The scans of the step are written
            to `not_finite.json` in the run's folder first; those whose own values are not finite are named.
    """
    bad = ~(torch.isfinite(loss.detach()) & torch.isfinite(gradient_norm))
    if not accelerator.reduce(bad.float(), "sum") > 0:
        return
    scans = sorted({records[index].id for pack in packs for index in pack.scans})
    poisoned = sorted({records[index].id for pack in packs for index in _not_finite(pack)})
    own = {"rank": accelerator.process_index, "loss": repr(loss.item()), "scans": scans, "not_finite": poisoned}
    report = run_dir / "not_finite.json"
    ranks = gather_object([own])
    if accelerator.is_main_process:
        told = {"step": step + 1, "gradient_norm": repr(float(gradient_norm)), "ranks": ranks}
        atomic_write_text(report, json.dumps(told, indent=2) + "\n")
    named = sorted({scan for rank in ranks for scan in rank["not_finite"]})
    cause = (
        f"values that are not finite come with {', '.join(named)}" if named else "all values that came in are finite"
    )
    raise FloatingPointError(
        f"step {step + 1}: loss or gradient is not finite; nothing was updated. {cause}; the scans of the step are in "
        f"{report}"
    )


def _not_finite(pack: Pack) -> list[int]:
    volumes = pack.values.split([torch.Size(shape).numel() for shape in pack.shapes])
    return [scan for scan, volume in zip(pack.scans, volumes, strict=True) if not volume.isfinite().all()]
