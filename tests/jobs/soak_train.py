"""Seeded kills of real training runs: whatever is killed whenever, the finished run equals the uninterrupted one.

Compared: every (position, key, label, frames, crop, tensor digest) that any rank of any attempt recorded, that no micro-batch
is missing, the final weights and moments to the bit, and that no process is left. A sample runs in the tests; `make soak` runs
more. Usage: python -m tests.jobs.soak_train --dataset DIR --kills N --seed S [--launcher ray]
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from cluster.checkpoint import CheckpointStore
from cluster.lease import read_attempts
from cluster.metrics import read_metrics

RECIPE = """
clip: {num_frames: 4, sampling: dense, stride: 2}
augment: {size: 32, area: [0.4, 1.0], flip: 0.5}
loader: {threads: 1}
model:
  preset: posmlp_tiny
  widths: [8, 16, 16, 32]
  depths: [1, 1, 1, 1]
  groups: [2, 2, 4, 4]
  drop_path: 0.2
train: {global_batch: 8, micro_batch: 2, steps: 18, trace: true}
optimizer: {lr: 0.002}
engine: {precision: fp32}
checkpoint: {every: 3, keep: 2}
launch: {launcher: local, workers: 2, hang_timeout_s: 120}
"""
MOMENTS = ("start", "step", "save", "restore")
DEADLINE_S = 300.0
MARK = "POSMLP_SOAK"  # environment variable by which every process of a run is found again


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One planned kill: SIGKILL to `victim` when `moment` comes (for "step": when `step` is finished)."""

    moment: str
    victim: str
    step: int

    def __str__(self) -> str:
        return f"{self.victim} at {self.moment}" + (f" {self.step}" if self.moment == "step" else "")


def plan(seed: int, steps: int) -> list[Kill]:
    """One to three kills of one run, in the order in which they can come. Two or more are second resumes."""
    draw = random.Random(seed)
    kills = [
        Kill(moment=draw.choice(MOMENTS), victim=draw.choice(["worker", "driver"]), step=draw.randrange(4, steps - 1))
        for _ in range(draw.choice([1, 2, 2, 3]))
    ]
    kills.sort(key=lambda kill: (MOMENTS.index(kill.moment), kill.step))
    if kills[0].moment == "restore":  # there must be something to restore
        kills.insert(0, Kill(moment="step", victim="driver", step=draw.randrange(4, steps - 1)))
    return kills


class Run:
    """One training run as a user starts it, in a folder of its own, that can be watched and killed."""

    def __init__(self, folder: Path, dataset: Path, *more: str) -> None:
        folder.mkdir(parents=True)
        self.folder, self.mark = folder, secrets.token_hex(8)
        recipe = folder / "soak.yaml"
        recipe.write_text(RECIPE)
        self.dir = folder / "run"
        self._command = [sys.executable, "-m", "jobs", "train", str(recipe), f"run.dir={self.dir}", f"data.dir={dataset}", *more]

    @contextlib.contextmanager
    def driver(self) -> Iterator[subprocess.Popen[bytes]]:
        with (self.folder / "driver.log").open("ab") as log:
            environment = {**os.environ, MARK: self.mark}
            process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def finish(self, kills: Sequence[Kill] = (), seed: int = 0) -> list[str]:
        """Trains to the end through all kills, with the same command again after each death of the driver. Says what happened."""
        draw, pending, log = random.Random(seed), list(kills), []
        while True:
            with self.driver() as driver:
                while pending and self._comes(pending[0], driver, draw):
                    kill = pending.pop(0)
                    log.append(f"{kill} (finished step {self.last_step()}, attempt {len(read_attempts(self.dir))})")
                    self._kill(kill, driver, draw)
                    if kill.victim == "driver":
                        break
                code = driver.wait(timeout=DEADLINE_S)
            self.assert_no_orphans()
            assert code in (0, -signal.SIGKILL), (self.folder / "driver.log").read_text()[-6000:]
            if code == 0:
                return log + [f"{kill}: the run was over before" for kill in pending]

    def last_step(self) -> int:
        return max((int(str(event["step"])) for event in read_metrics(self.dir / "metrics.jsonl") if event["event"] == "step"), default=0)

    def _checkpoints(self, *, whole: bool) -> set[str]:
        return {path.name for path in (self.dir / "checkpoints").glob("step-*") if (path / "manifest.json").exists() == whole}

    def _comes(self, kill: Kill, driver: subprocess.Popen[bytes], draw: random.Random) -> bool:
        """Waits for the kill's moment; False when the run ended first."""
        attempts, torn = len(read_attempts(self.dir)), self._checkpoints(whole=False)
        end = time.monotonic() + DEADLINE_S
        delay = draw.uniform(0.0, 6.0) if kill.moment == "start" else 0.0
        began = time.monotonic()
        while driver.poll() is None and time.monotonic() < end:
            here = {
                "start": lambda: time.monotonic() - began >= delay,
                "step": lambda: self.last_step() >= kill.step,
                "save": lambda: bool(self._checkpoints(whole=False) - torn),
                "restore": lambda: bool(self._checkpoints(whole=True)) and len(read_attempts(self.dir)) > attempts,
            }[kill.moment]()
            if here:
                time.sleep(draw.uniform(0.0, 0.5) if kill.moment == "restore" else 0.0)
                return driver.poll() is None
            time.sleep(0.002 if kill.moment == "save" else 0.05)
        return False

    def _kill(self, kill: Kill, driver: subprocess.Popen[bytes], draw: random.Random) -> None:
        pid = driver.pid
        if kill.victim == "worker":
            alive = [pid for pid in self._worker_pids() if psutil.pid_exists(pid)]
            pid = draw.choice(alive) if alive else driver.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if pid == driver.pid:
            driver.wait()

    def _worker_pids(self) -> list[int]:
        attempts = read_attempts(self.dir)
        pids = attempts[-1].get("pids") if attempts else []
        return [int(pid) for pid in pids] if isinstance(pids, list) else []

    def assert_no_orphans(self) -> None:
        """Nothing that the run started may outlive its driver by more than some seconds."""
        end = time.monotonic() + 20
        while left := [process for process in psutil.process_iter() if self._is_mine(process)]:
            assert time.monotonic() < end, f"left over: {[process.cmdline() for process in left]}"
            time.sleep(0.1)

    def _is_mine(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE
        return False

    def tensors(self) -> tuple[int, dict[str, npt.NDArray[np.generic]]]:
        newest = CheckpointStore(self.dir / "checkpoints", keep=2).newest(warn=print)
        assert newest is not None
        return newest.step, newest.load()


def trace(run_dir: Path) -> dict[tuple[int, int], list[dict[str, object]]]:
    """(step, micro-batch) -> what each attempt that ran it recorded. A line torn by a kill is not a record."""
    found: dict[tuple[int, int], list[dict[str, object]]] = {}
    for path in sorted((run_dir / "trace").glob("*.jsonl")):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                found.setdefault((record["step"], record["micro"]), []).append(record)
    return found


def assert_same_stream(run_dir: Path, reference: Path) -> int:
    """Both runs have seen the same, to the bit of each tensor. Returns how many micro-batches were run more than once."""
    ours, theirs = trace(run_dir), trace(reference)
    assert ours.keys() == theirs.keys(), "micro-batches lost or invented"
    for place, records in ours.items():
        assert len({record["attempt"] for record in records}) == len(records), f"{place} twice in one attempt"
        for record in records:
            assert {**record, "attempt": 0} == {**theirs[place][0], "attempt": 0}, f"{place} differs"
    return sum(len(records) - 1 for records in ours.values())


def assert_same(run: Run, reference: Run) -> int:
    """The run is the reference, to the bit. Returns how many micro-batches were run more than once."""
    repeated = assert_same_stream(run.dir, reference.dir)
    (step, mine), (wanted, expected) = run.tensors(), reference.tensors()
    assert step == wanted
    assert mine.keys() == expected.keys()
    different = [name for name in mine if mine[name].tobytes() != expected[name].tobytes()]
    assert not different, f"weights or moments differ: {different[:5]}"
    return repeated


def done(log: object) -> list[str]:
    """The kills of a run's log that happened before the run was over."""
    assert isinstance(log, list)
    return [line for line in log if "over before" not in line]


def soak(folder: Path, reference: Run, dataset: Path, kills: int, seed: int, *more: str) -> list[dict[str, object]]:
    """At least `kills` kills over as many runs as it takes, each compared with the uninterrupted `reference`."""
    steps = max(step for step, _ in trace(reference.dir)) + 1
    results: list[dict[str, object]] = []
    number = 0
    while sum(len(done(entry["kills"])) for entry in results) < kills:
        run = Run(folder / f"run-{number:03d}", dataset, *more)
        began = time.monotonic()
        log = run.finish(plan(seed + number, steps), seed + number)
        repeated = assert_same(run, reference)
        results.append({"seed": seed + number, "kills": log, "repeated": repeated, "seconds": round(time.monotonic() - began, 1)})
        print(json.dumps(results[-1]), flush=True)
        shutil.rmtree(run.folder)
        number += 1
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--launcher", choices=["local", "ray"], default="local")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = options.dataset.resolve()
        reference = Run(Path(folder) / "reference", dataset)
        reference.finish()
        soak(Path(folder), reference, dataset, options.kills, options.seed, f"launch.launcher={options.launcher}")


if __name__ == "__main__":
    main()
