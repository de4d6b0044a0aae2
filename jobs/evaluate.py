"""posmlp eval: every view of every video of a split judged exactly once, by any number of workers; the same command resumes.

Micro-batch j holds views [j*b, (j+1)*b) of the split whatever the world size, so that predictions do not depend on it. Each finished
micro-batch is one small file, whole or absent; merging them checks that every view is there exactly once, and fuses those of a video.

`eval.json` is the evaluation that the recipe asks for. Another one of the same run, with other eval keys or the mean of several
checkpoints, has a file of its own that names what is different: `eval-clips4-crops3.json`, `eval-average3.json`. Each says in full what
it is an evaluation of, so no report can take one for another.
"""

import hashlib
import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster import lease
from cluster.checkpoint import Checkpoint
from cluster.topology import Worker, num_micro_batches
from jobs.accuracy import summarise
from jobs.beside import beside
from jobs.errors import JobError, RecipeError, user_errors
from jobs.mirroring import mirror_of, resume
from jobs.predictions import ViewOutput, finished_parts, merge, records, write_part
from jobs.progress import Progress
from jobs.recipe import Recipe, load_recipe, parse_recipe
from jobs.results import SCHEMA
from jobs.run_folder import checkpoints, identity, open_dataset, recipe_of, worker_dataset, write_text
from pipeline.index import Dataset

if TYPE_CHECKING:
    import torch

    from pipeline.loader import Batch

POLL_S = 0.5
PARTS = "parts-"  # folders of views judged so far, by what they are an evaluation of


def run(
    run_dir: Path,
    *,
    overrides: Sequence[str] = (),
    average: int = 1,
    checkpoint: str = "last",
    baseline: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Evaluates a run on data.val_split and writes `eval.json`, or the file that `result_path` names, which it returns.

    overrides: "eval.key=value" for this evaluation only. average: how many of the newest kept checkpoints are averaged.
    checkpoint: "last", "best" (of those that `eval.every` judged) or a step.
    baseline: {"name": text, "top1": 0 to 1} of a simpler model, shown beside the result.
    Raises JobError, PipelineError or ClusterError with a text for the user.
    """
    kept = recipe_of(run_dir)
    recipe = _with_overrides(kept, overrides)
    dataset = open_dataset(recipe, recipe.data.val_split)
    path = result_path(run_dir, kept, recipe, average, checkpoint)
    with lease.hold(run_dir):
        if recipe.mirror is not None:
            resume(recipe, dataset, mirror_of(recipe), write=False)
        chosen = _newest(recipe, dataset, average) if checkpoint == "last" else [_chosen(recipe, dataset, checkpoint)]
        facts = facts_of(recipe, dataset, chosen)
        parts = run_dir / "eval" / f"{PARTS}{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}"
        result = finished(path, facts)
        if result is None:
            rows = dataset.rows(recipe.data.split_column, recipe.data.val_split)
            num_views = recipe.eval.num_views
            _judge_missing(recipe, dataset, chosen, parts, -(-len(rows) * num_views // recipe.eval.micro_batch))
            keys = [dataset.text("key", int(row)) for row in rows]
            predictions = merge(parts, keys, num_views=num_views, fusion=recipe.eval.fusion)
            result = {**facts, **summarise(predictions, dataset.info.classes), "videos": records(predictions)}
        if baseline is not None:
            result["baseline"] = dict(baseline)
        write_text(path, to_text(result))
        _forget_parts(run_dir / "eval", parts)
    return result


def _with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    foreign = [text for text in overrides if not text.startswith("eval.")]
    if foreign:
        raise RecipeError(f"'{foreign[0]}': only keys of the eval section can be overridden here, for example eval.clips=4.")
    if not overrides:
        return recipe
    changed = load_recipe(str(recipe.run_dir / "recipe.yaml"), overrides)
    return recipe.model_copy(update={"eval": changed.eval})


def result_path(run_dir: Path, kept: Recipe, recipe: Recipe, average: int, checkpoint: str = "last") -> Path:
    """Where an evaluation is written: `eval.json` if it is as the run's `kept` recipe says, else a file named by what differs."""
    before, after = kept.eval.protocol(), recipe.eval.protocol()
    names = [f"{name}{value}".lower() for name, value in after.items() if value != before[name]] + [f"average{average}"] * (average > 1)
    names += [] if checkpoint == "last" else ["best" if checkpoint == "best" else f"step{int(checkpoint)}"]
    return run_dir / f"{'-'.join(['eval', *names])}.json"


def _newest(recipe: Recipe, dataset: Dataset, count: int) -> list[Checkpoint]:
    """The newest whole checkpoints, one per step, newest first. Raises JobError when there are fewer than `count`."""
    found = checkpoints(recipe).whole(identity(recipe, dataset), warn=lambda text: click.echo(f"warning: {text}", err=True))
    chosen: list[Checkpoint] = []
    for checkpoint in found:  # asked for one by one, since each is read whole to be checked
        if checkpoint.step not in {one.step for one in chosen}:
            chosen.append(checkpoint)
        if len(chosen) == count:
            break
    if not chosen:
        raise JobError(f"{recipe.run_dir} has no checkpoint yet. Train first: posmlp train {recipe.run_dir / 'recipe.yaml'}")
    if len(chosen) < count:
        raise JobError(
            f"--average {count}: {recipe.run_dir} keeps {len(chosen)} whole checkpoint(s). "
            f"Ask for at most {len(chosen)}, or train with checkpoint.keep={count}."
        )
    return chosen


def _chosen(recipe: Recipe, dataset: Dataset, checkpoint: str) -> Checkpoint:
    """The best checkpoint, or that of a step, whole. Raises JobError where there is none."""
    store = checkpoints(recipe)
    if checkpoint == "best":
        wanted = store.best()
        missing = "no checkpoint that was judged: train with eval.every and data.choose_split or data.choose_fraction"
    else:
        wanted = next((found for found in store.manifests() if str(found.step) == checkpoint), None)
        missing = f"no checkpoint of step {checkpoint}; there are {', '.join(str(found.step) for found in store.manifests())}"
    if wanted is None:
        raise JobError(f"{recipe.run_dir} has {missing}.")
    whole = store.whole(identity(recipe, dataset), warn=lambda text: click.echo(f"warning: {text}", err=True))
    found = next((found for found in whole if found.number == wanted.number), None)
    if found is None:
        raise JobError(f"{wanted.path} is damaged; choose another --checkpoint.")
    return found


def facts_of(recipe: Recipe, dataset: Dataset, chosen: Sequence[Checkpoint]) -> dict[str, object]:
    """What an evaluation is of: equal facts, equal predictions. step: of the newest of the averaged `checkpoints`."""
    return {
        "schema": SCHEMA,
        "split": recipe.data.val_split,
        "step": chosen[0].step,
        "checkpoints": [checkpoint.path.name for checkpoint in chosen],
        "dataset_fingerprint": dataset.info.fingerprint,
        "views": recipe.eval.num_views,
        "eval": recipe.eval.protocol(),
    }


def finished(path: Path, facts: Mapping[str, object]) -> dict[str, object] | None:
    """A result that is there already and whose facts are these."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    same = isinstance(result, dict) and all(result.get(name) == value for name, value in facts.items())
    return result if same else None


def to_text(result: Mapping[str, object]) -> str:
    """JSON with a line for each entry, and for each row, class and video."""
    entries = []
    for name, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], list | dict):
            text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        elif name == "per_class" and isinstance(value, Mapping):
            text = "{\n  " + ",\n  ".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in value.items()) + "\n }"
        entries.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _forget_parts(folder: Path, parts: Path) -> None:
    """Removes the parts that are in a result now; with the last ones everything that judging left."""
    shutil.rmtree(parts, ignore_errors=True)
    if not list(folder.glob(f"{PARTS}*")):
        shutil.rmtree(folder, ignore_errors=True)


def _judge_missing(recipe: Recipe, dataset: Dataset, chosen: Sequence[Checkpoint], parts: Path, total: int) -> None:
    from cluster.launch import launch

    parts.mkdir(parents=True, exist_ok=True)
    done = len(finished_parts(parts))
    if done == total:
        return
    payload = {
        "recipe": recipe.model_dump(mode="json"),
        "checkpoints": [checkpoint.number for checkpoint in chosen],
        "parts": str(parts),
        "dataset": dataset.info.fingerprint,
    }
    with Progress("evaluating", total=total, unit="batches", done=done) as progress, _follow(parts, progress, done):
        launch(
            "jobs.evaluate:worker",
            payload,
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


def worker(payload: Mapping[str, object], worker: Worker) -> None:
    """One rank: its share of the micro-batches that are not there yet."""
    import torch

    from cluster.engine import autocast
    from cluster.worker import agree_on, heartbeat
    from jobs.run_log import say_slow
    from jobs.trained_model import load_trained
    from pipeline.keyed import eval_views
    from pipeline.loader import Loader
    from pipeline.requests import eval_requests

    recipe = parse_recipe(payload["recipe"], where="the run's recipe")
    dataset = worker_dataset(recipe, recipe.dataset_dir, payload["dataset"])
    parts = Path(str(payload["parts"]))
    numbers, store = payload["checkpoints"], checkpoints(recipe)
    assert isinstance(numbers, list)
    model = load_trained(recipe, len(dataset.info.classes), *(store.at(int(number)) for number in numbers)).to(worker.device)
    precision = autocast(recipe.engine, worker.device)
    # Rank 0 looks and the others follow: a rank that starts late would see what the others have finished since, and share out otherwise.
    done = agree_on(sorted(finished_parts(parts)))
    requests = eval_requests(
        dataset,
        dataset.rows(recipe.data.split_column, recipe.data.val_split),
        micro_batch=recipe.eval.micro_batch,
        rank=worker.rank,
        world_size=worker.world_size,
        clip=recipe.clip,
        augment=recipe.augment,
        views=eval_views(recipe.eval.clips, recipe.eval.crops, recipe.eval.flip),
        skip=set(done),
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
        on_slow_read=partial(say_slow, worker.rank, dataset),
    ) as loader:
        for batch in loader:
            with torch.inference_mode(), precision:
                logits = model(batch.clips)
            outputs = judged(batch, logits.float().cpu())
            if outputs:  # a dummy that only keeps ranks in step has none
                write_part(parts, batch.micro, outputs)
            heartbeat()


def judged(batch: "Batch", logits: "torch.Tensor") -> list[ViewOutput]:
    """What the model says of each real view of a batch, logits (B, K); slots that only fill up are left out."""
    failed = {damage.position: damage.reason for damage in batch.damaged}
    positions, labels, values = batch.positions.tolist(), batch.labels.tolist(), logits.numpy()
    return [
        ViewOutput(position=position, key=batch.keys[i], label=labels[i], logits=values[i], failed=failed.get(position))
        for i, position in enumerate(positions)
        if batch.valid[i]
    ]


def headline(result: Mapping[str, Any]) -> str:
    """One line for people."""
    failed = f", {result['num_failed']} of them unreadable and counted as wrong" if result["num_failed"] else ""
    views = f", {result['views']} views each" if result["views"] > 1 else ""
    averaged = f", mean of {len(result['checkpoints'])} checkpoints" if len(result["checkpoints"]) > 1 else ""
    return (
        f"top-1 {result['top1']:.3f}, top-5 {result['top5']:.3f} (chance {result['chance']:.3f}) "
        f"on {result['num_videos']} videos of split '{result['split']}'{failed}{views}, step {result['step']}{averaged}"
    )
