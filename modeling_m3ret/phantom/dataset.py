"""The phantom collection: a synthetic data set that any fresh machine can make in about a minute, in real file formats.

It lets every command run without a download: classes, subjects and cross-modal truth (the same subject in another
modality). NOTHING IN IT COMES FROM A PATIENT, and figures on it say nothing about the clinic. `phantom_anatomy.py` says
what a subject is made of, `phantom_rendering.py` how it looks in each modality; here the renderings become DICOM,
NIfTI, PNG and MP4 files with a manifest.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..worker_process import initialise_worker, worker_context
from . import SYNTHETIC_SOURCE
from .anatomy import Anatomy, random_stream, subject_anatomy
from .rendering import RENDERERS, Rendering, format_turn


VERSION = 1  # raise it when a byte of the output changes: a folder of another version is never taken for this one
COLUMNS = ("id", "file", "modality", "anatomy", "label", "group", "source", "licence", "extra")
LICENCE, PATIENT_NAME = "Apache-2.0", "PHANTOM^SYNTHETIC"
COMMENT = "Synthetic phantom, no patient"


def _dicom(anatomy: Anatomy, modality: str, number: int = 0) -> Any:
    """A DICOM data set of patient, study and series level, whose identifiers follow from the subject alone."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import (
        CTImageStorage,
        DigitalXRayImageStorageForPresentation,
        ExplicitVRLittleEndian,
        UltrasoundMultiFrameImageStorage,
        generate_uid,
    )

    def uid(*parts: object) -> str:
        return generate_uid(entropy_srcs=["m3ret-phantom", *map(str, (VERSION, anatomy.seed, anatomy.subject, *parts))])

    storage = {
        "CT": CTImageStorage,
        "DX": DigitalXRayImageStorageForPresentation,
        "US": UltrasoundMultiFrameImageStorage,
    }
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = storage[modality], uid(modality, number)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    header.PatientName, header.PatientID = PATIENT_NAME, f"PHANTOM-{anatomy.subject:04d}"
    header.ImageComments = header.SeriesDescription = COMMENT
    header.StudyInstanceUID, header.SeriesInstanceUID = uid("study"), uid("series", modality)
    header.FrameOfReferenceUID, header.Modality = uid("frame"), modality
    header.SeriesNumber, header.InstanceNumber = 1, number + 1
    return header


def _write_dicom(path: Path, header: Any, pixels: NDArray[Any], stored_bits: int) -> None:
    """Set the pixel module for (H, W) or, with frames, (D, H, W) and write; `header` holds all the rest."""
    header.Rows, header.Columns = pixels.shape[-2:]
    header.SamplesPerPixel, header.PixelRepresentation = 1, int(pixels.dtype.kind == "i")
    header.BitsAllocated, header.BitsStored, header.HighBit = pixels.itemsize * 8, stored_bits, stored_bits - 1
    header.PixelData = pixels.tobytes()
    header["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
    header.save_as(path, enforce_file_format=True)


def _write_series(folder: Path, anatomy: Anatomy, scan: Rendering, rng: np.random.Generator) -> None:
    """One file per slice; the names are shuffled, so that only ImagePositionPatient gives the order."""
    folder.mkdir()
    names = rng.permutation(len(scan.array))
    spacing, slope, intercept = scan.spacing_mm, 1, -1024
    corner = -np.array(spacing) * (np.array(scan.array.shape) - 1) / 2
    for number, pixels in enumerate(scan.array):
        header = _dicom(anatomy, "CT", number)
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        header.ImagePositionPatient = [f"{v:.6g}" for v in (corner[2], corner[1], corner[0] + number * spacing[0])]
        header.PixelSpacing, header.SliceThickness = [spacing[1], spacing[2]], spacing[0]
        header.RescaleSlope, header.RescaleIntercept, header.RescaleType = slope, intercept, "HU"
        header.PhotometricInterpretation = "MONOCHROME2"
        _write_dicom(folder / f"{names[number]:04d}.dcm", header, pixels - np.int16(intercept), 16)


def _write_nifti(path: Path, scan: Rendering, flip: bool) -> None:
    """int16 NIfTI-1 in (x, y, z) order with the affine in RAS; `flip` stores the first axis the other way round."""
    import nibabel

    # Columns of the affine: the array's axes from last to first; rows: (z, y, x) of DICOM to (right, front, up).
    axes = (scan.directions * np.array(scan.spacing_mm))[::-1, ::-1] * np.array([[-1], [-1], [1]])
    data, affine = scan.array.transpose(2, 1, 0), np.eye(4)
    if flip:
        data, axes = data[::-1], axes * np.array([-1, 1, 1])
    affine[:3, :3] = axes
    affine[:3, 3] = -axes @ ((np.array(data.shape) - 1) / 2)
    image = nibabel.Nifti1Image(np.ascontiguousarray(data), affine)
    image.header["descrip"] = COMMENT.encode()
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    # Level 1 is four times faster than the default and 5 % larger; no time stamp, or two runs would differ.
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content)


def _write_png(path: Path, pixels: NDArray[Any]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("Description", COMMENT)
    Image.fromarray(pixels).save(path, pnginfo=text, compress_level=1)


def _write_mp4(path: Path, frames: NDArray[np.uint8]) -> None:
    """H.264 in yuv420p from (D, H, W) or (D, H, W, 3)."""
    import av

    if frames.ndim == 3:
        frames = np.repeat(frames[..., None], 3, axis=-1)
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # yuv420p needs even sides
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata["comment"] = COMMENT
        # A fixed quantiser and one thread: x264's rate control (crf) does not give the same bytes twice.
        stream = container.add_stream("libx264", rate=10, options={"preset": "veryfast", "qp": "22", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def _write_scan(folder: Path, anatomy: Anatomy, modality: str, scan: Rendering, rng: np.random.Generator) -> str:
    """Write one rendering; returns its path in the collection."""
    turn = format_turn(anatomy.subject)
    stem = f"{modality}/subject-{anatomy.subject:04d}"
    if modality == "ct" and turn % 2:
        _write_series(folder / stem, anatomy, scan, rng)
        return stem
    if modality in ("ct", "mri"):
        name = stem + (".nii" if turn % 4 == 0 else ".nii.gz")
        _write_nifti(folder / name, scan, flip=turn // 4 % 2 == 1)
    elif modality == "xray" and turn % 2:
        name, header, pixels = stem + ".dcm", _dicom(anatomy, "DX"), scan.array
        dark_bone = turn % 4 == 1
        header.PhotometricInterpretation = "MONOCHROME1" if dark_bone else "MONOCHROME2"
        header.PresentationLUTShape = "INVERSE" if dark_bone else "IDENTITY"
        header.PixelSpacing = [f"{v:.6g}" for v in scan.spacing_mm[1:]]
        header.ViewPosition, header.BodyPartExamined = scan.note.upper()[:16], anatomy.name.upper()
        _write_dicom(folder / name, header, 4095 - pixels if dark_bone else pixels, 12)
    elif modality == "xray":
        name = stem + ".png"
        _write_png(folder / name, scan.array * np.uint16(16))  # 12 bits at the top of 16, as PNG asks for full scale
    elif modality == "ultrasound" and turn % 3 == 0:
        from pydicom.dataset import Dataset

        name, header, region = stem + ".dcm", _dicom(anatomy, "US"), Dataset()
        header.PhotometricInterpretation, header.NumberOfFrames, header.FrameTime = "MONOCHROME2", len(scan.array), 100
        region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = 1, 1, 0
        region.RegionLocationMinX0, region.RegionLocationMinY0 = 0, 0
        region.RegionLocationMaxX1, region.RegionLocationMaxY1 = scan.array.shape[2] - 1, scan.array.shape[1] - 1
        region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3  # cm
        region.PhysicalDeltaX, region.PhysicalDeltaY = scan.spacing_mm[2] / 10, scan.spacing_mm[1] / 10
        header.SequenceOfUltrasoundRegions = [region]
        _write_dicom(folder / name, header, scan.array, 8)
    elif modality == "ultrasound" and turn % 3 == 1:
        name = stem + ".png"
        _write_png(folder / name, scan.array[len(scan.array) // 2])
    else:
        name = stem + ".mp4"
        _write_mp4(folder / name, scan.array)
    return name


def _write_subject(subject: int, *, folder: Path, seed: int) -> list[dict[str, str]]:
    """Write a subject's five scans; returns their rows of the manifest."""
    anatomy, rows = subject_anatomy(seed, subject), []
    for stream, (modality, render) in enumerate(RENDERERS.items(), start=1):
        rng = random_stream(seed, subject, stream)
        scan = render(anatomy, rng)
        name = _write_scan(folder, anatomy, modality, scan, rng)
        group = f"subject-{subject:04d}"
        values = (
            f"{modality}-{subject:04d}",
            name,
            modality,
            anatomy.name,
            anatomy.name,
            group,
            SYNTHETIC_SOURCE,
            LICENCE,
            scan.note,
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _is_this_phantom(folder: Path, description: dict[str, Any]) -> bool:
    try:
        found = json.loads((folder / "phantom.json").read_text())
        return all(found.get(key) == description[key] for key in ("version", "seed", "subjects"))
    except (OSError, ValueError, AttributeError):
        return False


def write_phantom(folder: Path, *, subjects: int = 200, seed: int = 0, workers: int | None = None) -> Path:
    """Write the collection to `folder` and return it: five scans per subject, `manifest.csv` and `phantom.json`.

    Everything is written beside `folder` and renamed at the end, so a folder of this name is always whole. If it
    already holds this very collection nothing happens; if it holds anything else, `FileExistsError`.
    The defaults: 200 subjects are 25 per class, enough for a ranking and about a minute on two cores; `workers=None`
    takes one process per core, or none for a handful of subjects, where starting processes takes longer than the work.
    They import the script that calls this again, which therefore needs `if __name__ == "__main__":`.
    """
    folder = Path(folder)
    if subjects < 1 or seed < 0:
        raise ValueError(f"subjects must be at least 1 and seed at least 0, not {subjects} and {seed}")
    description: dict[str, Any] = {
        "what": "synthetic phantom collection: no patient data, not for clinical conclusions",
        "version": VERSION,
        "seed": seed,
        "subjects": subjects,
    }
    if _is_this_phantom(folder, description):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} holds something other than the phantom of version {VERSION}, seed {seed}, {subjects} subjects; "
            "it is left alone: choose another folder, or remove it yourself"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".part", dir=folder.parent))
    try:
        for modality in RENDERERS:
            (part / modality).mkdir()
        write = partial(_write_subject, folder=part, seed=seed)
        if workers is None:
            workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            workers = min(workers, subjects // 24)
        if workers > 1:
            rows = list(chain.from_iterable(_in_processes(write, range(subjects), workers)))
        else:
            rows = list(chain.from_iterable(map(write, range(subjects))))
        with (part / "manifest.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        description["counts"] = {key: dict(Counter(row[key] for row in rows)) for key in ("modality", "anatomy")}
        (part / "phantom.json").write_text(json.dumps(description, indent=2) + "\n")
        part.chmod(0o755)  # mkdtemp's 0o700 would hide the collection from everyone else
        try:
            part.rename(folder)
        except OSError:
            if not _is_this_phantom(folder, description):  # else another process wrote the same one meanwhile
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _in_processes(function: Callable[[int], Any], items: range, workers: int) -> list[Any]:
    """Map in processes of their own."""
    with ProcessPoolExecutor(workers, mp_context=worker_context([__name__]), initializer=initialise_worker) as pool:
        return list(pool.map(function, items, chunksize=4))
