"""Many independent tasks on Ray, a bounded number at a time. The only file that knows Ray tasks.

A task must be idempotent: Ray runs it again when the process or machine under it dies. Results come as they are finished.
"""

import sys
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from typing import Any, TypeVar

from cluster.errors import ClusterError
from cluster.ray_session import ensure_ray, ray

Argument = TypeVar("Argument")
Result = TypeVar("Result")

PER_CPU = 2  # tasks submitted per CPU: the next one waits beside the one that runs
SILENCE_S = 15.0  # until a cluster that has no room for a single task is named


def run_tasks(
    function: Callable[[Argument], Result],
    arguments: Iterable[Argument],
    *,
    num_cpus: int | None = None,
    cpus_per_task: float = 1.0,
    max_retries: int = 5,
) -> Generator[tuple[Argument, Result]]:
    """Yields (argument, result) pairs as tasks finish; `arguments` is read only as far as tasks are submitted.

    num_cpus: of the private cluster that is started when none is joined. max_retries: how often one task may lose its process.
    What a task raises is raised here; then, or when the caller stops iterating, all other tasks are cancelled.
    Raises ClusterError when a task lost its process more often than allowed.
    """
    ensure_ray(num_cpus)
    remote = ray.remote(num_cpus=cpus_per_task, max_retries=max_retries)(function)
    limit = max(1, int(PER_CPU * ray.cluster_resources().get("CPU", 1) / cpus_per_task))
    waiting = iter(arguments)
    running: dict[ray.ObjectRef, Argument] = {}
    try:
        while True:
            for following in islice(waiting, limit - len(running)):
                running[remote.remote(following)] = following
            if not running:
                return
            finished, _ = ray.wait(list(running), num_returns=1, timeout=SILENCE_S)
            if not finished:
                _say_if_there_is_no_room(cpus_per_task)
            for reference in finished:
                argument = running.pop(reference)
                result: Result = _outcome(reference)
                yield argument, result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _say_if_there_is_no_room(cpus_per_task: float) -> None:
    """Such tasks wait for ever, unless the cluster grows by itself: so it is no error, but must not be silent."""
    cpus = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if cpus < cpus_per_task:
        print(
            f"waiting: a task needs {cpus_per_task:g} CPU, the largest machine of this Ray cluster has {cpus:g}. "
            "Add machines (ray start --address=...), or press Ctrl-C and unset RAY_ADDRESS to use this machine.",
            file=sys.stderr,
            flush=True,
        )


def _outcome(reference: "ray.ObjectRef") -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # as it was raised, without Ray's account of it
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError) as error:
        raise ClusterError(
            f"A task lost its process again and again: {error}. Look at the memory of the machines; the same command resumes."
        ) from None
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ClusterError(f"Ray ended amid its tasks: {lines[0] if lines else error!r} The same command goes on.") from None
