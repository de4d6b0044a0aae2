"""data build --dry-run: what it says comes true, and nothing is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import build, dry_run
from jobs.recipe import Recipe, parse_overrides
from pipeline.index import read_info


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, motion_dataset: Path) -> Recipe:
    """The build of 24 clips and a broken one; its labels name one more that is not there."""
    folder, videos = tmp_path_factory.mktemp("dry"), motion_dataset.parent / "videos"
    labels = folder / "labels.csv"
    labels.write_text((videos / "labels.csv").read_text() + "left/gone.mp4,left,train,scene_000\n")
    paths = {"videos": str(videos), "labels": str(labels), "dir": str(folder / "data"), "allow_missing": True}
    return parse_overrides({"data": paths}, [])


def test_what_it_says_comes_true(recipe: Recipe) -> None:
    estimate = dry_run.run(recipe)
    assert not recipe.dataset_dir.exists()
    assert dry_run.run(recipe).bytes_out == estimate.bytes_out  # the same sample
    assert (estimate.videos, estimate.missing, len(estimate.classes)) == (25, ["left/gone.mp4"], 6)
    assert set(estimate.refused) <= {"left/truncated.mp4"}
    assert sum(estimate.splits["split"].values()) == 25
    build.build_dataset(recipe)
    info = read_info(recipe.dataset_dir)
    assert estimate.bytes_out == pytest.approx(sum(shard.size for shard in info.shards), rel=0.25)
    assert estimate.hours == pytest.approx(info.num_frames / 24 / 3600, rel=0.25)
    assert estimate.seconds is not None
    assert estimate.fits


def test_too_small_a_disk_and_nothing_usable(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: dry_run.shutil._ntuple_diskusage(1, 1, 1000))
    assert not dry_run.run(recipe).fits
    (tmp_path / "videos" / "a").mkdir(parents=True)
    (tmp_path / "videos" / "a" / "1.mp4").write_text("no video")
    estimate = dry_run.run(parse_overrides({"data": {"videos": str(tmp_path / "videos"), "dir": str(tmp_path / "data")}}, []))
    assert (estimate.bytes_out, estimate.seconds, list(estimate.refused)) == (None, None, ["a/1.mp4"])
    dry_run.show(estimate)


def test_command(recipe: Recipe) -> None:
    data = recipe.data
    where = ["--videos", str(data.videos), "--labels", str(data.labels), "--out", str(recipe.dataset_dir)]
    command = [sys.executable, "-m", "jobs", "data", "build", *where, "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"] is True
