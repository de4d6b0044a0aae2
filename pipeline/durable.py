"""Files that exist whole or not at all: written and synced under a name of their own, then renamed, then the folder synced."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".*.tmp"  # the pattern of names that `temporary_name` gives


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process uses. Whoever finds one that nobody writes any more may remove it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")


def commit(temporary: Path, path: Path) -> None:
    """Gives a written and synced file its name, durably."""
    os.replace(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def committed(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under `path` whole, synced and durable when the block ends, or not at all."""
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Of a whole file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
