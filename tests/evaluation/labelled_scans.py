"""Labelled scans and training facts shared by the tests of reports."""

from __future__ import annotations

from pathlib import Path

import torch

from modeling_m3ret.data.collection import Record
from modeling_m3ret.search.embedding import Embedded


SECRET_FILE, SECRET_ID, SECRET_PATIENT = "mueller_anna", "accession-4711", "patient-0815"
LABELS = ("mass", "mass|cyst", "cyst", "_hidden", "$c_{$", "<b>[x]")


def collection(count: int = 60, modalities: tuple[str, ...] = ("ct", "mri", "xray"), folder: Path = Path()) -> Embedded:
    """Return two scans per patient, of several modalities, labels and anatomies, loosely clustered by label."""
    records = [
        Record(
            f"{SECRET_ID}-{n}",
            folder / f"{SECRET_FILE}-{n}.png",
            modalities[n % len(modalities)],
            ("chest", "head", "")[n % 3],
            LABELS[n // 2 % len(LABELS)],
            f"{SECRET_PATIENT}-{n // 2}",
        )
        for n in range(count)
    ]
    centres = {label: torch.randn(8) for label in LABELS}
    vectors = torch.stack([0.7 * centres[record.label] + torch.randn(8) for record in records])
    return Embedded(torch.nn.functional.normalize(vectors, dim=-1), records)


def training_facts(objective: str, step: int, scans: int, parameters: int) -> dict[str, object]:
    return {
        "objective": objective,
        "step": step,
        "views": 8 * step,
        "training_scans": scans,
        "parameters": parameters,
        "seconds": step * 1.5,
    }
