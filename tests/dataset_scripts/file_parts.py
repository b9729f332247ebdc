"""Parts of image, NIfTI and DICOM files, with a text planted wherever the format can hold one."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset
from scan_files import PLANTED, dicom, dicom_bytes


TEXT = PLANTED.encode()
AFFINE = np.diag([0.8, 0.9, 1.2, 1.0])
TEXT_ELEMENTS = (  # of each value representation that holds text: AE, CS, DA, LO, LT, PN, SH, ST, TM, UC, UI, UR, UT
    *("StationAETitle", "BodyPartExamined", "StudyDate", "PatientID", "AdditionalPatientHistory", "PatientName"),
    *("AccessionNumber", "InstitutionAddress", "StudyTime", "LongCodeValue", "FrameOfReferenceUID", "RetrieveURL"),
    "TextValue",
)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def exif(orientation: int | None = None) -> bytes:
    """Return EXIF with a description, a UTF-16 comment, a date, a maker note, and a JPEG thumbnail with a comment."""
    tags = Image.Exif()
    tags[0x010E], tags[0x9C9C], tags[0x013B] = PLANTED, PLANTED.encode("utf-16-le"), PLANTED
    tags[0x0132] = "1953:11:17 13:57:24"
    if orientation:
        tags[0x0112] = orientation
    tags.get_ifd(0x8769)[0x927C] = TEXT
    return tags.tobytes() + encode(Image.new("L", (8, 8)), "JPEG", comment=TEXT)


def planted_nifti(voxels: np.ndarray) -> bytes:
    image = nib.Nifti1Image(voxels, AFFINE)
    for field in ("descrip", "aux_file", "db_name", "intent_name", "data_type"):
        image.header[field] = TEXT[: image.header[field].dtype.itemsize]
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", TEXT))
    patient = dicom_bytes(dicom(np.zeros((2, 2), np.uint8)))[132:]
    image.header.extensions.append(nib.nifti1.Nifti1Extension("dicom", patient))
    return image.to_bytes() + TEXT


def planted_dicom(pixels: np.ndarray, **elements: Any) -> Dataset:
    """Plant the text in elements of every kind that are not given, at every depth, and around the elements."""
    ds = dicom(pixels, **elements)
    item = Dataset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of texts that are not dates
        for target, given in ((ds, elements), (item, {})):
            for keyword in TEXT_ELEMENTS:
                setattr(target, keyword, given.get(keyword, PLANTED))
            block = target.private_block(0x0099, PLANTED, create=True)
            for offset, vr in enumerate(("LO", "UT", "PN", "ST", "LT", "SH", "CS", "UN", "OB")):
                block.add_new(offset, vr, TEXT + b"  " if vr in ("UN", "OB") else PLANTED)
            target.ICCProfile = TEXT + b"  "
    inner = Dataset()
    inner.RequestAttributesSequence = [item]
    ds.RequestAttributesSequence, ds.ReferencedStudySequence = [item], [inner]
    ds.IconImageSequence = [dicom(np.zeros((8, 8), np.uint8), PatientName=PLANTED)]
    ds.ImageComments = ds.WindowCenterWidthExplanation = PLANTED
    ds.add_new(0x60000010, "US", 18)  # an overlay: rows, columns, description, and bits that encode the text
    ds.add_new(0x60000011, "US", 8)
    ds.add_new(0x60000022, "LO", PLANTED)
    ds.add_new(0x60003000, "OW", TEXT)
    ds.DataSetTrailingPadding = TEXT + b"  "
    ds.PixelData += TEXT + b"  "  # more than the pixels need
    ds.file_meta.SourceApplicationEntityTitle = ds.file_meta.ImplementationVersionName = PLANTED[:16]
    ds.file_meta.PrivateInformationCreatorUID, ds.file_meta.PrivateInformation = "1.2.826.0.1", TEXT + b"  "
    ds.preamble = (TEXT * 8)[:128]
    return ds


def written(ds: Dataset) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of texts that are not dates
        return dicom_bytes(ds)


def add_palette(ds: Dataset, *, segmented: bool) -> Dataset:
    """Colour a picture by three lookup tables, plain or segmented (an entry of 0, then 255 on a line)."""
    ds.PhotometricInterpretation = "PALETTE COLOR"
    for name, top in (("Red", 80), ("Green", 160), ("Blue", 240)):
        table = np.array([0, 1, 0, 1, 255, top << 8] if segmented else np.linspace(0, top << 8, 256), "<u2")
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(ds, f"{'Segmented' * segmented}{name}PaletteColorLookupTableData", table.tobytes())
    return ds


def region(left: Any, top: Any, right: Any, bottom: Any) -> Dataset:
    """Return an item of SequenceOfUltrasoundRegions; both ends are inclusive."""
    item = Dataset()
    item.RegionLocationMinX0, item.RegionLocationMinY0 = left, top
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = right, bottom
    return item
