"""Promise 2: randomness is keyed, and the clip of a position is known before a byte is read."""

import itertools
import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import keyed
from pipeline.keyed import ClipParameters, Purpose, clip_frames, clip_parameters
from pipeline.options import AugmentOptions, ClipOptions

WORDS = st.integers(0, 2**64 - 1)
MASK = 2**64 - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x64-10 as published, written independently with Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & MASK, (a >> 64) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


def test_the_reference_is_philox() -> None:
    """The authors' known answers for zeros and for ones."""
    assert philox([0] * 4, [0] * 2) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox([MASK] * 4, [MASK] * 2) == [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]


@settings(deadline=None)
@given(seed=WORDS, position=WORDS, purpose=st.sampled_from(Purpose), view=WORDS, count=st.integers(1, 13))
def test_words_are_philox_under_the_key(seed: int, position: int, purpose: Purpose, view: int, count: int) -> None:
    blocks = [philox([block, purpose, view, 0], [seed, position]) for block in range(1, 5)]
    assert keyed.words(seed, position, purpose, view, count=count) == list(itertools.chain.from_iterable(blocks))[:count]


def test_threads_do_not_disturb_each_other() -> None:
    expected = [keyed.words(1, position, Purpose.CROP, count=9) for position in range(300)]
    wrong: list[int] = []

    def draw() -> None:
        wrong.extend(position for position in range(300) if keyed.words(1, position, Purpose.CROP, count=9) != expected[position])

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_golden_values() -> None:
    """Resumed runs depend on these: they change only together with KEYED_VERSION."""
    assert keyed.KEYED_VERSION == 1
    assert [drawn(sampling).as_lists() for sampling in ("dense", "segment", "uniform")] == [
        {"frames": [80, 84, 88, 92], "roi": [33.0, 83.0, 227.0, 335.0], "flip": True},
        {"frames": [23, 45, 58, 85], "roi": [33.0, 83.0, 227.0, 335.0], "flip": True},
        {"frames": [0, 33, 66, 99], "roi": [33.0, 83.0, 227.0, 335.0], "flip": True},
    ]
    assert [keyed.substitute(3, 11, attempt, 1000) for attempt in range(4)] == [26, 547, 56, 801]


def drawn(sampling: str, **change: object) -> ClipParameters:
    values: dict = {"num_frames": 100, "fps": 25.0, "width": 340, "height": 256, "augment": AugmentOptions(), "training": True}
    clip = ClipOptions(num_frames=4, sampling=sampling)  # type: ignore[arg-type]
    return clip_parameters(3, 11, clip=clip, **{**values, **change})


@settings(deadline=None)
@given(word=WORDS, bound=st.integers(1, 2**40))
def test_numbers_are_in_range(word: int, bound: int) -> None:
    assert 0 <= keyed.to_int(word, bound) < bound
    assert 0 <= keyed.to_float(word) < 1
    assert keyed.to_int(MASK, bound) == bound - 1
    assert keyed.to_int(0, bound) == 0


def test_numbers_are_uniform() -> None:
    values = [keyed.to_int(keyed.words(5, position, Purpose.FRAMES, count=1)[0], 7) for position in range(14_000)]
    counts = np.bincount(values, minlength=7)
    assert ((counts - 2000) ** 2 / 2000).sum() < 6 + 6 * np.sqrt(12)


@settings(deadline=None)
@given(
    seed=WORDS,
    position=WORDS,
    num_frames=st.integers(1, 400),
    fps=st.floats(1, 240),
    length=st.integers(1, 40),
    sampling=st.sampled_from(["dense", "segment", "uniform"]),
    stride=st.integers(1, 20),
    stride_s=st.none() | st.floats(0.01, 5),
    training=st.booleans(),
)
def test_frames_are_ascending_frames_of_the_video(
    seed: int, position: int, num_frames: int, fps: float, length: int, sampling: str, stride: int, stride_s: float | None, training: bool
) -> None:
    clip = ClipOptions(num_frames=length, sampling=sampling, stride=stride, stride_s=stride_s)  # type: ignore[arg-type]
    frames = clip_frames(num_frames, fps, clip, key=(seed, position) if training else None)
    assert frames.shape == (length,)
    assert frames.dtype == np.int32
    assert frames.min() >= 0
    assert frames.max() < num_frames
    assert (np.diff(frames) >= 0).all()


@pytest.mark.parametrize(
    ("num_frames", "clip", "expected"),
    [
        (100, ClipOptions(num_frames=4, stride=4), [43, 47, 51, 55]),  # the middle of 88 starts
        (13, ClipOptions(num_frames=4, stride=4), [0, 4, 8, 12]),  # just fits
        (12, ClipOptions(num_frames=4, stride=4), [0, 4, 8, 11]),  # one frame short: the last repeats
        (1, ClipOptions(num_frames=4, stride=4), [0, 0, 0, 0]),
        (100, ClipOptions(num_frames=3, stride_s=0.1), [47, 50, 52]),  # 2.5 frames apart at 25 fps, rounded half up
        (9, ClipOptions(num_frames=4, sampling="segment"), [1, 3, 5, 7]),  # s = 2: middles of [0,2] [2,4] [4,6] [6,8]
        (1, ClipOptions(num_frames=3, sampling="segment"), [0, 0, 0]),
        (9, ClipOptions(num_frames=3, sampling="uniform"), [0, 4, 8]),
        (2, ClipOptions(num_frames=4, sampling="uniform"), [0, 0, 1, 1]),
        (9, ClipOptions(num_frames=1, sampling="uniform"), [4]),
    ],
)
def test_evaluation_frames(num_frames: int, clip: ClipOptions, expected: list[int]) -> None:
    assert clip_frames(num_frames, 25.0, clip, key=None).tolist() == expected


def test_training_frames_reach_every_start_and_every_place_of_a_segment() -> None:
    dense = {tuple(clip_frames(15, 25.0, ClipOptions(num_frames=4), key=(1, position)).tolist()) for position in range(200)}
    assert dense == {(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14)}
    segments = np.array(
        [clip_frames(9, 25.0, ClipOptions(num_frames=4, sampling="segment"), key=(1, position)).tolist() for position in range(400)]
    )
    assert [set(column) for column in segments.T.tolist()] == [{0, 1, 2}, {2, 3, 4}, {4, 5, 6}, {6, 7, 8}]


@settings(deadline=None)
@given(seed=WORDS, position=WORDS, height=st.integers(8, 2000), width=st.integers(8, 2000))
def test_crops_are_inside_and_exact_in_float32(seed: int, position: int, height: int, width: int) -> None:
    (y0, x0, y1, x1), _ = keyed.crop_parameters(height, width, AugmentOptions(), seed=seed, position=position)
    assert 0 <= y0 < y1 <= height
    assert 0 <= x0 < x1 <= width
    assert all(float(np.float32(edge)) == edge for edge in (y0, x0, y1, x1))


def test_crops_have_the_area_and_aspect_asked_for() -> None:
    rois = np.array([keyed.crop_parameters(256, 340, AugmentOptions(area=(0.3, 0.6)), seed=1, position=i)[0] for i in range(500)])
    height, width = rois[:, 2] - rois[:, 0], rois[:, 3] - rois[:, 1]
    area, aspect = height * width / (256 * 340), width / height
    assert area.min() > 0.29
    assert area.max() < 0.61
    assert 0.4 < area.mean() < 0.5
    assert aspect.min() > 0.74
    assert aspect.max() < 1.35


def test_a_frame_that_no_box_fits_gives_the_largest_centred_one() -> None:
    roi, _ = keyed.crop_parameters(16, 400, AugmentOptions(area=(1, 1), aspect=(1, 1)), seed=1, position=1)
    assert roi == (0, 192, 16, 208)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 200), (0.5, 100)])
def test_flips(probability: float, expected: int) -> None:
    flips = sum(keyed.crop_parameters(64, 64, AugmentOptions(flip=probability), seed=1, position=i)[1] for i in range(200))
    assert abs(flips - expected) <= (40 if probability == 0.5 else 0)


@pytest.mark.parametrize(
    ("height", "width", "options", "roi"),
    [
        (240, 320, AugmentOptions(size=224), (0, 40, 240, 280)),
        (320, 240, AugmentOptions(size=224), (40, 0, 280, 240)),
        (256, 340, AugmentOptions(size=224, eval_resize=256), (16, 58, 240, 282)),
    ],
)
def test_evaluation_crops_the_centre(height: int, width: int, options: AugmentOptions, roi: tuple[float, ...]) -> None:
    assert keyed.centre_crop(height, width, options) == roi


def test_views_share_frames_but_not_crops() -> None:
    first, second = drawn("dense"), drawn("dense", view=1)
    assert first.frames.tolist() == second.frames.tolist()
    assert first.roi != second.roi


def test_parameters_are_plain_lists() -> None:
    values = json.loads(json.dumps(drawn("dense").as_lists()))
    assert values == drawn("dense").as_lists()


def test_an_empty_item_is_refused() -> None:
    with pytest.raises(ValueError, match="num_frames"):
        drawn("dense", num_frames=0)
