"""HyperKvasir: clips of gastroscopies and colonoscopies, by finding. Its still images are not used."""

from collections.abc import Iterator
from pathlib import Path

from dataset_scripts.entries import Entry, Source, descend, find_files
from modeling_m3ret.data.table import read_table


TRACTS = {"lower-gi-tract": "colon", "upper-gi-tract": "upper gastrointestinal tract"}


class HyperKvasirVideos(Source):
    """`labeled-videos/lower-gi-tract/<category>/<finding>/*.avi` and `labeled-videos/video-labels.csv`.

    The table may name a second finding. The collection does not say which clips belong to one patient.
    """

    name = "hyperkvasir_videos"
    title = "HyperKvasir, labelled videos"
    homepage = "https://osf.io/mh9sj/"
    licence = "CC BY 4.0; the authors ask for written permission before commercial use and competitions"
    citation = "Borgli et al., HyperKvasir, Scientific Data 2020"
    layout = "labeled-videos/lower-gi-tract|upper-gi-tract/<category>/<finding>/*.avi"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        root = descend(root, "labeled-videos")
        findings = {
            Path(row["Video file"]).stem: [row[column] for column in sorted(row) if column.startswith("Finding")]
            for row in read_table(root / "video-labels.csv", ["Video file"])
        }
        for tract, anatomy in TRACTS.items():
            for path in find_files(root / tract, (".avi",)):
                names = [path.parent.name, *findings.get(path.stem, [])]
                labels = dict.fromkeys(" ".join(name.replace("-", " ").lower().split()) for name in names)
                found = tuple(label for label in labels if label not in ("", "none"))
                yield Entry(path.relative_to(root).as_posix(), (path,), "endoscopy", anatomy, labels=found)
