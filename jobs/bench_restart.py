"""posmlp bench restart: from the loss of a worker to the next optimizer step, and the parts of that time.

A small training of two workers runs until it has made some steps; then, in each round,

    worker killed      SIGKILL to its second worker; the supervisor starts the gang again
    worker stopped     SIGSTOP to its second worker, which then does not answer
    driver killed      SIGKILL to the command; the same command is given again at once

    noticed     until the supervisor says that it starts the gang again; for the command: nobody has to notice
    new gang    until the new workers have found one another: processes, imports of torch and DeepSpeed, on Ray also their places
    next step   until the first optimizer step: model, engine, newest checkpoint, loader

It is the least that a loss costs: a real model's first step and its checkpoint come on top.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import yaml

from cluster.lease import read_attempts
from cluster.metrics import read_metrics
from jobs.bench_train import synthetic_dataset
from jobs.errors import JobError

RECIPE = {
    "clip": {"num_frames": 4},
    "augment": {"size": 32},
    "loader": {"threads": 1},
    "model": {"preset": "posmlp_tiny", "widths": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "groups": [2, 2, 4, 4]},
    "train": {"global_batch": 8, "micro_batch": 2, "steps": 1_000_000},
    "engine": {"precision": "fp32"},
    "checkpoint": {"every": 5, "keep": 2},
    "launch": {"workers": 2, "cpus_per_worker": 1},
}
HARMS = ("worker killed", "worker stopped", "driver killed")
PARTS = ("noticed", "new gang", "next step")
STEPS = 8  # that an attempt makes before it is harmed: one checkpoint at the least
DEADLINE_S = 180.0


def run(launchers: Sequence[str], rounds: int) -> list[dict[str, object]]:
    """One row for each launcher and harm: medians of the parts in seconds, and of the whole with the lowest and the highest."""
    with tempfile.TemporaryDirectory(prefix="posmlp-restart-") as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        dataset = synthetic_dataset(folder)
        rows = []
        for launcher in launchers:
            taken: dict[str, list[list[float]]] = {harm: [] for harm in HARMS}
            with _Trial(folder, dataset, launcher) as trial:
                for number in range(rounds):
                    for harm in HARMS:
                        click.echo(f"{launcher}, round {number + 1} of {rounds}: {harm}", err=True)
                        taken[harm].append(trial.harm(harm))
            rows += [_row(launcher, harm, found) for harm, found in taken.items()]
    return rows


def _row(launcher: str, harm: str, taken: Sequence[Sequence[float]]) -> dict[str, object]:
    parts = {part: round(statistics.median(seconds), 1) for part, seconds in zip(PARTS, zip(*taken, strict=True), strict=True)}
    whole = [sum(seconds) for seconds in taken]
    figures = {"whole": statistics.median(whole), "lowest": min(whole), "highest": max(whole)}
    return {"launcher": launcher, "harm": harm, **parts, **{name: round(seconds, 1) for name, seconds in figures.items()}}


def table(rows: Sequence[dict[str, object]]) -> str:
    """For people."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows)])


class _Trial:
    """One training that is harmed again and again."""

    def __init__(self, folder: Path, dataset: Path, launcher: str) -> None:
        self._dir, self._log = folder / f"run-{launcher}", folder / f"{launcher}.log"
        settings = [f"run.dir={self._dir}", f"data.dir={dataset}", f"launch.launcher={launcher}", "launch.max_restarts=1000"]
        self._command = [sys.executable, "-m", "jobs", "train", str(folder / "recipe.yaml"), *settings]

    def __enter__(self) -> "_Trial":
        self._driver = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the training as a user would, so that nothing writes to its folder any more; by force if it does not answer."""
        self._driver.terminate()
        try:
            self._driver.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._kill_driver()

    def harm(self, harm: str) -> list[float]:
        """Seconds of each of PARTS."""
        attempt = max(1, len(read_attempts(self._dir)))
        self._wait(lambda: self._steps(attempt) >= STEPS, "the training makes steps")
        began = noticed = time.time()
        if harm == "driver killed":
            self._kill_driver()
            self._driver = self._start()
        else:
            os.kill(self._second_worker(), signal.SIGKILL if harm == "worker killed" else signal.SIGSTOP)
            noticed = self._wait(lambda: self._time("restart", after=began), "the supervisor notices")
        stepped = self._wait(lambda: self._time("step", after=began, attempt=attempt + 1), "the next optimizer step")
        joined = float(str(read_attempts(self._dir)[-1]["time"]))
        return [noticed - began, joined - noticed, stepped - joined]

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def _kill_driver(self) -> None:
        self._driver.kill()
        self._driver.wait()

    def _second_worker(self) -> int:
        pids = read_attempts(self._dir)[-1]["pids"]
        assert isinstance(pids, list)
        return int(pids[1])

    def _steps(self, attempt: int) -> int:
        return sum(event["event"] == "step" and event["attempt"] == attempt for event in read_metrics(self._dir / "metrics.jsonl"))

    def _time(self, kind: str, *, after: float, attempt: int = 0) -> float:
        """Of the first such event after `after` (0.0: none yet), of that attempt or a later one."""
        for event in read_metrics(self._dir / "metrics.jsonl"):
            when = float(str(event["time"]))
            if event["event"] == kind and when > after and int(str(event["attempt"])) >= attempt:
                return when
        return 0.0

    def _wait(self, question: Callable[[], float], what: str) -> float:
        """The first answer that is not 0."""
        end = time.monotonic() + DEADLINE_S
        while not (answer := question()):
            if time.monotonic() > end or self._driver.poll() is not None:
                raise JobError(f"Waited in vain until {what}. The training said:\n{self._log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        return answer
