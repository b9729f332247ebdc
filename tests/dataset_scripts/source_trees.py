"""Folders as collections publish them, and what a source finds there."""

from __future__ import annotations

from pathlib import Path

from dataset_scripts.sources import SOURCES


def write(root: Path, *names: str, text: str = "") -> Path:
    """Files that are not opened, or tables."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def found(source: str, root: Path) -> list[tuple[str, str, tuple[str, ...], str, str | None]]:
    """id, file, labels, patient and split of each entry, in order; the file as seen from `root`."""
    return [
        (entry.id, entry.files[0].relative_to(root).as_posix(), entry.labels, entry.patient, entry.split)
        for entry in SOURCES[source]().entries(root)
    ]


def kinds(source: str, root: Path) -> set[tuple[str, str]]:
    """The modalities and anatomies."""
    return {(entry.modality, entry.anatomy) for entry in SOURCES[source]().entries(root)}
