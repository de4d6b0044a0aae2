"""What one rank writes down while it trains, and how the driver follows it."""

import hashlib
import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from cluster.metrics import MetricsWriter, read_metrics
from cluster.topology import Worker
from jobs.beside import beside
from jobs.progress import Progress
from jobs.recipe import Recipe
from jobs.trackers import Trackers

if TYPE_CHECKING:
    from cluster.engine import StepResult
    from pipeline.index import Dataset, Item
    from pipeline.loader import Batch
    from pipeline.mixture import Mixture

POLL_S = 0.5  # how often the driver looks for new metrics to show


class RankLog:
    """Metrics (rank 0), damaged samples and, on request, the trace of what this rank consumed."""

    def __init__(self, recipe: Recipe, worker: Worker, start: int) -> None:
        self._trackers: Trackers | None = None
        self._flops_rate = 0.0
        self._batch, self._samples = recipe.train.global_batch, recipe.samples_per_step
        self._metrics = MetricsWriter(recipe.run_dir / "metrics.jsonl", worker.attempt) if worker.rank == 0 else None
        self._damage_path = recipe.run_dir / "damage" / f"rank-{worker.rank}.jsonl"
        self._damage: MetricsWriter | None = None
        self._attempt = worker.attempt
        self._trace: TextIO | None = None
        self._waited = 0.0
        self._step = start
        self._keys: list[str] = []
        if worker.rank == 0:
            self._trackers = Trackers(recipe, start, lambda text: self.event("tracker", text=text))
        if recipe.train.trace:
            folder = recipe.run_dir / "trace"
            folder.mkdir(exist_ok=True)
            self._trace = (folder / f"attempt-{worker.attempt:06d}-rank-{worker.rank}.jsonl").open("a", encoding="utf-8")

    def event(self, event: str, **facts: object) -> None:
        """One line in metrics.jsonl, from rank 0."""
        if self._metrics is not None:
            self._metrics.write(event, **facts)
        if self._trackers is not None:
            self._trackers.send({"event": event, **facts})

    def place(self) -> dict[str, object]:
        """Where this rank is, for whoever asks why it does not get on."""
        return {"steps finished": self._step, "videos of the last micro-batch": self._keys}

    def count_flops(self, in_step: float, peak_per_s: float) -> None:
        """From now on steps tell which share of `peak_per_s` operations per second the `in_step` ones of this rank's step were."""
        self._flops_rate = in_step / peak_per_s

    def watch(self, batches: Iterable["Batch"]) -> Iterator[tuple[int, "Batch"]]:
        """Passes (micro-batch number, batch) on; measures the wait for data, records damage and trace."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            self._keys = batch.keys
            self._record(batch)
            yield batch.micro, batch

    def step(self, step: int, result: "StepResult", seconds: float, num_samples: int) -> None:
        """The figures of one finished optimizer step; `step` counts from 1."""
        self._step = step
        self.event(
            "step",
            step=step,
            epoch=round(step * self._samples / num_samples, 4),
            loss=result.loss,
            lr=result.lr,
            grad_norm=result.grad_norm,
            clips_per_s=round(self._batch / seconds, 3),
            data_wait=round(min(1.0, self._waited / seconds), 4),
            step_s=round(seconds, 4),
            parts={name: round(value, 5) for name, value in result.parts.items()},
            **({"flops_share": round(self._flops_rate / seconds, 5)} if self._flops_rate else {}),
            **({"skipped": result.skipped} if result.skipped else {}),
        )
        self._waited = 0.0

    def _record(self, batch: "Batch") -> None:
        for damage in batch.damaged:
            if self._damage is None:
                self._damage_path.parent.mkdir(exist_ok=True)
                self._damage = MetricsWriter(self._damage_path, self._attempt)
            self._damage.write(
                "damage",
                position=damage.position,
                key=damage.key,
                shard=damage.shard,
                reason=damage.reason,
                substitute_key=damage.substitute_key,
            )
        if self._trace is not None:
            self._trace.write(json.dumps({"attempt": self._attempt, **_trace_line(batch)}) + "\n")
            self._trace.flush()

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()
        for writer in (self._metrics, self._damage, self._trace):
            if writer is not None:
                writer.close()


def say_slow(rank: int, source: "Dataset | Mixture", item: "Item", seconds: float) -> None:
    """On standard error, which is in the run's logs: who waits for what."""
    click.echo(f"rank {rank} has waited {seconds:.1f} s for {where(source, item)}", err=True)


def where(source: "Dataset | Mixture", item: "Item") -> str:
    """A video and its place in a shard, for people."""
    return f"video '{item.key}', byte {item.offset} of {source.parts[source.part(item.row)].where}/{item.shard_file}"


def damage_before(run_dir: Path, position: int) -> set[int]:
    """Positions of damaged samples before `position` that any rank of any attempt wrote down; each counts once."""
    events = [event for path in sorted((run_dir / "damage").glob("rank-*.jsonl")) for event in read_metrics(path)]
    found = {int(str(event["position"])) for event in events if event["event"] == "damage"}
    return {each for each in found if each < position}


def _trace_line(batch: "Batch") -> dict[str, object]:
    """What was consumed, to the bit: positions, keys, frames, crops and a digest of the tensor."""
    return {
        "step": batch.step,
        "micro": batch.micro,
        "positions": [int(position) for position in batch.positions],
        "keys": batch.keys,
        "labels": batch.labels.tolist(),
        "parameters": [chosen.as_lists() for chosen in batch.parameters],
        "digest": hashlib.sha256(batch.clips.cpu().numpy().tobytes()).hexdigest(),
    }


def follow(metrics: Path, progress: Progress, done: int) -> AbstractContextManager[None]:
    """Shows steps on `progress` as they appear in `metrics`, whichever process of which machine writes them."""
    offset = metrics.stat().st_size if metrics.is_file() else 0
    return beside(partial(_tail, metrics, offset, progress, done))


def _tail(metrics: Path, offset: int, progress: Progress, done: int, stop: threading.Event) -> None:
    pending = b""
    while True:
        last = stop.is_set()
        if metrics.is_file():
            with metrics.open("rb") as file:
                file.seek(offset)
                pending += file.read()
                offset = file.tell()
        *lines, pending = pending.split(b"\n")
        for line in lines:
            event = _step_event(line)
            if event is not None and event["step"] > done:  # steps replayed after a kill were counted before
                loss = "no finite loss" if event["loss"] is None else f"loss {event['loss']:.3f}"
                progress.advance(int(event["step"]) - done, f"{loss}, {_shares(event)}")
                done = int(event["step"])
        if last:
            return
        stop.wait(POLL_S)


def _shares(event: Mapping[str, Any]) -> str:
    """Where a step's time went, for people."""
    parts, seconds = event.get("parts") or {}, float(event["step_s"])
    shown = [f"{name} {value / seconds:.0%}" for name, value in parts.items() if seconds and name != "data" and value / seconds >= 0.01]
    share = [f"{event['flops_share']:.0%} of peak"] if "flops_share" in event else []
    return ", ".join([f"data wait {event['data_wait']:.0%}", *shown, *share])


def _step_event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:  # a line torn by a kill
        return None
    return event if isinstance(event, dict) and event.get("event") == "step" else None
