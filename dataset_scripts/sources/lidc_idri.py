"""LIDC-IDRI: chest CT of lung cancer screening and diagnosis."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from dataset_scripts.entries import Entry, Source, descend, find_files, list_folders


MIN_SLICES = 20  # every CT has more; folders of radiographs, segmentations and reports have fewer files


class LidcIdri(Source):
    """`LIDC-IDRI/LIDC-IDRI-0001/<study>/<series>/*.dcm`, with the old or the new folder names of the archive.

    The readers' annotations (XML files or segmentations) are not used, so the scans have no labels.
    """

    name = "lidc_idri"
    title = "LIDC-IDRI"
    homepage = "https://www.cancerimagingarchive.net/collection/lidc-idri/"
    licence = "CC BY 3.0"
    citation = "Armato et al., The Lung Image Database Consortium, Medical Physics 2011"
    layout = "LIDC-IDRI-0001/<study>/<series>/*.dcm"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        root = descend(root, "LIDC-IDRI")
        for patient in list_folders(root):
            if not patient.name.startswith("LIDC-IDRI-"):
                continue
            for series, slices in groupby(find_files(patient, (".dcm",)), key=lambda path: path.parent):
                files = tuple(slices)
                if len(files) >= MIN_SLICES:
                    name = series.relative_to(root).as_posix()
                    yield Entry(name, files, "ct", "chest", patient=patient.name)
