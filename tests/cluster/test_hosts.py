"""The lab holds what tests build on: separate addresses and folders, deaths that take everything along, links that fail and slow down."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import hosts

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[hosts.Lab]:
    hosts.require()
    with hosts.Lab(shared=tmp_path) as lab:
        yield lab


KNOCK = """
import socket, sys, time
began = time.monotonic()
try:
    socket.create_connection((sys.argv[1], 9), timeout=1)
except ConnectionRefusedError:  # the other kernel says so: it lives, and nothing listens there
    print(time.monotonic() - began)
except OSError:
    pass
"""


def round_trip_s(asker: hosts.Host, other: hosts.Host) -> float | None:
    """Until the other host answers; None when it does not within a second."""
    answer = asker.run(sys.executable, "-SEc", KNOCK, other.address).stdout
    return float(answer) if answer else None


def answers(asker: hosts.Host, other: hosts.Host) -> bool:
    return round_trip_s(asker, other) is not None


def comes_to_answer(asker: hosts.Host, other: hosts.Host) -> bool:
    """A link that is up again first has to learn its neighbours."""
    end = time.monotonic() + 20
    while not answers(asker, other):
        if time.monotonic() > end:
            return False
    return True


def test_a_host_has_what_is_its_own_and_loses_it_at_its_death(lab: hosts.Lab) -> None:
    one, two = lab.host("h1"), lab.host("h2", shm="64m")
    assert one.run("hostname").stdout.strip() == "h1"
    assert (
        one.run("sh", "-c", "echo 1 > /tmp/own; echo 1 > /dev/shm/own; echo 1 > /tmp/disk/kept; echo 1 > /tmp/shared/seen").returncode == 0
    )
    seen = two.run(
        "sh", "-c", "ls -d /tmp/own /dev/shm/own /tmp/disk/kept /tmp/shared/seen; df -m --output=size /dev/shm | tail -1"
    ).stdout.split()
    assert seen == ["/tmp/shared/seen", "64"]
    assert answers(two, one)
    sleeper = one.start("sh", "-c", "echo here; sleep 600", stdout=subprocess.PIPE)
    assert sleeper.stdout is not None
    assert sleeper.stdout.readline() == "here\n"
    assert len(one.pids()) >= 2
    one.kill()
    sleeper.communicate(timeout=10)
    assert sleeper.returncode != 0
    assert one.pids() == []
    assert not answers(two, one)
    one.boot()
    assert one.run("sh", "-c", "ls -d /tmp/own /tmp/disk/kept").stdout.split() == ["/tmp/disk/kept"]
    assert comes_to_answer(two, one)


def test_a_link_is_cut_restored_and_delayed(lab: hosts.Lab) -> None:
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("needs /dev/net/tun for a link with a delay")
    one, two = lab.host("h1"), lab.host("h2", delay_ms=0)
    assert answers(one, two)
    one.cut()
    assert not answers(one, two)
    one.restore()
    assert comes_to_answer(one, two)
    two.delay(60)
    slow_s = round_trip_s(one, two)
    assert slow_s is not None
    assert slow_s >= 0.12


HARNESS = """
import subprocess, sys, time
from pathlib import Path
from tests.cluster.hosts import Lab
with Lab(shared=Path(sys.argv[1])) as lab:
    host = lab.host("h1")
    host.start("sh", "-c", "echo here; sleep 601", stdout=subprocess.PIPE).stdout.readline()
    print(*host.pids(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_harness(tmp_path: Path, number: int) -> None:
    hosts.require()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", HARNESS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as harness:
        assert harness.stdout is not None
        pids = [int(pid) for pid in harness.stdout.readline().split()]
        assert len(pids) >= 2
        harness.send_signal(number)
        harness.wait(timeout=20)
    end = time.monotonic() + 20
    while left := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]:
        assert time.monotonic() < end, left
        time.sleep(0.05)
