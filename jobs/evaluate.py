"""posmlp eval: every video of a split judged exactly once, by any number of workers; the same command resumes.

Micro-batch j holds videos [j*b, (j+1)*b) of the split whatever the world size, so that predictions do not depend on it.
Each finished micro-batch is one small file, whole or absent; merging them checks that every video is there exactly once.
"""

import json
import math
import shutil
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt

from cluster import lease
from cluster.topology import Worker, num_micro_batches
from jobs.beside import beside
from jobs.errors import JobError, user_errors
from jobs.progress import Progress
from jobs.recipe import Recipe, parse_recipe
from jobs.run_folder import checkpoints, newest_checkpoint, open_dataset, recipe_of, write_text
from pipeline.index import Dataset

if TYPE_CHECKING:
    import torch

    from pipeline.loader import Batch

SCHEMA = 1
TOP = 5  # classes kept per video
POLL_S = 0.5


def run(run_dir: Path, baseline: Mapping[str, object] | None = None) -> dict[str, object]:
    """Evaluates the newest checkpoint of a run on data.val_split and writes `eval.json`, which it returns.

    baseline: {"name": text, "top1": 0 to 1} of a simpler model, shown beside the result.
    Raises JobError, PipelineError or ClusterError with a text for the user.
    """
    recipe = recipe_of(run_dir)
    dataset = open_dataset(recipe, recipe.data.val_split)
    with lease.hold(run_dir):
        newest = newest_checkpoint(recipe, dataset)
        if newest is None:
            raise JobError(f"{run_dir} has no checkpoint yet. Train first: posmlp train {run_dir / 'recipe.yaml'}")
        facts = {"schema": SCHEMA, "split": recipe.data.val_split, "step": newest.step, "dataset_fingerprint": dataset.info.fingerprint}
        result = finished(run_dir, facts)
        if result is None:
            rows = dataset.rows(recipe.data.split_column, recipe.data.val_split)
            parts = run_dir / "eval" / f"step-{newest.step:08d}"
            _evaluate_missing(recipe, newest.number, parts, math.ceil(len(rows) / recipe.eval.micro_batch))
            result = {**facts, **summarise(merge(parts, dataset, rows), dataset.info.classes)}
        if baseline is not None:
            result["baseline"] = dict(baseline)
        write_text(run_dir / "eval.json", json.dumps(result, indent=1) + "\n")
        shutil.rmtree(run_dir / "eval", ignore_errors=True)
    return result


def finished(run_dir: Path, facts: Mapping[str, object]) -> dict[str, object] | None:
    """`eval.json` when it is there and its facts (schema, split, step, dataset) are these."""
    path = run_dir / "eval.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if all(result.get(name) == value for name, value in facts.items()) else None


def _evaluate_missing(recipe: Recipe, number: int, parts: Path, total: int) -> None:
    from cluster.launch import launch

    parts.mkdir(parents=True, exist_ok=True)
    done = len(finished_parts(parts))
    if done == total:
        return
    with Progress("evaluating", total=total, unit="batches", done=done) as progress, _follow(parts, progress, done):
        launch(
            "jobs.evaluate:worker",
            {"recipe": recipe.model_dump(mode="json"), "checkpoint": number, "parts": str(parts)},
            run_dir=parts.parent,  # its attempts are not the training's
            num_micro_batches=num_micro_batches(recipe.train.global_batch, recipe.train.micro_batch),
            options=recipe.launch,
            on_event=lambda event: click.echo(f"evaluation restarted: {event['reason']}", err=True),
            user_errors=user_errors(),
        )


def _follow(parts: Path, progress: Progress, done: int) -> AbstractContextManager[None]:
    """Shows parts on `progress` as they appear, whichever process writes them."""

    def watch(stop: threading.Event) -> None:
        shown = done
        while not stop.wait(POLL_S):
            now = len(finished_parts(parts))
            if now > shown:
                progress.advance(now - shown)
                shown = now
        progress.advance(len(finished_parts(parts)) - shown)

    return beside(watch)


def finished_parts(parts: Path) -> dict[int, Path]:
    """Micro-batch number -> its file."""
    return {int(path.stem.removeprefix("micro-")): path for path in parts.glob("micro-*.json")}


def worker(payload: Mapping[str, object], worker: Worker) -> None:
    """One rank: its share of the micro-batches that are not there yet."""
    import torch

    from cluster.engine import autocast
    from cluster.worker import heartbeat
    from jobs.trained_model import load_trained
    from pipeline.loader import Loader
    from pipeline.requests import eval_requests

    recipe = parse_recipe(payload["recipe"], where="the run's recipe")
    dataset = Dataset.open(recipe.dataset_dir)
    parts = Path(str(payload["parts"]))
    checkpoint = checkpoints(recipe).at(int(str(payload["checkpoint"])))
    model = load_trained(recipe, len(dataset.info.classes), checkpoint).to(worker.device)
    precision = autocast(recipe.engine, worker.device)
    requests = eval_requests(
        dataset,
        dataset.rows(recipe.data.split_column, recipe.data.val_split),
        micro_batch=recipe.eval.micro_batch,
        rank=worker.rank,
        world_size=worker.world_size,
        clip=recipe.clip,
        augment=recipe.augment,
        skip=finished_parts(parts).keys(),
    )
    with Loader(
        dataset,
        requests,
        micro_batch=recipe.eval.micro_batch,
        clip=recipe.clip,
        augment=recipe.augment,
        options=recipe.loader,
        threads=worker.threads,
        device=worker.device,
        on_damage="report",
    ) as loader:
        for batch in loader:
            with torch.inference_mode(), precision:
                logits = model(batch.clips)
            records = judge(batch, logits.float().cpu())
            if records:  # a dummy that only keeps ranks in step has none
                write_text(parts / f"micro-{batch.micro:08d}.json", json.dumps(records))
            heartbeat()


def judge(batch: "Batch", logits: "torch.Tensor") -> list[dict[str, object]]:
    """One record per real video of a batch: its row, truth, best classes with scores, and why it failed if it did."""
    failed = {damage.position: damage.reason for damage in batch.damaged}
    scores, best = logits.softmax(dim=1).topk(min(TOP, logits.shape[1]), dim=1)
    records: dict[int, dict[str, object]] = {}
    for i, position in enumerate(batch.positions.tolist()):
        if position in records or not (batch.valid[i] or position in failed):
            continue  # a slot that only fills up
        records[position] = {
            "key": batch.keys[i],
            "label": int(batch.labels[i]),
            "top": best[i].tolist(),
            "scores": [round(score, 6) for score in scores[i].tolist()],
            "failed": failed.get(position),
        }
    return list(records.values())


def merge(parts: Path, dataset: Dataset, rows: npt.NDArray[np.uint32]) -> list[dict[str, object]]:
    """All records, each video of `rows` exactly once. Raises JobError naming what is missing or double."""
    records = [record for _, path in sorted(finished_parts(parts).items()) for record in json.loads(path.read_text(encoding="utf-8"))]
    counts = Counter(record["key"] for record in records)
    wanted = {dataset.text("key", int(row)) for row in rows}
    double = sorted(key for key, count in counts.items() if count > 1)
    wrong = sorted(wanted ^ counts.keys())
    if double or wrong:
        raise JobError(
            f"Evaluation is not exact: {len(wrong)} videos missing or foreign, {len(double)} double, first '{(double + wrong)[0]}'. "
            f"Remove {parts} and run 'posmlp eval' again."
        )
    return records


def summarise(records: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, object]:
    """The figures of `eval.json`; a failed video counts as wrong. Confusion: rows truth, columns prediction, failed ones in none."""
    num = len(records)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    totals = np.zeros(len(classes), dtype=np.int64)
    top5 = 0
    for record in records:
        totals[record["label"]] += 1
        if record["failed"] is None:
            confusion[record["label"], record["top"][0]] += 1
            top5 += record["label"] in record["top"]
    right = confusion.diagonal()
    return {
        "num_videos": num,
        "num_failed": sum(record["failed"] is not None for record in records),
        "views": 1,
        "top1": float(right.sum() / num),
        "top5": top5 / num,
        "chance": 1 / len(classes),
        "per_class": {
            name: {"num": int(totals[i]), "top1": float(right[i] / totals[i]) if totals[i] else None} for i, name in enumerate(classes)
        },
        "classes": list(classes),
        "confusion": confusion.tolist(),
        "failed": [{"key": record["key"], "reason": record["failed"]} for record in records if record["failed"] is not None],
    }


def headline(result: Mapping[str, Any]) -> str:
    """One line for people."""
    failed = f", {result['num_failed']} of them unreadable and counted as wrong" if result["num_failed"] else ""
    return (
        f"top-1 {result['top1']:.3f}, top-5 {result['top5']:.3f} (chance {result['chance']:.3f}) "
        f"on {result['num_videos']} videos of split '{result['split']}'{failed}, step {result['step']}"
    )
