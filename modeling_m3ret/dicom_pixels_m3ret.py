"""Decode the pixels of DICOM frames and scale them as their headers declare.

Pixel data, modality and VOI LUTs, windows, padding, palettes and photometric interpretation (DICOM PS3.3, sections
C.7.6.3, C.7.9 and C.11). This file travels inside every checkpoint and imports only NumPy; pydicom and GDCM are
imported when a file needs them.
"""

from __future__ import annotations

import importlib
import math
import struct
from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .scan_m3ret import Description, ReadRequest


CT_STORAGE = tuple("1.2.840.10008.5.1.4.1.1.2" + tail for tail in ("", ".1", ".2"))  # CT, enhanced, legacy enhanced
PIXEL_KEYS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
JPEG_BASELINE, JPEG_EXTENDED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of one dataset."""

    name: str  # of the file, in messages
    dataset: Any
    frame: int
    values: Any  # item with the rescale: a functional group of the frame, or the dataset itself
    window: Any  # item with the window or VOI LUT


@dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded frames, as arguments of `to_unit_range`."""

    array: np.ndarray  # (C, D, H, W)
    rule: str
    padding: np.ndarray | None = None  # (C, D, H, W) bool
    inverted: bool = False


def read_pixels(frames: Sequence[Frame], is_volume: bool, request: ReadRequest, description: Description) -> Pixels:
    """Decode frames of one size and apply what their headers declare about values.

    Args:
        frames: in the order of the result.
        is_volume: whether frames are slices of one volume, which must not depend on the windows of its slices.
        request: the read request.
        description: description of the scan, which is extended.
    """
    head = frames[0].dataset
    if _photometric(head) == "PALETTE COLOR" or int(head.get("SamplesPerPixel") or 1) > 1:
        return _read_colour(frames, request)
    return _read_grey(frames, is_volume, request, description)


def read_numbers(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """Return the first `count` numbers of an element, or None if it is absent, shorter or not finite."""
    value = dataset.get(keyword)
    is_multiple = isinstance(value, (tuple, MutableSequence))  # pydicom's MultiValue is a MutableSequence
    try:
        numbers = tuple(float(number) for number in (value if is_multiple else [value]))[:count]
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _read_colour(frames: Sequence[Frame], request: ReadRequest) -> Pixels:
    head = frames[0].dataset
    has_palette = _photometric(head) == "PALETTE COLOR"
    bits = int(head.get("BitsStored") or head.get("BitsAllocated") or 32)
    dtype = np.dtype(np.uint8 if bits <= 8 or has_palette else np.float32)
    array = _allocate(frames, 3, dtype, request)
    for index, frame, pixels in _decode(frames, request):
        pixels = _palette_colours(frame.dataset, pixels.dtype)[pixels] if has_palette else pixels
        array[:, index] = pixels[..., :3].transpose(2, 0, 1)
    if dtype != np.uint8:
        array /= 2.0**bits - 1
    return Pixels(array, "8-bit" if dtype == np.uint8 else "bit depth")


def _read_grey(frames: Sequence[Frame], is_volume: bool, request: ReadRequest, description: Description) -> Pixels:
    rule = _grey_intensity_rule(frames, is_volume)
    array = _allocate(frames, 1, np.dtype(np.uint8 if rule == "8-bit" else np.float32), request)
    padding: np.ndarray | None = None
    for index, frame, pixels in _decode(frames, request):
        mask = _padding_mask(pixels, frame.dataset)
        if mask is not None:
            padding = np.zeros(array.shape, bool) if padding is None else padding
            padding[0, index] = mask
        values = array[0, index]
        values[...] = pixels
        if rule != "8-bit":
            _apply_modality_lut(values, frame.values)
        if rule == "window":
            _apply_window(values, frame.window)
    # MONOCHROME1 is a matter of display, which does not change the sign of a physical unit.
    inverted = _photometric(frames[0].dataset) == "MONOCHROME1" and rule != "hounsfield"
    description["inverted"] = inverted
    return Pixels(array, rule, padding, inverted)


def _allocate(frames: Sequence[Frame], channels: int, dtype: np.dtype, request: ReadRequest) -> np.ndarray:
    shape = (channels, len(frames), int(frames[0].dataset.Rows), int(frames[0].dataset.Columns))
    request.check_size(shape, dtype.itemsize)
    return np.empty(shape, dtype)


def _grey_intensity_rule(frames: Sequence[Frame], is_volume: bool) -> str:
    """Return how stored values are scaled to [0, 1], as `rule` of `to_unit_range`."""
    if all(is_hounsfield(frame) for frame in frames):
        return "hounsfield"
    # A window describes the display of one image. It often differs between slices, and NIfTI has none: a volume must
    # not depend on it.
    if not is_volume and all(_voi_window(frame.window) is not None for frame in frames):
        return "window"
    return "8-bit" if all(_is_plain_8_bit(frame) for frame in frames) else "percentiles"


def _photometric(dataset: Any) -> str:
    return str(dataset.get("PhotometricInterpretation", "")).upper()


def _palette_colours(dataset: Any, dtype: np.dtype) -> np.ndarray:
    """Return the colour of every stored value, `(256 or 65536, 3)` uint8."""
    values = np.arange(2 ** (8 * dtype.itemsize), dtype=dtype)
    table = importlib.import_module("pydicom.pixels").apply_color_lut(values[None], dataset)[0]
    return (table >> (8 if table.max() > 255 else 0)).astype(np.uint8)  # 16-bit tables often hold 8-bit colours


# ------------------------------------------------------------------------------------------------------------- decoding


def _decode(frames: Sequence[Frame], request: ReadRequest) -> Iterator[tuple[int, Frame, np.ndarray]]:
    """Yield (index in `frames`, frame, pixels), file by file; pixels are `(H, W)`, or `(H, W, 3)` RGB."""
    size = (int(frames[0].dataset.Rows), int(frames[0].dataset.Columns))
    indices_of: dict[int, list[int]] = {}
    for index, frame in enumerate(frames):
        indices_of.setdefault(id(frame.dataset), []).append(index)
    for indices in indices_of.values():
        indices.sort(key=lambda index: frames[index].frame)
        dataset = frames[indices[0]].dataset
        file_request = replace(request, name=frames[indices[0]].name)
        with file_request.translate_errors():
            numbers = [frames[index].frame for index in indices]
            for index, pixels in zip(indices, _decode_frames(dataset, numbers, file_request), strict=True):
                _check_frame_size(pixels.shape[:2], size, file_request)
                yield index, frames[index], pixels


def _check_frame_size(size: tuple[int, ...], declared: tuple[int, int], request: ReadRequest) -> None:
    if size != declared:
        expected = f"frames of {declared[0]} x {declared[1]} pixels, as the DICOM header declares"
        raise request.error("damaged", expected, f"{size[0]} x {size[1]}")


def _decode_frames(dataset: Any, frames: list[int], request: ReadRequest) -> Iterable[np.ndarray]:
    """Decode frames of one dataset, given in ascending order."""
    syntax, total = _transfer_syntax(dataset), int(dataset.get("NumberOfFrames") or 1)
    if syntax.is_encapsulated:  # decoders allocate what the codestream requests, whatever the header declares
        encaps = importlib.import_module("pydicom.encaps")
        for codestream in encaps.generate_frames(dataset.PixelData, number_of_frames=total):
            size = _codestream_size(codestream)
            if size is not None:
                _check_frame_size(size, (int(dataset.Rows), int(dataset.Columns)), request)
    if syntax == JPEG_EXTENDED and int(dataset.BitsStored) > 8:
        return (_decode_jpeg_12bit(dataset, frame, total, request) for frame in frames)
    decoder = importlib.import_module("pydicom.pixels").get_decoder(syntax)
    # Pillow's libjpeg-turbo is four times faster than GDCM; for other syntaxes pydicom's default order is faster.
    plugin = "pillow" if syntax == JPEG_BASELINE and "pillow" in decoder.available_plugins else ""
    if frames == list(range(total)):  # all frames: one pass over the fragments
        pixels = decoder.as_array(dataset, decoding_plugin=plugin)[0]
        return pixels if total > 1 else [pixels]
    return (decoder.as_array(dataset, index=frame, decoding_plugin=plugin)[0] for frame in frames)


def _transfer_syntax(dataset: Any) -> Any:
    """Return the declared transfer syntax, or without file meta information the encoding the dataset was read with."""
    uid = importlib.import_module("pydicom.uid")
    declared = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if declared:
        return declared
    implicit, little = getattr(dataset, "original_encoding", (None, None))
    if little is False:
        return uid.ExplicitVRBigEndian
    return uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian


def _codestream_size(frame: bytes) -> tuple[int, int] | None:
    """Return (rows, columns) from a JPEG 2000 SIZ, JPEG SOF or JPEG-LS SOF marker; None for others, such as RLE."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start >= 0:
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        return bottom - top, right - left
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">HH", frame, at + 5)
        else:
            at += 2 + struct.unpack_from(">H", frame, at + 2)[0]
    return None


def _decode_jpeg_12bit(dataset: Any, frame: int, total: int, request: ReadRequest) -> np.ndarray:
    """Decode a frame of 12-bit JPEG Extended with GDCM, which pydicom does not use here: it requires a GPL decoder."""
    gdcm = request.import_decoder("gdcm", "python-gdcm")
    encaps = importlib.import_module("pydicom.encaps")
    rows, columns, bits = int(dataset.Rows), int(dataset.Columns), int(dataset.BitsStored)
    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(encaps.get_frame(dataset.PixelData, frame, number_of_frames=total))
    fragments.AddFragment(fragment)
    element, image = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010)), gdcm.Image()
    element.SetValue(fragments.__ref__())
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, bits, bits - 1, int(dataset.PixelRepresentation)))
    data = image.GetBuffer().encode("utf-8", "surrogateescape")  # GDCM returns bytes as text
    return np.frombuffer(data, "<i2" if dataset.PixelRepresentation else "<u2").reshape(rows, columns)


# --------------------------------------------------------------------------------------------- what the header declares


def is_hounsfield(frame: Frame) -> bool:
    """Return whether values are HU: declared, or CT with a rescale of unspecified type ("US" in DICOM)."""
    kind = str(frame.values.get("RescaleType") or "").strip().upper()
    is_ct = str(frame.dataset.get("SOPClassUID", "")) in CT_STORAGE and "RescaleSlope" in frame.values
    return kind == "HU" or (is_ct and kind in ("", "US"))


def _is_plain_8_bit(frame: Frame) -> bool:
    """Return whether pixels are 8-bit unsigned without a rescale, so that they read as the same image in PNG does."""
    elements = (frame.dataset.get(key) for key in ("BitsAllocated", "BitsStored", "PixelRepresentation"))
    return tuple(elements) == (8, 8, 0) and _rescale(frame.values) == (1.0, 0.0)


def _rescale(item: Any) -> tuple[float, float] | None:
    """Return (slope, intercept), or None if a modality LUT replaces them."""
    if item.get("ModalityLUTSequence"):
        return None
    slope, intercept = read_numbers(item, "RescaleSlope", 1), read_numbers(item, "RescaleIntercept", 1)
    return slope[0] if slope else 1.0, intercept[0] if intercept else 0.0


def _apply_modality_lut(values: np.ndarray, item: Any) -> None:
    """Transform stored to measured values (PS3.3 C.11.1), in place."""
    rescale = _rescale(item)
    if rescale is None:
        values[...] = importlib.import_module("pydicom.pixels").apply_modality_lut(values.astype(np.int32), item)
    elif rescale != (1.0, 0.0):
        values *= np.float32(rescale[0])
        values += np.float32(rescale[1])


def _voi_window(item: Any) -> tuple[float, float, str] | str | None:
    """Return the first window (centre, width, function), "lut" if there is a VOI LUT instead, or None if neither is."""
    if item.get("VOILUTSequence"):
        return "lut"
    centre, width = read_numbers(item, "WindowCenter", 1), read_numbers(item, "WindowWidth", 1)
    if centre is None or width is None:
        return None
    function = str(item.get("VOILUTFunction") or "LINEAR").upper()
    valid = width[0] >= 1 if function == "LINEAR" else width[0] > 0
    return (centre[0], width[0], function) if valid else None


def _apply_window(values: np.ndarray, item: Any) -> None:
    """Transform measured values to [0, 1] with the window or VOI LUT of the image (PS3.3 C.11.2), in place."""
    window = _voi_window(item)
    if not isinstance(window, tuple):
        values[...] = importlib.import_module("pydicom.pixels").apply_voi(np.rint(values).astype(np.int32), item)
        values /= 2.0 ** int(item.VOILUTSequence[0].LUTDescriptor[2]) - 1
        return
    centre, width, function = window
    if function == "SIGMOID":
        np.exp((values - centre) * np.float32(-4 / width), out=values)
        np.divide(1.0, 1.0 + values, out=values)
        return
    if function == "LINEAR":  # the standard shifts it by half a value
        centre, width = centre - 0.5, max(width - 1, 1e-6)
    values -= np.float32(centre)
    values *= np.float32(1 / width)
    values += np.float32(0.5)
    np.clip(values, 0, 1, out=values)


def _padding_mask(pixels: np.ndarray, dataset: Any) -> np.ndarray | None:
    """Return the mask of pixels that were not measured (PS3.3 C.7.5.1.1.2), or None if no padding value is declared."""
    low = read_numbers(dataset, "PixelPaddingValue", 1)
    if low is None:
        return None
    high = read_numbers(dataset, "PixelPaddingRangeLimit", 1) or low
    return (pixels >= min(low[0], high[0])) & (pixels <= max(low[0], high[0]))
