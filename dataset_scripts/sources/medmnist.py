"""MedMNIST+: small images and volumes, many per file; the subsets of radiographs, ultrasound and CT."""

import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dataset_scripts.entries import Entry, Source, SourceError


SPLITS = {"train": "train", "val": "validation", "test": "test"}
SIZES = ("_224", "_128", "_64", "")
MAX_ARRAY_BYTES = 2**33  # ChestMNIST at 224 has half of that
ARCHIVE_ERRORS = (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Subset:
    modality: str
    anatomy: str
    labels: tuple[str, ...]
    multi_label: bool = False  # one 0/1 column per label; otherwise one column with the index of the label


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
RIB_FRACTURES = ("buckle rib fracture", "nondisplaced rib fracture", "displaced rib fracture")
SUBSETS = {
    "breastmnist": Subset("ultrasound", "breast", ("malignant", "normal, benign")),
    "chestmnist": Subset("xray", "chest", CHEST, multi_label=True),
    "fracturemnist3d": Subset("ct", "rib", RIB_FRACTURES),
    "nodulemnist3d": Subset("ct", "lung", ("benign", "malignant")),
    "organamnist": Subset("ct", "abdomen", ORGANS),
    "organcmnist": Subset("ct", "abdomen", ORGANS),
    "organmnist3d": Subset("ct", "abdomen", ORGANS_3D),
    "organsmnist": Subset("ct", "abdomen", ORGANS),
    "pneumoniamnist": Subset("xray", "chest", ("normal", "pneumonia")),
}


class MedMnist(Source):
    """`chestmnist_224.npz` and similar files; the largest size of each subset that was downloaded.

    The arrays of a split stay in memory while it is built: 8 GB per process for all subsets at 224. On a small machine,
    build a few subsets at a time from a folder with fewer files.

    Left out are subsets that are not radiographs, ultrasound or CT, and AdrenalMNIST3D and VesselMNIST3D, which are
    segmented shapes. Patients are not named; the official split is by patient where the original one is.
    """

    name = "medmnist"
    title = "MedMNIST+"
    homepage = "https://doi.org/10.5281/zenodo.10519652"
    licence = "CC BY 4.0"
    citation = "Yang et al., MedMNIST v2, Scientific Data 2023, arXiv 2110.14795"
    layout = f"at least one of {', '.join(SUBSETS)}, as NAME.npz or NAME_224.npz"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        for name, subset in SUBSETS.items():
            path = next((file for size in SIZES if (file := root / f"{name}{size}.npz").is_file()), None)
            if path is None:
                continue
            for key, split in SPLITS.items():
                images, labels = read_shape(path, f"{key}_images"), load_array(path, f"{key}_labels")
                if labels.shape != (expected := (images[0], len(subset.labels) if subset.multi_label else 1)):
                    raise SourceError(path, f"{key}_labels of shape {expected}", str(labels.shape))
                for index, row in enumerate(labels):
                    member, classes = f"{key}/{index}", _labels(row, subset)
                    yield Entry(
                        f"{path.stem}/{member}",
                        (path,),
                        subset.modality,
                        subset.anatomy,
                        classes,
                        split=split,
                        member=member,
                    )

    def open(self, entry: Entry) -> Any:
        """Return the image or volume as a uint8 array."""
        key, _, index = str(entry.member).partition("/")
        return cached_images(entry.files[0], f"{key}_images")[int(index)].copy()


def _labels(row: np.ndarray, subset: Subset) -> tuple[str, ...]:
    if subset.multi_label:
        return tuple(label for label, value in zip(subset.labels, row, strict=True) if value == 1)
    return (subset.labels[int(row[0])],) if 0 <= int(row[0]) < len(subset.labels) else ()


@lru_cache(maxsize=len(SUBSETS))  # within a split, the builder alternates between subsets
def cached_images(path: Path, key: str) -> np.ndarray:
    """Return all images of a split: a compressed archive gives no access to a single one."""
    return load_array(path, key)


def read_shape(path: Path, key: str) -> tuple[int, ...]:
    """Read the shape of an array from its header, and check type and size before memory is allocated."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as stream:
            shape, _, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except (KeyError, *ARCHIVE_ERRORS) as error:
        got = f"damaged or other data ({type(error).__name__})"
        raise SourceError(path, f"an archive with the array {key}", got) from error
    got = f"type {dtype} and shape {shape}"
    if dtype.kind not in "iu" or not shape or math.prod(shape) * dtype.itemsize > MAX_ARRAY_BYTES:
        raise SourceError(path, f"{key} as integers of at most {MAX_ARRAY_BYTES:,} bytes", got)
    if key.endswith("_images") and (dtype != np.uint8 or len(shape) not in (3, 4)):
        raise SourceError(path, f"{key} as uint8 of shape (N, H, W) or (N, D, H, W)", got)
    return tuple(shape)


def load_array(path: Path, key: str) -> np.ndarray:
    """Load one array of an archive, after `read_shape`."""
    read_shape(path, key)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[key]
    except ARCHIVE_ERRORS as error:
        raise SourceError(path, "the file as published", f"a damaged array {key}") from error
