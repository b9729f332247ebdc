"""`python app.py`: its checkpoint and its errors."""

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

from modeling_m3ret import M3RetImageProcessor, M3RetModel


pytest.importorskip("gradio", reason="the Space needs gradio: pip install m3ret[app]")

from app import SHIPPED, find_checkpoint, parse_arguments
from modeling_m3ret.errors import InputError


ROOT = Path(__file__).parents[1]
TIMEOUT = 300.0  # s; generous, for a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small checkpoint and a gallery of one scan."""
    folder = tmp_path_factory.mktemp("app")
    M3RetModel(tiny_config()).save_pretrained(folder / "m3ret-tiny")
    M3RetImageProcessor(size=48, num_frames=8).save_pretrained(folder / "m3ret-tiny")
    np.save(folder / "scan.npy", np.eye(64, dtype=np.uint8) * 200)
    (folder / "manifest.csv").write_text("id,file,modality,anatomy,label,group\n1,scan.npy,xray,chest,,\n")
    return folder


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf_home")}
    command = [sys.executable, str(ROOT / "app.py"), *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--modle", "m3ret-tiny"], "--modle"),
        (["--port", "many"], "port"),
        (["--port", "70000"], "port"),
        (["--port", "1e3"], "port"),
        (["--auth", "secret"], "auth"),
        (["--auth", ":secret"], "auth"),
        (["--mod", "m3ret-tiny"], "--mod"),
        (["--share", "stray"], "stray"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(
    options: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(options)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("app.py: error: ")
    assert name in line
    assert "secret" not in line


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "python app.py --model" in printed
    for name in ("model", "gallery", "show_labels", "port", "share", "auth", "push_to_hub"):
        assert f"--{name}" in printed


def test_options_are_parsed() -> None:
    arguments = parse_arguments(["--auth", "user:pass:word", "--port", "8080"])
    assert (arguments.auth, arguments.port, arguments.model) == (("user", "pass:word"), 8080, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--model", "no-such-folder"], "no-such-folder"),
        (["--model", "m3ret-tiny", "--gallery", "no-such-folder"], "no-such-folder"),
        (["--model", "m3ret-tiny", "--gallery", "m3ret-tiny"], "manifest.csv"),
        (["--model", "no-such-folder", "--gallery", "phantom:many"], "phantom"),
        (["--model", "m3ret-tiny", "--gallery", "m3ret-tiny/config.json"], "config.json"),
    ],
)
def test_a_missing_folder_is_one_line_that_names_it(options: list[str], name: str, folder: Path) -> None:
    ran = run(folder, *options)
    assert ran.returncode == 2, ran.stderr
    assert len(ran.stderr.splitlines()) == 1, "no checkpoint is loaded first: its progress bar would be shown"
    assert name in ran.stderr


@pytest.mark.slow
def test_without_a_tunnel_it_serves_locally(folder: Path) -> None:
    """All requests to other servers go through a proxy that refuses them, as without a network."""
    with socket.socket() as refusing, socket.socket() as free:
        for probe in (refusing, free):
            probe.bind(("127.0.0.1", 0))  # bound but not listening
        port = free.getsockname()[1]
        free.close()
        proxy = f"http://127.0.0.1:{refusing.getsockname()[1]}"
        proxies = {name: proxy for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
        local = {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}
        environment = os.environ | proxies | local | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf_home")}
        command = [
            sys.executable,
            str(ROOT / "app.py"),
            "--model",
            "m3ret-tiny",
            "--gallery",
            ".",
            "--share",
            "--port",
            str(port),
        ]
        app = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            assert app.stderr is not None
            address = f"http://127.0.0.1:{port}"
            assert any(address in line for line in app.stderr), "it prints the local address, unasked"
            assert urllib.request.urlopen(address, timeout=TIMEOUT).status == 200
        finally:
            app.terminate()
            app.communicate(timeout=TIMEOUT)
        assert app.returncode == 0, "SIGTERM stops it like Ctrl-C"


def test_the_shipped_checkpoint_is_used_and_else_the_newest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--model"):
        find_checkpoint(tmp_path, tmp_path)
    for age, name in enumerate(("m3ret-b", "m3ret-a", "other", "m3ret-c", f"project/{SHIPPED}")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "config.json", (1e9 - age, 1e9 - age))
    (tmp_path / "m3ret-empty").mkdir()
    assert find_checkpoint(tmp_path / "elsewhere", tmp_path) == tmp_path / "m3ret-b"
    assert find_checkpoint(tmp_path / "project", tmp_path) == tmp_path / "project" / SHIPPED
