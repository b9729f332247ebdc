"""Query and hit side by side: where they match, as a whole or for a region that the visitor chooses in the query."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from PIL import Image

from ..reading_m3ret import Scan
from .gallery import Facts
from .handling import HEAVY, LIGHT, PRIVATE, in_words
from .searching import Heat, Query, Searching
from .viewer import (
    WHOLE_RANGE,
    WINDOWS,
    Region,
    facts_of_scan,
    is_in_hu,
    linked,
    picture,
    region_of,
    slices_of,
    voxel_at,
    whole_of,
)


# along D, H and W, counted from 1 as the sliders are
REGION_FIELDS = ("First slice", "Last slice", "Top row", "Bottom row", "Left column", "Right column")
HOW_TO_CHOOSE = "Where does *this* match? Click two opposite corners of it in the query's picture."
SECOND_CORNER = "Now the opposite corner; on another slice for a deeper part."
Corner = tuple[int, int, int]  # the voxel of a first click: slice, row, column


def words_of(facts: Facts) -> str:
    """Modality, anatomy and labels in a line, for where text is shown as text."""
    labels = [label for label in facts["labels"] if label != facts["anatomy"]]
    return " · ".join(part for part in (facts["modality"], facts["anatomy"], ", ".join(labels)) if part)


@dataclass(frozen=True, eq=False)
class Look:
    """What two pictures show. Slices count from 0. region: None for the whole query."""

    query: Query
    row: int
    query_slice: int
    hit_slice: int
    window: str
    heated: bool
    together: bool
    corner: Corner | None
    region: Region | None
    query_scan: Scan
    hit_scan: Scan


class SideBySide:
    """Made within a `gr.Blocks`. query: the page's state, a `Query` or None.

    hit: the state of the row that is looked at. as_query: the button that searches with it. opens, opened: inputs after
    query and row, and outputs, of an event that calls `open`.
    """

    def __init__(self, searching: Searching, query: gr.State):
        self.searching = searching
        self.hit: gr.State = gr.State(None, time_to_live=3600)
        self.corner: gr.State = gr.State(None, time_to_live=3600)
        has_scans = searching.has_scans()  # else there is a small picture of the hit at best
        with gr.Column(visible=False, elem_id="viewer") as self.column:
            gr.Markdown("## Side by side")
            with gr.Row(visible=has_scans):
                self.heated = gr.Checkbox(True, label="Show where they match", min_width=140)
                self.linked = gr.Checkbox(True, label="Move both together", min_width=140)
            self.window = gr.Radio([*WINDOWS], value=WHOLE_RANGE, label="CT window", visible=False)
            self.confidence = gr.Markdown()
            self.asking = gr.Markdown(HOW_TO_CHOOSE, visible=has_scans, elem_id="asking")
            with gr.Row():
                with gr.Column(min_width=300, visible=has_scans):
                    self.query_image = gr.Image(
                        label="Query", type="pil", interactive=False, buttons=["fullscreen"], elem_id="query-image"
                    )
                    self.query_slice = _slice_slider("Slice or frame of the query", "query-slice")
                    with gr.Accordion("The region in numbers", open=False, elem_id="region"), gr.Row():
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
                self.to_best = gr.Button("Jump to the best match", size="sm", visible=has_scans, elem_id="to-best")
                self.whole = gr.Button("Whole scan", size="sm", visible=has_scans, elem_id="whole-scan")
                self.as_query = gr.Button("Search with this hit", size="sm", variant="primary", elem_id="as-query")
        self._wire(query)

    def _wire(self, query: gr.State) -> None:
        sliders = [self.query_slice, self.hit_slice]
        self.opens = [*sliders, self.window, self.heated, self.linked, self.corner, *self.numbers]
        drawn = [self.query_image, self.query_slice, self.hit_image, self.hit_slice]
        placed = [*drawn, self.confidence, self.asking, self.corner]
        self.opened = [*placed, self.column, self.hit, self.hit_facts, self.window]
        looks = [query, self.hit, *self.opens]
        again: dict[str, Any] = {**HEAVY, "show_progress": "hidden", "trigger_mode": "always_last"}
        self.query_slice.input(in_words(self._move_query), looks, drawn, **PRIVATE, **LIGHT)
        self.hit_slice.input(in_words(self._move_hit), looks, drawn, **PRIVATE, **LIGHT)
        gr.on([self.window.input, self.heated.input], in_words(self._redraw), looks, drawn, **PRIVATE, **LIGHT)
        self.to_best.click(in_words(self._to_best), looks, placed, **PRIVATE, **HEAVY)
        self.query_image.select(in_words(self._click), looks, [*placed, *self.numbers], **PRIVATE, **again)
        gr.on([number.input for number in self.numbers], in_words(self._ask_numbers), looks, placed, **PRIVATE, **again)
        self.whole.click(in_words(self._to_whole), looks, [*placed, *self.numbers], **PRIVATE, **again)

    # --------------------------------------------------------------------------------------------------------- events

    def closed(self, scan: Scan | None) -> dict[Any, Any]:
        """For a new query: nothing is looked at, and all of its scan asks. To the outputs `closing`."""
        closed: dict[Any, Any] = {self.hit: None, self.corner: None, self.column: gr.Column(visible=False)}
        return closed | ({} if scan is None else self._numbers_of(scan, whole_of(scan)))

    @property
    def closing(self) -> list[Any]:
        return [self.hit, self.corner, self.column, *self.numbers]

    def open(self, query: Query | None, row: int | None, *opens: Any) -> dict[Any, Any]:
        """Query and hit at the slices that match best, or what there is to see without scans."""
        query, row = _chosen(query, row)
        facts = self.searching.gallery.facts(row)
        shown: dict[Any, Any] = {self.column: gr.Column(visible=True), self.hit: row}
        if not self.searching.has_scans():
            shown[self.hit_image] = gr.Image(self.tile(row))
            shown[self.hit_facts] = f"{words_of(facts)}\nno scan here, only its embedding"
            return shown
        look = self._look(query, row, *opens)
        shown[self.hit_facts] = f"{words_of(facts)}\n{facts_of_scan(look.hit_scan)}"
        shown[self.window] = gr.Radio(visible=is_in_hu(look.query_scan) or is_in_hu(look.hit_scan))
        return shown | self._at_best(look)

    def tile(self, row: int) -> Image.Image:
        """The small picture of a scan, or grey where there is none."""
        return self.searching.gallery.thumbnail(row) or Image.new("RGB", (128, 128), "#404040")

    def _to_best(self, *looks: Any) -> dict[Any, Any]:
        return self._at_best(self._look(*looks))

    def _ask_numbers(self, *looks: Any) -> dict[Any, Any]:
        """As the region's numbers change, the query stays where it is."""
        look = self._look(*looks)
        return self._at_best(look, look.query_slice)

    def _click(self, chosen: gr.SelectData, *looks: Any) -> dict[Any, Any]:
        """A first corner of a region, or the second one: then it reaches from one to the other, in depth over the
        slices that the encoder sees in one patch with theirs."""
        look = self._look(*looks)
        clicked: Corner = (look.query_slice, *voxel_at(look.query_scan, *chosen.index))
        if look.corner is None:
            image = self._image("query", replace(look, corner=clicked), look.query_slice)
            return {self.query_image: image, self.asking: SECOND_CORNER, self.corner: clicked}
        first, last = (self.searching.slab(look.query, edge(look.corner[0], look.query_slice)) for edge in (min, max))
        rows, columns = (slice(min(pair), max(pair) + 1) for pair in zip(look.corner[1:], clicked[1:], strict=True))
        return self._choose(look, (slice(first.start, last.stop), rows, columns))

    def _to_whole(self, *looks: Any) -> dict[Any, Any]:
        look = self._look(*looks)
        return self._choose(look, whole_of(look.query_scan))

    def _choose(self, look: Look, region: Region) -> dict[Any, Any]:
        chosen = replace(look, region=None if region == whole_of(look.query_scan) else region)
        return self._at_best(chosen, look.query_slice) | self._numbers_of(look.query_scan, region)

    def _move_query(self, *looks: Any) -> dict[Any, Any]:
        look = self._look(*looks)
        drawn: dict[Any, Any] = {self.query_image: self._image("query", look, look.query_slice)}
        if look.together:
            place = linked(look.query_slice, slices_of(look.query_scan), slices_of(look.hit_scan))
            drawn |= {self.hit_slice: place + 1, self.hit_image: self._image("hit", look, place)}
        return drawn

    def _move_hit(self, *looks: Any) -> dict[Any, Any]:
        look = self._look(*looks)
        drawn: dict[Any, Any] = {self.hit_image: self._image("hit", look, look.hit_slice)}
        if look.together:
            place = linked(look.hit_slice, slices_of(look.hit_scan), slices_of(look.query_scan))
            drawn |= {self.query_slice: place + 1, self.query_image: self._image("query", look, place)}
        return drawn

    def _redraw(self, *looks: Any) -> dict[Any, Any]:
        look = self._look(*looks)
        return {
            self.query_image: self._image("query", look, look.query_slice),
            self.hit_image: self._image("hit", look, look.hit_slice),
        }

    # -------------------------------------------------------------------------------------------------------- pictures

    def _look(
        self,
        query: Query | None,
        row: int | None,
        query_slice: float,
        hit_slice: float,
        window: str,
        heated: bool,
        together: bool,
        corner: Corner | None,
        *numbers: float | None,
    ) -> Look:
        query, row = _chosen(query, row)
        asked, hit = self.searching.scan(query.key), self.searching.scan(f"row-{row}")
        slices = int(query_slice) - 1, int(hit_slice) - 1
        return Look(query, row, *slices, window, heated, together, corner, region_of(asked, numbers), asked, hit)

    def _heat(self, look: Look) -> Heat:
        return self.searching.heat(look.query, look.row, look.region)

    def _at_best(self, look: Look, query_slice: int | None = None) -> dict[Any, Any]:
        """The hit at the slice that matches best, and the query too, unless its slice is given. A first corner is
        forgotten."""
        look = replace(look, corner=None)
        heat = self._heat(look)
        query_slice = heat.query_slice if query_slice is None else query_slice
        return {
            self.query_image: self._image("query", look, query_slice),
            self.query_slice: _slider_at(look.query_scan, query_slice),
            self.hit_image: self._image("hit", look, heat.hit_slice),
            self.hit_slice: _slider_at(look.hit_scan, heat.hit_slice),
            self.confidence: f"The surest pair of patches has a confidence of {heat.confidence:.2f} (of 1). Colour is "
            "relative to it: yellow where they match best.",
            self.asking: HOW_TO_CHOOSE if look.region is None else _words_of_region(look.query_scan, look.region),
            self.corner: None,
        }

    def _image(self, which: str, look: Look, place: int) -> gr.Image:
        heat = self._heat(look) if look.heated else None
        window = WINDOWS[look.window]
        if which == "query":
            scan = look.query_scan
            corner = look.corner[1:] if look.corner is not None and look.corner[0] == place else None
            image = picture(scan, place, window, heat.query if heat else None, look.region, corner)
        else:
            scan = look.hit_scan
            image = picture(scan, place, window, heat.hit if heat else None)
        return gr.Image(image, alt_text=f"Slice or frame {place + 1} of {slices_of(scan)} of the {which}")

    def _numbers_of(self, scan: Scan, region: Region) -> dict[Any, Any]:
        ends = [end for axis in region for end in (axis.start + 1, axis.stop)]
        in_depth = slices_of(scan) > 1
        return {
            field: gr.Number(value=end, visible=in_depth or place > 1)
            for place, (field, end) in enumerate(zip(self.numbers, ends, strict=True))
        }


def _words_of_region(scan: Scan, region: Region) -> str:
    depth, rows, columns = (f"{axis.start + 1} to {axis.stop}" for axis in region)
    slices = f" of slices {depth}" if slices_of(scan) > 1 else ""
    return f"Where columns {columns}, rows {rows}{slices} match. Two clicks choose another region."


def _chosen(query: Query | None, row: int | None) -> tuple[Query, int]:
    if query is None or row is None:
        raise ValueError("Choose a hit first.")
    return query, row


def _field_id(label: str) -> str:
    return "region-" + label.lower().replace(" ", "-")


def _slice_slider(label: str, name: str, visible: bool = True) -> gr.Slider:
    return gr.Slider(1, 2, value=1, step=1, label=label, buttons=[], visible=visible, elem_id=name)


def _slider_at(scan: Scan, place: int) -> gr.Slider:
    slices = slices_of(scan)
    return gr.Slider(maximum=max(2, slices), value=place + 1, visible=slices > 1)
