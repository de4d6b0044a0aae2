"""posmlp jobs, logs, stop, status: what became of what was submitted, by run folder or by job id."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.errors import SubmitError
from cluster.submit import Jobs, Submission, address_of
from jobs import status
from jobs.charts import duration
from jobs.submission import number_of
from jobs.submit import FOLDER, VERB, exit_code, follow

ANSWER_S = 60.0  # for a job that only reads a run folder on the cluster
POLL_S = 0.5
COLOURS = {"finished": "green", "running": "cyan", "pending": "yellow", "stopped": "yellow", "failed": "red"}


def listed(jobs: Jobs) -> list[Submission]:
    """What `posmlp submit` has submitted, the newest first."""
    return [job for job in jobs.all() if VERB in job.metadata]


def find(jobs: Jobs, run: str) -> Submission:
    """A job by its id, or the newest of a run folder. Raises SubmitError when there is none."""
    found = listed(jobs)
    folder = run if "://" in run else os.path.abspath(run)
    for job in found:
        if job.id == run:
            return job
    of_folder = [job for job in found if job.metadata.get(FOLDER) == folder]
    if not of_folder:
        raise SubmitError(f"{run}: no job of that id, and none that fills that folder, on {jobs.address}. 'posmlp jobs' lists them.")
    return of_folder[0]


def show(found: list[Submission], address: str) -> None:
    """Prints a table for people."""
    if not found:
        click.echo(f"{address}: nothing was submitted there")
        return
    table = Table()
    for name in ("job", "state", "folder", "started", "lasted"):
        table.add_column(name, overflow="fold")
    for job in found:
        lasted = (job.ended or time.time()) - job.started
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started))
        state = Text(job.state, style=COLOURS[job.state])
        table.add_row(Text(job.id), state, Text(job.metadata.get(FOLDER, "")), since, duration(lasted))
    Console().print(table)


def plain(job: Submission) -> dict[str, object]:
    """Of one job, for JSON."""
    return {
        "id": job.id,
        "verb": job.metadata.get(VERB),
        "folder": job.metadata.get(FOLDER),
        "attempt": number_of(job.id),
        "state": job.state,
        "exit_code": job.exit_code,
        "started": job.started,
        "ended": job.ended,
    }


def logs(jobs: Jobs, run: str, *, follow_it: bool) -> int:
    """Prints what a job has printed, on request until it is over. Returns the exit code: with follow_it that of the job."""
    job = find(jobs, run)
    if follow_it:
        return follow(jobs, job.id)
    click.echo(jobs.log(job.id), nl=False)
    return 0


def stop(jobs: Jobs, run: str) -> None:
    """Asks a job to save and end, and waits until it is over."""
    job = find(jobs, run)
    if job.over:
        click.echo(f"{job.id}: {job.state} already")
        return
    jobs.stop(job.id)
    while not (job := jobs.get(job.id)).over:
        time.sleep(POLL_S)
    log = jobs.log(job.id)
    said = [line for line in log.splitlines() if line.startswith("stopped: ")]
    click.echo(said[-1] if said else f"{job.id}: ended before it could save anything new")
    click.echo(f"{job.id}: {job.state}, exit code {exit_code(job, log)}; the same submit goes on")


def status_of(run: str, address: str | None) -> dict[str, object]:
    """How a run gets on: read from its folder where that is visible here, else by a job on its cluster; and the job's own state.

    Raises SubmitError, or JobError where the run has no folder yet.
    """
    folder = Path(run)
    if address is None and status.is_run(folder):
        return dict(status.run(folder))
    jobs = Jobs(address_of(address))
    job = find(jobs, run)
    there = Path(job.metadata[FOLDER])
    found = status.run(there) if status.is_run(there) else _asked_there(jobs, job, there)
    return {"job": plain(job), **found}


def _asked_there(jobs: Jobs, job: Submission, folder: Path) -> Mapping[str, object]:
    """What the head says of a folder that is not visible here: the same command there, as a job with the files of the first."""
    name = f"posmlp-status-{os.getpid()}-{time.time_ns():x}"
    command = ["python", "-P", "-m", "jobs", "status", str(folder), "--json"]
    if not jobs.submit(name, command, folder=None, like=job, metadata={}):
        raise SubmitError(f"{jobs.address}: there is a job {name} already.")
    end = time.monotonic() + ANSWER_S
    while not (asked := jobs.get(name)).over:
        if time.monotonic() > end:
            jobs.stop(name)
            raise SubmitError(f"{jobs.address}: the head did not answer within {ANSWER_S:.0f} s.")
        time.sleep(POLL_S)
    log = jobs.log(name)
    jobs.delete(name)
    if asked.state != "finished":  # no run folder yet, most likely: the job's own state is what there is to say
        return {}
    answer = json.loads(log[log.index("\n{") :])
    assert isinstance(answer, dict)
    return answer
