"""A dataset's folder while something is made in it: who may, under which plan, and what a full disk or a killed attempt means.

`data build` works in `build/`, `data append` in `append/`: a plan.json that says what was asked for, then a record per finished shard.
"""

import errno
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pipeline.durable import TEMPORARY, committed
from pipeline.errors import DatasetError, PipelineError
from pipeline.location import Location

LOCK = ".build.lock"
_ABSENT: Mapping[str, object] = {"encode.form": "plain"}  # what was meant before there was such an option
PLAN_VERSION = 3  # of what a plan means and of the records of finished shards


@contextmanager
def only_builder(out: Path) -> Iterator[None]:
    """The kernel's lock on the folder, which ends with the process that holds it. Raises PipelineError when another holds it."""
    descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace") or "another process"
            raise PipelineError(f"{out} is being built by {holder}. Wait for it, stop it, or choose another data.dir.") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def explained(out: Location) -> Iterator[None]:
    """Turns what an operating system says of a full or read-only disk into what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PipelineError(
                f"The disk of {out} is full ({error.strerror}). Free some space and run the same command again: finished shards are kept."
            ) from None
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise PipelineError(f"{error.filename or out} cannot be written ({error.strerror}). Choose another data.dir.") from None
        raise


def compare(out: Location, built: Mapping[str, object], asked: Mapping[str, object], next_step: str) -> None:
    """Raises DatasetError naming every value that was asked for and is another one there."""
    has = {**_ABSENT, **built}
    differences = [f"{name}: it has {has.get(name)!r}, asked for {value!r}" for name, value in asked.items() if has.get(name) != value]
    if differences:
        raise DatasetError(f"{out} holds another dataset. " + "; ".join(differences) + f". {next_step}")


def read_plan(work: Path) -> dict[str, object] | None:
    """What an earlier call wrote down in this folder, None when there is nothing."""
    path = work / "plan.json"
    if not path.is_file():
        return None
    plan = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(plan, dict)
    return plan


def write_plan(work: Path, plan: Mapping[str, object]) -> None:
    with committed(work / "plan.json") as file:
        file.write(json.dumps(plan, indent=1, sort_keys=True).encode() + b"\n")


def remove_leftovers(out: Path, work: Path) -> None:
    """What killed attempts left behind; nobody writes here but the holder of the lock and its tasks."""
    for folder in (out, out / "shards", work):
        for path in folder.glob(TEMPORARY):
            path.unlink(missing_ok=True)
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
