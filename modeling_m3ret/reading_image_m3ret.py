"""Read still images, animations and TIFF stacks with Pillow.

Pages and animation frames become depth. Grey pixels keep their bit depth; EXIF rotation, alpha and the ratio of a
pixel's sides are applied as the file declares them. This file is copied into every checkpoint and imports only NumPy;
Pillow is imported when a file needs it.
"""

from __future__ import annotations

import io
import math
import re
import sys
from typing import Any

import numpy as np

from .intensity_m3ret import blend_over_black, to_unit_range
from .scan_m3ret import AnyScan, Description, M3RetReadError, ReadRequest, Spacing, spacing_of_aspect


IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "AVIF", "JPEG2000")
EXIF_ORIENTATION = 0x0112
IMAGEJ_STACK = re.compile(r"ImageJ=.*^images=(\d+)", re.DOTALL | re.MULTILINE)
# TIFF tags
NEW_SUBFILE_TYPE, BITS_PER_SAMPLE, PHOTOMETRIC, DESCRIPTION, STRIP_OFFSETS, PLANAR = 254, 258, 262, 270, 273, 284
SAMPLE_FORMAT = 339
STRIP_BYTE_COUNTS, TILE_OFFSETS, TILE_BYTE_COUNTS = 279, 324, 325
NATIVE_ORDER = {"I;16BS": "I;16S", "I;32BS": "I;32S", "F;32BF": "F;32F"} if sys.byteorder == "little" else {}


def read_encoded_image(data: bytes, request: ReadRequest, formats: tuple[str, ...] = IMAGE_FORMATS) -> AnyScan:
    """Read the content of an image file, and tell a damaged file from one that Pillow does not support."""
    pillow = request.import_decoder("PIL.Image", "pillow")
    opened = False
    try:
        with pillow.open(io.BytesIO(data), formats=formats) as image:
            opened = True
            return read_image(image, request)
    except M3RetReadError:
        raise
    except pillow.DecompressionBombError as error:
        expected, advice = f"at most {request.limits.max_pixels_per_image:,} pixels per image", "Reduce the image."
        raise request.error("too_large", expected, "more pixels than Pillow opens", advice) from error
    except (pillow.UnidentifiedImageError, OSError, SyntaxError, EOFError, ValueError) as error:
        complete = _is_complete(data)
        if complete and not opened:
            expected = "a variant of this image format that Pillow reads"
            raise request.error("unsupported", expected, "another pixel type or compression") from error
        reason = "undecodable" if complete else "damaged"
        raise request.error(reason, "a complete image", type(error).__name__) from error  # type: ignore[arg-type]


def _is_complete(data: bytes) -> bool:
    """Return whether a JPEG, BMP or TIFF file is not truncated; False for formats that Pillow reads in all variants."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" in data[-1024:]
    if data.startswith(b"BM"):
        return int.from_bytes(data[2:6], "little") <= len(data)
    if data.startswith(b"MM\0+"):  # Pillow reads BigTIFF in little-endian order only
        return True
    if not data.startswith((b"II", b"MM")):
        return False
    from PIL import TiffImagePlugin

    try:
        stream = io.BytesIO(data)
        tags = TiffImagePlugin.ImageFileDirectory_v2(stream.read(16 if data[2:4] in (b"+\0", b"\0+") else 8))
        stream.seek(tags.next)
        tags.load(stream)
        pairs = ((STRIP_OFFSETS, STRIP_BYTE_COUNTS), (TILE_OFFSETS, TILE_BYTE_COUNTS))
        offsets, counts = next((tags[first], tags[second]) for first, second in pairs if first in tags)
        return all(offset + count <= len(data) for offset, count in zip(offsets, counts, strict=True))
    except Exception:  # any tag may be cut or malformed
        return False


def read_image(image: Any, request: ReadRequest) -> AnyScan:
    """Read a PIL image, whose pixels need not be loaded yet. Pages and animation frames become depth."""
    description: Description = {"format": (image.format or "image").lower()}
    pages = _pages(image, request, description)
    if len(pages) > 1:
        pages = [pages[index] for index in request.select_frames(len(pages), description)]
    if image.tell() != pages[0]:
        image.seek(pages[0])
    width, height = image.size
    request.check_pixels(height, width)
    request.check_size((len(pages), height, width), 4)
    spacing = _pixel_aspect(image, description)
    if request.min_pixels is not None and image.format == "JPEG" and image.mode in ("L", "RGB"):
        spacing = _reduce_jpeg(image, request.min_pixels, spacing, description)
        width, height = image.size
    frames, kinds = [], set()
    for page in pages:
        if page != pages[0]:
            image.seek(page)
            if image.size != (width, height):
                raise request.error("unsupported", "pages of one size", "pages of several sizes")
        pixels, inverted = _image_pixels(image, request)
        frames.append(pixels)
        kinds.add((pixels.dtype, inverted))
    if len(kinds) > 1:
        raise request.error("unsupported", "pages of one data type and polarity", "pages that differ in one of them")
    if len({frame.ndim for frame in frames}) > 1:  # an animation with grey and colour frames
        frames = [np.repeat(frame[..., None], 3, axis=2) if frame.ndim == 2 else frame for frame in frames]
    array = frames[0][None] if len(frames) == 1 else np.stack(frames)
    array = array[None] if array.ndim == 3 else array.transpose(3, 0, 1, 2)
    return to_unit_range(array, spacing, request, description, inverted=inverted)


def _reduce_jpeg(image: Any, min_pixels: int, spacing: Spacing, description: Description) -> Spacing:
    """Have a JPEG that is not decoded yet decoded at the smallest size of at least `min_pixels`.

    The decoder leaves out high frequencies and rounds up sides that the factor does not divide. The returned spacing
    accounts for that, so that the scan has the same shape and number of patches as when it is decoded whole.
    """
    width, height = image.size
    factor = next((n for n in (8, 4, 2) if (width // n) * (height // n) >= min_pixels), 1)
    if factor == 1 or not image.draft(image.mode, (width // factor, height // factor)) or image.size == (width, height):
        return spacing
    description["decoded_at"] = f"1/{factor}"
    stretch = (height * image.width) / (width * image.height)  # of a pixel along a column
    if stretch == 1:
        return spacing
    turned = image.getexif().get(EXIF_ORIENTATION, 1) > 4  # by 90 degrees
    _, row, column = spacing
    return None, (row or 1.0) * (1 / stretch if turned else stretch), column or 1.0


def _pages(image: Any, request: ReadRequest, description: Description) -> list[int]:
    """Return the indices of the pages or frames of an image, without previews, masks and reduced copies."""
    total, kind = getattr(image, "n_frames", 1), description["format"]
    pages = list(range(total))
    if kind in ("jpeg", "mpo", "heif"):  # further images in a camera file are previews
        pages = [image.tell() if kind == "heif" else 0]
    elif kind == "png" and image.info.get("default_image"):  # the first image is for viewers without animation
        pages = pages[1:]
    elif kind == "tiff" and total == 1 and (images := IMAGEJ_STACK.match(str(image.tag_v2.get(DESCRIPTION, "")))):
        if int(images.group(1)) > 1:  # all slices follow the first one, without pages of their own
            advice = "Save the stack again with one page per slice."
            raise request.error("unsupported", "one page per slice", "an ImageJ stack in one page", advice)
    elif kind == "tiff" and total > 1:
        reduced = []
        for page in pages:
            image.seek(page)
            reduced.append(int(image.tag_v2.get(NEW_SUBFILE_TYPE, 0)) & 0b101)  # a reduced copy, or a mask
        pages = [page for page in pages if not reduced[page]] or pages
    if len(pages) < total:
        description["pages_left_out"] = total - len(pages)
    return pages


def _pixel_aspect(image: Any, description: Description) -> Spacing:
    """Return the ratio of a pixel's sides as spacing. The scale of a declared resolution is for print, so not used."""
    if image.format == "TIFF" and not {282, 283} <= set(image.tag_v2):  # Pillow invents a missing one
        return (None, None, None)
    # pixels per unit along a row and along a column
    keys = ("dpi", "resolution", "aspect", "jfif_density") if image.format else ()  # a derived image may be resampled
    density = next((image.info[key] for key in keys if image.info.get(key)), (1, 1))
    across, down = (float(value) for value in density[:2])
    if not (0 < across < math.inf and 0 < down < math.inf):
        return (None, None, None)
    turned = across != down and image.getexif().get(EXIF_ORIENTATION, 1) > 4  # by 90 degrees
    return spacing_of_aspect(down / across if turned else across / down, description)


def _image_pixels(image: Any, request: ReadRequest) -> tuple[np.ndarray, bool]:
    """Return `(H, W)` at the bit depth of the image or `(H, W, 3)` uint8, and whether low values are bright.

    EXIF rotation and alpha are applied.
    """
    tags = getattr(image, "tag_v2", {})
    names = (BITS_PER_SAMPLE, SAMPLE_FORMAT, PLANAR)
    bits, kind, planar = (int(np.ravel(tags.get(name, 1))[0]) for name in names) if tags else (1, 1, 1)
    if bits > 8 and planar == 2 and len(image.getbands()) > 1:  # Pillow would read it as 8 bits
        expected = "interleaved colour channels, or 8 bits per channel"
        raise request.error("unsupported", expected, "separate colour planes of more than 8 bits")
    if tags:  # libtiff returns native order, though Pillow takes some types for big-endian
        image.tile = [
            tile._replace(args=(NATIVE_ORDER.get(tile.args[0], tile.args[0]), *tile.args[1:]))
            if tile.codec_name == "libtiff"
            else tile
            for tile in image.tile
        ]
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = request.import_decoder("PIL.ImageOps", "pillow").exif_transpose(image)
    if image.mode == "1":
        return np.asarray(image.convert("L")), False
    transparent = "transparency" in image.info and image.mode in ("P", "RGB", "L")
    if (image.mode in ("L", "F") and not transparent) or image.mode[0] == "I":  # "I", "I;16" and its byte orders
        pixels = np.asarray(image)
        if (bits, kind) == (32, 1) and image.mode == "I":  # Pillow reads uint32 as int32, and int8 as uint8
            pixels = pixels.view(np.uint32)
        elif (bits, kind) == (8, 2):
            pixels = pixels.view(np.int8)
        # Pillow inverts WhiteIsZero only for up to 8 bits
        return pixels, image.mode != "L" and tags.get(PHOTOMETRIC) == 0
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or transparent:  # in LAB, "A" is a colour
        return blend_over_black(np.asarray(image.convert("RGBA"))), False
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB")), False  # palette, CMYK, YCbCr, HSV
