"""The index: what is written is what opens, by memory map, and what does not fit is refused with the next step."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import DatasetError
from pipeline.index import Dataset, DatasetInfo, ShardInfo, index_schema, write_index


def rows(shard: int, count: int) -> pa.Table:
    values = [
        {
            "key": f"k{shard}/{i}",
            "source": f"k{shard}/{i}.avi",
            "group": "",
            "label": i % 2,
            "shard": shard,
            "offset": 1024 * i,
            "size": 100 + i,
            "crc32": 0xFFFFFFFF - i,
            "begin": 0,
            "end": 10 + i,
            "fps": 29.97,
            "width": 320,
            "height": 240,
            "codec": "h264",
            "split:split": i % 3 - 1,
        }
        for i in range(count)
    ]
    return pa.Table.from_pylist(values, schema=index_schema(["split"]))


def make(root: Path, counts: list[int]) -> Dataset:
    digest, size = write_index(root / "index.arrow", (rows(shard, count) for shard, count in enumerate(counts)))
    info = DatasetInfo(
        classes=["a", "b"],
        splits={"split": ["train", "val"]},
        num_items=sum(counts),
        num_quarantined=0,
        num_frames=1,
        index_sha256=digest,
        index_size=size,
        shards=[ShardInfo(file=f"shards/{shard}.tar", size=1, sha256="", num_items=count) for shard, count in enumerate(counts)],
    )
    (root / "dataset.json").write_text(info.with_fingerprint().to_json(), encoding="utf-8")
    return Dataset.open(root)


def test_what_is_written_opens(tmp_path: Path) -> None:
    dataset = make(tmp_path, [3, 4])
    assert len(dataset) == 7
    item = dataset.item(4)
    assert (item.key, item.shard_file, item.offset, item.crc32, item.num_frames) == ("k1/1", "shards/1.tar", 1024, 0xFFFFFFFE, 11)
    assert dataset.rows("split", "val").tolist() == [2, 5]
    assert dataset.column("shard").tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert dataset.text("source", 6) == "k1/3.avi"


def test_columns_are_views_of_the_map(tmp_path: Path) -> None:
    column = make(tmp_path, [3, 4, 5]).column("size")
    assert not column.flags.writeable
    assert not column.flags.owndata
    assert column.dtype == np.int64


def test_bytes_repeat_and_fingerprint_is_of_content(tmp_path: Path) -> None:
    infos = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        infos.append(make(tmp_path / name, [3, 4]).info)
    assert (tmp_path / "a" / "index.arrow").read_bytes() == (tmp_path / "b" / "index.arrow").read_bytes()
    assert infos[0] == infos[1]
    (tmp_path / "c").mkdir()
    assert make(tmp_path / "c", [4, 3]).info.fingerprint != infos[0].fingerprint


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no dataset"):
        Dataset.open(tmp_path)
    (tmp_path / "build").mkdir()
    with pytest.raises(DatasetError, match="unfinished build"):
        Dataset.open(tmp_path)
    dataset = make(tmp_path, [3, 4])
    with pytest.raises(DatasetError, match=r"no split column 'split9'; it has \['split'\]"):
        dataset.rows("split9", "val")
    with pytest.raises(DatasetError, match=r"\['train', 'val'\], not 'test'"):
        dataset.rows("split", "test")

    manifest, index = tmp_path / "dataset.json", tmp_path / "index.arrow"
    raw = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**raw, "version": 99}))
    with pytest.raises(DatasetError, match="version 99, expected 1"):
        Dataset.open(tmp_path)
    manifest.write_text("{")
    with pytest.raises(DatasetError, match="not valid JSON"):
        Dataset.open(tmp_path)
    manifest.write_text(json.dumps({**raw, "colour": 1}))
    with pytest.raises(DatasetError, match="colour"):
        Dataset.open(tmp_path)
    manifest.write_text(json.dumps(raw))
    data = index.read_bytes()
    index.write_bytes(data[:-1])
    with pytest.raises(DatasetError, match=f"not {len(data)} bytes long"):
        Dataset.open(tmp_path)
    index.write_bytes(bytes(len(data)))
    with pytest.raises(DatasetError, match="damaged"):
        Dataset.open(tmp_path)
