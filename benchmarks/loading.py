"""How fast do scans load from Parquet into packed patches, beside the bare decoder of their source files?

    python benchmarks/loading.py --data FOLDER        # a folder with a manifest.csv; the phantom by default

Read: fetch the row, decode it under limits and scale to [0, 1]. Packed: also resize and cut into patches. The decoder:
pydicom, nibabel, decord or Pillow, decoding the source file to its array. One thread each, files in the page
cache, interleaved; the ratio is the median of the rounds', with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import io
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset_scripts.builder import Pseudonyms, ScanBuilder
from dataset_scripts.entries import Entry
from dataset_scripts.shards import build_shards, plan_shards, write_index
from dataset_scripts.sources.folder import Folder
from modeling_m3ret import M3RetImageProcessor
from modeling_m3ret.cpu import keep_freed_memory
from modeling_m3ret.data.collection import Record, open_collection, phantom_folder


PER_KIND = 24
SALT = b"benchmark"


def kind_of(path: Path) -> str:
    if path.is_dir():
        return "DICOM series"
    return {".gz": "NIfTI, gzipped", ".nii": "NIfTI", ".dcm": "DICOM", ".mp4": "video"}.get(
        path.suffix, path.suffix[1:].upper()
    )


def decode(path: Path) -> Any:
    """The array of a source file by the library that everyone would take."""
    if path.is_dir():
        import pydicom

        return [pydicom.dcmread(slice_).pixel_array for slice_ in sorted(path.iterdir())]
    if path.suffix == ".dcm":
        import pydicom

        return pydicom.dcmread(path).pixel_array
    if path.suffix in (".nii", ".gz"):
        import nibabel

        return nibabel.load(path).get_fdata(dtype=np.float32)  # the array itself may be a map of the file, not yet read
    if path.suffix == ".mp4":
        import decord

        video = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        # the frames that we take, too: a clip has no more than 32
        wanted = min(len(video), 32)
        return video.get_batch([(2 * i + 1) * len(video) // (2 * wanted) for i in range(wanted)]).asnumpy()
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return archive[archive.files[0]]
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as in the workers of a training
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    root = arguments.data or phantom_folder("phantom")
    kinds: dict[str, list[Entry]] = defaultdict(list)
    for entry in Folder().entries(root):
        if len(kinds[kind_of(entry.files[0])]) < PER_KIND:
            kinds[kind_of(entry.files[0])].append(entry)
    processor = M3RetImageProcessor(size=arguments.size)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "built"
        builder = ScanBuilder(Folder(), root, salt=SALT, cache_dir=folder)
        shards = plan_shards({"train": [entry for entries in kinds.values() for entry in entries]})
        build_shards(builder, output, shards)
        write_index(output, shards)
        records = {record.id: record for record in open_collection(output)}
        pseudonyms = Pseudonyms(Folder.name, SALT)
        print(f"| {'scans/s':16} | scans |     read |   packed |  decoder | read / decoder    | packed / decoder  |")
        print(f"|{'-' * 18}|------:|---------:|---------:|---------:|------------------:|------------------:|")
        for kind, entries in sorted(kinds.items()):
            compare(kind, [records[pseudonyms.scan(entry)] for entry in entries], entries, processor, arguments.rounds)


def compare(
    kind: str, records: list[Record], entries: list[Entry], processor: M3RetImageProcessor, rounds: int
) -> None:
    def read() -> None:
        for record in records:
            processor.read(record.open())

    def load() -> None:
        for record in records:
            processor.pack([processor.resize(processor.read(record.open()))])

    def decoder() -> None:
        for entry in entries:
            decode(entry.files[0])

    sides = (read, load, decoder)
    for warm_up in sides:
        warm_up()
    times = [[seconds(side) for side in sides] for _ in range(rounds)]
    speeds = [f"{len(entries) / statistics.median(side):8.1f}" for side in zip(*times, strict=True)]
    ratios = []
    for side in range(2):
        each = [row[2] / row[side] for row in times]
        ratios.append(f"{statistics.median(each):5.2f} ({min(each):.2f}-{max(each):.2f})")
    print(f"| {kind:16} | {len(entries):5} | {' | '.join(speeds)} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
