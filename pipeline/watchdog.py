"""Says which read takes long while it does, so that one sees who waits for what."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from pipeline.index import Item

LOOKS = 4  # in the time after which a read is slow


class Watchdog:
    """Between `begin` and `end` a thread's read is watched; one that takes longer than `slow_s` is reported once, (item, seconds so far).

    slow_s: 0 watches nothing. What it costs a read is two changes of a dictionary.
    """

    def __init__(self, slow_s: float, report: Callable[[Item, float], None]) -> None:
        self._slow_s, self._report = slow_s, report
        self._reads: dict[int, tuple[Item, float]] = {}  # by thread
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        if slow_s:
            self._thread.start()

    def begin(self, item: Item) -> None:
        self._reads[threading.get_ident()] = (item, time.monotonic())

    def end(self) -> None:
        del self._reads[threading.get_ident()]

    def reads(self) -> list[tuple[Item, float]]:
        """What is being read now, and for how many seconds it has been."""
        now = time.monotonic()
        return [(item, now - began) for item, began in self._reads.copy().values()]

    def _look(self) -> None:
        told: set[tuple[int, float]] = set()
        while not self._closed.wait(self._slow_s / LOOKS):
            now, reads = time.monotonic(), self._reads.copy()
            told &= {(thread, began) for thread, (_, began) in reads.items()}
            for thread, (item, began) in reads.items():
                if now - began > self._slow_s and (thread, began) not in told:
                    told.add((thread, began))
                    self._report(item, now - began)

    def close(self) -> None:
        """Nothing is reported any more."""
        self._closed.set()
        if self._slow_s:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
