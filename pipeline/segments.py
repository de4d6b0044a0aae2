"""A long canonical video as short ones, its packets copied: overlapping ones, of which any window is read without reading the whole,
or ones that follow each other, which together are the video.

Every group of pictures is closed and starts at a keyframe, so a cut there changes no pixel.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import av
from av.packet import Packet
from av.video.stream import VideoStream

VideoPacket: TypeAlias = "Packet[VideoStream]"


def cut(source: Path, destination: Path, num_groups: int) -> Iterator[Path]:
    """Writes segment i to `destination` and yields that, for i = 0, 1, ...; each is gone when the next one is asked for.

    Segment i holds groups of pictures [i * n, (i + 2) * n) with n = num_groups, at least 1: whatever is no longer than n groups lies
    whole within one. source: a canonical video. Raises OSError where a segment cannot be written.
    """
    with av.open(str(source), "r") as container:
        stream = container.streams.video[0]
        for packets in _overlapping(_groups(container.demux(stream)), num_groups):
            write_packets(destination, stream, packets)
            yield destination


def even_windows(num_groups: int, max_groups: int) -> list[int]:
    """The fewest windows of at most `max_groups` groups that hold `num_groups`, as their sizes, which differ by one at most.

    The larger ones come last: the video's last group may be a short one.
    """
    count = max(1, -(-num_groups // max_groups))
    return [num_groups // count + (number >= count - num_groups % count) for number in range(count)]


def cut_evenly(source: Path, destination: Path, max_groups: int) -> Iterator[int]:
    """Writes window i to `destination` and yields its number of frames, for i = 0, 1, ...; the next one overwrites it.

    The windows follow each other and hold every frame exactly once; each has at most `max_groups` groups of pictures, at least 1, and
    they are as equal as whole groups allow. source: a canonical video. Raises OSError where a window cannot be written.
    """
    with av.open(str(source), "r") as container:
        num_groups = sum(packet.is_keyframe for packet in container.demux(video=0) if packet.size)
    with av.open(str(source), "r") as container:
        stream = container.streams.video[0]
        groups = _groups(container.demux(stream))
        for size in even_windows(num_groups, max_groups):
            packets = [packet for group in islice(groups, size) for packet in group]
            write_packets(destination, stream, packets)
            yield len(packets)


def _groups(packets: Iterator[VideoPacket]) -> Iterator[list[VideoPacket]]:
    """Packets by group of pictures, in decoding order."""
    group: list[VideoPacket] = []
    for packet in packets:
        if packet.size == 0:  # the demuxer's end mark
            continue
        if packet.is_keyframe and group:
            yield group
            group = []
        group.append(packet)
    yield group


def _overlapping(groups: Iterator[list[VideoPacket]], num_groups: int) -> Iterator[list[VideoPacket]]:
    """Packets of groups [0, 2n), [n, 3n), ...; the last one may be shorter."""
    held: list[list[VideoPacket]] = []
    for group in groups:
        held.append(group)
        if len(held) == 2 * num_groups:
            yield [packet for each in held for packet in each]
            held = held[num_groups:]
    yield [packet for each in held for packet in each]


def write_packets(path: Path, stream: VideoStream, packets: Iterable[VideoPacket]) -> None:
    """Writes packets of `stream` as a video of their own; the first is of a keyframe, which is the first one shown."""
    base = stream.time_base or Fraction(1, 90_000)
    origin: int | None = None
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as container:
        copy = container.add_stream_from_template(stream)
        for packet in packets:
            origin = packet.pts or 0 if origin is None else origin
            ours = Packet(bytes(packet))  # the other segment that has it needs the original's times
            ours.pts, ours.dts, ours.time_base = (packet.pts or 0) - origin, (packet.dts or 0) - origin, base
            ours.duration, ours.is_keyframe, ours.stream = packet.duration, packet.is_keyframe, copy
            container.mux(ours)
