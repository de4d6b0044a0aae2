"""Frames that nothing refers to are left out where nobody wants them, and no other pixel changes; base frames are known beforehand."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from av.video.frame import PictureType
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import h264
from pipeline.errors import DatasetError
from pipeline.keyed import View, clip_frames
from pipeline.media import write_video
from pipeline.options import AugmentOptions, ClipOptions, EncodeOptions
from pipeline.requests import Planner
from pipeline.software_decode import decode
from tests.pipeline.numbered import Video, encode, number_image, write_dataset

GOP = 16
LENGTHS = (1, 2, 3, 5, 31, 67)
X264 = {
    "stock": "",
    "GOP 32, 2 B-frames": "keyint=32:min-keyint=32:scenecut=0:open-gop=0:bframes=2",
    "open GOP, pyramid": "keyint=12:scenecut=0:open-gop=1:bframes=3:b-pyramid=normal",
    "many references": f"keyint={GOP}:scenecut=0:bframes=8:b-adapt=2:ref=8:direct=temporal:weightb=1",
    **{f"layered, phase {phase}": f"keyint={GOP}:scenecut=0:open-gop=0:bframes=3:b-adapt=0:b-pyramid=none" for phase in range(4)},
}
OURS = {"ours": EncodeOptions(gop=GOP), "ours, layered": EncodeOptions(gop=GOP, form="layered")}
Frames = npt.NDArray[np.uint8]
CACHE: dict[tuple[str, int], tuple[bytes, Frames]] = {}


def images(num_frames: int) -> list[Frames]:
    """Numbers on a background that moves, so that motion vectors and residuals are needed."""
    noise = np.random.default_rng(0).integers(0, 90, (64, 256, 3), dtype=np.uint8).repeat(2, 0)[:64]
    return [number_image(i) // 2 + noise[:, i % 160 : i % 160 + 96] for i in range(num_frames)]


def film(form: str, num_frames: int, folder: Path) -> tuple[bytes, Frames]:
    """A video of a form and all its frames, decoded plainly: (T, H, W, 3)."""
    if (form, num_frames) not in CACHE:
        path = folder / "video.mp4"
        if form in OURS:
            write_video(path, images(num_frames), 25.0, OURS[form])
        else:
            write_x264(path, images(num_frames), X264[form], int(form[-1]) if form.startswith("layered") else None)
        with av.open(str(path)) as container:
            plain = np.stack([frame.to_ndarray(format="rgb24", dst_color_range="JPEG") for frame in container.decode(video=0)])
        assert len(plain) == num_frames
        CACHE[form, num_frames] = path.read_bytes(), plain
    return CACHE[form, num_frames]


def write_x264(path: Path, frames: list[Frames], options: str, phase: int | None) -> None:
    """phase: each frame i with i mod 4 = phase is a reference, a GOP's first frame too, the others are not; None: as x264 has it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "threads": "1", "x264-params": options})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            if phase is not None and i % GOP:
                frame.pict_type = PictureType.P if i % 4 == phase or i % GOP == GOP - 1 or i == len(frames) - 1 else PictureType.B
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layered")


def decoded(data: bytes, frames: list[int]) -> Frames:
    out = np.empty((len(frames), 64, 96, 3), dtype=np.uint8)
    decode(data, np.array(frames, dtype=np.int32), out, key="k", shard="s")
    return out


@pytest.mark.parametrize("form", [*X264, *OURS])
@settings(deadline=None, max_examples=40)
@given(draw=st.data())
def test_any_frames_of_any_form_are_those_of_a_plain_decode(form: str, folder: Path, draw: st.DataObject) -> None:
    num_frames = draw.draw(st.sampled_from(LENGTHS))
    data, plain = film(form, num_frames, folder)
    one = st.integers(0, num_frames - 1)
    strided = st.tuples(one, st.integers(1, 8)).map(lambda pair: list(range(pair[0], num_frames, pair[1])))
    frames = draw.draw(st.one_of(st.lists(one, min_size=1, max_size=9), strided))
    assert np.array_equal(decoded(data, frames), plain[frames])


def droppable(data: bytes) -> dict[int, bool]:
    """Shown frame -> whether no other refers to it."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        size = h264.length_size(stream.codec_context.extradata)
        packets = [packet for packet in container.demux(stream) if packet.size]
    order = sorted(packet.pts for packet in packets if packet.pts is not None)
    return {order.index(packet.pts): h264.is_droppable(memoryview(packet), size) for packet in packets if packet.pts is not None}


@pytest.mark.parametrize("preset", ["ultrafast", "veryfast", "slow"])
@pytest.mark.parametrize("tune", ["fastdecode", "film"])
def test_the_base_layer_is_every_fourth_frame(preset: str, tune: str, tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    write_video(path, images(67), 25.0, EncodeOptions(gop=GOP, preset=preset, tune=tune, form="layered"))
    expected = {i: not (i % 4 == 0 or i % GOP == GOP - 1 or i == 66) for i in range(67)}
    assert droppable(path.read_bytes()) == expected


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([0x01], True),  # a slice, nal_ref_idc 0
        ([0x06, 0x01, 0x01], True),  # SEI and two slices
        ([0x01, 0x41], False),  # the second slice is of a reference
        ([0x07, 0x01], False),  # brings a parameter set
        ([0x02], False),  # a data partition
        ([0x06], False),  # no picture at all
        ([], False),
    ],
)
def test_what_may_be_left_out(units: list[int], expected: bool) -> None:
    packet = b"".join((2).to_bytes(4, "big") + bytes([header, 0]) for header in units)
    assert h264.is_droppable(memoryview(packet), 4) == expected


def test_only_packets_with_lengths_are_looked_into() -> None:
    assert h264.length_size(bytes.fromhex("0164000dffe100")) == 4
    assert h264.length_size(bytes.fromhex("0164000dfde100")) == 2
    assert [h264.length_size(data) for data in (None, b"", b"\0\0\0\1\x67\x64\0\x0d", b"\0\0\1\x67\x64\0\x0d")] == [0] * 4


@settings(deadline=None, max_examples=150)
@given(
    num_frames=st.integers(1, 400),
    begin=st.integers(0, 9),
    stride=st.sampled_from([4, 8, 12]),
    length=st.integers(1, 20),
    p=st.integers(0, 99),
)
def test_clips_of_base_frames(num_frames: int, begin: int, stride: int, length: int, p: int) -> None:
    base = ClipOptions(num_frames=length, stride=stride, starts="base")
    views = [View(clip=clip, num_clips=3) for clip in range(3)]
    clips = [clip_frames(num_frames, 25.0, base, key=(0, p), begin=begin)]
    clips += [clip_frames(num_frames, 25.0, base, key=None, view=view, begin=begin) for view in views]
    starts = range(max(1, num_frames - (length - 1) * stride))
    possible = [start for start in starts if (begin + start) % 4 == 0]
    for frames in clips:
        assert frames[0] in (possible or starts)
        assert frames.tolist() == [min(frames[0] + i * stride, num_frames - 1) for i in range(length)]
    assert clips[1][0] == min(possible or starts)
    assert clips[3][0] == max(possible or starts)


def test_every_base_start_is_drawn() -> None:
    clip = ClipOptions(num_frames=4, stride=4, starts="base")
    drawn = {int(clip_frames(40, 25.0, clip, key=(1, position), begin=2)[0]) for position in range(300)}
    assert drawn == {2, 6, 10, 14, 18, 22, 26}


def test_base_frames_need_a_layered_dataset(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "plain", [Video(data=encode(8), num_frames=8)])
    with pytest.raises(DatasetError, match=r"data\.encode\.form=layered"):
        Planner(dataset, ClipOptions(starts="base"), AugmentOptions())


@pytest.mark.parametrize(
    "options", [{"sampling": "segment"}, {"sampling": "uniform"}, {"stride": 2}, {"stride": 6}, {"stride_s": 0.5}], ids=str
)
def test_base_frames_are_for_dense_clips_by_multiples_of_four(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="starts: got 'base'"):
        ClipOptions(starts="base", **options)  # type: ignore[arg-type]


def test_a_layered_gop_is_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="gop: got 30, expected a multiple of 4"):
        EncodeOptions(gop=30, form="layered")


@pytest.mark.parametrize("phase", range(4))
def test_the_phases_above_are_what_they_are_called(phase: int, folder: Path) -> None:
    """Of a video of any phase, what a clip at its phase does not need can be left out."""
    found = droppable(film(f"layered, phase {phase}", 67, folder)[0])
    assert found == {i: i % GOP not in (0, GOP - 1) and i % 4 != phase and i != 66 for i in range(67)}
