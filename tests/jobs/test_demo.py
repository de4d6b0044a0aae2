"""The demo on a folder of one's own: built, trained with a kill, resumed, evaluated, reported; labels are optional."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.lease import read_attempts
from jobs import demo
from jobs.errors import RecipeError
from tests.pipeline.numbered import encode


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture
def no_usual_ports() -> Iterator[None]:
    """The ports that Ray and torch would take by default are somebody else's."""
    with contextlib.ExitStack() as stack:
        for port in (6379, 8265, 29500):
            taken = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # somebody has it already: as good
                taken.bind(("0.0.0.0", port))
                taken.listen()
        yield


@pytest.mark.usefixtures("no_usual_ports")
def test_own_videos(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(16):
        path = tmp_path / "own videos: #1" / f"class {number % 2}" / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(12, first=number))
    quick = ["train.steps=8", "checkpoint.every=2", "launch.launcher=local", "augment.size=32", "clip.num_frames=4", "clip.stride=2"]
    demo.run(tmp_path / "run", videos=tmp_path / "own videos: #1", overrides=quick)
    shown = capfd.readouterr()
    assert "16 built, 0 broken" in shown.out
    assert "demo: killing worker 1" in shown.err
    assert len(read_attempts(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "report.html").is_file()


def test_labels_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Add --videos"):
        demo.run(tmp_path, labels=tmp_path / "labels.csv")
