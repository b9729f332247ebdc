"""COVID-19 Lung Ultrasound: point-of-care images and clips, gathered from public websites."""

from collections.abc import Iterator
from pathlib import Path

from dataset_scripts.entries import Entry, Source, descend, find_files
from modeling_m3ret.data.table import read_table


LABELS = {"cov": "COVID-19", "pneu": "bacterial pneumonia", "reg": "regular", "vir": "viral pneumonia"}
SUFFIXES = {"pocus_images": (".png", ".jpg", ".jpeg"), "pocus_videos": (".mp4", ".mpeg", ".mov", ".avi", ".gif")}


class PocusLung(Source):
    """`data/pocus_images` and `data/pocus_videos`, each with `convex` and `linear`: `Cov-Atlas-Day+1.gif`, `Pneu_…`.

    The first part of a file name is its label, except in `label_uncertain`. `dataset_metadata.csv` has the patients.
    """

    name = "pocus_lung"
    title = "COVID-19 Lung Ultrasound (POCUS)"
    homepage = "https://github.com/jannisborn/covid19_ultrasound"
    licence = "CC BY-NC 4.0 for most files; dataset_metadata.csv has the licence of each"
    citation = "Born et al., Accelerating Detection of Lung Pathologies, Applied Sciences 2021, arXiv 2004.12084"
    layout = "data/pocus_images|pocus_videos/convex|linear/Cov|Pneu|Reg|Vir*"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        root = descend(root, "data")
        rows = read_table(root / "dataset_metadata.csv", ["Filename", "Patient ID / Name"])
        patients = {row["Filename"]: row["Patient ID / Name"] for row in rows}
        for folder, suffixes in SUFFIXES.items():
            for path in find_files(root / folder, suffixes):
                label = LABELS.get(path.stem.replace("_", "-").split("-")[0].lower())
                labels = (label,) if label and path.parent.name != "label_uncertain" else ()
                name, patient = path.relative_to(root).as_posix(), patients.get(path.stem, "")
                yield Entry(name, (path,), "ultrasound", "lung", labels=labels, patient=patient)
