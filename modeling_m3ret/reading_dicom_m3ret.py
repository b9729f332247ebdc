"""Read DICOM files as one scan.

A single image, a cine or a whole series becomes one `Scan`: frames are sorted by their positions, decoded, and scaled
to the values that their headers declare (DICOM PS3.3, sections C.7.6 and C.11). Nothing is decoded before the header
has passed the limits. This file travels inside every checkpoint and imports only NumPy; pydicom is imported when a file
needs it.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, MutableSequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .intensity_m3ret import to_unit_range
from .scan_m3ret import (
    AnyScan,
    Description,
    ReadRequest,
    Spacing,
    display_name,
    sniff,
    to_canonical_orientation,
)


CT_STORAGE = tuple("1.2.840.10008.5.1.4.1.1.2" + tail for tail in ("", ".1", ".2"))  # CT, enhanced, legacy enhanced
Step = np.ndarray | None  # (3,): from a plane to the next in LPS mm; None for planes that are no volume
PIXEL_KEYS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
DEFLATED, JPEG_BASELINE, JPEG_EXTENDED = ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")


def read_folder(folder: Path, request: ReadRequest) -> AnyScan:
    """Read a folder that contains one DICOM series. Other files are ignored and counted."""
    files: list[Path] = []
    for root, _, names in os.walk(folder):
        files += [Path(root, name) for name in names]
        _check_file_count(len(files), request)
    dicom = [path for path in sorted(files) if path.is_file() and sniff(path) == "dicom"]
    if not dicom:
        raise request.error("unsupported", "a folder with a DICOM series", f"{len(files)} files, none of them DICOM")
    request.check_size((sum(path.stat().st_size for path in dicom),), 1)
    return read_series(dicom, request, {"files_ignored": len(files) - len(dicom)})


def read_series(sources: list[Any], request: ReadRequest, description: Description) -> AnyScan:
    """Read DICOM files or pydicom datasets of one series: an image, a cine or a volume.

    Args:
        sources: paths, bytes or datasets, in any order.
        request: the read request.
        description: becomes the description of the scan.
    """
    planes = _collect_planes(sources, request, description)
    burned_in = str(planes[0].dataset.get("BurnedInAnnotation", "")).lower()
    description["burned_in_annotation"] = burned_in if burned_in in ("yes", "no") else "unknown"
    description["format"] = "dicom"
    if len(planes) > 1:
        description["format"] = "dicom multi-frame" if len(sources) == 1 else "dicom series"
        group = _largest_parallel_group(planes)
        description["slices_left_out"], planes = len(planes) - len(group), group
    have_positions = all(p.position is not None and p.orientation is not None and p.spacing[0] for p in planes)
    # Frames of one file at one position follow each other in time, not in space.
    if have_positions and (len(sources) > 1 or len({str(plane.position) for plane in planes}) > 1):
        planes, step = _sort_by_position(planes, description)
        return _make_scan(planes, step, request, description)
    if len(planes) > 1:
        planes = sorted(planes, key=lambda plane: (plane.number, plane.frame))
        if len(sources) > 1:
            description["order"] = "InstanceNumber (no positions)"
        if not all(_is_hounsfield(plane) for plane in planes):  # may be a clip, whereas values in HU are a volume
            planes = [planes[index] for index in request.select_frames(len(planes), description)]
    return _make_scan(planes, None, request, description)


def _check_file_count(count: int, request: ReadRequest) -> None:
    if count > (limit := request.limits.max_files):
        advice = "Pass a folder with one DICOM series, or raise `ReadLimits.max_files`."
        raise request.error("too_large", f"at most {limit:,} files", f"{count:,} or more", advice)


def _collect_planes(sources: list[Any], request: ReadRequest, description: Description) -> list[_Plane]:
    """Return all frames of all sources, after checking that they are of one series."""
    if not sources:
        raise request.error("unsupported", "a DICOM series", "an empty list")
    _check_file_count(len(sources), request)
    planes: list[_Plane] = []
    for source in sources:
        name = f"{request.name}/{display_name(source)}" if len(sources) > 1 else request.name
        file_request = replace(request, name=name)
        with file_request.translate_errors():
            dataset = _parse_dataset(source, file_request)
            if any(key in dataset for key in PIXEL_KEYS):
                planes += _split_into_planes(dataset, len(planes), file_request)
            elif "files_ignored" in description:  # DICOMDIR, report or structure set in a folder
                description["files_ignored"] += 1
            else:
                raise file_request.error("undecodable", "an image, a cine or a series", "DICOM without pixel data")
    if not planes:
        raise request.error("unsupported", "a DICOM series", "no DICOM file with pixel data")
    series = len({str(plane.dataset.get("SeriesInstanceUID", "")) for plane in planes})
    if series > 1:
        advice = "Read one series at a time, as a list of its files."
        raise request.error("unsupported", "slices of one series", f"{series} series", advice)
    return planes


def _parse_dataset(source: Any, request: ReadRequest) -> Any:
    """Return a pydicom Dataset whose pixels are not decoded.

    pydicom inflates a deflated file without a limit, so it is inflated in chunks first to check its size.
    """
    if hasattr(source, "group_dataset"):
        return source
    if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise request.error("unsupported", "a DICOM file or dataset", f"an object of type {type(source).__name__}")
    file = Path(source) if isinstance(source, (str, os.PathLike)) else bytes(source)
    if isinstance(file, Path) and not file.is_file():
        raise request.error("not_found", "an existing DICOM file", "a path that does not exist")
    if sniff(file) != "dicom":
        raise request.error("unsupported", "a DICOM file", "a file of another format")
    stream = io.BytesIO(request.read_bytes(file) if isinstance(file, Path) else file)
    reader = request.import_decoder("pydicom.filereader", "pydicom")
    reader.read_preamble(stream, True)
    meta = reader.read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") == DEFLATED:
        compressed = stream.read()
        inflate, size, tail = zlib.decompressobj(-15), 0, compressed
        while tail and not inflate.eof:
            size += len(inflate.decompress(tail, 2**20))
            tail = inflate.unconsumed_tail
            request.check_size((max(size, 1),), 1)
            request.check_ratio(size, len(compressed))
    stream.seek(0)
    return reader.dcmread(stream, force=True)


# ----------------------------------------------------------------------------------------------- planes and their order


@dataclass(frozen=True, eq=False)
class _Plane:
    """One frame of one dataset, and its geometry (LPS, mm)."""

    name: str  # of the file, in messages
    dataset: Any
    frame: int
    number: int  # InstanceNumber, or the position in the input
    position: np.ndarray | None
    orientation: np.ndarray | None  # (2, 3): direction along a row, direction down a column
    spacing: tuple[float | None, float | None]  # between rows, between columns
    values: Any  # item with the rescale: a functional group of the frame, or the dataset itself
    window: Any  # item with the window or VOI LUT

    @property
    def normal(self) -> np.ndarray:
        return np.zeros(3) if self.orientation is None else np.cross(self.orientation[0], self.orientation[1])


def _split_into_planes(dataset: Any, number_if_absent: int, request: ReadRequest) -> list[_Plane]:
    """Return the frames of a dataset after checking its size. Enhanced objects declare the geometry of each frame."""
    rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel") or 1)
    frames = int(dataset.get("NumberOfFrames") or 1)
    request.check_pixels(rows, columns)
    request.check_size((min(frames, request.num_frames or frames), rows, columns, samples), 1)
    compressed_size = len(next(dataset[key].value for key in PIXEL_KEYS if key in dataset))
    request.check_ratio(frames * rows * columns * samples, compressed_size)
    instance = _read_numbers(dataset, "InstanceNumber", 1)
    number = int(instance[0]) if instance else number_if_absent
    per_frame, shared = (dataset.get(f"{kind}FunctionalGroupsSequence") or [] for kind in ("PerFrame", "Shared"))

    def item(frame: int, sequence: str) -> Any:
        groups = (*per_frame[frame : frame + 1], *shared[:1])
        return next((group[sequence][0] for group in groups if group.get(sequence)), dataset)

    planes = []
    for frame in range(frames):
        geometry, measures = item(frame, "PlanePositionSequence"), item(frame, "PixelMeasuresSequence")
        # A classic multi-frame image has a single position, which does not locate its frames.
        has_position = geometry is not dataset or frames == 1
        corner = _read_numbers(geometry, "ImagePositionPatient", 3) if has_position else None
        position = np.array(corner) if corner else None
        cosines = _read_numbers(item(frame, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
        orientation = np.array(cosines).reshape(2, 3) if cosines and any(cosines) else None
        mm = (_read_numbers(measures, key, 2) for key in ("PixelSpacing", "ImagerPixelSpacing"))
        spacing = next(((pair[0], pair[1]) for pair in mm if pair and min(pair) > 0), (None, None))
        values, window = item(frame, "PixelValueTransformationSequence"), item(frame, "FrameVOILUTSequence")
        planes.append(_Plane(request.name, dataset, frame, number, position, orientation, spacing, values, window))
    return planes


def _read_numbers(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """Return the first `count` numbers of an element, or None if it is absent, shorter or not finite."""
    value = dataset.get(keyword)
    is_multiple = isinstance(value, (tuple, MutableSequence))  # pydicom's MultiValue is a MutableSequence
    try:
        numbers = tuple(float(number) for number in (value if is_multiple else [value]))[:count]
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _largest_parallel_group(planes: list[_Plane]) -> list[_Plane]:
    """Return the largest group of parallel planes of one size (a localiser has three), on a tie the most axial one."""
    keys = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation")

    def are_parallel(a: _Plane, b: _Plane) -> bool:
        if a.spacing != b.spacing or any(a.dataset.get(key) != b.dataset.get(key) for key in keys):
            return False
        if a.orientation is None or b.orientation is None:
            return a.orientation is b.orientation
        return bool(np.abs(a.orientation - b.orientation).max() < 0.01)  # about half a degree

    groups: list[list[_Plane]] = []
    for plane in planes:
        group = next((group for group in groups if are_parallel(plane, group[0])), None)
        if group is None:
            groups.append(group := [])
        group.append(plane)
    return max(groups, key=lambda group: (len(group), *np.round(np.abs(group[0].normal[::-1]), 3)))


def _sort_by_position(planes: list[_Plane], description: Description) -> tuple[list[_Plane], Step]:
    """Return one plane per position, sorted along the normal, and the `(3,)` step in LPS mm, None for one plane."""
    normal = planes[0].normal
    heights = np.array([np.dot(plane.position, normal) for plane in planes])  # type: ignore[arg-type]
    order = sorted(range(len(planes)), key=lambda i: (round(float(heights[i]), 3), planes[i].number, planes[i].frame))
    heights = heights[order]
    is_first = np.concatenate(([True], np.diff(heights) > 0.01))  # positions closer than 10 µm are equal
    planes = [planes[i] for i, first in zip(order, is_first, strict=True) if first]
    description["slices"], description["duplicate_positions"] = len(planes), len(is_first) - len(planes)
    if len(planes) == 1:
        return planes, None
    positions = np.array([plane.position for plane in planes])
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    distance = float(np.median(gaps))
    line = (positions[-1] - positions[0]) / np.linalg.norm(positions[-1] - positions[0])
    cosine = float(line @ normal) / float(np.linalg.norm(normal))
    description["missing_slices"] = int((np.rint(gaps / distance) - 1).clip(0).sum())
    description["gantry_tilt_degrees"] = round(math.degrees(math.acos(min(1.0, cosine))), 1)
    return planes, line * distance


# ------------------------------------------------------------------------------------------ values of a volume or image


def _make_scan(planes: list[_Plane], step: Step, request: ReadRequest, description: Description) -> AnyScan:
    """Decode sorted planes and scale them to [0, 1]. With a step they are a volume, which is oriented as well."""
    head = planes[0].dataset
    is_colour = _photometric(head) == "PALETTE COLOR" or int(head.get("SamplesPerPixel") or 1) > 1
    make = _make_colour_scan if is_colour else _make_grey_scan
    return make(planes, step, request, description)


def _make_colour_scan(planes: list[_Plane], step: Step, request: ReadRequest, description: Description) -> AnyScan:
    head = planes[0].dataset
    has_palette = _photometric(head) == "PALETTE COLOR"
    bits = int(head.get("BitsStored") or head.get("BitsAllocated") or 32)
    dtype = np.dtype(np.uint8 if bits <= 8 or has_palette else np.float32)
    array = _allocate(planes, 3, dtype, request)
    for index, plane, pixels in _decode_planes(planes, request):
        pixels = _palette_colours(plane.dataset, pixels.dtype)[pixels] if has_palette else pixels
        array[:, index] = pixels[..., :3].transpose(2, 0, 1)
    if dtype != np.uint8:
        array /= 2.0**bits - 1
    view, spacing = _orient(array, planes[0], step, description)
    return to_unit_range(view, spacing, request, description, rule="8-bit" if dtype == np.uint8 else "bit depth")


def _make_grey_scan(planes: list[_Plane], step: Step, request: ReadRequest, description: Description) -> AnyScan:
    rule = _grey_intensity_rule(planes, is_volume=step is not None)
    array = _allocate(planes, 1, np.dtype(np.uint8 if rule == "8-bit" else np.float32), request)
    padding: np.ndarray | None = None
    for index, plane, pixels in _decode_planes(planes, request):
        mask = _padding_mask(pixels, plane.dataset)
        if mask is not None:
            padding = np.zeros(array.shape, bool) if padding is None else padding
            padding[0, index] = mask
        values = array[0, index]
        values[...] = pixels
        if rule != "8-bit":
            _apply_modality_lut(values, plane.values)
        if rule == "window":
            _apply_window(values, plane.window)
    # MONOCHROME1 is a matter of display, which does not change the sign of a physical unit.
    inverted = _photometric(planes[0].dataset) == "MONOCHROME1" and rule != "hounsfield"
    description["inverted"] = inverted
    view, spacing = _orient(array, planes[0], step, description)
    if padding is not None:
        padding, _ = _orient(padding, planes[0], step, description)
    return to_unit_range(view, spacing, request, description, rule=rule, padding=padding, inverted=inverted)


def _allocate(planes: list[_Plane], channels: int, dtype: np.dtype, request: ReadRequest) -> np.ndarray:
    shape = (channels, len(planes), int(planes[0].dataset.Rows), int(planes[0].dataset.Columns))
    request.check_size(shape, dtype.itemsize)
    return np.empty(shape, dtype)


def _grey_intensity_rule(planes: list[_Plane], is_volume: bool) -> str:
    """Return how stored values are scaled to [0, 1], as `rule` of `to_unit_range`."""
    if all(_is_hounsfield(plane) for plane in planes):
        return "hounsfield"
    # A window describes the display of one image. It often differs between slices, and NIfTI has none: a volume must
    # not depend on it.
    if not is_volume and all(_voi_window(plane.window) is not None for plane in planes):
        return "window"
    return "8-bit" if all(_is_plain_8_bit(plane) for plane in planes) else "percentiles"


def _orient(array: np.ndarray, plane: _Plane, step: Step, description: Description) -> tuple[np.ndarray, Spacing]:
    """Bring a volume to the canonical orientation and return its spacing. Without a step, keep the orientation."""
    if step is None:
        return array, (None, *plane.spacing)
    assert plane.orientation is not None
    down, along = plane.orientation[1] * plane.spacing[0], plane.orientation[0] * plane.spacing[1]
    lps_to_ras = np.array([[-1.0], [-1.0], [1.0]])
    return to_canonical_orientation(array, np.stack([step, down, along], axis=1) * lps_to_ras, description)


def _photometric(dataset: Any) -> str:
    return str(dataset.get("PhotometricInterpretation", "")).upper()


def _palette_colours(dataset: Any, dtype: np.dtype) -> np.ndarray:
    """Return the colour of every stored value, `(256 or 65536, 3)` uint8."""
    values = np.arange(2 ** (8 * dtype.itemsize), dtype=dtype)
    table = importlib.import_module("pydicom.pixels").apply_color_lut(values[None], dataset)[0]
    return (table >> (8 if table.max() > 255 else 0)).astype(np.uint8)  # 16-bit tables often hold 8-bit colours


# ------------------------------------------------------------------------------------------------------------- decoding


def _decode_planes(planes: list[_Plane], request: ReadRequest) -> Iterator[tuple[int, _Plane, np.ndarray]]:
    """Yield (index in `planes`, plane, pixels), file by file; pixels are `(H, W)`, or `(H, W, 3)` RGB."""
    size = (int(planes[0].dataset.Rows), int(planes[0].dataset.Columns))
    indices_of: dict[int, list[int]] = {}
    for index, plane in enumerate(planes):
        indices_of.setdefault(id(plane.dataset), []).append(index)
    for indices in indices_of.values():
        indices.sort(key=lambda index: planes[index].frame)
        dataset = planes[indices[0]].dataset
        file_request = replace(request, name=planes[indices[0]].name)
        with file_request.translate_errors():
            frames = [planes[index].frame for index in indices]
            for index, pixels in zip(indices, _decode_frames(dataset, frames, file_request), strict=True):
                _check_frame_size(pixels.shape[:2], size, file_request)
                yield index, planes[index], pixels


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


def _is_hounsfield(plane: _Plane) -> bool:
    """Return whether values are HU: declared, or CT with a rescale of unspecified type ("US" in DICOM)."""
    kind = str(plane.values.get("RescaleType") or "").strip().upper()
    is_ct = str(plane.dataset.get("SOPClassUID", "")) in CT_STORAGE and "RescaleSlope" in plane.values
    return kind == "HU" or (is_ct and kind in ("", "US"))


def _is_plain_8_bit(plane: _Plane) -> bool:
    """Return whether pixels are 8-bit unsigned without a rescale, so that they read as the same image in PNG does."""
    elements = (plane.dataset.get(key) for key in ("BitsAllocated", "BitsStored", "PixelRepresentation"))
    return tuple(elements) == (8, 8, 0) and _rescale(plane.values) == (1.0, 0.0)


def _rescale(item: Any) -> tuple[float, float] | None:
    """Return (slope, intercept), or None if a modality LUT replaces them."""
    if item.get("ModalityLUTSequence"):
        return None
    slope, intercept = _read_numbers(item, "RescaleSlope", 1), _read_numbers(item, "RescaleIntercept", 1)
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
    centre, width = _read_numbers(item, "WindowCenter", 1), _read_numbers(item, "WindowWidth", 1)
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
    low = _read_numbers(dataset, "PixelPaddingValue", 1)
    if low is None:
        return None
    high = _read_numbers(dataset, "PixelPaddingRangeLimit", 1) or low
    return (pixels >= min(low[0], high[0])) & (pixels <= max(low[0], high[0]))
