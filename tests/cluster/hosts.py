"""Several hosts on one machine, as nested Linux namespaces: real networks, real deaths, no container runtime, no root where user
namespaces are allowed.

A lab is a namespace that holds a bridge; each host is another one inside it, with its own address, name, process numbers, /tmp, /dev/shm
and /etc/hosts, and otherwise the machine's files. Killing PID 1 of a host ends everything on it, as the kernel promises. PID 1 reads a
pipe of the harness: whatever becomes of the harness, nothing is left behind.

    with Lab(shared=folder) as lab:          # `folder` is /tmp/shared on every host
        one, two = lab.host("h1"), lab.host("h2")
        one.run("ip", "addr")
        two.kill(power=True)                 # no farewell: peers see silence
        two.boot()                           # with an empty /tmp; /tmp/disk is as it was

Where that is impossible, tests fail; with POSMLP_NO_NETNS=1 they are skipped, saying so.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

NETWORK = "10.77.0"
PROGRAMS = (Path(__file__).parent.parent.parent, Path(sys.prefix))  # hosts see these, wherever they are
NAMESPACES = ["--net", "--mount", "--uts", "--ipc", "--pid"]
ISOLATE = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname")
START_S = 20.0
# PID 1: sets its namespace up, then reaps orphans until the harness's end of the pipe closes.
INIT = """
import signal, subprocess, sys
subprocess.run(["sh", "-ec", sys.argv[1]], stdin=subprocess.DEVNULL, check=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("READY", flush=True)
sys.stdin.read()
"""
TRIAL = """ip link set lo up
ip link add br0 type bridge
ip link add v0 type veth peer name v1
ip link set v0 master br0
mount -t tmpfs t /mnt
"""


def unsupported_reason() -> str | None:
    """Why this machine cannot have hosts; None when it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        return f"needs Linux and the tools {', '.join(missing)} (packages util-linux, iproute2, hostname)"
    inner = f"{TRIAL}{' '.join(ISOLATE)} sh -c 'ip link set lo up'"
    tried = subprocess.run([*_outer(), "sh", "-ec", inner], capture_output=True, text=True, timeout=START_S, check=False)
    return f"namespaces are refused: {' '.join(tried.stderr.split())}" if tried.returncode else None


def require() -> None:
    """Fails the test where there cannot be hosts; skips it where POSMLP_NO_NETNS=1 says that there shall be none."""
    if os.environ.get("POSMLP_NO_NETNS") == "1":
        pytest.skip("POSMLP_NO_NETNS=1: tests with several hosts are off")
    reason = unsupported_reason()
    if reason is not None:
        pytest.fail(f"{reason}. Set POSMLP_NO_NETNS=1 to do without the tests that need several hosts.")


def _rootless() -> bool:
    return os.geteuid() != 0


def _outer() -> list[str]:
    return [ISOLATE[0], *(["--user", "--map-root-user"] if _rootless() else []), *ISOLATE[1:]]


def _enter(pid: int, namespaces: Sequence[str] = NAMESPACES) -> list[str]:
    return ["nsenter", "-t", str(pid), *(["--user", "--preserve-credentials"] if _rootless() else []), *namespaces]


class Namespace:
    """A started PID 1: `pid` as the harness sees it. Ends when `end` is called or the harness ends."""

    def __init__(self, command: Sequence[str], script: str) -> None:
        self._process = subprocess.Popen(
            [*command, sys.executable, "-SEc", INIT, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "READY":
            _, words = self._process.communicate(timeout=START_S)
            raise RuntimeError(f"no namespace: {words}")
        self.pid = _last_descendant(self._process.pid)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.communicate(timeout=START_S)

    def ip(self, *words: object) -> str:
        """Runs `ip` in this network; process numbers among the words are the harness's."""
        command = [*_enter(self.pid, ["--net"]), "ip", *map(str, words)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _last_descendant(pid: int) -> int:
    """nsenter -> unshare -> PID 1: the end of a line of only children."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    return pid


class Lab:
    """The network between hosts, and the hosts. shared: a folder that all of them see as /tmp/shared. environment: of every process on a
    host, beside the harness's."""

    def __init__(self, *, shared: Path, environment: Mapping[str, str] | None = None) -> None:
        self.shared, self.environment = shared, dict(environment or {})
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="posmlp-lab-"))
        bridge = f"ip link set lo up; ip link add br0 type bridge; ip addr add {NETWORK}.1/24 dev br0; ip link set br0 up"
        self.switch = Namespace(_outer(), bridge)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for host in self.hosts.values():
            host.kill()
        self.switch.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def host(self, name: str, *, shm: str = "512m", delay_ms: int | None = None) -> "Host":
        """Boots a host. shm: size of its /dev/shm. delay_ms: of its link each way, through a relay, which `delay` changes."""
        host = self.hosts[name] = Host(self, name, len(self.hosts) + 1, shm, delay_ms)
        host.boot()
        return host


class Host:
    """One machine. `disk` outlives it: /tmp/disk on the host."""

    def __init__(self, lab: Lab, name: str, number: int, shm: str, delay_ms: int | None) -> None:
        self._lab, self.name, self._number, self._shm, self._delay_ms = lab, name, number, shm, delay_ms
        self.address = f"{NETWORK}.{10 + number}"
        self.boots = 0
        self._port = f"p-{name}"
        self._space: Namespace | None = None
        self._relay: subprocess.Popen[str] | None = None
        self.disk = lab.folder / name / "disk"
        self.disk.mkdir(parents=True)

    def boot(self) -> None:
        """Starts the machine, also again after `kill`."""
        lab = self._lab
        script = "; ".join([*self._mounts(), f"hostname {self.name}", "ip link set lo up"])
        self._space = Namespace([*_enter(lab.switch.pid), "--", *ISOLATE], script)
        self.boots += 1
        mac = f"02:77:00:00:00:{10 + self._number:02x}"
        if self._delay_ms is None:
            peer = ("peer", "name", "eth0", "address", mac, "netns", self._space.pid)
            lab.switch.ip("link", "add", self._port, "type", "veth", *peer)
        else:
            self._start_relay(mac)
        lab.switch.ip("link", "set", self._port, "master", "br0", "up")
        self._space.ip("addr", "add", f"{self.address}/24", "dev", "eth0")
        self._space.ip("link", "set", "eth0", "up")
        self._space.ip("route", "add", "8.8.8.8", "dev", "eth0")  # Ray asks the kernel which address it would send from to there
        self._space.ip("route", "add", "unreachable", "default")  # anything else fails at once instead of after a time-out

    def _mounts(self) -> list[str]:
        home = self._lab.folder / self.name
        stage, etc = home / "tmp", home / "etc"
        for folder in (stage, etc):
            folder.mkdir(exist_ok=True)
        (etc / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")  # refused at once
        names = "".join(f"{NETWORK}.{10 + number} h{number}\n" for number in range(1, 10))
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        mounts = [f"mount --bind {etc}/{name} /etc/{name}" for name in ("resolv.conf", "hosts")]
        mounts.append(f"mount -t tmpfs -o size=2g,mode=1777 tmpfs {stage}")
        kept = {folder: folder for folder in PROGRAMS if folder.is_relative_to("/tmp")}
        binds = {**kept, Path("/tmp/shared"): self._lab.shared, Path("/tmp/disk"): self.disk}
        for inside, outside in binds.items():
            target = stage / inside.relative_to("/tmp")
            mounts.append(f"mkdir -p {target}; mount --rbind {outside} {target}")
        return [
            *mounts,
            f"mkdir -p {stage}/home",
            f"mount --rbind {stage} /tmp",
            f"mount -t tmpfs -o size={self._shm},mode=1777 tmpfs /dev/shm",
        ]

    def _start_relay(self, mac: str) -> None:
        assert self._space is not None
        relay = [sys.executable, str(Path(__file__).with_name("hosts_relay.py")), str(self._lab.switch.pid), str(self._space.pid)]
        self._relay = subprocess.Popen([*relay, self._port, mac], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._relay.stdout is not None
        if self._relay.stdout.readline().strip() != "READY":
            raise RuntimeError(f"{self.name}: no relay")
        self.delay(self._delay_ms or 0)

    def delay(self, delay_ms: int) -> None:
        """Of every packet, each way; for a host that was made with a delay."""
        assert self._relay is not None
        assert self._relay.stdin is not None
        print(json.dumps({"delay_s": delay_ms / 1000}), file=self._relay.stdin, flush=True)

    def cut(self) -> None:
        """Pulls its network cable."""
        self._lab.switch.ip("link", "set", self._port, "down")

    def restore(self) -> None:
        """Plugs it in again."""
        self._lab.switch.ip("link", "set", self._port, "up")

    def kill(self, *, power: bool = False) -> None:
        """Ends everything on it at once. power: the cable first, as when the power fails, so that no connection is seen to close."""
        if self._space is None:
            return
        if power:
            self.cut()
        if self._relay is not None:
            self._relay.kill()
            self._relay.communicate()
        self._space.end()
        self._space = None
        end = time.monotonic() + START_S
        while self._port in self._lab.switch.ip("-o", "link"):  # the kernel takes it away with the namespace, a moment later
            assert time.monotonic() < end
            time.sleep(0.02)

    def command(self, *words: object) -> list[str]:
        """A command line that runs the words on this host."""
        assert self._space is not None
        return [*_enter(self._space.pid), "--wd=/tmp", "--", *map(str, words)]

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        return {**own, "HOME": "/tmp/home", "TMPDIR": "/tmp", **self._lab.environment, **(more or {})}

    def run(self, *words: object, environment: Mapping[str, str] | None = None, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        return subprocess.run(
            self.command(*words),
            env=self.environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start(self, *words: object, environment: Mapping[str, str] | None = None, **options: Any) -> "subprocess.Popen[str]":
        """Starts a command, in a session of its own."""
        return subprocess.Popen(
            self.command(*words),
            env=self.environment(environment),
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            **options,
        )

    def pids(self) -> list[int]:
        """Processes on the host, as the harness sees them."""
        if self._space is None:
            return []
        found, namespace = [], os.readlink(f"/proc/{self._space.pid}/ns/pid")
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it has just ended
                if os.readlink(f"/proc/{name}/ns/pid") == namespace:
                    found.append(int(name))
        return found
