"""The synthetic phantom collection of this project."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dataset_scripts.entries import Entry, Source
from dataset_scripts.sources.folder import Folder
from modeling_m3ret.data.collection import phantom_folder
from modeling_m3ret.phantom import SYNTHETIC_SOURCE


class Phantom(Source):
    """A folder written by `make_phantom.py`, or `phantom[:SUBJECTS[:SEED]]`, which is created on first use."""

    name = "phantom"
    title = SYNTHETIC_SOURCE
    homepage = ""
    licence = "Apache-2.0"
    citation = ""

    def folder(self, root: str) -> Path:
        return Path(root) if Path(root).exists() else phantom_folder(root)

    layout = "a folder written by make_phantom.py, or phantom[:SUBJECTS[:SEED]]"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        for entry in Folder().entries(root):
            yield replace(entry, licence=self.licence)
