"""Fuzz all readers with mutated files, and compare valid files of random attributes with reference readers.

    python benchmarks/fuzz_readers.py --cases 20000 --output report.json
    python benchmarks/fuzz_readers.py --only 1234 --save FOLDER     # repeat one case and keep its file

Mutated files derive from the test data of pydicom and nibabel and from files written here. Reading one may only
return a scan or raise M3RetReadError, within bounded memory. For every four of them, one valid file is written with
random legal attributes, and its scan must equal the values that pydicom, nibabel, SimpleITK, Pillow or FFmpeg read,
scaled as documented. Every disagreement is a failure; where a reference reader is wrong, the check says how and
follows the standard. A case is a function of the seed and its number. Cases run in worker processes, so a crash of a
decoder is a failure of one case.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import importlib.util
import io
import json
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


MIB = 2**20
MAX_DECODED = 64 * MIB
MAX_GROWTH = 2 * MAX_DECODED + 128 * MIB  # of resident memory: twice the limit, as documented, and what decoders need
ADDRESS_SPACE = 8 * 2**30  # protects the machine
MAX_SEED_BYTES = 300_000
SLOW_SECONDS, STUCK_SECONDS, START_SECONDS = 20.0, 120.0, 900.0
CHUNK = 5_000  # cases between two reports
VALID_EVERY = 5  # each fifth case is valid

Check = Callable[[Any], str | None]  # takes a scan; returns how it differs, or None


@dataclass
class Case:
    format: str
    source: Any  # argument of `read_scan`
    check: Check | None = None  # None for mutated files
    options: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------- valid files


def compare(
    scan: Any, measured: np.ndarray, *, padding: np.ndarray | None = None, inverted: bool = False
) -> str | None:
    """Return how a scan differs from measured values `(C, D, H, W)`, scaled by the rule that it describes."""
    array, rule = scan.array, str(scan.description["intensity"])
    if array.shape[1:] != measured.shape[1:]:
        return f"shape {array.shape}, expected {measured.shape}"
    seen = measured if padding is None else measured[~padding]
    if scan.description.get("constant"):
        return None if seen.size == 0 or np.ptp(seen) == 0 else "marked as constant"
    if rule == "8-bit":
        expected = 255 - measured if inverted else measured
        got: np.ndarray = array.astype(float)
    else:
        low, high = 0.0, 1.0
        if rule.startswith("hounsfield"):
            low, high = -1000.0, 1000.0
        elif rule.startswith("percentiles"):
            low, high = np.percentile(seen, [0.5, 99.5])
            low, high = (low, high) if high > low else (seen.min(), seen.max())
        elif rule not in ("window", "bit depth", "already in [0, 1]"):
            return f"unknown rule {rule}"
        expected = np.clip((measured.astype(float) - low) / (high - low), 0, 1)
        expected, got = (1 - expected if inverted else expected), array
    if padding is not None:
        expected = np.where(padding, 0, expected)
    error = float(np.abs(got - expected).max())
    limit = 0 if rule == "8-bit" else 2e-3 if rule.startswith("percent") else 2e-4
    return None if error <= limit else f"{rule}: off by {error:.3g}"


def lookup_table(rng: np.random.Generator, low: int, stored: int, signed: bool) -> Any:
    """Return an item of a LUT sequence that maps some of the values of `stored` bits from `low`."""
    from pydicom.dataset import Dataset

    # pydicom reads no other depths
    item, bits, count = Dataset(), choose(rng, 8, 16), int(rng.integers(2, min(2**stored, 4096) + 1))
    entries = rng.integers(0, 2**bits, count)
    entries[-1] = 2**bits - 1  # so that the entries fill the declared depth
    first = low + int(rng.integers(2**stored - count + 1))
    item.add_new(0x00283002, "SS" if signed else "US", [count, first, bits])
    item.add_new(0x00283006, "US", entries.tolist())
    return item


def jpeg_2000(values: np.ndarray) -> bytes:
    """Return a frame `(H, W)` compressed without loss by OpenJPEG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG2000", irreversible=False, no_jp2=True)
    return stream.getvalue()


def valid_dicom(rng: np.random.Generator) -> Case:
    import pydicom
    from pydicom import uid
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, convert_color_space

    pick = functools.partial(choose, rng)
    syntax = pick(uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian,
                  uid.DeflatedExplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless)  # fmt: skip
    jpeg = syntax == uid.JPEG2000Lossless
    kinds = ("MONOCHROME1", "MONOCHROME2", "MONOCHROME2", "RGB", "YBR_FULL", "PALETTE COLOR")
    kind = pick(*kinds[: 2 if jpeg else None])
    colour = kind in ("RGB", "YBR_FULL")
    frames, (rows, columns) = pick(1, 1, 1, 3), rng.integers(2, 20, 2)
    allocated = 8 if colour else pick(8, 16, 16)
    # pydicom writes RLE of at most 8 bits in words of 16 that it cannot read
    least = 9 if syntax == uid.RLELossless and allocated == 16 else 2
    stored = 8 if colour else int(rng.integers(least, allocated + 1))
    stored = allocated if jpeg else stored
    signed = bool(rng.integers(2)) and kind.startswith("MONO") and not jpeg
    shift = pick(0, 0, allocated - stored) if kind.startswith("MONO") and syntax != uid.RLELossless else 0
    low = -(2 ** (stored - 1)) if signed else 0
    shape = (frames, int(rows), int(columns), 3 if colour else 1)
    values = rng.integers(low, low + 2**stored, shape)

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian if syntax == uid.RLELossless else syntax
    classes = (uid.MRImageStorage, uid.CTImageStorage, uid.ComputedRadiographyImageStorage)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = (
        uid.UltrasoundMultiFrameImageStorage if frames > 1 else pick(*classes)
    )
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    ds.SeriesInstanceUID = "1.2.3"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = shape[1], shape[2], shape[3], kind
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = allocated, stored, stored - 1 + shift
    ds.PixelRepresentation = int(signed)
    if frames > 1:
        ds.NumberOfFrames = frames
    planar = colour and syntax != uid.RLELossless and pick(0, 1)  # pydicom encodes planes wrongly
    if colour:
        ds.PlanarConfiguration = planar
    words = (values & (2**stored - 1)) << shift
    if signed and not shift and allocated > stored and pick(0, 1):  # extended sign, as most files have it
        words = values & (2**allocated - 1)
    order = words.transpose(0, 3, 1, 2) if planar else words
    big = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    pixels = order.astype(f"{big}u{allocated // 8}").tobytes()
    ds.PixelData = pixels + b"\0" * (len(pixels) % 2)
    if jpeg:
        ds.PixelData = encapsulate([jpeg_2000(frame[..., 0].astype(f"u{allocated // 8}")) for frame in values])
    ds["PixelData"].VR = "OW" if allocated > 8 or syntax == uid.ImplicitVRLittleEndian else "OB"
    padding = None
    measured_range = (float(low), float(low + 2**stored - 1))
    if kind.startswith("MONO"):
        modality = pick("", "rescale", "LUT")
        if modality == "LUT":
            ds.ModalityLUTSequence = [lookup_table(rng, low, stored, signed)]
            ds.ModalityLUTSequence[0].ModalityLUTType = "US"
            measured_range = (0.0, 65535.0)
        if modality == "rescale":
            ds.RescaleSlope, ds.RescaleIntercept = pick(1, 2, 0.5, 0.37), pick(0, -1024, 12.5)
            slope, intercept = float(ds.RescaleSlope), float(ds.RescaleIntercept)
            measured_range = (measured_range[0] * slope + intercept, measured_range[1] * slope + intercept)
        voi = pick("", "window", "window", "LUT")
        if voi == "LUT" and not modality:
            ds.VOILUTSequence = [lookup_table(rng, low, stored, signed)]
        elif voi == "window":
            span = measured_range[1] - measured_range[0]
            ds.WindowCenter = round(measured_range[0] + span * float(rng.random()), 3)
            ds.WindowWidth = round(2 + span * float(rng.random()), 3)
            ds.VOILUTFunction = pick("LINEAR", "LINEAR_EXACT", "SIGMOID")
        if pick(0, 0, 1):
            value = int(values.flat[0])
            ds.add_new(0x00280120, "SS" if signed else "US", value)
            padding = values == value
    elif kind == "PALETTE COLOR":
        for number, name in enumerate(("Red", "Green", "Blue")):
            table = rng.integers(0, 65536, 2**stored).astype("<u2")
            entries = min(len(table), 65535)
            ds.add_new(0x00281101 + number, "US", [entries % 65536, 0, 16])
            ds.add_new(0x00281201 + number, "OW", table[:entries].astype(f"{big}u2").tobytes())
            ds[f"{name}PaletteColorLookupTableData"].VR = "OW"
    if syntax == uid.RLELossless:  # GDCM aborts the process for some sizes
        ds.compress(syntax, encoding_plugin="pydicom", generate_instance_uid=False)
    stream = io.BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    data = stream.getvalue()

    def check(scan: Any) -> str | None:
        read = pydicom.dcmread(io.BytesIO(data))
        if kind == "PALETTE COLOR":
            tables = [
                np.frombuffer(ds[f"{name}PaletteColorLookupTableData"].value, f"{big}u2")
                for name in ("Red", "Green", "Blue")
            ]
            expected = np.stack([table[np.minimum(values[..., 0], len(table) - 1)] for table in tables])
            return compare(scan, expected >> (8 if expected.max() > 255 else 0)) if len(tables[0]) > 255 else None
        if colour:
            rgb = values.astype(np.uint8)
            rgb = rgb if kind == "RGB" else convert_color_space(rgb, kind, "RGB")
            return compare(scan, rgb.transpose(3, 0, 1, 2))
        if not shift and not np.array_equal(read.pixel_array.reshape(shape), values):
            return "pydicom reads other pixels than were written"
        measured = np.asarray(apply_modality_lut(values[..., 0], read), float)
        if scan.description["intensity"] == "window" and "VOILUTSequence" in read:
            # PS3.3 C.11.2.1.1: values outside have the first or last entry; pydicom cuts values to the type of entries
            (count, first, bits), entries = ds.VOILUTSequence[0].LUTDescriptor, ds.VOILUTSequence[0].LUTData
            measured = np.asarray(entries)[np.clip(measured.astype(int) - first, 0, count - 1)] / (2.0**bits - 1)
        elif scan.description["intensity"] == "window":
            ends = apply_voi_lut(np.append(measured.ravel(), [-1e9, 1e9]), read)
            measured = ((ends[:-2] - ends[-2]) / (ends[-1] - ends[-2])).reshape(measured.shape)
        mask = None if padding is None else padding[..., 0][None]
        inverted = kind == "MONOCHROME1" and not str(scan.description["intensity"]).startswith("hounsfield")
        return compare(scan, measured[None], padding=mask, inverted=inverted)

    return Case("DICOM", data, check)


def check_volume(scan: Any, image: Any, values: np.ndarray | None = None) -> str | None:
    """Compare a scan with a nibabel image: orientation, spacing and values."""
    import nibabel

    canonical = nibabel.as_closest_canonical(image)
    voxels = np.asarray(canonical.dataobj if values is None else values)
    voxels = voxels[..., 0] if voxels.ndim == 4 else voxels
    if voxels.dtype.names:
        voxels = np.stack([voxels[name] for name in voxels.dtype.names[:3]])
    else:
        voxels = voxels.astype(float)[None]
    mm = [float(value) for value in nibabel.affines.voxel_sizes(canonical.affine)]
    flat = [axis for axis in range(3) if voxels.shape[1 + axis] == 1]
    thick = [axis for axis in range(3) if all(mm[axis] > 1.5001 * mm[other] for other in range(3) if other != axis)]
    depth = flat[0] if len(flat) == 1 else thick[0] if thick else 2
    order = {2: (2, 1, 0), 1: (1, 2, 0), 0: (0, 2, 1)}[depth]
    voxels = voxels[:, ::-1, ::-1] if depth == 2 else voxels[:, ::-1, ::-1, ::-1]
    voxels = voxels.transpose(0, *(1 + axis for axis in order))
    if not np.allclose(scan.spacing, [mm[axis] for axis in order], rtol=1e-4):
        return f"spacing {scan.spacing}, expected {[mm[axis] for axis in order]}"
    padding = np.isnan(voxels)
    return compare(scan, np.nan_to_num(voxels), padding=padding if padding.any() else None)


def random_affine(rng: np.random.Generator) -> np.ndarray:
    """Return axes in any order and direction, tilted by up to 20 degrees."""
    from scipy.spatial.transform import Rotation

    axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
    tilt = Rotation.from_rotvec(rng.uniform(-0.2, 0.2, 3) * choose(rng, 0, 1)).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = tilt @ axes * rng.choice([0.5, 0.7, 1.0, 3.0], 3)
    affine[:3, 3] = rng.uniform(-100, 100, 3).round(2)
    return affine


def random_values(rng: np.random.Generator, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        values = (rng.random(shape) * choose(rng, 1, 900) - choose(rng, 0, 100)).astype(dtype)
        values.flat[0] = np.nan if rng.random() < 0.1 else 0
        return values
    limits = np.iinfo(dtype)
    return rng.integers(max(limits.min, -3000), min(limits.max, 4000) + 1, shape).astype(dtype)


def valid_nifti(rng: np.random.Generator) -> Case:
    import nibabel

    shape = tuple(int(side) for side in rng.integers(2, 9, 3)) + choose(rng, (), (), (2,))
    header = choose(rng, nibabel.Nifti1Header, nibabel.Nifti2Header)(endianness=choose(rng, "<", ">"))
    dtype = choose(rng, "u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8", "rgb")
    if dtype == "rgb":
        voxels = np.zeros(shape[:3], [(name, "u1") for name in "RGB"])
        for name in "RGB":
            voxels[name] = rng.integers(0, 256, shape[:3])
    else:
        voxels = random_values(rng, dtype, shape)
    header.set_data_dtype(voxels.dtype)
    make = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    image = make(voxels, random_affine(rng), header)
    image.set_sform(image.affine, choose(rng, 0, 1, 2))
    image.set_qform(image.affine, choose(rng, 1, 2) if not image.header["sform_code"] else choose(rng, 0, 1))
    image.header.set_xyzt_units(choose(rng, "mm", "unknown"))
    data = bytearray(image.to_bytes())
    if dtype != "rgb" and choose(rng, 0, 1):  # nibabel resets both on writing
        at, kind = (176, "f8") if make is nibabel.Nifti2Image else (112, "f4")
        scale = np.array([choose(rng, 1, 2, 0.37), choose(rng, 0, -1024, 12.5)], header.endianness + kind).tobytes()
        data[at : at + len(scale)] = scale
    plain = bytes(data)
    return Case("NIfTI", gzip.compress(plain, 1, mtime=0) if choose(rng, 0, 1) else plain,
                lambda scan: check_volume(scan, make.from_bytes(plain)))  # fmt: skip


def valid_mgh(rng: np.random.Generator) -> Case:
    import nibabel

    shape = tuple(int(side) for side in rng.integers(2, 9, 3))
    image = nibabel.MGHImage(random_values(rng, choose(rng, "u1", "i2", "i4", "f4"), shape), random_affine(rng))
    data = image.to_bytes()
    packed = gzip.compress(data, 1, mtime=0) if choose(rng, 0, 1) else data
    return Case("MGH", packed, lambda scan: check_volume(scan, nibabel.MGHImage.from_bytes(data)))


def valid_itk(rng: np.random.Generator) -> Case:
    import nibabel
    import SimpleITK

    shape = tuple(int(side) for side in rng.integers(2, 9, 3))
    values = random_values(rng, choose(rng, "u1", "i1", "i2", "u2", "i4", "f4", "f8"), shape)
    image = SimpleITK.GetImageFromArray(values)
    affine = np.diag([-1.0, -1, 1, 1]) @ random_affine(rng)
    image.SetSpacing(np.linalg.norm(affine[:3, :3], axis=0).tolist())
    image.SetDirection((affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)).ravel().tolist())
    ending = choose(rng, "nrrd", "mha")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"volume.{ending}")
        SimpleITK.WriteImage(image, str(path), useCompression=bool(rng.integers(2)))
        data, read = path.read_bytes(), SimpleITK.ReadImage(str(path))

    def check(scan: Any) -> str | None:
        steps = np.reshape(read.GetDirection(), (3, 3)) * read.GetSpacing()
        lps = np.eye(4)
        lps[:3, :3] = steps
        values = SimpleITK.GetArrayFromImage(read).T.astype(float)
        return check_volume(scan, nibabel.Nifti1Image(values, np.diag([-1.0, -1, 1, 1]) @ lps))

    return Case(ending.upper(), data, check)


def valid_image(rng: np.random.Generator) -> Case:
    from PIL import Image, ImageOps

    modes = {"PNG": "1 L LA P RGB RGBA I;16", "TIFF": "1 L LA P RGB RGBA CMYK I;16 I F", "BMP": "1 L P RGB",
             "GIF": "L P", "WEBP": "RGB RGBA", "JPEG": "L RGB CMYK"}  # fmt: skip
    kind = choose(rng, "PNG", "TIFF", "TIFF", "BMP", "GIF", "WEBP", "JPEG")
    mode = choose(rng, *modes[kind].split())
    height, width = (int(side) for side in rng.integers(2, 30, 2))
    if mode in ("I;16", "I", "F"):
        pixels = random_values(rng, {"I;16": "u2", "I": "i4", "F": "f4"}[mode], (height, width))
        image = Image.fromarray(np.nan_to_num(pixels))
    else:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
        if mode != "RGBA":
            image = image.convert("RGB").quantize(16) if mode == "P" else image.convert("RGB").convert(mode)
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    if kind == "TIFF":
        options["compression"] = choose(rng, None, "tiff_lzw", "tiff_adobe_deflate", "packbits")
        options["big_tiff"] = bool(rng.integers(2))
    if kind in ("PNG", "TIFF", "JPEG", "WEBP") and choose(rng, 0, 1):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = int(rng.integers(1, 9))
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    data = stream.getvalue()

    def check(scan: Any) -> str | None:
        with Image.open(io.BytesIO(data)) as opened:
            upright = ImageOps.exif_transpose(opened)
            if opened.mode in ("I;16", "I", "F", "L", "1"):
                pixels = np.asarray(upright if opened.mode != "1" else upright.convert("L"), float)
                return compare(scan, pixels[None, None])
            rgba = np.asarray(upright.convert("RGBA")).astype(int)
        blended = (rgba[..., :3] * rgba[..., 3:] + 127) // 255  # over black
        return compare(scan, blended.transpose(2, 0, 1)[:, None])

    return Case(kind, data, check)


def valid_array(rng: np.random.Generator) -> Case:
    dtype = choose(rng, "u1", "i1", ">i2", "u2", ">i4", "u4", "i8", "f2", "f4", ">f8", "?")
    height, width, depth = (int(side) for side in rng.integers(5, 12, 3))
    shape = choose(rng, (height, width), (depth, height, width), (height, width, 3), (depth, height, width, 3))
    values = random_values(rng, dtype, shape) if dtype != "?" else rng.integers(0, 2, shape).astype(bool)
    values = np.nan_to_num(values)
    stream = io.BytesIO()
    if choose(rng, 0, 1):
        np.savez_compressed(stream, image=values)
    else:
        np.save(stream, np.asfortranarray(values) if choose(rng, 0, 1) else values)
    measured = values * 255.0 if dtype == "?" else values.astype(float)
    measured = measured if shape[-1] == 3 else measured[..., None]
    measured = measured if measured.ndim == 4 else measured[None]
    return Case("NumPy", stream.getvalue(), lambda scan: compare(scan, measured.transpose(3, 0, 1, 2)))


def valid_video(rng: np.random.Generator) -> Case:
    import av
    from av.filter import Graph

    container, codec, pixels = choose(rng, *VIDEOS)
    even = pixels.startswith("yuv") and "444" not in pixels
    height, width = (int(side) * (2 if even else 1) for side in rng.integers(16, 30, 2))
    options = {"threads": "1"}
    if codec in ("libx264", "mpeg4"):
        options |= {"bf": str(rng.integers(3)), "g": str(rng.integers(2, 12))}
    stream = io.BytesIO()
    with av.open(stream, "w", format=container, options={"fflags": "+bitexact"}) as out:
        track = out.add_stream(codec, rate=25, options=options)
        track.height, track.width, track.pix_fmt = height, width, pixels
        if codec in ("libx264", "libvpx-vp9") and not pixels.startswith("gray"):
            track.codec_context.colorspace, track.codec_context.color_range = choose(rng, 1, 5, 9), choose(rng, 1, 2)
        if choose(rng, 0, 1):
            track.codec_context.sample_aspect_ratio = Fraction(choose(rng, 1, 4, 12), choose(rng, 1, 3, 11))
        texture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for number in range(int(rng.integers(1, 25))):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, number, axis=1), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    data = stream.getvalue()

    def check(scan: Any) -> str | None:
        with av.open(io.BytesIO(data)) as source:
            frames = list(source.decode(video=0))
        first, graph = frames[0], Graph()
        size = f"video_size={first.width}x{first.height}:pix_fmt={first.format.name}:time_base=1/25"
        buffer = graph.add("buffer", f"{size}:colorspace={int(first.colorspace)}:range={int(first.color_range)}")
        deep = first.format.name.startswith("gray1")
        nodes = [graph.add("scale", "flags=bicubic"), graph.add("format", first.format.name if deep else "rgb24")]
        graph.link_nodes(buffer, *nodes, graph.add("buffersink")).configure()
        shown = []
        for frame in frames:
            graph.vpush(frame)
            shown.append(graph.vpull().to_ndarray().reshape(first.height, first.width, -1))
        count = min(num_frames or len(shown), len(shown))
        centres = [(2 * number + 1) * len(shown) // (2 * count) for number in range(count)]
        return compare(scan, np.stack(shown)[centres].transpose(3, 0, 1, 2).astype(float))

    num_frames = choose(rng, None, 1, 3, 5)
    return Case("video", data, check, {"num_frames": num_frames})


VIDEOS = [("mp4", "libx264", "yuv420p"), ("mp4", "libx264", "yuv444p"), ("matroska", "libx264", "yuv420p10le"),
          ("avi", "mpeg4", "yuv420p"), ("mpeg", "mpeg2video", "yuv420p"), ("mpegts", "libx264", "yuv420p"),
          ("avi", "mjpeg", "yuvj422p"), ("webm", "libvpx", "yuv420p"), ("matroska", "ffv1", "gray"),
          ("matroska", "ffv1", "gray12le"), ("matroska", "ffv1", "bgr0"), ("mov", "png", "rgb24")]  # fmt: skip
VALID: list[tuple[Callable[[np.random.Generator], Case], float]] = [
    (valid_dicom, 0.35), (valid_nifti, 0.2), (valid_mgh, 0.05), (valid_itk, 0.1), (valid_image, 0.15),
    (valid_array, 0.1), (valid_video, 0.05)]  # fmt: skip
INSTALLED = {valid_itk: "SimpleITK"}  # optional packages


# -------------------------------------------------------------------------------------------------- mutated files


def choose(rng: np.random.Generator, *options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


@functools.cache
def slices() -> list[bytes]:
    """Return the slices of a DICOM series."""
    import pydicom
    from pydicom.data import get_testdata_file

    head = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False))
    written = []
    for number in range(4):
        head.InstanceNumber, head.ImagePositionPatient = number, [0, 0, 2 * number]
        head.SOPInstanceUID = head.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
        stream = io.BytesIO()
        head.save_as(stream)
        written.append(stream.getvalue())
    return written


@functools.cache
def seeds() -> dict[str, list[bytes]]:
    """Return files by format: test data of installed packages, and files written here."""
    import nibabel
    import pydicom

    found: dict[str, list[bytes]] = defaultdict(list)
    roots = [Path(pydicom.__file__).parent / "data" / "test_files", Path(nibabel.__file__).parent]
    data_package = importlib.util.find_spec("data_store")  # pydicom-data
    roots += [Path(folder, "data") for folder in (data_package and data_package.submodule_search_locations) or ()]
    endings = {".dcm": "DICOM", ".nii": "NIfTI", ".nii.gz": "NIfTI", ".mgz": "MGH", ".mgh": "MGH", ".mnc": "MINC"}
    for path in sorted(path for root in roots for path in root.rglob("*") if path.is_file()):
        kind = next((kind for ending, kind in endings.items() if path.name.endswith(ending)), None)
        if kind and 0 < path.stat().st_size <= MAX_SEED_BYTES:
            found[kind].append(path.read_bytes())
    rng = np.random.default_rng(0)
    for make, _ in available():
        for _ in range(24):
            case = make(rng)
            found[case.format].append(case.source)
    for members in (found["DICOM"][-4:], found["NIfTI"][-1:]):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for number, data in enumerate(members):
                archive.writestr(zipfile.ZipInfo(f"{number}.bin"), data, zipfile.ZIP_DEFLATED)  # with a fixed date
        found["zip"].append(stream.getvalue())
    compressed = (
        b"1.2.840.10008.1.2.4.5",
        b"1.2.840.10008.1.2.4.7",
        b"1.2.840.10008.1.2.4.8",
        b"1.2.840.10008.1.2.4.9",
    )
    found["codestream"] = [data for data in found["DICOM"] if any(syntax in data[:600] for syntax in compressed)]
    return dict(found)


def available() -> list[tuple[Callable[[np.random.Generator], Case], float]]:
    return [(make, share) for make, share in VALID if importlib.util.find_spec(INSTALLED.get(make, "numpy"))]


def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Return a damaged copy: flipped bytes, a truncation, a splice, or edited numbers."""
    raw = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if not raw:
            break
        at = int(rng.integers(len(raw) if rng.random() < 0.5 else min(len(raw), 600)))
        end = int(rng.integers(at, len(raw) + 1))
        action = choose(rng, "flip", "flip", "number", "number", "cut", "splice", "delete", "repeat")
        if action == "flip":
            for position in rng.integers(0, min(len(raw), choose(rng, 400, len(raw))), int(rng.integers(1, 20))):
                raw[position] ^= 1 << int(rng.integers(8))
        elif action == "number":
            size = choose(rng, 1, 2, 4, 8)
            number = choose(rng, 0, 1, 2, -1, 2 ** (8 * size - 1) - 1, len(raw), int(rng.integers(2**31)))
            raw[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, choose(rng, "little", "big"))
        elif action == "cut":
            del raw[at:]
        elif action == "splice":
            start = int(rng.integers(len(other)))
            raw[at:end] = other[start : start + int(rng.integers(1, 4096))]
        elif action == "delete":
            del raw[at : min(end, at + int(rng.integers(1, 2000)))]
        else:
            raw[at:at] = raw[at : min(end, at + 2000)]
    return bytes(raw)


def edit_dicom(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    """Return a DICOM file in which a few elements are deleted or set to invalid values."""
    import pydicom

    ds = pydicom.dcmread(io.BytesIO(data), force=True)
    numbers = (0, 1, -1, 2, 7, 12, 255, 65535, 2**31 - 1)
    texts = ("", "0", "-1", "1e308", "1\\2", "nan", "RGB", "MONOCHROME1", "PALETTE COLOR", "ABC")
    for _ in range(int(rng.integers(1, 4))):
        elements = [element for element in ds if element.tag != 0x7FE00010]
        if not elements:
            break
        element = elements[int(rng.integers(len(elements)))]
        if rng.random() < 0.3:
            del ds[element.tag]
        elif element.VR in ("US", "SS", "UL", "SL"):
            element.value = choose(rng, *numbers) % (2**15 if element.VR[1] == "S" and element.VR[0] == "S" else 2**16)
        elif element.VR in ("IS", "DS", "CS", "LO", "SH", "UI"):
            element._value = choose(rng, *texts)
    stream = io.BytesIO()
    ds.save_as(stream, enforce_file_format=False)
    return stream.getvalue()


def edit_codestream(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Return a compressed DICOM file in which the header or the data of one frame are damaged."""
    import pydicom
    from pydicom.encaps import encapsulate, generate_frames

    ds = pydicom.dcmread(io.BytesIO(data))
    frames = list(generate_frames(ds.PixelData, number_of_frames=int(ds.get("NumberOfFrames") or 1)))
    at = int(rng.integers(len(frames)))
    frames[at] = mutate(frames[at], other, rng) + b"\0\0"  # fragments of no bytes cannot be written
    ds.PixelData = encapsulate(frames)
    stream = io.BytesIO()
    ds.save_as(stream)
    return stream.getvalue()


def make_case(seed: int, index: int) -> Case:
    rng = np.random.default_rng([seed, index])
    if index % VALID_EVERY == 0:
        makers, shares = zip(*available(), strict=True)
        return makers[int(rng.choice(len(makers), p=np.array(shares) / sum(shares)))](rng)
    kind = choose(rng, *sorted(seeds()), "DICOM", "DICOM", "NIfTI", "series")
    files = slices() if kind == "series" else seeds()[kind]
    data = choose(rng, *files)
    other = choose(rng, *files)
    edit = {"codestream": edit_codestream, "DICOM": edit_dicom, "series": edit_dicom}.get(kind, mutate)
    try:
        changed = (edit if edit is edit_codestream or rng.random() < 0.3 else mutate)(data, other, rng)
    except Exception:  # pydicom cannot write what was set
        changed = mutate(data, other, rng)
    source = [changed if file is data else file for file in files] if kind == "series" else changed
    return Case(kind, source, options={"num_frames": choose(rng, None, 3)})


# ----------------------------------------------------------------------------------------------------- running cases


def memory() -> tuple[int, int]:
    """Return the resident memory and its peak since `reset_peak`, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmRSS"].split()[0]) * 1024, int(status["VmHWM"].split()[0]) * 1024


def run_case(seed: int, index: int, folder: Path) -> dict[str, Any]:
    """Run one case. `failure` is None if the readers kept their promises."""
    from modeling_m3ret.reading_m3ret import M3RetReadError, ReadLimits, read_scan

    case = make_case(seed, index)
    if isinstance(case.source, bytes) and index % 3 == 0:
        path = folder / "scan"
        path.write_bytes(case.source)
        case.source = path
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began = memory()[0], time.perf_counter()
    failure, outcome = None, "read"
    try:
        scan = read_scan(case.source, limits=ReadLimits(max_decoded_bytes=MAX_DECODED), **case.options)
        difference = case.check(scan) if case.check else None
        if difference:
            failure = f"differs from the reference: {difference}"
        array = scan.array
        if not failure and array.dtype != np.uint8 and not (array.min() >= 0 and array.max() <= 1):
            failure = "values are not in [0, 1]"
    except M3RetReadError as error:
        outcome = str(error.reason)
        if case.check:
            failure = f"a valid file is refused: {error.detail}"
    except BaseException as error:
        outcome, failure = "other exception", f"{type(error).__name__}: {error}"
    growth, seconds = memory()[1] - before, time.perf_counter() - began
    if not failure and growth > MAX_GROWTH:
        failure = f"took {growth / MIB:.0f} MiB"
    return {"index": index, "format": case.format, "valid": case.check is not None, "outcome": outcome,
            "failure": failure, "growth": growth, "seconds": seconds}  # fmt: skip


def work(connection: Any, seed: int, indices: list[int]) -> None:
    """Run cases in a worker process: announce each, then send its result."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders print to it
    seeds()
    with tempfile.TemporaryDirectory() as folder:
        for index in indices:
            connection.send(index)
            connection.send(run_case(seed, index, Path(folder)))
    connection.send(None)


def run(seed: int, indices: list[int]) -> list[dict[str, Any]]:
    """Run cases in a worker process that is replaced when it crashes or is stuck."""
    context, results = multiprocessing.get_context("spawn"), []
    while indices:
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(sender, seed, indices))
        worker.start()
        sender.close()
        running: Any = None
        try:
            has_started = receiver.poll(START_SECONDS)
            while has_started and receiver.poll(STUCK_SECONDS):
                message = receiver.recv()
                if message is None:
                    running, indices = None, []
                    break
                if isinstance(message, dict):
                    results.append(message)
                    running, indices = None, indices[indices.index(message["index"]) + 1 :]
                else:
                    running = message
            problem = f"still running after {STUCK_SECONDS:.0f} s"
        except EOFError:
            problem = "the process crashed"
        worker.kill()
        worker.join()
        if indices:
            at = indices[0] if running is None else running
            case = make_case(seed, at)
            results.append({"index": at, "format": case.format, "valid": case.check is not None, "outcome": "crash",
                            "failure": problem, "growth": 0, "seconds": 0.0})  # fmt: skip
            indices = indices[indices.index(at) + 1 :]
    return results


def summarise(results: list[dict[str, Any]]) -> str:
    """Return a table with one row for each format."""
    titles = "format", "mutated", "valid", "read", "refused, by reason", "failures", "peak MiB", "slowest s"
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for kind in sorted({result["format"] for result in results}):
        rows = [result for result in results if result["format"] == kind]
        outcomes, valid = Counter(row["outcome"] for row in rows), sum(row["valid"] for row in rows)
        refused = ", ".join(f"{count} {why}" for why, count in outcomes.most_common() if why != "read")
        failures = sum(row["failure"] is not None for row in rows)
        peak, slowest = (max(row[key] for row in rows) for key in ("growth", "seconds"))
        cells = (kind, len(rows) - valid, valid, outcomes["read"], refused, failures)
        lines.append(f"| {' | '.join(map(str, cells))} | {peak / MIB:.0f} | {slowest:.1f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Return the number of failures, at most 1, as the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, help="number of mutated files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", type=int, help="number of one case to repeat in this process")
    parser.add_argument("--save", type=Path, help="folder for the files of the case given by --only")
    parser.add_argument("--output", type=Path, help="JSON file for the report")
    options = parser.parse_args(arguments)
    if options.only is not None:
        source = make_case(options.seed, options.only).source
        for number, data in enumerate(source if isinstance(source, list) else [source]):
            if options.save:
                (options.save / f"{options.only}_{number}.bin").write_bytes(data)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run_case(options.seed, options.only, Path(folder)), indent=1))
        return 0
    total = math.ceil(options.cases * VALID_EVERY / (VALID_EVERY - 1))
    results: list[dict[str, Any]] = []
    for start in range(0, total, CHUNK):
        indices = range(start, min(start + CHUNK, total))
        with ThreadPoolExecutor(options.workers) as pool:  # each thread waits for a worker process
            parts = [list(indices[first :: options.workers]) for first in range(options.workers)]
            results += [result for part in pool.map(functools.partial(run, options.seed), parts) for result in part]
        failures = sorted((result for result in results if result["failure"]), key=lambda result: result["index"])
        slow = [result for result in results if result["seconds"] > SLOW_SECONDS]
        if options.output:  # after each chunk, as a long run may be stopped
            report = {"seed": options.seed, "cases": len(results), "failures": failures, "slow": slow}
            options.output.write_text(json.dumps(report | {"table": summarise(results).splitlines()}, indent=1))
    print(summarise(results))
    for failure in failures:
        print(f"--seed {options.seed} --only {failure['index']}: {failure['format']}: {failure['failure']}")
    print(f"{len(results):,} cases, {len(failures)} failures, {len(slow)} slower than {SLOW_SECONDS:.0f} s")
    return int(bool(failures))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
