"""Command lines of all scripts: options, YAML files, and mistakes that end in one line and exit code 2."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, get_args

import jsonargparse
import yaml
from safetensors import SafetensorError

from .errors import InputError
from .scan_m3ret import M3RetReadError


jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


# jsonargparse's message about a value of the wrong type: option, value
WRONG_VALUE = re.compile(r'Parser key "(\w+)":.*(?:Got|Given) value: (.*)', re.DOTALL)

# a float where an integer is expected: the error then states the integer to write
FLOAT_FOR_INTEGER = re.compile(r"expected int\b.*, got ([\d.]+(?:e\+?\d{1,2})?)\.", re.IGNORECASE | re.DOTALL)

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class YamlLoader(yaml.SafeLoader):
    """Read YAML with the numbers of version 1.2, where 1e-4 is a float; a whole number such as 1e5 is an integer.

    A repeated key is an error; PyYAML would use the last one without a warning.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [key for number, key in enumerate(keys) if key in keys[:number]]:
            problem = f"expected each key once, got {repeated[0]!r} twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_float(self, node: Any) -> float:
        value = super().construct_yaml_float(node)
        is_whole = "e" in node.value.lower() and value.is_integer() and abs(value) < MAX_EXACT_FLOAT
        return int(value) if is_whole else value


MAX_EXACT_FLOAT = 2**53  # larger whole numbers are rounded in a float
FLOAT_WITH_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
YamlLoader.add_constructor("tag:yaml.org,2002:float", YamlLoader.construct_yaml_float)
YamlLoader.yaml_implicit_resolvers = {  # dates stay text, as in jsonargparse
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT_WITH_EXPONENT, list("-+0123456789"))


def load_yaml(text: str) -> Any:
    """Return the value of an option or the content of a YAML file. Text such as "name:" stays text."""
    value = yaml.load(text, Loader=YamlLoader)
    is_mapping = isinstance(value, dict) and bool(value) and "\n" not in text.strip()
    return text if is_mapping and all(item is None for item in value.values()) else value


jsonargparse.set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))


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

    def parse_args(  # type: ignore[override]  # argparse has overloads
        self, args: Sequence[str] | None = None, *positional: Any, **settings: Any
    ) -> Any:
        """Parse as jsonargparse does, but take 1e5 for 100000 where an integer is expected."""
        integers: set[str] = set()
        for action in self._actions:
            hint = getattr(action, "_typehint", action.type)
            if int in (hint, *get_args(hint)):
                integers.update(action.option_strings)
        words = [*(sys.argv[1:] if args is None else args)]
        for number, word in enumerate(words):
            option, separator, value = word.partition("=") if "=" in word else (words[number - 1], "", word)
            if option in integers and FLOAT_WITH_EXPONENT.fullmatch(value):
                words[number] = f"{option}{separator}" * bool(separator) + str(load_yaml(value))
        return super().parse_args(words, *positional, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # this parser reads a mapping in a list; that of the command reports the error
            super().error(message, ex)
        if wrong_value := WRONG_VALUE.fullmatch(message):
            key, value = wrong_value.groups()
            message = f"{key}: expected {self._type_name(key)}, got {value}."
        number = FLOAT_FOR_INTEGER.search(message)
        if number and (value := float(number[1])).is_integer():
            message += f" Write {int(value)}."
        exit_with_error(self.prog, f"{message} (see --help)")

    def _type_name(self, key: str) -> str:
        """Return the type of an option in words: `float or null`, `one of ['mae', 'simdino']`."""
        hint = next(getattr(action, "_typehint", action.type) for action in self._actions if action.dest == key)
        name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
        return name.replace("typing.Literal", "one of ").replace("typing.", "").replace(" | None", " or null")


class _Help(jsonargparse.DefaultHelpFormatter):
    """Keep the line breaks of the description; add type and default to every option."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


@contextmanager
def user_errors(prog: str) -> Iterator[None]:
    """Turn an exception that the user can act on into one line on stderr and exit code 2.

    These are `InputError`, `M3RetReadError`, files or folders that are missing or not readable, and a disk that is full
    or read-only. Any other exception is a fault of the program and keeps its traceback.
    """
    try:
        yield
    except (InputError, M3RetReadError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        exit_with_error(prog, str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        exit_with_error(
            prog, f"cannot write {error.filename or 'a file'}: {error.strerror}. Free space, or write elsewhere."
        )
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # it wraps the error of the operating system in text
        if number is None or int(number[1]) not in DISK_ERRORS:
            raise
        exit_with_error(prog, f"cannot write weights: {os.strerror(int(number[1]))}. Free space, or write elsewhere.")


def printable(text: str) -> str:
    """Return a text that every stream can print: names of files may hold bytes that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def exit_with_error(prog: str, message: str) -> NoReturn:
    """Print `prog: error: message` as one line, once per machine of a distributed run, and exit with code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
