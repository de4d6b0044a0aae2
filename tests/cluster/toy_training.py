"""Entries for gangs in tests: a small real training with batch norm and dropout, whose data is a function of step and micro-batch."""

import json
import os
import signal
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster import lease
from cluster.checkpoint import CheckpointStore, model_state
from cluster.engine import Engine
from cluster.errors import ClusterError
from cluster.metrics import MetricsWriter
from cluster.options import EngineOptions, OptimizerOptions
from cluster.topology import Worker, micro_batches_of
from cluster.worker import agree, heartbeat

ALONE = Worker(rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu", threads=1, attempt=1)
NUM_MICRO_BATCHES = 4
RESTORE = -1  # a misfortune's step: while the state is being restored
OPTIMIZER = OptimizerOptions(lr=1e-2, warmup=0.2, clip_grad=1.0)


def build_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(6 * 36, 7))


def batch(step: int, micro: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + micro)
    labels = torch.randint(0, 7, (4,), generator=generator)
    return torch.randn(4, 3, 8, 8, generator=generator) + labels.view(4, 1, 1, 1), labels


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def build_engine(worker: Worker, *, total_steps: int, zero: int = 0, precision: str = "fp32") -> Engine:
    return Engine(
        build_model(),
        optimizer=OPTIMIZER,
        options=EngineOptions(precision=precision, zero_stage=zero),  # type: ignore[arg-type]
        total_steps=total_steps,
        num_micro_batches=NUM_MICRO_BATCHES,
        worker=worker,
        seed=11,
    )


def train(payload: Mapping[str, object], worker: Worker) -> None:
    """payload: run_dir, steps, every, zero; misfortunes: list of {attempt, rank, step, kind}, in which a rank comes to grief."""
    run_dir, steps, every = Path(str(payload["run_dir"])), int(str(payload["steps"])), int(str(payload["every"]))
    store = CheckpointStore(run_dir / "checkpoints", keep=2)
    newest = store.newest({"toy": 1}, warn=print) if worker.rank == 0 else None
    number = agree(newest.number if newest else 0)
    found = store.at(number) if number else None
    engine = build_engine(worker, total_steps=steps, zero=int(str(payload.get("zero", 0))))
    _misfortunes(payload, worker, RESTORE)
    if found:
        engine.restore(found.load())
    fence = partial(lease.check, run_dir, worker.attempt)
    with MetricsWriter(run_dir / "metrics.jsonl", worker.attempt) as metrics:
        if worker.rank == 0:
            metrics.write("attempt", step=found.step if found else 0, world_size=worker.world_size)
        for step in range(found.step if found else 0, steps):
            _misfortunes(payload, worker, step)
            mine = micro_batches_of(worker.rank, worker.world_size, NUM_MICRO_BATCHES)
            result = engine.train_step(step, ((micro, batch(step, micro)) for micro in mine), loss)
            heartbeat()
            time.sleep(float(str(payload.get("pause_s", 0))))
            if worker.rank == 0:
                metrics.write("step", step=step, loss=result.loss, grad_norm=result.grad_norm, lr=result.lr)
            if (step + 1) % every == 0 or step + 1 == steps:
                tensors = engine.state()
                if worker.rank == 0:
                    store.save_in_background(step + 1, tensors, {"toy": 1}, fence=fence)
        store.wait()


def _misfortunes(payload: Mapping[str, object], worker: Worker, step: int) -> None:
    for told in payload.get("misfortunes", ()):  # type: ignore[attr-defined]
        if (told["attempt"], told["rank"], told["step"]) == (worker.attempt, worker.rank, step):
            _misfortune(str(told["kind"]))


def _misfortune(kind: str) -> None:
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill in save":
            _kill_at_rename()
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            time.sleep(3600)
        case "crash":
            raise RuntimeError("the toy crashed")
        case "user error":
            raise ClusterError("the toy's user made a mistake")


def _kill_at_rename() -> None:
    """The next save is killed between its data and its manifest."""

    def killed(source: object, target: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = killed  # type: ignore[assignment]


def matrix(payload: Mapping[str, object], worker: Worker) -> None:
    """Saves at every ZeRO stage, before and after steps, and restores at every stage; rank 0 writes what differed, per pair."""
    from torch import equal, from_numpy

    problems: list[str] = []
    states = {}
    for stage in range(4):
        engine = build_engine(worker, total_steps=6, zero=stage)
        _steps(engine, worker, range(2))
        states[stage] = _everywhere(engine)
    for saved, state in states.items():
        for stage in range(4):
            for warmed in (False, True):
                engine = build_engine(worker, total_steps=6, zero=stage)
                if warmed:
                    _steps(engine, worker, range(1))
                engine.restore(state)
                again = _everywhere(engine)
                for name in state:
                    if not equal(from_numpy(state[name]), from_numpy(again[name])):
                        problems.append(f"{saved} -> {stage} (warmed {warmed}): {name}")
            losses = _steps(engine, worker, range(2, 4))
            if saved == 0 and stage == 0:
                expected = losses
            if any(abs(a - b) > 1e-5 for a, b in zip(losses, expected, strict=True)):
                problems.append(f"{saved} -> {stage}: losses {losses} instead of {expected}")
            heartbeat()
    if worker.rank == 0:
        Path(str(payload["result"])).write_text(json.dumps(problems), encoding="utf-8")


def _steps(engine: Engine, worker: Worker, steps: range) -> list[float]:
    mine = micro_batches_of(worker.rank, worker.world_size, NUM_MICRO_BATCHES)
    return [engine.train_step(step, ((micro, batch(step, micro)) for micro in mine), loss).loss for step in steps]


def _everywhere(engine: Engine):  # type: ignore[no-untyped-def]
    """The engine's state on every rank."""
    import torch.distributed as dist

    state = engine.state()
    names = [*(f"{key}.{name}" for name, parameter in engine.model.named_parameters() for key in ("model", "exp_avg", "exp_avg_sq"))]
    names += [f"buffer.{name}" for name, _ in engine.model.named_buffers()] + ["optimizer.step"]
    shapes = {f"{key}.{name}": shape for name, shape in engine._shapes.items() for key in ("model", "exp_avg", "exp_avg_sq")}
    shapes |= {f"buffer.{name}": tuple(buffer.shape) for name, buffer in engine.model.named_buffers()} | {"optimizer.step": ()}
    found = {}
    for name in names:
        whole = name.endswith("num_batches_tracked") or name == "optimizer.step"
        tensor = torch.from_numpy(state[name]) if state else torch.empty(shapes[name], dtype=torch.int64 if whole else torch.float32)
        dist.broadcast(tensor, 0)
        found[name] = tensor.numpy()
    return found


FEATURED = OptimizerOptions(lr=1e-2, warmup=0.2, clip_grad=0.5, schedule="wsd", cooldown=0.5, ema=0.6, max_skipped=2)
RATE_SCALES = {"0.weight": 0.25, "1.weight": 0.5}
FEATURED_STEPS, BAD_STEP, RESTORED_AT = 8, 3, 5


def featured_model() -> nn.Module:
    """Without dropout, and with a frozen bias."""
    model = build_model()
    model[3].p = 0.0  # type: ignore[assignment,index]
    model[5].bias.requires_grad_(False)  # type: ignore[union-attr,index]
    return model


def featured_batch(step: int, micro: int) -> tuple[Tensor, Tensor]:
    """One micro-batch of one step holds a value that is no number."""
    images, labels = batch(step, micro)
    return images * (torch.nan if (step, micro) == (BAD_STEP, 1) else 1.0), labels


def featured(worker: Worker, zero: int) -> Engine:
    return Engine(
        featured_model(),
        optimizer=FEATURED,
        options=EngineOptions(precision="fp32", zero_stage=zero),  # type: ignore[arg-type]
        total_steps=FEATURED_STEPS,
        num_micro_batches=NUM_MICRO_BATCHES,
        worker=worker,
        rate_scales=RATE_SCALES,
    )


def featured_run(worker: Worker, first: int, second: int) -> dict[str, object]:
    """Begins at one ZeRO stage and ends at another; the last state on every rank, and the steps' losses and whether they were skipped."""
    import torch.distributed as dist

    mine = micro_batches_of(worker.rank, worker.world_size, NUM_MICRO_BATCHES)
    engine, told = featured(worker, first), []
    for step in range(FEATURED_STEPS):
        if step == RESTORED_AT:
            state = [engine.state()]
            dist.broadcast_object_list(state, 0)
            engine = featured(worker, second)
            engine.restore(state[0])
        result = engine.train_step(step, ((micro, featured_batch(step, micro)) for micro in mine), loss)
        told.append((result.loss, result.skipped))
    return {"state": engine.state(), "told": told}


def features(payload: Mapping[str, object], worker: Worker) -> None:
    """`featured_run` for pairs of stages; rank 0 writes the states as safetensors, every rank what it was told."""
    from cluster.checkpoint import write_safetensors

    for pair in payload["pairs"]:  # type: ignore[attr-defined]
        result = featured_run(worker, *pair)
        name = "-".join(map(str, pair))
        told = Path(str(payload["result"])) / f"told-{name}-{worker.rank}.json"
        told.write_text(json.dumps(result["told"]), encoding="utf-8")
        if worker.rank == 0:
            write_safetensors(Path(str(payload["result"])) / f"state-{name}.safetensors", result["state"])  # type: ignore[arg-type]


ELASTIC = OptimizerOptions(lr=5e-3, warmup=0.2, clip_grad=0.5, schedule="wsd", cooldown=0.5, ema=0.9)
ELASTIC_MICRO_BATCHES, ELASTIC_STEPS = 6, 24


def elastic_engine(worker: Worker, zero: int) -> Engine:
    return Engine(
        build_model(),
        optimizer=ELASTIC,
        options=EngineOptions(precision="fp32", zero_stage=zero),  # type: ignore[arg-type]
        total_steps=ELASTIC_STEPS,
        num_micro_batches=ELASTIC_MICRO_BATCHES,
        worker=worker,
        rate_scales=RATE_SCALES,
        seed=11,
    )


def elastic(payload: Mapping[str, object], worker: Worker) -> None:
    """Goes on from the newest checkpoint to step `until` at stage `zero` and saves; what it restores must come out of it to the bit."""
    run_dir, until, zero = Path(str(payload["run_dir"])), int(str(payload["until"])), int(str(payload["zero"]))
    store = CheckpointStore(run_dir / "checkpoints", keep=9)
    found = next(iter(store.manifests()), None)
    engine = elastic_engine(worker, zero)
    if found:
        tensors = found.load()
        engine.restore(tensors)
        state = engine.state()
        different = [name for name in state if state[name].tobytes() != tensors[name].tobytes()]
        if different or (worker.rank == 0 and state.keys() != tensors.keys()):
            raise ClusterError(f"restored otherwise: {different}")
        copy, expected = build_model(), model_state(tensors)
        engine.copy_weights(copy)  # on every rank what evaluation sees
        if not all(torch.equal(value, torch.from_numpy(expected[name])) for name, value in copy.state_dict().items()):
            raise ClusterError("copied otherwise")
    mine = micro_batches_of(worker.rank, worker.world_size, ELASTIC_MICRO_BATCHES)
    with MetricsWriter(run_dir / "metrics.jsonl", worker.attempt) as metrics:
        for step in range(found.step if found else 0, until):
            result = engine.train_step(step, ((micro, batch(step, micro)) for micro in mine), loss)
            if worker.rank == 0:
                metrics.write("step", step=step, loss=result.loss, grad_norm=result.grad_norm, lr=result.lr, size=worker.world_size)
    tensors = engine.state()
    if worker.rank == 0:
        store.save(until, tensors, {}, fence=partial(lease.check, run_dir, worker.attempt))


def elastic_next(payload: Mapping[str, object], worker: Worker) -> None:
    """From each checkpoint of a run one step, alone and at stage 0; writes the norms of their gradients."""
    norms = {}
    for found in CheckpointStore(Path(str(payload["run_dir"])) / "checkpoints", keep=9).manifests():
        if found.step < ELASTIC_STEPS:
            engine = elastic_engine(worker, 0)
            engine.restore(found.load())
            batches = [(micro, batch(found.step, micro)) for micro in range(ELASTIC_MICRO_BATCHES)]
            norms[found.step] = engine.train_step(found.step, batches, loss).grad_norm
    Path(str(payload["result"])).write_text(json.dumps(norms), encoding="utf-8")
