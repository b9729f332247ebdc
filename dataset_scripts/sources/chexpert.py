"""CheXpert: chest radiographs, with findings extracted from their reports. The validation set is labelled by hand."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dataset_scripts.entries import Entry, Source, SourceError, positive_labels
from modeling_m3ret.data.table import path_inside, read_table


FINDINGS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other"),
    *("Fracture", "Support Devices"),
)
TABLES = {"train": "train.csv", "validation": "valid.csv"}


class CheXpert(Source):
    """`train.csv`, `valid.csv` and `train|valid/patient00001/study1/view1_frontal.jpg`, of full or small size."""

    name = "chexpert"
    title = "CheXpert"
    homepage = "https://stanfordmlgroup.github.io/competitions/chexpert/"
    licence = "Stanford University Dataset Research Use Agreement"
    citation = "Irvin et al., CheXpert, AAAI 2019, arXiv 1901.07031"
    layout = "train.csv and valid.csv with a row per image"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        for split, table in TABLES.items():
            for row in read_table(root / table, ["Path", *FINDINGS]):
                parts = PurePosixPath(row["Path"]).parts[1:]  # the first is the name of the release
                if len(parts) != 4:
                    expected = "paths such as RELEASE/train/PATIENT/STUDY/VIEW.jpg"
                    raise SourceError(root / table, expected, repr(row["Path"]))
                name = "/".join(parts)
                path, labels = path_inside(root, name), positive_labels(row, FINDINGS)
                yield Entry(name, (path,), "xray", "chest", labels=labels, patient=parts[1], split=split)
