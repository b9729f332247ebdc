"""The "Search" tab: upload a scan or choose an example, see the most similar scans, and compare one with the query."""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import InputError
from ..reading_m3ret import FORMATS
from ..search.filters import MetadataFilter
from ..search.thumbnails import is_blank
from .endpoints import HEAVY, PRIVATE, error_html
from .pixels import describe_scan, preview
from .results import (
    HTML,
    Group,
    describe,
    group_similar,
    modality_name,
    once_loaded,
    readable,
    to_csv,
)
from .service import DEFAULT_HITS, MAX_HITS, HitFacts, Query, SearchService
from .uploads import Choice
from .viewer import Viewer


EXAMPLES = 8  # pictures in two rows of four, one of each modality and anatomy
MAX_CHIPS = 10  # values of a filter
SORTS = ("Most similar first", "Modality", "Anatomy")
LIVE = "<div role='{}'>${{value || ''}}</div>"  # read out when it changes
NO_PIXELS = "This gallery has no pictures, only embeddings."


@dataclass
class Turn:
    """The number of queries of a visitor so far. It tells whether the query of an event is still the latest."""

    number: int = 0


class SearchPage:
    """The components and events of the tab. Construct it within a `gr.Blocks`.

    A visitor has one query at a time. All that is shown of it is replaced or cleared together, see `cleared`. If an
    event ends after a later query was chosen, it changes nothing.

    Attributes:
        options: Inputs of a search: turn, number of results, filters and order.
        outputs: Outputs of an event that changes the query.
    """

    def __init__(self, service: SearchService):
        self.service = service
        gallery = service.gallery
        self.query: gr.State = gr.State(None, time_to_live=3600)  # a `Query`
        self.groups: gr.State = gr.State([], time_to_live=3600)  # a list of `Group`, the results
        self.choices: gr.State = gr.State([], time_to_live=1800)  # a list of `Choice`
        self.turn = gr.State(Turn())
        with gr.Row(elem_id="search-row"):
            with gr.Column(scale=2, min_width=280, elem_id="query-column"):
                with gr.Column(elem_id="upload-box"):
                    self.files = gr.File(
                        label="Your scan: file, series or clip", file_count="multiple", height=150, elem_id="upload"
                    )
                    self.folder = gr.UploadButton(
                        "Choose a folder", file_count="directory", size="sm", elem_id="upload-folder"
                    )
                gr.HTML(HTML.formats(FORMATS), elem_id="formats")
                self.query_card = gr.HTML(elem_id="query-card")
                self.another = gr.Button("Other scans of this upload", size="sm", visible=False, elem_id="another")
                self.clear = gr.Button("Start over", size="sm", visible=False, elem_id="start-over")
            with gr.Column(scale=5, min_width=300):
                self.notice = gr.HTML(elem_id="notice", html_template=LIVE.format("alert"))
                self.choice = self._clickable("which-one")
                with gr.Column(elem_id="welcome") as self.welcome:
                    gr.HTML(HTML.welcome(len(gallery)))
                    self.examples = self._clickable("examples", self._example_cards())
                with gr.Column(visible=False, elem_id="results") as self.area:
                    self.status = gr.HTML(elem_id="status", html_template=LIVE.format("status"))
                    self._add_options()
                    self.grid = self._clickable("grid")
                    with gr.Accordion("Table and downloads", open=False, elem_id="table-accordion"):
                        self.table = gr.HTML(elem_id="table")
                        with gr.Row():
                            self.as_csv = gr.DownloadButton("Download CSV", size="sm", elem_id="as-csv")
                            self.as_json = gr.DownloadButton("Download JSON", size="sm", elem_id="as-json")
        self.viewer = Viewer(service)
        self._connect_events()

    def _clickable(self, elem_id: str, value: str = "") -> gr.HTML:
        """Add HTML in which a click on an element with `data-index` is a selection."""
        script = once_loaded("m3ret.clickable(element, trigger, watch)")
        return gr.HTML(value, elem_id=elem_id, js_on_load=script)

    def _example_cards(self) -> str:
        visible = self.service.gallery.visible.select(["modality", "anatomy"]).to_pylist()
        rows = {(facts["modality"], facts["anatomy"]): row for row, facts in reversed([*enumerate(visible)])}
        # one of each modality first, then a second anatomy of each, and so on
        turn = {pair: sum(other < pair for other in rows if other[0] == pair[0]) for pair in rows}
        first = sorted(rows, key=lambda pair: (turn[pair], pair))[:EXAMPLES]
        return str(HTML.examples([rows[pair] for pair in sorted(first)], self.service.gallery))

    def _add_options(self) -> None:
        def chips(column: str, name: Callable[[str], str]) -> gr.CheckboxGroup:
            counts = self.service.gallery.counts(column)
            first = sorted(counts, key=lambda value: -counts[value])[:MAX_CHIPS]
            choices = [(f"{name(value)} ({counts[value]})", value) for value in sorted(first)]
            label = f"Show only this {column}"
            return gr.CheckboxGroup(
                choices, label=label, elem_id=f"{column}-chips", elem_classes="chips", min_width=200
            )

        with gr.Group():
            self.modalities, self.anatomies = chips("modality", modality_name), chips("anatomy", readable)
        with gr.Accordion("Options", open=False, elem_id="options"):
            self.count = gr.Slider(1, MAX_HITS, DEFAULT_HITS, step=1, label="Number of results", elem_id="count")
            self.sort = gr.Radio([*SORTS], value=SORTS[0], label="Order", elem_id="sort")
            self.exclude_same_patient = gr.Checkbox(
                label="Leave out the same patient",
                info="Applies if the query is a scan of the gallery.",
                elem_id="exclude-same-patient",
            )
            self.rerank = gr.Checkbox(
                label="Compare image regions",
                info="Orders the results by how well their regions match those of the query. Slower.",
                visible=self.service.has_scans(),
                elem_id="rerank",
            )

    def _connect_events(self) -> None:
        viewer = self.viewer
        filters = [self.modalities, self.anatomies]
        self.options = [self.turn, self.count, *filters, self.sort, self.exclude_same_patient, self.rerank]
        result_outputs = [self.groups, self.grid, self.table, self.status, self.as_csv, self.as_json]
        result_outputs += [self.notice, viewer.view]
        panes = [self.query_card, self.another, self.clear, self.welcome, self.area, self.choice]
        self.outputs = [self.query, self.choices, self.files, *panes, *result_outputs]
        event: dict[str, Any] = {"show_progress_on": self.notice, "show_progress": "minimal", **PRIVATE, **HEAVY}
        new: dict[str, Any] = {"outputs": self.outputs, "trigger_mode": "multiple", **event}
        for files in (self.files, self.folder):
            uploaded = "(files, ...options) => [m3ret.isLatestQuery() ? files : null, ...options]"
            files.upload(self._of_files, [files, *self.options], js=uploaded, **new)
        for cleared in (self.files.clear, self.clear.click):
            cleared(self._new_query(lambda _: {}), [self.turn], self.outputs, show_progress="hidden", **PRIVATE)
        for clicked in (self.examples.select, viewer.view.submit):
            clicked(self.of_click, self.options, **new)
        self.choice.select(self._new_query(self._of_choice), [self.choices, *self.options], **new)
        self.another.click(self._new_query(self._offer), [self.choices, self.turn], **new)
        # a slider's `release` does not fire for keys
        changes = [self.count.input, self.modalities.change, self.anatomies.change, self.sort.change]
        changes += [self.exclude_same_patient.change, self.rerank.change]
        search = self._shown(self._search)
        gr.on(changes, search, [self.query, *self.options], result_outputs, trigger_mode="always_last", **event)
        opening = [viewer.view, self.notice]
        for selected in (self.grid.select, viewer.view.select):
            selected(self._shown(self._open), [self.turn, self.query, self.groups], opening, **event)
        by_region = self._shown(self._search_region)
        viewer.view.input(by_region, [self.query, *self.options], [self.query, *result_outputs], **event)

    # -------------------------------------------------------------------------------------------------------- states

    def cleared(self) -> dict[Any, Any]:
        """Return the values of all `outputs` without a query."""
        empty = [self.query_card, self.choice, self.grid, self.table, self.status, self.notice]
        return {
            **dict.fromkeys(empty, ""),
            **dict.fromkeys([self.query, self.files, self.viewer.view, self.as_csv, self.as_json]),
            **{self.choices: [], self.groups: []},
            **dict.fromkeys([self.another, self.clear], gr.Button(visible=False)),
            **{self.welcome: gr.Column(visible=True), self.area: gr.Column(visible=False)},
        }

    def _shown(
        self, function: Callable[..., dict[Any, Any]], is_new_query: bool = False
    ) -> Callable[..., dict[Any, Any]]:
        """Wrap an event handler, one of whose inputs is the turn.

        Its errors are shown in the page, and earlier ones are not. If a later query was chosen meanwhile, it changes
        nothing. Of a new query, nothing of the earlier one stays, even after an error.
        """

        @functools.wraps(function)
        def handler(*args: Any, **kwargs: Any) -> dict[Any, Any]:
            turn = next(value for value in args if isinstance(value, Turn))
            turn.number += is_new_query
            own = turn.number
            found = self.cleared() if is_new_query else {self.notice: ""}
            try:
                found |= function(*args, **kwargs)
            except Exception as error:
                found[self.notice] = error_html(error)
            return found if turn.number == own else {self.notice: gr.skip()}

        return handler

    def _new_query(self, function: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
        return self._shown(function, is_new_query=True)

    # -------------------------------------------------------------------------------------------------------- queries

    def _of_files(self, files: Any, *options: Any, progress: gr.Progress = gr.Progress()) -> dict[Any, Any]:
        def search(*options: Any) -> dict[Any, Any]:
            found = self.service.query_or_choices(files)
            if isinstance(found, Query):
                return {**self._query(found, *options), self.files: gr.skip()}
            return self._offer(found)

        if files is None:  # a later query was chosen while they were uploaded
            return {self.files: None}
        progress(None, desc="Reading the scan")
        return self._new_query(search)(*options)

    def _of_choice(self, selected: gr.SelectData, choices: list[Choice], *options: Any) -> dict[Any, Any]:
        if not 0 <= selected.index < len(choices):
            raise InputError("These scans are no longer in memory. Please upload them again.")
        choice = choices[selected.index]
        found = self._query(self.service.query_of_files(choice.files, choice.series), *options)
        return {**found, self.choices: choices, self.another: gr.Button(visible=True)}

    def _offer(self, choices: list[Choice], *_: Any) -> dict[Any, Any]:
        """Ask which of several scans of an upload to search with."""
        return {self.choices: choices, self.choice: HTML.which_one(choices), self.welcome: gr.Column(visible=False)}

    def of_click(self, selected: gr.SelectData, *options: Any) -> dict[Any, Any]:
        """Search with the scan of the gallery that was clicked. Values of `outputs`."""
        return self.of_item(selected.index, *options)

    def of_item(self, row: int | None, *options: Any) -> dict[Any, Any]:
        """Search with a scan of the gallery. Values of `outputs`."""

        def search(*options: Any) -> dict[Any, Any]:
            if row is None:
                raise InputError("Enter the number of a scan first.")
            return self._query(self.service.query_of_row(row), *options)

        return self._new_query(search)(*options)

    def _query(self, query: Query, *options: Any) -> dict[Any, Any]:
        facts, picture = [], self.service.gallery.thumbnail(query.row) if query.row is not None else None
        if query.row is not None:
            facts.append(describe(self.service.gallery.facts(query.row)))
        if query.row is None or self.service.has_scans():
            scan = self.service.scan(query.key)
            picture = preview(scan)
            facts.append(describe_scan(scan))
        return {
            self.query: query,
            self.query_card: HTML.query(picture, facts),
            self.clear: gr.Button(visible=True),
            self.welcome: gr.Column(visible=False),
            self.area: gr.Column(visible=True),
            **self._search(query, *options, picture=picture),
        }

    # -------------------------------------------------------------------------------------------------------- results

    def _search(
        self,
        query: Query | None,
        _: Turn,
        count: float,
        modalities: list[str],
        anatomies: list[str],
        sort: str,
        exclude_same_patient: bool,
        rerank: bool,
        *,
        picture: Any = None,
    ) -> dict[Any, Any]:
        if query is None:
            return {}
        gallery = self.service.gallery
        where = MetadataFilter(modality=modalities or None, anatomy=anatomies or None)
        found = int(count) if rerank else MAX_HITS  # comparing regions takes time for each
        hits = self.service.search(query, found, where, exclude_same_patient=exclude_same_patient, rerank=rerank)
        groups = group_similar(hits, gallery, int(count))
        hits = [hit for group in groups for hit in group.hits]
        is_cosine = not rerank and query.region is None
        order = "most similar first" if is_cosine else "by their regions" if rerank else "by the selected region"
        verdict = reason = ""
        if picture is not None and is_blank(picture):
            verdict, reason = "The query is blank", "It shows nothing that could be compared."
        elif hits and is_cosine:
            verdict, reason = self._level_words(hits[0], bool(modalities or anatomies))
        status = HTML.status(groups, verdict, reason, order, is_cosine)
        if sort != SORTS[0]:
            column = "modality" if sort == SORTS[1] else "anatomy"
            groups.sort(key=lambda group: group.first[column])  # type: ignore[literal-required]
        folder = Path(self.files.GRADIO_CACHE) / uuid.uuid4().hex  # downloads are served from here, then swept
        folder.mkdir(parents=True)
        (folder / "results.csv").write_text(to_csv(hits), encoding="utf-8")
        (folder / "results.json").write_text(json.dumps(hits, indent=2), encoding="utf-8")
        return {
            **{self.groups: groups, self.status: status, self.grid: HTML.cards(groups), self.table: HTML.table(groups)},
            self.viewer.view: None,
            **{self.as_csv: str(folder / "results.csv"), self.as_json: str(folder / "results.json")},
        }

    def _level_words(self, best: HitFacts, is_filtered: bool) -> tuple[str, str]:
        calibration = self.service.gallery.calibration
        level = calibration.level(best["similarity"])
        part = "the selected part of this gallery" if is_filtered else "this gallery"
        p = calibration.p_value(best["similarity"])
        own = f"No more than {p:.1%} of the gallery's own scans are as far from the scans of all other patients."
        if level == "unlike":
            return f"Unlike anything in {part}", f"{own} Do not rely on these results."
        if level == "weak":
            return f"Only weak matches in {part}", own
        return "", ""

    def _open(self, selected: gr.SelectData, _: Turn, query: Query | None, groups: list[Group]) -> dict[Any, Any]:
        if query is None or selected.index not in [hit["item"] for group in groups for hit in group.hits]:
            raise InputError("This result is not shown any more. Select another one.")
        if not self.service.has_scans():
            raise InputError(NO_PIXELS)
        return {self.viewer.view: self.viewer.open(query, groups, selected.index)}

    def _search_region(self, selected: gr.SelectData, query: Query | None, *options: Any) -> dict[Any, Any]:
        """Order the gallery by a box of one slice of the query, and open the first hit."""
        if query is None:
            raise InputError("Choose a scan first.")
        query = self.service.with_region(query, *selected.index)
        found = {self.query: query, **self._search(query, *options)}
        groups = found[self.groups]
        best = min(groups, key=lambda group: group.rank, default=None)
        return found | ({self.viewer.view: self.viewer.open(query, groups, best.first["item"])} if best else {})
