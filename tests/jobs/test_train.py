"""Training as a user starts it: killed and resumed, on one, two and four ranks, on damaged data, under the wrong recipe."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.metrics import merge_steps, read_metrics
from jobs import amend
from pipeline.index import Dataset
from pipeline.overlay import Kind
from tests.jobs.soak_train import Kill, Run, assert_same, trace

STEPS = 18


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, motion_dataset: Path) -> Run:
    """The uninterrupted run of two ranks."""
    run = Run(tmp_path_factory.mktemp("reference") / "run", motion_dataset)
    run.finish()
    return run


def losses(run: Run) -> list[float]:
    return [float(str(event["loss"])) for event in merge_steps(read_metrics(run.dir / "metrics.jsonl"))]


def posmlp(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jobs", *arguments], capture_output=True, text=True, timeout=240, check=False)


def test_kills_of_workers_and_drivers_change_nothing(tmp_path: Path, motion_dataset: Path, reference: Run) -> None:
    kills = [Kill(moment="step", victim="worker", step=7), Kill(moment="save", victim="driver", step=0)]
    run = Run(tmp_path / "run", motion_dataset)
    log = run.finish(kills, seed=3)
    assert not any("over before" in line for line in log), log
    assert assert_same(run, reference) > 0  # something was run twice, and was the same both times
    assert len(losses(run)) == STEPS
    assert losses(run) == losses(reference)


def test_a_kill_under_ray_changes_nothing(tmp_path: Path, motion_dataset: Path, reference: Run) -> None:
    run = Run(tmp_path / "run", motion_dataset, "launch.launcher=ray", "launch.cpus_per_worker=1")
    log = run.finish([Kill(moment="step", victim="worker", step=7)])
    assert "over before" not in log[0], log
    assert_same(run, reference)
    events = read_metrics(run.dir / "metrics.jsonl")
    reasons = [str(event["reason"]) for event in events if event["event"] == "restart"]
    assert len(reasons) == 1
    assert re.fullmatch(r"the process of rank [01] on \S+ died", reasons[0])
    assert [event["step"] for event in events if event["event"] == "attempt"] == [0, 6]
    logs = sorted(path.relative_to(run.dir / "logs").as_posix() for path in (run.dir / "logs").rglob("*.log"))
    assert logs == [f"launch-0001/gang-000{gang}/rank-{rank}.log" for gang in (1, 2) for rank in (0, 1)]


@pytest.mark.parametrize("workers", [1, 4])
def test_world_size_changes_neither_stream_nor_losses(tmp_path: Path, motion_dataset: Path, reference: Run, workers: int) -> None:
    run = Run(tmp_path / "run", motion_dataset, f"launch.workers={workers}")
    run.finish()
    ours, theirs = trace(run.dir), trace(reference.dir)
    assert ours.keys() == theirs.keys()
    assert all({**ours[place][0], "attempt": 0} == {**theirs[place][0], "attempt": 0} for place in ours)
    assert np.allclose(losses(run), losses(reference), rtol=1e-4)
    # Variances only: a convolution's bias before a batch norm has a true gradient of zero, which Adam turns into steps of rounding
    # noise; the mean follows that bias, nothing else does.
    (_, mine), (_, expected) = run.tensors(), reference.tensors()
    variances = [name for name in mine if name.endswith("running_var")]
    assert variances
    for name in variances:
        assert np.allclose(mine[name], expected[name], rtol=1e-3), name


def test_a_finished_run_is_skipped(reference: Run) -> None:
    before = (reference.dir / "metrics.jsonl").read_bytes()
    reference.finish()
    assert (reference.dir / "metrics.jsonl").read_bytes() == before


def test_another_recipe_or_dataset_is_refused(reference: Run, motion_dataset: Path, tmp_path: Path) -> None:
    recipe = str(reference.dir / "recipe.yaml")
    changed = posmlp("train", recipe, f"run.dir={reference.dir}", "optimizer.lr=0.01")
    assert changed.returncode == 1
    assert "optimizer.lr" in changed.stderr
    assert "0.002" in changed.stderr
    assert "0.01" in changed.stderr
    assert "Traceback" not in changed.stderr

    other = tmp_path / "dataset"
    shutil.copytree(motion_dataset, other)
    manifest = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**manifest, "fingerprint": "0" * 32}))
    elsewhere = posmlp("train", recipe, f"run.dir={reference.dir}", f"data.dir={other}")
    assert elsewhere.returncode == 1
    assert "dataset" in elsewhere.stderr
    assert "0" * 32 in elsewhere.stderr

    built = Dataset.open(motion_dataset)
    (other / "dataset.json").write_text(json.dumps(manifest))
    overlaid = amend.exclude(other, [built.text("key", 0)]).dataset.info.fingerprint
    without = posmlp("train", recipe, f"run.dir={reference.dir}", f"data.dir={other}")
    assert without.returncode == 1
    assert built.info.fingerprint in without.stderr
    assert overlaid in without.stderr
    amend.undo(other, Kind.EXCLUDE)
    assert posmlp("train", recipe, f"run.dir={reference.dir}", f"data.dir={other}").returncode == 0


def damage(dataset: Path, keys: int) -> list[str]:
    """Flips a byte in the middle of the first `keys` train videos."""
    opened = Dataset.open(dataset)
    hit = [opened.item(int(row)) for row in opened.rows("split", "train")[:keys]]
    for item in hit:
        with (dataset / item.shard_file).open("r+b") as file:
            file.seek(item.offset + item.size // 2)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 0x10]))
    return [item.key for item in hit]


def test_a_damaged_video_is_substituted_and_written_down(tmp_path: Path, motion_dataset: Path) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(motion_dataset, dataset)
    (key,) = damage(dataset, 1)
    run = Run(tmp_path / "run", dataset, "loader.max_damaged=0.5", "launch.workers=1")
    run.finish()
    events = [event for path in (run.dir / "damage").glob("*.jsonl") for event in read_metrics(path)]
    assert {event["key"] for event in events} == {key}
    assert all("checksum" in str(event["reason"]).lower() or "crc" in str(event["reason"]).lower() for event in events)
    assert key not in {name for records in trace(run.dir).values() for record in records for name in record["keys"]}  # type: ignore[attr-defined]


def test_too_many_damaged_videos_stop_the_run(tmp_path: Path, motion_dataset: Path) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(motion_dataset, dataset)
    damage(dataset, 8)
    recipe = tmp_path / "soak.yaml"
    from tests.jobs.soak_train import RECIPE

    recipe.write_text(RECIPE)
    done = posmlp("train", str(recipe), f"run.dir={tmp_path / 'run'}", f"data.dir={dataset}", "launch.workers=1")
    assert done.returncode == 1
    assert "max_damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_altered_index_is_refused(tmp_path: Path, motion_dataset: Path, reference: Run) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(motion_dataset, dataset)
    index = bytearray((dataset / "index.arrow").read_bytes())
    index[len(index) // 2] ^= 1
    (dataset / "index.arrow").write_bytes(bytes(index))
    done = posmlp("train", str(reference.dir / "recipe.yaml"), f"run.dir={tmp_path / 'run'}", f"data.dir={dataset}")
    assert done.returncode == 1
    assert "index.arrow was altered" in done.stderr
