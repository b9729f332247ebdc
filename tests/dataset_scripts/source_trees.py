"""Write folders in the layout of a collection, and list what its source finds there."""

from __future__ import annotations

from pathlib import Path

from dataset_scripts.sources import SOURCES


def write(root: Path, *names: str, text: str = "") -> Path:
    """Write empty files, or tables with this text."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def found(source: str, root: Path) -> list[tuple[str, str, tuple[str, ...], str, str | None]]:
    """Return id, file relative to `root`, labels, patient and split of each entry, in order."""
    return [
        (entry.id, entry.files[0].relative_to(root).as_posix(), entry.labels, entry.patient, entry.split)
        for entry in SOURCES[source]().entries(root)
    ]


def kinds(source: str, root: Path) -> set[tuple[str, str]]:
    """Return the pairs of modality and anatomy."""
    return {(entry.modality, entry.anatomy) for entry in SOURCES[source]().entries(root)}
