"""Command lines of all scripts: options, YAML files, and mistakes that end in one line and exit code 2."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jsonargparse

from .errors import InputError
from .scan_m3ret import M3RetReadError


jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


# jsonargparse's message about a value of the wrong type: option, type, value
WRONG_VALUE = re.compile(
    r"""Parser key "(\w+)":\s+Expected an? (?:<class ')?(.+?)(?:'>)?\. Got value: (.*)""", re.DOTALL
)


# jsonargparse reads 1e5 as a float and has no public way to convert it: the error says what to write
FLOAT_FOR_INTEGER = re.compile(r"expected int\b.*, got ([\d.]+(?:e\+?\d{1,2})?)\.", re.IGNORECASE | re.DOTALL)


class CommandLine(jsonargparse.ArgumentParser):
    """`argparse.ArgumentParser` with typed options, dataclasses and YAML files, whose errors are one line.

    Options come from `add_argument`, as in argparse, or from `add_class_arguments(Dataclass)`, where the docstring
    under each field is its help. `add_argument("--config", action="config")` reads options from a YAML file.

    Args:
        description: shown by `--help` as it is written.
        prog: name of the command; by default that of the script.
        settings: of jsonargparse, which parses each mapping of a list of dataclasses with a parser of its own.
    """

    def __init__(self, description: str | None = None, prog: str | None = None, **settings: Any):
        usage = "%(prog)s [options]"
        super().__init__(prog=prog, usage=usage, description=description, formatter_class=_Help, **settings)
        self.allow_abbrev = False

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # of a mapping in a list: the parser of the whole command reports it
            super().error(message, ex)
        if wrong_value := WRONG_VALUE.fullmatch(message):
            key, expected, value = wrong_value.groups()
            message = f"{key}: expected {expected.replace('typing.Literal', 'one of ')}, got {value}."
        number = FLOAT_FOR_INTEGER.search(message)
        if number and (value := float(number[1])).is_integer():
            message += f" Write {int(value)}."
        exit_with_error(self.prog, f"{message} (see --help)")


class _Help(jsonargparse.DefaultHelpFormatter):
    """Keep the line breaks of the description; add type and default to every option."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


@contextmanager
def user_errors(prog: str) -> Iterator[None]:
    """Turn an exception that the user can act on into one line on stderr and exit code 2.

    These are `InputError`, `M3RetReadError`, and files or folders that are missing or not readable. Any other exception
    is a fault of the program and keeps its traceback.
    """
    try:
        yield
    except (InputError, M3RetReadError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        exit_with_error(prog, str(error))


def exit_with_error(prog: str, message: str) -> NoReturn:
    """Print `prog: error: message` as one line, once per machine of a distributed run, and exit with code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
