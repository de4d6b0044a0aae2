"""posmlp runs: what became of every run in a folder, from the small files that runs leave. Nothing is locked, changed or loaded."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.job import FAILURE
from cluster.lease import LOCK
from jobs.charts import duration, num_bytes
from jobs.errors import JobError
from jobs.recipe import Recipe
from jobs.run_folder import checkpoints, recipe_of, total_steps, train_rows
from pipeline.errors import PipelineError
from pipeline.index import Dataset

State: TypeAlias = Literal["finished", "running", "interrupted", "failed", "broken"]

MARKS = ("recipe.yaml", "metrics.jsonl", "checkpoints", "attempts")  # any of them makes a folder a run's
OWN_FOLDERS = frozenset({"attempts", "checkpoints", "damage", "dataset", "eval", "logs", "trace", "videos"})  # of a run: no runs in these
DEPTH = 3  # of folders in which runs are looked for
LOOK_S = 5.0  # that an object store may take to answer
TAIL_BYTES = 1 << 16  # of metrics.jsonl: hundreds of lines
COLOURS = {"finished": "green", "running": "cyan", "interrupted": "yellow", "failed": "red", "broken": "red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run folder. step: the last one finished; total: of the recipe. None where nothing tells.

    top1: of `eval.json`, made at step eval_step. size_bytes: on disk, all in all. changed: seconds since 1970 of the last change.
    note: why it failed or is broken.
    """

    path: str
    state: State
    step: int | None
    total: int | None
    top1: float | None
    eval_step: int | None
    size_bytes: int
    changed: float
    note: str = ""


def run(folder: Path) -> list[Run]:
    """Every run in `folder`, the last changed first. Raises JobError when there is no such folder."""
    if not folder.is_dir():
        raise JobError(f"{folder}: no such folder. Name the folder that your run folders are in, for example: posmlp runs runs")
    return sorted((look_at(path) for path in _run_folders(folder, DEPTH)), key=lambda found: -found.changed)


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    is_run = any((folder / mark).exists() for mark in MARKS)
    if is_run:
        yield folder
    try:
        inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:  # what may not be read holds no runs of ours
        return
    for name in inside if depth else []:
        if not name.startswith(".") and not (is_run and name in OWN_FOLDERS):
            yield from _run_folders(folder / name, depth - 1)


def look_at(folder: Path) -> Run:
    """What one run folder says of itself, whatever state it is in."""
    size, changed = _measure(folder)
    notes: list[str] = []
    recipe = _recipe(folder, notes)
    events = _last_events(folder / "metrics.jsonl", notes)
    result = _evaluation(folder / "eval.json", notes)
    saved = max((checkpoint.step for checkpoint in checkpoints(recipe).manifests()), default=None) if recipe else None
    stepped = [_whole(event.get("step")) for event in events if event["event"] in ("step", "end")]
    step = stepped[-1] if stepped else saved
    total = _total(recipe) if recipe else None
    gang = [event["event"] for event in events if event["event"] != "mirror"]  # the driver's own may follow the end
    if total is None and gang and gang[-1] == "end":
        total = step
    top1 = result.get("top1")
    state = _state(folder, recipe, saved, total)
    if state == "failed":
        notes.append(_failure(folder))
    return Run(
        path=click.format_filename(folder),
        state=state,
        step=step,
        total=total,
        top1=float(top1) if isinstance(top1, int | float) else None,
        eval_step=_whole(result.get("step")),
        size_bytes=size,
        changed=changed,
        note=" ".join("; ".join(notes).split()),
    )


def _state(folder: Path, recipe: Recipe | None, saved: int | None, total: int | None) -> State:
    if _held(folder / LOCK):
        return "running"
    if recipe is None:
        return "broken"
    if saved is not None and total is not None and saved >= total:
        return "finished"
    return "failed" if _failure(folder) else "interrupted"


def _held(lock: Path) -> bool:
    """Whether a process holds the lease: asks for a shared lock and lets go of it at once."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _recipe(folder: Path, notes: list[str]) -> Recipe | None:
    try:
        return recipe_of(folder)
    except (JobError, OSError) as error:
        notes.append(str(error) if (folder / "recipe.yaml").exists() else "it has no recipe.yaml")
        return None


def _total(recipe: Recipe) -> int | None:
    if recipe.train.steps is not None:
        return recipe.train.steps
    try:
        # Who lists runs does not wait for a store that is away.
        dataset = Dataset.open(recipe.dataset_dir, replace(recipe.loader.remote, retries=0, timeout_s=LOOK_S))
        return total_steps(recipe, len(train_rows(recipe, dataset)))
    except (PipelineError, OSError):  # it was moved or removed since
        return None


def _last_events(metrics: Path, notes: list[str]) -> list[dict[str, object]]:
    """The whole events at the end of a file that may be gigabytes long."""
    try:
        with metrics.open("rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"metrics.jsonl: {error.strerror}")
        return []
    found = []
    for line in lines[1 if start else 0 :]:
        try:
            event = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if isinstance(event, dict) and "event" in event:
            found.append(event)
    return found


def _evaluation(path: Path, notes: list[str]) -> dict[str, object]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"eval.json cannot be read: {error}")
        return {}
    return result


def _failure(folder: Path) -> str:
    """The message that the last launch left for the user; "" when it left none, or stopped because it was asked to."""
    launches = sorted((folder / "logs").glob("launch-*"))
    try:
        told = json.loads((launches[-1] / FAILURE).read_text(encoding="utf-8")) if launches else {}
        return "" if told.get("stopped") else str(told.get("message", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _measure(folder: Path) -> tuple[int, float]:
    """Bytes that everything in a folder takes on disk, and when its newest file was changed."""
    size, changed = 0, folder.stat().st_mtime
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                facts = os.lstat(os.path.join(parent, name))
            except OSError:  # removed meanwhile: the run is at work
                continue
            size += 512 * facts.st_blocks
            changed = max(changed, facts.st_mtime)
    return size, changed


def show(runs: list[Run], folder: Path) -> None:
    """Prints a table for people."""
    if not runs:
        click.echo(f"{folder} holds no runs")
        return
    table = Table()
    for name in ("run", "state", "step", "top-1", "size", "last change"):
        table.add_column(name, justify="right" if name in ("step", "top-1", "size") else "left", overflow="fold")
    for each in runs:
        late = "" if each.eval_step in (None, each.step) else f" (step {each.eval_step})"
        table.add_row(
            Text(each.path),
            Text(each.state, style=COLOURS[each.state]),
            f"{_count(each.step)}/{_count(each.total)}",
            "" if each.top1 is None else f"{each.top1:.3f}{late}",
            num_bytes(each.size_bytes),
            f"{duration(max(0.0, time.time() - each.changed))} ago",
        )
    Console().print(table)
    for each in runs:
        if each.note:
            click.echo(f"{each.path}: {each.note}", err=True)


def _count(value: int | None) -> str:
    return "?" if value is None else str(value)
