"""Checkpoints of an evaluation: their names in the table, and names that are no checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from modeling_m3ret.errors import InputError
from modeling_m3ret.evaluation.checkpoints import load_checkpoint, method_titles


def test_titles_are_unique_and_hold_no_folder() -> None:
    assert method_titles(["runs/a/step-1"], ["org/dino"]) == ["trained", "dino"]
    assert method_titles(["a/step-1", "b/step-1"], ["org/pixels"]) == ["step-1 (1)", "step-1 (2)", "pixels (3)"]


def test_a_missing_checkpoint_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="missing-model"):
        load_checkpoint("missing-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        load_checkpoint("empty")
