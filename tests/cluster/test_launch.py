"""Gangs of real processes: equal results at every size, exact resumption after every kind of death, and nobody left behind."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import toy_training

from cluster import lease
from cluster.checkpoint import Array, CheckpointStore
from cluster.errors import ClusterError, LaunchError, TopologyError
from cluster.launch import launch
from cluster.metrics import merge_steps, read_metrics
from cluster.options import LaunchOptions

STEPS = 8
EVERY = 2
HERE = Path(__file__).parent


def options(workers: int, **changes: object) -> LaunchOptions:
    values: dict[str, object] = {"launcher": "local", "workers": workers, "cpus_per_worker": 1, "max_restarts": 2, "hang_timeout_s": 60}
    return LaunchOptions(**{**values, **changes})  # type: ignore[arg-type]


def train(
    run_dir: Path, workers: int, *, misfortunes: Sequence[Mapping[str, object]] = (), **changes: object
) -> list[Mapping[str, object]]:
    """Runs the toy to its end; returns the launcher's events."""
    events: list[Mapping[str, object]] = []
    payload = {"run_dir": str(run_dir), "steps": STEPS, "every": EVERY, "misfortunes": list(misfortunes)}
    launch(
        "toy_training:train",
        payload,
        run_dir=run_dir,
        num_micro_batches=4,
        options=options(workers, **changes),
        on_event=events.append,
        progress=lambda: saved_step(run_dir),
    )
    return events


def final_state(run_dir: Path) -> dict[str, Array]:
    def damaged(text: str) -> None:
        raise AssertionError(text)

    found = CheckpointStore(run_dir / "checkpoints", 2).newest(warn=damaged)
    assert found is not None
    assert found.step == STEPS
    return found.load()


def saved_step(run_dir: Path) -> int:
    found = CheckpointStore(run_dir / "checkpoints", 2).manifests()
    return found[0].step if found else 0


def losses(run_dir: Path) -> list[float]:
    return [float(str(event["loss"])) for event in merge_steps(read_metrics(run_dir / "metrics.jsonl"))]


def _workers() -> list[int]:
    """Of any gang on this machine."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE and "cluster.worker" in (process.info["cmdline"] or [])
    ]


def _listens_on(pid: int) -> list[str]:
    return [connection.laddr.ip for connection in psutil.Process(pid).net_connections() if connection.status == psutil.CONN_LISTEN]


def assert_nobody_left(run_dir: Path) -> None:
    """No worker that any attempt recorded is alive."""
    recorded = {int(pid) for attempt in lease.read_attempts(run_dir) for pid in attempt["pids"]}  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while True:
        left = recorded & set(_workers())
        if not left:
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    assert train(run_dir, 2) == []
    assert_nobody_left(run_dir)
    return run_dir


def assert_bit_equal(run_dir: Path, reference: Path) -> None:
    left, right = final_state(run_dir), final_state(reference)
    assert left.keys() == right.keys()
    assert [name for name in left if not np.array_equal(left[name], right[name])] == []
    assert losses(run_dir) == losses(reference)


def test_deaths_cost_steps_not_exactness(uninterrupted: Path, tmp_path: Path) -> None:
    """A worker killed between saves, its successor while it restores, rank 0 in the middle of a save, a worker again: all in one run.

    One more than the budget allows in a row: what the third gang's successor saved before it died gives the budget back.
    """
    misfortunes = [
        {"attempt": 1, "rank": 1, "step": 5, "kind": "kill"},
        {"attempt": 2, "rank": 1, "step": toy_training.RESTORE, "kind": "kill"},
        {"attempt": 3, "rank": 0, "step": 5, "kind": "kill in save"},
        {"attempt": 4, "rank": 1, "step": 7, "kind": "kill"},
    ]
    events = train(tmp_path, 2, misfortunes=misfortunes, max_restarts=3)
    assert_bit_equal(tmp_path, uninterrupted)
    assert [(event["event"], event["attempt"], event["delay_s"]) for event in events] == [
        ("restart", 1, 0.0), ("restart", 2, 1.0), ("restart", 3, 2.0), ("restart", 4, 0.0)
    ]  # fmt: skip
    for rank, event in zip([1, 1, 0, 1], events, strict=True):
        assert re.fullmatch(rf"rank {rank} \(pid \d+\) was killed by SIGKILL", str(event["reason"]))
    starts = {event["attempt"]: event["step"] for event in read_metrics(tmp_path / "metrics.jsonl") if event["event"] == "attempt"}
    assert {attempt: starts[attempt] for attempt in (1, 3, 4, 5)} == {1: 0, 3: 4, 4: 4, 5: 6}
    assert_nobody_left(tmp_path)


def test_workers_that_make_no_progress_are_noticed(uninterrupted: Path, tmp_path: Path) -> None:
    """One is stopped, and its peer waits for it; then one sleeps. Who can still do so leaves its stacks."""
    misfortunes = [{"attempt": 1, "rank": 1, "step": 5, "kind": "stop"}, {"attempt": 2, "rank": 1, "step": 6, "kind": "hang"}]
    start = time.monotonic()
    events = train(tmp_path, 2, misfortunes=misfortunes, hang_timeout_s=10)
    assert time.monotonic() - start < 240  # a worker that sleeps would take an hour
    assert len(events) == 2
    stopped, slept = (Path(str(event["reason"]).rsplit(" ", 1)[1]).read_text() for event in events)
    for event in events:
        assert "no rank finished a step for 10 s; where each one was, and its last collectives, are in " in str(event["reason"])
    assert stopped.startswith("1 of 2 ranks finished no step in time")
    assert "Nothing came from rank 1: stopped, stuck" in stopped
    assert "=== rank 0, process " in stopped
    assert "in train_step" in stopped  # where it waits for the one that was stopped
    assert "gloo:all_reduce of " in stopped
    assert re.search(r"^The others have entered \d+ collectives and wait for rank 1 \(\d+\)\.$", slept, re.MULTILINE)
    assert "time.sleep" in slept
    assert "=== rank 1, process " in slept
    assert_bit_equal(tmp_path, uninterrupted)
    assert_nobody_left(tmp_path)


def test_an_error_for_the_user_ends_the_launch_at_once(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"^the toy's user made a mistake$"):
        train(tmp_path, 2, misfortunes=[{"attempt": 1, "rank": 1, "step": 2, "kind": "user error"}])
    assert len(lease.read_attempts(tmp_path)) == 1
    assert_nobody_left(tmp_path)


def test_the_restart_budget_ends_with_the_cause(tmp_path: Path) -> None:
    crashes = [{"attempt": attempt, "rank": 1, "step": 1, "kind": "crash"} for attempt in (1, 2)]
    expected = (
        r"died 2 times without getting further.*max_restarts=1 .*rank 1 .*the toy crashed(.|\n)*--- rank-1\.log(.|\n)*RuntimeError: the toy"
    )
    with pytest.raises(LaunchError, match=expected):
        train(tmp_path, 2, misfortunes=crashes, max_restarts=1)


def test_in_one_process_errors_come_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^the toy crashed$"):
        train(tmp_path, 1, misfortunes=[{"attempt": 1, "rank": 0, "step": 1, "kind": "crash"}])


def test_a_world_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"launch\.workers=3"):
        train(tmp_path, 3)


DRIVER = """
import json, sys
from pathlib import Path
from cluster.launch import launch
from cluster.options import LaunchOptions
run_dir = Path(sys.argv[1])
payload = {"run_dir": str(run_dir), "steps": 8, "every": 2, "pause_s": float(sys.argv[2])}
options = LaunchOptions(launcher="local", workers=2, cpus_per_worker=1, hang_timeout_s=60)
launch("toy_training:train", payload, run_dir=run_dir, num_micro_batches=4, options=options, on_event=print)
"""


def test_when_the_driver_is_killed_its_workers_end_and_the_same_command_resumes(uninterrupted: Path, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM: tests/jobs/test_stop.py."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), "0.3"], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while len(merge_steps(read_metrics(tmp_path / "metrics.jsonl"))) < 4:
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert {ip for pid in lease.read_attempts(tmp_path)[0]["pids"] for ip in _listens_on(pid)} == {"127.0.0.1"}  # promise 13
        driver.kill()
        driver.wait(timeout=5)
    finally:
        driver.kill()
        driver.communicate()
    assert driver.returncode == -signal.SIGKILL
    assert_nobody_left(tmp_path)
    train(tmp_path, 2)
    assert_bit_equal(tmp_path, uninterrupted)
