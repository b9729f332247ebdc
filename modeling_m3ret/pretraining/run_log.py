"""What a run says on its way: lines in `metrics.jsonl`, the tracker, warnings, and at its end a summary and curves."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..atomic_io import append_json_line, atomic_write_text


logger = logging.getLogger(__name__)


class RunLog:
    """Written by the main process; the calls of others do nothing.

    Args:
        step: where the run begins. Lines of later steps, left by one that was killed after its last checkpoint, go.
    """

    def __init__(self, run_dir: Path, accelerator: Accelerator, step: int = 0):
        self.run_dir = run_dir
        self.accelerator = accelerator
        self.metrics_file = run_dir / "metrics.jsonl"
        if accelerator.is_main_process:
            run_dir.mkdir(parents=True, exist_ok=True)
            kept = [entry for entry in self.entries() if entry["step"] <= step]
            atomic_write_text(self.metrics_file, "".join(json.dumps(entry) + "\n" for entry in kept))
            (run_dir / "summary.json").unlink(missing_ok=True)

    def entries(self) -> list[dict[str, Any]]:
        """All lines so far; a last one that a kill cut short is none."""
        if not self.metrics_file.is_file():
            return []
        found = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return found

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """A line in `metrics.jsonl`, and the same to the tracker."""
        self.accelerator.log(dict(numbers), step=step)
        if self.accelerator.is_main_process:
            append_json_line(self.metrics_file, {"step": step, **numbers})

    def alarm(self, step: int, message: str) -> None:
        """A warning that is seen, and stays in `metrics.jsonl` and the summary."""
        self.accelerator.log({"alarm": 1}, step=step)  # trackers take numbers
        if self.accelerator.is_main_process:
            logger.warning("step %d: %s", step, message)
            append_json_line(self.metrics_file, {"step": step, "alarm": message})

    def summary(self, finished: bool, facts: Mapping[str, Any]) -> None:
        """`summary.json` (last value of every number, all alarms, what the run was), and `curves.png`."""
        if not self.accelerator.is_main_process:
            return
        entries = self.entries()
        last: dict[str, Any] = {}
        for entry in entries:
            last |= {name: value for name, value in entry.items() if name != "alarm"}
        alarms = [{"step": entry["step"], "alarm": entry["alarm"]} for entry in entries if "alarm" in entry]
        text = json.dumps({"finished": finished, **facts, "last": last, "alarms": alarms}, indent=2)
        atomic_write_text(self.run_dir / "summary.json", text + "\n")
        plot_curves(entries, self.run_dir / "curves.png")


def plot_curves(entries: list[dict[str, Any]], path: Path) -> None:
    """Loss, its terms, and the held-out numbers over the steps, each that was logged at least twice in a panel."""
    import matplotlib.figure  # a second to load, which `--help` needn't take

    def curve(name: str) -> tuple[list[int], list[float]]:
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
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
    beside = path.with_name(f".{path.name}.partial.png")
    figure.savefig(beside, dpi=100)
    beside.replace(path)
