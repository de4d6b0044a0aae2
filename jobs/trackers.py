"""A run's figures elsewhere: TensorBoard files, MLflow, Weights & Biases (`track` in the recipe), Ray's metrics endpoint.

They get what metrics.jsonl gets, from a thread of rank 0, so that a slow server delays no step. Whatever goes wrong with one of them
is told once and ends that one alone.
"""

import importlib
import math
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from cluster.ray_gauges import gauges
from jobs.recipe import Recipe

PENDING = 1000  # events that wait for a slow tracker; later ones are left out
CLOSE_S = 20.0  # how long the end of a run waits for what is still to be sent

Figures: TypeAlias = Mapping[str, float]
Send: TypeAlias = Callable[[int, Figures], None]


class Trackers:
    """Sends steps and validations on. tell: gets a sentence when a tracker fails."""

    def __init__(self, recipe: Recipe, start: int, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._opened: dict[str, tuple[Send, Callable[[], None]]] = {}
        makers = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}
        wanted = [name for name in makers if getattr(recipe.track, name)]
        self._makers = {name: makers[name] for name in wanted} | ({"ray": _ray} if "ray" in sys.modules else {})
        self._recipe, self._start = recipe, start
        self._queue: queue.Queue[tuple[int, Figures] | None] = queue.Queue(PENDING)
        self._thread = threading.Thread(target=self._run, name="trackers", daemon=True)
        if self._makers:
            self._thread.start()

    def send(self, event: Mapping[str, object]) -> None:
        """A step or a validation; never waits and never raises."""
        step, kind = event.get("step"), event.get("event")
        if not self._thread.is_alive() or not isinstance(step, int) or kind not in ("step", "validation"):
            return
        parts = event.get("parts")
        flat = {**event, **({f"seconds/{name}": value for name, value in parts.items()} if isinstance(parts, Mapping) else {})}
        names = {name: value for name, value in flat.items() if name not in ("step", "time", "attempt") and not isinstance(value, bool)}
        figures = {name: float(value) for name, value in names.items() if isinstance(value, int | float) and math.isfinite(value)}
        named = {f"{'train' if kind == 'step' else 'choice'}/{name}": value for name, value in figures.items()}
        with suppress(queue.Full):  # a tracker is slower than training: metrics.jsonl has it all
            self._queue.put_nowait((step, named))

    def close(self) -> None:
        """Waits CLOSE_S at the most for what is still to be sent."""
        if not self._thread.is_alive():
            return
        try:
            self._queue.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        for name, make in self._makers.items():
            opened = self._tried(name, lambda make=make: make(self._recipe, self._start))  # type: ignore[misc]
            if opened is not None:
                self._opened[name] = opened
        while (item := self._queue.get()) is not None:
            for name, (send, _) in list(self._opened.items()):
                self._tried(name, lambda send=send, item=item: send(*item))  # type: ignore[misc]
        for name, (_, close) in list(self._opened.items()):
            self._tried(name, close)

    def _tried(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except BaseException as error:  # a tracker's own errors have no common class, and none may end a training
            self._opened.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._tell(f"track.{name} is off for the rest of this attempt: {reason}")
            return None


def _nothing() -> None:
    pass


def _ray(recipe: Recipe, start: int) -> tuple[Send, Callable[[], None]] | None:
    show = gauges(recipe.run_dir.name)
    if show is None:
        return None
    return (lambda step, figures: show({"step": step, **{name.partition("/")[2]: value for name, value in figures.items()}})), _nothing


def _tensorboard(recipe: Recipe, start: int) -> tuple[Send, Callable[[], None]]:
    """Event files in the run folder's `tensorboard/`; what a dead attempt wrote beyond its checkpoint is marked as void."""
    writer = importlib.import_module("tensorboardX").SummaryWriter(str(recipe.run_dir / "tensorboard"), purge_step=start + 1)

    def send(step: int, figures: Figures) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


def _mlflow(recipe: Recipe, start: int) -> tuple[Send, Callable[[], None]]:
    """One MLflow run for the run folder, however often it is resumed: found again by its tag."""
    mlflow = importlib.import_module("mlflow")
    client = mlflow.MlflowClient(tracking_uri=recipe.track.mlflow)
    found = client.get_experiment_by_name(recipe.track.experiment)
    experiment = found.experiment_id if found is not None else client.create_experiment(recipe.track.experiment)
    folder = str(recipe.run_dir).replace("'", "")
    known = client.search_runs([experiment], filter_string=f"tags.run_dir = '{folder}'", max_results=1)
    tags = {"run_dir": folder}
    run = known[0] if known else client.create_run(experiment, run_name=recipe.run_dir.name, tags=tags)

    def send(step: int, figures: Figures) -> None:
        for name, value in figures.items():
            client.log_metric(run.info.run_id, name, value, step=step)

    return send, lambda: client.set_terminated(run.info.run_id)


def _wandb(recipe: Recipe, start: int) -> tuple[Send, Callable[[], None]]:
    """One Weights & Biases run for the run folder, resumed by an id made of its path."""
    import hashlib

    wandb = importlib.import_module("wandb")
    name = hashlib.sha256(str(recipe.run_dir).encode()).hexdigest()[:16]
    run = wandb.init(
        project=recipe.track.wandb,
        id=name,
        name=recipe.run_dir.name,
        resume="allow",
        dir=str(recipe.run_dir),
        config=recipe.model_dump(mode="json"),
    )
    return (lambda step, figures: run.log(dict(figures), step=step)), run.finish
