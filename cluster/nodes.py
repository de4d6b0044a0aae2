"""The machines of the Ray cluster that this process has joined, and a question to all of them at once."""

import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import psutil

from cluster.errors import LaunchError
from cluster.ray_session import ray

PROBE_S = 2.0  # within which a node's raylet takes a connection

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A living node. port: of its raylet. cpus, gpus: what it offers to tasks and workers, used or not."""

    id: str
    host: str
    address: str
    port: int
    cpus: float
    gpus: int

    def __str__(self) -> str:
        return f"node {self.host} ({self.address})"


def living() -> list[Node]:
    """Every node that is alive, ordered by address."""
    found = [
        Node(
            id=facts["NodeID"],
            host=facts["NodeManagerHostname"],
            address=facts["NodeManagerAddress"],
            port=int(facts["NodeManagerPort"]),
            cpus=facts["Resources"].get("CPU", 0.0),
            gpus=int(facts["Resources"].get("GPU", 0)),
        )
        for facts in ray.nodes()
        if facts["Alive"]
    ]
    return sorted(found, key=lambda node: node.address)


def usable() -> list[Node]:
    """Those of the living nodes that answer and are not about to be taken away. A node that died counts as alive for up to a minute."""
    nodes, leaving = living(), draining()
    with ThreadPoolExecutor(max_workers=min(32, len(nodes) or 1)) as pool:
        answers = list(pool.map(_answers, nodes))
    return [node for node, answered in zip(nodes, answers, strict=True) if answered and node.id not in leaving]


def draining() -> set[str]:
    """Ids of nodes that the cluster's owner is about to take away (a preemption notice, `ray drain-node`)."""
    return set(ray._private.state.state.get_draining_nodes())  # there is no public way


def _answers(node: Node) -> bool:
    try:
        with socket.create_connection((node.address, node.port), timeout=PROBE_S):
            return True
    except OSError:
        return False


def this_node() -> str:
    """The id of the node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def ask(
    nodes: Sequence[Node],
    function: Callable[[Question], Answer],
    questions: Mapping[str, Question],
    *,
    timeout_s: float,
    exit_after: bool = False,
    enough: Callable[[Answer], bool] = lambda answer: False,
) -> tuple[dict[str, Answer], dict[str, str]]:
    """Runs the function on each of the nodes at once, beside whatever else runs there: (node id -> answer, node id -> why there is none).

    function: of a module that needs nothing but the standard library, because it travels as a whole: whether our packages can be
    imported there may be what it shall find out. questions: its argument, by node id. exit_after: the process that ran it ends.
    enough: an answer after which the others need not be waited for; those that are missing then are in neither dictionary.
    """
    ray.cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    remote = ray.remote(num_cpus=0, max_retries=0, max_calls=1 if exit_after else 0)(function)
    pending: dict[ray.ObjectRef, str] = {}
    for node in nodes:
        pinned = remote.options(scheduling_strategy=strategy(node.id, soft=False))
        pending[pinned.remote(questions[node.id])] = node.id
    answers: dict[str, Answer] = {}
    problems: dict[str, str] = {}
    end = time.monotonic() + timeout_s
    done = False
    while pending and not done and (left := end - time.monotonic()) > 0:
        for reference in ray.wait(list(pending), timeout=left)[0]:
            node_id = pending.pop(reference)
            try:
                answers[node_id] = ray.get(reference)
                done = done or enough(answers[node_id])
            except ray.exceptions.RayError as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                problems[node_id] = lines[-1] if lines else type(error).__name__
    for reference, node_id in pending.items():
        ray.cancel(reference, force=True)
        if not done:
            problems[node_id] = f"no answer within {timeout_s:g} s"
    return answers, problems


def interface_of(address: str) -> str:
    """The network interface of this machine that has this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return str(name)
    raise LaunchError(f"No network interface of {socket.gethostname()} has Ray's node address {address}.")
