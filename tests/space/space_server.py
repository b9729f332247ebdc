"""A served Space over a small gallery with hostile labels and file names, and a browser to visit it."""

from __future__ import annotations

import csv
import os
import shutil
import socket
from collections.abc import Callable, Iterator
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
from modeling_m3ret.space.isolation import IsolatedReaders
from modeling_m3ret.space.service import SearchService


SUBJECTS = 4  # the smallest number with every file format
TIMEOUT = 120.0  # s; generous, for a busy machine
HTML_LABEL = "<img src=x onerror=\"window.attacked='label'\">"
MARKDOWN_LABEL = "[click](javascript:window.attacked='markdown')<script>window.attacked='script'</script>"
FORMULA_LABEL = "=HYPERLINK(1)"


@dataclass
class SpaceServer:
    """A running server.

    Attributes:
        address: Ends in a slash.
        folder: Holds the scans (in `secret-ward`) and the gallery.
        records: The gallery's records, in the order of its rows.
        uploads: Gradio's upload folder.
    """

    address: str
    page: Any
    folder: Path
    records: list[Record]
    service: SearchService
    uploads: Path

    def row_of(self, modality: str) -> int:
        """Return the first row of a modality."""
        return next(row for row, record in enumerate(self.records) if record.modality == modality)

    def scan_path(self, modality: str, suffix: str | None = None) -> Path:
        """Return the file or folder of a scan."""
        for record in self.records:
            path = record.location
            if isinstance(path, Path) and record.modality == modality and suffix in (None, path.suffix):
                return path
        raise LookupError(f"{modality} {suffix}")


class DirectReaders:
    """Stands in for `IsolatedReaders` and reads in the same process."""

    def read(self, name: str, function: Callable[..., Any], *arguments: object) -> Any:
        return function(*arguments)


def small_phantom(folder: Path, subjects: int = SUBJECTS) -> list[Record]:
    """Write a phantom with HTML, Markdown and a spreadsheet formula in some labels."""
    write_phantom(folder, subjects=subjects, workers=0)
    rows = list(csv.DictReader((folder / "manifest.csv").open(newline="")))
    rows[0]["label"], rows[1]["label"], rows[2]["label"] = HTML_LABEL, MARKDOWN_LABEL, FORMULA_LABEL
    rows[5]["anatomy"] = HTML_LABEL
    with (folder / "manifest.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return read_manifest(folder)


def small_gallery(folder: Path, records: list[Record]) -> tuple[M3RetModel, M3RetImageProcessor, Gallery]:
    torch.manual_seed(0)  # module fixtures run before the seed fixture of a test
    model, processor = M3RetModel(tiny_config()).eval(), M3RetImageProcessor(size=48, num_frames=8)
    return model, processor, embed_gallery(records, model, processor, "m3ret-tiny", folder=folder)


@contextmanager
def serving(
    folder: Path,
    upload_bytes: int = 2**25,
    auth: tuple[str, str] | None = None,
    subjects: int = SUBJECTS,
    show_labels: bool = False,
    listening: socket.socket | None = None,
) -> Iterator[SpaceServer]:
    pytest.importorskip("gradio", reason="the Space needs gradio: pip install m3ret[app]")
    records = small_phantom(folder / "secret-ward", subjects)
    with serving_records(folder, records, upload_bytes, auth, show_labels, listening) as space:
        yield space


@contextmanager
def serving_records(
    folder: Path,
    records: list[Record],
    upload_bytes: int = 2**25,
    auth: tuple[str, str] | None = None,
    show_labels: bool = False,
    listening: socket.socket | None = None,
) -> Iterator[SpaceServer]:
    """Serve a gallery of these records, with `folder` as the checkpoint."""
    from modeling_m3ret.space.pages import build, serve

    model, processor, gallery = small_gallery(folder / "galleries", records)
    gallery.show_labels = show_labels
    service = SearchService(model, processor, gallery, IsolatedReaders(seconds=TIMEOUT))
    page = build(service, str(folder))
    try:
        address = serve(page, service, listening=listening, upload_bytes=upload_bytes, auth=auth, wait=False)
        yield SpaceServer(address, page, folder, records, service, Path(os.environ["GRADIO_TEMP_DIR"]))
    finally:
        page.close()
        shutil.rmtree(os.environ.pop("GRADIO_TEMP_DIR"), ignore_errors=True)


def routes_of(router: Any) -> set[tuple[str, str]]:
    """Return methods and paths of a router and of the routers that it includes."""
    routes = set()
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            routes |= routes_of(inner)
        else:
            routes |= {(method, route.path) for method in getattr(route, "methods", None) or ()}
    return routes


def screenshot_folder(default: Path) -> Path:
    """Return the folder for screenshots: M3RET_SCREENSHOTS to inspect them, or a temporary one."""
    folder = Path(os.environ.get("M3RET_SCREENSHOTS") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_browser() -> str:
    """Return the path of a Chromium, or skip the test."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("Chromium is not installed: e.g. apt-get install chromium")


@contextmanager
def browsing() -> Iterator[Any]:
    """Start a headless Chromium that makes no requests of its own and draws WebGL in software."""
    playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
    features = ["quic", "background-networking", "component-update", "sync"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=find_browser(),
            args=[
                "--headless",
                "--no-sandbox",
                "--no-first-run",
                "--enable-unsafe-swiftshader",
                *(f"--disable-{feature}" for feature in features),
            ],
        )
        yield browser
        browser.close()
