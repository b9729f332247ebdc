"""CholecT50: laparoscopic cholecystectomy at one frame per second, with the phase of the operation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset_scripts.entries import Entry, Source, SourceError, descend, find_files, list_folders, read_json


# The split of the article; all other videos are for training.
VALIDATION = ("VID08", "VID12", "VID29", "VID50", "VID78")
TEST = ("VID06", "VID10", "VID14", "VID32", "VID42", "VID51", "VID73", "VID74", "VID80", "VID111")
PHASE = 14  # index of the phase in an annotation vector


class CholecT50(Source):
    """`videos/VID01/000000.png` and `labels/VID01.json`. Each video shows a different patient."""

    name = "cholect50"
    title = "CholecT50"
    homepage = "https://github.com/CAMMA-public/cholect50"
    licence = "CC BY-NC-SA 4.0"
    citation = "Nwoye et al., Rendezvous, Medical Image Analysis 2022, arXiv 2109.03223"
    layout = "videos/VID01/*.png and labels/VID01.json"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        root = descend(root, "CholecT50")
        for video in list_folders(root / "videos"):
            split = "validation" if video.name in VALIDATION else "test" if video.name in TEST else "train"
            phases = _phases(root / "labels" / f"{video.name}.json")
            for path in find_files(video, (".png",)):
                phase = phases.get(str(int(path.stem))) if path.stem.isdecimal() else None
                name, labels = f"{video.name}/{path.stem}", (phase,) if phase else ()
                yield Entry(name, (path,), "endoscopy", "abdomen", labels=labels, patient=video.name, split=split)


def _phases(path: Path) -> dict[str, str]:
    """Return the phase of each annotated frame, by frame number."""
    table: Any = read_json(path)
    try:
        names = table["categories"]["phase"]
        frames = {frame: vectors[0][PHASE] for frame, vectors in table["annotations"].items() if vectors}
        return {frame: str(names[str(int(phase))]) for frame, phase in frames.items() if int(phase) >= 0}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(path, "JSON with categories.phase and annotations", "another structure") from error
