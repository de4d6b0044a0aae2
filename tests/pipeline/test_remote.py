"""Datasets in an object store: a real S3 protocol in bad weather gives the stream of a local dataset, and nothing corrupt is kept."""

import hashlib
import json
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import s3fs

from pipeline import duplicates, overlay
from pipeline.cache import CacheFolder
from pipeline.durable import sha256_of
from pipeline.errors import ChecksumError, DatasetError, PipelineError, SampleError, StorageError
from pipeline.index import Dataset, Item, read_info
from pipeline.loader import Batch, Loader
from pipeline.location import location
from pipeline.mixture import Mixture
from pipeline.options import AugmentOptions, ClipOptions, LoaderOptions, RemoteOptions
from pipeline.overlay import Kind
from pipeline.reader import RemoteReader, open_reader
from pipeline.remote import RemoteFolder
from pipeline.requests import train_requests
from pipeline.watchdog import Watchdog
from tests.pipeline.numbered import Video, encode, flip_byte, write_dataset
from tests.pipeline.s3 import CALM, FAULTS, Proxy, Weather, s3_server

CLIP, AUGMENT = ClipOptions(num_frames=4, stride=2), AugmentOptions(size=32)
CONTENT = [bytes([row]) * (3000 + row) for row in range(12)]


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with s3_server(seed=4) as server:
        yield server


@pytest.fixture(autouse=True)
def calm(proxy: Proxy) -> Iterator[None]:
    yield
    proxy.weather = CALM


@pytest.fixture(scope="module")
def videos(proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Twelve small videos in three shards, here and in the store."""
    dataset = write_dataset(
        tmp_path_factory.mktemp("remote") / "d", [Video(data=encode(12, first=100 * i), num_frames=12) for i in range(12)]
    )
    copy(dataset.root, "s3://bucket/videos")
    return dataset


@pytest.fixture
def plain(tmp_path: Path) -> Dataset:
    """Twelve items that are not videos, here only."""
    return write_dataset(tmp_path / "plain", [Video(data=data, num_frames=1) for data in CONTENT])


def copy(root: Path, url: str) -> str:
    folder = RemoteFolder(url)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            folder.upload(path, path.relative_to(root).as_posix())
    return url


def options(tmp_path: Path, **change: object) -> RemoteOptions:
    values: dict = {"cache_dir": str(tmp_path / "cache"), "retries": 12, "timeout_s": 5.0, "requests": 8}
    return RemoteOptions(**{**values, **change})


def stream(dataset: Dataset | Mixture, remote: RemoteOptions) -> list[tuple[object, ...]]:
    rows = [dataset.rows("split", "train")] if isinstance(dataset, Dataset) else [dataset.rows(part, "split", "train") for part in (0, 1)]
    sizes = {"global_batch": 8, "micro_batch": 4, "rank": 0, "world_size": 1, "start_step": 0, "end_step": 4}
    requests = train_requests(dataset, rows, weights=[2, 1][: len(rows)], seed=5, **sizes, clip=CLIP, augment=AUGMENT)
    loading = LoaderOptions(prefetch_mib=64, remote=remote)
    with Loader(dataset, requests, micro_batch=4, clip=CLIP, augment=AUGMENT, options=loading, threads=2, on_damage="substitute") as loader:
        return [digest(batch) for batch in loader]


def digest(batch: Batch) -> tuple[object, ...]:
    frames = json.dumps([one.as_lists() for one in batch.parameters])
    return batch.step, batch.micro, batch.keys, frames, batch.damaged, hashlib.sha256(batch.clips.numpy().tobytes()).hexdigest()


def kept(dataset: Dataset) -> dict[int, bytes]:
    """Row -> what the cache has of it."""
    items = [dataset.item(row) for row in range(len(dataset))]
    rows = {(Path(item.shard_file).stem, str(item.offset)): item.row for item in items}
    return {rows[path.parent.name, path.name]: path.read_bytes() for path in dataset.root.glob("items/*/*")}


def test_the_stream_in_bad_weather_is_the_local_one(proxy: Proxy, videos: Dataset, tmp_path: Path) -> None:
    proxy.weather = weather = Weather(dict.fromkeys(FAULTS, 0.1), slow=0.2, slow_s=0.05)
    remote = options(tmp_path)
    dataset = Dataset.open("s3://bucket/videos", remote)
    assert stream(dataset, remote) == stream(videos, remote)
    for place in range(4):  # the same again with an empty cache, until every kind was met
        if all(weather.seen[kind] for kind in FAULTS):
            break
        remote = options(tmp_path / str(place))
        dataset = Dataset.open("s3://bucket/videos", remote)
        assert stream(dataset, remote) == stream(videos, remote)
    assert all(weather.seen[kind] for kind in FAULTS), weather.seen
    found = kept(dataset)
    assert sorted(found) == list(range(12))  # two and a half epochs
    assert {row: zlib.crc32(data) for row, data in found.items()} == {row: dataset.item(row).crc32 for row in range(12)}
    proxy.weather = weather = Weather({"error": 1.0}, only="shards")  # what is in the cache needs no store
    assert stream(dataset, remote) == stream(videos, remote)
    assert not weather.seen["error"]


def test_what_is_corrupt_in_the_cache_is_fetched_again(proxy: Proxy, videos: Dataset, tmp_path: Path) -> None:
    dataset = Dataset.open("s3://bucket/videos", options(tmp_path))
    path = dataset.root / "items" / "000000" / str(dataset.item(3).offset)
    with open_reader(dataset) as reader:
        good = reader.read(dataset.item(3))
        for bad in (b"", good[:100], good[:-1] + b"\0", good + b"\0"):
            path.write_bytes(bad)
            assert reader.read(dataset.item(3)) == good
            assert path.read_bytes() == good


def test_damage_in_the_store_is_damage(proxy: Proxy, plain: Dataset, tmp_path: Path) -> None:
    flip_byte(plain, 3)
    url = copy(plain.root, "s3://bucket/damaged")
    dataset = Dataset.open(url, options(tmp_path))
    proxy.weather = weather = Weather({})
    with open_reader(dataset) as reader:
        with pytest.raises(ChecksumError, match=r"CRC-32 .* 'video-3' in shards/000000.tar"):
            reader.read(dataset.item(3))
        assert weather.seen["GET"] == 2  # fetched once more, not for ever
        beyond = replace(dataset.item(11), offset=dataset.info.shards[2].size - 10)
        with pytest.raises(ChecksumError, match="ends at byte"):
            reader.read(beyond)
        with pytest.raises(SampleError, match=r"no such object .*video-0"):
            reader.read(replace(dataset.item(0), shard_file="shards/none.tar"))
        with pytest.raises(DatasetError, match="outside"):
            reader.read(replace(dataset.item(0), shard_file="../x.tar"))
    assert kept(dataset) == {}


def test_a_store_that_stays_away_is_no_damage(proxy: Proxy, videos: Dataset, tmp_path: Path) -> None:
    """The run ends with an error that says what and where, instead of going on with other samples."""
    remote = options(tmp_path, retries=1)
    dataset = Dataset.open("s3://bucket/videos", remote)
    proxy.weather = Weather({"error": 1.0})
    with pytest.raises(StorageError, match=r"s3://bucket/videos/shards/0.*tar: reading bytes .* failed 2 times .*'video-\d+'"):
        stream(dataset, remote)


def test_closing_does_not_wait_for_more_attempts(proxy: Proxy, videos: Dataset, tmp_path: Path) -> None:
    remote = options(tmp_path, retries=100)
    dataset = Dataset.open("s3://bucket/videos", remote)
    proxy.weather = Weather({"error": 1.0})
    reader = RemoteReader(dataset.origin)  # type: ignore[arg-type]
    ended = threading.Event()

    def read() -> None:
        with pytest.raises(StorageError):
            reader.read(dataset.item(0))
        ended.set()

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.3)
    reader.close()
    assert ended.wait(5)
    thread.join()


def test_the_index_is_fetched_once_and_never_half(proxy: Proxy, plain: Dataset, tmp_path: Path) -> None:
    url, remote = copy(plain.root, "s3://bucket/index"), options(tmp_path)
    proxy.weather = weather = Weather({}, latency_s=0.02)
    opened: list[Dataset] = []
    threads = [threading.Thread(target=lambda: opened.append(Dataset.open(url, remote))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    first = weather.seen["GET"]
    for _ in range(4):
        Dataset.open(url, remote)
    assert weather.seen["GET"] - first == first - 1  # dataset.json and a listing each, the index once
    index = opened[0].root / "index.arrow"
    assert not list(index.parent.glob("*.part"))
    index.write_bytes(index.read_bytes()[:-1])  # as no version of ours leaves it
    assert len(Dataset.open(url, remote)) == 12
    RemoteFolder(url).delete(["index.arrow"])
    assert len(Dataset.open(url, remote)) == 12
    with pytest.raises(DatasetError, match=r"index\.arrow is missing"):
        Dataset.open(url, options(tmp_path / "other"))
    (plain.root / "index.arrow").write_bytes(bytes(plain.info.index_size))
    RemoteFolder(url).upload(plain.root / "index.arrow", "index.arrow")
    with pytest.raises(DatasetError, match="not the one of its"):
        Dataset.open(url, options(tmp_path / "third"))
    assert not list((tmp_path / "third").rglob("*.arrow"))


def test_overlays_at_a_url_are_applied(proxy: Proxy, plain: Dataset, tmp_path: Path) -> None:
    """Also where some of their bytes came wrong; what is wrong in the store is refused."""
    rows, labels = np.array([2, 7], dtype=np.uint32), np.array([0, 0], dtype=np.int32)
    keys = plain.table.column("key").take(rows).combine_chunks()
    overlay.write_file(plain.folder, Kind.RELABEL, 2, rows, keys, labels, "")
    overlay.write_file(plain.folder, Kind.EXCLUDE, 1, rows[:1], keys[:1], None, "blurred")
    local, url = Dataset.open(plain.root), copy(plain.root, "s3://bucket/overlays")
    proxy.weather = weather = Weather({}, only="/overlays/0")
    weather.deck = ["flip", ""] * 3  # each other request, from the end
    weather.deck.reverse()
    opened = [Dataset.open(url, options(tmp_path)) for _ in range(3)]
    assert weather.seen["flip"] == 3
    for dataset in opened:
        assert dataset.info.fingerprint == local.info.fingerprint != plain.info.fingerprint
        assert dataset.rows("split", "train").tolist() == [row for row in range(12) if row != 2]
        assert dataset.column("label").tolist() == local.column("label").tolist()
    proxy.weather = CALM
    [name] = [name for name in opened[0].folder.sizes(overlay.FOLDER) if "exclude" in name]
    (tmp_path / "other").write_bytes(b"other")
    RemoteFolder(url).upload(tmp_path / "other", name)
    with pytest.raises(DatasetError, match=rf"{url}/{name} was altered"):
        Dataset.open(url, options(tmp_path))
    assert Dataset.open(url, options(tmp_path), overlays=False).info.fingerprint == plain.info.fingerprint


def test_digests_are_fetched_when_they_are_asked_for(proxy: Proxy, plain: Dataset, tmp_path: Path) -> None:
    assert plain.likeness() is None
    table = pa.table([pa.array([None] * 12, field.type) for field in duplicates.COLUMNS], schema=pa.schema(duplicates.COLUMNS))
    with (plain.root / plain.info.likeness_file).open("wb") as file:
        duplicates.write_table(file, [table])
    info = replace(plain.info, likeness_sha256=sha256_of(plain.root / plain.info.likeness_file)).with_fingerprint()
    (plain.root / "dataset.json").write_text(info.to_json())
    url, remote = copy(plain.root, "s3://bucket/likeness"), options(tmp_path)
    proxy.weather = weather = Weather({}, only="likeness.arrow")
    weather.deck = ["", "flip", ""]  # its size is asked for; then it comes wrong once
    dataset = Dataset.open(url, remote)
    assert not list(tmp_path.glob("cache/*/likeness.arrow"))
    found = dataset.likeness()
    assert weather.seen["flip"] == 1
    assert found is not None
    assert found.equals(Dataset.open(plain.root).likeness())
    RemoteFolder(url).delete([info.likeness_file])
    with pytest.raises(DatasetError, match=r"likeness\.arrow is missing"):
        Dataset.open(url, options(tmp_path / "other")).likeness()


@pytest.mark.parametrize("there", [0, 1])
def test_a_mixture_of_here_and_there_is_one_of_here(proxy: Proxy, videos: Dataset, tmp_path: Path, there: int) -> None:
    """What is cached of a dataset is the same alone and in a mixture, where its rows have other numbers."""
    few = [Video(data=encode(9, first=5000 + 100 * row), num_frames=9) for row in range(5)]
    parts = [videos, write_dataset(tmp_path / "second", few)]
    expected = stream(Mixture(parts), options(tmp_path))
    remote = options(tmp_path)
    parts[there] = dataset = Dataset.open(copy(parts[there].root, f"s3://bucket/mixed/{parts[there].root.name}"), remote)
    proxy.weather = weather = Weather({}, only="shards")
    assert stream(dataset, remote)  # alone, which fills the cache
    assert weather.seen["GET"]
    proxy.weather = weather = Weather({"error": 1.0}, only="shards")
    assert stream(Mixture(parts), remote) == expected
    assert not weather.seen["error"]


def test_no_dataset(proxy: Proxy, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="s3://bucket/nothing holds no finished dataset"):
        Dataset.open("s3://bucket/nothing", options(tmp_path))
    with pytest.raises(DatasetError, match="no finished dataset"):
        read_info("s3://bucket/nothing")


def test_any_fsspec_store(plain: Dataset, tmp_path: Path) -> None:
    url = copy(plain.root, "memory://stored/d")
    memory = fsspec.filesystem("memory")
    try:
        assert not memory.exists("/stored/d/plan") or memory.rm("/stored/d/plan")
        dataset = Dataset.open(url, options(tmp_path))
        with open_reader(dataset) as reader:
            assert [reader.read(dataset.item(row)) for row in range(12)] == CONTENT
        assert dataset.folder.sizes("shards") == {shard.file: shard.size for shard in plain.info.shards}
    finally:
        memory.rm("/stored", recursive=True)


def test_one_writer_creates(proxy: Proxy) -> None:
    folder = RemoteFolder("s3://bucket/created")
    assert folder.create("plan", b"one")
    assert folder.create("plan", b"one")  # its own, whose answer was lost
    assert not folder.create("plan", b"two")
    assert folder.read_all("plan", 3) == b"one"
    with pytest.raises(StorageError, match=r"s3://bucket/created/plan has 3 bytes, expected at most 2"):
        folder.read_all("plan", 2)


def test_what_a_store_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RemoteFolder("memory://x")
    monkeypatch.setattr(folder._fs, "info", lambda path: {"size": None})
    with pytest.raises(StorageError, match=r"memory://x/a: asking for its size is not what this kind of store can do .*s3://, gs://"):
        folder.size("a")


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("gs://bucket/x", ["gs://", "pip install 'posmlp-video[gs]'"]),
        ("nothing-like-it://x", ["nothing-like-it", "s3://"]),
    ],
)
def test_what_is_not_installed_is_named(url: str, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(StorageError) as caught:
        RemoteFolder(url)
    assert all(part in str(caught.value) for part in parts)


def test_missing_credentials_are_said_at_once(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"Unable to locate credentials.*credentials in the environment"):
        RemoteFolder("s3://bucket/videos").read_all("dataset.json", 1000)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "text", ["s3://key:secret@bucket/x", "s3://bucket/x?token=1", "simplecache::s3://bucket/x", "zip://a::s3://b", "s3://"]
)
def test_urls_that_could_carry_secrets_or_code_are_refused(text: str) -> None:
    if "::" in text.partition("//")[0]:
        assert location(text) == Path(text)  # no URL of ours: a path that is not there
        return
    with pytest.raises(ValueError, match="credentials come from the environment") as caught:
        location(text)
    assert "secret" not in str(caught.value)


def test_locations() -> None:
    assert location("S3://bucket/x/") == "s3://bucket/x"
    assert location("file:///a/b") == Path("/a/b")
    assert location("a/b") == Path("a/b")


# The cache


def test_unused_datasets_make_room_the_oldest_first(tmp_path: Path) -> None:
    data = bytes(1000)
    for name in ("a", "b", "c"):
        folder = CacheFolder.open(tmp_path, name, 3500)
        folder.add("items/0", data)
        folder.close()
        time.sleep(0.01)
    again = CacheFolder.open(tmp_path, "a", 3500)  # used again, and in use
    new = CacheFolder.open(tmp_path, "d", 3500)
    new.add("items/0", data)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["a", "c", "d"]
    new.add("items/1", data)
    assert again.get("items/0") == data
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name == "c"] == []
    new.add("items/2", data)  # no room: what is read stays in
    assert (new.get("items/0"), new.get("items/1"), new.get("items/2")) == (data, data, None)
    again.close()
    late = CacheFolder.open(tmp_path, "d", 3500)
    late.add("items/2", data)
    assert late.get("items/2") == data
    assert not (tmp_path / "a").exists()


def test_a_removal_that_was_killed_half_way_is_finished(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = CacheFolder.open(tmp_path, name, 2500)
        folder.add("items/0", bytes(1000))
        folder.close()
    (tmp_path / "a" / "items" / "0").unlink()
    (tmp_path / "a" / "items").rmdir()
    (tmp_path / "a").rmdir()
    new = CacheFolder.open(tmp_path, "c", 2500)
    new.add("items/0", bytes(1000))
    assert new.get("items/0") == bytes(1000)
    assert sorted(path.name for path in tmp_path.glob("*.use")) == ["b.use", "c.use"]


def test_a_full_disk_only_costs_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CacheFolder.open(tmp_path, "a", 1 << 40)
    monkeypatch.setattr("pipeline.cache.FREE_BYTES", 1 << 60)
    folder.add("items/0", b"x")
    assert folder.get("items/0") is None


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be used .*loader\.remote\.cache_dir"):
        CacheFolder.open(tmp_path / "file" / "x", "a", 1000)


# The watchdog


def test_slow_reads_are_told_once_while_they_last(proxy: Proxy, videos: Dataset, tmp_path: Path) -> None:
    dataset = Dataset.open("s3://bucket/videos", options(tmp_path))
    proxy.weather = Weather({}, latency_s=0.5)
    told: list[tuple[Item, float]] = []
    item = dataset.item(4)
    with Watchdog(0.1, lambda item, seconds: told.append((item, seconds))) as watchdog, open_reader(dataset) as reader:
        watchdog.begin(item)
        reader.read(item)
        watchdog.end()
        for _ in range(50):  # quick ones are not told
            watchdog.begin(item)
            reader.read(item)
            watchdog.end()
    assert [(one.key, one.shard_file, one.offset) for one, _ in told] == [("video-4", item.shard_file, item.offset)]
    assert 0.1 < told[0][1] < 0.5
    assert issubclass(StorageError, PipelineError)
