"""The `m3ret` console command, run in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config

from modeling_m3ret import M3RetImageProcessor, M3RetModel, __version__, cli


def run(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["m3ret", *map(str, argv)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "m3ret-tiny"
    M3RetModel(tiny_config()).save_pretrained(folder)
    M3RetImageProcessor(size=64).save_pretrained(folder)
    return folder


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in cli.COMMANDS)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help_of_its_own(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    assert f"m3ret {command}" in capsys.readouterr().out


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.split() == ["m3ret", __version__]


@pytest.mark.parametrize("argv", [(), ("embde",), ("embed", "scan.npy"), ("embed", "--modle", "x")])
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_embed_saves_the_embeddings_of_the_files_that_can_be_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = [tmp_path / "image.npy", tmp_path / "broken.npy", tmp_path / "volume.npy"]
    np.save(scans[0], np.random.default_rng(0).random((40, 40), dtype=np.float32))
    np.save(scans[2], np.random.default_rng(1).random((8, 40, 40), dtype=np.float32))
    scans[1].write_bytes(b"not an array")
    output = tmp_path / "embeddings.npz"
    assert run(monkeypatch, "embed", "--model", checkpoint, *scans, "--output", output) == 0
    assert "broken.npy" in capsys.readouterr().err
    saved = np.load(output)
    assert saved["files"].tolist() == [str(scans[0]), str(scans[2])]
    model, processor = M3RetModel.from_pretrained(checkpoint).eval(), M3RetImageProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = model.embed_scans(**processor([scans[0], scans[2]], return_tensors="pt"))
    np.testing.assert_allclose(saved["embeddings"], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("wrong", ["model", "output", "scan"])
def test_embed_names_the_argument_that_is_wrong(
    wrong: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "scan.npy", np.zeros((40, 40), dtype=np.float32))
    given = {"model": checkpoint, "output": tmp_path / "out.npz", "scan": tmp_path / "scan.npy"}
    given[wrong] = tmp_path / "missing" / "file.npz"
    argv = ("embed", given["scan"], "--model", given["model"], "--output", given["output"])
    assert run(monkeypatch, *argv) == 2
    assert str(given[wrong]) in capsys.readouterr().err or wrong == "scan"
    assert not given["output"].exists()
