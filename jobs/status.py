"""posmlp status: how a run gets on, from its folder alone: state, progress, rate, time left, last checkpoint, data wait, restarts."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from cluster.metrics import merge_steps, read_metrics
from jobs import runs
from jobs.charts import duration
from jobs.errors import JobError
from jobs.run_folder import checkpoints, recipe_of

RECENT_STEPS = 50  # over which rate and data wait are taken


def is_run(folder: Path) -> bool:
    """Whether there is a run in this folder."""
    return any((folder / mark).exists() for mark in runs.MARKS)


def run(folder: Path) -> dict[str, object]:
    """Plain values, seconds and steps; None where nothing tells. Raises JobError when there is no run.

    step_s: median of the last steps; clips_per_s, data_wait (share of a step's time): their means. left_s: at that rate.
    silent_s: since the last event. checkpoint: step of the newest whole one; restarts: how often the gang began again.
    places: why workers wait or places stay empty now.
    """
    if not is_run(folder):
        raise JobError(f"{folder}: no run folder. 'posmlp runs' lists those that are here; of a cluster, add --address http://HEAD:8265.")
    found = runs.look_at(folder)
    events = read_metrics(folder / "metrics.jsonl")
    recent = merge_steps(events)[-RECENT_STEPS:]
    step_s = _median([_number(event, "step_s") for event in recent])
    left = None if found.total is None or found.step is None or step_s is None else max(0, found.total - found.step) * step_s
    restarts = [event for event in events if event["event"] == "restart"]
    worlds = [event.get("world_size") for event in events if event["event"] == "attempt"]
    last = max((_number(event, "time") for event in events), default=None)
    return {
        "folder": found.path,
        "state": found.state,
        "note": found.note,
        "step": found.step,
        "total": found.total,
        "loss": recent[-1].get("loss") if recent else None,
        "step_s": step_s,
        "clips_per_s": _mean([_number(event, "clips_per_s") for event in recent]),
        "data_wait": _mean([_number(event, "data_wait") for event in recent]),
        "left_s": left if found.state == "running" else None,
        "checkpoint": _saved(folder),
        "workers": worlds[-1] if worlds else None,
        "restarts": len(restarts),
        "last_restart": restarts[-1].get("reason") if restarts else None,
        "places": _places(events),
        "silent_s": None if last is None else max(0.0, time.time() - last),
    }


def _places(events: Sequence[Mapping[str, object]]) -> str | None:
    """What was last said of workers without a place, or of places without a worker, if no later gang has put an end to it."""
    for event in reversed(events):
        if event["event"] == "idle" or event["event"] == "waiting":
            return str(event.get("reason"))
        if event["event"] == "restart":
            return None
    return None


def _saved(folder: Path) -> int | None:
    try:
        manifests = checkpoints(recipe_of(folder)).manifests()
    except (JobError, OSError):
        return None
    return max((manifest.step for manifest in manifests), default=None)


def _number(event: Mapping[str, object], name: str) -> float:
    value = event.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def show(facts: Mapping[str, object]) -> None:
    """Prints it for people, one line a thing."""
    job = facts.get("job")
    if isinstance(job, Mapping):
        code = "" if job["exit_code"] is None else f", exit code {job['exit_code']}"
        click.echo(f"job         {job['id']}: {job['state']}{code}")
    if "folder" not in facts:
        click.echo("run         nothing in its folder yet")
        return
    note = f" ({facts['note']})" if facts["note"] else ""
    click.echo(f"run         {facts['folder']}: {facts['state']}{note}")
    loss = "" if facts["loss"] is None else f", loss {facts['loss']:.3f}"
    click.echo(f"step        {_or(facts['step'])} of {_or(facts['total'])}{loss}")
    if facts["step_s"] is not None:
        left = f", {duration(_float(facts['left_s']))} left" if facts["left_s"] is not None else ""
        click.echo(f"rate        {facts['step_s']:.2f} s a step, {facts['clips_per_s']:.1f} clips a second{left}")
        click.echo(f"data wait   {facts['data_wait']:.0%} of a step")
    click.echo(f"checkpoint  {'none yet' if facts['checkpoint'] is None else 'step ' + str(facts['checkpoint'])}")
    reason = f", the last because {facts['last_restart']}" if facts["last_restart"] else ""
    click.echo(f"workers     {_or(facts['workers'])}, restarted {facts['restarts']} times{reason}")
    if facts["places"] is not None:
        click.echo(f"places      {facts['places']}")
    if facts["silent_s"] is not None:
        click.echo(f"last event  {duration(_float(facts['silent_s']))} ago")


def _or(value: object) -> str:
    return "?" if value is None else str(value)


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
