"""Search a gallery with any scan, in a browser.

    python app.py                                        # newest local checkpoint, demo gallery
    python app.py --quickstart                           # trains a small checkpoint first, where there is none
    python app.py --model m3ret-vitb --gallery FOLDER    # a collection, or the folder of an index
    python app.py --push_to_hub ORG/SPACE                # as a Hugging Face Space, private at first

Needs `pip install "m3ret[app]"`. The server listens on this machine alone and serves no file of it; what is uploaded is
deleted within the hour. docs/space.md says more.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import torch
from transformers import AutoImageProcessor, AutoModel

import modeling_m3ret  # noqa: F401  # registers the model
from modeling_m3ret.data.collection import CollectionError
from modeling_m3ret.search.index import IndexFormatError
from modeling_m3ret.space.gallery import open_gallery
from modeling_m3ret.space.isolation import IsolatedReaders
from modeling_m3ret.space.quickstart import newest_checkpoint, train_small


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=None, help="checkpoint folder or Hub id (default: newest m3ret-* folder here)"
    )
    parser.add_argument(
        "--gallery",
        default=None,
        metavar="DATASET|INDEX",
        help="folder with a manifest.csv, Parquet data set (folder or ORG/NAME), phantom[:SUBJECTS[:SEED]], or the "
        "folder of an index, whose scans are found but not seen (default: phantom scans, and those of pydicom-data)",
    )
    parser.add_argument("--port", type=int, default=None, help="(default: the first one free from 7860)")
    parser.add_argument("--share", action="store_true", help="also reachable through a public Gradio address")
    parser.add_argument("--auth", type=_user_and_password, default=None, metavar="USER:PASSWORD")
    parser.add_argument(
        "--quickstart", action="store_true", help="where there is no checkpoint, train a small one first"
    )
    parser.add_argument("--push_to_hub", default=None, metavar="ORG/SPACE", help="publish app, model and index instead")
    return parser.parse_args(words)


def _user_and_password(words: str) -> tuple[str, str]:
    user, _, password = words.partition(":")
    if not user or not password:
        raise argparse.ArgumentTypeError("expected USER:PASSWORD")
    return user, password


def main() -> None:
    arguments = parse()
    name = arguments.model or newest_checkpoint()
    if name is None and arguments.quickstart:
        train_small(Path(__file__).parent)
        name = newest_checkpoint()
    if name is None:
        raise SystemExit(
            "There is no checkpoint here (a folder m3ret-* with a config.json).\n"
            "  python app.py --quickstart        trains a small one in some six minutes on two cores, and opens\n"
            "  python app.py --model FOLDER|ID   takes another one"
        )
    readers = None if arguments.push_to_hub else IsolatedReaders()  # which start while the model is loaded
    model = AutoModel.from_pretrained(name).eval()
    if torch.cuda.is_available():
        model.to("cuda")
    processor = AutoImageProcessor.from_pretrained(name)
    try:
        gallery = open_gallery(arguments.gallery, model, processor, str(name))
    except (CollectionError, IndexFormatError) as error:
        raise SystemExit(str(error)) from error
    if readers is None:
        from modeling_m3ret.space.publishing import push_space

        print(push_space(arguments.push_to_hub, Path(__file__), model, processor, gallery, str(name)))
        return

    # after the demo gallery, which may take a minute the first time: Gradio takes seconds to import
    from modeling_m3ret.space.pages import Serving, build, serve
    from modeling_m3ret.space.searching import Searching

    searching = Searching(model, processor, gallery, readers)
    serve(build(searching, str(name)), searching, Serving(arguments.port, arguments.share, arguments.auth))


if __name__ == "__main__":
    main()
