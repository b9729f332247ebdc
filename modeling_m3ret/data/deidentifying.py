"""What of a file may leave the machine? The picture, and of its header only what says how to look at it.

A DICOM file becomes a PNG or a NIfTI file, so nothing of its header goes along but what `DICOM_ELEMENTS_USED` changed
in the voxels, spacing and intensity: no name, date, UID, private element or preamble (in the spirit of the Basic
Profile of PS3.15, annex E, which removes elements where this list keeps). JPEG, PNG and video keep their compressed
pixels, bit for bit, and lose all else. What is burned into the pixels stays: see `blank_outside_regions`.
"""

from __future__ import annotations

import io
import re
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


# The elements that reading looks at, and so all that can have an influence on a row. A row holds none of their texts.
DICOM_ELEMENTS_USED = (
    *("TransferSyntaxUID", "SOPClassUID", "SeriesInstanceUID", "InstanceNumber", "BurnedInAnnotation"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "FloatPixelData"),
    *("DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("PixelSpacing", "ImagerPixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PlanePositionSequence"),
    *("PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence", "FrameVOILUTSequence"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "PixelPaddingValue"),
    *("PixelPaddingRangeLimit", "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "LUTDescriptor"),
    *("LUTData", "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor"),
    *("BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData"),
    *("SequenceOfUltrasoundRegions", "RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1"),
    "RegionLocationMaxY1",
)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# pixels, palette, transparency, and the frames of an animation: no text, time, EXIF or colour profile
PNG_CHUNKS_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT")
# of H.264 and H.265 streams: supplemental messages, which may hold text of the device
MESSAGE_UNITS = {"h264": "6", "hevc": "39-40"}
# a plain JFIF header: version 1.1, no density, no thumbnail
JFIF = b"\xff\xe0\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # in entropy-coded data: neither stuffing, restart nor fill


def bare_jpeg(data: bytes) -> bytes:
    """A JPEG file with its compressed picture bit for bit, without application segments, comments and trailing bytes.

    What says how colours are coded stays: that there was a JFIF or an Adobe header, no more of it.

    Raises:
        ValueError: for what is not a whole JPEG file.
    """
    kept, at = [data[:2]], 2
    while True:
        if data[at : at + 2] == b"\xff\xd9":
            return b"".join([*kept, data[at : at + 2]])
        if data[at : at + 2] == b"\xff\xff":  # fill
            at += 1
            continue
        if data[at : at + 1] != b"\xff" or at + 4 > len(data):
            raise ValueError("a JPEG file with a segment cut short")
        marker = data[at + 1]
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        body = data[at + 4 : end]
        if marker == 0xE0 and body.startswith(b"JFIF\0"):
            kept.append(JFIF)
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            kept.append(b"\xff\xee\0\x0e" + body[:12])  # the last of them says which colours these are
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[at:end])
        if marker == 0xDA:  # entropy-coded data follows, up to the next marker
            following = _JPEG_MARKER.search(data, end)
            if following is None:
                raise ValueError("a JPEG file without an end")
            kept.append(data[end : following.start()])
            end = following.start()
        at = end


def bare_png(data: bytes) -> bytes:
    """A PNG file with its compressed picture bit for bit, and no other chunk than `PNG_CHUNKS_KEPT`.

    Raises:
        ValueError: for what is not a whole PNG file.
    """
    kept, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind in PNG_CHUNKS_KEPT:
            kept.append(data[at:end])
        if kind == b"IEND":
            return b"".join(kept)
        at = end
    raise ValueError("a PNG file without an end")


def bare_video(file: bytes | Path) -> bytes:
    """The video stream as it is compressed, alone in a new MP4 (or Matroska, for what MP4 can't hold).

    Sound, subtitles, chapters, attachments, metadata and supplemental messages stay behind.

    Raises:
        ValueError, or an error of FFmpeg: if the stream can't be copied.
    """
    errors: list[Exception] = []
    for container in ("mp4", "matroska"):
        try:
            return _copied_stream(file, container)
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _copied_stream(file: bytes | Path, container: str) -> bytes:
    import av
    from av.bitstream import BitStreamFilterContext

    target = io.BytesIO()
    with (
        av.open(_openable(file)) as source,
        av.open(target, "w", format=container, options={"fflags": "+bitexact"}) as output,
    ):
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        copy.metadata.clear()
        units = MESSAGE_UNITS.get(stream.codec_context.name)
        filters = BitStreamFilterContext(f"filter_units=remove_types={units}", stream, copy) if units else None
        packets = 0
        for packet in source.demux(stream):
            if packet.size == 0:
                continue
            if packet.pts is None:  # AVI says only when to decode
                packet.pts = packet.dts
            for part in filters.filter(packet) if filters else [packet]:
                part.stream = copy
                output.mux(part)
                packets += 1
    if not packets:
        raise ValueError("a video without frames")
    return target.getvalue()


def lossless_video(frames: np.ndarray, fps: float) -> bytes:
    """RGB frames `(D, H, W, 3)` uint8 as H.264 that loses nothing of them, in MP4: for streams that can't be copied."""
    import av

    target = io.BytesIO()
    with av.open(target, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
        rate = Fraction(fps if 0 < fps < 1000 else 25).limit_denominator(1000)
        stream = output.add_stream("libx264rgb", rate=rate, options={"qp": "0", "preset": "veryfast", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        output.mux(stream.encode())
    return target.getvalue()


def _openable(file: bytes | Path) -> Any:
    return str(file.resolve()) if isinstance(file, Path) else io.BytesIO(file)


def blank_outside_regions(array: np.ndarray, dataset: Any) -> np.ndarray:
    """`(C, D, H, W)` of an ultrasound DICOM with everything outside its regions (PS3.3 C.8.5.5) set to the least value:
    names and dates are burned in beside them. As it is where the header declares no region."""
    regions = dataset.get("SequenceOfUltrasoundRegions") or []
    inside = np.zeros(array.shape[2:], bool)
    for region in regions:
        left, top, right, bottom = (
            int(region.get(f"RegionLocation{edge}", -1)) for edge in ("MinX0", "MinY0", "MaxX1", "MaxY1")
        )
        if 0 <= left <= right and 0 <= top <= bottom:
            inside[top : bottom + 1, left : right + 1] = True
    if not inside.any():
        return array
    return np.where(inside, array, array.min())
