"""Remove everything from a file that could identify a patient, and keep the picture.

A DICOM file becomes a PNG or NIfTI file, so its header is dropped except for the effect of `DICOM_ELEMENTS_USED` on
voxels, spacing and intensity. This follows the Basic Profile of DICOM PS3.15, annex E, with a list of what is retained
in place of a list of what is removed. JPEG and video retain their compressed pixels bit for bit and lose all metadata.
Text burned into the pixels is not removed, except by `blank_outside_regions`.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


# The elements that the reader looks at, and thus all that can influence a row. No text of them is stored. Of Siemens
# mosaics, it also reads the number and direction of their slices in private elements.
DICOM_ELEMENTS_USED = (
    *("TransferSyntaxUID", "SOPClassUID", "SeriesInstanceUID", "InstanceNumber", "BurnedInAnnotation"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "FloatPixelData"),
    *("DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("PixelSpacing", "ImagerPixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"),
    *("NominalScannedPixelSpacing", "EstimatedRadiographicMagnificationFactor", "SliceThickness", "SliceLocation"),
    *("SpacingBetweenSlices", "GridFrameOffsetVector", "SliceLocationVector", "SliceVector", "FrameTime", "CineRate"),
    *("FrameTimeVector", "RotationVector", "AngularViewVector", "TimeSlotVector", "PhaseVector"),
    *("DetectorInformationSequence", "FrameOfReferenceUID", "StudyInstanceUID", "SeriesNumber", "SOPInstanceUID"),
    *("PatientID", "Modality", "DirectoryRecordSequence", "ImageType", "FrameType", "MRImageFrameTypeSequence"),
    *("CTImageFrameTypeSequence", "PETFrameTypeSequence", "XRay3DFrameTypeSequence", "FrameContentSequence", "StackID"),
    *("InStackPositionNumber", "TemporalPositionIdentifier", "TemporalPositionIndex", "AcquisitionNumber"),
    *("FrameAcquisitionNumber", "AcquisitionDateTime", "AcquisitionDate", "AcquisitionTime", "ContentDate"),
    *("FrameAcquisitionDateTime", "ContentTime", "DimensionIndexValues", "TriggerTime", "FrameReferenceTime"),
    *("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime", "EchoTime", "EchoNumbers", "MREchoSequence"),
    *("EffectiveEchoTime", "DiffusionBValue", "MRDiffusionSequence", "InversionTime", "MRModifierSequence"),
    *("InversionTimes", "FlipAngle", "MRTimingAndRelatedParametersSequence", "KVP", "CTXRayDetailsSequence"),
    *("ConvolutionKernel", "CTReconstructionSequence", "PixelAspectRatio", "PhysicalUnitsXDirection"),
    *("PhysicalUnitsYDirection", "PhysicalDeltaX", "PhysicalDeltaY", "RegionSpatialFormat"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PlanePositionSequence"),
    *("PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence", "FrameVOILUTSequence"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "ModalityLUTType", "PixelPaddingValue"),
    *("FloatPixelPaddingValue", "FloatPixelPaddingRangeLimit", "DoubleFloatPixelPaddingValue"),
    *("DoubleFloatPixelPaddingRangeLimit", "PixelPaddingRangeLimit", "WindowCenter", "WindowWidth"),
    *("VOILUTFunction", "VOILUTSequence", "LUTDescriptor", "LUTData", "RedPaletteColorLookupTableDescriptor"),
    *("GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor"),
    *("RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData"),
    *("PixelPresentation", "PresentationLUTShape"),
    *("SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData"),
    "SegmentedBluePaletteColorLookupTableData",
    *("SequenceOfUltrasoundRegions", "RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1"),
    "RegionLocationMaxY1",
)

# Frames, Huffman and arithmetic coding tables, scans, quantisation tables, line counts, restarts: no text.
JPEG_MARKERS_RETAINED = (*range(0xC0, 0xD0), *range(0xDA, 0xE0))
PLAIN_JFIF = b"\xff\xe0\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"  # version 1.1, no density, no thumbnail
_NEXT_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # in entropy-coded data; not stuffing, restart or fill

# NAL units that cannot hold text of the device or the encoder, as arguments of FFmpeg's bitstream filter. It drops SEI
# (6 in H.264, 39 and 40 in HEVC) and all reserved or unspecified types.
FILTER_UNITS = {
    "h264": "filter_units=pass_types=1-5|7-11|13-15|19-20",
    "hevc": "filter_units=pass_types=0-9|16-21|32-37",
}
# Start codes of MPEG video that hold no user data (0xB2). `filter_units` does not support MPEG-1 and MPEG-4 part 2.
_MPEG_2_START_CODES = frozenset((*range(0xB0), 0xB3, 0xB5, 0xB7, 0xB8))
START_CODES_RETAINED = {
    "mpeg4": frozenset((*range(0x30), 0xB0, 0xB1, 0xB3, 0xB5, 0xB6)),
    "mpeg1video": _MPEG_2_START_CODES,
    "mpeg2video": _MPEG_2_START_CODES,
}


def strip_jpeg_metadata(data: bytes) -> bytes:
    """Return a JPEG file without application segments, comments and trailing bytes; its scans stay bit for bit.

    A JFIF or Adobe header is replaced by a minimal one, because it determines how colours are decoded.

    Raises:
        ValueError: if the data is not a complete JPEG file.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG file")
    retained, position = [data[:2]], 2
    while True:
        if data[position : position + 2] == b"\xff\xd9":
            return b"".join([*retained, data[position : position + 2]])
        if data[position : position + 2] == b"\xff\xff":  # fill byte
            position += 1
            continue
        if data[position : position + 1] != b"\xff" or position + 4 > len(data):
            raise ValueError("truncated JPEG file")
        marker = data[position + 1]
        end = position + 2 + struct.unpack_from(">H", data, position + 2)[0]
        if not position + 4 <= end <= len(data):
            raise ValueError("truncated JPEG file")
        body = data[position + 4 : end]
        if marker == 0xE0 and body.startswith(b"JFIF\0"):
            retained.append(PLAIN_JFIF)
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            retained.append(b"\xff\xee\0\x0e" + body[:12])  # the last byte is the colour transform
        elif marker in JPEG_MARKERS_RETAINED:
            retained.append(data[position:end])
        if marker == 0xDA:  # entropy-coded data follows, up to the next marker
            following = _NEXT_JPEG_MARKER.search(data, end)
            if following is None:
                raise ValueError("truncated JPEG file")
            retained.append(data[end : following.start()])
            end = following.start()
        position = end


def strip_video_metadata(file: bytes | Path) -> bytes:
    """Copy the compressed video stream into a new MP4 file, or into Matroska if MP4 does not support the codec.

    Audio, subtitles, chapters, attachments, metadata, SEI messages and user data are dropped.

    Raises:
        ValueError: if the codec may hold text in places that are not checked, or frames would be lost.
        av.FFmpegError: if FFmpeg cannot copy the stream.
    """
    try:
        return _copy_stream(file, "mp4")
    except Exception as error:  # FFmpeg and its muxers raise many types
        try:
            return _copy_stream(file, "matroska")
        except Exception:
            raise error from None


def _copy_stream(file: bytes | Path, container: str) -> bytes:
    import av

    target = io.BytesIO()
    frames = 0
    with (
        av.open(str(file.resolve()) if isinstance(file, Path) else io.BytesIO(file)) as source,
        av.open(io.BytesIO(), "w", format="matroska") as scratch,
        av.open(target, "w", format=container, options={"fflags": "+bitexact"}) as output,
    ):
        stream = source.streams.video[0]
        template, packets = _strip_packets(source, stream, scratch)
        copy = output.add_stream_from_template(template)
        copy.metadata.clear()
        copy.codec_context.extradata = _strip_extradata(template)
        rate = stream.average_rate or 25
        default_duration = max(1, round(1 / (rate * stream.time_base))) if stream.time_base else 1
        for packet, data in packets:
            stripped = av.Packet(data)  # without side data
            stripped.stream, stripped.time_base, stripped.is_keyframe = copy, stream.time_base, packet.is_keyframe
            stripped.dts = packet.dts
            stripped.pts = packet.dts if packet.pts is None else packet.pts  # AVI has decoding times only
            stripped.duration = packet.duration or default_duration  # MP4 hides a last frame without duration
            output.mux(stripped)
            frames += 1
    data = target.getvalue()
    with av.open(io.BytesIO(data)) as written:
        shown = sum(packet.size > 0 and not packet.is_discard for packet in written.demux(video=0))
    if not frames or shown != frames:
        raise ValueError(f"the copied video would show {shown} of {frames} frames")
    return data


def _strip_packets(source: Any, stream: Any, scratch: Any) -> tuple[Any, Iterator[tuple[Any, bytes]]]:
    """Return a stream with the parameters of the copy, held by `scratch` if a filter changes them, and the packets."""
    from av.bitstream import BitStreamFilterContext

    codec = stream.codec_context.codec.canonical_name
    if codec not in FILTER_UNITS:
        stripped = ((packet, _strip_packet(bytes(packet), codec)) for packet in source.demux(stream))
        return stream, ((packet, data) for packet, data in stripped if data)
    template = scratch.add_stream_from_template(stream)
    filters = BitStreamFilterContext(f"{codec}_mp4toannexb,{FILTER_UNITS[codec]}", stream, template)
    filtered = (out for packet in source.demux(stream) for out in filters.filter(packet))
    return template, ((packet, bytes(packet)) for packet in filtered if packet.size)


def _strip_packet(data: bytes, codec: str) -> bytes:
    if codec in START_CODES_RETAINED:
        return _drop_user_data(data, codec)
    if codec == "mjpeg":
        return strip_jpeg_metadata(data) if data else data
    if codec in ("vp8", "vp9"):  # their bitstreams cannot hold text
        return data
    raise ValueError(f"{codec} video may hold text in places that are not checked")


def _strip_extradata(stream: Any) -> bytes | None:
    """Return the codec header of a stream without text, or None if the codec needs no header."""
    import av
    from av.bitstream import BitStreamFilterContext

    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata
    if extradata and codec in FILTER_UNITS:  # the filter drops units of packets only, so pass the header as a packet
        return b"".join(map(bytes, BitStreamFilterContext(FILTER_UNITS[codec], stream).filter(av.Packet(extradata))))
    return _drop_user_data(extradata, codec) if extradata and codec in START_CODES_RETAINED else None


def _drop_user_data(data: bytes, codec: str) -> bytes:
    units = data.split(b"\0\0\1")[1:]
    return b"".join(b"\0\0\1" + unit for unit in units if unit and unit[0] in START_CODES_RETAINED[codec])


def encode_lossless_video(frames: np.ndarray, fps: float) -> bytes:
    """Encode RGB frames as lossless H.264 in MP4, for streams that cannot be copied.

    Args:
        frames: `(D, H, W, 3)` uint8.
        fps: frames per second; 25 if out of (0, 1000).
    """
    import av

    target = io.BytesIO()
    with av.open(target, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
        rate = Fraction(fps if 0 < fps < 1000 else 25).limit_denominator(1000)
        stream = output.add_stream("libx264rgb", rate=rate, options={"qp": "0", "preset": "veryfast", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        output.mux(stream.encode())
    return strip_video_metadata(target.getvalue())  # x264 writes its settings into an SEI message


def blank_outside_regions(array: np.ndarray, *datasets: Any) -> np.ndarray:
    """Blank the pixels outside the ultrasound regions (DICOM PS3.3 C.8.5.5), where names and dates are burned in.

    Args:
        array: `(C, D, H, W)`.
        datasets: headers of the scan. If several declare regions, only pixels inside the regions of all are retained.

    Returns:
        A copy with the other pixels set to the smallest value of `array`, or `array` if no header declares a region.
    """
    retained: np.ndarray | None = None
    for regions in {regions for dataset in datasets if (regions := _valid_regions(dataset))}:
        inside = np.zeros(array.shape[2:], bool)
        for left, top, right, bottom in regions:
            inside[top : bottom + 1, left : right + 1] = True
        if inside.any():
            retained = inside if retained is None else retained & inside
    return array if retained is None else np.where(retained, array, array.min())


def _valid_regions(dataset: Any) -> tuple[tuple[int, int, int, int], ...]:
    """Return (left, top, right, bottom), inclusive, of each well-formed region."""
    regions = []
    for region in dataset.get("SequenceOfUltrasoundRegions") or []:
        edges = [region.get(f"RegionLocation{edge}") for edge in ("MinX0", "MinY0", "MaxX1", "MaxY1")]
        if all(isinstance(edge, int) for edge in edges):
            left, top, right, bottom = edges
            if 0 <= left <= right and 0 <= top <= bottom:
                regions.append((left, top, right, bottom))
    return tuple(regions)
