"""One run at world sizes 2, 1, 3, 2 and ZeRO stages 0, 2, 3, 1 is the run of one worker, within the bounds of promise 5."""

import json
from pathlib import Path

import numpy as np
import pytest
import toy_training as toy

from cluster.checkpoint import CheckpointStore
from cluster.launch import launch
from cluster.metrics import merge_steps, read_metrics
from cluster.options import LaunchOptions

LIVES = ((2, 0, 6), (1, 2, 12), (3, 3, 18), (2, 1, toy.ELASTIC_STEPS))  # workers, ZeRO stage, step at which the gang ends
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")  # DeepSpeed's own


def run(entry: str, run_dir: Path, workers: int, **payload: object) -> None:
    launch(
        f"toy_training:{entry}",
        {"run_dir": str(run_dir), **payload},
        run_dir=run_dir,
        num_micro_batches=toy.ELASTIC_MICRO_BATCHES,
        options=LaunchOptions(launcher="local", workers=workers, cpus_per_worker=1, max_restarts=0, hang_timeout_s=120),
        on_event=lambda event: None,
    )


def figures(run_dir: Path, name: str) -> list[float]:
    return [float(str(event[name])) for event in merge_steps(read_metrics(run_dir / "metrics.jsonl"))]


def test_world_sizes_and_stages_change_within_one_run(tmp_path: Path) -> None:
    alone, changing = tmp_path / "alone", tmp_path / "changing"
    run("elastic", alone, 1, until=toy.ELASTIC_STEPS, zero=0)
    for workers, zero, until in LIVES:
        run("elastic", changing, workers, until=until, zero=zero)
    assert [int(size) for size in figures(changing, "size")] == [2] * 6 + [1] * 6 + [3] * 6 + [2] * 6
    assert figures(changing, "lr") == figures(alone, "lr")
    losses, expected = np.array(figures(changing, "loss")), np.array(figures(alone, "loss"))
    assert np.abs(losses / expected - 1).max() < 1e-4
    # From one checkpoint, the next reduced gradient.
    run("elastic_next", changing, 1, result=str(tmp_path / "norms.json"))
    norms, found = json.loads((tmp_path / "norms.json").read_text()), figures(changing, "grad_norm")
    assert sorted(map(int, norms)) == [6, 12, 18]
    for step, norm in norms.items():
        assert found[int(step)] == pytest.approx(norm, rel=1e-5)
    # Weights, moments, average, statistics and Adam's step at the end.
    mine, theirs = (CheckpointStore(folder / "checkpoints", keep=9).manifests()[0].load() for folder in (changing, alone))
    assert mine.keys() == theirs.keys()
    assert int(mine["optimizer.step"]) == toy.ELASTIC_STEPS
    for name in theirs:
        scale = np.abs(theirs[name]).max()
        assert np.abs(mine[name].astype(np.float64) - theirs[name]).max() <= 1e-4 * scale + 1e-9, name
