"""The `m3ret` console command: one name for the commands that an installed package offers."""

from __future__ import annotations

import sys
from importlib import import_module

from .command_line import CommandLine
from .version import __version__


# command: module with a `main()` that reads `sys.argv`, and what it does
COMMANDS = {
    "embed": ("modeling_m3ret.embed", "Embed a folder, a dataset or files, and save one vector per scan as Parquet"),
    "index": ("modeling_m3ret.index_command", "Build a search index from embeddings"),
    "search": ("modeling_m3ret.search_command", "Find the scans of an index that are most similar to a scan"),
    "convert": ("modeling_m3ret.convert_command", "Convert a published 2D vision transformer to an encoder of scans"),
    "export": ("modeling_m3ret.export", "Export an encoder as an ONNX graph or a torch.export program"),
    "build": ("dataset_scripts.build", "Build a de-identified Parquet dataset from a folder or a known collection"),
    "combine": (
        "dataset_scripts.combine",
        "Combine folders of scans into one collection with splits, without duplicates",
    ),
    "phantom": ("dataset_scripts.make_phantom", "Write the synthetic phantom collection"),
}
DESCRIPTION = """Embed and search medical scans of any kind.

commands:
{commands}

`m3ret COMMAND --help` describes one command. In a clone of the repository, train.py pretrains an encoder,
eval_retrieval.py measures retrieval, and app.py opens the search page.
"""


def main() -> None:
    """Run the command that `sys.argv` names."""
    listing = "\n".join(f"  {name:10}{summary}" for name, (_, summary) in COMMANDS.items())
    parser = CommandLine(DESCRIPTION.format(commands=listing), prog="m3ret")
    parser.add_argument("command", choices=list(COMMANDS), help="command to run; its own options follow")
    parser.add_argument("--version", action="version", version=f"m3ret {__version__}")
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv = [f"m3ret {command}", *sys.argv[2:]]
    import_module(COMMANDS[command][0]).main()


if __name__ == "__main__":
    main()
