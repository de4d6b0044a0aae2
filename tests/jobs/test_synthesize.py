"""The demo's videos: the same bytes again, nothing half-written, and a class that no single frame can tell."""

import csv
import itertools
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.synthesize import CLASSES, FPS, MANIFEST, NUM_FRAMES, SIZE, film, make_scene, pose, synthesize

CHANCE = 1 / len(CLASSES)
Frames = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "videos"
    synthesize(out, num_clips=18, seed=7)
    return out


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decode(path: Path) -> Frames:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_every_scene_has_every_class_and_is_whole_in_one_split(videos: Path) -> None:
    whole = [row for row in rows(videos) if "truncated" not in row["path"]]
    assert len(whole) == 18
    groups = defaultdict(list)
    for row in whole:
        assert row["path"].startswith(f"{row['label']}/")
        assert (videos / row["path"]).is_file()
        groups[row["group"]].append(row)
    assert all(sorted(row["label"] for row in group) == sorted(CLASSES) for group in groups.values())
    assert sorted(next(iter({row["split"] for row in group})) for group in groups.values()) == ["train", "train", "val"]
    assert all(len({row["split"] for row in group}) == 1 for group in groups.values())


def test_videos_decode_to_what_was_drawn(videos: Path) -> None:
    for motion in CLASSES:
        path = videos / motion / "scene_002.mp4"
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            assert float(container.streams.video[0].average_rate or 0) == FPS
        drawn = np.stack(list(film(make_scene(7, 2), motion)))
        got = decode(path)
        assert got.shape == (NUM_FRAMES, SIZE, SIZE, 3)
        assert np.abs(got.astype(np.int16) - drawn).mean() < 6


def test_the_truncated_video_is_listed_and_does_not_decode_whole(videos: Path) -> None:
    broken = [row for row in rows(videos) if "truncated" in row["path"]]
    assert len(broken) == 1
    try:
        num = len(decode(videos / broken[0]["path"]))
    except av.FFmpegError:
        num = 0
    assert num < NUM_FRAMES


def test_the_same_arguments_make_the_same_bytes(videos: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "again", num_clips=18, seed=7)
    assert contents(tmp_path / "again") == contents(videos)
    synthesize(tmp_path / "other", num_clips=18, seed=8)
    assert contents(tmp_path / "other")["left/scene_000.mp4"] != contents(videos)["left/scene_000.mp4"]


def test_a_finished_folder_is_left_alone_and_a_damaged_one_is_made_again(videos: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in videos.rglob("*")}
    wanted = contents(videos)
    synthesize(videos, num_clips=18, seed=7)
    assert {path: path.stat().st_mtime_ns for path in videos.rglob("*")} == before
    os.truncate(videos / "up" / "scene_001.mp4", 100)
    (videos / "down" / "scene_001.mp4").unlink()
    synthesize(videos, num_clips=18, seed=7)
    assert contents(videos) == wanted


def test_what_a_killed_call_left_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(source: Path, target: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("jobs.synthesize.os.rename", kill)  # everything is written, nothing has its name yet
        with pytest.raises(Killed):
            synthesize(tmp_path / "out", num_clips=18, seed=7)
    assert not (tmp_path / "out").exists()
    next(tmp_path.rglob("scene_001.mp4")).write_bytes(b"half")
    synthesize(tmp_path / "out", num_clips=18, seed=7)
    assert len(decode(tmp_path / "out" / "left" / "scene_001.mp4")) == NUM_FRAMES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_of_the_users_is_deleted(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.mp4").write_bytes(b"x")
    with pytest.raises(FileExistsError, match=r"mine\.mp4"):
        synthesize(tmp_path, num_clips=18, seed=7)
    (videos / "notes.txt").write_text("added by the user")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        synthesize(videos, num_clips=18, seed=8)  # other arguments would replace the folder
    assert (videos / MANIFEST).is_file()
    (videos / "notes.txt").unlink()


@pytest.mark.parametrize("num_clips", [0, 12, 19])
def test_numbers_of_clips_that_cannot_be_dealt_out(tmp_path: Path, num_clips: int) -> None:
    with pytest.raises(ValueError, match="num_clips"):
        synthesize(tmp_path / "out", num_clips=num_clips, seed=0)


@given(
    motion=st.sampled_from(CLASSES),
    frame=st.integers(0, NUM_FRAMES - 1),
    number=st.integers(0, 50),
    by=st.tuples(st.floats(-SIZE, SIZE), st.floats(-SIZE, SIZE), st.floats(-3.0, 3.0)),
)
def test_a_motion_only_shifts_where_a_scene_started(motion: str, frame: int, number: int, by: tuple[float, float, float]) -> None:
    """Why no frame can tell the class: a start drawn uniformly from a torus and a circle, shifted, is as uniform as before."""
    scene = make_scene(0, number)
    moved = replace(scene, x=scene.x + by[0], y=scene.y + by[1], turn=scene.turn + by[2])
    assert np.allclose(np.subtract(pose(moved, motion, frame), pose(scene, motion, frame)), by, atol=1e-6)
    assert pose(scene, motion, 0) == pytest.approx((scene.x, scene.y, scene.turn))


def small(frames: Frames) -> npt.NDArray[np.float64]:
    """Grey pictures (T, 32, 32) in [0, 1]."""
    blocks = frames.mean(axis=3).reshape(len(frames), 32, SIZE // 32, 32, SIZE // 32)
    return np.asarray(blocks.mean(axis=(2, 4)) / 255)


def motion_features(grey: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Least-squares shift of each frame to the next (x, y): its mean, and how large it is without its sign."""
    shifts = []
    for before, after in itertools.pairwise(grey):
        slope_y, slope_x = np.gradient((before + after) / 2)
        weight = np.abs(after - before) > 0.02
        slopes = np.stack([slope_x[weight], slope_y[weight]], axis=1)
        shifts.append(-np.linalg.solve(slopes.T @ slopes + 1e-3 * np.eye(2), slopes.T @ (after - before)[weight]))
    found = np.array(shifts)
    return np.concatenate([found.mean(axis=0), [np.linalg.norm(found.mean(axis=0)), np.linalg.norm(found, axis=1).mean()]])


def ridge_accuracy(x: npt.NDArray[np.float64], y: npt.NDArray[np.int64], held_out: npt.NDArray[np.bool_], decay: float) -> float:
    x = (x - x[~held_out].mean(axis=0)) / (x[~held_out].std(axis=0) + 1e-6)
    kernel = x @ x[~held_out].T
    weights = np.linalg.solve(kernel[~held_out] + decay * np.eye((~held_out).sum()), np.eye(len(CLASSES))[y[~held_out]] - CHANCE)
    return float(((kernel[held_out] @ weights).argmax(axis=1) == y[held_out]).mean())


def nearest_accuracy(x: npt.NDArray[np.float64], y: npt.NDArray[np.int64], held_out: npt.NDArray[np.bool_]) -> float:
    x = (x - x[~held_out].mean(axis=0)) / (x[~held_out].std(axis=0) + 1e-6)
    distances = ((x[held_out][:, None, :] - x[~held_out][None]) ** 2).sum(axis=2)
    return float((y[~held_out][distances.argmin(axis=1)] == y[held_out]).mean())


def test_single_frames_are_at_chance_and_motion_is_easy() -> None:
    last = 12
    pictures, motions, labels, groups = [], [], [], []
    for number in range(30):
        for label, motion in enumerate(CLASSES):
            grey = small(np.stack(list(film(make_scene(3, number), motion, last + 1))))
            pictures.append(grey[last].ravel())
            motions.append(motion_features(grey))
            labels.append(label)
            groups.append(number)
    y, held_out = np.array(labels), np.array(groups) % 3 == 2
    single, moving = np.array(pictures), np.array(motions)
    limit = CHANCE + 3 * np.sqrt(CHANCE * (1 - CHANCE) / held_out.sum())  # three standard errors above chance
    assert ridge_accuracy(single, y, held_out, decay=100.0) <= limit
    assert nearest_accuracy(single, y, held_out) <= limit
    assert nearest_accuracy(moving, y, held_out) >= 0.8
