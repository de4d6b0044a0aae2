"""What listens on this machine is what docs/ports.md lists, in each mode that needs no cluster (the others: tests/jobs/test_submit.py)."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.metrics import read_metrics
from tests.cluster import hosts, ray_hosts
from tests.jobs.soak_train import RECIPE
from tests.ports import ROOT, assert_as_listed

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


@pytest.fixture
def host(tmp_path: Path, motion_dataset: Path) -> Iterator[hosts.Host]:
    hosts.require()
    shutil.copytree(motion_dataset, tmp_path / "dataset")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with hosts.Lab(shared=tmp_path, environment={**ray_hosts.ENVIRONMENT, **ENVIRONMENT}) as lab:
        yield lab.host("h1")


@pytest.mark.parametrize(("launcher", "mode"), [("local", "local run"), ("ray", "private Ray")])
def test_training(tmp_path: Path, host: hosts.Host, launcher: str, mode: str) -> None:
    words = ["data.dir=/tmp/shared/dataset", "run.dir=/tmp/shared/run", "train.steps=100000", "launch.cpus_per_worker=1"]
    train = ["train", "/tmp/shared/recipe.yaml", "--launcher", launcher, *words]
    with host.start(sys.executable, "-m", "jobs", *train, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 240
            while not any(event["event"] == "step" for event in read_metrics(tmp_path / "run" / "metrics.jsonl")):
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)
            assert_as_listed(mode, host)
        finally:
            host.kill()


def test_viewer(host: hosts.Host) -> None:
    with host.start(sys.executable, "-m", "jobs", "data", "view", "/tmp/shared/dataset", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        assert_as_listed("viewer", host)
        host.kill()
