"""A report's pictures, each drawn from the numbers of `report_numbers.py` alone.

A report may be shared, so a picture shows modalities, anatomies, labels and what the table calls the methods, never a
file or a patient; pictures of scans are made only for those who ask for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.collection import Record
from ...image_processing_m3ret import M3RetImageProcessor
from ...search.embedding import Embedded
from ..protocols import Annotations
from ..table import ALL_MODALITIES, Row
from .numbers import (
    CHANCE_ORDERS,
    EXAMPLE_HITS,
    FIRST,
    MOST_CLASSES,
    QUANTITIES,
    Ranked,
    best_and_worst,
    class_means,
    engineering,
    example_queries,
    first_hits,
    modality_shares,
    principal_components,
    thumbnail,
)
from .style import (
    BLACK,
    COLOURS,
    GREEN,
    MARKERS,
    SKY,
    VERMILLION,
    YELLOW,
    legend_below,
    method_styles,
    new_figure,
    panels_of,
    plain,
    png,
)


MOST_KINDS = 8  # of modalities or anatomies in the map: as many as there are colours; the rarest share the last
MOST_POINTS = 5000  # in the map, where more only hide each other


@dataclass(frozen=True)
class Picture:
    """file: its name in the report's folder; alt: what it shows, for those who don't see it; note: how to read it."""

    file: str
    title: str
    alt: str
    note: str
    png: bytes


def precision_recall(within: Mapping[str, Mapping[str, Ranked]], main: str) -> Picture:
    """A line a method, a panel a modality; `within` is of `rank_within_modalities`, `main` the method in bold."""
    columns = min(3, len(within))
    figure = new_figure(max(4.5, 3.2 * columns), 3.0 * -(-len(within) // columns) + 0.6)
    panels = panels_of(figure, list(within), columns, "recall", "interpolated precision")
    recall = [tenth / 10 for tenth in range(11)]
    told = []
    for modality, axes in panels.items():
        of_methods = within[modality]
        for name, style in method_styles(list(of_methods), main).items():
            precision = of_methods[name].precision.mean(0).tolist()
            axes.plot(recall, precision, label=plain(name), **style, zorder=3 if name == main else 2)
            told.append(f"{modality}, {name}: {', '.join(f'{precision[at]:.2f}' for at in (0, 5, 10))}")
        axes.set(title=f"{plain(modality, 18)} ({len(of_methods[main].queries)} queries)")
        axes.set(xlim=(-0.03, 1.03), ylim=(0, 1.03))
        axes.grid(alpha=0.3)
    legend_below(figure, next(iter(panels.values())), 2 if columns == 1 else 4)
    return Picture(
        "precision_recall.png",
        "Precision and recall within each modality",
        f"Lines that fall from left to right, a panel a modality. Precision at recall 0, .5 and 1: {'; '.join(told)}.",
        "The highest precision at a recall of 0, .1, … 1 or any above it, mean over queries (the eleven-point curve). "
        f"Chance is the mean of {CHANCE_ORDERS} random orders or more.",
        png(figure),
    )


def classes(records: Sequence[Record], within: Mapping[str, Mapping[str, Ranked]], main: str) -> Picture:
    """Bars of mAP by label, of `main`, with the other methods as markers."""
    means = {
        modality: {name: class_means(records, ranked) for name, ranked in of_methods.items()}
        for modality, of_methods in within.items()
    }
    shown = {modality: best_and_worst(list(of_methods[main])) for modality, of_methods in means.items()}
    sizes = [len(labels) for labels in shown.values()]
    figure = new_figure(7.5, 0.24 * sum(sizes) + 0.55 * len(sizes) + 0.9)
    panels = figure.subplots(len(sizes), 1, squeeze=False, sharex=True, height_ratios=[n + 1 for n in sizes])[:, 0]
    styles = method_styles(list(next(iter(within.values()))), main)
    told = []
    for (modality, labels), axes in zip(shown.items(), panels, strict=True):
        of_methods = means[modality]
        places = {label: place for place, label in enumerate(labels)}
        axes.barh(
            list(places.values()),
            [of_methods[main][label][1] for label in labels],
            color=(SKY, 0.45),  # light, so that markers stand out in grey, too
            edgecolor=BLACK,
            linewidth=0.6,
            label=plain(main),
        )
        for name in styles:
            if name != main:
                marker = "|" if name == "chance" else styles[name]["marker"]
                axes.plot(
                    [of_methods[name][label][1] for label in labels],
                    list(places.values()),
                    marker=marker,
                    color=styles[name]["color"],
                    linestyle="",
                    markersize=9 if name == "chance" else 5,
                    markeredgewidth=2 if name == "chance" else 0.5,
                    markeredgecolor=BLACK,
                    label=plain(name),
                )
        axes.set_yticks(
            list(places.values()),
            [f"{plain(label)} ({of_methods[main][label][0]})" for label in labels],
            fontsize="small",
        )
        left_out = len(of_methods[main]) - len(labels)
        if left_out:
            axes.axhline(MOST_CLASSES / 2 - 0.5, color=BLACK, linestyle="--", linewidth=0.8)
        more = (
            f": {MOST_CLASSES // 2} best and {MOST_CLASSES // 2} worst, {left_out} between left out" if left_out else ""
        )
        axes.set(ylim=(len(labels) - 0.4, -0.6), xlim=(0, 1.02))
        axes.set_title(plain(modality) + more, fontsize="medium", loc="left")
        axes.grid(axis="x", alpha=0.3)
        for word, label in (("best", labels[0]), ("worst", labels[-1])):
            scores = ", ".join(f"{name} {own[label][1]:.2f}" for name, own in of_methods.items())
            told.append(f"{modality}, {word}: {label} ({scores})")
    panels[-1].set_xlabel("mAP (in brackets: queries)")
    legend_below(figure, panels[0], 4)
    return Picture(
        "classes.png",
        "Classes within each modality",
        f"Bars of mAP, one a class, best of {main} first. {'; '.join(told)}.",
        f"mAP of the queries of each label: bars are {main}, markers the other methods. Few queries say little.",
        png(figure),
    )


def modalities(methods: Mapping[str, Embedded]) -> Picture:
    """A matrix a method: the modality of the first hits by that of the query."""
    matrices: dict[str, Tensor] = {}
    for name, embedded in methods.items():
        names, matrices[name], candidates = modality_shares(embedded)
    matrices = {"chance": candidates, **matrices}
    columns = 2 if len(matrices) == 4 else min(3, len(matrices))
    side = max(2.2, 0.55 * len(names))
    figure = new_figure(columns * (side + 0.4) + 1.0, -(-len(matrices) // columns) * (side + 0.4) + 1.0)
    labels = [plain(name, 14) for name in names]
    words = (f"modality of the first {FIRST} hits, %", "modality of the query")
    told = []
    for name, axes in panels_of(figure, list(matrices), columns, *words).items():
        axes.imshow(matrices[name].numpy(), cmap="Greys", vmin=0, vmax=1)
        for row, shares in enumerate(matrices[name].tolist()):
            for column, share in enumerate(shares):
                number = "–" if share != share else f"{100 * share:.0f}"
                axes.text(
                    column,
                    row,
                    number,
                    ha="center",
                    va="center",
                    color="white" if share > 0.5 else BLACK,
                    fontsize="small",
                )
        axes.set_xticks(range(len(names)), labels, rotation=45, ha="right", fontsize="small")
        axes.set_yticks(range(len(names)), labels, fontsize="small")
        axes.set_title(plain(name, 24), fontsize="medium")
        own = ", ".join(
            f"{kind} {100 * share:.0f}" for kind, share in zip(names, matrices[name].diag().tolist(), strict=True)
        )
        told.append(f"{name}: {own}")
    return Picture(
        "modalities.png",
        f"Modality of the first {FIRST} hits in the mixed gallery",
        f"Matrices of per cent, a panel a method. Hits of the query's own modality: {'; '.join(told)}.",
        "All scans are searched together. A row is the queries of a modality and adds up to 100; chance is what the "
        "gallery holds.",
        png(figure),
    )


def embedding_map(records: Sequence[Record], embeddings: Tensor, main: str) -> Picture:
    """The first two principal components of embeddings `(n, d)`, by modality and by anatomy."""
    points, shares = principal_components(embeddings)
    shown = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))[:MOST_POINTS].tolist()
    kinds = {key: [getattr(record, key) or "not told" for record in records] for key in ("modality", "anatomy")}
    kinds = {key: names for key, names in kinds.items() if key == "modality" or any(r.anatomy for r in records)}
    figure = new_figure(4.4 * len(kinds), 5.0)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharex=True, sharey=True)[0]
    told = []
    for (key, names), axes in zip(kinds.items(), panels, strict=True):
        common = [name for name, _ in Counter(sorted(names)).most_common()]
        if len(common) > MOST_KINDS:
            common, names = (
                [*common[: MOST_KINDS - 1], "others"],
                [name if name in common[: MOST_KINDS - 1] else "others" for name in names],
            )
        for number, kind in enumerate(common):
            own = points[[place for place in shown if names[place] == kind]].numpy()
            colour = (*COLOURS, YELLOW)[number]
            style = {"color": colour, "marker": MARKERS[number], "edgecolor": BLACK, "linewidth": 0.3, "alpha": 0.8}
            axes.scatter(
                own[:, 0],
                own[:, 1],
                s=22,
                label=f"{plain(kind, 20)} ({names.count(kind)})",
                **style,
                zorder=1 if kind == "others" else 2,
            )
        told.append(f"by {key}: {', '.join(common)}")
        axes.set(title=f"by {key}", xlabel=f"first component, {100 * shares[0]:.0f} % of the variance")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize="small", frameon=False)
    panels[0].set_ylabel(f"second component, {100 * shares[1]:.0f} %")
    return Picture(
        "map.png",
        "Map of the embeddings",
        f"Points, one a scan, at the first two principal components, {100 * shares[0]:.0f} and {100 * shares[1]:.0f} "
        f"per cent of the variance, coloured {'; '.join(told)}.",
        f"Principal components of the embeddings of {main}: a flat shadow of many dimensions. What lies apart here is "
        "apart; what lies together may not be.",
        png(figure),
    )


def scaling(
    series: Mapping[str, Mapping[str, list[str]]], checkpoints: Mapping[str, Mapping[str, Any]], rows: Sequence[Row]
) -> Picture:
    """mAP of checkpoints over each quantity of `scaling_series`, with its interval; others as horizontal lines."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    scored = {row.method: row for row in rows if row.protocol == ALL_MODALITIES}
    beside = [name for name in scored if name not in checkpoints]
    heights = [max(2.8, 0.2 * (len(by_series) + len(beside)) + 0.6) for by_series in series.values()]
    figure = new_figure(9.0, sum(heights))
    lines = method_styles(beside)
    told = []
    panels = figure.subplots(len(series), 1, squeeze=False, sharey=True, height_ratios=heights)[:, 0]
    for (quantity, by_series), axes in zip(series.items(), panels, strict=True):
        for number, (title, members) in enumerate(by_series.items()):
            x = [float(checkpoints[member][quantity]) for member in members]
            y = [scored[member].scores["mAP"] for member in members]
            intervals = [scored[member].interval or (score, score) for member, score in zip(members, y, strict=True)]
            lengths = [[v - low for v, (low, _) in zip(y, intervals, strict=True)]]
            lengths += [[high - v for v, (_, high) in zip(y, intervals, strict=True)]]
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axes.errorbar(x, y, lengths, fmt=marker, color=colour, capsize=3, label=plain(title, 48))
            at = sorted(set(x))
            means = [float(np.mean([v for place, v in zip(x, y, strict=True) if place == here])) for here in at]
            axes.plot(at, means, color=colour, linewidth=1.5)
            points = ", ".join(f"{engineering(place)} {score:.3f}" for place, score in zip(x, y, strict=True))
            told.append(f"{QUANTITIES[quantity]}, {title}: {points}")
        for name in beside:
            dashes = lines[name]["linestyle"]
            axes.axhline(
                scored[name].scores["mAP"], color="0.35", linestyle=dashes, linewidth=1.2, label=plain(name), zorder=1
            )
        all_x = [float(checkpoints[member][quantity]) for members in by_series.values() for member in members]
        if max(all_x) > 10 * min(all_x):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, place: ""))
        else:
            axes.locator_params(axis="x", integer=True)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: engineering(value)))
        axes.set(xlabel=QUANTITIES[quantity], ylabel="mAP, mean over modalities")
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small", frameon=False)
    others = ", ".join(f"{name} {scored[name].scores['mAP']:.3f}" for name in beside)
    return Picture(
        "scaling.png",
        "mAP and the size of training",
        f"mAP of the checkpoints. {'; '.join(told)}. Beside them as horizontal lines: {others}.",
        "Mean over modalities with its 95 % interval. A line joins checkpoints that have all else in common, at equal "
        "places through their mean. The untrained encoder is of the first checkpoint's size.",
        png(figure),
    )


def examples(
    embedded: Embedded, within: Mapping[str, Mapping[str, Ranked]], main: str, processor: M3RetImageProcessor
) -> Picture:
    """Scans: queries at quantiles of average precision, and their first hits. The only picture that shows patients."""
    facts = Annotations(embedded.records)
    chosen = [
        (modality, word, of_methods[main].queries[place].item(), of_methods[main].average_precision[place].item())
        for modality, of_methods in within.items()
        for word, place in example_queries(of_methods[main]).items()
    ]
    figure = new_figure(1.35 * (1 + EXAMPLE_HITS), 1.75 * len(chosen))
    told = []
    for (modality, word, query, score), axes in zip(
        chosen, figure.subplots(len(chosen), 1 + EXAMPLE_HITS, squeeze=False), strict=True
    ):
        hits = first_hits(embedded, facts, int(query))
        for panel in axes[1 + len(hits) :]:
            panel.set_visible(False)
        shown = [(int(query), None), *hits]
        for panel, (place, relevant) in zip(axes, shown, strict=False):
            record = embedded.records[place]
            panel.imshow(thumbnail(processor, record.open()))
            panel.set_xticks([])
            panel.set_yticks([])
            sign = {True: "✓ ", False: "✗ ", None: ""}[relevant]
            panel.set_xlabel(sign + plain(record.label or "no label", 20), fontsize="x-small")
            panel.spines[:].set(
                color={True: GREEN, False: VERMILLION, None: BLACK}[relevant],
                linewidth={True: 3.0, False: 2.0, None: 1.0}[relevant],
                linestyle="--" if relevant is False else "-",
            )
        axes[0].set_ylabel(f"{plain(modality, 14)}, {word}", fontsize="small")
        axes[0].set_title(f"query, AP {score:.2f}", fontsize="small")
        found = ", ".join("relevant" if relevant else "not" for _, relevant in hits)
        told.append(f"{modality}, {word} (average precision {score:.2f}): {found}")
    return Picture(
        "examples.png",
        "Examples",
        f"Pictures of scans: a query a row, and its first {EXAMPLE_HITS} hits. {'; '.join(told)}.",
        "**This picture shows scans of patients**, and writing that may be burned into them: share it as you would "
        f"share the scans. Hits of {main} in the query's modality: ✓ in an unbroken border shares a label with it, "
        "✗ in a dashed one doesn't. Queries stand at the 90th, 50th and 10th percentile of average precision.",
        png(figure),
    )
