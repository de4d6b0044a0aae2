"""posmlp bench train: what a training step costs beyond the model, each against its bare counterpart, interleaved in one run.

    loop      our training loop (log, timers, stop questions, heartbeat, loader)   against   `Engine.train_step` alone, cached batches
    save      a step that also saves, its write going on beside the next one       against   a step that does not
    data      the loop with the loader                                             against   the same loop on cached batches
    stage n   DeepSpeed at ZeRO stage n, two ranks of one thread                   against   torch's DistributedDataParallel

A round takes one step of each contestant; a ratio is taken within a round, and the median of the rounds counts, with the lowest and the
highest beside it; of wall clock, for which nothing else should run, and of the first rank's CPU time, which other processes disturb less.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.launch import launch
from cluster.options import LaunchOptions
from cluster.topology import Worker
from jobs import build
from jobs.recipe import Recipe, parse_overrides, parse_recipe
from jobs.synthesize import synthesize

if TYPE_CHECKING:
    import torch

    from cluster.engine import Engine
    from pipeline.loader import Batch

CACHED = 2  # global batches that are kept
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def run(dataset: Path | None, *, preset: str, size: int, global_batch: int, micro_batch: int, rounds: int) -> dict[str, object]:
    """Ratios by contest; `dataset`: a built one, else a small synthetic one is made (128 pixels, 40 frames)."""
    with tempfile.TemporaryDirectory(prefix="posmlp-train-") as name:
        folder = Path(name)
        if dataset is None:
            dataset = synthetic_dataset(folder)
        sections = {
            "run": {"dir": str(folder / "run")},
            "data": {"dir": str(dataset)},
            "model": {"preset": preset},
            "augment": {"size": size},
            "train": {"global_batch": global_batch, "micro_batch": micro_batch, "steps": 10 * rounds},
        }
        recipe = parse_overrides(sections, [])
        payload = {"recipe": recipe.model_dump(mode="json"), "rounds": rounds}
        results: dict[str, object] = {}
        for entry, workers, cpus in (("jobs.bench_train:one_rank", 1, 0), ("jobs.bench_train:two_ranks", 2, 1)):
            launch(
                entry,
                payload,
                run_dir=folder / f"gang-{workers}",
                num_micro_batches=2 * workers,
                options=LaunchOptions(launcher="local", workers=workers, cpus_per_worker=cpus, max_restarts=0),
                on_event=lambda event: click.echo(str(event), err=True),
            )
            results |= json.loads((folder / f"gang-{workers}" / "result.json").read_text())
    return {"preset": preset, "size": size, "global_batch": global_batch, "micro_batch": micro_batch, "rounds": rounds, "ratios": results}


def synthetic_dataset(folder: Path) -> Path:
    """24 clips of 128 pixels and 40 frames in `folder`/videos, built to the dataset that is returned, `folder`/dataset."""
    synthesize(folder / "videos", num_clips=24, seed=1)
    paths = {"videos": str(folder / "videos"), "labels": str(folder / "videos" / "labels.csv"), "dir": str(folder / "dataset")}
    build.build_dataset(parse_overrides({"data": paths}, []))
    return folder / "dataset"


def table(result: Mapping[str, Any]) -> str:
    """For people."""
    head = "{preset} at {size} pixels, {global_batch} clips a step in micro-batches of {micro_batch}, {rounds} rounds".format(**result)
    rows = [
        f"{name:<8} {clock:<4} {r['median']:.3f} ({r['lowest']:.3f} to {r['highest']:.3f}), {r['seconds']:.2f} against {r['against']:.2f} s"
        for name, clocks in result["ratios"].items()
        for clock, r in clocks.items()
    ]
    return "\n".join([head, *rows])


def contest(rounds: int, steps: Mapping[str, Callable[[], object]], against: Callable[[], object]) -> dict[str, object]:
    """Name -> clock ("wall", "cpu") -> lowest, median and highest ratio of its seconds to those of `against`, and both medians.

    One unmeasured round goes first.
    """
    runners = {**steps, "": against}
    taken: dict[tuple[str, str], list[float]] = {(name, clock): [] for name in runners for clock in CLOCKS}
    for number in range(rounds + 1):
        for name, step in runners.items():
            began = {clock: now() for clock, now in CLOCKS.items()}
            step()
            for clock, now in CLOCKS.items() if number else ():
                taken[name, clock].append(now() - began[clock])
    return {name: {clock: _ratio(taken[name, clock], taken["", clock]) for clock in CLOCKS} for name in steps}


def _ratio(seconds: list[float], bare: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(seconds, bare, strict=True)]
    found = {"lowest": min(ratios), "median": statistics.median(ratios), "highest": max(ratios)}
    return {**found, "seconds": statistics.median(seconds), "against": statistics.median(bare)}


def _opened(payload: Mapping[str, object]) -> tuple[Recipe, int]:
    return parse_recipe(payload["recipe"], where="the benchmark"), int(str(payload["rounds"]))


def _engine(recipe: Recipe, worker: Worker, num_classes: int, zero: int = 0) -> "Engine":
    from cluster.engine import Engine
    from jobs.trained_model import build_model

    return Engine(
        build_model(recipe, num_classes),
        optimizer=recipe.optimizer,
        options=replace(recipe.engine, zero_stage=zero),  # type: ignore[arg-type]
        total_steps=10_000,
        num_micro_batches=recipe.train.global_batch // recipe.train.micro_batch,
        worker=worker,
    )


def one_rank(payload: Mapping[str, object], worker: Worker) -> None:
    """Contests "loop", "save" and "data", with real batches."""
    from cluster.checkpoint import CheckpointStore
    from cluster.stopping import stop_asked
    from cluster.worker import heartbeat
    from jobs.deadline import Deadline
    from jobs.run_log import RankLog
    from jobs.train import _loss, _requests
    from jobs.train_data import open_data
    from pipeline.index import Dataset
    from pipeline.loader import Loader

    recipe, rounds = _opened(payload)
    recipe.run_dir.mkdir(parents=True)
    dataset = Dataset.open(recipe.dataset_dir, recipe.loader.remote)
    engine, loss = _engine(recipe, worker, len(dataset.info.classes)), partial(_loss, 0.1)
    log, deadline = RankLog(recipe, worker, 0), Deadline(None, engine.state_bytes)
    store = CheckpointStore(recipe.run_dir / "checkpoints", keep=1)
    num, counter = recipe.train.global_batch // recipe.train.micro_batch, itertools.count()
    with Loader(
        dataset,
        _requests(recipe, open_data(recipe, dataset), worker, 0, 10_000),
        micro_batch=recipe.train.micro_batch,
        clip=recipe.clip,
        augment=recipe.augment,
        options=recipe.loader,
        threads=worker.threads,
        device=worker.device,
        on_damage="substitute",
    ) as loader:
        cached = list(itertools.islice(loader, CACHED * num))
        cache, loaded = log.watch(itertools.cycle(cached)), log.watch(loader)

        def bare() -> None:
            engine.train_step(next(counter), ((micro, cached[micro]) for micro in range(num)), loss)

        def looped(batches: "Iterator[tuple[int, Batch]]") -> None:
            began = time.perf_counter()
            result = engine.train_step(next(counter), itertools.islice(batches, num), loss, stop=lambda: stop_asked() or deadline.near())
            log.step(1, result, time.perf_counter() - began, len(dataset))
            deadline.step(time.perf_counter() - began)
            heartbeat()

        def saving() -> None:
            looped(cache)
            store.save_in_background(next(counter), engine.state(), {}, fence=lambda: None)

        results = contest(rounds, {"loop": partial(looped, cache)}, bare)
        results |= contest(rounds, {"data": partial(looped, loaded)}, partial(looped, cache))
        results |= contest(rounds, {"save": saving}, partial(looped, cache))
        store.wait()
    log.close()
    _write(worker, "gang-1", recipe, results)


def two_ranks(payload: Mapping[str, object], worker: Worker) -> None:
    """Contests "stage 0" to "stage 3": the same model, optimizer, clipping, accumulation and loss, on random clips."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from cluster.engine import autocast
    from cluster.topology import micro_batches_of
    from jobs.trained_model import build_model
    from model.objective import cross_entropy

    recipe, rounds = _opened(payload)
    micro, size = recipe.train.micro_batch, recipe.augment.size
    mine = micro_batches_of(worker.rank, worker.world_size, recipe.train.global_batch // micro)
    clips = torch.randn(micro, 3, recipe.clip.num_frames, size, size, device=worker.device)
    labels = torch.arange(micro, device=worker.device) % 6

    def loss(model: nn.Module, batch: object) -> torch.Tensor:
        return cross_entropy(model(clips), labels, 0.1)

    model = DistributedDataParallel(build_model(recipe, 6).to(worker.device))
    adam, counter = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), itertools.count()

    def plain() -> None:
        for number, _ in enumerate(mine, start=1):
            with autocast(recipe.engine, worker.device):
                value = loss(model, None) / len(mine)
            if number < len(mine):
                with model.no_sync():
                    value.backward()  # type: ignore[no-untyped-call]
            else:
                value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_grad)
        adam.step()
        adam.zero_grad()

    results: dict[str, object] = {}
    for stage in range(4):
        engine = _engine(recipe, worker, 6, stage)
        step = partial(_staged, engine, counter, list(mine), loss)
        results |= contest(rounds, {f"stage {stage}": step}, plain)
    _write(worker, "gang-2", recipe, results)


def _staged(engine: "Engine", counter: Iterator[int], mine: list[int], loss: "Callable[[torch.nn.Module, Any], torch.Tensor]") -> None:
    engine.train_step(next(counter), ((micro, None) for micro in mine), loss)


def _write(worker: Worker, gang: str, recipe: Recipe, results: Mapping[str, object]) -> None:
    if worker.rank == 0:
        (recipe.run_dir.parent / gang / "result.json").write_text(json.dumps(results), encoding="utf-8")
