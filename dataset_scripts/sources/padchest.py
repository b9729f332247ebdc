"""PadChest: chest radiographs of Hospital San Juan, with findings from their Spanish reports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from dataset_scripts.entries import Entry, Source, expecting, inside, read_table


TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
NO_FINDINGS = ("", "exclude", "suboptimal study", "unchanged")  # of the examination, not of what the image shows


class PadChest(Source):
    """`PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv(.gz)` and the folders `0` to `54` of PNG files."""

    name = "padchest"
    title = "PadChest"
    homepage = "https://bimcv.cipf.es/bimcv-projects/padchest/"
    licence = "PadChest Dataset Research Use Agreement"
    citation = "Bustos et al., PadChest, Medical Image Analysis 2020, arXiv 1901.07441"

    @expecting(f"{TABLE} and folders 0 to 54 of *.png")
    def entries(self, root: Path) -> Iterator[Entry]:
        for row in read_table(root / TABLE, ["ImageID", "ImageDir", "PatientID", "Labels"]):
            folder = inside(root, row["ImageDir"])
            if not folder.is_dir():  # each folder is an archive of many GB, and most downloads lack some
                continue
            yield Entry(
                id=row["ImageID"],
                files=(inside(folder, row["ImageID"]),),
                modality="xray",
                anatomy="chest",
                labels=_labels(row["Labels"]),
                patient=row["PatientID"],
            )


def _labels(cell: str) -> tuple[str, ...]:
    """The words of a cell such as "['cardiomegaly', ' pleural effusion']"; none where it holds no such list."""
    try:
        words = ast.literal_eval(cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ()
    if not isinstance(words, list):
        return ()
    found = dict.fromkeys(word.strip() for word in words if isinstance(word, str))
    return tuple(word for word in found if word not in NO_FINDINGS)
