"""Videos inside a page: the bytes of the shard where they are small, a smaller cut where they are not, never more than the limits."""

import base64
import io
from pathlib import Path
from types import ModuleType

import av
import pytest

from jobs import inline_video
from pipeline.index import Dataset
from pipeline.reader import read


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, whose limits a test may lower."""
    for name in ("MAX_VIDEO_BYTES", "MAX_PAGE_BYTES", "MAX_FRAMES", "SHORT_SIDE"):
        monkeypatch.setattr(inline_video, name, getattr(inline_video, name))
    return inline_video


def bytes_of(video: inline_video.InlineVideo) -> bytes:
    return base64.b64decode(video.uri.removeprefix("data:video/mp4;base64,"))


def test_a_small_video_is_the_bytes_of_its_shard(motion_dataset: Path) -> None:
    dataset = Dataset.open(motion_dataset)
    found = inline_video.inline_videos(dataset, [3, 1, 2], num=2)
    assert list(found) == [3, 1]
    for row, video in found.items():
        item = dataset.item(row)
        assert bytes_of(video) == read(dataset, item)
        assert (video.width, video.height) == (item.width, item.height)


def test_a_large_video_is_cut(motion_dataset: Path, limits: ModuleType) -> None:
    dataset = Dataset.open(motion_dataset)
    item = dataset.item(0)
    limits.MAX_VIDEO_BYTES, limits.MAX_FRAMES, limits.SHORT_SIDE = item.size - 1, 10, 48
    video = inline_video.inline_videos(dataset, [0], num=1)[0]
    assert len(bytes_of(video)) < item.size
    with av.open(io.BytesIO(bytes_of(video))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert 1 < len(frames) <= 10
    factor = min(item.width, item.height) // 48
    assert frames[0].shape == (video.height, video.width, 3) == (item.height // factor, item.width // factor, 3)


def test_a_window_shows_its_own_frames_only(motion_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    dataset = Dataset.open(motion_dataset)
    item = dataset.item(0)
    monkeypatch.setattr(dataset, "item", lambda row: replace(item, begin=5, end=12))
    video = inline_video.inline_videos(dataset, [0], num=1)[0]
    with av.open(io.BytesIO(bytes_of(video))) as container:
        assert sum(1 for _ in container.decode(video=0)) == 7


def test_what_does_not_fit_or_cannot_be_read_is_left_out(motion_dataset: Path, limits: ModuleType, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(motion_dataset, tmp_path / "dataset")
    dataset = Dataset.open(tmp_path / "dataset")
    item = dataset.item(0)
    with (dataset.root / item.shard_file).open("r+b") as file:
        file.seek(item.offset + item.size // 2)
        file.write(b"damage")
    assert list(inline_video.inline_videos(dataset, [0, 1], num=2)) == [1]
    limits.MAX_PAGE_BYTES = dataset.item(1).size + dataset.item(2).size
    shown = inline_video.inline_videos(dataset, range(1, 20), num=20)
    assert 1 <= len(shown) < 19
    assert sum(len(bytes_of(video)) for video in shown.values()) <= limits.MAX_PAGE_BYTES
