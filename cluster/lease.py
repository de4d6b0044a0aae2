"""Who may write to a run folder: one driver at a time (a lock), and of its gangs only the newest (a fence).

The lock is the kernel's: it ends with the process that holds it, however that process ends. It cannot stop a worker on another
machine that was cut off and does not know that it was replaced; so each gang takes the next attempt number when it starts, and
whoever is about to commit looks whether a newer one exists.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ClusterError, FencedError

LOCK = "run.lock"
ATTEMPTS = "attempts"


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Holds the run folder (created if missing) for this process. Raises ClusterError naming the holder if there is one."""
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(
                f"{run_dir} is in use by {_holder(run_dir / LOCK)}. Wait for it, stop it, or choose another run.dir."
            ) from None
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "start": time.time()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(facts).encode(), 0)
        yield
    finally:
        os.close(descriptor)  # releases the lock; the file stays, because removing it would race with the next holder


def _holder(lock: Path) -> str:
    try:
        facts = json.loads(lock.read_text(encoding="utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["start"]))
        return f"process {facts['pid']} on {facts['host']} since {since}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has not written its name yet


def _numbers(run_dir: Path) -> list[int]:
    try:
        names = os.listdir(run_dir / ATTEMPTS)
    except FileNotFoundError:
        return []
    return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())


def newest_attempt(run_dir: Path) -> int:
    """The number of the newest attempt; 0 before the first."""
    return max(_numbers(run_dir), default=0)


def begin_attempt(run_dir: Path, **facts: object) -> int:
    """Takes the next attempt number, from 1, and records `facts` (JSON) under it. Fences every earlier attempt."""
    folder = run_dir / ATTEMPTS
    folder.mkdir(parents=True, exist_ok=True)
    number = newest_attempt(run_dir) + 1
    while True:
        try:
            descriptor = os.open(folder / f"{number:06d}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            break
        except FileExistsError:
            number += 1  # someone else took it in this moment
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"attempt": number, "time": time.time(), "host": socket.gethostname(), **facts}, file)
        file.flush()
        os.fsync(file.fileno())
    return number


def check(run_dir: Path, attempt: int) -> None:
    """Raises FencedError when a newer attempt than `attempt` has begun."""
    newest = newest_attempt(run_dir)
    if newest > attempt:
        raise FencedError(
            f"{run_dir}: attempt {newest} has taken over from attempt {attempt}, whose workers were given up. Nothing was written."
        )


def read_attempts(run_dir: Path) -> list[dict[str, object]]:
    """What each attempt recorded when it began, oldest first. One that was killed while writing has only its number."""
    found = []
    for number in _numbers(run_dir):
        try:
            facts = json.loads((run_dir / ATTEMPTS / f"{number:06d}.json").read_text(encoding="utf-8"))
        except ValueError:
            facts = {}
        found.append({**facts, "attempt": number})
    return found
