"""The viewer: query and hit side by side, with a heatmap of where they match, for the whole query or a region of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from PIL import Image

from ..errors import InputError
from ..reading_m3ret import Scan
from .endpoints import HEAVY, LIGHT, PRIVATE, QUIET, show_errors
from .gallery import Facts
from .service import Heat, Query, SearchService, key_of_row
from .viewer import (
    FULL_RANGE,
    WINDOWS,
    Region,
    describe_scan,
    full_region,
    is_hounsfield,
    linked_slice,
    num_slices,
    region_from_numbers,
    render_slice,
    voxel_at,
)


MODALITY_NAMES = {"xray": "X-ray", "ultrasound": "Ultrasound", "endoscopy": "Endoscopy", "ct": "CT", "mri": "MRI"}
# along D, H and W, counted from 1 as on the sliders
REGION_FIELDS = ("First slice", "Last slice", "Top row", "Bottom row", "Left column", "Right column")
FIRST_CORNER_HINT = "To find where a region of the query matches, click two opposite corners of it in the query image."
SECOND_CORNER_HINT = "Click the opposite corner. To include more slices, first move to another slice."
NO_SCAN = "This gallery has no scans, only embeddings."
Corner = tuple[int, int, int]  # the voxel of a first click: slice, row, column


def modality_name(modality: str) -> str:
    """Return the name of a modality as it is shown, e.g. X-ray for xray."""
    return MODALITY_NAMES.get(modality, modality)


def describe(facts: Facts) -> str:
    """Return modality, anatomy and labels in one line. Labels are untrusted: show it as text, not as HTML."""
    labels = [label for label in facts["labels"] if label != facts["anatomy"]]
    return " · ".join(filter(None, (modality_name(facts["modality"]), facts["anatomy"], ", ".join(labels))))


@dataclass(frozen=True, eq=False)
class ViewState:
    """What the two images show. The keys of `scans` and `slices` are `query` and `hit`."""

    query: Query
    row: int  # of the hit
    scans: dict[str, Scan]
    slices: dict[str, int]  # from 0
    window: str
    show_heat: bool
    link_slices: bool
    corner: Corner | None
    region: Region | None  # None for the whole query


class SideBySide:
    """The components and events of the viewer. Construct it within a `gr.Blocks`.

    Args:
        query: State of the page: a `Query` or None.

    Attributes:
        hit: State: the row of the hit that is shown.
        as_query: Button to search with that hit.
        open_inputs: Inputs, after query and row, of an event that calls `open`.
        open_outputs: Outputs of such an event.
        close_outputs: Outputs of an event that calls `close`.
    """

    def __init__(self, service: SearchService, query: gr.State):
        self.service = service
        self.hit: gr.State = gr.State(None, time_to_live=3600)
        self.corner: gr.State = gr.State(None, time_to_live=3600)
        self.images: dict[str, gr.Image] = {}
        self.sliders: dict[str, gr.Slider] = {}
        has_scans = service.has_scans()  # without scans there is at most a thumbnail of the hit
        with gr.Column(visible=False, elem_id="viewer") as self.column:
            gr.Markdown("## Compare")
            with gr.Row(visible=has_scans):
                self.show_heat = gr.Checkbox(True, label="Highlight matches", min_width=140, elem_id="show-heat")
                self.link_slices = gr.Checkbox(True, label="Link slices", min_width=140, elem_id="link-slices")
            self.window = gr.Radio([*WINDOWS], value=FULL_RANGE, label="CT window", visible=False, elem_id="window")
            self.confidence = gr.Markdown()
            self.hint = gr.Markdown(FIRST_CORNER_HINT, visible=has_scans, elem_id="region-hint")
            with gr.Row():
                with gr.Column(min_width=300, visible=has_scans):
                    self._add_image("query", has_scans)
                    with gr.Accordion("Edit the region", open=False, elem_id="region"), gr.Row():
                        self.numbers = [
                            gr.Number(label=label, precision=0, min_width=120, elem_id=_field_id(label))
                            for label in REGION_FIELDS
                        ]
                with gr.Column(min_width=300):
                    self._add_image("hit", has_scans)
                    self.hit_facts = gr.Textbox(label="Hit", interactive=False, lines=2, elem_id="hit-facts")
            with gr.Row():
                self.to_best = gr.Button("Go to best match", size="sm", visible=has_scans, elem_id="to-best")
                self.clear_region = gr.Button("Clear region", size="sm", visible=has_scans, elem_id="clear-region")
                self.as_query = gr.Button("Find similar scans", size="sm", variant="primary", elem_id="as-query")
        self._connect_events(query)

    def _add_image(self, which: str, has_slider: bool) -> None:
        options: dict[str, Any] = {"type": "pil", "interactive": False, "buttons": ["fullscreen"]}
        self.images[which] = gr.Image(label=which.capitalize(), elem_id=f"{which}-image", **options)
        options = {"step": 1, "buttons": [], "visible": has_slider, "elem_id": f"{which}-slice"}
        self.sliders[which] = gr.Slider(1, 2, value=1, label=f"Slice or frame of the {which}", **options)

    def _connect_events(self, query: gr.State) -> None:
        sliders, images = [*self.sliders.values()], [*self.images.values()]
        matched = [*images, *sliders, self.confidence, self.hint, self.corner]
        self.open_inputs = [*sliders, self.window, self.show_heat, self.link_slices, self.corner, *self.numbers]
        self.open_outputs = [*matched, self.column, self.hit, self.hit_facts, self.window]
        self.close_outputs = [self.hit, self.corner, self.column, *self.numbers]
        state = [query, self.hit, *self.open_inputs]
        for which, slider in self.sliders.items():
            move = functools.partial(self._move, which)
            slider.input(show_errors(move), state, [*images, *sliders], **PRIVATE, **LIGHT)
        gr.on([self.window.input, self.show_heat.input], show_errors(self._redraw), state, images, **PRIVATE, **LIGHT)
        self.to_best.click(show_errors(self._go_to_best), state, matched, **PRIVATE, **HEAVY)
        quiet = {**PRIVATE, **HEAVY, **QUIET}
        edits = [number.input for number in self.numbers]
        gr.on(edits, show_errors(self._edit_region), state, matched, **quiet)
        self.images["query"].select(show_errors(self._click), state, [*matched, *self.numbers], **quiet)
        self.clear_region.click(show_errors(self._clear_region), state, [*matched, *self.numbers], **quiet)

    def close(self, scan: Scan | None) -> dict[Any, Any]:
        """Hide the viewer and reset the region, for a new query. Values of `close_outputs`."""
        closed: dict[Any, Any] = {self.hit: None, self.corner: None, self.column: gr.Column(visible=False)}
        return closed | ({} if scan is None else self._region_fields(scan, full_region(scan)))

    def open(self, query: Query | None, row: int | None, *open_inputs: Any) -> dict[Any, Any]:
        """Show query and hit at the slices that match best, or the thumbnail if the gallery has no scans.

        Returns:
            Values of `open_outputs`.
        """
        query, row = _require_hit(query, row)
        facts = describe(self.service.gallery.facts(row))
        shown: dict[Any, Any] = {self.column: gr.Column(visible=True), self.hit: row}
        if not self.service.has_scans():
            return shown | {self.images["hit"]: self.thumbnail(row), self.hit_facts: f"{facts}\n{NO_SCAN}"}
        state = self._state(query, row, *open_inputs)
        shown[self.hit_facts] = f"{facts}\n{describe_scan(state.scans['hit'])}"
        shown[self.window] = gr.Radio(visible=any(map(is_hounsfield, state.scans.values())))
        return shown | self._show_best(state)

    def thumbnail(self, row: int) -> Image.Image:
        """Return the thumbnail of a scan, or a grey square if there is none."""
        return self.service.gallery.thumbnail(row) or Image.new("RGB", (128, 128), "#404040")

    def _go_to_best(self, *values: Any) -> dict[Any, Any]:
        return self._show_best(self._state(*values))

    def _edit_region(self, *values: Any) -> dict[Any, Any]:
        """Apply the region's numbers. The query stays at its slice."""
        state = self._state(*values)
        return self._show_best(state, state.slices["query"])

    def _click(self, selected: gr.SelectData, *values: Any) -> dict[Any, Any]:
        """Mark the first corner of a region, or complete the region at the second one.

        In depth, the region includes all slices that share a patch with those of the two corners.
        """
        state = self._state(*values)
        index = state.slices["query"]
        clicked: Corner = (index, *voxel_at(state.scans["query"], *selected.index))
        if state.corner is None:
            marked = self._image(replace(state, corner=clicked), "query", index)
            return marked | {self.hint: SECOND_CORNER_HINT, self.corner: clicked}
        first, last = (self.service.slices_in_patch(state.query, end) for end in sorted((state.corner[0], index)))
        rows, columns = (slice(min(pair), max(pair) + 1) for pair in zip(state.corner[1:], clicked[1:], strict=True))
        return self._select_region(state, (slice(first.start, last.stop), rows, columns))

    def _clear_region(self, *values: Any) -> dict[Any, Any]:
        state = self._state(*values)
        return self._select_region(state, full_region(state.scans["query"]))

    def _select_region(self, state: ViewState, region: Region) -> dict[Any, Any]:
        scan = state.scans["query"]
        selected = replace(state, region=None if region == full_region(scan) else region)
        return self._show_best(selected, state.slices["query"]) | self._region_fields(scan, region)

    def _move(self, which: str, *values: Any) -> dict[Any, Any]:
        """Show the slice that one slider was moved to, and the linked slice of the other scan."""
        state = self._state(*values)
        shown = self._image(state, which, state.slices[which])
        if state.link_slices:
            other = "hit" if which == "query" else "query"
            index = linked_slice(state.slices[which], num_slices(state.scans[which]), num_slices(state.scans[other]))
            shown |= {self.sliders[other]: index + 1} | self._image(state, other, index)
        return shown

    def _redraw(self, *values: Any) -> dict[Any, Any]:
        state = self._state(*values)
        return self._image(state, "query", state.slices["query"]) | self._image(state, "hit", state.slices["hit"])

    def _state(self, query: Query | None, row: int | None, *inputs: Any) -> ViewState:
        """Build the state from the values of query, row and `open_inputs`."""
        query_slice, hit_slice, window, show_heat, link_slices, corner, *numbers = inputs
        query, row = _require_hit(query, row)
        scans = {"query": self.service.scan(query.key), "hit": self.service.scan(key_of_row(row))}
        slices = {"query": int(query_slice) - 1, "hit": int(hit_slice) - 1}
        region = region_from_numbers(scans["query"], numbers)
        return ViewState(query, row, scans, slices, window, show_heat, link_slices, corner, region)

    def _heat(self, state: ViewState) -> Heat:
        return self.service.heat(state.query, state.row, state.region)

    def _show_best(self, state: ViewState, query_slice: int | None = None) -> dict[Any, Any]:
        """Show the hit at its best slice, and the query at its best slice or the given one. Clears a first corner."""
        state = replace(state, corner=None)
        heat = self._heat(state)
        query_slice = heat.query_slice if query_slice is None else query_slice
        shown = {
            self.confidence: f"Best match: confidence {heat.confidence:.2f} (0 to 1). Colours are relative to it; "
            "yellow marks the best match.",
            self.hint: _describe_region(state.scans["query"], state.region) if state.region else FIRST_CORNER_HINT,
            self.corner: None,
        }
        for which, index in (("query", query_slice), ("hit", heat.hit_slice)):
            slices = num_slices(state.scans[which])
            slider = gr.Slider(maximum=max(2, slices), value=index + 1, visible=slices > 1)
            shown |= {self.sliders[which]: slider} | self._image(state, which, index)
        return shown

    def _image(self, state: ViewState, which: str, index: int) -> dict[Any, Any]:
        """Render a slice of the query or the hit."""
        scan, window = state.scans[which], WINDOWS[state.window]
        heat = self._heat(state) if state.show_heat else None
        if which == "query":
            mark = state.corner[1:] if state.corner is not None and state.corner[0] == index else None
            image = render_slice(scan, index, window, heat.query if heat else None, state.region, mark)
        else:
            image = render_slice(scan, index, window, heat.hit if heat else None)
        alt_text = f"Slice or frame {index + 1} of {num_slices(scan)} of the {which}"
        return {self.images[which]: gr.Image(image, alt_text=alt_text)}

    def _region_fields(self, scan: Scan, region: Region) -> dict[Any, Any]:
        ends = [end for axis in region for end in (axis.start + 1, axis.stop)]
        visible = [num_slices(scan) > 1] * 2 + [True] * 4  # the first two fields are slices
        return {
            field: gr.Number(value=end, visible=shown)
            for field, end, shown in zip(self.numbers, ends, visible, strict=True)
        }


def _describe_region(scan: Scan, region: Region) -> str:
    depth, rows, columns = (f"{axis.start + 1} to {axis.stop}" for axis in region)
    slices = f", slices {depth}" if num_slices(scan) > 1 else ""
    return f"Matches of columns {columns}, rows {rows}{slices}. Click two corners to select another region."


def _require_hit(query: Query | None, row: int | None) -> tuple[Query, int]:
    if query is None or row is None:
        raise InputError("Select a hit first.")
    return query, row


def _field_id(label: str) -> str:
    return "region-" + label.lower().replace(" ", "-")
