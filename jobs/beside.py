"""Something that watches while something else runs: progress of a gang, a worker to kill, memory."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beside(watch: Callable[[threading.Event], None]) -> Iterator[None]:
    """Runs `watch(stop)` in a thread of its own during the block; at its end sets `stop` and waits for `watch` to return."""
    stop = threading.Event()
    thread = threading.Thread(target=watch, args=(stop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
