"""The viewer: query and hit side by side, with a heatmap of where they match, for the whole query or a region of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from PIL import Image

from ..reading_m3ret import Scan
from .endpoints import HEAVY, LIGHT, PRIVATE, show_errors
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
FIRST_CORNER_HINT = (
    "To find where a region of the query matches, click two opposite corners of the region in the query image."
)
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
    """What the two images show. Slices count from 0. `region` is None for the whole query."""

    query: Query
    row: int
    query_slice: int
    hit_slice: int
    window: str
    show_heat: bool
    link_slices: bool
    corner: Corner | None
    region: Region | None
    query_scan: Scan
    hit_scan: Scan


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
                    self.query_image = gr.Image(
                        label="Query", type="pil", interactive=False, buttons=["fullscreen"], elem_id="query-image"
                    )
                    self.query_slice = _slice_slider("Slice or frame of the query", "query-slice")
                    with gr.Accordion("Edit the region", open=False, elem_id="region"), gr.Row():
                        self.numbers = [
                            gr.Number(label=label, precision=0, min_width=120, elem_id=_field_id(label))
                            for label in REGION_FIELDS
                        ]
                with gr.Column(min_width=300):
                    self.hit_image = gr.Image(
                        label="Hit", type="pil", interactive=False, buttons=["fullscreen"], elem_id="hit-image"
                    )
                    self.hit_slice = _slice_slider("Slice or frame of the hit", "hit-slice", visible=has_scans)
                    self.hit_facts = gr.Textbox(label="Hit", interactive=False, lines=2, elem_id="hit-facts")
            with gr.Row():
                self.to_best = gr.Button("Go to best match", size="sm", visible=has_scans, elem_id="to-best")
                self.clear_region = gr.Button("Clear region", size="sm", visible=has_scans, elem_id="clear-region")
                self.as_query = gr.Button("Find similar scans", size="sm", variant="primary", elem_id="as-query")
        self._connect_events(query)

    def _connect_events(self, query: gr.State) -> None:
        sliders = [self.query_slice, self.hit_slice]
        images = [self.query_image, self.query_slice, self.hit_image, self.hit_slice]
        matched = [*images, self.confidence, self.hint, self.corner]
        self.open_inputs = [*sliders, self.window, self.show_heat, self.link_slices, self.corner, *self.numbers]
        self.open_outputs = [*matched, self.column, self.hit, self.hit_facts, self.window]
        self.close_outputs = [self.hit, self.corner, self.column, *self.numbers]
        state = [query, self.hit, *self.open_inputs]
        quiet: dict[str, Any] = {**PRIVATE, **HEAVY, "show_progress": "hidden", "trigger_mode": "always_last"}
        self.query_slice.input(show_errors(self._move_query), state, images, **PRIVATE, **LIGHT)
        self.hit_slice.input(show_errors(self._move_hit), state, images, **PRIVATE, **LIGHT)
        gr.on([self.window.input, self.show_heat.input], show_errors(self._redraw), state, images, **PRIVATE, **LIGHT)
        self.to_best.click(show_errors(self._go_to_best), state, matched, **PRIVATE, **HEAVY)
        self.query_image.select(show_errors(self._click), state, [*matched, *self.numbers], **quiet)
        edits = [number.input for number in self.numbers]
        gr.on(edits, show_errors(self._edit_region), state, matched, **quiet)
        self.clear_region.click(show_errors(self._clear_region), state, [*matched, *self.numbers], **quiet)

    # --------------------------------------------------------------------------------------------------------- events

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
        facts = self.service.gallery.facts(row)
        shown: dict[Any, Any] = {self.column: gr.Column(visible=True), self.hit: row}
        if not self.service.has_scans():
            shown[self.hit_image] = gr.Image(self.thumbnail(row))
            shown[self.hit_facts] = f"{describe(facts)}\n{NO_SCAN}"
            return shown
        state = self._state(query, row, *open_inputs)
        shown[self.hit_facts] = f"{describe(facts)}\n{describe_scan(state.hit_scan)}"
        shown[self.window] = gr.Radio(visible=is_hounsfield(state.query_scan) or is_hounsfield(state.hit_scan))
        return shown | self._show_best(state)

    def thumbnail(self, row: int) -> Image.Image:
        """Return the thumbnail of a scan, or a grey square if there is none."""
        return self.service.gallery.thumbnail(row) or Image.new("RGB", (128, 128), "#404040")

    def _go_to_best(self, *values: Any) -> dict[Any, Any]:
        return self._show_best(self._state(*values))

    def _edit_region(self, *values: Any) -> dict[Any, Any]:
        """Apply the region's numbers. The query stays at its slice."""
        state = self._state(*values)
        return self._show_best(state, state.query_slice)

    def _click(self, selected: gr.SelectData, *values: Any) -> dict[Any, Any]:
        """Mark the first corner of a region, or complete the region at the second one.

        In depth, the region includes all slices that share a patch with those of the two corners.
        """
        state = self._state(*values)
        clicked: Corner = (state.query_slice, *voxel_at(state.query_scan, *selected.index))
        if state.corner is None:
            image = self._image("query", replace(state, corner=clicked), state.query_slice)
            return {self.query_image: image, self.hint: SECOND_CORNER_HINT, self.corner: clicked}
        first, last = sorted((state.corner[0], state.query_slice))
        depth = slice(
            self.service.slices_in_patch(state.query, first).start, self.service.slices_in_patch(state.query, last).stop
        )
        rows, columns = (slice(min(pair), max(pair) + 1) for pair in zip(state.corner[1:], clicked[1:], strict=True))
        return self._select_region(state, (depth, rows, columns))

    def _clear_region(self, *values: Any) -> dict[Any, Any]:
        state = self._state(*values)
        return self._select_region(state, full_region(state.query_scan))

    def _select_region(self, state: ViewState, region: Region) -> dict[Any, Any]:
        selected = replace(state, region=None if region == full_region(state.query_scan) else region)
        return self._show_best(selected, state.query_slice) | self._region_fields(state.query_scan, region)

    def _move_query(self, *values: Any) -> dict[Any, Any]:
        state = self._state(*values)
        shown: dict[Any, Any] = {self.query_image: self._image("query", state, state.query_slice)}
        if state.link_slices:
            index = linked_slice(state.query_slice, num_slices(state.query_scan), num_slices(state.hit_scan))
            shown |= {self.hit_slice: index + 1, self.hit_image: self._image("hit", state, index)}
        return shown

    def _move_hit(self, *values: Any) -> dict[Any, Any]:
        state = self._state(*values)
        shown: dict[Any, Any] = {self.hit_image: self._image("hit", state, state.hit_slice)}
        if state.link_slices:
            index = linked_slice(state.hit_slice, num_slices(state.hit_scan), num_slices(state.query_scan))
            shown |= {self.query_slice: index + 1, self.query_image: self._image("query", state, index)}
        return shown

    def _redraw(self, *values: Any) -> dict[Any, Any]:
        state = self._state(*values)
        return {
            self.query_image: self._image("query", state, state.query_slice),
            self.hit_image: self._image("hit", state, state.hit_slice),
        }

    # --------------------------------------------------------------------------------------------------------- images

    def _state(
        self,
        query: Query | None,
        row: int | None,
        query_slice: float,
        hit_slice: float,
        window: str,
        show_heat: bool,
        link_slices: bool,
        corner: Corner | None,
        *numbers: float | None,
    ) -> ViewState:
        query, row = _require_hit(query, row)
        query_scan, hit_scan = self.service.scan(query.key), self.service.scan(key_of_row(row))
        slices = int(query_slice) - 1, int(hit_slice) - 1
        region = region_from_numbers(query_scan, numbers)
        return ViewState(query, row, *slices, window, show_heat, link_slices, corner, region, query_scan, hit_scan)

    def _heat(self, state: ViewState) -> Heat:
        return self.service.heat(state.query, state.row, state.region)

    def _show_best(self, state: ViewState, query_slice: int | None = None) -> dict[Any, Any]:
        """Show the hit at its best slice, and the query at its best slice or the given one. Clears a first corner."""
        state = replace(state, corner=None)
        heat = self._heat(state)
        query_slice = heat.query_slice if query_slice is None else query_slice
        return {
            self.query_image: self._image("query", state, query_slice),
            self.query_slice: _slider_at(state.query_scan, query_slice),
            self.hit_image: self._image("hit", state, heat.hit_slice),
            self.hit_slice: _slider_at(state.hit_scan, heat.hit_slice),
            self.confidence: f"Best match: confidence {heat.confidence:.2f} (0 to 1). Colours are relative to it; "
            "yellow marks the best match.",
            self.hint: FIRST_CORNER_HINT if state.region is None else _describe_region(state.query_scan, state.region),
            self.corner: None,
        }

    def _image(self, which: str, state: ViewState, index: int) -> gr.Image:
        heat = self._heat(state) if state.show_heat else None
        window = WINDOWS[state.window]
        if which == "query":
            scan = state.query_scan
            mark = state.corner[1:] if state.corner is not None and state.corner[0] == index else None
            image = render_slice(scan, index, window, heat.query if heat else None, state.region, mark)
        else:
            scan = state.hit_scan
            image = render_slice(scan, index, window, heat.hit if heat else None)
        return gr.Image(image, alt_text=f"Slice or frame {index + 1} of {num_slices(scan)} of the {which}")

    def _region_fields(self, scan: Scan, region: Region) -> dict[Any, Any]:
        ends = [end for axis in region for end in (axis.start + 1, axis.stop)]
        has_depth = num_slices(scan) > 1
        return {
            field: gr.Number(value=end, visible=has_depth or number > 1)  # the first two fields are slices
            for number, (field, end) in enumerate(zip(self.numbers, ends, strict=True))
        }


def _describe_region(scan: Scan, region: Region) -> str:
    depth, rows, columns = (f"{axis.start + 1} to {axis.stop}" for axis in region)
    slices = f", slices {depth}" if num_slices(scan) > 1 else ""
    return f"Matches of columns {columns}, rows {rows}{slices}. Click two corners to select another region."


def _require_hit(query: Query | None, row: int | None) -> tuple[Query, int]:
    if query is None or row is None:
        raise ValueError("Select a hit first.")
    return query, row


def _field_id(label: str) -> str:
    return "region-" + label.lower().replace(" ", "-")


def _slice_slider(label: str, name: str, visible: bool = True) -> gr.Slider:
    return gr.Slider(1, 2, value=1, step=1, label=label, buttons=[], visible=visible, elem_id=name)


def _slider_at(scan: Scan, index: int) -> gr.Slider:
    slices = num_slices(scan)
    return gr.Slider(maximum=max(2, slices), value=index + 1, visible=slices > 1)
