"""posmlp train: a recipe and a built dataset become checkpoints and metrics; the same command resumes.

`run` is the driver: it checks that dataset, recipe and checkpoints belong together, holds the run folder, launches the gang
and shows progress. `worker` is the loop itself, a plain function of recipe, rank, world size and resume point.
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cluster import lease
from cluster.checkpoint import CheckpointStore
from cluster.metrics import MetricsWriter
from cluster.topology import Worker, num_micro_batches
from jobs.errors import JobError, user_errors
from jobs.progress import Progress
from jobs.recipe import Recipe, parse_recipe
from jobs.run_folder import checkpoints, identity, newest_checkpoint, open_dataset, prepare, total_steps
from jobs.run_log import RankLog, follow
from pipeline.index import Dataset

if TYPE_CHECKING:
    import torch

    from cluster.engine import Engine
    from pipeline.loader import Batch
    from pipeline.requests import MicroBatchRequest


def run(recipe: Recipe) -> int:
    """Trains until the recipe's last step, resuming from the newest whole checkpoint. Returns the step reached.

    Raises PipelineError, ClusterError or JobError with a text for the user.
    """
    from cluster.launch import launch  # imports torch or Ray, which `posmlp --help` must not

    dataset = open_dataset(recipe, recipe.data.train_split)
    steps = total_steps(recipe, len(dataset.rows(recipe.data.split_column, recipe.data.train_split)))
    recipe.network(len(dataset.info.classes)).resolve()  # a model that cannot be built fails here, not on every worker
    with lease.hold(recipe.run_dir):
        found = newest_checkpoint(recipe, dataset)
        done = found.step if found else 0
        if done >= steps:
            return done
        prepare(recipe)
        metrics = recipe.run_dir / "metrics.jsonl"
        with Progress("training", total=steps, unit="steps", done=done) as progress, follow(metrics, progress, done):
            launch(
                "jobs.train:worker",
                {"recipe": recipe.model_dump(mode="json")},
                run_dir=recipe.run_dir,
                num_micro_batches=num_micro_batches(recipe.train.global_batch, recipe.train.micro_batch),
                options=recipe.launch,
                on_event=partial(_record, metrics),
                user_errors=user_errors(),
            )
        final = newest_checkpoint(recipe, dataset)
    if final is None or final.step < steps:
        raise JobError(f"Training in {recipe.run_dir} ended before its last step. See {recipe.run_dir / 'logs'}.")
    return final.step


def _record(metrics: Path, event: Mapping[str, object]) -> None:
    """An event of the gang itself (a restart), beside what rank 0 writes."""
    facts = {name: value for name, value in event.items() if name not in ("event", "attempt")}
    attempt = event.get("attempt")
    writer = MetricsWriter(metrics, attempt if isinstance(attempt, int) else 0)
    writer.write(str(event["event"]), **facts)
    writer.close()


def worker(payload: Mapping[str, object], worker: Worker) -> None:
    """One rank of the gang, from the resume point to the last step."""
    from cluster.engine import Engine
    from cluster.worker import agree, heartbeat
    from jobs.trained_model import build_model
    from pipeline.loader import Loader

    recipe = parse_recipe(payload["recipe"], where="the run's recipe")
    dataset = Dataset.open(recipe.dataset_dir)
    rows = dataset.rows(recipe.data.split_column, recipe.data.train_split)
    steps, micro_batches = total_steps(recipe, len(rows)), num_micro_batches(recipe.train.global_batch, recipe.train.micro_batch)
    store = checkpoints(recipe)
    # Rank 0 looks and the others follow: a checkpoint damaged or committed between two looks must not split the gang.
    newest = newest_checkpoint(recipe, dataset) if worker.rank == 0 else None
    number = agree(newest.number if newest else 0)
    found = store.at(number) if number else None
    start = found.step if found else 0

    model = build_model(recipe, len(dataset.info.classes))
    engine = Engine(
        model,
        optimizer=recipe.optimizer,
        options=recipe.engine,
        total_steps=steps,
        num_micro_batches=micro_batches,
        worker=worker,
        no_weight_decay=model.no_weight_decay(),
        seed=recipe.run.seed,
    )
    if found is not None:
        engine.restore(found.load())
    log = RankLog(recipe, worker)
    log.event("attempt", step=start, world_size=worker.world_size)
    saver = _Saver(recipe, dataset, store, worker, log)
    loss = partial(_loss, recipe.optimizer.label_smoothing)
    with Loader(
        dataset,
        _requests(recipe, dataset, rows, worker, start, steps),
        micro_batch=recipe.train.micro_batch,
        clip=recipe.clip,
        augment=recipe.augment,
        options=recipe.loader,
        threads=worker.threads,
        device=worker.device,
        on_damage="substitute",
    ) as loader:
        batches = log.watch(loader)
        for step in range(start, steps):
            began = time.perf_counter()
            result = engine.train_step(step, itertools.islice(batches, micro_batches // worker.world_size), loss)
            log.step(step + 1, result, time.perf_counter() - began, len(rows))
            heartbeat()
            if (step + 1) % recipe.checkpoint.every == 0 or step + 1 == steps:
                saver.save(step + 1, engine)
    saver.wait()
    log.event("end", step=steps)
    log.close()


def _requests(
    recipe: Recipe, dataset: Dataset, rows: npt.NDArray[np.uint32], worker: Worker, start: int, steps: int
) -> "Iterator[MicroBatchRequest]":
    from pipeline.requests import train_requests

    return train_requests(
        dataset,
        rows,
        seed=recipe.run.seed,
        global_batch=recipe.train.global_batch,
        micro_batch=recipe.train.micro_batch,
        rank=worker.rank,
        world_size=worker.world_size,
        start_step=start,
        end_step=steps,
        clip=recipe.clip,
        augment=recipe.augment,
    )


def _loss(label_smoothing: float, model: "torch.nn.Module", batch: "Batch") -> "torch.Tensor":
    from model.objective import cross_entropy

    return cross_entropy(model(batch.clips), batch.labels, label_smoothing)


class _Saver:
    """Checkpoints of one rank: all ranks gather the state, rank 0 writes it in the background, fenced by its attempt."""

    def __init__(self, recipe: Recipe, dataset: Dataset, store: CheckpointStore, worker: Worker, log: RankLog) -> None:
        self._store, self._worker, self._log = store, worker, log
        self._fence = partial(lease.check, recipe.run_dir, worker.attempt)
        self._meta = {**identity(recipe, dataset), "classes": dataset.info.classes, "recipe": recipe.model_dump(mode="json")}

    def save(self, step: int, engine: "Engine") -> None:
        began = time.perf_counter()
        tensors = engine.state()
        if self._worker.rank == 0:
            self._store.save_in_background(step, tensors, self._meta, fence=self._fence)
            size = sum(array.nbytes for array in tensors.values())
            self._log.event("checkpoint", step=step, seconds=round(time.perf_counter() - began, 4), bytes=size)

    def wait(self) -> None:
        """Returns when the last save is committed; raises what it raised."""
        self._store.wait()
