"""Whether a submitted job can work on this cluster, asked from inside and before it starts: an answer in seconds, with a remedy for each
failure, instead of a wait for workers that never come.

Each node that would work, and the head, on which the driver runs, looks at itself (`preflight_node.look`); then the nodes that would
train together add up a number over the network (`preflight_node.reach`).
"""

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from cluster.errors import ClusterError
from cluster.nodes import Node, ask, living, this_node
from cluster.openness import CLOSE_IT, on_loopback
from cluster.options import LaunchOptions
from cluster.topology import fit_workers
from jobs import preflight_node
from jobs.packages import PACKAGES
from jobs.probes import GIB, MIN_SHM
from jobs.submission import Needs

SHOWN = 4  # nodes named in one line
REACH_MORE_S = 5.0  # that torch may take to load

Finding: TypeAlias = tuple[Node | None, str]  # of one node, or of all together


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """problems: why the job must not start, each with a remedy. notes: what is worth knowing. num_nodes: how many were asked."""

    problems: list[str]
    notes: list[str]
    num_nodes: int
    seconds: float


def run(needs: Needs, mark: str) -> Verdict:
    """Asks the cluster that this process has joined. mark: the name of a file that lies beside our packages in the job's files."""
    began = time.monotonic()
    everyone = living()
    head = this_node()
    workers = _that_would_work(everyone)
    nodes = [node for node in everyone if node in workers or node.id == head]
    problems: list[Finding] = [*_open_to_anybody(nodes), *_resources(needs, workers)]
    notes: list[Finding] = []
    with _nonces(needs.shared, problems) as nonce:
        shared = dict(needs.shared) if nonce else {}
        common = {"packages": PACKAGES, "mark": mark, "libraries": list(needs.libraries), "read": dict(needs.read), "shared": shared}
        questions = {node.id: {**common, "nonce": nonce, "me": node.id, "address": node.address} for node in nodes}
        answers, silent = ask(nodes, preflight_node.look, questions, timeout_s=needs.timeout_s)
        for node in nodes:
            if node.id in silent:
                problems.append((node, f"{silent[node.id]}. Restart Ray there, or take it out of the cluster."))
                continue
            problems.extend((node, text) for text in _of_node(needs, answers[node.id], nonce, node))
            if node in workers and needs.num_micro_batches is not None:
                problems.extend((node, text) for text in _of_worker(needs, node, answers[node.id]))
                notes.extend((node, text) for text in _small_memory(node, answers[node.id]) if node.gpus < 2)
    problems.extend(_differences(needs, [node for node in nodes if node.id in answers], answers))
    if not problems and needs.num_micro_batches is not None and len(workers) > 1:
        problems.extend(_reach(workers, answers, needs.timeout_s))
    return Verdict(problems=_told(problems), notes=_told(notes), num_nodes=len(nodes), seconds=time.monotonic() - began)


def _told(findings: Iterable[Finding]) -> list[str]:
    """For people: what is true of several nodes is said once."""
    by_text: dict[str, list[Node]] = {}
    for node, text in findings:
        by_text.setdefault(text, []).extend([node] if node else [])
    lines = []
    for text, nodes in by_text.items():
        more = f" and {len(nodes) - SHOWN} more" if len(nodes) > SHOWN else ""
        lines.append(f"{', '.join(map(str, nodes[:SHOWN]))}{more}: {text}" if nodes else text)
    return lines


def _that_would_work(nodes: Sequence[Node]) -> list[Node]:
    gpus = any(node.gpus for node in nodes)
    return [node for node in nodes if (node.gpus if gpus else node.cpus)]


def _open_to_anybody(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Seen from here, since a tunnel makes every cluster look as if it were on the submitter's loopback interface."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" and not all(on_loopback(node.address) for node in nodes):
        yield None, f"this Ray cluster listens on {', '.join(node.address for node in nodes)} and asks for no token. {CLOSE_IT}"


def _resources(needs: Needs, workers: Sequence[Node]) -> Iterator[Finding]:
    if not workers:
        yield None, "no node of this cluster offers a CPU to tasks and workers. Start one with ray start --num-cpus=N."
    elif needs.num_micro_batches is not None:
        try:
            fit_workers(needs.num_micro_batches, LaunchOptions(**needs.launch), [(node.cpus, node.gpus) for node in workers])
        except ClusterError as error:
            yield None, f"{error} It has " + "; ".join(f"{node}: {node.cpus:g} CPUs, {node.gpus} GPUs" for node in workers) + "."


@contextlib.contextmanager
def _nonces(shared: Mapping[str, str], problems: list[Finding]) -> Iterator[str]:
    """Leaves a file of one random name in each of the folders, which are made if missing; in the end nothing of it is left.

    The name is new, because a network file system may remember for a minute that an old one was not there. Yields "" on failure.
    """
    nonce, where = f".preflight-{secrets.token_hex(8)}", ""
    made: list[Path] = []
    try:
        try:
            for key, name in shared.items():
                where, folder = f"{key}={name}", Path(name)
                made.extend(parent for parent in (folder, *folder.parents) if not parent.exists())
                folder.mkdir(parents=True, exist_ok=True)
                (folder / nonce).write_text(nonce, encoding="ascii")
        except OSError as error:
            text = f"{where} cannot be written: {error.strerror}. Let the cluster's user write there."
            problems.append((None, f"the head ({socket.gethostname()}): {text}"))
            nonce = ""
        yield nonce
    finally:
        for name in shared.values():
            for left in Path(name).glob(".preflight-*"):
                left.unlink(missing_ok=True)
        for folder in sorted(made, key=lambda path: -len(path.parts)):
            with contextlib.suppress(OSError):  # somebody has put something there meanwhile
                folder.rmdir()


def _of_node(needs: Needs, answer: Mapping[str, Any], nonce: str, node: Node) -> Iterator[str]:
    for name, found in answer["packages"].items():
        if found:
            yield (
                f"Python finds package '{name}' at {found}, not in the job's files. Something on that node's PYTHONPATH or in its "
                "site-packages shadows it: remove that, or start Ray there without it."
            )
    for name, wanted in needs.libraries.items():
        found = answer["libraries"][name]
        if _public(found) != _public(wanted):
            yield f"{name} is {found}, the job was submitted with {wanted}. Install that version there, or submit with the cluster's."
    for key, found in answer["read"].items():
        if found.startswith("missing"):
            advice = "" if "://" in needs.read[key] else ". Put it on storage that every node mounts at that path."  # the store's says it
            yield f"{key}={needs.read[key]}: {found.removeprefix('missing: ')}{advice}"
    for key, problem in answer["shared"].items():
        if problem:
            yield f"{key}={needs.shared[key]} {problem}. Mount the same storage at that path on every node, writable."
        elif not (Path(needs.shared[key]) / f"{nonce}-{node.id}").is_file():
            yield f"{key}={needs.shared[key]}: what that node writes there does not arrive at the head. Mount the same storage on both."


def _public(version: str) -> str:
    return version.partition("+")[0]  # 2.13.0+cpu and 2.13.0+cu130 are one version, built for different devices


def _of_worker(needs: Needs, node: Node, answer: Mapping[str, Any]) -> Iterator[str]:
    if needs.nvdec and answer["nvdec"]:
        yield (
            f"loader.decode=nvdec, but the driver's video decoding cannot be used: {answer['nvdec']}. In a container set "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video, or submit with loader.decode=auto."
        )
    if node.gpus > 1:  # NCCL moves gradients between GPUs of a node through it
        yield from _small_memory(node, answer)


def _small_memory(node: Node, answer: Mapping[str, Any]) -> Iterator[str]:
    if answer["shm_bytes"] < MIN_SHM:
        yield (
            f"{answer['shm_bytes'] / GIB:.2f} GiB of shared memory in /dev/shm, better {MIN_SHM / GIB:.0f} or more. In Docker: "
            "--shm-size=2g; in Kubernetes: an emptyDir of medium Memory at /dev/shm."
        )


def _differences(needs: Needs, nodes: Sequence[Node], answers: Mapping[str, Any]) -> Iterator[Finding]:
    """Of what must be equal on all nodes: Python's minor version, and every file that is read."""
    facts = {f"{key}={path}": {node: str(answers[node.id]["read"][key]) for node in nodes} for key, path in needs.read.items()}
    facts["Python"] = {node: str(answers[node.id]["python"]).rpartition(".")[0] for node in nodes}
    for what, found in facts.items():
        values = [value for value in found.values() if not value.startswith("missing")]
        common = max(values, key=values.count, default="")
        for node, value in found.items():
            if value != common and not value.startswith("missing"):
                got = f"{value}, on other nodes {common}" if what == "Python" else "another one than on other nodes"
                yield node, f"{what} is {got}. Make it the same everywhere."


def _reach(workers: Sequence[Node], answers: Mapping[str, Any], timeout_s: float) -> Iterator[Finding]:
    meet = [workers[0].address, answers[workers[0].id]["port"]]
    common = {"world_size": len(workers), "meet": meet, "timeout_s": timeout_s}
    questions = {node.id: {**common, "rank": rank, "address": node.address} for rank, node in enumerate(workers)}
    found, silent = ask(workers, preflight_node.reach, questions, timeout_s=timeout_s + REACH_MORE_S, exit_after=True, enough=bool)
    for node in workers:
        problem = silent.get(node.id) or found.get(node.id)
        if problem:
            yield node, f"cannot compute together with the others: {problem}. Open all TCP ports between the nodes (docs/ports.md)."
