"""posmlp submit: the same command on a running Ray cluster; submitted twice it is one job.

A job's id is made from its verb and the folder that it fills, and ends in a number that grows when a job that failed or was stopped is
submitted again: `posmlp-train-mine-1f0c9a52d3-2`. What is sent is our package as it is installed here, unpacked, and the resolved
recipe; never data. The job looks first whether it can work there (`preflight`), and its answer is waited for.
"""

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from cluster.errors import SubmitError
from cluster.submit import Jobs, Submission
from jobs.packages import PACKAGES
from jobs.run_folder import libraries
from jobs.submission import Work, base_id, number_of
from jobs.submitted import ENDED, ORDER, PASSED, REFUSED_EXIT

POLL_S, POLL_MORE_S_PER_MB = 0.5, 2.0  # how often a log is looked at, which is sent as a whole each time
START_S = 60.0  # for a cluster to begin with a job, after which the user is told
MAX_FILES_BYTES = 16 << 20
VERB, FOLDER, DIGEST = "posmlp.verb", "posmlp.folder", "posmlp.digest"  # what our jobs carry as metadata
TERMINATED = 143


def run(words: Sequence[str], jobs: Jobs, *, wait: bool, again: bool, timeout_s: float) -> int:
    """Submits a command, or finds the job that an earlier call has submitted, and follows it: to its end, or, without `wait`, until it is
    known that it can work there. again: also when it is finished. Returns the exit code of the command.

    Raises RecipeError, UsageError or SubmitError.
    """
    work = Work.of(words, timeout_s=timeout_s)
    while True:
        earlier = newest(jobs, work)
        if earlier is not None and not earlier.over:
            _must_be_equal(work, earlier)
            click.echo(f"{earlier.id}: submitted before, {earlier.state} since {_clock(earlier.started)}")
            return follow(jobs, earlier.id, to_the_end=wait)
        if earlier is not None and earlier.state == "finished" and not again and earlier.metadata.get(DIGEST) == work.digest:
            click.echo(f"{earlier.id}: finished at {_clock(earlier.ended or 0)}; --again submits it anew")
            return 0
        name = f"{base_id(work.verb, work.folder)}-{number_of(earlier.id) + 1 if earlier else 1}"
        if _send(jobs, work, name):
            before = f" after {earlier.id}, which {earlier.state}" if earlier else ""
            click.echo(f"{name}: submitted to {jobs.address}{before}")
            return follow(jobs, name, to_the_end=wait)
        # somebody else submitted it in this very moment: that is the job to follow


def newest(jobs: Jobs, work: Work) -> Submission | None:
    """The last submission of this work."""
    base = base_id(work.verb, work.folder)
    found = [job for job in jobs.all() if job.id.rpartition("-")[0] == base and job.metadata.get(FOLDER) == work.folder]
    return max(found, key=lambda job: number_of(job.id), default=None)


def _must_be_equal(work: Work, earlier: Submission) -> None:
    if earlier.metadata.get(DIGEST) != work.digest:
        raise SubmitError(
            f"{work.folder} is being filled by {earlier.id}, which was submitted with another command or recipe. Stop it first "
            f"(posmlp stop {earlier.id}), or choose another folder."
        )


def _send(jobs: Jobs, work: Work, name: str) -> bool:
    metadata = {VERB: work.verb, FOLDER: work.folder, DIGEST: work.digest}
    with tempfile.TemporaryDirectory(prefix="posmlp-submit-") as folder:
        write_files(Path(folder), work)
        return jobs.submit(name, ["python", "-P", "-m", "jobs.submitted"], folder=Path(folder), like=None, metadata=metadata)


def write_files(folder: Path, work: Work) -> None:
    """The job's files: our package as an unpacked wheel, the recipe, and what to do with them. Raises SubmitError when they are too big."""
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        shutil.copytree(home / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    version = libraries()["posmlp-video"]
    facts = folder / f"posmlp_video-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: posmlp-video\nVersion: {version}\n", encoding="utf-8")
    for name, text in work.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    order = {"version": 1, "command": list(work.command), "needs": asdict(work.needs)}
    (folder / ORDER).write_text(json.dumps(order, indent=1), encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MAX_FILES_BYTES:
        raise SubmitError(f"{home}: our package has {size} bytes there, expected at most {MAX_FILES_BYTES}. Are there other files in it?")


def follow(jobs: Jobs, name: str, *, to_the_end: bool = True) -> int:
    """Prints what a job prints until it is over, or, not to_the_end, until its preflight has passed. Returns the command's exit code."""
    shown, began, told = 0, time.monotonic(), False
    while True:
        job = jobs.get(name)  # before its log, so that a log that is read after its end is whole
        log = jobs.log(name) if job.state != "pending" or job.over else ""
        click.echo(log[shown:], nl=False)
        sys.stdout.flush()
        shown = len(log)
        if job.over:
            return _ending(job, log)
        if not to_the_end and PASSED in log:
            click.echo(f"{name} works on; posmlp logs {name} --follow, posmlp status {name}, posmlp stop {name}")
            return 0
        if job.state == "pending" and not told and time.monotonic() - began > START_S:
            told = True
            click.echo(f"{name}: not started yet after {START_S:.0f} s. Does the head live, and has it room on its disk?", err=True)
        time.sleep(POLL_S + POLL_MORE_S_PER_MB * len(log) / 1e6)


def _ending(job: Submission, log: str) -> int:
    code = exit_code(job, log)
    if job.state == "failed" and code != REFUSED_EXIT and job.exit_code is None:
        click.echo(f"{job.id}: {job.message}", err=True)  # of the cluster; what the command says is in the log
    click.echo(f"{job.id}: {job.state}, exit code {code}", err=True)
    return code


def exit_code(job: Submission, log: str) -> int:
    """Of the command. When the cluster was asked to stop the job, the log alone knows how it ended."""
    if job.exit_code is not None:
        return job.exit_code
    told = re.findall(rf"^{ENDED} (\d+)$", log, flags=re.MULTILINE)
    if told:
        return int(told[-1])
    return 0 if job.state == "finished" else TERMINATED if job.state == "stopped" else 1


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
