"""Read video with decord, or with PyAV where decord is missing or would return other frames.

This file travels inside every checkpoint; decoders are imported when a video is read.
"""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from .intensity_m3ret import to_unit_range
from .scan_m3ret import AnyScan, Description, M3RetReadError, ReadRequest


def read_video(file: bytes | Path, request: ReadRequest) -> AnyScan:
    """Read a video with decord, or with PyAV if decord is not installed or cannot decode it correctly."""
    description: Description = {"format": "video"}
    try:
        array = _decode_with_decord(file, request, description)
    except M3RetReadError:
        raise
    except Exception:  # not installed, an unsupported codec (AV1), or `_decord_misnumbers_frames`
        array = _decode_with_av(file, request, description)
    return to_unit_range(array.transpose(3, 0, 1, 2), (None, None, None), request, description)


def _decode_with_decord(file: bytes | Path, request: ReadRequest, description: Description) -> np.ndarray:
    decord = importlib.import_module("decord")
    decord.logging.set_level(decord.logging.QUIET)  # it prints the names of files that it cannot open
    try:  # PyAV reads the size from the header; decord would have to decode a frame first
        with importlib.import_module("av").open(_decoder_input(file)) as container:
            height, width = container.streams.video[0].height, container.streams.video[0].width
            if _decord_misnumbers_frames(container):
                raise ValueError("decord would return other frames")
    except ImportError:
        height, width, _ = decord.VideoReader(_decoder_input(file), ctx=decord.cpu(0))[0].shape
    request.check_pixels(height, width)
    reader = decord.VideoReader(_decoder_input(file), ctx=decord.cpu(0))
    indices = request.select_frames(len(reader), description)
    request.check_size((len(indices), height, width, 3), 1)
    description["fps"] = float(reader.get_avg_fps())
    return reader.get_batch(indices).asnumpy()


def _decord_misnumbers_frames(container: Any) -> bool:
    """Return whether decord may return another frame than the requested one.

    It does so in MPEG program and transport streams, and for codecs whose frames are stored in another order than
    shown, except H.264 and H.265 in containers that record both orders.
    """
    context, kind = container.streams.video[0].codec_context, container.format.name
    ordered = context.codec.canonical_name in ("h264", "hevc") and kind != "avi"
    return kind in ("mpeg", "mpegts") or bool(context.has_b_frames and not ordered)


def _decode_with_av(file: bytes | Path, request: ReadRequest, description: Description) -> np.ndarray:
    av = request.import_decoder("av", "av")
    with av.open(_decoder_input(file)) as container:
        stream = container.streams.video[0]
        request.check_pixels(stream.height, stream.width)
        total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    indices = request.select_frames(total, description)
    request.check_size((len(indices), stream.height, stream.width, 3), 1)
    frames, wanted = [], set(indices)
    with av.open(_decoder_input(file)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        description["fps"] = float(stream.average_rate or 0)
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
            if index == indices[-1]:
                break
    if len(frames) < len(indices):
        raise request.error("damaged", f"{total} frames, as its header declares", "a video that ends earlier")
    return np.stack(frames)


def _decoder_input(file: bytes | Path) -> Any:
    """Return what both decoders open. An absolute path cannot be taken for a protocol."""
    return str(file.resolve()) if isinstance(file, Path) else io.BytesIO(file)
