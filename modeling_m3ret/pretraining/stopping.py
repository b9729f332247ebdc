"""Reasons to stop a run before its last step: SIGTERM, and a loss or gradient that is not finite."""

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


# a scheduler's signal and the copy that the launcher forwards arrive together; a person's second signal comes later
SAME_REQUEST_SECONDS = 5.0


class StopSignal:
    """Record SIGTERM, which schedulers send before SIGKILL. The training loop asks for it after each step.

    A second signal, more than `SAME_REQUEST_SECONDS` after the first, ends the process at once.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._received_at: float | None = None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._received_at = self._received_at or now
        if now - self._received_at > SAME_REQUEST_SECONDS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self) -> bool:
        """Return whether any rank received the signal. All ranks get the same answer and stop after the same step."""
        if self._accelerator.num_processes == 1:
            return self._received_at is not None
        received = torch.tensor(float(self._received_at is not None), device=self._accelerator.device)
        return bool(self._accelerator.reduce(received, "sum") > 0)


def stop_if_not_finite(
    accelerator: Accelerator,
    loss: Tensor,
    gradient_norm: Tensor,
    step: int,
    packs: Sequence[Pack],
    records: Sequence[Record],
    run_dir: Path,
) -> None:
    """Check loss and gradient before the optimiser step, so that the weights of the last good step stay intact.

    All ranks must call it together, each with its own loss and packs. `step` counts completed steps. The report
    `run_dir/not_finite.json` lists the scans of this step on each rank, and those whose own values are not finite.

    Raises:
        FloatingPointError: on every rank, if the loss of any rank or the gradient is not finite.
    """
    bad = ~(torch.isfinite(loss.detach()) & torch.isfinite(gradient_norm))
    if not accelerator.reduce(bad.float(), "sum") > 0:
        return
    scans = sorted({records[index].id for pack in packs for index in pack.scans})
    not_finite = sorted({records[index].id for pack in packs for index in _not_finite(pack)})
    this_rank = {"rank": accelerator.process_index, "loss": repr(loss.item()), "scans": scans, "not_finite": not_finite}
    ranks = gather_object([this_rank])
    file = run_dir / "not_finite.json"
    if accelerator.is_main_process:
        report = {"step": step + 1, "gradient_norm": repr(float(gradient_norm)), "ranks": ranks}
        atomic_write_text(file, json.dumps(report, indent=2) + "\n")
    named = sorted({scan for rank in ranks for scan in rank["not_finite"]})
    cause = f"Scans with values that are not finite: {', '.join(named)}." if named else "All input values are finite."
    raise FloatingPointError(
        f"step {step + 1}: loss or gradient is not finite. The weights were not updated. {cause} See {file} and "
        "docs/training.md, 'Not finite'."
    )


def _not_finite(pack: Pack) -> list[int]:
    volumes = pack.values.split([torch.Size(shape).numel() for shape in pack.shapes])
    return [scan for scan, volume in zip(pack.scans, volumes, strict=True) if not volume.isfinite().all()]
