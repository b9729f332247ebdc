"""BraTS: brain MRI of patients with glioma, four sequences each."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from dataset_scripts.entries import Entry, Source, find_files


SEQUENCES = ("flair", "t1", "t1ce", "t2")
SPLITS = {"TrainingData": "train", "ValidationData": "validation"}


class Brats(Source):
    """`BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2}.nii.gz` at any depth; BraTS 2020 has `.nii`.

    Each sequence is one entry. The split comes from a parent folder named "*TrainingData" or "*ValidationData".
    """

    name = "brats"
    title = "RSNA-ASNR-MICCAI BraTS 2021"
    homepage = "https://www.cancerimagingarchive.net/analysis-result/rsna-asnr-miccai-brats-2021/"
    licence = "CC BY 4.0 from The Cancer Imaging Archive; elsewhere as agreed to there"
    citation = "Baid et al., The RSNA-ASNR-MICCAI BraTS 2021 Benchmark, 2021, arXiv 2107.02314"
    evaluation_only = True
    layout = "BraTS2021_00000/BraTS2021_00000_flair.nii.gz"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        for folder, files in groupby(find_files(root, (".nii.gz", ".nii")), key=lambda path: path.parent):
            case = folder.name
            by_sequence = {path.name.removeprefix(f"{case}_").split(".")[0]: path for path in files}
            if not case.startswith("BraTS") or not by_sequence.keys() & set(SEQUENCES):
                continue
            parents = "/".join(folder.relative_to(root).parts[:-1])
            split = next((split for marker, split in SPLITS.items() if marker in parents), None)
            for sequence in SEQUENCES:
                name = f"{case}_{sequence}"
                path = by_sequence.get(sequence, folder / f"{name}.nii.gz")
                yield Entry(name, (path,), "mri", "brain", labels=("glioma",), patient=case, split=split)
