"""The style of the figures: colours, markers, panels and labels.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), which the colour-blind can distinguish; markers,
dashes and borders carry the same information without colour.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BLACK, BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, YELLOW = (
    "#000000",
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
)
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
DPI = 110


def method_styles(names: Sequence[str], main: str = "") -> dict[str, dict[str, Any]]:
    """Return matplotlib properties by method, chance and the main method first.

    The numbers of colours, markers and dashes have no common factor, so combinations repeat late.
    """
    others = [name for name in names if name not in ("chance", main)]
    styles: dict[str, dict[str, Any]] = {"chance": {"color": BLACK, "linestyle": ":", "marker": "", "linewidth": 1.2}}
    for number, name in enumerate([main, *others]):
        styles[name] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": DASHES[number % len(DASHES)],
            "linewidth": 2.2 if name == main else 1.3,
            "markersize": 5,
        }
    return styles


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; width and height are in inches."""
    from matplotlib.figure import Figure  # takes a second to import, which `--help` does not need

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")  # pyplot would keep a reference


def png(figure: Figure) -> bytes:
    """Encode a figure as PNG without software version, so that equal figures give equal bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    return stream.getvalue()


def new_panels(figure: Figure, titles: Sequence[str], columns: int, x_label: str, y_label: str) -> dict[str, Axes]:
    """Return axes by title, labelled on the left and at the lowest panel of each column."""
    rows = -(-len(titles) // columns)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for index, panel in enumerate(axes):
        panel.set_visible(index < len(titles))
        at_bottom = index + columns >= len(titles)
        panel.tick_params(labelbottom=at_bottom)
        panel.set(xlabel=x_label if at_bottom else "", ylabel="" if index % columns else y_label)
    return dict(zip(titles, axes, strict=False))


def plain_text(name: str, max_length: int = 28) -> str:
    """Escape a name for matplotlib, where `$` starts a formula and a leading `_` hides a legend entry.

    A long name is shortened in the middle, since many names differ at the end.
    """
    name = " ".join(name.split())
    if len(name) > max_length:
        name = f"{name[: max_length - max_length // 2 - 1]}…{name[-(max_length // 2) :]}"
    return re.sub(r"^_", " _", name).replace("$", r"\$")


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Add one legend below all panels, with the entries of these axes."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small", frameon=False)
