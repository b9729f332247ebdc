"""LDPolypVideo: frames of colonoscopies with polyp bounding boxes."""

from collections.abc import Iterator
from pathlib import Path

from dataset_scripts.entries import Entry, Source, descend, find_files, list_folders


SPLITS = {"TrainValid": "train", "Test": "test"}


class LDPolypVideo(Source):
    """`TrainValid/Images/<video>/*.jpg` with `TrainValid/Annotations/<video>/*.txt`; the same in `Test`.

    Patients are not named, so each video counts as one. Videos without annotations are not used.
    """

    name = "ldpolypvideo"
    title = "LDPolypVideo"
    homepage = "https://github.com/dashishi/LDPolypVideo-Benchmark"
    licence = "Not stated"
    citation = "Ma et al., LDPolypVideo Benchmark, MICCAI 2021"
    layout = "TrainValid/Images/<video>/*.jpg or Test/Images/<video>/*.jpg"

    def find_entries(self, root: Path) -> Iterator[Entry]:
        root = descend(root, "LDPolypVideo")
        for folder, split in SPLITS.items():
            images, boxes = root / folder / "Images", root / folder / "Annotations"
            for video in list_folders(images):
                for path in find_files(video, (".jpg",)):
                    name, labels = path.relative_to(root).as_posix(), _labels(boxes / video.name, path.stem)
                    patient = f"{folder}/{video.name}"
                    yield Entry(name, (path,), "endoscopy", "colon", labels=labels, patient=patient, split=split)


def _labels(boxes: Path, frame: str) -> tuple[str, ...]:
    """Read the number of polyps from the first line. Some releases annotate `vp_1_23.jpg` in `23.txt`."""
    for name in (frame, frame.rsplit("_", 1)[-1]):
        path = boxes / f"{name}.txt"
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as lines:
                count = lines.readline(16).strip()
            return ("no polyp" if int(count) == 0 else "polyp",) if count.isdecimal() else ()
    return ()
