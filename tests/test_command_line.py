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
    rate: float = 0.5
    """Learning rate."""
    name: str = "x"
    """Name of the run."""


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
        (["--steps", "1.5e0"], "steps: expected int, got 1.5"),
        (["--steps", "1e-5"], "steps: expected int"),
        (["--steps", "1e400"], "steps: expected int"),
        (["--steps", "nan"], "steps: expected int"),
        (["--steps", "true"], "steps: expected int"),
        (["--steps", "[1]"], "steps: expected int"),
        (["--steps", ""], "steps: expected int"),
        (["--rate", "fast"], "rate: expected float"),
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


@pytest.mark.parametrize(
    ("text", "value"), [("1e5", 100_000), ("1E+5", 100_000), ("1.5e3", 1500), ("100_000", 100_000), ("-2e0", -2)]
)
def test_whole_numbers_may_have_an_exponent(parser: CommandLine, text: str, value: int, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"steps: {text}\n")
    for argv in ([f"--steps={text}"], ["--config", str(tmp_path / "run.yaml")]):
        steps = parser.parse_args(argv).steps
        assert (steps, type(steps)) == (value, int)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1e0", 1.0), ("1.5e+2", 150.0), ("2", 2.0), (".5", 0.5)])
def test_floats_may_have_an_exponent(parser: CommandLine, text: str, value: float, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"rate: {text}\n")
    for argv in ([f"--rate={text}"], ["--config", str(tmp_path / "run.yaml")]):
        rate = parser.parse_args(argv).rate
        assert (rate, type(rate)) == (value, float)


@pytest.mark.parametrize("text", ["1e5", "2024-01-31", "a:", "{a, b}", "007", "yes"])
def test_text_stays_text(parser: CommandLine, text: str) -> None:
    assert parser.parse_args([f"--name={text}"]).name == text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("steps: 3\nrate: 0.5\nsteps: 4\n", "steps"),  # the last one would be used in silence
        ("steps: {a: 1}\n", "steps"),
        ("steps: [3]\n", "steps"),
        ("steps: '3 steps'\n", "steps"),
        ("steps:\n", "steps"),
        ("- steps\n", ""),
        ("steps: 3\n  rate: 2\n", ""),
        ("steps: !!python/object/apply:os.getcwd []\n", ""),
        ("\tsteps: 3\n", ""),
        ("name: 7\n", "name"),
        ("rate: yes\n", "rate"),
    ],
)
def test_a_yaml_file_with_a_mistake_is_refused_in_one_line(
    parser: CommandLine, text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--config", str(tmp_path / "run.yaml")])
    printed = capsys.readouterr().err
    assert (ended.value.code, len(printed.splitlines())) == (2, 1)
    assert named in printed


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
