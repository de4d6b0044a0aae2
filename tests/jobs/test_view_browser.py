"""The viewer in a real headless browser: a script around it filters, plays a clip and looks at a tensor, as a person would.

The browser sees the viewer through a server of the test, which holds the script's page, hands everything else on to the viewer, and is
the browser's proxy, so that whatever is asked of anyone else is seen. On the way it lets the page be framed, and has violations of the
viewer's policy reported.
"""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs.recipe import parse_overrides
from jobs.view_http import Server
from jobs.view_items import Items
from jobs.view_pages import DatasetPages
from jobs.view_tensor import Training
from pipeline.index import Dataset
from tests.jobs.browser import DEADLINE_S, _running, find_browser

SETTINGS = ["train.global_batch=4", "train.micro_batch=2", "train.steps=40", "augment.size=32", "clip.num_frames=4"]
SCRIPT = """<!doctype html><meta charset="utf-8"><iframe id="f" style="width:WIDTHpx;height:900px;border:0"></iframe><script>
const frame = document.getElementById("f"), found = {};
const pause = ms => new Promise(done => setTimeout(done, ms));
const page = () => frame.contentDocument;
async function until(what, name) { for (let i = 0; i < 300; i++) { if (what()) return; await pause(100); }
  throw new Error("waited for " + name); }
function go(act) { return new Promise(done => { frame.onload = () => done(); act(); }); }
const wide = () => page().documentElement.scrollWidth > page().documentElement.clientWidth;
const videos = () => [...page().querySelectorAll("video")];
async function run() {
  await go(() => { frame.src = "/?token=TOKEN"; });
  found.address = frame.contentWindow.location.href;
  found.styled = getComputedStyle(page().querySelector("main")).maxWidth;
  await until(() => videos().every(v => v.readyState >= 1 || v.error), "the videos of the list");
  found.listed = videos().length; found.broken = videos().filter(v => v.error || !v.videoWidth).length; found.wide = [wide()];
  const form = page().getElementById("filter");
  form.elements["class"].value = "LABEL"; form.elements["q"].value = "SCENE";
  await go(() => form.requestSubmit());
  found.filtered = [...page().querySelectorAll("article")].map(a => Number(a.dataset.row)); found.wide.push(wide());
  await go(() => { frame.src = "/item/ROW"; });
  const video = videos()[0];
  await video.play();
  await until(() => video.currentTime > 0.1 && video.readyState >= 2, "the clip to play");
  found.played = [video.videoWidth, video.videoHeight, video.error ? video.error.message : "", video.duration];
  video.pause(); video.currentTime = video.duration / 2;
  await until(() => !video.seeking, "the clip to seek"); found.wide.push(wide());
  const link = page().querySelector("#uses a");
  found.link = link.getAttribute("href");
  await go(() => link.click());
  const pictures = () => [...page().querySelectorAll(".strip img")];
  await until(() => pictures().every(p => p.complete), "the pictures");
  found.pictures = pictures().map(p => [p.naturalWidth, p.naturalHeight]);
  found.digest = page().getElementById("digest").textContent; found.wide.push(wide());
  await go(() => { frame.src = "/out"; });
  found.reasons = page().querySelectorAll("tbody tr").length; found.wide.push(wide());
}
window.onload = async () => {
  try { await run(); } catch (error) { found.failed = String(error); }
  await pause(300);
  await fetch("/found", { method: "POST", body: JSON.stringify(found) });
};
</script>"""


@dataclass(slots=True, kw_only=True)
class Findings:
    """result: of the script. foreign: requests for others than the viewer. violations: of the viewer's policy."""

    result: dict[str, object] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


def drive(viewer: Server, script: str, browser: str) -> Findings:
    findings, done = Findings(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/script":
                self._send(200, {"Content-Type": "text/html; charset=utf-8"}, script.encode())
            elif self.path == "/":
                self._send(*self._asked()) if self.headers.get("Cookie") else self._send(303, {"Location": "/script"}, b"")
            elif self.path.startswith("/"):
                self._send(*self._asked())
            else:
                self._foreign()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            if self.path == "/found":
                findings.result = json.loads(body)
            elif self.path == "/violation":
                findings.violations.append(body)
            else:
                self._foreign()
            self._send(200, {}, b"")
            if self.path == "/found":
                done.set()

        def do_CONNECT(self) -> None:
            self._foreign()

        def _asked(self) -> tuple[int, dict[str, str], bytes]:
            """The viewer's answer."""
            connection = http.client.HTTPConnection("127.0.0.1", viewer.server_port, timeout=60)
            kept = {name: value for name, value in self.headers.items() if name in ("Cookie", "Range")}
            connection.request("GET", self.path, headers=kept)
            answer = connection.getresponse()
            headers, body = dict(answer.getheaders()), answer.read()
            connection.close()
            policy = headers["Content-Security-Policy"].replace("frame-ancestors 'none'", "frame-ancestors 'self'")
            headers["Content-Security-Policy"] = policy + "; report-uri /violation"
            return answer.status, headers, body

        def _foreign(self) -> None:
            if f"127.0.0.1:{server.server_port}" in self.headers.get("Referer", ""):  # browsers ask for things of their own, too
                findings.foreign.append(f"{self.command} {self.path}")
            self.send_error(404)

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name not in ("Server", "Date", "Content-Length"):
                    self.send_header(name, "unsafe-url" if name == "Referrer-Policy" else value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Tests are quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with _running(browser, server.server_port) as errors:
            assert done.wait(DEADLINE_S), f"{browser} did not report within {DEADLINE_S} s: {errors.read_text()[-2000:]}"
    finally:
        server.shutdown()
        server.server_close()
    return findings


@contextmanager
def viewing(root: Path) -> Iterator[tuple[Server, Training]]:
    items = Items(root)
    training = Training(parse_overrides({}, SETTINGS), items.dataset)
    with Server(0, DatasetPages(items, training, root.name)) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server, training
        server.shutdown()
    items.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_filter_play_and_inspect(motion_dataset: Path, width: int) -> None:
    browser, dataset = find_browser(), Dataset.open(motion_dataset)
    with viewing(motion_dataset) as (server, training):
        row = int(training.rows[0])
        label = dataset.item(row).label
        values = {"WIDTH": width, "TOKEN": server.token, "LABEL": label, "ROW": row}
        script = SCRIPT
        for name, value in values.items():
            script = script.replace(name, str(value))
        found = drive(server, script, browser)
        use = training.uses(row, 0, 1)[0]
        digest = training.seen(use.step, use.micro).digest
    result = found.result
    assert "failed" not in result, result
    assert str(result["address"]).endswith("/")  # the token has left the address bar
    assert result["styled"] == "1160px"
    assert (result["listed"], result["broken"]) == (min(len(dataset), 24), 0)
    assert result["filtered"] == [each for each in range(len(dataset)) if dataset.item(each).label == label]
    item = dataset.item(row)
    assert result["played"] == [item.width, item.height, "", pytest.approx(item.num_frames / item.fps, abs=0.1)]
    assert result["link"] == f"/seen/{use.step}/{use.micro}/{use.slot}"
    assert result["pictures"] == [[32, 32]] * 4
    assert result["digest"] == digest
    assert result["reasons"] == dataset.info.num_quarantined
    assert result["wide"] == [False] * 5, "no page may scroll sideways"
    assert found.foreign == []
    assert found.violations == []
