"""Schema of a row of a Parquet dataset. It is the same for every source, so that any mix of sources can be trained on.

Exactly one of `image`, `video` and `volume` is set. It holds the bytes of a file that this project's reader decodes
under its limits: PNG or JPEG; MP4 or Matroska; uncompressed NIfTI with int16, uint16 or uint8 voxels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError


if TYPE_CHECKING:
    from datasets import Features


MODALITIES = ("xray", "ultrasound", "endoscopy", "ct", "mri")
SPLITS = ("train", "validation", "test")
MEDIA = ("image", "video", "volume")


class CollectionError(InputError):
    """A collection that cannot be used: it is missing, or it does not match its format."""


def features() -> Features:
    """Return the schema as `datasets.Features`. Media columns are not decoded.

    `id` and `patient` are salted hashes; a scan of an unknown patient has a hash of its own. `intensity` states how
    stored values map to [0, 1], see `StoredScan`. `shape` is D, H, W of the scan in voxels. `spacing` is in mm along
    D, H, W, null where unknown.
    """
    from datasets import ClassLabel, Features, Image, List, Nifti, Value, Video

    return Features(
        {
            "image": Image(decode=False),
            "video": Video(decode=False),
            "volume": Nifti(decode=False),
            "id": Value("string"),
            "modality": ClassLabel(names=list(MODALITIES)),
            "anatomy": Value("string"),
            "labels": List(Value("string")),
            "patient": Value("string"),
            "shape": List(Value("int32")),
            "spacing": List(Value("float64")),
            "intensity": Value("string"),
            "source": Value("string"),
            "licence": Value("string"),
        }
    )


def media_column(row: dict[str, Any]) -> str:
    """Return the name of the media column that a row sets."""
    return next(name for name in MEDIA if row.get(name) is not None)
