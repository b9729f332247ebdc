"""The first page: a scan in, its most similar ones out, and two of them side by side."""

from __future__ import annotations

import csv
import functools
import html
import io
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..reading_m3ret import M3RetReadError, Scan
from .gallery import Facts, Filters
from .searching import MOST_HITS, Heat, HitFacts, PutAwayError, Query, Searching
from .viewer import WHOLE_RANGE, WINDOWS, facts_of_scan, is_in_hu, linked, picture, slices_of


HITS = 8  # two rows of the grid
HEAVY: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 2}  # as many as a small machine has cores
LIGHT: dict[str, Any] = {
    "concurrency_id": "viewer",
    "concurrency_limit": 8,
    "show_progress": "hidden",
    "trigger_mode": "always_last",
}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
COLUMNS = ["item", "similarity", "modality", "anatomy", "labels", "source"]
TO_VIEWER = "() => document.getElementById('viewer').scrollIntoView({behavior: 'smooth', block: 'start'})"
TO_TOP = "() => window.scrollTo({top: 0, behavior: 'smooth'})"


def in_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """What cannot be done is told in its own words. They hold names of files, and a message is shown as HTML."""

    @functools.wraps(function)
    def told(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except (M3RetReadError, PutAwayError, ValueError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return told


def words_of(facts: Facts) -> str:
    """Modality, anatomy and labels in a line, for where text is shown as text."""
    labels = [label for label in facts["labels"] if label != facts["anatomy"]]
    return " · ".join(part for part in (facts["modality"], facts["anatomy"], ", ".join(labels)) if part)


class SearchPage:
    """Made within a `gr.Blocks`."""

    def __init__(self, searching: Searching):
        self.searching = searching
        gallery = searching.gallery
        self.query: gr.State = gr.State(None, time_to_live=3600)  # of `Query`
        self.hits: gr.State = gr.State([], time_to_live=3600)  # of `HitFacts`
        self.hit: gr.State = gr.State(None, time_to_live=3600)  # its row
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
        self._viewer()
        self._wire()

    def _example_of(self, modality: str) -> int:
        return self.searching.gallery.index.metadata.column("modality").to_pylist().index(modality)

    def _viewer(self) -> None:
        with gr.Column(visible=False, elem_id="viewer") as self.viewer:
            gr.Markdown("## Side by side")
            with gr.Row():
                self.heated = gr.Checkbox(True, label="Show where they match", min_width=140)
                self.linked = gr.Checkbox(True, label="Move both together", min_width=140)
            self.window = gr.Radio([*WINDOWS], value=WHOLE_RANGE, label="CT window", visible=False)
            self.confidence = gr.Markdown()
            with gr.Row():
                with gr.Column(min_width=300):
                    self.query_image = gr.Image(
                        label="Query", type="pil", interactive=False, buttons=["fullscreen"], elem_id="query-image"
                    )
                    self.query_slice = _slice_slider("Slice or frame of the query", "query-slice")
                with gr.Column(min_width=300):
                    self.hit_image = gr.Image(
                        label="Hit", type="pil", interactive=False, buttons=["fullscreen"], elem_id="hit-image"
                    )
                    self.hit_slice = _slice_slider("Slice or frame of the hit", "hit-slice")
                    self.hit_facts = gr.Textbox(label="Hit", interactive=False, lines=2, elem_id="hit-facts")
            with gr.Row():
                self.to_best = gr.Button("Jump to the best match", size="sm", elem_id="to-best")
                self.as_query = gr.Button("Search with this hit", size="sm", variant="primary", elem_id="as-query")

    # --------------------------------------------------------------------------------------------------------- events

    def _wire(self) -> None:
        options = [self.count, self.modalities, self.anatomies, self.other_subjects, self.reranked]
        found = [self.hits, self.grid, self.table, self.status, self.as_csv, self.as_json]
        asked = [self.query, self.query_thumbnail, self.query_facts, *found, self.hit, self.viewer]
        seen = [
            self.viewer, self.hit, self.query_image, self.query_slice, self.hit_image, self.hit_slice, self.hit_facts,
            self.window, self.confidence,
        ]  # fmt: skip
        drawn = [self.query_image, self.query_slice, self.hit_image, self.hit_slice]
        looks = [self.query, self.hit, self.query_slice, self.hit_slice, self.window, self.heated, self.linked]

        self.files.upload(in_words(self._ask_files), [self.files, *options], asked, **PRIVATE, **HEAVY)
        for button, row in self.examples:
            ask = functools.partial(self._ask_row, row)
            button.click(in_words(ask), options, asked, **PRIVATE, **HEAVY)
        again = [self.count.input, self.modalities.change, self.anatomies.change]  # a key releases no slider
        again += [self.other_subjects.change, self.reranked.change]
        gr.on(
            again, in_words(self._search), [self.query, *options], found, trigger_mode="always_last", **PRIVATE, **HEAVY
        )
        self.grid.select(in_words(self._open_of_grid), [self.query, self.hits], seen, **PRIVATE, **HEAVY).success(
            None, js=TO_VIEWER, **PRIVATE
        )
        self.table.select(in_words(self._open_of_table), [self.query, self.hits], seen, **PRIVATE, **HEAVY).success(
            None, js=TO_VIEWER, **PRIVATE
        )
        self.query_slice.input(in_words(self._move_query), looks, drawn, **PRIVATE, **LIGHT)
        self.hit_slice.input(in_words(self._move_hit), looks, drawn, **PRIVATE, **LIGHT)
        gr.on([self.window.input, self.heated.input], in_words(self._draw_both), looks, drawn, **PRIVATE, **LIGHT)
        self.to_best.click(in_words(self._open), [self.query, self.hit], seen, **PRIVATE, **HEAVY)
        self.as_query.click(in_words(self._ask_hit), [self.hit, *options], asked, **PRIVATE, **HEAVY).success(
            None, js=TO_TOP, **PRIVATE
        )
        self.asked, self.options = asked, options

    def _ask_files(
        self, files: list[str] | None, *options: Any, progress: gr.Progress = gr.Progress()
    ) -> dict[Any, Any]:
        progress(0.1, desc="reading and embedding the scan")
        return self._answer(self.searching.query_of_files(files or []), *options)

    def _ask_row(self, row: int, *options: Any) -> dict[Any, Any]:
        return self._answer(self.searching.query_of_row(row), *options)

    def _ask_hit(self, row: int | None, *options: Any) -> dict[Any, Any]:
        if row is None:
            raise ValueError("Choose a hit first.")
        return self._ask_row(row, *options)

    def _answer(self, query: Query, *options: Any) -> dict[Any, Any]:
        image: Image.Image | None = None
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
            self.hit: None,
            self.viewer: gr.Column(visible=False),
        }
        return alone | self._search(query, *options)

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
        filters = Filters(tuple(modalities), tuple(anatomies), other_subjects)
        hits = self.searching.search(query, int(count), filters, reranked)
        folder = Path(self.grid.GRADIO_CACHE) / uuid.uuid4().hex  # where downloads are served from, for a while
        folder.mkdir(parents=True)
        (folder / "hits.csv").write_text(as_csv(hits), encoding="utf-8")
        (folder / "hits.json").write_text(json.dumps(hits, indent=2), encoding="utf-8")
        many = f"**{len(hits)} hits** of {len(self.searching.gallery):,} scans, the most similar first."
        return {
            self.hits: hits,
            self.grid: [(self._tile(hit["item"]), f"{hit['similarity']:.3f} · {words_of(hit)}") for hit in hits],
            self.table: [_cells(hit) for hit in hits],
            self.status: many + " Choose one to see where it matches." * bool(hits and self.searching.has_scans()),
            self.as_csv: gr.DownloadButton(value=folder / "hits.csv", interactive=True),
            self.as_json: gr.DownloadButton(value=folder / "hits.json", interactive=True),
        }

    def _tile(self, row: int) -> Image.Image:
        return self.searching.gallery.thumbnail(row) or Image.new("RGB", (128, 128), "#404040")

    # --------------------------------------------------------------------------------------------------------- viewer

    def _open_of_grid(self, query: Query, hits: list[HitFacts], chosen: gr.SelectData) -> dict[Any, Any]:
        return self._open(query, hits[chosen.index]["item"])

    def _open_of_table(self, query: Query, hits: list[HitFacts], chosen: gr.SelectData) -> dict[Any, Any]:
        return self._open(query, hits[chosen.index[0]]["item"])

    def _open(self, query: Query | None, row: int | None) -> dict[Any, Any]:
        """Query and hit at the slices that match best."""
        if query is None or row is None:
            raise ValueError("Choose a hit first.")
        facts = self.searching.gallery.facts(row)
        shown: dict[Any, Any] = {self.viewer: gr.Column(visible=True), self.hit: row}
        if not self.searching.has_scans():
            shown[self.hit_image] = gr.Image(self._tile(row))
            shown[self.hit_facts] = f"{words_of(facts)}\nno scan here, only its embedding"
            return shown
        asked, hit = self.searching.scan(query.key), self.searching.scan(f"row-{row}")
        heat = self.searching.heat(query, row)
        in_hu = is_in_hu(asked) or is_in_hu(hit)
        return shown | {
            self.query_image: _image(asked, heat.query_slice, None, heat.query, "query"),
            self.query_slice: _slider_at(asked, heat.query_slice),
            self.hit_image: _image(hit, heat.hit_slice, None, heat.hit, "hit"),
            self.hit_slice: _slider_at(hit, heat.hit_slice),
            self.hit_facts: f"{words_of(facts)}\n{facts_of_scan(hit)}",
            self.window: gr.Radio(value=WHOLE_RANGE, visible=in_hu),
            self.confidence: f"The surest pair of patches has a confidence of {heat.confidence:.2f} (of 1). Colour is "
            "relative to it: yellow where they match best.",
        }

    def _move_query(self, *looks: Any) -> dict[Any, Any]:
        return self._draw("query", *looks)

    def _move_hit(self, *looks: Any) -> dict[Any, Any]:
        return self._draw("hit", *looks)

    def _draw_both(self, *looks: Any) -> dict[Any, Any]:
        return self._draw(None, *looks)

    def _draw(
        self,
        moved: str | None,
        query: Query | None,
        row: int | None,
        query_slice: float,
        hit_slice: float,
        window: str,
        heated: bool,
        together: bool,
    ) -> dict[Any, Any]:
        """What changed: the scan that was moved, the other one if they are linked, or both. Sliders count from 1."""
        if query is None or row is None:
            raise ValueError("Choose a hit first.")
        asked, hit = self.searching.scan(query.key), self.searching.scan(f"row-{row}")
        heat: Heat | None = self.searching.heat(query, row) if heated else None
        here, there = int(query_slice) - 1, int(hit_slice) - 1
        drawn: dict[Any, Any] = {}
        if moved == "query" and together:
            there = linked(here, slices_of(asked), slices_of(hit))
            drawn[self.hit_slice] = there + 1
        elif moved == "hit" and together:
            here = linked(there, slices_of(hit), slices_of(asked))
            drawn[self.query_slice] = here + 1
        if moved != "hit" or together:
            drawn[self.query_image] = _image(asked, here, window, heat.query if heat else None, "query")
        if moved != "query" or together:
            drawn[self.hit_image] = _image(hit, there, window, heat.hit if heat else None, "hit")
        return drawn


def _waiting(scans: int) -> str:
    return f"The gallery holds **{scans:,} scans**. Upload one of yours, or begin with one of these."


def _slice_slider(label: str, name: str) -> gr.Slider:
    return gr.Slider(1, 2, value=1, step=1, label=label, buttons=[], elem_id=name)


def _slider_at(scan: Scan, place: int) -> gr.Slider:
    slices = slices_of(scan)
    return gr.Slider(maximum=max(2, slices), value=place + 1, visible=slices > 1)


def _image(scan: Scan, place: int, window: str | None, heat: Any, what: str) -> gr.Image:
    image = picture(scan, place, WINDOWS[window] if window else None, heat)
    return gr.Image(image, alt_text=f"Slice or frame {place + 1} of {slices_of(scan)} of the {what}")


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
