"""OASIS-3: brain MRI in ageing and Alzheimer's disease."""

import re
from collections.abc import Iterator
from pathlib import Path

from dataset_scripts.entries import Entry, Source, find_files


NAME = re.compile(r"sub-(OAS3\d{4})(_[\w-]+)?_(T1w|T2w|FLAIR)\.nii(\.gz)?", re.ASCII)


class Oasis(Source):
    """`OAS30001_MR_d0129/anat2/sub-OAS30001_ses-d0129_run-01_T1w.nii.gz`, or the same files in BIDS folders.

    Only T1w, T2w and FLAIR are used; the other files are time series, maps or PET. OASIS-1 and OASIS-2, which have
    another layout, are not supported. Diagnoses belong to visits, not to scans, so there are no labels.
    """

    name = "oasis"
    title = "OASIS-3"
    homepage = "https://sites.wustl.edu/oasisbrains/"
    licence = "OASIS Data Use Agreement"
    citation = "LaMontagne et al., OASIS-3, medRxiv 2019.12.13.19014902"
    evaluation_only = True
    layout = "OAS30001_MR_d0129/anat2/sub-OAS30001_*_T1w.nii.gz of OASIS-3 (OASIS-1 is not supported)"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        for path in find_files(root, (".nii.gz", ".nii")):
            if match := NAME.fullmatch(path.name):
                yield Entry(path.relative_to(root).as_posix(), (path,), "mri", "brain", patient=match[1])
