"""posmlp demo: the whole system on videos it makes itself, or on the user's own, with a worker killed on purpose between checkpoints.

The class of each video that it makes is its motion, so a model that sees one frame must stay at chance: the same model on single frames is
trained beside it and shown in the report. Running the command again resumes, or finds everything done.
"""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from cluster.lease import read_attempts
from jobs import build, evaluate, report, train
from jobs.beside import beside
from jobs.errors import RecipeError
from jobs.recipe import Recipe, load_recipe
from jobs.run_folder import open_dataset, total_steps, train_rows
from jobs.synthesize import synthesize

NUM_CLIPS = 90
SINGLE_FRAME = "single_frame"  # folder of the second run, inside the first one's
POLL_S = 0.1
TAIL_BYTES = 4096  # several lines of metrics


def run(out: Path | None = None, *, videos: Path | None = None, labels: Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Builds, trains with a kill, evaluates, compares with single frames, reports, and prints a summary.

    videos, labels: the user's own; without them the demo's, which are made first. out: the run folder; None: below `runs`.
    Raises RecipeError for labels without videos.
    """
    began = time.monotonic()
    if videos is None:
        if labels is not None:
            raise RecipeError("--labels without --videos: the demo's own videos have their labels. Add --videos FOLDER.")
        out = out or Path("runs/demo")
        videos, labels = out / "videos", out / "videos" / "labels.csv"
        synthesize(videos, num_clips=NUM_CLIPS, seed=0)
    out = out or Path("runs") / f"demo-{videos.resolve().name}"
    paths = {"run.dir": out, "data.videos": videos, "data.labels": labels}
    given = [f"{key}={json.dumps(None if path is None else str(path))}" for key, path in paths.items()]
    recipe = load_recipe("demo", [*given, *overrides])
    info = build.build_dataset(recipe)
    steps = _total_steps(recipe)
    with _kill_one_worker(recipe.run_dir, recipe.checkpoint.every, steps):
        train.run(recipe)
    evaluate.run(recipe.run_dir)
    result = evaluate.run(recipe.run_dir, baseline=_single_frame(recipe))
    path = report.write_report(recipe.run_dir)
    _summary(info.num_items, info.num_quarantined, result, recipe.run_dir, path, time.monotonic() - began)


def _total_steps(recipe: Recipe) -> int:
    dataset = open_dataset(recipe, recipe.data.train_split)
    return total_steps(recipe, len(train_rows(recipe, dataset)))


def _single_frame(recipe: Recipe) -> dict[str, object]:
    """The same recipe on clips of one frame, in a folder of its own: what can be told without seeing motion."""
    single = load_recipe(
        str(recipe.run_dir / "recipe.yaml"),
        [f"run.dir={recipe.run_dir / SINGLE_FRAME}", f"data.dir={recipe.dataset_dir}", "clip.num_frames=1", "launch.launcher=local"],
    )
    train.run(single)
    return {"name": "the same model on single frames", "top1": evaluate.run(single.run_dir)["top1"]}


def _kill_one_worker(run_dir: Path, every: int, steps: int) -> AbstractContextManager[None]:
    """While the block runs: SIGKILL to one worker, once, half-way and between two checkpoints."""
    due = max(1, steps // 2 // every * every + every // 2)

    def watch(stop: threading.Event) -> None:
        while not stop.wait(POLL_S):
            attempts = read_attempts(run_dir)
            if len(attempts) > 1:
                return  # it has happened, in this call or an earlier one
            step = _last_step(run_dir / "metrics.jsonl")
            pids = attempts[0].get("pids") if attempts else None
            if step >= due and isinstance(pids, list):
                click.echo(f"demo: killing worker {len(pids) - 1} (process {pids[-1]}) after step {step}", err=True)
                os.kill(int(pids[-1]), signal.SIGKILL)
                return

    return beside(watch)


def _last_step(metrics: Path) -> int:
    """The last step written so far, 0 when there is none; reads the file's end only."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        found = re.findall(rb'"step": (\d+)', file.read())
    return int(found[-1]) if found else 0


def _summary(num_items: int, num_quarantined: int, result: Mapping[str, object], run_dir: Path, path: Path, seconds: float) -> None:
    table = Table(title="PosMLP-Video demo", show_header=False)
    table.add_row("clips", f"{num_items} built, {num_quarantined} broken one(s) found and quarantined")
    table.add_row("accuracy", evaluate.headline(result))
    baseline = result["baseline"]
    assert isinstance(baseline, Mapping)
    table.add_row("single frames", f"{baseline['name']}: top-1 {baseline['top1']:.3f}")
    for kill in report.kills(run_dir):
        table.add_row("kill", kill)
    table.add_row("time", f"{seconds / 60:.1f} min for this call")
    table.add_row("report", str(path))
    Console(soft_wrap=True).print(table)
