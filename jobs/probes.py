"""What `posmlp doctor` looks at, each part in a process of its own: a library that crashes takes nothing else along.

`python -m jobs.probes module:function` runs one probe, a generator of `Check`s, and prints each as a line of JSON.
"""

import importlib
import json
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

GIB = 1 << 30
MIN_DISK, MIN_MEMORY, MIN_SHM = 2 * GIB, 2 * GIB, 1 * GIB
MIN_OPEN_FILES, GOOD_OPEN_FILES = 512, 4096
REINSTALL = "Install this project's pinned versions again: make, or pip install -c constraints.txt -e ."


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was tried. required: nothing works without it. remedy: what to do when it is not ok."""

    name: str
    ok: bool
    required: bool
    detail: str
    remedy: str = ""


def machine() -> Iterator[Check]:
    """Python, memory, shared memory, open files, loopback ports; nothing is imported that could crash."""
    supported = sys.version_info >= (3, 11) and sys.platform == "linux"
    detail = f"{platform.python_version()} on {platform.platform()}, {len(os.sched_getaffinity(0))} cores"
    yield Check(name="Python", ok=supported, required=True, detail=detail, remedy="Use Python 3.11 on Linux.")
    yield _memory()
    yield _shared_memory()
    yield _open_files()
    yield _ports()


def _memory() -> Check:
    available, limit = psutil.virtual_memory().available, cgroup_limit()
    usable = available if limit is None else min(available, limit)
    capped = "" if limit is None else f", this container may use {limit / GIB:.1f} GiB"
    return Check(
        name="memory",
        ok=usable >= MIN_MEMORY,
        required=True,
        detail=f"{available / GIB:.1f} GiB free{capped}",
        remedy=f"Free memory, or raise the container's limit, to {MIN_MEMORY / GIB:.0f} GiB or more.",
    )


def cgroup_limit() -> int | None:
    """Bytes that this process's control group may still use (versions 1 and 2); None without a limit."""
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            most = (Path("/sys/fs/cgroup") / limit).read_text(encoding="ascii").strip()
            now = int((Path("/sys/fs/cgroup") / used).read_text(encoding="ascii"))
        except OSError:
            continue
        if most.isdigit() and int(most) < psutil.virtual_memory().total:
            return max(0, int(most) - now)
    return None


def _shared_memory() -> Check:
    size = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0  # noqa: S108 - the system's own
    return Check(
        name="shared memory",
        ok=size >= MIN_SHM,
        required=False,
        detail=f"{size / GIB:.1f} GiB in /dev/shm",
        remedy="Ray then keeps objects on disk. In Docker: --shm-size=2g; in Kubernetes: an emptyDir of medium Memory at /dev/shm.",
    )


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Check(
        name="open files",
        ok=soft >= GOOD_OPEN_FILES or (soft >= MIN_OPEN_FILES and soft == hard),
        required=soft < MIN_OPEN_FILES,
        detail=f"{soft} allowed, at most {hard}",
        remedy=f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}",
    )


def _ports() -> Check:
    """Two ends talk over each loopback address that local runs use."""
    problem = ""
    for address in ("127.0.0.1", "127.0.0.2"):
        try:
            with closing(socket.create_server((address, 0))) as server, closing(socket.create_connection(server.getsockname(), 5)):
                continue
        except OSError as error:
            problem = f"{address}: {error.strerror or error}"
    return Check(
        name="loopback ports",
        ok=not problem,
        required=True,
        detail=problem or "127.0.0.1 and 127.0.0.2 listen and answer",
        remedy="Bring the loopback interface up (ip link set lo up), or let the sandbox bind ports on it.",
    )


def disk(folder: str) -> Iterator[Check]:
    """Room and permission where runs go (`folder`, or the nearest parent that exists), and where temporary files go."""
    place = Path(folder).absolute()
    while not place.is_dir():
        place = place.parent
    yield _disk("disk", place, required=True, remedy="Choose a run.dir on a disk with room that you may write to.")
    yield _disk("temporary folder", Path(tempfile.gettempdir()), required=True, remedy="Set TMPDIR to a folder with room.")


def _disk(name: str, folder: Path, *, required: bool, remedy: str) -> Check:
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.1f} GiB free in {folder}"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Check(name=name, ok=False, required=required, detail=f"{folder} cannot be written: {error.strerror}", remedy=remedy)
    return Check(name=name, ok=free >= MIN_DISK, required=required, detail=detail, remedy=remedy)


def torch_cpu() -> Iterator[Check]:
    """A product of two matrices, and what the processor computes natively."""
    import torch

    right = bool((torch.ones(64, 64) @ torch.ones(64, 64) == 64).all())
    detail = f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield Check(name="torch", ok=right, required=True, detail=detail, remedy=REINSTALL)
    facts = torch.cpu.get_capabilities()
    native = [name for name in ("avx512_bf16", "amx_bf16") if facts.get(name)]
    others = [name for name in ("avx2", "avx512_f", "sve") if facts.get(name)]
    yield Check(
        name="bf16 on the CPU",
        ok=bool(native),
        required=False,
        detail=", ".join([*others, *native]) or "neither AVX nor SVE",
        remedy="Nothing to do: engine.precision=auto then computes in fp32 on this CPU.",
    )


def torch_gpu() -> Iterator[Check]:
    """Every GPU multiplies two matrices."""
    import torch

    if not torch.cuda.is_available():
        there = gpus_there()
        yield Check(
            name="GPU",
            ok=False,
            required=False,
            detail=f"{len(there)} NVIDIA devices, torch {torch.__version__} sees none" if there else "no NVIDIA device",
            remedy="Install a CUDA build of torch and a driver that fits it." if there else "Nothing to do: everything runs on the CPU.",
        )
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.bfloat16)
        right = bool((ones @ ones == 64).all())
        detail = f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, compute capability {facts.major}.{facts.minor}, driver works"
        yield Check(
            name=f"GPU {index}", ok=right, required=True, detail=detail, remedy="Update the driver, or hide it: CUDA_VISIBLE_DEVICES="
        )


def gpus_there() -> list[str]:
    """Names of NVIDIA's device files."""
    return sorted(name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit())


def ray_starts() -> Iterator[Check]:
    """A private Ray on loopback is started, or the cluster of RAY_ADDRESS joined, as training does it."""
    began = time.monotonic()
    from cluster.ray_session import ensure_ray, ray

    remedy = "launch.launcher=local trains without Ray; the build needs it. Is another Ray's RAY_ADDRESS set, or a port forbidden?"
    ensure_ray(1)
    found = ray.cluster_resources()
    ray.shutdown()
    where = f"joined {os.environ['RAY_ADDRESS']}" if os.environ.get("RAY_ADDRESS") else "a private one started"
    detail = (
        f"{ray.__version__}, {where} in {time.monotonic() - began:.1f} s, {found.get('object_store_memory', 0) / GIB:.1f} GiB for objects"
    )
    yield Check(name="Ray", ok="CPU" in found, required=True, detail=detail, remedy=remedy)


def deepspeed_loads() -> Iterator[Check]:
    """The engine's import, which decides on the device."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpus_there() else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed

    right = hasattr(deepspeed, "initialize")
    yield Check(name="DeepSpeed", ok=right, required=True, detail=deepspeed.__version__, remedy=REINSTALL)


def main(entry: str, arguments: list[str]) -> None:
    """Runs one probe; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    module, _, name = entry.partition(":")
    for check in getattr(importlib.import_module(module), name)(*arguments):
        print(json.dumps(asdict(check)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
