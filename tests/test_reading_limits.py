"""Bad files and sources are refused with an M3RetReadError that names them, before memory is allocated."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import subprocess
import sys
import tempfile
import textwrap
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import av
import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless
from scan_files import CINE, dicom, dicom_bytes, nifti_bytes, series

from modeling_m3ret.reading_m3ret import M3RetReadError, ReadLimits, read_scan
from modeling_m3ret.scan_m3ret import RATIO_FLOOR


MIB = 2**20
BOMB_SIZE = RATIO_FLOOR + 8 * MIB  # the smallest size at which the inflate ratio is checked
RNG = np.random.default_rng(3)
GREY = RNG.integers(0, 256, (32, 24), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """Return a PNG whose header declares more pixels than its data contain."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    good = png(GREY)
    return good[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + good[33:]


def npy_claiming(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + b"\0" * 64


def zip_of(name: str, data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return stream.getvalue()


def nifti_claiming(*shape: int) -> bytes:
    """Return 377 bytes with a NIfTI header of float64 voxels."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.float64)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header.binaryblock + b"\0" * 29


def deflated_bomb() -> bytes:
    """Return a small deflated DICOM file that inflates to more than `RATIO_FLOOR`."""
    ds = dicom(GREY)
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    whole = dicom_bytes(ds)
    start = 132 + 12 + struct.unpack("<I", whole[140:144])[0]
    body = zlib.decompress(whole[start:], -15)
    body += struct.pack("<HH2sHI", 0x7FE1, 0x0010, b"OB", 0, BOMB_SIZE) + b"\0" * BOMB_SIZE
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return whole[:start] + deflate.compress(body) + deflate.flush()


def jpeg2000_of_another_size() -> bytes:
    """Return a dataset of 32 x 24 pixels whose codestream declares 60,000 x 60,000."""
    image = io.BytesIO()
    Image.fromarray(GREY).save(image, "JPEG2000", no_jp2=True)
    stream = bytearray(image.getvalue())
    stream[8:16] = struct.pack(">II", 60_000, 60_000)  # Xsiz, Ysiz
    stream[24:32] = struct.pack(">II", 60_000, 60_000)  # XTsiz, YTsiz: a single tile
    ds = dicom(GREY, PixelData=encapsulate([bytes(stream)]))
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
    return dicom_bytes(ds)


def compressed(kind: str) -> bytes:
    ds = dicom(GREY)
    if kind == "rle":
        ds.compress(RLELossless)
    else:
        stream = io.BytesIO()
        Image.fromarray(GREY).save(stream, "JPEG")
        ds.PixelData = encapsulate([stream.getvalue()])
        ds["PixelData"].is_undefined_length = True
        ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    return dicom_bytes(ds)


def truncated_codestream(data: bytes) -> bytes:
    """Return a valid file whose encapsulated frame is cut in half."""
    ds = pydicom.dcmread(io.BytesIO(data))
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    ds.PixelData = encapsulate([frame[: len(frame) // 2]])
    ds["PixelData"].is_undefined_length = True
    return dicom_bytes(ds)


def video(frames: np.ndarray) -> bytes:
    """Return an MP4 of `(D, H, W, 3)` frames."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        # the index comes first, so that a truncated file still opens
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            track = container.add_stream("mpeg4", rate=10)
            track.height, track.width, track.pix_fmt = *frames.shape[1:3], "yuv420p"
            for frame in frames:
                container.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(track.encode())
        return path.read_bytes()


def metaimage(data_file: str, size: str) -> bytes:
    """Return the header of a MetaImage of int16."""
    fields = f"ObjectType = Image\nNDims = 3\nDimSize = {size}\nElementType = MET_SHORT\n"
    return f"{fields}ElementDataFile = {data_file}\n".encode()


def nrrd(data_file: str, size: str) -> bytes:
    """Return the header of an NRRD of int16, with a line that names a data file or none."""
    fields = f"NRRD0004\ntype: short\ndimension: 3\nsizes: {size}\nendian: little\nencoding: raw\n"
    return f"{fields}{data_file}\n".encode()


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64), dtype=np.uint8)).convert("RGB").save(stream, kind)
    return stream.getvalue()


class Planted:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (exec, ("raise SystemExit('unpickled')",))


def object_npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Planted()], dtype=object), allow_pickle=True)
    return stream.getvalue()


MR = RNG.integers(0, 900, (12, 10, 8)).astype(np.int16)
PLAIN, NIFTI = dicom_bytes(dicom(MR[:, :, 0])), nifti_bytes(MR, np.eye(4))
BAD: dict[str, bytes | Callable[[], bytes]] = {
    "empty.dcm": b"",
    "text.dcm": b"This is a text file that was named .dcm by mistake.\n" * 20,
    "random.nii.gz": RNG.bytes(900),
    "page.png": b"<html><body>404 Not Found</body></html>",
    "plain.gz": gzip.compress(b"hello " * 400),
    "header_only.dcm": PLAIN[:140],
    "cut.dcm": PLAIN[:-40],
    "no_pixels.dcm": lambda: dicom_bytes(dicom(MR[:, :, 0], PixelData=None)),
    "zero_rows.dcm": lambda: dicom_bytes(dicom(MR[:, :, 0], Rows=0)),
    "many_frames.dcm": lambda: dicom_bytes(dicom(GREY, NumberOfFrames=2_000_000_000)),
    "large_rows.dcm": lambda: dicom_bytes(dicom(GREY, Rows=65535, Columns=65535)),
    "rle_cut.dcm": lambda: truncated_codestream(compressed("rle")),
    "jpeg_cut.dcm": lambda: compressed("jpeg")[:-300],
    "larger_than_declared.dcm": jpeg2000_of_another_size,
    "bomb_deflated.dcm": deflated_bomb,
    "bomb.nii": nifti_claiming(2000, 2000, 600),
    "bomb_under_the_limit.nii": nifti_claiming(800, 800, 100),
    "bomb.nii.gz": gzip.compress(nifti_claiming(2000, 2000, 600)),
    "bomb_zeros.nii.gz": lambda: gzip.compress(nifti_claiming(512, 512, BOMB_SIZE // 2**21)[:352] + b"\0" * BOMB_SIZE),
    "zero_dim.nii": NIFTI[:42] + b"\0\0" + NIFTI[44:],
    "cut.nii": NIFTI[:-10],
    "cut.nii.gz": gzip.compress(NIFTI)[:-900],
    "corrupt.nii.gz": lambda: (lambda g: g[:-8] + b"\0\0\0\0" + g[-4:])(gzip.compress(NIFTI)),
    "complex.nii": nifti_bytes(MR.astype(np.complex64), np.eye(4)),
    "infinite.nii": nifti_bytes(np.where(MR[0, 0, 0] == MR, np.inf, MR).astype(np.float32), np.eye(4)),
    "pair.hdr": NIFTI[:344] + b"ni1\0" + NIFTI[348:],
    "bomb.png": png_claiming(60_000, 60_000),
    "large.png": png_claiming(10_000, 10_000),
    "cut.png": png(GREY)[:-200],
    "cut.jpg": lambda: (lambda s: (Image.fromarray(GREY).save(s, "JPEG"), s.getvalue()[:-400])[1])(io.BytesIO()),
    "objects.npy": object_npy(),
    "objects.npz": zip_of("hu.npy", object_npy()),
    "bomb.npy": npy_claiming((40_000, 40_000, 10)),
    "short.npy": npy_claiming((100, 100)),
    "negative.npy": npy_claiming((-4, 10)),
    "names.npy": npy_claiming((4,), "<U8"),
    "bomb.npz": lambda: zip_of("hu.npy", npy_claiming((BOMB_SIZE // 2**19, 512, 512), "<i2") + b"\0" * BOMB_SIZE),
    "several.npz": lambda: (lambda s: (np.savez(s, a=GREY, b=GREY), s.getvalue())[1])(io.BytesIO()),
    "word.zip": zip_of("word/document.xml", b"<xml/>"),
    "cut.npz": zip_of("hu.npy", npy_claiming((4, 4)))[:-30],
    "bomb.zip": lambda: zip_of("scan.nii", b"\0" * BOMB_SIZE),
    "zip_in.zip": zip_of("scan.zip", zip_of("scan.nii", NIFTI)),
    "encrypted.zip": (lambda z: z[:6] + b"\1" + z[7:].replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"))(
        zip_of("scan.nii", NIFTI)
    ),
    "cut.zip": zip_of("scan.nii", NIFTI)[:-30],
    "bomb_of.gz": lambda: gzip.compress(b"BM" + b"\0" * BOMB_SIZE),
    "cut_checksum.nii.gz": gzip.compress(NIFTI)[:-5],
    "bomb.mha": metaimage("LOCAL", "2000 2000 600"),
    "bomb_under_the_limit.mha": metaimage("LOCAL", "500 500 300"),
    "cut.mha": metaimage("LOCAL", "4 4 4") + bytes(100),
    "dimensions.mha": metaimage("LOCAL", "4 4 4").replace(b"NDims = 3", b"NDims = 355"),
    "binary_line.mha": metaimage("LOCAL", "4 4 4").replace(b"ElementData", b"\2\2\0yData = True\nElementData"),
    "nul_in_field.mha": metaimage("LOCAL", "4 4 4").replace(b"File =", b"File\0\0") + metaimage("LOCAL", "4 4 4"),
    "long_line.mha": metaimage("LOCAL", "4 4 4").replace(b"Image\n", b"Image" * 9_000 + b"\n"),
    "corrupt_zlib.mha": metaimage("LOCAL", "4 4 4").replace(b"Element", b"CompressedData = True\nElement", 1)
    + bytes(128),
    "no_size.mha": metaimage("LOCAL", "4 4 4").replace(b"Element", b"CompressedData = True\nElement", 1)
    + zlib.compress(bytes(128)),  # SimpleITK returns the compressed bytes as voxels
    "no_data.mha": metaimage("LOCAL", "4 4 4").split(b"ElementDataFile")[0],
    "bomb.nrrd": nrrd("", "2000 2000 600"),
    "cut.nrrd": nrrd("", "4 4 4") + bytes(100),
    "cut_header.nrrd": nrrd("", "4 4 4")[:40],
    "path.mhd": metaimage("../secret.raw", "4 4 4"),
    "absolute.mhd": metaimage("/etc/passwd", "4 4 4"),
    "list.mhd": metaimage("LIST", "4 4 4"),
    "pattern.mhd": metaimage("slice%d.raw 1 4 1", "4 4 4"),
    "path.nhdr": nrrd("data file: ../secret.raw\n", "4 4 4"),
    "absolute.nhdr": nrrd("data file: /etc/passwd\n", "4 4 4"),
    "list.nhdr": nrrd("data file: LIST\n", "4 4 4"),
    "twice.nhdr": nrrd("data file: a.raw\ndatafile: /etc/passwd\n", "4 4 4"),
    "alone.nhdr": nrrd("data file: a.raw\n", "4 4 4"),
    "cut.mgh": lambda: nib.MGHImage(MR, np.eye(4)).to_bytes()[:900],
    "hdf5.mnc": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "analyze.hdr": struct.pack("<i", 348) + bytes(344),
    "packets.txt": b"G" + b"a" * 187 + b"G" + b"a" * 400,
    "offset.nii": NIFTI[:108] + struct.pack("<f", 0) + NIFTI[112:],
    "type.nii": NIFTI[:70] + struct.pack("<h", 77) + NIFTI[72:],
    "cut.tif": lambda: picture("TIFF")[:300],
    "cut.webp": lambda: picture("WEBP")[:90],
    "cut.avif": lambda: picture("AVIF")[:200],
    "cut.jp2": lambda: picture("JPEG2000")[:200],
    "picture.jls": b"\xff\xd8\xff\xf7" + bytes(100),
    "picture.jxl": b"\xff\x0a" + bytes(100),
    "report.pdf": b"%PDF-1.7 " + bytes(100),
    "not_a.mp4": b"\0\0\0\x20ftypisom" + b"\0" * 400,
    "cut.mp4": lambda: (lambda v: v[: len(v) // 2])(video(RNG.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8))),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("bomb") else name for name in BAD]
)
def test_bad_file_is_refused_by_name_without_taking_memory(name: str, tmp_path: Path) -> None:
    data = BAD[name]
    path = tmp_path / name
    path.write_bytes(data() if callable(data) else data)
    tracemalloc.start()
    try:
        with pytest.raises(M3RetReadError) as caught:
            read_scan(path)
        assert tracemalloc.get_traced_memory()[1] < 40 * MIB  # includes memory of NumPy and zlib
    finally:
        tracemalloc.stop()
    error = caught.value
    assert error.file == name
    assert all(text and text in str(error) for text in (error.file, error.expected, error.got, error.advice))
    with pytest.raises(M3RetReadError) as caught:
        read_scan(path.read_bytes())
    assert caught.value.file == "<bytes>"


@pytest.mark.slow
def test_memory_of_decoders_is_bounded(tmp_path: Path) -> None:
    """tracemalloc does not see C and C++ decoders, so a process with an address-space limit reads all files again."""
    for name, data in BAD.items():
        (tmp_path / name).write_bytes(data() if callable(data) else data)
    code = """
        import gc, resource, sys
        from pathlib import Path
        import av, decord, gdcm, nibabel, pydicom, PIL.Image
        from modeling_m3ret.reading_m3ret import M3RetReadError, read_scan
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, size + 2**30))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sorted(Path(sys.argv[1]).iterdir()):
            try:
                read_scan(path)
            except M3RetReadError as error:
                if isinstance(error.__cause__, MemoryError):
                    sys.exit(f"{path.name} ran out of memory")
                continue
            sys.exit(f"{path.name} was read")
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("the size of the process is read from /proc")
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout.split()[-1]) < 200  # MiB


@pytest.mark.parametrize(
    ("source", "file", "reason", "got"),
    [
        ("nowhere/absent.nii.gz", "absent.nii.gz", "not_found", ""),
        ("a\0b.png", "a\0b.png", "not_found", ""),
        ([], "<series of 0 files>", "unsupported", ""),
        (["nowhere/slice.dcm"], "slice.dcm", "not_found", ""),
        ([b"text", b"more text"], "<series of 2 files>/<bytes>", "unsupported", ""),
        (3.5, "<float>", "unsupported", "float"),
        (None, "<NoneType>", "unsupported", "NoneType"),
        ({"image": None, "video": None, "volume": None}, "<row>", "unsupported", "0"),
        ({"image": b"x", "volume": b"y"}, "<bytes>", "unsupported", "2"),
        ({"bytes": None, "path": None}, "<bytes>", "unsupported", "null"),
        ({"bytes": b"nonsense", "path": "folder/IM1.dcm"}, "IM1.dcm", "unsupported", ""),
        ({"image": GREY, "intensity": "bright"}, "<array>", "unsupported", ""),
        ({"image": GREY, "intensity": "full range"}, "<array>", "unsupported", "uint8"),
        ({"image": GREY, "spacing": [1.0, 2.0]}, "<array>", "unsupported", "2"),
        (np.zeros((2, 3), np.complex64), "<array>", "unsupported", "complex64"),
        (np.array([["a"]], dtype=object), "<array>", "unsupported", "object"),
        (np.zeros(5), "<array>", "unsupported", "(5,)"),
        (np.zeros((2, 3, 4, 5, 3)), "<array>", "unsupported", "(2, 3, 4, 5, 3)"),
        (np.zeros((2, 3, 4, 7)), "<array>", "unsupported", "(2, 3, 4, 7)"),
        (np.zeros((0, 4)), "<array>", "unsupported", "(0, 4)"),
        (np.array([[1.0, np.nan]]), "<array>", "unsupported", "NaN"),
        (np.ma.masked_equal([[1, 2]], 2), "<array>", "unsupported", "mask"),
        (np.array([[1.0, 1e300]]), "<array>", "unsupported", "larger"),
        (np.zeros((3, 4, 5)), "<array>", "unsupported", "(3, 4, 5)"),
        (np.array([[1.0, np.inf]]), "<array>", "unsupported", "infinite"),
        (np.array([[-np.inf, -1000.0]]), "<array>", "unsupported", "infinite"),
    ],
)
def test_bad_source_is_refused(source: Any, file: str, reason: str, got: str) -> None:
    with pytest.raises(M3RetReadError) as caught:
        read_scan(source)
    assert (caught.value.file, caught.value.reason) == (file, reason)
    assert got in caught.value.got
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("files", [{}, {"notes.dcm": "text"}])
def test_folder_without_dicom_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(M3RetReadError) as caught:
        read_scan(tmp_path)
    assert (caught.value.file, caught.value.reason) == (tmp_path.name, "unsupported")


def test_damaged_slice_is_named(tmp_path: Path) -> None:
    for index, ds in enumerate(series(MR, np.diag([1.0, 1, 1, 1]))):
        data = dicom_bytes(ds)
        (tmp_path / f"{index}.dcm").write_bytes(data[:-30] if index == 3 else data)
    with pytest.raises(M3RetReadError) as caught:
        read_scan(tmp_path)
    assert caught.value.file == f"{tmp_path.name}/3.dcm"


@pytest.mark.parametrize(
    ("source", "limits"),
    [
        (png(GREY), ReadLimits(max_pixels_per_image=700)),
        (GREY, ReadLimits(max_decoded_bytes=700)),
        (NIFTI, ReadLimits(max_decoded_bytes=1500)),
        (dicom(MR[:, :, 0]), ReadLimits(max_pixels_per_image=100)),
        (dicom(np.zeros((40, 8, 8), np.uint8), sop=CINE), ReadLimits(max_decoded_bytes=2000)),
        ([dicom(MR[:, :, 0])] * 3, ReadLimits(max_files=2)),
    ],
)
def test_limits_can_be_set(source: Any, limits: ReadLimits) -> None:
    read_scan(source)
    with pytest.raises(M3RetReadError) as caught:
        read_scan(source, limits=limits)
    assert caught.value.reason == "too_large"
    (limit,) = (field.name for field in fields(limits) if getattr(limits, field.name) != field.default)
    assert limit in caught.value.advice


@pytest.mark.parametrize("kind", ["mp4", "dicom"])
def test_num_frames_brings_a_long_clip_within_limits(kind: str) -> None:
    frames = RNG.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    if kind == "mp4":
        data = video(frames)
    else:
        cine = dicom(np.zeros_like(frames), sop=CINE)
        cine.compress(RLELossless)
        data = dicom_bytes(cine)
    limits = ReadLimits(max_decoded_bytes=max(len(data), frames[:5].nbytes))
    assert limits.max_decoded_bytes < frames.nbytes
    with pytest.raises(M3RetReadError) as caught:
        read_scan(data, limits=limits)
    assert caught.value.reason == "too_large"
    assert "num_frames" in caught.value.advice
    assert read_scan(data, num_frames=5, limits=limits).array.shape[1] == 5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.dcm", "damaged"),
        ("text.dcm", "unsupported"),
        ("cut.nii", "damaged"),
        ("short.npy", "damaged"),
        ("pair.hdr", "unsupported"),
        ("several.npz", "unsupported"),
        ("large.png", "too_large"),
        ("bomb.nii.gz", "too_large"),
        ("larger_than_declared.dcm", "damaged"),
        ("encrypted.zip", "unsupported"),
        ("zip_in.zip", "unsupported"),
        ("cut.zip", "damaged"),
        ("cut.nii.gz", "damaged"),
        ("cut_checksum.nii.gz", "damaged"),
        ("dimensions.mha", "unsupported"),
        ("bomb.mha", "too_large"),
        ("bomb_under_the_limit.mha", "too_large"),
        ("cut.mha", "damaged"),
        ("no_data.mha", "damaged"),
        ("corrupt_zlib.mha", "damaged"),
        ("no_size.mha", "damaged"),
        ("cut.nrrd", "damaged"),
        ("cut_header.nrrd", "damaged"),
        ("path.nhdr", "unsupported"),
        ("absolute.mhd", "unsupported"),
        ("twice.nhdr", "unsupported"),
        ("cut.mgh", "damaged"),
        ("hdf5.mnc", "damaged"),
        ("analyze.hdr", "unsupported"),
        ("packets.txt", "unsupported"),
        ("offset.nii", "damaged"),
        ("type.nii", "unsupported"),
        ("complex.nii", "unsupported"),
        ("cut.png", "damaged"),
        ("cut.tif", "damaged"),
        ("cut.webp", "damaged"),
        ("cut.avif", "damaged"),
        ("cut.jp2", "damaged"),
        ("picture.jls", "unsupported"),
        ("picture.jxl", "unsupported"),
        ("cut.jpg", "damaged"),
    ],
)
def test_reason_tells_unsupported_from_damaged_and_too_large(name: str, reason: str) -> None:
    data = BAD[name]
    with pytest.raises(M3RetReadError) as caught:
        read_scan(data() if callable(data) else data)
    assert caught.value.reason == reason


def test_damaged_files_of_pydicom_are_refused() -> None:
    for name in (
        "MR_truncated.dcm",
        "rtplan.dcm",
        "badVR.dcm",
        "JPEG2000-embedded-sequence-delimiter.dcm",
        "test-SR.dcm",
    ):
        with pytest.raises(M3RetReadError) as caught:
            read_scan(get_testdata_file(name, download=False))
        assert caught.value.file == name


@pytest.mark.parametrize(
    ("module", "package", "source"),
    [
        ("SimpleITK", "itk", metaimage("LOCAL", "4 4 4")),
        ("h5py", "h5py", BAD["hdf5.mnc"]),
        ("nibabel", "nibabel", NIFTI),
        ("pillow_heif", "pillow-heif", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(200)),
    ],
)
def test_missing_package_is_named(module: str, package: str, source: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(M3RetReadError) as caught:
        read_scan(source)
    assert caught.value.reason == "no_decoder"
    assert package in caught.value.advice


@pytest.mark.slow
def test_import_needs_only_numpy() -> None:
    code = """
        import sys
        import types
        package = types.ModuleType("alone")  # the files without modeling_m3ret/__init__.py
        package.__path__ = ["modeling_m3ret"]
        sys.modules["alone"] = package
        from alone.reading_m3ret import read_scan
        heavy = {"torch", "pydicom", "nibabel", "decord", "av", "PIL"} & set(sys.modules)
        assert not heavy, heavy
    """
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
