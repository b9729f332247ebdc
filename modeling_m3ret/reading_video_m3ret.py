"""Read video as ffmpeg shows it.

Each frame is returned once, however long it is shown. Edit lists and rotation are applied, as ffmpeg does by default;
alpha is ignored and fields are not deinterlaced. PyAV inspects and decodes every file. When only a few frames of a long
file are needed and decord gives the same pixels as ffmpeg, decord seeks. This file is copied into every checkpoint;
decoders are imported when a video is read.
"""

from __future__ import annotations

import importlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .intensity_m3ret import to_unit_range
from .scan_m3ret import AnyScan, Description, ReadRequest, spacing_of_aspect


# decord (FFmpeg 4.1) converts these to the same RGB as current FFmpeg; deeper formats differ by up to 39 of 255 levels
DECORD_FORMATS = frozenset(f"yuv{range}{chroma}p" for range in ("", "j") for chroma in (420, 422, 444))
# With fewer key frames for each frame that is read, decoding all frames takes less CPU time than seeking: 204 against
# 230 ms for 32 of 300 frames with a key frame every 12, as much for 32 of 900 with one every 48.
KEY_FRAMES_PER_SEEK = 2
FRAMES_OF_ONE_THREAD = 64  # threads of the decoder add 15 % of CPU time to a clip of 20 frames


def read_video(file: bytes | Path, request: ReadRequest) -> AnyScan:
    """Read the video stream that ffmpeg shows by default."""
    description: Description = {"format": "video"}
    frames, aspect = decode_video(file, request, description)
    spacing = spacing_of_aspect(aspect, description)
    return to_unit_range(frames.transpose(3, 0, 1, 2), spacing, request, description)


def decode_video(file: bytes | Path, request: ReadRequest, description: Description) -> tuple[np.ndarray, float]:
    """Decode the frames that the request selects.

    Args:
        file: a container, or an elementary or transport stream of MPEG-2, H.264 or HEVC, as DICOM embeds them.
        request: the read request. Its limits are checked before frames are decoded.
        description: description of the scan, to which the properties of the video are added.

    Returns:
        Frames `(D, H, W, 3)` uint8, or `(D, H, W, 1)` uint16 or float32 for grey of more than 8 bits; and the height
        of a pixel divided by its width.

    Raises:
        M3RetReadError: if the file has no video stream, is truncated or exceeds the limits.
    """
    av = request.import_decoder("av", "av")
    with _open(file, request) as container:
        track = _inspect(container, av.stream.Disposition, request, description)
    frames, total, passes = None, track.total, 0
    seeks = track.key_frames > KEY_FRAMES_PER_SEEK * len(request.select_frames(total, {}))
    use_decord = seeks and track.fits_decord and not _changes_size(file, track, request)
    while frames is None:
        indices = request.select_frames(total, description)
        request.check_size((len(indices), *track.frame_shape), track.dtype.itemsize)
        if use_decord and total == track.total:
            frames = _decode_with_decord(file, track, indices)
        if frames is None:
            frames, decoded = _decode_with_av(file, track, indices, request)
            passes += 1
            if decoded != total and passes > 1:
                raise request.error("damaged", f"{total} frames, as in a first pass", f"{decoded}")
            if decoded != total:  # some packets hold no frame that is shown, or two
                frames, total = None, decoded
    return _apply_display_matrix(frames, track, request, description)


@dataclass(frozen=True)
class _Track:
    """What is known of a video stream after all of its packets were read and one frame was decoded."""

    index: int
    total: int  # packets that show a frame
    frame_shape: tuple[int, int, int]  # H, W, C
    dtype: np.dtype
    aspect: float
    display_matrix: tuple[int, int, int, int] | None  # a, b, c, d: a stored (x, y) is shown at (ax + cy, bx + dy)
    key_frames: int
    fits_decord: bool  # unless its size changes


def _inspect(container: Any, disposition: Any, request: ReadRequest, description: Description) -> _Track:
    """Read all packets of the stream that ffmpeg chooses, decode its first frame, and describe both."""
    pictures = disposition.attached_pic | disposition.timed_thumbnails  # covers and previews
    streams = [s for s in container.streams.video if s.codec_context and not s.disposition & pictures]
    if not streams:
        raise request.error("unsupported", "a video stream of a known codec", "a file without one")
    stream = max(streams, key=lambda s: (bool(s.disposition & disposition.default), s.height * s.width))
    if not stream.height:
        expected = f"frames of at most {request.limits.max_pixels_per_image:,} pixels"
        raise request.error("undecodable", expected, "larger or damaged frames")
    request.check_pixels(stream.height, stream.width)
    frame, packets = None, []
    for packet in container.demux(stream):
        if frame is None:
            frame = next(iter(packet.decode()), None)
        if packet.size:
            time = packet.dts if packet.pts is None else packet.pts
            packets.append((time or 0, packet.is_discard, packet.is_keyframe, packet.is_corrupt))
    times, discarded, key_frames, corrupt = np.array(packets, np.int64).reshape(-1, 4).T
    shown = np.sort(times[discarded == 0])  # the edit list excludes the others
    rate, base = float(stream.average_rate or 0), float(stream.time_base or 1)
    steps = np.diff(shown) if len(shown) > 1 else np.array([1 / (rate * base) if rate else np.inf])
    kind, missing = container.format.name.split(",")[0], 0.0
    if kind == "mov":
        missing = len(stream.index_entries) - len(packets)
    elif kind == "avi":  # whose times are numbers of frames
        missing = stream.frames - 1 - times.max(initial=-1)
    elif kind == "matroska" and container.duration and len(container.streams) == 1:  # else the audio may be longer
        missing = (container.duration / 1e6 / base - times.max(initial=0)) / max(1, steps.max()) - 1.5
    if frame is None or corrupt.any() or missing > 0:
        raise request.error("damaged", "all frames that the container declares", "a truncated or corrupt video")
    request.check_pixels(frame.height, frame.width)

    deep_grey = frame.format.name.startswith("gray") and frame.format.components[0].bits > 8
    dtype = frame.to_ndarray().dtype if deep_grey else np.dtype(np.uint8)
    description["fps"] = rate
    if len(container.streams.video) > 1:
        description["video_streams"], description["video_stream"] = len(container.streams.video), stream.index
    if frame.interlaced_frame:
        description["interlaced"] = True
    is_regular = steps.max() <= 1.5 * steps.min() + 1  # a difference of 1 is rounding
    if kind in ("mov", "matroska") and not is_regular:
        description["variable_frame_rate"] = True
    context, matrix = stream.codec_context, _display_matrix(frame)
    ordered = context.codec.canonical_name in ("h264", "hevc") and kind != "avi"  # the display order is known
    fits_decord = (
        len(container.streams.video) == 1
        and len(shown) == len(packets)
        and 4 * key_frames.sum() <= len(packets)  # otherwise `_changes_size` takes as long as decoding all frames
        and kind not in ("mpeg", "mpegts")
        and is_regular  # decord seeks by time, and to what the index calls key frames
        and (kind not in ("mov", "avi") or sum(e.is_keyframe for e in stream.index_entries) == key_frames.sum())
        and (ordered or not context.has_b_frames)
        and frame.format.name in DECORD_FORMATS
        and frame.height % 2 == frame.width % 2 == 0
        and (stream.height, stream.width) == (frame.height, frame.width)
        and matrix is None
    )
    return _Track(
        stream.index,
        len(shown),
        (frame.height, frame.width, 1 if deep_grey else 3),
        dtype,
        1 / float(stream.sample_aspect_ratio or 1),
        matrix,
        int(key_frames.sum()),
        fits_decord,
    )


def _changes_size(file: bytes | Path, track: _Track, request: ReadRequest) -> bool:
    """Return whether key frames, where a size may change, have several sizes; decord would scale them to the first."""
    with _open(file, request) as container:
        stream = container.streams[track.index]
        stream.codec_context.skip_frame = "NONKEY"
        return any((frame.height, frame.width) != track.frame_shape[:2] for frame in container.decode(stream))


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """Return the linear part of a frame's display matrix, or None if the frame is shown as stored."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know the type of other side data, such as EXIF in motion JPEG
        turned = (-1, 0, 0, -1)
        return {0: None, 90: (0, -1, 1, 0), -90: (0, 1, -1, 0), 180: turned, -180: turned}[frame.rotation]
    if data is None:
        return None
    a, b, _, c, d = np.frombuffer(data, "<i4")[:5].tolist()
    upright = a > 0 and d > 0 and max(abs(b), abs(c)) < 0.01 * min(a, d)
    return None if upright or not any((a, b, c, d)) else (a, b, c, d)


def _decode_with_decord(file: bytes | Path, track: _Track, indices: list[int]) -> np.ndarray | None:
    """Return the frames, or None if decord is not installed, fails, or finds another number of frames than PyAV."""
    try:
        decord = importlib.import_module("decord")
        decord.logging.set_level(decord.logging.QUIET)  # it prints the names of files that it cannot open
        reader = decord.VideoReader(_decoder_input(file), ctx=decord.cpu(0))
        return reader.get_batch(indices).asnumpy() if len(reader) == track.total else None
    except Exception:  # not installed, or a codec that it does not know
        return None


def _decode_with_av(
    file: bytes | Path, track: _Track, indices: list[int], request: ReadRequest
) -> tuple[np.ndarray, int]:
    """Return the frames, and how many the whole stream shows."""
    frames = np.empty((len(indices), *track.frame_shape), track.dtype)
    rows, count = {index: row for row, index in enumerate(indices)}, 0
    graphs: dict[tuple[str, int, int], Any] = {}
    with _open(file, request) as container:
        stream = container.streams[track.index]
        if track.total > FRAMES_OF_ONE_THREAD:
            stream.thread_type = "AUTO"
        else:
            stream.codec_context.thread_count = 1
        for count, frame in enumerate(container.decode(stream), 1):
            if (frame.height, frame.width) != track.frame_shape[:2]:
                raise request.error("unsupported", "frames of one size", "frames of several sizes")
            if (row := rows.get(count - 1)) is not None:
                if frame.is_corrupt:
                    raise request.error("damaged", "intact frames", f"a corrupt frame, number {count}")
                pixels = frame.to_ndarray() if track.frame_shape[2] == 1 else _to_rgb(frame, graphs)
                frames[row] = pixels.reshape(track.frame_shape)
    return frames, count


def _to_rgb(frame: Any, graphs: dict[tuple[str, int, int], Any]) -> np.ndarray:
    """Convert a frame with the filters of `ffmpeg -pix_fmt rgb24`, which respect colour space, range and chroma."""
    key = (frame.format.name, int(frame.colorspace), int(frame.color_range))
    if key not in graphs:
        graph = importlib.import_module("av.filter").Graph()
        graph.threads = 1
        source = graph.add(
            "buffer",
            video_size=f"{frame.width}x{frame.height}",
            pix_fmt=key[0],
            colorspace=str(key[1]),
            range=str(key[2]),
            time_base="1/1",
        )
        scale, rgb = graph.add("scale", "flags=bicubic"), graph.add("format", "pix_fmts=rgb24")
        graph.link_nodes(source, scale, rgb, graph.add("buffersink")).configure()
        graphs[key] = graph
    graphs[key].vpush(frame)
    return graphs[key].vpull().to_ndarray()


def _apply_display_matrix(
    frames: np.ndarray, track: _Track, request: ReadRequest, description: Description
) -> tuple[np.ndarray, float]:
    """Rotate and mirror frames for display; return them and the height of a pixel divided by its width."""
    aspect = track.aspect
    if track.display_matrix:
        a, b, c, d = track.display_matrix
        right, down, swapped = (c, b, True) if min(abs(b), abs(c)) > max(abs(a), abs(d)) else (a, d, False)
        rest = (a, d) if swapped else (b, c)
        if max(map(abs, rest)) >= 0.02 * min(abs(right), abs(down)):  # ffmpeg tolerates one degree
            raise request.error("unsupported", "a rotation by a multiple of 90 degrees", "another rotation")
        frames = frames.transpose(0, 2, 1, 3) if swapped else frames
        frames = frames[:, :: 1 if down > 0 else -1, :: 1 if right > 0 else -1]
        aspect = 1 / aspect if swapped else aspect
        description["display_matrix"] = "applied"
    return frames, aspect


def _open(file: bytes | Path, request: ReadRequest) -> Any:
    """Open a file with PyAV; its decoders refuse frames above the limit, whatever the container declares."""
    options = {"max_pixels": str(request.limits.max_pixels_per_image)}
    return importlib.import_module("av").open(_decoder_input(file), options=options)


def _decoder_input(file: bytes | Path) -> Any:
    """Return what both decoders open. An absolute path cannot be taken for a protocol."""
    return str(file.resolve()) if isinstance(file, Path) else io.BytesIO(file)
