"""What users get wrong and machines do to them, through the real command line: one clear message, exit code 1, nothing half-written.

Each case prepares a folder and gives the command, what the message must say (what, where, the next step), and a folder that must be
as it was. Commands run in this process by the entry point that `posmlp` calls; those that need another process start one.
"""

import contextlib
import fcntl
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from cluster.lease import LOCK
from jobs import cli
from pipeline.index import Dataset
from pipeline.media import write_video
from pipeline.options import EncodeOptions
from tests.jobs.soak_train import RECIPE
from tests.pipeline.numbered import encode

STEPS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What cases work with: an empty folder, two videos of two classes, a dataset and a finished run; all of this test's own."""

    tmp: Path
    videos: Path
    dataset: Path
    run: Path

    def labels(self, text: str | bytes) -> Path:
        path = self.tmp / "labels.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def build(self, *more: str, out: str = "out") -> list[str]:
        return ["data", "build", "--videos", str(self.videos), "--out", str(self.tmp / out), *more]

    def build_labels(self, text: str | bytes, *more: str) -> list[str]:
        return self.build("--labels", str(self.labels(text)), *more)

    def train(self, *more: str, run: str | None = None) -> list[str]:
        recipe = self.tmp / "recipe.yaml"
        recipe.write_text(RECIPE)
        folder = self.run if run is None else self.tmp / run
        data = [] if any(each.startswith("data.dir=") for each in more) else [f"data.dir={self.dataset}"]
        return ["train", str(recipe), f"run.dir={folder}", *data, *TRAIN, *more]


TRAIN = ["launch.workers=1", f"train.steps={STEPS}", "checkpoint.every=3", "train.trace=false"]
Prepare = Callable[[World], list[str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, motion_dataset: Path) -> Path:
    """A finished run with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(RECIPE)
    command = ["train", str(folder / "recipe.yaml"), f"run.dir={folder / 'run'}", f"data.dir={motion_dataset}", *TRAIN]
    assert posmlp(command)[0] == 0
    return folder / "run"


@pytest.fixture
def world(tmp_path: Path, motion_dataset: Path, trained: Path) -> World:
    for name in ("a", "b"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        (tmp_path / "videos" / name / "1.mp4").write_bytes(encode(6))
    shutil.copytree(motion_dataset, tmp_path / "dataset")
    shutil.copytree(trained, tmp_path / "run")
    return World(tmp=tmp_path, videos=tmp_path / "videos", dataset=tmp_path / "dataset", run=tmp_path / "run")


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    ray.shutdown()


def posmlp(arguments: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a command, in this process."""
    from io import StringIO

    before, text = sys.argv, StringIO()
    sys.argv = ["posmlp", *arguments]
    try:
        with contextlib.redirect_stderr(text):
            cli.main()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    finally:
        sys.argv = before
    return code, text.getvalue()


def contents(root: Path) -> dict[str, bytes]:
    """Files below, except locks and logs of attempts, which say who tried."""
    skipped = {".build.lock", LOCK}
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in skipped and "logs" not in path.parts]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------------------ videos and labels

LABELS = {
    "no videos folder": (
        lambda world: ["data", "build", "--videos", str(world.tmp / "gone"), "--out", str(world.tmp / "out")],
        r"gone is not a folder\. data\.videos must name",
    ),
    "no path column": (lambda world: world.build_labels("file,label\na/1.mp4,x\n"), r"lacks the column path; it has file, label"),
    "missing files": (
        lambda world: world.build_labels("path,label\na/1.mp4,x\na/2.mp4,x\na/3.mp4,y\n"),
        r"2 of 3 videos are not in .*first a/2\.mp4, a/3\.mp4\. Add them, or set data\.allow_missing=true",
    ),
    "two labels": (
        lambda world: world.build_labels("path,label\na/1.mp4,x\nb/1.mp4,x\na/1.mp4,y\n"),
        r"a/1\.mp4 has two values of 'label': 'x' \(.*line 2\) and 'y' \(.*line 4\)\. Remove one",
    ),
    "binary labels": (lambda world: world.build_labels(bytes(range(256)) * 9), r"labels\.csv cannot be read.*Expected CSV in UTF-8"),
    "latin-1 labels": (lambda world: world.build_labels("path,label\na/1.mp4,Ü\n".encode("latin-1")), r"cannot be read.*CSV in UTF-8"),
    "ragged labels": (lambda world: world.build_labels("path,label\na/1.mp4,x,1\n"), r"line 2 has 3 fields, the header 2.*Expected CSV"),
    "empty labels": (lambda world: world.build_labels(""), r"lacks the column label and path; it has none"),
    "only a header": (lambda world: world.build_labels("path,label\n"), r"holds no video named by .*labels\.csv"),
    "no class named": (lambda world: world.build_labels("path,label\na/1.mp4,\n"), r"labels\.csv, line 2: a/1\.mp4 has an empty label"),
    "empty class folder": (
        lambda world: [(world.videos / "c").mkdir(), world.build()][1],  # type: ignore[func-returns-value]
        r"videos/c holds no video.*put videos into it, remove it, or give a label file",
    ),
    "a path that leaves": (lambda world: world.build_labels("path,label\n../x.mp4,x\n"), r"line 2: path '\.\./x\.mp4' must be relative"),
    "unknown key": (lambda world: world.build("encode.gob=8"), r"data\.encode\.gob: unknown key; did you mean 'data\.encode\.gop'"),
    "wrong type": (lambda world: world.build("encode.gop=often"), r"data\.encode\.gop: got 'often'.*integer"),
    "not a number that fits": (lambda world: world.build("encode.gop=0"), r"data\.encode\.gop: got 0, expected 1 to 1024"),
    "append to nothing": (
        lambda world: ["data", "append", "--videos", str(world.videos), "--out", str(world.tmp / "out")],
        r"out holds no dataset",
    ),
    "dry run of nothing": (lambda world: world.build_labels("path,label\n", "--dry-run"), r"holds no video named by"),
}


@pytest.mark.parametrize("name", LABELS)
def test_before_anything_is_built(world: World, name: str) -> None:
    prepare, expected = LABELS[name]
    code, text = posmlp(prepare(world))
    assert code == 1
    assert re.search(expected, text), text
    assert text.count("error:") == 1
    assert "Traceback" not in text
    assert not (world.tmp / "out").exists()


# ------------------------------------------------------------------------------------------------ training and its checkpoints


def with_splits(world: World, rows: dict[str, tuple[str, str]]) -> list[str]:
    """Builds a dataset of one-video items, path -> (class, split), and trains on it."""
    for path in rows:
        (world.tmp / "own" / path).parent.mkdir(parents=True, exist_ok=True)
        (world.tmp / "own" / path).write_bytes(encode(6))
    labels = world.labels("path,label,split\n" + "".join(f"{path},{label},{split}\n" for path, (label, split) in rows.items()))
    build = ["data", "build", "--videos", str(world.tmp / "own"), "--labels", str(labels), "--out", str(world.tmp / "own-data")]
    assert posmlp(build)[0] == 0
    return world.train(f"data.dir={world.tmp / 'own-data'}", run="new")


def appended(world: World) -> list[str]:
    command = ["data", "append", "--videos", str(world.tmp / "more"), "--out", str(world.dataset)]
    (world.tmp / "more" / "left").mkdir(parents=True)
    (world.tmp / "more" / "left" / "new.mp4").write_bytes(encode(6))
    assert posmlp(command)[0] == 0
    return world.train(f"train.steps={STEPS + 1}")


def other_version(world: World) -> list[str]:
    for manifest in (world.run / "checkpoints").glob("*/manifest.json"):
        facts = json.loads(manifest.read_text())
        facts["meta"]["version.order"] = 0
        manifest.write_text(json.dumps(facts))
    return world.train(f"train.steps={STEPS}")


def other_dataset_format(world: World) -> list[str]:
    facts = json.loads((world.dataset / "dataset.json").read_text())
    (world.dataset / "dataset.json").write_text(json.dumps({**facts, "version": 99}))
    return world.train()


def cut_shard(world: World) -> list[str]:
    shard = min((world.dataset / "shards").glob("*.tar"))
    os.truncate(shard, shard.stat().st_size // 2)
    return world.train(run="new")


TRAINING: dict[str, tuple[Prepare, str]] = {
    "two classes in train, three in val": (
        lambda world: with_splits(world, {"1.mp4": ("a", "train"), "2.mp4": ("b", "train"), "3.mp4": ("c", "val"), "4.mp4": ("a", "val")}),
        r"1 of 3 classes have no video in 'train' of 'split': 'c' \(1 in 'val'\)\. .*give 'train' some of their videos",
    ),
    "empty val split": (
        lambda world: with_splits(world, {"1.mp4": ("a", "train"), "2.mp4": ("b", "train")}),
        r"split column 'split' has \['train'\], not 'val'\. Set data\.train_split or data\.val_split",
    ),
    "empty train split": (
        lambda world: world.train("data.train_split=none", run="new"),
        r"split column 'split' has \['train', 'val'\], not 'none'\. Set",
    ),
    "unknown recipe key": (
        lambda world: world.train("train.epoch=3", run="new"),
        r"train\.epoch .*unknown key; did you mean 'train\.epochs'",
    ),
    "wrong type": (lambda world: world.train("train.global_batch=many", run="new"), r"train\.global_batch .*got 'many'.*integer"),
    "batch that does not divide": (
        lambda world: world.train("train.global_batch=9", run="new"),
        r"train\.global_batch .*got 9, expected a multiple of train\.micro_batch \(2\), for example 8",
    ),
    "workers that do not divide": (
        lambda world: world.train("launch.workers=3", run="new"),
        r"3 .*divi",
    ),
    "no such recipe": (lambda world: ["train", "demoo"], r"demoo: no such recipe file\. Did you mean the packaged recipe 'demo'"),
    "another recipe": (
        lambda world: world.train("optimizer.lr=0.01"),
        r"is of another run: its optimizer\.lr is 0\.002, this run's is 0\.01\. .*run\.dir",
    ),
    "another dataset": (appended, r"is of another run: its dataset is '\w{32}', this run's is '\w{32}'"),
    "another version": (other_version, r"version\.order is 0, this run's is \d"),
    "another dataset format": (other_dataset_format, r"format version 99, expected 1\. Rebuild, or install the version"),
    "a shard cut off": (cut_shard, r"\.tar is \d+ bytes long, expected \d+\. Run 'posmlp data validate"),
    "no dataset": (lambda world: world.train(f"data.dir={world.tmp / 'nothing'}", run="new"), r"nothing holds no dataset"),
    "a run folder that is none": (lambda world: ["eval", str(world.tmp / "videos")], r"is not a run folder.*Train first"),
}


@pytest.mark.parametrize("name", TRAINING)
def test_before_anything_is_trained(world: World, name: str) -> None:
    prepare, expected = TRAINING[name]
    command = prepare(world)
    before = contents(world.run)
    code, text = posmlp(command)
    assert code == 1, text
    assert re.search(expected, text), text
    assert text.count("error:") == 1
    assert "Traceback" not in text
    assert contents(world.run) == before
    assert not list((world.tmp / "new").glob("checkpoints/*"))


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir(), key=lambda path: path.name)


def test_a_flipped_byte_in_a_checkpoint(world: World) -> None:
    damaged = newest(world.run)
    file = max(damaged.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(bytes(data))
    code, text = posmlp(world.train())
    assert code == 0, text
    assert re.search(rf"warning: \S*{damaged.name} is damaged .*skipped for the one before", text), text
    again = newest(world.run)
    assert json.loads((again / "manifest.json").read_text())["step"] == STEPS
    assert again != damaged


def test_clock_set_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the future, and a clock that starts anew in 2001 and runs backwards: the order of attempts and checkpoints is in numbers."""
    last = newest(world.run)
    shutil.rmtree(last)
    future = time.time() + 10 * 365 * 86400
    for path in [*world.run.rglob("*"), *world.dataset.rglob("*")]:
        os.utime(path, (future, future))
    ticks = iter(range(1_000_000_000, 0, -10))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    code, text = posmlp(world.train())
    assert code == 0, text
    assert newest(world.run).name.split("-")[1] == f"{STEPS:08d}"
    events = [json.loads(line) for line in (world.run / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "attempt"] == [0, STEPS - 3]
    assert posmlp(["data", "validate", str(world.dataset)])[0] == 0
    out = world.build()
    assert posmlp(out)[0] == 0
    assert posmlp(out)[0] == 0


def test_two_drivers(world: World) -> None:
    (world.run / LOCK).write_text(json.dumps({"pid": 77, "host": "elsewhere", "start": 0}))
    before = contents(world.run)
    with (world.run / LOCK).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, text = posmlp(world.train(f"train.steps={STEPS + 3}"))
    assert code == 1
    assert re.search(r"run is in use by process 77 on elsewhere since .*Wait for it, stop it, or choose another run\.dir", text), text
    assert contents(world.run) == before


# ------------------------------------------------------------------------------------------------ shards


def rewritten(shard: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    """The same tar with other members, in a file of whatever size that has."""
    with tarfile.open(shard) as tar:
        members = [(member.name, file.read()) for member in tar if (file := tar.extractfile(member)) is not None]
    with tarfile.open(shard, "w") as tar:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            with contextlib.closing(__import__("io").BytesIO(data)) as file:
                tar.addfile(info, file)


def swapped(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    (first, one), (second, two) = [member for member in members if member[0].endswith(".mp4")][:2]
    return [(name, two if name == first else one if name == second else data) for name, data in members]


def altered(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(name, data[:-1] + bytes([data[-1] ^ 1]) if name.endswith(".mp4") else data) for name, data in members]


@pytest.mark.parametrize(
    ("change", "expected"),
    [(lambda members: members[:-1], r"member \.mp4: got missing, expected present"), (altered, "CRC-32 of the video"), (swapped, "CRC-32")],
    ids=["missing", "altered", "swapped"],
)
def test_members_of_a_tar(
    world: World, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = min((world.dataset / "shards").glob("*.tar"))
    rewritten(shard, change)
    code, _ = posmlp(["data", "validate", str(world.dataset)])
    text = capsys.readouterr().out
    assert code == 1
    assert re.search(expected, text), text
    assert re.search(r"\d+ problems found", text)


# ------------------------------------------------------------------------------------------------ disks


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip("nothing can be mounted here: run the tests as root of a container to test full and read-only disks")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def small(folder: Path, size_kib: int) -> contextlib.AbstractContextManager[None]:
    return mounted(folder, "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs")


def read_only(folder: Path) -> contextlib.AbstractContextManager[None]:
    return mounted(folder, "--bind", "-o", "ro", str(folder))


def filled(folder: Path, left_kib: int) -> Path:
    """A file that leaves so much of its file system."""
    filler = folder / "filler"
    space = os.statvfs(folder)
    filler.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - (left_kib << 10))))
    return filler


def test_full_disk_while_building(world: World) -> None:
    with small(world.tmp / "disk", 64):
        filler = filled(world.tmp / "disk", 8)
        command = world.build(out="disk/out")
        code, text = posmlp(command)
        assert code == 1
        assert re.search(r"disk of .*out is full .*run the same command again: finished shards are kept", text), text
        assert not (world.tmp / "disk" / "out" / "dataset.json").exists()
        filler.unlink()
        assert posmlp(command)[0] == 0
        assert len(Dataset.open(world.tmp / "disk" / "out")) == 2


def test_full_disk_while_saving(world: World) -> None:
    run = world.tmp / "disk" / "run"
    with small(world.tmp / "disk", 4096):
        shutil.copytree(world.run, run)
        shutil.rmtree(newest(run))  # so that there is something left to train
        filler = filled(world.tmp / "disk", 40)
        code, text = posmlp(world.train(run="disk/run"))
        assert code == 1
        assert re.search(
            r"checkpoint of step 6 could not be written .*No space left on device.*Free space .*the same command then resumes", text
        ), text
        assert text.count("error:") == 1
        assert "Traceback" not in text
        assert len(list((run / "checkpoints").glob("*/manifest.json"))) == 1
        filler.unlink()
        assert posmlp(world.train(run="disk/run"))[0] == 0
        assert len(list((run / "checkpoints").glob("*/manifest.json"))) == 2


def test_full_disk_while_reporting(world: World) -> None:
    with small(world.tmp / "disk", 8):
        filled(world.tmp / "disk", 4)
        code, text = posmlp(["report", str(world.run), "--out", str(world.tmp / "disk" / "report.html")])
        assert code == 1
        assert re.search(r"No space left on device.*Free some space and run the same command again", text), text
        assert "Traceback" not in text
        assert [path.name for path in (world.tmp / "disk").iterdir()] == ["filler"]


@pytest.mark.parametrize("what", ["build", "train", "report", "append"])
def test_read_only_output(world: World, what: str) -> None:
    (world.tmp / "disk").mkdir()
    commands = {
        "build": world.build(out="disk/out"),
        "train": world.train(run="disk/run"),
        "report": ["report", str(world.run), "--out", str(world.tmp / "disk" / "report.html")],
        "append": ["data", "append", "--videos", str(world.videos), "--out", str(world.dataset)],
    }
    folder = world.dataset if what == "append" else world.tmp / "disk"
    with read_only(folder):
        code, text = posmlp(commands[what])
    assert code == 1
    assert re.search(r"Read-only file system.*[Cc]hoose another", text), text
    assert text.count("error:") == 1
    assert "Traceback" not in text
    assert not list((world.tmp / "disk").iterdir())


# ------------------------------------------------------------------------------------------------ prediction


def predicted(world: World, name: str, make: Callable[[Path], object]) -> list[str]:
    make(world.tmp / name)
    return ["predict", str(world.run), str(world.tmp / name)]


def sound(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\0\0" * 8000)


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("text.mp4", lambda path: path.write_text("no video\n" * 50), r"no video"),
        ("sound.wav", sound, r"video"),
        ("gone.mp4", lambda path: None, r"gone\.mp4.*(no such|not there|missing|does not have)"),
    ],
)
def test_prediction_of_what_is_no_video(
    world: World, name: str, make: Callable[[Path], object], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = posmlp(predicted(world, name, make))
    shown = text + capsys.readouterr().out
    assert code == 1
    assert re.search(rf"{name}[\s\S]*{expected}|{expected}", shown), shown
    assert "Traceback" not in shown


def test_prediction_of_one_frame(world: World) -> None:
    picture = np.full((64, 64, 3), 90, np.uint8)
    code, text = posmlp(predicted(world, "one.mp4", lambda path: write_video(path, [picture], 25.0, EncodeOptions())))
    assert code == 1
    assert re.search(r"one\.mp4: it has 1 frame.*Give a video of 2 frames or more", text), text


# ------------------------------------------------------------------------------------------------ Ray

# Ports that others use are no error: `test_demo` builds, trains and evaluates while the usual ones are taken.


@pytest.mark.parametrize("listener", ["nothing", "a web server"])
def test_ray_address_without_ray(world: World, monkeypatch: pytest.MonkeyPatch, listener: str) -> None:
    ray.shutdown()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = http.server.HTTPServer(("127.0.0.1", port), http.server.BaseHTTPRequestHandler) if listener == "a web server" else None
    if server is not None:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    try:
        code, text = posmlp(world.build())
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
    assert code == 1
    assert re.search(rf"RAY_ADDRESS=127\.0\.0\.1:{port}: no Ray answers there.*correct RAY_ADDRESS, or unset it", text), text
    assert not (world.tmp / "out" / "dataset.json").exists()
