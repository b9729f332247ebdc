"""Write folders of small generated scans, and read the output of a build."""

from __future__ import annotations

import csv
import io
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from scan_files import nifti_bytes


SALT = b"a salt of the tests, known to all"
COLUMNS = ("id", "file", "modality", "anatomy", "label", "group")


def texture(seed: int, shape: tuple[int, int] = (96, 80)) -> np.ndarray:
    """Return a smooth random uint8 picture with the spectrum of natural images; no two seeds look the same."""
    frequencies = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1]))
    frequencies[0, 0] = 1
    waves = np.fft.rfft2(np.random.default_rng(seed).normal(size=shape)) / frequencies**1.2
    smooth = np.fft.irfft2(waves, shape)
    low, high = smooth.min(), smooth.max()
    return ((smooth - low) / (high - low) * 200 + 20).astype(np.uint8)


def noise(seed: int, side: int) -> np.ndarray:
    """Return a picture that no codec can compress."""
    return np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)


def picture_bytes(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **({"compress_level": 1} if kind == "PNG" else {}), **options)
    return stream.getvalue()


def volume_bytes(seed: int, shape: tuple[int, int, int] = (12, 10, 6), *, zipped: bool = False) -> bytes:
    """Return a NIfTI file of int16 values that are not Hounsfield units."""
    voxels = np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)
    return nifti_bytes(voxels, np.diag([0.5, 0.5, 2, 1]), zipped=zipped)


def video_bytes(seed: int, frames: int = 8, **metadata: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")  # the index comes first, so that a truncated file still opens
        _write_video(path, seed, frames, metadata)
        return path.read_bytes()


def _write_video(path: Path, seed: int, frames: int, metadata: dict[str, str]) -> None:
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        container.metadata.update(metadata)
        track = container.add_stream("mpeg4", rate=10)
        track.width = track.height = 64
        track.pix_fmt = "yuv420p"
        for number in range(frames):
            grey = texture(1000 * seed + number, (64, 64))
            container.mux(track.encode(av.VideoFrame.from_ndarray(np.stack([grey] * 3, -1), format="rgb24")))
        container.mux(track.encode())


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_manifest(root: Path, rows: list[dict[str, str]]) -> Path:
    """Write a manifest; missing cells are empty."""
    columns = list(dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)]))
    root.mkdir(parents=True, exist_ok=True)
    with (root / "manifest.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, columns, restval="")
        table.writeheader()
        table.writerows(rows)
    return root


def noise_collection(root: Path, count: int, side: int) -> Path:
    """Write `count` X-rays of as many patients, each of about side**2 bytes."""
    files = {f"xray/{number:03}.png": picture_bytes(noise(number, side)) for number in range(count)}
    return put(root, files)


def rows_of(output: Path, split: str = "") -> list[dict[str, Any]]:
    """Return the rows of a built dataset or of one split, in order."""
    shards = sorted((output / "data").glob(f"{split}*.parquet"))
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


def bytes_of(output: Path) -> dict[str, bytes]:
    """Return the content of every file, by its name relative to the folder."""
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()}
