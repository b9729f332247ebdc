"""The named endpoints `/search`, `/embed` and `/similar`: the same search without the page, in JSON."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import gradio as gr

from ..reading_m3ret import Scan
from ..search.index import MetadataFilter
from .handling import HEAVY, in_words
from .search_page import HITS
from .searching import MOST_HITS, HitFacts, Query, Searching


class ScanFacts(TypedDict):
    """shape: D, H, W of what was read. spacing: mm along them, null where the file doesn't say."""

    shape: list[int]
    spacing: list[float | None]


class SearchAnswer(TypedDict):
    query: ScanFacts
    hits: list[HitFacts]


class SimilarAnswer(TypedDict):
    hits: list[HitFacts]


class EmbedAnswer(TypedDict):
    """embedding: of norm 1. model, revision, processor: whose it is, see `ModelFacts`."""

    embedding: list[float]
    query: ScanFacts
    model: str
    revision: str
    processor: str


def add_endpoints(searching: Searching) -> None:
    """Within a `gr.Blocks`. Files come in through a component of the page, which takes none but
    uploads: `RequestGate` lets no address through."""

    @contextmanager
    def uploaded(files: list[str] | None) -> Iterator[tuple[Query, ScanFacts]]:
        query = searching.query_of_files(files or [])
        try:
            yield query, _facts(searching.scan(query.key))
        finally:
            searching.put_away(query)

    def search(
        files: list[str] | None, k: float, modalities: list[str] | None, anatomies: list[str] | None, rerank: bool
    ) -> SearchAnswer:
        where = MetadataFilter(modality=modalities or None, anatomy=anatomies or None)
        with uploaded(files) as (query, scan):
            return SearchAnswer(query=scan, hits=searching.search(query, int(k), where, rerank=bool(rerank)))

    def embed(files: list[str] | None) -> EmbedAnswer:
        facts = searching.gallery.index.facts
        with uploaded(files) as (query, scan):
            return EmbedAnswer(
                embedding=query.embedding.tolist(),
                query=scan,
                model=facts.model,
                revision=facts.revision,
                processor=facts.processor,
            )

    def similar(
        item: float, k: float, modalities: list[str] | None, anatomies: list[str] | None, other_subjects: bool
    ) -> SimilarAnswer:
        where = MetadataFilter(modality=modalities or None, anatomy=anatomies or None)
        query = searching.query_of_row(int(item))
        hits = searching.search(query, int(k), where, exclude_same_patient=bool(other_subjects))
        return SimilarAnswer(hits=hits)

    gallery = searching.gallery
    with gr.Column(visible=False):
        files = gr.File(label="files", file_count="multiple")
        item = gr.Number(label="item", precision=0, value=0)
        k = gr.Slider(1, MOST_HITS, value=HITS, step=1, label="k")
        modalities = gr.Dropdown(gallery.names("modality"), value=[], multiselect=True, label="modalities")
        anatomies = gr.Dropdown(gallery.names("anatomy"), value=[], multiselect=True, label="anatomies")
        rerank = gr.Checkbox(False, label="rerank")
        other_subjects = gr.Checkbox(False, label="other_subjects")
        answer = gr.JSON(label="answer")
        button = gr.Button()
        for endpoint, inputs, description in (
            (
                search,
                [files, k, modalities, anatomies, rerank],
                "The scans of the gallery most similar to an uploaded one: a file, or a series' slices.",
            ),
            (embed, [files], "The embedding of an uploaded scan, and whose embedding it is."),
            (
                similar,
                [item, k, modalities, anatomies, other_subjects],
                "The scans most similar to one of the gallery, named by its `item`.",
            ),
        ):
            told: dict[str, Any] = {"api_name": endpoint.__name__, "api_description": description}
            button.click(in_words(endpoint), inputs, answer, **told, **HEAVY)


def _facts(scan: Scan) -> ScanFacts:
    return ScanFacts(shape=[int(size) for size in scan.array.shape[1:]], spacing=[*scan.spacing])
