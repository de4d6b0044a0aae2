"""One Ray session per process: joins the cluster that RAY_ADDRESS names, else starts a private one on loopback."""

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cluster.errors import ClusterError
from cluster.openness import CLOSE_IT, on_loopback

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's new default, which silences its warning
    # Our own supervisors say in a line what Ray says in a page when a worker dies.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed while executing a task",
}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)  # before Ray is imported, which reads some of them then

_PRIVATE = {
    # Ray's figures for Prometheus, which would answer everybody on every interface: no agent's, and no port for the head's two servers.
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}

import ray as ray  # noqa: E402 - also for the other rooms' use: whoever imports Ray must do so after the above

PROBE_S = 5.0
LOOPBACK_ADDRESS = "127.0.0.2"  # Ray takes 127.0.0.1 for "find out yourself" and then advertises the machine's address


def ensure_ray(num_cpus: int | None = None) -> None:
    """Connects this process to Ray unless it is connected already.

    num_cpus: what a private cluster offers to tasks and workers; None is every core. Ignored when a cluster is joined.
    Raises ClusterError when the cluster to join cannot be joined, or takes orders from anybody who reaches it.
    A private cluster advertises a loopback address, has no dashboard, shows no figures to Prometheus and ends with this process. Ray's
    gRPC ports still bind to all interfaces; they refuse whoever lacks the token that Ray keeps in this user's home.
    """
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        _join(os.environ["RAY_ADDRESS"])
        return
    # A private cluster asks for a token, which Ray makes and keeps for this user; it need not say so every time.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    with _environment(_PRIVATE):  # which its processes inherit, and other clusters that are started later do not
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,  # workers' output is in the run's logs; a killed one would print a page here
            _node_ip_address=LOOPBACK_ADDRESS,
        )


def is_private() -> bool:
    """Whether this process has a Ray of its own, which no other machine can join."""
    return str(ray.get_runtime_context().gcs_address).startswith(f"{LOOPBACK_ADDRESS}:")


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _join(address: str) -> None:
    advice = "Start that cluster (ray start --head), correct RAY_ADDRESS, or unset it for a private Ray on this machine."
    found = re.fullmatch(r"([^/:]+|\[[^\]]+\]):(\d{1,5})", address)
    if found and not _speaks_grpc(found[1].strip("[]"), int(found[2])):
        raise ClusterError(f"RAY_ADDRESS={address}: no Ray answers there: nothing listens on that port, or something else does. {advice}")
    try:
        ray.init(logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:  # other versions, token, address
        text = " ".join(str(error).split())
        token = "" if os.environ.get("RAY_AUTH_MODE") == "token" else " not"
        raise ClusterError(
            f"RAY_ADDRESS={address}: that Ray cannot be joined: {text}. If it asks for a token (RAY_AUTH_MODE is{token} 'token' here), "
            f"set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with that cluster's. {advice}"
        ) from None
    addresses = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" and not all(map(on_loopback, addresses)):
        ray.shutdown()
        raise ClusterError(f"RAY_ADDRESS={address}: this Ray cluster listens on {', '.join(addresses)} and asks for no token. {CLOSE_IT}")


def _speaks_grpc(host: str, port: int) -> bool:
    """Whether an HTTP/2 server answers: it sends its settings first. Ray itself would wait for minutes, and then end the process."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # RFC 9113, 3.4: and empty settings
    try:
        with socket.create_connection((host, port), timeout=PROBE_S) as connection:
            connection.sendall(preface)
            reply = connection.recv(9)
    except OSError:
        return False
    return len(reply) > 3 and reply[3] == 4
