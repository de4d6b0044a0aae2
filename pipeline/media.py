"""One video: every frame of it verified, transcoded to the canonical form, or copied where it is in that form already.

Videos are untrusted input. `verify_and_transcode` is meant to run in the limited child process of `media_worker`, and either returns
what it wrote or raises RejectedError with a reason, which goes to the quarantine list.

The canonical form is H.264 yuv420p in MP4, upright, square pixels, BT.709 limited range, a keyframe every `gop` frames exactly, closed
GOPs, no audio. In the layered form every fourth frame, and the last of each GOP, is a reference, the others refer to these and are
referred to by none. Its bytes repeat for equal library versions: one thread, a bit-exact scaler and muxer, no version strings, and x264's
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
from av.codec.context import Flags
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange

from pipeline.canonical import Timed, Trace, resample, within
from pipeline.canonical_file import avc_configuration, copy_file, is_canonical
from pipeline.errors import PipelineError
from pipeline.likeness import Likeness
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.picture import CanonicalPicture, Recolour
from pipeline.quarantine import Reason, RejectedError
from pipeline.source_pictures import are_pictures, read_pictures
from pipeline.source_video import DEFAULT_RATE, SourceFacts, digest_of, read_video


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaReport:
    """The canonical video as written: its frames, counted; its rate; width and height in pixels; size in bytes; and its source.

    source_frames: frames decoded within the wanted window; differs from num_frames only when resampled by time.
    source_digest, content: what `likeness` compares, in hexadecimal digits.
    """

    num_frames: int
    fps: float
    width: int
    height: int
    codec: str
    size: int
    source_frames: int
    source: SourceFacts
    source_digest: str
    content: str


def verify_and_transcode(
    source: Path,
    destination: Path,
    encode: EncodeOptions,
    limits: LimitOptions,
    start_s: float | None = None,
    end_s: float | None = None,
    num_frames: int | None = None,
    trace: Path | None = None,
) -> MediaReport:
    """Decodes all of `source` (or the frames in [start_s, end_s) seconds of it) once and writes the canonical form to `destination`.

    source: a video, a picture, or a folder of numbered pictures, of which there must be `num_frames` where that is stated. trace: a file
    that becomes a `Trace`.

    Raises RejectedError when the source is damaged or over a limit, OSError when `destination` cannot be written.
    """
    pictured = are_pictures(source)
    with read_pictures(source, limits, encode.frames_fps, num_frames) if pictured else read_video(source, limits) as reading:
        rate = Fraction(reading.facts.fps).limit_denominator(1001)
        decoded = _Decoded(within(reading.frames, start_s, end_s))
        frames = iter(decoded)
        if encode.fps != "keep":
            frames = resample(frames, target := Fraction(encode.fps).limit_denominator(1001), limits.max_frames)
            rate = target
        shown: list[float] = []
        frames = _timed(frames, shown)
        first = next(frames, None)
        if first is None:
            raise RejectedError(Reason.NO_FRAMES)
        canonical = CanonicalPicture(first.frame, reading.aspect, encode.short_side)
        likeness = Likeness()
        pictures = (_noted(canonical(each.frame), likeness) for each in chain([first], frames))
        size, whole = (canonical.width, canonical.height), not pictured and start_s is None and end_s is None
        try:
            copied = whole and canonical.changes_nothing and _is_canonical(source, destination, reading.facts, rate, encode, limits)
            written = sum(1 for _ in pictures) if copied else _encode(destination, pictures, size, rate, encode)
        except av.error.FFmpegError as error:
            raise _refused(error) from None
    if copied:
        copy_file(source, destination)
    counted = _count_packets(destination)
    if counted != written and copied:
        raise RejectedError(Reason.DAMAGED, f"it holds {counted} frames, {written} decode")
    if counted != written:
        raise RejectedError(Reason.ENCODER_FAILED, f"{written} frames went into the encoder, {counted} came out")
    if trace is not None:
        width, height = canonical.source_size
        Trace(decoded=decoded.times, shown=shown, end_s=decoded.end_s, width=width, height=height).write(trace)
    return MediaReport(
        num_frames=counted,
        fps=float(rate),
        width=canonical.width,
        height=canonical.height,
        codec="h264",
        size=destination.stat().st_size,
        source_frames=len(decoded.times),
        source=reading.facts,
        source_digest=digest_of(reading.files, start_s, end_s).hex(),
        content=likeness.digest().hex(),
    )


def _is_canonical(source: Path, scratch: Path, facts: SourceFacts, rate: Fraction, encode: EncodeOptions, limits: LimitOptions) -> bool:
    """Whether a video that keeps its size is in the canonical form already, see `canonical_file`."""
    if (facts.codec, facts.pixel_format) != ("h264", "yuv420p"):
        return False
    context = av.CodecContext.create("libx264", "w")
    _configure(context, (facts.width, facts.height), rate, encode)
    context.flags |= int(Flags.global_header)
    context.open()
    assert context.extradata is not None
    return is_canonical(source, scratch, rate, avc_configuration(bytes(context.extradata)), encode, limits)


def _noted(picture: VideoFrame, likeness: Likeness) -> VideoFrame:
    """The picture, after `likeness` has seen it."""
    luma = picture.planes[0]
    likeness.add(np.frombuffer(memoryview(luma), np.uint8).reshape(luma.height, luma.line_size)[:, : luma.width])
    return picture


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
    recolour = Recolour()

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


class _Decoded:
    """Passes frames on and notes when they are shown. times: of each; end_s: of the last one's end, in seconds."""

    def __init__(self, frames: Iterable[Timed[VideoFrame]]) -> None:
        self._frames = frames
        self.times: list[float] = []
        self.end_s = 0.0

    def __iter__(self) -> Iterator[Timed[VideoFrame]]:
        for each in self._frames:
            self.times.append(float(each.time))
            self.end_s = float(each.time + each.duration)
            yield each


def _timed(frames: Iterable[Timed[VideoFrame]], times: list[float]) -> Iterator[Timed[VideoFrame]]:
    """The frames, after their times are in `times`."""
    for each in frames:
        times.append(float(each.time))
        yield each


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
    layers = ":bframes=3:b-adapt=0:b-pyramid=none" if encode.form == "layered" else ""
    context.options = {"preset": encode.preset, "tune": encode.tune, "crf": str(encode.crf), "x264-params": exact + layers}


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
