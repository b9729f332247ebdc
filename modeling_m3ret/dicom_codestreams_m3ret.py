"""Check the headers of compressed DICOM frames before they are decoded.

Covers JPEG (ITU-T T.81), JPEG-LS (T.87) and JPEG 2000 (T.800). Decoders allocate what a codestream requests, whatever
the DICOM header declares, and GDCM aborts the process or never returns for some invalid headers. This file is copied
into every checkpoint and imports only NumPy; pydicom is imported when a file needs it.
"""

from __future__ import annotations

import importlib
import math
import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from .scan_m3ret import ReadRequest


# last numbers of the transfer syntaxes 1.2.840.10008.1.2.4.*
JPEG, JPEG_LS, JPEG_2000 = ("50", "51", "57", "70"), ("80", "81"), ("90", "91", "92", "93", "201", "202", "203")
# second bytes of markers
DCT, LOSSLESS, LS = (0xC0, 0xC1, 0xC2), 0xC3, 0xF7
FRAMES = (LS, *(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC)))
WITHOUT_SEGMENT = range(0xD0, 0xD9)  # restart markers and start of image
END, SCAN, RESTART, JFIF, ADOBE, PRESETS = 0xD9, 0xDA, 0xDD, 0xE0, 0xEE, 0xF8
CODING, QUANTISATION, TILE_PART = 0x52, 0x5C, 0x90  # of JPEG 2000
LS_MARKER = re.compile(rb"\xff[\x80-\xff]")  # within the data of a scan, 0xff is followed by a smaller byte


class Codestream(NamedTuple):
    """Header of a compressed frame."""

    rows: int
    columns: int
    bits: int | None  # per sample; None for RLE, which has no header
    is_signed: bool | None  # None for JPEG and JPEG-LS, which have no sign
    is_converted: bool = False  # whether Pillow returns RGB, as an Adobe segment declares YCbCr


NO_HEADER = Codestream(0, 0, None, None)  # of RLE


def check_codestreams(dataset: Any, syntax: str, total: int, request: ReadRequest) -> list[Codestream]:
    """Return the headers of all codestreams of a dataset.

    Args:
        dataset: pydicom dataset with compressed `PixelData`.
        syntax: UID of its transfer syntax.
        total: number of frames that its header declares.
        request: names the file in errors.

    Raises:
        M3RetReadError: if their number or size differs from the DICOM header, or one is not valid or not supported.
    """
    offsets = None
    if "ExtendedOffsetTable" in dataset and "ExtendedOffsetTableLengths" in dataset:
        offsets = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
    encaps = importlib.import_module("pydicom.encaps")
    frames = encaps.generate_frames(dataset.PixelData, number_of_frames=total, extended_offsets=offsets)
    samples = int(dataset.get("SamplesPerPixel") or 1)
    codestreams = [_check_codestream(frame, syntax.rpartition(".")[2], samples, request) for frame in frames]
    for codestream in codestreams:
        if codestream.bits is not None:
            check_frame_size(codestream[:2], (int(dataset.Rows), int(dataset.Columns)), request)
    if len(codestreams) != total:
        raise request.error("damaged", f"{total} frames, as the header declares", f"{len(codestreams)} codestreams")
    return codestreams


def check_frame_size(size: tuple[int, ...], declared: tuple[int, int], request: ReadRequest) -> None:
    """Raise an `M3RetReadError` if the rows and columns of a frame differ from those that the header declares."""
    if size != declared:
        expected = f"frames of {declared[0]} x {declared[1]} pixels, as the DICOM header declares"
        raise request.error("damaged", expected, f"{size[0]} x {size[1]}")


def _check_codestream(frame: bytes, syntax: str, samples: int, request: ReadRequest) -> Codestream:
    try:
        if syntax in JPEG_2000:
            return _check_jpeg_2000(frame, samples, request)
        return _check_jpeg(frame, samples, syntax in JPEG_LS, request) if syntax in JPEG + JPEG_LS else NO_HEADER
    except (struct.error, IndexError) as error:
        raise request.error("damaged", "a complete codestream", "one that ends in its header") from error


def _require(condition: bool, request: ReadRequest, expected: str, damaged: bool = True) -> None:
    """Raise an `M3RetReadError` unless the condition holds; without `damaged`, the frame is unsupported instead."""
    if not condition:
        raise request.error(
            "damaged" if damaged else "unsupported", f"a compressed frame with {expected}", "one without"
        )


def _segments(frame: bytes, request: ReadRequest) -> Iterator[tuple[int, bytes, int]]:
    """Yield (marker, content, position) of all segments after the first marker, without the data of scans."""
    at = 2
    while True:
        while frame[at : at + 2] == b"\xff\xff":  # fill byte
            at += 1
        marker = frame[at + 1]
        length = 0 if marker == END else struct.unpack_from(">H", frame, at + 2)[0]
        content = frame[at + 4 : at + 2 + length]
        is_complete = marker == END or length == len(content) + 2
        _require(frame[at] == 0xFF and is_complete, request, "complete marker segments")
        yield marker, content, at
        at += 2 + length
        if marker == SCAN:
            end = LS_MARKER.search(frame, at)
            _require(end is not None, request, "an end")
            at = end.start() if end else at


# ---------------------------------------------------------------------------------------------------- JPEG and JPEG-LS


def _check_jpeg(frame: bytes, samples: int, is_ls: bool, request: ReadRequest) -> Codestream:
    """Check a JPEG image up to its first scan, or all segments of a JPEG-LS image."""
    family, kinds = ("JPEG-LS", (LS,)) if is_ls else ("JPEG", (*DCT, LOSSLESS))
    _require(frame[:2] == b"\xff\xd8", request, f"{family}, as the transfer syntax declares")
    kind = bits = rows = columns = largest = scanned = 0
    names = presets = b""
    is_jfif, transform = False, None
    for marker, content, _ in _segments(frame, request):
        _require(marker >= 0xC0 and marker not in WITHOUT_SEGMENT, request, "complete marker segments")
        if marker in FRAMES:
            _require(not kind, request, "one frame header")
            _require(marker in kinds, request, f"{family} without hierarchy and arithmetic coding", damaged=False)
            kind, (bits, rows, columns, _) = marker, struct.unpack_from(">BHHB", content)
            names, largest = _check_components(kind, content, samples, request), 2**bits - 1
        elif marker == JFIF and content[:5] == b"JFIF\0" and len(content) >= 14:  # libjpeg ignores shorter ones
            _require(content[5] == 1, request, "JFIF version 1")  # GDCM aborts where libjpeg only warns
            is_jfif = True
        elif marker == ADOBE and content[:5] == b"Adobe" and len(content) >= 12:
            _require(content[11] <= 1, request, "RGB or YCbCr as its Adobe transform")
            transform = content[11]
        elif marker == RESTART and is_ls:
            _require(not any(content), request, "JPEG-LS without restart intervals", damaged=False)
        elif marker == PRESETS and is_ls:
            _require(content[:1] == b"\1", request, "JPEG-LS without mapping tables and oversize images", damaged=False)
            presets = content  # may precede the frame header
        elif marker == SCAN:
            _require(bool(kind), request, "a frame header before each scan")
            largest = _check_presets(presets, largest, request) if presets else largest
            _check_scan(kind, content, names, largest, request)
            scanned += content[0]
        if (marker == SCAN and not is_ls) or marker == END:
            break
    _require(scanned == samples or (scanned > 0 and not is_ls), request, "all components of the image")
    return Codestream(rows, columns, bits, None, transform == 1 or (transform == 0 and is_jfif))


def _check_components(kind: int, content: bytes, samples: int, request: ReadRequest) -> bytes:
    """Check a frame header and return the identifiers of its components."""
    bits, names, sampling = content[0], content[6::3], content[7::3]
    _require(content[5] == samples, request, f"{samples} component(s), as the DICOM header declares")
    _require(len(content) == 6 + 3 * samples and len(set(names)) == samples, request, "a valid frame header")
    if kind in DCT:
        _require(bits in (8, 12), request, "samples of 8 or 12 bits", damaged=False)
        _require(all(1 <= side <= 4 for pair in sampling for side in divmod(pair, 16)), request, "valid subsampling")
    else:
        _require(2 <= bits <= 16, request, "samples of 2 to 16 bits", damaged=False)
        _require(samples == 1 or set(sampling) == {0x11}, request, "components of one size", damaged=False)
    return names


def _check_presets(content: bytes, largest: int, request: ReadRequest) -> int:
    """Check the preset coding parameters of JPEG-LS (T.87, C.2.4.1.1) and return the largest sample."""
    maximum, *thresholds, reset = struct.unpack(">5H", content[1:])
    maximum = maximum or largest
    is_valid = maximum <= largest and (reset == 0 or 3 <= reset <= max(255, maximum))
    given = [threshold for threshold in thresholds if threshold]
    _require(is_valid and given == sorted(given) and max(given, default=0) <= maximum, request, "valid presets")
    return maximum


def _check_scan(kind: int, content: bytes, names: bytes, largest: int, request: ReadRequest) -> None:
    """Check a scan header of JPEG or JPEG-LS. `names` are the component identifiers, `largest` the largest sample."""
    count, chosen, (first, second, bits) = content[0], content[1:-3:2], content[-3:]
    fits = len(content) == 4 + 2 * count and 1 <= count <= len(names) and set(chosen) <= set(names)
    _require(fits, request, "a valid scan header")
    if kind == LOSSLESS:
        _require(1 <= first <= 7 and (second, bits) == (0, 0), request, "lossless JPEG of all bits", damaged=False)
    elif kind == LS:
        is_valid = first <= min(255, largest // 2) and count in (1, len(names)) and (second > 0) == (count > 1)
        _require(is_valid and second <= 2 and bits == 0, request, "a valid scan of JPEG-LS")
        _require(not any(content[2:-3:2]), request, "JPEG-LS without mapping tables", damaged=False)


# ------------------------------------------------------------------------------------------------------------ JPEG 2000


def _check_jpeg_2000(frame: bytes, samples: int, request: ReadRequest) -> Codestream:
    """Check the main header and the lengths of the tile-parts of JPEG 2000."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)  # a JP2 file may wrap the codestream
    _require(start >= 0, request, "JPEG 2000, as the transfer syntax declares")
    at = 0
    while at < start:
        size, kind = struct.unpack_from(">I4s", frame, at)
        _require(size >= 8 or kind == b"jp2c", request, "complete boxes of JP2")  # pydicom never returns for size 0
        at += 8 if kind == b"jp2c" else size
    _require(at == start, request, "a codestream that begins where its JP2 box does")
    frame = frame[start:]
    right, bottom, left, top, width, height, tile_left, tile_top, count = struct.unpack_from(">8IH", frame, 8)
    _require(count == samples, request, f"{samples} component(s), as the DICOM header declares")
    kinds, across, down = (frame[42 + offset : 42 + 3 * count : 3] for offset in range(3))
    depth, (length,) = frame[42], struct.unpack_from(">H", frame, 4)
    _require(length == 38 + 3 * count, request, "a valid SIZ segment")
    is_uniform = len(set(kinds)) == 1 and set(across + down) == {1}
    _require(is_uniform, request, "components of one size, depth and sign", damaged=False)
    _require(depth & 0x7F < 32, request, "samples of 1 to 32 bits", damaged=False)
    is_covered = tile_left <= left < tile_left + width and tile_top <= top < tile_top + height
    _require(is_covered and left < right and top < bottom, request, "tiles that cover the image")
    tiles = math.ceil((right - tile_left) / width) * math.ceil((bottom - tile_top) / height)
    _require(tiles <= len(frame) // 14, request, f"headers of {tiles:,} tiles")
    found, at = set(), 0
    for marker, content, position in _segments(frame, request):
        found.add(marker)
        if marker == CODING:
            _, order, layers, transform, levels, *block, _, wavelet = struct.unpack_from(">BBHBBBBBB", content)
            is_valid = order <= 4 and layers and levels <= 32 and max(transform, wavelet) <= 1 and sum(block) <= 8
            _require(is_valid and (samples >= 3 or not transform), request, "a valid COD segment")
        if marker == TILE_PART:
            at = position
            break
    _require({CODING, QUANTISATION, TILE_PART} <= found, request, "a complete main header")
    complete: set[int] = set()
    while frame[at : at + 2] == b"\xff\x90":
        index, size = struct.unpack_from(">HI", frame, at + 4)
        size = size or len(frame) - at  # 0: up to the end
        _require(index < tiles and 14 <= size <= len(frame) - at, request, "complete tile-parts")
        complete.add(index)
        at += size
    _require(len(complete) == tiles, request, f"{tiles:,} tiles")
    return Codestream(bottom - top, right - left, (depth & 0x7F) + 1, bool(depth & 0x80))
