"""What a launcher tells a worker, as plain JSON-able values: nothing is pickled, and the supervisor need not load torch."""

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from cluster import hang
from cluster.errors import ClusterError, StoppedError

USER_ERROR_EXIT = 3  # exit code of a worker whose failure is written for the user: trying again would not help
HUNG_EXIT = 4  # of a worker that made no progress, after it wrote down where it was
STOPPED_EXIT = 75  # exit code of a command that stopped early with everything saved; EX_TEMPFAIL of sysexits.h
FAILURE = "failure.json"
STOP, RESIZE = "stop", "resize"
TAIL_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to run, and where.

    entry: "module:function", called with the payload and a Worker. folder: of this launch's logs, in which the gangs' are.
    user_errors: exception classes as "module:name", beside ClusterError, whose text is for the user and which no restart cures.
    stoppable: the entry asks `stopping.stop_asked` and then ends by StoppedError, so SIGTERM need not kill.
    """

    entry: str
    payload: Mapping[str, object]
    run_dir: str
    folder: str
    hang_timeout_s: int
    user_errors: tuple[str, ...]
    stoppable: bool = False

    @property
    def failure(self) -> Path:
        """Where the first rank that meets an error for the user leaves it; then the launch ends."""
        return Path(self.folder) / FAILURE

    def ending(self) -> ClusterError | None:
        """What a rank left for the user, if one did: an error, or that it stopped as it was asked to."""
        try:
            told = json.loads(self.failure.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return StoppedError(told["message"]) if told["stopped"] else ClusterError(told["message"])

    def prepare_stop(self) -> None:
        """Makes the files by which workers anywhere are asked to stop. They are there from the start because network file systems look
        again at a file that is opened, but remember for a minute that a file was not there."""
        for name in (STOP, RESIZE):
            (Path(self.folder) / name).touch()

    def ask_to_stop(self) -> None:
        """Asks the gang to save and end after its current step. May be called by a signal handler."""
        (Path(self.folder) / STOP).write_text("stop\n", encoding="utf-8")

    def ask_to_resize(self, why: str) -> None:
        """The same, for another gang of other size to follow."""
        (Path(self.folder) / RESIZE).write_text(why, encoding="utf-8")

    def stop_asked(self) -> bool:
        """Whether the launcher has been asked to end the job early."""
        return bool(self._asked(STOP))

    def resize_asked(self) -> str:
        """Why the gang shall make room for one of another size; "" when it need not."""
        return self._asked(RESIZE)

    def resized(self) -> None:
        """The gang that was asked to has ended; the next one begins with a clean slate."""
        (Path(self.folder) / RESIZE).write_text("", encoding="utf-8")
        self.failure.unlink(missing_ok=True)

    def _asked(self, name: str) -> str:
        try:
            return (Path(self.folder) / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A worker's place in a gang that is about to form.

    folder: the gang's, for its logs. beat: the file whose modification time is its heartbeat, if the supervisor looks at one.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    threads: int
    folder: str
    beat: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one process of a local gang reads on standard input. parent: its supervisor's pid, with which it shall end.

    rendezvous: the file through which the ranks of this gang find each other; no other gang ever uses it.
    """

    job: Job
    place: Place
    parent: int
    rendezvous: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        raw = json.loads(text)
        job = Job(**{**raw["job"], "user_errors": tuple(raw["job"]["user_errors"])})
        return cls(job=job, place=Place(**raw["place"]), parent=raw["parent"], rendezvous=raw["rendezvous"])


def resolve(name: str) -> object:
    """The object that "module:name" means."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def next_folder(parent: Path, prefix: str) -> Path:
    """Makes and returns `parent`/`prefix`-0001 or the next number that nobody has."""
    parent.mkdir(parents=True, exist_ok=True)
    taken = [name[len(prefix) + 1 :] for name in os.listdir(parent) if name.startswith(f"{prefix}-")]
    number = max((int(name) for name in taken if name.isdigit()), default=0) + 1
    while True:
        folder = parent / f"{prefix}-{number:04d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        return folder


def last_lines(log: Path, count: int) -> list[str]:
    """The last non-empty lines of a worker's output."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (64 << 10)))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip()][-count:]


def tails(folder: Path) -> str:
    """The last lines of every rank's output in a gang's folder."""
    return "\n".join(f"--- {log.name}\n" + "\n".join(last_lines(log, TAIL_LINES)) for log in sorted(folder.glob("rank-*.log")))


def hung_reason(folder: Path, world_size: int, job: Job) -> str | None:
    """That a gang hung, and the file that says where, when a rank of it ended itself because it made no progress; else None."""
    path = hang.gather(folder, world_size)
    if path is not None:
        return f"no rank finished a step for {job.hang_timeout_s} s; where each one was, and its last collectives, are in {path}"
    for log in sorted(folder.glob("rank-*.log")):  # of one that was stuck in native code and could not write that
        if any(line.startswith("Timeout (") for line in last_lines(log, 1000)):
            return f"{log.stem} finished no step for {job.hang_timeout_s} s; where its threads were is in {log}"
    return None


def worker_environment(threads: int) -> dict[str, str]:
    """What must be set before torch loads. OpenMP threads that spin while they wait would starve decoding."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", **hang.ENVIRONMENT}


LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # data ports of a gang on one machine
