"""Videos are read as ffmpeg shows them. Expected values are written frames, FFmpeg's filters, or a closed form."""

from __future__ import annotations

import io
import math
import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from av.filter import Graph

from modeling_m3ret import M3RetImageProcessor, reading_video_m3ret
from modeling_m3ret.reading_m3ret import M3RetReadError, ReadLimits, read_scan
from modeling_m3ret.reading_video_m3ret import decode_video
from modeling_m3ret.scan_m3ret import ReadRequest


ONE = 1 << 16
NONE3 = (None, None, None)
QUIET_265 = {"x265-params": "log-level=0:pools=1"}


def pictures(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return colour gradients with a square whose grey level is 20 + 8 n, above the noise of every codec."""
    y, x = np.mgrid[:height, :width]
    ramps = np.stack([255 * x / width, 255 * y / height, 255 - 127 * (x / width + y / height)], axis=2).astype(np.uint8)
    clip = np.repeat(ramps[None], frames, axis=0)
    clip[:, :16, :16] = (20 + 8 * np.arange(frames))[:, None, None, None]
    return clip


def add_track(out: Any, codec: str, pixels: str = "yuv420p", size: tuple[int, int] = (48, 64), **options: Any) -> Any:
    context = {key: options.pop(key) for key in ("colorspace", "color_range", "sample_aspect_ratio") if key in options}
    track = out.add_stream(codec, rate=options.pop("rate", 25), options={"threads": "1", **options})
    (track.height, track.width), track.pix_fmt = size, pixels
    for key, value in context.items():
        setattr(track.codec_context, key, value)
    return track


def fill(out: Any, track: Any, frames: int = 16, times: list[int] | None = None) -> None:
    for index, picture in enumerate(pictures(frames, track.height, track.width)):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = index if times is None else times[index]
        frame.time_base = Fraction(1, 25 if times is None else 1000)
        out.mux(track.encode(frame))
    out.mux(track.encode(None))


def clip(kind: str = "mp4", codec: str = "libx264", *, frames: int = 16, times: Any = None, **options: Any) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind, options={"movflags": "write_colr"} if kind == "mp4" else {}) as out:
        fill(out, add_track(out, codec, **options), frames, times)
    return stream.getvalue()


def decoded(data: bytes, index: int = 0) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(container.streams.video[index]))


def shown_by_ffmpeg(frames: list[av.VideoFrame], *filters: tuple[str, str | None]) -> np.ndarray:
    """Return the output of `ffmpeg -vf FILTERS -fps_mode passthrough -pix_fmt rgb24`: its scaler is bicubic."""
    first, graph = frames[0], Graph()
    size = f"video_size={first.width}x{first.height}:pix_fmt={first.format.name}:time_base=1/25"
    nodes = [graph.add("buffer", f"{size}:colorspace={int(first.colorspace)}:range={int(first.color_range)}")]
    nodes += [graph.add(*node) for node in filters]
    nodes += [graph.add("scale", "flags=bicubic"), graph.add("format", "rgb24"), graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    shown = []
    for frame in frames:
        graph.vpush(frame)
        shown.append(graph.vpull().to_ndarray())
    return np.stack(shown)


def assert_read_as(data: bytes, expected: np.ndarray, **description: Any) -> None:
    """Assert that whole and sampled readings are the expected frames `(D, H, W, 3)`."""
    whole = read_scan(data)
    array = np.broadcast_to(whole.array, (3, *whole.array.shape[1:])).transpose(1, 2, 3, 0)
    np.testing.assert_array_equal(array, expected)
    for count in (1, 3, 5):
        few = read_scan(data, num_frames=count)
        centres = [(2 * i + 1) * len(expected) // (2 * count) for i in range(count)]
        np.testing.assert_array_equal(few.array, whole.array[:, centres])
        assert few.description["frames_dropped"] == len(expected) - count
    assert description.items() <= whole.description.items()


@pytest.fixture(autouse=True)
def short_clips_are_read_like_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """decord seeks wherever it can, which else only videos of thousands of frames need."""
    monkeypatch.setattr(reading_video_m3ret, "KEY_FRAMES_PER_SEEK", 0)


# -------------------------------------------------------------------------------------------- frames and their indices


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "mpeg4"), ("mp4", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx")]
)
def test_video_frames_are_evenly_spaced(kind: str, codec: str) -> None:
    data = clip(kind, codec, frames=20)
    whole, few = read_scan(data), read_scan(data, num_frames=4)
    assert whole.array.shape == (3, 20, 48, 64)
    assert few.array.shape == (3, 4, 48, 64)
    levels = few.array[:, :, 2:14, 2:14].mean((0, 2, 3))
    np.testing.assert_allclose(levels, [36, 76, 116, 156], atol=4)  # frames 2, 7, 12, 17: centres of four segments
    assert few.description["frames_dropped"] == 16
    assert few.description["fps"] == pytest.approx(25, rel=0.01)
    assert few.spacing == NONE3
    assert few.array[0, 0, 4, 60] > few.array[2, 0, 4, 60] + 50  # RGB, not BGR
    assert read_scan(data, num_frames=50).array.shape[1] == 20


def test_video_reads_without_decord(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(frames=80)  # more than PyAV decodes in one thread
    with_decord = read_scan(data, num_frames=5)
    monkeypatch.setitem(sys.modules, "decord", None)
    without = read_scan(data, num_frames=5)
    assert without.description == with_decord.description
    np.testing.assert_array_equal(without.array, with_decord.array)


def test_few_frames_of_a_long_video_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key frame every 4 frames, one of 80 is sought and 32 of 80 are decoded."""
    monkeypatch.undo()
    data = clip(frames=80, g="4")
    whole = read_scan(data).array
    for count in (1, 32):
        centres = [(2 * i + 1) * 80 // (2 * count) for i in range(count)]
        np.testing.assert_array_equal(read_scan(data, num_frames=count).array, whole[:, centres])


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "libx264"), ("matroska", "ffv1"), ("webm", "libvpx"), ("avi", "mjpeg")]
)
def test_video_of_one_frame(kind: str, codec: str) -> None:
    data = clip(kind, codec, frames=1, pixels="yuvj420p" if codec == "mjpeg" else "yuv420p")
    np.testing.assert_array_equal(read_scan(data).array.transpose(1, 2, 3, 0), shown_by_ffmpeg(decoded(data)))


TIMES = [0, 40, 80, 120, 600, 640, 1500, 1540, 1580, 1620, 1660, 3000, 3040, 3080, 3120, 3160]


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("mov", "mpeg4")])
def test_variable_frame_rate_neither_duplicates_nor_drops_frames(kind: str, codec: str) -> None:
    data = clip(kind, codec, times=TIMES, rate=1000)
    assert_read_as(data, shown_by_ffmpeg(decoded(data)), frames_total=16, variable_frame_rate=True)
    assert "variable_frame_rate" not in read_scan(clip(kind, codec)).description


def with_edits(data: bytes, *edits: tuple[int, int]) -> bytes:
    """Replace the edit list of a QuickTime file by (duration in ms, first frame or -1 for an empty edit)."""
    at = data.index(b"elst")
    (size,), (delay,) = struct.unpack_from(">I", data, at - 4), struct.unpack_from(">i", data, at + 16)
    with av.open(io.BytesIO(data)) as container:
        track = container.streams.video[0]
        step = round(1 / (track.average_rate * track.time_base))
    entries = [(ms, first if first < 0 else delay + first * step, ONE) for ms, first in edits]
    new = b"elst" + data[at + 4 : at + 8] + struct.pack(">I", len(entries))
    new += b"".join(struct.pack(">IiI", *entry) for entry in entries)
    out = bytearray(data[: at - 4] + struct.pack(">I", len(new) + 4) + new + data[at - 4 + size :])
    for box in (b"edts", b"trak", b"moov"):
        start = out.rindex(box, 0, at) - 4
        struct.pack_into(">I", out, start, struct.unpack_from(">I", out, start)[0] + len(new) + 4 - size)
    return bytes(out)


@pytest.mark.parametrize("b_frames", ["0", "2"])
@pytest.mark.parametrize(
    ("edits", "frames"),
    [
        ([(640, 0)], range(16)),
        ([(440, 5)], range(5, 16)),  # starts between key frames
        ([(240, 5)], range(5, 11)),
        ([(400, -1), (640, 0)], range(16)),  # an empty edit shows nothing
        ([(120, 0), (160, 8)], [0, 1, 2, 8, 9, 10, 11]),
    ],
)
def test_edit_list_selects_the_frames(edits: list[tuple[int, int]], frames: Any, b_frames: str) -> None:
    source = clip(bf=b_frames, g="30")
    data = with_edits(source, *edits)
    assert_read_as(data, shown_by_ffmpeg(decoded(source))[list(frames)], frames_total=len(frames))


def test_edit_list_without_a_frame_is_refused() -> None:
    with pytest.raises(M3RetReadError) as caught:
        read_scan(with_edits(clip(), (640, 100)))
    assert caught.value.reason == "damaged"


@pytest.mark.parametrize(
    ("kind", "codec", "options"),
    [
        ("h264", "libx264", {"x264-params": "open-gop=1:keyint=8:bframes=2:scenecut=0"}),
        ("mpeg2video", "mpeg2video", {}),
    ],
)
def test_frames_before_the_first_decodable_one_are_not_counted(kind: str, codec: str, options: dict[str, str]) -> None:
    header = b"\0\0\1\xb3" if codec == "mpeg2video" else b"\0\0\1\x67"  # sequence header, SPS
    data = clip(kind, codec, frames=24, **({"g": "8", "bf": "2"} | options))
    data = data[data.index(header, 100) :]  # starts at the second, open group of pictures
    expected = shown_by_ffmpeg(decoded(data))
    request = ReadRequest("stream", 3, ReadLimits())
    description: dict[str, Any] = {}
    frames, _ = decode_video(data, request, description)
    assert description["frames_total"] == len(expected) < 24
    centres = [(2 * i + 1) * len(expected) // 6 for i in range(3)]
    np.testing.assert_array_equal(frames, expected[centres])


# ---------------------------------------------------------------------------------------------- orientation and aspect

MATRICES = {  # a, b, u, c, d, v, x, y, w of ISO/IEC 14496-12, 8.3.2: a point (p, q) is shown at (ap + cq, bp + dq)
    "90 clockwise": (0, ONE, 0, -ONE, 0, 0),
    "90 anticlockwise": (0, -ONE, 0, ONE, 0, 0),
    "180": (-ONE, 0, 0, 0, -ONE, 0),
    "mirrored": (-ONE, 0, 0, 0, ONE, 0),
    "upside down": (ONE, 0, 0, 0, -ONE, 0),
    "transposed": (0, ONE, 0, ONE, 0, 0),
    "transposed along the other diagonal": (0, -ONE, 0, -ONE, 0, 0),
    "identity": (ONE, 0, 0, 0, ONE, 0),
}


def with_matrix(data: bytes, matrix: tuple[int, ...]) -> bytes:
    raw, at = bytearray(data), data.index(b"tkhd")
    struct.pack_into(">9i", raw, at + (44 if raw[at + 4] == 0 else 56), *matrix, 0, 0, 1 << 30)
    return bytes(raw)


def autorotation(matrix: tuple[int, ...]) -> list[tuple[str, str | None]]:
    """Return the filters that ffmpeg inserts (fftools/ffmpeg_filter.c, configure_input_video_filter)."""
    angle = round(math.degrees(math.atan2(matrix[1], matrix[0]))) % 360
    if angle == 90:
        return [("transpose", "cclock_flip" if matrix[3] > 0 else "clock")]
    if angle == 180:
        return [("hflip", None)] * (matrix[0] < 0) + [("vflip", None)] * (matrix[4] < 0)
    if angle == 270:
        return [("transpose", "clock_flip" if matrix[3] < 0 else "cclock")]
    return [("vflip", None)] * (matrix[4] < 0)


@pytest.mark.parametrize("without_decord", [False, True])
@pytest.mark.parametrize("name", MATRICES)
def test_display_matrix_is_applied(name: str, without_decord: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if without_decord:
        monkeypatch.setitem(sys.modules, "decord", None)
    data = with_matrix(clip(), MATRICES[name])
    assert_read_as(data, shown_by_ffmpeg(decoded(data), *autorotation(MATRICES[name])))


def test_oblique_rotation_is_refused() -> None:
    with pytest.raises(M3RetReadError) as caught:
        read_scan(with_matrix(clip(), (46341, 46341, 0, -46341, 46341, 0)))
    assert caught.value.reason == "unsupported"


@pytest.mark.parametrize(
    ("kind", "codec", "options", "aspect"),
    [
        ("mp4", "libx264", {"sample_aspect_ratio": Fraction(4, 3)}, 4 / 3),
        ("matroska", "libx264", {"sample_aspect_ratio": Fraction(10, 11)}, 10 / 11),
        ("avi", "mpeg4", {"sample_aspect_ratio": Fraction(12, 11)}, 12 / 11),
        ("mov", "prores_ks", {"sample_aspect_ratio": Fraction(2, 1), "pixels": "yuv422p10le"}, 2),
        ("mpeg", "mpeg2video", {"sample_aspect_ratio": Fraction(4, 3)}, 4 / 3),  # shown as 16:9
        pytest.param(
            "avi", "dvvideo", {"size": (576, 720), "frames": 2}, 16 / 15, marks=pytest.mark.slow
        ),  # PAL, 4:3 of 720 + 48 by 576
    ],
)
def test_pixels_that_are_not_square_have_a_relative_spacing(
    kind: str, codec: str, options: dict[str, Any], aspect: float
) -> None:
    data = clip(kind, codec, **options)
    scan = read_scan(data)
    assert scan.spacing == (None, pytest.approx(1 / aspect), 1.0)
    assert scan.description["pixel_aspect_ratio"] == pytest.approx(1 / aspect, abs=1e-4)  # height / width, as in DICOM
    np.testing.assert_array_equal(scan.array.transpose(1, 2, 3, 0), shown_by_ffmpeg(decoded(data)))


def test_aspect_ratio_turns_with_the_frames_and_reaches_the_processor() -> None:
    data = clip(sample_aspect_ratio=Fraction(3, 1))
    assert read_scan(with_matrix(data, MATRICES["90 clockwise"])).spacing == (None, pytest.approx(3), 1.0)
    grid = M3RetImageProcessor(size=64)(data)["grid_thw"][0].tolist()
    assert grid[1:] == [2, 8]  # 64 x 48 pixels of 3 x 1 are 4 times as wide as high


# ----------------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize(
    ("kind", "codec", "options"),
    [
        ("mp4", "libx264", {"colorspace": 1, "color_range": 1}),
        ("mp4", "libx264", {"colorspace": 1, "color_range": 2}),
        ("mp4", "mpeg4", {"colorspace": 1, "color_range": 2}),  # declared by the container only
        ("mp4", "libx264", {"colorspace": 9, "color_range": 1}),
        ("mp4", "libx264", {"pixels": "yuv420p10le"}),
        ("mp4", "libx264", {"pixels": "yuv444p", "size": (47, 63)}),
        ("mp4", "libx264", {"flags": "+ildct+ilme"}),
        ("mp4", "libx264rgb", {"pixels": "rgb24", "qp": "0"}),
        ("mp4", "libx265", {"pixels": "yuv422p10le", **QUIET_265}),
        ("webm", "libvpx-vp9", {"colorspace": 1, "color_range": 2, "cpu-used": "8"}),
        ("avi", "mjpeg", {"pixels": "yuvj422p"}),
        ("avi", "mpeg4", {"size": (47, 63)}),
        ("avi", "huffyuv", {"pixels": "bgra"}),
        ("mov", "png", {"pixels": "rgba"}),
        ("mov", "qtrle", {"pixels": "argb"}),
        ("matroska", "ffv1", {"pixels": "gbrp10le"}),
        ("matroska", "ffv1", {"pixels": "gray"}),
    ],
)
def test_colours_are_those_of_ffmpeg(kind: str, codec: str, options: dict[str, Any]) -> None:
    data = clip(kind, codec, **options)
    assert_read_as(data, shown_by_ffmpeg(decoded(data)))


@pytest.mark.parametrize("pixels", ["gray10le", "gray12le", "gray16le"])
def test_deep_grey_keeps_its_depth(pixels: str) -> None:
    values = np.random.default_rng(0).integers(0, 2 ** int(pixels[4:6]), (5, 48, 64)).astype(np.uint16)
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as out:
        track = add_track(out, "ffv1", pixels)
        for frame in values:
            out.mux(track.encode(av.VideoFrame.from_ndarray(frame, format=pixels)))
        out.mux(track.encode(None))
    low, high = np.percentile(values, [0.5, 99.5])
    scan = read_scan(stream.getvalue())
    np.testing.assert_allclose(scan.array[0], ((values - low) / (high - low)).clip(0, 1), atol=1e-6)


# ---------------------------------------------------------------------------------------------------- several streams


Writer = Callable[[], None]  # all tracks are added before any is written


def add_silence(out: Any) -> Writer:
    track = out.add_stream("aac", rate=8000, layout="mono")

    def write() -> None:
        for index in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * index
            out.mux(track.encode(frame))
        out.mux(track.encode(None))

    return write


def add_cover(out: Any) -> Writer:
    track = add_track(out, "mjpeg", "yuvj420p", (112, 96))
    track.disposition = av.stream.Disposition.attached_pic
    return lambda: fill(out, track, 1)


def add_video(out: Any) -> Writer:
    track = add_track(out, "libx264")
    return lambda: fill(out, track)


def add_preview(out: Any) -> Writer:
    track = add_track(out, "libx264", size=(32, 32))
    return lambda: fill(out, track)


def streams(kind: str, *adders: Callable[[Any], Writer]) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as out:
        for write in [add(out) for add in adders]:
            write()
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_audio_covers_and_smaller_streams_are_ignored(kind: str) -> None:
    expected = shown_by_ffmpeg(decoded(clip()))
    assert_read_as(streams(kind, add_silence, add_video), expected)
    if kind == "mp4":  # whose first track is the default
        assert_read_as(streams(kind, add_cover, add_video), expected, video_streams=2)
    else:
        assert_read_as(streams(kind, add_preview, add_video), expected, video_streams=2, video_stream=1)


@pytest.mark.parametrize("adders", [(add_silence,), (add_silence, add_cover)])
def test_file_without_a_video_stream_is_unsupported(adders: Any) -> None:
    with pytest.raises(M3RetReadError) as caught:
        read_scan(streams("mp4", *adders))
    assert caught.value.reason == "unsupported"


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "libx264"), ("mov", "mpeg4"), ("avi", "mpeg4"), ("webm", "libvpx")]
)
@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_truncated_video_is_refused(kind: str, codec: str, fraction: float) -> None:
    data = clip(kind, codec, frames=40)
    assert read_scan(data).array.shape[1] == 40
    for num_frames in (None, 2):
        with pytest.raises(M3RetReadError) as caught:
            read_scan(data[: int(len(data) * fraction)], num_frames=num_frames)
        assert caught.value.reason in ("damaged", "undecodable")


@pytest.mark.parametrize("kind", ["matroska", "mpegts"])
@pytest.mark.parametrize("num_frames", [None, 2])
@pytest.mark.parametrize("size", [(64, 96), (64, 48)])
def test_video_that_changes_its_size_is_refused(kind: str, num_frames: int | None, size: tuple[int, int]) -> None:
    stream, both = io.BytesIO(), clip("h264", bf="0") + clip("h264", bf="0", size=size)
    with av.open(io.BytesIO(both)) as source, av.open(stream, "w", format=kind) as out:
        track = out.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            packet.pts = packet.dts = round(index / 25 / packet.time_base)
            packet.stream = track
            out.mux(packet)
    with pytest.raises(M3RetReadError) as caught:
        read_scan(stream.getvalue(), num_frames=num_frames)
    assert caught.value.reason == "unsupported"


@pytest.mark.parametrize(
    ("codec", "kind", "options"),
    [
        ("libx264", "h264", {"bf": "2"}),
        ("libx264", "mpegts", {"bf": "2"}),
        ("libx265", "hevc", QUIET_265),
        ("libx265", "mpegts", QUIET_265),
        ("mpeg2video", "mpeg2video", {}),
        ("mpeg2video", "mpegts", {"bf": "2"}),
    ],
)
def test_streams_of_dicom_decode_within_limits(codec: str, kind: str, options: dict[str, str]) -> None:
    data = clip(kind, codec, frames=10, **options)
    expected = shown_by_ffmpeg(decoded(data))
    frames, aspect = decode_video(data, ReadRequest("stream", 4, ReadLimits()), {})
    assert aspect == 1
    np.testing.assert_array_equal(frames, expected[[1, 3, 6, 8]])
    for limits in (ReadLimits(max_pixels_per_image=1000), ReadLimits(max_decoded_bytes=frames.nbytes - 1)):
        with pytest.raises(M3RetReadError) as caught:
            decode_video(data, ReadRequest("stream", 4, limits), {})
        assert caught.value.reason in ("too_large", "undecodable")  # MPEG-2's size is known to its decoder only
