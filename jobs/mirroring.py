"""What the driver of a run does with `checkpoint.mirror`: goes on from it, and copies to it beside the gang.

Training never waits for the store: the gang saves into the run folder, and a thread of the driver copies from there, one checkpoint at
a time, the newest first. A store that stays away is tried again and said once; only at the end of the command is it an error.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import click

from cluster.checkpoint import Checkpoint, CheckpointStore
from cluster.errors import ClusterError
from jobs.checkpoint_mirror import Mirror
from jobs.errors import JobError
from jobs.recipe import Recipe
from jobs.run_folder import checkpoints, identity, newest_checkpoint
from pipeline.errors import PipelineError
from pipeline.index import Dataset

POLL_S = 1.0  # how often the driver looks for new checkpoints
RETRY_S = 60.0  # until a store that was away is tried again, if nothing new is saved before
PATIENCE_S = 2.0  # of a user who is not told what a command waits for

Event = Callable[[Mapping[str, object]], None]


def mirror_of(recipe: Recipe) -> Mirror | None:
    """None without `checkpoint.mirror`. Raises StorageError for a kind of store that is not known."""
    return None if recipe.mirror is None else Mirror(recipe.mirror, recipe.loader.remote)


def resume(recipe: Recipe, dataset: Dataset, mirror: Mirror | None, *, write: bool) -> Checkpoint | None:
    """The newest whole checkpoint of run folder and mirror together; it is in the run folder then. Hold the run folder.

    write: this is a driver that will copy to the mirror. Raises CheckpointError, with both values, where either is of another run, and
    JobError where the mirror does not answer and the run folder has nothing.
    """
    found = newest_checkpoint(recipe, dataset)
    if mirror is None:
        return found
    warn = partial(_warn, prefix="warning: ")
    try:
        store, expect = checkpoints(recipe), identity(recipe, dataset)
        if write:
            mirror.claim(store, expect)
        else:
            mirror.check(store, expect)
        fetched = mirror.fetch(store, found, warn)
    except (PipelineError, OSError) as error:
        if found is None:
            raise JobError(
                f"{recipe.run_dir} has no checkpoint, and checkpoint.mirror={mirror} does not tell whether it has one: {error} "
                "Run the same command again, or set checkpoint.mirror=null to begin anew."
            ) from None
        warn(f"checkpoint.mirror={mirror} was not asked for a newer checkpoint than that of step {found.step}, which is here: {error}")
        return found
    return newest_checkpoint(recipe, dataset) if fetched else found


@contextmanager
def mirrored(mirror: Mirror | None, store: CheckpointStore, expect: Mapping[str, object], event: Event) -> Iterator[None]:
    """Copies what the block saves in `store` to the mirror, beside it; waits for the last copy when it ends, unless it was interrupted.

    expect: what the meta of the mirror's checkpoints must have. event: told of each copy, and once of a store that stays away.
    Raises JobError where the last checkpoint cannot be copied; an error of the block itself comes first.
    """
    if mirror is None:
        yield
        return
    copier = _Copier(mirror, store, expect, event)
    thread = threading.Thread(target=copier.follow, daemon=True)  # so that an interrupted command ends at once
    thread.start()
    try:
        yield
    except Exception:
        try:
            copier.finish(thread)  # what was saved before it was stopped or failed
        except (ClusterError, JobError) as error:
            _warn(str(error), prefix="warning: ")
        raise
    finally:
        copier.stop.set()
    copier.finish(thread)


class _Copier:
    def __init__(self, mirror: Mirror, store: CheckpointStore, expect: Mapping[str, object], event: Event) -> None:
        self._mirror, self._store, self._expect, self._event = mirror, store, expect, event
        self._failing = False
        self.stop = threading.Event()

    def follow(self) -> None:
        """Copies whenever something new stands in the run folder, until `stop`."""
        seen: object = None
        due = math.inf
        while not self.stop.is_set():
            stands = frozenset(self._store.root.glob("step-*/*.json"))  # manifests and scores
            if stands != seen or time.monotonic() >= due:
                seen, due = stands, math.inf
                try:
                    self._copy()
                except ClusterError as error:  # it belongs to a newer driver, or another run: nothing mends that
                    self._say(error)
                    return
                except (PipelineError, OSError) as error:
                    self._say(error)
                    due = time.monotonic() + RETRY_S
            self.stop.wait(POLL_S)

    def _copy(self) -> None:
        self._mirror.copy(self._store, self._expect, self._copied)
        self._failing = False

    def _copied(self, found: Checkpoint, size: int, seconds: float) -> None:
        self._event({"event": "mirror", "step": found.step, "bytes": size, "seconds": round(seconds, 4)})

    def _say(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            self._event({"event": "mirror", "error": str(error)})
            _warn(f"checkpoint.mirror={self._mirror} is behind, training goes on: {error}", prefix="warning: ")

    def finish(self, thread: threading.Thread) -> None:
        """Waits for the copy under way and makes the last one. Raises JobError, or ClusterError where it must not copy."""
        self.stop.set()
        thread.join(PATIENCE_S)
        if thread.is_alive():
            _warn(f"waiting until the last checkpoint is in {self._mirror}")
            thread.join()
        try:
            self._copy()
        except (PipelineError, OSError) as error:
            raise JobError(
                f"The last checkpoint in {self._store.root} is not in checkpoint.mirror={self._mirror}: {error} "
                "Run the same command again, which copies it, or set checkpoint.mirror=null to do without."
            ) from None


def _warn(text: str, prefix: str = "") -> None:
    click.echo(prefix + text, err=True)
