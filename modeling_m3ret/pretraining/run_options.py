"""Command line and YAML file of a pretraining run.

Apart from `run_config`, because a machine that trains without a command line needs no jsonargparse.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import fields
from itertools import zip_longest

from ..command_line import CommandLine
from .run_config import RunConfig


TYPES = {entry.name: str(entry.type) for entry in fields(RunConfig)}  # annotations, as written


@functools.cache  # building it takes longer than parsing
def run_config_parser(description: str | None) -> CommandLine:
    """Return the parser of all options and of `--config`."""
    parser = CommandLine(description)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    for group in RunConfig.__bases__:
        parser.add_class_arguments(group)
    return parser


def parse_run_config(arguments: Sequence[str], description: str | None = None) -> RunConfig:
    """Parse `--config FILE.yaml` and `--key value` options; options override the file.

    A list or mapping is given as YAML: `--exclude_modalities "[mri, ct]"`, `--model "{mask_ratio: 0.9}"`. A boolean
    option may stand alone: `--resume`.

    Raises:
        SystemExit: with status 2, after one line on standard error, if an option is unknown or its value of wrong type.
        ConfigError: if a value is out of range, or two options contradict each other.
    """
    values = run_config_parser(description).parse_args(with_explicit_flags(arguments)).as_dict()
    del values["config"]
    return RunConfig(**values)


def with_explicit_flags(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `--flag` expanded to `--flag=true` and `--config` first, so options override it."""
    flags = {f"--{name}" for name, annotation in TYPES.items() if annotation == "bool"}
    expanded = [
        f"{argument}=true" if argument in flags and (following is None or following.startswith("--")) else argument
        for argument, following in zip_longest(arguments, arguments[1:])
        if argument is not None
    ]
    if "--config" in expanded:
        index = expanded.index("--config")
        return [*expanded[index : index + 2], *expanded[:index], *expanded[index + 2 :]]
    return expanded
