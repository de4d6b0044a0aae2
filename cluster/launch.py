"""Starts a gang of workers, watches it, and starts it again when one of them dies.

`launch` runs one function in every worker. Resuming is the function's own business: it looks for the newest checkpoint each time it
starts, so a restart here and the same command typed again are one thing. Three ways, one behaviour:

    local, one worker     in this very process, for a debugger: no supervision, errors come as they are
    local, several        processes of this machine (below)
    ray                   Ray Train (`ray_train`)

A local worker has its own session, so that Ctrl-C reaches only the supervisor, which then ends the gang; and the kernel kills it
when the supervisor dies. Killing is always SIGKILL: whatever a worker commits is safe at any instant (`checkpoint`).

SIGTERM to the supervisor, where the function can be asked to stop: the gang finishes its step, saves and ends (StoppedError); a second
SIGTERM ends everything at once. Elsewhere the first does.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cluster import lease
from cluster.errors import LaunchError, StoppedError
from cluster.job import LOOPBACK, USER_ERROR_EXIT, Job, Order, Place, hung, last_lines, next_folder, tails, worker_environment
from cluster.options import LaunchOptions
from cluster.restarts import Restarts, no_progress
from cluster.topology import check_world_size, largest_world_size

POLL_S = 0.05
STOPPED_GRACE_S = 5.0  # a worker that hangs ends itself and leaves its stacks; one that cannot even do that is ended after this


def launch(
    entry: str,
    payload: Mapping[str, object],
    *,
    run_dir: Path,
    num_micro_batches: int,
    options: LaunchOptions,
    on_event: Callable[[Mapping[str, object]], None],
    user_errors: tuple[type[Exception], ...] = (),
    progress: Callable[[], int] = no_progress,
    stoppable: bool = False,
) -> None:
    """Runs `entry` ("module:function", called with payload and Worker) in a gang until every worker has returned.

    payload: JSON-able. num_micro_batches: A; the gang's size divides it. user_errors: exceptions, beside ClusterError, whose text is
    for the user: they end the launch at once. on_event gets {"event": "restart", "reason": text, "attempt": of the dead gang}.
    progress: how far the work is kept, a number that grows; a gang that has raised it gets the whole restart budget again (`restarts`);
    a function of a module, since other processes call it. stoppable: the entry asks `stopping.stop_asked`.
    Raises ClusterError with a worker's text for the user, LaunchError when the gang died more often than `options.max_restarts`,
    StoppedError when it was asked to stop.
    """
    run_dir = run_dir.resolve()
    job = Job(
        entry=entry,
        payload=payload,
        run_dir=str(run_dir),
        folder=str(next_folder(run_dir / "logs", "launch")),
        hang_timeout_s=options.hang_timeout_s,
        user_errors=tuple(f"{error.__module__}:{error.__qualname__}" for error in user_errors),
        stoppable=stoppable,
    )
    job.prepare_stop()
    restarts = Restarts(options.max_restarts, progress)
    if options.launcher == "ray":
        from cluster.ray_session import ensure_ray
        from cluster.ray_train import run_on_ray  # Ray takes a second to import

        ensure_ray()  # takes SIGTERM over, so before we do
        with _sigterm(job):
            run_on_ray(job, num_micro_batches=num_micro_batches, options=options, restarts=restarts, on_event=on_event)
        return
    workers, threads = _size(num_micro_batches, options)
    if workers == 1:
        _run_here(job, threads)
        return
    with _sigterm(job):
        _supervise(job, workers, threads, restarts, on_event)


def _size(num_micro_batches: int, options: LaunchOptions) -> tuple[int, int]:
    """(workers, threads of each) on this machine."""
    cores = len(os.sched_getaffinity(0))
    if options.workers == "auto":
        workers = largest_world_size(num_micro_batches, _num_gpus() or cores // max(1, options.cpus_per_worker))
    else:
        workers = int(options.workers)
        check_world_size(num_micro_batches, workers)
    return workers, options.cpus_per_worker or max(1, cores // workers)


def _num_gpus() -> int:
    """Of this machine, as CUDA would count them, without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    return len([name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()])


def _run_here(job: Job, threads: int) -> None:
    """A gang of one in this process."""
    import torch.distributed as dist  # only this branch needs torch in the supervisor

    from cluster.job import resolve
    from cluster.worker import gang

    function = resolve(job.entry)
    assert callable(function)
    place = Place(rank=0, world_size=1, local_rank=0, local_world_size=1, threads=threads)
    before = {name: os.environ.get(name) for name in LOOPBACK}
    os.environ.update(LOOPBACK)
    try:
        with _sigterm(job), gang(job, place, dist.HashStore()) as worker:  # type: ignore[attr-defined]
            function(job.payload, worker)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _supervise(job: Job, workers: int, threads: int, restarts: Restarts, on_event: Callable[[Mapping[str, object]], None]) -> None:
    while True:
        folder = next_folder(Path(job.folder), "gang")
        reason = _run_gang(job, workers, threads, folder)
        ending = job.ending()
        if ending is not None:
            raise ending
        if reason is None:
            return
        if job.stop_asked():
            raise StoppedError(f"Asked to stop, the workers ended before they could save ({reason}). The same command goes on.")
        delay_s = restarts.delay_s()
        if delay_s is None:
            raise LaunchError(f"{restarts.verdict()} The last time {reason}. Their output is in {folder}:\n{tails(folder)}")
        on_event({"event": "restart", "reason": reason, "attempt": lease.newest_attempt(Path(job.run_dir)), "delay_s": delay_s})
        time.sleep(delay_s)


@dataclass(slots=True, kw_only=True)
class _Member:
    """One worker as its supervisor sees it. `changed`: when its heartbeat was last seen to move, on the monotonic clock."""

    rank: int
    process: subprocess.Popen[bytes]
    beat: Path
    log: Path
    beat_time: float = 0.0
    changed: float = 0.0

    def silence_s(self) -> float:
        """Seconds since its last heartbeat."""
        try:
            beat_time = self.beat.stat().st_mtime
        except FileNotFoundError:
            beat_time = 0.0  # it is still starting
        if beat_time != self.beat_time:
            self.beat_time, self.changed = beat_time, time.monotonic()
        return time.monotonic() - self.changed


def _run_gang(job: Job, workers: int, threads: int, folder: Path) -> str | None:
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
                return _reason(ended, job.hang_timeout_s)
            if not silent:
                return None
            longest, member = max(silent, key=lambda pair: pair[0])
            if longest > job.hang_timeout_s + STOPPED_GRACE_S:
                return f"rank {member.rank} (pid {member.process.pid}) gave no sign of life for {longest:.0f} s"
    finally:
        for member in members:
            _kill(member.process)


def _start(job: Job, rank: int, workers: int, threads: int, folder: Path) -> _Member:
    beat, log = folder / f"beat-{rank}", folder / f"rank-{rank}.log"
    place = Place(rank=rank, world_size=workers, local_rank=rank, local_world_size=workers, threads=threads, beat=str(beat))
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
    member = _Member(rank=rank, process=process, beat=beat, log=log, changed=time.monotonic())
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


def _reason(ended: list[_Member], hang_timeout_s: int) -> str:
    """Why the gang ended. A killed worker's peers fail of its absence a moment later, so a signal says more than an exit code."""
    first = min(ended, key=lambda member: (member.process.returncode != USER_ERROR_EXIT, member.process.returncode > 0, member.rank))
    who, code = f"rank {first.rank} (pid {first.process.pid})", first.process.returncode
    if code < 0:
        return f"{who} was killed by {signal.Signals(-code).name}"
    if hung(first.log):
        return f"{who} finished no step for {hang_timeout_s} s; where its threads were is in {first.log}"
    return f"{who} ended with exit code {code}: {''.join(last_lines(first.log, 1))}"


@contextmanager
def _sigterm(job: Job) -> Iterator[None]:
    """SIGTERM asks a gang to stop if it can be asked. Else, and the second time, it unwinds this process, so that the gang ends with it,
    instead of ending it on the spot. In the main thread only."""
    asked: list[int] = []
    leaving: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if job.stoppable and not asked:
            asked.append(number)
            job.ask_to_stop()
            return
        leaving.append(number)
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, on_signal)
    except ValueError:
        yield  # not the main thread: whoever has it decides
        return
    try:
        yield
    except SystemExit:
        if leaving:  # on its way through Ray the exit code becomes 1
            raise SystemExit(128 + leaving[0]) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
