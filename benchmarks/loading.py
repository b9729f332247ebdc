"""Measure how fast scans load from Parquet into packed patches, compared with the decoders of their source files.

    python benchmarks/loading.py --data FOLDER        # a folder with a manifest.csv; the phantom by default

Items are those of the data loaders, without worker processes: `packed` is a whole scan of 224 pixels for embedding,
`2+4` and `2+8` are SimDINO's views of 128 and 64 pixels, and of 224 and 96 pixels. `decoder` is pydicom, nibabel,
decord or Pillow decoding the source file to an array. All use one thread, with files in the page cache, in interleaved
rounds, and are measured in CPU time, so that other processes matter less. Ratios are ratios of speeds: the median of
the rounds, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import io
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import torch
from PIL import Image
from timing import interleaved_seconds, speed_ratio

from dataset_scripts.builder import Pseudonyms, ScanBuilder
from dataset_scripts.entries import Entry
from dataset_scripts.shards import build_shards, plan_shards
from dataset_scripts.sources.folder import Folder
from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.cpu import keep_freed_memory
from modeling_m3ret.data.collection import Record, open_collection, phantom_folder
from modeling_m3ret.data.loading import RandomViews, WholeScans
from modeling_m3ret.pretraining.objectives import build_objective
from modeling_m3ret.pretraining.run_config import RunConfig


SCANS_PER_KIND = 24
SALT = b"benchmark"
MULTI_CROPS = {"2+4": (128, 64, 4), "2+8": (224, 96, 8)}  # size of the global views, size and number of the local views


def kind_of(path: Path) -> str:
    """Return the name of a file format, for the table."""
    names = {".gz": "NIfTI, gzipped", ".nii": "NIfTI", ".dcm": "DICOM", ".mp4": "video"}
    return "DICOM series" if path.is_dir() else names.get(path.suffix, path.suffix[1:].upper())


def decode(path: Path) -> Any:
    """Decode a source file to an array, with the most common library for its format."""
    if path.is_dir():
        return [decode(file) for file in sorted(path.iterdir())]
    if path.suffix == ".dcm":
        return pydicom.dcmread(path).pixel_array
    if path.suffix in (".nii", ".gz"):
        return nibabel.load(path).get_fdata(dtype=np.float32)  # dataobj may be a memory map that is not read yet
    if path.suffix == ".mp4":
        import decord  # not on every platform

        video = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        frames = min(len(video), 32)  # the frames that our reader samples
        return video.get_batch([(2 * i + 1) * len(video) // (2 * frames) for i in range(frames)]).asnumpy()
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return archive[archive.files[0]]
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with a manifest.csv (default: the phantom)")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions of each measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the workers of a training run do
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    root = arguments.data or phantom_folder("phantom")
    kinds: dict[str, list[Entry]] = defaultdict(list)
    for entry in Folder().entries(root):
        if len(kinds[kind_of(entry.files[0])]) < SCANS_PER_KIND:
            kinds[kind_of(entry.files[0])].append(entry)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "built"
        builder = ScanBuilder(Folder(), root, salt=SALT, cache_dir=folder)
        build_shards(
            builder, output, plan_shards({"train": [entry for entries in kinds.values() for entry in entries]})
        )
        records = {record.id: record for record in open_collection(output)}
        pseudonyms = Pseudonyms(Folder.name, SALT)
        sides = ("packed", *MULTI_CROPS, "decoder")
        print(f"| {'scans/s':16} | scans | {' | '.join(f'{side:>8}' for side in sides)} | ", end="")
        print(" | ".join(f"{side} / decoder".rjust(17) for side in sides[:-1]) + " |")
        print(f"|{'-' * 18}|------:|{'---------:|' * len(sides)}{'------------------:|' * (len(sides) - 1)}")
        for kind, entries in sorted(kinds.items()):
            compare(kind, [records[pseudonyms.scan(entry)] for entry in entries], entries, arguments.rounds)


def compare(kind: str, records: list[Record], entries: list[Entry], rounds: int) -> None:
    """Print the row of the table for one kind of file."""
    items: dict[str, WholeScans | RandomViews] = {"packed": WholeScans(records, M3RetImageProcessor(size=224))}
    for name, (size, local_size, local_views) in MULTI_CROPS.items():
        run = RunConfig(objective="simdino", preset="vitt", size=size, local_size=local_size, local_views=local_views)
        items[name] = RandomViews(records, M3RetImageProcessor(size=size), views=build_objective(run)[0].views)

    def load(name: str) -> None:
        for index in range(len(records)):
            _ = items[name][index if name == "packed" else (0, index)]  # type: ignore[index]

    def decode_all() -> None:
        for entry in entries:
            decode(entry.files[0])

    calls: dict[str, Any] = {name: partial(load, name) for name in items} | {"decoder": decode_all}
    times = interleaved_seconds(calls, rounds, time.process_time)
    speeds = [f"{len(entries) / statistics.median(taken):8.1f}" for taken in times.values()]
    ratios = [f"{speed_ratio(times[name], times['decoder']):>17}" for name in items]
    print(f"| {kind:16} | {len(entries):5} | {' | '.join(speeds)} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
