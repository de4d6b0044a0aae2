"""Boxes: what label files say is read as it stands or refused by its line, and a crop shows a box where it shows the pixels in it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import boxes
from pipeline.boxes import LABELLED, STORED, Boxes, BoxTable, ItemBoxes, Keyframe, in_crop, keyframes
from pipeline.canonical import Trace
from pipeline.class_file import read_classes
from pipeline.errors import DatasetError, ManifestError
from pipeline.keyed import keyframe_frames
from pipeline.label_file import detect
from pipeline.manifest import Manifest, read_manifest
from pipeline.options import ClipOptions

AVA = "-5KQ66BBWC4,0902,0.077,0.151,0.283,0.811,80,1\n"
FRAMES = "video,frame,x1,y1,x2,y2,label,person\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(
    tmp_path: Path, *files: tuple[str, str], videos: tuple[str, ...] = ("a.mp4",), format: str = "auto", **options: object
) -> Manifest:
    for name in videos:
        write(tmp_path / "videos" / name, "video")
    paths = [write(tmp_path / name, text) for name, text in files]
    return read_manifest(tmp_path / "videos", paths if len(paths) > 1 else paths[0], format=format, **options)  # type: ignore[arg-type]


def rows(manifest: Manifest, place: int = 0) -> list[tuple[float, ...]]:
    """(time, corners, person, label) of a source's rows."""
    said = manifest.sources[place].boxes
    assert said is not None
    return [tuple(round(value, 4) for value in row) for row in said.rows.tolist()]


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.csv", AVA, "ava"),
        ("a.csv", "abc,902.5,0,0,1,1e-1,3\n", "ava"),
        ("a.csv", FRAMES, "boxes"),
        ("a.csv", "path,label,frame,x1_frac,y1_frac,x2_frac,y2_frac\n", "boxes"),
        ("a.csv", "path,label,frame\n", "csv"),
        ("a.csv", "abc,0902\n", "list"),
        ("a.csv", "id,name\n1,stand\n", "classes"),
        ("map.pbtxt", "# all\nitem {\n", "classes"),
        ("map.txt", 'label {\n name: "x"\n', "classes"),
    ],
)
def test_formats_are_told_from_the_content(tmp_path: Path, name: str, text: str, kind: str) -> None:
    assert detect(write(tmp_path / name, text)) == kind


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.pbtxt", "item {\n  name: \"bend/bow (at the waist)\"\n  id: 1\n}\nitem {\n  name: 'it\\'s }'\n  id: 12\n}\n"),
        (
            "m.pbtxt",
            'label { name: "bend/bow (at the waist)" label_id: 1 label_type: A_B }\n# c\nlabel{label_id:12 name:"it\'s }"}',
        ),
        ("m.csv", "name,id\nbend/bow (at the waist),1\nit's },12\n"),
    ],
)
def test_files_of_classes(tmp_path: Path, name: str, text: str) -> None:
    assert read_classes(write(tmp_path / name, text)) == {1: "bend/bow (at the waist)", 12: "it's }"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.pbtxt", 'item { name: "a" id: 1 }\nitem { name: "b" id: 1 }', "class 1 has two names"),
        ("m.pbtxt", 'item { name: "a" id: 1 }\nitem { name: "a" id: 2 }', "names one class twice"),
        ("m.pbtxt", 'item { name: "a" id: 1 }\n\nitem { name: "b" }', "line 3: a class needs a name and an id"),
        ("m.pbtxt", 'item { name: "a" id: 1 }\nitems: 3', "line 2: got 'items: 3'"),
        ("m.pbtxt", 'item { name: "a', "line 1: got 'item { name: \"a'"),
        ("m.csv", "id,name\nx,a\n", "line 2: id is 'x'"),
        ("m.csv", "id,name\n1,\n", "class 1 has no name"),
        ("m.csv", "id,name\n", "names no class"),
    ],
)
def test_a_file_of_classes_that_is_wrong(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read_classes(write(tmp_path / name, text))
    assert message in str(caught.value)


def test_ava(tmp_path: Path) -> None:
    """Two lists are two splits; videos have any extension and folder; classes that no box has are no classes; excluded seconds are out."""
    train = "b,0902,.1,.2,.3,.4,12,7\nb,0902,.1,.2,.3,.4,3,7\nb,0902,.5,.2,.9,.4,12,8\nb,0902,.5,.2,.9,.4,12,8\nb,0903,0,0,1,1,3,7\n"
    names = {"sit": 20, "stand": 12, "bend": 3, "x": 9}
    manifest = read(
        tmp_path,
        ("ava_train_v2.2.csv", train + "b,0904,0,0,1,1,3,7\nc,1000,0,0,1,1,3,1\n"),
        ("ava_val_v2.2.csv", "d,0010,0,0,1,.5,20,1\n"),
        ("ava_train_excluded_timestamps_v2.2.csv", "b,0904\nc,1000\n"),
        ("list.pbtxt", "".join(f'item {{ name: "{name}" id: {number} }}\n' for name, number in names.items())),
        videos=("trainval/b.mkv", "c.webm", "test/d.mp4"),
    )  # fmt: skip
    assert [(each.path, each.splits, each.start_s, each.end_s, each.label) for each in manifest.sources] == [
        ("test/d.mp4", ("val",), 5.0, 15.0, "sit"),
        ("trainval/b.mkv", ("train",), 897.0, 908.0, "bend"),  # bend and stand twice: the first
    ]
    assert (manifest.classes, manifest.box_classes) == (["bend", "stand", "sit"], ["bend", "stand", "sit"])
    assert rows(manifest, 1) == [
        (902.0, 0.1, 0.2, 0.3, 0.4, 7, 0),
        (902.0, 0.1, 0.2, 0.3, 0.4, 7, 1),
        (902.0, 0.5, 0.2, 0.9, 0.4, 8, 1),
        (903.0, 0.0, 0.0, 1.0, 1.0, 7, 0),
    ]


def test_ava_over_videos_that_were_cut(tmp_path: Path) -> None:
    manifest = read(tmp_path, ("a.csv", "a,0902,0,0,1,1,3\n"), format="ava_cut")
    (source,) = manifest.sources
    assert source.boxes is not None
    assert (source.start_s, source.end_s, source.boxes.origin_s, manifest.classes) == (None, None, 900.0, ["3"])
    assert rows(manifest) == [(902.0, 0.0, 0.0, 1.0, 1.0, -1, 0)]


def test_boxes_by_frame(tmp_path: Path) -> None:
    """The order of the rows means nothing; pixels and fractions are told by the columns' names, never by the values."""
    pixels = "x,frame,y2,x2,y1,x1,label,video,split,group\n,7,1,1,0,0,b,a,train,g\n,0,9,8,2,1,a,a,train,g\n"
    manifest = read(tmp_path, ("a.csv", pixels))
    (source,) = manifest.sources
    assert source.boxes is not None
    assert (source.boxes.in_pixels, source.boxes.timed, source.splits, source.group) == (True, False, ("train",), "g")
    assert rows(manifest) == [(0, 1, 2, 8, 9, -1, 0), (7, 0, 0, 1, 1, -1, 1)]
    lines = pixels.splitlines()
    assert read(tmp_path, ("a.csv", "\n".join([lines[0], lines[2], lines[1]]))).sources == manifest.sources
    fractions = read(tmp_path, ("b.csv", "path,frame,x1_frac,y1_frac,x2_frac,y2_frac,label\na.mp4,7,0,0,1,1,b\n"))
    assert fractions.sources[0].boxes is not None
    assert not fractions.sources[0].boxes.in_pixels


def test_missing_videos(tmp_path: Path) -> None:
    lists = ("a.csv", "a,1,0,0,1,1,3\nb,1,0,0,1,1,4\n")
    with pytest.raises(ManifestError, match="1 of 2 videos are not in"):
        read(tmp_path, lists)
    manifest = read(tmp_path, lists, allow_missing=True)
    assert ([source.path for source in manifest.sources], manifest.missing, manifest.classes) == (["a.mp4"], ["b"], ["3"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,x,0,0,1,1,3", "its time is 'x', expected seconds from 0"),
        ("a,-1,0,0,1,1,3", "its time is '-1'"),
        ("a,1,,0,1,1,3", "the box is ', 0, 1, 1', expected four numbers"),
        ("a,1,0,nan,1,1,3", "expected four numbers"),
        ("a,1,0,0,12,1,3", "the box 0, 0, 12, 1 is not in the frame: expected fractions from 0 to 1"),
        ("a,1,.5,0,.5,1,3", "the box .5, 0, .5, 1 has no area"),
        ("a,1,.6,0,.5,1,3", "has no area"),
        ("a,1,0,0,1,1,99", "label '99' is not in the file that numbers the classes"),
        ("a,1,0,0,1,1,", "its label is empty"),
        ("a,1,0,0,1,1,3,p", "person is 'p'"),
        ("a,1,0,0,1,1", "has 6 fields"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read(tmp_path, ("a.csv", f"a,1,0,0,1,1,3\n\n{line}\n"), ("m.csv", "id,name\n3,x\n"), format="ava")
    assert "a.csv, line 3" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FRAMES + "a,0.5,0,0,9,9,x,\n", "line 2: its frame is '0.5', expected a whole number"),
        (FRAMES + "a,5,9,0,9,9,x,\n", "line 2: the box 9, 0, 9, 9 has no area"),
        ("video,frame,x1,y1,x2,y2\na,1,0,0,1,1\n", "lacks the column label"),
        ("video,frame,label,x1,y1,x2,y2,x1_frac,y1_frac,x2_frac,y2_frac\n", "must have the corners of its boxes once"),
        ("video,frame,label,x1,y1,x2_frac,y2_frac\n", "must have the corners of its boxes once"),
        ("video,frame,x1,y1,x2,y2,label,split\na,0,0,0,1,1,x,train\na,1,0,0,1,1,x,val\n", "line 3: 'a' has another split or group"),
        (FRAMES + "a,0,0,0,1,1,x,\na.mp4,1,0,0,1,1,x,\n", "a.mp4 has boxes at"),
    ],
)  # fmt: skip
def test_a_wrong_list_by_frame(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read(tmp_path, ("a.csv", text), format="boxes")
    assert message in str(caught.value)


def test_lists_of_boxes_are_not_mixed_with_others(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be mixed with others: got boxes and csv"):
        read(tmp_path, ("train.csv", FRAMES + "a,0,0,0,1,1,x,\n"), ("val.csv", "path,label\na.mp4,x\n"))


def labelled(*values: tuple[float, ...]) -> np.ndarray:
    return np.array(list(values), dtype=LABELLED)


def test_where_a_keyframe_is_shown() -> None:
    """10 source frames at 10 per second, the last one longer, shown at 5 per second; corners in pixels of the source."""
    trace = Trace(decoded=[i / 10 for i in range(10)], shown=[i / 5 for i in range(5)], end_s=1.1, width=200, height=100)
    box = (0, 50, 200, 100, -1, 0)
    numbered = Boxes.of(labelled(*((n, *box) for n in (0, 1, 2, 9, 10))), timed=False, in_pixels=True)
    kept, refused = keyframes(numbered, trace)
    assert [(each.name, each.frame) for each in kept] == [("~f000000", 0), ("~f000001", 0), ("~f000002", 1), ("~f000009", 4)]
    assert refused == [(boxes.Reason.KEYFRAME_OUTSIDE, "frame 10: the video has 10 frames")]
    assert kept[0].rows.tolist() == [(0, 0.0, 0.5, 1.0, 1.0, 0, -1)]
    timed = Boxes.of(labelled(*((900 + t, *box) for t in (0, 0.39, 0.4, 1.05, 1.2))), timed=True, in_pixels=True, origin_s=900)
    kept, refused = keyframes(timed, trace)
    assert [(each.name, each.frame) for each in kept] == [
        ("~t000900000", 0), ("~t000900390", 1), ("~t000900400", 2), ("~t000901050", 4)
    ]  # fmt: skip
    assert refused == [(boxes.Reason.KEYFRAME_OUTSIDE, "second 901.2: what there is of the video goes from 900.000 to 901.100 s")]


@pytest.mark.parametrize(
    ("box", "stored"),
    [
        ((0, 0, 201, 100), (0.0, 0.0, 1.0, 1.0)),  # a pixel of rounding
        ((-1, 10, 20, 20), (0.0, 0.1, 0.1, 0.2)),
        ((0, 0, 202, 100), None),
        ((-3, 0, 10, 10), None),
        ((200, 0, 201, 10), None),  # nothing of it in the frame
    ],
)
def test_boxes_outside_the_frame(box: tuple[float, ...], stored: tuple[float, ...] | None) -> None:
    trace = Trace(decoded=[0.0], shown=[0.0], end_s=1.0, width=200, height=100)
    kept, refused = keyframes(Boxes.of(labelled((0, *box, -1, 0)), timed=False, in_pixels=True), trace)
    if stored is None:
        assert refused == [(boxes.Reason.BOX_OUTSIDE, f"frame 0: the box {', '.join(map(str, box))} in a frame of 200x100")]
    else:
        assert tuple(round(float(kept[0].rows[name][0]), 6) for name in boxes.CORNERS) == stored


def rectangles(side: int) -> st.SearchStrategy[tuple[int, int, int, int]]:
    """(a0, b0, a1, b1) with area, within side x side."""
    edges = st.lists(st.integers(0, side), min_size=2, max_size=2, unique=True).map(sorted)
    return st.tuples(edges, edges).map(lambda both: (both[0][0], both[1][0], both[0][1], both[1][1]))


CORNERS = rectangles(40)
ITEMS = st.lists(st.lists(st.tuples(CORNERS, st.integers(-1, 2), st.integers(0, 4)), min_size=1, max_size=6), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(items=ITEMS, first_row=st.integers(0, 3))
def test_what_is_stored_of_an_item_is_found_by_its_row(tmp_path_factory: pytest.TempPathFactory, items: list, first_row: int) -> None:
    """Against plain dictionaries: box and person -> labels."""
    trace = Trace(decoded=[0.0], shown=[0.0], end_s=1.0, width=40, height=40)
    found: list[Keyframe] = []
    for item in items:
        said = Boxes.of(labelled(*((0, *box, person, label) for box, person, label in item)), timed=False, in_pixels=True)
        found += keyframes(said, trace)[0]
    path = tmp_path_factory.mktemp("b") / "boxes.arrow"
    padding = [np.array([(0, 0, 0, 1, 1, 0, -1)], STORED).tobytes()] * first_row
    with path.open("wb") as file:
        parts = [boxes.table_of(padding, 0), boxes.table_of((each.rows.tobytes() for each in found), first_row)]
        boxes.write_table(file, parts)
    table = boxes.open_table(path, first_row + len(items), 5)
    expected = [{(box, person): {x for b, p, x in item if (b, p) == (box, person)} for box, person, _ in item} for item in items]
    for row, wanted in enumerate(expected, first_row):
        got = table.of(row)
        assert {
            (tuple(np.rint(corners * 40).astype(int).tolist()), int(person)): set(np.flatnonzero(labels).tolist())
            for corners, person, labels in zip(got.corners, got.persons, got.labels, strict=True)
        } == wanted
    assert len(table) == first_row + sum(map(len, expected))
    most = max(len(set().union(*each.values())) for each in expected)
    assert boxes.most_classes(table.table) == max(most, min(1, first_row))
    assert list(boxes.checked(table, 5)) == []
    labels = np.bincount([label for _, _, label in set(items[0])], minlength=5)
    assert found[0].label == int(labels.argmax())


def test_a_file_of_boxes_that_is_not_the_datasets(tmp_path: Path) -> None:
    path, packed = tmp_path / "boxes.arrow", [np.array([(0, 0, 0, 1, 1, 4, -1)], STORED).tobytes()] * 3
    with path.open("wb") as file:
        boxes.write_table(file, [boxes.table_of(packed, 0)])
    with pytest.raises(DatasetError, match="another index: its last row is 2, expected 3"):
        boxes.open_table(path, 4, 5)
    table = boxes.open_table(path, 3, 5)
    assert [what for _, what, _, _ in boxes.checked(table, 4)] == ["label of a box"] * 3
    whole = table.table
    gap = BoxTable(whole.take([0, 2]), 5)
    assert [what for _, what, _, _ in boxes.checked(gap, 5)] == ["next row with boxes"]
    newer = whole.replace_schema_metadata({b"version": b"2"})
    with pa.OSFile(str(tmp_path / "newer.arrow"), "wb") as sink, pa.ipc.new_file(sink, newer.schema) as writer:
        writer.write_table(newer)
    with pytest.raises(DatasetError, match="format version 2, expected 1"):
        boxes.open_table(tmp_path / "newer.arrow", 3, 5)
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DatasetError, match="damaged or missing"):
        boxes.open_table(cut, 3, 5)


@settings(max_examples=200, deadline=None)
@example(box=(0, 0, 1, 39), crop=(39, 0, 44, 1), flip=False)  # they touch
@given(
    box=rectangles(64),
    crop=rectangles(64),
    flip=st.booleans(),
)
def test_a_box_in_a_crop_is_where_its_pixels_are(box: tuple[int, ...], crop: tuple[int, ...], flip: bool) -> None:
    """Plain NumPy: paint the box, cut and mirror the picture, and look where the paint is."""
    picture = np.zeros((64, 64), dtype=bool)
    x1, y1, x2, y2 = box
    picture[y1:y2, x1:x2] = True
    y0, x0, bottom, right = crop
    cut = picture[y0:bottom, x0:right]
    cut = cut[:, ::-1] if flip else cut
    item = ItemBoxes(
        corners=np.array([box], dtype=np.float32) / 64, persons=np.array([5], dtype=np.int32), labels=np.array([[True, False]])
    )
    seen = in_crop(item, tuple(map(float, crop)), flip, width=64, height=64)  # type: ignore[arg-type]
    if not cut.any():
        assert (seen.corners.shape, seen.labels.shape, len(seen.persons)) == ((0, 4), (0, 2), 0)
        return
    rows_of, columns = np.flatnonzero(cut.any(axis=1)), np.flatnonzero(cut.any(axis=0))
    height, width = cut.shape
    expected = [columns[0] / width, rows_of[0] / height, (columns[-1] + 1) / width, (rows_of[-1] + 1) / height]
    np.testing.assert_allclose(seen.corners[0], expected, atol=1e-6)
    assert (seen.persons.tolist(), seen.labels.tolist()) == ([5], [[True, False]])


@settings(max_examples=60, deadline=None)
@given(num_frames=st.integers(1, 60), keyframe=st.integers(0, 59), length=st.integers(1, 16), stride_s=st.none() | st.floats(0.01, 0.3))
def test_a_clip_around_a_keyframe_has_it_in_its_middle(num_frames: int, keyframe: int, length: int, stride_s: float | None) -> None:
    keyframe = min(keyframe, num_frames - 1)
    frames = keyframe_frames(keyframe, num_frames, 25.0, ClipOptions(num_frames=length, stride=3, stride_s=stride_s))
    assert frames[length // 2] == keyframe
    assert frames.tolist() == sorted(frames.tolist())
    assert 0 <= frames[0] <= frames[-1] < num_frames
    if stride_s is None:
        middle = [min(max(keyframe + 3 * (i - length // 2), 0), num_frames - 1) for i in range(length)]
        assert frames.tolist() == middle
