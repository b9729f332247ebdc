"""What does a row of a data set hold? One schema for every source, so that any mix of them trains and is viewed.

Exactly one of `image`, `video` and `volume` is set, as bytes of a file that our own reader decodes under its limits:
PNG or JPEG; MP4 or Matroska; NIfTI with int16, uint16 or uint8 voxels, not compressed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Features


MODALITIES = ("xray", "ultrasound", "endoscopy", "ct", "mri")
SPLITS = ("train", "validation", "test")
MEDIA = ("image", "video", "volume")


def features() -> Features:
    """The schema as `datasets` has it. Media are not decoded: a viewer may, training never does it eagerly.

    id, patient: salted hashes (patient: a scan of no known patient has its own). intensity: how stored values become
    [0, 1], see `StoredScan`. shape: D, H, W of the scan. spacing: mm along D, H, W, null where unknown.
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
    """Which of the media columns a row sets."""
    return next(name for name in MEDIA if row.get(name) is not None)
