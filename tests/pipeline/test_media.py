"""One video: every decodable frame once and in order, the right colours the right way up, bytes that repeat, damage named."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import source_video
from pipeline.canonical import Timed, canonical_size, orientation, resample, within
from pipeline.errors import PipelineError
from pipeline.media import check_encoder, verify_and_transcode, write_video
from pipeline.media_worker import MediaWorker
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import MAX_STREAMS, Reason, RejectedError
from pipeline.source_video import probe
from tests.pipeline.numbered import MJPEG, VP9, Stream, encode, number_image, read_number

ENCODE, LIMITS = EncodeOptions(), LimitOptions()
X264 = {"preset": "ultrafast", "crf": "18", "threads": "1"}


def frames_of(path: Path) -> list[npt.NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        return [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in container.decode(video=0)]


def numbers_of(path: Path) -> list[int]:
    return [read_number(frame) for frame in frames_of(path)]


def made(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def reason_of(path: Path, limits: LimitOptions = LIMITS) -> Reason:
    with pytest.raises(RejectedError) as caught:
        verify_and_transcode(path, path.with_name("out.mp4"), ENCODE, limits)
    return caught.value.reason


STREAMS = {  # what users have
    "h264, b-frames": Stream(options={**X264, "bf": "3", "g": "250"}),
    "h264, open gop": Stream(options={**X264, "bf": "3", "g": "12", "x264-params": "open-gop=1"}),
    "h264, 10 bit": Stream(options=X264, pixel_format="yuv420p10le"),
    "h264, 4:4:4": Stream(options=X264, pixel_format="yuv444p"),
    "mpeg-4 in avi": Stream(codec="mpeg4", container="avi", options={"q:v": "3"}),
    "mpeg-2 in ts": Stream(codec="mpeg2video", container="mpegts", options={"q:v": "3", "bf": "2"}),
    "vp9 in webm": VP9,
    "mjpeg, full range": MJPEG,
    "irregular timestamps": Stream(options=X264, times=[i * i for i in range(70)]),
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
def test_every_frame_once_and_in_order(tmp_path: Path, stream: Stream) -> None:
    out = tmp_path / "out.mp4"
    report = verify_and_transcode(made(tmp_path / "in", encode(70, stream)), out, ENCODE, LIMITS)
    assert numbers_of(out) == list(range(70))
    assert (report.num_frames, report.source_frames, report.width, report.height) == (70, 70, 96, 64)
    assert report.size == out.stat().st_size


def test_a_video_that_is_canonical_already(tmp_path: Path) -> None:
    """Its pictures are taken as they are decoded, where the decoder pads its lines."""
    frames = [number_image(number) for number in range(10)]
    write_video(tmp_path / "in.mp4", frames, 25.0, EncodeOptions(crf=5))
    with av.open(str(tmp_path / "in.mp4")) as container:
        decoded = next(container.decode(video=0))
    assert decoded.planes[0].line_size > decoded.width
    verify_and_transcode(tmp_path / "in.mp4", tmp_path / "out.mp4", EncodeOptions(crf=5), LIMITS)
    for one, other in zip(frames_of(tmp_path / "out.mp4"), frames, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 12


def test_form(tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    verify_and_transcode(made(tmp_path / "in", encode(70, VP9)), out, EncodeOptions(gop=12), LIMITS)
    with av.open(str(out)) as container:
        context = container.streams.video[0].codec_context
        assert (context.codec.name, context.pix_fmt, len(container.streams)) == ("h264", "yuv420p", 1)
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert container.streams.video[0].average_rate == 25
        packets = [packet for packet in container.demux(video=0) if packet.size]
        keys = sorted(packet.pts // (packet.stream.time_base.denominator // 25) for packet in packets if packet.is_keyframe)
        assert keys == list(range(0, 70, 12))
    data = out.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert not any(noise in data for noise in (b"x264", b"Lavf", b"Lavc"))


def test_bytes_repeat_in_other_processes_and_memory(tmp_path: Path) -> None:
    # Flat pictures encoded from recycled memory are where x264's AVX-512 code differs from itself without cpu-independent.
    code = """
import hashlib, sys, numpy as np
from pathlib import Path
from pipeline.media import write_video
from pipeline.options import EncodeOptions
def film():
    for i in range(60):
        image = np.full((240, 320, 3), 4 * i, np.uint8)
        image[:, : 5 * i] = 200
        yield image
out = Path(sys.argv[1])
digests = set()
for _ in range(4):
    write_video(out, film(), 25.0, EncodeOptions())
    digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
print(*digests)
"""
    found = set()
    for number in range(2):
        command = [sys.executable, "-c", code, str(tmp_path / f"{number}.mp4")]
        found |= set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert len(found) == 1


def test_missing_first_keyframe(tmp_path: Path) -> None:
    stream = Stream(container="mpegts", options={**X264, "g": "20", "bf": "0"})
    with av.open(str(made(tmp_path / "whole.ts", encode(50, stream)))) as container:
        second = sum(packet.size for packet in list(container.demux(video=0))[1:2])
    assert second > 0
    data = (tmp_path / "whole.ts").read_bytes()
    cut = made(tmp_path / "cut.ts", data[len(data) // 4 // 188 * 188 :])
    out = tmp_path / "out.mp4"
    verify_and_transcode(cut, out, ENCODE, LIMITS)
    numbers = numbers_of(out)
    assert numbers == list(range(50 - len(numbers), 50))
    assert numbers[0] % 20 == 0


@pytest.mark.parametrize(("start_s", "end_s", "expected"), [(None, 1.0, range(25)), (0.4, 1.0, range(10, 25)), (1.0, None, range(25, 40))])
def test_window(tmp_path: Path, start_s: float | None, end_s: float | None, expected: range) -> None:
    out = tmp_path / "out.mp4"
    verify_and_transcode(made(tmp_path / "in", encode(40)), out, ENCODE, LIMITS, start_s, end_s)
    assert numbers_of(out) == list(expected)


def test_resampling_counts_time(tmp_path: Path) -> None:
    times = [0, 1, 2, 20, 21, 40]  # of 1/25 s
    out = tmp_path / "out.mp4"
    report = verify_and_transcode(made(tmp_path / "in", encode(6, Stream(options=X264, times=times))), out, EncodeOptions(fps=10), LIMITS)
    numbers = numbers_of(out)
    assert report.num_frames == len(numbers)
    assert report.fps == 10
    assert numbers == [1] + [2] * 7 + [4] * 8  # what is on screen at the ticks 0, 1 and 8, to the nearest tick


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.fractions(0, 2, max_denominator=30), min_size=1, max_size=20),
    last=st.fractions(Fraction(1, 100), 2, max_denominator=100),
    rate=st.sampled_from([Fraction(1), Fraction(10), Fraction(30000, 1001)]),
)
def test_resampling_shows_what_is_on_screen(gaps: list[Fraction], last: Fraction, rate: Fraction) -> None:
    times = [sum(gaps[:i], Fraction(0)) for i in range(len(gaps))]
    frames = [Timed(i, each, last) for i, each in enumerate(times)]
    shown = [each.frame for each in resample(iter(frames), rate, 10_000)]
    half = Fraction(1, 2)
    assert len(shown) == max(1, int((times[-1] + last) * rate + half))
    for tick, number in enumerate(shown[:-1]):
        assert number == max(i for i, each in enumerate(times) if int(each * rate + half) <= tick)


def test_a_wild_timestamp_cannot_ask_for_a_million_frames() -> None:
    frames = iter([Timed(0, Fraction(0), Fraction(1)), Timed(1, Fraction(10**6), Fraction(1))])
    with pytest.raises(RejectedError, match="too_many_frames"):
        list(resample(frames, Fraction(30), 1000))


def test_window_stops_reading_behind_its_end() -> None:
    read: list[int] = []

    def frames() -> Iterator[Timed[int]]:
        for number in range(100):
            read.append(number)
            yield Timed(number, Fraction(number), Fraction(1))

    assert [each.frame for each in within(frames(), 2, 5)] == [2, 3, 4]
    assert read[-1] == 5


@given(
    width=st.integers(16, 5000),
    height=st.integers(16, 5000),
    aspect=st.sampled_from([Fraction(1), Fraction(4, 3), Fraction(2), Fraction(10, 11), Fraction(1, 10**6)]),
    short_side=st.integers(16, 512),
)
def test_canonical_size(width: int, height: int, aspect: Fraction, short_side: int) -> None:
    wide, high = canonical_size(width, height, aspect, short_side)
    assert wide % 16 == 0
    assert high % 16 == 0
    assert 16 <= wide <= width
    assert 16 <= high <= height
    assert min(wide, high) <= max(16, short_side + 8)
    shown = Fraction(width, height) * (aspect if Fraction(1, 8) <= aspect <= 8 else 1)
    if min(wide, high) >= 128:  # rounding moves each side by at most 8, or 15 at the source's own size
        assert abs(Fraction(wide, high) / shown - 1) < Fraction(15, 100)


SIZES = [  # source, sample aspect, short side -> canonical
    ((320, 240), 1, 256, (320, 240)),
    ((1920, 1080), 1, 256, (448, 256)),
    ((180, 144), 1, 256, (176, 144)),  # never enlarged
    ((640, 360), 2, 256, (640, 176)),  # wide pixels: the height gives way
    ((720, 576), Fraction(16, 15), 256, (336, 256)),
]


@pytest.mark.parametrize(("source", "aspect", "short_side", "expected"), SIZES)
def test_sizes(source: tuple[int, int], aspect: Fraction, short_side: int, expected: tuple[int, int]) -> None:
    assert canonical_size(*source, Fraction(aspect), short_side) == expected


# ------------------------------------------------------------------------------------------------ colours and orientation

QUADRANTS = np.array([[[200, 40, 40], [40, 180, 60]], [[50, 60, 210], [190, 190, 70]]], np.float64)  # RGB of the four corners
KR_KB = {"bt709": (0.2126, 0.0722), "bt601": (0.299, 0.114), "bt2020": (0.2627, 0.0593)}  # ITU-R BT.709, BT.601, BT.2020


def planes(rgb: npt.NDArray[np.float64], matrix: str, full: bool, bits: int = 8) -> list[npt.NDArray[np.uint16]]:
    """Y, Cb, Cr at 4:4:4 by the standards' formulas, independent of swscale."""
    kr, kb = KR_KB[matrix]
    red, green, blue = (rgb[..., i] / 255 for i in range(3))
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = [(blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)]
    scale = 1 << (bits - 8)
    if full:
        values = [luma * (256 * scale - 1), *(plane * (256 * scale - 1) + 128 * scale for plane in chroma)]
    else:
        values = [(219 * luma + 16) * scale, *((224 * plane + 128) * scale for plane in chroma)]
    return [np.round(value).astype(np.uint16) for value in values]


def quadrant_image(width: int, height: int) -> npt.NDArray[np.float64]:
    return QUADRANTS.repeat(height // 2, 0).repeat(width // 2, 1)


def quadrants_of(path: Path) -> npt.NDArray[np.float64]:
    """The four corners' RGB as a BT.709 limited decoder must show them, by the standard's formula."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        luma, blue, red = (np.asarray(plane) for plane in _planes_of(frame))
    grid = []
    for plane in (luma, blue, red):
        high, wide = plane.shape
        grid.append(plane[[high // 4, 3 * high // 4]][:, [wide // 4, 3 * wide // 4]].astype(np.float64))
    y, cb, cr = (grid[0] - 16) / 219, (grid[1] - 128) / 224, (grid[2] - 128) / 224
    kr, kb = KR_KB["bt709"]
    r, b = y + (2 - 2 * kr) * cr, y + (2 - 2 * kb) * cb
    return np.stack([r, (y - kr * r - kb * b) / (1 - kr - kb), b], axis=-1) * 255


def _planes_of(frame: av.VideoFrame) -> list[npt.NDArray[np.uint8]]:
    flat = np.asarray(frame.to_ndarray()).reshape(-1)
    area = frame.width * frame.height
    shapes = [(frame.height, frame.width), (frame.height // 2, frame.width // 2), (frame.height // 2, frame.width // 2)]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, [area, area + area // 4]), shapes, strict=True)]


COLOURS = {  # name: (matrix, full range, tag of AVColorSpace, tag of range, bits, size)
    "bt601": ("bt601", False, 6, 1, 8, (128, 64)),
    "bt601 full": ("bt601", True, 5, 2, 8, (128, 64)),
    "bt709": ("bt709", False, 1, 1, 8, (128, 64)),
    "bt709 full": ("bt709", True, 1, 2, 8, (128, 64)),
    "bt2020, 10 bit": ("bt2020", False, 9, 1, 10, (128, 64)),
    "untagged, small: bt601": ("bt601", False, 2, 0, 8, (128, 64)),
    "untagged, hd: bt709": ("bt709", False, 2, 0, 8, (1280, 720)),
}


@pytest.mark.parametrize("case", COLOURS.values(), ids=COLOURS.keys())
def test_colours(tmp_path: Path, case: tuple[str, bool, int, int, int, tuple[int, int]]) -> None:
    matrix, full, space, color_range, bits, (width, height) = case
    source = tmp_path / "in.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "qp": "4"})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if bits == 8 else "yuv444p10le"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, color_range
        frame = av.VideoFrame(width, height, stream.pix_fmt)
        for plane, values in zip(frame.planes, planes(quadrant_image(width, height), matrix, full, bits), strict=True):
            lines = values.astype(np.uint8 if bits == 8 else np.uint16)
            padded = np.zeros((height, plane.line_size // lines.itemsize), lines.dtype)
            padded[:, :width] = lines
            plane.update(padded.tobytes())
        frame.colorspace, frame.color_range, frame.pts = space, color_range, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    out = tmp_path / "out.mp4"
    verify_and_transcode(source, out, EncodeOptions(crf=8), LIMITS)
    assert np.abs(quadrants_of(out) - QUADRANTS).max() < 4


@pytest.mark.parametrize("size", [(320, 240), (1280, 720)])
def test_white_stays_white(tmp_path: Path, size: tuple[int, int]) -> None:
    # swscale's direct way from BT.601 to BT.709 darkens by two levels, of every video of standard definition
    source, out = tmp_path / "in.mp4", tmp_path / "out.mp4"
    for luma in (16, 128, 235):
        with av.open(str(source), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "qp": "1"})
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            flat = np.full((size[1] * 3 // 2, size[0]), 128, np.uint8)
            flat[: size[1]] = luma
            container.mux(stream.encode(av.VideoFrame.from_ndarray(flat, format="yuv420p")))
            container.mux(stream.encode(None))
        verify_and_transcode(source, out, EncodeOptions(crf=1), LIMITS)
        with av.open(str(out)) as container:
            assert abs(_planes_of(next(container.decode(video=0)))[0].mean() - luma) < 0.6


def test_rgb_source(tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    write_video(out, [quadrant_image(128, 64).astype(np.uint8)], 25.0, EncodeOptions(crf=8))
    assert np.abs(quadrants_of(out) - QUADRANTS).max() < 4


# FFmpeg's display matrices: a source pixel (x, y) goes to (a x + c y, b x + d y), in 1/65536
TURNS = {
    "upright": ((1, 0, 0, 1), QUADRANTS),
    "quarter clockwise": ((0, 1, -1, 0), np.rot90(QUADRANTS, -1)),
    "half": ((-1, 0, 0, -1), np.rot90(QUADRANTS, 2)),
    "quarter anticlockwise": ((0, -1, 1, 0), np.rot90(QUADRANTS, 1)),
    "mirrored": ((-1, 0, 0, 1), QUADRANTS[:, ::-1]),
    "upside down": ((1, 0, 0, -1), QUADRANTS[::-1]),
    "transposed": ((0, 1, 1, 0), QUADRANTS.transpose(1, 0, 2)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_orientation(tmp_path: Path, turn: str) -> None:
    (a, b, c, d), expected = TURNS[turn]
    source, out = tmp_path / "in.mp4", tmp_path / "out.mp4"
    matrix = [round(value * 65536) for value in (a, b, 0, c, d, 0, 0, 0)] + [1 << 30]
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "qp": "4"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        stream.set_display_matrix(matrix)
        frame = av.VideoFrame.from_ndarray(quadrant_image(128, 64).astype(np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    report = verify_and_transcode(source, out, EncodeOptions(crf=8), LIMITS)
    assert (report.width, report.height) == ((64, 128) if a == 0 else (128, 64))
    assert np.abs(quadrants_of(out) - expected).max() < 20


def test_no_matrix_is_upright() -> None:
    assert orientation(b"") == (False, False, False)


# ------------------------------------------------------------------------------------------------ what is refused


def sound(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\0\0" * 8000)
    return path


def noise(path: Path, num_frames: int = 400) -> Path:
    generator = np.random.default_rng(0)
    write_video(
        path, (generator.integers(0, 256, (256, 256, 3), np.uint8) for _ in range(num_frames)), 25.0, EncodeOptions(preset="ultrafast")
    )
    return path


def test_what_is_no_video(tmp_path: Path) -> None:
    assert reason_of(tmp_path / "nowhere.mp4") == Reason.MISSING
    assert reason_of(tmp_path) == Reason.UNREADABLE
    assert reason_of(made(tmp_path / "empty.mp4", b"")) == Reason.NOT_A_VIDEO
    assert reason_of(made(tmp_path / "text.mp4", b"path,label\n" * 99)) == Reason.NOT_A_VIDEO
    with pytest.raises(RejectedError) as caught:
        probe(sound(tmp_path / "sound.wav"), LIMITS)
    assert caught.value.reason in (Reason.NO_VIDEO_STREAM, Reason.NOT_A_VIDEO)


def test_what_cannot_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    assert reason_of(tmp_path / "pipe.mp4") == Reason.UNREADABLE  # and nobody waits for a writer
    (tmp_path / "failing.mp4").symlink_to("/proc/self/mem")  # a file whose first byte cannot be read (EIO)
    assert reason_of(tmp_path / "failing.mp4") == Reason.READ_FAILED


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_storage_that_fails_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str, share: float) -> None:
    # Matroska and MPEG-TS take a failed read for the end of the file: without care, a shorter video and no error
    data = encode(60, Stream(container=container, options=X264))
    source = made(tmp_path / "in", data)
    read = source_video._File.read

    def failing(file: source_video._File, size: int) -> bytes:
        if file.tell() + size > share * len(data):
            file.error = OSError(errno.EIO, "Input/output error")
            raise file.error
        return read(file, size)

    monkeypatch.setattr(source_video, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(source_video._File, "read", failing)
    assert reason_of(source) == Reason.READ_FAILED


def test_playlists_are_not_followed(tmp_path: Path) -> None:
    inner = made(tmp_path / "inner.mp4", encode(5))
    assert reason_of(made(tmp_path / "a.mp4", f"ffconcat version 1.0\nfile '{inner.name}'\n".encode())) == Reason.NOT_A_VIDEO
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{inner}\n#EXT-X-ENDLIST\n"
    assert reason_of(made(tmp_path / "b.m3u8", playlist.encode())) == Reason.NOT_A_VIDEO
    with pytest.raises(RejectedError):
        verify_and_transcode(Path("http://127.0.0.1:9/a.mp4"), tmp_path / "out.mp4", ENCODE, LIMITS)


@pytest.mark.parametrize(("num_sounds", "fits"), [(MAX_STREAMS - 1, True), (MAX_STREAMS, False), (3 * MAX_STREAMS, False)])
def test_limit_on_streams(tmp_path: Path, num_sounds: int, fits: bool) -> None:
    path = tmp_path / "in.mov"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mjpeg", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuvj420p"
        sounds = [container.add_stream("pcm_s16le", rate=8000) for _ in range(num_sounds)]
        picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 90, np.uint8), format="rgb24")
        picture.pts = 0
        container.mux(video.encode(picture))
        for stream in sounds:
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 80), np.int16), format="s16", layout="mono")
            sound.sample_rate, sound.pts = 8000, 0
            container.mux(stream.encode(sound))
    if fits:
        assert verify_and_transcode(path, tmp_path / "out.mp4", ENCODE, LIMITS).num_frames == 1
    else:
        assert reason_of(path) == Reason.TOO_MANY_STREAMS


def test_limits_on_the_video(tmp_path: Path) -> None:
    video = made(tmp_path / "in.mp4", encode(30))
    assert reason_of(video, LimitOptions(max_frames=29)) == Reason.TOO_MANY_FRAMES
    assert reason_of(video, LimitOptions(max_pixels=96 * 64 - 1)) == Reason.TOO_MANY_PIXELS
    assert reason_of(video, LimitOptions(max_bytes=100)) == Reason.TOO_MANY_BYTES
    write_video(tmp_path / "tiny.mp4", [np.zeros((8, 32, 3), np.uint8)], 25.0, ENCODE)
    assert reason_of(tmp_path / "tiny.mp4") == Reason.TOO_SMALL


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_cut_off_mp4(tmp_path: Path, share: float) -> None:
    whole = tmp_path / "whole.mp4"
    verify_and_transcode(made(tmp_path / "in", encode(60)), whole, ENCODE, LIMITS)  # its index is in front
    data = whole.read_bytes()
    assert reason_of(made(tmp_path / "cut.mp4", data[: int(len(data) * share)])) in (Reason.TRUNCATED, Reason.NOT_A_VIDEO)


def test_zeroed_block_is_noticed(tmp_path: Path) -> None:
    data = bytearray(noise(tmp_path / "whole.mp4", 20).read_bytes())
    middle = (data.index(b"mdat") + len(data)) // 2
    data[middle : middle + 30_000] = bytes(30_000)
    assert reason_of(made(tmp_path / "in.mp4", bytes(data))) == Reason.DAMAGED


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), num_bytes=st.sampled_from([1, 30, 1000]))
def test_random_damage_never_crashes_and_counts_are_true(tmp_path_factory: pytest.TempPathFactory, seed: int, num_bytes: int) -> None:
    folder = tmp_path_factory.mktemp("damage")
    data = bytearray(encode(30))
    generator = np.random.default_rng(seed)
    for place in generator.integers(0, len(data), num_bytes):
        data[place] ^= int(generator.integers(1, 256))
    out = folder / "out.mp4"
    try:
        report = verify_and_transcode(made(folder / "in.mp4", bytes(data)), out, ENCODE, LimitOptions(max_pixels=1 << 20, max_frames=1000))
    except RejectedError:
        return
    assert len(frames_of(out)) == report.num_frames


def test_writing_a_video(tmp_path: Path) -> None:
    images = [np.full((48, 64, 3), 8 * i, np.uint8) for i in range(20)]
    assert write_video(tmp_path / "a.mp4", images, 24.0, EncodeOptions(crf=10)) == 20
    shown = frames_of(tmp_path / "a.mp4")
    assert [abs(int(frame.mean()) - 8 * i) <= 3 for i, frame in enumerate(shown)] == [True] * 20
    with pytest.raises(ValueError, match="even sides"):
        write_video(tmp_path / "b.mp4", [np.zeros((33, 64, 3), np.uint8)], 24.0, ENCODE)
    with pytest.raises(ValueError, match="got none"):
        write_video(tmp_path / "b.mp4", [], 24.0, ENCODE)


@pytest.mark.parametrize("options", [EncodeOptions(preset="warp9"), EncodeOptions(tune="speed")])
def test_unknown_encoder_options(options: EncodeOptions) -> None:
    check_encoder(ENCODE)
    with pytest.raises(PipelineError, match=r"data\.encode\.preset"):
        check_encoder(options)


# ------------------------------------------------------------------------------------------------ the limited child


@pytest.fixture(scope="module")
def slow_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise(tmp_path_factory.mktemp("slow") / "slow.mp4")


def worker_reason(video: Path, limits: LimitOptions, encode: EncodeOptions = ENCODE) -> Reason:
    with MediaWorker(encode, limits) as worker, pytest.raises(RejectedError) as caught:
        worker.transcode(video, video.with_name("out.mp4"))
    return caught.value.reason


def test_limits_of_the_child(tmp_path: Path, slow_video: Path) -> None:
    slow = EncodeOptions(preset="veryslow")
    assert worker_reason(slow_video, LimitOptions(cpu_s=1), slow) == Reason.CPU_TIME
    assert worker_reason(slow_video, LimitOptions(wall_s=1), slow) == Reason.WALL_TIME
    assert worker_reason(slow_video, LimitOptions(memory_mib=8)) == Reason.OUT_OF_MEMORY


def test_the_child_equals_this_process(tmp_path: Path) -> None:
    video = made(tmp_path / "in.mp4", encode(30))
    here = verify_and_transcode(video, tmp_path / "here.mp4", ENCODE, LIMITS, 0.2, 1.0)
    with MediaWorker(ENCODE, LIMITS) as worker:
        there = worker.transcode(video, tmp_path / "there.mp4", 0.2, 1.0)
        with pytest.raises(FileNotFoundError):
            worker.transcode(video, tmp_path / "no folder" / "there.mp4")
        with pytest.raises(RejectedError, match="missing"):
            worker.transcode(tmp_path / "nowhere.mp4", tmp_path / "there.mp4")
        again = worker.transcode(video, tmp_path / "again.mp4", 0.2, 1.0)
    assert here == there == again
    digests = {hashlib.sha256((tmp_path / f"{name}.mp4").read_bytes()).hexdigest() for name in ("here", "there", "again")}
    assert len(digests) == 1


def test_a_killed_child_costs_nothing(tmp_path: Path) -> None:
    video = made(tmp_path / "in.mp4", encode(30))
    with MediaWorker(ENCODE, LIMITS) as worker:
        worker.transcode(video, tmp_path / "out.mp4")
        for child in psutil.Process().children():
            if "pipeline.media_worker" in child.cmdline():
                child.kill()
        assert worker.transcode(video, tmp_path / "out.mp4").num_frames == 30


def test_children_die_with_their_parent_and_inherit_no_secret(tmp_path: Path, slow_video: Path) -> None:
    code = """
import sys
from pathlib import Path
from pipeline.media_worker import MediaWorker
from pipeline.options import EncodeOptions, LimitOptions
with MediaWorker(EncodeOptions(preset="veryslow"), LimitOptions()) as worker:
    worker.transcode(Path(sys.argv[1]), Path(sys.argv[2]))
"""
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "hunter2"}
    driver = subprocess.Popen([sys.executable, "-c", code, str(slow_video), str(tmp_path / "out.mp4")], env=environment)
    deadline = time.monotonic() + 30
    while len(family := psutil.Process(driver.pid).children(recursive=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(family) == 2  # the child, and its fork for this video
    assert not any("hunter2" in child.environ().values() for child in family)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
