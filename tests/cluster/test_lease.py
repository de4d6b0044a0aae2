"""One driver a run folder, and of its gangs only the newest commits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import lease
from cluster.errors import ClusterError, FencedError

HOLDER = """
import sys, time
from pathlib import Path
from cluster import lease
with lease.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_driver_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ClusterError, match=rf"in use by process {holder.pid} on .* since .*run\.dir"), lease.hold(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with lease.hold(tmp_path):
            assert str(os.getpid()) in (tmp_path / lease.LOCK).read_text()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with lease.hold(tmp_path):  # and again, after an orderly end
        pass


def test_a_newer_attempt_fences_older_ones(tmp_path: Path) -> None:
    assert lease.newest_attempt(tmp_path) == 0
    first = lease.begin_attempt(tmp_path, world_size=2, pids=[1, 2])
    lease.check(tmp_path, first)
    second = lease.begin_attempt(tmp_path, world_size=1)
    lease.check(tmp_path, second)
    with pytest.raises(FencedError, match="attempt 2 has taken over from attempt 1"):
        lease.check(tmp_path, first)
    recorded = lease.read_attempts(tmp_path)
    assert [facts["attempt"] for facts in recorded] == [1, 2]
    assert recorded[0]["pids"] == [1, 2]


def test_an_attempt_killed_while_it_was_written_counts(tmp_path: Path) -> None:
    lease.begin_attempt(tmp_path)
    (tmp_path / lease.ATTEMPTS / "000002.json").write_text('{"attem')
    assert lease.read_attempts(tmp_path)[1] == {"attempt": 2}
    assert lease.begin_attempt(tmp_path) == 3


def test_simultaneous_attempts_get_different_numbers(tmp_path: Path) -> None:
    code = "import sys, pathlib, cluster.lease as lease\nfor _ in range(20): print(lease.begin_attempt(pathlib.Path(sys.argv[1])))"
    racers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    numbers = [int(line) for racer in racers for line in racer.communicate()[0].split()]
    assert sorted(numbers) == list(range(1, 61))
