"""Search a gallery with any scan, in a web browser.

    python app.py                                        # newest local checkpoint, demo gallery
    python app.py --quickstart                           # train a small checkpoint first if there is none
    python app.py --model m3ret-vitb --gallery FOLDER    # a dataset, or the folder of an index
    python app.py --push_to_hub ORG/SPACE                # publish as a private Hugging Face Space

Needs `pip install "m3ret[app]"`. The server accepts connections from this machine only. It serves no local files and
deletes uploads within one hour. See docs/space.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import torch
from jsonargparse.typing import restricted_number_type

from modeling_m3ret.command_line import CommandLine, user_errors
from modeling_m3ret.errors import InputError
from modeling_m3ret.hub import load_pretrained
from modeling_m3ret.space.gallery import check_gallery, open_gallery
from modeling_m3ret.space.isolation import IsolatedReaders


QUICKSTART_CONFIG = "configs/smoke.yaml"


Port = restricted_number_type("Port", int, [(">=", 1), ("<=", 65535)])


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandLine(__doc__, prog="app.py")
    add = parser.add_argument
    add("--model", type=str, help="checkpoint folder or Hub id; by default the newest m3ret-* here")
    add("--gallery", type=str, help="dataset (folder, ORG/NAME or phantom) or folder of an index; by default a demo")
    add("--show_labels", action="store_true", help="show all labels; by default only known medical words")
    add("--port", type=Port, help="port of the server; by default the first free one from 7860")
    add("--share", action="store_true", help="also create a public Gradio address; by default this machine only")
    add("--auth", type=str, help="USER:PASSWORD of a login; by default no login")
    add("--quickstart", action="store_true", help="train a small checkpoint if there is none")
    add("--push_to_hub", type=str, help="ORG/SPACE to publish app, model and index to, instead of serving them")
    arguments = parser.parse_args(argv)
    if arguments.auth is not None:
        arguments.auth = tuple(arguments.auth.split(":", 1))
        if len(arguments.auth) != 2 or not all(arguments.auth):  # the value is a secret
            parser.error("auth: expected USER:PASSWORD, got a value without one of them.")
    return arguments


def newest_checkpoint(folder: Path = Path()) -> Path | None:
    """Return the most recently written checkpoint folder `m3ret-*` in `folder`."""
    configs = folder.glob("m3ret-*/config.json")
    newest = max(configs, key=lambda config: config.stat().st_mtime, default=None)
    return newest.parent if newest else None


def train_small_checkpoint(project: Path, overrides: Sequence[str] = ()) -> None:
    """Train the checkpoint `m3ret-smoke` in the current folder.

    Args:
        project: Folder with `train.py` and `configs`.
        overrides: Options for `train.py` in addition to its config.

    Raises:
        InputError: If there is no `train.py`.
        SystemExit: If training fails.
    """
    script = project / "train.py"
    if not script.is_file():
        raise InputError(f"--quickstart: {script} does not exist. Use --model instead.")
    print("Training a small model on synthetic scans (about six minutes on two cores).", flush=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launch, str(script), "--config", str(project / QUICKSTART_CONFIG), *overrides]
    if (code := subprocess.run(command, check=False).returncode) != 0:
        raise SystemExit(f"Training failed with exit code {code}. See its messages above.")


def find_checkpoint(model: str | None, quickstart: bool) -> str:
    """Return the checkpoint to load: the given one, the newest local one, or one that is trained now."""
    name = model or newest_checkpoint()
    if name is None and quickstart:
        train_small_checkpoint(Path(__file__).parent)
        name = newest_checkpoint()
    if name is None:
        raise InputError(
            "--model: no checkpoint folder m3ret-* in the current folder. Use --quickstart to train a small one, or "
            "--model FOLDER|HUB_ID."
        )
    return str(name)


def main() -> None:
    arguments = parse_arguments()
    check_gallery(arguments.gallery)  # before a model is trained or loaded
    project = Path(__file__).parent
    name = find_checkpoint(arguments.model, arguments.quickstart)
    model, processor = load_pretrained(name)
    if torch.cuda.is_available():
        model.to("cuda")
    gallery = open_gallery(arguments.gallery, model, processor, name, arguments.show_labels, project=project)
    if arguments.push_to_hub:
        from modeling_m3ret.space.publishing import push_space

        print(push_space(arguments.push_to_hub, Path(__file__), model, processor, gallery, name))
        return

    readers = IsolatedReaders()  # they start while Gradio is imported, which takes seconds
    from modeling_m3ret.space.pages import build, serve
    from modeling_m3ret.space.service import SearchService

    service = SearchService(model, processor, gallery, readers)
    serve(build(service, name), service, port=arguments.port, share=arguments.share, auth=arguments.auth)


if __name__ == "__main__":
    with user_errors("app.py"):
        main()
