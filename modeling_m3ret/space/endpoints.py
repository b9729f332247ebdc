"""The named endpoints `/search`, `/embed` and `/similar`: the same search without the page, in JSON."""

from __future__ import annotations

from typing import TypedDict

import gradio as gr

from ..reading_m3ret import Scan
from .gallery import Filters
from .search_page import HEAVY, HITS, in_words
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
    """Within a `gr.Blocks`. Files come in through a component of the page, which takes none but uploads."""

    def search(
        files: list[str] | None, k: float, modalities: list[str] | None, anatomies: list[str] | None, rerank: bool
    ) -> SearchAnswer:
        query = searching.query_of_files(files or [])
        facts = _facts(searching.scan(query.key))
        filters = Filters(tuple(modalities or ()), tuple(anatomies or ()))
        hits = searching.search(query, int(k), filters, bool(rerank))
        searching.put_away(query)
        return SearchAnswer(query=facts, hits=hits)

    def embed(files: list[str] | None) -> EmbedAnswer:
        query: Query = searching.query_of_files(files or [])
        scan = _facts(searching.scan(query.key))
        searching.put_away(query)
        facts = searching.gallery.index.facts
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
        filters = Filters(tuple(modalities or ()), tuple(anatomies or ()), bool(other_subjects))
        return SimilarAnswer(hits=searching.search(searching.query_of_row(int(item)), int(k), filters))

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
        button.click(
            in_words(search),
            [files, k, modalities, anatomies, rerank],
            answer,
            api_name="search",
            api_description="The scans of the gallery most similar to an uploaded one: a file, or a series' slices.",
            **HEAVY,
        )
        button.click(
            in_words(embed),
            [files],
            answer,
            api_name="embed",
            api_description="The embedding of an uploaded scan, and whose embedding it is.",
            **HEAVY,
        )
        button.click(
            in_words(similar),
            [item, k, modalities, anatomies, other_subjects],
            answer,
            api_name="similar",
            api_description="The scans most similar to one of the gallery, named by its `item`.",
            **HEAVY,
        )


def _facts(scan: Scan) -> ScanFacts:
    return ScanFacts(shape=[int(size) for size in scan.array.shape[1:]], spacing=[*scan.spacing])
