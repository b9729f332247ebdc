"""LDPolypVideo: frames of colonoscopies, each with boxes around its polyps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dataset_scripts.entries import Entry, Source, expecting, files_under, folders_in, within


SPLITS = {"TrainValid": "train", "Test": "test"}


class LDPolypVideo(Source):
    """`TrainValid/Images/<video>/*.jpg` with `TrainValid/Annotations/<video>/*.txt`, and `Test` alike.

    A video stands for its patient, whom the collection does not name. The videos without boxes are not taken.
    """

    name = "ldpolypvideo"
    title = "LDPolypVideo"
    homepage = "https://github.com/dashishi/LDPolypVideo-Benchmark"
    licence = "Not stated"
    citation = "Ma et al., LDPolypVideo Benchmark, MICCAI 2021"

    @expecting("TrainValid/Images/<video>/*.jpg or Test/Images/<video>/*.jpg")
    def entries(self, root: Path) -> Iterator[Entry]:
        root = within(root, "LDPolypVideo")
        for part, split in SPLITS.items():
            images, boxes = root / part / "Images", root / part / "Annotations"
            for video in folders_in(images) if images.is_dir() else []:
                for path in files_under(video, (".jpg",)):
                    yield Entry(
                        id=path.relative_to(root).as_posix(),
                        files=(path,),
                        modality="endoscopy",
                        anatomy="colon",
                        labels=_labels(boxes / video.name, path.stem),
                        patient=f"{part}/{video.name}",
                        split=split,
                    )


def _labels(boxes: Path, frame: str) -> tuple[str, ...]:
    """The first line counts the polyps. The boxes of `vp_1_23.jpg` are in `23.txt` in some releases."""
    for name in (frame, frame.rsplit("_", 1)[-1]):
        path = boxes / f"{name}.txt"
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as lines:
                count = lines.readline(16).strip()
            return ("no polyp" if int(count) == 0 else "polyp",) if count.isdecimal() else ()
    return ()
