"""A video as a user has it: opened within limits, its facts, and every frame that decodes, in order and with its time.

Videos are untrusted input: local files only, of formats that refer to no other file, read through `_File`, decoded on one thread.
"""

import errno
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.codec.context import ThreadType
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipeline.canonical import Timed
from pipeline.likeness import joined_digest, source_digest
from pipeline.options import LimitOptions
from pipeline.quarantine import MAX_STREAMS, MIN_SIDE, Reason, RejectedError

DEFAULT_RATE = Fraction(25)
RATES = (Fraction(1, 10), Fraction(1000))  # a stated rate outside is not believed
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,mxf,ivf,h264,hevc,obu,m4v,h263,dv,nut,rm,"
    "wtv,gif,apng,mjpeg,yuv4mpegpipe,vc1,vvc,av1"
)
BUFFER_BYTES = 1 << 18  # of one read


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFacts:
    """What the source says of itself; headers lie, so nothing is computed from it but estimates.

    width, height: coded, in pixels, before rotation. header_frames: 0 when not stated. duration_s: of the container, 0 when not stated.
    """

    container: str
    codec: str
    pixel_format: str
    width: int
    height: int
    fps: float
    header_frames: int
    duration_s: float
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A source being decoded. files: all of it. aspect: of a pixel, width to height. frames: in order, with their times from 0."""

    files: Sequence[Path]
    facts: SourceFacts
    aspect: Fraction
    frames: Iterator[Timed[VideoFrame]]


@contextmanager
def read_video(path: Path, limits: LimitOptions) -> Iterator[Reading]:
    """A video file, to decode within the block. Raises RejectedError, also while frames are taken."""
    with opened(path, limits) as container:
        stream = video_stream(container, limits)
        facts = facts_of(container, stream, path)
        refuse_truncated(container, stream, facts.size)
        period = 1 / Fraction(facts.fps).limit_denominator(1001)
        frames = timed(decode(container, stream, limits), stream, period)
        yield Reading(files=[path], facts=facts, aspect=stream.sample_aspect_ratio or Fraction(1), frames=frames)


def probe(path: Path, limits: LimitOptions) -> SourceFacts:
    """What the headers of a video say. Raises RejectedError. Decodes at most what FFmpeg needs to find the streams' parameters."""
    with opened(path, limits) as container:
        return facts_of(container, video_stream(container, limits), path)


class _File:
    """A local file that FFmpeg reads through this process, which remembers a read that failed.

    Several demuxers take a failed read for the end of the file: what they deliver then is a shorter video, and no error.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.error: OSError | None = None
        self._file = path.open("rb", buffering=0)

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size) or b""
        except OSError as error:
            self.error = error
            raise

    def seek(self, offset: int, whence: int) -> int:
        try:
            return self._file.seek(offset, whence)
        except OSError as error:  # before the file's beginning, where a damaged header may point
            return -(error.errno or errno.EINVAL)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def digest_of(files: Sequence[Path], start_s: float | None, end_s: float | None) -> bytes:
    """`likeness.source_digest` of a video, or of the frames of a folder. Raises RejectedError when one of them cannot be read."""
    digests = []
    try:
        for path in files:
            with path.open("rb") as file:
                digests.append(source_digest(file, start_s, end_s))
    except OSError as error:
        raise RejectedError(Reason.READ_FAILED, str(error.strerror)) from None
    return joined_digest(digests)


@contextmanager
def opened(path: Path, limits: LimitOptions, format: str | None = None) -> Iterator[InputContainer]:
    """The container of a video, to use within the block. format: FFmpeg's name where it is known, None: any of FORMATS.

    Raises RejectedError, also when a read within the block failed.
    """
    file = _open_file(path, limits)
    try:
        with _open_container(file, limits, format) as container:
            yield container
    except Exception:
        if file.error is None:  # otherwise it is no more than what a failed read led to
            raise
    finally:
        file.close()
    if file.error is not None:
        raise RejectedError(Reason.READ_FAILED, str(file.error.strerror))


def _open_file(path: Path, limits: LimitOptions) -> _File:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise RejectedError(Reason.UNREADABLE, "not a regular file")
        if status.st_size > limits.max_bytes:
            raise RejectedError(Reason.TOO_MANY_BYTES, f"{status.st_size} bytes, limits.max_bytes is {limits.max_bytes}")
        return _File(path)
    except (FileNotFoundError, NotADirectoryError):
        raise RejectedError(Reason.MISSING) from None
    except PermissionError as error:
        raise RejectedError(Reason.UNREADABLE, str(error.strerror)) from None
    except OSError as error:
        raise RejectedError(Reason.READ_FAILED, str(error.strerror)) from None


def _open_container(file: _File, limits: LimitOptions, format: str | None) -> InputContainer:
    try:
        safe = {"protocol_whitelist": "file", "format_whitelist": format or FORMATS}
        codec = {"max_pixels": str(limits.max_pixels), "threads": "1"}
        return av.open(file, "r", format=format, container_options=safe, options=codec, metadata_errors="replace", buffer_size=BUFFER_BYTES)
    except (av.error.MemoryError, MemoryError):
        raise RejectedError(Reason.OUT_OF_MEMORY, "while reading its header") from None
    except av.error.FFmpegError as error:
        raise RejectedError(Reason.NOT_A_VIDEO, str(error.strerror)) from None


def video_stream(container: InputContainer, limits: LimitOptions) -> VideoStream:
    """The first video stream that is no cover picture, ready to decode on one thread; all other streams are skipped."""
    if len(container.streams) > MAX_STREAMS:  # FFmpeg itself stops at 1000, as out of memory
        raise RejectedError(Reason.TOO_MANY_STREAMS, f"{len(container.streams)} streams")
    picture = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    videos = [stream for stream in container.streams.video if not stream.disposition & picture]
    if not videos:
        types = sorted({stream.type for stream in container.streams})
        reason = Reason.NO_VIDEO_STREAM if {"audio", "subtitle"} & set(types) else Reason.NOT_A_VIDEO
        raise RejectedError(reason, f"streams: {', '.join(types) or 'none'}")
    for other in container.streams:
        if other is not videos[0]:
            other.discard = av.stream.Discard.all
    stream, context = videos[0], videos[0].codec_context
    if context is None:
        raise RejectedError(Reason.UNSUPPORTED_CODEC)
    if context.width * context.height > limits.max_pixels:
        raise RejectedError(Reason.TOO_MANY_PIXELS, f"{context.width}x{context.height}, limits.max_pixels is {limits.max_pixels}")
    context.options = {"max_pixels": str(limits.max_pixels)}
    context.thread_count, context.thread_type = 1, ThreadType.NONE
    return stream


def facts_of(container: InputContainer, stream: VideoStream, path: Path) -> SourceFacts:
    context = stream.codec_context
    stated = (rate for rate in (stream.guessed_rate, stream.average_rate, stream.base_rate) if rate and RATES[0] <= rate <= RATES[1])
    return SourceFacts(
        container=container.format.name.split(",")[0],
        codec=context.codec.canonical_name,
        pixel_format=context.pix_fmt or "",
        width=context.width,
        height=context.height,
        fps=float(next(stated, DEFAULT_RATE)),
        header_frames=stream.frames,
        duration_s=max(0.0, (container.duration or 0) / av.time_base),
        size=path.stat().st_size,
    )


def refuse_truncated(container: InputContainer, stream: VideoStream, size: int) -> None:
    """MP4 lists where every frame lies; of a file that was cut between two frames nothing else would tell."""
    if container.format.name.startswith("mov"):
        ends = [entry.pos + entry.size for entry in stream.index_entries]
        if ends and max(ends) > size:
            beyond = sum(end > size for end in ends)
            raise RejectedError(
                Reason.TRUNCATED, f"{beyond} of {len(ends)} frames lie behind the end of the file ({max(ends)} > {size} bytes)"
            )


def decode(container: InputContainer, stream: VideoStream, limits: LimitOptions) -> Iterator[VideoFrame]:
    """Every frame that decodes, in presentation order. Raises RejectedError at the first sign of damage or past a limit."""
    count = 0
    try:
        for packet in container.demux(stream):
            if packet.has_sidedata("encryption_info"):
                raise RejectedError(Reason.ENCRYPTED, f"at frame {count}")
            if packet.is_corrupt:
                raise RejectedError(Reason.DAMAGED, f"the container marks a packet near frame {count} as incomplete")
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise RejectedError(Reason.DAMAGED, f"the decoder had to conceal errors in frame {count}")
                if count >= limits.max_frames:
                    raise RejectedError(Reason.TOO_MANY_FRAMES, f"limits.max_frames is {limits.max_frames}")
                if min(frame.width, frame.height) < MIN_SIDE:
                    raise RejectedError(Reason.TOO_SMALL, f"{frame.width}x{frame.height} pixels")
                yield frame
                count += 1
    except (av.error.MemoryError, MemoryError):
        raise RejectedError(Reason.OUT_OF_MEMORY, f"at frame {count}") from None
    except av.error.FFmpegError as error:
        raise RejectedError(Reason.DAMAGED, f"{error.strerror} (at frame {count})") from None


def timed(frames: Iterable[VideoFrame], stream: VideoStream, period: Fraction) -> Iterator[Timed[VideoFrame]]:
    """Times that never run backwards; a frame without a timestamp follows the one before it by the nominal period."""
    base = stream.time_base or Fraction(1, 90_000)
    origin = stream.start_time
    last = -period
    for frame in frames:
        if origin is None:
            origin = frame.pts or 0
        last = max(last, (frame.pts - origin) * base) if frame.pts is not None else last + period
        yield Timed(frame, last, frame.duration * base if frame.duration else period)
