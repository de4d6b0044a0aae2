"""Seeded kills of real builds: whatever dies whenever, the finished dataset is the uninterrupted one, byte by byte.

Victims are the driver, a Ray worker, the child that decodes, its fork for one video, and on request Ray's own processes. After each
kill the build goes on by itself or is started again. Compared: every file; the inodes and times of shards that were finished when
something died; that no process and no other file is left. A sample runs in the tests; `make soak` runs more.
Usage: python tests/jobs/soak_build.py --data DIR --kills N --seed S
"""

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

VICTIMS = ("driver", "worker", "decoder", "fork")
RAY = ("raylet", "gcs_server")  # Ray itself; then the build ends, with an error
KILLS_PER_BUILD = 2
DEADLINE_S = 300.0
SLOW_TO_LEAVE = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray's own; up to a minute when killed while they start
LOCK = ".build.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """SIGKILL to `victim`, `delay_s` after `shards` shards are finished."""

    victim: str
    shards: int
    delay_s: float

    def __str__(self) -> str:
        return f"{self.victim} {self.delay_s:.2f} s after shard {self.shards}"


def plan(seed: int, kills: int, num_shards: int, victims: Sequence[str] = VICTIMS) -> list[Kill]:
    """Kills in the order of their moments; the last moment is the merge of all shards."""
    draw = random.Random(seed)
    drawn = [Kill(victim=draw.choice(victims), shards=draw.randint(0, num_shards), delay_s=draw.uniform(0, 0.4)) for _ in range(kills)]
    return sorted(drawn, key=lambda kill: (kill.shards, kill.delay_s))


def soak(videos: Path, *, kills: int, seed: int, wait_for_ray: bool = True, victims: Sequence[str] = VICTIMS) -> list[dict[str, object]]:
    """One entry per killed build: seed, kills (as text), seconds. Raises AssertionError, with the seed, at the first difference.

    wait_for_ray: also wait, at the end, for those processes of Ray that take a minute to leave.
    """
    slow: list[psutil.Process] = []
    entries: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="posmlp-soak-build-") as name:
        reference = Path(name) / "reference"
        _wait(_start(videos, reference), expect=0)
        num_shards = len(list((reference / "shards").iterdir()))
        for number, first in enumerate(range(0, kills, KILLS_PER_BUILD)):
            began = time.monotonic()
            own = seed + number
            out = Path(name) / "killed"
            told = _killed_build(videos, out, plan(own, min(KILLS_PER_BUILD, kills - first), num_shards, victims), own, slow)
            _compare(reference, out, own)
            shutil.rmtree(out)
            entries.append({"seed": own, "kills": told, "seconds": round(time.monotonic() - began, 1)})
    if wait_for_ray:
        _assert_gone(slow, 120, seed)
    return entries


def _killed_build(videos: Path, out: Path, kills: list[Kill], seed: int, slow: list[psutil.Process]) -> list[str]:
    """Builds `out` through all the kills and returns what happened; processes in no hurry to leave are added to `slow`."""
    told: list[str] = []
    finished: dict[str, tuple[int, int]] = {}
    driver = _start(videos, out)
    for kill in kills:
        if driver.poll() is not None:
            driver = _start(videos, out)
        family = _kill(driver, out, kill)
        told.append(str(kill) if family is not None else f"{kill}: over before")
        finished |= _finished(out)
        if kill.victim in ("driver", *RAY) and family is not None:
            driver.wait(DEADLINE_S)
            slow += [process for process in family if process.is_running() and process.name() in SLOW_TO_LEAVE]
            _assert_gone([process for process in family if process not in slow], 30, seed)
    for _ in range(3):
        if _wait(driver) == 0 and (out / "dataset.json").is_file():
            break
        driver = _start(videos, out)
    for file, identity in finished.items():
        status = (out / file).stat()
        assert (status.st_ino, status.st_mtime_ns) == identity, f"seed {seed}: finished {file} was written again"
    return told


def _assert_gone(family: list[psutil.Process], timeout_s: float, seed: int) -> None:
    _, alive = psutil.wait_procs(family, timeout=timeout_s)
    assert not alive, f"seed {seed}: {timeout_s:g} s after the driver's death these still run: {alive}"


def _start(videos: Path, out: Path) -> subprocess.Popen[bytes]:
    labels = ["--labels", str(videos / "labels.csv")] if (videos / "labels.csv").is_file() else []
    command = [sys.executable, "-m", "jobs", "data", "build", "--videos", str(videos), *labels, "--out", str(out)]
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait(driver: subprocess.Popen[bytes], expect: int | None = None) -> int:
    code = driver.wait(DEADLINE_S)
    assert expect is None or code == expect, f"the build ended with exit code {code}"
    return code


def _kill(driver: subprocess.Popen[bytes], out: Path, kill: Kill) -> list[psutil.Process] | None:
    """Waits for the moment and kills. Returns the driver's descendants just before, or None when the build was over first."""
    deadline = time.monotonic() + DEADLINE_S
    moment: float | None = None
    while driver.poll() is None:
        assert time.monotonic() < deadline, f"{kill} never came"
        if moment is None and len(list((out / "build").glob("shard-*.arrow"))) >= kill.shards and (out / "build" / "plan.json").is_file():
            moment = time.monotonic() + kill.delay_s
        if moment is not None and time.monotonic() >= moment:
            family = _family(driver)
            victims = [psutil.Process(driver.pid)] if kill.victim == "driver" else _victims(family, kill.victim)
            if victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victims[0].kill()
                    return family
        time.sleep(0.005)
    return None


def _family(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _victims(family: list[psutil.Process], victim: str) -> list[psutil.Process]:
    """Ray workers at work, their decoding children, or the forks of those; lowest process number first."""
    decoders, workers, ray = [], [], []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "pipeline.media_worker" in process.cmdline():
                decoders.append(process)
            elif process.name().startswith("ray::build_shard"):
                workers.append(process)
            elif process.name() == victim:
                ray.append(process)
    pids = {process.pid for process in decoders}
    forks = [process for process in decoders if process.ppid() in pids]
    kinds = {"worker": workers, "decoder": [process for process in decoders if process not in forks], "fork": forks}
    return sorted(kinds.get(victim, ray), key=lambda process: process.pid)


def _finished(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of modification of every shard that has its record."""
    found = {}
    for record in (out / "build").glob("shard-*.arrow"):
        file = f"shards/{record.stem}.tar"
        with contextlib.suppress(FileNotFoundError):  # a shard without items goes when all are merged
            status = (out / file).stat()
            found[file] = (status.st_ino, status.st_mtime_ns)
    return found


def _compare(reference: Path, out: Path, seed: int) -> None:
    trees = []
    for root in (reference, out):
        files = {os.path.relpath(os.path.join(folder, name), root) for folder, _, names in os.walk(root) for name in names}
        trees.append(files - {LOCK})
    assert trees[0] == trees[1], f"seed {seed}: files differ: {sorted(trees[0] ^ trees[1])}"
    for file in sorted(trees[0]):
        assert (reference / file).read_bytes() == (out / file).read_bytes(), f"seed {seed}: {file} differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of videos, with labels.csv or class folders")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--victims", nargs="+", choices=[*VICTIMS, *RAY], default=VICTIMS)
    options = parser.parse_args()
    for entry in soak(options.data, kills=options.kills, seed=options.seed, victims=options.victims):
        print(f"seed {entry['seed']}: {'; '.join(map(str, entry['kills']))}: equal, {entry['seconds']} s")  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
