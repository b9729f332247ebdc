"""Scan files with known voxels, spacing and headers, written by pydicom and nibabel, and archives of files."""

from __future__ import annotations

import gzip
import io
import zipfile
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, UltrasoundMultiFrameImageStorage


PLANTED = "PLANTED-IDENTIFIER"  # in every text element; must not appear in any output of the reader
CT, MR, CINE = str(CTImageStorage), str(MRImageStorage), str(UltrasoundMultiFrameImageStorage)


def dicom(pixels: np.ndarray, *, sop: str = MR, series: str = "1.2.3", **elements: Any) -> pydicom.Dataset:
    """Return a dataset with the given pixels.

    Args:
        pixels: `(H, W)`, `(F, H, W)`, or either of them with a last axis of RGB.
        sop: SOP class.
        series: SeriesInstanceUID.
        **elements: further elements; None deletes one.
    """
    colour = pixels.shape[-1] == 3 and pixels.ndim > 2
    planes = pixels.shape[: pixels.ndim - (3 if colour else 2)]
    rows, columns = pixels.shape[len(planes) : len(planes) + 2]
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = sop
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = pydicom.uid.generate_uid()
    ds.PatientName, ds.PatientID, ds.InstitutionName, ds.StudyDescription = (PLANTED,) * 4
    ds.SeriesDescription, ds.ProtocolName = PLANTED, PLANTED
    ds.PatientBirthDate, ds.SeriesInstanceUID = "19700101", series
    ds.Rows, ds.Columns, ds.SamplesPerPixel = rows, columns, 3 if colour else 1
    ds.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        ds.PlanarConfiguration = 0
    if planes:
        ds.NumberOfFrames = planes[0]
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.itemsize
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    for key, value in elements.items():
        if value is None:
            del ds[key]
        else:
            setattr(ds, key, value)
    return ds


def dicom_bytes(ds: pydicom.Dataset) -> bytes:
    stream = io.BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def series(volume: np.ndarray, affine: np.ndarray, **elements: Any) -> list[pydicom.Dataset]:
    """Return a volume with a NIfTI (RAS) affine as DICOM slices.

    Slices are stacked along the last axis of the volume; image columns run along its first axis, rows along its second.
    """
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    di, dj = lps[:3, 0], lps[:3, 1]
    slices = []
    for k in range(volume.shape[2]):
        mm = lps @ [0, 0, k, 1]
        slices.append(
            dicom(
                np.ascontiguousarray(volume[:, :, k].T),
                ImagePositionPatient=[f"{v:.6f}" for v in mm[:3]],
                ImageOrientationPatient=[f"{v:.9f}" for v in (*di / np.linalg.norm(di), *dj / np.linalg.norm(dj))],
                PixelSpacing=[float(np.linalg.norm(dj)), float(np.linalg.norm(di))],
                InstanceNumber=volume.shape[2] - k,  # reversed, as positions define the order
                **elements,
            )
        )
    return slices


def reorient(volume: np.ndarray, affine: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the same anatomy with its voxel axes reordered and flipped to the given codes, by nibabel."""
    change = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    return apply_orientation(volume, change), affine @ inv_ornt_aff(change, volume.shape)


def nifti_bytes(volume: np.ndarray, affine: np.ndarray | None, *, zipped: bool = False, **header: Any) -> bytes:
    image = nib.Nifti1Image(volume, affine)
    for key, value in header.items():
        image.header[key] = value
    return gzip.compress(image.to_bytes()) if zipped else image.to_bytes()


def percentiles(array: np.ndarray) -> np.ndarray:
    """Return values scaled to [0, 1] by their percentiles."""
    low, high = np.percentile(array, [0.5, 99.5])
    return ((array.astype(np.float64) - low) / (high - low)).clip(0, 1)


def zip_bytes(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip archive of files by name."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()
