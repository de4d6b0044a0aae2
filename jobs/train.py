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

from cluster import lease
from cluster.checkpoint import Checkpoint, CheckpointStore
from cluster.errors import StoppedError
from cluster.metrics import MetricsWriter
from cluster.stopping import stop_asked
from cluster.topology import Worker, num_micro_batches
from jobs.deadline import Deadline
from jobs.errors import JobError, user_errors
from jobs.progress import Progress
from jobs.recipe import Recipe, parse_recipe
from jobs.run_folder import check_classes, checkpoints, epoch_length, identity, newest_checkpoint, prepare, total_steps
from jobs.run_log import RankLog, damage_before, follow
from jobs.train_data import TrainData, open_checked_data, open_worker_data
from pipeline.augmentation import swapped_labels
from pipeline.index import Dataset

if TYPE_CHECKING:
    import torch

    from cluster.engine import Engine
    from pipeline.loader import Batch
    from pipeline.requests import MicroBatchRequest


def run(recipe: Recipe) -> int:
    """Trains until the recipe's last step, resuming from the newest whole checkpoint. Returns the step reached.

    Raises PipelineError, ClusterError or JobError with a text for the user; StoppedError, everything saved, after SIGTERM or when
    `train.time_limit` is near.
    """
    from cluster.launch import launch  # imports torch or Ray, which `posmlp --help` must not

    end = None if recipe.train.time_limit is None else time.time() + recipe.train.time_limit
    data = open_checked_data(recipe)
    dataset = data.dataset
    check_classes(recipe, dataset, data.mixture)
    steps = total_steps(recipe, len(data.rows[0]))
    recipe.network(len(dataset.info.classes)).resolve()  # a model that cannot be built fails here, not on every worker
    swapped_labels(dataset.info.classes, recipe.augment.flip_labels)  # and so does a class that is not there
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
                {"recipe": recipe.model_dump(mode="json"), "end": end, "datasets": data.fingerprints},
                run_dir=recipe.run_dir,
                num_micro_batches=num_micro_batches(recipe.train.global_batch, recipe.train.micro_batch),
                options=recipe.launch,
                on_event=partial(_record, metrics),
                user_errors=user_errors(),
                progress=partial(_saved_step, str(recipe.run_dir / "checkpoints")),
                stoppable=True,
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


def _saved_step(checkpoints: str) -> int:
    """The step of the newest checkpoint; 0 without one."""
    found = CheckpointStore(Path(checkpoints), keep=1).manifests()
    return found[0].step if found else 0


def worker(payload: Mapping[str, object], worker: Worker) -> None:
    """One rank of the gang, from the resume point to the last step, or to the step at which it is asked to stop."""
    from cluster.worker import agree, heartbeat
    from pipeline.loader import Loader

    recipe = parse_recipe(payload["recipe"], where="the run's recipe")
    data = open_worker_data(recipe, payload["datasets"])
    dataset = data.dataset
    steps, micro_batches = total_steps(recipe, len(data.rows[0])), num_micro_batches(recipe.train.global_batch, recipe.train.micro_batch)
    store = checkpoints(recipe)
    # Rank 0 looks and the others follow: a checkpoint damaged or committed between two looks must not split the gang.
    newest = newest_checkpoint(recipe, dataset) if worker.rank == 0 else None
    number = agree(newest.number if newest else 0)
    found = store.at(number) if number else None
    start = found.step if found else 0

    log = RankLog(recipe, worker)
    engine = _engine(recipe, dataset, worker, steps, found, log)
    log.event("attempt", step=start, world_size=worker.world_size)
    saver = _Saver(recipe, dataset, store, worker, log)
    deadline = _deadline(payload, engine, worker)
    loss = partial(_loss, recipe.optimizer.label_smoothing)
    with Loader(
        data.source,
        _requests(recipe, data, worker, start, steps),
        micro_batch=recipe.train.micro_batch,
        clip=recipe.clip,
        augment=recipe.augment,
        options=recipe.loader,
        threads=worker.threads,
        device=worker.device,
        on_damage="substitute",
        counted=_counted(recipe, worker, start),
    ) as loader:
        batches = log.watch(loader)
        for step in range(start, steps):
            began = time.perf_counter()
            mine = itertools.islice(batches, micro_batches // worker.world_size)
            result = engine.train_step(step, mine, loss, stop=lambda: stop_asked() or deadline.near())
            seconds = time.perf_counter() - began
            log.step(step + 1, result, seconds, epoch_length(recipe, len(data.rows[0])))
            deadline.step(seconds)
            heartbeat()
            if result.stop or (step + 1) % recipe.checkpoint.every == 0 or step + 1 == steps:
                saver.save(step + 1, engine, deadline)
            if result.stop and step + 1 < steps:
                saver.wait()
                agree(step + 1)  # nobody leaves before rank 0 has committed
                log.event("stop", step=step + 1, reason="SIGTERM" if stop_asked() else "train.time_limit")
                log.close()
                raise StoppedError(f"{recipe.run_dir} is saved at step {step + 1} of {steps}; the same command goes on from there.")
    saver.wait()
    log.event("end", step=steps)
    log.close()


def _engine(recipe: Recipe, dataset: Dataset, worker: Worker, steps: int, found: Checkpoint | None, log: RankLog) -> "Engine":
    """The engine at its resume point, or with its first weights. An error of `train.init_from` or `train.freeze` shows at once."""
    from cluster.engine import Engine
    from jobs.initial import freeze, initialise, rate_scales
    from jobs.trained_model import build_model

    model = build_model(recipe, len(dataset.info.classes))
    if found is None and recipe.train.init_from is not None:
        report = initialise(model, recipe.train.init_from)
        facts = {"kept": len(report.kept), "resized": report.resized, "fresh": report.fresh, "dropped": report.dropped}
        log.event("init", source=str(recipe.train.init_from), text=str(report), **facts)
    frozen = freeze(model, recipe.train.freeze)
    if frozen:
        log.event("freeze", parameters=len(frozen))
    engine = Engine(
        model,
        optimizer=recipe.optimizer,
        options=recipe.engine,
        total_steps=steps,
        num_micro_batches=num_micro_batches(recipe.train.global_batch, recipe.train.micro_batch),
        worker=worker,
        no_weight_decay=model.no_weight_decay(),
        rate_scales=rate_scales(model, recipe.optimizer.layer_decay),
        seed=recipe.run.seed,
    )
    if found is not None:
        engine.restore(found.load())
    return engine


def _deadline(payload: Mapping[str, object], engine: "Engine", worker: Worker) -> Deadline:
    """Of the whole gang; rank 0 looks at the clock."""
    end = payload.get("end") if worker.rank == 0 else None
    return Deadline(float(str(end)) if end is not None else None, engine.state_bytes)


def _counted(recipe: Recipe, worker: Worker, start: int) -> tuple[int, int]:
    """(samples, damaged ones) that this rank would have counted had it run from the first step on: a function of positions alone."""
    size, micro = recipe.samples_per_step, recipe.train.micro_batch // recipe.augment.repeats
    damaged = damage_before(recipe.run_dir, start * size)
    mine = [position for position in damaged if position % size // micro % worker.world_size == worker.rank]
    return start * size // worker.world_size, len(mine)


def _requests(recipe: Recipe, data: TrainData, worker: Worker, start: int, steps: int) -> "Iterator[MicroBatchRequest]":
    from pipeline.requests import train_requests

    return train_requests(
        data.source,
        data.rows,
        weights=data.weights,
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

    return cross_entropy(model(batch.clips), batch.labels if batch.targets is None else batch.targets, label_smoothing)


class _Saver:
    """Checkpoints of one rank: all ranks gather the state, rank 0 writes it in the background, fenced by its attempt."""

    def __init__(self, recipe: Recipe, dataset: Dataset, store: CheckpointStore, worker: Worker, log: RankLog) -> None:
        self._store, self._worker, self._log = store, worker, log
        self._gather_s = 0.0
        self._fence = partial(lease.check, recipe.run_dir, worker.attempt)
        self._meta = {**identity(recipe, dataset), "classes": dataset.info.classes, "recipe": recipe.model_dump(mode="json")}

    def save(self, step: int, engine: "Engine", deadline: Deadline) -> None:
        began = time.perf_counter()
        tensors = engine.state()
        if self._worker.rank == 0:
            gather_s = time.perf_counter() - began
            self._store.wait()
            if self._store.save_s:
                deadline.saved(self._gather_s + self._store.save_s)
            self._gather_s = gather_s
            self._store.save_in_background(step, tensors, self._meta, fence=self._fence)
            size = sum(array.nbytes for array in tensors.values())
            self._log.event("checkpoint", step=step, seconds=round(time.perf_counter() - began, 4), bytes=size)

    def wait(self) -> None:
        """Returns when the last save is committed; raises what it raised."""
        self._store.wait()
