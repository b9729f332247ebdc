"""PadChest: chest radiographs of Hospital San Juan, with findings extracted from their Spanish reports."""

import ast
from collections.abc import Iterator
from pathlib import Path

from dataset_scripts.entries import Entry, Source
from modeling_m3ret.data.table import path_inside, read_table


TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
NO_FINDINGS = ("", "exclude", "suboptimal study", "unchanged")  # about the examination, not about the image


class PadChest(Source):
    """`PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv(.gz)` and the folders `0` to `54` of PNG files."""

    name = "padchest"
    title = "PadChest"
    homepage = "https://bimcv.cipf.es/bimcv-projects/padchest/"
    licence = "PadChest Dataset Research Use Agreement"
    citation = "Bustos et al., PadChest, Medical Image Analysis 2020, arXiv 1901.07441"
    layout = f"{TABLE} and folders 0 to 54 of *.png"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        for row in read_table(root / TABLE, ["ImageID", "ImageDir", "PatientID", "Labels"]):
            folder = path_inside(root, row["ImageDir"])
            if folder.is_dir():  # each folder is a separate download of many GB
                path, labels = path_inside(folder, row["ImageID"]), _labels(row["Labels"])
                yield Entry(row["ImageID"], (path,), "xray", "chest", labels=labels, patient=row["PatientID"])


def _labels(cell: str) -> tuple[str, ...]:
    """Parse a cell such as "['cardiomegaly', ' pleural effusion']"; return nothing for any other content."""
    try:
        findings = ast.literal_eval(cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ()
    if not isinstance(findings, list):
        return ()
    unique = dict.fromkeys(finding.strip() for finding in findings if isinstance(finding, str))
    return tuple(finding for finding in unique if finding not in NO_FINDINGS)
