"""A collection of scans in one small file, which a machine without image libraries reads.

Scans are resized as in training and compressed like JPEG: blocks of 8 x 8 pixels, cosine transform, rounded
coefficients, chroma at half the resolution. The coefficients are compressed with LZMA, which Python has everywhere.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


CHUNK = 256  # scans that are compressed together
CODEC = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 0, "pb": 0}]}
# rows of the cosine transform of 8 values, orthonormal
COSINES = torch.tensor(
    [
        [math.sqrt((1 if k == 0 else 2) / 8) * math.cos(math.pi * (2 * n + 1) * k / 16) for n in range(8)]
        for k in range(8)
    ]
)
# steps of JPEG's luminance table (ITU-T T.81, annex K), at least such that a coefficient fits into a signed byte
JPEG_STEPS = torch.tensor(
    [
        *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
        *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
        *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
        *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
    ],
    dtype=torch.float32,
)
TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


@dataclass(frozen=True)
class PackedScan:
    """One scan of a packed corpus."""

    id: str
    modality: str
    source: str
    shape: tuple[int, int, int, int]  # (1 or 3, D, H, W), H and W multiples of 16

    @property
    def planes(self) -> list[tuple[int, int]]:
        """Return height and width of each compressed plane: luma of all slices, then chroma of all slices."""
        C, D, H, W = self.shape
        return [(H, W)] * D + [(H // 2, W // 2)] * (2 * D if C == 3 else 0)


def quantisation(quality: float) -> Tensor:
    """Return the steps of the 64 coefficients; quality 1 is JPEG's own table (its "50"), 2 half its steps."""
    return (JPEG_STEPS / quality).clamp(min=1024 / 127)


def encode_plane(plane: Tensor, steps: Tensor) -> Tensor:
    """Encode `(H, W)` values in 0 to 255, H and W multiples of 8, to coefficients `(64, blocks)` int8."""
    blocks = plane.unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).transpose(1, 2).reshape(-1, 8, 8) - 128
    coefficients = (COSINES @ blocks @ COSINES.T).flatten(1) / steps
    return coefficients.round().clamp(-127, 127).to(torch.int8).T


def decode_plane(coefficients: Tensor, height: int, width: int, steps: Tensor) -> Tensor:
    """Undo `encode_plane`: `(64, blocks)` int8 to `(height, width)` float32."""
    blocks = COSINES.T @ (coefficients.T * steps).view(-1, 8, 8) @ COSINES + 128
    return blocks.view(height // 8, width // 8, 8, 8).transpose(1, 2).reshape(height, width)


def encode_scan(volume: Tensor, steps: Tensor) -> Tensor:
    """Encode a scan `(1 or 3, D, H, W)` uint8 to coefficients `(64, blocks of all its planes)`."""
    planes = list(volume[0].float())
    if len(volume) == 3:
        luma, *chroma = (TO_YCC @ volume.float().flatten(1)).view(3, *volume.shape[1:])
        planes = [*luma, *(torch.nn.functional.avg_pool2d(torch.stack(chroma) + 128, 2).flatten(0, 1))]
    return torch.cat([encode_plane(plane, steps) for plane in planes], dim=1)


def decode_scan(coefficients: Tensor, scan: PackedScan, steps: Tensor) -> Tensor:
    """Undo `encode_scan`: `(1 or 3, D, H, W)` uint8."""
    C, D, H, W = scan.shape
    blocks = coefficients.split([height * width // 64 for height, width in scan.planes], dim=1)
    planes = [decode_plane(block, *size, steps) for block, size in zip(blocks, scan.planes, strict=True)]
    values = torch.stack(planes[:D])[None]
    if C == 3:
        chroma = torch.stack(planes[D:]).unflatten(0, (2, D)) - 128
        chroma = torch.nn.functional.interpolate(chroma, size=(H, W), mode="bilinear", align_corners=False)
        values = (torch.linalg.inv(TO_YCC) @ torch.cat([values, chroma]).flatten(1)).view(3, D, H, W)
    return values.round().clamp(0, 255).to(torch.uint8)


def compress(coefficients: Sequence[Tensor]) -> bytes:
    """Compress the coefficients of several scans, those of one frequency together."""
    return lzma.compress(torch.cat(list(coefficients), dim=1).contiguous().numpy().tobytes(), **CODEC)


def write_corpus(path: Path, scans: Sequence[PackedScan], volumes: Iterator[Tensor], quality: float) -> None:
    """Write scans and their volumes `(1 or 3, D, H, W)` uint8 as a packed corpus."""
    steps = quantisation(quality)
    chunks: dict[str, Tensor] = {}
    for first in range(0, len(scans), CHUNK):
        coefficients = [encode_scan(next(volumes), steps) for _ in scans[first : first + CHUNK]]
        chunks[f"{first:08d}"] = torch.frombuffer(bytearray(compress(coefficients)), dtype=torch.uint8)
    listed = [[scan.id, scan.modality, scan.source, scan.shape] for scan in scans]
    save_file(chunks, path, metadata={"quality": str(quality), "scans": json.dumps(listed)})


def read_corpus(path: Path, processes: int = 1) -> tuple[list[PackedScan], list[Tensor]]:
    """Return the scans of a packed corpus and their volumes `(1 or 3, D, H, W)` uint8."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        scans = [
            PackedScan(id, modality, source, tuple(shape))
            for id, modality, source, shape in json.loads(metadata["scans"])
        ]
        chunks = [file.get_tensor(name).numpy().tobytes() for name in sorted(file.keys())]
    groups = [scans[first : first + CHUNK] for first in range(0, len(scans), CHUNK)]
    decode = partial(_decode_chunk, steps=quantisation(float(metadata["quality"])))
    with ProcessPoolExecutor(processes) if processes > 1 else nullcontext() as pool:
        decoded = map(decode, chunks, groups) if pool is None else pool.map(decode, chunks, groups)
        return scans, [torch.from_numpy(volume) for chunk in decoded for volume in chunk]


def _decode_chunk(chunk: bytes, scans: Sequence[PackedScan], steps: Tensor) -> list[np.ndarray]:
    torch.set_num_threads(1)
    values = np.frombuffer(lzma.decompress(chunk, **CODEC), dtype=np.int8)
    coefficients = torch.from_numpy(values.reshape(64, -1).copy())
    pieces = coefficients.split([sum(h * w // 64 for h, w in scan.planes) for scan in scans], dim=1)
    return [decode_scan(piece, scan, steps).numpy() for piece, scan in zip(pieces, scans, strict=True)]
