"""What a gang that hangs leaves behind: one file that tells, of every rank, where it was, what it was reading and its last collectives.

A rank that makes no progress writes its part down (`write`) and lives on for GRACE_S, in which its peers, which wait for it or for the
same thing, notice as well and write theirs. Then it ends; the supervisor ends the gang and joins the parts (`gather`).
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

GRACE_S = 5.0
NAME = "hang.txt"
COLLECTIVES = 4  # of each rank, the last ones
ENVIRONMENT = {"TORCH_FR_BUFFER_SIZE": "64"}  # torch remembers that many collectives; read when a process group forms

_facts: dict[str, Callable[[], object]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Of one rank. silence_s: since its last heartbeat. calls: collectives it has entered so far; -1 unknown. stacks: of all threads."""

    rank: int
    host: str
    pid: int
    when: str
    silence_s: float
    facts: dict[str, object]
    calls: int
    collectives: list[str]
    stacks: str

    def lines(self) -> list[str]:
        facts = [f"{name}: {fact if isinstance(fact, str) else json.dumps(fact, ensure_ascii=False)}" for name, fact in self.facts.items()]
        calls = [f"  {call}" for call in self.collectives]
        title = f"=== rank {self.rank}, process {self.pid} on {self.host}, {self.when}, silent for {self.silence_s:.0f} s"
        return ["", title, *facts, f"collectives entered: {self.calls}, the last ones:", *calls, "", self.stacks]


def tell(name: str, fact: Callable[[], object]) -> None:
    """From now on `fact()`, JSON, belongs to what this process writes when it hangs. It is called in another thread."""
    _facts[name] = fact


def write(folder: Path, rank: int, silence_s: float) -> None:
    """This rank's part of the file, in the gang's folder."""
    calls, collectives = _collectives()
    part = Part(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        when=time.strftime("%Y-%m-%d %H:%M:%S"),
        silence_s=silence_s,
        facts={name: _told(fact) for name, fact in _facts.items()},
        calls=calls,
        collectives=collectives,
        stacks=_stacks(),
    )
    temporary = folder / f"hang-{rank}.tmp"
    temporary.write_text(json.dumps(asdict(part)), encoding="utf-8")
    os.replace(temporary, folder / f"hang-{rank}.json")


def gather(folder: Path, world_size: int) -> Path | None:
    """Joins what the ranks of a gang wrote into one file for people, and returns it; None when none of them wrote anything."""
    parts = [_read(folder / f"hang-{rank}.json") for rank in range(world_size)]
    there = [part for part in parts if part is not None]
    if not there:
        return None
    silent = [f"rank {rank}" for rank, part in enumerate(parts) if part is None]
    lines = [f"{len(there)} of {world_size} ranks finished no step in time and wrote down where they were."]
    if silent:
        lines.append(f"Nothing came from {', '.join(silent)}: stopped, stuck in native code, dead, or on a host that is away.")
    lines += _behind(there)
    for part in there:
        lines += part.lines()
    path = folder / NAME
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for rank in range(world_size):
        (folder / f"hang-{rank}.json").unlink(missing_ok=True)
    return path


def _read(path: Path) -> Part | None:
    try:
        return Part(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def _behind(parts: list[Part]) -> list[str]:
    """Whom the others wait for, where the numbers of collectives tell."""
    most = max(part.calls for part in parts)
    behind = [part for part in parts if part.calls < most]
    if not behind or min(part.calls for part in parts) < 0:
        return []
    ranks = ", ".join(f"rank {part.rank} ({part.calls})" for part in behind)
    return [f"The others have entered {most} collectives and wait for {ranks}."]


def _told(fact: Callable[[], object]) -> object:
    try:
        return fact()
    except Exception as error:  # the process is in an unknown state, and the rest of the file matters more
        return f"not known: {error!r}"


def _collectives() -> tuple[int, list[str]]:
    """(how many this process has entered, the last of them) as torch's flight recorder knows them."""
    torch = sys.modules.get("torch")
    if torch is None:
        return -1, ["torch is not loaded yet"]
    try:
        from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]  # no public way

        entries = json.loads(_dump_fr_trace_json())["entries"]
        said = [f"{entry['profiling_name']} of {entry['input_sizes']} in group {entry['process_group'][0]}" for entry in entries]
        return max((entry["record_id"] + 1 for entry in entries), default=0), said[-COLLECTIVES:]
    except (ImportError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        return -1, [f"not known: {error!r}"]


def _stacks() -> str:
    """Of every thread, the main one first, outermost call first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda pair: pair[0] != threading.main_thread().ident)
    shown = [f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames]
    return "\n".join(shown)
