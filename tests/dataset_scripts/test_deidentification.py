"""Metadata planted anywhere in a file is not in its row, and the pixels are unchanged."""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import gzip
import io
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pydicom
import pytest
from file_parts import AFFINE, TEXT, add_palette, chunk, encode, exif, planted_dicom, planted_nifti, region, written
from PIL import Image, PngImagePlugin
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit
from scan_files import CINE, CT, PLANTED, series

from dataset_scripts.deidentification import (
    DICOM_ELEMENTS_USED,
    blank_outside_regions,
    encode_lossless_video,
    strip_jpeg_metadata,
    strip_video_metadata,
)
from dataset_scripts.row_encoding import EncodedScan, encode_scan
from modeling_m3ret.reading_m3ret import M3RetReadError, ReadLimits, read_scan


RNG = np.random.default_rng(29)
SMOOTH = np.stack([np.add.outer(np.arange(40), np.arange(56)) * k for k in (1, 2, 3)], axis=2).astype(np.uint8)
GREY = RNG.integers(0, 256, (31, 45), dtype=np.uint8)
VOLUME = RNG.integers(0, 2500, (14, 12, 10)).astype(np.int16)


def variants(text: str = PLANTED) -> list[bytes]:
    """Return encodings of a text: ASCII, UTF-16, and base64 at its three alignments."""
    plain = text.encode()
    starts = [base64.b64encode(b"\0" * pad + plain)[4 if pad else 0 : -4] for pad in range(3)]
    return [plain, text.encode("utf-16-le"), text.encode("utf-16-be"), *(start for start in starts if len(start) > 7)]


def inflated(data: bytes) -> Iterator[bytes]:
    """Yield the decompressed content of every zlib or gzip stream in the data."""
    for found in re.finditer(rb"\x1f\x8b|\x78[\x01\x5e\x9c\xda]", data):
        with contextlib.suppress(zlib.error):
            yield zlib.decompressobj(47).decompress(data[found.start() :], 2**22)


def holds(data: bytes, text: str = PLANTED) -> bool:
    return any(variant in content for content in (data, *inflated(data)) for variant in variants(text))


def all_bytes(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from all_bytes(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from all_bytes(item)
    elif isinstance(value, bytes):
        yield value
    else:
        yield str(value).encode()


def media(row: EncodedScan) -> bytes:
    return next(row.columns[key]["bytes"] for key in ("image", "video", "volume") if key in row.columns)


def assert_clean(source: Any, text: str = PLANTED) -> EncodedScan:
    """Encode a source that contains the text; check that the row does not and that the pixels are the same."""
    if isinstance(source, bytes):
        assert holds(source, text)
    row = encode_scan(source)
    assert not any(holds(data, text) for data in all_bytes(row.columns))
    assert text not in f"{row.digest} {row.burned_in}"
    expected, got = read_scan(source), read_scan(row.columns)
    tolerance = 1 / 65535 if row.columns["intensity"] == "full range" else 0
    np.testing.assert_allclose(got.array, expected.array, rtol=0, atol=tolerance)
    assert got.spacing == expected.spacing
    return row


# ----------------------------------------------------------------------------------------------------------------- JPEG


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


PLAIN_JPEG = encode(Image.fromarray(SMOOTH), "JPEG", quality=90)
PROGRESSIVE = encode(Image.fromarray(SMOOTH), "JPEG", quality=90, progressive=True)
SEGMENTS: dict[str, bytes] = {
    **{f"APP{n}": segment(0xE0 + n, TEXT) for n in range(16)},
    "COM": segment(0xFE, TEXT),
    "COM in UTF-16": segment(0xFE, PLANTED.encode("utf-16-le")),
    "JFXX thumbnail": segment(0xE0, b"JFXX\0\x10" + TEXT),
    "second JFIF with a thumbnail": segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\6\1" + TEXT),
    "EXIF": segment(0xE1, exif()),
    "XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>" + TEXT + b"</x:xmpmeta>"),
    "ICC": segment(0xE2, b"ICC_PROFILE\0\1\1" + TEXT),
    "Photoshop": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\0\0\0\x12" + TEXT),
    "APP1 in base64": segment(0xE1, base64.b64encode(TEXT)),
    "Adobe with more": segment(0xEE, b"Adobe\0\x64\0\0\0\0\1" + TEXT),
    "fill before a marker": b"\xff\xff" + segment(0xFE, TEXT),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_jpeg_metadata_is_removed_wherever_it_is(name: str) -> None:
    for before in (b"\xff\xdb", b"\xff\xc4", b"\xff\xda"):  # quantisation tables, Huffman tables, scan
        position = PLAIN_JPEG.index(before)
        row = assert_clean(PLAIN_JPEG[:position] + SEGMENTS[name] + PLAIN_JPEG[position:])
        if name not in ("Adobe with more", "second JFIF with a thumbnail"):  # their type is retained
            assert media(row) == strip_jpeg_metadata(PLAIN_JPEG)


def test_jpeg_metadata_between_scans_and_after_the_end_is_removed() -> None:
    position = PROGRESSIVE.index(b"\xff\xda", PROGRESSIVE.index(b"\xff\xda") + 2)
    between = PROGRESSIVE[:position] + SEGMENTS["COM"] + PROGRESSIVE[position:]
    assert media(assert_clean(between)) == strip_jpeg_metadata(PROGRESSIVE)
    for tail in (TEXT, encode(Image.new("L", (8, 8)), "JPEG", comment=TEXT)):
        assert media(assert_clean(PLAIN_JPEG + tail)) == strip_jpeg_metadata(PLAIN_JPEG)


@pytest.mark.parametrize("orientation", [None, 6])
def test_jpeg_of_cameras_and_editors_is_clean(orientation: int | None) -> None:
    options = {"exif": exif(orientation), "icc_profile": TEXT, "comment": TEXT, "xmp": TEXT, "dpi": (300, 300)}
    for mode in ("L", "RGB", "CMYK"):
        assert_clean(encode(Image.fromarray(SMOOTH).convert(mode), "JPEG", **options))
    second = Image.fromarray(SMOOTH[::-1].copy())
    assert_clean(encode(Image.fromarray(SMOOTH), "MPO", save_all=True, append_images=[second], **options))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_stripped_jpeg_retains_tables_and_compressed_pixels(mode: str) -> None:
    image = Image.fromarray(SMOOTH).convert(mode)
    plain, planted = encode(image, "JPEG"), encode(image, "JPEG", comment=TEXT, exif=exif(), icc_profile=TEXT)
    stripped = strip_jpeg_metadata(planted)
    assert stripped == strip_jpeg_metadata(plain) == strip_jpeg_metadata(stripped)
    assert stripped[stripped.index(b"\xff\xda") :] == plain[plain.index(b"\xff\xda") :]  # the scan
    for marker in (b"\xff\xdb", b"\xff\xc0", b"\xff\xc4"):
        position = plain.index(marker)
        (length,) = struct.unpack_from(">H", plain, position + 2)
        assert plain[position : position + 2 + length] in stripped
    with Image.open(io.BytesIO(stripped)) as after, Image.open(io.BytesIO(plain)) as before:
        assert after.mode == mode
        np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
        assert not {"exif", "icc_profile", "comment", "xmp"} & set(after.info)


# ------------------------------------------------------------------------------------------------------------------ PNG


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    position, found = 8, []
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        found.append((kind, data[position + 8 : position + 8 + length]))
        position += 12 + length
    return found


PLAIN_PNG = encode(Image.fromarray(GREY), "PNG")
PACKED = zlib.compress(TEXT)
CHUNKS: dict[str, bytes] = {
    "tEXt": chunk(b"tEXt", b"Author\0" + TEXT),
    "tEXt of another keyword": chunk(b"tEXt", TEXT + b"\0Bob"),
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + PACKED),
    "iTXt": chunk(b"iTXt", b"Title\0\0\0en\0\0" + TEXT),
    "iTXt compressed": chunk(b"iTXt", b"Title\0\1\0en\0\0" + PACKED),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x>" + TEXT + b"</x>"),
    "eXIf": chunk(b"eXIf", exif()[6:]),
    "iCCP": chunk(b"iCCP", b"profile\0\0" + PACKED),
    "sPLT": chunk(b"sPLT", TEXT + b"\0\x08"),
    "tIME": chunk(b"tIME", struct.pack(">HBBBBB", 1970, 1, 1, 0, 0, 0) + TEXT),
    "private": chunk(b"prVt", TEXT),
    "private, critical by its name": chunk(b"pRVt", TEXT),
    "private in base64": chunk(b"prVt", base64.b64encode(TEXT)),
    "hIST": chunk(b"hIST", TEXT),
}


PIXEL_CHUNKS = {b"IHDR", b"IDAT", b"IEND"}


@pytest.mark.parametrize("name", CHUNKS)
def test_only_pixels_of_a_png_are_stored(name: str) -> None:
    for before in (b"IDAT", b"IEND"):
        position = PLAIN_PNG.index(before) - 4
        row = assert_clean(PLAIN_PNG[:position] + CHUNKS[name] + PLAIN_PNG[position:])
        assert {kind for kind, _ in chunks(media(row))} == PIXEL_CHUNKS


def png_with_longer_chunk(kind: bytes) -> bytes:
    position = PLAIN_PNG.index(kind) - 4
    (length,) = struct.unpack_from(">I", PLAIN_PNG, position)
    longer = chunk(kind, PLAIN_PNG[position + 8 : position + 8 + length] + TEXT)
    return PLAIN_PNG[:position] + longer + PLAIN_PNG[position + 12 + length :]


def test_data_after_the_parts_of_a_png_is_removed() -> None:
    for tail in (TEXT, CHUNKS["tEXt"], PACKED, PLAIN_JPEG + TEXT):
        assert media(assert_clean(PLAIN_PNG + tail)) == media(encode_scan(PLAIN_PNG))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(8 * 9) + TEXT))  # more than eight rows
    assert_clean(PLAIN_PNG[:8] + header + rows + chunk(b"IEND", b""))
    for kind in (b"IHDR", b"IEND"):
        assert_clean(png_with_longer_chunk(kind))


def test_png_of_every_mode_and_animation_is_clean() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Name", PLANTED)
    text.add_text("Packed", PLANTED, zip=True)
    text.add_itxt("Itxt", PLANTED, zip=True)
    options: dict[str, Any] = {"pnginfo": text, "exif": exif(), "icc_profile": TEXT, "dpi": (72, 72)}
    base = Image.fromarray(SMOOTH)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = base.convert("L").convert("I").convert(mode) if mode == "I;16" else base.convert(mode)
        row = assert_clean(encode(image, "PNG", **options))
        assert {kind for kind, _ in chunks(media(row))} == PIXEL_CHUNKS
    options["exif"] = exif(6)
    assert_clean(encode(base, "PNG", **options))
    frames = [Image.fromarray(np.roll(SMOOTH, k, axis=1)) for k in range(4)]
    assert_clean(encode(frames[0], "PNG", save_all=True, append_images=frames[1:], **options))


# ----------------------------------------------------------------------------------------------------- damaged pictures

PICTURES = {"jpeg": PLAIN_JPEG, "progressive jpeg": PROGRESSIVE, "png": PLAIN_PNG}


@pytest.mark.parametrize("name", PICTURES)
def test_truncated_and_foreign_pictures_are_refused(name: str) -> None:
    data = PICTURES[name]
    if name != "png":
        for length in (0, 1, 2, 3, 8, 20, 60, len(data) // 2, len(data) - 20, len(data) - 1):
            with pytest.raises(ValueError):  # noqa: PT011
                strip_jpeg_metadata(data[:length])
        for foreign in (b"\0\0" + data[2:], b"GIF89a" + data, b"\0" * 100, TEXT * 9):
            with pytest.raises(ValueError):  # noqa: PT011
                strip_jpeg_metadata(foreign)
    for length in (20, 60, len(data) // 2, len(data) - 60):
        with pytest.raises(M3RetReadError):
            encode_scan(data[:length])


@pytest.mark.parametrize("name", PICTURES)
def test_damaged_pictures_are_refused_or_encoded_as_they_are_read(name: str) -> None:
    data, random = PICTURES[name], np.random.default_rng(5)
    limits = ReadLimits(max_pixels_per_image=100_000)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data[: random.integers(len(data))] if random.random() < 0.3 else data)
        for _ in range(random.integers(1, 4)):
            if damaged:
                damaged[random.integers(len(damaged))] = random.integers(256)
        with contextlib.suppress(ValueError):
            strip_jpeg_metadata(bytes(damaged))
        try:
            row = encode_scan(bytes(damaged), limits=limits)
        except M3RetReadError:
            refused += 1
            with pytest.raises(M3RetReadError):
                read_scan(bytes(damaged), limits=limits)
        else:
            np.testing.assert_array_equal(read_scan(row.columns).array, read_scan(bytes(damaged), limits=limits).array)
    assert refused > 30


# ---------------------------------------------------------------------------------------------------------------- video


@functools.cache
def clip(kind: str, codec: str, metadata: bool = False, frames: int = 12, **options: str) -> bytes:
    """Encode a clip; with metadata, in every field that the container offers."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as container:
        video = container.add_stream(codec, rate=10, options={"threads": "1", **options})
        video.height, video.width = 48, 64
        video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if metadata:
            for key in ("title", "comment", "artist", "copyright", "description", "creation_time", PLANTED):
                container.metadata[key] = "1970-01-01T00:00:00Z" if key == "creation_time" else PLANTED
            video.metadata.update({"title": PLANTED, "handler_name": PLANTED, "language": "eng"})
        if metadata and kind in ("mp4", "matroska", "avi", "mpegts"):
            sound = container.add_stream("aac" if kind == "mp4" else "libmp3lame", rate=44100)
            sound.metadata.update({"title": PLANTED, "handler_name": PLANTED})
        if metadata and kind in ("mp4", "matroska"):
            edge = {"id": 1, "start": 0, "end": 500, "time_base": Fraction(1, 1000), "metadata": {"title": PLANTED}}
            container.set_chapters([edge])
        if metadata and kind == "matroska":
            container.add_attachment(PLANTED + ".txt", "text/plain", TEXT)
        for index in range(frames):
            picture = np.roll(SMOOTH[:48, :, :].repeat(2, 1)[:, :64], 3 * index, axis=1)
            picture = np.pad(picture, ((0, 48 - picture.shape[0]), (0, 0), (0, 0)))
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(video.encode())
        if metadata and kind in ("mp4", "matroska", "avi", "mpegts"):
            tone = av.AudioFrame(format="fltp", layout="stereo", samples=1152)
            tone.sample_rate, tone.pts = 44100, 0
            for plane in tone.planes:
                plane.update(bytes(plane.buffer_size))
            container.mux(sound.encode(tone))
            container.mux(sound.encode())
    return stream.getvalue()


def remuxed(data: bytes, kind: str, change: Callable[[bytes], bytes], header: bytes | None = None) -> bytes:
    """Copy the stream into a new container, with changed packets and, if given, another codec header."""
    stream = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(stream, "w", format=kind) as target:
        video = source.streams.video[0]
        copy = target.add_stream_from_template(video)
        if header is not None:
            copy.codec_context.extradata = header
        for packet in source.demux(video):
            if packet.size:
                other = av.Packet(change(bytes(packet)))
                other.pts, other.dts, other.duration = packet.pts, packet.dts, packet.duration
                other.is_keyframe, other.time_base, other.stream = packet.is_keyframe, packet.time_base, copy
                target.mux(other)
    return stream.getvalue()


def header_of(data: bytes) -> bytes:
    with av.open(io.BytesIO(data)) as container:
        return container.streams.video[0].codec_context.extradata or b""


MESSAGE = b"\x05" + bytes([16 + len(TEXT)]) + b"\x01" * 16 + TEXT + b"\x80"  # user data, unregistered


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        *(("mp4", "libx264"), ("mp4", "mpeg4"), ("mov", "mjpeg"), ("matroska", "libx264"), ("matroska", "libvpx-vp9")),
        *(("webm", "libvpx"), ("avi", "mpeg4"), ("avi", "mjpeg"), ("mpegts", "mpeg2video"), ("asf", "wmv2")),
        ("flv", "flv1"),
    ],
)
def test_metadata_of_containers_is_removed(kind: str, codec: str) -> None:
    source = clip(kind, codec, metadata=True)
    data = media(assert_clean(source))
    for trace in (b"x264 - core", b"Lavc", b"1970"):
        assert trace not in data
    with av.open(io.BytesIO(data)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        assert not container.chapters()
        assert not {"title", "comment", "artist", "creation_time"} & {
            *container.metadata,
            *container.streams[0].metadata,
        }


def test_data_outside_the_streams_of_a_container_is_removed() -> None:
    for name in (b"free", b"skip", b"uuid", b"udta", b"meta"):
        assert_clean(clip("mp4", "libx264") + struct.pack(">I", 8 + len(TEXT)) + name + TEXT)
    assert_clean(clip("matroska", "libx264") + TEXT)
    assert_clean(clip("avi", "mpeg4") + b"JUNK" + struct.pack("<I", len(TEXT)) + TEXT)


@pytest.mark.parametrize(
    ("codec", "trace"),
    [("libx264", b"x264 - core"), ("libx265", b"x265 (build"), ("mpeg4", b"Lavc"), ("mjpeg", b"Lavc")],
)
def test_settings_of_the_encoder_are_removed(codec: str, trace: bytes) -> None:
    options = {"x265-params": "log-level=0:pools=1"} if codec == "libx265" else {}
    kinds = ("mov", "matroska") if codec == "libx265" else ("mov", "matroska", "avi")
    sources = [clip(kind, codec, **options) for kind in kinds]
    assert any(trace in source for source in sources)
    for source in sources:
        assert trace not in media(encode_scan(source))


def test_sei_messages_and_unspecified_units_of_h264_are_removed() -> None:
    unit = b"\x06" + MESSAGE
    clear = clip("mp4", "libx264")
    assert_clean(remuxed(clear, "mp4", lambda packet: struct.pack(">I", len(unit)) + unit + packet))
    raw = clip("mpegts", "libx264", bf="0")
    assert_clean(remuxed(raw, "mpegts", lambda packet: b"\0\0\0\1" + unit + packet, header=b""))
    private = bytes([24]) + TEXT  # of an unspecified type
    assert_clean(remuxed(clear, "mp4", lambda packet: packet + struct.pack(">I", len(private)) + private))


def test_sei_messages_of_hevc_are_removed() -> None:
    source = clip("mp4", "libx265", **{"x265-params": "log-level=0:pools=1"})
    unit = b"\x4e\x01" + MESSAGE
    assert_clean(remuxed(source, "mp4", lambda packet: struct.pack(">I", len(unit)) + unit + packet))
    header = header_of(source)
    more = header[:22] + bytes([header[22] + 1]) + header[23:] + b"\x27" + struct.pack(">HH", 1, len(unit)) + unit
    assert_clean(remuxed(source, "mp4", bytes, header=more))


@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video"])
def test_user_data_of_mpeg_is_removed(codec: str) -> None:
    note = b"\0\0\1\xb2" + TEXT
    source = clip("avi", codec)
    start = b"\0\0\1\xb6" if codec == "mpeg4" else b"\0\0\1\x01"
    assert_clean(remuxed(source, "avi", lambda packet: packet.replace(start, note + start, 1)))
    boxed = clip("mp4", codec)
    assert_clean(remuxed(boxed, "mp4", bytes, header=header_of(boxed) + note))


def test_comments_of_motion_jpeg_are_removed() -> None:
    source = clip("avi", "mjpeg")
    assert_clean(
        remuxed(source, "avi", lambda packet: packet[:2] + SEGMENTS["COM"] + SEGMENTS["EXIF"] + packet[2:] + TEXT)
    )


def test_codec_headers_of_vp8_and_vp9_are_removed() -> None:
    for codec in ("libvpx", "libvpx-vp9"):
        assert_clean(remuxed(clip("matroska", codec), "matroska", bytes, header=TEXT))


def test_copied_stream_shows_a_last_frame_without_duration() -> None:
    source = remuxed(clip("matroska", "libvpx-vp9"), "matroska", bytes)
    with av.open(io.BytesIO(strip_video_metadata(source))) as container:
        assert sum(1 for _ in container.decode(video=0)) == 12


def test_unchecked_codec_is_not_copied() -> None:
    with pytest.raises(ValueError, match="wmv2") as caught:
        strip_video_metadata(clip("asf", "wmv2"))
    assert not isinstance(caught.value, av.FFmpegError)


def test_lossless_video_has_the_same_frames_and_no_settings_of_the_encoder() -> None:
    frames = RNG.integers(0, 256, (7, 33, 47, 3), dtype=np.uint8)
    data = encode_lossless_video(frames, 12.5)
    np.testing.assert_array_equal(read_scan(data).array.transpose(1, 2, 3, 0), frames)
    assert b"x264" not in data


# ---------------------------------------------------------------------------------------- NIfTI, arrays, other pictures


def named_gzip(data: bytes) -> bytes:
    stream = io.BytesIO()
    with gzip.GzipFile(PLANTED + ".nii", "wb", fileobj=stream) as file:
        file.write(data)
    return stream.getvalue()


def planted_npz() -> bytes:
    stream = io.BytesIO()
    member = io.BytesIO()
    np.save(member, VOLUME)
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = TEXT
        info = zipfile.ZipInfo(PLANTED + ".npy")
        info.comment = TEXT
        archive.writestr(info, member.getvalue())
    return stream.getvalue()


def planted_tiff() -> bytes:
    tags = {270: PLANTED, 305: PLANTED, 315: PLANTED, 306: PLANTED, 33432: PLANTED, 65000: PLANTED}
    pages = [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())]
    return encode(pages[0], "TIFF", save_all=True, append_images=pages[1:], tiffinfo=tags, exif=None) + TEXT


OTHERS: dict[str, Callable[[], bytes]] = {
    "nifti": lambda: planted_nifti(VOLUME),
    "nifti gzipped": lambda: named_gzip(planted_nifti(VOLUME)),
    "npz": planted_npz,
    "npy": lambda: (lambda s: (np.save(s, VOLUME), s.getvalue() + TEXT)[1])(io.BytesIO()),
    "tiff": planted_tiff,
    "gif": lambda: encode(
        Image.fromarray(GREY), "GIF", comment=TEXT, save_all=True, append_images=[Image.fromarray(255 - GREY)]
    ),
    "gif of one frame": lambda: encode(Image.fromarray(GREY), "GIF", comment=TEXT) + TEXT,
    "webp": lambda: encode(Image.fromarray(SMOOTH), "WEBP", exif=exif(), xmp=TEXT, icc_profile=TEXT),
    "bmp": lambda: encode(Image.fromarray(SMOOTH), "BMP") + TEXT,
}


@pytest.mark.parametrize("name", OTHERS)
def test_metadata_of_other_formats_is_removed(name: str) -> None:
    assert_clean(OTHERS[name]())


def test_file_names_and_other_columns_of_rows_are_removed(tmp_path: Path) -> None:
    path = tmp_path / f"{PLANTED}.png"
    path.write_bytes(PLAIN_PNG)
    for source in (path, {"image": {"bytes": PLAIN_PNG, "path": PLANTED}, "id": PLANTED, "patient": PLANTED}):
        assert not any(holds(data) for data in all_bytes(encode_scan(source).columns))


# ---------------------------------------------------------------------------------------------------------------- DICOM


def jpeg_dicom() -> Dataset:
    ds = planted_dicom(np.asarray(Image.open(io.BytesIO(PLAIN_JPEG)).convert("L")))
    frame = encode(Image.fromarray(SMOOTH).convert("L"), "JPEG", comment=TEXT, exif=exif())
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    return ds


TABLE = Dataset()
TABLE.LUTDescriptor, TABLE.LUTExplanation = [256, 0, 12], PLANTED
TABLE.add_new(0x00283006, "OW", (np.arange(256) ** 2 // 16).astype("<u2").tobytes())  # LUTData
TABLE_16 = copy.deepcopy(TABLE)
TABLE_16.LUTDescriptor = [256, 0, 16]
REGION = region(2, 3, 30, 20)
REGION.RegionDataType = 1
HOUNSFIELD: dict[str, Any] = {"sop": CT, "RescaleSlope": 1, "RescaleIntercept": -1024, "RescaleType": "HU"}
PLANE = RNG.integers(0, 4096, (31, 45), dtype=np.uint16)
DICOMS: dict[str, Callable[[], Dataset]] = {
    "plain": lambda: planted_dicom(GREY, BurnedInAnnotation="YES"),
    "rgb": lambda: planted_dicom(SMOOTH, PlanarConfiguration=0, PixelSpacing=[0.2, 0.2]),
    "12-bit": lambda: planted_dicom(PLANE, BitsStored=12, HighBit=11, ImagerPixelSpacing=[0.1, 0.1]),
    "windowed": lambda: planted_dicom(PLANE, WindowCenter=[900, 40], WindowWidth=[800, 80], VOILUTFunction="SIGMOID"),
    "table": lambda: planted_dicom(PLANE // 20, VOILUTSequence=[TABLE]),
    "modality table": lambda: planted_dicom(PLANE // 20, ModalityLUTSequence=[TABLE_16]),
    "hounsfield": lambda: planted_dicom(PLANE, **HOUNSFIELD),
    "padded": lambda: planted_dicom(PLANE, PixelPaddingValue=7, PixelPaddingRangeLimit=90),
    "cine": lambda: planted_dicom(
        np.stack([GREY, GREY[::-1]]), sop=CINE, SequenceOfUltrasoundRegions=[REGION], CineRate=30
    ),
    "jpeg": jpeg_dicom,
    "palette": lambda: add_palette(planted_dicom(GREY), segmented=False),
    "segmented palette": lambda: add_palette(planted_dicom(GREY), segmented=True),
    "slice": lambda: planted_dicom(
        PLANE, ImagePositionPatient=[1, 2, 3], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[1, 2]
    ),
}


def reduced(ds: Dataset) -> Dataset:
    """Return the dataset with only those elements that are declared as used, at any depth."""
    used = Dataset()
    for element in ds:
        if element.keyword in DICOM_ELEMENTS_USED:
            if element.VR == "SQ":
                setattr(used, element.keyword, [reduced(item) for item in element.value])
            else:
                used.add(element)
    return used


def keep_used_elements(data: bytes) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of texts that are not dates
        ds = pydicom.dcmread(io.BytesIO(data), force=True)
        small = reduced(ds)
        small.file_meta = pydicom.dataset.FileMetaDataset()
        small.file_meta.TransferSyntaxUID = ds.file_meta.TransferSyntaxUID
        small.save_as(stream, enforce_file_format=False)
    return stream.getvalue()


@pytest.mark.parametrize("name", DICOMS)
@pytest.mark.parametrize("blank_outside", [False, True])
def test_only_declared_elements_of_a_dicom_file_influence_its_row(name: str, blank_outside: bool) -> None:
    data = written(DICOMS[name]())
    assert_clean(data)
    small = keep_used_elements(data)
    full, reduced_row = (encode_scan(source, blank_outside=blank_outside) for source in (data, small))
    assert full.columns == reduced_row.columns
    assert (full.digest, full.burned_in) == (reduced_row.digest, reduced_row.burned_in)
    np.testing.assert_array_equal(full.picture, reduced_row.picture)


def test_only_declared_elements_of_a_series_influence_its_row() -> None:
    slices = [planted_dicom(np.ascontiguousarray(ds.pixel_array)) for ds in series(VOLUME, AFFINE)]
    for ds, placed in zip(slices, series(VOLUME, AFFINE), strict=True):
        for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "InstanceNumber"):
            setattr(ds, key, placed[key].value)
    files = [written(ds) for ds in slices]
    row = encode_scan(files)
    assert not any(holds(data) for data in all_bytes(row.columns))
    assert (
        row.columns
        == encode_scan([keep_used_elements(data) for data in files]).columns
        == encode_scan(series(VOLUME, AFFINE)).columns
    )


PACKAGED = ["CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"]
PACKAGED += ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_rle.dcm", "SC_rgb_jpeg_gdcm.dcm"]
PACKAGED += ["SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_gdcm_KY.dcm", "examples_palette.dcm", "examples_ybr_color.dcm"]
PACKAGED += ["693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm", "image_dfl.dcm", "JPGExtended.dcm", "rtdose.dcm"]
PACKAGED += ["liver_1frame.dcm", "examples_overlay.dcm", "SC_ybr_full_422_uncompressed.dcm"]


@pytest.mark.parametrize("name", PACKAGED)
def test_only_declared_elements_of_vendor_files_influence_their_rows(name: str) -> None:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str), "not included in this version of pydicom"
    data = Path(path).read_bytes()
    try:
        full = encode_scan(data)
    except M3RetReadError:
        with pytest.raises(M3RetReadError):
            encode_scan(keep_used_elements(data))
        return
    reduced_row = encode_scan(keep_used_elements(data))
    assert full.columns == reduced_row.columns
    assert (full.digest, full.burned_in) == (reduced_row.digest, reduced_row.burned_in)


# --------------------------------------------------------------------------------------------------- outside of regions


def with_regions(*edges: tuple[Any, Any, Any, Any]) -> Dataset:
    ds = Dataset()
    ds.SequenceOfUltrasoundRegions = [region(*one) for one in edges]
    return ds


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_outside_of_regions_become_the_smallest_value(channels: int) -> None:
    array = RNG.integers(3, 200, (channels, 4, 20, 30), dtype=np.uint8)
    before = array.copy()
    blanked = blank_outside_regions(array, with_regions((2, 1, 9, 5), (20, 10, 29, 19)))
    expected = np.full_like(array, array.min())
    expected[:, :, 1:6, 2:10] = array[:, :, 1:6, 2:10]
    expected[:, :, 10:20, 20:30] = array[:, :, 10:20, 20:30]
    np.testing.assert_array_equal(blanked, expected)
    assert blanked.dtype == array.dtype
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize(
    ("edges", "clipped"),
    [
        ((0, 0, 4_000_000, 4_000_000), (0, 0, 30, 20)),  # larger than the picture
        ((25, 15, 100, 100), (25, 15, 30, 20)),
        ((5, 5, 5, 5), (5, 5, 6, 6)),  # one pixel, as both ends are inclusive
    ],
)
def test_regions_are_clipped_to_the_picture(
    edges: tuple[int, int, int, int], clipped: tuple[int, int, int, int]
) -> None:
    array = RNG.integers(3, 200, (1, 1, 20, 30), dtype=np.uint8)
    expected = np.full_like(array, array.min())
    left, top, right, bottom = clipped
    expected[..., top:bottom, left:right] = array[..., top:bottom, left:right]
    np.testing.assert_array_equal(blank_outside_regions(array, with_regions(edges)), expected)


@pytest.mark.parametrize(
    "edges", [(9, 5, 2, 1), (2, 9, 5, 1), (None, 0, 5, 5), (100, 100, 120, 120), ([1, 2], 0, 5, 5)]
)
def test_malformed_regions_are_ignored(edges: tuple[Any, Any, Any, Any]) -> None:
    array = RNG.integers(3, 200, (1, 2, 20, 30), dtype=np.uint8)
    np.testing.assert_array_equal(blank_outside_regions(array, with_regions(edges)), array)
    valid = (2, 1, 9, 5)
    both, one = (blank_outside_regions(array, with_regions(*several)) for several in ((edges, valid), (valid,)))
    np.testing.assert_array_equal(both, one)


def test_only_the_intersection_of_several_headers_is_retained() -> None:
    array = RNG.integers(3, 200, (1, 2, 20, 30), dtype=np.uint8)
    left, right, elsewhere = ((0, 0, 14, 19), (10, 0, 29, 19), (20, 0, 29, 19))
    expected = np.full_like(array, array.min())
    expected[..., 10:15] = array[..., 10:15]
    headers = [with_regions(left), Dataset(), with_regions(right), with_regions((100, 100, 120, 120))]
    np.testing.assert_array_equal(blank_outside_regions(array, *headers), expected)
    assert np.unique(blank_outside_regions(array, with_regions(left), with_regions(elsewhere))).size == 1


def test_a_header_without_regions_blanks_nothing() -> None:
    array = RNG.integers(3, 200, (1, 2, 20, 30), dtype=np.uint8)
    for datasets in ((), (Dataset(),), (with_regions(),)):
        assert blank_outside_regions(array, *datasets) is array
