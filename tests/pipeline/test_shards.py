"""Shards: a fair, repeatable deal, and tars that any reader opens and ours finds its bytes in."""

import json
import random
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.durable import TEMPORARY, committed
from pipeline.manifest import Source
from pipeline.shards import MIN_SHARDS, ShardWriter, deal, sample


def source(number: int, size: int = 1000, start_s: float | None = None) -> Source:
    return Source(
        key=f"class{number % 7}/{number}{'' if start_s is None else f'_{start_s:g}'}",
        path=f"class{number % 7}/{number}.mp4",
        label=f"class{number % 7}",
        splits=("train",),
        group="",
        size=size,
        start_s=start_s,
        end_s=None,
    )


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 10**6), min_size=1, max_size=200),
    shard_bytes=st.integers(1, 10**6),
    seed=st.integers(0, 5),
    shuffle=st.randoms(use_true_random=False),
)
def test_every_video_is_dealt_once_in_an_order_of_its_own(sizes: list[int], shard_bytes: int, seed: int, shuffle: random.Random) -> None:
    sources = [source(number, size) for number, size in enumerate(sizes)]
    shards = deal(sources, ratio=0.3, shard_bytes=shard_bytes, seed=seed)
    assert Counter(each.key for shard in shards for each in shard) == Counter(each.key for each in sources)
    assert all(shards)
    shuffle.shuffle(sources)
    assert deal(sources, ratio=0.3, shard_bytes=shard_bytes, seed=seed) == shards


def test_shards_are_of_one_size_and_fair() -> None:
    sources = [source(number, 90_000 + number % 20_000) for number in range(7000)]
    shards = deal(sources, ratio=0.5, shard_bytes=1 << 20, seed=0)
    sizes = [sum(each.size * 0.5 + 2048 for each in shard) for shard in shards]
    assert max(sizes) < 1.1 * (1 << 20)
    assert min(sizes) > 0.85 * (1 << 20)
    shares = [Counter(each.label for each in shard)["class3"] / len(shard) for shard in shards]
    assert sum(shares) / len(shares) == pytest.approx(1 / 7, abs=0.01)
    assert max(shares) < 0.6  # no shard is one class


@pytest.mark.parametrize(("num_videos", "expected"), [(1, 1), (7, 1), (24, 6), (64, MIN_SHARDS), (1000, MIN_SHARDS)])
def test_enough_shards_to_build_in_parallel(num_videos: int, expected: int) -> None:
    shards = deal([source(number) for number in range(num_videos)], ratio=1, shard_bytes=128 << 20, seed=0)
    assert len(shards) == expected


def test_the_deal_is_this_one() -> None:
    # A golden value: another deal would make other bytes of the same request.
    shards = deal([source(number) for number in range(9)], ratio=1, shard_bytes=4 * (1000 + 2048), seed=3)
    assert [[each.path for each in shard] for shard in shards] == GOLDEN
    assert [each.path for each in sample([source(number) for number in range(9)], 2, 3)] == GOLDEN_SAMPLE


GOLDEN = [
    ["class0/7.mp4", "class1/8.mp4", "class4/4.mp4"],
    ["class3/3.mp4", "class2/2.mp4", "class0/0.mp4"],
    ["class6/6.mp4", "class5/5.mp4", "class1/1.mp4"],
]
GOLDEN_SAMPLE = ["class2/2.mp4", "class0/7.mp4"]


def test_windows_share_the_size_of_their_video() -> None:
    windows = [source(0, 8000, start_s=float(i)) for i in range(8)]
    shards = deal([*windows, source(1, 8000)], ratio=1, shard_bytes=1 << 30, seed=0)
    assert len(shards) == 2  # by number of videos; the split lies where half of the bytes are
    alone = next(shard for shard in shards if any(each.path == "class1/1.mp4" for each in shard))
    assert len(alone) < 8


def write(path: Path, folder: Path) -> dict[str, tuple[int, int, int]]:
    places = {}
    with ShardWriter(path) as writer:
        for number, key in enumerate(["a/1", "b/" + "long " * 60, "c/é中"]):
            video = folder / "video.mp4"
            video.write_bytes(bytes([number]) * (700 * number + 1))
            member = writer.add(key, number, {"label": number, "class": "ä"}, video)
            places[key] = (member.offset, member.size, member.crc32)
    assert path.stat().st_size == writer.size
    return places


def test_tar_is_where_the_writer_says_and_repeats(tmp_path: Path) -> None:
    places = write(tmp_path / "one.tar", tmp_path)
    assert write(tmp_path / "two.tar", tmp_path) == places
    data = (tmp_path / "one.tar").read_bytes()
    assert data == (tmp_path / "two.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as tar:
        members = tar.getmembers()
    assert [member.name.rpartition(".")[2] for member in members] == ["cls", "json", "mp4"] * 3
    assert {(member.mode, member.uid, member.gid, member.mtime, member.uname) for member in members} == {(0o644, 0, 0, 0, "")}
    for key, (offset, size, crc32) in places.items():
        member = next(member for member in members if member.name == f"{key}.mp4")
        assert (member.offset_data, member.size) == (offset, size)
        assert zlib.crc32(data[offset : offset + size]) == crc32


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file to the collector
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_webdataset_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "one.tar", tmp_path)
    samples = list(webdataset.WebDataset(str(tmp_path / "one.tar"), shardshuffle=False))
    assert [each["__key__"] for each in samples] == ["a/1", "b/" + "long " * 60, "c/é中"]
    assert [int(each["cls"]) for each in samples] == [0, 1, 2]
    assert [len(each["mp4"]) for each in samples] == [1, 701, 1401]
    assert json.loads(samples[2]["json"]) == {"label": 2, "class": "ä"}


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"
    video.write_bytes(b"1")

    def interrupted_shard() -> None:
        with ShardWriter(tmp_path / "one.tar") as writer:
            writer.add("a", 0, {}, video)
            assert list(tmp_path.glob(TEMPORARY))
            raise KeyboardInterrupt

    def failed_file() -> None:
        with committed(tmp_path / "file") as file:
            file.write(b"half")
            raise ValueError("no")

    with pytest.raises(KeyboardInterrupt):
        interrupted_shard()
    with pytest.raises(ValueError, match="no"):
        failed_file()
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]
    with committed(tmp_path / "file") as file:
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
