"""Ray on the hosts of a lab, as an administrator would start it: an address of its own, a token in a file, the environment's `bin` first.

Hosts that die are noticed within seconds instead of a minute, so that tests need not wait.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.cluster.hosts import Host

BIN = Path(sys.prefix) / "bin"
TOKEN = "0123456789abcdef0123456789abcdef-of-the-tests"
TOKEN_FILE = "/tmp/disk/token"
CLOSED = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": TOKEN_FILE}
OPEN = {"RAY_AUTH_MODE": "disabled"}
ENVIRONMENT = {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "RAY_TMPDIR": "/tmp",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def give_token(host: Host) -> None:
    path = host.disk / "token"
    path.write_text(TOKEN)
    path.chmod(0o600)


def begin_ray(
    host: Host, head: Host | None = None, *, num_cpus: int = 1, environment: dict[str, str] | None = None
) -> "subprocess.Popen[str]":
    """`ray start` on a host, as the head or of that head; see `begun`."""
    give_token(host)
    # A new port after each boot: what the head still has open to a host that lost its power must not be taken for the new one.
    port = 7100 + 10 * host.boots
    ports = {
        "node-manager-port": port,
        "object-manager-port": port + 1,
        "dashboard-agent-listen-port": 7002,
        "dashboard-agent-grpc-port": 7003,
        "metrics-export-port": 7004,
        "runtime-env-agent-port": 7005,
        "min-worker-port": 7500,
        "max-worker-port": 7599,
    }
    words = [str(BIN / "python"), "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", "--object-store-memory=80000000"]
    words += [f"--node-ip-address={host.address}", "--temp-dir=/tmp/ray", f"--num-cpus={num_cpus}"]
    words += [f"--{name}={number}" for name, number in ports.items()]
    if head is None:
        words += ["--head", "--port=6379", f"--dashboard-host={host.address}", "--include-dashboard=true"]
    else:
        words.append(f"--address={head.address}:6379")
    return host.start(*words, environment={**CLOSED, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def begun(process: "subprocess.Popen[str]") -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-2000:]


def url(host: Host) -> str:
    return f"http://{host.address}:8265"
