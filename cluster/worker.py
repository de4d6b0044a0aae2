"""One process of a gang: its process group, its place, its heartbeat; and `python -m cluster.worker`, as `launch` starts it locally.

The ranks of a local gang find each other through a file and exchange data on the loopback interface: nothing listens to the network.
"""

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]

from cluster import hang, lease
from cluster.errors import ClusterError, LaunchError, StoppedError
from cluster.job import HUNG_EXIT, USER_ERROR_EXIT, Job, Order, Place, resolve
from cluster.stopping import look_at, remember_sigterm
from cluster.topology import Worker

BEAT_INTERVAL_S = 1.0

Entry: TypeAlias = Callable[[Mapping[str, object], Worker], None]


class Watch:
    """Ends this process when no heartbeat comes in time, after it has written down where it was (`hang`)."""

    def __init__(self, timeout_s: int, place: Place, log: IO[str]) -> None:
        self._timeout_s, self._place, self._log = timeout_s, place, log
        self._last = -BEAT_INTERVAL_S
        self._left = threading.Event()

    def heartbeat(self) -> None:
        now = time.monotonic()
        if now - self._last < BEAT_INTERVAL_S:
            return
        self._last = now
        if self._place.beat is not None:
            Path(self._place.beat).touch()
        # For a process stuck in native code that holds the interpreter lock: faulthandler's timer needs none.
        faulthandler.dump_traceback_later(self._timeout_s + 2 * hang.GRACE_S, exit=True, file=self._log)

    def _look(self) -> None:
        while not self._left.wait(BEAT_INTERVAL_S):
            silence_s = time.monotonic() - self._last
            if silence_s > self._timeout_s:
                hang.write(Path(self._place.folder), self._place.rank, silence_s)
                time.sleep(hang.GRACE_S)  # for the peers to write theirs: when this process ends, they will fail of that
                os._exit(HUNG_EXIT)

    def __enter__(self) -> Self:
        _watches.append(self)
        self.heartbeat()
        threading.Thread(target=self._look, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        _watches.remove(self)
        faulthandler.cancel_dump_traceback_later()


_watches: list[Watch] = []  # one; none in a process without a supervisor (a single local worker)


def heartbeat() -> None:
    """Tells the supervisor that this worker is getting on. Call it more often than every `hang_timeout_s`: per step, per batch."""
    for watch in _watches:
        watch.heartbeat()


def agree(value: int) -> int:
    """Rank 0's `value` (int64) on every rank. A collective."""
    tensor = _tensor([value])
    dist.broadcast(tensor, 0)
    return int(tensor[0])


def agree_on(values: Sequence[int]) -> list[int]:
    """Rank 0's `values` (int64, any number of them) on every rank. A collective."""
    num = agree(len(values))
    if num == 0:
        return []
    tensor = _tensor(list(values) if dist.get_rank() == 0 else [0] * num)
    dist.broadcast(tensor, 0)
    return [int(value) for value in tensor]


def _tensor(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cuda" if dist.get_backend() == "nccl" else "cpu")


@contextmanager
def gang(job: Job, place: Place, store: Store) -> Iterator[Worker]:
    """Forms the process group (NCCL where workers have GPUs, else gloo), begins an attempt, and yields this rank's Worker."""
    run_dir = Path(job.run_dir)
    device = _device(place)
    torch.set_num_threads(place.threads)
    if device != "cpu":
        torch.cuda.set_device(device)
    # The heartbeat tells slow from stuck, so the group itself never times out.
    backend, patience = ("gloo" if device == "cpu" else "nccl"), timedelta(days=7)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=patience)
    look_at(job if place.rank == 0 else None)
    try:
        pids = _tensor([os.getpid() if rank == place.rank else 0 for rank in range(place.world_size)])
        dist.all_reduce(pids)
        attempt = lease.begin_attempt(run_dir, world_size=place.world_size, pids=pids.tolist()) if place.rank == 0 else 0
        yield Worker(
            rank=place.rank,
            world_size=place.world_size,
            local_rank=place.local_rank,
            local_world_size=place.local_world_size,
            device=device,
            threads=place.threads,
            attempt=agree(attempt),
        )
    finally:
        dist.destroy_process_group()  # closes the connections, so that peers that wait for this rank fail at once


def _device(place: Place) -> str:
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return "cpu"
    if gpus < place.local_world_size:
        raise LaunchError(
            f"launch.workers puts {place.local_world_size} workers on {socket.gethostname()}, which has {gpus} GPUs. "
            "Lower launch.workers, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on CPUs."
        )
    return f"cuda:{place.local_rank}"


def run(job: Job, place: Place, store: Callable[[], Store], log: IO[str]) -> bool:
    """Runs the job's entry as this rank, watched. False when the launch shall end: an error for the user is in `job.failure`.

    Any other failure is raised, for the supervisor to start the gang again.
    """
    user_errors = (ClusterError, *(error for error in map(resolve, job.user_errors) if isinstance(error, type)))
    try:
        with Watch(job.hang_timeout_s, place, log), _reported(job, place.rank, user_errors):
            entry: Entry = resolve(job.entry)  # type: ignore[assignment]
            with gang(job, place, store()) as worker, _reported(job, place.rank, user_errors):
                entry(job.payload, worker)  # what it raises is reported before the peers notice the closing group
    except Exception:
        if not job.failure.exists():
            raise
        if not isinstance(job.ending(), StoppedError):
            traceback.print_exc(file=log)
        return False
    return True


@contextmanager
def _reported(job: Job, rank: int, user_errors: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Leaves the text of an error for the user in `job.failure`; of several ranks and errors the first counts."""
    try:
        yield
    except user_errors as error:
        temporary = job.failure.with_suffix(f".{rank}")
        told = {"rank": rank, "message": str(error), "stopped": isinstance(error, StoppedError)}
        temporary.write_text(json.dumps(told), encoding="utf-8")
        if job.failure.exists():
            temporary.unlink()
        else:
            os.replace(temporary, job.failure)
        raise


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, however that ends (Linux)."""
    pr_set_pdeathsig = 1
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """One rank of a local gang; standard input says which (an Order as JSON). Returns the exit code."""
    order = Order.from_json(sys.stdin.read())
    _die_with(order.parent)
    if order.job.stoppable:
        remember_sigterm()
    finished = run(order.job, order.place, lambda: FileStore(order.rendezvous, order.place.world_size), sys.stderr)
    return 0 if finished else USER_ERROR_EXIT


if __name__ == "__main__":
    # Not this module, which is only "__main__", but the one whose `heartbeat` the entry will import.
    exit_code = importlib.import_module("cluster.worker").main()
    for thread in threading.enumerate():  # as the interpreter would, a save in the background among them
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # taking torch's modules apart one by one lasts longer than a second
