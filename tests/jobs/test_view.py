"""The viewer's door and what it opens to: who is let in, filters, ranges, damage, and that a tensor is the one that training gets."""

import hashlib
import http.client
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.recipe import Recipe, parse_overrides
from jobs.view_http import Server, byte_range
from jobs.view_items import PAGE, Filter, Items
from jobs.view_pages import DatasetPages
from jobs.view_tensor import Training, levels
from pipeline.index import Dataset
from pipeline.order import Order

SETTINGS = ["train.global_batch=4", "train.micro_batch=2", "train.steps=40", "augment.size=32", "clip.num_frames=4", "run.seed=3"]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse_overrides({}, SETTINGS)


@pytest.fixture(scope="module")
def damaged(motion_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose row 1 has a flipped bit."""
    root = tmp_path_factory.mktemp("damaged") / "dataset"
    shutil.copytree(motion_dataset, root)
    item = Dataset.open(root).item(1)
    with (root / item.shard_file).open("r+b") as file:
        file.seek(item.offset + item.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return root


@pytest.fixture(scope="module")
def server(damaged: Path, recipe: Recipe) -> Iterator[Server]:
    items = Items(damaged)
    with Server(0, DatasetPages(items, Training(recipe, items.dataset), "<b>name</b>")) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield running
        running.shutdown()
    items.close()


def get(server: Server, path: str, *, token: bool = True, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body. token: with the right cookie."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    cookie = {"Cookie": f"{server.cookie}={server.token}"} if token else {}
    connection.request("GET", path, headers={**cookie, **headers})
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_only_the_token_lets_in(server: Server) -> None:
    for path in (
        "/",
        "/item/0",
        "/video/0",
        "/seen/0/0/0",
        "/style.css",
        "/?token=",
        "/?token=wrong",
        f"/?token={server.token}x",
        "/?token=%ff",
    ):
        status, _, body = get(server, path, token=False)
        assert status == 403, path
        assert b"name" not in body.replace(b'name="', b"")  # not even what the dataset is called
    assert get(server, "/", token=False, Cookie=f"{server.cookie}={server.token[:-1]}")[0] == 403
    assert get(server, "/", token=False, Cookie="=;;\x01")[0] == 403
    status, headers, _ = get(server, f"/?token={server.token}", token=False)
    assert (status, headers["Location"]) == (303, "/")
    assert "HttpOnly" in headers["Set-Cookie"]
    assert "SameSite=Strict" in headers["Set-Cookie"]
    assert get(server, "/")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example", ""])
def test_another_host_is_refused(server: Server, host: str) -> None:
    assert get(server, f"/?token={server.token}", Host=host)[0] == 403
    assert get(server, "/", Host=f"localhost:{server.server_port}")[0] == 200


def test_it_listens_on_loopback_alone(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "path",
    ["/../dataset.json", "//etc/passwd", "/video/..%2f..%2fetc", "/video/-1", "/video/999999", "/item/1e3", "/frame/0/0/0/99",
     "/seen/40/0/0", "/seen/0/2/0", "/seen/0/0/2", "/style.css/", "/video/" + "9" * 400],
)  # fmt: skip
def test_what_is_no_page_is_not_found(server: Server, path: str) -> None:
    assert get(server, path)[0] == 404


@pytest.mark.parametrize(
    "query",
    [
        "class=99",
        "class=x",
        "split=split:9",
        "split=a",
        "page=-1",
        "q=" + "a" * 201,
        "&".join(f"{name}=1" for name in "abcdefghijklmnopqrs"),
    ],
)
def test_a_wrong_filter_says_so(server: Server, query: str) -> None:
    assert get(server, f"/?{query}")[0] == 400


def test_every_answer_carries_the_policy(server: Server) -> None:
    for path in ("/", "/out", "/item/0", "/video/0", "/video/1", "/x"):
        headers = get(server, path)[1]
        assert headers["Content-Security-Policy"].startswith("default-src 'none';")
        assert "script" not in headers["Content-Security-Policy"]
        assert headers["Referrer-Policy"] == "no-referrer"


def test_everything_is_escaped(server: Server) -> None:
    body = get(server, "/?q=%22%3E%3Cscript%3E")[2]
    assert b"<script" not in body
    assert b"<b>name</b>" not in body
    assert b"&lt;b&gt;name" in body


def test_filters_match_a_plain_search(motion_dataset: Path) -> None:
    items = Items(motion_dataset)
    dataset = items.dataset
    rows = range(len(items))
    labels, codes = dataset.column("label"), dataset.column("split:split")
    for label in (None, 0, 2):
        for code in (None, 0, 1, -1):
            for text in ("", "SCENE_00", ".", "%", "left"):
                split = None if code is None else ("split", code)
                expected = [
                    row
                    for row in rows
                    if (label is None or labels[row] == label)
                    and (code is None or codes[row] == code)
                    and any(text.lower() in dataset.text(name, row).lower() for name in ("key", "source"))
                ]
                num, found = items.page(Filter(label=label, split=split, text=text), 0)
                assert (num, found) == (len(expected), expected[:PAGE])
    assert items.page(Filter(), 10**12) == (len(items), [])
    items.close()


@pytest.mark.parametrize(
    ("header", "expected"),
    [(None, (0, 10)), ("bytes=0-", (0, 10)), ("bytes=2-3", (2, 4)), ("bytes=8-99", (8, 10)), ("bytes=-3", (7, 10)),
     ("bytes=-99", (0, 10)), ("bytes=10-", None), ("bytes=-0", None), ("bytes=3-2", (0, 10)), ("bytes=0-1,3-4", (0, 10)),
     ("bytes=-", (0, 10)), ("lines=1-2", (0, 10))],
)  # fmt: skip
def test_byte_ranges(header: str | None, expected: tuple[int, int] | None) -> None:
    assert byte_range(header, 10) == expected


def test_a_video_is_the_stored_bytes(server: Server, damaged: Path) -> None:
    item = Dataset.open(damaged).item(0)
    with (damaged / item.shard_file).open("rb") as file:
        file.seek(item.offset)
        stored = file.read(item.size)
    assert zlib.crc32(stored) == item.crc32
    status, headers, body = get(server, "/video/0")
    assert (status, headers["Content-Type"], body) == (200, "video/mp4", stored)
    status, headers, body = get(server, "/video/0", Range="bytes=100-199")
    assert (status, headers["Content-Range"], body) == (206, f"bytes 100-199/{item.size}", stored[100:200])
    assert get(server, "/video/0", Range=f"bytes={item.size}-")[0] == 416


def test_damage_is_shown_and_not_served(server: Server) -> None:
    status, _, body = get(server, "/video/1")
    assert (status, b"CRC-32" in body) == (500, True)
    assert b"stored bytes are damaged" in get(server, "/item/1")[2]
    assert get(server, "/")[2].count(b"damaged bytes") == 1


def test_what_is_not_in_is_listed(server: Server) -> None:
    body = get(server, "/out")[2].decode()
    reason = re.search(r'<option value="(\w+)">', body)
    assert reason
    assert get(server, f"/out?reason={reason[1]}")[2].count(b"<tr><td") == 1
    assert get(server, "/out?q=nothing-has-this-name")[2].count(b"<tr><td") == 0
    assert get(server, "/out?reason=x")[0] == 400


def test_where_an_item_is_used_is_where_the_order_shows_it(motion_dataset: Path, recipe: Recipe) -> None:
    dataset = Dataset.open(motion_dataset)
    for repeats in (1, 2):
        varied = recipe.model_copy(update={"augment": replace(recipe.augment, repeats=repeats)})
        training = Training(varied, dataset)
        order = Order(recipe.run.seed, len(training.rows))
        for row in range(len(dataset)):
            uses = training.uses(row, 1, 3)
            assert len(uses) == (3 if row in training.rows else 0)
            for use in uses:
                epoch, sample = order.locate(np.array([use.position]))
                assert (int(epoch[0]), training.rows[int(sample[0])]) == (use.epoch, row)
                micro_samples = 2 // repeats
                assert use.position == use.step * (4 // repeats) + use.micro * micro_samples + use.slot // repeats
                assert use.beyond == (use.step >= 40)


def test_the_tensor_is_the_one_that_training_gets(motion_dataset: Path) -> None:
    """Against a loader of one rank that runs whole steps with two threads, with every augmentation and with mixing."""
    from pipeline.loader import Loader
    from pipeline.requests import train_requests

    more = [
        "augment.randaugment={}",
        "augment.jitter={}",
        "augment.erase.probability=1.0",
        "augment.mix={}",
        "train.micro_batch=4",
        "train.global_batch=8",
    ]
    recipe = parse_overrides({}, [*SETTINGS, *more, "augment.repeats=2"])
    dataset = Dataset.open(motion_dataset)
    training = Training(recipe, dataset)
    requests = train_requests(
        dataset, training.rows, seed=3, global_batch=8, micro_batch=4, rank=0, world_size=1, start_step=5, end_step=7, clip=recipe.clip,
        augment=recipe.augment,
    )  # fmt: skip
    with Loader(
        dataset, requests, micro_batch=4, clip=recipe.clip, augment=recipe.augment, options=recipe.loader, threads=2, on_damage="substitute"
    ) as loader:
        for batch in loader:
            seen = training.seen(batch.step, batch.micro)
            assert seen.digest == hashlib.sha256(batch.clips.numpy().tobytes()).hexdigest()
            assert [slot.key for slot in seen.slots] == batch.keys
            assert np.array_equal(seen.levels, levels(batch.clips.numpy(), recipe.augment))
            assert max(len(slot.target) for slot in seen.slots) == 2


def test_frames_are_pictures_of_the_tensor(server: Server, damaged: Path, recipe: Recipe) -> None:
    import io

    import av

    seen = Training(recipe, Dataset.open(damaged)).seen(1, 1)
    status, headers, body = get(server, "/frame/1/1/1/2")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    with av.open(io.BytesIO(body)) as container:
        shown = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(shown, seen.levels[1, 2])


def test_a_substitute_is_named(server: Server, damaged: Path, recipe: Recipe) -> None:
    training = Training(recipe, Dataset.open(damaged))
    row = 1
    if row not in training.rows:
        pytest.fail("the damaged row must be of the train split: choose another one")
    use = training.uses(row, 0, 1)[0]
    body = get(server, f"/seen/{use.step}/{use.micro}/{use.slot}")[2].decode()
    assert "CRC-32" in body
    assert "takes its place" in body


def test_ctrl_c_ends_it(motion_dataset: Path) -> None:
    command = [sys.executable, "-m", "jobs", "data", "view", str(motion_dataset)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{43}\n", process.stdout.readline())
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0
        assert errors.strip() == "ended"
        assert time.monotonic() - began < 5
