"""Raw videos at a URL are found as those in a folder are, whatever the labels; what is read in many parts is refused there."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import ManifestError
from pipeline.manifest import Source, list_videos, read_manifest
from pipeline.options import LimitOptions
from pipeline.quarantine import Reason, RejectedError
from pipeline.remote import RemoteFolder
from pipeline.source_files import SourceFiles
from pipeline.video_folder import LocalVideos, RemoteVideos, videos_at

URL = "memory://raw/videos"
SOMETHING = json.dumps([{"id": "74225", "template": "Spinning [something]"}, {"id": "116154", "template": "Opening [something]"}])
OFFICIAL = """label,youtube_id,time_start,time_end,split
tap dancing,abcdefghijk,1,11,train
x,lmnopqrstuv,2,12,val
x,gonegonegon,2,12,val
"""


@dataclass(frozen=True)
class Case:
    files: list[str]
    labels: str = ""
    name: str = "labels.csv"
    format: str = "auto"
    absent: int = 0
    num: int = field(default=2)


CASES = {
    "class folders": Case(["a/1.mp4", "b/2.MP4", "a/.hidden.mp4", ".git/3.mp4", "a/readme.txt"]),
    "splits": Case(["train/a/1.mp4", "val/b/2.webm"]),
    "pictures": Case(["a/one.jpg", "b/two.png"]),
    "csv": Case(["x/1.mp4", "2.avi"], "path,label\nx/1.mp4,a\n./2.avi,b\nx/gone.mp4,b\n", absent=1),
    "no extension": Case(["x/1.mp4", "x/2.webm"], "path,label\nx/1,a\nx/2,b\n"),
    "something": Case(["74225.webm", "116154.webm"], SOMETHING, "labels.json"),
    "kinetics": Case(["tap dancing/abcdefghijk_000001_000011.mp4", "x/lmnopqrstuv_000002_000012.mkv"], OFFICIAL, absent=1),
    "list": Case(["1.mp4", "2.mp4"], "1.mp4 0\n2.mp4 1\n", "train.txt"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "videos").mkdir()
    yield tmp_path / "videos"
    memory = fsspec.filesystem("memory")
    if memory.exists("/raw"):
        memory.rm("/raw", recursive=True)


def fill(folder: Path, files: list[str]) -> None:
    """Here and at the URL; each file has another size."""
    for number, name in enumerate(files, 1):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(number))
        RemoteFolder(URL).upload(path, name)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_url_is_as_the_folder(folder: Path, case: Case) -> None:
    fill(folder, case.files)
    labels = None
    if case.labels:
        labels = folder.parent / case.name
        labels.write_text(case.labels)
    here, there = list_videos(folder, labels, case.format), list_videos(URL, labels, case.format)
    assert len(here.present) == case.num
    assert len(here.absent) == case.absent
    assert (there.present, there.absent, there.labels.format) == (here.present, here.absent, here.labels.format)
    manifests = [read_manifest(place, labels, allow_missing=True) for place in (folder, URL)]
    assert manifests[0] == manifests[1]


def test_a_label_may_say_the_whole_url(folder: Path) -> None:
    fill(folder, ["x/1.mp4"])
    labels = folder.parent / "labels.csv"
    labels.write_text(f"path,label\n{URL}/x/1.mp4,a\n")
    assert [source.path for source in list_videos(URL, labels).present] == ["x/1.mp4"]


WRONG = {
    "tars": (["a.tar"], "", "auto", r"memory://raw/videos/a\.tar: WebDataset tars are read from a disk only.*Copy them into a folder"),
    "stated tars": (["a.tar", "a/1.mp4"], "", "tars", "WebDataset tars are read from a disk only"),
    "frames": (["a/v/1.jpg", "a/v/2.jpg"], "", "auto", "memory://raw/videos/a/v: folders of pictures are read from a disk only"),
    "frames in a list": (["v/1.jpg", "v/2.jpg"], "v 2 0\n", "auto", "memory://raw/videos/v: folders of pictures are read from a disk only"),
    "no class": (["1.mp4"], "", "auto", r"memory://raw/videos/1\.mp4 lies in no class folder"),
    "outside": (["1.mp4"], "path,label\n../1.mp4,a\n", "auto", "must be relative to the videos folder"),
    "two": (["1.mp4", "1.avi"], "path,label\n1,a\n", "auto", r"'1' may be 1\.avi or 1\.mp4"),
    "missing": (["1.mp4"], "path,label\n1.mp4,a\n2.mp4,a\n", "auto", r"1 of 2 videos are not in memory://raw/videos, first 2\.mp4"),
    "empty": (["1.txt"], "", "auto", "memory://raw/videos holds no video"),
}


@pytest.mark.parametrize(("files", "labels", "format", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_read_there_is_said(folder: Path, files: list[str], labels: str, format: str, message: str) -> None:
    fill(folder, files)
    path = None
    if labels:
        path = folder.parent / "labels.csv"
        path.write_text(labels)
    with pytest.raises(ManifestError, match=message):
        read_manifest(URL, path, format=format)


def test_kinds(folder: Path) -> None:
    assert isinstance(videos_at(folder), LocalVideos)
    assert isinstance(videos_at(URL), RemoteVideos)
    with pytest.raises(ManifestError, match="is not a folder"):
        videos_at(folder / "none")


def source(path: str, size: int) -> Source:
    return Source(key="k", path=path, label="a", splits=(), group="", size=size, start_s=None, end_s=None)


def test_a_video_from_a_url_is_a_file_as_long_as_it_is_needed(folder: Path) -> None:
    fill(folder, ["x/1.mp4", "x/2.jpg", "x/3.odd"])
    files, beside = SourceFiles(URL, LimitOptions(max_bytes=3)), folder.parent / "work" / "video.mp4"
    beside.parent.mkdir()
    for size, (path, name) in enumerate([("x/1.mp4", "source.mp4"), ("x/2.jpg", "source.jpg"), ("x/3.odd", "source")], 1):
        with files.local(source(path, size), beside) as copy:
            assert (copy, copy.read_bytes()) == (beside.with_name(name), bytes(size))
        assert not os.listdir(beside.parent)
    for path, size, reason in (("x/gone.mp4", 1, Reason.MISSING), ("x/1.mp4", 4, Reason.TOO_MANY_BYTES)):
        with pytest.raises(RejectedError) as caught, files.local(source(path, size), beside):
            pass
        assert caught.value.reason == reason
        assert not os.listdir(beside.parent)
