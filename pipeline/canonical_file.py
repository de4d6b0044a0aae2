"""Whether a file is in the canonical form already, so that its bytes are copied: encoding it again would cost quality and time.

Nothing marks our files, and nothing has to: x264's parameter sets hold size, rate, profile, references, entropy coding and quality (crf),
and our muxer writes a file in one way only. A file is ours when

    its parameter sets are those that our encoder writes for its size and rate with the options that are asked for,
    each group of pictures is closed and has the length, and in the layered form the layers, that are asked for,
    frames follow each other at the rate, and
    muxing its packets again gives the same file.

Presets that differ only in how thoroughly the encoder searches have the same parameter sets and are not told apart.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av

from pipeline.h264 import is_droppable, is_instant, length_size
from pipeline.options import BASE_STEP, EncodeOptions, LimitOptions
from pipeline.quarantine import Reason, RejectedError
from pipeline.segments import VideoPacket, write_packets
from pipeline.source_video import opened, video_stream

BLOCK_BYTES = 1 << 20
RATES, RATE_BYTES = b"btrt", 12  # a box of bit rates, of which the encoder knows another one than who copies packets


@dataclass(frozen=True, slots=True)
class _Picture:
    """A packet. time: in the stream's time base, from the first picture that is shown."""

    time: int
    is_instant: bool
    is_droppable: bool


def is_canonical(source: Path, scratch: Path, rate: Fraction, parameter_sets: bytes, encode: EncodeOptions, limits: LimitOptions) -> bool:
    """Whether `source`, which opens as a video, is what our encoder would have written. scratch: a file that is overwritten.

    rate: frames per second. parameter_sets: of our encoder for its size, as `avc_configuration` gives them. Raises RejectedError.
    """
    pictures: list[_Picture] = []
    try:
        with opened(source, limits) as container:
            stream = video_stream(container, limits)
            extradata = stream.codec_context.extradata
            if len(container.streams) != 1 or extradata is None or not extradata.startswith(parameter_sets):
                return False
            write_packets(scratch, stream, _noted(container.demux(stream), length_size(extradata), pictures))
            step = 1 / rate / (stream.time_base or Fraction(1))
    except av.error.FFmpegError:
        return False
    return _is_regular(pictures, step, encode) and _same_files(source, scratch)


def avc_configuration(extradata: bytes) -> bytes:
    """The beginning of a stream's decoder configuration (ISO/IEC 14496-15, 5.3.3.1) from an encoder's one SPS and one PPS in Annex B."""
    sps, pps = extradata.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")[1:3]
    sized = [len(unit).to_bytes(2, "big") + unit for unit in (sps, pps)]
    return b"\1" + sps[1:4] + b"\xff\xe1" + sized[0] + b"\1" + sized[1]


def _noted(packets: Iterator[VideoPacket], size: int, pictures: list[_Picture]) -> Iterator[VideoPacket]:
    for packet in packets:
        if packet.size:
            data = memoryview(packet)
            instant = is_instant(data, size)
            # A keyframe of the container alone would be one where nobody can begin to decode.
            pictures.append(_Picture(packet.pts or 0, instant and packet.is_keyframe, is_droppable(data, size)))
            yield packet


def _is_regular(pictures: Sequence[_Picture], step: Fraction, encode: EncodeOptions) -> bool:
    """Whether groups, layers and times are as our encoder makes them; pictures in decoding order."""
    if not pictures:
        return False
    first = pictures[0].time
    for begin in range(0, len(pictures), encode.gop):
        group = pictures[begin : begin + encode.gop]
        shown = sorted(group, key=lambda picture: picture.time)
        if [place for place, picture in enumerate(group) if picture.is_instant] != [0]:
            return False
        for place, picture in enumerate(shown):
            base = place % BASE_STEP == 0 or place == len(shown) - 1
            if picture.time - first != (begin + place) * step or (encode.form == "layered" and picture.is_droppable == base):
                return False
    return True


def _same_files(one: Path, other: Path) -> bool:
    """Whether two files are equal but for the bit rates in their headers."""
    with closing(_blocks(one)) as first, closing(_blocks(other)) as second:
        blocks = [next(first), next(second)]
        place = blocks[0].find(RATES)
        if place >= 0:
            place += len(RATES)
            blocks = [block[:place] + bytes(RATE_BYTES) + block[place + RATE_BYTES :] for block in blocks]
        while blocks[0] == blocks[1]:
            if not blocks[0]:
                return True
            blocks = [next(first), next(second)]
    return False


def copy_file(source: Path, destination: Path) -> None:
    """Raises RejectedError when the source cannot be read, OSError when the destination cannot be written."""
    with closing(_blocks(source)) as blocks, destination.open("wb") as file:
        while block := next(blocks):
            file.write(block)


def _blocks(path: Path) -> Generator[bytes, None, None]:
    """What is in a file, then empty blocks for ever."""
    try:
        with path.open("rb") as file:
            while True:
                yield file.read(BLOCK_BYTES)
    except OSError as error:
        raise RejectedError(Reason.READ_FAILED, str(error.strerror)) from None
