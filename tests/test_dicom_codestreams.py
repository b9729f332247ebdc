"""Compressed DICOM frames are read as their codestreams declare; invalid ones are refused before they are decoded."""

from __future__ import annotations

import copy
import io
import struct
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from scan_files import dicom, dicom_bytes, percentiles

from modeling_m3ret.reading_m3ret import M3RetReadError, read_scan


RNG = np.random.default_rng(12)
GREY = np.add.outer(np.arange(40) * 3, np.arange(50) * 2).astype(np.uint8)  # (40, 50)


def refusal(ds: Dataset) -> str | None:
    with pytest.raises(M3RetReadError) as caught:
        read_scan(ds)
    return caught.value.reason


CODECS = {
    "j2k": gdcm.TransferSyntax.JPEG2000Lossless,
    "jls": gdcm.TransferSyntax.JPEGLSLossless,
    "jpeg": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
}


def compressed(ds: Dataset, codec: str, folder: Path) -> Dataset:
    """Compress a dataset without loss, by GDCM, whose encoder overflows if the result is larger than the pixels."""
    (folder / "raw.dcm").write_bytes(dicom_bytes(ds))
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(folder / "raw.dcm"))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(CODECS[codec]))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(folder / "compressed.dcm"))
    assert writer.Write()
    return pydicom.dcmread(io.BytesIO((folder / "compressed.dcm").read_bytes()))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("signed", [False, True])
def test_bits_of_a_codestream_take_precedence_over_the_header(codec: str, signed: bool, tmp_path: Path) -> None:
    # PS3.5, 8.2: the characteristics of the codestream shall be used to decode it
    values = RNG.integers(-2048 if signed else 0, 2048 if signed else 4096, (9, 14)).astype("i2" if signed else "u2")
    ds = compressed(dicom(values, BitsStored=12, HighBit=11), codec, tmp_path)
    for bits in (12, 16, 10):
        ds.BitsStored, ds.HighBit = bits, bits - 1
        scan = read_scan(ds)
        np.testing.assert_allclose(scan.array[0, 0], percentiles(values), atol=1e-6)
        assert ("codestream_bits" in scan.description) == (bits == 10)


def test_sign_of_a_codestream(tmp_path: Path) -> None:
    # as SimpleITK: unsigned words of 12 bits that the header declares as signed
    values = RNG.integers(0, 4096, (9, 14)).astype(np.uint16)
    ds = compressed(dicom(values, BitsStored=12, HighBit=11), "j2k", tmp_path)
    ds.PixelRepresentation = 1
    scan = read_scan(ds)
    np.testing.assert_allclose(scan.array[0, 0], percentiles((values.astype(int) + 2048) % 4096 - 2048), atol=1e-6)
    assert scan.description["codestream_sign"] == "differs from the header"
    # pydicom, SimpleITK and the codestream give three images of negative samples that the header declares as unsigned
    negative = compressed(dicom((values.astype(int) - 2048).astype(np.int16), BitsStored=12), "j2k", tmp_path)
    negative.PixelRepresentation = 0
    assert refusal(negative) == "damaged"


# ------------------------------------------------------------------------------------------------- hostile codestreams


def frame_of(ds: Dataset) -> bytes:
    return next(generate_frames(ds.PixelData, number_of_frames=1))


def with_frame(ds: Dataset, frame: bytes) -> Dataset:
    changed = copy.deepcopy(ds)
    changed.PixelData = encapsulate([frame])
    return changed


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Dataset, np.ndarray]]:
    """Return a compressed dataset of 12 bits and its pixels for each codec."""
    values = (np.add.outer(np.arange(13) * 200, np.arange(18) * 60) + RNG.integers(0, 200, (13, 18))).astype(np.uint16)
    folder = tmp_path_factory.mktemp("lossless")
    return {name: (compressed(dicom(values, BitsStored=12, HighBit=11), name, folder), values) for name in CODECS}


SEGMENTS = {"j2k": b"\xff\x51", "jls": b"\xff\xf7", "jpeg": b"\xff\xc3", "COD": b"\xff\x52", "SOT": b"\xff\x90"}
SEGMENTS |= {"SOS": b"\xff\xda", "DHT": b"\xff\xc4"}
PRESETS = b"\xff\xf8\0\x0d\1"
HUGE = b"\0\x0b\x10\xff\xff\xff\xff\1\1\x11\0"  # a frame header of 65535 x 65535


@pytest.mark.parametrize(
    ("codec", "segment", "offset", "form", "value", "reason"),
    [
        ("j2k", "j2k", 40, "B", 37, "unsupported"),  # 38 bits, on which GDCM aborts
        ("jls", "jls", 4, "B", 38, "unsupported"),
        ("jpeg", "jpeg", 4, "B", 17, "unsupported"),
        ("jls", "jls", 5, ">H", 65535, "damaged"),  # rows
        ("jls", "jls", 9, "B", 3, "damaged"),  # components
        ("jls", "SOS", 4, "B", 2, "damaged"),
        ("jls", "SOS", 5, "B", 9, "damaged"),  # a component that the frame header does not declare
        ("jls", "SOS", 6, "B", 1, "unsupported"),  # mapping table
        ("jls", "SOS", 8, "B", 1, "damaged"),  # interleaving of one component
        ("jls", "SOS", 9, "B", 1, "damaged"),  # point transform
        ("jpeg", "SOS", 7, "B", 0, "unsupported"),  # predictor
        ("jpeg", "SOS", 9, "B", 2, "unsupported"),  # point transform
        ("jpeg", "jpeg", 1, "B", 0xCB, "unsupported"),  # arithmetic coding
        *(("jpeg", "DHT", 1, "B", marker, "damaged") for marker in (0, 1, 0xBF, 0xD4, 0xD8)),  # have no segment
        ("j2k", "j2k", 6, ">I", 2**32 - 1, "damaged"),  # width
        ("j2k", "j2k", 22, ">I", 1, "damaged"),  # tiles of 1 x 13 pixels
        ("j2k", "j2k", 22, ">I", 0, "damaged"),
        ("j2k", "j2k", 30, ">I", 5, "damaged"),  # tiles that begin within the image
        ("j2k", "j2k", 38, ">H", 3, "damaged"),  # components
        ("j2k", "j2k", 41, "B", 2, "unsupported"),  # subsampling
        ("j2k", "COD", 5, "B", 9, "damaged"),  # progression
        ("j2k", "COD", 9, "B", 33, "damaged"),  # levels of decomposition
        ("j2k", "COD", 10, "B", 9, "damaged"),  # code blocks
        ("j2k", "SOT", 4, ">H", 7, "damaged"),  # index of the tile
        ("j2k", "SOT", 6, ">I", 13, "damaged"),  # length of the tile-part
        ("j2k", "SOT", 6, ">I", 2**31, "damaged"),
    ],
)
def test_invalid_header_is_refused(
    codec: str, segment: str, offset: int, form: str, value: int, reason: str, lossless: dict[str, Any]
) -> None:
    ds = lossless[codec][0]
    frame = bytearray(frame_of(ds))
    struct.pack_into(form, frame, frame.find(SEGMENTS[segment]) + offset, value)
    assert refusal(with_frame(ds, bytes(frame))) == reason


@pytest.mark.parametrize(
    ("codec", "before", "inserted"),
    [
        ("jls", "SOS", b"\xff\xf7" + HUGE),  # a second frame header
        ("jpeg", "SOS", b"\xff\xc3" + HUGE),
        ("jls", "SOS", PRESETS + struct.pack(">5H", 0, 90, 10, 200, 0)),  # thresholds in another order
        ("jls", "SOS", PRESETS + struct.pack(">5H", 0, 0, 0, 0, 2)),
        ("jls", "SOS", b"\xff\xf8\0\x08\2\1\1\1\2\3"),  # mapping table
        ("jls", "SOS", b"\xff\xdd\0\4\0\2"),  # restart interval
        ("jpeg", "jpeg", b"\xff\xe0\0\x10JFIF\0\2\1\0\0\1\0\1\0\0"),  # libjpeg warns, and GDCM aborts
        ("jpeg", "jpeg", b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\2"),
        ("jpeg", "jpeg", b"\0\0"),
        ("jpeg", "SOS", b"\xff\xe1\xff\xff"),  # a segment that is longer than the file
        ("j2k", "SOT", b"\xff\x64\xff\xff"),
    ],
)
def test_invalid_segment_is_refused(codec: str, before: str, inserted: bytes, lossless: dict[str, Any]) -> None:
    ds = lossless[codec][0]
    frame = frame_of(ds)
    at = frame.find(SEGMENTS[before])
    assert refusal(with_frame(ds, frame[:at] + inserted + frame[at:])) in ("damaged", "unsupported")


@pytest.mark.parametrize("codec", CODECS)
def test_truncated_codestream_is_refused(codec: str, lossless: dict[str, Any]) -> None:
    ds = lossless[codec][0]
    frame = frame_of(ds)
    for size in (2, 3, 5, 9, 20, 45, len(frame) // 2, len(frame) - 20):  # GDCM never returned for some
        assert refusal(with_frame(ds, frame[:size])) in ("damaged", "undecodable"), size


def test_codestream_of_another_family_is_refused(lossless: dict[str, Any]) -> None:
    for codec, other in (("j2k", "jpeg"), ("jpeg", "j2k"), ("jls", "jpeg"), ("jpeg", "jls"), ("j2k", "jls")):
        assert refusal(with_frame(lossless[codec][0], frame_of(lossless[other][0]))) in ("damaged", "unsupported")


@pytest.mark.parametrize(
    ("codec", "before", "inserted"),
    [
        (
            "jls",
            "jls",
            PRESETS + struct.pack(">5H", 4095, 18, 67, 276, 64),
        ),  # the defaults of 12 bits (T.87, C.2.4.1.1.1)
        ("jls", "SOS", PRESETS + bytes(10)),
        ("jls", "jls", b"\xff\xe8\0\6abcd"),
        ("jpeg", "jpeg", b"\xff\xfe\0\6abcd"),
        ("jpeg", "SOS", b"\xff\xff"),  # fill bytes
        ("jpeg", "jpeg", b"\xff\xee\0\x0cAdobe\0\0\0\0\0"),  # too short, which libjpeg ignores
        ("jpeg", "jpeg", b"\xff\xe0\0\x09JFIF\0\2\1"),
        ("jpeg", "jpeg", b"\xff\xe0\0\x10JFIF\0\1\2\0\0\1\0\1\0\0"),
        ("j2k", "SOT", b"\xff\x64\0\7\0\1abc"),  # comment
    ],
)
def test_legal_segment_changes_nothing(codec: str, before: str, inserted: bytes, lossless: dict[str, Any]) -> None:
    ds, values = lossless[codec]
    frame = frame_of(ds)
    at = frame.find(SEGMENTS[before])
    scan = read_scan(with_frame(ds, frame[:at] + inserted + frame[at:] + bytes(2)))
    np.testing.assert_allclose(scan.array[0, 0], percentiles(values), atol=1e-6)


@pytest.mark.parametrize("progression", ["LRCP", "RLCP", "RPCL", "PCRL", "CPRL"])
def test_tiles_and_layers_of_jpeg_2000(progression: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(GREY).save(
        stream, "JPEG2000", no_jp2=True, progression=progression, tile_size=(16, 16), offset=(3, 2), tile_offset=(1, 0),
        quality_layers=[20, 5, 1], num_resolutions=2, codeblock_size=(16, 16),
    )  # fmt: skip
    ds = dicom(GREY)
    ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    np.testing.assert_array_equal(read_scan(with_frame(ds, stream.getvalue())).array[0, 0], GREY)


def test_boxes_around_jpeg_2000() -> None:
    stream = io.BytesIO()
    Image.fromarray(GREY).save(stream, "JPEG2000", irreversible=False)  # a JP2 file
    ds = dicom(GREY)
    ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    np.testing.assert_array_equal(read_scan(with_frame(ds, stream.getvalue())).array[0, 0], GREY)
    for size in (0, 7, 2**31):  # of the second box; pydicom never returned for 0
        frame = bytearray(stream.getvalue())
        struct.pack_into(">I", frame, 12, size)
        assert refusal(with_frame(ds, bytes(frame))) == "damaged"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True}])
def test_variants_of_baseline_jpeg(options: dict[str, Any]) -> None:
    stream = io.BytesIO()
    Image.fromarray(GREY).save(stream, "JPEG", quality=95, **options)
    with Image.open(stream) as image:
        truth = np.asarray(image)
    ds = dicom(GREY)
    for syntax in (pydicom.uid.JPEGBaseline8Bit, pydicom.uid.JPEGExtended12Bit):
        ds.file_meta.TransferSyntaxUID = syntax
        scan = read_scan(with_frame(ds, stream.getvalue()))
        assert np.abs(scan.array[0, 0].astype(int) - truth).max() <= 1  # GDCM and libjpeg-turbo round differently


@pytest.mark.parametrize("syntax", [pydicom.uid.JPEGBaseline8Bit, pydicom.uid.JPEGExtended12Bit])
@pytest.mark.parametrize("photometric", ["YBR_FULL", "YBR_FULL_422", "RGB"])
@pytest.mark.parametrize("segments", ["JFIF", "Adobe", "both"])
def test_colour_of_jpeg_is_that_of_its_markers(syntax: str, photometric: str, segments: str) -> None:
    # JFIF, and an Adobe segment with transform 1, declare YCbCr (T.872, 6.5.3 and 6.1), as Pillow reads it
    colour = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
    stream = io.BytesIO()
    Image.fromarray(colour).save(stream, "JPEG", quality=95, subsampling=0)
    plain, adobe = stream.getvalue(), b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\1"
    frame = (
        plain[:2] + (b"" if segments == "Adobe" else plain[2:20]) + (b"" if segments == "JFIF" else adobe) + plain[20:]
    )
    with Image.open(io.BytesIO(frame)) as image:
        truth = np.asarray(image)
    ds = dicom(colour, PhotometricInterpretation=photometric)
    ds.file_meta.TransferSyntaxUID = syntax
    scan = read_scan(with_frame(ds, frame))
    assert np.abs(scan.array[:, 0].transpose(1, 2, 0).astype(int) - truth).max() <= 3
