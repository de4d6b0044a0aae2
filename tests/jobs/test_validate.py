"""data validate: whatever is altered in a dataset is found and named by file, video and value."""

import hashlib
import io
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from jobs import validate
from jobs.validate import Problem
from pipeline.errors import DatasetError
from pipeline.index import Dataset, index_schema, write_index


@pytest.fixture
def dataset(motion_dataset: Path, tmp_path: Path) -> Dataset:
    return Dataset.open(shutil.copytree(motion_dataset, tmp_path / "dataset"))


def edit(path: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(path: Path, offset: int) -> None:
    def change(data: bytearray) -> None:
        data[offset] ^= 1

    edit(path, change)


def rewrite(path: Path, keep: Callable[[tarfile.TarInfo, bytes], bytes | None]) -> None:
    """The same tar with other members: `keep` returns a member's new content, None drops it."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            new = keep(member, data)
            if new is not None:
                member.size = len(new)
                tar.addfile(member, io.BytesIO(new))


def read_table(root: Path) -> pa.Table:
    with pa.ipc.open_file(str(root / "index.arrow")) as reader:
        return reader.read_all()


def whats(problems: list[Problem]) -> set[tuple[str, str]]:
    return {(problem.file, problem.what) for problem in problems}


def test_untouched(dataset: Dataset) -> None:
    assert validate.run(dataset.root) == []


def test_flipped_byte_in_a_video(dataset: Dataset) -> None:
    item = dataset.item(5)
    flip(dataset.root / item.shard_file, item.offset + item.size // 2)
    problems = validate.run(dataset.root)
    assert whats(problems) == {(item.shard_file, "SHA-256"), (item.shard_file, "CRC-32 of the video")}
    [crc] = [problem for problem in problems if problem.key]
    assert (crc.key, crc.expected) == (item.key, f"{item.crc32:08x}")
    assert item.key in str(crc)
    assert item.shard_file in str(crc)


def test_flipped_byte_in_a_header(dataset: Dataset) -> None:
    item = dataset.item(0)
    flip(dataset.root / item.shard_file, 20)
    problems = validate.run(dataset.root)
    assert (item.shard_file, "SHA-256") in whats(problems)
    assert (item.shard_file, "tar headers") in whats(problems)


@pytest.mark.parametrize("suffix", ["mp4", "json", "cls"])
def test_missing_member(dataset: Dataset, suffix: str) -> None:
    item = dataset.item(3)
    rewrite(dataset.root / item.shard_file, lambda member, data: None if member.name == f"{item.key}.{suffix}" else data)
    found = [problem for problem in validate.run(dataset.root) if problem.what == f"member .{suffix}"]
    assert [(problem.file, problem.key, problem.got) for problem in found] == [(item.shard_file, item.key, "missing")]


def test_other_facts_in_the_tar(dataset: Dataset) -> None:
    first, second = dataset.item(0), dataset.item(1)
    assert first.shard_file == second.shard_file

    def change(member: tarfile.TarInfo, data: bytes) -> bytes:
        if member.name == f"{first.key}.cls":
            return b"7"
        return data.replace(b'"height": 128', b'"height": 129') if member.name == f"{second.key}.json" else data

    rewrite(dataset.root / first.shard_file, change)
    problems = {(problem.key, problem.what, problem.got) for problem in validate.run(dataset.root)}
    assert (first.key, "label in .cls", "7") in problems
    assert (second.key, "height in .json", "129") in problems


def test_truncated_and_lost_shards(dataset: Dataset) -> None:
    first, second = (shard.file for shard in dataset.info.shards[:2])
    edit(dataset.root / first, lambda data: data.__delitem__(slice(len(data) // 2, None)))
    (dataset.root / second).unlink()
    problems = validate.run(dataset.root)
    assert {(first, "size in bytes"), (first, "SHA-256"), (second, "file")} <= whats(problems)
    assert any(problem.file == first and problem.what == "CRC-32 of the video" for problem in problems)


def test_members_swapped_between_shards(dataset: Dataset) -> None:
    first, second = (dataset.root / shard.file for shard in dataset.info.shards[:2])
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    problems = validate.run(dataset.root)
    for shard, row in ((dataset.info.shards[0], 0), (dataset.info.shards[1], int(dataset.info.shards[0].num_items))):
        assert (shard.file, "SHA-256") in whats(problems)
        key = dataset.item(row).key
        assert any(problem.key == key and problem.what == "member .mp4" for problem in problems)
        assert any(problem.file == shard.file and problem.what == "member" for problem in problems)  # strangers


def test_altered_index(dataset: Dataset) -> None:
    table = read_table(dataset.root)
    labels = table.column("label").to_pylist()
    labels[4] = 99
    place = table.schema.get_field_index("label")
    write_index(dataset.root / "index.arrow", [table.set_column(place, table.schema.field(place), pa.array(labels, pa.int32()))])
    problems = validate.run(dataset.root)
    assert ("index.arrow", "SHA-256 (altered, or of another build)") in whats(problems)
    assert any((problem.file, problem.key, problem.got) == ("index.arrow", dataset.item(4).key, "99") for problem in problems)


def test_index_of_another_build(dataset: Dataset) -> None:
    table = read_table(dataset.root)
    order = pc.sort_indices(table.column("key"))
    write_index(dataset.root / "index.arrow", [table.take(order)])
    assert ("index.arrow", "SHA-256 (altered, or of another build)") in whats(validate.run(dataset.root))
    write_index(dataset.root / "index.arrow", [index_schema(["split"]).empty_table()])
    found = validate.run(dataset.root)
    assert whats(found) == {("index.arrow", "index")}
    (dataset.root / "index.arrow").unlink()
    assert whats(validate.run(dataset.root)) == {("index.arrow", "index")}


def test_altered_manifest(dataset: Dataset) -> None:
    manifest = dataset.root / "dataset.json"
    info = dataset.info
    manifest.write_text(replace(info, classes=list(reversed(info.classes))).to_json(), encoding="utf-8")
    assert ("dataset.json", "fingerprint") in whats(validate.run(dataset.root))
    other = hashlib.sha256(b"other").hexdigest()
    manifest.write_text(replace(info, index_sha256=other).with_fingerprint().to_json(), encoding="utf-8")
    assert ("index.arrow", "SHA-256 (altered, or of another build)") in whats(validate.run(dataset.root))
    manifest.unlink()
    with pytest.raises(DatasetError, match=r"dataset\.json"):
        validate.run(dataset.root)


def test_a_tar_nobody_knows(dataset: Dataset) -> None:
    shutil.copy(dataset.root / dataset.info.shards[0].file, dataset.root / "shards" / "extra.tar")
    assert whats(validate.run(dataset.root)) == {("shards/extra.tar", "shard")}
