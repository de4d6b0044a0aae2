"""Builds from what users have: lists, long videos in windows, with real tars; without Ray, which other tests have."""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs import append, build, dry_run, validate
from jobs.build_commit import read_quarantine
from jobs.build_shard import ShardTask, build_shard, record_path
from jobs.errors import RecipeError
from jobs.recipe import parse_overrides
from pipeline.errors import ManifestError
from pipeline.index import Dataset, DatasetInfo
from pipeline.options import EncodeOptions, LimitOptions
from tests.jobs.test_build import snapshot
from tests.jobs.test_build_append import numbers_in
from tests.pipeline.numbered import encode, number_image
from tests.pipeline.test_pictures import numbered_folder, png
from tests.pipeline.test_tar_source import write_tar

GOP = 8


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_after_the_other(tasks: Sequence[ShardTask], num_cpus: int | None) -> None:
        for task in tasks:
            if not record_path(task.work, task.number).is_file():
                build_shard(task)

    monkeypatch.setattr(build, "build_shards", one_after_the_other)
    monkeypatch.setattr(append, "build_shards", one_after_the_other)


def make(videos: Path, labels: Path | list[Path] | dict[str, Path] | None, out: Path, **encode: object) -> DatasetInfo:
    options = EncodeOptions(gop=GOP, **encode)  # type: ignore[arg-type]
    return build.run(videos=videos, labels=labels, out=out, encode=options, limits=LimitOptions())


def test_long_videos_become_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos, lengths = tmp_path / "videos", {"a/short": 25, "a/long": 75, "b/longer": 110}
    for number, (name, length) in enumerate(lengths.items()):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        (videos / f"{name}.mp4").write_bytes(encode(length, first=200 * number))
    lists = {}
    for split, names in (("train", ["a/short", "a/long"]), ("val", ["b/longer"])):
        lists[split] = tmp_path / f"{split}.txt"
        lists[split].write_text("".join(f"{name} {ord(name[0]) - ord('a')}\n" for name in names))
    out = tmp_path / "data"
    make(videos, lists, out, max_member_s=1.0)  # 25 frames, 3 groups of 8
    assert "labels: list of `path label` lines (data.format=list): 3 items, 2 classes" in capsys.readouterr().err
    dataset, numbers = Dataset.open(out), numbers_in(out, tmp_path)
    assert {key: len(frames) for key, frames in numbers.items()} == {
        "a/short": 25,
        **{f"a/long~{number:04d}": length for number, length in enumerate([16, 16, 24, 19])},
        **{f"b/longer~{number:04d}": length for number, length in enumerate([16, 24, 24, 24, 22])},
    }
    for number, (name, length) in enumerate(lengths.items()):
        frames = [frame for key in sorted(numbers) if key.partition("~")[0] == name for frame in numbers[key]]
        assert frames == list(range(200 * number, 200 * number + length))
    assert (dataset.info.num_frames, dataset.info.num_items, len(dataset.rows("split", "val"))) == (210, 10, 5)
    assert validate.run(out) == []
    windows = {}
    for shard in dataset.info.shards:
        with tarfile.open(out / shard.file) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    windows[member.name[:-5]] = json.loads(tar.extractfile(member).read()).get("window")  # type: ignore[union-attr]
    assert windows["a/short"] is None
    assert windows["a/long~0002"] == {"number": 2, "begin": 32, "of_frames": 75}
    before = snapshot(out)
    make(videos, lists, tmp_path / "again", max_member_s=1.0)
    make(videos, lists, out, max_member_s=1.0)
    after, again = snapshot(out), snapshot(tmp_path / "again")
    assert after == before
    content = {name: value[2] for name, value in after.items() if not name.startswith(".")}
    assert {name: value[2] for name, value in again.items() if not name.startswith(".")} == content
    with pytest.raises(ManifestError, match=r"has 3 of these 3 videos already, by their keys, first a/long\.mp4"):
        append.run(videos=videos, labels=lists, out=out, format="list", allow_missing=True)


def test_a_dry_run_says_as_what_labels_were_read(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "1.webm").write_bytes(encode(10))
    (tmp_path / "train.json").write_text('[{"id": "1", "template": "Moving [something]"}]')
    paths = {"videos": str(tmp_path / "videos"), "labels": str(tmp_path / "train.json"), "dir": str(tmp_path / "data")}
    estimate = dry_run.run(parse_overrides({"data": paths}, []))
    assert (estimate.labels, estimate.classes) == ("Something-Something list (data.format=something)", {"Moving something": 1})


def test_folders_of_frames_and_of_images(tmp_path: Path) -> None:
    for number, name in enumerate(["run/a", "run/b", "jump/c", "jump/gap"]):
        numbered_folder(tmp_path / "frames" / name, range(100 * number + 1, 100 * number + 8))
    (tmp_path / "frames" / "jump" / "gap" / "00304.png").unlink()
    with pytest.raises(RecipeError, match=r"4 videos are folders of pictures.*data\.encode\.frames_fps=25"):
        make(tmp_path / "frames", None, tmp_path / "data")
    info = make(tmp_path / "frames", None, tmp_path / "data", frames_fps=10.0)
    assert numbers_in(tmp_path / "data", tmp_path) == {
        name: list(range(100 * number + 1, 100 * number + 8)) for number, name in enumerate(["run/a", "run/b", "jump/c"])
    }
    assert info.num_quarantined == 1
    (row,) = read_quarantine(Dataset.open(tmp_path / "data"))
    assert (row["path"], row["reason"], row["detail"]) == ("jump/gap", "frames_missing", "no picture has number 304; 1 gaps in all")
    assert make(tmp_path / "frames", None, tmp_path / "data", frames_fps=10.0) == info
    assert validate.run(tmp_path / "data") == []
    for number, name in enumerate(["run/1.png", "jump/x.png"]):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(number_image(number)))
    make(tmp_path / "images", None, tmp_path / "images-data")
    assert numbers_in(tmp_path / "images-data", tmp_path) == {"run/1": [0], "jump/x": [1]}


def test_tars_are_a_source(tmp_path: Path) -> None:
    videos = tmp_path / "tars"
    numbers: dict[str, list[int]] = {}
    for split, first in (("train", 0), ("val", 100)):
        members: list[tuple[str, bytes]] = [("bad.cls", b"0"), ("bad.mp4", b"no video")]
        for label in (0, 1):
            start, length = first + 20 * label, 9 + label
            members += [(f"../{label}.cls", b"%d" % label), (f"../{label}.mp4", encode(length, first=start))]
            numbers[f"{split}-0_tar/__/{label}"] = list(range(start, start + length))
        write_tar(videos / f"{split}-0.tar", members)
    out = tmp_path / "data"
    info = make(videos, None, out)
    dataset = Dataset.open(out)
    assert numbers_in(out, tmp_path) == numbers
    assert (info.num_quarantined, len(dataset.rows("split", "val")), info.classes) == (2, 2, ["0", "1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "one.mp4", "tars"]
    assert make(videos, None, out) == info
    assert validate.run(out) == []
    again = make(out / "shards", None, tmp_path / "again")  # a dataset's own shards are tars like any other
    assert (again.num_items, again.classes) == (4, ["0", "1"])
    paths = {"videos": str(videos), "dir": str(tmp_path / "dry")}
    estimate = dry_run.run(parse_overrides({"data": paths}, []))
    assert (estimate.labels, estimate.videos, len(estimate.refused)) == ("WebDataset tars (data.format=tars)", 6, 2)


def test_a_dataset_from_another_ones_tars_has_its_videos(tmp_path: Path) -> None:
    """Not a byte of a video changes, in one step or two; with another quality all do."""
    for number, name in enumerate(("a/one", "a/two", "b/three")):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(encode(20 + number, first=100 * number))
    steps = [tmp_path / "videos", *(tmp_path / f"{step}" / "shards" for step in range(3))]
    for step, crf in enumerate((23, 23, 23, 30)):
        make(steps[step], None, tmp_path / f"{step}", crf=crf)
    stored = [sorted(Dataset.open(tmp_path / f"{step}").column("crc32").tolist()) for step in range(4)]
    assert stored[0] == stored[1] == stored[2]
    assert not set(stored[2]) & set(stored[3])
