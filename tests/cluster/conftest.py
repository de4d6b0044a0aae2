"""Gangs must be able to import their entries, which lie beside these tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)  # local workers get this process's module path


@pytest.fixture(autouse=True, scope="module")
def module_path() -> Iterator[None]:
    """Ray's workers, and drivers that are processes of their own, read it from the environment, when their Ray is started."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()  # that of a file whose tests ran before in this process
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")])))
        yield


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A gang of one in this process."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
