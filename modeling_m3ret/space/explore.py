"""The gallery as a map: its embeddings on their two main axes, a dot for each scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


SIDE = 720  # px of the map; below it stands the legend
MARGIN = 24
LEGEND_LINE = 34
NEAR = 24  # px: a click farther away from every dot is none
# Okabe and Ito's colours, told apart by the colour-blind, and seen on white and on black; then their darker halves
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#B8A800", "#8C8C8C"]
OTHERS = "other"


@dataclass(frozen=True, eq=False)
class GalleryMap:
    """points: `(n, 2)` float32, px from the top left."""

    points: NDArray[np.float32]

    @classmethod
    def of(cls, embeddings: Tensor) -> GalleryMap:
        """Principal components of `(n, d)`, at least one scan."""
        centred = embeddings.float() - embeddings.float().mean(0)
        axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)  # (d, 2), ascending before
        flat = centred @ axes
        low, high = flat.amin(0), flat.amax(0)
        scaled = (flat - low) / (high - low).clamp(min=1e-6)
        return cls((scaled * (SIDE - 2 * MARGIN) + MARGIN).numpy())

    def nearest(self, x: float, y: float) -> int | None:
        """The scan whose dot was clicked."""
        distances = np.hypot(self.points[:, 0] - x, self.points[:, 1] - y)
        row = int(distances.argmin())
        return row if distances[row] <= NEAR else None

    def picture(self, names: Sequence[str], chosen: int | None = None) -> Image.Image:
        """The map in RGBA, transparent behind, its dots coloured by name; the rarest names share one colour.

        Args:
            names: of each scan. chosen: the row with a ring around it.
        """
        counts = {name: names.count(name) for name in dict.fromkeys(names)}
        frequent = sorted(counts, key=lambda name: (-counts[name], name))
        own = frequent if len(frequent) <= len(COLOURS) else frequent[: len(COLOURS) - 1]
        colour_of = dict(zip(own, COLOURS, strict=False))
        entries = [(name or "unknown", colour_of[name]) for name in own]
        if len(own) < len(frequent):
            entries.append((OTHERS, COLOURS[-1]))
        image = Image.new("RGBA", (SIDE, SIDE + LEGEND_LINE * -(-len(entries) // 2) + 12))
        draw = ImageDraw.Draw(image)
        draw.rectangle([1, 1, SIDE - 2, SIDE - 2], outline="#8C8C8C")
        radius = 6 if len(names) <= 1000 else 3
        for (x, y), name in zip(self.points.tolist(), names, strict=True):
            fill = colour_of.get(name, COLOURS[-1])
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill, outline="#404040")
        if chosen is not None:
            x, y = self.points[chosen].tolist()
            draw.ellipse([x - 13, y - 13, x + 13, y + 13], outline="#E00000", width=4)
        font = ImageFont.load_default(24)
        for number, (name, colour) in enumerate(entries):
            x, y = 12 + number % 2 * SIDE // 2, SIDE + 8 + number // 2 * LEGEND_LINE
            draw.ellipse([x, y + 6, x + 20, y + 26], fill=colour, outline="#404040")
            draw.text((x + 30, y + 2), name[:24], font=font, fill="#8C8C8C")
        return image
