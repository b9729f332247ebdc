"""Read DICOM files as one scan.

A single image, a cine or a whole series becomes one `Scan`. Here, files are parsed and one series is selected;
`dicom_planes_m3ret` selects and sorts its frames, and `dicom_pixels_m3ret` decodes them. Nothing is decoded before the
header has passed the limits. This file is copied into every checkpoint and imports only NumPy; pydicom is imported when
a file needs it.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import zlib
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .dicom_pixels_m3ret import PIXEL_KEYS, decode_frames, in_plane_spacing, is_hounsfield, read_numbers, read_pixels
from .dicom_planes_m3ret import Arrangement, Plane, arrange, frames_are_described, split_into_planes
from .intensity_m3ret import to_unit_range
from .reading_video_m3ret import read_video
from .scan_m3ret import AnyScan, Description, ReadRequest, Spacing, display_name, sniff, to_canonical_orientation


EXPLICIT_LITTLE_ENDIAN, DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"
VIDEO = tuple(f"1.2.840.10008.1.2.4.{number}" for number in range(100, 109))  # MPEG-2, H.264, HEVC; also fragmentable
BYTES_PER_FRAME = 4096  # memory that is assumed for the metadata of a frame
# Objects that describe or refer to scans: start of the SOP class (PS3.4, B.5), what they are.
NOT_SCANS = {
    "1.2.840.10008.1.3.10": "a DICOMDIR",
    "1.2.840.10008.5.1.4.1.1.66.": "a segmentation or registration",
    "1.2.840.10008.5.1.4.1.1.481.3": "a structure set",
    "1.2.840.10008.5.1.4.1.1.11.": "a presentation state",
    "1.2.840.10008.5.1.4.1.1.88.": "a report or key object selection",
    "1.2.840.10008.5.1.4.1.1.104.": "an encapsulated document",
    "1.2.840.10008.5.1.4.1.1.77.1.6": "a whole-slide image in tiles",
}
NOT_SCANS_BY_MODALITY = ("SEG", "RTSTRUCT", "RTPLAN", "PR", "SR", "KO", "REG", "DOC")
LISTED_SERIES = 10  # in an error message


@dataclass(frozen=True, eq=False)
class _File:
    """A parsed file with pixels."""

    name: str  # in messages
    dataset: Any
    frames: int
    is_clip: bool  # a video stream, or several frames without positions

    @property
    def series(self) -> tuple[str, ...]:
        """Series UID, study UID and patient. Scans of two patients are never one series, even if they share a UID."""
        keys = ("SeriesInstanceUID", "StudyInstanceUID", "PatientID")
        return tuple(str(self.dataset.get(key) or "").strip(" \0") for key in keys)

    @property
    def series_number(self) -> float:
        number = read_numbers(self.dataset, "SeriesNumber", 1)
        return number[0] if number else math.inf


def read_folder(folder: Path, request: ReadRequest) -> AnyScan:
    """Read a series of the DICOM files in a folder. Other files are ignored and counted."""
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
        request: the read request. Its `series` selects one of several series.
        description: becomes the description of the scan. `arrange` documents what it says about frames.
    """
    files = _select_series(_parse_files(sources, request, description), request, description)
    burned_in = str(files[0].dataset.get("BurnedInAnnotation", "")).lower()
    description["burned_in_annotation"] = burned_in if burned_in in ("yes", "no") else "unknown"
    # A clip is a scan of its own. It is read if it has more frames than all other files together have slices.
    slices = [file for file in files if not file.is_clip]
    clip = max((file for file in files if file.is_clip), key=lambda file: file.frames, default=None)
    if clip is not None and clip.frames > sum(file.frames for file in slices):
        if len(files) > 1:
            description["slices_left_out"] = sum(file.frames for file in files) - clip.frames
            description["clips"] = sum(file.is_clip for file in files)
        return _read_clip(clip, replace(request, name=clip.name), description)
    description["format"] = "dicom series" if len(slices) > 1 else "dicom"
    if len(slices) == 1 and slices[0].frames > 1:
        description["format"] = "dicom multi-frame"
    _check_frame_count(sum(file.frames for file in slices), request)
    planes: list[Plane] = []
    for index, file in enumerate(slices):
        file_request = replace(request, name=file.name)
        with file_request.translate_errors():
            planes += split_into_planes(file.dataset, range(file.frames), file.name, index, file_request)
    if any(plane.is_tile for plane in planes):
        description["format"] = "dicom mosaic"
    arrangement = arrange(planes, description)
    if len(files) > len(slices):
        left_out = sum(file.frames for file in files if file.is_clip)
        description["slices_left_out"] = description.get("slices_left_out", 0) + left_out
    planes = arrangement.planes
    is_sequence = arrangement.step is None and len(planes) > 1
    # Without positions, values in HU are a volume, whereas others may be a clip.
    if is_sequence and (arrangement.is_clip or not all(is_hounsfield(plane) for plane in planes)):
        planes = [planes[index] for index in request.select_frames(len(planes), description)]
    return _make_scan(replace(arrangement, planes=planes), request, description)


def _check_file_count(count: int, request: ReadRequest) -> None:
    if count > (limit := request.limits.max_files):
        advice = "Pass a folder with one DICOM series, or raise `ReadLimits.max_files`."
        raise request.error("too_large", f"at most {limit:,} files", f"{count:,} or more", advice)


def _check_frame_count(count: int, request: ReadRequest) -> None:
    if count > (limit := request.limits.max_decoded_bytes // BYTES_PER_FRAME):
        advice = "Read fewer frames with `num_frames`, or raise `ReadLimits.max_decoded_bytes`."
        raise request.error("too_large", f"at most {limit:,} frames", f"{count:,}", advice)


def _parse_files(sources: list[Any], request: ReadRequest, description: Description) -> list[_File]:
    """Parse all sources and check their sizes. Objects that are not scans are left out of a folder, and counted."""
    if not sources:
        raise request.error("unsupported", "a DICOM series", "an empty list")
    _check_file_count(len(sources), request)
    files: list[_File] = []
    kind = ""
    for source in sources:
        name = f"{request.name}/{display_name(source)}" if len(sources) > 1 else request.name
        file_request = replace(request, name=name)
        with file_request.translate_errors():
            dataset = _parse_dataset(source, file_request)
            kind = _kind_if_not_scan(dataset)
            if not kind:
                files.append(_checked_file(dataset, file_request))
            elif "files_ignored" in description:
                description["files_ignored"] += 1
            else:
                advice = "Pass the files or the folder of the images themselves."
                raise file_request.error("unsupported", "an image, a cine or a series", kind, advice)
    if not files:
        raise request.error("unsupported", "a folder with a DICOM series", f"no image, but {kind}")
    return files


def _kind_if_not_scan(dataset: Any) -> str:
    """Return what kind of object a dataset is if it is not a scan, otherwise an empty string."""
    sop_class, modality = str(dataset.get("SOPClassUID", "")), str(dataset.get("Modality", "")).strip().upper()
    if "DirectoryRecordSequence" in dataset:
        return "a DICOMDIR"
    kind = next((kind for start, kind in NOT_SCANS.items() if sop_class.startswith(start)), "")
    if not kind and modality in NOT_SCANS_BY_MODALITY:
        return f"an object of modality {modality}"
    return kind or ("" if any(key in dataset for key in PIXEL_KEYS) else "DICOM without pixel data")


def _checked_file(dataset: Any, request: ReadRequest) -> _File:
    """Return a file after checking its size. For a clip, only the frames that will be read count."""
    rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel") or 1)
    frames = int(dataset.get("NumberOfFrames") or 1)
    request.check_pixels(rows, columns)
    is_video = _is_video(dataset)
    is_clip = is_video or not frames_are_described(dataset)
    if not is_video:  # the video reader checks the stream itself
        kept = min(frames, request.num_frames or frames) if is_clip else frames
        request.check_size((kept, rows, columns, samples), 1)
        compressed_size = len(next(dataset[key].value for key in PIXEL_KEYS if key in dataset))
        request.check_ratio(frames * rows * columns * samples, compressed_size)
    return _File(request.name, dataset, max(1, frames), is_clip)


def _is_video(dataset: Any) -> bool:
    syntax = str(getattr(dataset, "file_meta", {}).get("TransferSyntaxUID", ""))
    return syntax.removesuffix(".1") in VIDEO


def _select_series(files: list[_File], request: ReadRequest, description: Description) -> list[_File]:
    """Return the files of the series that `request.series` selects; without it, refuse several."""
    found = dict.fromkeys(file.series for file in files)
    members: dict[tuple[str, ...], list[_File]] = defaultdict(list)
    for file in files:  # a file that lacks a patient or study joins a series if only one fits
        fitting = [key for key in found if key != file.series and _may_be_of(file.series, key)]
        members[fitting[0] if len(fitting) == 1 else file.series].append(file)
    ranks = {key: (min(file.series_number for file in group), key) for key, group in members.items()}
    series = [members[key] for key in sorted(members, key=ranks.__getitem__)]
    choices = [f"{index} ({_describe(group)})" for index, group in enumerate(series[:LISTED_SERIES])]
    choices += ["..."] * (len(series) > LISTED_SERIES)
    wanted = request.series
    if wanted is None:
        matching = list(range(len(series)))
    elif wanted == "largest":
        matching = [max(range(len(series)), key=lambda index: sum(file.frames for file in series[index]))]
    elif isinstance(wanted, int):
        matching = [wanted] if 0 <= wanted < len(series) else []
    else:
        matching = [index for index, group in enumerate(series) if group[0].series[0] == wanted]
    if len(matching) != 1:
        advice = f'Choose one with `series`: its UID, "largest", or its index out of {", ".join(choices)}.'
        got = f"{len(matching)} series" if matching else "none with this UID or index"
        raise request.error("unsupported", "one DICOM series", got, advice)
    if len(series) > 1:
        description["series_total"], description["series_index"] = len(series), matching[0]
    return series[matching[0]]


def _may_be_of(series: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Return whether two series share their UID, and `series` has no value wherever it differs from `other`."""
    return series[0] == other[0] and all(part in ("", whole) for part, whole in zip(series, other, strict=True))


def _describe(files: list[_File]) -> str:
    sizes = sorted({(int(file.dataset.Rows), int(file.dataset.Columns)) for file in files})
    size = f"{sizes[0][0]} x {sizes[0][1]}" if len(sizes) == 1 else "several sizes"
    return f"{sum(file.frames for file in files)} frames of {size}"


def _parse_dataset(source: Any, request: ReadRequest) -> Any:
    """Return a pydicom Dataset whose pixels are not decoded.

    pydicom inflates a deflated file without a limit, so it is inflated in chunks first to check its size.
    """
    if hasattr(source, "group_dataset"):
        return source
    if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        advice = "A list within a list is a DICOM series. Pass voxels as an array, for example by numpy.asarray."
        got = f"an object of type {type(source).__name__}"
        raise request.error("unsupported", "a DICOM file or dataset", got, advice)
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


def _read_clip(file: _File, request: ReadRequest, description: Description) -> AnyScan:
    """Read a multi-frame file whose frames follow each other in time, or a video stream in DICOM."""
    dataset = file.dataset
    if _is_video(dataset):
        return _read_video_stream(dataset, request, description)
    description["format"] = "dicom multi-frame"
    head = next(split_into_planes(dataset, [0], file.name, 0, request))
    is_volume = is_hounsfield(head)  # without positions, values in HU are a volume
    _check_frame_count(file.frames if is_volume else min(file.frames, request.num_frames or file.frames), request)
    frames = range(file.frames) if is_volume else request.select_frames(file.frames, description)
    planes = list(split_into_planes(dataset, frames, file.name, 0, request))
    return _make_scan(Arrangement(planes, None, not is_volume), request, description)


def _read_video_stream(dataset: Any, request: ReadRequest, description: Description) -> AnyScan:
    """Read a stream of MPEG-2, H.264 or HEVC (PS3.5, 8.2.5 to 8.2.8). Its own header declares size and frames."""
    encaps = importlib.import_module("pydicom.encaps")
    stream = b"".join(encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    head = next(split_into_planes(dataset, [0], request.name, 0, request))
    mm = head.spacing if head.spacing[0] else in_plane_spacing(dataset, description)
    scan = read_video(stream, request)
    scan.description.update({**description, "format": "dicom video"})
    if request.spacing is not None or not mm[0]:
        return scan
    if "pixel_aspect_ratio" not in description:
        scan.description.pop("pixel_aspect_ratio", None)  # of the stream, whereas the header declares mm
    return replace(scan, spacing=(None, *mm))


def _make_scan(arrangement: Arrangement, request: ReadRequest, description: Description) -> AnyScan:
    """Decode sorted planes and scale them to [0, 1]. Planes with a step are a volume, which is oriented too."""
    planes = _untile(arrangement.planes, request)
    step = arrangement.step
    pixels = read_pixels(planes, step is not None, request, description)
    view, spacing = _orient(pixels.array, planes[0], step, description)
    padding = None if pixels.padding is None else _orient(pixels.padding, planes[0], step, description)[0]
    return to_unit_range(
        view, spacing, request, description, rule=pixels.rule, padding=padding, inverted=pixels.inverted
    )


def _untile(planes: list[Plane], request: ReadRequest) -> list[Plane]:
    """Replace the datasets of mosaics by ones with a frame per tile."""
    tiled = {}
    for plane in {id(plane.dataset): plane for plane in planes if plane.is_tile}.values():
        file_request = replace(request, name=plane.name)
        with file_request.translate_errors():
            pixels = np.asarray(next(iter(decode_frames(plane.dataset, [0], file_request)[0])))
            rows, columns = plane.size
            side = pixels.shape[0] // rows
            frames = pixels.reshape(side, rows, side, columns).swapaxes(1, 2)
            pydicom = importlib.import_module("pydicom.dataset")
            dataset, dataset.file_meta = pydicom.Dataset(), pydicom.FileMetaDataset()
            dataset.update(plane.dataset)
            dataset.file_meta.TransferSyntaxUID = EXPLICIT_LITTLE_ENDIAN
            data = np.ascontiguousarray(frames, frames.dtype.newbyteorder("<")).tobytes()
            for keyword, vr, value in (  # add new elements: existing ones are shared with the caller's dataset
                ("Rows", "US", rows),
                ("Columns", "US", columns),
                ("NumberOfFrames", "IS", side**2),
                ("BitsAllocated", "US", 8 * frames.itemsize),
                ("PixelData", "OW", data),
            ):
                dataset.add_new(keyword, vr, value)
            tiled[id(plane.dataset)] = dataset
    return [replace(plane, dataset=tiled.get(id(plane.dataset), plane.dataset)) for plane in planes]


def _orient(
    array: np.ndarray, plane: Plane, step: np.ndarray | None, description: Description
) -> tuple[np.ndarray, Spacing]:
    """Return an array in the canonical orientation with its spacing; as stored if the orientation is unknown."""
    row_mm, column_mm = plane.spacing if plane.spacing[0] else in_plane_spacing(plane.dataset, description)
    if step is None or "pixel_aspect_ratio" in description:
        return array, (None, row_mm, column_mm)
    if len(step) == 1 or plane.orientation is None or row_mm is None or column_mm is None:
        return array, (float(np.linalg.norm(step)), row_mm, column_mm)
    along, down = plane.orientation
    lps_to_ras = np.array([[-1.0], [-1.0], [1.0]])
    steps = np.stack([step, down * row_mm, along * column_mm], axis=1)
    return to_canonical_orientation(array, steps * lps_to_ras, description)
