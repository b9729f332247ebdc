"""The "Explore" tab: the gallery as a map of its embeddings, in which a click on a point shows its scan.

Drawn with Pillow, in pixel coordinates: Gradio's plots report no click on a point, only on an image.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..evaluation.report.numbers import principal_components
from .endpoints import HEAVY, PRIVATE, show_errors
from .search_page import IMAGE, SCROLL_TO_TOP, SearchPage
from .service import SearchService
from .side_by_side import describe, modality_name


SIDE = 720  # px of the map, without the legend below it
MARGIN = 24
LEGEND_LINE = 34
MAX_CLICK_DISTANCE = 24  # px from the centre of a point
# Okabe and Ito ("Color Universal Design", 2008), without black and with a darker yellow: visible on white and on black
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#B8A800", "#8C8C8C"]
OTHERS = "other"


@dataclass(frozen=True, eq=False)
class GalleryMap:
    """The gallery in two dimensions. `points` is `(n, 2)` float32, in pixels from the top left."""

    points: NDArray[np.float32]

    @classmethod
    def from_embeddings(cls, embeddings: torch.Tensor) -> GalleryMap:
        """Project embeddings `(n, d)`, n >= 1, onto their first two principal components."""
        flat, _ = principal_components(embeddings.float())
        low, high = flat.amin(0), flat.amax(0)
        scaled = (flat - low) / (high - low).clamp(min=1e-6)
        return cls((scaled * (SIDE - 2 * MARGIN) + MARGIN).float().numpy())

    def nearest(self, x: float, y: float) -> int | None:
        """Return the row of the point at this pixel, or None if there is none nearby."""
        distances = np.hypot(self.points[:, 0] - x, self.points[:, 1] - y)
        row = int(distances.argmin())
        return row if distances[row] <= MAX_CLICK_DISTANCE else None

    def draw(self, names: Sequence[str], selected: int | None = None) -> Image.Image:
        """Draw the map in RGBA on a transparent background, with a ring around the selected row.

        Scans are coloured by their names. The rarest names share one colour.
        """
        by_count = [name for name, _ in Counter(sorted(names)).most_common()]  # equally frequent ones by name
        named = by_count if len(by_count) <= len(COLOURS) else by_count[: len(COLOURS) - 1]
        colour_of = dict(zip(named, COLOURS, strict=False))
        entries = [(name or "unknown", colour_of[name]) for name in named]
        if len(named) < len(by_count):
            entries.append((OTHERS, COLOURS[-1]))
        image = Image.new("RGBA", (SIDE, SIDE + LEGEND_LINE * -(-len(entries) // 2) + 12))
        draw = ImageDraw.Draw(image)
        draw.rectangle([1, 1, SIDE - 2, SIDE - 2], outline="#8C8C8C")
        radius = 6 if len(names) <= 1000 else 3
        for (x, y), name in zip(self.points.tolist(), names, strict=True):
            fill = colour_of.get(name, COLOURS[-1])
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill, outline="#404040")
        if selected is not None:
            x, y = self.points[selected].tolist()
            draw.ellipse([x - 13, y - 13, x + 13, y + 13], outline="#E00000", width=4)
        font = ImageFont.load_default(24)
        for number, (name, colour) in enumerate(entries):
            x, y = 12 + number % 2 * SIDE // 2, SIDE + 8 + number // 2 * LEGEND_LINE
            draw.ellipse([x, y + 6, x + 20, y + 26], fill=colour, outline="#404040")
            draw.text((x + 30, y + 2), name[:24], font=font, fill="#8C8C8C")
        return image


class ExplorePage:
    """The components and events of the tab `tab`, one of `tabs`. Construct it within that tab.

    The selected scan can be the query on the page `search`, which is in the tab with id `search`.
    """

    def __init__(self, service: SearchService, search: SearchPage, tab: gr.Tab, tabs: gr.Tabs):
        self.service = service
        self._map: GalleryMap | None = None
        self._lock = threading.Lock()
        gr.Markdown(
            "The embeddings of the gallery on their first two principal components. Scans that are close to each other "
            "look similar to the model."
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                colours = [("Modality", "modality"), ("Anatomy", "anatomy")]
                colour = gr.Radio(colours, value="modality", label="Colour by", elem_id="map-colour")
                options = {**IMAGE, "format": "png", "image_mode": "RGBA", "elem_id": "map"}
                alt_text = "Map of the gallery with one point per scan"
                self.map = gr.Image(label="Map: click a point", alt_text=alt_text, **options)
            with gr.Column(scale=2, min_width=300):
                last = len(service.gallery) - 1
                item = gr.Number(0, label="Scan number", minimum=0, maximum=last, precision=0, elem_id="item")
                self.thumbnail = gr.Image(label="Scan", height=240, alt_text="The selected scan", **IMAGE)
                self.facts = gr.Textbox(label="Description", interactive=False, lines=2, elem_id="item-facts")
                as_query = gr.Button("Find similar scans", variant="primary", size="sm", elem_id="search-with-item")
        outputs = [self.map, self.thumbnail, self.facts]
        triggers = [tab.select, colour.input, item.change]
        gr.on(triggers, show_errors(self.show), [item, colour], outputs, **PRIVATE, **HEAVY)
        self.map.select(show_errors(self._select), item, item, **PRIVATE)
        inputs, search_row = [item, *search.options], show_errors(search.search_row)
        searched = as_query.click(search_row, inputs, search.query_outputs, **PRIVATE, **HEAVY)
        switched = searched.success(lambda: gr.Tabs(selected="search"), None, tabs, **PRIVATE)
        switched.success(None, js=SCROLL_TO_TOP, **PRIVATE)

    def show(self, row: int | None, colour: str) -> dict[Any, Any]:
        """Draw the map, coloured by `modality` or `anatomy`, and describe the selected scan."""
        gallery = self.service.gallery
        names = gallery.visible.column(colour).to_pylist()
        if colour == "modality":
            names = [modality_name(name) for name in names]
        shown: dict[Any, Any] = {self.map: self._gallery_map().draw(names, row), self.thumbnail: None, self.facts: ""}
        if row is not None:
            facts = gallery.facts(row)
            shown[self.thumbnail] = gallery.thumbnail(row)
            shown[self.facts] = f"{describe(facts)}\n{facts['source']}"
        return shown

    def _gallery_map(self) -> GalleryMap:
        with self._lock:  # computed once, when the tab is first opened
            if self._map is None:
                self._map = GalleryMap.from_embeddings(self.service.gallery.index.embeddings)
            return self._map

    def _select(self, item: int | None, selected: gr.SelectData) -> int | None:
        row = self._gallery_map().nearest(*selected.index)
        return item if row is None else row
