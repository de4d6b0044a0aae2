"""`posmlp run`: from a folder of videos to a report, the same command again does nothing, and mistakes are explained."""

import json
import shutil
import time
from pathlib import Path

import pytest

from jobs.synthesize import synthesize
from tests.jobs.soak_train import RECIPE
from tests.jobs.test_train import posmlp


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE.replace("steps: 18, trace: true", "steps: 6"))
    return path


def test_videos_to_report_and_again(tmp_path: Path, recipe: Path) -> None:
    synthesize(tmp_path / "videos", num_clips=24, seed=2)
    (tmp_path / "videos" / "labels.csv").unlink()  # class = subfolder
    for broken in (tmp_path / "videos").glob("*.mp4"):
        broken.unlink()
    command = ["run", str(recipe), f"data.videos={tmp_path / 'videos'}", f"run.dir={tmp_path / 'run'}", "launch.workers=1"]
    first = posmlp(*command)
    assert first.returncode == 0, first.stderr
    assert "top-1" in first.stdout
    made = {"recipe.yaml", "env.json", "metrics.jsonl", "checkpoints", "eval.json", "report.html", "dataset"}
    assert made <= {path.name for path in (tmp_path / "run").iterdir()}
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["num_videos"] > 0
    assert result["step"] == 6

    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    began = time.monotonic()
    again = posmlp(*command)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    assert "training:" not in again.stderr
    assert time.monotonic() - began < 60  # a hang guard; the figure is in docs/benchmarks.md


MISTAKES = [  # arguments, what the one message must name
    (["run", "weizmann", "data.videos=nowhere"], ["nowhere", "data.videos"]),
    (["run", "weizmann"], ["data.videos is not set"]),
    (["run", "wiezmann"], ["weizmann"]),
    (["train", "weizmann", "data.dir=nowhere"], ["nowhere", "no dataset"]),
    (["train", "weizmann", "train.epoch=1"], ["train.epochs"]),
    (["eval", "nowhere"], ["nowhere", "not a run folder"]),
    (["data", "info", "nowhere"], ["nowhere", "no dataset"]),
    (["data", "validate", "nowhere"], ["nowhere", "no dataset"]),
    (["data", "build", "--videos", "nowhere", "--out", "out"], ["nowhere"]),
]


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_mistakes_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], parts: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    done = posmlp(*arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"runs", "out"}  # a run folder may have been named, nothing in it is half-written
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
