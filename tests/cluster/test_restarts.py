"""Only deaths without progress count, and the pauses between them grow."""

from pathlib import Path

import pytest

from cluster.checkpoint import CheckpointStore
from cluster.errors import LaunchError
from cluster.launch import launch
from cluster.options import LaunchOptions
from cluster.restarts import MAX_DELAY_S, Restarts, no_progress


def test_progress_gives_the_budget_back() -> None:
    reached = 0
    restarts = Restarts(2, lambda: reached)
    assert [restarts.delay_s(), restarts.delay_s()] == [0.0, 1.0]
    reached = 10
    assert [restarts.delay_s() for _ in range(3)] == [0.0, 1.0, None]
    assert "died 3 times without getting further, more often than launch.max_restarts=2" in restarts.verdict()


def test_pauses_double_up_to_a_bound() -> None:
    restarts = Restarts(99, no_progress)
    assert [restarts.delay_s() for _ in range(9)] == [0, 1, 2, 4, 8, 16, 32, MAX_DELAY_S, MAX_DELAY_S]


def test_none_are_allowed_with_a_budget_of_none() -> None:
    assert Restarts(0, no_progress).delay_s() is None


def saved_step(root: Path) -> int:
    found = CheckpointStore(root, keep=1).manifests()
    return found[0].step if found else 0


def test_a_gang_that_saves_between_deaths_may_die_more_often_than_the_budget(tmp_path: Path) -> None:
    misfortunes = [{"attempt": attempt, "rank": 1, "step": step, "kind": "kill"} for attempt, step in [(1, 3), (2, 5), (3, 7)]]
    events: list[object] = []

    def train() -> None:
        launch(
            "toy_training:train",
            {"run_dir": str(tmp_path), "steps": 8, "every": 2, "pause_s": 0.1, "misfortunes": misfortunes},
            run_dir=tmp_path,
            num_micro_batches=4,
            options=LaunchOptions(launcher="local", workers=2, cpus_per_worker=1, max_restarts=1, hang_timeout_s=60),
            on_event=lambda event: events.append(event["delay_s"]),
            progress=lambda: saved_step(tmp_path / "checkpoints"),
        )

    train()
    assert events == [0.0] * 3
    assert saved_step(tmp_path / "checkpoints") == 8


def test_without_progress_the_end_names_the_first_cause(tmp_path: Path) -> None:
    misfortunes = [{"attempt": attempt, "rank": 1, "step": 1, "kind": "crash"} for attempt in (1, 2)]
    with pytest.raises(
        LaunchError, match=r"died 2 times without getting further(.|\n)*rank 1 .*the toy crashed(.|\n)*RuntimeError: the toy"
    ):
        launch(
            "toy_training:train",
            {"run_dir": str(tmp_path), "steps": 8, "every": 2, "misfortunes": misfortunes},
            run_dir=tmp_path,
            num_micro_batches=4,
            options=LaunchOptions(launcher="local", workers=2, cpus_per_worker=1, max_restarts=1, hang_timeout_s=60),
            on_event=lambda event: None,
            progress=lambda: saved_step(tmp_path / "checkpoints"),
        )
