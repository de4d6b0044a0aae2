"""The viewer's door: who may come in, which page a path means, and byte ranges of videos.

Only the holder of the token comes in: it is in the address that the command prints, and then in a cookie. The Host header must name
this very server, so that no name which someone else points at 127.0.0.1 reaches it. What a client sends is matched with
fixed routes and turned into numbers and short texts; none of it ever becomes a path of the file system.
"""

import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Protocol
from urllib.parse import parse_qs, urlsplit

POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self' data:; media-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
MAX_FIELDS = 16
BLOCK = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is sent. seekable: a client may ask for a range of the body's bytes."""

    status: int = 200
    kind: str = "text/html; charset=utf-8"
    body: bytes = b""
    seekable: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


class Pages(Protocol):
    """What the door opens to."""

    def answer(self, path: str, query: Mapping[str, str]) -> Answer:
        """The answer to a GET of `path`, unquoted parts excluded; `query` has the first value of each field."""

    def refusal(self, status: int, text: str) -> Answer:
        """A page that says why not."""


class Server(ThreadingHTTPServer):
    """Listens on 127.0.0.1 alone. port: 0 takes a free one. Raises OSError when the port is taken."""

    daemon_threads = True
    block_on_close = False  # a browser keeps connections open; Ctrl-C must not wait for them

    def __init__(self, port: int, pages: Pages) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.pages = pages
        self.token = secrets.token_urlsafe(32)
        self.cookie = f"posmlp-view-{self.server_port}"  # browsers share cookies between the ports of a host
        self.hosts = {f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/?token={self.token}"


class Handler(BaseHTTPRequestHandler):
    """One connection. Answers GET and HEAD; http.server refuses the rest."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "posmlp", ""
    timeout = 60  # seconds of silence after which a connection is closed; browsers open another one

    def do_GET(self) -> None:
        try:
            self._send(self._answer())
        except (BrokenPipeError, ConnectionResetError, TimeoutError):  # the browser has what it wanted of a video
            self.close_connection = True

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def _answer(self) -> Answer:
        pages = self.server.pages
        if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
            return pages.refusal(403, "This server answers to 127.0.0.1 and localhost only.")
        parts = urlsplit(self.path if self.path.startswith("/") else "/")
        try:
            fields = parse_qs(parts.query, max_num_fields=MAX_FIELDS)
        except ValueError:
            return pages.refusal(400, f"The address has more than {MAX_FIELDS} fields.")
        query = {name: values[0] for name, values in fields.items()}
        token = query.pop("token", None)
        if token is not None and self._is_token(token):
            cookie = {"Set-Cookie": f"{self.server.cookie}={token}; Path=/; HttpOnly; SameSite=Strict"}
            if parts.path == "/" and not query:
                return Answer(status=303, headers={"Location": "/", **cookie})  # the token leaves the address bar
            answer = pages.answer(parts.path, query)
            return replace(answer, headers={**answer.headers, **cookie})
        if token is not None or not self._is_token(self._cookie()):
            return pages.refusal(403, "Open the address that 'posmlp data view' printed: it carries the token that lets you in.")
        return pages.answer(parts.path, query)

    def _cookie(self) -> str:
        try:
            found = SimpleCookie("; ".join(self.headers.get_all("Cookie", []))).get(self.server.cookie)
        except CookieError:
            return ""
        return found.value if found else ""

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "surrogateescape"), self.server.token.encode())

    def _send(self, answer: Answer) -> None:
        size = len(answer.body)
        begin, end, status = 0, size, answer.status
        headers = {"Content-Type": answer.kind, **HEADERS, **answer.headers}
        if answer.seekable:
            headers["Accept-Ranges"] = "bytes"
            wanted = byte_range(self.headers.get("Range"), size)
            if wanted is None:
                begin, end, status = 0, 0, 416
                headers["Content-Range"] = f"bytes */{size}"
            elif wanted != (0, size) or self.headers.get("Range"):
                (begin, end), status = wanted, 206
                headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(end - begin)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            body = memoryview(answer.body)
            for at in range(begin, end, BLOCK):
                self.wfile.write(body[at : min(at + BLOCK, end)])

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: an access log would show the token, and nobody reads it."""


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The half-open range of bytes that a Range header of one range asks for (RFC 9110, section 14.2); None: beyond the end.

    No header, other units, several ranges and what is malformed mean the whole.
    """
    found = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", header.strip()) if header else None
    if found is None or found.groups() == ("", ""):
        return 0, size
    first, last = found.groups()
    if not first:  # so many bytes at the end
        return (max(size - int(last), 0), size) if int(last) and size else None
    if int(first) >= size:
        return None
    if last and int(last) < int(first):
        return 0, size
    return int(first), min(int(last) + 1, size) if last else size
