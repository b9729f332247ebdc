"""Measure how fast scans load from Parquet into packed patches, compared with the decoders of their source files.

    python benchmarks/loading.py --data FOLDER        # a folder with a manifest.csv; the phantom by default

`read` fetches a row, decodes it under limits and scales it to [0, 1]; `packed` also resizes the scan and cuts it into
patches. `decoder` is pydicom, nibabel, decord or Pillow decoding the source file to an array. All use one thread, with
files in the page cache, in interleaved rounds. Ratios are ratios of speeds: the median of the rounds, with the smallest
and the largest.
"""

from __future__ import annotations

import argparse
import io
import logging
import statistics
import tempfile
from collections import defaultdict
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


SCANS_PER_KIND = 24
SALT = b"benchmark"


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
    parser.add_argument("--size", type=int, default=224, help="size of the processor, in pixels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the workers of a training run do
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    root = arguments.data or phantom_folder("phantom")
    kinds: dict[str, list[Entry]] = defaultdict(list)
    for entry in Folder().entries(root):
        if len(kinds[kind_of(entry.files[0])]) < SCANS_PER_KIND:
            kinds[kind_of(entry.files[0])].append(entry)
    processor = M3RetImageProcessor(size=arguments.size)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "built"
        builder = ScanBuilder(Folder(), root, salt=SALT, cache_dir=folder)
        build_shards(
            builder, output, plan_shards({"train": [entry for entries in kinds.values() for entry in entries]})
        )
        records = {record.id: record for record in open_collection(output)}
        pseudonyms = Pseudonyms(Folder.name, SALT)
        print(f"| {'scans/s':16} | scans |     read |   packed |  decoder | read / decoder    | packed / decoder  |")
        print(f"|{'-' * 18}|------:|---------:|---------:|---------:|------------------:|------------------:|")
        for kind, entries in sorted(kinds.items()):
            compare(kind, [records[pseudonyms.scan(entry)] for entry in entries], entries, processor, arguments.rounds)


def compare(
    kind: str, records: list[Record], entries: list[Entry], processor: M3RetImageProcessor, rounds: int
) -> None:
    """Print the row of the table for one kind of file."""

    def read() -> None:
        for record in records:
            processor.read(record.open())

    def load() -> None:
        for record in records:
            processor.pack([processor.resize(processor.read(record.open()))])

    def decoder() -> None:
        for entry in entries:
            decode(entry.files[0])

    times = interleaved_seconds({"read": read, "packed": load, "decoder": decoder}, rounds)
    speeds = [f"{len(entries) / statistics.median(taken):8.1f}" for taken in times.values()]
    ratios = [speed_ratio(times[side], times["decoder"]) for side in ("read", "packed")]
    print(f"| {kind:16} | {len(entries):5} | {' | '.join(speeds)} | {ratios[0]:>17} | {ratios[1]:>17} |", flush=True)


if __name__ == "__main__":
    main()
