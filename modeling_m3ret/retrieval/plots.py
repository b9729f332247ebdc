"""The pictures of a report: where precision is lost, in which classes, to which modality, and with how much training.

Each picture is computed first, by a function that returns numbers, and then drawn from these alone. A report may be
shared, so a picture shows modalities, anatomies, labels and what the table calls the methods, never a file or a
patient; pictures of scans are made only for those who ask for them. Colours are those of Okabe and Ito ("Color
Universal Design", 2008), told apart with any colour vision; markers, dashes and borders say the same without colour.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.collection import Record
from ..image_processing_m3ret import M3RetImageProcessor
from ..whole_files import writing_whole
from .embed import Embedded
from .evaluation import ALL_MODALITIES, Row
from .metrics import METRICS, Ranking, chunks, interpolated_precision, scores_of_ranks
from .protocols import MIXED_GALLERY, WITHIN_MODALITY, Annotations


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


CHANCE_ORDERS = 1000  # random orders a modality: one standard error of the mean precision is then below .01
FIRST = 10  # hits whose modality is counted: one page of results, as in `own modality@10`
MOST_CLASSES = 30  # of a modality in the picture: the 15 worst and the 15 best
MOST_KINDS = 8  # of modalities or anatomies in the map: as many as there are colours; the rarest share the last
MOST_POINTS = 5000  # in the map, where more only hide each other
EXAMPLES = {"good": 0.9, "median": 0.5, "bad": 0.1}  # quantiles of average precision at which examples are taken
EXAMPLE_HITS = 5


@dataclass(frozen=True)
class Picture:
    """file: its name in the report's folder; alt: what it shows, for those who don't see it; note: how to read it."""

    file: str
    title: str
    alt: str
    note: str
    png: bytes


FILES = ("precision_recall.png", "classes.png", "modalities.png", "map.png", "scaling.png", "examples.png")


def report_pictures(
    methods: Mapping[str, Embedded],
    main: str,
    rows: Sequence[Row],
    checkpoints: Mapping[str, Mapping[str, Any]],
    examples_by: M3RetImageProcessor | None = None,
) -> list[Picture]:
    """All pictures that these scans and methods give; one that would show nothing is left out.

    Args:
        main: the method whose classes, map and examples are shown. rows: of `evaluate`, for the curves of scaling.
        checkpoints: of the methods that are trained checkpoints, what they were trained with: `objective`, and any of
            `QUANTITIES`; other keys are ignored.
        examples_by: reads and resizes the scans that are shown as examples; without it no scan is.
    """
    within = rank_within_modalities(methods)
    records, embeddings = methods[main].records, methods[main].embeddings
    pictures = [_precision_recall(within, main), _classes(records, within, main)] if within else []
    if len({record.modality for record in records}) > 1:
        pictures.append(_modalities(methods))
    if len(records) > 2:
        pictures.append(_map(records, embeddings, main))
    series = scaling_series(checkpoints)
    if series and any(row.protocol == ALL_MODALITIES for row in rows):
        pictures.append(_scaling(series, checkpoints, rows))
    if examples_by and within:
        pictures.append(_examples(methods[main], within, main, examples_by))
    return pictures


def write_pictures(folder: Path, pictures: Sequence[Picture]) -> str:
    """Write the pictures, each as a whole, and remove those that an earlier report left; returns Markdown that shows
    and explains them."""
    for name in set(FILES) - {picture.file for picture in pictures}:
        (folder / name).unlink(missing_ok=True)  # an earlier one's examples, say, that this report is to be without
    parts = ["## Pictures"]
    for picture in pictures:
        with writing_whole(folder / picture.file) as stream:
            stream.write(picture.png)
        alt = re.sub(r"([\\\[\]<>`])", r"\\\1", " ".join(picture.alt.split()))
        parts.append(f"### {picture.title}\n\n![{alt}]({picture.file})\n\n{picture.note}")
    if not any(picture.file == "examples.png" for picture in pictures):
        parts.append("No scan is shown in this report.")
    return "\n\n".join(parts)


# -------------------------------------------------------------------------------------------------------------- numbers


class Ranked(NamedTuple):
    """The A queries of a modality that have something to find.

    queries: int64 `(A,)`, their places among the records. average_precision, expected: float64 `(A,)`, and what chance
    gives. precision: float64 `(A, 11)`, interpolated, at recall 0 to 1.
    """

    queries: Tensor
    average_precision: Tensor
    expected: Tensor
    precision: Tensor


def rank_within_modalities(methods: Mapping[str, Embedded]) -> dict[str, dict[str, Ranked]]:
    """By modality and method, chance first, in the protocol within each modality by label.

    Chance's curve is the mean of random orders, since its highest precision from some recall on has no closed form.
    """
    facts = Annotations(next(iter(methods.values())).records)
    count = len(facts.records)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, Ranked]] = {}
    for modality, queries in WITHIN_MODALITY.parts(facts):
        of_methods = {name: _rank(facts, queries, embedded.similarities) for name, embedded in methods.items()}
        first = next(iter(of_methods.values()))
        if not len(first.queries):
            continue
        asked_often = first.queries.repeat(-(-CHANCE_ORDERS // len(first.queries)))
        drawn = _rank(facts, asked_often, lambda asked, _: torch.rand(len(asked), count, generator=generator))
        chance = first._replace(average_precision=first.expected, precision=drawn.precision)
        found[modality] = {"chance": chance, **of_methods}
    return found


def _rank(facts: Annotations, queries: Tensor, similarities: Callable[[Tensor, Tensor], Tensor]) -> Ranked:
    parts = []
    for rows in chunks(len(queries), len(facts.records)):
        asked = queries[rows]
        relevant, candidate = WITHIN_MODALITY.masks(facts, asked)
        ranking = Ranking(similarities(asked, candidate), relevant, candidate)
        answerable = ranking.relevant > 0
        ranks = ranking.ranks[answerable]
        expected = ranking.scores().chance[:, METRICS.index("mAP")]
        parts.append(
            Ranked(asked[answerable], scores_of_ranks(ranks, ("mAP",))[:, 0], expected, interpolated_precision(ranks))
        )
    return Ranked(*(torch.cat(column) for column in zip(*parts, strict=True)))


def class_means(records: Sequence[Record], ranked: Ranked) -> dict[str, tuple[int, float]]:
    """Of each label the number of its queries and their mean average precision, best first; a query with several
    labels counts in each."""
    own: dict[str, list[float]] = {}
    for place, score in zip(ranked.queries.tolist(), ranked.average_precision.tolist(), strict=True):
        for label in WITHIN_MODALITY.classes(records[place]):
            own.setdefault(label, []).append(score)
    means = {label: (len(scores), sum(scores) / len(scores)) for label, scores in own.items()}
    return dict(sorted(means.items(), key=lambda item: (-item[1][1], item[0])))


def modality_shares(embedded: Embedded) -> tuple[list[str], Tensor, Tensor]:
    """What modalities the first ten hits are of, in the mixed gallery of all modalities without the query's group.

    Returns:
        The modalities' names, sorted; of their queries the share of hits of each, float64 `(M, M)` whose rows add up to
        1, or are not a number where nothing can be found; and the same of all candidates, which is chance.
    """
    records, facts = embedded.records, Annotations(embedded.records)
    names = sorted({record.modality for record in records})
    modality = torch.tensor([names.index(record.modality) for record in records])
    hits, candidates = torch.zeros(2, len(names), len(names), dtype=torch.float64)
    for rows in chunks(len(records), len(records)):
        asked = torch.arange(len(records))[rows]
        relevant, candidate = MIXED_GALLERY.masks(facts, asked)
        ranking = Ranking(embedded.similarities(asked, candidate), relevant, candidate)
        first = ranking.candidate & (ranking.rank_of_place <= FIRST)
        cell = modality[asked, None] * len(names) + modality[ranking.order]  # (q, n)
        for counts, counted in ((hits, first), (candidates, ranking.candidate)):
            counts += torch.bincount(cell[counted], minlength=len(names) ** 2).view_as(counts)
    return names, hits / hits.sum(1, keepdim=True), candidates / candidates.sum(1, keepdim=True)


def principal_components(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """The first two principal components of embeddings `(n, d)`: coordinates float64 `(n, 2)`, and the shares of the
    variance that they hold `(2,)`. Of a component's two signs it has the one whose largest weight is positive."""
    centred = embeddings.double() - embeddings.double().mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    directions = directions[:, -2:].flip(1)  # (d, 2)
    directions = directions * directions.gather(0, directions.abs().argmax(0)[None]).sign()
    return centred @ directions, variances[-2:].flip(0).clamp(min=0) / variances.sum().clamp(min=1e-12)


QUANTITIES = {
    "step": "training steps",
    "views": "views seen in training",
    "training_scans": "scans trained on",
    "parameters": "parameters of the encoder",
}
SAME_AXIS = ("step", "views")  # both are the length of a training


def scaling_series(checkpoints: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """For each quantity that differs among checkpoints, those that a line may join, since they have everything else in
    common: titles by what that is, as far as it differs; sorted by the quantity. Arguments as for `report_pictures`."""
    quantities: dict[str, dict[str, list[str]]] = {}
    for quantity in QUANTITIES:
        having = [title for title, facts in checkpoints.items() if _quantity(facts, quantity) is not None]
        if len({checkpoints[title][quantity] for title in having}) < 2:
            continue
        own_axis = SAME_AXIS if quantity in SAME_AXIS else (quantity,)
        told = {title: _in_common(checkpoints[title], own_axis) for title in having}
        differing = [place for place, words in enumerate(zip(*told.values(), strict=True)) if len(set(words)) > 1]
        series: dict[str, list[str]] = {}
        for title in having:  # in their order, so that what has a colour in one picture has it in the next
            words = [told[title][place] for place in differing if told[title][place]]
            series.setdefault(", ".join(words) or "checkpoints", []).append(title)
        for members in series.values():
            members.sort(key=lambda title: float(checkpoints[title][quantity]))
        quantities[quantity] = series
    return quantities


def _in_common(facts: Mapping[str, Any], without: Sequence[str]) -> list[str]:
    objective = str(facts.get("objective", ""))
    objective = objective if re.fullmatch(r"[\w+-]{1,32}", objective) else ""  # a word, not whatever a file may hold
    words = {"step": "steps", "training_scans": "scans", "parameters": "parameters"}
    numbers = [(_quantity(facts, name), word) for name, word in words.items() if name not in without]
    return [objective, *(f"{_engineering(number)} {word}" if number else "" for number, word in numbers)]


def _quantity(facts: Mapping[str, Any], name: str) -> float | None:
    """A positive number, or None where the facts, which may be anyone's file, hold none."""
    value = facts.get(name)
    return float(value) if isinstance(value, int | float) and 0 < value < float("inf") else None


def example_queries(ranked: Ranked) -> dict[str, int]:
    """Places in `ranked` of the queries at `EXAMPLES`' quantiles of average precision, each once."""
    order = ranked.average_precision.argsort(stable=True)
    places: dict[str, int] = {}
    for name, quantile in EXAMPLES.items():
        place = int(order[round(quantile * (len(order) - 1))])
        if place not in places.values():
            places[name] = place
    return places


def first_hits(embedded: Embedded, facts: Annotations, query: int) -> list[tuple[int, bool]]:
    """Places of the query's first hits of its own modality, and whether each is relevant."""
    asked = torch.tensor([query])
    relevant, candidate = WITHIN_MODALITY.masks(facts, asked)
    ranking = Ranking(embedded.similarities(asked, candidate), relevant, candidate)
    hits = ranking.candidate[0].nonzero()[:EXAMPLE_HITS, 0]
    return [(int(ranking.order[0, place]), bool(ranking.hits[0, place])) for place in hits]


def thumbnail(processor: M3RetImageProcessor, source: object) -> Image.Image:
    """The middle slice or frame of a scan, as the encoder sees it. Raises M3RetReadError if it can't be read."""
    volume = processor.resize(processor.read(source)) * processor.image_std + processor.image_mean  # (C, D, H, W)
    middle = volume[:, volume.shape[1] // 2].clamp(0, 1).mul(255).byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(middle.expand(-1, -1, 3)))


# -------------------------------------------------------------------------------------------------------------- drawing


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


def _styles(names: Sequence[str], main: str = "") -> dict[str, dict[str, Any]]:
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


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # a second to load, which `--help` needn't take

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")  # not pyplot's, which would keep it


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    return stream.getvalue()


def _panels(figure: Figure, titles: Sequence[str], columns: int, x_label: str, y_label: str) -> dict[str, Axes]:
    """Axes by title, labelled at the left and at the bottom, which is also above a place that is empty."""
    rows = -(-len(titles) // columns)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for place, panel in enumerate(axes):
        panel.set_visible(place < len(titles))
        at_bottom = place + columns >= len(titles)
        panel.tick_params(labelbottom=at_bottom)
        panel.set(xlabel=x_label if at_bottom else "", ylabel="" if place % columns else y_label)
    return dict(zip(titles, axes, strict=False))


def _plain(name: str, most: int = 28) -> str:
    """A name of any characters as matplotlib prints it: `$` begins no formula, `_` hides nothing from a legend. Of a
    long one the middle goes, for many differ at the end."""
    name = " ".join(name.split())
    name = name if len(name) <= most else f"{name[: most - most // 2 - 1]}…{name[-(most // 2) :]}"
    return re.sub(r"^_", " _", name).replace("$", r"\$")


def _engineering(number: float) -> str:
    """3 digits and k, M or G: 32.0 k."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small", frameon=False)


def _precision_recall(within: Mapping[str, Mapping[str, Ranked]], main: str) -> Picture:
    columns = min(3, len(within))
    figure = _figure(max(4.5, 3.2 * columns), 3.0 * -(-len(within) // columns) + 0.6)
    panels = _panels(figure, list(within), columns, "recall", "interpolated precision")
    recall = [tenth / 10 for tenth in range(11)]
    told = []
    for modality, axes in panels.items():
        of_methods = within[modality]
        for name, style in _styles(list(of_methods), main).items():
            precision = of_methods[name].precision.mean(0).tolist()
            axes.plot(recall, precision, label=_plain(name), **style, zorder=3 if name == main else 2)
            told.append(f"{modality}, {name}: {', '.join(f'{precision[at]:.2f}' for at in (0, 5, 10))}")
        axes.set(title=f"{_plain(modality, 18)} ({len(of_methods[main].queries)} queries)")
        axes.set(xlim=(-0.03, 1.03), ylim=(0, 1.03))
        axes.grid(alpha=0.3)
    _legend_below(figure, next(iter(panels.values())), 2 if columns == 1 else 4)
    return Picture(
        "precision_recall.png",
        "Precision and recall within each modality",
        f"Lines that fall from left to right, a panel a modality. Precision at recall 0, .5 and 1: {'; '.join(told)}.",
        "The highest precision at a recall of 0, .1, … 1 or any above it, mean over queries (the eleven-point curve). "
        f"Chance is the mean of {CHANCE_ORDERS} random orders or more.",
        _png(figure),
    )


def _classes(records: Sequence[Record], within: Mapping[str, Mapping[str, Ranked]], main: str) -> Picture:
    means = {
        modality: {name: class_means(records, ranked) for name, ranked in of_methods.items()}
        for modality, of_methods in within.items()
    }
    shown = {modality: _best_and_worst(list(of_methods[main])) for modality, of_methods in means.items()}
    sizes = [len(labels) for labels in shown.values()]
    figure = _figure(7.5, 0.24 * sum(sizes) + 0.55 * len(sizes) + 0.9)
    panels = figure.subplots(len(sizes), 1, squeeze=False, sharex=True, height_ratios=[n + 1 for n in sizes])[:, 0]
    styles = _styles(list(next(iter(within.values()))), main)
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
            label=_plain(main),
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
                    label=_plain(name),
                )
        axes.set_yticks(
            list(places.values()),
            [f"{_plain(label)} ({of_methods[main][label][0]})" for label in labels],
            fontsize="small",
        )
        left_out = len(of_methods[main]) - len(labels)
        if left_out:
            axes.axhline(MOST_CLASSES / 2 - 0.5, color=BLACK, linestyle="--", linewidth=0.8)
        more = (
            f": {MOST_CLASSES // 2} best and {MOST_CLASSES // 2} worst, {left_out} between left out" if left_out else ""
        )
        axes.set(ylim=(len(labels) - 0.4, -0.6), xlim=(0, 1.02))
        axes.set_title(_plain(modality) + more, fontsize="medium", loc="left")
        axes.grid(axis="x", alpha=0.3)
        for word, label in (("best", labels[0]), ("worst", labels[-1])):
            scores = ", ".join(f"{name} {own[label][1]:.2f}" for name, own in of_methods.items())
            told.append(f"{modality}, {word}: {label} ({scores})")
    panels[-1].set_xlabel("mAP (in brackets: queries)")
    _legend_below(figure, panels[0], 4)
    return Picture(
        "classes.png",
        "Classes within each modality",
        f"Bars of mAP, one a class, best of {main} first. {'; '.join(told)}.",
        f"mAP of the queries of each label: bars are {main}, markers the other methods. Few queries say little.",
        _png(figure),
    )


def _best_and_worst(labels: list[str]) -> list[str]:
    half = MOST_CLASSES // 2
    return labels if len(labels) <= MOST_CLASSES else labels[:half] + labels[-half:]


def _modalities(methods: Mapping[str, Embedded]) -> Picture:
    matrices: dict[str, Tensor] = {}
    for name, embedded in methods.items():
        names, matrices[name], candidates = modality_shares(embedded)
    matrices = {"chance": candidates, **matrices}
    columns = 2 if len(matrices) == 4 else min(3, len(matrices))
    side = max(2.2, 0.55 * len(names))
    figure = _figure(columns * (side + 0.4) + 1.0, -(-len(matrices) // columns) * (side + 0.4) + 1.0)
    labels = [_plain(name, 14) for name in names]
    words = (f"modality of the first {FIRST} hits, %", "modality of the query")
    told = []
    for name, axes in _panels(figure, list(matrices), columns, *words).items():
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
        axes.set_title(_plain(name, 24), fontsize="medium")
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
        _png(figure),
    )


def _map(records: Sequence[Record], embeddings: Tensor, main: str) -> Picture:
    points, shares = principal_components(embeddings)
    shown = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))[:MOST_POINTS].tolist()
    kinds = {key: [getattr(record, key) or "not told" for record in records] for key in ("modality", "anatomy")}
    kinds = {key: names for key, names in kinds.items() if key == "modality" or any(r.anatomy for r in records)}
    figure = _figure(4.4 * len(kinds), 5.0)
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
                label=f"{_plain(kind, 20)} ({names.count(kind)})",
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
        _png(figure),
    )


def _scaling(
    series: Mapping[str, Mapping[str, list[str]]], checkpoints: Mapping[str, Mapping[str, Any]], rows: Sequence[Row]
) -> Picture:
    from matplotlib.ticker import FuncFormatter, LogLocator

    scored = {row.method: row for row in rows if row.protocol == ALL_MODALITIES}
    beside = [name for name in scored if name not in checkpoints]
    heights = [max(2.8, 0.2 * (len(by_series) + len(beside)) + 0.6) for by_series in series.values()]
    figure = _figure(9.0, sum(heights))
    lines = _styles(beside)
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
            axes.errorbar(x, y, lengths, fmt=marker, color=colour, capsize=3, label=_plain(title, 48))
            at = sorted(set(x))
            means = [float(np.mean([v for place, v in zip(x, y, strict=True) if place == here])) for here in at]
            axes.plot(at, means, color=colour, linewidth=1.5)
            points = ", ".join(f"{_engineering(place)} {score:.3f}" for place, score in zip(x, y, strict=True))
            told.append(f"{QUANTITIES[quantity]}, {title}: {points}")
        for name in beside:
            dashes = lines[name]["linestyle"]
            axes.axhline(
                scored[name].scores["mAP"], color="0.35", linestyle=dashes, linewidth=1.2, label=_plain(name), zorder=1
            )
        all_x = [float(checkpoints[member][quantity]) for members in by_series.values() for member in members]
        if max(all_x) > 10 * min(all_x):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, place: ""))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: _engineering(value)))
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
        _png(figure),
    )


def _examples(
    embedded: Embedded, within: Mapping[str, Mapping[str, Ranked]], main: str, processor: M3RetImageProcessor
) -> Picture:
    facts = Annotations(embedded.records)
    chosen = [
        (modality, word, of_methods[main].queries[place].item(), of_methods[main].average_precision[place].item())
        for modality, of_methods in within.items()
        for word, place in example_queries(of_methods[main]).items()
    ]
    figure = _figure(1.35 * (1 + EXAMPLE_HITS), 1.75 * len(chosen))
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
            panel.set_xlabel(sign + _plain(record.label or "no label", 20), fontsize="x-small")
            panel.spines[:].set(
                color={True: GREEN, False: VERMILLION, None: BLACK}[relevant],
                linewidth={True: 3.0, False: 2.0, None: 1.0}[relevant],
                linestyle="--" if relevant is False else "-",
            )
        axes[0].set_ylabel(f"{_plain(modality, 14)}, {word}", fontsize="small")
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
        _png(figure),
    )
