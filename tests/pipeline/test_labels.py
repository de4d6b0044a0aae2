"""Label files as their publishers write them: told from their content, read to the same manifest, mistakes named with file and line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ManifestError
from pipeline.label_file import FORMATS, detect, open_table
from pipeline.labels import LabelFiles
from pipeline.manifest import Manifest, list_videos, read_manifest
from tests.pipeline.test_manifest import touch

KINETICS = "label,youtube_id,time_start,time_end,split\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def error(videos: Path, labels: LabelFiles, **options: str) -> str:
    with pytest.raises(ManifestError) as caught:
        read_manifest(videos, labels, **options)  # type: ignore[arg-type]
    return str(caught.value)


def facts(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """Path -> label and splits."""
    return {source.path: (source.label, *source.splits) for source in manifest.sources}


FILES = {  # name, text, format
    "csv": ("a.csv", "label,path\nrun,a.mp4\n", "csv"),
    "csv, header with spaces and a byte order mark": ("a.csv", "\ufeffpath , label\na.mp4,run\n", "csv"),
    "tsv": ("a.csv", "path\tlabel\na.mp4\trun\n", "tsv"),
    "jsonl": ("a.txt", '{"path": "a.mp4", "label": "run"}\n', "jsonl"),
    "kinetics": ("a.csv", KINETICS + "run,abc,1,11,train\n", "kinetics"),
    "something, v2": ("a.json", ' [{"id": "7", "label": "x", "template": "[x]"}]', "something"),
    "something, v1": ("a.csv", "100;Pushing something; quickly\n", "something"),
    "list, space": ("a.csv", "b c/1.mp4 3\n", "list"),
    "list, comma": ("a.csv", "b/1.mp4,3\n", "list"),
    "list, frames": ("a.txt", "\nb/1 40 3\n", "list"),
    "classes": ("a.json", '{"a": "0",\n "b": "1"}', "classes"),
    "classes in a line": ("a.json", '{"a": "0", "b": "1"}', "classes"),
    "nothing known": ("a.csv", "file,class\na.mp4,run\n", "csv"),
    "empty": ("a.csv", "", "csv"),
}


@pytest.mark.parametrize(("name", "text", "kind"), FILES.values(), ids=FILES)
def test_the_format_is_told_from_the_content(tmp_path: Path, name: str, text: str, kind: str) -> None:
    assert detect(write(tmp_path / name, text)) == kind
    assert kind in FORMATS or kind == "classes"


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.text("ab ._-é'", min_size=1, max_size=6), st.text('run "é\t,', min_size=1, max_size=5).filter(lambda x: x.strip())),
        min_size=1, max_size=5, unique_by=lambda row: row[0].strip(),
    )
)  # fmt: skip
def test_tables_say_the_same_in_every_format(tmp_path_factory: pytest.TempPathFactory, rows: Sequence[tuple[str, str]]) -> None:
    import csv

    folder = tmp_path_factory.mktemp("tables")
    records = [{"path": f"{name}x.mp4", "label": label, "split": "train", "more": "1"} for name, label in rows]
    for kind, delimiter in (("csv", ","), ("tsv", "\t")):
        with (folder / kind).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)
    write(folder / "jsonl", "".join(json.dumps(record) + "\n" for record in records))
    read = {kind: [record for _, record in open_table(folder / kind).records] for kind in ("csv", "tsv", "jsonl")}
    assert read["csv"] == read["tsv"] == read["jsonl"] == [[row["path"], row["label"], row["split"]] for row in records]


NAMES = {  # file of the clip "abc-_defgh1" of class "massaging person's head", seconds 5 to 15
    "trimmed, in a class folder": "massaging person's head/abc-_defgh1_000005_000015.mp4",
    "underscores, below the split": "train/massaging_person's_head/abc-_defgh1_000005_000015.mkv",
    "flat, other extension": "abc-_defgh1_000005_000015.webm",
    "flat, plain numbers": "abc-_defgh1_5_15.mp4",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_kinetics_clips_are_found_under_their_usual_names(tmp_path: Path, name: str) -> None:
    videos = touch(tmp_path / "videos", [name, "other/abc-_defgh1_000006_000016.mp4", "other/xabc-_defgh1.mp4"])
    labels = write(tmp_path / "train.csv", KINETICS + "massaging person's head,abc-_defgh1,5,15,validate\n")
    manifest = read_manifest(videos, labels)
    assert facts(manifest) == {name: ("massaging person's head", "val")}
    assert (manifest.sources[0].start_s, manifest.format) == (None, "official Kinetics list (data.format=kinetics)")


def test_kinetics_clips_named_by_id_alone_are_not_guessed_at(tmp_path: Path) -> None:
    videos = touch(tmp_path / "videos", ["run/abcdefghij1.mp4", "run/abcdefghij2_000000_000010.mp4"])
    labels = write(tmp_path / "k.csv", KINETICS + "run,abcdefghij1,5,15,train\nrun,abcdefghij2,0,10,val\n")
    message = error(videos, labels)
    assert all(part in message for part in ("1 files", "run/abcdefghij1.mp4", "data.format=kinetics ", "data.format=kinetics_whole")), (
        message
    )
    windows = [(source.start_s, source.end_s) for source in read_manifest(videos, labels, format="kinetics").sources]
    assert windows == [(None, None), (None, None)]
    windows = [(source.start_s, source.end_s) for source in read_manifest(videos, labels, format="kinetics_whole").sources]
    assert windows == [(5.0, 15.0), (None, None)]


def test_of_two_files_the_one_in_the_class_folder_is_the_clip(tmp_path: Path) -> None:
    name = "abcdefghij1_000005_000015"
    videos = touch(tmp_path / "videos", [f"jump rope/{name}.mp4", f"run/{name}.mp4"])
    labels = write(tmp_path / "k.csv", KINETICS + "Jump Rope,abcdefghij1,5,15,train\n")
    assert list(facts(read_manifest(videos, labels))) == [f"jump rope/{name}.mp4"]
    touch(videos, [f"jump_rope/{name}.mp4"])
    message = error(videos, labels)
    assert "k.csv, line 2: 2 files may be this clip" in message


def test_kinetics_missing_clips_have_the_name_they_would_have(tmp_path: Path) -> None:
    videos = touch(tmp_path / "videos", ["run/abcdefghij1_000005_000015.mp4"])
    labels = [write(tmp_path / f"{split}.csv", KINETICS + f"run,abcdefghij{n},5,15,{split}\n") for n, split in ((1, "train"), (2, "val"))]
    listed = list_videos(videos, labels)
    assert [source.path for source in listed.absent] == ["run/abcdefghij2_000005_000015"]
    assert "1 of 2 videos" in error(videos, labels)


CLIPS = [{"id": "1", "label": "pushing a cup", "template": "Pushing [something]"}, {"id": 22, "template": "Moving [part] of [something]"}]


def test_something_something(tmp_path: Path) -> None:
    videos = touch(tmp_path / "videos", ["1.webm", "22.mp4", "3.webm"])
    train = write(tmp_path / "something-something-v2-train.json", json.dumps(CLIPS))
    val = write(tmp_path / "something-something-v2-validation.json", json.dumps([{"id": "3", "template": "Pushing [something]"}]))
    numbers = write(tmp_path / "labels.json", json.dumps({"Pushing something": "0", "Moving part of something": "1", "Zoom": "2"}))
    manifest = read_manifest(videos, [train, val, numbers])
    moving, pushing = "Moving part of something", "Pushing something"
    assert facts(manifest) == {"1.webm": (pushing, "train"), "22.mp4": (moving, "train"), "3.webm": (pushing, "val")}
    assert manifest.classes == [pushing, moving]  # as the file numbers them; those without a video are left out
    assert read_manifest(videos, {"a": train, "b": val}).split_columns == ["split"]
    first = write(tmp_path / "v1-train.csv", "22;Moving part of something\n1;Pushing something; quickly\n")
    assert {label for label, _ in facts(read_manifest(videos, first)).values()} == {moving, "Pushing something; quickly"}


def test_lists(tmp_path: Path) -> None:
    videos = touch(tmp_path / "videos", ["b c/1.mp4", "2.avi", "3.mkv"])
    home = (videos / "3.mkv").resolve()
    spaces = write(tmp_path / "train.csv", f"b c/1.mp4 10\n2 2\n{home} 9\n")
    commas = write(tmp_path / "train.txt", f"b c/1.mp4,10\n2, 2\n{home},9\n")
    manifest = read_manifest(videos, {"train": spaces})
    assert facts(manifest) == {"b c/1.mp4": ("10", "train"), "2.avi": ("2", "train"), "3.mkv": ("9", "train")}
    assert manifest.classes == ["2", "9", "10"]
    assert manifest.sources == read_manifest(videos, {"train": commas}).sources
    names = write(tmp_path / "names.json", json.dumps({'"x"': 0, "y": 1, **{f"n{i}": i for i in range(2, 11)}}))
    assert read_manifest(videos, [spaces, names]).classes == ["n2", "n9", "n10"]
    rows = [list(record) for _, record in open_table(write(tmp_path / "frames.txt", "a b/c 40 3\n")).records]
    assert rows == [["a b/c", "40", "3"]]


def test_several_files_need_a_split_each(tmp_path: Path) -> None:
    videos = touch(tmp_path / "videos", ["1.mp4", "2.mp4"])
    train, other = write(tmp_path / "train.txt", "1.mp4 0\n"), write(tmp_path / "rest.txt", "2.mp4 0\n")
    assert "rest.txt has no split column" in error(videos, [train, other])
    assert facts(read_manifest(videos, {"train": train, "test2": other})) == {"1.mp4": ("0", "train"), "2.mp4": ("0", "test2")}
    table = write(tmp_path / "val.csv", "path,label,split1\n2.mp4,0,val\n")
    assert "has the split columns split, " in error(videos, [train, table])
    wrong = write(tmp_path / "k.csv", "path,label,split\n2.mp4,0,val\n")
    assert "k.csv, line 2: its split is 'val'" in error(videos, {"train": wrong})
    both = write(tmp_path / "val.txt", "1.mp4 0\n")
    message = error(videos, [train, both])
    assert all(part in message for part in ("1.mp4 has two values of 'split'", "train.txt, line 1", "val.txt, line 1")), message


MISTAKES: Mapping[str, tuple[str, str, list[str]]] = {  # name of the file, text, what the message says
    "jsonl, no JSON": ("a.jsonl", '{"path": "a.mp4", "label": "x"}\n{"path": \n', ["a.jsonl, line 2 is not a JSON object"]),
    "jsonl, a list": ("a.jsonl", '{"path": "a.mp4", "label": "x"}\n[1]\n', ["a.jsonl, line 2", "got a list"]),
    "jsonl, lacks": ("a.jsonl", '{"path": "a.mp4", "label": "x"}\n\n{"path": "b.mp4"}\n', ["a.jsonl, line 3 lacks 'label'"]),
    "jsonl, nested": ("a.jsonl", '{"path": "a.mp4", "label": ["x"]}\n', ["a.jsonl, line 1", "expected text or a number"]),
    "jsonl, no path": ("a.jsonl", '{"video": "a.mp4", "label": "x"}\n', ["lacks the column path"]),
    "tsv, fields": ("a.tsv", "path\tlabel\na.mp4\tx\ty\n", ["line 2 has 3 fields, the header 2"]),
    "kinetics, no label": ("a.csv", "youtube_id,time_start,time_end,split\nabc,1,2,test\n", ["lacks the column label"]),
    "kinetics, times": ("a.csv", KINETICS + "run,abc,1,soon,train\n", ["a.csv, line 2", "time_end 'soon'"]),
    "kinetics, backwards": ("a.csv", KINETICS + "run,abc,9,8,train\n", ["a.csv, line 2", "time_start before time_end"]),
    "kinetics, leaves": ("a.csv", KINETICS + "run,../../etc/passwd,1,2,train\n", ["a.csv, line 2", "expected an id"]),
    "kinetics, class leaves": ("a.csv", KINETICS + "../..,abc,1,2,train\n", ["a.csv, line 2", "stay in it"]),
    "something, no label": ("test.json", '[{"id": "1"}]', ["test.json, entry 1 (id 1) has no template", "test split"]),
    "something, no id": ("a.json", '[{"id": "1", "template": "x"}, {"template": "x"}]', ["a.json, entry 2 has no id"]),
    "something, strings": ("a.json", '["x"]', ["a.json, entry 1 has no id"]),
    "something, cut off": ("a.json", '[{"id": "1",\n "template"', ["a.json, line 2 is not valid JSON"]),
    "something, v1": ("a.csv", "1;x\n2\n", ["a.csv, line 2: got '2', expected id;label"]),
    "list, no number": ("a.txt", "a.mp4 1\na.mp4 run\n", ["a.txt, line 2: got 'a.mp4 run'", "whole number"]),
    "list, two labels": ("a.txt", "a.mp4 1\nb.mp4 1 2\n", ["a.txt, line 2", "more than one label"]),
    "list, leaves": ("a.txt", "../a.mp4 1\n", ["a.txt, line 1", "stay in it"]),
    "classes alone": ("labels.json", '{"a": "0"}', ["numbers classes and names no video"]),
    "a zero in a name": ("a.txt", "a\0b.mp4 1\n", ["a.txt, line 1", "stay in it"]),
    "a name too long": ("a.txt", "a" * 300 + ".mp4 1\n", ["a.txt, line 1", "cannot be looked up"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_file_and_line(tmp_path: Path, mistake: str) -> None:
    name, text, parts = MISTAKES[mistake]
    videos = touch(tmp_path / "videos", ["a.mp4", "1.webm"])
    message = error(videos, write(tmp_path / name, text))
    assert all(part in message for part in parts), message


def test_more_mistakes(tmp_path: Path) -> None:
    videos = touch(tmp_path / "videos", ["a.mp4", "a.webm"])
    assert "'a' may be a.mp4 or a.webm" in error(videos, write(tmp_path / "l.txt", "a 1\n"))
    for text, part in (('{"x": 1}', "must be 0 to 0"), ('{"x": 0,\n"y": "z"}', "but not one of class names"), ('{"x": 0,\n', "line 2")):
        assert part in error(videos, [write(tmp_path / "l.txt", "a.mp4 1\n"), write(tmp_path / "labels.json", text)])
    assert "label '1' is not one of the 1 classes" in error(videos, [tmp_path / "l.txt", write(tmp_path / "labels.json", '{\n"x": 0}')])
    assert "lacks the column label and path" in error(videos, tmp_path / "l.txt", format="csv")
    deep = write(tmp_path / "deep.json", "[" * 200_000)
    assert "deep.json" in error(videos, deep)
