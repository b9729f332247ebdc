"""Medical Segmentation Decathlon: six CT tasks and, as a separate source, four MRI tasks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from dataset_scripts.entries import Entry, Source, SourceError, read_json
from modeling_m3ret.data.table import path_inside


SPLITS = {"training": "train", "test": "test"}


class Msd(Source):
    """`Task03_Liver/dataset.json`, which lists `./imagesTr/liver_1.nii.gz` and `./imagesTs/…`; masks are not used.

    Each task is a separate download; missing ones are skipped.
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
    layout = "a task folder such as Task03_Liver (CT) or Task01_BrainTumour (MRI), with its dataset.json"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        for task, anatomy in self.tasks.items():
            folder = root / task
            for name, split in _list_images(folder / "dataset.json") if folder.is_dir() else ():
                path = path_inside(folder, name)
                name = f"{task}/{path.name.split('.')[0]}"
                intensity = "hounsfield" if self.modality == "ct" else None  # which NIfTI cannot declare
                yield Entry(name, (path,), self.modality, anatomy, split=split, intensity=intensity)


class MsdMri(Msd):
    """Same layout as `Msd`. Of the 4D images with several sequences, only the first volume is read."""

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


def _list_images(path: Path) -> list[tuple[str, str]]:
    """Return file name and split of each image in `dataset.json`. Test images have no mask and are plain strings."""
    table: Any = read_json(path)
    try:
        items = [(item, split) for key, split in SPLITS.items() for item in table[key]]
        images = [(item["image"] if isinstance(item, dict) else item, split) for item, split in items]
    except (KeyError, TypeError) as error:
        raise SourceError(path, "JSON with the lists training and test", "another structure") from error
    if not all(isinstance(name, str) for name, _ in images):
        raise SourceError(path, "file names such as ./imagesTr/NAME.nii.gz", "images that are not strings")
    return sorted(images)
