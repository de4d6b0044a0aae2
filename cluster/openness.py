"""Clusters that take orders from anybody who reaches them: how to tell, and how to close them."""

import ipaddress
import socket

CLOSE_IT = (
    "Anyone who reaches that port can run programs on every node. Stop the cluster, put one token into a file of mode 0600 on each node, "
    "and start every node with RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE; see docs/howto/cluster.md."
)


def on_loopback(host: str) -> bool:
    """Whether every address of this name is one of the loopback interface."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)
