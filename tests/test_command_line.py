"""Mistakes on the command line end in one line and exit code 2; faults of the program keep their traceback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from modeling_m3ret.command_line import CommandLine, user_errors
from modeling_m3ret.errors import InputError
from modeling_m3ret.hub import load_pretrained
from modeling_m3ret.scan_m3ret import M3RetReadError


@dataclass
class Options:
    """Options of the test."""

    steps: int = 5
    """Number of steps."""


@pytest.fixture
def parser() -> CommandLine:
    parser = CommandLine("Two lines\nof text.", prog="command")
    parser.add_argument("--config", action="config", help="YAML file")
    parser.add_class_arguments(Options)
    return parser


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--stesp", "3"], "--stesp"),
        (["--steps", "many"], "steps: expected int, got many"),
        (["--steps", "1e5"], "Write 100000."),
        (["--steps=2.0"], "Write 2."),
        (["--steps", "2.5"], "steps: expected int, got 2.5. (see"),
        (["--step", "3"], "--step"),  # options are not abbreviated
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    parser: CommandLine, argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(argv)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("command: error: ")
    assert named in printed.err


def test_a_misspelt_key_of_a_yaml_file_is_named(
    parser: CommandLine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("stesp: 3\n")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--config", str(tmp_path / "run.yaml")])
    printed = capsys.readouterr().err
    assert (ended.value.code, len(printed.splitlines())) == (2, 1)
    assert "stesp" in printed


def test_help_shows_docstring_type_and_default_of_a_field(
    parser: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert "Two lines\nof text." in printed
    assert "Number of steps." in printed
    assert "int, default: 5" in printed


@pytest.mark.parametrize(
    "error",
    [
        lambda path: InputError(f"{path}: expected a folder"),
        lambda path: M3RetReadError(str(path), "unsupported", "a scan", "text"),
        lambda path: path.read_bytes(),
        lambda path: list((Path(__file__) / path.name).iterdir()),
    ],
)
def test_errors_of_the_user_end_in_one_line(
    error: Callable[[Path], Exception], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, user_errors("command"):
        raise error(tmp_path / "missing")
    printed = capsys.readouterr().err
    assert (ended.value.code, len(printed.splitlines())) == (2, 1)
    assert "missing" in printed


def test_faults_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), user_errors("command"):
        _ = 1 / 0


def test_only_the_first_process_of_a_machine_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended, user_errors("command"):
        raise InputError("expected another folder")
    assert (ended.value.code, capsys.readouterr().err) == (2, "")


def test_a_checkpoint_of_another_model_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    for name in (str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises(InputError) as raised:
            load_pretrained(name)
        assert name in str(raised.value)
