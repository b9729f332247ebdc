"""The second page: the gallery as a map, whose dots are looked at and searched with."""

from __future__ import annotations

import threading
from typing import Any

import gradio as gr

from .explore import GalleryMap
from .handling import HEAVY, PRIVATE, in_words
from .search_page import TO_TOP, SearchPage
from .searching import Searching
from .side_by_side import words_of


class ExplorePage:
    """Made within a `gr.Tab`. search: where a dot's scan is searched with; tabs: to go there, to the tab `search`."""

    def __init__(self, searching: Searching, search: SearchPage, tab: gr.Tab, tabs: gr.Tabs):
        self.searching = searching
        self._map: GalleryMap | None = None
        self._making = threading.Lock()
        gallery = searching.gallery
        gr.Markdown("The gallery's embeddings on their two main axes. Scans that lie close look alike to the encoder.")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self.colour = gr.Radio(["modality", "anatomy"], value="modality", label="Colour")
                self.map = gr.Image(
                    label="Map: click a dot",
                    type="pil",
                    format="png",
                    image_mode="RGBA",
                    interactive=False,
                    buttons=[],
                    alt_text="Map of the gallery, a dot for each scan",
                    elem_id="map",
                )
            with gr.Column(scale=2, min_width=300):
                self.item = gr.Number(
                    label="Item", minimum=0, maximum=len(gallery) - 1, precision=0, value=0, elem_id="item"
                )
                self.thumbnail = gr.Image(
                    label="Scan", type="pil", interactive=False, height=240, buttons=[], alt_text="The chosen scan"
                )
                self.facts = gr.Textbox(label="What it is", interactive=False, lines=2, elem_id="item-facts")
                self.as_query = gr.Button("Search with this scan", variant="primary", size="sm")
        drawn = [self.map, self.thumbnail, self.facts]
        shown = [self.item, self.colour]
        gr.on([tab.select, self.colour.input, self.item.change], in_words(self._show), shown, drawn, **PRIVATE, **HEAVY)
        self.map.select(in_words(self._clicked), self.item, self.item, **PRIVATE)
        self.as_query.click(
            in_words(search.ask_hit), [self.item, *search.options], search.asked, **PRIVATE, **HEAVY
        ).success(lambda: gr.Tabs(selected="search"), None, tabs, **PRIVATE).success(None, js=TO_TOP, **PRIVATE)

    def _of_gallery(self) -> GalleryMap:
        with self._making:  # once, when somebody first looks
            if self._map is None:
                self._map = GalleryMap.of(self.searching.gallery.index.embeddings)
            return self._map

    def _clicked(self, item: int | None, chosen: gr.SelectData) -> int | None:
        row = self._of_gallery().nearest(*chosen.index)
        return item if row is None else row

    def _show(self, row: int | None, colour: str) -> dict[Any, Any]:
        gallery = self.searching.gallery
        column = gallery.index.metadata.column("anatomy" if colour == "anatomy" else "modality")
        names = [name or "" for name in column.to_pylist()]  # another one's index may not say
        shown: dict[Any, Any] = {self.map: self._of_gallery().picture(names, row), self.thumbnail: None, self.facts: ""}
        if row is not None:
            facts = gallery.facts(row)
            shown[self.thumbnail] = gallery.thumbnail(row)
            shown[self.facts] = f"{words_of(facts)}\n{facts['source']}"
        return shown
