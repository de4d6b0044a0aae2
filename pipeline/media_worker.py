"""Verifies and transcodes videos in child processes with limits, because a video is untrusted input to millions of lines of C.

`MediaWorker` keeps one small, single-threaded child that has PyAV imported and forks for each video (some ms, where a fresh
interpreter takes 200). The fork may use only so much memory, CPU and wall time, writes no core, gains no privileges, and gets an
environment without anyone's credentials. Its parent judges how it ended; a crash costs one video. Both die with whoever started them.

Requests and replies are lines of JSON on the child's standard input and output; its end of input is its order to leave.
"""

import ctypes
import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.errors import PipelineError
from pipeline.media import MediaReport, verify_and_transcode
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import Reason, RejectedError
from pipeline.source_video import SourceFacts

START_S = 60.0  # for the child to import what it needs, and for its answer to arrive after a video's own time is up
ATTEMPTS = 3  # a child that somebody else kills says nothing of the video
KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")
STARVED = 0.75  # decoders do not tell a failed allocation from bad data; past this share of the memory limit it is taken for one
_LOOKS_STARVED = (Reason.DAMAGED, Reason.NO_FRAMES, Reason.ENCODER_FAILED, Reason.NOT_A_VIDEO)
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # linux/prctl.h


class MediaWorker:
    """A context manager that transcodes one video at a time, each in a limited process of its own."""

    def __init__(self, encode: EncodeOptions, limits: LimitOptions) -> None:
        self._encode, self._limits = encode, limits
        self._child: subprocess.Popen[bytes] | None = None

    def transcode(
        self,
        source: Path,
        destination: Path,
        start_s: float | None = None,
        end_s: float | None = None,
        num_frames: int | None = None,
        trace: Path | None = None,
    ) -> MediaReport:
        """See `media.verify_and_transcode`, which says what is raised; also PipelineError when the child cannot be kept alive."""
        paths = {"source": str(source.absolute()), "destination": str(destination.absolute())}
        wanted = {"start_s": start_s, "end_s": end_s, "num_frames": num_frames, "trace": None if trace is None else str(trace.absolute())}
        request = {**paths, **wanted, "encode": asdict(self._encode), "limits": asdict(self._limits)}
        for _ in range(ATTEMPTS):
            reply = self._ask(json.dumps(request).encode() + b"\n")
            if reply is not None and not reply.get("killed"):
                return _result(reply, destination)
        if reply is None:
            raise PipelineError(
                f"The process that decodes videos ended {ATTEMPTS} times before it could answer, last at {source}. "
                "Is the machine out of memory? Run the same command again with fewer CPUs or a lower data.limits.memory_mib."
            )
        raise RejectedError(Reason.OUT_OF_MEMORY, "the system killed the decoding process")

    def _ask(self, line: bytes) -> dict[str, object] | None:
        """The child's answer, or None when it ended instead; it is then started anew at the next call."""
        if self._child is None:
            self._child = _start_child()
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(line)
            stdin.flush()
            answered, _, _ = select.select([stdout], [], [], self._limits.wall_s + START_S)
            answer = stdout.readline() if answered else b""
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            self._stop()
            return None
        reply = json.loads(answer)
        assert isinstance(reply, dict)
        return reply

    def _stop(self) -> None:
        if self._child is None:
            return
        child, self._child = self._child, None
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # it is gone, and with it what was not yet flushed
                continue
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            child.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()


def _start_child() -> subprocess.Popen[bytes]:
    kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # threads do not survive a fork, and cost address space
    environment = {**kept, **threads, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "pipeline.media_worker", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd="/",
        start_new_session=True,  # Ctrl-C goes to the command, which then ends this group
    )


def _result(reply: dict[str, object], destination: Path) -> MediaReport:
    if "report" in reply:
        report = reply["report"]
        assert isinstance(report, dict)
        return MediaReport(**{**report, "source": SourceFacts(**report["source"])})
    if "errno" in reply:
        raise OSError(int(str(reply["errno"])), str(reply["detail"]), str(destination))
    raise RejectedError(Reason(str(reply["reason"])), str(reply["detail"]))


def serve(parent: int) -> None:
    """The child: answers requests until its input ends or its parent dies."""
    _die_with(parent)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints must not look like an answer
    gc.freeze()
    for line in sys.stdin.buffer:
        replies.write(json.dumps(_supervise(json.loads(line))).encode() + b"\n")


def _die_with(parent: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:  # it died before we could ask to be told
        os._exit(0)


def _supervise(request: dict[str, object]) -> dict[str, object]:
    """Runs one request in a fork and says how it ended. Leaves, taking the fork along, when our own input ends."""
    parent = os.getpid()
    answer, out = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(answer)
        _be_the_fork(parent, request, out)
    os.close(out)
    limits = request["limits"]
    assert isinstance(limits, dict)
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(0, 0)  # only its hang-up
    events = poll.poll(1000 * limits["wall_s"])
    in_time = any(descriptor == ended for descriptor, _ in events)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if events and not in_time:
        os._exit(0)
    os.close(ended)
    with os.fdopen(answer, "rb") as file:
        text = file.read()
    if not in_time:
        return _reject(Reason.WALL_TIME, f"limits.wall_s is {limits['wall_s']}")
    return _judge(status, text, limits["cpu_s"])


def _judge(status: int, text: bytes, cpu_s: int) -> dict[str, object]:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return _reject(Reason.CPU_TIME, f"limits.cpu_s is {cpu_s}")
        if number == signal.SIGKILL:
            return {"killed": True}
        return _reject(Reason.CRASHED, signal.Signals(number).name)
    if os.WEXITSTATUS(status) != 0 or not text:
        return _reject(Reason.CRASHED, f"exit status {os.WEXITSTATUS(status)}")
    reply = json.loads(text)
    assert isinstance(reply, dict)
    return reply


def _be_the_fork(parent: int, request: dict[str, object], out: int) -> None:
    """Does the work under limits, writes the answer, and ends the process without returning."""
    status = 1
    try:
        _die_with(parent)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        limits = LimitOptions(**request["limits"])  # type: ignore[arg-type]
        _limit(limits)
        os.write(out, json.dumps(_work(request, limits)).encode())
        status = 0
    finally:
        os._exit(status)


def _limit(limits: LimitOptions) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    memory = pages * os.sysconf("SC_PAGE_SIZE") + (limits.memory_mib << 20)  # what libraries map is not the video's
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_s, limits.cpu_s + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _work(request: dict[str, object], limits: LimitOptions) -> dict[str, object]:
    encode = EncodeOptions(**request["encode"])  # type: ignore[arg-type]
    source, destination = Path(str(request["source"])), Path(str(request["destination"]))
    start_s, end_s = (None if request[name] is None else float(str(request[name])) for name in ("start_s", "end_s"))
    num_frames = None if request["num_frames"] is None else int(str(request["num_frames"]))
    trace = None if request["trace"] is None else Path(str(request["trace"]))
    try:
        return {"report": asdict(verify_and_transcode(source, destination, encode, limits, start_s, end_s, num_frames, trace))}
    except RejectedError as rejected:
        starved = rejected.reason in _LOOKS_STARVED and _peak_bytes() > STARVED * resource.getrlimit(resource.RLIMIT_AS)[0]
        return _reject(Reason.OUT_OF_MEMORY if starved else rejected.reason, rejected.detail)
    except MemoryError:
        return _reject(Reason.OUT_OF_MEMORY, "")
    except OSError as error:
        return {"errno": error.errno, "detail": error.strerror}
    except Exception as error:  # of PyAV, on a video nobody has thought of: said, and the build goes on
        return _reject(Reason.CRASHED, f"{type(error).__name__}: {error}")


def _peak_bytes() -> int:
    """The most address space that this process has had."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmPeak:")[2].split()[0]) << 10


def _reject(reason: Reason, detail: str) -> dict[str, object]:
    return {"reason": reason.value, "detail": detail}


if __name__ == "__main__":
    serve(int(sys.argv[1]))
