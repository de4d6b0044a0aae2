"""Files that a driver, a report or a command line needs stay free of heavy frameworks."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "ray", "deepspeed", "nvidia", "webdataset", "av"}


@pytest.mark.parametrize(
    "name",
    [
        "errors",
        "options",
        "topology",
        "schedule",
        "lease",
        "checkpoint",
        "metrics",
        "job",
        "launch",
        "guard",
        "restarts",
        "stopping",
        "tensor_file",
    ],
)
def test_it_imports_no_framework(name: str) -> None:
    code = f"import sys, cluster.{name}; print(*{{module.split('.')[0] for module in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert HEAVY & set(loaded) == set()
