"""WebDataset tars as a source: what any writer of tars leaves is found, names harm nobody, headers that lie cost nothing."""

import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ManifestError
from pipeline.manifest import read_manifest
from pipeline.options import LimitOptions
from pipeline.quarantine import Reason, RejectedError
from pipeline.tar_source import copy_video, videos_of

LIMITS = LimitOptions()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(tar: Path, tmp_path: Path) -> dict[str, tuple[bytes, str]]:
    """Name -> bytes and label."""
    found = {}
    for video in videos_of(tar):
        copy_video(tar, video.offset, video.size, tmp_path / "copy", LIMITS)
        found[video.name] = ((tmp_path / "copy").read_bytes(), video.label)
    return found


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.text("ab/é _-", min_size=1, max_size=300), min_size=1, max_size=4, unique=True),
    sizes=st.lists(st.integers(0, 2000), min_size=4, max_size=4),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)  # fmt: skip
def test_names_offsets_and_sizes_are_those_of_the_tar(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], sizes: list[int], format: int
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    expected = {f"{name}.mp4": (bytes([place]) * size, str(place)) for place, (name, size) in enumerate(zip(names, sizes, strict=False))}
    labelled = [each for name, (data, label) in expected.items() for each in ((f"{name[:-4]}.cls", label.encode()), (name, data))]
    assert read(write_tar(folder / "a.tar", labelled, format), folder) == expected


def test_what_says_the_label(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "videos" / "train-00.tar",
        [
            *[("a.cls", b"7\n"), ("a.json", b'{"class": "run", "label": 3, "group": "p1"}'), ("a.mp4", b"1")],
            *[("sub/b.mp4", b"2"), ("sub/b.txt", b"jump"), ("sub/b.jpg", b"a thumbnail")],
            *[("c.seg.png", b"not a video"), ("readme", b"x"), ("c.txt", b"no video")],
            *[("d.JSON", b'{"label": 5}'), ("d.WEBM", b"4")],
            *[("e.json", b"[1]"), ("e.cls", b"9"), ("e.png", b"5")],
        ],
    )
    labels = {video.name: video.label for video in videos_of(tar)}
    assert labels == {"a.mp4": "run", "sub/b.mp4": "jump", "d.WEBM": "5", "e.png": "9"}
    manifest = read_manifest(tmp_path / "videos", None)
    assert [(source.key, source.splits, source.group) for source in manifest.sources][:2] == [
        ("train-00_tar/a", ("train",), "p1"),
        ("train-00_tar/d", ("train",), ""),
    ]
    assert manifest.format == "WebDataset tars (data.format=tars)"
    write_tar(tmp_path / "videos" / "more.tar", [("a.cls", b"7"), ("a.mp4", b"1")])
    assert read_manifest(tmp_path / "videos", None).drawn
    stated = tmp_path / "stated"
    for name in ("x", "y"):
        write_tar(stated / f"{name}.tar", [("a.json", f'{{"label": "r", "split": "{name}"}}'.encode()), ("a.mp4", b"1")])
    assert [source.splits for source in read_manifest(stated, None).sources] == [("x",), ("y",)]


EVIL = ["../../../etc/passwd", "/etc/passwd", "a/../../b", "a\nb", "\x1b[31m", "con:|*", "x" * 3000, "-rf"]


def test_names_are_text_and_never_paths(tmp_path: Path) -> None:
    members = [each for name in EVIL for each in ((f"{name}.cls", b"1"), (f"{name}.mp4", name.encode()[:9]))]
    tar = write_tar(tmp_path / "videos" / "a.tar", members)
    with tarfile.open(tar, "a") as opened:
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(link)
    sources = read_manifest(tmp_path / "videos", None).sources
    assert len({source.key for source in sources}) == len(EVIL)
    assert {source.tar for source in sources} == {"a.tar"}
    assert all(source.path.startswith("a.tar/") and source.path.isprintable() for source in sources)
    assert all(source.key.startswith("a_tar/") and "." not in source.key for source in sources)
    (tmp_path / "outside.tar").symlink_to(tar)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "b.tar").symlink_to(tar)
    with pytest.raises(ManifestError, match="leads out"):
        read_manifest(tmp_path / "linked", None)


def test_headers_that_lie(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("a.cls", b"1"), ("a.mp4", b"x" * 2000)])
    whole = tar.read_bytes()
    tar.write_bytes(whole[: 3 * 512 + 700])  # cut off within the video
    (video,) = videos_of(tar)
    with pytest.raises(RejectedError) as caught:
        copy_video(tar, video.offset, video.size, tmp_path / "copy", LIMITS)
    assert (caught.value.reason, caught.value.detail) == (Reason.TRUNCATED, "the tar ends 1300 bytes before the video does")
    with pytest.raises(RejectedError) as caught:
        copy_video(tar, video.offset, video.size, tmp_path / "copy", LimitOptions(max_bytes=1999))
    assert caught.value.reason == Reason.TOO_MANY_BYTES
    with pytest.raises(RejectedError) as caught:
        copy_video(tmp_path / "gone.tar", 0, 1, tmp_path / "copy", LIMITS)
    assert caught.value.reason == Reason.MISSING
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(ManifestError, match="not a regular file"):
        list(videos_of(tmp_path / "pipe.tar"))
    huge = bytearray(_header(b"long", 1 << 40, b"x"))
    for data, part in (
        (bytes(huge) + whole, "the name of a member at byte 0 has 1099511627776 bytes"),
        (b"\x1f\x8b" + whole, "It is compressed"),
        (whole[:1024] + b"damaged" + whole[1031:], "or damaged, at byte 1024"),
        (_header(b"a", -1, b"0") + whole, "or damaged, at byte 0"),
        (b"short", "or damaged, at byte 0"),
    ):
        tar.write_bytes(data)
        with pytest.raises(ManifestError) as error:
            list(videos_of(tar))
        assert part in str(error.value)


def _header(name: bytes, size: int, kind: bytes) -> bytes:
    header = bytearray(512)
    header[: len(name)] = name
    header[124:136] = b"\x80" + size.to_bytes(11) if size >= 0 else b"\xff" * 12
    header[156:157] = kind
    header[148:156] = b"%06o\0 " % (sum(header) + 8 * 32)
    return bytes(header)


MISTAKES: Mapping[str, tuple[Sequence[tuple[str, bytes]], str]] = {
    "no label": ([("a.mp4", b"1")], "'a.mp4' has no label"),
    "two videos": ([("a.mp4", b"1"), ("a.webm", b"1"), ("a.cls", b"1")], "'a.mp4' has other videos of the same name"),
    "twice": ([("a.mp4", b"1"), ("a.mp4", b"1")], "holds 'a.mp4' twice"),
    "a caption": ([("a.txt", b"word " * 99), ("a.mp4", b"1")], "A caption?"),
    "no JSON": ([("a.json", b"{"), ("a.mp4", b"1")], "'a.json' is not JSON"),
    "deep JSON": ([("a.json", b"[" * 60_000), ("a.mp4", b"1")], "'a.json' is not JSON"),
    "no text": ([("a.cls", b"\xff"), ("a.mp4", b"1")], "'a.cls' is not text"),
    "a huge label": ([("a.json", b" " * 70_000), ("a.mp4", b"1")], "has 70000 bytes, a label may have 65536"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_tar_and_member(tmp_path: Path, mistake: str) -> None:
    members, part = MISTAKES[mistake]
    tar = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path, None)
    assert str(tar) in str(caught.value)
    assert part in str(caught.value)


@settings(max_examples=80, deadline=None)
@given(place=st.integers(0, 1535), value=st.integers(0, 255), data=st.binary(max_size=2048))
def test_no_damage_makes_it_hang_or_crash(tmp_path_factory: pytest.TempPathFactory, place: int, value: int, data: bytes) -> None:
    tar = write_tar(tmp_path_factory.mktemp("damage") / "a.tar", [("x" * 120 + ".mp4", b"1"), ("x" * 120 + ".cls", b"1")])
    whole = bytearray(tar.read_bytes())
    whole[place] = value
    for content in (bytes(whole), data):
        tar.write_bytes(content)
        try:
            found = list(videos_of(tar))
        except ManifestError:
            continue
        assert all(video.size >= 0 and video.offset >= 0 for video in found)
    os.unlink(tar)
