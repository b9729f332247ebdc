"""CT-RATE: chest CT, with abnormalities extracted from the reports."""

from collections.abc import Iterator
from pathlib import Path

from dataset_scripts.entries import Entry, Source, SourceError, descend, find_files, positive_labels
from modeling_m3ret.data.table import read_table


SPLITS = {"train": "train", "valid": "validation"}


class CtRate(Source):
    """`dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz` and `dataset/multi_abnormality_labels/*.csv`.

    File names are patient_scan_reconstruction; each reconstruction is one entry. Only volumes that were downloaded are
    listed. The folders `train` and `valid` without "_fixed" are refused: their volumes are not in Hounsfield units and
    their headers lack the true spacing.
    """

    name = "ct_rate"
    title = "CT-RATE"
    homepage = "https://huggingface.co/datasets/ibrahimhamamci/CT-RATE"
    licence = "CC BY-NC-SA 4.0"
    citation = "Hamamci et al., CT-RATE and CT-CLIP, 2024, arXiv 2403.17834"
    layout = "dataset/train_fixed or valid_fixed with train_1/train_1_a/train_1_a_1.nii.gz"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        root = descend(root, "dataset")
        for prefix, split in SPLITS.items():
            volumes = root / f"{prefix}_fixed"
            if not volumes.is_dir():
                if (root / prefix).is_dir():
                    raise SourceError(root, f"{prefix}_fixed, the volumes with correct headers", prefix)
                continue
            labels = _labels(root / "multi_abnormality_labels" / f"{prefix}_predicted_labels.csv")
            not_chest = _read_not_chest(root / "metadata" / f"no_chest_{prefix}.txt")
            for path in find_files(volumes, (".nii.gz",)):
                name = path.name.removesuffix(".nii.gz")
                anatomy = "" if not_chest & {name, name.rpartition("_")[0]} else "chest"
                patient = "_".join(name.split("_")[:2])
                yield Entry(
                    name,
                    (path,),
                    "ct",
                    anatomy,
                    labels=labels.get(name, ()),
                    patient=patient,
                    split=split,
                    intensity="hounsfield",  # which NIfTI cannot declare
                )


def _labels(table: Path) -> dict[str, tuple[str, ...]]:
    rows = read_table(table, ["VolumeName"])
    return {row["VolumeName"].removesuffix(".nii.gz"): positive_labels(row, row.keys()) for row in rows}


def _read_not_chest(path: Path) -> set[str]:
    """Return volumes and scans of other body parts; none if the list was not downloaded."""
    if not path.is_file():
        return set()
    return {line.split("/")[-1].removesuffix(".nii.gz") for line in path.read_text(encoding="utf-8").split()}
