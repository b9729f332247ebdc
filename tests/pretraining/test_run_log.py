"""The log of a run in its files and in the tracker."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from modeling_m3ret.pretraining.run_log import RunLog


def test_metrics_and_alarms_reach_file_and_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    tracked: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr(accelerator, "log", lambda values, step: tracked.append((step, values)))
    log = RunLog(tmp_path, accelerator)
    log.log_metrics(3, {"loss": 0.5})
    log.log_alarm(3, "features are collapsing")
    assert tracked == [(3, {"loss": 0.5}), (3, {"alarm": 1})]
    lines = [json.loads(line) for line in log.metrics_file.read_text().splitlines()]
    assert lines == [{"step": 3, "loss": 0.5}, {"step": 3, "alarm": "features are collapsing"}]


def test_files_are_strict_json_although_metrics_are_not_finite(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "held_out/rank_me": NaN}\n')  # of an earlier version
    log = RunLog(tmp_path, Accelerator(cpu=True), step=1)
    for step in (2, 3, 4):
        log.log_metrics(step, {"loss": 1 / step, "held_out/rank_me": math.nan if step == 3 else 2.0})
    log.write_summary(True, {"seed": 0, "online": {"mAP": [math.inf]}})
    lines = [json.loads(line, parse_constant=refuse) for line in log.metrics_file.read_text().splitlines()]
    assert [line["held_out/rank_me"] for line in lines] == [None, 2.0, None, 2.0]
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert (summary["finished"], summary["seed"], summary["last"]["step"]) == (True, 0, 4)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_resuming_removes_the_lines_of_later_steps_and_an_incomplete_line(tmp_path: Path) -> None:
    lines = ['{"step": 1}', '{"st{"step": 2}', "5", "null", '{"loss": 2}', "", '{"step": 2}', '{"step": 3}', '{"st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [entry["step"] for entry in RunLog(tmp_path, Accelerator(cpu=True), step=2).entries()] == [1, 2]
