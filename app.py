"""Search a gallery with any scan, in a web browser.

    python app.py                                        # the shipped encoder and its demo gallery
    python app.py --model m3ret-vitb --gallery FOLDER    # a dataset, or the folder of an index
    python app.py --push_to_hub ORG/SPACE                # publish as a private Hugging Face Space

Needs `pip install "m3ret[app]"`. The server accepts connections from this machine only. It serves no local files and
deletes uploads within one hour. See docs/space.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import torch
from jsonargparse.typing import restricted_number_type

from modeling_m3ret.command_line import CommandLine, user_errors
from modeling_m3ret.cpu import prepare_cpu
from modeling_m3ret.errors import InputError
from modeling_m3ret.hub import load_pretrained
from modeling_m3ret.space.gallery import check_gallery, open_gallery
from modeling_m3ret.space.isolation import IsolatedReaders
from modeling_m3ret.space.startup import StartupPage


SHIPPED = "m3ret-vitt"  # checkpoint folder in this repository
Port = restricted_number_type("Port", int, [(">=", 1), ("<=", 65535)])


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandLine(__doc__, prog="app.py")
    add = parser.add_argument
    add(
        "--model",
        type=str,
        help=f"checkpoint folder or Hub id; by default {SHIPPED} beside app.py, or else the newest m3ret-* here",
    )
    add("--gallery", type=str, help="dataset (folder, ORG/NAME or phantom) or folder of an index; by default a demo")
    add("--show_labels", action="store_true", help="show all labels; by default only known medical words")
    add("--port", type=Port, help="port of the server; by default the first free one from 7860")
    add("--share", action="store_true", help="also create a public Gradio address; by default this machine only")
    add("--auth", type=str, help="USER:PASSWORD of a login; by default no login")
    add("--push_to_hub", type=str, help="ORG/SPACE to publish app, model and index to, instead of serving them")
    arguments = parser.parse_args(argv)
    if arguments.auth is not None:
        arguments.auth = tuple(arguments.auth.split(":", 1))
        if len(arguments.auth) != 2 or not all(arguments.auth):  # the value is a secret
            parser.error("auth: expected USER:PASSWORD, got a value without one of them.")
    return arguments


def find_checkpoint(project: Path, folder: Path = Path()) -> Path:
    """Return the shipped checkpoint in `project`, or else the newest `m3ret-*` in `folder`.

    Raises:
        InputError: if there is none.
    """
    if (project / SHIPPED / "config.json").is_file():
        return project / SHIPPED
    configs = folder.glob("m3ret-*/config.json")
    newest = max(configs, key=lambda config: config.stat().st_mtime, default=None)
    if newest is None:
        problem = f"--model: expected a checkpoint folder {SHIPPED} beside app.py or m3ret-* here, got none."
        raise InputError(f"{problem} Use --model FOLDER|HUB_ID.")
    return newest.parent


def main() -> None:
    arguments = parse_arguments()
    check_gallery(arguments.gallery)  # before a model is trained or loaded
    project = Path(__file__).parent
    name = arguments.model or str(find_checkpoint(project))
    model, processor = load_pretrained(name)
    if torch.cuda.is_available():
        model.to("cuda")
    else:
        prepare_cpu()
    options: dict[str, Any] = {"show_labels": arguments.show_labels, "project": project}
    if arguments.push_to_hub:
        from modeling_m3ret.space.publishing import push_space

        gallery = open_gallery(arguments.gallery, model, processor, name, **options)
        print(push_space(arguments.push_to_hub, Path(__file__), model, processor, gallery, name))
        return

    with StartupPage(arguments.port) as waiting:
        gallery = open_gallery(arguments.gallery, model, processor, name, report=waiting.report, **options)
        readers = IsolatedReaders()  # they start while Gradio is imported, which takes seconds
        from modeling_m3ret.space.pages import build, serve
        from modeling_m3ret.space.service import SearchService

        service = SearchService(model, processor, gallery, readers)
        page = build(service, name)
    serve(page, service, listening=waiting.socket, share=arguments.share, auth=arguments.auth)


if __name__ == "__main__":
    with user_errors("app.py"):
        main()
