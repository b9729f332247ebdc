"""Small pictures of scans: the middle slice or frame as the encoder sees it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image
from torch import Tensor, nn, stack, tensor

from ..image_processing_m3ret import M3RetImageProcessor
from .embedding import Embedder, unpatchify


THUMBNAIL_SIZE = 128  # px
BLANK_SHARE, BLANK_RANGE = 0.99, 8  # so many of a blank picture's pixels are within so many grey levels of the median


def thumbnail(processor: M3RetImageProcessor, source: object) -> Image.Image:
    """Return the middle slice or frame of a scan in RGB, at the resolution of the encoder's input.

    Raises:
        M3RetReadError: if the processor cannot read the source.
    """
    middle = _middle_slice(processor.resize(processor.read(source)), processor)
    return to_image(middle.mul(255).round().byte())


def is_blank(picture: Image.Image) -> bool:
    """Return whether a picture shows nothing: almost all of its pixels are equal."""
    grey = np.asarray(picture.convert("L"), np.int16)
    return bool((np.abs(grey - np.median(grey)) <= BLANK_RANGE).mean() >= BLANK_SHARE)


def miniature(picture: Image.Image) -> Tensor:
    """Return 32 x 32 grey values minus their mean, L2-normalised: float32 `(1024,)`, zero for a picture of one value.

    The dot product of two miniatures is the correlation of two tiny images (Torralba et al. 2008).
    """
    grey = tensor(np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BOX), np.float32)).flatten()
    return nn.functional.normalize(grey - grey.mean(), dim=0)


def to_image(pixels: Tensor) -> Image.Image:
    """Convert uint8 pixels `(3, H, W)` to an RGB picture."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0)))


def thumbnail_embedder(processor: M3RetImageProcessor) -> Embedder:
    """Return an embedder whose vectors are thumbnails, so that one decode gives embedding and picture.

    A vector is uint8 `(3 * THUMBNAIL_SIZE**2,)`: the middle slice or frame, scaled to fit a black square.
    """

    def embed(inputs: Mapping[str, Tensor]) -> Tensor:
        grids = inputs["grid_thw"]
        scans = zip(inputs["pixel_values"].split(grids.prod(-1).tolist()), grids.tolist(), strict=True)
        return stack([_square(_middle_slice(unpatchify(*scan, processor), processor)).flatten() for scan in scans])

    return embed


def _middle_slice(volume: Tensor, processor: M3RetImageProcessor) -> Tensor:
    """Undo the normalisation of a scan `(C, D, H, W)` and return its middle slice `(3, H, W)`, float32 in [0, 1]."""
    middle = processor.denormalise(volume[:, volume.shape[1] // 2])
    return middle.clamp(0, 1).expand(3, -1, -1)


def _square(pixels: Tensor) -> Tensor:
    """Fit a picture `(3, H, W)` into a black square: uint8 `(3, THUMBNAIL_SIZE, THUMBNAIL_SIZE)`."""
    scale = THUMBNAIL_SIZE / max(pixels.shape[1:])
    height, width = (max(1, round(edge * scale)) for edge in pixels.shape[1:])
    resized = nn.functional.interpolate(pixels[None], (height, width), mode="bilinear", antialias=True)[0]
    top, left = (THUMBNAIL_SIZE - height) // 2, (THUMBNAIL_SIZE - width) // 2
    square = pixels.new_zeros(3, THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    square[:, top : top + height, left : left + width] = resized
    return square.mul(255).round().byte()
