"""NIH ChestX-ray14: frontal chest radiographs, with findings extracted from their reports."""

from collections.abc import Iterator
from pathlib import Path

from dataset_scripts.entries import Entry, Source, SourceError
from modeling_m3ret.data.table import read_table


LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}


class NihChestXray14(Source):
    """`Data_Entry_2017*.csv` and the images, in `images_001/images` to `images_012/images` or all in `images`."""

    name = "nih_chestxray14"
    title = "NIH ChestX-ray14"
    homepage = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
    licence = "Unrestricted use; link to the download site and acknowledge the NIH Clinical Center"
    citation = "Wang et al., ChestX-ray8, CVPR 2017, arXiv 1705.02315"
    layout = "Data_Entry_2017*.csv and images_001/images/*.png or images/*.png"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        tables = sorted(root.glob("Data_Entry_2017*.csv"))
        if not tables:
            raise SourceError(root, "the table of findings, Data_Entry_2017*.csv", "no such file")
        splits = _read_splits(root)
        folders = [root / "images", *sorted(root.glob("images_*/images"))]
        files = {path.name: path for folder in folders for path in folder.glob("*.png")}
        table = tables[-1]  # the corrected version
        for row in read_table(table, ["Image Index", "Finding Labels", "Patient ID"]):
            name, patient, split = row["Image Index"], row["Patient ID"], splits.get(row["Image Index"])
            if name in files:  # otherwise in one of the twelve archives that was not downloaded
                labels = tuple(label for label in row["Finding Labels"].split("|") if label)
                yield Entry(name, (files[name],), "xray", "chest", labels=labels, patient=patient, split=split)


def _read_splits(root: Path) -> dict[str, str]:
    """Return the official split of each file name; empty if neither list was downloaded."""
    lists = {split: root / name for split, name in LISTS.items() if (root / name).is_file()}
    if len(lists) == 1:
        raise SourceError(root, f"both or neither of {', '.join(LISTS.values())}", "one of them")
    return {name: split for split, path in lists.items() for name in path.read_text(encoding="utf-8").split()}
