"""What one machine keeps of remote datasets on its own disk: a folder each, shared by all processes, limited in bytes.

    HOME/lock         held for an instant while something is counted, opened or removed
    HOME/NAME.use     locked (shared) while a process reads NAME; holds its size in bytes; its time is that of the last use
    HOME/NAME/        the files, each under its name only when it is whole

The order of training visits every video of an epoch once. Least recently used first would throw out what the next epoch needs: with
room for half of a dataset it finds 15 % of an epoch. So what is in stays in while its dataset is read, which finds the half; whole
datasets that nobody reads make room, the least recently used first. Locks are the kernel's and end with their process.
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from pipeline.durable import temporary_name
from pipeline.errors import StorageError

FULL_S = 60.0  # so long a full cache is not asked again
FREE_BYTES = 1 << 30  # of the disk stay free
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class CacheFolder:
    """The folder of one dataset, in use until it is closed or the process ends."""

    def __init__(self, path: Path, use: int, limit: int) -> None:
        self.path = path
        self._use, self._limit = use, limit
        self._full_until = 0.0

    @classmethod
    def open(cls, home: Path, name: str, limit: int) -> Self:
        """home: made if missing. limit: bytes of everything in it. Raises StorageError when it cannot be written."""
        try:
            home.mkdir(parents=True, exist_ok=True)
            with _locked(home / "lock"):
                use = os.open(home / f"{name}.use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                fcntl.flock(use, fcntl.LOCK_SH)  # granted at once: whoever wants it alone holds the folder's lock, as we do
                os.utime(use)
                (home / name).mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"The cache {home} cannot be used ({error.strerror}). Set loader.remote.cache_dir.") from None
        return cls(home / name, use, limit)

    def get(self, file: str) -> bytes | None:
        """A file's bytes, None when it is not in."""
        try:
            return (self.path / file).read_bytes()
        except FileNotFoundError:
            return None

    def add(self, file: str, data: bytes) -> None:
        """Keeps a file, where there is room for it. What is torn by a crash later shows by its checksum, so nothing is synced."""
        target = self.path / file
        if not self._reserve(len(data)):
            return
        temporary = temporary_name(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in FULL_DISK:
                raise
            self._full_until = time.monotonic() + FULL_S

    def drop(self, file: str) -> None:
        (self.path / file).unlink(missing_ok=True)

    def once(self, file: str, size: int, make: Callable[[Path], None], *, sound: Callable[[Path], bool]) -> Path:
        """A file that every reader of the dataset needs: made by one process while the others wait. It is kept even in a full cache.

        make: writes it under the path given, whole or not at all. sound: whether one that is there can be used.
        """
        target = self.path / file
        with _locked(self.path / "making"):
            if not sound(target):
                if not target.exists():
                    self._reserve(size)
                make(target)
        return target

    def close(self) -> None:
        """Nobody may rely on the folder any more."""
        if self._use >= 0:
            os.close(self._use)
            self._use = -1

    def __del__(self) -> None:
        self.close()

    def _reserve(self, size: int) -> bool:
        """Counts `size` more bytes, if need be in place of datasets that are not in use; whether there was room."""
        if time.monotonic() < self._full_until:
            return False
        home = self.path.parent
        with _locked(home / "lock"):
            uses = {path: _count(path) for path in home.glob("*.use")}
            own = home / f"{self.path.name}.use"
            for path in sorted(uses.keys() - {own}, key=lambda path: path.stat().st_mtime):
                if self._fits(sum(uses.values()) + size, size):
                    break
                if _remove(home, path):
                    del uses[path]
            fits = self._fits(sum(uses.values()) + size, size)
            if fits:
                os.pwrite(self._use, b"%020d" % (uses.get(own, 0) + size), 0)
        if not fits:
            self._full_until = time.monotonic() + FULL_S
        return fits

    def _fits(self, total: int, size: int) -> bool:
        return total <= self._limit and shutil.disk_usage(self.path).free >= size + FREE_BYTES


def _count(use: Path) -> int:
    return int(use.read_text(encoding="ascii") or 0)


def _remove(home: Path, use: Path) -> bool:
    """Removes the dataset of `use`, which nobody reads and is this user's; whether it did. The caller holds the folder's lock."""
    try:
        descriptor = os.open(use, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):  # a process was killed right here
            shutil.rmtree(home / use.stem)
        use.unlink()
    except (BlockingIOError, PermissionError):
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
