"""data build: real Ray tasks, real children, real tars. What is killed, repeated, refused or full leaves a dataset whole or absent."""

import csv
import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
import ray
import webdataset

from cluster.tasks import run_tasks
from jobs import build, info, validate
from jobs.build_folder import LOCK
from jobs.build_shard import ShardTask
from pipeline.errors import DatasetError, ManifestError, PipelineError
from pipeline.index import Dataset, DatasetInfo
from pipeline.media import write_video
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import Reason
from tests.jobs.soak_build import soak
from tests.pipeline.numbered import encode, number_image, read_number
from tests.pipeline.test_media import frames_of

ENCODE = EncodeOptions(gop=8)


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 numbered videos of 10 + i frames, one cut off, one text, with labels that name a file that is not there."""
    folder = tmp_path_factory.mktemp("videos")
    rows = []
    for i in range(12):
        path = folder / f"class{i % 3}" / f"{i:02d}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(10 + i, first=100 * i))
        rows.append({"path": path.relative_to(folder).as_posix(), "label": f"class{i % 3}", "split": "val" if i % 4 == 0 else "train"})
    write_video(folder / "class0" / "cut.mp4", [number_image(i) for i in range(20)], 25.0, ENCODE)
    os.truncate(folder / "class0" / "cut.mp4", (folder / "class0" / "cut.mp4").stat().st_size * 2 // 3)
    (folder / "class1" / "text.mp4").write_text("no video")
    rows += [{"path": path, "label": path[:6], "split": "train"} for path in ("class0/cut.mp4", "class1/text.mp4", "class2/gone.mp4")]
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "split"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def make(videos: Path, out: Path, **changes: object) -> DatasetInfo:
    options: dict[str, object] = {"encode": ENCODE, "limits": LimitOptions(), "allow_missing": True, "labels": videos / "labels.csv"}
    return build.run(videos=videos, out=out, num_cpus=2, **{**options, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def built(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "dataset"
    make(videos, out)
    return out


def snapshot(root: Path) -> dict[str, tuple[int, int, bytes]]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_what_is_in(built: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(built)
    assert (len(dataset), dataset.info.num_quarantined, dataset.info.num_frames) == (12, 3, sum(range(10, 22)))
    assert dataset.info.classes == ["class0", "class1", "class2"]
    assert dataset.info.splits == {"split": ["train", "val"]}
    assert len(dataset.rows("split", "val")) == 3
    for row in range(len(dataset)):
        item = dataset.item(row)
        number = int(item.key[-2:])
        with (built / item.shard_file).open("rb") as file:
            file.seek(item.offset)
            (tmp_path / "video.mp4").write_bytes(file.read(item.size))
        assert [read_number(frame) for frame in frames_of(tmp_path / "video.mp4")] == list(range(100 * number, 100 * number + 10 + number))
        assert (item.num_frames, item.label, dataset.text("source", row)) == (10 + number, number % 3, f"{item.key}.mp4")
    assert sorted(path.name for path in built.iterdir()) == [
        ".build.lock", "dataset.json", "index.arrow", "likeness.arrow", "quarantine.parquet", "shards",
    ]  # fmt: skip


def test_what_is_out(built: Path) -> None:
    rows = {row["path"]: row for row in pyarrow.parquet.read_table(built / "quarantine.parquet").to_pylist()}
    assert {path: row["reason"] for path, row in rows.items()} == {
        "class0/cut.mp4": Reason.TRUNCATED.value,
        "class1/text.mp4": Reason.NOT_A_VIDEO.value,
        "class2/gone.mp4": Reason.MISSING.value,
    }
    assert rows["class0/cut.mp4"]["split"] == "train"
    assert all(row["explanation"] for row in rows.values())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files to the collector
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_webdataset_reads_the_shards(built: Path) -> None:
    shards = sorted(str(path) for path in (built / "shards").glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert {sample["__key__"]: int(sample["cls"]) for sample in samples} == {f"class{i % 3}/{i:02d}": i % 3 for i in range(12)}
    assert all(json.loads(sample["json"])["num_frames"] == 10 + int(sample["__key__"][-2:]) for sample in samples)


def test_again_is_nothing(built: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(built)
    monkeypatch.delattr(build, "build_shards")  # neither Ray nor a task is started
    make(videos, built)
    assert snapshot(built) == before


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"encode": EncodeOptions(gop=8, crf=30)}, ["encode.crf: it has 23, asked for 30"]),
        ({"seed": 5}, ["seed: it has 0, asked for 5"]),
        ({"labels": None}, ["videos: it has '14 items"]),
    ],
    ids=["encode", "seed", "labels"],
)
def test_another_request_is_refused(built: Path, videos: Path, changes: dict[str, object], parts: list[str]) -> None:
    before = snapshot(built)
    with pytest.raises(DatasetError) as caught:
        make(videos, built, **changes)
    assert all(part in str(caught.value) for part in [*parts, "data.dir"])
    assert snapshot(built) == before


def test_a_lost_shard_is_named(built: Path, videos: Path, tmp_path: Path) -> None:
    shard = built / Dataset.open(built).info.shards[0].file
    shard.rename(tmp_path / "away.tar")
    try:
        with pytest.raises(DatasetError, match=shard.name):
            make(videos, built)
    finally:
        (tmp_path / "away.tar").rename(shard)


def test_killed_builds_end_byte_identical(tmp_path: Path) -> None:
    """Two seeded kills; `make soak` runs many more."""
    from jobs.synthesize import synthesize

    synthesize(tmp_path / "videos", num_clips=24, seed=3)
    entries = soak(tmp_path / "videos", kills=2, seed=SOAK_SEED, wait_for_ray=False)
    assert any("over before" not in str(kill) for kill in entries[0]["kills"])  # type: ignore[attr-defined]


SOAK_SEED = 15  # a worker in the first shard, the driver in the second


def test_resumes_what_is_there_and_removes_leftovers(built: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "dataset"
    with monkeypatch.context() as patch:
        patch.setattr(build, "commit", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(videos, out)
    records = sorted((out / "build").glob("*.arrow"))
    assert len(records) == 3
    kept, lost = "shards/shard-000000.tar", "shards/shard-000001.tar"
    before = snapshot(out)
    records[1].unlink()  # as if killed between the tar and its record
    for leftover in ("shards/.shard-000002.tar.77-00.tmp", "build/.plan.json.77-00.tmp"):
        (out / leftover).write_bytes(b"half")
    (out / "build" / "tmp77").mkdir()
    with pytest.raises(DatasetError, match=r"limits\.cpu_s: it has 1800, asked for 7"):
        make(videos, out, limits=LimitOptions(cpu_s=7))
    make(videos, out)
    after, reference = snapshot(out), snapshot(built)
    assert after[kept] == before[kept]
    assert after[lost][:2] != before[lost][:2]
    assert {name: value[2] for name, value in after.items() if name != LOCK} == {
        name: value[2] for name, value in reference.items() if name != LOCK
    }


def test_a_dead_tasks_leftovers_go(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A task that dies is run again by Ray within the same build; what it had begun must not stay in a finished dataset.
    whole = build.build_shards

    def with_a_death(tasks: list[ShardTask], num_cpus: int | None) -> None:
        whole(tasks, num_cpus)
        (tasks[0].out / "shards" / ".shard-000001.tar.77-00.tmp").write_bytes(b"half")

    monkeypatch.setattr(build, "build_shards", with_a_death)
    make(videos, tmp_path / "dataset")
    assert not [path for path in (tmp_path / "dataset").rglob("*") if path.name.endswith(".tmp")]


def _interrupt(*_: object, **__: object) -> DatasetInfo:
    raise KeyboardInterrupt


def test_second_builder_is_refused(videos: Path, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("process 77 on elsewhere")
    with (tmp_path / LOCK).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(PipelineError, match=r"being built by process 77 on elsewhere.*data\.dir"):
            make(videos, tmp_path)


def test_nothing_usable(tmp_path: Path) -> None:
    (tmp_path / "videos" / "a").mkdir(parents=True)
    (tmp_path / "videos" / "a" / "1.mp4").write_text("no video")
    for _ in range(2):  # the second time from what the first one found
        with pytest.raises(DatasetError, match=r"None of the 1 videos.*a/1\.mp4: not_a_video"):
            build.run(videos=tmp_path / "videos", labels=None, out=tmp_path / "out", encode=ENCODE, limits=LimitOptions(), num_cpus=2)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_mistakes_touch_nothing(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="warp9"):
        make(videos, tmp_path / "out", encode=EncodeOptions(preset="warp9"))
    with pytest.raises(ManifestError, match=r"class2/gone\.mp4"):
        make(videos, tmp_path / "out", allow_missing=False)
    assert not (tmp_path / "out").exists()


def test_strange_shards_are_left_alone(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine.tar").write_bytes(b"mine")
    with pytest.raises(DatasetError, match=r"no known build, first mine\.tar"):
        make(videos, tmp_path)
    assert (tmp_path / "shards" / "mine.tar").read_bytes() == b"mine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here: run the tests as root of a container to test a full disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # on a busy machine a process that is ending may still hold it


def test_full_disk(videos: Path, small_disk: Path) -> None:
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(200_000))  # what is left holds a shard or two
    with pytest.raises(PipelineError, match=r"is full .*same command again"):
        make(videos, small_disk / "dataset")
    assert not (small_disk / "dataset" / "dataset.json").exists()
    filler.unlink()
    assert make(videos, small_disk / "dataset").num_items == 12


def _double(value: int) -> int:
    return 2 * value


def _fail_at_three(value: int) -> int:
    if value == 3:
        raise DatasetError("three")
    return value


def _die_once(folder: str) -> int:
    with (Path(folder) / "tries").open("a") as file:
        file.write("x")
    if (Path(folder) / "tries").stat().st_size == 1:
        os.kill(os.getpid(), 9)
    return (Path(folder) / "tries").stat().st_size


def test_tasks(tmp_path: Path) -> None:
    read = 0

    def arguments() -> Iterator[int]:
        nonlocal read
        for value in range(40):
            read += 1
            yield value

    results = run_tasks(_double, arguments(), num_cpus=2)
    first = next(results)
    assert read <= 8  # bounded: not all forty are submitted
    assert sorted([first, *results]) == [(value, 2 * value) for value in range(40)]
    with pytest.raises(DatasetError, match=r"^three$"):
        list(run_tasks(_fail_at_three, range(6), num_cpus=2))
    assert list(run_tasks(_die_once, [str(tmp_path)], num_cpus=2)) == [(str(tmp_path), 2)]


def test_card(built: Path) -> None:
    card = info.run(built)
    assert card["items"] == 12
    assert card["quarantined"] == {"truncated": 1, "not_a_video": 1, "missing": 1}
    assert card["classes"] == {"class0": 4, "class1": 4, "class2": 4}
    assert card["splits"] == {"split": {"train": 9, "val": 3}}
    json.dumps(card)
    info.show(card)
    assert validate.run(built) == []
