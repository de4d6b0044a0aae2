"""Every state a run folder can be in is told, from files that real stores, leases and writers made; a broken one breaks nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster import lease
from cluster.checkpoint import CheckpointStore
from cluster.metrics import MetricsWriter
from jobs import runs
from jobs.errors import JobError
from jobs.recipe import load_recipe
from jobs.run_folder import prepare
from tests.jobs.test_train import posmlp

STEPS = 6


def make(folder: Path, *, saved: int, steps: int | None = None, more: tuple[str, ...] = ()) -> Path:
    """A run folder that has trained `steps` steps and saved at `saved`."""
    overrides = [f"run.dir={folder}", f"data.dir={folder}/nowhere", *(more or [f"train.steps={STEPS}"])]
    recipe = load_recipe("weizmann", overrides)
    prepare(recipe)
    with MetricsWriter(folder / "metrics.jsonl", lease.begin_attempt(folder)) as metrics:
        for step in range(1, (saved if steps is None else steps) + 1):
            metrics.write("step", step=step, loss=1.0)
        if saved == STEPS:
            metrics.write("end", step=STEPS)
    CheckpointStore(folder / "checkpoints", keep=2).save(saved, {"model.x": np.zeros(3, np.float32)}, {}, fence=lambda: None)
    return folder


def found(folder: Path) -> dict[str, runs.Run]:
    return {Path(each.path).name: each for each in runs.run(folder)}


def test_finished_interrupted_and_running(tmp_path: Path) -> None:
    make(tmp_path / "done", saved=STEPS)
    (tmp_path / "done" / "eval.json").write_text(json.dumps({"top1": 0.75, "step": STEPS}))
    make(tmp_path / "half", saved=3, steps=4)
    make(tmp_path / "busy", saved=3)
    with lease.hold(tmp_path / "busy"):
        seen = found(tmp_path)
        with pytest.raises(Exception, match="in use"), lease.hold(tmp_path / "busy"):  # looking has not freed it
            pass
    assert {name: each.state for name, each in seen.items()} == {"done": "finished", "half": "interrupted", "busy": "running"}
    assert (seen["done"].step, seen["done"].total, seen["done"].top1) == (STEPS, STEPS, 0.75)
    assert (seen["half"].step, seen["half"].total, seen["half"].top1) == (4, STEPS, None)
    with lease.hold(tmp_path / "busy"):
        pass  # looking holds nothing
    assert found(tmp_path)["busy"].state == "interrupted"


def test_a_run_that_gave_up_is_failed_and_says_why_until_it_goes_on(tmp_path: Path) -> None:
    run = make(tmp_path / "run", saved=3)
    for number, told in enumerate([{"message": "Training has diverged."}, {"message": "Asked to stop.", "stopped": True}], 1):
        (run / "logs" / f"launch-{number:04d}").mkdir(parents=True)
        (run / "logs" / f"launch-{number:04d}" / "failure.json").write_text(json.dumps(told))
        seen = found(tmp_path)["run"]
        assert (seen.state, seen.note) == (("failed", "Training has diverged.") if number == 1 else ("interrupted", ""))


def test_a_kill_while_saving_changes_nothing(tmp_path: Path) -> None:
    run = make(tmp_path / "run", saved=STEPS)
    (next((run / "checkpoints").iterdir()) / "manifest.json").unlink()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "step", "st')
    assert found(tmp_path)["run"].state == "interrupted"  # what is not committed is not there
    assert found(tmp_path)["run"].step == STEPS


def test_total_without_dataset(tmp_path: Path) -> None:
    make(tmp_path / "open", saved=3, more=("train.epochs=2",))
    assert (found(tmp_path)["open"].state, found(tmp_path)["open"].total) == ("interrupted", None)
    make(tmp_path / "ended", saved=STEPS, more=("train.epochs=2",))
    assert (found(tmp_path)["ended"].state, found(tmp_path)["ended"].total) == ("finished", STEPS)


BREAKS = {  # what happens to a run folder, what the note must name
    "no_recipe": (lambda run: (run / "recipe.yaml").unlink(), "no recipe.yaml"),
    "wrong_recipe": (lambda run: (run / "recipe.yaml").write_text("train: {epocs: 1}"), "train.epocs"),
    "binary_recipe": (lambda run: (run / "recipe.yaml").write_bytes(b"\xff\x00"), "UTF-8"),
    "recipe_is_folder": (lambda run: ((run / "recipe.yaml").unlink(), (run / "recipe.yaml").mkdir()), "recipe.yaml"),
    "eval": (lambda run: (run / "eval.json").write_text('{"top1": 0.'), "eval.json"),
    "eval_list": (lambda run: (run / "eval.json").write_text("[1]"), "eval.json"),
    "metrics_are_folder": (lambda run: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()), "metrics.jsonl"),
    "manifest": (lambda run: (next((run / "checkpoints").iterdir()) / "manifest.json").write_text("{"), ""),
    "failure": (lambda run: ((run / "logs" / "launch-1").mkdir(parents=True), (run / "logs/launch-1/failure.json").write_text("[]")), ""),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_run_is_shown_and_the_others_too(tmp_path: Path, name: str) -> None:
    make(tmp_path / "good", saved=STEPS)
    damage, part = BREAKS[name]
    damage(make(tmp_path / "bad", saved=3))
    seen = found(tmp_path)
    assert seen["good"].state == "finished"
    assert part in seen["bad"].note
    assert seen["bad"].state == ("broken" if "recipe" in name else "interrupted")


def test_runs_within_folders_and_runs(tmp_path: Path) -> None:
    make(tmp_path / "sweep" / "a", saved=1)
    make(tmp_path / "demo", saved=1)
    make(tmp_path / "demo" / "single_frame", saved=1)
    make(tmp_path / "demo" / "dataset" / "hidden", saved=1)  # a dataset holds no runs
    (tmp_path / "videos").mkdir()
    assert set(found(tmp_path)) == {"a", "demo", "single_frame"}
    assert set(found(tmp_path / "demo")) == {"demo", "single_frame"}  # named itself


def test_size_and_order(tmp_path: Path) -> None:
    make(tmp_path / "old", saved=1)
    make(tmp_path / "new", saved=1)
    (tmp_path / "new" / "weights").write_bytes(os.urandom(1 << 20))
    for path in [*(tmp_path / "old").rglob("*"), tmp_path / "old"]:
        os.utime(path, (1e9, 1e9))
    (new, old) = runs.run(tmp_path)
    assert (Path(new.path).name, Path(old.path).name) == ("new", "old")
    assert 1 << 20 <= new.size_bytes < 2 << 20
    assert old.changed == 1e9


def test_the_command(tmp_path: Path) -> None:
    make(tmp_path / "[red]evil", saved=STEPS)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "recipe.yaml").write_text("train: 3")
    listed = posmlp("runs", str(tmp_path), "--json")
    assert listed.returncode == 0, listed.stderr
    assert {entry["state"] for entry in json.loads(listed.stdout)} == {"finished", "broken"}
    shown = subprocess.run(
        [sys.executable, "-m", "jobs", "runs", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert "[red]evil" in shown.stdout
    assert "train" in shown.stderr  # why the other is broken
    shutil.rmtree(tmp_path / "bad")
    assert "no such folder" in posmlp("runs", str(tmp_path / "bad")).stderr
    (tmp_path / "empty").mkdir()
    assert "holds no runs" in posmlp("runs", str(tmp_path / "empty")).stdout
    with pytest.raises(JobError, match="no such folder"):
        runs.run(tmp_path / "bad")
