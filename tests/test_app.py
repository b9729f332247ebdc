"""`python app.py`: which checkpoint it takes, what it says when there is none, and the small one that it trains."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config
from processes import Script

from modeling_m3ret import M3RetImageProcessor, M3RetModel


pytest.importorskip("gradio", reason="the Space needs gradio: pip install m3ret[app]")

from modeling_m3ret.space.quickstart import newest_checkpoint, train_small


ROOT = Path(__file__).parents[1]
PATIENCE = 300.0  # s, of a machine that is busy with other things


def test_without_a_checkpoint_it_says_so_and_what_to_do(tmp_path: Path) -> None:
    app = Script([str(ROOT / "app.py")], tmp_path)
    assert app.finish() == 1
    assert "There is no checkpoint here" in app.printed
    assert "--quickstart" in app.printed
    assert "Traceback" not in app.printed
    assert not [path for path in tmp_path.iterdir() if path != app.printed_to], "nothing was made"


def test_a_password_needs_a_user(tmp_path: Path) -> None:
    app = Script([str(ROOT / "app.py"), "--auth", "secret"], tmp_path)
    assert app.finish() == 2
    assert "expected USER:PASSWORD" in app.printed


def test_without_a_tunnel_it_says_so_and_stays_here(tmp_path: Path) -> None:
    """Gradio's server is asked through a proxy that refuses: as it is where there is no network."""
    model, processor = M3RetModel(tiny_config()), M3RetImageProcessor(size=48, num_frames=8)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "m3ret-tiny")
    np.save(tmp_path / "scan.npy", np.eye(64, dtype=np.uint8) * 200)
    (tmp_path / "manifest.csv").write_text("id,file,modality,anatomy,label,group\n1,scan.npy,xray,chest,,\n")
    with socket.socket() as refusing, socket.socket() as free:
        for own in (refusing, free):
            own.bind(("127.0.0.1", 0))  # but nobody listens
        port = free.getsockname()[1]
        free.close()
        nowhere = f"http://127.0.0.1:{refusing.getsockname()[1]}"
        proxies = {name: nowhere for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
        own_host = {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}
        environment = os.environ | proxies | own_host | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf_home")}
        command = [sys.executable, str(ROOT / "app.py"), "--gallery", ".", "--share", "--port", str(port)]
        app = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            assert app.stderr is not None
            told = next(line for line in app.stderr if "public address" in line)  # at once, while the page lives
            assert f"No public address could be made (above: why). The page goes on at http://127.0.0.1:{port}/" in told
            assert urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=PATIENCE).status == 200
        finally:
            app.terminate()
            app.communicate(timeout=PATIENCE)
        assert app.returncode == 0, "stopped as by Ctrl-C"


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
