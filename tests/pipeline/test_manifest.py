"""What the user has: labels and files that do not fit are named; the result depends on nothing but them."""

import csv
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ManifestError
from pipeline.manifest import Manifest, Source, read_manifest

PLAIN = [{"path": "a/1.mp4", "label": "run"}, {"path": "a/2.avi", "label": "jump"}, {"path": "b/1.mp4", "label": "run"}]


def touch(folder: Path, paths: Sequence[str]) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"video")
    return folder


def table(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(tmp_path: Path, rows: Sequence[Mapping[str, object]], suffix: str = ".csv", **options: object) -> Manifest:
    videos = touch(tmp_path / "videos", [str(row["path"]) for row in rows if ".." not in str(row["path"])])
    return read_manifest(videos, table(tmp_path / f"labels{suffix}", rows), **options)  # type: ignore[arg-type]


def error(videos: Path, labels: Path | None, **options: bool) -> str:
    with pytest.raises(ManifestError) as caught:
        read_manifest(videos, labels, **options)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_csv_and_parquet_say_the_same(tmp_path: Path, suffix: str) -> None:
    manifest = read(tmp_path, [{**row, "split": "train", "split2": "val", "group": "g", "frames": 7} for row in PLAIN], suffix)
    assert manifest.classes == ["jump", "run"]
    assert manifest.split_columns == ["split", "split2"]
    assert [source.key for source in manifest.sources] == ["a/1", "a/2", "b/1"]
    first = Source(key="a/1", path="a/1.mp4", label="run", splits=("train", "val"), group="g", size=5, start_s=None, end_s=None)
    assert manifest.sources[0] == first


def test_integer_labels_keep_their_order(tmp_path: Path) -> None:
    rows = [{"path": f"{label}.mp4", "label": label} for label in (10, 9, 2)]
    assert read(tmp_path, rows).classes == ["2", "9", "10"]
    assert read(tmp_path, rows, ".parquet").classes == ["2", "9", "10"]


def test_classes_from_folders(tmp_path: Path) -> None:
    touch(tmp_path, ["run/deep/1.mp4", "run/2.MP4", "jump/1.webm", "jump/notes.txt", ".hidden/1.mp4"])
    manifest = read_manifest(tmp_path, None)
    assert [(source.path, source.label) for source in manifest.sources] == [
        ("jump/1.webm", "jump"),
        ("run/2.MP4", "run"),
        ("run/deep/1.mp4", "run"),
    ]
    assert manifest.split_columns == ["split"]


def test_splits_from_folders(tmp_path: Path) -> None:
    touch(tmp_path, ["train/run/1.mp4", "validation/run/2.mp4", "test/jump/3.mp4"])
    manifest = read_manifest(tmp_path, None)
    assert {source.path: (source.label, source.splits) for source in manifest.sources} == {
        "train/run/1.mp4": ("run", ("train",)),
        "validation/run/2.mp4": ("run", ("val",)),
        "test/jump/3.mp4": ("jump", ("test",)),
    }


def test_windows_of_one_video_are_items(tmp_path: Path) -> None:
    rows = [
        {"path": "a.mp4", "label": "run", "start_s": "", "end_s": "1.5"},
        {"path": "a.mp4", "label": "jump", "start_s": "1.5", "end_s": ""},
        {"path": "a.mp4", "label": "run", "start_s": "", "end_s": ""},
    ]
    manifest = read(tmp_path, rows)
    assert [(source.key, source.start_s, source.end_s) for source in manifest.sources] == [
        ("a", None, None),
        ("a_000000000_000001500", None, 1.5),
        ("a_000001500_end", 1.5, None),
    ]


def test_keys_are_safe_and_unique(tmp_path: Path) -> None:
    paths = ["x/a.b.mp4", "x/a_b.mp4", "x/a_b.avi", "x/.mp4", "y.z/\u00e9 1.mp4", "x/a:b*.mp4"]
    keys = [source.key for source in read(tmp_path, [{"path": path, "label": "run"} for path in paths]).sources]
    assert len(set(keys)) == len(paths)
    assert not any("." in key for key in keys)
    assert "y_z/\u00e9 1" in keys


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.text(alphabet="ab._-é", min_size=1, max_size=4), min_size=1, max_size=8, unique=True),
    shuffle=st.randoms(use_true_random=False),
)
def test_depends_on_no_order(tmp_path_factory: pytest.TempPathFactory, names: list[str], shuffle: random.Random) -> None:
    folder = tmp_path_factory.mktemp("order")
    rows = [{"path": f"c/{name}.mp4", "label": name[0]} for name in names]
    touch(folder, [row["path"] for row in rows])
    first = read_manifest(folder, table(folder / "a.csv", rows))
    shuffle.shuffle(rows)
    second = read_manifest(folder, table(folder / "b.csv", rows))
    assert first == second
    assert len({source.key for source in first.sources}) == len(rows)


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 9)), min_size=1, max_size=60),
    shared=st.booleans(),
    seed=st.integers(0, 99),
    fraction=st.floats(0.05, 0.9),
)
def test_held_out_groups(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, int]], shared: bool, seed: int, fraction: float
) -> None:
    folder = tmp_path_factory.mktemp("groups")
    rows = [
        {"path": f"{i}.mp4", "label": label, "group": str(group) if shared else f"{label}{group}"}
        for i, (label, group) in enumerate(members)
    ]
    touch(folder, [row["path"] for row in rows])
    manifest = read_manifest(folder, table(folder / "a.csv", rows), val_fraction=fraction, seed=seed)
    splits_of_group: dict[str, set[str]] = {}
    groups_of_class: dict[str, set[str]] = {}
    splits_of_class: dict[str, set[str]] = {}
    for source in manifest.sources:
        splits_of_group.setdefault(source.group, set()).add(source.splits[0])
        groups_of_class.setdefault(source.label, set()).add(source.group)
        splits_of_class.setdefault(source.label, set()).add(source.splits[0])
    assert all(len(splits) == 1 for splits in splits_of_group.values())  # nobody is in both
    for label, groups in groups_of_class.items():
        if not shared:
            assert splits_of_class[label] == ({"train", "val"} if len(groups) > 1 else {"train"})


def test_held_out_share(tmp_path: Path) -> None:
    rows = [{"path": f"{label}/{i}.mp4", "label": label} for label in "ab" for i in range(50)]
    for label in "ab":
        splits = [source.splits[0] for source in read(tmp_path, rows, val_fraction=0.2).sources if source.label == label]
        assert splits.count("val") == 10


MISTAKES = {  # rows, what the one message must say
    "no path": ([{"file": "a.mp4", "label": "run"}], ["lacks the column path", "file, label"]),
    "no label": ([{"path": "a.mp4", "class": "run"}], ["lacks the column label"]),
    "two labels": (
        [{"path": "a.mp4", "label": "run"}, {"path": "./a.mp4", "label": "jump"}],
        ["a.mp4", "'run'", "'jump'", "line 2", "line 3"],
    ),
    "two splits": (
        [{"path": "a.mp4", "label": "run", "split": "train"}, {"path": "a.mp4", "label": "run", "split": "val"}],
        ["'split'", "'train'", "'val'"],
    ),
    "empty label": ([{"path": "a.mp4", "label": ""}], ["empty label", "a.mp4"]),
    "backwards": ([{"path": "a.mp4", "label": "run", "start_s": "2", "end_s": "1"}], ["line 2", "2", "1"]),
    "no number": ([{"path": "a.mp4", "label": "run", "start_s": "soon"}], ["start_s", "soon"]),
    "leaves": ([{"path": "../a.mp4", "label": "run"}], ["../a.mp4", "stay in it"]),
    "absolute": ([{"path": "/etc/passwd", "label": "run"}], ["/etc/passwd", "relative"]),
    "empty path": ([{"path": "", "label": "run"}], ["line 2"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(tmp_path: Path, mistake: str) -> None:
    rows, parts = MISTAKES[mistake]
    touch(tmp_path / "videos", ["a.mp4"])
    message = error(tmp_path / "videos", table(tmp_path / "labels.csv", rows))
    assert all(part in message for part in parts), message


def test_missing_files_are_listed_and_counted(tmp_path: Path) -> None:
    touch(tmp_path / "videos", ["a/1.mp4"])
    labels = table(tmp_path / "labels.csv", [*PLAIN, *({"path": f"gone{i}.mp4", "label": "run"} for i in range(7))])
    message = error(tmp_path / "videos", labels)
    assert all(part in message for part in ("9 of 10", "a/2.avi", "gone2.mp4", "data.allow_missing")), message
    assert "gone3.mp4" not in message
    manifest = read_manifest(tmp_path / "videos", labels, allow_missing=True)
    assert [source.path for source in manifest.sources] == ["a/1.mp4"]
    assert len(manifest.missing) == 9


def test_unreadable_files(tmp_path: Path) -> None:
    videos = touch(tmp_path / "videos", ["a.mp4"])
    labels = tmp_path / "labels.csv"
    for text, part in ((b"path,label\n\xff\xfe,run\n", "UTF-8"), (b"path,label\na.mp4,run,more\n", "line 2 has 3 fields"), (b"", "lacks")):
        labels.write_bytes(text)
        assert part in error(videos, labels)
    (tmp_path / "labels.parquet").write_bytes(b"PAR1 not really")
    assert "cannot be read" in error(videos, tmp_path / "labels.parquet")
    assert "not a file" in error(videos, tmp_path / "nowhere.csv")


def test_folders_without_videos(tmp_path: Path) -> None:
    assert "not a folder" in error(tmp_path / "nowhere", None)
    assert "no video" in error(tmp_path, None)
    touch(tmp_path, ["loose.mp4", "run/1.mp4"])
    assert "class folder" in error(tmp_path, None)


def test_links_that_leave_are_refused(tmp_path: Path) -> None:
    outside = touch(tmp_path / "outside", ["secret.mp4"])
    videos = touch(tmp_path / "videos", ["run/real.mp4"])
    (videos / "run" / "inside.mp4").symlink_to(videos / "run" / "real.mp4")
    assert len(read_manifest(videos, None).sources) == 2
    (videos / "run" / "link.mp4").symlink_to(outside / "secret.mp4")
    assert "leads out" in error(videos, None)
    (videos / "run" / "link.mp4").unlink()
    (videos / "folder").symlink_to(outside)
    message = error(videos, table(tmp_path / "labels.csv", [{"path": "folder/secret.mp4", "label": "run"}]))
    assert "leads out" in message
    whole = tmp_path / "linked videos"
    whole.symlink_to(videos)  # the folder itself may be one
    assert read_manifest(whole, table(tmp_path / "labels.csv", [{"path": "run/real.mp4", "label": "run"}])).sources


def test_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    try:
        (tmp_path / "run" / os.fsdecode(b"\xff.mp4")).write_bytes(b"video")
    except OSError:
        pytest.skip("this file system refuses names that are not UTF-8; run on ext4 or tmpfs")
    assert "UTF-8" in error(tmp_path, None)


def test_split_columns_in_one_order(tmp_path: Path) -> None:
    # dataset.json keeps its keys sorted; an index with its columns in another order would not open
    manifest = read(tmp_path, [{**row, "split2": "val", "split1": "train"} for row in PLAIN])
    assert manifest.split_columns == ["split1", "split2"]
    assert {source.splits for source in manifest.sources} == {("train", "val")}
    assert not manifest.drawn


def test_groups_that_are_decided_stay(tmp_path: Path) -> None:
    rows = [{"path": f"{number}.mp4", "label": "a", "group": f"g{number % 4}"} for number in range(40)]
    for held in (True, False):
        manifest = read(tmp_path, rows, held_groups={"g1": held, "elsewhere": True})
        assert {source.splits[0] for source in manifest.sources if source.group == "g1"} == {"val" if held else "train"}
        assert {source.splits[0] for source in manifest.sources} == {"train", "val"}


def test_a_class_folder_without_videos_is_named(tmp_path: Path) -> None:
    videos = touch(tmp_path / "videos", ["a/1.mp4", "b/notes.txt", ".git/x.txt"])
    assert "videos/b holds no video" in error(videos, None)
    split = touch(tmp_path / "split", ["train/a/1.mp4", "val/a/1.mp4", "val/b/notes.txt"])
    assert "split/val/b holds no video" in error(split, None)
