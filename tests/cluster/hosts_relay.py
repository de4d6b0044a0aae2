"""Joins a port of a lab's bridge to a host's eth0 in user space, with a delay: what `tc netem` does where the kernel has it.

Arguments: process numbers in the lab's and the host's namespace, the port's name, eth0's address. Standard input: {"delay_s": s} a line.
"""

import ctypes
import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
LIBC = ctypes.CDLL(None, use_errno=True)


def enter(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    if LIBC.setns(descriptor, 0) != 0:
        raise OSError(ctypes.get_errno(), path)
    os.close(descriptor)


def tap(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def relay(ends: tuple[int, int]) -> None:
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    waiting: dict[int, deque[tuple[float, bytes]]] = {end: deque() for end in ends}
    delay_s, words = 0.0, b""
    os.set_blocking(0, False)
    while True:
        now = time.monotonic()
        for end, packets in waiting.items():
            while packets and packets[0][0] <= now:
                try:
                    os.write(end, packets.popleft()[1])
                except OSError:  # the link is down: a packet that is lost
                    continue
        due = [packets[0][0] for packets in waiting.values() if packets]
        ready, _, _ = select.select([*ends, 0], [], [], max(0.0, min(due) - now) if due else None)
        for source in ready:
            if source == 0:
                told = os.read(0, 4096)
                if not told:
                    return
                *lines, words = (words + told).split(b"\n")
                for line in lines:
                    delay_s = json.loads(line)["delay_s"]
                continue
            try:
                packet = os.read(source, 1 << 16)
            except OSError:
                continue
            waiting[other[source]].append((time.monotonic() + delay_s, packet))


def main() -> None:
    lab, host, port, address = sys.argv[1:]
    spaces = [os.open(f"/proc/{pid}/ns/net", os.O_RDONLY) for pid in (lab, host)]
    if os.geteuid() != 0:
        enter(f"/proc/{lab}/ns/user")
    ends = []
    for space, name in zip(spaces, (port, "eth0"), strict=True):
        if LIBC.setns(space, 0) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        ends.append(tap(name))
    subprocess.run(["ip", "link", "set", "eth0", "address", address], check=True)
    print("READY", flush=True)
    relay((ends[0], ends[1]))


if __name__ == "__main__":
    main()
