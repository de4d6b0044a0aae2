"""Asked to stop, a run saves, ends with exit code 75, and the same command goes on to the same end; Ctrl-C breaks nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.lease import read_attempts
from cluster.metrics import read_metrics
from jobs.deadline import MARGIN_S, Deadline, seconds
from tests.jobs.soak_train import MARK, Run, assert_same

STEPS = 30
STOPPED = 75


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, motion_dataset: Path) -> Run:
    run = Run(tmp_path_factory.mktemp("reference") / "run", motion_dataset, f"train.steps={STEPS}")
    run.finish()
    return run


def log_of(run: Run) -> str:
    return (run.folder / "driver.log").read_text()


def begin(run: Run, driver: subprocess.Popen[bytes], steps: int) -> None:
    """Waits until a call of the command has finished `steps` steps of its own."""
    attempts, deadline = len(read_attempts(run.dir)), time.monotonic() + 120
    before = run.last_step()
    while len(read_attempts(run.dir)) <= attempts or run.last_step() < before + steps:
        assert driver.poll() is None, log_of(run)
        assert time.monotonic() < deadline, log_of(run)
        time.sleep(0.05)


def assert_saved_and_stopped(run: Run, driver: subprocess.Popen[bytes]) -> None:
    assert driver.wait(timeout=60) == STOPPED, log_of(run)
    run.assert_no_orphans()
    step, _ = run.tensors()
    assert step == run.last_step()  # the last step that was made is saved
    assert f"is saved at step {step} of {STEPS}; the same command goes on from there." in log_of(run)
    assert "Traceback" not in log_of(run)


def events_of(run: Run) -> list[object]:
    return [event["event"] for event in read_metrics(run.dir / "metrics.jsonl")]


def sigterm_to_a_worker(run: Run) -> None:
    """To rank 1, as a machine that is taken away would send it."""
    with run.driver() as driver:
        begin(run, driver, 3)
        pids = read_attempts(run.dir)[-1]["pids"]
        assert isinstance(pids, list)
        os.kill(pids[1], signal.SIGTERM)
        assert_saved_and_stopped(run, driver)


def test_sigterm_to_the_driver_or_to_a_worker_saves_and_stops(tmp_path: Path, motion_dataset: Path, reference: Run) -> None:
    run = Run(tmp_path / "run", motion_dataset, f"train.steps={STEPS}")
    with run.driver() as driver:
        begin(run, driver, 4)
        driver.send_signal(signal.SIGTERM)
        assert_saved_and_stopped(run, driver)
    sigterm_to_a_worker(run)
    run.finish()
    assert_same(run, reference)
    assert events_of(run).count("stop") == 2
    assert "restart" not in events_of(run)


def test_sigterm_to_a_worker_under_ray(tmp_path: Path, motion_dataset: Path) -> None:
    """To the driver: tests/jobs/test_submit.py; that the same command goes on from there is the same as without Ray."""
    run = Run(tmp_path / "run", motion_dataset, f"train.steps={STEPS}", "launch.launcher=ray", "launch.cpus_per_worker=1")
    sigterm_to_a_worker(run)
    assert [event for event in events_of(run) if event in ("attempt", "stop", "restart")] == ["attempt", "stop"]


def test_the_time_limit_stops_in_time_and_every_call_gets_on(tmp_path: Path, motion_dataset: Path, reference: Run) -> None:
    run = Run(tmp_path / "run", motion_dataset, f"train.steps={STEPS}", "launch.workers=1", "train.time_limit=1s")
    for step in (1, 2):  # the limit is over before the first step, which is made all the same
        with run.driver() as driver:
            assert_saved_and_stopped(run, driver)
        assert run.last_step() == step
    assert [event["reason"] for event in read_metrics(run.dir / "metrics.jsonl") if event["event"] == "stop"] == ["train.time_limit"] * 2


def test_a_second_sigterm_ends_at_once(tmp_path: Path, motion_dataset: Path) -> None:
    run = Run(tmp_path / "run", motion_dataset, f"train.steps={STEPS}")
    with run.driver() as driver:
        begin(run, driver, 2)
        pids = read_attempts(run.dir)[-1]["pids"]
        assert isinstance(pids, list)
        os.kill(pids[0], signal.SIGSTOP)  # so that nobody can finish a step
        driver.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert driver.poll() is None
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=5) == 143
    run.assert_no_orphans()


@pytest.mark.parametrize("delay_s", [0.3, 4.0])
def test_ctrl_c_during_training_breaks_nothing(tmp_path: Path, motion_dataset: Path, delay_s: float) -> None:
    run = Run(tmp_path / "run", motion_dataset, f"train.steps={STEPS}")
    with run.driver() as driver:
        time.sleep(delay_s)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=20) in (130, -signal.SIGINT), log_of(run)  # the latter before Python has begun
    run.assert_no_orphans()


def test_ctrl_c_during_a_build_breaks_nothing(tmp_path: Path, motion_dataset: Path) -> None:
    mark = tmp_path.name + str(os.getpid())
    command = [sys.executable, "-m", "jobs", "data", "build", "--videos", str(motion_dataset.parent / "videos")]
    command += ["--labels", str(motion_dataset.parent / "videos" / "labels.csv"), "--out", str(tmp_path / "dataset")]
    driver = subprocess.Popen(command, env={**os.environ, MARK: mark}, start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "dataset" / "build" / "plan.json").exists() and driver.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(3.0)  # Ray is starting, or a task is at work
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does, to everything in the foreground
    _, text = driver.communicate(timeout=30)
    assert driver.returncode in (0, 130, -signal.SIGINT), text.decode()
    end = time.monotonic() + 45  # Ray's own agents look for their raylet only now and then
    while left := [process for process in psutil.process_iter() if _marked(process, mark)]:
        assert time.monotonic() < end, [process.cmdline() for process in left]
        time.sleep(0.1)
    assert subprocess.run(command, env=os.environ, capture_output=True, timeout=120).returncode == 0
    fingerprints = [json.loads((path / "dataset.json").read_text())["fingerprint"] for path in (tmp_path / "dataset", motion_dataset)]
    assert fingerprints[0] == fingerprints[1]


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.mark.parametrize(
    ("text", "expected"), [("3h30m", 12600.0), ("90s", 90.0), ("1d 12h", 129600.0), (45, 45.0), ("2.5", 2.5), ("1m0.5s", 60.5)]
)
def test_durations(text: object, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "3h30", "-5", 0, -1, True, float("nan"), float("inf"), "30m3h", None, [1]])
def test_nonsense_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="3h30m or 90s"):
        seconds(text)


def test_the_deadline_leaves_time_for_what_it_measured() -> None:
    now = 0.0
    deadline = Deadline(1000.0, state_bytes=100_000_000, clock=lambda: now)  # a first save is taken to last 2 s
    deadline.step(10.0)
    now = 1000.0 - (2 * 10.0 + 1.5 * 2.0 + MARGIN_S) - 0.1
    assert not deadline.near()
    now += 0.2
    assert deadline.near()
    deadline.saved(40.0)
    now = 1000.0 - (2 * 10.0 + 1.5 * 40.0 + MARGIN_S) + 0.1
    assert deadline.near()
    assert not Deadline(None, 0, clock=lambda: 1e12).near()
