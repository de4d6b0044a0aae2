"""A gang of Ray actors, one a rank: as many as fit the cluster now, each in a process of its own. The only file that runs workers on Ray.

Of Ray this uses what is public and old: placement groups, actors, kills. Whether a gang is started again, and from where, is our own
business (`launch`, `checkpoint`). Ray Train has an answer to both that does less: it tries the size again that has just died, knows no
sizes that divide, and forgets the newest checkpoint of a worker that was killed.

A gang smaller than it may be grows when there is room: the places are reserved first, then the gang is asked to save and end. The same
is asked of one on a node that is about to be taken away.
"""

import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from cluster.errors import LaunchError, StoppedError
from cluster.job import Job, Place, hung_reason, worker_environment
from cluster.nodes import Node, draining, interface_of, living, usable
from cluster.options import LaunchOptions
from cluster.ray_session import is_private, ray
from cluster.stopping import remember_sigterm
from cluster.topology import Fit, fit_workers

POLL_S = 0.5
STOPPED_S = 20.0  # a process that does not answer for so long is stopped, or its host is away
START_S = 120.0  # for a worker's process to start on a busy machine
RESERVE_S = 10.0  # for Ray to find places where there are some
SETTLE_S = 2.0  # when a gang fails: for the one whose death made the others fail to be known
LOOK_S = 5.0  # between two looks at the cluster for nodes that leave or come
EXTRA_S, PAUSE_S = 30.0, 60.0  # how long places to grow are asked for, and how long not again when others had them

Group: TypeAlias = Any  # ray.util.placement_group.PlacementGroup, for which Ray has no types
Seat: TypeAlias = dict[str, Any]


class RayGangs:
    """The gangs of one job, one after the other. on_event: see `launch`."""

    def __init__(self, job: Job, num_micro_batches: int, options: LaunchOptions, on_event: Callable[[Mapping[str, object]], None]) -> None:
        self._job, self._num_micro_batches, self._options, self._on_event = job, num_micro_batches, options, on_event
        self._began = False

    def run(self, folder: Path) -> str | None:
        """One gang from start to end: None when every worker finished, else why it was ended. Leaves no process and no reservation.

        Raises LaunchError when the workers do not fit the cluster, later on when they have found no place for `hang_timeout_s`, and when
        Ray itself is gone.
        """
        try:
            return self._run(folder)
        except ray.exceptions.RayError as error:
            raise LaunchError(f"Ray ended while it ran the workers: {_last_line(error)} The same command goes on.") from None

    def _run(self, folder: Path) -> str | None:
        with self._reserved() as (group, size, fit, gpu):
            ranks = self._ranks(group, size, fit, gpu)
            try:
                members = self._start(ranks, folder)
                if isinstance(members, str):
                    return members
                return _Watch(self._job, folder, members, self._growth(fit, size, gpu)).run()
            finally:
                for rank in ranks:
                    ray.kill(rank)

    @contextmanager
    def _reserved(self) -> Iterator[tuple[Group, int, Fit, bool]]:
        """(places, their number, the fit they are of, whether each has a GPU), for the largest size for which Ray finds them."""
        end = time.monotonic() + self._options.hang_timeout_s
        told = False
        while True:
            nodes = usable()
            if not nodes and is_private():
                raise LaunchError("Ray on this machine has ended. The same command goes on.")
            gpu = any(node.gpus for node in nodes)
            try:
                fit = self._fit(nodes)
            except LaunchError as error:
                if not self._began:
                    raise
                problem = str(error)
            else:
                for size in fit.sizes:
                    with _places(size, fit.cpus_each, gpu, avoid={node.id for node in living()} - {node.id for node in nodes}) as group:
                        if group.wait(RESERVE_S):
                            self._began = True
                            self._tell_idle(fit, size)
                            yield group, size, fit, gpu
                            return
                problem = "Others use the places that the cluster has."
            if self._job.stop_asked():
                raise StoppedError("Asked to stop while it waited for a place for its workers. The same command goes on.")
            if time.monotonic() > end:
                raise LaunchError(f"The workers have found no place for {self._options.hang_timeout_s} s. {problem}")
            if not told:
                self._on_event({"event": "waiting", "reason": problem})
                told = True
            time.sleep(1.0)

    def _fit(self, nodes: Sequence[Node]) -> Fit:
        return fit_workers(self._num_micro_batches, self._options, [(node.cpus, node.gpus) for node in nodes])

    def _tell_idle(self, fit: Fit, size: int) -> None:
        idle = fit.places - size if size < (self._options.most or self._num_micro_batches) else 0
        if idle > 0:
            micro_batches = f"the {self._num_micro_batches} micro-batches of a step"
            reason = f"{fit.places} workers would fit, {size} work: no larger number that may work divides {micro_batches}."
            self._on_event({"event": "idle", "workers": size, "places": fit.places, "reason": reason})

    def _ranks(self, group: Group, size: int, fit: Fit, gpu: bool) -> list[Any]:
        rank = ray.remote(num_cpus=fit.cpus_each, num_gpus=1 if gpu else 0, max_restarts=0, max_task_retries=0)(_Rank)
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        return [
            rank.options(scheduling_strategy=strategy(placement_group=group, placement_group_bundle_index=index)).remote()
            for index in range(size)
        ]

    def _start(self, ranks: Sequence[Any], folder: Path) -> "list[_Member] | str":
        """Gives each actor its rank, ranks of a node side by side, and starts its work. Says what is wrong when one does not come up."""
        try:
            found: list[Seat] = ray.get([rank.seat.remote() for rank in ranks], timeout=START_S)
            seated = sorted(zip(found, ranks, strict=True), key=lambda pair: (pair[0]["address"], pair[0]["node"]))
            seats = [seat for seat, _ in seated]
            nodes = [seat["node"] for seat in seats]
            # A gang on one machine has no business on the network.
            addresses = ["127.0.0.1" if len(set(nodes)) == 1 else seat["address"] for seat in seats]
            port = ray.get(seated[0][1].offer.remote(addresses[0]), timeout=START_S)
            started, members = [], []
            for number, (seat, rank) in enumerate(seated):
                first, local = nodes.index(seat["node"]), nodes.count(seat["node"])
                place = Place(
                    rank=number,
                    world_size=len(ranks),
                    local_rank=number - first,
                    local_world_size=local,
                    threads=self._options.cpus_per_worker or max(1, seat["cores"] // local),
                    folder=str(folder),
                )
                gpus = ",".join(neighbour["gpus"] for neighbour in seats[first : first + local])  # so that NCCL can use them directly
                started.append(rank.start.remote(asdict(self._job), asdict(place), addresses[number], (addresses[0], port), gpus))
                members.append(_Member(rank=number, actor=rank, node=seat["node"], host=seat["host"], answered=time.monotonic()))
            ray.get(started, timeout=START_S)
        except ray.exceptions.RayError as error:
            return f"a worker did not start: {_last_line(error)}"
        for member in members:
            member.answered = time.monotonic()
        return members

    @contextmanager
    def _growth(self, fit: Fit, size: int, gpu: bool) -> Iterator[Callable[[], str]]:
        """A function that says why the gang shall make room for a larger one; "" when it need not. It reserves what that needs first."""
        asked: list[tuple[Group, int, float]] = []
        again = 0.0

        def why() -> str:
            nonlocal again
            now = time.monotonic()
            if not asked:
                nodes = [node for node in living() if node.id not in draining()]
                target = self._fit(nodes).sizes[0] if now >= again else 0
                if target > size:
                    asked.append((_reserve(target - size, fit.cpus_each, gpu, set()), target, now))
            elif asked[0][0].wait(0.1):
                return f"there is room: from {size} to {asked[0][1]} workers"
            elif now - asked[0][2] > EXTRA_S:
                again = now + PAUSE_S
                ray.util.remove_placement_group(asked.pop()[0])
            return ""

        try:
            yield why
        finally:
            for group, _, _ in asked:
                ray.util.remove_placement_group(group)


@contextmanager
def _places(size: int, cpus_each: float, gpu: bool, avoid: set[str]) -> Iterator[Group]:
    group = _reserve(size, cpus_each, gpu, avoid)
    try:
        yield group
    finally:
        ray.util.remove_placement_group(group)


def _reserve(size: int, cpus_each: float, gpu: bool, avoid: set[str]) -> Group:
    """Asks for places of workers: close together where they have GPUs, else each on a node of its own while there are any."""
    bundle = {"CPU": cpus_each, **({"GPU": 1.0} if gpu else {})}
    selector = [{"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}] * size if avoid else None
    return ray.util.placement_group([bundle] * size, strategy="PACK" if gpu else "SPREAD", bundle_label_selector=selector)


@dataclass(slots=True, kw_only=True)
class _Member:
    """One rank as its supervisor sees it. state: "running", "finished", "failed" or "lost". answered: when, on the monotonic clock."""

    rank: int
    actor: Any
    node: str
    host: str
    answered: float
    state: str = "running"
    text: str = ""
    question: Any = None


class _Watch:
    """Looks at a gang until it ends."""

    def __init__(self, job: Job, folder: Path, members: list[_Member], growth: Any) -> None:
        self._job, self._folder, self._members, self._growth = job, folder, members, growth
        self._looked = time.monotonic()

    def run(self) -> str | None:
        """None when every worker finished, else why the gang has to end."""
        with self._growth as room:
            while True:
                began = time.monotonic()
                self._poll(POLL_S)
                if self._job.ending() is not None or any(member.state in ("lost", "failed") for member in self._members):
                    return self._reason()
                if all(member.state == "finished" for member in self._members):
                    return None
                silent = [member for member in self._members if member.question and time.monotonic() - member.answered > STOPPED_S]
                if silent:
                    return f"rank {silent[0].rank} on {silent[0].host} stopped answering for {STOPPED_S:.0f} s"
                self._look(room)
                time.sleep(max(0.0, began + POLL_S - time.monotonic()))

    def _poll(self, timeout_s: float) -> None:
        """Asks everyone who still runs, and waits for the answers."""
        running = [member for member in self._members if member.state == "running"]
        for member in running:
            member.question = member.question or member.actor.poll.remote()
        asked = {member.question: member for member in running}
        if not asked:
            return
        for answer in ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)[0]:
            member = asked[answer]
            member.question, member.answered = None, time.monotonic()
            try:
                member.state, member.text = ray.get(answer)
            except ray.exceptions.RayError as error:
                member.state, member.text = "lost", _last_line(error)

    def _reason(self) -> str:
        """What ended the gang, in one line. A lost process says more than its peers, which fail of its absence."""
        end = time.monotonic() + SETTLE_S
        while time.monotonic() < end and any(member.state == "running" for member in self._members):
            self._poll(end - time.monotonic())
        hung = hung_reason(self._folder, len(self._members), self._job)
        if hung:
            return hung
        ranked = sorted(self._members, key=lambda member: ("lost", "running", "failed", "finished").index(member.state))
        worst = ranked[0]
        if worst.state == "lost":
            return f"the process of rank {worst.rank} on {worst.host} died"
        if worst.state == "running":
            return f"rank {worst.rank} on {worst.host} does not answer"
        return f"rank {worst.rank} failed: {worst.text}"

    def _look(self, room: Callable[[], str]) -> None:
        """Asks the gang to save and end when one of its nodes is about to go, or when a larger one fits."""
        if not self._job.stoppable or self._job.resize_asked() or time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        leaving = draining()
        hosts = sorted({member.host for member in self._members if member.node in leaving})
        why = f"{', '.join(hosts)} is about to be taken away" if hosts else room()
        if why:
            self._job.ask_to_resize(why)


class _Rank:
    """In the worker's process. Its work runs in a thread, so that the main one hears signals and answers."""

    def __init__(self) -> None:
        self._answer = ("running", "")
        self._server: socket.socket | None = None

    def seat(self) -> Seat:
        """Where this process is."""
        return {
            "node": ray.get_runtime_context().get_node_id(),
            "host": socket.gethostname(),
            "address": ray.util.get_node_ip_address(),
            "cores": len(os.sched_getaffinity(0)),
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        }

    def offer(self, address: str) -> int:
        """The port at which the ranks will find each other, on this address alone."""
        self._server = socket.create_server((address, 0))
        return int(self._server.getsockname()[1])

    def start(self, job: dict[str, Any], place: dict[str, Any], address: str, store: tuple[str, int], gpus: str) -> None:
        """Begins the work as one rank. address: of this node, for the gang's traffic. gpus: of the gang on it, by local rank."""
        order, seat = Job(**job), Place(**place)
        interface = interface_of(address)
        os.environ.update(worker_environment(seat.threads), GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=interface)
        if gpus.strip(","):
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus
        if order.stoppable:
            remember_sigterm()
        threading.Thread(target=_end_with, args=(os.getppid(),), name="parent", daemon=True).start()
        threading.Thread(target=self._work, args=(order, seat, store), name="work", daemon=True).start()

    def poll(self) -> tuple[str, str]:
        """(state, text): "running", "finished", or "failed" with its last line."""
        return self._answer

    def _work(self, job: Job, place: Place, store: tuple[str, int]) -> None:
        log = (Path(place.folder) / f"rank-{place.rank}.log").open("w", encoding="utf-8", buffering=1)
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        try:
            from torch.distributed import TCPStore  # type: ignore[attr-defined]  # after the environment is set

            from cluster.worker import run

            first, size = place.rank == 0, place.world_size
            descriptor = self._server.detach() if self._server is not None else None
            run(job, place, lambda: TCPStore(*store, size, first, master_listen_fd=descriptor), log)
            self._answer = ("finished", "")
        except BaseException as error:  # the supervisor decides what follows
            traceback.print_exc(file=log)
            self._answer = ("failed", _last_line(error))


def _end_with(raylet: int) -> None:
    """Ends this process when its raylet has: for Ray it is dead then, and nobody would end it."""
    while os.getppid() == raylet:
        time.sleep(POLL_S)
    os._exit(1)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
