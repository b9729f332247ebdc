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
from .results import HTML
from .service import DEFAULT_HITS, MAX_HITS, Query, SearchService


logger = logging.getLogger(__name__)

# keyword arguments of events
HEAVY: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 2}  # the number of cores of a small server
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
# what went wrong with an upload, and what to do about it, by the reason of an `M3RetReadError`
PLAIN = {
    "damaged": "the file is incomplete or damaged. Export it again, and upload the new copy.",
    "undecodable": "it could not be decoded. Check that it is complete and that other software can open it.",
    "unsupported": "it is of a kind that this page does not read. Upload one of those listed under “Formats”.",
    "too_large": "it is too large for this server. Upload fewer slices, or a smaller part of the scan.",
    "no_decoder": "this server has no decoder for its format. Convert it to DICOM, NIfTI or PNG.",
    "not_found": "the file is no longer there. Upload it again.",
    "timeout": "reading it took too long. Try again, or upload a smaller part of the scan.",
}
FAILED = "The server failed to answer. Please try again."


def expected_message(error: Exception) -> str | None:
    """Return the message of an error that a visitor can act on, otherwise log the error and return None.

    It is logged without its message, which may hold the name of a file or text of its header.
    """
    if isinstance(error, (M3RetReadError, InputError)):
        return str(error)
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s in an event of the page:\n%s", type(error).__name__, frames)
    return None


def error_html(error: Exception) -> str:
    """Return an error in plain words, in HTML."""
    message = expected_message(error)
    if isinstance(error, M3RetReadError) and error.reason:
        return str(HTML.error(error.file, PLAIN[error.reason], error.detail[:1].upper() + error.detail[1:]))
    return f"<p>{html.escape(message or FAILED)}</p>"


def show_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an endpoint so that its clients see the message of an expected error, and no other message.

    Gradio renders messages as HTML. They are escaped because they contain file names.
    """

    @functools.wraps(function)
    def handler(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise gr.Error(html.escape(expected_message(error) or FAILED), print_exception=False) from None

    return handler


def add_endpoints(service: SearchService) -> None:
    """Add the endpoints to the current `gr.Blocks`. Their inputs are hidden components, their docstrings are shown."""

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
        modalities = gr.Dropdown([*gallery.counts("modality")], value=[], multiselect=True, label="modalities")
        anatomies = gr.Dropdown([*gallery.counts("anatomy")], value=[], multiselect=True, label="anatomies")
        rerank = gr.Checkbox(False, label="rerank")
        other_subjects = gr.Checkbox(False, label="other_subjects")
        answer = gr.JSON(label="answer")
        button = gr.Button()
        options = [k, modalities, anatomies]
        button.click(show_errors(search), [files, *options, rerank], answer, api_name="search", **HEAVY)
        button.click(show_errors(embed), [files], answer, api_name="embed", **HEAVY)
        button.click(show_errors(similar), [item, *options, other_subjects], answer, api_name="similar", **HEAVY)
