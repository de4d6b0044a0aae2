"""posmlp doctor: what this machine can do, tried and not guessed, with what to do about what it cannot."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from jobs.probes import REINSTALL, Check, gpus_there
from jobs.probes_video import ENCODERS
from jobs.progress import Progress

TIMEOUT_S = 60.0  # of one probe; they take seconds
MOST_AT_ONCE = 8
TAIL = 300  # characters of a crashed probe's last words


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A generator of checks and the arguments it gets. name, required: of the check that says the probe itself has failed."""

    name: str
    entry: str
    arguments: Sequence[str] = ()
    required: bool = True
    remedy: str = REINSTALL


def probes(folder: Path) -> list[Probe]:
    """All of them, the slowest first, so that they are done together. folder: where runs would go."""
    gpu = [
        Probe(name=f"DALI decodes {codec} on the GPU", entry="jobs.probes_video:dali_gpu", arguments=[codec], required=codec == "h264")
        for codec in ENCODERS
        if gpus_there()
    ]
    return [
        Probe(name="Ray", entry="jobs.probes:ray_starts"),
        Probe(name="DeepSpeed", entry="jobs.probes:deepspeed_loads"),
        Probe(name="DALI on the CPU", entry="jobs.probes_video:dali_cpu"),
        Probe(name="torch", entry="jobs.probes:torch_cpu"),
        Probe(name="GPU", entry="jobs.probes:torch_gpu", required=False, remedy="Update the driver, or hide it: CUDA_VISIBLE_DEVICES="),
        Probe(name="FFmpeg's codecs", entry="jobs.probes_video:codecs"),
        Probe(name="building: x264 and child process", entry="jobs.probes_video:reading_videos"),
        *gpu,
        Probe(name="driver's video decoding", entry="jobs.probes_video:driver_video", required=False),
        Probe(name="disk", entry="jobs.probes:disk", arguments=[str(folder)]),
        Probe(name="machine", entry="jobs.probes:machine"),
    ]


def run(folder: Path) -> list[Check]:
    """Everything that was tried, what is required first. A probe that crashes or hangs is a check that failed."""
    wanted = probes(folder)
    groups: set[int] = set()
    with Progress("looking", total=len(wanted), unit="probes") as progress, ThreadPoolExecutor(_at_once()) as pool:
        futures = [pool.submit(run_probe, probe, groups=groups) for probe in wanted]
        try:
            for _ in as_completed(futures):
                progress.advance()
        except BaseException:  # Ctrl-C: nobody waits for the rest
            pool.shutdown(wait=False, cancel_futures=True)
            for group in tuple(groups):
                _end(group)
            raise
    found = [check for future in futures for check in future.result()]
    return sorted(found, key=lambda check: not check.required)


def _at_once() -> int:
    return max(2, min(MOST_AT_ONCE, len(os.sched_getaffinity(0))))


def run_probe(probe: Probe, timeout_s: float = TIMEOUT_S, groups: set[int] | None = None) -> list[Check]:
    """The checks of one probe, in a process and session of its own that is gone when this returns; `groups` has its number till then."""
    groups = set() if groups is None else groups
    command = [sys.executable, "-P", "-m", "jobs.probes", probe.entry, *probe.arguments]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True) as child:
        groups.add(child.pid)
        try:
            answers, words = child.communicate(timeout=timeout_s)
            problem = _died(child.returncode, words)
        except subprocess.TimeoutExpired:
            problem = f"no answer within {timeout_s:g} s"
            _end(child.pid)
            answers, _ = child.communicate()
        finally:
            groups.discard(child.pid)
            _end(child.pid)
    checks = [Check(**json.loads(line)) for line in answers.decode(errors="replace").splitlines()]
    if problem:
        checks.append(Check(name=probe.name, ok=False, required=probe.required, detail=problem, remedy=probe.remedy))
    return checks


def _end(group: int) -> None:
    """Whatever is left of a probe: Ray's daemons, decoding children."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _died(code: int, words: bytes) -> str:
    """How a process ended, for people; "" when it ended well."""
    if code == 0:
        return ""
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}"
    lines = [line.strip() for line in words.decode(errors="replace").splitlines() if line.strip()]
    return (lines[-1] if lines else f"exit status {code}")[:TAIL]


def healthy(checks: Iterable[Check]) -> bool:
    """Whether everything that is required works."""
    return all(check.ok for check in checks if check.required)


def as_json(checks: Sequence[Check]) -> str:
    return json.dumps({"ok": healthy(checks), "checks": [asdict(check) for check in checks]}, indent=1, ensure_ascii=False)


def show(checks: Sequence[Check]) -> None:
    """Prints the checks for people, with a remedy under each that failed."""
    for required, title in ((True, "required"), (False, "optional")):
        click.echo(click.style(title, bold=True))
        for check in (check for check in checks if check.required == required):
            mark, colour = ("ok  ", "green") if check.ok else ("FAIL", "red") if required else ("no  ", "yellow")
            click.echo(f"  {click.style(mark, fg=colour)} {check.name}: {check.detail}")
            if not check.ok and check.remedy:
                click.echo(f"       -> {check.remedy}")
    broken = [check.name for check in checks if check.required and not check.ok]
    click.echo(f"not ready: {', '.join(broken)}" if broken else "ready: build, train, evaluate and predict work on this machine")
