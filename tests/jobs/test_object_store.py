"""From raw videos in an object store to a trained model, in bad weather and through kills: the same bytes, the same stream."""

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs import amend, append, build, coverage, info, leaks, validate
from jobs.build_folder import LOCK
from jobs.build_shard import build_shard
from jobs.cli import posmlp
from jobs.errors import JobError
from jobs.recipe import load_recipe, parse_overrides, parse_recipe
from jobs.run_folder import identity, open_dataset
from jobs.train_data import open_checked_data, open_worker_data
from pipeline.errors import DatasetError
from pipeline.index import Dataset, read_info
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.overlay import Kind
from pipeline.remote import RemoteFolder
from tests.jobs.soak_train import Run, trace
from tests.pipeline.numbered import Video, encode, number_image, write_dataset
from tests.pipeline.s3 import CALM, FAULTS, Proxy, Weather, s3_server
from tests.pipeline.test_pictures import png
from tests.pipeline.test_tar_source import write_tar

SECRET = b"secret-of-the-test"


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with s3_server(seed=7) as server:
        yield server


@pytest.fixture(scope="module")
def built(proxy: Proxy, motion_dataset: Path) -> str:
    """The dataset of `motion_dataset`, built from videos in the store into the store by a driver that is killed and started again."""
    url, videos = "s3://bucket/dataset", motion_dataset.parent / "videos"
    folder = RemoteFolder("s3://bucket/videos")
    for path in sorted(videos.rglob("*.mp4")):
        folder.upload(path, path.relative_to(videos).as_posix())
    proxy.weather = Weather({"error": 0.1, "reset": 0.05, "cut": 0.1})
    command = [sys.executable, "-m", "jobs", "data", "build", "--videos", "s3://bucket/videos", "--labels", str(videos / "labels.csv")]
    first = subprocess.Popen([*command, "--out", url], stderr=subprocess.PIPE, start_new_session=True)
    records = wait_for(first, proxy, "dataset/build/shard-")
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert records == 1, "the driver was killed with one of six shards finished"
    proxy.weather = Weather({"error": 0.1, "reset": 0.05, "cut": 0.1})
    done = subprocess.run([*command, "--out", url], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert proxy.weather.seen["error"]
    proxy.weather = CALM
    return url


def wait_for(driver: subprocess.Popen[bytes], proxy: Proxy, prefix: str) -> int:
    """Waits until the store lists something below `prefix`, asked behind the proxy's back; how many there are."""
    end = time.monotonic() + 120
    while driver.poll() is None and time.monotonic() < end:
        connection = http.client.HTTPConnection(*proxy.backend)
        connection.request("GET", f"/bucket?list-type=2&prefix={prefix}")
        found = connection.getresponse().read().count(b"<Key>")
        connection.close()
        if found:
            return found
        time.sleep(0.01)
    return 0


def test_a_killed_build_ends_byte_identical(built: str, motion_dataset: Path) -> None:
    folder = RemoteFolder(built)
    local = {path.relative_to(motion_dataset).as_posix(): path for path in motion_dataset.rglob("*") if path.is_file()}
    del local[".build.lock"]
    assert folder.sizes().keys() == local.keys()
    for name, path in local.items():
        assert folder.read_all(name, 1 << 30) == path.read_bytes(), name
        assert SECRET not in path.read_bytes()


def test_it_is_finished_and_another_is_refused(built: str, motion_dataset: Path, proxy: Proxy) -> None:
    labels = str(motion_dataset.parent / "videos" / "labels.csv")
    paths = {"videos": "s3://bucket/videos", "labels": labels, "dir": built}
    proxy.weather = weather = Weather({})
    assert build.build_dataset(parse_overrides({"data": paths}, [])).num_items == len(Dataset.open(motion_dataset))
    assert not weather.seen["PUT"]
    with pytest.raises(DatasetError, match=r"s3://bucket/dataset holds another dataset.*encode.gop: it has 32, asked for 5"):
        build.build_dataset(parse_overrides({"data": paths}, ["data.encode.gop=5"]))
    with pytest.raises(DatasetError, match="memory of one process"):
        build.build_dataset(parse_overrides({"data": {**paths, "dir": "memory://x/y"}}, []))


def test_it_is_seen_and_validated_where_it_is(built: str, motion_dataset: Path) -> None:
    card = info.run(built)
    assert {**card, "folder": "", "quarantine_list": ""} == {**info.run(motion_dataset), "folder": "", "quarantine_list": ""}
    assert validate.run(built) == []
    assert leaks.run(built) == leaks.run(motion_dataset)
    labels = motion_dataset.parent / "videos" / "labels.csv"
    assert {**coverage.run("s3://bucket/videos", labels), "folder": ""} == {**coverage.run(labels.parent, labels), "folder": ""}


def test_validation_finds_damage_in_the_store(motion_dataset: Path, proxy: Proxy, tmp_path: Path) -> None:
    folder = RemoteFolder("s3://bucket/damaged")
    for path in motion_dataset.rglob("*.*"):
        if path.suffix in (".tar", ".arrow", ".json", ".parquet"):
            folder.upload(path, path.relative_to(motion_dataset).as_posix())
    dataset = Dataset.open(motion_dataset)
    item = dataset.item(5)
    data = bytearray((motion_dataset / item.shard_file).read_bytes())
    data[item.offset + 7] ^= 1
    (tmp_path / "shard").write_bytes(data)
    folder.upload(tmp_path / "shard", item.shard_file)
    folder.upload(tmp_path / "shard", "shards/stranger.tar")
    folder.delete([dataset.info.shards[-1].file] if dataset.info.shards[-1].file != item.shard_file else [])
    found = {(problem.file, problem.what) for problem in validate.run("s3://bucket/damaged")}
    assert {(item.shard_file, "SHA-256"), (item.shard_file, "CRC-32 of the video"), ("shards/stranger.tar", "shard")} <= found
    assert (dataset.info.shards[-1].file, "file") in found
    with pytest.raises(DatasetError, match=r"s3://bucket/damaged/shards/.* is missing"):
        open_dataset(parse_overrides({"data": {"dir": "s3://bucket/damaged"}}, []), "train")


def small(root: Path, first: int = 0) -> Dataset:
    return write_dataset(root, [Video(data=bytes([first + row]) * 100, num_frames=1) for row in range(6)])


def uploaded(root: Path, url: str) -> str:
    folder = RemoteFolder(url)
    for path in root.rglob("*.*"):
        folder.upload(path, path.relative_to(root).as_posix())
    return url


def test_items_are_left_out_and_relabelled_at_the_url(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk: the same files, fingerprint and split; taken back, the dataset is as it was built."""
    monkeypatch.setenv("HOME", str(tmp_path))
    built = small(tmp_path / "dataset")
    url = uploaded(built.root, "s3://bucket/amended")
    for place in (built.root, url):
        amend.exclude(place, ["video-2", "video-3"], "blurred")
        amend.relabel(place, {"video-4": "c"})
    here, there = Dataset.open(built.root), Dataset.open(url)
    assert here.info.fingerprint == there.info.fingerprint != built.info.fingerprint
    assert [str(each) for each in there.overlay.files] == [str(each) for each in here.overlay.files]
    assert there.rows("split", "train").tolist() == [0, 1, 4, 5]
    assert there.item(4).label == 2
    with pytest.raises(DatasetError, match="s3://bucket/amended has no item 'nobody'"):
        amend.exclude(url, ["nobody"])
    undone = CliRunner().invoke(posmlp, ["data", "exclude", url, "--undo"])
    assert re.match(r"s3://bucket/amended: 2 items taken back \(overlays/000001-exclude-\w+\.arrow\); 6 items now", undone.output)
    amend.undo(url, Kind.RELABEL)
    assert Dataset.open(url).info.fingerprint == built.info.fingerprint
    with pytest.raises(JobError, match="has no exclude to take back"):
        amend.undo(url, Kind.EXCLUDE)


def here_or_there(place: Path | str) -> dict[str, bytes]:
    """Name -> bytes of a dataset's files."""
    if isinstance(place, str):
        folder = RemoteFolder(place)
        return {name: folder.read_all(name, 1 << 30) for name in folder.sizes()}
    files = [path for path in place.rglob("*") if path.is_file() and path.name != LOCK]
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", ["list", "tars"])
def test_every_kind_of_source_gives_the_same_bytes(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A list without extensions of videos, one in windows and one that is none, and of a picture; tars. Without Ray, for once."""
    monkeypatch.setattr(build, "build_shards", lambda tasks, num_cpus: [build_shard(task) for task in tasks])
    contents = {"x/1.mp4": encode(8), "x/2.mp4": encode(60, first=100), "bad.mp4": b"no video" * 99, "y/3.png": png(number_image(7))}
    videos, labels = tmp_path / "videos", None
    if kind == "tars":
        members = [(name.replace("/", "_"), data) for name, data in contents.items()]
        write_tar(videos / "train.tar", [each for name, data in members for each in ((name, data), (f"{name[:-4]}.cls", b"a"))])
    else:
        for name, data in contents.items():
            (videos / name).parent.mkdir(parents=True, exist_ok=True)
            (videos / name).write_bytes(data)
        labels = tmp_path / "labels.csv"
        labels.write_text("path,label,split\nx/1,a,train\nx/2,b,train\nbad,a,val\ny/3,b,val\n")
        uploaded(videos, "s3://bucket/kinds")
    ways: list[tuple[Path | str, Path | str]] = [(videos, tmp_path / "local"), (videos, f"s3://bucket/of-{kind}")]
    if kind == "list":
        ways += [("s3://bucket/kinds", tmp_path / "fetched"), ("s3://bucket/kinds", "s3://bucket/both")]
    for place, out in ways:
        build.run(videos=place, labels=labels, out=out, encode=EncodeOptions(gop=8, max_member_s=1.0), limits=LimitOptions())
    local = here_or_there(tmp_path / "local")
    info = read_info(tmp_path / "local")
    assert (info.num_items, info.num_quarantined) == (5, 1)  # 60 frames are three windows
    assert {"dataset.json", "index.arrow", "likeness.arrow", "quarantine.parquet", "shards/shard-000000.tar"} <= local.keys()
    for _, out in ways[1:]:
        assert here_or_there(out) == local


def test_what_a_recipe_mixes_may_lie_there(proxy: Proxy, tmp_path: Path) -> None:
    first, second = small(tmp_path / "first"), small(tmp_path / "second", 100)
    url, cache = uploaded(second.root, "s3://bucket/second"), f"loader.remote.cache_dir={tmp_path / 'cache'}"
    here, there = (
        parse_overrides({"data": {"dir": str(first.root), "mix": [{"dir": str(place)}]}}, [cache]) for place in (second.root, url)
    )
    found = open_checked_data(there)
    assert found.fingerprints == open_checked_data(here).fingerprints
    assert identity(there, found.dataset) == identity(here, found.dataset)
    assert [rows.tolist() for rows in found.rows] == [list(range(6)), list(range(6, 12))]
    assert found.source.item(7).key == "second:video-1"
    sent = parse_recipe(there.model_dump(mode="json"), where="the run's recipe")
    assert open_worker_data(sent, found.fingerprints).fingerprints == found.fingerprints
    with pytest.raises(DatasetError, match="s3://bucket/second was changed while"):
        open_worker_data(sent, [found.fingerprints[0], "another"])


def test_appending_at_a_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"s3://bucket/dataset cannot be appended to at its URL\. Append to a copy"):
        append.run(videos=tmp_path, labels=None, out="s3://bucket/dataset")


def test_training_from_the_store_is_training_from_the_disk(built: str, motion_dataset: Path, proxy: Proxy, tmp_path: Path) -> None:
    """Two ranks share the cache: keys, frames, crops, tensors and losses are those of the local dataset."""
    settings = ["train.steps=6", f"loader.remote.cache_dir={tmp_path / 'cache'}", "loader.remote.retries=12", "loader.slow_read_s=0.05"]
    local = Run(tmp_path / "local", motion_dataset, *settings)
    local.finish()
    proxy.weather = weather = Weather({"error": 0.1, "reset": 0.05, "cut": 0.1, "lie": 0.1, "flip": 0.05}, slow=0.2, slow_s=0.4)
    weather.only = "shards/"
    remote = Run(tmp_path / "remote", built, *settings)  # type: ignore[arg-type]
    remote.finish()
    proxy.weather = CALM
    assert sum(weather.seen[kind] for kind in FAULTS) >= 5
    assert trace(remote.dir) == trace(local.dir)
    assert load_recipe(str(remote.dir / "recipe.yaml")).data.dir == built
    files = [path for path in [*remote.dir.rglob("*"), *(tmp_path / "cache").rglob("*")] if path.is_file()]
    assert not [path for path in files if SECRET in path.read_bytes()]
    said = "".join(path.read_text() for path in (remote.dir / "logs").rglob("rank-*.log"))
    assert re.search(rf"rank [01] has waited 0\.\d s for video '\w+/\w+', byte \d+ of {built}/shards/shard-\d+\.tar", said), said[-500:]


def test_keyframes_in_the_store_are_those_on_a_disk(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_shards", lambda tasks, num_cpus: [build_shard(task) for task in tasks])
    proxy.weather = CALM
    videos, labels, url = tmp_path / "videos", tmp_path / "boxes.csv", "s3://bucket/boxes"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(encode(12))
    labels.write_text("path,frame,x1,y1,x2,y2,label\n" + "".join(f"a,{n},{n},0,90,60,{n % 2}\n" for n in range(14)))
    for out in (url, tmp_path / "local"):
        said = build.run(videos=videos, labels=labels, out=out, encode=EncodeOptions(), limits=LimitOptions())
        assert (said.num_items, said.num_quarantined) == (12, 2)
    local, stored = Dataset.open(tmp_path / "local"), Dataset.open(url)
    tables = [dataset.boxes() for dataset in (local, stored)]
    assert all(table is not None and len(table) == 12 for table in tables)
    folder = RemoteFolder(url)
    for name in folder.sizes():
        assert folder.read_all(name, 1 << 30) == (tmp_path / "local" / name).read_bytes(), name
    assert validate.run(url) == []
