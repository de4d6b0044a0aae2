"""Bytes by offset: every read is checked, and says which video in which shard is wrong."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ChecksumError, DatasetError, SampleError
from pipeline.index import Dataset
from pipeline.reader import Reader, read
from tests.pipeline.numbered import Video, flip_byte, write_dataset

CONTENT = [bytes([row]) * (1000 + row) for row in range(12)]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path / "d", [Video(data=data, num_frames=1) for data in CONTENT], per_shard=2)


def open_shards(dataset: Dataset) -> int:
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return sum(link.startswith(str(dataset.root)) and link.endswith(".tar") for link in links)


def test_bytes_are_those_that_were_built(dataset: Dataset) -> None:
    assert [read(dataset, dataset.item(row)) for row in range(12)] == CONTENT
    assert open_shards(dataset) == 0


def test_few_shards_stay_open_whatever_the_number_of_threads(dataset: Dataset) -> None:
    wrong: list[int] = []
    with Reader(dataset.root, max_open=2) as reader:

        def run(offset: int) -> None:
            wrong.extend(i for i in range(600) if reader.read(dataset.item((i + offset) % 12)) != CONTENT[(i + offset) % 12])

        threads = [threading.Thread(target=run, args=(offset,)) for offset in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert open_shards(dataset) == 2
    assert wrong == []
    assert open_shards(dataset) == 0


def test_a_flipped_bit_is_found_and_named(dataset: Dataset) -> None:
    flip_byte(dataset, 3)
    with pytest.raises(ChecksumError, match=r"CRC-32 .* expected .*'video-3' in shards/000001.tar") as caught:
        read(dataset, dataset.item(3))
    assert (caught.value.key, caught.value.shard) == ("video-3", "shards/000001.tar")
    assert read(dataset, dataset.item(2)) == CONTENT[2]


def test_a_cut_shard(dataset: Dataset) -> None:
    item = dataset.item(5)
    os.truncate(dataset.root / item.shard_file, item.offset + 10)
    with pytest.raises(ChecksumError, match=f"ends at byte {item.offset + 10}"):
        read(dataset, item)


def test_a_missing_shard(dataset: Dataset) -> None:
    (dataset.root / "shards/000000.tar").unlink()
    with pytest.raises(SampleError, match="No such file"):
        read(dataset, dataset.item(0))


@pytest.mark.parametrize("file", ["../secret.tar", "/etc/passwd", "shards/../../x"])
def test_a_dataset_cannot_point_outside_itself(dataset: Dataset, file: str) -> None:
    with pytest.raises(DatasetError, match="outside"):
        read(dataset, replace(dataset.item(0), shard_file=file))
