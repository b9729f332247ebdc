"""`python app.py`: which checkpoint it takes, what it says when there is none, and the small one that it trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("gradio", reason="the Space needs gradio: pip install m3ret[app]")

from modeling_m3ret.space.quickstart import newest_checkpoint, train_small


ROOT = Path(__file__).parents[1]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf_home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "app.py"), *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_without_a_checkpoint_it_says_so_and_what_to_do(tmp_path: Path) -> None:
    ran = run(tmp_path)
    assert ran.returncode == 1
    assert "There is no checkpoint here" in ran.stderr
    assert "--quickstart" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not list(tmp_path.iterdir()), "nothing was made"


def test_a_password_needs_a_user(tmp_path: Path) -> None:
    ran = run(tmp_path, "--auth", "secret")
    assert ran.returncode == 2
    assert "expected USER:PASSWORD" in ran.stderr


def test_the_newest_checkpoint_is_taken(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for age, name in enumerate(("m3ret-b", "m3ret-a", "other", "m3ret-c")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "config.json", (1e9 - age, 1e9 - age))
    (tmp_path / "m3ret-empty").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "m3ret-b"


def test_quickstart_trains_what_the_app_then_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model = "{num_hidden_layers: 1, hidden_size: 48, num_attention_heads: 4, intermediate_size: 96}"
    small = {"data": "phantom:6", "model": model, "size": 32, "steps": 2, "batch_size": 2, "num_workers": 0}
    train_small(ROOT, [word for key, value in small.items() for word in (f"--{key}", str(value))])
    assert newest_checkpoint() == Path("m3ret-smoke")


def test_without_the_project_there_is_nothing_to_train_with(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="give --model"):
        train_small(tmp_path)
