"""Decide which words of a gallery visitors may see. No other code decides it.

A cell of a manifest may hold anything: a patient's name, a date, a path, HTML. No pattern recognises a name, so words
are listed instead. A value that is not in a list is treated as missing, everywhere: on the page, in downloads, in
answers of the endpoints and in the index that `app.py --push_to_hub` uploads. Ids and patients are never shown.

| column | shown if |
|---|---|
| modality | it is a modality of the schema |
| anatomy, labels | all its words are in `WORDS`, or the owner has set `--show_labels` |
| source | it is the title of a collection in `SOURCES` |
"""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib.resources import files

import pyarrow as pa

from ..data.schema import MODALITIES
from ..phantom import SYNTHETIC_SOURCE


SAMPLE_SOURCE = "pydicom-data"
# titles of the collections that dataset_scripts can build, listed here because a Space does not contain that package;
# the last line is the demo gallery
SOURCES = frozenset({
    SYNTHETIC_SOURCE, SAMPLE_SOURCE, "a folder of scans", "Breast Ultrasound Images (BUSI)", "CheXpert", "CholecT50",
    "COVID-19 Lung Ultrasound (POCUS)", "CT-RATE", "HyperKvasir, labelled videos", "LDPolypVideo", "LIDC-IDRI",
    "Medical Segmentation Decathlon, CT", "Medical Segmentation Decathlon, MRI", "MedMNIST+", "MIMIC-CXR-JPG",
    "NIH ChestX-ray14", "OASIS-3", "PadChest", "RSNA-ASNR-MICCAI BraTS 2021",
    "BUS-BRA", "COVID-19-NY-SBU", "EndoTect", "HC18", "IQ-OTH/NCCD", "Kvasir-SEG", "OpenKBP", "TimTrack",
})  # fmt: skip
# body regions, findings and qualifiers of those collections and of DICOM's body parts (PS3.16, annex L). No first name,
# few surnames, and no digits but those of covid-19 and of the weightings of MRI
WORDS = frozenset((files("modeling_m3ret.space") / "words.txt").read_text(encoding="utf-8").split())


def is_visible(text: str) -> bool:
    """Return whether an anatomy or a label consists of known words only, separated by spaces or punctuation."""
    words = re.split(r"[\s_,./]+", text.strip().casefold())
    parts = (part for word in words for part in ([word] if word in WORDS else word.split("-")))
    return len(text) <= 80 and text.isprintable() and all(part in WORDS for part in parts)


def visible_columns(metadata: pa.Table, show_labels: bool = False) -> pa.Table:
    """Return the columns modality, anatomy, labels and source of an index, with empty values for what is not shown."""

    def cells(column: str, known: Collection[str], show_all: bool) -> list[str]:
        values = [value or "" for value in metadata.column(column).to_pylist()]  # may be null
        return [value if show_all or value in known else "" for value in values]

    anatomies = set(filter(is_visible, {text or "" for text in metadata.column("anatomy").to_pylist()}))
    labels = [
        [label for label in row or [] if label and (show_labels or is_visible(label))]
        for row in metadata.column("labels").to_pylist()
    ]
    return pa.table(
        {
            "modality": cells("modality", MODALITIES, show_labels),
            "anatomy": cells("anatomy", anatomies, show_labels),
            "labels": pa.array(labels, pa.list_(pa.string())),
            "source": cells("source", SOURCES, False),
        }
    )
