"""Ranges against whole shards from an object store, in the order of training; a read from the disk, the cache and the store in CPU time.

    python -m tests.pipeline.bench_remote [--latency-ms 50] [--before FILE]

The server runs in a process of its own, so that CPU times are the reader's. --before: an older pipeline/reader.py, compared with this one.
"""

import argparse
import importlib.util
import multiprocessing
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from pipeline.index import Dataset, Item
from pipeline.loader import Loader
from pipeline.options import AugmentOptions, ClipOptions, LoaderOptions, RemoteOptions
from pipeline.order import Order
from pipeline.reader import Reader, open_reader
from pipeline.remote import RemoteFolder
from pipeline.requests import train_requests
from tests.pipeline.numbered import Video, encode, write_dataset
from tests.pipeline.s3 import Weather, s3_server

ITEMS, PER_SHARD, SIZE = 480, 20, 300_000
BATCH, REQUESTS = 32, 32
MIB_PER_S = 100.0  # of one connection
REPEATS = 7
REAL_SHARD = 430  # videos of SIZE in a shard of 128 MiB


def serve(pipe: Connection, latency_s: float) -> None:
    with s3_server() as proxy:
        proxy.weather = Weather({}, latency_s=latency_s, mib_per_s=MIB_PER_S)
        pipe.send({name: os.environ[name] for name in os.environ if name.startswith("AWS_")})
        while pipe.recv() == "bytes":
            pipe.send(proxy.weather.seen["bytes"])


class WholeShards:
    """The other way: the shard of an item is copied as a whole to the disk, the least recently used one goes."""

    def __init__(self, dataset: Dataset, folder: Path, limit: int) -> None:
        assert dataset.origin is not None
        self._remote, self._folder, self._limit = dataset.origin.folder, folder, limit
        self._sizes = {shard.file: shard.size for shard in dataset.info.shards}
        self._kept: OrderedDict[str, int] = OrderedDict()
        self._locks = {file: threading.Lock() for file in self._sizes}
        self._lock = threading.Lock()
        (folder / "shards").mkdir(parents=True)

    def read(self, item: Item) -> bytes:
        with self._locks[item.shard_file]:
            if not (self._folder / item.shard_file).exists():
                self._remote.fetch(item.shard_file, self._folder / item.shard_file, self._sizes[item.shard_file])
            with Reader(self._folder) as reader:
                data = reader.read(item)
        with self._lock:
            self._kept[item.shard_file] = self._sizes[item.shard_file]
            self._kept.move_to_end(item.shard_file)
            gone = []
            while sum(self._kept.values()) > self._limit:
                gone.append(self._kept.popitem(last=False)[0])
        for file in gone:
            with self._locks[file]:
                (self._folder / file).unlink(missing_ok=True)
        return data


def passes(read: Callable[[Item], bytes], items: Iterable[Item]) -> tuple[float, float]:
    """(seconds to the first batch, seconds in all) of reading `items` with REQUESTS at a time."""
    began, first = time.perf_counter(), 0.0
    with ThreadPoolExecutor(REQUESTS) as pool:
        for number, _ in enumerate(pool.map(read, items), 1):
            if number == BATCH:
                first = time.perf_counter() - began
    return first, time.perf_counter() - began


def modes(pipe: Connection, folder: Path) -> None:
    def moved() -> int:
        pipe.send("bytes")
        return int(pipe.recv())

    whole = ITEMS * SIZE
    print(f"{ITEMS} videos of {SIZE} bytes in shards of {PER_SHARD}; {REQUESTS} requests in flight, {MIB_PER_S:g} MiB/s each")
    print("| mode | cache | first batch s | epoch 1 s | epoch 2 s | bytes moved in epoch 1 | in epoch 2 |\n|---|---|---|---|---|---|---|")
    for share in (2.0, 0.5):
        for mode in ("ranges", "whole shards"):
            home = folder / f"{mode} {share}"
            options = RemoteOptions(cache_dir=str(home), cache_gib=share * whole / 2**30, requests=REQUESTS)
            dataset = Dataset.open("s3://bucket/d", options)
            reader = open_reader(dataset) if mode == "ranges" else WholeShards(dataset, home / "shards", int(share * whole))
            order = Order(seed=1, num_samples=ITEMS)
            figures, bytes_moved = [], [moved()]
            for epoch in range(2):
                positions = np.arange(epoch * ITEMS, (epoch + 1) * ITEMS)
                figures.append(passes(reader.read, [dataset.item(int(row)) for row in order.locate(positions)[1]]))
                bytes_moved.append(moved())
            shares = np.diff(bytes_moved) / whole
            cache = "twice the dataset" if share > 1 else "half of it"
            print(
                f"| {mode} | {cache} | {figures[0][0]:.2f} | {figures[0][1]:.2f} | {figures[1][1]:.2f} | {shares[0]:.2f}, {shares[1]:.2f} |"
            )


def cpu_ms(read: Callable[[Item], bytes], items: list[Item]) -> float:
    began = time.process_time()
    for item in items:
        read(item)
    return 1000 * (time.process_time() - began) / len(items)


def costs(local: Dataset, folder: Path, before: Path | None) -> None:
    remote = Dataset.open("s3://bucket/d", RemoteOptions(cache_dir=str(folder / "costs")))
    items = [local.item(row) for row in range(ITEMS)]
    readers: dict[str, Callable[[Item], bytes]] = {"disk": Reader(local.root).read}
    if before is not None:
        spec = importlib.util.spec_from_file_location("before", before)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        readers["disk, before"] = module.Reader(local.root).read
    cached = open_reader(remote)
    print(f"store: {cpu_ms(cached.read, items[:100]):.2f} CPU-ms a read")
    readers["cache"] = cached.read
    found: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(REPEATS):  # interleaved
        for name, read in readers.items():
            found[name].append(cpu_ms(read, items[:100]))
    for name, values in found.items():
        print(f"{name}: {np.median(values):.3f} CPU-ms a read ({min(values):.3f} to {max(values):.3f})")


def loaders(folder: Path) -> None:
    """The whole loader, two decoding threads, from the disk, from the store and from the cache."""
    video = Video(data=encode(64, width=320, height=240), num_frames=64, width=320, height=240)
    local = write_dataset(folder / "videos", [video] * 160, per_shard=20)
    store = RemoteFolder("s3://bucket/videos")
    for path in local.root.rglob("*.*"):
        store.upload(path, path.relative_to(local.root).as_posix())
    remote = RemoteOptions(cache_dir=str(folder / "loaders"), requests=REQUESTS)
    opened = Dataset.open("s3://bucket/videos", remote)
    clip, augment = ClipOptions(num_frames=16, stride=4), AugmentOptions(size=112)
    options = LoaderOptions(remote=remote)
    for name, dataset in (("disk", local), ("store", opened), ("cache", opened)):
        began, cpu = time.perf_counter(), time.process_time()
        requests = train_requests(
            dataset,
            dataset.rows("split", "train"),
            seed=1,
            global_batch=8,
            micro_batch=8,
            rank=0,
            world_size=1,
            start_step=0,
            end_step=20,
            clip=clip,
            augment=augment,
        )
        with Loader(
            dataset, requests, micro_batch=8, clip=clip, augment=augment, options=options, threads=2, on_damage="substitute"
        ) as loader:
            num = sum(len(batch.keys) for batch in loader)
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        print(f"loader from the {name}: {num} clips in {seconds:.2f} s, {1000 * cpu_s / num:.1f} CPU-ms a clip")


def policies(num: int = 100_000, epochs: int = 6) -> None:
    """What a cache with room for half of a dataset finds of an epoch of our order once it is full; what whole shards would move."""
    room, order = num // 2, Order(seed=1, num_samples=num)
    recent: OrderedDict[int, None] = OrderedDict()
    kept: set[int] = set()
    shards: OrderedDict[int, None] = OrderedDict()
    copies = 0
    hits = {"least recently used first": 0, "what is in stays in": 0}
    for epoch in range(epochs):
        for row in order.locate(np.arange(epoch * num, (epoch + 1) * num))[1].tolist():
            hits["least recently used first"] += epoch > 0 and row in recent
            hits["what is in stays in"] += epoch > 0 and row in kept
            recent[row] = None
            recent.move_to_end(row)
            if len(recent) > room:
                recent.popitem(last=False)
            if len(kept) < room:
                kept.add(row)
            copies += epoch > 0 and row // REAL_SHARD not in shards
            shards[row // REAL_SHARD] = None
            shards.move_to_end(row // REAL_SHARD)
            if len(shards) > room // REAL_SHARD:
                shards.popitem(last=False)
    for name, number in hits.items():
        print(f"{name}: finds {number / num / (epochs - 1):.3f}")
    print(f"whole shards of {REAL_SHARD}: an epoch moves {copies * REAL_SHARD / num / (epochs - 1):.0f} times the dataset")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency-ms", type=float, default=50)
    parser.add_argument("--before", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, options.latency_ms / 1000))
    server.start()
    os.environ.update(ours.recv())
    with tempfile.TemporaryDirectory(prefix="posmlp-bench-remote-") as name:
        draw = np.random.default_rng(1)
        local = write_dataset(Path(name) / "d", [Video(data=draw.bytes(SIZE), num_frames=1) for _ in range(ITEMS)], per_shard=PER_SHARD)
        folder = RemoteFolder("s3://bucket/d")
        for path in local.root.rglob("*.*"):
            folder.upload(path, path.relative_to(local.root).as_posix())
        modes(ours, Path(name))
        costs(local, Path(name), options.before)
        for _ in range(2):
            with tempfile.TemporaryDirectory(dir=name) as inner:
                loaders(Path(inner))
    policies()
    ours.send("end")
    server.join()


if __name__ == "__main__":
    main()
