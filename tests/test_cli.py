"""The `m3ret` console command, run in this process."""

from __future__ import annotations

import sys

import pytest

from modeling_m3ret import __version__, cli


def run(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["m3ret", *map(str, argv)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


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
