"""Prints, as JSON, what listens in this network namespace: (process, address, port)."""

import json
import re
import sys

import psutil


def kind(pid: int | None) -> str:
    """What a process is, for people and for the page."""
    if pid is None:
        return "?"
    words = psutil.Process(pid).cmdline()
    line = " ".join(words)
    for pattern, name in KINDS.items():
        if re.search(pattern, line):
            return name
    return line[:120]


KINDS = {
    r"gcs_server": "GCS",
    r"raylet/raylet": "raylet",
    r"^ray::DashboardAgent|dashboard/agent\.py": "dashboard agent",
    r"^ray::RuntimeEnvAgent|runtime_env/agent/main\.py": "runtime environment agent",
    r"dashboard/dashboard\.py|^ray-dashboard": "dashboard",
    r"monitor\.py": "autoscaler's monitor",
    r"ray\.util\.client\.server": "client server",
    r"^ray::": "Ray worker",
    r"cluster\.worker": "local worker",
    r"default_worker\.py": "Ray worker",
    r"jobs": "posmlp",
}

if __name__ == "__main__":
    found = {
        (kind(each.pid), each.laddr.ip, each.laddr.port) for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN
    }
    json.dump(sorted(found), sys.stdout)
