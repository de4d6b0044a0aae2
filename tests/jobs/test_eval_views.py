"""Which frames and which squares the views of an evaluation are, and that every rank's share of them adds up to all, once."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.index import Dataset
from pipeline.keyed import MIDDLE, View, clip_frames, eval_views, view_crop, view_parameters
from pipeline.options import AugmentOptions, ClipOptions
from pipeline.requests import eval_requests

CLIP, AUGMENT = ClipOptions(num_frames=4, stride=3), AugmentOptions(size=32)


def frames_of(num_frames: int, clip: ClipOptions, num_clips: int) -> list[list[int]]:
    views = eval_views(num_clips, 1, False)
    return [clip_frames(num_frames, 25.0, clip, key=None, view=view).tolist() for view in views]


def test_dense_clips_start_evenly_from_the_first_to_the_last_that_fits() -> None:
    assert frames_of(30, CLIP, 3) == [[0, 3, 6, 9], [10, 13, 16, 19], [20, 23, 26, 29]]
    assert frames_of(30, CLIP, 1) == [[10, 13, 16, 19]]
    assert frames_of(10, CLIP, 2) == [[0, 3, 6, 9]] * 2  # only one fits
    assert frames_of(5, CLIP, 2) == [[0, 3, 4, 4]] * 2  # not even one


def test_segment_clips_are_shifted_within_the_segments() -> None:
    clip = ClipOptions(num_frames=4, sampling="segment")
    assert frames_of(33, clip, 1) == [[4, 12, 20, 28]]  # the middles of [0, 8), [8, 16), [16, 24), [24, 32)
    assert frames_of(33, clip, 2) == [[2, 10, 18, 26], [6, 14, 22, 30]]
    assert frames_of(33, clip, 4) == [[1, 9, 17, 25], [3, 11, 19, 27], [5, 13, 21, 29], [7, 15, 23, 31]]


@given(
    num_frames=st.integers(1, 400),
    length=st.integers(1, 32),
    num_clips=st.integers(1, 12),
    sampling=st.sampled_from(["dense", "segment"]),
)
def test_frames_are_in_the_video_and_clips_in_order(num_frames: int, length: int, num_clips: int, sampling: str) -> None:
    clips = frames_of(num_frames, ClipOptions(num_frames=length, sampling=sampling), num_clips)  # type: ignore[arg-type]
    for frames in clips:
        assert frames == sorted(frames)
        assert 0 <= frames[0] <= frames[-1] < num_frames
    assert all(earlier <= later for one, two in itertools.pairwise(clips) for earlier, later in zip(one, two, strict=True))
    if num_clips % 2:  # the middle clip is the one that a single clip is, but for rounding
        middle = frames_of(num_frames, ClipOptions(num_frames=length, sampling=sampling), 1)[0]  # type: ignore[arg-type]
        assert all(abs(a - b) <= 1 for a, b in zip(clips[num_clips // 2], middle, strict=True))


@pytest.mark.parametrize(
    ("height", "width", "boxes"),
    [
        (32, 64, [(0, 0, 32, 32), (0, 16, 32, 48), (0, 32, 32, 64)]),
        (64, 32, [(0, 0, 32, 32), (16, 0, 48, 32), (32, 0, 64, 32)]),
        (32, 32, [(0, 0, 32, 32)] * 3),
    ],
)
def test_crops_lie_along_the_longer_side(height: int, width: int, boxes: list[tuple[float, ...]]) -> None:
    assert [view_crop(height, width, AUGMENT, view) for view in eval_views(1, 3, False)] == boxes
    assert view_crop(height, width, AUGMENT, MIDDLE) == boxes[1]


def test_crops_of_a_larger_resize_are_centred_across() -> None:
    augment = AugmentOptions(size=32, eval_resize=64)
    assert [view_crop(64, 96, augment, view) for view in eval_views(1, 3, False)] == [(16, 0, 48, 32), (16, 32, 48, 64), (16, 64, 48, 96)]


def test_all_views_of_a_video() -> None:
    views = eval_views(2, 3, True)
    assert len(views) == len(set(views)) == 12
    assert eval_views(1, 1, False) == [MIDDLE] == [View()]
    size = {"num_frames": 30, "fps": 25.0, "width": 64, "height": 32, "clip": CLIP, "augment": AUGMENT}
    seen = {str(view_parameters(view, **size).as_lists()) for view in views}
    assert len(seen) == 12


@given(
    num_items=st.integers(0, 12),
    num_clips=st.integers(1, 3),
    micro_batch=st.integers(1, 7),
    world_size=st.integers(1, 5),
    skip=st.sets(st.integers(0, 9)),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_view_is_evaluated_once(
    motion_dataset: Path, num_items: int, num_clips: int, micro_batch: int, world_size: int, skip: set[int]
) -> None:
    dataset, views = Dataset.open(motion_dataset), eval_views(num_clips, 3, True)
    rows = np.arange(num_items, dtype=np.uint32)[::-1]
    common = {"micro_batch": micro_batch, "world_size": world_size, "clip": CLIP, "augment": AUGMENT, "views": views, "skip": skip}
    ranks = [list(eval_requests(dataset, rows, rank=rank, **common)) for rank in range(world_size)]
    assert len({len(requests) for requests in ranks}) == 1
    seen = {}
    for request in itertools.chain.from_iterable(ranks):
        for slot in np.flatnonzero(request.valid).tolist():
            position = int(request.positions[slot])
            assert position not in seen
            seen[position] = (int(request.rows[slot]), request.parameters[slot].flip)
    assert sorted(seen) == [p for p in range(num_items * len(views)) if p // micro_batch not in skip]
    for position, (row, flip) in seen.items():
        item, view = divmod(position, len(views))
        assert (row, flip) == (rows[item], views[view].flip)
