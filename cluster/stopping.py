"""How a worker hears that its gang shall stop early: a SIGTERM of its own, or, on rank 0, the launcher's files
(`Job.ask_to_stop`, `Job.ask_to_resize`).

Apart from `worker`, because SIGTERM is remembered in Ray's processes before torch may be loaded.
"""

import signal
from types import FrameType

from cluster.job import Job

_sigterms: list[int] = []  # that this process got since it began to remember them
_jobs: list[Job] = []  # whose stop file this process looks at


def remember_sigterm() -> None:
    """From now on the first SIGTERM makes `stop_asked` true; a second one ends the process. For the main thread."""

    def remember(number: int, frame: FrameType | None) -> None:
        _sigterms.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    _sigterms.clear()
    signal.signal(signal.SIGTERM, remember)


def look_at(job: Job | None) -> None:
    """Which job's stop file `stop_asked` looks at, from now on."""
    _jobs[:] = [job] if job is not None else []


def stop_asked() -> bool:
    """Whether this rank knows that the gang shall end after its current step.

    Ranks may differ: agree before acting, as `Engine.train_step` does. Then save, and raise StoppedError on every rank.
    """
    return bool(_sigterms) or any(job.stop_asked() or job.resize_asked() for job in _jobs)


def stop_reason() -> str:
    """Why rank 0 knows that the gang shall end: "SIGTERM", or "resize"; "" when it knows of nothing."""
    if _sigterms or any(job.stop_asked() for job in _jobs):
        return "SIGTERM"
    return "resize" if any(job.resize_asked() for job in _jobs) else ""
