"""The "Explore" tab: the gallery as a map of its embeddings, in which a click on a point searches with its scan."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

import gradio as gr
import torch

from ..evaluation.report.numbers import principal_components
from .endpoints import HEAVY, PRIVATE
from .results import HTML, describe, modality_name, once_loaded, readable
from .search_page import SearchPage
from .service import Query, SearchService


WIDTH, HEIGHT, MARGIN = 1600, 900, 30  # of the map, in its own units
MAX_POINTS = 3000  # evenly spaced in the gallery; a browser draws more of them slowly
# Okabe and Ito ("Color Universal Design", 2008), without black and with a darker yellow: visible on white and on black
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#B8A800", "#8C8C8C"]
OTHERS = "other"


class ExplorePage:
    """The components and events of the tab `tab`, one of `tabs`. Construct it within that tab.

    The selected scan becomes the query on the page `search`, which is in the tab with id `search`.
    """

    def __init__(self, service: SearchService, search: SearchPage, tab: gr.Tab, tabs: gr.Tabs):
        self.service = service
        gr.HTML(
            "<p>Each point is a scan of the gallery. Scans that are close to each other look alike to the model. "
            "Point at one to see it; click it to search with it. A red ring marks your query.</p>"
        )
        colours = [("Modality", "modality"), ("Anatomy", "anatomy")]
        colour = gr.Radio(colours, value="modality", label="Colour by", elem_id="map-colour")
        self.map = gr.HTML(elem_id="map", js_on_load=once_loaded("m3ret.clickable(element, trigger, watch)"))
        last = len(service.gallery) - 1
        with gr.Row():
            item = gr.Number(
                label="Or enter the number of a scan", minimum=0, maximum=last, precision=0, elem_id="item"
            )
            button = gr.Button("Search with this scan", elem_id="search-with-item")
        gr.on([tab.select, colour.input], self.draw, [search.query, colour], self.map, **PRIVATE)
        event: dict[str, Any] = {"outputs": search.outputs, **PRIVATE, **HEAVY}
        for chosen in (
            self.map.select(search.of_click, search.options, **event),
            button.click(search.of_item, [item, *search.options], **event),
        ):
            chosen.success(lambda: gr.Tabs(selected="search"), None, tabs, **PRIVATE)

    @cached_property
    def points(self) -> torch.Tensor:
        """The gallery on its first two principal components, `(n, 2)` in the units of the map."""
        flat, _ = principal_components(self.service.gallery.index.embeddings.float())
        low, high = flat.amin(0), flat.amax(0)
        size = torch.tensor([WIDTH, HEIGHT]) - 2 * MARGIN
        return (flat - low) / (high - low).clamp(min=1e-6) * size + MARGIN

    def draw(self, query: Query | None, colour: str) -> str:
        """Return the map in SVG, coloured by `modality` or `anatomy`, with a legend. The rarest share a colour."""
        gallery = self.service.gallery
        name_of = modality_name if colour == "modality" else readable
        names = [name_of(value) or "Unknown" for value in gallery.visible.column(colour).to_pylist()]
        by_count = [name for name, _ in Counter(sorted(names)).most_common()]  # equally frequent ones by name
        named = by_count if len(by_count) <= len(COLOURS) else by_count[: len(COLOURS) - 1]
        colours = dict(zip(named, COLOURS, strict=False))
        legend = colours | ({OTHERS: COLOURS[-1]} if len(named) < len(by_count) else {})
        points = [
            (row, *self.points[row].tolist(), colours.get(names[row], COLOURS[-1]), describe(gallery.facts(row)))
            for row in range(0, len(names), -(-len(names) // MAX_POINTS))
        ]
        entries = [(name, shade, names.count(name)) for name, shade in legend.items()]
        place = None
        if query is not None:  # of an upload, the place of its nearest scan, beside which it lies
            row = query.row
            if row is None:
                row = int((gallery.index.embeddings.float() @ query.embedding).argmax())
            place = self.points[row].tolist()
        return str(HTML.map(points, entries, place, WIDTH, HEIGHT))
