"""An S3 server on loopback (moto's), and in front of it a proxy that misbehaves as networks and stores do, by a seed.

The protocol is the real one, spoken by botocore through fsspec; moto keeps objects in memory. What the proxy injects: answers 500 and
503, connections reset before and in the middle of an answer, answers cut short under an honest or a lying Content-Length, flipped bytes
in objects, and delays.
"""

import http.client
import logging
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import s3fs
from moto.server import ThreadedMotoServer

DECK = 20
FAULTS = ("error", "reset", "cut", "lie", "flip")
KEPT_OUT = {"connection", "transfer-encoding", "content-length", "date", "server"}


@dataclass
class Weather:
    """Shares of requests that go wrong, by kind (see FAULTS); how long an answer takes; what was seen so far."""

    faults: dict[str, float]
    latency_s: float = 0.0
    slow: float = 0.0  # share of requests that take slow_s longer
    slow_s: float = 0.0
    mib_per_s: float = 0.0  # of one connection; 0: unlimited
    only: str = ""  # of requests whose path holds this

    def __post_init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.deck: list[str] = []
        self.lock = threading.Lock()

    def saw(self, what: str, number: int = 1) -> None:
        with self.lock:
            self.seen[what] += number


CALM = Weather({})


class Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, backend: tuple[str, int], weather: Weather, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend, self.weather = backend, weather
        self._draw, self._lock = random.Random(seed), threading.Lock()

    def draw(self, path: str) -> tuple[str, float]:
        """(what goes wrong with this request or "", how long it takes): cards of a deck, which is shuffled anew when it is through."""
        weather = self.weather
        if weather.only not in path:
            return "", weather.latency_s
        with self._lock:
            if not weather.deck:
                weather.deck = [kind for kind, share in weather.faults.items() for _ in range(round(share * DECK))]
                weather.deck += [""] * (DECK - len(weather.deck))
                self._draw.shuffle(weather.deck)
            fault, slow = weather.deck.pop(), self._draw.random() < weather.slow
        return fault, weather.latency_s + (weather.slow_s if slow else 0.0)

    def place(self, size: int) -> int:
        with self._lock:
            return self._draw.randrange(size)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what this is about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: object) -> None: ...

    def _serve(self) -> None:
        fault, delay = self.server.draw(self.path)
        body = self._body()
        time.sleep(delay)
        weather = self.server.weather
        weather.saw(self.command)
        if fault == "error":
            weather.saw(fault)
            self._answer(random.choice((500, 503)), {"Content-Type": "application/xml"}, b"<Error><Code>InternalError</Code></Error>")
            return
        if fault == "reset":
            weather.saw(fault)
            self._reset()
            return
        connection = http.client.HTTPConnection(*self.server.backend, timeout=60)
        connection.request(self.command, self.path, body, {name: value for name, value in self.headers.items() if name.lower() != "expect"})
        reply = connection.getresponse()
        data = reply.read()
        connection.close()
        headers = {name: value for name, value in reply.getheaders() if name.lower() not in KEPT_OUT}
        length = int(reply.headers.get("Content-Length", len(data)))
        weather.saw("bytes", len(data))
        if weather.mib_per_s:
            time.sleep(len(data) / (weather.mib_per_s * 2**20))
        if self.command != "GET" or reply.status >= 300 or len(data) < 2:
            self._answer(reply.status, headers, data, length)
        elif fault == "cut":
            weather.saw(fault)
            self._answer(reply.status, headers, data[: len(data) // 2], length)
            self._reset()
        elif fault == "lie":
            weather.saw(fault)
            self._answer(reply.status, headers, data[: len(data) // 2])
        elif fault == "flip" and reply.headers.get("Content-Type", "") != "application/xml":
            weather.saw(fault)
            broken = bytearray(data)
            broken[self.server.place(len(data))] ^= 4
            headers = {name: value for name, value in headers.items() if not name.lower().startswith("x-amz-checksum")}
            self._answer(reply.status, headers, bytes(broken), length)
        else:
            self._answer(reply.status, headers, data, length)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                continue
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, headers: dict[str, str], data: bytes, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


@contextmanager
def s3_server(seed: int = 0) -> Iterator[Proxy]:
    """The proxy, calm at first, before a server with the bucket `bucket`; the environment names it meanwhile."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it reports every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port(), CALM, seed)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "key-of-the-test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    s3fs.S3FileSystem.clear_instance_cache()
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    connection = http.client.HTTPConnection(*proxy.backend)
    for method, path in (("POST", "/moto-api/reset"), ("PUT", "/bucket")):  # moto's objects outlive its server
        connection.request(method, path)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
    connection.close()
    try:
        yield proxy
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        proxy.shutdown()
        thread.join()
        proxy.server_close()
        server.stop()
