"""What is told of a training while it runs: where its time goes, TensorBoard files, a profile; and what fits its memory."""

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from cluster.engine import Engine
from cluster.metrics import read_metrics
from cluster.ray_gauges import NAMES
from jobs import train
from jobs.errors import JobError
from jobs.fit import candidates, remembered
from jobs.recipe import Recipe, load_recipe, parse_overrides
from jobs.report import render
from jobs.run_folder import checkpoints, recipe_of
from jobs.trackers import Trackers
from tests.jobs.soak_train import RECIPE

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")  # DeepSpeed's own


def recipe_in(folder: Path, dataset: Path, *more: str) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "soak.yaml").write_text(RECIPE)
    given = [f"run.dir={folder / 'run'}", f"data.dir={dataset}", "launch.workers=1", "train.steps=4", *more]
    return load_recipe(str(folder / "soak.yaml"), given)


def state(recipe: Recipe) -> dict[str, Any]:
    return checkpoints(recipe).manifests()[0].load()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, motion_dataset: Path) -> Recipe:
    more = ("track.tensorboard=true", "track.mlflow=/nowhere", "train.profile=[2, 3]", "train.micro_batch=auto", "engine.peak_tflops=0.5")
    recipe = recipe_in(tmp_path_factory.mktemp("watched"), motion_dataset, *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mlflow", None)  # not installed, as on most machines
        train.run(recipe)
    return recipe


def events(recipe: Recipe, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(recipe.run_dir / "metrics.jsonl") if event["event"] == kind]


def test_the_time_of_a_step_is_split(watched: Recipe) -> None:
    steps = events(watched, "step")
    assert len(steps) == 4
    for step in steps:
        parts = step["parts"]
        assert {"data", "forward", "backward", "collective", "optimizer"} == parts.keys()
        assert all(seconds >= 0 for seconds in parts.values())
        assert 0.5 * step["step_s"] - 0.01 <= sum(parts.values()) <= step["step_s"] + 0.001  # a busy machine interrupts in between
        assert 0 < step["flops_share"] < 1
    page = render(watched.run_dir, num_videos=0)
    assert "Where the time went" in page
    assert "waiting for data" in page


def test_tensorboard_gets_what_the_metrics_say(watched: Recipe) -> None:
    (path,) = (watched.run_dir / "tensorboard").glob("events*")
    found = {}
    for record in _records(path.read_bytes()):
        event = Event.FromString(record)
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    for step in events(watched, "step"):
        assert found["train/loss", step["step"]] == pytest.approx(step["loss"], rel=1e-6)
        assert found["train/seconds/forward", step["step"]] == pytest.approx(step["parts"]["forward"], rel=1e-5)


def _records(data: bytes) -> Iterator[bytes]:
    """TFRecord: length (8 bytes), its checksum (4), the bytes, theirs (4)."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield data[12 : 12 + length]
        data = data[16 + length :]


def test_a_tracker_that_fails_is_told_once_and_stops_nothing(watched: Recipe) -> None:
    (event,) = events(watched, "tracker")
    assert "track.mlflow is off" in event["text"]
    assert len(events(watched, "end")) == 1


def test_a_slow_tracker_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    recipe = parse_overrides({"run": {"dir": str(tmp_path)}}, ["track.tensorboard=true"])
    sent: list[int] = []

    def broken(recipe: Recipe, start: int) -> Any:
        def send(step: int, figures: object) -> None:
            sent.append(step)
            raise ConnectionError("the server is gone")

        return send, lambda: None

    monkeypatch.setattr("jobs.trackers._tensorboard", broken)
    trackers = Trackers(recipe, 0, told.append)
    for step in range(5000):
        trackers.send({"event": "step", "step": step, "loss": float("nan")})
    trackers.close()
    assert sent == [0]
    assert told == ["track.tensorboard is off for the rest of this attempt: ConnectionError: the server is gone"]


def test_the_dashboard_shows_gauges_that_exist() -> None:
    text = (Path(__file__).parents[2] / "docs" / "grafana.json").read_text()
    shown = set(re.findall(r"ray_posmlp_(\w+)", text))
    assert shown == {*NAMES} - {"epoch"}
    assert json.loads(text)["panels"]


def test_a_profile_of_the_steps_asked_for(watched: Recipe) -> None:
    (path,) = (watched.run_dir / "profile").iterdir()
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    assert "aten::convolution" in names
    assert any("Backward" in name for name in names)


def test_a_micro_batch_is_solved_once_and_kept(watched: Recipe) -> None:
    assert watched.train.micro_batch == 0
    known = remembered(watched.run_dir)
    assert known["micro_batch"] in candidates(watched)
    assert known["micro_batch"] == 8  # these clips are small: all of the global batch fits
    assert recipe_of(watched.run_dir).train.micro_batch == 8
    before = (watched.run_dir / "metrics.jsonl").read_bytes()
    assert train.run(watched) == 4  # the same command finds its checkpoints again
    assert (watched.run_dir / "metrics.jsonl").read_bytes() == before


def test_candidates_give_each_worker_whole_samples() -> None:
    def given(*more: str) -> Recipe:
        return parse_overrides({}, ["train.micro_batch=auto", "train.global_batch=24", *more])

    assert candidates(given()) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert candidates(given("launch.workers=3")) == [1, 2, 4, 8]
    assert candidates(given("augment.repeats=2")) == [2, 4, 6, 8, 12, 24]
    assert candidates(given("augment.repeats=2", "augment.mix.mixup=0.8", "launch.workers=2")) == [4, 6, 12]


def test_without_memory_activations_are_recomputed_from_then_on(
    tmp_path: Path, motion_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path / "short", motion_dataset)
    plenty = recipe_in(tmp_path / "plenty", motion_dataset)
    train.run(plenty)
    real = Engine.train_step
    tried: list[bool] = []

    def short_of_memory(self: Engine, step: int, *arguments: Any, **options: Any) -> Any:
        recomputes = self.model.config.activation_checkpointing  # type: ignore[union-attr]
        tried.append(recomputes)
        if step == 3 and not recomputes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, step, *arguments, **options)

    monkeypatch.setattr(Engine, "train_step", short_of_memory)
    assert train.run(recipe) == 4
    assert tried == [False] * 4 + [True]  # three steps were saved; the fourth was done again
    (event,) = events(recipe, "restart")
    assert "Step 3 found no memory" in event["reason"]
    first, second = state(plenty), state(recipe)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_without_memory_even_so_the_keys_to_change_are_named(tmp_path: Path, motion_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Engine, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        )

    monkeypatch.setattr(Engine, "train_step", never)
    with pytest.raises(JobError, match=r"Step 0 found no memory.*set a smaller train\.micro_batch in a new run"):
        train.run(recipe_in(tmp_path, motion_dataset))


def test_compiling_without_a_compiler_is_one_clear_message(tmp_path: Path) -> None:
    code = (
        "import torch, cluster.precision as precision, cluster.options as options\n"
        "from cluster.errors import ClusterError\n"
        "for stage in (0, 3):\n"
        "    try:\n"
        "        precision.compiled(torch.nn.Linear(2, 2), options.EngineOptions(compile=True, zero_stage=stage))\n"
        "    except ClusterError as error:\n"
        "        print(error)\n"
    )
    environment = {
        **os.environ,
        "PATH": str(tmp_path),
        "HOME": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "CXX": "",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.splitlines()
    assert "engine.compile: got true, but torch.compile does not work here; it needs a C++ compiler" in first
    assert "expected false at engine.zero_stage=3" in second
