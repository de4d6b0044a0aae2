"""posmlp train: a recipe and a built dataset become checkpoints and metrics; the same command resumes.

`run` is the driver: it checks that dataset, recipe and checkpoints belong together, holds the run folder, launches the gang
and shows progress. `worker` is the loop itself, a plain function of recipe, rank, world size and resume point.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cluster import hang, lease
from cluster.checkpoint import Checkpoint, CheckpointStore
from cluster.errors import ClusterError, StoppedError
from cluster.metrics import MetricsWriter
from cluster.stopping import stop_asked, stop_reason
from cluster.topology import Worker, num_micro_batches
from jobs.deadline import Deadline
from jobs.errors import JobError, user_errors
from jobs.fit import is_out_of_memory, out_of_memory, remembered, solved, with_recomputation
from jobs.mirroring import mirror_of, mirrored, resume
from jobs.profiling import StepProfiler
from jobs.progress import Progress
from jobs.recipe import Recipe, parse_recipe
from jobs.run_folder import check_classes, checkpoints, epoch_length, identity, newest_checkpoint, prepare, total_steps
from jobs.run_log import RankLog, damage_before, follow, say_slow, where
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
    end = None if recipe.train.time_limit is None else time.time() + recipe.train.time_limit
    data = open_checked_data(recipe)
    dataset = data.dataset
    check_classes(recipe, dataset, data.mixture)
    steps = total_steps(recipe, len(data.rows[0]))
    recipe.network(len(dataset.info.classes)).resolve()  # a model that cannot be built fails here, not on every worker
    swapped_labels(dataset.info.classes, recipe.augment.flip_labels)  # and so does a class that is not there
    recipe = solved(recipe, len(dataset.info.classes))
    mirror = mirror_of(recipe)
    with lease.hold(recipe.run_dir):
        found = resume(recipe, dataset, mirror, write=True)
        with mirrored(mirror, checkpoints(recipe), identity(recipe, dataset), partial(_record_mirrored, recipe.run_dir)):
            if found is not None and found.step >= steps and not (recipe.eval.every and found.judgement() is None):
                if not (recipe.run_dir / "recipe.yaml").exists():  # all of it came from the mirror
                    prepare(recipe)
                return found.step
            prepare(recipe)
            _run_gang(recipe, {"recipe": recipe.model_dump(mode="json"), "end": end, "datasets": data.fingerprints}, found, steps)
        final = newest_checkpoint(recipe, dataset)
    if final is None or final.step < steps:
        raise JobError(f"Training in {recipe.run_dir} ended before its last step. See {recipe.run_dir / 'logs'}.")
    return final.step


def _run_gang(recipe: Recipe, payload: Mapping[str, object], found: Checkpoint | None, steps: int) -> None:
    """Launches the workers with `payload` and shows how they get on, until they are done. Raises as `run`."""
    from cluster.launch import launch  # imports torch or Ray, which `posmlp --help` must not

    metrics, done = recipe.run_dir / "metrics.jsonl", found.step if found else 0
    with Progress("training", total=steps, unit="steps", done=done) as progress, follow(metrics, progress, done):
        train = partial(
            launch,
            "jobs.train:worker",
            payload,
            run_dir=recipe.run_dir,
            num_micro_batches=num_micro_batches(recipe.train.global_batch, recipe.train.micro_batch),
            options=recipe.launch,
            on_event=partial(_record, metrics),
            user_errors=user_errors(),
            progress=partial(_saved_step, str(recipe.run_dir / "checkpoints")),
            stoppable=True,
        )
        _until_it_fits(recipe, train, metrics)


def _until_it_fits(recipe: Recipe, train: Callable[[], None], metrics: Path) -> None:
    """Trains; once again, with activations recomputed, when memory ran out while they were kept (`fit`)."""
    for recomputing in (bool(remembered(recipe.run_dir).get("activation_checkpointing")), True):
        try:
            train()
            return
        except (ClusterError, JobError) as error:
            ran_short = not recomputing and remembered(recipe.run_dir).get("activation_checkpointing")
            if isinstance(error, StoppedError) or not ran_short:
                raise
            attempt = lease.newest_attempt(recipe.run_dir)
            _record(metrics, {"event": "restart", "reason": str(error), "attempt": attempt, "delay_s": 0.0})
        # The second time begins here, where the error no longer holds on to the old engine.


def _record(metrics: Path, event: Mapping[str, object]) -> None:
    """An event of the gang itself (a restart), beside what rank 0 writes."""
    facts = {name: value for name, value in event.items() if name not in ("event", "attempt")}
    attempt = event.get("attempt")
    writer = MetricsWriter(metrics, attempt if isinstance(attempt, int) else 0)
    writer.write(str(event["event"]), **facts)
    writer.close()


def _record_mirrored(run_dir: Path, event: Mapping[str, object]) -> None:
    _record(run_dir / "metrics.jsonl", {**event, "attempt": lease.newest_attempt(run_dir)})


def _saved_step(checkpoints: str) -> int:
    """The step of the newest checkpoint; 0 without one."""
    found = CheckpointStore(Path(checkpoints), keep=1).manifests()
    return found[0].step if found else 0


def worker(payload: Mapping[str, object], worker: Worker) -> None:
    """One rank of the gang, from the resume point to the last step, or to the step at which it is asked to stop."""
    from cluster.worker import agree, heartbeat
    from jobs.choose import Chooser
    from jobs.model_flops import peak_flops, step_flops
    from pipeline.loader import Loader

    recipe = parse_recipe(payload["recipe"], where="the run's recipe")
    run_as = with_recomputation(recipe)  # the same numbers; what is saved and compared stays the recipe's
    data = open_worker_data(recipe, payload["datasets"])
    dataset = data.dataset
    steps, micro_batches = total_steps(recipe, len(data.rows[0])), num_micro_batches(recipe.train.global_batch, recipe.train.micro_batch)
    store = checkpoints(recipe)
    # Rank 0 looks and the others follow: a checkpoint damaged or committed between two looks must not split the gang.
    newest = newest_checkpoint(recipe, dataset) if worker.rank == 0 else None
    number = agree(newest.number if newest else 0)
    found = store.at(number) if number else None
    start = found.step if found else 0

    log = RankLog(recipe, worker, start)
    engine = _engine(run_as, dataset, worker, steps, found, log)
    log.event("attempt", step=start, world_size=worker.world_size)
    if worker.rank == 0:
        num_classes = len(dataset.info.classes)
        log.count_flops(step_flops(recipe, num_classes, worker.world_size), peak_flops(recipe, worker.device, engine.precision))
    saver = _Saver(recipe, dataset, store, worker, log)
    deadline = _deadline(payload, engine, worker)
    loss = partial(_loss, recipe.optimizer.label_smoothing)
    chooser = Chooser(recipe, dataset, store, worker, log, num_train=len(data.rows[0]), steps=steps)

    def stop() -> bool:
        return stop_asked() or deadline.near()

    # Whatever the time limit: each call gets on.
    if chooser.lacks(found) and not chooser.judge(engine, start, stop_asked, saver.wait):
        _leave(recipe, saver, log, start, steps)
    with (
        Loader(
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
            on_slow_read=partial(say_slow, worker.rank, data.source),
        ) as loader,
        StepProfiler(recipe, worker) as profiler,
    ):
        batches = log.watch(loader)
        hang.tell("place", log.place)
        hang.tell("reading", lambda: [f"{where(data.source, item)} for {seconds:.1f} s" for item, seconds in loader.reads()])
        for step in range(start, steps):
            profiler.before(step + 1)
            began = time.perf_counter()
            mine = itertools.islice(batches, micro_batches // worker.world_size)
            try:
                result = engine.train_step(step, mine, loss, stop=stop)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    saver.wait()
                    raise out_of_memory(run_as, step, error) from error
                raise
            seconds = time.perf_counter() - began
            profiler.after(step + 1)
            log.step(step + 1, result, seconds, epoch_length(recipe, len(data.rows[0])))
            deadline.step(seconds)
            heartbeat()
            due = chooser.due(step + 1)
            if result.stop or due or (step + 1) % recipe.checkpoint.every == 0 or step + 1 == steps:
                saver.save(step + 1, engine, deadline)
            judged = not due or (not result.stop and chooser.judge(engine, step + 1, stop, saver.wait))
            if not judged or (result.stop and step + 1 < steps):
                _leave(recipe, saver, log, step + 1, steps)
    saver.wait()
    log.event("end", step=steps)
    log.close()


def _leave(recipe: Recipe, saver: "_Saver", log: RankLog, step: int, steps: int) -> NoReturn:
    """Ends this rank because the gang was asked to stop, when what it has done is saved."""
    from cluster.worker import agree

    saver.wait()
    agree(step)  # nobody leaves before rank 0 has committed
    log.event("stop", step=step, reason=stop_reason() or "train.time_limit")
    log.close()
    raise StoppedError(f"{recipe.run_dir} is saved at step {step} of {steps}; the same command goes on from there.")


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
