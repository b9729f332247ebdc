"""Write the phantom collection: a synthetic dataset in real file formats that takes about a minute on any machine.

It lets every command run without a download. It has classes, subjects and cross-modal ground truth: the same subject in
five modalities. Nothing in it comes from a patient, and results on it have no clinical meaning. `anatomy.py` generates
subjects and `rendering.py` their scans; this file writes them as DICOM, NIfTI, PNG and MP4 with a manifest.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import av
import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset

from ..atomic_io import atomic_folder
from ..cpu import available_cores
from ..errors import InputError
from ..worker_process import initialise_worker, worker_context
from . import SYNTHETIC_SOURCE
from .anatomy import Anatomy, format_index, generate_anatomy, random_stream
from .rendering import RENDERERS, Rendering


VERSION = 1  # increase it if a byte of the output changes; a folder of another version is never reused
COLUMNS = ("id", "file", "modality", "anatomy", "label", "group", "source", "licence", "extra")
LICENCE, PATIENT_NAME = "Apache-2.0", "PHANTOM^SYNTHETIC"
SOP_CLASSES = {
    "CT": uid.CTImageStorage,
    "DX": uid.DigitalXRayImageStorageForPresentation,
    "US": uid.UltrasoundMultiFrameImageStorage,
}
WHAT = "synthetic phantom collection: no patient data, not for clinical conclusions"
COMMENT = "Synthetic phantom, no patient"
SUBJECTS_PER_WORKER = 24  # with fewer, starting a process takes longer than its work


class OccupiedFolderError(InputError, FileExistsError):
    """The output folder, `folder`, contains something other than the requested phantom."""

    def __init__(self, folder: Path, expected: str):
        problem = f"{folder} is occupied: expected an empty folder or the phantom of {expected}, got other content."
        super().__init__(f"{problem} Choose another folder or remove this one.")
        self.folder = folder


def _dicom_header(anatomy: Anatomy, modality: str, number: int = 0) -> Any:
    """Return a DICOM dataset with patient, study and series modules. Its identifiers depend only on the subject."""

    def generate_uid(*keys: object) -> str:
        source = ("m3ret-phantom", VERSION, anatomy.seed, anatomy.subject, *keys)
        return uid.generate_uid(entropy_srcs=list(map(str, source)))

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = SOP_CLASSES[modality], uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(modality, number)
    header = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    header.PatientName, header.PatientID = PATIENT_NAME, f"PHANTOM-{anatomy.subject:04d}"
    header.ImageComments = header.SeriesDescription = COMMENT
    header.StudyInstanceUID, header.SeriesInstanceUID = generate_uid("study"), generate_uid("series", modality)
    header.FrameOfReferenceUID, header.Modality = generate_uid("frame"), modality
    header.SeriesNumber, header.InstanceNumber = 1, number + 1
    return header


def _write_dicom(path: Path, header: Any, pixels: NDArray[Any], stored_bits: int) -> None:
    """Add the pixel module for (H, W), or (D, H, W) with frames, to a header and write the file."""
    header.Rows, header.Columns = pixels.shape[-2:]
    header.SamplesPerPixel, header.PixelRepresentation = 1, int(pixels.dtype.kind == "i")
    header.BitsAllocated, header.BitsStored, header.HighBit = pixels.itemsize * 8, stored_bits, stored_bits - 1
    header.PixelData = pixels.tobytes()
    header["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
    header.save_as(path, enforce_file_format=True)


def _write_series(folder: Path, anatomy: Anatomy, scan: Rendering, rng: np.random.Generator) -> None:
    """Write one file per slice. Names are shuffled, so that only ImagePositionPatient defines the order."""
    folder.mkdir()
    names = rng.permutation(len(scan.array))
    spacing, slope, intercept = scan.spacing_mm, 1, -1024
    corner = -np.array(spacing) * (np.array(scan.array.shape) - 1) / 2
    for number, pixels in enumerate(scan.array):
        header = _dicom_header(anatomy, "CT", number)
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        header.ImagePositionPatient = [f"{v:.6g}" for v in (corner[2], corner[1], corner[0] + number * spacing[0])]
        header.PixelSpacing, header.SliceThickness = [spacing[1], spacing[2]], spacing[0]
        header.RescaleSlope, header.RescaleIntercept, header.RescaleType = slope, intercept, "HU"
        header.PhotometricInterpretation = "MONOCHROME2"
        _write_dicom(folder / f"{names[number]:04d}.dcm", header, pixels - np.int16(intercept), 16)


def _write_nifti(path: Path, scan: Rendering, flip: bool) -> None:
    """Write int16 NIfTI-1 in (x, y, z) order with a RAS affine. `flip` stores the first axis in reverse."""
    # Columns of the affine are the array's axes from last to first; rows change from (z, y, x) in DICOM to RAS.
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
    # Level 1 is four times faster than the default and 5 % larger. A time stamp would make runs differ.
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content)


def _write_png(path: Path, pixels: NDArray[Any]) -> None:
    text = PngInfo()
    text.add_text("Description", COMMENT)
    Image.fromarray(pixels).save(path, pnginfo=text, compress_level=1)


def _write_mp4(path: Path, frames: NDArray[np.uint8]) -> None:
    """Write H.264 in yuv420p from (D, H, W) or (D, H, W, 3)."""
    if frames.ndim == 3:
        frames = np.repeat(frames[..., None], 3, axis=-1)
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # yuv420p needs even sides
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata["comment"] = COMMENT
        # With a fixed quantiser and one thread x264 is deterministic; with rate control (crf) it is not.
        stream = container.add_stream("libx264", rate=10, options={"preset": "veryfast", "qp": "22", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def _write_scan(folder: Path, anatomy: Anatomy, modality: str, scan: Rendering, rng: np.random.Generator) -> str:
    """Write one rendering in a format that depends on the subject, and return its path in the collection."""
    index = format_index(anatomy.subject)
    stem = f"{modality}/subject-{anatomy.subject:04d}"
    if modality == "ct" and index % 2:
        _write_series(folder / stem, anatomy, scan, rng)
        return stem
    if modality in ("ct", "mri"):
        name = stem + (".nii" if index % 4 == 0 else ".nii.gz")
        _write_nifti(folder / name, scan, flip=index // 4 % 2 == 1)
    elif modality == "xray" and index % 2:
        name, header, pixels = stem + ".dcm", _dicom_header(anatomy, "DX"), scan.array
        dark_bone = index % 4 == 1
        header.PhotometricInterpretation = "MONOCHROME1" if dark_bone else "MONOCHROME2"
        header.PresentationLUTShape = "INVERSE" if dark_bone else "IDENTITY"
        header.PixelSpacing = [f"{v:.6g}" for v in scan.spacing_mm[1:]]
        header.ViewPosition, header.BodyPartExamined = scan.note.upper()[:16], anatomy.name.upper()
        _write_dicom(folder / name, header, 4095 - pixels if dark_bone else pixels, 12)
    elif modality == "xray":
        name = stem + ".png"
        _write_png(folder / name, scan.array * np.uint16(16))  # PNG samples use the full scale of 16 bits
    elif modality == "ultrasound" and index % 3 == 0:
        name, header, region = stem + ".dcm", _dicom_header(anatomy, "US"), Dataset()
        header.PhotometricInterpretation, header.NumberOfFrames, header.FrameTime = "MONOCHROME2", len(scan.array), 100
        region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = 1, 1, 0
        region.RegionLocationMinX0, region.RegionLocationMinY0 = 0, 0
        region.RegionLocationMaxX1, region.RegionLocationMaxY1 = scan.array.shape[2] - 1, scan.array.shape[1] - 1
        region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3  # cm
        region.PhysicalDeltaX, region.PhysicalDeltaY = scan.spacing_mm[2] / 10, scan.spacing_mm[1] / 10
        header.SequenceOfUltrasoundRegions = [region]
        _write_dicom(folder / name, header, scan.array, 8)
    elif modality == "ultrasound" and index % 3 == 1:
        name = stem + ".png"
        _write_png(folder / name, scan.array[len(scan.array) // 2])
    else:
        name = stem + ".mp4"
        _write_mp4(folder / name, scan.array)
    return name


def _write_subject(subject: int, *, folder: Path, seed: int) -> list[dict[str, str]]:
    """Write the five scans of a subject and return their rows of the manifest."""
    anatomy, rows = generate_anatomy(seed, subject), []
    for stream, (modality, render) in enumerate(RENDERERS.items(), start=1):
        rng = random_stream(seed, subject, stream)
        scan = render(anatomy, rng)
        file = _write_scan(folder, anatomy, modality, scan, rng)
        row = {"id": f"{modality}-{subject:04d}", "file": file, "modality": modality, "group": f"subject-{subject:04d}"}
        row |= dict.fromkeys(("anatomy", "label"), anatomy.name)
        rows.append(row | {"source": SYNTHETIC_SOURCE, "licence": LICENCE, "extra": scan.note})
    return rows


def write_phantom(folder: Path, *, subjects: int = 200, seed: int = 0, workers: int | None = None) -> Path:
    """Write the collection: five scans per subject, `manifest.csv` and `phantom.json`.

    The folder is written atomically. If it already contains this very collection, nothing is written; several processes
    may write the same collection at the same time. The calling script needs `if __name__ == "__main__":`, as worker
    processes import it.

    Args:
        subjects: the default, 25 per class, suffices for a ranking and takes about a minute on two cores.
        workers: number of processes; None starts one per core, or none for a few subjects.

    Raises:
        OccupiedFolderError: if the folder contains anything else. It is a `FileExistsError`.
        InputError: if `subjects` or `seed` is out of range.
    """
    if subjects < 1 or seed < 0:
        raise InputError(f"invalid phantom: expected subjects >= 1 and seed >= 0, got {subjects} and {seed}.")
    description: dict[str, Any] = {"what": WHAT, "version": VERSION, "seed": seed, "subjects": subjects}
    if _contains_phantom(folder, description):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OccupiedFolderError(folder, f"version {VERSION}, seed {seed}, {subjects} subjects")
    if workers is None:
        workers = min(available_cores(), subjects // SUBJECTS_PER_WORKER)
    try:
        with atomic_folder(folder) as partial_folder:
            _write_collection(partial_folder, description, workers)
    except OSError:
        if not _contains_phantom(folder, description):  # unless another process has written the same one meanwhile
            raise
    return folder


def _contains_phantom(folder: Path, description: dict[str, Any]) -> bool:
    try:
        existing = json.loads((folder / "phantom.json").read_text())
        return all(existing.get(key) == description[key] for key in ("version", "seed", "subjects"))
    except (OSError, ValueError, AttributeError):
        return False


def _write_collection(folder: Path, description: dict[str, Any], workers: int) -> None:
    for modality in RENDERERS:
        (folder / modality).mkdir()
    write, subjects = partial(_write_subject, folder=folder, seed=description["seed"]), range(description["subjects"])
    if workers > 1:
        context = worker_context([__name__])
        with ProcessPoolExecutor(workers, mp_context=context, initializer=initialise_worker) as pool:
            rows = list(chain.from_iterable(pool.map(write, subjects, chunksize=4)))
    else:
        rows = list(chain.from_iterable(map(write, subjects)))
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    counts = {key: dict(Counter(row[key] for row in rows)) for key in ("modality", "anatomy")}
    (folder / "phantom.json").write_text(json.dumps(description | {"counts": counts}, indent=2) + "\n")
