"""The page about the model: what its card measured, what it cannot do, and what becomes of an upload."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


NOTICE = """## Not for diagnosis

Research software. It finds scans that look alike to one encoder, and says nothing about what a patient has. It has not
been evaluated for any clinical decision. Colours in the viewer show which patches the encoder holds to be counterparts:
a guess that is often wrong, relative to the surest place of each pair of scans.

## Your scans

An upload is read, compared, and deleted within the hour. Nothing in a file's header is shown, and nothing
leaves this server. Even so: do not upload a patient's scan to a server that is not yours.

"""


def about(name: str) -> str:
    """The page in Markdown. name: of a checkpoint, a folder or a Hub id."""
    card = re.sub(r"\A---\n.*?\n---\n", "", card_of(name), flags=re.DOTALL).strip()
    card = re.sub(r"!(?=\[)|<img[^>]*>", "", card)  # the pictures of anyone's card would be loaded from elsewhere
    return NOTICE + (card if card else "The checkpoint comes without a card.")


def card_of(name: str) -> str:
    """The model's card with its header; empty where there is none."""
    if Path(name).is_dir():
        file = Path(name) / "README.md"
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    try:
        return Path(hf_hub_download(name, "README.md")).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return ""
