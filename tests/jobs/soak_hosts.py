"""A training on three hosts that lose one another, end to end: it ends by itself and has seen what an uninterrupted one sees.

Submitted to a Ray cluster of three hosts (`tests.cluster.hosts`), a host is killed in the middle of an epoch and comes back, a link is
cut for 10 s, then for 60 s. Compared with an uninterrupted run on one machine: every position, key, label, frame, crop and tensor
digest; the final accuracy, with the spread of several seeds; and, from each checkpoint at which the number of workers changed, the next
gradient's norm and the losses of the 20 steps that follow, with one worker's.

Usage: python -m tests.jobs.soak_hosts --videos DIR --labels CSV --out FOLDER [--steps 300]. What is finished in FOLDER is not done again.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.checkpoint import CheckpointStore
from cluster.errors import ClusterError
from cluster.lease import hold
from cluster.metrics import merge_steps, read_metrics
from tests.cluster import hosts, ray_hosts
from tests.cluster.hosts import Host, Lab
from tests.jobs.soak_train import assert_same_stream

ROOT = Path(__file__).parent.parent.parent
SHARED = "/tmp/shared"
SEEDS = (0, 1, 2, 3, 4, 5)
FOLLOWED = 20  # steps after a change of the number of workers
DEADLINE_S = 1800.0
# A host is taken for dead some 25 s after its link is cut: 10 s are waited for, 60 s are not.
HEALTH = {"RAY_health_check_period_ms": "2000", "RAY_health_check_timeout_ms": "5000", "RAY_health_check_failure_threshold": "4"}


class Trial:
    """Folder, recipe and length of everything that is compared. Six micro-batches a step: one, two, three or six workers."""

    def __init__(self, out: Path, steps: int) -> None:
        self.out, self.steps = out, steps

    def words(self, verb: str, run: Path | str, dataset: Path | str, *more: str) -> list[str]:
        same = ["train.global_batch=24", "train.micro_batch=4", f"train.steps={self.steps}", "engine.precision=fp32"]
        kept = ["checkpoint.every=25", "checkpoint.keep=1000", "train.trace=true", "launch.cpus_per_worker=1"]
        return [verb, "jhmdb12", f"run.dir={run}", f"data.dir={dataset}", *same, *kept, *more]

    def local(self, *words: str) -> None:
        subprocess.run([sys.executable, "-m", "jobs", *words], check=True, cwd=ROOT)

    def reference(self, seed: int) -> Path:
        run = self.out / f"seed-{seed}"
        if not (run / "eval.json").exists():
            self.local(*self.words("train", run, self.out / "dataset", f"run.seed={seed}", "launch.launcher=local", "launch.workers=2"))
            self.local("eval", str(run))
        return run


class Survival:
    """The run on three hosts, and what happens to it."""

    def __init__(self, trial: Trial, lab: Lab) -> None:
        self.trial, self.lab = trial, lab
        self.run = lab.shared / "run"
        self.head, self.second, self.third = (lab.host(f"h{number}") for number in (1, 2, 3))
        self.log: list[str] = []

    def events(self, kind: str) -> list[Mapping[str, Any]]:
        return [event for event in read_metrics(self.run / "metrics.jsonl") if event["event"] == kind]

    def last_step(self) -> int:
        return max((int(event["step"]) for event in self.events("step")), default=0)

    def until(self, what: str, true: Callable[[], bool]) -> float:
        """Waits; returns the seconds it took."""
        began = time.monotonic()
        while not true():
            if time.monotonic() - began > DEADLINE_S:
                raise AssertionError(f"{what} did not come; {self.log}")
            time.sleep(0.1)
        return time.monotonic() - began

    def join(self, host: Host) -> None:
        ray_hosts.begun(ray_hosts.begin_ray(host, None if host is self.head else self.head))

    def steps_with(self, workers: int, since: float) -> Callable[[], bool]:
        """Whether a gang of so many workers, begun after `since`, has made a step."""

        def true() -> bool:
            sizes = {event["attempt"]: event["world_size"] for event in self.events("attempt") if float(event["time"]) > since}
            return any(sizes.get(event["attempt"]) == workers for event in self.events("step")[-5:])

        return true

    def say(self, text: str) -> None:
        self.log.append(text)
        print(text, flush=True)

    def pass_through(self) -> None:
        """The whole story."""
        for host in (self.head, self.second, self.third):
            self.join(host)
        words = self.trial.words("train", f"{SHARED}/run", f"{SHARED}/dataset", "run.seed=0")
        environment = {
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "RAY_API_SERVER_ADDRESS": ray_hosts.url(self.head),
            **ray_hosts.CLOSED,
        }
        done = self.head.run(sys.executable, "-m", "jobs", "submit", "--no-wait", "--", *words, environment=environment, timeout_s=300)
        assert done.returncode == 0, done.stdout + done.stderr
        self.say(f"submitted; first step with three workers {self.until('a step', self.steps_with(3, 0.0)):.1f} s later")
        self.until("an epoch's middle", lambda: self.last_step() >= 30)

        self.misfortune("kill -9 of a host", 2, self.third.kill)
        self.third.boot()
        self.recovery("the host is back, ray start", 3, lambda: self.join(self.third))

        self.cut(10.0)
        self.cut(60.0)
        self.until("the end", lambda: bool(self.events("end")))
        self.until("the driver's end", lambda: not _in_use(self.run))
        self.say(f"ended by itself at step {self.last_step()} with {len(self.events('restart'))} restarts")
        joined = {**environment, "RAY_ADDRESS": f"{self.head.address}:6379"}
        judged = self.head.run(sys.executable, "-m", "jobs", "eval", f"{SHARED}/run", environment=joined, timeout_s=DEADLINE_S)
        assert judged.returncode == 0, judged.stdout + judged.stderr

    def misfortune(self, what: str, workers: int, happens: Callable[[], None]) -> None:
        before, since = self.last_step(), time.time()
        happens()
        seconds = self.until(f"a step with {workers} workers", self.steps_with(workers, since))
        self.say(f"{what} after step {before}: next step with {workers} workers {seconds:.1f} s later")

    def recovery(self, what: str, workers: int, happens: Callable[[], None]) -> None:
        self.misfortune(what, workers, happens)
        mark = self.last_step()
        self.until("some steps in peace", lambda: self.last_step() >= mark + 10 or bool(self.events("end")))

    def cut(self, seconds: float) -> None:
        before, attempts = self.last_step(), len(self.events("attempt"))
        self.second.cut()
        began = time.monotonic()
        time.sleep(seconds)
        during = len(self.events("attempt")) - attempts
        sizes = [event["world_size"] for event in self.events("attempt")[attempts:]]
        self.second.restore()
        if during == 0:
            reached = self.last_step()
            self.until("a step", lambda: self.last_step() > reached)
            again = len(self.events("attempt")) - attempts
            self.say(f"link cut for {seconds:.0f} s after step {before}: {again} restarts, a step {time.monotonic() - began:.1f} s after")
            return
        self.say(f"link cut for {seconds:.0f} s after step {before}: meanwhile gangs of {sizes} workers, at step {self.last_step()}")
        # Its raylet was declared dead and ends when it hears so; whatever watches over the host starts it again, on another port.
        self.until("the old raylet's end", lambda: not any(_is_raylet(pid) for pid in self.second.pids()))
        self.second.boots += 1
        self.recovery("the link is back, ray start", 3, lambda: self.join(self.second))

    def changes(self) -> list[Mapping[str, Any]]:
        """The attempts that began from a checkpoint with another number of workers than the one before."""
        attempts = self.events("attempt")
        pairs = itertools.pairwise(attempts)
        return [after for before, after in pairs if after["world_size"] != before["world_size"] and int(after["step"]) > 0]


def _in_use(run: Path) -> bool:
    try:
        with hold(run):
            return False
    except ClusterError:
        return True


def _is_raylet(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "raylet"
    except OSError:
        return False


def follow_one_worker(trial: Trial, run: Path, change: Mapping[str, Any]) -> tuple[float, float]:
    """(difference of the next gradient's norm, greatest of the following losses), relative to one worker from the same checkpoint."""
    start = int(change["step"])
    alone = trial.out / f"from-{start}-{change['attempt']}"
    shutil.rmtree(alone, ignore_errors=True)
    found = next(each for each in CheckpointStore(run / "checkpoints", keep=1).manifests() if each.step == start)
    shutil.copytree(found.path, alone / "checkpoints" / found.path.name)
    words = trial.words("train", alone, trial.out / "dataset", "run.seed=0", "launch.launcher=local", "launch.workers=1")
    process = subprocess.Popen([sys.executable, "-m", "jobs", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (own := _steps(alone)) or max(own) < min(start + FOLLOWED, trial.steps):
        assert process.poll() in (None, 0), f"{alone} failed"
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.wait()
    theirs = {
        int(event["step"]): event
        for event in map(dict[str, Any], read_metrics(run / "metrics.jsonl"))
        if event["event"] == "step" and event["attempt"] == change["attempt"]
    }
    steps = sorted(own.keys() & theirs.keys())[:FOLLOWED]
    assert steps
    assert steps[0] == start + 1
    losses = max(abs(own[step]["loss"] - theirs[step]["loss"]) / abs(own[step]["loss"]) for step in steps)
    norm = abs(own[steps[0]]["grad_norm"] - theirs[steps[0]]["grad_norm"]) / own[steps[0]]["grad_norm"]
    return norm, losses


def _steps(run: Path) -> dict[int, Mapping[str, Any]]:
    return {int(str(event["step"])): event for event in merge_steps(read_metrics(run / "metrics.jsonl"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    hosts.require()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    trial = Trial(out, options.steps)
    trial.local("data", "build", "--videos", str(options.videos), "--labels", str(options.labels), "--out", str(out / "dataset"))
    shared = out / "shared"
    if not (shared / "run" / "eval.json").exists():
        shutil.rmtree(shared, ignore_errors=True)
        shutil.copytree(out / "dataset", shared / "dataset", copy_function=os.link)
        with Lab(shared=shared, environment={**ray_hosts.ENVIRONMENT, **HEALTH}) as lab:
            survival = Survival(trial, lab)
            survival.pass_through()
            (out / "log.json").write_text(json.dumps({"log": survival.log, "changes": survival.changes()}))
    kept = json.loads((out / "log.json").read_text())
    references = [trial.reference(seed) for seed in SEEDS]
    repeated = assert_same_stream(shared / "run", references[0])
    print(f"\nThe stream of all {trial.steps} steps equals the uninterrupted one; {repeated} micro-batches were run more than once.")
    for change in kept["changes"]:
        norm, losses = follow_one_worker(trial, shared / "run", change)
        assert norm <= 1e-5, (change, norm)
        assert losses <= 1e-4, (change, losses)
        print(f"From step {change['step']} with {change['world_size']} workers: next gradient's norm {norm:.1e}, losses {losses:.1e} off.")
    own, *others = (json.loads((run / "eval.json").read_text())["top1"] for run in (shared / "run", *references))
    spread = f"mean {statistics.mean(others):.3f}, {min(others):.3f} to {max(others):.3f}"
    print(f"top-1 {own:.3f}; uninterrupted, seeds {SEEDS}: {', '.join(f'{each:.3f}' for each in others)} ({spread})")


if __name__ == "__main__":
    main()
