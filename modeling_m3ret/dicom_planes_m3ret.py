"""Select the frames of one scan from a DICOM series, and sort them.

Handles the geometry of frames (DICOM PS3.3, sections C.7.6.2, C.7.6.16, C.8.4.15 and C.8.8.3.2), stacks, repetitions in
time and order. `arrange` documents the rules. This file is copied into every checkpoint and imports only NumPy.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .dicom_pixels_m3ret import Frame, read_numbers, read_pair
from .scan_m3ret import Description, ReadRequest


EQUAL_SPACING = 0.005  # relative: decimal strings of one spacing differ by rounding (0.98 and 0.9766 mm)
EQUAL_COSINES = 0.01  # about half a degree
# Planes that are closer than a tenth of a pixel, or 2 % of their thickness, are at one position: slices are never that
# close, but positions are rounded, and those of a cine may drift.
EQUAL_POSITION, EQUAL_POSITION_OF_THICKNESS = 0.1, 0.02
EQUAL_NUMBERS = 0.001  # relative, of measured values such as echo times

# Elements of enhanced objects that replace an element of classic ones: sequences of the functional group, keyword.
IN_FUNCTIONAL_GROUPS = {
    "ImageType": ((*(f"{kind}FrameTypeSequence" for kind in ("MRImage", "CTImage", "PET", "XRay3D")),), "FrameType"),
    "StackID": (("FrameContentSequence",), "StackID"),
    "InStackPositionNumber": (("FrameContentSequence",), "InStackPositionNumber"),
    "TemporalPositionIdentifier": (("FrameContentSequence",), "TemporalPositionIndex"),
    "AcquisitionNumber": (("FrameContentSequence",), "FrameAcquisitionNumber"),
    "AcquisitionDateTime": (("FrameContentSequence",), "FrameAcquisitionDateTime"),
    "DimensionIndexValues": (("FrameContentSequence",), "DimensionIndexValues"),
    "TriggerTime": (("CardiacSynchronizationSequence",), "NominalCardiacTriggerDelayTime"),
    "EchoTime": (("MREchoSequence",), "EffectiveEchoTime"),
    "DiffusionBValue": (("MRDiffusionSequence",), "DiffusionBValue"),
    "InversionTime": (("MRModifierSequence",), "InversionTimes"),
    "FlipAngle": (("MRTimingAndRelatedParametersSequence",), "FlipAngle"),
    "KVP": (("CTXRayDetailsSequence",), "KVP"),
    "ConvolutionKernel": (("CTReconstructionSequence",), "ConvolutionKernel"),
    "SliceThickness": (("PixelMeasuresSequence",), "SliceThickness"),
}
MEASURED = ("EchoTime", "DiffusionBValue", "TriggerTime", "FrameReferenceTime", "InversionTime", "FlipAngle", "KVP")
# Elements that distinguish images at one position, in the order in which they are tried.
PHASES = (
    *("EchoTime", "EchoNumbers", "DiffusionBValue", "TemporalPositionIdentifier", "TriggerTime", "FrameReferenceTime"),
    *("InversionTime", "FlipAngle", "KVP", "ConvolutionKernel", "AcquisitionNumber", "DimensionIndexValues"),
)
# Elements that distinguish acquisitions even if the slices of one lie between those of another.
ACQUISITIONS = ("EchoTime", "EchoNumbers", "DiffusionBValue", "KVP", "ConvolutionKernel", "AcquisitionNumber")
# Order of frames without positions, or at one position: the first of these that all frames have and no two share.
ORDER = (
    *("InStackPositionNumber", "TemporalPositionIdentifier", "TriggerTime", "FrameReferenceTime", "EchoTime"),
    *("DiffusionBValue", "AcquisitionDateTime", "ContentDateTime", "InstanceNumber"),
)
# Each projection is an image of its own: CR, DX, mammography, intra-oral.
PROJECTIONS = tuple(f"1.2.840.10008.5.1.4.1.1.1{tail}" for tail in ("", ".1", ".1.1", ".2", ".2.1", ".3", ".3.1"))
MAGNIFICATION = "EstimatedRadiographicMagnificationFactor"
MAX_DIRECTIONS = 64  # of planes that are compared with each other
# Multi-frame images with one of these are not slices, even if they declare a spacing between slices.
CLIP_ELEMENTS = (
    *("FrameTime", "FrameTimeVector", "CineRate", "RotationVector", "AngularViewVector", "TimeSlotVector"),
    "PhaseVector",
)


@dataclass(frozen=True, eq=False)
class Plane(Frame):
    """One frame of one dataset and its geometry (LPS, mm). The frames of a mosaic are its tiles."""

    index: int  # of its file in the input
    groups: tuple[Any, ...]  # functional groups of the frame, then those of all frames
    size: tuple[int, int]  # rows, columns
    position: np.ndarray | None  # of the first pixel
    orientation: np.ndarray | None  # (2, 3): direction along a row, direction down a column
    offset: float | None  # mm along a line of unknown direction; None if the frame is not placed along one
    placement: str  # element that declares position or offset
    spacing: tuple[float | None, float | None]  # between rows, between columns
    is_tile: bool = False  # of a mosaic; `frame` is the number of the tile

    @property
    def normal(self) -> np.ndarray:
        return np.zeros(3) if self.orientation is None else np.cross(self.orientation[0], self.orientation[1])

    def value(self, keyword: str) -> Any:
        """Return an element of the frame or else of its dataset, or None if it is absent, empty or damaged."""
        sequences, name = IN_FUNCTIONAL_GROUPS.get(keyword, ((), keyword))
        try:
            items = (group[sequence][0] for group in self.groups for sequence in sequences if group.get(sequence))
            found = next((value for item in items if (value := item.get(name)) is not None), None)
            return self.dataset.get(keyword) if found is None else found
        except Exception:  # pydicom parses elements on access and raises many types
            return None

    def key(self, keyword: str) -> tuple[Any, ...] | None:
        """Return an element in a form that can be compared: numbers, a date and time, or text. None if it is absent."""
        if keyword in ("AcquisitionDateTime", "ContentDateTime"):
            whole, stem = str(self.value(keyword) or ""), keyword.removesuffix("DateTime")
            date, time = whole[:8], whole[8:]
            if not time:
                date, time = str(self.value(stem + "Date") or ""), str(self.value(stem + "Time") or "")
            digits = re.match(r"\d{2,6}(\.\d+)?", time.replace(":", ""))
            if digits is None:
                return None
            clock, _, fraction = digits[0].partition(".")
            return (re.sub(r"\D", "", date), float(f"{clock.ljust(6, '0')}.{fraction or 0}"))
        value = self.value(keyword)
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if value is None or not len(values) or values[0] in (None, ""):
            return None
        try:
            numbers = tuple(float(number) for number in values)
            return numbers if all(map(math.isfinite, numbers)) else None
        except (TypeError, ValueError):
            return tuple(str(text).strip().upper() for text in values)


# ----------------------------------------------------------------------------------------------------- frames of a file


def frames_are_described(dataset: Any) -> bool:
    """Return whether a multi-frame dataset places or describes each of its frames. Otherwise it is a clip."""
    frames = int(dataset.get("NumberOfFrames") or 1)
    return frames == 1 or bool(dataset.get("PerFrameFunctionalGroupsSequence")) or _frame_offsets(dataset) is not None


def split_into_planes(
    dataset: Any, frames: Sequence[int], name: str, index: int, request: ReadRequest
) -> Iterator[Plane]:
    """Yield frames of a dataset. Those of a Siemens mosaic are its tiles."""
    groups = [dataset.get(f"{kind}FunctionalGroupsSequence") or [] for kind in ("PerFrame", "Shared")]
    detector = (dataset.get("DetectorInformationSequence") or [dataset])[0]
    is_multi_frame = int(dataset.get("NumberOfFrames") or 1) > 1
    offsets = _frame_offsets(dataset) if is_multi_frame else None
    size = (int(dataset.Rows), int(dataset.Columns))
    for frame in frames:
        own = (*groups[0][frame : frame + 1], *groups[1][:1])

        def item(*sequences: str, own: tuple[Any, ...] = own) -> Any:
            found = (group[sequence][0] for group in own for sequence in sequences if group.get(sequence))
            return next(found, dataset)

        geometry = item("PlanePositionSequence", "PlanePositionVolumeSequence")
        directions = item("PlaneOrientationSequence")
        cosines = read_numbers(directions, "ImageOrientationPatient", 6)
        cosines = cosines or read_numbers(detector, "ImageOrientationPatient", 6)
        orientation = _unit_vectors(cosines) if cosines else None
        corner = read_numbers(geometry, "ImagePositionPatient", 3) or read_numbers(geometry, "ImagePositionVolume", 3)
        corner = corner or read_numbers(detector, "ImagePositionPatient", 3)
        # The single position of a classic multi-frame image does not locate its frames.
        located = corner is not None and (geometry is not dataset or not is_multi_frame)
        plane = Plane(
            name=name,
            dataset=dataset,
            frame=frame,
            values=item("PixelValueTransformationSequence"),
            window=item("FrameVOILUTSequence"),
            index=index,
            groups=own,
            size=size,
            position=np.array(corner) if located else None,
            orientation=orientation,
            offset=None,
            placement="ImagePositionPatient" if located else "SliceLocation",
            spacing=_pixel_spacing(dataset, item("PixelMeasuresSequence")),
        )
        if offsets is not None and not located:
            keyword, mm, may_be_z = offsets
            shift = mm(frame) - mm(0)
            plane = replace(plane, placement=keyword, offset=shift)
            if corner and orientation is not None:
                is_z = may_be_z and mm(0) != 0 and abs(mm(0) - corner[2]) < 0.01
                direction = np.array([0.0, 0.0, 1.0]) if is_z else plane.normal
                plane = replace(plane, position=np.array(corner) + shift * direction, offset=None)
        tiles, normal = (0, None) if is_multi_frame else _mosaic_header(dataset, request)
        yield from _split_mosaic(plane, tiles, normal, request) if tiles else [plane]


def _unit_vectors(cosines: Sequence[float]) -> np.ndarray | None:
    """Return `(2, 3)` directions of length 1, or None if they are not perpendicular."""
    vectors = np.array(cosines).reshape(2, 3)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (lengths > 0.5).all():
        return None
    vectors = vectors / lengths
    return vectors if abs(float(vectors[0] @ vectors[1])) < 0.1 else None


def _pixel_spacing(dataset: Any, measures: Any) -> tuple[float | None, float | None]:
    """Return mm between rows and between columns: in the patient, otherwise at the detector without magnification."""
    if mm := read_pair(measures, "PixelSpacing") or read_pair(dataset, "PixelSpacing"):
        return mm
    mm, factor = (read_pair(dataset, "ImagerPixelSpacing"), read_numbers(dataset, MAGNIFICATION, 1))
    scale = factor[0] if factor and factor[0] > 0 else 1.0
    return (mm[0] / scale, mm[1] / scale) if mm else (None, None)


def _frame_offsets(dataset: Any) -> tuple[str, Callable[[int], float], bool] | None:
    """Return the element that places frames along a line, or None.

    Returns:
        Its keyword, a function from frame to mm, and whether these mm may be patient coordinates.
    """
    frames = int(dataset.get("NumberOfFrames") or 1)
    for keyword in ("GridFrameOffsetVector", "SliceLocationVector"):
        if mm := read_numbers(dataset, keyword, frames):
            return keyword, mm.__getitem__, keyword == "GridFrameOffsetVector"
    gap = read_numbers(dataset, "SpacingBetweenSlices", 1) or (0.0,)
    if slices := read_numbers(dataset, "SliceVector", frames):
        gap = gap if gap[0] else read_numbers(dataset, "SliceThickness", 1) or gap
        return ("SliceVector", lambda frame: slices[frame] * gap[0], False) if gap[0] else None
    if gap[0] and not any(dataset.get(keyword) for keyword in CLIP_ELEMENTS):
        return "SpacingBetweenSlices", lambda frame: frame * gap[0], False
    return None


# ------------------------------------------------------------------------------------------------------ Siemens mosaics


def _mosaic_header(dataset: Any, request: ReadRequest) -> tuple[int, np.ndarray | None]:
    """Return the number of tiles of a Siemens mosaic (0 if it is none) and the direction of its slices, if declared."""
    kind = dataset.get("ImageType") or ()
    private = dataset.get((0x0019, 0x100A))
    is_mosaic = any(str(word).strip().upper() == "MOSAIC" for word in ([kind] if isinstance(kind, str) else kind))
    if not is_mosaic and private is None:
        return 0, None
    tiles, normal = 0, None
    try:
        csa = request.import_decoder("nibabel.nicom.csareader", "nibabel")
        if header := csa.get_csa_header(dataset):
            tiles, normal = int(csa.get_n_mosaic(header) or 0), csa.get_slice_normal(header)
    except (ValueError, TypeError, KeyError, IndexError, csa.CSAError, struct.error):  # damaged or removed
        pass
    if not tiles and private is not None:
        value = private.value
        tiles = int.from_bytes(value[:2], "little") if isinstance(value, bytes) else int(value or 0)
    if is_mosaic and tiles < 1:
        advice = "Convert it to NIfTI with dcm2niix, or keep the private elements of Siemens when removing identifiers."
        raise request.error("unsupported", "a mosaic that declares its number of slices", "none declared", advice)
    return (tiles if tiles > 1 or is_mosaic else 0), normal


def _split_mosaic(plane: Plane, tiles: int, normal: np.ndarray | None, request: ReadRequest) -> Iterator[Plane]:
    """Yield the tiles of a mosaic.

    As in nibabel, its ImagePositionPatient is the corner of a slice as large as the whole mosaic.
    """
    side = math.isqrt(tiles - 1) + 1
    rows, columns = plane.size[0] // side, plane.size[1] // side
    if plane.size != (rows * side, columns * side) or not rows or not columns:
        expected = f"a mosaic of {side} x {side} tiles"
        raise request.error("damaged", expected, f"{plane.size[0]} x {plane.size[1]} pixels")
    gaps = (read_numbers(plane.dataset, key, 1) for key in ("SpacingBetweenSlices", "SliceThickness"))
    gap = next((mm[0] for mm in gaps if mm and mm[0] > 0), 1.0)
    for tile in range(tiles):
        part = replace(plane, frame=tile, size=(rows, columns), is_tile=True, offset=tile * gap, position=None)
        if plane.position is not None and plane.orientation is not None and None not in plane.spacing:
            along, down = plane.orientation
            shift = down * (plane.size[0] - rows) / 2 * plane.spacing[0]
            shift = shift + along * (plane.size[1] - columns) / 2 * plane.spacing[1]
            step = gap * (plane.normal if normal is None else normal)
            part = replace(part, position=plane.position + shift + tile * step, offset=None)
        yield part


# --------------------------------------------------------------------------------------------------------- arrangement


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Planes of one scan in their order."""

    planes: list[Plane]
    step: np.ndarray | None  # from a plane to the next in LPS mm: (3,), or (1,) if its direction is unknown
    is_clip: bool  # whether the frames are known to share one position


def arrange(planes: list[Plane], description: Description) -> Arrangement:
    """Select the planes of one scan from those of a series, and sort them.

    1. A stack is a set of parallel planes of one size, spacing, image type and stack ID, with or without positions. A
       multi-frame file without positions, and a radiograph, are a stack of their own. The stack with the most planes is
       read; on a tie, an original before a derived one, then the most axial one. Localisers come last.
    2. Planes are placed along their normal by ImagePositionPatient, a vector of frame offsets, or SliceLocation.
       Positions that differ by rounding are one position. A plane that is stored twice is dropped.
    3. Planes at a single position are a clip. Otherwise they are a volume: of several acquisitions, echoes, phases or
       other repetitions, the first one that covers the volume is read (see `PHASES`).
    4. The frames of a clip, and planes without any position, are sorted by the first element of `ORDER` that they all
       have and no two share, otherwise by the one with the most values. Planes of one value keep the input's order.

    Args:
        planes: at least one plane, in the order of the input.
        description: description of the scan. `order` and `selected_by` name the elements that decided, `stacks` and
            `phases` count what there was to choose from, `slices_left_out` the planes that were not chosen.
    """
    total = len(planes)
    planes = _largest_stack(planes, description)
    heights = _heights(planes)
    positions = _cluster(heights, _tolerance(planes)) if heights is not None else np.zeros(len(planes), int)
    kept = _without_duplicates(planes, positions)
    chosen = kept if heights is None else _first_phase(planes, heights, positions, kept, description)
    if total > 1:
        description["duplicates"] = len(planes) - len(kept)
        description["slices_left_out"] = total - len(planes) + len(kept) - len(chosen)
    if len(chosen) == 1:
        return Arrangement([planes[chosen[0]]], None, False)
    if heights is None or positions.max() == 0:
        ordered = _in_order([planes[index] for index in chosen], description)
        return Arrangement(ordered, None, heights is not None)
    chosen.sort(key=lambda index: heights[index])
    volume = [planes[index] for index in chosen]
    description["order"] = volume[0].placement
    return Arrangement(volume, _step(volume, heights[chosen], description), False)


def _largest_stack(planes: list[Plane], description: Description) -> list[Plane]:
    """Return the planes of the stack that rule 1 of `arrange` selects."""
    frames_of_reference = Counter(str(plane.value("FrameOfReferenceUID")) for plane in planes)
    one_each = len(frames_of_reference) == len(planes)  # software for removing identifiers may replace each of them
    stacks: dict[tuple[Any, ...], list[list[Plane]]] = defaultdict(list)
    for plane in planes:
        is_multi_frame = int(plane.dataset.get("NumberOfFrames") or 1) > 1
        is_projection = str(plane.dataset.get("SOPClassUID", "")) in PROJECTIONS
        is_loose = plane.position is None and (is_multi_frame or is_projection)
        key = (
            plane.size,
            *(plane.dataset.get(name) for name in ("SamplesPerPixel", "PhotometricInterpretation")),
            *(plane.key(name) for name in ("ImageType", "StackID")),
            None if one_each else str(plane.value("FrameOfReferenceUID")),
            plane.position is None,
            plane.index if is_loose else None,
        )
        stack = next((stack for stack in stacks[key][-MAX_DIRECTIONS:] if _are_parallel(plane, stack[0])), None)
        if stack is None:
            stacks[key].append(stack := [])
        stack.append(plane)

    def preference(stack: list[Plane]) -> tuple[Any, ...]:
        words = stack[0].key("ImageType") or ("",)
        number = (stack[0].key("InstanceNumber") or (math.inf,))[0]
        axial = np.round(np.abs(stack[0].normal[::-1]), 3)
        return (
            "LOCALIZER" not in words,
            len(stack),
            stack[0].position is not None,
            words[0] == "ORIGINAL",
            *axial,
            -number,
        )

    found = [stack for group in stacks.values() for stack in group]
    if len(found) > 1:
        description["stacks"] = len(found)
    return max(found, key=preference)


def _are_parallel(a: Plane, b: Plane) -> bool:
    for mm, other in zip(a.spacing, b.spacing, strict=True):
        if (mm is None) != (other is None) or (mm and other and abs(mm - other) > EQUAL_SPACING * other):
            return False
    if a.orientation is None or b.orientation is None:
        return a.orientation is b.orientation
    return bool(np.abs(a.orientation - b.orientation).max() < EQUAL_COSINES)


def _heights(planes: list[Plane]) -> np.ndarray | None:
    """Return mm along the normal, or along an unknown direction; None if not all planes declare them."""
    if all(plane.position is not None and plane.orientation is not None for plane in planes):
        return np.array([plane.position @ planes[0].normal for plane in planes])
    if all(plane.position is not None for plane in planes):  # along their line, towards left, back or head
        positions = np.array([plane.position for plane in planes])
        line = np.linalg.svd(positions - positions.mean(axis=0), full_matrices=False)[2][0]
        return positions @ line * np.sign(line[np.abs(line).argmax()])
    if all(plane.offset is not None for plane in planes):
        return np.array([plane.offset for plane in planes])
    if any(int(plane.dataset.get("NumberOfFrames") or 1) > 1 for plane in planes):
        return None
    locations = [read_numbers(plane.dataset, "SliceLocation", 1) for plane in planes]
    return np.array([mm[0] for mm in locations if mm]) if all(locations) else None


def _tolerance(planes: list[Plane]) -> float:
    mm = [mm for mm in planes[0].spacing if mm]
    thickness = (planes[0].key("SliceThickness") or (0.0,))[0]
    thickness = thickness if isinstance(thickness, float) else 0.0
    return max(EQUAL_POSITION * min(mm), min(EQUAL_POSITION_OF_THICKNESS * thickness, *mm)) if mm else 0.01


def _cluster(values: np.ndarray, tolerance: float) -> np.ndarray:
    """Return the rank of each value, counting values as equal if no gap between them exceeds the tolerance."""
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values), int)
    ranks[order] = np.concatenate(([0], np.cumsum(np.diff(values[order]) > tolerance)))
    return ranks


def _without_duplicates(planes: list[Plane], positions: np.ndarray) -> list[int]:
    """Return the indices of planes without copies: same position, number and times, and the same UID or pixels."""
    repeated = Counter(positions.tolist())
    keys = [
        (position, plane.frame, *(plane.key(name) for name in ORDER)) if repeated[position] > 1 else None
        for plane, position in zip(planes, positions.tolist(), strict=True)
    ]
    count, kept = Counter(keys), []
    seen: set[tuple[Any, ...]] = set()
    for index, (plane, key) in enumerate(zip(planes, keys, strict=True)):
        if key is not None and count[key] > 1:
            marks = {(key, "uid", plane.value("SOPInstanceUID")), (key, "pixels", hash(plane.value("PixelData")))}
            marks -= {(key, "uid", None), (key, "pixels", hash(None))}
            if seen & marks:
                continue
            seen |= marks
        kept.append(index)
    return kept


def _first_phase(
    planes: list[Plane], heights: np.ndarray, positions: np.ndarray, chosen: list[int], description: Description
) -> list[int]:
    """Return the indices of one plane per position, all of the first acquisition, echo or phase (rule 3).

    All planes of a single position are returned, unless they lie side by side.
    """
    is_volume = positions.max() > 0
    phases, selected_by = max(Counter(positions[chosen].tolist()).values()), []
    for name in ("ImagePositionPatient", *PHASES) if is_volume else ("ImagePositionPatient",):
        distinct = len(set(positions[chosen].tolist()))
        can_decide = len(chosen) > distinct or name in ACQUISITIONS
        groups = _groups(planes, chosen, name) if can_decide else []
        if len(groups) < 2:
            continue
        covered = [len(set(positions[group].tolist())) for group in groups]
        if len(chosen) > distinct and max(covered) >= 0.9 * distinct:
            chosen = next(group for group, count in zip(groups, covered, strict=True) if count >= 0.9 * max(covered))
        elif name in ACQUISITIONS and _interleave(planes, heights, groups, name, len(chosen) > distinct):
            phases, chosen = max(phases, len(groups)), groups[covered.index(max(covered))]
        else:
            continue
        selected_by.append(name)
    if is_volume and len(set(positions[chosen].tolist())) < len(chosen):
        name, keys = _order_keys([planes[index] for index in chosen], positions[chosen].tolist())
        first: dict[int, int] = {}
        for _, index in sorted(zip(keys, chosen, strict=True)):
            first.setdefault(int(positions[index]), index)
        chosen = list(first.values())
        selected_by.append(name)
    if selected_by:
        description["phases"], description["selected_by"] = phases, ", ".join(selected_by)
    return chosen


def _groups(planes: list[Plane], indices: list[int], name: str) -> list[list[int]]:
    """Return the indices grouped by an element, in the order of its values. Planes without it come last."""
    if name == "ImagePositionPatient":  # within the plane
        head = planes[indices[0]]
        places = [planes[index].position for index in indices]
        if head.orientation is None or None in head.spacing or any(place is None for place in places):
            return []
        shifts = (np.array(places) - head.position) @ head.orientation.T
        columns = [_cluster(column, float(mm or 0)) for column, mm in zip(shifts.T, head.spacing[::-1], strict=True)]
        keys: list[Any] = [tuple(pair) for pair in np.stack(columns, axis=1).tolist()]
    else:
        keys = [planes[index].key(name) for index in indices]
    if name in MEASURED:
        equal: dict[Any, Any] = {}
        last = -math.inf
        for number in sorted({part for key in keys if key for part in key if isinstance(part, float)}):
            equal[number] = equal[last] if number - last <= EQUAL_NUMBERS * abs(number) else number
            last = number
        keys = [key and tuple(equal.get(part, part) for part in key) for key in keys]
    groups = defaultdict(list)
    for key, index in zip(keys, indices, strict=True):
        groups[_sortable(key)].append(index)
    return [groups[key] for key in sorted(groups)]


def _sortable(key: tuple[Any, ...] | None) -> tuple[Any, ...]:
    return (2,) if key is None else (int(isinstance(key[0], str)), *key)


def _interleave(
    planes: list[Plane], heights: np.ndarray, groups: list[list[int]], name: str, have_repeats: bool
) -> bool:
    """Return whether groups are acquisitions of their own: slices of one lie between those of another.

    Groups that follow each other, such as the rotations of a step-and-shoot CT, are parts of one volume.
    """
    spans = [(float(heights[group].min()), float(heights[group].max())) for group in groups]
    largest = max(range(len(groups)), key=lambda number: len(groups[number]))
    low, high = spans[largest]
    whole = np.sort(heights[[index for group in groups for index in group]])
    tolerance = _tolerance(planes)
    if min(end - start for start, end in spans) <= tolerance or high - low < 0.3 * (whole[-1] - whole[0]):
        return False
    shared = [min(end, high) - max(start, low) for number, (start, end) in enumerate(spans) if number != largest]
    if max(shared) <= tolerance:
        return False
    if name != "AcquisitionNumber" or have_repeats:
        return True
    gaps, thickness = np.diff(whole), planes[groups[0][0]].key("SliceThickness")
    acquired_in_turns = thickness is not None and float(thickness[0]) <= 1.25 * gaps.min()
    return not (acquired_in_turns and gaps.max() <= 1.1 * gaps.min())


def _order_keys(planes: list[Plane], positions: Sequence[int]) -> tuple[str, list[Any]]:
    """Return the element that sorts planes at one position (rule 4), and their sort keys."""
    by_file = "input order" if len({plane.index for plane in planes}) > 1 else "frame number"
    best, best_keys, most = by_file, [()] * len(planes), len(set(positions))
    for name in ORDER:
        keys = [plane.key(name) for plane in planes]
        distinct = len(set(zip(positions, keys, strict=True)))
        if None not in keys and distinct > most:
            best, best_keys, most = name, [_sortable(key) for key in keys], distinct
        if most == len(planes):
            break
    if best != by_file and most < len(planes):
        best = f"{best}, {by_file}"
    return best, [(key, plane.index, plane.frame) for key, plane in zip(best_keys, planes, strict=True)]


def _in_order(planes: list[Plane], description: Description) -> list[Plane]:
    description["order"], keys = _order_keys(planes, [0] * len(planes))
    return [planes[index] for index in sorted(range(len(planes)), key=keys.__getitem__)]


def _step(planes: list[Plane], heights: np.ndarray, description: Description) -> np.ndarray:
    """Return the step from a plane to the next, and record what is not uniform."""
    if any(plane.position is None for plane in planes):
        gaps = np.diff(heights)
        step = np.array([np.median(gaps)])
    else:
        positions = np.array([plane.position for plane in planes])
        gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
        line = (positions[-1] - positions[0]) / np.linalg.norm(positions[-1] - positions[0])
        step = line * np.median(gaps)
        if planes[0].orientation is not None:
            tilt = math.degrees(math.acos(min(1.0, float(line @ planes[0].normal))))
            description["gantry_tilt_degrees"] = round(tilt, 1)
    distance = float(np.median(gaps))
    description["slices"] = len(planes)
    description["missing_slices"] = int((np.rint(gaps / distance) - 1).clip(0).sum())
    if gaps.max() - gaps.min() > 0.01 * distance:
        description["slice_spacing_min"], description["slice_spacing_max"] = (
            round(float(mm), 4) for mm in (gaps.min(), gaps.max())
        )
    return step
