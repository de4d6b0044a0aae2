"""Segments of a long video show exactly the frames that they should, pixel by pixel."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import software_decode
from pipeline.media import write_video
from pipeline.options import EncodeOptions
from pipeline.segments import cut, cut_evenly, even_windows
from tests.pipeline.numbered import HEIGHT, WIDTH, number_image, read_number

GOP = 8


def decoded(path: Path, num_frames: int) -> npt.NDArray[np.uint8]:
    out = np.empty((num_frames, HEIGHT, WIDTH, 3), dtype=np.uint8)
    software_decode.decode(path.read_bytes(), np.arange(num_frames, dtype=np.int32), out, key="x", shard="y")
    return out


@pytest.mark.parametrize("num_frames", [5, 8, 32, 64, 75, 96])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_segments_hold_the_frames_that_they_say(tmp_path: Path, num_frames: int, num_groups: int) -> None:
    source, step = tmp_path / "source.mp4", num_groups * GOP
    write_video(source, (number_image(i) for i in range(num_frames)), 25.0, EncodeOptions(gop=GOP, tune="film"))  # with B-frames
    whole = decoded(source, num_frames)
    seen = set()
    for number, path in enumerate(cut(source, tmp_path / "segment.mp4", num_groups)):
        begin, end = number * step, min((number + 2) * step, num_frames)
        frames = decoded(path, end - begin)
        assert np.array_equal(frames, whole[begin:end])
        assert [read_number(frame) for frame in frames] == list(range(begin, end))
        seen |= {(first, first + step) for first in range(begin, end - step + 1)}
    for first in range(max(0, num_frames - step) + 1 if num_frames >= step else 0):
        assert (first, first + step) in seen  # every stretch of `step` frames lies whole within a segment


@given(num_groups=st.integers(1, 400), max_groups=st.integers(1, 50))
def test_windows_are_few_and_equal(num_groups: int, max_groups: int) -> None:
    sizes = even_windows(num_groups, max_groups)
    assert sum(sizes) == num_groups
    assert len(sizes) == -(-num_groups // max_groups)  # fewer cannot hold it
    assert 1 <= min(sizes) <= max(sizes) <= min(max_groups, min(sizes) + 1)


@pytest.mark.parametrize(
    ("num_frames", "max_groups", "lengths"), [(75, 3, [16, 16, 24, 19]), (64, 4, [32, 32]), (5, 1, [5]), (9, 1, [8, 1])]
)
def test_windows_hold_every_frame_once(tmp_path: Path, num_frames: int, max_groups: int, lengths: list[int]) -> None:
    source, window = tmp_path / "source.mp4", tmp_path / "window.mp4"
    write_video(source, (number_image(i) for i in range(num_frames)), 25.0, EncodeOptions(gop=GOP, tune="film"))
    whole, begin = decoded(source, num_frames), 0
    for length, expected in zip(cut_evenly(source, window, max_groups), lengths, strict=True):
        assert length == expected
        assert np.array_equal(decoded(window, length), whole[begin : begin + length])
        begin += length
    assert begin == num_frames
