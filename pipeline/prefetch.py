"""What bounds a loader's memory: room for so many bytes in flight, and frame buffers that are used again."""

import threading
from math import prod

import numpy as np
import numpy.typing as npt


class Room:
    """Bytes in flight, up to `limit`; something larger than the limit has room when nothing else is in flight."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()
        self.closed = False

    def take(self, size: int, *, wait: bool) -> bool:
        """Whether there is room for `size` bytes, which are then in use. wait: until there is, or `close`, which always answers no."""
        with self._changed:
            while not self.closed and self._used and self._used + size > self._limit:
                if not wait:
                    return False
                self._changed.wait()
            if self.closed:
                return False
            self._used += size
            return True

    def give(self, size: int) -> None:
        """`size` bytes are no longer in flight."""
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing has room any more."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()


class Buffers:
    """uint8 arrays to use again: a fresh one costs a page fault for each of its pages, several milliseconds a clip.

    There are never more than were in use at the same time: a buffer that is too small for the next frames makes way for theirs.
    """

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """An array of `shape`, contiguous, with arbitrary content."""
        size = prod(shape)
        with self._lock:
            fitting = [i for i, buffer in enumerate(self._free) if buffer.size >= size]
            if fitting:
                return self._free.pop(min(fitting, key=lambda i: self._free[i].size))[:size].reshape(shape)
            if self._free:
                self._free.pop()
        return np.empty(size, dtype=np.uint8).reshape(shape)

    def give(self, array: npt.NDArray[np.uint8]) -> None:
        """Back from its user, who must not touch it any more."""
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        with self._lock:
            self._free.append(base)
