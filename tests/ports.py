"""Compares what listens on a host of a lab with what docs/ports.md says of a mode."""

import json
import re
import sys
from pathlib import Path

from tests.cluster.hosts import Host

ROOT = Path(__file__).parent.parent
LIST = ROOT / "tests" / "cluster" / "list_sockets.py"


def listed(mode: str) -> set[tuple[str, str, str]]:
    """(process, address, port) of the page's rows for a mode; port "any" where the kernel or Ray chooses it."""
    text = (ROOT / "docs" / "ports.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(mode[:1].upper() + mode[1:])}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert section is not None, mode
    rows = re.findall(r"^\| ([^|]+) \| `([^|`]+)` \| ([^|]+) \| [^|]+ \|$", section[1], flags=re.MULTILINE)
    return {(process.strip(), address, port.strip()) for process, address, port in rows}


def assert_as_listed(mode: str, host: Host) -> None:
    """Everything that listens is listed, and everything that is listed listens."""
    rows = listed(mode)
    seen = set()
    for process, ip, port in json.loads(host.run(sys.executable, LIST).stdout):
        address = {"0.0.0.0": "*", "::": "*", host.address: "node"}.get(ip.removeprefix("::ffff:"), ip.removeprefix("::ffff:"))
        matching = rows & {(process, address, str(port)), (process, address, "any")}
        assert matching, f"{mode}: {process} listens on {address}:{port}, which docs/ports.md does not list"
        seen |= matching
    assert seen == rows, f"{mode}: listed, but nothing listens: {rows - seen}"
