"""A served Space over a small gallery, whose labels and file names mean harm; and a browser to visit it with."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config


pytest.importorskip("pebble", reason="the Space needs pebble: pip install m3ret[app]")

from modeling_m3ret import M3RetImageProcessor, M3RetModel
from modeling_m3ret.data.collection import COLUMNS, Record, read_manifest
from modeling_m3ret.phantom.dataset import write_phantom
from modeling_m3ret.space.gallery import Gallery, embed_gallery
from modeling_m3ret.space.searching import Searching


SUBJECTS = 4  # the first four are rendered into every kind of file
EVIL_LABEL = "<img src=x onerror=\"window.attacked='label'\">"
EVIL_MARKDOWN = "[click](javascript:window.attacked='markdown')<script>window.attacked='script'</script>"


@dataclass
class Served:
    """records: of the gallery, in its order. address: ends in a slash. uploads: where Gradio keeps files."""

    address: str
    page: Any
    folder: Path
    records: list[Record]
    searching: Searching
    uploads: Path

    def of(self, modality: str, suffix: str | None = None) -> Path:
        """A scan's file or folder."""
        for record in self.records:
            place = record.location
            if isinstance(place, Path) and record.modality == modality and suffix in (None, place.suffix):
                return place
        raise LookupError(f"{modality} {suffix}")


def small_phantom(folder: Path, subjects: int = SUBJECTS) -> list[Record]:
    """A phantom's records; some rows of its manifest carry HTML where words should stand."""
    write_phantom(folder, subjects=subjects, workers=0)
    rows = list(csv.DictReader((folder / "manifest.csv").open(newline="")))
    rows[0]["label"], rows[1]["label"], rows[2]["label"] = EVIL_LABEL, EVIL_MARKDOWN, "=HYPERLINK(1)"
    rows[5]["anatomy"] = EVIL_LABEL
    with (folder / "manifest.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return read_manifest(folder)


def small_gallery(folder: Path, records: list[Record]) -> tuple[M3RetModel, M3RetImageProcessor, Gallery]:
    torch.manual_seed(0)  # a fixture of a module comes before the seed of a test
    model, processor = M3RetModel(tiny_config()).eval(), M3RetImageProcessor(size=48, num_frames=8)
    return model, processor, embed_gallery(records, model, processor, "m3ret-tiny", folder=folder)


@contextmanager
def serving(
    folder: Path, upload_bytes: int = 2**25, auth: tuple[str, str] | None = None, subjects: int = SUBJECTS
) -> Iterator[Served]:
    pytest.importorskip("gradio", reason="the Space needs gradio: pip install m3ret[app]")
    from modeling_m3ret.space.isolation import IsolatedReaders
    from modeling_m3ret.space.pages import Serving, build, serve

    records = small_phantom(folder / "secret-ward", subjects)
    model, processor, gallery = small_gallery(folder / "galleries", records)
    readers = IsolatedReaders()
    searching = Searching(model, processor, gallery, readers)
    page = build(searching, str(folder))
    try:
        address = serve(page, searching, Serving(upload_bytes=upload_bytes, auth=auth), wait=False)
        yield Served(address, page, folder, records, searching, Path(os.environ["GRADIO_TEMP_DIR"]))
    finally:
        page.close()
        shutil.rmtree(os.environ.pop("GRADIO_TEMP_DIR"), ignore_errors=True)


def pictures_folder(otherwise: Path) -> Path:
    """Where screenshots go: M3RET_SCREENSHOTS, to be looked at, or a folder that pytest removes."""
    folder = Path(os.environ.get("M3RET_SCREENSHOTS") or otherwise)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_browser() -> str:
    """The path of a Chromium; without one the test is skipped."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no browser here: install chromium, e.g. apt-get install chromium")


@contextmanager
def browsing() -> Iterator[Any]:
    """A headless Chromium that asks nobody but who it visits."""
    playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=find_browser(),
            args=["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{part}" for part in quiet)],
        )
        yield browser
        browser.close()
