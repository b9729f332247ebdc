"""The report of an evaluation: text, metrics.json, and report.md with its figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...atomic_io import atomic_write, atomic_write_text
from ...image_processing_m3ret import M3RetImageProcessor
from ...search.embedding import Embedded
from ...search.matching import RerankedSearch
from ...version import __version__
from ..checkpoints import Checkpoint
from ..probe import PROBE
from ..table import (
    ALL_MODALITIES,
    Row,
    all_differences,
    differences_from,
    format_all_differences,
    format_differences,
    format_table,
    to_json,
)
from . import plots
from .numbers import rank_within_modalities, scaling_series
from .plots import Picture


FILES = ("precision_recall.png", "classes.png", "modalities.png", "map.png", "scaling.png", "examples.png")


@dataclass
class Report:
    """The results of one evaluation."""

    methods: Mapping[str, Embedded]  # by name in the table
    main: str  # name of the main checkpoint
    rows: Sequence[Row]
    checkpoints: Mapping[str, Checkpoint]  # by name
    notes: Sequence[str]  # warnings and remarks
    selection: str  # of `describe_selection`

    def text(self) -> str:
        """Return the report for the terminal, which names unreadable files."""
        embedded = self.methods[self.main]
        failures = [f"not read: {message}" for message in embedded.failures]
        count = f"{len(embedded.records)} scans embedded ({self.selection}), {len(failures)} could not be read"
        return "\n".join([*self._tables(), *failures, count, *self.notes])

    def write(self, folder: Path, examples: bool, **settings: Any) -> None:
        """Write metrics.json, report.md and its figures, without the name of any file or patient.

        The folder is created if it does not exist. With `examples`, the report shows scans, which is patient data.
        `settings` of the run are stored in metrics.json.
        """
        folder.mkdir(parents=True, exist_ok=True)
        embedded, differences = self.methods[self.main], differences_from(self.main, self.rows)
        facts = {
            "m3ret": __version__,
            "torch": torch.__version__,
            **settings,
            "scans": len(embedded.records),
            "part": self.selection,
            "notes": list(self.notes),
            "not_read": len(embedded.failures),
            "models": {title: vars(checkpoint.facts) for title, checkpoint in self.checkpoints.items()},
            "differences_of_mean_map": {name: value._asdict() for name, value in differences.items()},
            "differences_of_map": {
                title: {name: value._asdict() for name, value in row.items()}
                for title, row in all_differences(self.main, self.rows).items()
            },
            "differences_of_probe": {
                title: {name: value._asdict() for name, value in row.items()}
                for title, row in all_differences(self.main, self.rows, PROBE).items()
            },
        }
        atomic_write_text(folder / "metrics.json", to_json(self.rows, **facts) + "\n")
        rows = [row for row in self.rows if not isinstance(self.methods.get(row.method), RerankedSearch)]
        training = {title: checkpoint.training for title, checkpoint in self.checkpoints.items()}
        processor = self.checkpoints[self.main].processor if examples else None
        pictures = draw_pictures(self.methods, self.main, rows, training, processor)
        sections = [*self._tables(), *self.notes, write_pictures(folder, pictures)]
        atomic_write_text(folder / "report.md", "\n\n".join(sections) + "\n")

    def _tables(self) -> list[str]:
        differences, paired = differences_from(self.main, self.rows), all_differences(self.main, self.rows)
        probed = all_differences(self.main, self.rows, PROBE)
        return [
            format_table(self.rows),
            *([format_all_differences(self.main, paired)] if paired else []),
            *([format_all_differences(self.main, probed, PROBE)] if probed else []),
            *([format_differences(self.main, differences)] if differences else []),
        ]


def draw_pictures(
    methods: Mapping[str, Embedded],
    main: str,
    rows: Sequence[Row],
    checkpoints: Mapping[str, Mapping[str, Any]],
    example_processor: M3RetImageProcessor | None = None,
) -> list[Picture]:
    """Draw all pictures for which there is something to show: classes, map and examples of the main method.

    `rows` are for the scaling curves. `checkpoints` holds the training facts of the methods that are checkpoints:
    `objective`, and any of `QUANTITIES`. Without `example_processor`, no scan is shown.
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
    if example_processor and within:
        pictures.append(plots.examples(methods[main], within, main, example_processor))
    return pictures


def write_pictures(folder: Path, pictures: Sequence[Picture]) -> str:
    """Write the pictures atomically, remove other pictures of an earlier report, and return their Markdown."""
    for name in set(FILES) - {picture.file for picture in pictures}:
        (folder / name).unlink(missing_ok=True)  # such as examples, which this report must not contain
    sections = ["## Pictures"]
    for picture in pictures:
        with atomic_write(folder / picture.file) as stream:
            stream.write(picture.png)
        alt = re.sub(r"([\\\[\]<>`])", r"\\\1", " ".join(picture.alt.split()))
        sections.append(f"### {picture.title}\n\n![{alt}]({picture.file})\n\n{picture.note}")
    if not any(picture.file == "examples.png" for picture in pictures):
        sections.append("This report shows no scans.")
    return "\n\n".join(sections)
