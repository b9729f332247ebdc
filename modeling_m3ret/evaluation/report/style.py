"""How pictures look: colours and signs of methods, figures, panels, names. Colours are those of Okabe and Ito ("Color
Universal Design", 2008), told apart with any colour vision; markers, dashes and borders say the same without colour."""

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
    """How each method is drawn; numbers of colours, markers and dashes share no factor, so pairs repeat late."""
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
    """In inches."""
    from matplotlib.figure import Figure  # a second to load, which `--help` needn't take

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")  # not pyplot's, which would keep it


def png(figure: Figure) -> bytes:
    """Without the name of what drew it; the same figure gives the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    return stream.getvalue()


def panels_of(figure: Figure, titles: Sequence[str], columns: int, x_label: str, y_label: str) -> dict[str, Axes]:
    """Axes by title, labelled at the left and at the bottom, which is also above a place that is empty."""
    rows = -(-len(titles) // columns)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for place, panel in enumerate(axes):
        panel.set_visible(place < len(titles))
        at_bottom = place + columns >= len(titles)
        panel.tick_params(labelbottom=at_bottom)
        panel.set(xlabel=x_label if at_bottom else "", ylabel="" if place % columns else y_label)
    return dict(zip(titles, axes, strict=False))


def plain(name: str, most: int = 28) -> str:
    """A name of any characters as matplotlib prints it: `$` begins no formula, `_` hides nothing from a legend. Of a
    long one the middle goes, for many differ at the end."""
    name = " ".join(name.split())
    name = name if len(name) <= most else f"{name[: most - most // 2 - 1]}…{name[-(most // 2) :]}"
    return re.sub(r"^_", " _", name).replace("$", r"\$")


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """One legend for all panels, of what these axes show."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small", frameon=False)
