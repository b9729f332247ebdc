"""CT-RATE: CT of the chest, with abnormalities mined from the reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dataset_scripts.entries import Entry, Source, SourceError, expecting, files_under, positive, read_table, within


SPLITS = {"train": "train", "valid": "validation"}


class CtRate(Source):
    """`dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz` and `dataset/multi_abnormality_labels/*.csv`.

    patient_scan_reconstruction: the reconstructions of one scan are entries of their own. The volumes lead, not the
    tables, as nobody has room for all of them. Those in `train` and `valid`, without "fixed", are refused: they are
    neither in Hounsfield units nor with the true spacing in their headers.
    """

    name = "ct_rate"
    title = "CT-RATE"
    homepage = "https://huggingface.co/datasets/ibrahimhamamci/CT-RATE"
    licence = "CC BY-NC-SA 4.0"
    citation = "Hamamci et al., CT-RATE and CT-CLIP, 2024, arXiv 2403.17834"

    @expecting("dataset/train_fixed or valid_fixed with train_1/train_1_a/train_1_a_1.nii.gz")
    def entries(self, root: Path) -> Iterator[Entry]:
        root = within(root, "dataset")
        for part, split in SPLITS.items():
            volumes = root / f"{part}_fixed"
            if not volumes.is_dir():
                if (root / part).is_dir():
                    raise SourceError(f"{root}: found {part}, expected {part}_fixed, the volumes with correct headers")
                continue
            labels = _labels(root / "multi_abnormality_labels" / f"{part}_predicted_labels.csv")
            elsewhere = _elsewhere(root / "metadata" / f"no_chest_{part}.txt")
            for path in files_under(volumes, (".nii.gz",)):
                name = path.name.removesuffix(".nii.gz")
                yield Entry(
                    id=name,
                    files=(path,),
                    modality="ct",
                    anatomy="" if elsewhere & {name, name.rpartition("_")[0]} else "chest",
                    labels=labels.get(name, ()),
                    patient="_".join(name.split("_")[:2]),
                    split=split,
                )


def _labels(table: Path) -> dict[str, tuple[str, ...]]:
    return {
        row["VolumeName"].removesuffix(".nii.gz"): positive(row, [column for column in row if column != "VolumeName"])
        for row in read_table(table, ["VolumeName"])
    }


def _elsewhere(path: Path) -> set[str]:
    """Volumes or scans that are of the head and the like; none where the list was not downloaded."""
    if not path.is_file():
        return set()
    return {line.split("/")[-1].removesuffix(".nii.gz") for line in path.read_text(encoding="utf-8").split()}
