"""Metrics, warnings, summary and training curves of a run, in its folder and in an experiment tracker."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..atomic_io import append_json_line, atomic_write, atomic_write_text


logger = logging.getLogger(__name__)


class RunLog:
    """Write the log of a run. Only the main process writes; calls of other processes do nothing.

    Files are strict JSON: a number that is not finite is written as null. Lines of steps after `step`, written after
    the checkpoint that this start resumes from, are removed.
    """

    def __init__(self, run_dir: Path, accelerator: Accelerator, step: int = 0):
        self.run_dir, self.accelerator = run_dir, accelerator
        self.metrics_file = run_dir / "metrics.jsonl"
        if accelerator.is_main_process:
            run_dir.mkdir(parents=True, exist_ok=True)
            retained = [entry for entry in self.entries() if entry["step"] <= step]
            atomic_write_text(self.metrics_file, "".join(json.dumps(finite(entry)) + "\n" for entry in retained))
            (run_dir / "summary.json").unlink(missing_ok=True)

    def entries(self) -> list[dict[str, Any]]:
        """Return all lines so far, without those that an interrupted process left incomplete."""
        if not self.metrics_file.is_file():
            return []
        entries = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                entries.append(json.loads(line))
        return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)]

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line to `metrics.jsonl` and send it to the tracker."""
        self.accelerator.log(dict(metrics), step=step)
        if self.accelerator.is_main_process:
            append_json_line(self.metrics_file, finite({"step": step, **metrics}))

    def log_alarm(self, step: int, message: str) -> None:
        """Print a warning and record it in `metrics.jsonl`, the tracker and the summary."""
        self.accelerator.log({"alarm": 1}, step=step)  # trackers accept only numbers
        if self.accelerator.is_main_process:
            logger.warning("step %d: %s", step, message)
            append_json_line(self.metrics_file, {"step": step, "alarm": message})

    def write_summary(self, finished: bool, facts: Mapping[str, Any]) -> None:
        """Write `summary.json` (facts of the run, last value of every metric, all alarms) and `curves.png`."""
        if not self.accelerator.is_main_process:
            return
        entries = self.entries()
        last = {name: value for entry in entries for name, value in entry.items() if name != "alarm"}
        alarms = [entry for entry in entries if "alarm" in entry]
        text = json.dumps(finite({"finished": finished, **facts, "last": last, "alarms": alarms}), indent=2)
        atomic_write_text(self.run_dir / "summary.json", text + "\n")
        plot_curves(entries, self.run_dir / "curves.png")


def finite(value: Any) -> Any:
    """Return the value with None for numbers that are not finite, which JSON cannot represent, at any depth."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot_curves(entries: list[dict[str, Any]], path: Path) -> None:
    """Plot each metric that was logged at least twice, in a panel of its own; held-out mAPs share one."""
    import matplotlib.figure  # takes a second to import

    def curve(name: str) -> tuple[list[int], list[float]]:
        points = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    names = list(dict.fromkeys(name for entry in entries for name in entry if name not in ("step", "alarm")))
    panels: dict[str, list[str]] = {}
    for name in names:
        if name not in ("views", "seconds") and len(curve(name)[0]) >= 2:
            panels.setdefault("held-out mAP" if name.startswith("held_out/mAP/") else name, []).append(name)
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = matplotlib.figure.Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    for axes, (title, members) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items(), strict=False):
        for name in members:
            axes.plot(*curve(name), label=name.removeprefix("held_out/mAP/"))
        axes.set(title=title, xlabel="step")
        if len(members) > 1:
            axes.legend(fontsize="small")
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=100)
