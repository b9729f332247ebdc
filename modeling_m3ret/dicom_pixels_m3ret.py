"""Decode the pixels of DICOM frames and scale them as their headers declare.

Handles pixel data, modality and VOI LUTs, windows, padding, palettes and photometric interpretation (DICOM PS3.3,
sections C.7.6.3, C.7.9 and C.11). This file is copied into every checkpoint and imports only NumPy; pydicom and GDCM
are imported when a file needs them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .dicom_codestreams_m3ret import Codestream, check_codestreams, check_frame_size
from .intensity_m3ret import ONE_GREY_LEVEL
from .scan_m3ret import Description, ReadRequest, spacing_of_aspect


CT_STORAGE = tuple("1.2.840.10008.5.1.4.1.1.2" + tail for tail in ("", ".1", ".2"))  # CT, enhanced, legacy enhanced
PIXEL_KEYS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
RLE = "1.2.840.10008.1.2.5"
JPEG_BASELINE, JPEG_EXTENDED, JPEG_LOSSLESS = (f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 70))
PHOTOMETRIC = {  # by samples per pixel; HSV, ARGB, CMYK and YBR_PARTIAL are retired
    1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"),
}
THRESHOLD_WIDTH = 1e-3  # a window of at most this width is a threshold: no pixel lies inside it
CENTIMETRES, TWO_DIMENSIONAL = 3, 1  # physical units and spatial format of an ultrasound region
Transform = Callable[[np.ndarray], np.ndarray]


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
        return _read_colour(frames, request, description)
    return _read_grey(frames, is_volume, request, description)


def in_plane_spacing(dataset: Any, description: Description) -> tuple[float | None, float | None]:
    """Return the spacing between rows and columns in mm of an image without `PixelSpacing`.

    It is that of the scanned film or of the ultrasound regions, if all of them agree. If only the ratio of a pixel's
    height to its width is known, it is returned as `spacing_of_aspect` documents.
    """
    sides = read_pair(dataset, "NominalScannedPixelSpacing")
    if sides is None and dataset.get("SequenceOfUltrasoundRegions"):
        regions = {_region_spacing(region) for region in dataset.SequenceOfUltrasoundRegions} - {None}
        sides = regions.pop() if len(regions) == 1 else None
    if sides is not None:
        return sides
    vertical, horizontal = read_pair(dataset, "PixelAspectRatio") or (1.0, 1.0)
    return spacing_of_aspect(vertical / horizontal, description)[1:]


def _region_spacing(region: Any) -> tuple[float, float] | None:
    """Return the mm between rows and columns of an ultrasound region, None if its axes are not both distances."""
    units = [region.get(f"PhysicalUnits{axis}Direction") for axis in "XY"]
    across, down = (read_numbers(region, f"PhysicalDelta{axis}", 1) for axis in "XY")
    is_image = units == [CENTIMETRES] * 2 and region.get("RegionSpatialFormat", TWO_DIMENSIONAL) == TWO_DIMENSIONAL
    if not (is_image and across and down and across[0] and down[0]):
        return None
    return round(abs(down[0]) * 10, 6), round(abs(across[0]) * 10, 6)


def read_pair(dataset: Any, keyword: str) -> tuple[float, float] | None:
    """Return the two numbers of an element, or None if it is missing or one of them is not positive."""
    pair = read_numbers(dataset, keyword, 2)
    return (pair[0], pair[1]) if pair and min(pair) > 0 else None


def read_numbers(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """Return the first `count` numbers of an element, or None if it is absent, shorter or not finite."""
    value = dataset.get(keyword)
    is_multiple = isinstance(value, (tuple, MutableSequence))  # pydicom's MultiValue is a MutableSequence
    try:
        numbers = tuple(float(number) for number in (value if is_multiple else [value]))[:count]
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _read_colour(frames: Sequence[Frame], request: ReadRequest, description: Description) -> Pixels:
    head = frames[0].dataset
    has_palette = _photometric(head) == "PALETTE COLOR"
    depth = int(head.get("BitsStored") or 0)
    dtype = np.dtype(np.uint8 if depth == 8 or has_palette else np.float32)
    array = _allocate(frames, 3, dtype, request)
    colours_of: tuple[Any, Any] = (None, None)  # dataset, and its palette
    for index, frame, words, precision in _decode(frames, request, description):
        pixels, bits = _used_bits(words, frame.dataset, precision)
        if has_palette:
            if colours_of[0] is not frame.dataset:
                colours_of = frame.dataset, _read_palette(frame.dataset, request)
            pixels = np.stack([_look_up(pixels, first, colour) for first, colour in colours_of[1]], axis=-1)
        elif bits != depth or frame.dataset.get("PixelRepresentation"):
            expected = f"unsigned colour of {depth} bits, as the header declares"
            raise request.error("unsupported", expected, "signed samples or another depth")
        array[:, index] = pixels.transpose(2, 0, 1)
    if dtype != np.uint8:
        array /= 2.0**depth - 1
    return Pixels(array, "8-bit" if dtype == np.uint8 else "bit depth")


def _read_grey(frames: Sequence[Frame], is_volume: bool, request: ReadRequest, description: Description) -> Pixels:
    # A window describes the display of one image. It often differs between slices, and NIfTI has none: a volume must
    # not depend on it.
    windows = [] if is_volume else _per_item(frames, lambda frame: (frame.window, frame.values), _voi_transform)
    rule = "percentiles"
    if request.intensity in ("hounsfield", "percentiles"):  # the caller overrides the header, and no window applies
        rule = request.intensity
    elif all(is_hounsfield(frame) for frame in frames):
        rule = "hounsfield"
    elif windows and None not in windows:
        rule = "window"
    elif all(_is_plain_8_bit(frame) for frame in frames):
        rule = "8-bit"
    modality_luts = _per_item(frames, lambda frame: (frame.values,), lambda frame: _modality_transform(frame, request))
    array = _allocate(frames, 1, np.dtype(np.uint8 if rule == "8-bit" else np.float32), request)
    padding: np.ndarray | None = None
    for index, frame, words, precision in _decode(frames, request, description):
        pixels, bits = _used_bits(words, frame.dataset, precision)
        if rule == "8-bit" and bits > 8:
            raise request.error("damaged", "pixels of 8 bits, as the header declares", f"a codestream of {bits}")
        if bits != frame.dataset.get("BitsStored") and precision is not None:
            description["codestream_bits"] = bits
        mask = _padding_mask(words, pixels, bits, frame.dataset)
        if mask is not None:
            padding = np.zeros(array.shape, bool) if padding is None else padding
            padding[0, index] = mask
            pixels = np.where(np.isnan(pixels), 0, pixels) if pixels.dtype.kind == "f" else pixels
        transform = modality_luts[index]
        array[0, index] = pixels if transform is None else transform(pixels)
    if rule == "window" and not _apply_windows(array[0], padding, windows):
        rule = "percentiles"
        description["window"] = "ignored, as it leaves one grey level"
    elif rule == "window":
        description.update(_describe_voi(frames[0]))
    # Display polarity does not change the sign of a physical unit.
    head = frames[0].dataset
    is_inverse = _photometric(head) == "MONOCHROME1" or _word(head, "PresentationLUTShape") == "INVERSE"
    description["inverted"] = is_inverse and rule != "hounsfield"
    return Pixels(array, rule, padding, description["inverted"])


def _per_item(frames: Sequence[Frame], items: Callable[[Frame], tuple[Any, ...]], make: Callable[[Frame], Any]) -> Any:
    """Return `make(frame)` for all frames, computed once for frames that share these items of the header."""
    made: dict[tuple[int, ...], Any] = {}
    keys = [tuple(map(id, items(frame))) for frame in frames]
    for key, frame in zip(keys, frames, strict=True):
        if key not in made:
            made[key] = make(frame)
    return [made[key] for key in keys]


def _allocate(frames: Sequence[Frame], channels: int, dtype: np.dtype, request: ReadRequest) -> np.ndarray:
    shape = (channels, len(frames), int(frames[0].dataset.Rows), int(frames[0].dataset.Columns))
    request.check_size(shape, dtype.itemsize)
    return np.empty(shape, dtype)


def _word(dataset: Any, keyword: str) -> str:
    return str(dataset.get(keyword) or "").strip().upper()


def _photometric(dataset: Any) -> str:
    return _word(dataset, "PhotometricInterpretation")


# ------------------------------------------------------------------------------------------------------------- decoding


def _decode(
    frames: Sequence[Frame], request: ReadRequest, description: Description
) -> Iterator[tuple[int, Frame, np.ndarray, int | None]]:
    """Yield (index in `frames`, frame, words, bits per sample of the codestream), file by file.

    Words are `(H, W)` or `(H, W, 3)` RGB. Those of uncompressed pixels still hold their unused bits.
    """
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
            decoded, codestreams = decode_frames(dataset, numbers, file_request)
            for index, number, words in zip(indices, numbers, decoded, strict=True):
                check_frame_size(words.shape[:2], size, file_request)
                bits, is_signed = codestreams[number][2:4] if codestreams else (None, None)
                if is_signed is not None and is_signed != bool(dataset.PixelRepresentation):
                    description["codestream_sign"] = "differs from the header"
                    if is_signed and bits and (words >> (bits - 1)).any():  # pydicom, GDCM and the codestream disagree
                        expected = "a codestream without negative samples, as the header declares"
                        raise file_request.error("damaged", expected, "negative samples")
                yield index, frames[index], words, bits


def decode_frames(
    dataset: Any, frames: list[int], request: ReadRequest
) -> tuple[Iterable[np.ndarray], list[Codestream]]:
    """Decode frames of one dataset, given in ascending order. Also return the headers of all its codestreams."""
    syntax, total = transfer_syntax(dataset), int(dataset.get("NumberOfFrames") or 1)
    _check_pixel_description(dataset, syntax, request)
    options: dict[str, Any] = {"correct_unused_bits": False, "allow_excess_frames": False}
    codestreams: list[Codestream] = []
    if syntax.is_encapsulated:
        codestreams = check_codestreams(dataset, syntax, total, request)
        options["planar_configuration"] = 0  # decoders return interleaved samples, whatever the header declares
    else:
        _check_length(dataset, total, request)
    bits = max((codestream.bits or 0 for codestream in codestreams), default=0)
    if bits:  # decoders return whole words, and GDCM aborts the process if a word of 8 bits has unused ones
        size = 8 if bits <= 8 else 16 if bits <= 16 else 32
        options |= {"bits_stored": size, "bits_allocated": size}
    if syntax == JPEG_EXTENDED and bits > 8:
        # For 12 bits pydicom uses a GPL decoder only. GDCM decodes the frames if lossless JPEG is declared instead.
        syntax = JPEG_LOSSLESS
        relabelled = dataset.group_dataset(0x0028)
        relabelled.update(dataset.group_dataset(0x7FE0))
        relabelled.file_meta = type(dataset.file_meta)()
        relabelled.file_meta.TransferSyntaxUID, dataset = syntax, relabelled
    try:
        decoder = importlib.import_module("pydicom.pixels").get_decoder(syntax)
    except NotImplementedError as error:
        raise request.error("unsupported", "a transfer syntax that pydicom decodes", "another one") from error
    if not decoder.is_available:
        advice = "Run `pip install pylibjpeg pylibjpeg-openjpeg python-gdcm`, or decompress the file."
        raise request.error("no_decoder", "a decoder of the file's transfer syntax", "none", advice)
    # Pillow's libjpeg-turbo is four times faster than GDCM; for other syntaxes pydicom's default order is faster.
    is_pillow = syntax in (JPEG_BASELINE, JPEG_EXTENDED) and "pillow" in decoder.available_plugins
    plugin = "pillow" if is_pillow else ""
    options["raw"] = is_pillow and codestreams[0].is_converted  # pydicom would convert from YCbCr a second time
    if any(codestream.is_converted != codestreams[0].is_converted for codestream in codestreams):
        raise request.error("unsupported", "frames of one colour transform", "frames of several")
    if len(frames) == total:  # all frames: one pass over the fragments
        pixels = decoder.as_array(dataset, decoding_plugin=plugin, **options)[0]
        return pixels if total > 1 else [pixels], codestreams
    single = (decoder.as_array(dataset, index=frame, decoding_plugin=plugin, **options)[0] for frame in frames)
    return single, codestreams


def _check_pixel_description(dataset: Any, syntax: Any, request: ReadRequest) -> None:
    """Refuse pixels that the standard does not define (PS3.3 C.7.6.3), or that pydicom decodes without a conversion."""
    if "PixelData" not in dataset:
        return
    keys = ["BitsAllocated", "BitsStored", "PixelRepresentation", "PhotometricInterpretation"]
    if dataset.get("SamplesPerPixel") == 3 and not syntax.is_encapsulated:
        keys.append("PlanarConfiguration")
    missing = [key for key in keys if dataset.get(key) in (None, "")]
    if missing:
        raise request.error("damaged", "an image with " + ", ".join(keys), "one without " + ", ".join(missing))
    photometric, samples = _photometric(dataset), int(dataset.get("SamplesPerPixel") or 1)
    if photometric not in PHOTOMETRIC.get(samples, ()):
        expected = " or ".join(f"{', '.join(names)} with {count} sample(s)" for count, names in PHOTOMETRIC.items())
        raise request.error("unsupported", expected, f"another kind of pixels with {samples} sample(s)")
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if allocated not in (1, 8, 16, 32, 64):
        raise request.error("unsupported", "words of 1, 8, 16, 32 or 64 bits", f"BitsAllocated {allocated}")
    if allocated == 1 and not syntax.is_little_endian and dataset["PixelData"].VR == "OW":
        raise request.error("unsupported", "big-endian pixels of 1 bit as bytes", "pixels as words")
    in_words = not syntax.is_encapsulated or syntax == RLE
    high = int(dataset.get("HighBit") or stored - 1) if in_words else stored - 1
    if not 1 <= stored <= high + 1 <= allocated:
        got = f"BitsStored {stored} and HighBit {high}"
        raise request.error("damaged", f"bits within BitsAllocated {allocated}", got)
    if photometric.startswith("YBR"):
        subsampled_rows = photometric == "YBR_FULL_422" and in_words and int(dataset.Columns) % 2
        if (in_words and (photometric[4:] in ("ICT", "RCT") or (stored, allocated) != (8, 8))) or subsampled_rows:
            expected = "uncompressed YBR_FULL, or YBR_FULL_422 with even Columns, of 8 bits"
            raise request.error("unsupported", expected, "other YBR pixels")


def _check_length(dataset: Any, total: int, request: ReadRequest) -> None:
    """Refuse uncompressed pixels that are too short, or long enough for another frame."""
    keyword = next(key for key in PIXEL_KEYS if key in dataset)
    bits = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(keyword) or int(dataset.BitsAllocated)
    is_subsampled = _photometric(dataset) == "YBR_FULL_422"
    bits *= int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("SamplesPerPixel") or 1)
    bits = bits * 2 // 3 if is_subsampled else bits
    size, actual = -(-bits * total // 8), len(dataset[keyword].value)
    if not size <= actual < size + size % 2 + max(1, bits // (16 if is_subsampled else 8)):
        raise request.error("damaged", f"{size:,} bytes of pixels, as the header declares", f"{actual:,}")


def transfer_syntax(dataset: Any) -> Any:
    """Return the declared transfer syntax, or without file meta information the encoding the dataset was read with."""
    uid = importlib.import_module("pydicom.uid")
    declared = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if declared:
        return declared
    implicit, little = getattr(dataset, "original_encoding", (None, None))
    if little is False:
        return uid.ExplicitVRBigEndian
    return uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian


# --------------------------------------------------------------------------------------------- what the header declares


def _used_bits(words: np.ndarray, dataset: Any, precision: int | None) -> tuple[np.ndarray, int]:
    """Return pixel values without the unused bits of their words (PS3.5 8.1.1), and their number of bits.

    Samples of a codestream fill the low bits, whatever HighBit is, unless whole words were compressed. If their depth
    differs from the header's, that of the codestream is used (PS3.5 8.2).
    """
    if words.dtype.kind == "f" or int(dataset.BitsAllocated) == 1:
        return words, 1
    bits, size = int(dataset.BitsStored), 8 * words.dtype.itemsize
    high = int(dataset.get("HighBit") or bits - 1)
    if precision is not None:
        unsigned = words.astype(f"u{words.dtype.itemsize}")
        if not bits <= high < precision or (unsigned & (2 ** (high + 1 - bits) - 1)).any():
            shift = max(0, size - bits)
            is_sign_extended = bool(((words << shift) >> shift == words).all())
            if precision < bits or not (is_sign_extended or not (unsigned >> bits).any()):
                bits = precision
            high = bits - 1
    if bits == size:
        return words, bits
    return (words << (size - 1 - high)) >> (size - bits), bits


def is_hounsfield(frame: Frame) -> bool:
    """Return whether values are HU: declared, or CT with a rescale of unspecified type ("US" in DICOM)."""
    lut = frame.values.get("ModalityLUTSequence")
    kind = _word(lut[0], "ModalityLUTType") if lut else _word(frame.values, "RescaleType")
    has_rescale = not lut and ("RescaleSlope" in frame.values or "RescaleIntercept" in frame.values)
    is_ct = str(frame.dataset.get("SOPClassUID", "")) in CT_STORAGE and has_rescale
    # HU_MOD: Hounsfield units in which some materials were replaced
    return kind in ("HU", "HU_MOD") or kind.startswith("HOUNSFIELD") or (is_ct and kind in ("", "US"))


def _is_plain_8_bit(frame: Frame) -> bool:
    """Return whether pixels are 8-bit unsigned without a rescale, so that the same image in PNG has equal values."""
    elements = (frame.dataset.get(key) for key in ("BitsAllocated", "BitsStored", "PixelRepresentation"))
    return tuple(elements) == (8, 8, 0) and _rescale(frame.values) == (1.0, 0.0)


def _rescale(item: Any) -> tuple[float, float] | None:
    """Return (slope, intercept), or None if a modality LUT replaces them."""
    if item.get("ModalityLUTSequence"):
        return None
    slope, intercept = read_numbers(item, "RescaleSlope", 1), read_numbers(item, "RescaleIntercept", 1)
    return slope[0] if slope else 1.0, intercept[0] if intercept else 0.0


def _modality_transform(frame: Frame, request: ReadRequest) -> Transform | None:
    """Return the function from stored to measured values (PS3.3 C.11.1), or None if they are equal."""
    for keyword in ("RescaleSlope", "RescaleIntercept"):
        if frame.values.get(keyword) is not None and read_numbers(frame.values, keyword, 1) is None:
            raise request.error("damaged", f"a finite {keyword}", "another value")
    rescale = _rescale(frame.values)
    if rescale is None:
        table = _read_lut(frame.values.ModalityLUTSequence[0], "LUT", frame.dataset, _stored_range(frame.dataset))
        if table is None:
            raise request.error("damaged", "a modality LUT", "one without entries or with an invalid descriptor")
        first, entries, _ = table
        return lambda values: _look_up(values, first, entries)
    slope, intercept = rescale

    def apply(values: np.ndarray) -> np.ndarray:
        if slope == 0 and values.any():  # slices of PET without counts have slope 0
            raise request.error("unsupported", "a rescale slope other than 0", "0, which removes all values")
        return values.astype(np.float64) * slope + intercept  # in float32, large values would cancel

    return None if rescale == (1.0, 0.0) else apply


def _stored_range(dataset: Any) -> tuple[float, float]:
    """Return the lowest and the highest value that the header declares for pixels."""
    bits = int(dataset.get("BitsStored") or dataset.get("BitsAllocated") or 16)
    lowest = -(2.0 ** (bits - 1)) if dataset.get("PixelRepresentation") else 0.0
    return lowest, lowest + 2.0**bits - 1


def _measured_range(frame: Frame) -> tuple[float, float]:
    """Return the lowest and the highest value that a rescale or modality LUT can give."""
    slope, intercept = _rescale(frame.values) or (0.0, 0.0)
    ends = [edge * slope + intercept for edge in _stored_range(frame.dataset)]
    return (min(ends), max(ends)) if _rescale(frame.values) else (0.0, 2.0**16 - 1)


def _read_descriptor(item: Any, name: str, values: tuple[float, float]) -> tuple[int, int, int] | None:
    """Return the number of entries, the first mapped value and the bits per entry of a LUT, or None if it has none.

    The VR of the first mapped value is often wrong, so `values`, the lowest and the highest value that the LUT can be
    applied to, decide whether it is negative.
    """
    descriptor = read_numbers(item, f"{name}Descriptor", 3)
    if descriptor is None:
        return None
    count, first, bits = int(descriptor[0]) % 2**16 or 2**16, int(descriptor[1]) % 2**16, int(descriptor[2])
    negative = first - 2**16
    may_be_negative = values[0] < 0 or first > values[1] or first + count > 2**16
    if first >= 2**15 and may_be_negative and negative + count > values[0]:
        first = negative
    return count, first, bits


def _read_lut(item: Any, name: str, dataset: Any, values: tuple[float, float]) -> tuple[int, np.ndarray, int] | None:
    """Return the first mapped value, the entries and the declared bits of a LUT, or None if it is invalid.

    Args:
        item: dataset with the descriptor and the data.
        name: keyword of both, without "Descriptor" and "Data".
        dataset: dataset of the image.
        values: lowest and highest value that the LUT can be applied to.
    """
    descriptor, data = _read_descriptor(item, name, values), item.get(f"{name}Data")
    if descriptor is None or data is None or (hasattr(data, "__len__") and not len(data)):
        return None
    count, first, bits = descriptor
    if isinstance(data, bytes):  # OW, or UN
        is_little = transfer_syntax(dataset).is_little_endian
        words = np.frombuffer(data + b"\0" * (len(data) % 2), "<u2" if is_little else ">u2").astype("<u2")
    else:
        words = np.atleast_1d(np.asarray(data, np.int64)).astype("<u2")
    packed = words.view(np.uint8)  # entries of 8 bits may be packed in pairs
    is_packed = len(words) < count and (bits <= 8 or len(packed) in (count, count + 1))
    return first, (packed if is_packed else words)[:count], bits


def _look_up(values: np.ndarray, first: int, entries: np.ndarray) -> np.ndarray:
    """Return the entries of values. Values outside the table have its first or last entry."""
    return entries[np.clip(np.rint(values).astype(np.int64) - first, 0, len(entries) - 1)]


def _read_palette(dataset: Any, request: ReadRequest) -> list[tuple[int, np.ndarray]]:
    """Return (first mapped value, 8-bit entries) of red, green and blue."""
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    tables = [_read_lut(dataset, name, dataset, _stored_range(dataset)) for name in names]
    colours = [(table[0], table[1]) for table in tables if table is not None]
    descriptor = _read_descriptor(dataset, names[0], _stored_range(dataset))
    if descriptor and all(dataset.get(f"Segmented{name}Data") for name in names):
        count, first, bits = descriptor
        if count > 2**bits:  # pydicom computes indices in the data type of the entries, which would overflow
            raise request.error("unsupported", "a segmented palette of 16 bits or 256 entries", "a larger one")
        mapped = np.arange(count) + int(dataset[f"{names[0]}Descriptor"].value[1])
        palette = importlib.import_module("pydicom.pixels").apply_color_lut(mapped, dataset)
        colours = [(first, palette[:, channel]) for channel in range(3)]
    if len(colours) < 3:
        raise request.error("unsupported", "a palette of red, green and blue in the file", "an incomplete palette")
    has_16_bits = max(int(entries.max()) for _, entries in colours) > 255  # tables of 16 bits may hold 8-bit colours
    return [(first, (entries >> (8 if has_16_bits else 0)).astype(np.uint8)) for first, entries in colours]


def _voi_transform(frame: Frame) -> Transform | None:
    """Return the function from measured values to [0, 1] (PS3.3 C.11.2), or None if none is valid.

    A VOI LUT takes precedence over a window, and the first of several is used.
    """
    item, table = frame.window, _read_voi_lut(frame)
    if table is not None:
        first, entries, _ = table
        # The depth follows from the entries, because the declared one may be wrong.
        scaled = (entries / (2.0 ** int(entries.max()).bit_length() - 1 or 1)).astype(np.float32)
        return lambda values: _look_up(values, first, scaled)
    centres, widths = read_numbers(item, "WindowCenter", 1), read_numbers(item, "WindowWidth", 1)
    function = _word(item, "VOILUTFunction") or "LINEAR"
    if centres is None or widths is None or function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        return None
    centre, width = centres[0], widths[0]
    if function == "LINEAR":  # PS3.3 C.11.2.1.2.1
        centre, width = centre - 0.5, width - 1
    if width < 0 or (width == 0 and function != "LINEAR"):
        return None
    if width <= THRESHOLD_WIDTH:
        return lambda values: values > centre
    if function == "SIGMOID":
        return lambda values: 1 / (1 + np.exp((values - centre) * (-4 / width)))
    return lambda values: np.clip((values - centre) / width + 0.5, 0, 1)


def _read_voi_lut(frame: Frame) -> tuple[int, np.ndarray, int] | None:
    luts = frame.window.get("VOILUTSequence")
    return _read_lut(luts[0], "LUT", frame.dataset, _measured_range(frame)) if luts else None


def _describe_voi(frame: Frame) -> Description:
    """Return how many windows or VOI LUTs an image declares, and the depth of the entries if its header is wrong."""
    table = _read_voi_lut(frame)
    if table is None:
        widths = frame.window.get("WindowWidth")
        count = len(widths) if isinstance(widths, (tuple, MutableSequence)) else 1
        return {"windows": count} if count > 1 else {}
    bits, count = int(table[1].max()).bit_length(), len(frame.window.VOILUTSequence)
    wrong_depth = {"voi_lut_bits": bits} if bits != table[2] else {}
    return wrong_depth | ({"voi_luts": count} if count > 1 else {})


def _apply_windows(values: np.ndarray, padding: np.ndarray | None, windows: list[Transform]) -> bool:
    """Apply the window of each frame in place. Return False, and change nothing, if one grey level would be left."""

    def has_contrast(index: int) -> bool:
        seen = windows[index](values[index])
        seen = seen if padding is None else seen[~padding[0, index]]
        return seen.size > 0 and float(seen.max()) - float(seen.min()) >= ONE_GREY_LEVEL

    if not any(has_contrast(index) for index in range(len(windows))):
        return False
    for index, window in enumerate(windows):
        values[index] = window(values[index])
    return True


def _padding_mask(words: np.ndarray, pixels: np.ndarray, bits: int, dataset: Any) -> np.ndarray | None:
    """Return the mask of pixels that were not measured (PS3.3 C.7.5.1.1.2), or None if there are none.

    The VR of a padding value, which sets its sign, is often wrong, so only the bits that a pixel stores are compared.
    """
    is_float = pixels.dtype.kind == "f"
    prefix = ("Float" if pixels.dtype.itemsize == 4 else "DoubleFloat") if is_float else ""
    low = read_numbers(dataset, f"{prefix}PixelPaddingValue", 1)
    high = read_numbers(dataset, f"{prefix}PixelPaddingRangeLimit", 1) or low
    if is_float:
        mask = np.isnan(pixels)
        mask |= (pixels >= min(low, high)[0]) & (pixels <= max(low, high)[0]) if low and high else False
        return mask if mask.any() else None
    if low is None or high is None:
        return None
    size, is_signed = min(bits, 16), bool(dataset.get("PixelRepresentation"))
    half, limits = 2 ** (size - 1), [int(low[0]) % 2**16, int(high[0]) % 2**16]
    ends = [(limit + half) % 2**size - half if is_signed else limit % 2**size for limit in limits]
    if not all(limit < 2 * half or (is_signed and limit >= 2**16 - half) for limit in limits):
        # Pixels do not store all its bits: their words may, or it is an end of their range, such as -1 for 4095.
        words = words.astype(np.uint16)
        mask = (words >= min(limits)) & (words <= max(limits))
        if mask.any():
            return mask
        if not set(ends) <= ({-half, half - 1} if is_signed else {0, 2 * half - 1}):
            return None
    return (pixels >= min(ends)) & (pixels <= max(ends))
