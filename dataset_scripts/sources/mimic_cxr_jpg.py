"""MIMIC-CXR-JPG: chest radiographs of an emergency department, with findings extracted from their reports."""

from collections.abc import Iterator
from pathlib import Path

from dataset_scripts.entries import Entry, Source, SourceError, positive_labels
from dataset_scripts.sources.chexpert import FINDINGS  # the same labeller processed these reports
from modeling_m3ret.data.table import path_inside, read_table


SPLITS = {"train": "train", "validate": "validation", "test": "test"}


class MimicCxrJpg(Source):
    """`files/p10/p10000032/s50414267/*.jpg` and the tables `mimic-cxr-2.0.0-{split,chexpert}.csv(.gz)`."""

    name = "mimic_cxr_jpg"
    title = "MIMIC-CXR-JPG"
    homepage = "https://physionet.org/content/mimic-cxr-jpg/"
    licence = "PhysioNet Credentialed Health Data License 1.5.0"
    citation = "Johnson et al., MIMIC-CXR-JPG, 2019, arXiv 1901.07042"
    layout = "mimic-cxr-2.0.0-split.csv.gz and files/p10/p10000032/s50414267/*.jpg"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        findings = {
            row["study_id"]: positive_labels(row, FINDINGS)
            for row in read_table(root / "mimic-cxr-2.0.0-chexpert.csv", ["study_id", *FINDINGS])
        }
        table = root / "mimic-cxr-2.0.0-split.csv"
        for row in read_table(table, ["dicom_id", "study_id", "subject_id", "split"]):
            name, study, subject = row["dicom_id"], row["study_id"], row["subject_id"]
            if row["split"] not in SPLITS:
                raise SourceError(table, f"a split out of {', '.join(SPLITS)}", repr(row["split"]))
            group = path_inside(root, f"files/p{subject[:2]}")
            if not group.is_dir():  # each of the ten groups of patients is a separate download
                continue
            path, labels = path_inside(group, f"p{subject}/s{study}/{name}.jpg"), findings.get(study, ())
            yield Entry(name, (path,), "xray", "chest", labels=labels, patient=subject, split=SPLITS[row["split"]])
