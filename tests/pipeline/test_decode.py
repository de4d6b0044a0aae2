"""Software decoding delivers exactly the frames that were asked for, in the colours that the stream is tagged with, or an error."""

import io
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import DecodeError
from pipeline.software_decode import decode
from tests.pipeline.numbered import H264, HEIGHT, MJPEG, VP9, WIDTH, Stream, encode, read_number

NUM_FRAMES = 100
STREAMS = {
    "h264 closed GOP 32, 2 B-frames": H264,
    "h264 one GOP, 3 B-frames, pyramid": Stream(options={"preset": "medium", "bf": "3", "g": "250", "crf": "20", "threads": "1"}),
    "h264 open GOP": Stream(options={"preset": "medium", "bf": "3", "g": "12", "x264-params": "open-gop=1:scenecut=0", "threads": "1"}),
    "h264 intra": Stream(options={"preset": "ultrafast", "g": "1", "threads": "1"}),
    "h264 variable frame rate": Stream(options={**H264.options, "g": "10"}, times=[i + i * i // 9 for i in range(NUM_FRAMES)]),
    "h264 in matroska": Stream(container="matroska", options=H264.options),
    "vp9": VP9,
    "mjpeg": MJPEG,
}
PATTERNS = {
    "first": [0],
    "last": [99],
    "odd start, stride 4": [33, 37, 41, 45, 49, 53, 57, 61],
    "all": list(range(NUM_FRAMES)),
    "unsorted and repeated": [70, 3, 3, 98, 31, 32, 70, 0, 33],
    "last, repeated": [97, 98, 99, 99, 99],
    "far apart": [2, 50, 96],
}
CACHE: dict[str, bytes] = {}


def video(name: str) -> bytes:
    if name not in CACHE:
        CACHE[name] = encode(NUM_FRAMES, STREAMS[name])
    return CACHE[name]


def decoded(data: bytes, frames: list[int], height: int = HEIGHT, width: int = WIDTH, **limits: int) -> npt.NDArray[np.uint8]:
    out = np.full((len(frames), height, width, 3), 77, dtype=np.uint8)
    decode(data, np.array(frames, dtype=np.int32), out, key="k", shard="s", **limits)
    return out


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("name", STREAMS)
def test_frames_are_exact(name: str, pattern: list[int]) -> None:
    assert [read_number(image) for image in decoded(video(name), pattern)] == pattern


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(STREAMS)), frames=st.lists(st.integers(0, NUM_FRAMES - 1), min_size=1, max_size=12))
def test_any_frames_in_any_order(name: str, frames: list[int]) -> None:
    assert [read_number(image) for image in decoded(video(name), frames)] == frames


@pytest.mark.parametrize("name", STREAMS)
def test_pixels_are_those_of_a_plain_full_decode(name: str) -> None:
    with av.open(io.BytesIO(video(name))) as container:
        plain = np.stack([frame.to_ndarray(format="rgb24", dst_color_range="JPEG") for frame in container.decode(video=0)])
    frames = [5, 64, 64, 99, 13]
    assert np.array_equal(decoded(video(name), frames), plain[frames])


@pytest.mark.parametrize("num_frames", [1, 2, 3])
@pytest.mark.parametrize("stream", [H264, VP9, MJPEG], ids=["h264", "vp9", "mjpeg"])
def test_short_videos(stream: Stream, num_frames: int) -> None:
    wanted = [num_frames - 1, 0, num_frames - 1]
    assert [read_number(image) for image in decoded(encode(num_frames, stream), wanted)] == wanted


def test_the_buffer_may_be_used_again_and_the_size_be_odd() -> None:
    data = encode(5, width=102, height=70)
    out = np.zeros((2, 70, 102, 3), dtype=np.uint8)
    for frames in ([0, 4], [3, 3]):
        decode(data, np.array(frames, dtype=np.int32), out, key="k", shard="s")
        assert [read_number(image) for image in out] == frames


BT709, BT601, FULL, LIMITED = 1, 6, 2, 1  # FFmpeg's AVColorSpace and AVColorRange


@pytest.mark.parametrize(
    ("matrix", "colour_range", "luma", "expected"),
    [
        (BT709, LIMITED, (235, 128, 128), (255, 255, 255)),
        (BT709, LIMITED, (16, 128, 128), (0, 0, 0)),
        (BT709, FULL, (235, 128, 128), (235, 235, 235)),
        (BT601, FULL, (16, 128, 128), (16, 16, 16)),
        (BT709, LIMITED, (120, 90, 200), (250, 95, 41)),
        (BT601, LIMITED, (120, 90, 200), (236, 77, 45)),
    ],
)
def test_colours_follow_the_tags(matrix: int, colour_range: int, luma: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    """Expected values are the standards' formulas; a rounding of a few levels is allowed."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1", "preset": "ultrafast"})
        stream.width = stream.height = 64
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, colour_range
        frame = av.VideoFrame(64, 64, "yuv420p")
        frame.colorspace, frame.color_range = matrix, colour_range
        for plane, value in zip(frame.planes, luma, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    got = decoded(file.getvalue(), [0], 64, 64)[0, 30, 30].astype(int)
    assert np.abs(got - expected).max() <= 5


def test_a_frame_beyond_the_end() -> None:
    with pytest.raises(DecodeError, match=r"100 frames, frame 100 was asked for \(video 'k' in s\)"):
        decoded(video("mjpeg"), [0, 100])


def test_another_size_than_the_index_says() -> None:
    with pytest.raises(DecodeError, match="is 96x64 pixels, the index says 64x64"):
        decoded(video("mjpeg"), [0], 64, 64)


def test_too_many_pixels() -> None:
    with pytest.raises(DecodeError):
        decoded(video("mjpeg"), [0], max_pixels=WIDTH * HEIGHT - 1)


@pytest.mark.parametrize("data", [b"", b"no video at all", b"\0" * 5000, b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"])
def test_what_is_no_video(data: bytes) -> None:
    with pytest.raises(DecodeError, match="'k' in s"):
        decoded(data, [0])


def test_sound_alone() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DecodeError, match="no video stream"):
        decoded(file.getvalue(), [0])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("name", ["h264 closed GOP 32, 2 B-frames", "h264 in matroska", "vp9", "mjpeg"])
def test_cut_videos_are_refused_or_right(name: str, share: float) -> None:
    data = video(name)[: int(len(video(name)) * share)]
    for frame in (0, 50, 99):
        try:
            images = decoded(data, [frame])
        except DecodeError:
            continue
        assert read_number(images[0]) == frame


def test_a_zeroed_part_is_refused_or_right() -> None:
    """The checksum finds it before; this is what is left when the damage was there at build time."""
    data = bytearray(video("h264 closed GOP 32, 2 B-frames"))
    start, end = data.index(b"mdat"), data.index(b"moov")
    middle = start + (end - start) // 2
    data[middle : middle + 100] = bytes(100)
    refused = 0
    for frame in range(NUM_FRAMES):
        try:
            assert read_number(decoded(bytes(data), [frame])[0]) == frame
        except DecodeError:
            refused += 1
    assert 0 < refused <= 32  # at most one group of pictures


def plain_frames(path: Path) -> npt.NDArray[np.uint8] | None:
    """Up to 90 frames by a plain full decode; None for files that have none, are damaged, change their size or are large."""
    frames = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0) if container.streams.video else ():
                if frame.is_corrupt or frame.width * frame.height > 1280 * 720:
                    return None
                frames.append(frame.to_ndarray(format="rgb24", dst_color_range="JPEG"))
    except av.FFmpegError:
        return None
    return np.stack(frames[:90]) if frames and len({frame.shape for frame in frames}) == 1 else None


def test_real_videos(test_data: Path) -> None:
    """Every third frame, backwards, of real files of many codecs equals a plain full decode of the file."""
    equal, refused = [], []
    for path in sorted([*(test_data / "codec_zoo").rglob("*.mp4"), *(test_data / "codec_zoo").rglob("*.webm")]):
        plain = plain_frames(path) if path.stat().st_size < 500_000 else None
        if plain is None:
            continue
        frames = list(range(len(plain)))[::-3]
        try:
            images = decoded(path.read_bytes(), frames, *plain.shape[1:3])
        except DecodeError as error:
            refused.append(f"{path.name}: {error}")
            continue
        assert np.array_equal(images, plain[frames]), path.name
        equal.append(path.name)
    assert len(equal) >= 10, refused
