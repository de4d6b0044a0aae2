"""A prediction is what evaluation says of the same file; long videos get a timeline; what is no video is explained, the rest goes on."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import evaluate, loose_videos, predict
from jobs.annotate import write_annotated
from jobs.errors import JobError
from jobs.predictor import Score, VideoPrediction, Window, load, predictions
from jobs.sliding import LONG, Sliding, clip_seconds
from jobs.timeline import as_text, clock, owned, stretches, write_page
from pipeline.caption import text_mask
from pipeline.index import Dataset
from pipeline.media import write_video
from pipeline.options import ClipOptions, EncodeOptions
from tests.jobs.soak_train import Run
from tests.jobs.test_train import posmlp


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, motion_dataset: Path) -> Path:
    """A run of a few steps, evaluated with several views a video."""
    run = Run(tmp_path_factory.mktemp("predict") / "run", motion_dataset, "launch.workers=1", "train.steps=3", "eval.clips=2")
    run.finish()
    evaluate.run(run.dir)
    return run.dir


@pytest.fixture
def long_video(tmp_path: Path) -> Path:
    """Six seconds at 25 frames per second: noise, then a still grey."""
    draw = np.random.default_rng(0)
    frames = [draw.integers(0, 256, (64, 96, 3), dtype=np.uint8) if i < 75 else np.full((64, 96, 3), 128, np.uint8) for i in range(150)]
    write_video(tmp_path / "long.mp4", frames, 25.0, EncodeOptions())
    return tmp_path / "long.mp4"


def test_validation_videos_have_the_scores_of_evaluation(trained: Path, motion_dataset: Path) -> None:
    dataset = Dataset.open(motion_dataset)
    rows = dataset.rows("split", "val").tolist()
    videos = [motion_dataset.parent / "videos" / dataset.text("source", row) for row in rows]
    result, failed = predict.run(trained, videos, quiet=True)
    assert failed == 0
    judged = {record["key"]: record for record in json.loads((trained / "eval.json").read_text())["videos"]}
    found: Any = result["videos"]
    for row, prediction in zip(rows, found, strict=True):
        record = judged[dataset.text("key", row)]
        assert [score["name"] for score in prediction["top"]] == [dataset.info.classes[place] for place in record["top"]]
        assert [score["score"] for score in prediction["top"]] == pytest.approx(record["scores"], abs=2e-6)
        assert prediction["num_frames"] == dataset.item(row).num_frames


def test_what_is_no_video_is_explained_and_the_others_are_predicted(trained: Path, tmp_path: Path, motion_dataset: Path) -> None:
    (tmp_path / "text.mp4").write_text("hello")
    _write_sound(tmp_path / "sound.m4a")
    write_video(tmp_path / "one.mp4", [np.zeros((64, 64, 3), np.uint8)], 25.0, EncodeOptions())
    good = next((motion_dataset.parent / "videos").rglob("*.mp4"))
    bad = {"text.mp4": "text", "sound.m4a": "holds pictures", "one.mp4": "1 frame", ".": "folder", "gone.mp4": "no such file"}
    done = posmlp("predict", str(trained), *(str(tmp_path / name) for name in bad), str(good), "--json")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(bad)
    for (name, reason), line in zip(bad.items(), errors, strict=True):
        assert str(tmp_path / name) in line
        assert reason in line
    found = json.loads(done.stdout)["videos"]
    assert [entry["error"] is None for entry in found] == [False] * len(bad) + [True]
    assert sum(score["score"] for score in found[-1]["top"]) <= 1 + 1e-6


MISTAKES = [  # arguments after RUN VIDEO, what the one message must name
    (["--window", "nan"], ["--window", "nan"]),
    (["--hop", "-1"], ["--hop", "-1"]),
    (["--timeline", "no/where.html"], ["no/where.html", "folder"]),
    (["--annotate", "a.mp4", "second.mp4"], ["--annotate", "2 videos"]),
]


@pytest.mark.parametrize(("options", "parts"), MISTAKES, ids=[" ".join(options) for options, _ in MISTAKES])
def test_mistakes_are_explained(trained: Path, long_video: Path, options: list[str], parts: list[str]) -> None:
    done = posmlp("predict", str(trained), str(long_video), *options)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def test_runs_without_weights_are_explained(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="not a run folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "fresh").mkdir()
    shutil.copy(trained / "recipe.yaml", tmp_path / "fresh")
    with pytest.raises(JobError, match="no checkpoint yet"):
        load(tmp_path / "fresh")


def test_a_run_outlives_its_dataset(trained: Path, tmp_path: Path, long_video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    recipe = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(
        "\n".join("  dir: /gone" if "dataset" in line and "dir:" in line else line for line in recipe.split("\n"))
    )
    assert "/gone" in (moved / "recipe.yaml").read_text()
    predictor = load(moved)
    assert "does not hold the dataset" in capsys.readouterr().err
    assert next(predictions(predictor, [long_video], Sliding())).error is None


def test_the_users_own_video_is_not_overwritten(trained: Path, long_video: Path) -> None:
    before = long_video.read_bytes()
    with pytest.raises(JobError, match="would be overwritten"):
        predict.run(trained, [long_video], annotate=long_video)
    assert long_video.read_bytes() == before


def test_a_long_video_has_a_timeline_a_page_and_an_annotated_copy(trained: Path, tmp_path: Path, long_video: Path) -> None:
    page, copy = tmp_path / "page.html", tmp_path / "copy.mp4"
    result, failed = predict.run(trained, [long_video], timeline=page, annotate=copy, quiet=True)
    assert failed == 0
    (video,) = result["videos"]  # type: ignore[misc]
    windows = video["windows"]
    seconds = clip_seconds(ClipOptions(num_frames=4, stride=2), 25.0)
    assert seconds is not None
    assert windows[0]["start_s"] == 0
    assert windows[-1]["end_s"] == pytest.approx(6.0)
    assert all(window["end_s"] - window["start_s"] == pytest.approx(seconds, abs=1e-3) for window in windows)
    assert [score["score"] for score in windows[0]["top"]] != [score["score"] for score in windows[-1]["top"]]  # noise and grey
    text = page.read_text()
    assert str(long_video) in text
    assert "<script" not in text
    assert "://" not in text
    with av.open(str(copy)) as ours, av.open(str(long_video)) as theirs:
        drawn = [frame.to_ndarray(format="gray") for frame in ours.decode(video=0)]
        plain = [frame.to_ndarray(format="gray") for frame in theirs.decode(video=0)]
    assert len(drawn) == len(plain)
    changed = np.abs(drawn[100].astype(int) - plain[100].astype(int)) > 40
    assert changed[:20].any()  # text on the upper third
    assert not changed[40:].any()  # nothing below
    assert not list(tmp_path.glob(".*"))


def test_windows_of_a_long_video_are_judged_as_if_the_whole_were_read(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(1)
    frames = (np.kron(draw.integers(0, 256, (8, 12, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)) for _ in range(400))
    write_video(tmp_path / "long.mp4", frames, 25.0, EncodeOptions())
    sliding = Sliding(window=1.0, hop=3.0)
    (cut_up,) = predictions(load(trained), [tmp_path / "long.mp4"], sliding)
    monkeypatch.setattr(loose_videos, "SEGMENT_GROUPS", 1000)  # longer than the video, which is then not cut
    (whole,) = predictions(load(trained), [tmp_path / "long.mp4"], sliding)
    assert cut_up == whole
    assert len({window.top[0].score for window in cut_up.windows}) > 3


def test_a_failed_annotation_leaves_nothing(trained: Path, tmp_path: Path, long_video: Path) -> None:
    predictor = load(trained)
    (video,) = predictions(predictor, [long_video], Sliding(always=True))
    long_video.write_bytes(b"changed meanwhile")
    with pytest.raises(JobError):
        write_annotated(predictor, video, long_video, tmp_path / "copy.mp4")
    assert {path.name for path in tmp_path.iterdir()} == {"long.mp4"}


@given(st.integers(1, 5000), st.floats(1, 60), st.floats(0.05, 30), st.floats(0.01, 1))
def test_windows_cover_the_video(num_frames: int, fps: float, window: float, share: float) -> None:
    found = Sliding(window=window, hop=window * share).over(num_frames, fps, None)
    assert found[0][0] == 0
    assert found[-1][1] == num_frames
    for (begin, end), (following, _) in itertools.pairwise(found):
        assert begin < following <= end
    assert len({end - begin for begin, end in found}) == 1


def test_when_there_is_a_timeline() -> None:
    assert Sliding().over(100, 25.0, 4.0 / LONG) == []  # exactly so long is not long
    assert len(Sliding().over(101, 25.0, 4.0 / LONG)) > 4
    assert Sliding().over(10**6, 25.0, None) == []  # nobody knows how long one look is
    assert Sliding(always=True).over(50, 25.0, None) == [(0, 50)]
    with pytest.raises(JobError, match="longer --hop"):
        Sliding(window=1, hop=0.001).over(10**6, 1000.0, None)


def test_stretches_join_neighbours_and_leave_no_gap() -> None:
    names = ["walk", "walk", "run", "walk"]
    windows = [Window(start_s=i, end_s=i + 2, top=[Score(name=name, score=0.5 + i / 10)]) for i, name in enumerate(names)]
    video = VideoPrediction(path="x", num_frames=50, fps=10.0, duration_s=5.0, top=windows[0].top, windows=windows)
    found = stretches(video)
    assert [(each.name, each.begin_s, each.end_s) for each in found] == [("walk", 0.0, 2.5), ("run", 2.5, 3.5), ("walk", 3.5, 5.0)]
    assert found[0].score == pytest.approx(0.55)
    assert owned(video)[0] == (0.0, 1.5)
    assert "0:02.5 to 0:03.5  0.700  run" in as_text(video)
    assert clock(3725.96) == "1:02:06.0"


def test_names_are_text_on_the_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    window = Window(start_s=0, end_s=1, top=[Score(name=evil, score=0.9)])
    write_page(
        tmp_path / "page.html", [VideoPrediction(path=evil, duration_s=1.0, fps=1.0, num_frames=1, top=window.top, windows=[window])], evil
    )
    assert "<script" not in (tmp_path / "page.html").read_text()


def test_text_is_drawn_as_letters() -> None:
    ink = text_mask(("Iä", "I\x1b[2J\u6253"))
    assert ink.shape == (32, 8 * 6)
    assert (ink[:16, :8] == ink[16:, :8]).all()  # the same letter looks the same
    assert not (ink[:16, 8:16] == ink[:16, :8]).all()
    assert (ink[16:, 8:16] == ink[16:, 40:48]).all()  # what the font does not have, and what is no character, is a question mark


def _write_sound(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        for _ in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
