"""LIDC-IDRI: CT of the chest, of patients with lung nodules or in screening for them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from dataset_scripts.entries import Entry, Source, expecting, files_under, folders_in, within


FEWEST_SLICES = 20  # the folders of radiographs, segmentations and reports hold fewer files, every CT holds more


class LidcIdri(Source):
    """`LIDC-IDRI/LIDC-IDRI-0001/<study>/<series>/*.dcm`, as the archive names studies and series, then or now.

    The marks of the readers, in XML files or segmentations, are not taken: the scans have no labels.
    """

    name = "lidc_idri"
    title = "LIDC-IDRI"
    homepage = "https://www.cancerimagingarchive.net/collection/lidc-idri/"
    licence = "CC BY 3.0"
    citation = "Armato et al., The Lung Image Database Consortium, Medical Physics 2011"

    @expecting("LIDC-IDRI-0001/<study>/<series>/*.dcm")
    def entries(self, root: Path) -> Iterator[Entry]:
        root = within(root, "LIDC-IDRI")
        for patient in folders_in(root):
            if not patient.name.startswith("LIDC-IDRI-"):
                continue
            for series, slices in groupby(files_under(patient, (".dcm",)), key=lambda path: path.parent):
                files = tuple(slices)
                if len(files) >= FEWEST_SLICES:
                    name = series.relative_to(root).as_posix()
                    yield Entry(name, files, "ct", "chest", patient=patient.name)
