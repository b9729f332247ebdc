"""What a run says reaches the tracker too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from modeling_m3ret.pretraining.run_log import RunLog


def test_an_alarm_reaches_file_and_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    tracked: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr(accelerator, "log", lambda values, step: tracked.append((step, values)))
    log = RunLog(tmp_path, accelerator)
    log.numbers(3, {"loss": 0.5})
    log.alarm(3, "features are collapsing")
    assert tracked == [(3, {"loss": 0.5}), (3, {"alarm": 1})]
    lines = [json.loads(line) for line in log.metrics_file.read_text().splitlines()]
    assert lines == [{"step": 3, "loss": 0.5}, {"step": 3, "alarm": "features are collapsing"}]
