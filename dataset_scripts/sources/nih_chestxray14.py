"""NIH ChestX-ray14: frontal chest radiographs, with findings mined from their reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dataset_scripts.entries import Entry, Source, SourceError, expecting, read_table


LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}


class NihChestXray14(Source):
    """`Data_Entry_2017*.csv` and the images, in `images_001/images` to `images_012/images` or all in `images`."""

    name = "nih_chestxray14"
    title = "NIH ChestX-ray14"
    homepage = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
    licence = "Unrestricted use; link to the download site and acknowledge the NIH Clinical Center"
    citation = "Wang et al., ChestX-ray8, CVPR 2017, arXiv 1705.02315"

    @expecting("Data_Entry_2017*.csv and images_001/images/*.png or images/*.png")
    def entries(self, root: Path) -> Iterator[Entry]:
        tables = sorted(root.glob("Data_Entry_2017*.csv"))
        if not tables:
            raise SourceError(f"{root}: found no Data_Entry_2017*.csv, expected the table of findings")
        splits = _splits(root)
        files = {
            path.name: path
            for folder in [root / "images", *sorted(root.glob("images_*/images"))]
            for path in folder.glob("*.png")
        }
        for row in read_table(tables[-1], ["Image Index", "Finding Labels", "Patient ID"]):  # the last is the corrected
            name = row["Image Index"]
            if name not in files:  # its archive, one of twelve, was not downloaded; the table doesn't say which it is
                continue
            yield Entry(
                id=name,
                files=(files[name],),
                modality="xray",
                anatomy="chest",
                labels=tuple(label for label in row["Finding Labels"].split("|") if label),
                patient=row["Patient ID"],
                split=splits.get(name),
            )


def _splits(root: Path) -> dict[str, str]:
    """The official split by file name; empty where neither list was downloaded."""
    found = {split: root / name for split, name in LISTS.items() if (root / name).is_file()}
    if len(found) == 1:
        raise SourceError(f"{root}: found one of {', '.join(LISTS.values())}, expected both or neither")
    return {name: split for split, path in found.items() for name in path.read_text(encoding="utf-8").split()}
