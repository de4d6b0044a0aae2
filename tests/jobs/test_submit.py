"""Jobs for a real Ray cluster of two hosts, submitted from a third: one job however often, or a clear refusal in seconds.

h1 is the head, h2 a node of it, h3 the submitter's machine, on which an open Ray cluster runs as well.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.checkpoint import CheckpointStore
from cluster.metrics import merge_steps, read_metrics
from tests.cluster import hosts, ray_hosts
from tests.cluster.hosts import Host, Lab
from tests.jobs.soak_train import RECIPE
from tests.ports import LIST, assert_as_listed

ROOT = Path(__file__).parent.parent.parent
SHARED = "/tmp/shared"
REFUSED, STOPPED = 78, 75
STEPS = "train.steps=4000"
REFUSED_WITHIN_S = 60.0  # 15 on a quiet machine
SITE = """
import os, sys
if os.path.isdir("/tmp/shared/shadow"):
    sys.path.insert(0, "/tmp/shared/shadow")
"""


class Cluster:
    """The lab, with Ray in it, and the submitter's command line."""

    def __init__(self, lab: Lab, shared: Path) -> None:
        self.lab, self.shared = lab, shared
        self.head, self.node, self.laptop = (lab.hosts[name] for name in ("h1", "h2", "h3"))

    def start(self, *words: str, to: Host | None = None, environment: dict[str, str] | None = None) -> "subprocess.Popen[str]":
        """`posmlp words` on the submitter's machine."""
        own = {"RAY_API_SERVER_ADDRESS": ray_hosts.url(to or self.head), "RAY_AUTH_TOKEN_PATH": ray_hosts.TOKEN_FILE, "COLUMNS": "200"}
        more = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **own, **(environment or {})}
        return self.laptop.start(sys.executable, "-m", "jobs", *words, environment=more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def posmlp(self, *words: str, to: Host | None = None, environment: dict[str, str] | None = None) -> tuple[int, str]:
        """(exit code, what it printed)."""
        process = self.start(*words, to=to, environment=environment)
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    def train(self, name: str, *more: str) -> list[str]:
        """The words that train into the run folder of that name."""
        return [
            "train",
            f"{SHARED}/recipe.yaml",
            f"data.dir={SHARED}/dataset",
            f"run.dir={SHARED}/{name}",
            "launch.cpus_per_worker=1",
            *more,
        ]

    def last_step(self, name: str) -> int:
        return max((int(str(event["step"])) for event in merge_steps(read_metrics(self.shared / name / "metrics.jsonl"))), default=0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, motion_dataset: Path) -> Iterator[Cluster]:
    hosts.require()
    shared = tmp_path_factory.mktemp("submit") / "shared"
    shutil.copytree(motion_dataset.parent, shared)
    (shared / "recipe.yaml").write_text(RECIPE.replace("launcher: local, ", ""))
    (shared / "site").mkdir()
    (shared / "site" / "sitecustomize.py").write_text(SITE)
    with Lab(shared=shared, environment=ray_hosts.ENVIRONMENT) as lab:
        head, node, laptop = lab.host("h1"), lab.host("h2"), lab.host("h3")
        other = ray_hosts.begin_ray(laptop, environment=ray_hosts.OPEN)
        ray_hosts.begun(ray_hosts.begin_ray(head))
        ray_hosts.begun(ray_hosts.begin_ray(node, head, environment={"PYTHONPATH": f"{SHARED}/site"}))
        ray_hosts.begun(other)
        yield Cluster(lab, shared)


def test_an_open_cluster_and_a_wrong_token_are_refused(cluster: Cluster) -> None:
    began = time.monotonic()
    code, said = cluster.posmlp("submit", "--", *cluster.train("none"), to=cluster.laptop)
    assert time.monotonic() - began < REFUSED_WITHIN_S
    assert code == 1
    assert said.startswith(f"error: http://{cluster.laptop.address}:8265: this Ray cluster asks for no token. Anyone who reaches that port")
    assert "RAY_AUTH_MODE=token" in said
    (cluster.laptop.disk / "wrong").write_text("w" * 40)
    code, said = cluster.posmlp("jobs", environment={"RAY_AUTH_TOKEN_PATH": "/tmp/disk/wrong"})
    assert code == 1
    assert f"http://{cluster.head.address}:8265: the cluster refuses this token" in said


def test_everything_that_would_go_wrong_is_said_at_once_with_its_node(cluster: Cluster) -> None:
    """Data that workers cannot see, a run folder of a node's own, too few CPUs, another version, a package that is shadowed there."""
    (cluster.shared / "shadow" / "model").mkdir(parents=True)
    (cluster.shared / "shadow" / "model" / "__init__.py").touch()
    newer = cluster.shared / "newer" / "av-99.0.0.dist-info"
    newer.mkdir(parents=True)
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: av\nVersion: 99.0.0\n")
    words = cluster.train("none", f"data.dir={SHARED}/nothing", "run.dir=/tmp/own/run", "launch.workers=4")
    began = time.monotonic()
    try:
        code, said = cluster.posmlp("submit", "--patience", "30", "--", *words, environment={"PYTHONPATH": f"{SHARED}/newer:{ROOT}"})
    finally:
        shutil.rmtree(cluster.shared / "shadow")
    seconds = time.monotonic() - began
    print(f"refused after {seconds:.1f} s")
    assert code == REFUSED, said
    one, two = f"node h1 ({cluster.head.address})", f"node h2 ({cluster.node.address})"
    assert f"  - {one}, {two}: data.dir={SHARED}/nothing/dataset.json: No such file or directory." in said
    assert f"  - {two}: run.dir=/tmp/own/run is not there. Mount the same storage" in said
    assert "  - launch.workers=4 with 1 CPUs each do not fit the Ray cluster, which has 2 CPUs and 0 GPUs on 2 nodes." in said
    assert f"  - {two}: Python finds package 'model' at {SHARED}/shadow/model, not in the job's files." in said
    assert f"  - {one}, {two}: av is 1" in said
    assert "the job was submitted with 99.0.0" in said
    assert "preflight: refused: 5 problems" in said
    assert cluster.head.run("ls", "-d", "/tmp/own").returncode != 0  # nothing is left of the trial
    assert seconds < REFUSED_WITHIN_S


FIREWALL = [
    "prio 4 ipproto tcp sport 6379-8300 lookup main",  # what Ray itself listens on answers
    "prio 5 ipproto tcp dport 32768-60999 blackhole",  # the ports that the kernel gives to whoever asks for any
]


def test_nodes_that_cannot_compute_together_are_found(cluster: Cluster) -> None:
    """A firewall between them that lets Ray through."""
    for rule in FIREWALL:
        assert cluster.node.run("ip", "rule", "add", *rule.split()).returncode == 0
    try:
        code, said = cluster.posmlp("submit", "--patience", "40", "--", *cluster.train("run", STEPS))
    finally:
        for rule in FIREWALL:
            cluster.node.run("ip", "rule", "del", *rule.split())
    assert code == REFUSED, said
    assert f"  - node h2 ({cluster.node.address}): cannot compute together with the others: {cluster.head.address}:" in said
    assert " cannot be reached: " in said
    assert "Open all TCP ports between the nodes" in said


def test_submitted_twice_it_is_one_job_that_stops_saved_and_goes_on(cluster: Cluster) -> None:
    words = cluster.train("run", STEPS)
    code, said = cluster.posmlp("submit", "--patience", "60", "--no-wait", "--", *words)
    assert code == 0, said
    assert "preflight: passed on 2 nodes in " in said
    name = said.partition(":")[0]
    assert f"after {name[:-1]}1, which failed" in said  # for lack of a network: what failed is tried again under the next number
    assert name.endswith("-2")
    again = cluster.start("submit", "--", *words)
    code, said = cluster.posmlp("submit", "--no-wait", "--", *words, "train.steps=3999")
    assert code == 1
    assert f"error: {SHARED}/run is being filled by {name}, which was submitted with another command or recipe. Stop it first" in said
    end = time.monotonic() + 120
    while cluster.last_step("run") < 5:
        assert time.monotonic() < end
        time.sleep(0.1)
    code, said = cluster.posmlp("status", f"{SHARED}/run", "--address", ray_hosts.url(cluster.head), "--json")
    facts = json.loads(said)
    assert (facts["job"]["id"], facts["job"]["state"], facts["state"], facts["total"]) == (name, "running", "running", 4000)
    assert facts["step"] >= 5
    assert facts["workers"] == 2
    assert facts["left_s"] > 0
    assert_as_listed("joined cluster, head", cluster.head)
    assert_as_listed("joined cluster, node", cluster.node)
    code, said = cluster.posmlp("stop", f"{SHARED}/run")
    saved = cluster.last_step("run")
    assert (
        f"stopped: {SHARED}/run is saved at step {saved} of 4000; the same command goes on from there.\n{name}: stopped, exit code 75"
        in said
    )
    followed, _ = again.communicate(timeout=60)
    assert again.returncode == STOPPED
    assert followed.startswith(f"{name}: submitted before, ")
    assert CheckpointStore(cluster.shared / "run" / "checkpoints", keep=1).manifests()[0].step == saved
    code, said = cluster.posmlp("jobs", "--json")
    states = {job["id"]: job["state"] for job in json.loads(said) if job["folder"] == f"{SHARED}/run"}
    assert states == {name: "stopped", f"{name[:-1]}1": "failed"}


CONTROL = {
    "http": ["8265:GET:/api/jobs/", "8265:POST:/api/jobs/", "7002:GET:/api/job_agent/jobs/x/logs", "7005:POST:/get_or_create_runtime_env"],
    "grpc": [
        "6379:NodeInfoGcsService/GetAllNodeInfo",
        "6379:InternalKVGcsService/InternalKVGet",
        "7110:NodeManagerService/GetNodeStats",
        "7111:ObjectManagerService/Push",
        "7003:ReporterService/GetTraceback",
        "10001:RayletDriver/ClusterInfo",
    ],
}


def test_control_ports_refuse_whoever_has_no_token(cluster: Cluster) -> None:
    asked = [f"{kind}:{port}" for kind, ports in CONTROL.items() for port in ports]
    workers = [port for _, _, port in json.loads(cluster.head.run(sys.executable, LIST).stdout) if 7500 <= port <= 7599]
    asked += [f"grpc:{port}:CoreWorkerService/GetCoreWorkerStats" for port in workers]
    assert workers
    script = ROOT / "tests" / "cluster" / "without_token.py"
    answered = json.loads(cluster.laptop.run(sys.executable, script, cluster.head.address, *asked).stdout)
    assert answered == {each: "401" if each.startswith("http") else "UNAUTHENTICATED" for each in asked}


def test_what_is_finished_is_not_done_again(cluster: Cluster) -> None:
    """A build, of a dataset that is there already."""
    words = ["data", "build", "--videos", f"{SHARED}/videos", "--labels", f"{SHARED}/videos/labels.csv", "--out", f"{SHARED}/dataset"]
    code, said = cluster.posmlp("submit", "--", *words)
    assert code == 0, said
    name = said.partition(":")[0]
    assert f"{name}: finished, exit code 0" in said
    code, said = cluster.posmlp("submit", "--", *words)
    assert (code, said.partition(" at ")[0]) == (0, f"{name}: finished")
    code, said = cluster.posmlp("logs", name)
    assert (code, said.splitlines()[-1]) == (0, "posmlp: exit code 0")


def steps_with(run: Path, workers: int, after: int) -> bool:
    """Whether the newest attempt, a later one than `after`, has so many workers and has made a step."""
    events = read_metrics(run / "metrics.jsonl")
    attempts = [event for event in events if event["event"] == "attempt"]
    newest = attempts[-1] if attempts else {"attempt": 0, "world_size": 0}
    made = any(event["event"] == "step" and event["attempt"] == newest["attempt"] for event in events[-20:])
    return made and newest["world_size"] == workers and int(str(newest["attempt"])) > after


def test_a_gang_leaves_a_node_in_time_grows_again_and_outlives_a_dead_one(cluster: Cluster) -> None:
    """Nothing is run twice when a node is announced to leave, or a place comes; after a death, what came after the checkpoint."""
    code, said = cluster.posmlp("submit", "--no-wait", "--", *cluster.train("elastic", STEPS, "launch.workers=[1,2]", "train.trace=true"))
    assert code == 0, said
    run = cluster.shared / "elastic"

    def wait_for(workers: int, after: int) -> int:
        end = time.monotonic() + 150
        while not steps_with(run, workers, after):
            assert time.monotonic() < end, (run / "metrics.jsonl").read_text()[-2000:]
            time.sleep(0.2)
        return int(str(read_metrics(run / "metrics.jsonl")[-1]["attempt"]))

    attempt = wait_for(2, 0)
    drain = "import ray; ray.init(); print(next(n['NodeID'] for n in ray.nodes() if n['Alive'] and n['NodeManagerHostname'] == 'h2'))"
    joined = {**ray_hosts.CLOSED, "RAY_ADDRESS": f"{cluster.head.address}:6379", "PYTHONWARNINGS": "ignore"}
    node = cluster.head.run(sys.executable, "-c", drain, environment=joined).stdout.split()[-1]
    notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "60"]
    drained = cluster.head.run(sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--node-id", node, *notice, environment=joined)
    assert drained.returncode == 0, drained.stdout + drained.stderr
    attempt = wait_for(1, attempt)
    cluster.node.kill()
    cluster.node.boot()
    ray_hosts.begun(ray_hosts.begin_ray(cluster.node, cluster.head, environment={"PYTHONPATH": f"{SHARED}/site"}))
    attempt = wait_for(2, attempt)
    cluster.node.kill()
    wait_for(1, attempt)
    code, said = cluster.posmlp("stop", f"{SHARED}/elastic")
    assert code == 0, said
    cluster.node.boot()
    ray_hosts.begun(ray_hosts.begin_ray(cluster.node, cluster.head, environment={"PYTHONPATH": f"{SHARED}/site"}))

    events = read_metrics(run / "metrics.jsonl")
    reasons = [str(event["reason"]) for event in events if event["event"] == "restart"]
    assert len(reasons) == 3, reasons
    assert reasons[0] == "h2 is about to be taken away"
    assert reasons[1] == "there is room: from 1 to 2 workers"
    assert re.fullmatch(r"rank 1 on h2 does not answer|the process of rank 1 on h2 died|rank 0 failed: .*", reasons[2])
    places = [
        (record["step"], record["micro"])
        for attempt in (1, 2, 3)
        for path in sorted((run / "trace").glob(f"attempt-{attempt:06d}-*.jsonl"))
        for record in map(json.loads, path.read_text().splitlines()[:-1])
    ]
    assert len(places) == len(set(places))  # nobody ran a micro-batch that another attempt had run, until the host died
