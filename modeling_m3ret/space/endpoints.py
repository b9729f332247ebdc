"""The JSON endpoints `/search`, `/embed` and `/similar`, and the rules that all events of the page share.

The endpoints do what the page does, for programs. Errors that a visitor can act on are shown; concurrency is limited.
"""

from __future__ import annotations

import functools
import html
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import gradio as gr

from ..errors import InputError
from ..reading_m3ret import M3RetReadError
from ..search.filters import MetadataFilter
from .service import DEFAULT_HITS, MAX_HITS, Query, SearchService


logger = logging.getLogger(__name__)

# keyword arguments of events
HEAVY: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 2}  # the number of cores of a small server
QUIET: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
LIGHT: dict[str, Any] = {"concurrency_id": "viewer", "concurrency_limit": 8, **QUIET}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}


def show_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an event handler so that visitors see the message of an expected error, and no other message.

    Gradio renders messages as HTML. They are escaped because they contain file names. An unexpected error is logged
    without its message, which may hold the name of a file or text of its header.
    """

    @functools.wraps(function)
    def handler(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (M3RetReadError, InputError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None
        except Exception as error:
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s in an event of the page:\n%s", type(error).__name__, frames)
            raise gr.Error("The server failed to answer. Please try again.", print_exception=False) from None

    return handler


def add_endpoints(service: SearchService) -> None:
    """Add the endpoints to the current `gr.Blocks`. Their docstrings are their documentation; see also docs/space.md.

    Each needs components as inputs; they are hidden. Files arrive through a file component, which accepts uploads only:
    `RequestGate` refuses URLs.
    """

    @contextmanager
    def uploaded(files: list[str] | None) -> Iterator[tuple[Query, dict[str, Any]]]:
        query = service.query_of_files(files or [])
        try:
            scan = service.scan(query.key)
            yield query, {"shape": [int(size) for size in scan.array.shape[1:]], "spacing": [*scan.spacing]}
        finally:
            service.close(query)

    def search(
        files: list[str] | None, k: float, modalities: list[str] | None, anatomies: list[str] | None, rerank: bool
    ) -> dict[str, Any]:
        """Find the scans of the gallery most similar to an uploaded scan: one file, or the slices of a series."""
        where = MetadataFilter(modality=modalities or None, anatomy=anatomies or None)
        with uploaded(files) as (query, scan):
            return {"query": scan, "hits": service.search(query, int(k), where, rerank=bool(rerank))}

    def embed(files: list[str] | None) -> dict[str, Any]:
        """Compute the embedding of an uploaded scan."""
        with uploaded(files) as (query, scan):
            return {"embedding": query.embedding.tolist(), "query": scan, **asdict(service.gallery.index.facts)}

    def similar(
        item: float | None, k: float, modalities: list[str] | None, anatomies: list[str] | None, other_subjects: bool
    ) -> dict[str, Any]:
        """Find the scans most similar to a scan of the gallery, given by its `item` number.

        With `other_subjects`, scans of the same patient are excluded.
        """
        where = MetadataFilter(modality=modalities or None, anatomy=anatomies or None)
        if item is None:
            raise InputError("item: expected the number of a scan, got none.")
        query = service.query_of_row(int(item))
        return {"hits": service.search(query, int(k), where, exclude_same_patient=bool(other_subjects))}

    gallery = service.gallery
    with gr.Column(visible=False):
        files = gr.File(label="files", file_count="multiple")
        item = gr.Number(label="item", precision=0, value=0, minimum=0, maximum=len(gallery) - 1)
        k = gr.Slider(1, MAX_HITS, value=DEFAULT_HITS, step=1, label="k")
        modalities = gr.Dropdown(gallery.names("modality"), value=[], multiselect=True, label="modalities")
        anatomies = gr.Dropdown(gallery.names("anatomy"), value=[], multiselect=True, label="anatomies")
        rerank = gr.Checkbox(False, label="rerank")
        other_subjects = gr.Checkbox(False, label="other_subjects")
        answer = gr.JSON(label="answer")
        button = gr.Button()
        options = [k, modalities, anatomies]
        button.click(show_errors(search), [files, *options, rerank], answer, api_name="search", **HEAVY)
        button.click(show_errors(embed), [files], answer, api_name="embed", **HEAVY)
        button.click(show_errors(similar), [item, *options, other_subjects], answer, api_name="similar", **HEAVY)
