"""A page in a real headless browser, at the widths people have: what it asks of the network, what it breaks, what sticks out.

The page is served to the browser inside frames of the given widths, by a server of ours that also is the browser's proxy: whatever the page
asks of anyone is seen. The server sends a reporting Content-Security-Policy, so a script, or a load from anywhere, is reported even where
the page's own policy stops it. A script around the frames measures and sends the findings back. This needs no driver and no protocol,
so any browser does.
"""

import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "firefox", "firefox-esr")
DEADLINE_S = 90.0
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; report-uri /violation"
FIREFOX = {
    "network.proxy.type": 1, "network.proxy.http_port": 0, "network.proxy.ssl_port": 0, "network.proxy.http": "127.0.0.1",
    "network.proxy.ssl": "127.0.0.1", "network.proxy.allow_hijacking_localhost": False, "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False, "browser.shell.checkDefaultBrowser": False, "media.autoplay.default": 0,
    "app.normandy.enabled": False, "services.settings.server": "data:,", "datareporting.policy.dataSubmissionEnabled": False,
    "toolkit.telemetry.server": "data:,", "browser.safebrowsing.downloads.remote.enabled": False, "extensions.update.enabled": False,
}  # fmt: skip
HARNESS = """<!doctype html><meta charset="utf-8"><body style="margin:0">WIDTHS<script>
const pause = ms => new Promise(done => setTimeout(done, ms));
async function measure(frame) {
  const page = frame.contentDocument, width = frame.clientWidth;
  const videos = [...page.querySelectorAll("video")];
  for (let i = 0; i < 200 && videos.some(v => v.readyState < 2 && !v.error); i++) await pause(100);
  const inScroller = e => { for (let p = e.parentElement; p; p = p.parentElement)
    if (["auto", "scroll", "hidden", "clip"].includes(getComputedStyle(p).overflowX) && p !== page.body) return true; return false; };
  const texts = [...page.querySelectorAll("main *")].filter(
    e => !e.closest("svg") && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  const sizes = texts.map(e => parseFloat(getComputedStyle(e).fontSize));
  const svgs = [...page.querySelectorAll("svg text")].map(
    t => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.clientWidth / t.ownerSVGElement.viewBox.baseVal.width);
  const room = page.documentElement.clientWidth;
  return { width, room, content: page.documentElement.scrollWidth, title: page.title,
    outside: texts.filter(e => !inScroller(e) && e.getBoundingClientRect().right > room + 1).map(e => e.textContent.trim().slice(0, 60)),
    smallest: Math.min(...sizes, ...svgs), videos: videos.length,
    broken: videos.filter(v => v.readyState < 2 || v.error || !v.videoWidth).map(v => (v.error || {}).message || "state " + v.readyState),
    playing: videos.filter(v => !v.paused && v.currentTime > 0).length };
}
window.onload = async () => {
  let found;
  try { found = await Promise.all([...document.querySelectorAll("iframe")].map(measure)); } catch (error) { found = String(error); }
  await pause(300);  // what was violated is reported on the side
  await fetch("/found", { method: "POST", body: JSON.stringify(found) });
};
</script>"""


@dataclass(slots=True, kw_only=True)
class Findings:
    """frames: what the script measured, one mapping per width. foreign: requests other than ours. violations: of the policy."""

    frames: list[dict[str, object]] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


def find_browser() -> str:
    """A browser on PATH; skips the test, saying how to get one, where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser on PATH (looked for {', '.join(NAMES)}): apt-get install chromium")
    return found


def open_page(html: str, widths: Sequence[int], browser: str, *, violations: int = 0) -> Findings:
    """Opens a page in frames of `widths` pixels and returns what was found. violations: how many to wait for, which come on the side."""
    findings, done = Findings(), threading.Event()
    frames = "".join(f'<iframe src="/page" style="width:{width}px;height:900px;border:0;display:block"></iframe>' for width in widths)
    harness = HARNESS.replace("WIDTHS", frames)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/page":
                self._send(html, POLICY)
            elif self.path == "/":
                self._send(harness, None)
            else:
                self._foreign()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            if self.path == "/found":
                assert isinstance(json.loads(body), list), body
                findings.frames = json.loads(body)
            elif self.path == "/violation":
                report = json.loads(body)["csp-report"]
                findings.violations.append(f"{report['violated-directive']}: {report['blocked-uri']}")
            else:
                self._foreign()
            self._send("", None)
            if self.path == "/found":
                done.set()

        def do_CONNECT(self) -> None:
            self._foreign()

        def _foreign(self) -> None:
            if f"127.0.0.1:{server.server_port}/page" in self.headers.get("Referer", ""):  # browsers ask for things of their own, too
                findings.foreign.append(f"{self.command} {self.path}")
            self.send_error(404)

        def _send(self, text: str, policy: str | None) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Referrer-Policy", "unsafe-url")
            if policy:
                self.send_header("Content-Security-Policy-Report-Only", policy)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: object) -> None:
            """Tests are quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with _running(browser, server.server_port) as errors:
            assert done.wait(DEADLINE_S), f"{browser} did not report within {DEADLINE_S} s: {errors.read_text()[-2000:]}"
            give_up = time.monotonic() + 10
            while len(findings.violations) < violations and time.monotonic() < give_up:
                time.sleep(0.05)
    finally:
        server.shutdown()
        server.server_close()
    return findings


@contextmanager
def _running(browser: str, port: int) -> Iterator[Path]:
    """The browser at our server's page, with a profile of its own, until the block ends. Yields the file of what it complains of."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        errors = Path(folder) / "stderr"
        arguments = _firefox(Path(folder), port) if "firefox" in browser else _chromium(Path(folder), port)
        with errors.open("w") as file:
            process = subprocess.Popen([browser, *arguments, f"http://127.0.0.1:{port}/"], stdout=file, stderr=file)
            try:
                yield errors
            finally:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _chromium(profile: Path, port: int) -> list[str]:
    switches = ["headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "disable-extensions", "mute-audio"]
    switches += ["disable-background-networking", "disable-component-update", "disable-sync", "disable-default-apps"]
    switches += ["autoplay-policy=no-user-gesture-required", "window-size=1300,1900", f"user-data-dir={profile}"]
    return [f"--{switch}" for switch in [*switches, f"proxy-server=127.0.0.1:{port}"]]


def _firefox(profile: Path, port: int) -> list[str]:
    values = {name: port if name.endswith("_port") else value for name, value in FIREFOX.items()}
    (profile / "user.js").write_text("".join(f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in values.items()))
    return ["--headless", "--no-remote", "--profile", str(profile), "--width", "1300", "--height", "1900"]
