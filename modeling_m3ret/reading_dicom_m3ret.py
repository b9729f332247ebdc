"""How do DICOM files become one scan?

A file, a cine or a whole series ends as one `Scan`: frames are placed by their own positions, decoded, and brought to
the values that their headers declare (PS3.3 C.11). Nothing is decoded before the header has passed the limits. This
file travels inside every checkpoint and imports NumPy alone; pydicom loads when a file needs it.

Order below: series · planes and their order · values of a volume or picture · decoding · what the header declares.
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

from .scan_m3ret import Job, Scan, Spacing, StoredScan, canonical, name_of, sniff, unit


CT_STORAGE = tuple("1.2.840.10008.5.1.4.1.1.2" + tail for tail in ("", ".1", ".2"))  # CT, enhanced, legacy enhanced
PIXEL_KEYS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
DEFLATED, JPEG_BASELINE, JPEG_EXTENDED = ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")


# --------------------------------------------------------------------------------------------------------------- series


def read_folder(folder: Path, job: Job) -> Scan | StoredScan:
    """A folder as one DICOM series. Files that aren't DICOM are passed over and counted."""
    files: list[Path] = []
    for root, _, names in os.walk(folder):
        files += [Path(root, name) for name in names]
        if len(files) > job.limits.max_files:
            raise job.refuse(f"more than {job.limits.max_files:,} files", "one DICOM series; see ReadLimits")
    dicom = [path for path in sorted(files) if path.is_file() and sniff(path) == "dicom"]
    if not dicom:
        raise job.refuse(f"a folder of {len(files)} files, none of them DICOM", "a DICOM series")
    job.check((sum(path.stat().st_size for path in dicom),), 1)
    return read_series(dicom, job, {"files_ignored": len(files) - len(dicom)})


def read_series(sources: list[Any], job: Job, found: dict[str, Any]) -> Scan | StoredScan:
    """DICOM files, or data sets, of one series: a picture, a cine or a volume."""
    planes = _planes_in(sources, job, found)
    burned = str(planes[0].dataset.get("BurnedInAnnotation", "")).lower()
    found["burned_in_annotation"] = burned if burned in ("yes", "no") else "unknown"
    found["format"] = "dicom"
    if len(planes) > 1:
        found["format"] = "dicom multi-frame" if len(sources) == 1 else "dicom series"
        group = _largest_group(planes)
        found["slices_left_out"], planes = len(planes) - len(group), group
    placed = all(p.position is not None and p.orientation is not None and p.spacing[0] for p in planes)
    if len(sources) == 1 and len({str(plane.position) for plane in planes}) == 1:
        placed = False  # one place: a picture, or frames through time
    if placed:
        planes, step = _stack(planes, found)
        return _scan_of(planes, step, job, found)
    if len(planes) > 1:
        planes = sorted(planes, key=lambda plane: (plane.number, plane.frame))
        if len(sources) > 1:
            found["order"] = "InstanceNumber, for lack of positions"
        if not all(_is_hu(plane) for plane in planes):  # may be a clip; what is in HU is a volume
            planes = [planes[index] for index in job.keep(len(planes), found)]
    return _scan_of(planes, None, job, found)


def _planes_in(sources: list[Any], job: Job, found: dict[str, Any]) -> list[_Plane]:
    """All frames of all sources, of one series and not empty."""
    if not 1 <= len(sources) <= job.limits.max_files:
        raise job.refuse(f"{len(sources)} slices", f"1 to {job.limits.max_files:,}; see ReadLimits")
    planes: list[_Plane] = []
    for source in sources:
        part = job if len(sources) == 1 else replace(job, name=f"{job.name}/{name_of(source)}")
        with part.refusing():
            dataset = _parse_dicom(source, part)
            if any(key in dataset for key in PIXEL_KEYS):
                planes += _planes_of(dataset, len(planes), part)
            elif "files_ignored" in found:  # a folder's DICOMDIR, report or structure set
                found["files_ignored"] += 1
            else:
                raise part.refuse("DICOM without pixel data, or cut short", "an image, a cine or a series")
    if not planes:
        raise job.refuse("no DICOM file with pixel data", "a DICOM series")
    series = len({str(plane.dataset.get("SeriesInstanceUID", "")) for plane in planes})
    if series > 1:
        raise job.refuse(f"slices of {series} series", "one series")
    return planes


def _parse_dicom(source: Any, job: Job) -> Any:
    """A pydicom Dataset, its pixels not decoded. A deflated one is inflated once more, to see that it keeps limits."""
    if hasattr(source, "group_dataset"):
        return source
    if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise job.refuse(f"a {type(source).__name__}", "a DICOM file or data set")
    file = Path(source) if isinstance(source, (str, os.PathLike)) else bytes(source)
    if isinstance(file, Path) and not file.is_file():
        raise job.refuse("no such file", "a DICOM file")
    if sniff(file) != "dicom":
        raise job.refuse("a file that isn't DICOM", "a DICOM file or data set")
    stream = io.BytesIO(job.read_bytes(file) if isinstance(file, Path) else file)
    reader = job.need("pydicom.filereader", "pydicom")
    reader.read_preamble(stream, True)
    meta = reader.read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") == DEFLATED:
        packed = stream.read()
        inflate, size, tail = zlib.decompressobj(-15), 0, packed
        while tail and not inflate.eof:
            size += len(inflate.decompress(tail, 2**20))
            tail = inflate.unconsumed_tail
            job.check((max(size, 1),), 1, packed=len(packed))
    stream.seek(0)
    return reader.dcmread(stream, force=True)


# ----------------------------------------------------------------------------------------------- planes and their order


@dataclass(frozen=True, eq=False)
class _Plane:
    """One frame of one data set, and where it lies (LPS, mm)."""

    name: str  # of the file, for messages
    dataset: Any
    frame: int
    number: int  # InstanceNumber, or else the order of arrival
    position: np.ndarray | None
    orientation: np.ndarray | None  # (2, 3): along a row, down a column
    spacing: tuple[float | None, float | None]  # between rows, between columns
    values: Any  # the item with the rescale: a functional group of the frame, or the data set itself
    window: Any  # the item with the window or VOI LUT

    @property
    def normal(self) -> np.ndarray:
        return np.zeros(3) if self.orientation is None else np.cross(self.orientation[0], self.orientation[1])


def _planes_of(dataset: Any, arrived: int, job: Job) -> list[_Plane]:
    """The frames of a data set, sizes checked. Enhanced objects place each frame by its functional groups."""
    rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel") or 1)
    frames = int(dataset.get("NumberOfFrames") or 1)
    job.check_pixels(rows, columns)
    job.check((min(frames, job.num_frames or frames), rows, columns, samples), 1)
    packed = len(next(dataset[key].value for key in PIXEL_KEYS if key in dataset))
    job.check((frames, rows, columns, samples), 1, packed=packed)
    number = _numbers(dataset, "InstanceNumber", 1)
    per_frame, shared = (dataset.get(f"{kind}FunctionalGroupsSequence") or [] for kind in ("PerFrame", "Shared"))

    def item(frame: int, sequence: str) -> Any:
        groups = (*per_frame[frame : frame + 1], *shared[:1])
        return next((group[sequence][0] for group in groups if group.get(sequence)), dataset)

    planes = []
    for frame in range(frames):
        place, measures = item(frame, "PlanePositionSequence"), item(frame, "PixelMeasuresSequence")
        # a classic multi-frame image has one position for all frames, which places none of them
        position = _numbers(place, "ImagePositionPatient", 3) if place is not dataset or frames == 1 else None
        orientation = _numbers(item(frame, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
        mm = (_numbers(measures, key, 2) for key in ("PixelSpacing", "ImagerPixelSpacing"))
        spacing = next((pair for pair in mm if pair and min(pair) > 0), (None, None))
        planes.append(
            _Plane(
                name=job.name,
                dataset=dataset,
                frame=frame,
                number=int(number[0]) if number else arrived,
                position=np.array(position) if position else None,
                orientation=np.array(orientation).reshape(2, 3) if orientation and any(orientation) else None,
                spacing=(spacing[0], spacing[1]),
                values=item(frame, "PixelValueTransformationSequence"),
                window=item(frame, "FrameVOILUTSequence"),
            )
        )
    return planes


def _numbers(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """The first `count` numbers of an element, or None where it is absent, short or no number."""
    value = dataset.get(keyword)
    several = isinstance(value, (tuple, MutableSequence))  # pydicom's MultiValue is one
    try:
        numbers = tuple(float(number) for number in (value if several else [value]))[:count]
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _largest_group(planes: list[_Plane]) -> list[_Plane]:
    """The largest set of parallel planes of one size; of equal sets the most axial (a three-plane localiser)."""
    keys = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation")

    def fit(a: _Plane, b: _Plane) -> bool:
        if a.spacing != b.spacing or any(a.dataset.get(key) != b.dataset.get(key) for key in keys):
            return False
        if a.orientation is None or b.orientation is None:
            return a.orientation is b.orientation
        return bool(np.abs(a.orientation - b.orientation).max() < 0.01)  # about half a degree

    groups: list[list[_Plane]] = []
    for plane in planes:
        home = next((group for group in groups if fit(plane, group[0])), None)
        if home is None:
            groups.append(home := [])
        home.append(plane)
    return max(groups, key=lambda group: (len(group), *np.round(np.abs(group[0].normal[::-1]), 3)))


def _stack(planes: list[_Plane], found: dict[str, Any]) -> tuple[list[_Plane], np.ndarray | None]:
    """Planes in order along their normal, one per position, and the step (LPS mm) from one to the next."""
    normal = planes[0].normal
    heights = np.array([np.dot(plane.position, normal) for plane in planes])  # type: ignore[arg-type]
    order = sorted(range(len(planes)), key=lambda i: (round(float(heights[i]), 3), planes[i].number, planes[i].frame))
    heights = heights[order]
    first = np.concatenate(([True], np.diff(heights) > 0.01))  # closer than 10 µm is the same place
    planes = [planes[i] for i, new in zip(order, first, strict=True) if new]
    found["slices"], found["duplicate_positions"] = len(planes), len(first) - len(planes)
    if len(planes) == 1:
        return planes, None
    places = np.array([plane.position for plane in planes])
    gaps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    distance = float(np.median(gaps))
    line = (places[-1] - places[0]) / np.linalg.norm(places[-1] - places[0])
    cosine = float(line @ normal) / float(np.linalg.norm(normal))
    found["missing_slices"] = int((np.rint(gaps / distance) - 1).clip(0).sum())
    found["gantry_tilt_degrees"] = round(math.degrees(math.acos(min(1.0, cosine))), 1)
    return planes, line * distance


# ---------------------------------------------------------------------------------------- values of a volume or picture


def _scan_of(planes: list[_Plane], step: np.ndarray | None, job: Job, found: dict[str, Any]) -> Scan | StoredScan:
    """Decode the planes, in order, and bring them to [0, 1]. With a step they are a volume, and get oriented."""
    head = planes[0].dataset
    colour = _photometric(head) == "PALETTE COLOR" or int(head.get("SamplesPerPixel") or 1) > 1
    return _colour_scan(planes, step, job, found) if colour else _grey_scan(planes, step, job, found)


def _colour_scan(planes: list[_Plane], step: np.ndarray | None, job: Job, found: dict[str, Any]) -> Scan | StoredScan:
    head = planes[0].dataset
    palette = _photometric(head) == "PALETTE COLOR"
    bits = int(head.get("BitsStored") or head.get("BitsAllocated") or 32)
    dtype = np.dtype(np.uint8 if bits <= 8 or palette else np.float32)
    shape = (3, len(planes), int(head.Rows), int(head.Columns))
    job.check(shape, dtype.itemsize)
    array = np.empty(shape, dtype)
    for index, plane, pixels in _decoded(planes, job):
        pixels = _palette(plane.dataset, pixels.dtype)[pixels] if palette else pixels
        array[:, index] = pixels[..., :3].transpose(2, 0, 1)
    if dtype != np.uint8:
        array /= 2.0**bits - 1
    view, spacing = _placed(array, planes[0], step, found)
    return unit(view, spacing, job, found, rule="8-bit" if dtype == np.uint8 else "bit depth")


def _grey_scan(planes: list[_Plane], step: np.ndarray | None, job: Job, found: dict[str, Any]) -> Scan | StoredScan:
    head = planes[0].dataset
    rule = _grey_rule(planes, is_volume=step is not None)
    dtype = np.dtype(np.uint8 if rule == "8-bit" else np.float32)
    shape = (len(planes), int(head.Rows), int(head.Columns))
    job.check(shape, dtype.itemsize)
    array = np.empty(shape, dtype)
    padding: np.ndarray | None = None
    for index, plane, pixels in _decoded(planes, job):
        mask = _is_padding(pixels, plane.dataset)
        if mask is not None:
            padding = np.zeros(shape, bool) if padding is None else padding
            padding[index] = mask
        array[index] = pixels
        if rule != "8-bit":
            _apply_modality(array[index], plane.values, job)
        if rule == "window":
            _apply_window(array[index], plane.window, job)
    # the sign of a physical unit is not a matter of display
    inverted = _photometric(head) == "MONOCHROME1" and rule != "hounsfield"
    found["inverted"] = inverted
    view, spacing = _placed(array[None], planes[0], step, found)
    if padding is not None:
        padding = _placed(padding[None], planes[0], step, found)[0]
    return unit(view, spacing, job, found, rule=rule, padding=padding, inverted=inverted)


def _grey_rule(planes: list[_Plane], is_volume: bool) -> str:
    """How stored values reach [0, 1], in `unit`'s words."""
    if all(_is_hu(plane) for plane in planes):
        return "hounsfield"
    # A window is how one image was to be looked at. It often differs from slice to slice, and NIfTI has none: a volume
    # must not depend on it.
    if not is_volume and all(_window_of(plane.window) is not None for plane in planes):
        return "window"
    return "8-bit" if all(_is_plain(plane) for plane in planes) else "percentiles"


def _placed(
    array: np.ndarray, plane: _Plane, step: np.ndarray | None, found: dict[str, Any]
) -> tuple[np.ndarray, Spacing]:
    """With a step, a volume in the canonical orientation: DICOM's patient axes (LPS) become RAS, as NIfTI's are."""
    if step is None:
        return array, (None, *plane.spacing)
    assert plane.orientation is not None
    down, along = plane.orientation[1] * plane.spacing[0], plane.orientation[0] * plane.spacing[1]
    return canonical(array, np.stack([step, down, along], axis=1) * np.array([[-1.0], [-1.0], [1.0]]), found)


def _photometric(dataset: Any) -> str:
    return str(dataset.get("PhotometricInterpretation", "")).upper()


def _palette(dataset: Any, dtype: np.dtype) -> np.ndarray:
    """`(256 or 65536, 3)` uint8: the colour of every stored value."""
    values = np.arange(2 ** (8 * dtype.itemsize), dtype=dtype)
    table = importlib.import_module("pydicom.pixels").apply_color_lut(values[None], dataset)[0]
    return (table >> (8 if table.max() > 255 else 0)).astype(np.uint8)  # 16-bit tables often hold 8-bit colours


# ------------------------------------------------------------------------------------------------------------- decoding


def _decoded(planes: list[_Plane], job: Job) -> Iterator[tuple[int, _Plane, np.ndarray]]:
    """(place in `planes`, plane, pixels as `(H, W)` or `(H, W, 3)` RGB), in an order that suits the decoder."""
    size = (int(planes[0].dataset.Rows), int(planes[0].dataset.Columns))
    places: dict[int, list[int]] = {}
    for index, plane in enumerate(planes):
        places.setdefault(id(plane.dataset), []).append(index)
    for indices in places.values():
        indices.sort(key=lambda index: planes[index].frame)
        dataset = planes[indices[0]].dataset
        part = replace(job, name=planes[indices[0]].name)
        with part.refusing():
            frames = [planes[index].frame for index in indices]
            for index, pixels in zip(indices, _decode(dataset, frames, part), strict=True):
                if pixels.shape[:2] != size:
                    raise part.refuse(f"a frame of {pixels.shape[:2]} pixels", f"{size}, as in the header")
                yield index, planes[index], pixels


def _decode(dataset: Any, frames: list[int], job: Job) -> Iterable[np.ndarray]:
    """The given frames, which ascend, of one data set."""
    syntax, total = _transfer_syntax(dataset), int(dataset.get("NumberOfFrames") or 1)
    if syntax.is_encapsulated:
        _check_codestreams(dataset, total, job)
    if syntax == JPEG_EXTENDED and int(dataset.BitsStored) > 8:
        return (_decode_jpeg_12bit(dataset, frame, total, job) for frame in frames)
    decoder = job.need("pydicom.pixels", "pydicom").get_decoder(syntax)
    # Pillow's libjpeg-turbo takes a quarter of GDCM's time; elsewhere pydicom's own order is the faster one
    plugin = "pillow" if syntax == JPEG_BASELINE and "pillow" in decoder.available_plugins else ""
    if frames == list(range(total)):  # all of it: one pass over the fragments
        pixels = decoder.as_array(dataset, decoding_plugin=plugin)[0]
        return pixels if total > 1 else [pixels]
    return (decoder.as_array(dataset, index=frame, decoding_plugin=plugin)[0] for frame in frames)


def _transfer_syntax(dataset: Any) -> Any:
    """The declared syntax; where the file meta is missing, what the data set was read (or would be written) as."""
    uid = importlib.import_module("pydicom.uid")
    declared = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if declared:
        return declared
    implicit, little = getattr(dataset, "original_encoding", (None, None))
    if little is False:
        return uid.ExplicitVRBigEndian
    return uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian


def _check_codestreams(dataset: Any, total: int, job: Job) -> None:
    """Refuse a compressed frame of another size than the header's: decoders allocate what the codestream asks for."""
    encaps = importlib.import_module("pydicom.encaps")
    for frame in encaps.generate_frames(dataset.PixelData, number_of_frames=total):
        size = _codestream_size(frame)
        if size is not None and size != (int(dataset.Rows), int(dataset.Columns)):
            raise job.refuse(f"a frame of {size[0]} x {size[1]} pixels", "the size in the DICOM header")


def _codestream_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) in a JPEG 2000 SIZ, or a JPEG or JPEG-LS SOF marker; None for anything else, RLE above all."""
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


def _decode_jpeg_12bit(dataset: Any, frame: int, total: int, job: Job) -> np.ndarray:
    """A frame of 12-bit JPEG Extended. pydicom leaves it to a GPL decoder and passes over GDCM's, which is right."""
    gdcm = job.need("gdcm", "python-gdcm")
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
    data = image.GetBuffer().encode("utf-8", "surrogateescape")  # GDCM hands bytes over as text
    return np.frombuffer(data, "<i2" if dataset.PixelRepresentation else "<u2").reshape(rows, columns)


# --------------------------------------------------------------------------------------------- what the header declares


def _is_hu(plane: _Plane) -> bool:
    """Hounsfield units: declared so, or CT with a rescale whose type isn't said ("US" is DICOM for unspecified)."""
    kind = str(plane.values.get("RescaleType") or "").strip().upper()
    is_ct = str(plane.dataset.get("SOPClassUID", "")) in CT_STORAGE and "RescaleSlope" in plane.values
    return kind == "HU" or (is_ct and kind in ("", "US"))


def _is_plain(plane: _Plane) -> bool:
    """8 unsigned bits without a rescale: a picture, to be read as the same picture in PNG is."""
    elements = (plane.dataset.get(key) for key in ("BitsAllocated", "BitsStored", "PixelRepresentation"))
    return tuple(elements) == (8, 8, 0) and _rescale_of(plane.values) == (1.0, 0.0)


def _rescale_of(item: Any) -> tuple[float, float] | None:
    """(slope, intercept); None where a table takes their place."""
    if item.get("ModalityLUTSequence"):
        return None
    slope, intercept = _numbers(item, "RescaleSlope", 1), _numbers(item, "RescaleIntercept", 1)
    return slope[0] if slope else 1.0, intercept[0] if intercept else 0.0


def _apply_modality(values: np.ndarray, item: Any, job: Job) -> None:
    """Stored values to measured ones (PS3.3 C.11.1), in place."""
    rescale = _rescale_of(item)
    if rescale is None:
        values[...] = job.need("pydicom.pixels", "pydicom").apply_modality_lut(values.astype(np.int32), item)
    elif rescale != (1.0, 0.0):
        values *= np.float32(rescale[0])
        values += np.float32(rescale[1])


def _window_function(item: Any) -> str:
    return str(item.get("VOILUTFunction") or "LINEAR").upper()


def _window_of(item: Any) -> tuple[float, float] | str | None:
    """The first window (centre, width), "lut" where a table is given instead, None where there is neither."""
    if item.get("VOILUTSequence"):
        return "lut"
    centre, width = _numbers(item, "WindowCenter", 1), _numbers(item, "WindowWidth", 1)
    if centre is None or width is None:
        return None
    valid = width[0] >= 1 if _window_function(item) == "LINEAR" else width[0] > 0
    return (centre[0], width[0]) if valid else None


def _apply_window(values: np.ndarray, item: Any, job: Job) -> None:
    """Measured values to [0, 1] as the image asks to be seen (PS3.3 C.11.2), in place."""
    window, function = _window_of(item), _window_function(item)
    if not isinstance(window, tuple):
        values[...] = job.need("pydicom.pixels", "pydicom").apply_voi(np.rint(values).astype(np.int32), item)
        values /= 2.0 ** int(item.VOILUTSequence[0].LUTDescriptor[2]) - 1
        return
    centre, width = window
    if function == "SIGMOID":
        np.exp((values - centre) * np.float32(-4 / width), out=values)
        np.divide(1.0, 1.0 + values, out=values)
        return
    if function == "LINEAR":  # the standard's own half-pixel convention
        centre, width = centre - 0.5, max(width - 1, 1e-6)
    values -= np.float32(centre)
    values *= np.float32(1 / width)
    values += np.float32(0.5)
    np.clip(values, 0, 1, out=values)


def _is_padding(pixels: np.ndarray, dataset: Any) -> np.ndarray | None:
    """Where stored values mark that nothing was measured (PS3.3 C.7.5.1.1.2), or None where no value does."""
    low = _numbers(dataset, "PixelPaddingValue", 1)
    if low is None:
        return None
    high = _numbers(dataset, "PixelPaddingRangeLimit", 1) or low
    return (pixels >= min(low[0], high[0])) & (pixels <= max(low[0], high[0]))
