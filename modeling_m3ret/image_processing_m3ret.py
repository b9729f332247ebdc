"""Files, arrays and images of any kind -> packed patches for the encoder.

One rule sizes every scan from its array and its voxel spacing alone; nothing asks which modality it is. Reading is in
`reading_m3ret`; this file resizes, normalises and packs. It travels inside every checkpoint and imports nothing of the
rest of the project.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature

from .packing_m3ret import cut
from .reading_m3ret import Scan, read_scan


class M3RetImageProcessorKwargs(TypedDict, total=False):
    size: int
    num_frames: int
    max_patches: int
    patch_size: int
    patch_depth: int
    num_channels: int
    image_mean: float
    image_std: float


class M3RetImageProcessor(BaseImageProcessor):
    """Reads scans and packs them: `processor(["ct.nii.gz", "clip.mp4", "chest.dcm", "series/"], return_tensors="pt")`.

    A scan is a path, bytes, a PIL image, an array or tensor (`H W`, `H W C`, `D H W`, `D H W C`), a folder that holds a
    DICOM series, a list of DICOM slices, a `datasets` row, or a `Scan`. Channels come last: a tensor of `(3, H, W)` is
    three slices. A call takes one scan or a list of scans, kinds mixed; so the slices of one series as a list go into a
    list of their own: `processor([[slice_1, slice_2]])`.

    Size policy, the same for every scan:

    1. In the plane a scan gets the area `size` x `size`, its (physical) aspect ratio kept, each side rounded to whole
       patches.
    2. In depth it keeps its slices or frames, up to `num_frames`; never more than make its voxels as deep as they are
       wide. Where the spacing in depth is known, slices are resampled over their whole thickness; where it is not
       (frames of a video), frames evenly spaced over the clip are taken as they are.
    3. What still exceeds `max_patches` shrinks by one factor along every axis.

    Args:
        size: edge in pixels of the square whose area a slice gets. 224 as in ViT, DINO and MAE.
        num_frames: most slices or frames. 32 with 16 px patches 4 deep gives a CT 8 x 14 x 14 patches, some eight
            X-rays' worth of work.
        max_patches: most patches of a scan. 2048 is the power of two over those 1568, and binds only for larger
            settings or long thin shapes: it bounds memory, where attention grows with its square.
        patch_size, patch_depth, num_channels: of the encoder, see `M3RetConfig`.
        image_mean, image_std: subtracted and divided by; .5 and .5 take the reader's [0, 1] to [-1, 1]. One pair for
            all, since ImageNet's colour means describe no scan.
    """

    model_input_names = ["pixel_values", "grid_thw"]
    valid_kwargs = M3RetImageProcessorKwargs  # type: ignore[assignment]  # those that from_pretrained may override

    def __init__(
        self,
        size: int = 224,
        num_frames: int = 32,
        max_patches: int = 2048,
        patch_size: int = 16,
        patch_depth: int = 4,
        num_channels: int = 3,
        image_mean: float = 0.5,
        image_std: float = 0.5,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if min(size, num_frames, max_patches, patch_size, patch_depth) < 1:
            raise ValueError("size, num_frames, max_patches, patch_size and patch_depth are at least 1")
        self.size = size
        self.num_frames = num_frames
        self.max_patches = max_patches
        self.patch_size = patch_size
        self.patch_depth = patch_depth
        self.num_channels = num_channels
        self.image_mean = image_mean
        self.image_std = image_std

    def preprocess(
        self,
        images: Any,
        *,
        size: int | None = None,
        num_frames: int | None = None,
        max_patches: int | None = None,
        return_tensors: str | None = "pt",
        **unknown: Any,
    ) -> BatchFeature:
        """One scan or a list of scans -> `pixel_values (P, C*t*p*p)` float32 and `grid_thw (B, 3)` int64.

        Raises:
            M3RetReadError: for a scan that cannot be read.
            TypeError: for an argument that this processor does not have.
        """
        if unknown:
            raise TypeError(f"M3RetImageProcessor has no argument {', '.join(sorted(unknown))}")
        settings = {"size": size, "num_frames": num_frames, "max_patches": max_patches}
        scans = images if isinstance(images, (list, tuple)) else [images]
        if not scans:
            raise ValueError("no scan was given")
        rows, grids = self.rows([self.resize(self.read(scan, num_frames), **settings) for scan in scans])
        return BatchFeature({"pixel_values": rows, "grid_thw": grids}, tensor_type=return_tensors)

    def read(self, source: Any, num_frames: int | None = None) -> Scan:
        """Read one scan, of a clip no more frames than will be used."""
        return read_scan(source, num_frames=self.num_frames if num_frames is None else num_frames)

    def rows(self, volumes: Sequence[Tensor], slices_once: bool = False) -> tuple[Tensor, Tensor]:
        """Resized scans, each `(1 or 3, D, H, W)` -> `pixel_values (P, C*t*p*p)` and `grid_thw (B, 3)`, where they are.

        A grey scan's values are written for every channel, and each value once, straight to its place.

        Args:
            slices_once: if all scans are images, rows hold their slice once and not t times: `(P, C*p*p)`.
        """
        grids = [self.grid(volume) for volume in volumes]
        depth = 1 if slices_once and all(volume.shape[1] == 1 for volume in volumes) else self.patch_depth
        values = self.num_channels * depth * self.patch_size**2
        rows = volumes[0].new_empty(sum(math.prod(grid) for grid in grids), values)
        for part, volume in zip(rows.split([math.prod(grid) for grid in grids]), volumes, strict=True):
            patches = cut(volume[None], depth, self.patch_size)[0]  # (T, h, w, 1 or 3, t, p, p)
            part.view(*patches.shape[:3], self.num_channels, *patches.shape[4:]).copy_(patches)
        return rows, torch.tensor(grids, dtype=torch.int64, device=rows.device)

    def grid(self, volume: Tensor) -> tuple[int, int, int]:
        """Patches along depth, height and width of a resized scan `(C, D, H, W)`."""
        return self.grid_of(tuple(volume.shape))

    def grid_of(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """As above, of a scan of this shape."""
        D, H, W = shape[1:]
        return -(-D // self.patch_depth), H // self.patch_size, W // self.patch_size

    def resize(self, scan: Scan, **settings: int | None) -> Tensor:
        """A scan by the size policy, normalised: `(1 or 3, D, H, W)` float32. `settings` as in `preprocess`."""
        # a picture's memory may be read-only, which torch has no word for; nothing below writes into it either way
        volume = torch.from_numpy(scan.array if scan.array.flags.writeable else scan.array.copy())
        depth, height, width = self.target_shape(tuple(volume.shape[1:]), scan.spacing, **settings)
        C, D, H, W = volume.shape
        if depth < D and scan.spacing[0] is None:
            centres = (torch.arange(depth) + 0.5) * D / depth
            volume = volume[:, centres.long()]
        elif depth < D:  # first, so that the plane is resized for the slices that stay
            volume = _interpolate(volume.float().reshape(C, 1, D, H * W), depth, H * W).view(C, depth, H, W)
            volume = volume / 255 if scan.array.dtype == np.uint8 else volume
        volume = _interpolate(volume, height, width)
        one = 255 if volume.dtype == torch.uint8 else 1
        volume = volume.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return volume.mul_(1 / (one * self.image_std)).sub_(self.image_mean / self.image_std)

    def target_shape(
        self,
        shape: tuple[int, ...],
        spacing: tuple[float | None, ...],
        *,
        size: int | None = None,
        num_frames: int | None = None,
        max_patches: int | None = None,
    ) -> tuple[int, int, int]:
        """Depth, height and width that the size policy gives a scan of `(D, H, W)` voxels and spacing in mm."""
        size = self.size if size is None else size
        num_frames = self.num_frames if num_frames is None else num_frames
        max_patches = self.max_patches if max_patches is None else max_patches
        if min(size, num_frames, max_patches) < 1:
            raise ValueError(f"size, num_frames and max_patches are at least 1: {size}, {num_frames}, {max_patches}")
        D, H, W = shape
        # a spacing that cannot be is one that is not known
        through, down, across = (mm if mm is not None and 0 < mm < math.inf else None for mm in spacing)
        if down is None or across is None:
            down = across = 1.0
            through = None  # nothing to compare it with
        aspect = math.sqrt((H * down) / (W * across))
        depth = min(D, num_frames)
        if through is not None and D > 1:
            pixel = math.sqrt(H * down * W * across) / size  # mm
            depth = max(1, min(depth, math.ceil(D * through / pixel)))

        shrink = 1.0
        while True:
            edge = size * shrink
            height = max(1, round(edge * aspect / self.patch_size))
            width = max(1, round(edge / aspect / self.patch_size))
            slices = max(1, round(depth * shrink))
            if -(-slices // self.patch_depth) * height * width <= max_patches or shrink < 1e-3:
                # a thread of a scan, thousands of times longer than wide, is cut to the budget along its length
                height, width = min(height, max_patches), min(width, max_patches)
                return slices, height * self.patch_size, width * self.patch_size
            shrink *= 0.98


def _interpolate(frames: Tensor, height: int, width: int) -> Tensor:
    """`(C, D, H, W)` -> `(C, D, height, width)`, bilinear and antialiased; uint8 stays uint8."""
    if tuple(frames.shape[2:]) == (height, width):
        return frames
    if frames.dtype == torch.uint8:
        # as pictures, their channels side by side in memory as a decoder leaves them: an eighth of the time in colour
        pictures = frames.transpose(0, 1).contiguous(memory_format=torch.channels_last)  # (D, C, H, W)
        return _interpolate_2d(pictures, height, width).transpose(0, 1)
    return _interpolate_2d(frames, height, width)


def _interpolate_2d(frames: Tensor, height: int, width: int) -> Tensor:
    # where nothing shrinks antialiasing changes nothing, and takes twice the time
    shrinks = height < frames.shape[2] or width < frames.shape[3] or frames.dtype == torch.uint8
    return torch.nn.functional.interpolate(frames, (height, width), mode="bilinear", antialias=shrinks)


__all__ = ["M3RetImageProcessor"]
