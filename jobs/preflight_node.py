"""What one node of a cluster says of itself before a job starts there. The standard library alone: whether our packages, or the right
versions of others, are what is imported there is among the questions, so the code travels as a whole (`cluster.nodes.ask`). What a
node sees of an object store it can only say with our packages.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import time
from pathlib import Path

HASHED_BYTES = 1 << 20
STORE_S = 4.0  # for an object store to answer
KNOCK_S = 4.0  # for a node to answer at all


def look(question: dict) -> dict:  # type: ignore[type-arg] # plain values, as they travel
    """Answers the question, which has

    packages: names, and mark: a file beside each of them. libraries: names. read: path or URL by recipe key. shared: folder by recipe
    key, in which the asker has left a file called `nonce` with those bytes. me: what this node calls its own file there. address: of it.
    """
    return {
        "packages": {name: _package(name, question["mark"]) for name in question["packages"]},
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in question["libraries"]},
        "read": {key: _stored(path) if "://" in path else _read(path) for key, path in question["read"].items()},
        "shared": {key: _share(path, question["nonce"], question["me"]) for key, path in question["shared"].items()},
        "shm_bytes": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,  # noqa: S108 - the system's own
        "nvdec": _loads("libnvcuvid.so.1"),
        "port": _free_port(question["address"]),
    }


def _package(name: str, mark: str) -> str:
    """Where Python finds a package; "" when that is where the job's files are."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return "nowhere"
    home = Path(spec.origin).parent
    return "" if (home.parent / mark).is_file() else str(home)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _read(path: str) -> str:
    """ "folder", size and a digest of the beginning of a file, or "missing: why"."""
    try:
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                next(entries, None)
            return "folder"
        with open(path, "rb") as file:
            return f"{os.fstat(file.fileno()).st_size} {hashlib.sha256(file.read(HASHED_BYTES)).hexdigest()}"
    except OSError as error:
        return f"missing: {error.strerror}"


def _stored(url: str) -> str:
    """The size of an object, "0" of a folder that is not empty, or "missing: why", as this node's network and credentials have it."""
    try:
        from pipeline.errors import StorageError
        from pipeline.options import RemoteOptions
        from pipeline.remote import RemoteFolder
    except ImportError as error:  # other packages in the place of ours, which is told by itself
        return f"missing: {error}"
    try:
        size = RemoteFolder(url, RemoteOptions(retries=0, timeout_s=STORE_S)).size()
    except StorageError as error:
        return f"missing: {error}"
    return "missing: there is nothing at this URL. Correct it, or build what it names first." if size is None else str(size)


def _share(folder: str, nonce: str, me: str) -> str:
    """ "" when the asker's file is there and one of ours could be left beside it; else what is wrong."""
    try:
        with open(os.path.join(folder, nonce), encoding="ascii") as file:
            if file.read() != nonce:
                return "holds another file of that name"
    except FileNotFoundError:
        return "is another folder there than on the head" if os.path.isdir(folder) else "is not there"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    try:
        with open(os.path.join(folder, f"{nonce}-{me}"), "w", encoding="ascii") as file:
            file.write(me)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return ""


def _loads(library: str) -> str:
    """ "" when a shared library loads, else why not."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return ""


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as server:
        return int(server.getsockname()[1])


def reach(question: dict) -> str:  # type: ignore[type-arg]
    """Adds up a number per node with gloo over this node's interface, as a gang of workers would; "" or what went wrong.

    Question: rank, world_size, meet (address and port of rank 0's node), address (of this one), timeout_s. Needs our packages.
    """
    from datetime import timedelta

    from cluster.nodes import interface_of

    os.environ.update(GLOO_SOCKET_IFNAME=interface_of(question["address"]), TORCH_CPP_LOG_LEVEL="ERROR")
    import torch
    import torch.distributed as dist

    host, port = question["meet"]
    unreachable = _knock(host, port, question["timeout_s"]) if question["rank"] else ""
    if unreachable:
        return unreachable
    patience = timedelta(seconds=question["timeout_s"])
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, question["world_size"], question["rank"] == 0, timeout=patience
        )
        dist.init_process_group("gloo", store=store, rank=question["rank"], world_size=question["world_size"], timeout=patience)
        total = torch.ones(1)
        dist.all_reduce(total)
        dist.destroy_process_group()
    except RuntimeError as error:  # of torch's errors the base
        return " ".join(str(error).split())[:200]
    return "" if int(total) == question["world_size"] else f"the sum is {int(total)}, expected {question['world_size']}"


def _knock(host: str, port: int, timeout_s: float) -> str:
    """ "" as soon as something listens there, else why that cannot be reached. The other node may still be starting to listen."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=KNOCK_S).close()
        except ConnectionRefusedError:
            if time.monotonic() > end:
                return f"nothing listens on {host}:{port}"
            time.sleep(0.1)
        except OSError as error:
            return f"{host}:{port} cannot be reached: {error.strerror or error}"
        else:
            return ""
