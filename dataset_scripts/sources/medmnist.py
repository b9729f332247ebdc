"""MedMNIST+: small images and volumes, many to a file; the subsets of radiographs, ultrasound and CT."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dataset_scripts.entries import Entry, Source, SourceError, expecting


SPLITS = {"train": "train", "val": "validation", "test": "test"}
SIZES = ("_224", "_128", "_64", "")
LARGEST = 2**33  # bytes of one array; ChestMNIST at 224 has half of that
DAMAGES = (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)  # of an archive, as they show


@dataclass(frozen=True)
class Subset:
    modality: str
    anatomy: str
    labels: tuple[str, ...]
    several: bool = False  # a column a label, 1 where it holds; else one column with the number of the label


CHEST = (
    *("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax"),
    *("consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia"),
)
ORGANS = (
    *("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left"),
    *("lung-right", "pancreas", "spleen"),
)
ORGANS_3D = (
    *("liver", "kidney-right", "kidney-left", "femur-right", "femur-left", "bladder", "heart", "lung-right"),
    *("lung-left", "spleen", "pancreas"),
)
SUBSETS = {
    "breastmnist": Subset("ultrasound", "breast", ("malignant", "normal, benign")),
    "chestmnist": Subset("xray", "chest", CHEST, several=True),
    "fracturemnist3d": Subset(
        "ct", "rib", ("buckle rib fracture", "nondisplaced rib fracture", "displaced rib fracture")
    ),
    "nodulemnist3d": Subset("ct", "lung", ("benign", "malignant")),
    "organamnist": Subset("ct", "abdomen", ORGANS),
    "organcmnist": Subset("ct", "abdomen", ORGANS),
    "organmnist3d": Subset("ct", "abdomen", ORGANS_3D),
    "organsmnist": Subset("ct", "abdomen", ORGANS),
    "pneumoniamnist": Subset("xray", "chest", ("normal", "pneumonia")),
}


class MedMnist(Source):
    """`chestmnist_224.npz` and the like; of each subset the largest size that is there.

    The arrays of a split stay unpacked while it is built, 8 GB a process for all subsets at 224: on a small machine
    build a few at a time, from a folder with fewer files.

    Left out: what is no radiograph, ultrasound or CT; and AdrenalMNIST3D and VesselMNIST3D, which are shapes that were
    segmented, not scans. Patients are not named; the official split is by patient where the original one is.
    """

    name = "medmnist"
    title = "MedMNIST+"
    homepage = "https://doi.org/10.5281/zenodo.10519652"
    licence = "CC BY 4.0"
    citation = "Yang et al., MedMNIST v2, Scientific Data 2023, arXiv 2110.14795"

    @expecting(f"at least one of {', '.join(SUBSETS)}, as name.npz or name_224.npz")
    def entries(self, root: Path) -> Iterator[Entry]:
        for name, subset in SUBSETS.items():
            path = next((file for size in SIZES if (file := root / f"{name}{size}.npz").is_file()), None)
            if path is None:
                continue
            for key, split in SPLITS.items():
                images, labels = _shape(path, f"{key}_images"), _load(path, f"{key}_labels")
                if labels.shape != (expected := (images[0], len(subset.labels) if subset.several else 1)):
                    raise SourceError(f"{path}: found {key}_labels of shape {labels.shape}, expected {expected}")
                for index, row in enumerate(labels):
                    part = f"{key}/{index}"
                    yield Entry(
                        id=f"{path.stem}/{part}",
                        files=(path,),
                        modality=subset.modality,
                        anatomy=subset.anatomy,
                        labels=_labels(row, subset),
                        split=split,
                        part=part,
                    )

    def open(self, entry: Entry) -> Any:
        """The image or the volume, uint8."""
        key, _, index = str(entry.part).partition("/")
        return _images(entry.files[0], f"{key}_images")[int(index)].copy()


def _labels(row: np.ndarray, subset: Subset) -> tuple[str, ...]:
    if subset.several:
        return tuple(label for label, value in zip(subset.labels, row, strict=True) if value == 1)
    return (subset.labels[int(row[0])],) if 0 <= int(row[0]) < len(subset.labels) else ()


@lru_cache(maxsize=len(SUBSETS))  # scans are built split by split, but in an order that mixes the subsets
def _images(path: Path, key: str) -> np.ndarray:
    """All images of a split: an archive is packed, so that a single one can't be picked from it."""
    return _load(path, key)


def _shape(path: Path, key: str) -> tuple[int, ...]:
    """What the header says, without unpacking what follows; refused before memory is taken if it's no array of ours."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as stream:
            shape, _, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except (KeyError, *DAMAGES) as error:
        raise SourceError(f"{path}: found no array {key} that can be read, expected a file of MedMNIST") from error
    if dtype.kind not in "iu" or not shape or math.prod(shape) * dtype.itemsize > LARGEST:
        raise SourceError(f"{path}: found {key} of type {dtype} and shape {shape}, expected small images")
    if key.endswith("_images") and (dtype != np.uint8 or len(shape) not in (3, 4)):
        raise SourceError(f"{path}: found {key} of type {dtype} and shape {shape}, expected uint8, N H W or N D H W")
    return tuple(shape)


def _load(path: Path, key: str) -> np.ndarray:
    _shape(path, key)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[key]
    except DAMAGES as error:
        raise SourceError(f"{path}: found {key} damaged, expected the file as published") from error
