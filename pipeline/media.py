"""One video: probe, verify every frame, transcode to the canonical form. With `software_decode` the only place that knows PyAV.

Videos are untrusted input. `verify_and_transcode` is meant to run in the limited child process of `media_worker`, opens local files
only, no playlists, and either returns what it wrote or raises RejectedError with one of the reasons below, which go to the quarantine list.

The canonical form is H.264 yuv420p in MP4, upright, square pixels, BT.709 limited range, a keyframe every `gop` frames exactly, closed
GOPs, no audio. Its bytes repeat for equal library versions: one thread, a bit-exact scaler and muxer, no version strings, and x264's
`cpu-independent`, without which AVX-512, AVX2 and plain code give different streams (and AVX-512 not even the same one twice).
"""

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.bitstream import BitStreamFilterContext
from av.codec.context import Flags, ThreadType
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from pipeline.canonical import Timed, canonical_size, orientation, resample, within
from pipeline.errors import PipelineError
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import MIN_SIDE, Reason, RejectedError

HD_WIDTH, HD_HEIGHT = 1280, 720  # untagged video from this size on is taken for BT.709, below for BT.601
DEFAULT_RATE = Fraction(25)
RATES = (Fraction(1, 10), Fraction(1000))  # a stated rate outside is not believed
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,mxf,ivf,h264,hevc,obu,m4v,h263,dv,nut,rm,"
    "wtv,gif,apng,mjpeg,yuv4mpegpipe,vc1,vvc,av1"
)
SWS = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_MATRICES = {  # AVColorSpace of a frame -> swscale's matrix; others are treated as untagged
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.SMPTE170M,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}


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
class MediaReport:
    """The canonical video as written: its frames, counted; its rate; width and height in pixels; size in bytes; and its source.

    source_frames: frames decoded within the wanted window; differs from num_frames only when resampled by time.
    """

    num_frames: int
    fps: float
    width: int
    height: int
    codec: str
    size: int
    source_frames: int
    source: SourceFacts


def probe(path: Path, limits: LimitOptions) -> SourceFacts:
    """What the headers of a video say. Raises RejectedError. Decodes at most what FFmpeg needs to find the streams' parameters."""
    with _open_source(path, limits) as container:
        return _facts(container, _video_stream(container, limits), path)


def verify_and_transcode(
    source: Path, destination: Path, encode: EncodeOptions, limits: LimitOptions, start_s: float | None = None, end_s: float | None = None
) -> MediaReport:
    """Decodes all of `source` (or the frames in [start_s, end_s) seconds of it) once and writes the canonical form to `destination`.

    Raises RejectedError when the source is damaged or over a limit, OSError when `destination` cannot be written.
    """
    with _open_source(source, limits) as container:
        stream = _video_stream(container, limits)
        facts = _facts(container, stream, source)
        _refuse_truncated(container, stream, facts.size)
        rate = Fraction(facts.fps).limit_denominator(1001)
        decoded = _Counted(within(_timed(_decode(container, stream, limits), stream, 1 / rate), start_s, end_s))
        frames = iter(decoded)
        if encode.fps != "keep":
            frames = resample(frames, target := Fraction(encode.fps).limit_denominator(1001), limits.max_frames)
            rate = target
        first = next(frames, None)
        if first is None:
            raise RejectedError(Reason.NO_FRAMES)
        canonical = _Canonical(first.frame, stream, encode.short_side)
        pictures = (canonical(each.frame) for each in chain([first], frames))
        try:
            written = _encode(destination, pictures, (canonical.width, canonical.height), rate, encode)
        except av.error.FFmpegError as error:
            raise _refused(error) from None
    num_frames = _count_packets(destination)
    if num_frames != written:
        raise RejectedError(Reason.ENCODER_FAILED, f"{written} frames went into the encoder, {num_frames} came out")
    return MediaReport(
        num_frames=num_frames,
        fps=float(rate),
        width=canonical.width,
        height=canonical.height,
        codec="h264",
        size=destination.stat().st_size,
        source_frames=decoded.count,
        source=facts,
    )


def write_video(path: Path, frames: Iterable[npt.NDArray[np.uint8]], fps: float, encode: EncodeOptions) -> int:
    """Encodes (H, W, 3) uint8 RGB frames in the canonical form and returns their number; H and W even, kept as they are.

    Raises PipelineError when x264 refuses the options, ValueError for a frame of another shape.
    """
    check_encoder(encode)
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise ValueError("frames: got none, expected at least one")
    height, width = first.shape[:2]
    recolour = _Recolour()

    def convert(array: npt.NDArray[np.uint8]) -> VideoFrame:
        if array.shape != (height, width, 3) or height % 2 or width % 2:
            raise ValueError(f"frame: got shape {array.shape}, expected ({height}, {width}, 3) with even sides")
        return recolour(VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24"), width, height)

    images = chain([convert(first)], map(convert, iterator))
    return _encode(path, images, (width, height), Fraction(fps).limit_denominator(1001), encode)


def check_encoder(encode: EncodeOptions) -> None:
    """Raises PipelineError naming preset and tune when x264 does not know them; costs milliseconds."""
    context = av.CodecContext.create("libx264", "w")
    _configure(context, (64, 64), DEFAULT_RATE, encode)
    try:
        context.open()
    except av.error.FFmpegError as error:
        raise PipelineError(
            f"x264 refuses data.encode.preset={encode.preset!r} with data.encode.tune={encode.tune!r} ({error.strerror}). "
            "Presets run from ultrafast to veryslow; tunes are fastdecode, film, animation, grain, stillimage, zerolatency."
        ) from None


def library_versions() -> dict[str, str]:
    """Versions that decide which bytes come out."""
    names = ("libavcodec", "libavformat", "libswscale")
    return {"av": av.__version__, **{name: ".".join(str(part) for part in av.library_versions[name]) for name in names}}


def _open_source(path: Path, limits: LimitOptions) -> InputContainer:
    try:
        if path.stat().st_size > limits.max_bytes:
            raise RejectedError(Reason.TOO_MANY_BYTES, f"{path.stat().st_size} bytes, limits.max_bytes is {limits.max_bytes}")
        safe = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
        codec = {"max_pixels": str(limits.max_pixels), "threads": "1"}
        return av.open(f"file:{path}", "r", container_options=safe, options=codec, metadata_errors="replace")
    except FileNotFoundError:
        raise RejectedError(Reason.MISSING) from None
    except (av.error.MemoryError, MemoryError):
        raise RejectedError(Reason.OUT_OF_MEMORY, "while reading its header") from None
    except (IsADirectoryError, PermissionError) as error:
        raise RejectedError(Reason.UNREADABLE, str(error.strerror)) from None
    except av.error.FFmpegError as error:
        raise RejectedError(Reason.UNREADABLE if error.errno in _STORAGE else Reason.NOT_A_VIDEO, str(error.strerror)) from None


def _video_stream(container: InputContainer, limits: LimitOptions) -> VideoStream:
    """The first video stream that is no cover picture, ready to decode on one thread; all other streams are skipped."""
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


def _facts(container: InputContainer, stream: VideoStream, path: Path) -> SourceFacts:
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


def _refuse_truncated(container: InputContainer, stream: VideoStream, size: int) -> None:
    """MP4 lists where every frame lies; of a file that was cut between two frames nothing else would tell."""
    if container.format.name.startswith("mov"):
        ends = [entry.pos + entry.size for entry in stream.index_entries]
        if ends and max(ends) > size:
            beyond = sum(end > size for end in ends)
            raise RejectedError(
                Reason.TRUNCATED, f"{beyond} of {len(ends)} frames lie behind the end of the file ({max(ends)} > {size} bytes)"
            )


def _decode(container: InputContainer, stream: VideoStream, limits: LimitOptions) -> Iterator[VideoFrame]:
    """Every frame that decodes, in presentation order. Raises RejectedError at the first sign of damage or past a limit."""
    count = 0
    try:
        for packet in container.demux(stream):
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


def _timed(frames: Iterable[VideoFrame], stream: VideoStream, period: Fraction) -> Iterator[Timed[VideoFrame]]:
    """Times that never run backwards; a frame without a timestamp follows the one before it by the nominal period."""
    base = stream.time_base or Fraction(1, 90_000)
    origin = stream.start_time
    last = -period
    for frame in frames:
        if origin is None:
            origin = frame.pts or 0
        last = max(last, (frame.pts - origin) * base) if frame.pts is not None else last + period
        yield Timed(frame, last, frame.duration * base if frame.duration else period)


class _Counted:
    """Passes frames on and counts them."""

    def __init__(self, frames: Iterable[Timed[VideoFrame]]) -> None:
        self._frames = frames
        self.count = 0

    def __iter__(self) -> Iterator[Timed[VideoFrame]]:
        for each in self._frames:
            self.count += 1
            yield each


class _Canonical:
    """Brings decoded frames to the size, orientation and colours that the first of them decides. width, height: of the result."""

    def __init__(self, first: VideoFrame, stream: VideoStream, short_side: int) -> None:
        aspect = stream.sample_aspect_ratio or Fraction(1)
        self._size = canonical_size(first.width, first.height, aspect, short_side)
        matrix = first.side_data.get("DISPLAYMATRIX")
        assert matrix is None or isinstance(matrix, SideData)
        self._transpose, self._flip_rows, self._flip_columns = orientation(b"" if matrix is None else bytes(matrix))
        self.width, self.height = self._size[::-1] if self._transpose else self._size
        self._recolour = _Recolour()

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        """A new yuv420p frame that carries pixels only: no timestamps, picture types or side data of the source."""
        width, height = self._size
        flat = np.asarray(self._recolour(frame, width, height).to_ndarray(), np.uint8)  # (3 H / 2, W): Y, then U, then V
        area = width * height
        planes = np.split(flat.reshape(-1), [area, area + area // 4])
        shapes = [(height, width), (height // 2, width // 2), (height // 2, width // 2)]
        turned = [self._turn(plane.reshape(shape)).reshape(-1) for plane, shape in zip(planes, shapes, strict=True)]
        return VideoFrame.from_ndarray(np.concatenate(turned).reshape(self.height * 3 // 2, self.width), format="yuv420p")

    def _turn(self, plane: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        plane = plane.T if self._transpose else plane
        return plane[:: -1 if self._flip_rows else 1, :: -1 if self._flip_columns else 1]


class _Recolour:
    """Scales, and converts to yuv420p in BT.709 limited range from whatever matrix and range a frame says, or its size suggests.

    From another matrix it goes through planar RGB: swscale's direct way from BT.601 makes white (235) 233, this way is true to 1.
    """

    def __init__(self) -> None:
        self._scale, self._convert = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: VideoFrame, width: int, height: int) -> VideoFrame:
        untagged = Colorspace.ITU709 if frame.width >= HD_WIDTH or frame.height >= HD_HEIGHT else Colorspace.ITU601
        matrix = None if frame.format.is_rgb else _MATRICES.get(frame.colorspace, untagged)
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        direct = matrix == Colorspace.ITU709
        scaled = self._scale.reformat(
            frame,
            width=width,
            height=height,
            format="yuv420p" if direct else "gbrp",
            src_colorspace=matrix,
            dst_colorspace=Colorspace.ITU709 if direct else None,
            interpolation=SWS,
            src_color_range=None if matrix is None else ColorRange.JPEG if full else ColorRange.MPEG,
            dst_color_range=ColorRange.MPEG if direct else ColorRange.JPEG,
            threads=1,
        )
        if direct:
            return scaled
        return self._convert.reformat(
            scaled,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            interpolation=SWS,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )


def _configure(context: VideoCodecContext, size: tuple[int, int], rate: Fraction, encode: EncodeOptions) -> None:
    context.width, context.height = size
    context.pix_fmt = "yuv420p"
    context.framerate, context.time_base = rate, 1 / rate
    context.gop_size = encode.gop
    context.thread_count = 1
    context.flags |= int(Flags.bitexact)
    context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709 in all three tables
    context.color_range = int(ColorRange.MPEG)
    exact = "scenecut=0:open-gop=0:threads=1:lookahead-threads=1:sync-lookahead=0:cpu-independent=1"
    context.options = {"preset": encode.preset, "tune": encode.tune, "crf": str(encode.crf), "x264-params": exact}


def _encode(path: Path, frames: Iterable[VideoFrame], size: tuple[int, int], rate: Fraction, encode: EncodeOptions) -> int:
    """Writes the frames as MP4, its index in front, and returns their number."""
    count = 0
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        _configure(stream.codec_context, size, rate, encode)
        container.start_encoding()
        without_sei = BitStreamFilterContext("filter_units=remove_types=6", stream)  # x264 writes its version and options there
        for frame in frames:
            frame.pts, frame.time_base = count, 1 / rate
            for packet in stream.encode(frame):
                container.mux(without_sei.filter(packet))
            count += 1
        for packet in stream.encode(None):
            container.mux(without_sei.filter(packet))
        container.mux(without_sei.filter(None))
    return count


def _refused(error: av.error.FFmpegError) -> Exception:
    """The video's fault, or the destination's?"""
    if isinstance(error, av.error.MemoryError):
        return RejectedError(Reason.OUT_OF_MEMORY, "while encoding")
    if error.errno in _STORAGE:
        return OSError(error.errno, error.strerror)
    return RejectedError(Reason.ENCODER_FAILED, str(error.strerror))


_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ESTALE)


def _count_packets(path: Path) -> int:
    """Frames of a file that we wrote, by its packets: each holds one frame, and what we encoded ourselves needs no second decode."""
    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))
