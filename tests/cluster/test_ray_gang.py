"""On a real Ray: an error for the user is not retried, and nobody is left behind. Deaths: tests/jobs/test_train.py."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from cluster import lease
from cluster.errors import ClusterError, LaunchError
from cluster.launch import launch
from cluster.metrics import merge_steps, read_metrics
from cluster.options import LaunchOptions

STEPS = 8
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Ray's own


def train(run_dir: Path, launcher: str, misfortunes: list[dict[str, object]], **changes: object) -> list[Mapping[str, object]]:
    events: list[Mapping[str, object]] = []
    values = {"launcher": launcher, "workers": 2, "cpus_per_worker": 1, "max_restarts": 2, "hang_timeout_s": 60, **changes}
    payload = {"run_dir": str(run_dir), "steps": STEPS, "every": 2, "misfortunes": misfortunes}
    options = LaunchOptions(**values)  # type: ignore[arg-type]
    launch("toy_training:train", payload, run_dir=run_dir, num_micro_batches=4, options=options, on_event=events.append)
    return events


@pytest.fixture(scope="module")
def session(module_path: None) -> Iterator[None]:
    import ray

    from cluster.ray_session import ensure_ray

    ensure_ray(num_cpus=2)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("session")
def test_an_error_for_the_user_ends_the_launch_at_once(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"^the toy's user made a mistake$"):
        train(tmp_path, "ray", [{"attempt": 1, "rank": 1, "step": 2, "kind": "user error"}])
    assert len(lease.read_attempts(tmp_path)) == 1


@pytest.mark.usefixtures("session")
def test_more_workers_than_fit_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"launch\.workers=4 with 1 CPUs each do not fit .* 2 CPUs"):
        train(tmp_path, "ray", [], workers=4)


DRIVER = """
import sys
from pathlib import Path
from cluster.launch import launch
from cluster.options import LaunchOptions
run_dir = Path(sys.argv[1])
payload = {"run_dir": str(run_dir), "steps": 200, "every": 2, "pause_s": 0.2}
options = LaunchOptions(launcher="ray", workers=2, cpus_per_worker=1)
launch("toy_training:train", payload, run_dir=run_dir, num_micro_batches=4, options=options, on_event=print)
"""


# Ray's agents, which hold no lock and no port of ours, look for their raylet only now and then.
LEISURELY = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@pytest.mark.parametrize("victim", ["driver", "raylet"])
def test_nothing_is_left_of_a_private_cluster(tmp_path: Path, victim: str) -> None:
    """When its driver is interrupted, and when Ray itself dies, which the driver says in a line. A driver that is killed: `make soak`."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        deadline = time.monotonic() + 120
        while len(merge_steps(read_metrics(tmp_path / "metrics.jsonl"))) < 3:
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        family = psutil.Process(driver.pid).children(recursive=True)
        workers = lease.read_attempts(tmp_path)[0]["pids"]
        if victim == "driver":
            driver.send_signal(signal.SIGINT)
        else:
            next(process for process in family if process.name() == "raylet").kill()
        _, said = driver.communicate(timeout=60)
    finally:
        driver.kill()
        driver.communicate()
    assert victim == "driver" or "LaunchError: Ray on this machine has ended. The same command goes on." in said, said
    started = [process.pid for process in family]
    assert isinstance(workers, list)
    assert set(workers) <= set(started)
    deadline = time.monotonic() + 15
    while left := [name for name in map(_name, started) if name and not name.startswith(LEISURELY)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _name(pid: int) -> str:
    """The command line of a process; "" when it has ended."""
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
