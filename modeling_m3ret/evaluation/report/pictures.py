"""A report's pictures: which of them these scans and methods give, and Markdown that shows and explains them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...atomic_io import atomic_write
from ...image_processing_m3ret import M3RetImageProcessor
from ...search.embedding import Embedded
from ..table import ALL_MODALITIES, Row
from . import plots
from .numbers import rank_within_modalities, scaling_series
from .plots import Picture


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
    pictures = [plots.precision_recall(within, main), plots.classes(records, within, main)] if within else []
    if len({record.modality for record in records}) > 1:
        pictures.append(plots.modalities(methods))
    if len(records) > 2:
        pictures.append(plots.embedding_map(records, embeddings, main))
    series = scaling_series(checkpoints)
    if series and any(row.protocol == ALL_MODALITIES for row in rows):
        pictures.append(plots.scaling(series, checkpoints, rows))
    if examples_by and within:
        pictures.append(plots.examples(methods[main], within, main, examples_by))
    return pictures


def write_pictures(folder: Path, pictures: Sequence[Picture]) -> str:
    """Write the pictures, each as a whole, and remove those that an earlier report left; returns Markdown that shows
    and explains them."""
    for name in set(FILES) - {picture.file for picture in pictures}:
        (folder / name).unlink(missing_ok=True)  # an earlier one's examples, say, that this report is to be without
    parts = ["## Pictures"]
    for picture in pictures:
        with atomic_write(folder / picture.file) as stream:
            stream.write(picture.png)
        alt = re.sub(r"([\\\[\]<>`])", r"\\\1", " ".join(picture.alt.split()))
        parts.append(f"### {picture.title}\n\n![{alt}]({picture.file})\n\n{picture.note}")
    if not any(picture.file == "examples.png" for picture in pictures):
        parts.append("No scan is shown in this report.")
    return "\n\n".join(parts)
