"""Every video is judged exactly once, with the same result for any number of workers and after a kill."""

import json
import shutil
from pathlib import Path

import pytest

from jobs import evaluate
from jobs.errors import JobError
from pipeline.index import Dataset
from tests.jobs.soak_train import Run
from tests.jobs.test_train import posmlp


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, motion_dataset: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("trained") / "run", motion_dataset, "launch.workers=1", "train.steps=4", "eval.micro_batch=3")
    run.finish()
    return run


def with_workers(trained: Run, folder: Path, workers: int) -> Path:
    shutil.copytree(trained.dir, folder)
    text = (folder / "recipe.yaml").read_text()
    assert "workers: 1" in text
    (folder / "recipe.yaml").write_text(text.replace("workers: 1", f"workers: {workers}"))
    return folder


def test_workers_do_not_change_the_result(trained: Run, tmp_path: Path) -> None:
    done = posmlp("eval", str(trained.dir), "--json")
    assert done.returncode == 0, done.stderr
    alone = json.loads(done.stdout)
    assert alone == json.loads((trained.dir / "eval.json").read_text())
    other = with_workers(trained, tmp_path / "two", 2)
    (other / "eval.json").unlink()
    assert posmlp("eval", str(other)).returncode == 0
    assert json.loads((other / "eval.json").read_text()) == alone
    dataset = Dataset.open(trained_dataset(trained))
    assert alone["num_videos"] == len(dataset.rows("split", "val"))
    assert sum(sum(row) for row in alone["confusion"]) == alone["num_videos"]
    assert alone["dataset_fingerprint"] == dataset.info.fingerprint


def trained_dataset(trained: Run) -> Path:
    from jobs.run_folder import recipe_of

    return recipe_of(trained.dir).dataset_dir


def test_finished_parts_are_not_judged_again(trained: Run, tmp_path: Path) -> None:
    run_dir = with_workers(trained, tmp_path / "again", 1)
    (run_dir / "eval.json").unlink(missing_ok=True)
    dataset = Dataset.open(trained_dataset(trained))
    rows = dataset.rows("split", "val")[:3]
    records = [{"key": dataset.text("key", int(row)), "label": 0, "top": [0], "scores": [1.0], "failed": None} for row in rows]
    parts = run_dir / "eval" / "step-00000004"
    parts.mkdir(parents=True)
    (parts / "micro-00000000.json").write_text(json.dumps(records))  # as a killed evaluation leaves it
    result = evaluate.run(run_dir)
    assert result["num_videos"] == len(dataset.rows("split", "val"))
    assert result["per_class"][dataset.info.classes[0]]["num"] >= 3  # type: ignore[index]


def test_missing_and_double_videos_are_errors(trained: Run, tmp_path: Path) -> None:
    dataset = Dataset.open(trained_dataset(trained))
    rows = dataset.rows("split", "val")
    record = {"key": dataset.text("key", int(rows[0])), "label": 0, "top": [0], "scores": [1.0], "failed": None}
    (tmp_path / "micro-00000000.json").write_text(json.dumps([record]))
    with pytest.raises(JobError, match="missing"):
        evaluate.merge(tmp_path, dataset, rows)
    (tmp_path / "micro-00000001.json").write_text(json.dumps([record]))
    with pytest.raises(JobError, match="1 double"):
        evaluate.merge(tmp_path, dataset, rows)


def test_a_damaged_video_counts_as_wrong(trained: Run, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(trained_dataset(trained), dataset)
    run_dir = tmp_path / "run"
    shutil.copytree(trained.dir, run_dir)
    (run_dir / "eval.json").unlink(missing_ok=True)
    text = (run_dir / "recipe.yaml").read_text()
    (run_dir / "recipe.yaml").write_text(text.replace(str(trained_dataset(trained)), str(dataset)))
    opened = Dataset.open(dataset)
    item = opened.item(int(opened.rows("split", "val")[0]))
    with (dataset / item.shard_file).open("r+b") as file:
        file.seek(item.offset + item.size // 2)
        file.write(b"damage")
    result = evaluate.run(run_dir)
    assert [entry["key"] for entry in result["failed"]] == [item.key]  # type: ignore[attr-defined]
    assert result["num_failed"] == 1
