"""The first page: a scan in, its most similar ones out, and two of them side by side."""

from __future__ import annotations

import csv
import functools
import io
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..search.index import MetadataFilter
from .handling import HEAVY, PRIVATE, in_words
from .searching import MOST_HITS, HitFacts, Query, Searching
from .side_by_side import SideBySide, words_of
from .viewer import facts_of_scan, picture, slices_of


HITS = 8  # two rows of the grid
COLUMNS = ["item", "similarity", "modality", "anatomy", "labels", "source"]
TO_VIEWER = "() => document.getElementById('viewer').scrollIntoView({behavior: 'smooth', block: 'start'})"
TO_TOP = "() => window.scrollTo({top: 0, behavior: 'smooth'})"


class SearchPage:
    """Made within a `gr.Blocks`."""

    def __init__(self, searching: Searching):
        self.searching = searching
        gallery = searching.gallery
        self.query: gr.State = gr.State(None, time_to_live=3600)  # of `Query`
        self.hits: gr.State = gr.State([], time_to_live=3600)  # of `HitFacts`
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                gr.Markdown("DICOM, NIfTI, video or image; the slices of a series, or a zip of them.")
                self.files = gr.File(
                    label="Scan",
                    file_count="multiple",
                    height=140,
                    elem_id="upload",
                )
                gr.Markdown("Or a scan of the gallery:")
                with gr.Row(elem_id="examples"):
                    self.examples = [
                        (gr.Button(name, size="sm", min_width=90), self._example_of(name))
                        for name in gallery.names("modality")[:8]
                    ]
                with gr.Accordion("Filters and order", open=False, elem_id="options"):
                    self.count = gr.Slider(1, MOST_HITS, value=HITS, step=1, label="Hits")
                    self.modalities = gr.Dropdown(
                        gallery.names("modality"), value=[], multiselect=True, label="Modality (empty: all)"
                    )
                    self.anatomies = gr.Dropdown(
                        gallery.names("anatomy"), value=[], multiselect=True, label="Anatomy (empty: all)"
                    )
                    self.other_subjects = gr.Checkbox(
                        False, label="Leave out the query's own subject", info="Where the query is of the gallery."
                    )
                    self.reranked = gr.Checkbox(
                        False,
                        label="Order by matching patches",
                        info="Late interaction of the hits' patches: slower.",
                        visible=searching.has_scans(),
                    )
                self.query_thumbnail = gr.Image(
                    label="Query",
                    type="pil",
                    interactive=False,
                    height=180,
                    buttons=[],
                    visible=False,
                    elem_id="query-thumbnail",
                )
                self.query_facts = gr.Textbox(
                    label="Size and spacing", interactive=False, visible=False, elem_id="query-facts"
                )
            with gr.Column(scale=5, min_width=300):
                self.status = gr.Markdown(_waiting(len(gallery)), elem_id="status")
                with gr.Tabs():
                    with gr.Tab("Pictures"):
                        self.grid = gr.Gallery(
                            label="Most similar first",
                            show_label=False,
                            columns=4,
                            height="auto",
                            object_fit="contain",
                            allow_preview=False,
                            interactive=False,
                            buttons=[],
                            elem_id="grid",
                        )
                    with gr.Tab("Table"):
                        self.table = gr.Dataframe(
                            headers=COLUMNS,
                            datatype="str",
                            interactive=False,
                            wrap=True,
                            column_widths=[80, 120, 130, 130, 240, 190],
                            buttons=[],
                            label="Most similar first",
                            elem_id="table",
                        )
                with gr.Row():
                    self.as_csv = gr.DownloadButton("Download CSV", size="sm", interactive=False, elem_id="as-csv")
                    self.as_json = gr.DownloadButton("Download JSON", size="sm", interactive=False, elem_id="as-json")
        self.beside = SideBySide(searching, self.query)
        self._wire()

    def _example_of(self, modality: str) -> int:
        return self.searching.gallery.index.metadata.column("modality").to_pylist().index(modality)

    # --------------------------------------------------------------------------------------------------------- events

    def _wire(self) -> None:
        options = [self.count, self.modalities, self.anatomies, self.other_subjects, self.reranked]
        found = [self.hits, self.grid, self.table, self.status, self.as_csv, self.as_json]
        asked = [self.query, self.query_thumbnail, self.query_facts, *found, *self.beside.closing]
        opens = [self.query, self.hits, *self.beside.opens]
        on_grid: dict[str, Any] = {"show_progress_on": self.grid, **PRIVATE, **HEAVY}  # and not over the words above it
        self.files.upload(in_words(self._ask_files), [self.files, *options], asked, **on_grid)
        for button, row in self.examples:
            ask = functools.partial(self._ask_row, row)
            button.click(in_words(ask), options, asked, **on_grid)
        again = [self.count.input, self.modalities.change, self.anatomies.change]  # a key releases no slider
        again += [self.other_subjects.change, self.reranked.change]
        gr.on(again, in_words(self._search), [self.query, *options], found, trigger_mode="always_last", **on_grid)
        for hits, open_hit in ((self.grid, self._open_of_grid), (self.table, self._open_of_table)):
            opened = hits.select(in_words(open_hit), opens, self.beside.opened, **PRIVATE, **HEAVY)
            opened.success(None, js=TO_VIEWER, **PRIVATE)
        asked_hit = self.beside.as_query.click(in_words(self.ask_hit), [self.beside.hit, *options], asked, **on_grid)
        asked_hit.success(None, js=TO_TOP, **PRIVATE)
        self.asked, self.options = asked, options

    def _ask_files(
        self, files: list[str] | None, *options: Any, progress: gr.Progress = gr.Progress()
    ) -> dict[Any, Any]:
        progress(0.1, desc="reading and embedding the scan")
        return self._answer(self.searching.query_of_files(files or []), *options)

    def _ask_row(self, row: int, *options: Any) -> dict[Any, Any]:
        return self._answer(self.searching.query_of_row(row), *options)

    def ask_hit(self, row: int | None, *options: Any) -> dict[Any, Any]:
        if row is None:
            raise ValueError("Choose a hit first.")
        return self._ask_row(row, *options)

    def _answer(self, query: Query, *options: Any) -> dict[Any, Any]:
        scan, image = None, None
        facts = "no scan here, only its embedding"
        if query.row is None or self.searching.has_scans():
            scan = self.searching.scan(query.key)
            image, facts = picture(scan, slices_of(scan) // 2, longest=320), facts_of_scan(scan)
        if query.row is not None:
            facts = f"{words_of(self.searching.gallery.facts(query.row))} · {facts}"
        alone = {
            self.query: query,
            self.query_thumbnail: gr.Image(
                image, alt_text="Middle slice or frame of the query", visible=image is not None
            ),
            self.query_facts: gr.Textbox(facts, visible=True),
        }
        return alone | self.beside.closed(scan) | self._search(query, *options)

    def _search(
        self,
        query: Query | None,
        count: float,
        modalities: list[str],
        anatomies: list[str],
        other_subjects: bool,
        reranked: bool,
        progress: gr.Progress = gr.Progress(),
    ) -> dict[Any, Any]:
        if query is None:
            return {self.status: _waiting(len(self.searching.gallery))}
        progress(0.5, desc="comparing patches" if reranked else "searching")
        where = MetadataFilter(modality=modalities or None, anatomy=anatomies or None)
        hits = self.searching.search(query, int(count), where, exclude_same_patient=other_subjects, rerank=reranked)
        folder = Path(self.grid.GRADIO_CACHE) / uuid.uuid4().hex  # where downloads are served from, for a while
        folder.mkdir(parents=True)
        (folder / "hits.csv").write_text(as_csv(hits), encoding="utf-8")
        (folder / "hits.json").write_text(json.dumps(hits, indent=2), encoding="utf-8")
        many = f"**{len(hits)} hits** of {len(self.searching.gallery):,} scans, the most similar first."
        return {
            self.hits: hits,
            self.grid: [(self.beside.tile(hit["item"]), f"{hit['similarity']:.3f} · {words_of(hit)}") for hit in hits],
            self.table: [_cells(hit) for hit in hits],
            self.status: many + " Choose one to see where it matches." * bool(hits and self.searching.has_scans()),
            self.as_csv: gr.DownloadButton(value=folder / "hits.csv", interactive=True),
            self.as_json: gr.DownloadButton(value=folder / "hits.json", interactive=True),
        }

    def _open_of_grid(self, chosen: gr.SelectData, query: Query, hits: list[HitFacts], *opens: Any) -> dict[Any, Any]:
        return self.beside.open(query, hits[chosen.index]["item"], *opens)

    def _open_of_table(self, chosen: gr.SelectData, query: Query, hits: list[HitFacts], *opens: Any) -> dict[Any, Any]:
        return self.beside.open(query, hits[chosen.index[0]]["item"], *opens)


def _waiting(scans: int) -> str:
    return f"The gallery holds **{scans:,} scans**. Upload one of yours, or begin with one of these."


def _cells(hit: HitFacts) -> list[str]:
    values: dict[str, Any] = {**hit, "similarity": f"{hit['similarity']:.4f}", "labels": ", ".join(hit["labels"])}
    return [str(values[column]) for column in COLUMNS]


def as_csv(hits: Sequence[HitFacts]) -> str:
    """A line a hit. A cell that a spreadsheet would compute is marked as text."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for hit in hits:
        cells = _cells(hit)
        texts = [f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell for cell in cells[2:]]
        writer.writerow([*cells[:2], *texts])
    return stream.getvalue()
