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
import zlib
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
    *("GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData", "PixelPresentation"),
    *("SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData"),
    "SegmentedBluePaletteColorLookupTableData",
    *("SequenceOfUltrasoundRegions", "RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1"),
    "RegionLocationMaxY1",
)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# pixels, palette, transparency: no text, time, EXIF or colour profile, and no frames of an animation
PNG_CHUNKS_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# frames, tables of Huffman and arithmetic coding, scans, quantisation, lines, restarts: no text, no application's data
JPEG_SEGMENTS_KEPT = (*range(0xC0, 0xD0), *range(0xDA, 0xE0))
# a plain JFIF header: version 1.1, no density, no thumbnail
JFIF = b"\xff\xe0\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # in entropy-coded data: neither stuffing, restart nor fill
# Units of a stream, by type or start code, that are picture: not H.264's supplemental messages nor MPEG's user data,
# which hold text of the device and of the encoder
_MPEG_UNITS = frozenset((*range(0xB0), 0xB3, 0xB5, 0xB7, 0xB8))
UNITS_KEPT = {
    "h264": frozenset((*range(1, 6), *range(7, 12), 13, 14, 15, 19, 20)),
    "hevc": frozenset((*range(10), *range(16, 22), *range(32, 38))),
    "mpeg4": frozenset((*range(0x30), 0xB0, 0xB1, 0xB3, 0xB5, 0xB6)),
    "mpeg1video": _MPEG_UNITS,
    "mpeg2video": _MPEG_UNITS,
}


def bare_jpeg(data: bytes) -> bytes:
    """A JPEG file with its compressed picture bit for bit, without application segments, comments and trailing bytes.

    What says how colours are coded stays: that there was a JFIF or an Adobe header, no more of it.

    Raises:
        ValueError: for what is not a whole JPEG file.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG file")
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
        if not at + 4 <= end <= len(data):
            raise ValueError("a JPEG file with a segment cut short")
        body = data[at + 4 : end]
        if marker == 0xE0 and body.startswith(b"JFIF\0"):
            kept.append(JFIF)
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            kept.append(b"\xff\xee\0\x0e" + body[:12])  # the last of them says which colours these are
        elif marker in JPEG_SEGMENTS_KEPT:
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
    if not data.startswith(PNG_SIGNATURE):
        raise ValueError("not a PNG file")
    kept, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data) or length > {b"IHDR": 13, b"IEND": 0, b"PLTE": 768, b"tRNS": 256}.get(kind, length):
            raise ValueError("a PNG file with a chunk cut short, or too long")
        if kind in PNG_CHUNKS_KEPT:
            kept.append(data[at:end])
        if kind == b"IEND":
            return b"".join(kept)
        at = end
    raise ValueError("a PNG file without an end")


def unpacked_png(bare: bytes) -> bytes:
    """A PNG from `bare_png` with the same picture not deflated: it decodes in half of the time, and a column of the
    data set compresses it better. As it is where the picture is none of its header's size."""
    width, height, bits, colour, interlaced = struct.unpack_from(">IIBBxxB", bare, 16)
    values = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 4)
    # each row begins with a byte for its filter; interlaced, the seven passes have up to twice as many rows
    most = (2 if interlaced else 1) * height * (1 + (width * bits * values + 7) // 8)
    before, packed, at = [bare[:8]], [], 8
    after: list[bytes] = []
    while at < len(bare):
        length, kind = struct.unpack_from(">I4s", bare, at)
        chunk = bare[at : at + 12 + length]
        if kind == b"IDAT":
            packed.append(chunk[8:-4])
        else:
            (after if packed else before).append(chunk)
        at += 12 + length
    inflate = zlib.decompressobj()
    try:
        rows = inflate.decompress(b"".join(packed), most + 1)
    except zlib.error:
        return bare
    if len(rows) > most or not inflate.eof:
        return bare
    stored = zlib.compress(rows, 0)
    data = b"IDAT" + stored
    chunk = struct.pack(">I", len(stored)) + data + struct.pack(">I", zlib.crc32(data))
    return b"".join([*before, chunk, *after])


def bare_video(file: bytes | Path) -> bytes:
    """The video stream as it is compressed, alone in a new MP4 (or Matroska, for what MP4 can't hold).

    Sound, subtitles, chapters, attachments, metadata, supplemental messages and user data stay behind.

    Raises:
        ValueError, or an error of FFmpeg: if the stream can't be copied, or may hold text where we don't look.
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
        av.open(io.BytesIO(), "w", format="matroska") as parameters,
        av.open(target, "w", format=container, options={"fflags": "+bitexact"}) as output,
    ):
        stream = source.streams.video[0]
        codec, filters = stream.codec_context.codec.canonical_name, None
        if codec in ("h264", "hevc"):  # start codes, as MPEG has them, in place of lengths
            template = parameters.add_stream_from_template(stream)
            filters = BitStreamFilterContext(f"{codec}_mp4toannexb", stream, template)
        else:
            template = stream
        copy = output.add_stream_from_template(template)
        copy.metadata.clear()
        header = copy.codec_context.extradata
        copy.codec_context.extradata = _bare_units(header, codec) if header and codec in UNITS_KEPT else None
        rate = stream.average_rate or 25
        usual = max(1, round(1 / (rate * stream.time_base))) if stream.time_base else 1
        packets = 0
        for packet in source.demux(stream):
            for part in filters.filter(packet) if filters else [packet]:
                data = _bare_packet(bytes(part), codec)
                if not data:
                    continue
                bare = av.Packet(data)  # without what lies beside a packet
                bare.stream, bare.time_base, bare.is_keyframe = copy, stream.time_base, part.is_keyframe
                bare.dts, bare.duration = part.dts, part.duration or usual  # MP4 hides a last frame of none
                bare.pts = part.dts if part.pts is None else part.pts  # AVI says only when to decode
                output.mux(bare)
                packets += 1
    data = target.getvalue()
    with av.open(io.BytesIO(data)) as written:
        shown = sum(packet.size > 0 and not packet.is_discard for packet in written.demux(video=0))
    if not packets or shown != packets:
        raise ValueError(f"a video of {packets} frames of which {shown} would be shown")
    return data


def _bare_packet(data: bytes, codec: str) -> bytes:
    if codec in UNITS_KEPT:
        return _bare_units(data, codec)
    if codec == "mjpeg":
        return bare_jpeg(data) if data else data
    if codec in ("vp8", "vp9"):  # these have no place for text
        return data
    raise ValueError("a codec that isn't known to be without text")


def _bare_units(data: bytes, codec: str) -> bytes:
    """A stream with start codes, or the header of one, without what isn't in `UNITS_KEPT`."""
    shift, mask = {"h264": (0, 31), "hevc": (1, 63)}.get(codec, (0, 255))
    units = data.split(b"\0\0\1")[1:]
    return b"".join(b"\0\0\1" + unit for unit in units if unit and unit[0] >> shift & mask in UNITS_KEPT[codec])


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
    return bare_video(target.getvalue())  # the encoder notes its settings


def _openable(file: bytes | Path) -> Any:
    return str(file.resolve()) if isinstance(file, Path) else io.BytesIO(file)


def blank_outside_regions(array: np.ndarray, *datasets: Any) -> np.ndarray:
    """`(C, D, H, W)` of an ultrasound DICOM with everything outside its regions (PS3.3 C.8.5.5) set to the least value:
    names and dates are burned in beside them. As it is where no header declares a region; of several headers, what lies
    inside the regions of all that do stays."""
    kept: np.ndarray | None = None
    for edges in {regions for dataset in datasets if (regions := _regions_of(dataset))}:
        inside = np.zeros(array.shape[2:], bool)
        for left, top, right, bottom in edges:
            inside[top : bottom + 1, left : right + 1] = True
        if inside.any():
            kept = inside if kept is None else kept & inside
    return array if kept is None else np.where(kept, array, array.min())


def _regions_of(dataset: Any) -> tuple[tuple[int, int, int, int], ...]:
    """(left, top, right, bottom), inclusive, of each region that makes sense."""
    regions = []
    for region in dataset.get("SequenceOfUltrasoundRegions") or []:
        edges = [region.get(f"RegionLocation{edge}") for edge in ("MinX0", "MinY0", "MaxX1", "MaxY1")]
        if all(isinstance(edge, int) for edge in edges):
            left, top, right, bottom = edges
            if 0 <= left <= right and 0 <= top <= bottom:
                regions.append((left, top, right, bottom))
    return tuple(regions)
