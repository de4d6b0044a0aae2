"""The gang on Ray Train, which places the workers, notices their death and starts them again. The only file that knows Ray Train.

Of Train we use exactly that. Nothing is reported through it (it loses the last checkpoint when a worker dies): each gang resumes from
our newest manifest. The process group is ours (`worker.gang`), without Train's torch backend: that would listen on every interface
and costs seconds of imports at each start.
"""

import contextlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from cluster import lease
from cluster.errors import ClusterError, LaunchError, StoppedError
from cluster.job import Job, Place, hung, next_folder, tails, worker_environment
from cluster.nodes import interface_of, living
from cluster.options import LaunchOptions
from cluster.restarts import Restarts
from cluster.stopping import remember_sigterm
from cluster.topology import fit_workers

DEATHS = "deaths.jsonl"
POLL_S = 0.5
_SWITCHES = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "20",  # a stopped worker; 600 by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
for _name, _value in _SWITCHES.items():
    os.environ.setdefault(_name, _value)  # before Train is imported, which reads some of them then

from ray.train import BackendConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback, get_context  # noqa: E402
from ray.train.backend import Backend  # noqa: E402
from ray.train.collective import broadcast_from_rank_zero  # noqa: E402
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback  # noqa: E402
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback  # noqa: E402
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError  # noqa: E402
from ray.train.v2._internal.execution.context import TrainRunContext  # noqa: E402
from ray.train.v2._internal.execution.worker_group import ExecutionGroup  # noqa: E402
from ray.train.v2.api.callback import RayTrainCallback  # noqa: E402
from ray.train.v2.api.config import LoggingConfig  # noqa: E402
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # noqa: E402
from ray.train.v2.api.exceptions import TrainingFailedError  # noqa: E402

LOST = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)


def run_on_ray(
    job: Job, *, num_micro_batches: int, options: LaunchOptions, restarts: Restarts, on_event: Callable[[Mapping[str, object]], None]
) -> None:
    """Runs the job in a gang of fixed size on the Ray cluster to which this process is connected.

    on_event is called in another thread. Raises as `launch` does; when interrupted, ends the workers first.
    """
    workers, scaling = _size(num_micro_batches, options)
    trainer = _Trainer(
        _work,
        train_loop_config={"job": asdict(job), "threads": options.cpus_per_worker},
        backend_config=_NoBackend(job.stoppable),
        scaling_config=scaling,
        run_config=RunConfig(
            name="train",
            storage_path=str(Path(job.folder) / "ray"),
            failure_config=FailureConfig(max_failures=-1),  # how often is our decision
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=[_Deaths(job, restarts)],
        ),
    )
    done = threading.Event()
    given_up: list[ClusterError] = []
    watcher = threading.Thread(target=_watch, args=(job, trainer, done, on_event, given_up), name="restarts", daemon=True)
    watcher.start()
    failed: TrainingFailedError | RayActorError | None = None
    try:
        trainer.fit()
    except (TrainingFailedError, RayActorError) as error:
        failed = error
    finally:  # also when interrupted
        trainer.end()
        done.set()
        watcher.join()
        shutil.rmtree(Path(job.folder) / "ray", ignore_errors=True)
    ending = job.ending() or (given_up[0] if given_up else None)
    if ending is not None:
        raise ending
    if failed is not None:
        raise _launch_error(failed, job, workers) from failed


def _watch(
    job: Job,
    trainer: "_Trainer",
    done: threading.Event,
    on_event: Callable[[Mapping[str, object]], None],
    given_up: list[ClusterError],
) -> None:
    """Passes on restarts while the gang runs; ends it at an error for the user, for which the other ranks would wait in vain, and when
    it shall not be started again."""
    seen = 0
    last = False
    while not last:
        last = done.wait(POLL_S)
        deaths = _deaths(job)
        for death in deaths[seen:]:
            if death["event"] == "restart":
                on_event(death)
            else:
                kind = StoppedError if death["event"] == "stopped" else LaunchError
                given_up.append(kind(str(death["message"])))
        seen = len(deaths)
        if not last and (given_up or job.ending() is not None):
            trainer.end()


def _size(num_micro_batches: int, options: LaunchOptions) -> tuple[int, ScalingConfig]:
    nodes = living()
    workers, reserved = fit_workers(num_micro_batches, options, [(node.cpus, node.gpus) for node in nodes])
    gpus = any(node.gpus for node in nodes)
    wanted: dict[str, float] = {"CPU": reserved, **({"GPU": 1.0} if gpus else {})}
    strategy = "PACK" if gpus else "SPREAD"
    return workers, ScalingConfig(num_workers=workers, use_gpu=gpus, resources_per_worker=wanted, placement_strategy=strategy)


class _Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Leaves Ctrl-C alone, can be ended, and starts no actor that polls the dashboard for a lost controller and complains when there is
    none: a private cluster ends with its driver anyway, and on a shared one the end of the job removes what it had reserved. Nor one
    for each gang that would hand out Ray datasets: there are none."""

    _controller: ActorHandle | None = None

    def _register_sigint_handler(self, controller: ActorHandle) -> None:
        self._controller = controller

    def end(self) -> None:
        """Ends the run if it runs: the workers belong to the controller and die with it."""
        controller, self._controller = self._controller, None
        if controller is not None:
            ray.kill(controller)

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback | PlacementGroupCleanerCallback)]


class _SeesAllGpus(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True  # of the gang's workers on a machine, so that NCCL can use them directly

    def on_start(self, worker_group: ExecutionGroup, backend_config: BackendConfig) -> None:
        """Before training starts in a thread of each worker: what only their main threads can do."""
        if backend_config.stoppable:
            worker_group.execute(remember_sigterm)


class _NoBackend(BackendConfig):  # type: ignore[misc]
    """The process group is the workers' own affair."""

    def __init__(self, stoppable: bool) -> None:
        super().__init__()
        self.stoppable = stoppable

    @property
    def backend_cls(self) -> type[Backend]:
        return _SeesAllGpus


class _Deaths(UserCallback):  # type: ignore[misc]
    """In Train's controller: notes why a gang died and what follows, for the driver to read; waits before the next start."""

    def __init__(self, job: Job, restarts: Restarts) -> None:
        self._job, self._restarts = job, restarts

    def after_exception(self, run_context: TrainRunContext, worker_exceptions: dict[int, Exception]) -> None:
        reason = _reason(worker_exceptions, self._job)
        if self._job.stop_asked():
            self._leave("stopped", f"Asked to stop, the workers ended before they could save ({reason}). The same command goes on.")
            return
        delay_s = self._restarts.delay_s()
        if delay_s is None:
            self._leave("failed", f"{self._restarts.verdict()} The last time {reason}\n{_output(self._job)}")
            return
        attempt = lease.newest_attempt(Path(self._job.run_dir))
        self._note({"event": "restart", "reason": reason, "attempt": attempt, "delay_s": delay_s})
        time.sleep(delay_s)

    def _leave(self, event: str, message: str) -> None:
        self._note({"event": event, "message": message})
        time.sleep(20 * POLL_S)  # the driver ends this process now: no other gang shall begin

    def _note(self, event: Mapping[str, object]) -> None:
        with (Path(self._job.folder) / DEATHS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def _deaths(job: Job) -> list[dict[str, object]]:
    """What the controller has noted, whole lines only."""
    with contextlib.suppress(FileNotFoundError):
        text = (Path(job.folder) / DEATHS).read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return []


def _output(job: Job) -> str:
    """Where the last gang's output is, and its end."""
    folders = sorted(Path(job.folder).glob("gang-*"))
    return f"Their output is in {folders[-1]}:\n{tails(folders[-1])}" if folders else f"Their output is in {job.folder}."


def _reason(worker_exceptions: Mapping[int, Exception], job: Job) -> str:
    """What ended the gang, in one line. A lost process says more than its peers, which fail of its absence."""
    lost = {rank: error for rank, error in worker_exceptions.items() if isinstance(error, LOST)}
    rank, error = min((lost or worker_exceptions).items())
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return f"rank {rank} stopped answering for {os.environ['RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S']} s"
    logs = sorted(Path(job.folder).glob(f"gang-*/rank-{rank}.log"))
    if logs and hung(logs[-1]):
        return f"rank {rank} finished no step for {job.hang_timeout_s} s; where its threads were is in {logs[-1]}"
    if lost:
        return f"the process of rank {rank} died"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"rank {rank} failed: {lines[-1] if lines else type(error).__name__}"


def _launch_error(error: BaseException, job: Job, workers: int) -> LaunchError:
    failures = getattr(error, "worker_failures", {}) if isinstance(error, TrainingFailedError) else {}
    reason = _reason(failures, job) if failures else str(error)
    return LaunchError(f"Ray could not run the gang of {workers} workers: {reason}\n{_output(job)}")


def _work(config: dict[str, object]) -> None:
    """What Train runs in each worker process."""
    context = get_context()
    raw = config["job"]
    if not isinstance(raw, dict):
        raise TypeError(raw)
    job = Job(**raw)
    local = context.get_local_world_size()
    threads = int(str(config["threads"])) or max(1, len(os.sched_getaffinity(0)) // local)
    alone = local == context.get_world_size()  # a gang on one machine has no business on the network
    address = "127.0.0.1" if alone else ray.util.get_node_ip_address()
    interface = interface_of(address)
    os.environ.update(worker_environment(threads), GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=interface)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # after the environment is set

    from cluster.worker import run

    rank, world_size = context.get_world_rank(), context.get_world_size()
    server = socket.create_server((address, 0)) if rank == 0 else None  # so that the store listens on this address alone
    offer = [address, server.getsockname()[1], str(next_folder(Path(job.folder), "gang"))] if server else None
    host, port, folder = broadcast_from_rank_zero(offer)
    place = Place(rank=rank, world_size=world_size, local_rank=context.get_local_rank(), local_world_size=local, threads=threads)
    with (Path(folder) / f"rank-{rank}.log").open("w", encoding="utf-8", buffering=1) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        descriptor = server.detach() if server else None
        run(job, place, lambda: TCPStore(host, port, world_size, rank == 0, master_listen_fd=descriptor), log)
