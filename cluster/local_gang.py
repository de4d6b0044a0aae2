"""A gang of processes on this machine.

Each has its own session, so that Ctrl-C reaches only the supervisor, which then ends the gang; the kernel kills them when it dies.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster import hang
from cluster.job import LOOPBACK, USER_ERROR_EXIT, Job, Order, Place, hung_reason, last_lines, worker_environment

POLL_S = 0.05
STOPPED_S = 20.0  # how long a process may be stopped (SIGSTOP, a debugger)
SILENT_GRACE_S = 3 * hang.GRACE_S  # a worker that hangs ends itself; one that cannot even do that is ended so long after


@dataclass(slots=True, kw_only=True)
class _Member:
    """One worker as its supervisor sees it. `changed`: when its heartbeat was last seen to move, on the monotonic clock."""

    rank: int
    process: subprocess.Popen[bytes]
    beat: Path
    log: Path
    beat_time: float = 0.0
    changed: float = 0.0
    running: float = 0.0  # when it was last seen not to be stopped

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.process.pid})"

    def silence_s(self) -> float:
        """Seconds since its last heartbeat."""
        try:
            beat_time = self.beat.stat().st_mtime
        except FileNotFoundError:
            beat_time = 0.0  # it is still starting
        if beat_time != self.beat_time:
            self.beat_time, self.changed = beat_time, time.monotonic()
        return time.monotonic() - self.changed

    def stopped_s(self) -> float:
        """Seconds for which it has been seen stopped, asked at each look."""
        if not _is_stopped(self.process.pid):
            self.running = time.monotonic()
        return time.monotonic() - self.running


def run_gang(job: Job, workers: int, threads: int, folder: Path) -> str | None:
    """One gang from start to end: None when every worker finished, else why it was ended. Leaves no process."""
    members: list[_Member] = []
    try:
        for rank in range(workers):
            members.append(_start(job, rank, workers, threads, folder))
        while True:
            time.sleep(POLL_S)
            silent = [(member.silence_s(), member) for member in members if member.process.poll() is None]
            ended = [member for member in members if member.process.returncode not in (None, 0)]
            if ended:
                return hung_reason(folder, workers, job) or _reason(ended)
            if not silent:
                return None
            for silence_s, member in silent:
                if silence_s > job.hang_timeout_s + SILENT_GRACE_S:
                    return hung_reason(folder, workers, job) or f"{member} gave no sign of life for {silence_s:.0f} s"
                if member.stopped_s() > STOPPED_S:
                    return f"{member} has been stopped (SIGSTOP) for {STOPPED_S:.0f} s"
    finally:
        for member in members:
            _kill(member.process)


def _start(job: Job, rank: int, workers: int, threads: int, folder: Path) -> _Member:
    beat, log = folder / f"beat-{rank}", folder / f"rank-{rank}.log"
    place = Place(
        rank=rank, world_size=workers, local_rank=rank, local_world_size=workers, threads=threads, folder=str(folder), beat=str(beat)
    )
    order = Order(job=job, place=place, parent=os.getpid(), rendezvous=str(folder / "rendezvous"))
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cluster.worker"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **worker_environment(threads), **LOOPBACK, "PYTHONPATH": path},
        )
    member = _Member(rank=rank, process=process, beat=beat, log=log, changed=time.monotonic(), running=time.monotonic())
    assert process.stdin is not None
    try:
        with process.stdin as pipe:
            pipe.write(order.to_json().encode())
    except BaseException as error:
        _kill(process)
        if not isinstance(error, BrokenPipeError):
            raise  # a worker that died before it read its order is found dead by the caller
    return member


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a worker and whatever it started."""
    with suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _reason(ended: list[_Member]) -> str:
    """Why the gang ended. A killed worker's peers fail of its absence a moment later, so a signal says more than an exit code."""
    first = min(ended, key=lambda member: (member.process.returncode != USER_ERROR_EXIT, member.process.returncode > 0, member.rank))
    code = first.process.returncode
    if code < 0:
        return f"{first} was killed by {signal.Signals(-code).name}"
    return f"{first} ended with exit code {code}: {''.join(last_lines(first.log, 1))}"
