"""CPU-seconds of what runs in other processes."""

import contextlib
import resource

import psutil


def children_cpu_s() -> float:
    """Of all children so far that have ended and were waited for, with what they themselves waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def family_cpu_s() -> float:
    """Of this process and all below it that are there now, with what each of them waited for."""
    total, own = 0.0, psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
