"""Starts a gang of workers, watches it, and starts it again when one of them dies.

`launch` runs one function in every worker. Resuming is the function's own business: it looks for the newest checkpoint each time it
starts, so a restart here and the same command typed again are one thing. Three ways, one behaviour:

    local, one worker     in this very process, for a debugger: no supervision, errors come as they are
    local, several        processes of this machine (`local_gang`)
    ray                   actors of a Ray cluster (`ray_gang`), as many as fit; each start looks again

Killing is always SIGKILL: whatever a worker commits is safe at any instant (`checkpoint`).

SIGTERM to the supervisor, where the function can be asked to stop: the gang finishes its step, saves and ends (StoppedError); a second
SIGTERM ends everything at once. Elsewhere the first does.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from cluster import lease
from cluster.errors import LaunchError, StoppedError
from cluster.job import LOOPBACK, Job, Place, next_folder, tails
from cluster.local_gang import run_gang
from cluster.options import LaunchOptions
from cluster.restarts import Restarts, no_progress
from cluster.topology import largest_world_size


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
    for the user: they end the launch at once. on_event gets {"event": "restart", "reason": text, "attempt": of the gang before}, and on
    Ray {"event": "waiting" | "idle", "reason": text, ...} when workers find no place, or places no worker.
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
        from cluster.ray_gang import RayGangs  # Ray takes a second to import
        from cluster.ray_session import ensure_ray

        ensure_ray()  # takes SIGTERM over, so before we do
        with _sigterm(job):
            _supervise(job, RayGangs(job, num_micro_batches, options, on_event).run, restarts, on_event)
        return
    workers, threads = _size(num_micro_batches, options)
    if workers == 1:
        _run_here(job, threads)
        return
    with _sigterm(job):
        _supervise(job, partial(run_gang, job, workers, threads), restarts, on_event)


def _size(num_micro_batches: int, options: LaunchOptions) -> tuple[int, int]:
    """(workers, threads of each) on this machine."""
    cores = len(os.sched_getaffinity(0))
    places = _num_gpus() or cores // max(1, options.cpus_per_worker)
    if options.fewest == options.most:
        places = options.fewest  # who asks for a number gets it, however small the machine
    workers = largest_world_size(num_micro_batches, options, places)
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
    place = Place(rank=0, world_size=1, local_rank=0, local_world_size=1, threads=threads, folder=job.folder)
    before = {name: os.environ.get(name) for name in LOOPBACK}
    os.environ.update(LOOPBACK)
    try:
        with _sigterm(job), gang(job, place, dist.HashStore()) as worker:  # type: ignore[attr-defined]
            function(job.payload, worker)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _supervise(job: Job, run: Callable[[Path], str | None], restarts: Restarts, on_event: Callable[[Mapping[str, object]], None]) -> None:
    """Runs gang after gang in folders of their own until one of them finishes. `run` says why the gang ended, None when it finished."""
    while True:
        folder = next_folder(Path(job.folder), "gang")
        reason = run(folder)
        ending, resize = job.ending(), job.resize_asked()
        if ending is not None and not (resize and isinstance(ending, StoppedError) and not job.stop_asked()):
            raise ending
        if reason is None and ending is None:
            return
        if job.stop_asked():
            raise StoppedError(f"Asked to stop, the workers ended before they could save ({reason}). The same command goes on.")
        delay_s: float | None = 0.0
        if ending is not None:
            reason = resize  # saved and ended as it was asked to: no death
        else:
            delay_s = restarts.delay_s()
        if delay_s is None:
            raise LaunchError(f"{restarts.verdict()} The last time {reason}. Their output is in {folder}:\n{tails(folder)}")
        job.resized()
        on_event({"event": "restart", "reason": reason, "attempt": lease.newest_attempt(Path(job.run_dir)), "delay_s": delay_s})
        time.sleep(delay_s)


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
