"""CholecT50: frames of gallbladders removed by laparoscopy, one a second, with the phase of the operation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset_scripts.entries import Entry, Source, SourceError, expecting, files_under, folders_in, read_json, within


# The split of the article; all else is training.
VALIDATION = ("VID08", "VID12", "VID29", "VID50", "VID78")
TEST = ("VID06", "VID10", "VID14", "VID32", "VID42", "VID51", "VID73", "VID74", "VID80", "VID111")
PHASE = 14  # where the phase is in the vector of an annotation


class CholecT50(Source):
    """`videos/VID01/000000.png` and `labels/VID01.json`. Each video is of a patient of its own."""

    name = "cholect50"
    title = "CholecT50"
    homepage = "https://github.com/CAMMA-public/cholect50"
    licence = "CC BY-NC-SA 4.0"
    citation = "Nwoye et al., Rendezvous, Medical Image Analysis 2022, arXiv 2109.03223"

    @expecting("videos/VID01/*.png and labels/VID01.json")
    def entries(self, root: Path) -> Iterator[Entry]:
        root = within(root, "CholecT50")
        for video in folders_in(root / "videos") if (root / "videos").is_dir() else []:
            phases = _phases(root / "labels" / f"{video.name}.json")
            for path in files_under(video, (".png",)):
                phase = phases.get(str(int(path.stem))) if path.stem.isdecimal() else None
                yield Entry(
                    id=f"{video.name}/{path.stem}",
                    files=(path,),
                    modality="endoscopy",
                    anatomy="abdomen",
                    labels=(phase,) if phase else (),
                    patient=video.name,
                    split="validation" if video.name in VALIDATION else "test" if video.name in TEST else "train",
                )


def _phases(path: Path) -> dict[str, str]:
    """The phase of each annotated frame, by the number of the frame."""
    table: Any = read_json(path)
    try:
        names = table["categories"]["phase"]
        frames = {frame: vectors[0][PHASE] for frame, vectors in table["annotations"].items() if vectors}
        return {frame: str(names[str(int(phase))]) for frame, phase in frames.items() if int(phase) >= 0}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{path}: found another structure, expected categories.phase and annotations") from error
