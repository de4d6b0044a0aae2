"""What Ray Train's own resume keeps when a worker is killed, beside ours: the newest checkpoint that was reported, or an older one.

Two workers report a checkpoint of every step; rank 1 is killed as soon as rank 0's report of a step has returned. Then: from which step
does the next gang go on? Usage: python -m tests.cluster.peer_ray_train [--trials 3]. Our side of it is every kill of `make soak`, whose
reference is a run in which nothing that was committed is ever lost.
"""

import argparse
import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

STEPS = 6


def loop(config: dict[str, Any]) -> None:
    """One worker: counts steps, reports each, and notes what it went on from."""
    rank = ray.train.get_context().get_world_rank()
    notes = Path(config["notes"])
    found = ray.train.get_checkpoint()
    start = 0
    if found is not None:
        with found.as_directory() as folder:
            start = json.loads((Path(folder) / "step.json").read_text())
    if rank == 0:
        with (notes / "starts").open("a") as file:
            file.write(f"{start}\n")
    (notes / f"pid-{rank}").write_text(str(os.getpid()))
    for step in range(start + 1, STEPS + 1):
        time.sleep(0.2)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if rank == 0:
                (Path(folder) / "step.json").write_text(json.dumps(step))
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=checkpoint)
        if rank == 0 and step == config["kill_at"] and not (notes / "killed").exists():
            (notes / "killed").touch()
            os.kill(int((notes / "pid-1").read_text()), signal.SIGKILL)


def trial(kill_at: int) -> int:
    """The step from which the second gang went on."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        notes.mkdir()
        trainer = DataParallelTrainer(
            loop,
            train_loop_config={"notes": str(notes), "kill_at": kill_at},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
            run_config=RunConfig(name="peer", storage_path=folder, failure_config=FailureConfig(max_failures=2)),
        )
        trainer.fit()
        starts = [int(line) for line in (notes / "starts").read_text().split()]
        return starts[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=3)
    options = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    results = [(step, trial(step)) for step in (2 + number % (STEPS - 2) for number in range(options.trials))]
    ray.shutdown()
    for reported, resumed in results:
        print(f"Ray Train {ray.__version__}: killed after the report of step {reported} had returned, went on from step {resumed}")
    lost = sum(resumed < reported for reported, resumed in results)
    print(f"the newest reported checkpoint was lost {lost} of {len(results)} times")


if __name__ == "__main__":
    main()
