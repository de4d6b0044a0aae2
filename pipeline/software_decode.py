"""Wanted frames of a video in memory, decoded on the CPU by FFmpeg through PyAV.

The order of work: demux packets from the keyframe of the first wanted frame until the group of pictures of the last one is complete;
number the shown frames by sorting their timestamps; feed the decoder only the packets from the keyframe before each wanted frame up to
that frame, without the frames in between that no other refers to, and drain it; convert only the wanted frames to RGB. A frame is known
by its timestamp, never by counting, so B-frames, variable frame rates, edit lists and open GOPs cannot shift it.

Leaving out what is not referred to changes no pixel of the rest and is what makes a layered video cheap: of a clip of base frames,
only the base layer is decoded.
"""

import io
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import TypeAlias

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream

from pipeline import h264
from pipeline.errors import DecodeError

MAX_PIXELS = 4096 * 4096
# Containers that can hold a canonical video or a copied one; none of them refers to other files or hosts.
_CONTAINER = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,ivf", "protocol_whitelist": "none", "probesize": "32"}
# Otherwise FFmpeg opens a decoder of its own and looks into packets for what the header says: .7 ms a clip.
_HEADER_ONLY = {"skip_frame": "all", "threads": "1"}
VideoPacket: TypeAlias = "Packet[VideoStream]"


class _UndecodableError(Exception):
    """Carries the reason to the place that knows the video's name."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Packets in decoding order and the ascending timestamps of the frames they show, the first of which is frame number `first`."""

    packets: list[VideoPacket]
    shown: list[int]
    first: int


@dataclass(frozen=True, slots=True)
class _Run:
    """Packets [first, last] in decoding order; decoding them yields the frames with the wanted timestamps."""

    first: int
    last: int
    wanted: frozenset[int]


def decode(
    data: bytes, frames: npt.NDArray[np.int32], out: npt.NDArray[np.uint8], *, key: str, shard: str, max_pixels: int = MAX_PIXELS
) -> None:
    """Decodes `frames` of the video file `data` into `out`, with one thread.

    frames: (T,), shown frames counted from 0, in any order, repeats allowed. out: (T, H, W, 3) RGB, 0 to 255, contiguous; H and W are
    the video's. Colours follow the stream's tags (matrix and range). key, shard: name the video in errors.
    Raises DecodeError when the bytes are no video, its size is not H x W or beyond `max_pixels`, a wanted frame does not come, or
    FFmpeg reports damage in a frame that was decoded on the way.
    """
    try:
        _decode(data, frames, out, max_pixels)
    except _UndecodableError as error:
        raise DecodeError(str(error), key=key, shard=shard) from None
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise DecodeError(f"FFmpeg cannot decode it: {error}", key=key, shard=shard) from error


def _decode(data: bytes, frames: npt.NDArray[np.int32], out: npt.NDArray[np.uint8], max_pixels: int) -> None:
    limit = {"max_pixels": str(max_pixels)}
    with av.open(io.BytesIO(data), mode="r", container_options=_CONTAINER, options=limit | _HEADER_ONLY) as container:
        if not container.streams.video:
            raise _UndecodableError("it has no video stream")
        stream = container.streams.video[0]
        context = stream.codec_context
        if (context.height, context.width) != out.shape[1:3]:
            raise _UndecodableError(f"it is {context.width}x{context.height} pixels, the index says {out.shape[2]}x{out.shape[1]}")
        if context.width * context.height > max_pixels:
            raise _UndecodableError(f"it is {context.width}x{context.height} pixels, at most {max_pixels} are allowed")
        context.thread_count = 1
        context.options = limit  # a frame may be larger than the header says
        span = _demux_span(container, stream, int(frames.min()), int(frames.max()))
        places: dict[int, list[int]] = {}  # timestamp -> places in `out`
        for place, frame in enumerate(frames.tolist()):
            places.setdefault(span.shown[frame - span.first], []).append(place)
        reformatter = VideoReformatter()
        for run in _plan(span.packets, sorted(places)):
            for image in _decode_run(context, span.packets, run):
                place, *repeats = places[int(image.pts or 0)]
                _convert(reformatter, image, out[place])
                for repeat in repeats:
                    out[repeat] = out[place]


def _demux_span(container: InputContainer, stream: VideoStream, first: int, last: int) -> _Span:
    """What has to be known to decode frames `first` to `last`, which an MP4's list of packets makes less than all before `last`.

    Reading begins at the keyframe where a seek ends. All packets before a keyframe are shown before it, or hidden, and so tell the number
    of the first frame behind them. It is of no use where frame `first` needs the group before, as the leading frames of an open GOP do.
    """
    entries = stream.index_entries
    if container.format.name.startswith("mov") and first < len(entries) == stream.frames and stream.start_time is not None:
        before = accumulate((not entry.is_discard for entry in entries), initial=0)
        numbers = {entry.timestamp: number for entry, number in zip(entries, before, strict=False)}  # by decoding time
        delay = stream.start_time - entries[0].timestamp  # from decoding to showing
        container.seek(entries[first].timestamp + delay, stream=stream)
        packets = container.demux(stream)
        start = next(packets)
        number = None if start.dts is None or len(numbers) < len(entries) else numbers.get(start.dts)
        if number is not None and number <= first and start.is_keyframe and not start.is_discard:
            span = _demux(chain((start,), packets), number, last)
            if span.shown[first - number] >= (start.pts or 0):
                return span
        container.seek(entries[0].timestamp, stream=stream)
    return _demux(container.demux(stream), 0, last)


def _demux(source: Iterator[VideoPacket], first: int, last: int) -> _Span:
    """Packets in decoding order, whose first shown frame is frame `first`, until frame `last` and its group of pictures are complete.

    Later groups cannot show a frame earlier than their keyframe, except the leading frames of an open GOP: hence two keyframes more.
    """
    packets: list[VideoPacket] = []
    times: list[int] = []
    keyframes_after = 0
    for packet in source:
        if packet.size == 0:  # the demuxer's end mark
            continue
        if packet.pts is None:
            raise _UndecodableError(f"its packet {len(packets)} has no timestamp")
        if packet.is_corrupt:
            raise _UndecodableError(f"its packet {len(packets)} is marked as corrupt")
        if packet.is_keyframe and first + len(times) > last:
            keyframes_after += 1
            if keyframes_after > 1:
                break
        packets.append(packet)
        if not packet.is_discard:  # an edit list hides the frame
            times.append(packet.pts)
    times.sort()
    if first + len(times) <= last:
        raise _UndecodableError(f"it has {first + len(times)} frames, frame {last} was asked for")
    if any(earlier == later for earlier, later in pairwise(times)):
        raise _UndecodableError("two of its frames have the same timestamp")
    return _Span(packets, times, first)


def _plan(packets: list[VideoPacket], wanted: list[int]) -> list[_Run]:
    """The fewest packets that show the frames with the `wanted` timestamps (ascending): runs that start at keyframes."""
    keyframes = sorted((int(packet.pts or 0), place) for place, packet in enumerate(packets) if packet.is_keyframe)
    place_of = {packet.pts: place for place, packet in enumerate(packets)}
    runs: list[_Run] = []
    for time in wanted:
        before = bisect_right(keyframes, (time, len(packets)))
        if before == 0:
            raise _UndecodableError("it has no keyframe before a wanted frame")
        first, last = keyframes[before - 1][1], place_of[time]
        if runs and first <= runs[-1].last + 1:  # the decoder is already there
            previous = runs.pop()
            runs.append(_Run(previous.first, max(last, previous.last), previous.wanted | {time}))
        else:
            runs.append(_Run(first, last, frozenset((time,))))
    return runs


def _decode_run(context: VideoCodecContext, packets: list[VideoPacket], run: _Run) -> Iterator[VideoFrame]:
    """The run's wanted frames, in the order they are shown."""
    start = packets[run.first].pts or 0
    missing = set(run.wanted)
    for packet in (*_needed(context, packets, run), None):  # None drains the frames that wait to be reordered
        for image in context.decode(packet):
            if image.pts is None or image.pts < start:
                continue  # a leading frame of an open GOP: its references lie before the keyframe
            if image.is_corrupt:
                raise _UndecodableError("FFmpeg met damaged data in it")
            if image.pts in missing:
                missing.remove(image.pts)
                yield image
    if missing:
        raise _UndecodableError(f"{len(missing)} of {len(run.wanted)} wanted frames did not come out of the decoder")
    context.flush_buffers()  # a drained decoder takes packets again only after this


def _needed(context: VideoCodecContext, packets: list[VideoPacket], run: _Run) -> Iterator[VideoPacket]:
    """The run's packets without those of unwanted frames that no other frame refers to."""
    length_size = h264.length_size(context.extradata) if context.name == "h264" else 0
    for packet in packets[run.first : run.last + 1]:
        if packet.pts in run.wanted or not length_size or not h264.is_droppable(memoryview(packet), length_size):
            yield packet


def _convert(reformatter: VideoReformatter, image: VideoFrame, out: npt.NDArray[np.uint8]) -> None:
    """RGB of one frame into `out` (H, W, 3)."""
    height, width = out.shape[:2]
    if (image.height, image.width) != (height, width):
        raise _UndecodableError(f"a frame is {image.width}x{image.height} pixels, the index says {width}x{height}")
    rgb = reformatter.reformat(image, format="rgb24", dst_color_range=ColorRange.JPEG, threads=1)
    plane = rgb.planes[0]
    rows = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)
    out[:] = rows[:height, : width * 3].reshape(height, width, 3)
