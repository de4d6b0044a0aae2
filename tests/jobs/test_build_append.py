"""data append: the old stays byte for byte, the new is whole or absent, and what reads a dataset reads the grown one."""

import ctypes
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
import ray

from jobs import append, build, validate
from jobs.build_shard import ShardTask, build_shard
from pipeline.errors import DatasetError, ManifestError
from pipeline.index import SPLIT_PREFIX, Dataset
from pipeline.manifest import Source
from pipeline.options import EncodeOptions, LimitOptions
from tests.pipeline.numbered import encode, read_number
from tests.pipeline.test_media import frames_of

ENCODE = EncodeOptions(gop=8)


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    yield
    ray.shutdown()


def make_videos(folder: Path, names: dict[str, int], **columns: dict[str, str]) -> Path:
    """Numbered videos of 6 frames, name -> first number; returns a label file beside them with class = subfolder."""
    lines = [",".join(["path", "label", *columns])]
    for name, first in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(6, first=first))
        lines.append(",".join([name, name.partition("/")[0], *(values[name] for values in columns.values())]))
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv"


OLD = {f"b{i % 2}/{i}.mp4": 10 * i for i in range(6)}
NEW = {"a/6.mp4": 60, "b1/7.mp4": 70, "c/8.mp4": 80, "c/9.mp4": 90}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Six videos of classes b0 and b1; the person of each is its class."""
    groups = {name: name[:2] for name in OLD}
    labels = make_videos(tmp_path / "old", OLD, group=groups)
    build.run(videos=tmp_path / "old", labels=labels, out=tmp_path / "data", encode=ENCODE, limits=LimitOptions(), num_cpus=2)
    return tmp_path / "data"


def shards_of(root: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (root / "shards").glob("*.tar")}


def numbers_in(root: Path, work: Path) -> dict[str, list[int]]:
    """Key -> the numbers in its frames, read where the index says."""
    dataset, found = Dataset.open(root), {}
    for row in range(len(dataset)):
        item = dataset.item(row)
        with (root / item.shard_file).open("rb") as file:
            file.seek(item.offset)
            (work / "one.mp4").write_bytes(file.read(item.size))
        found[item.key] = [read_number(frame) for frame in frames_of(work / "one.mp4")]
    return found


def test_old_stays_new_comes_and_again_is_nothing(old: Path, tmp_path: Path) -> None:
    before, was = shards_of(old), Dataset.open(old)
    labels = make_videos(tmp_path / "new", NEW, group={name: "b1" if name == "a/6.mp4" else "p" for name in NEW})
    done = append.run(videos=tmp_path / "new", labels=labels, out=old, num_cpus=2)
    after, dataset = shards_of(old), Dataset.open(old)
    assert {name: after[name] for name in before} == before
    assert dataset.info.classes == ["b0", "b1", "a", "c"]  # old ids stay, new ones behind
    assert (done.num_items, done.new_classes, dataset.info.num_items, dataset.info.num_frames) == (4, ["a", "c"], 10, 60)
    assert dataset.info.fingerprint != was.info.fingerprint
    assert dataset.table.slice(0, 6).equals(was.table)
    assert numbers_in(old, tmp_path) == {name[:-4]: list(range(first, first + 6)) for name, first in {**OLD, **NEW}.items()}
    codes = dict(zip(dataset.table.column("key").to_pylist(), dataset.column(SPLIT_PREFIX + "split").tolist(), strict=True))
    assert codes["a/6"] == codes["b1/1"]  # the same person
    assert validate.run(old) == []
    state = (old / "dataset.json").read_bytes()
    assert append.run(videos=tmp_path / "new", labels=labels, out=old, num_cpus=2).num_items == 0
    build.run(videos=tmp_path / "old", labels=tmp_path / "old" / "labels.csv", out=old, encode=ENCODE, limits=LimitOptions())
    assert (old / "dataset.json").read_bytes() == state
    assert not (old / "append").exists()


KILL = """
import os, sys
from pathlib import Path
from jobs import append, build_commit
from pipeline import durable
stage, out = sys.argv[1], Path(sys.argv[4])
original = durable.commit
def commit(temporary, path):
    if stage == "dataset.json" and path.name == stage:
        os._exit(9)
    original(temporary, path)
    if path.name == stage.removeprefix("after "):
        os._exit(9)
durable.commit = commit
append.build_shards = lambda tasks, num_cpus: [append_shard(task) for task in tasks]
from jobs.build_shard import build_shard, record_path
def append_shard(task):
    if not record_path(task.work, task.number).is_file():
        build_shard(task)
append.run(videos=Path(sys.argv[2]), labels=Path(sys.argv[3]), out=out)
"""


@pytest.mark.parametrize("stage", ["plan.json", "index-000001.arrow", "dataset.json", "after dataset.json"])
def test_killed_anywhere_it_is_the_old_or_the_new(old: Path, tmp_path: Path, stage: str) -> None:
    labels = make_videos(tmp_path / "new", NEW)
    make_videos(tmp_path / "other", {"b0/20.mp4": 200})
    was = Dataset.open(old).info
    arguments = [stage, str(tmp_path / "new"), str(labels), str(old)]
    assert subprocess.run([sys.executable, "-c", KILL, *arguments], check=False, capture_output=True).returncode == 9
    whole = stage.startswith("after")
    assert Dataset.open(old).info.num_items == (10 if whole else 6)
    assert (Dataset.open(old).info.fingerprint == was.fingerprint) != whole
    if not whole:
        with pytest.raises(DatasetError, match=r"videos: it has .*Finish that append by its own command"):
            append.run(videos=tmp_path / "other", labels=None, out=old, num_cpus=2)
    append.run(videos=tmp_path / "new", labels=labels, out=old, num_cpus=2)
    assert len(numbers_in(old, tmp_path)) == 10
    assert validate.run(old) == []
    assert not (old / "append").exists()


def test_what_is_refused_changes_nothing(old: Path, tmp_path: Path) -> None:
    state = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    make_videos(tmp_path / "same", {"b0/0.mp4": 500, "b0/30.mp4": 300})
    labels = make_videos(tmp_path / "split", {"b0/31.mp4": 300}, split1={"b0/31.mp4": "train"})
    for videos, label_file, text in [
        (tmp_path / "same", None, r"has 1 of these 2 videos already.*first b0/0\.mp4.*only the new ones"),
        (tmp_path / "split", labels, r"split columns split, the new videos split1\. Give a label file"),
        (tmp_path / "nowhere", None, "is not a folder"),
    ]:
        with pytest.raises(ManifestError, match=text):
            append.run(videos=videos, labels=label_file, out=old, num_cpus=2)
    with pytest.raises(DatasetError, match="no dataset"):
        append.run(videos=tmp_path / "same", labels=None, out=tmp_path / "nothing", num_cpus=2)
    assert not (tmp_path / "nothing").exists()
    (old / "shards" / "shard-000099.tar").write_bytes(b"mine")
    make_videos(tmp_path / "fine", {"b0/32.mp4": 300})
    with pytest.raises(DatasetError, match=r"does not list, first shard-000099\.tar"):
        append.run(videos=tmp_path / "fine", labels=None, out=old, num_cpus=2)
    (old / "shards" / "shard-000099.tar").unlink()
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file() and path.name != ".build.lock"} == {
        path: data for path, data in state.items() if path.name != ".build.lock"
    }


def test_two_appends_and_all_rejected(old: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        make_videos(tmp_path / f"n{number}", {f"b0/x{number}.mp4": 100 * number})
        assert append.run(videos=tmp_path / f"n{number}", labels=None, out=old, num_cpus=2).info.generation == number
    (tmp_path / "bad" / "b0").mkdir(parents=True)
    (tmp_path / "bad" / "b0" / "text.mp4").write_text("no video")
    done = append.run(videos=tmp_path / "bad", labels=None, out=old, num_cpus=2)
    assert (done.num_items, done.num_quarantined, done.info.num_quarantined) == (0, 1, 1)
    assert len(numbers_in(old, tmp_path)) == 8
    assert [path.name for path in sorted(old.glob("index*"))] == ["index-000002.arrow", "index-000003.arrow"]
    assert validate.run(old) == []


# ------------------------------------------------------------------------------------------------ what could not be read


def without_privilege() -> None:
    """In a child: not even root may read what the file's mode forbids (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH leave the bounding set)."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def command(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    arguments = ["data", "build", "--videos", str(tmp_path / "old"), "--out", str(tmp_path / "data")]
    return subprocess.run(
        [sys.executable, "-m", "jobs", *arguments], capture_output=True, text=True, check=False, preexec_fn=without_privilege
    )


def test_what_could_not_be_read_is_read_by_a_later_build(tmp_path: Path) -> None:
    make_videos(tmp_path / "old", OLD)
    locked = tmp_path / "old" / "b0" / "0.mp4"
    locked.chmod(0)
    for _ in range(2):  # the second time it still cannot be read, and nothing changes
        done = command(tmp_path)
        assert done.returncode == 0, done.stderr
        dataset = Dataset.open(tmp_path / "data")
        assert (len(dataset), dataset.info.generation, dataset.info.num_quarantined) == (5, 0, 1)
    row = pyarrow.parquet.read_table(tmp_path / "data" / "quarantine.parquet").to_pylist()[0]
    assert (row["path"], row["reason"]) == ("b0/0.mp4", "unreadable")
    before = shards_of(tmp_path / "data")
    locked.chmod(0o644)
    assert command(tmp_path).returncode == 0
    dataset = Dataset.open(tmp_path / "data")
    assert (len(dataset), dataset.info.generation, dataset.info.num_quarantined) == (6, 1, 0)
    after = shards_of(tmp_path / "data")
    assert {name: after[name] for name in before} == before
    assert numbers_in(tmp_path / "data", tmp_path)["b0/0"] == list(range(6))
    assert validate.run(tmp_path / "data") == []


def test_storage_that_fails_gets_more_chances(tmp_path: Path) -> None:
    # /proc/self/mem is a file whose reading fails with EIO; the link is turned to a video while the task waits to try again
    (tmp_path / "good").write_bytes(encode(6, first=40))
    (tmp_path / "work").mkdir()
    (tmp_path / "shards").mkdir()
    link = tmp_path / "one.mp4"
    link.symlink_to("/proc/self/mem")
    source = Source(key="one", path="one.mp4", label="a", splits=("train",), group="", size=1, start_s=None, end_s=None)
    task = ShardTask(
        number=0,
        videos=tmp_path,
        out=tmp_path,
        work=tmp_path / "work",
        sources=[source],
        labels=[0],
        codes=[[0]],
        split_columns=["split"],
        encode=ENCODE,
        limits=LimitOptions(),
    )
    turn = subprocess.Popen(["sh", "-c", f"sleep 1; ln -sfn {tmp_path / 'good'} {link}"])
    assert build_shard(task) == 0
    turn.wait()
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as tar:
        facts = tar.extractfile("one.json")
        assert facts is not None
        assert json.load(facts)["num_frames"] == 6
    assert os.path.islink(link)
