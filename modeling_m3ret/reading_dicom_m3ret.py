"""Read DICOM files as one scan.

A single image, a cine or a whole series becomes one `Scan`: frames are sorted by their positions (DICOM PS3.3, section
C.7.6.2), and `dicom_pixels_m3ret` decodes them. Nothing is decoded before the header has passed the limits. This file
travels inside every checkpoint and imports only NumPy; pydicom is imported when a file needs it.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .dicom_pixels_m3ret import PIXEL_KEYS, Frame, in_plane_spacing, is_hounsfield, read_numbers, read_pixels
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


Step = np.ndarray | None  # (3,): from a plane to the next in LPS mm; None for planes that are no volume
DEFLATED = "1.2.840.10008.1.2.1.99"


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
        if not all(is_hounsfield(plane) for plane in planes):  # may be a clip, whereas values in HU are a volume
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
class _Plane(Frame):
    """A frame and its geometry (LPS, mm)."""

    number: int  # InstanceNumber, or the position in the input
    position: np.ndarray | None
    orientation: np.ndarray | None  # (2, 3): direction along a row, direction down a column
    spacing: tuple[float | None, float | None]  # between rows, between columns

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
    instance = read_numbers(dataset, "InstanceNumber", 1)
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
        corner = read_numbers(geometry, "ImagePositionPatient", 3) if has_position else None
        position = np.array(corner) if corner else None
        cosines = read_numbers(item(frame, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
        orientation = np.array(cosines).reshape(2, 3) if cosines and any(cosines) else None
        mm = (read_numbers(measures, key, 2) for key in ("PixelSpacing", "ImagerPixelSpacing"))
        spacing = next(((pair[0], pair[1]) for pair in mm if pair and min(pair) > 0), (None, None))
        values, window = item(frame, "PixelValueTransformationSequence"), item(frame, "FrameVOILUTSequence")
        planes.append(_Plane(request.name, dataset, frame, values, window, number, position, orientation, spacing))
    return planes


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


def _make_scan(planes: list[_Plane], step: Step, request: ReadRequest, description: Description) -> AnyScan:
    """Decode sorted planes and scale them to [0, 1]. With a step they are a volume, which is oriented as well."""
    pixels = read_pixels(planes, step is not None, request, description)
    view, spacing = _orient(pixels.array, planes[0], step, description)
    padding = None if pixels.padding is None else _orient(pixels.padding, planes[0], step, description)[0]
    return to_unit_range(
        view, spacing, request, description, rule=pixels.rule, padding=padding, inverted=pixels.inverted
    )


def _orient(array: np.ndarray, plane: _Plane, step: Step, description: Description) -> tuple[np.ndarray, Spacing]:
    """Bring a volume to the canonical orientation and return its spacing. Without a step, keep the orientation."""
    if step is None:
        return array, (None, *(plane.spacing if plane.spacing[0] else in_plane_spacing(plane.dataset, description)))
    assert plane.orientation is not None
    down, along = plane.orientation[1] * plane.spacing[0], plane.orientation[0] * plane.spacing[1]
    lps_to_ras = np.array([[-1.0], [-1.0], [1.0]])
    return to_canonical_orientation(array, np.stack([step, down, along], axis=1) * lps_to_ras, description)
