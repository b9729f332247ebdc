"""Medical Segmentation Decathlon: ten tasks, six of them CT; those of MRI are a source of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from dataset_scripts.entries import Entry, Source, SourceError, expecting, inside, read_json


SPLITS = {"training": "train", "test": "test"}


class Msd(Source):
    """`Task03_Liver/dataset.json`, which lists `./imagesTr/liver_1.nii.gz` and `./imagesTs/…`; masks are not taken.

    Each task is an archive of its own: those that are not there were not downloaded.
    """

    name = "msd"
    title = "Medical Segmentation Decathlon, CT"
    homepage = "http://medicaldecathlon.com/"
    licence = "CC BY-SA 4.0"
    citation = "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 2022, arXiv 2106.05735"
    modality: ClassVar[str] = "ct"
    tasks: ClassVar[dict[str, str]] = {
        "Task03_Liver": "liver",
        "Task06_Lung": "lung",
        "Task07_Pancreas": "pancreas",
        "Task08_HepaticVessel": "liver",
        "Task09_Spleen": "spleen",
        "Task10_Colon": "colon",
    }

    @expecting("a task such as Task03_Liver or, of MRI, Task01_BrainTumour, with its dataset.json")
    def entries(self, root: Path) -> Iterator[Entry]:
        for task, anatomy in self.tasks.items():
            folder = root / task
            if not folder.is_dir():
                continue
            for name, split in _images(folder / "dataset.json"):
                path = inside(folder, name)
                yield Entry(f"{task}/{path.name.split('.')[0]}", (path,), self.modality, anatomy, split=split)


class MsdMri(Msd):
    """As `Msd`. The images with several sequences are 4D, and their first volume is what is read."""

    name = "msd_mri"
    title = "Medical Segmentation Decathlon, MRI"
    evaluation_only = True
    modality = "mri"
    tasks: ClassVar[dict[str, str]] = {
        "Task01_BrainTumour": "brain",
        "Task02_Heart": "heart",
        "Task04_Hippocampus": "brain",
        "Task05_Prostate": "prostate",
    }


def _images(path: Path) -> list[tuple[str, str]]:
    """What `dataset.json` lists: names of files, and the split of each. Test images have no mask and no dictionary."""
    table: Any = read_json(path)
    try:
        found = [
            (item["image"] if isinstance(item, dict) else item, split)
            for part, split in SPLITS.items()
            for item in table[part]
        ]
    except (KeyError, TypeError) as error:
        raise SourceError(f"{path}: found another structure, expected lists training and test") from error
    if not all(isinstance(name, str) for name, _ in found):
        raise SourceError(f"{path}: found images that are not file names, expected ./imagesTr/name.nii.gz")
    return sorted(found)
