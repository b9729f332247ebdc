"""The figures of a report, drawn from the numbers of `numbers.py`.

A report may be shared: figures show modalities, anatomies, labels and names of methods, never a file or a patient.
Scans are shown only on request, in `examples`.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...data.collection import Record
from ...image_processing_m3ret import M3RetImageProcessor
from ...search.embedding import Embedded
from ...search.thumbnails import thumbnail
from ..protocols import Annotations
from ..table import ALL_MODALITIES, Row
from . import numbers


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Results = Mapping[str, Mapping[str, numbers.QueryResults]]  # of `rank_within_modalities`

# Okabe and Ito, "Color Universal Design", 2008: colours that colour-blind readers can distinguish. Markers, dashes and
# borders carry the same information without colour.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
VERMILLION, PURPLE, SKY, YELLOW = "#D55E00", "#CC79A7", "#56B4E9", "#F0E442"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
DPI = 110
MAX_CATEGORIES = 8  # modalities or anatomies in the map, one colour each; the rarest share the last one
MAX_POINTS = 5000  # in the map; more would hide each other
# sign, colour, width and line style of the border of a relevant hit, of any other hit, and of the query
BORDERS = {True: ("✓ ", GREEN, 3.0, "-"), False: ("✗ ", VERMILLION, 2.0, "--"), None: ("", BLACK, 1.0, "-")}


@dataclass(frozen=True)
class Picture:
    """A figure of the report."""

    file: str  # name in the folder of the report
    title: str
    alt: str  # alternative text, with the numbers shown
    note: str  # how to read the figure
    png: bytes


def precision_recall(within: Results, main: str) -> Picture:
    """Draw interpolated precision over recall, one panel per modality and one line per method, the main one bold."""
    columns = min(3, len(within))
    figure = new_figure(max(4.5, 3.2 * columns), 3.0 * -(-len(within) // columns) + 0.6)
    panels = new_panels(figure, list(within), columns, "recall", "interpolated precision")
    recall = [tenth / 10 for tenth in range(11)]
    alt: list[str] = []
    for modality, axes in panels.items():
        by_method = within[modality]
        for name, style in method_styles(list(by_method), main).items():
            precision = by_method[name].precision.mean(0).tolist()
            axes.plot(recall, precision, label=plain_text(name), **style, zorder=3 if name == main else 2)
            alt.append(f"{modality}, {name}: {', '.join(f'{precision[at]:.2f}' for at in (0, 5, 10))}")
        title = f"{plain_text(modality, 18)} ({len(by_method[main].queries)} queries)"
        axes.set(title=title, xlim=(-0.03, 1.03), ylim=(0, 1.03))
        axes.grid(alpha=0.3)
    legend_below(figure, next(iter(panels.values())), 2 if columns == 1 else 4)
    return Picture(
        "precision_recall.png",
        "Precision and recall within each modality",
        f"One panel per modality, one falling line per method. Precision at recall 0, 0.5 and 1: {'; '.join(alt)}.",
        "The highest precision at recall 0, 0.1, …, 1 or any above it, mean over queries (the eleven-point curve). "
        f"Chance is the mean of at least {numbers.CHANCE_RANKINGS} random rankings.",
        png(figure),
    )


def classes(records: Sequence[Record], within: Results, main: str) -> Picture:
    """Draw mAP by label: bars of the main method and markers of the others."""
    means = {
        modality: {name: numbers.class_means(records, ranked) for name, ranked in by_method.items()}
        for modality, by_method in within.items()
    }
    shown = {modality: numbers.best_and_worst(list(by_method[main])) for modality, by_method in means.items()}
    sizes = [len(labels) for labels in shown.values()]
    figure = new_figure(7.5, 0.24 * sum(sizes) + 0.55 * len(sizes) + 0.9)
    panels = figure.subplots(len(sizes), 1, squeeze=False, sharex=True, height_ratios=[n + 1 for n in sizes])[:, 0]
    styles = method_styles(list(next(iter(within.values()))), main)
    alt: list[str] = []
    for (modality, labels), axes in zip(shown.items(), panels, strict=True):
        by_method, positions = means[modality], range(len(labels))
        scores = {name: [by_label[label][1] for label in labels] for name, by_label in by_method.items()}
        light = (SKY, 0.45)  # so that markers stand out in greyscale
        axes.barh(positions, scores[main], color=light, edgecolor=BLACK, linewidth=0.6, label=plain_text(main))
        for name in styles:
            if name != main:
                marker, size, edge = ("|", 9, 2) if name == "chance" else (styles[name]["marker"], 5, 0.5)
                style = {"marker": marker, "markersize": size, "markeredgewidth": edge, "markeredgecolor": BLACK}
                style |= {"color": styles[name]["color"], "linestyle": "", "label": plain_text(name)}
                axes.plot(scores[name], positions, **style)
        ticks = [f"{plain_text(label)} ({by_method[main][label][0]})" for label in labels]
        axes.set_yticks(positions, ticks, fontsize="small")
        if omitted := len(by_method[main]) - len(labels):
            axes.axhline(numbers.MAX_CLASSES / 2 - 0.5, color=BLACK, linestyle="--", linewidth=0.8)
        half = numbers.MAX_CLASSES // 2
        more = f": {half} best and {half} worst, {omitted} between omitted" if omitted else ""
        axes.set(ylim=(len(labels) - 0.4, -0.6), xlim=(0, 1.02))
        axes.set_title(plain_text(modality) + more, fontsize="medium", loc="left")
        axes.grid(axis="x", alpha=0.3)
        for rank, label in (("best", labels[0]), ("worst", labels[-1])):
            listed = ", ".join(f"{name} {by_label[label][1]:.2f}" for name, by_label in by_method.items())
            alt.append(f"{modality}, {rank}: {label} ({listed})")
    panels[-1].set_xlabel("mAP (number of queries in brackets)")
    legend_below(figure, panels[0], 4)
    return Picture(
        "classes.png",
        "Classes within each modality",
        f"One bar of mAP per class, best of {main} first. {'; '.join(alt)}.",
        f"mAP of the queries of each label. Bars: {main}. Markers: other methods. Means of few queries are uncertain.",
        png(figure),
    )


def modalities(methods: Mapping[str, Embedded]) -> Picture:
    """Draw one matrix per method: the modalities of the first hits by modality of the query."""
    matrices: dict[str, Tensor] = {}
    for name, embedded in methods.items():
        names, matrices[name], candidates = numbers.modality_fractions(embedded)
    matrices = {"chance": candidates, **matrices}
    columns = 2 if len(matrices) == 4 else min(3, len(matrices))
    side = max(2.2, 0.55 * len(names))
    figure = new_figure(columns * (side + 0.4) + 1.0, -(-len(matrices) // columns) * (side + 0.4) + 1.0)
    labels = [plain_text(name, 14) for name in names]
    axis_labels = (f"modality of the first {numbers.TOP_K} hits, %", "modality of the query")
    alt: list[str] = []
    for name, axes in new_panels(figure, list(matrices), columns, *axis_labels).items():
        axes.imshow(matrices[name].numpy(), cmap="Greys", vmin=0, vmax=1)
        for row, fractions in enumerate(matrices[name].tolist()):
            for column, fraction in enumerate(fractions):
                number = "–" if fraction != fraction else f"{100 * fraction:.0f}"
                colour = "white" if fraction > 0.5 else BLACK
                axes.text(column, row, number, ha="center", va="center", color=colour, fontsize="small")
        axes.set_xticks(range(len(names)), labels, rotation=45, ha="right", fontsize="small")
        axes.set_yticks(range(len(names)), labels, fontsize="small")
        axes.set_title(plain_text(name, 24), fontsize="medium")
        diagonal = zip(names, matrices[name].diag().tolist(), strict=True)
        alt.append(f"{name}: {', '.join(f'{modality} {100 * fraction:.0f}' for modality, fraction in diagonal)}")
    return Picture(
        "modalities.png",
        f"Modality of the first {numbers.TOP_K} hits in the mixed gallery",
        f"One matrix of percentages per method. Hits of the query's own modality: {'; '.join(alt)}.",
        "All scans are searched together. Each row holds the queries of one modality and adds up to 100. Chance is the "
        "composition of the gallery.",
        png(figure),
    )


def embedding_map(records: Sequence[Record], embeddings: Tensor, main: str) -> Picture:
    """Draw the first two principal components of embeddings `(n, d)`, coloured by modality and by anatomy."""
    points, variance = numbers.principal_components(embeddings)
    shown = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))[:MAX_POINTS].tolist()
    keys = ["modality", "anatomy"] if any(record.anatomy for record in records) else ["modality"]
    figure = new_figure(4.4 * len(keys), 5.0)
    panels = figure.subplots(1, len(keys), squeeze=False, sharex=True, sharey=True)[0]
    alt: list[str] = []
    for key, axes in zip(keys, panels, strict=True):
        names = [getattr(record, key) or "unknown" for record in records]
        categories = [name for name, _ in Counter(sorted(names)).most_common()]
        if len(categories) > MAX_CATEGORIES:
            frequent = categories[: MAX_CATEGORIES - 1]
            categories = [*frequent, "others"]
            names = [name if name in frequent else "others" for name in names]
        for number, category in enumerate(categories):
            x, y = points[[index for index in shown if names[index] == category]].T.numpy()
            label, zorder = f"{plain_text(category, 20)} ({names.count(category)})", 1 if category == "others" else 2
            style = {"color": (*COLOURS, YELLOW)[number], "marker": MARKERS[number], "edgecolor": BLACK}
            axes.scatter(x, y, s=22, label=label, linewidth=0.3, alpha=0.8, zorder=zorder, **style)
        alt.append(f"by {key}: {', '.join(categories)}")
        axes.set(title=f"by {key}", xlabel=f"first component, {100 * variance[0]:.0f} % of the variance")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize="small", frameon=False)
    panels[0].set_ylabel(f"second component, {100 * variance[1]:.0f} %")
    return Picture(
        "map.png",
        "Map of the embeddings",
        f"One point per scan at the first two principal components, {100 * variance[0]:.0f} % and "
        f"{100 * variance[1]:.0f} % of the variance, coloured {'; '.join(alt)}.",
        f"Principal components of the embeddings of {main}. Points that are far apart here are far apart in the "
        "embedding space; points that are close together need not be close there.",
        png(figure),
    )


def scaling(
    series: Mapping[str, Mapping[str, list[str]]], checkpoints: Mapping[str, Mapping[str, Any]], rows: Sequence[Row]
) -> Picture:
    """Draw mAP of checkpoints over each quantity of `scaling_series`, with intervals; other methods are lines."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    scored = {row.method: row for row in rows if row.protocol == ALL_MODALITIES}
    references = [name for name in scored if name not in checkpoints]
    heights = [max(2.8, 0.2 * (len(by_series) + len(references)) + 0.6) for by_series in series.values()]
    figure = new_figure(9.0, sum(heights))
    lines = method_styles(references)
    alt: list[str] = []
    panels = figure.subplots(len(series), 1, squeeze=False, sharey=True, height_ratios=heights)[:, 0]
    for (quantity, by_series), axes in zip(series.items(), panels, strict=True):
        for number, (title, members) in enumerate(by_series.items()):
            x = [float(checkpoints[member][quantity]) for member in members]
            y = [scored[member].scores["mAP"] for member in members]
            intervals = [scored[member].interval or (score, score) for member, score in zip(members, y, strict=True)]
            pairs = [(score - low, high - score) for score, (low, high) in zip(y, intervals, strict=True)]
            lengths = list(zip(*pairs, strict=True))  # below and above
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axes.errorbar(x, y, lengths, fmt=marker, color=colour, capsize=3, label=plain_text(title, 48))
            distinct = sorted(set(x))
            means = [float(np.mean([v for u, v in zip(x, y, strict=True) if u == value])) for value in distinct]
            axes.plot(distinct, means, color=colour, linewidth=1.5)
            points = ", ".join(f"{numbers.with_prefix(value)} {score:.3f}" for value, score in zip(x, y, strict=True))
            alt.append(f"{numbers.QUANTITIES[quantity]}, {title}: {points}")
        for name in references:
            style = {"color": "0.35", "linestyle": lines[name]["linestyle"], "linewidth": 1.2, "zorder": 1}
            axes.axhline(scored[name].scores["mAP"], label=plain_text(name), **style)
        all_x = [float(checkpoints[member][quantity]) for members in by_series.values() for member in members]
        if max(all_x) > 10 * min(all_x):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, position: ""))
        else:
            axes.locator_params(axis="x", integer=True)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: numbers.with_prefix(value)))
        axes.set(xlabel=numbers.QUANTITIES[quantity], ylabel="mAP, mean over modalities")
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small", frameon=False)
    others = ", ".join(f"{name} {scored[name].scores['mAP']:.3f}" for name in references)
    return Picture(
        "scaling.png",
        "mAP and the size of training",
        f"mAP of the checkpoints. {'; '.join(alt)}. Horizontal lines: {others}.",
        "Mean over modalities with its 95 % interval. A line joins checkpoints that differ in this quantity only, "
        "through the mean of those with equal values. The untrained encoder has the size of the first checkpoint.",
        png(figure),
    )


def examples(embedded: Embedded, within: Results, main: str, processor: M3RetImageProcessor) -> Picture:
    """Show queries at quantiles of average precision with their first hits. This figure contains patient data."""
    annotations = Annotations(embedded.records)
    selected = [
        (modality, quantile, by_method[main].queries[index].item(), by_method[main].average_precision[index].item())
        for modality, by_method in within.items()
        for quantile, index in numbers.example_queries(by_method[main]).items()
    ]
    figure = new_figure(1.35 * (1 + numbers.EXAMPLE_HITS), 1.75 * len(selected))
    alt: list[str] = []
    panels = figure.subplots(len(selected), 1 + numbers.EXAMPLE_HITS, squeeze=False)
    for (modality, quantile, query, score), axes in zip(selected, panels, strict=True):
        hits = numbers.first_hits(embedded, annotations, int(query))
        for panel in axes[1 + len(hits) :]:
            panel.set_visible(False)
        shown = [(int(query), None), *hits]
        for panel, (index, relevant) in zip(axes, shown, strict=False):
            record = embedded.records[index]
            panel.imshow(thumbnail(processor, record.open()))
            panel.set(xticks=[], yticks=[])
            sign, colour, width, line = BORDERS[relevant]
            panel.set_xlabel(sign + plain_text(record.label or "no label", 20), fontsize="x-small")
            panel.spines[:].set(color=colour, linewidth=width, linestyle=line)
        axes[0].set_ylabel(f"{plain_text(modality, 14)}, {quantile}", fontsize="small")
        axes[0].set_title(f"query, AP {score:.2f}", fontsize="small")
        relevance = ", ".join("relevant" if relevant else "not" for _, relevant in hits)
        alt.append(f"{modality}, {quantile} (average precision {score:.2f}): {relevance}")
    return Picture(
        "examples.png",
        "Examples",
        f"One row per query with its first {numbers.EXAMPLE_HITS} hits. {'; '.join(alt)}.",
        "**This figure shows scans of patients**, possibly with burned-in text. Share it only as you would share the "
        f"scans. Hits of {main} in the query's modality: ✓ (solid border) shares a label with the query, ✗ (dashed "
        "border) does not. Queries are at the 90th, 50th and 10th percentile of average precision.",
        png(figure),
    )


def method_styles(names: Sequence[str], main: str = "") -> dict[str, dict[str, Any]]:
    """Return matplotlib properties by method, chance and the main method first.

    The numbers of colours, markers and dashes have no common factor, so combinations repeat late.
    """
    styles: dict[str, dict[str, Any]] = {"chance": {"color": BLACK, "linestyle": ":", "marker": "", "linewidth": 1.2}}
    for number, name in enumerate([main, *(name for name in names if name not in ("chance", main))]):
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
