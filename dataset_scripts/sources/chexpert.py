"""CheXpert: chest radiographs, with findings mined from their reports; the validation set is labelled by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dataset_scripts.entries import Entry, Source, SourceError, expecting, inside, positive, read_table


FINDINGS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
TABLES = {"train": "train.csv", "validation": "valid.csv"}


class CheXpert(Source):
    """`train.csv`, `valid.csv` and `train|valid/patient00001/study1/view1_frontal.jpg`, full size or small."""

    name = "chexpert"
    title = "CheXpert"
    homepage = "https://stanfordmlgroup.github.io/competitions/chexpert/"
    licence = "Stanford University Dataset Research Use Agreement"
    citation = "Irvin et al., CheXpert, AAAI 2019, arXiv 1901.07031"

    @expecting("train.csv and valid.csv with a row per image")
    def entries(self, root: Path) -> Iterator[Entry]:
        for split, table in TABLES.items():
            for row in read_table(root / table, ["Path", *FINDINGS]):
                parts = PurePosixPath(row["Path"]).parts[1:]  # the first is the release, whatever `root` is called
                if len(parts) != 4:
                    raise SourceError(
                        f"{root / table}: found the path {row['Path']!r}, expected release/train/patient/study/view.jpg"
                    )
                name = "/".join(parts)
                yield Entry(
                    id=name,
                    files=(inside(root, name),),
                    modality="xray",
                    anatomy="chest",
                    labels=positive(row, FINDINGS),
                    patient=parts[1],
                    split=split,
                )
