"""The "Search" tab: upload or select a scan, see the most similar ones, and compare one of them with the query."""

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

from ..errors import InputError
from ..reading_m3ret import FORMATS
from ..search.filters import MetadataFilter
from .endpoints import HEAVY, PRIVATE, show_errors
from .service import DEFAULT_HITS, MAX_HITS, HitFacts, Query, SearchService
from .side_by_side import NO_SCAN, SideBySide, describe, modality_name
from .viewer import describe_scan, num_slices, render_slice


COLUMNS = ["item", "similarity", "modality", "anatomy", "labels", "source"]
IMAGE: dict[str, Any] = {"type": "pil", "interactive": False, "buttons": []}  # keyword arguments of `gr.Image`
SCROLL_TO_VIEWER = "() => document.getElementById('viewer').scrollIntoView({behavior: 'smooth', block: 'start'})"
SCROLL_TO_TOP = "() => window.scrollTo({top: 0, behavior: 'smooth'})"


class SearchPage:
    """The components and events of the tab. Construct it within a `gr.Blocks`.

    Attributes:
        options: Inputs of a search: number of hits, filters and order.
        query_outputs: Outputs of an event with a new query.
    """

    def __init__(self, service: SearchService):
        self.service = service
        gallery = service.gallery
        self.query: gr.State = gr.State(None, time_to_live=3600)  # a `Query`
        self.hits: gr.State = gr.State([], time_to_live=3600)  # a list of `HitFacts`
        modalities = [(modality_name(name), name) for name in gallery.names("modality")]
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                gr.Markdown(f"Upload a file ({FORMATS}), all slices of a DICOM series, or a zip archive of either.")
                self.files = gr.File(label="Scan", file_count="multiple", height=140, elem_id="upload")
                gr.Markdown("Or start with an example from the gallery:")
                with gr.Row(elem_id="examples"):
                    self.examples = {
                        name: gr.Button(label, size="sm", min_width=90, elem_id=f"example-{name}")
                        for label, name in modalities[:8]
                    }
                with gr.Accordion("Filters and ranking", open=False, elem_id="options"):
                    self.count = gr.Slider(
                        1, MAX_HITS, DEFAULT_HITS, step=1, label="Number of results", elem_id="count"
                    )
                    several: dict[str, Any] = {"value": [], "multiselect": True}
                    self.modalities = gr.Dropdown(
                        modalities, label="Modality (empty: all)", elem_id="modalities", **several
                    )
                    anatomies = gallery.names("anatomy")
                    self.anatomies = gr.Dropdown(
                        anatomies, label="Anatomy (empty: all)", elem_id="anatomies", **several
                    )
                    self.exclude_same_patient = gr.Checkbox(
                        False,
                        label="Exclude the same patient",
                        info="Applies if the query is a scan of the gallery.",
                        elem_id="exclude-same-patient",
                    )
                    self.rerank = gr.Checkbox(
                        False,
                        label="Re-rank by matching image regions",
                        info="Compares the results with the query patch by patch. Slower.",
                        visible=service.has_scans(),
                        elem_id="rerank",
                    )
                self.query_thumbnail = gr.Image(
                    label="Query", height=180, visible=False, elem_id="query-thumbnail", **IMAGE
                )
                self.query_facts = gr.Textbox(
                    label="Description", interactive=False, visible=False, elem_id="query-facts"
                )
            with gr.Column(scale=5, min_width=300):
                self.status = gr.Markdown(_welcome(len(gallery)), elem_id="status")
                with gr.Tabs():
                    with gr.Tab("Images"):
                        self.grid = gr.Gallery(
                            label="Results, most similar first",
                            show_label=False,
                            columns=4,
                            height="auto",
                            object_fit="contain",
                            allow_preview=False,
                            interactive=False,
                            buttons=[],
                            elem_id="grid",
                        )
                    with gr.Tab("Table", elem_id="table-tab"):
                        self.table = gr.Dataframe(
                            headers=COLUMNS,
                            datatype="str",
                            interactive=False,
                            wrap=True,
                            column_widths=[80, 120, 130, 130, 240, 190],
                            buttons=[],
                            label="Results, most similar first",
                            elem_id="table",
                        )
                with gr.Row():
                    self.as_csv = gr.DownloadButton("Download CSV", size="sm", interactive=False, elem_id="as-csv")
                    self.as_json = gr.DownloadButton("Download JSON", size="sm", interactive=False, elem_id="as-json")
        self.viewer = SideBySide(service, self.query)
        self._connect_events()

    def _connect_events(self) -> None:
        viewer = self.viewer
        self.options = [self.count, self.modalities, self.anatomies, self.exclude_same_patient, self.rerank]
        hit_outputs = [self.hits, self.grid, self.table, self.status, self.as_csv, self.as_json]
        query_outputs = [self.query, self.query_thumbnail, self.query_facts]
        self.query_outputs = [*query_outputs, *hit_outputs, *viewer.close_outputs]
        event: dict[str, Any] = {"show_progress_on": self.grid, **PRIVATE, **HEAVY}  # not over the status line
        self.files.upload(show_errors(self._search_files), [self.files, *self.options], self.query_outputs, **event)
        modality_of_row = self.service.gallery.visible.column("modality").to_pylist()
        for modality, button in self.examples.items():
            search_row = functools.partial(self.search_row, modality_of_row.index(modality))
            button.click(show_errors(search_row), self.options, self.query_outputs, **event)
        # a slider's `release` does not fire for keys
        changes = [self.count.input, self.modalities.change, self.anatomies.change]
        changes += [self.exclude_same_patient.change, self.rerank.change]
        search = show_errors(self._search)
        gr.on(changes, search, [self.query, *self.options], hit_outputs, trigger_mode="always_last", **event)
        open_inputs = [self.query, self.hits, *viewer.open_inputs]
        for results in (self.grid, self.table):
            opened = results.select(show_errors(self._open), open_inputs, viewer.open_outputs, **PRIVATE, **HEAVY)
            opened.success(None, js=SCROLL_TO_VIEWER, **PRIVATE)
        hit_inputs = [viewer.hit, *self.options]
        searched = viewer.as_query.click(show_errors(self.search_row), hit_inputs, self.query_outputs, **event)
        searched.success(None, js=SCROLL_TO_TOP, **PRIVATE)

    def _search_files(self, files: Any, *options: Any, progress: gr.Progress = gr.Progress()) -> dict[Any, Any]:
        progress(0.1, desc="Reading the scan")
        return self._new_query(self.service.query_of_files(files or []), *options)

    def search_row(self, row: int | None, *options: Any) -> dict[Any, Any]:
        """Search with a scan of the gallery. Values of `query_outputs`."""
        if row is None:
            raise InputError("Select a scan first.")
        return self._new_query(self.service.query_of_row(row), *options)

    def _new_query(self, query: Query, *options: Any) -> dict[Any, Any]:
        scan, image, facts = None, None, NO_SCAN
        if query.row is None or self.service.has_scans():
            scan = self.service.scan(query.key)
            image, facts = render_slice(scan, num_slices(scan) // 2, long_side=320), describe_scan(scan)
        if query.row is not None:
            facts = f"{describe(self.service.gallery.facts(query.row))} · {facts}"
        alt_text, has_image = "Middle slice or frame of the query", image is not None
        shown = {
            self.query: query,
            self.query_thumbnail: gr.Image(image, alt_text=alt_text, visible=has_image),
            self.query_facts: gr.Textbox(facts, visible=True),
        }
        return shown | self.viewer.close(scan) | self._search(query, *options)

    def _search(
        self,
        query: Query | None,
        count: float,
        modalities: list[str],
        anatomies: list[str],
        exclude_same_patient: bool,
        rerank: bool,
        progress: gr.Progress = gr.Progress(),
    ) -> dict[Any, Any]:
        if query is None:
            return {self.status: _welcome(len(self.service.gallery))}
        progress(0.5, desc="Comparing patches" if rerank else "Searching")
        where = MetadataFilter(modality=modalities or None, anatomy=anatomies or None)
        hits = self.service.search(query, int(count), where, exclude_same_patient=exclude_same_patient, rerank=rerank)
        folder = Path(self.grid.GRADIO_CACHE) / uuid.uuid4().hex  # downloads are served from here, then swept
        folder.mkdir(parents=True)
        (folder / "hits.csv").write_text(to_csv(hits), encoding="utf-8")
        (folder / "hits.json").write_text(json.dumps(hits, indent=2), encoding="utf-8")
        status = f"**{len(hits)} results** from {len(self.service.gallery):,} scans, most similar first."
        if hits and self.service.has_scans():
            status += " Select one to compare it with the query."
        captions = [f"{hit['similarity']:.3f} · {describe(hit)}" for hit in hits]
        return {
            self.hits: hits,
            self.grid: [
                (self.viewer.thumbnail(hit["item"]), caption) for hit, caption in zip(hits, captions, strict=True)
            ],
            self.table: [_cells(hit) for hit in hits],
            self.status: status,
            self.as_csv: gr.DownloadButton(value=folder / "hits.csv", interactive=True),
            self.as_json: gr.DownloadButton(value=folder / "hits.json", interactive=True),
        }

    def _open(self, selected: gr.SelectData, query: Query, hits: list[HitFacts], *open_inputs: Any) -> dict[Any, Any]:
        index = selected.index if isinstance(selected.index, int) else selected.index[0]  # of the table: row, column
        if not 0 <= index < len(hits):
            raise InputError("This result is not shown any more. Select another one.")
        return self.viewer.open(query, hits[index]["item"], *open_inputs)


def _welcome(scans: int) -> str:
    return f"The gallery contains **{scans:,} scans**. Upload a scan, or start with an example."


def _cells(hit: HitFacts) -> list[str]:
    values: dict[str, Any] = {**hit, "similarity": f"{hit['similarity']:.4f}", "labels": ", ".join(hit["labels"])}
    return [str(values[column]) for column in COLUMNS]


def to_csv(hits: Sequence[HitFacts]) -> str:
    """Format hits as CSV. Cells that a spreadsheet would evaluate as a formula are prefixed with an apostrophe."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for hit in hits:
        cells = _cells(hit)
        texts = [f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell for cell in cells[2:]]
        writer.writerow([*cells[:2], *texts])
    return stream.getvalue()
