"""BUSI: breast ultrasound, normal or with a lesion."""

from collections.abc import Iterator
from pathlib import Path

from dataset_scripts.entries import Entry, Source, descend, find_files


LABELS = ("benign", "malignant", "normal")


class Busi(Source):
    """`Dataset_BUSI_with_GT/benign/benign (1).png`; its masks `benign (1)_mask.png` are skipped.

    Some patients have several images, but the collection does not say which ones.
    """

    name = "busi"
    title = "Breast Ultrasound Images (BUSI)"
    homepage = "https://scholar.cu.edu.eg/?q=afahmy/pages/dataset"
    licence = "Not stated with the data; the article is CC BY 4.0"
    citation = "Al-Dhabyani et al., Dataset of breast ultrasound images, Data in Brief 2020"
    layout = "Dataset_BUSI_with_GT/benign|malignant|normal/*.png"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        root = descend(root, "Dataset_BUSI_with_GT")
        for label in LABELS:
            for path in find_files(root / label, (".png",)):
                if "_mask" not in path.stem:
                    yield Entry(f"{label}/{path.stem}", (path,), "ultrasound", "breast", (label,))
