"""Keyframes with boxes from label file to batch: which frames, which bytes, what is refused, and that boxes are where the pixels are."""

import csv
import json
import shutil
import tarfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from jobs import amend, append, build, data_card, diff, info, leaks, run_folder, validate
from jobs.build_commit import read_quarantine
from jobs.build_shard import ShardTask, build_shard, record_path
from jobs.recipe import parse_overrides
from jobs.view_items import Filter, Items
from pipeline.boxes import in_crop
from pipeline.errors import DatasetError, ManifestError
from pipeline.index import Dataset, DatasetInfo
from pipeline.loader import Batch, Loader
from pipeline.mixture import Mixture
from pipeline.options import AugmentOptions, ClipOptions, EncodeOptions, LimitOptions, LoaderOptions, MixOptions, RandAugmentOptions
from pipeline.requests import Planner, eval_requests, train_requests
from tests.jobs.test_build import snapshot
from tests.pipeline.numbered import encode, read_number

CLIP = ClipOptions(num_frames=4, stride=3)
WIDTH, HEIGHT, NUM = 128, 96, 30  # of the videos with a painted box, and their frames


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_after_the_other(tasks: Sequence[ShardTask], num_cpus: int | None) -> None:
        for task in tasks:
            if not record_path(task.work, task.number).is_file():
                build_shard(task)

    monkeypatch.setattr(build, "build_shards", one_after_the_other)
    monkeypatch.setattr(append, "build_shards", one_after_the_other)


def make(videos: Path, labels: Path | list[Path], out: Path, *, format: str = "auto", **encode: object) -> DatasetInfo:
    options = EncodeOptions(**{"gop": 8, **encode})  # type: ignore[arg-type]
    return build.run(videos=videos, labels=labels, out=out, encode=options, limits=LimitOptions(), format=format)


def load(dataset: Dataset, augment: AugmentOptions, steps: int = 1, seed: int = 0) -> list[Batch]:
    rows = dataset.rows("split", "train")
    requests = train_requests(
        dataset, rows, seed=seed, global_batch=4, micro_batch=4, rank=0, world_size=1, start_step=0, end_step=steps, clip=CLIP,
        augment=augment,
    )  # fmt: skip
    with Loader(
        dataset, requests, micro_batch=4, clip=CLIP, augment=augment, options=LoaderOptions(), threads=2, on_damage="substitute"
    ) as loader:
        return list(loader)


def painted_box(frame: int) -> tuple[int, int, int, int]:
    return 16 + 2 * frame, 20 + frame, 48 + 2 * frame, 52 + frame


def painted(path: Path) -> None:
    """A video with a white box that moves over dark grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "12", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(NUM):
            picture = np.full((HEIGHT, WIDTH, 3), 40, dtype=np.uint8)
            x1, y1, x2, y2 = painted_box(number)
            picture[y1:y2, x1:x2] = 235
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def by_frame(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two painted videos with a box in every frame, in pixels; frame 3 of one has a second box and a second label; some are wrong."""
    folder = tmp_path_factory.mktemp("by_frame")
    lines = ["path,frame,x1,y1,x2,y2,label,person,split"]
    for name, label in (("a", "walk"), ("b", "run")):
        painted(folder / "videos" / f"{name}.mp4")
        lines += [f"{name}.mp4,{n},{','.join(map(str, painted_box(n)))},{label},1,train" for n in range(NUM)]
    lines += [f"a.mp4,3,{','.join(map(str, painted_box(3)))},wave,1,train", "a.mp4,3,0,0,8,8,run,2,train"]
    lines += ["a.mp4,30,0,0,8,8,run,2,train", "b.mp4,5,0,0,640,8,run,2,train"]
    (folder / "boxes.csv").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)  # type: ignore[attr-defined]
        make(folder / "videos", folder / "boxes.csv", folder / "data")
    return folder


def test_keyframes_share_a_stored_video(by_frame: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = Dataset.open(by_frame / "data")
    said, table = dataset.info, dataset.boxes()
    assert said.boxes is not None
    assert table is not None
    assert (said.num_items, said.num_frames, said.classes, said.boxes.num_boxes, said.boxes.most_classes) == (
        59, 60, ["run", "walk", "wave"], 60, 3
    )  # fmt: skip
    names: list[str] = []
    for shard in said.shards:
        with tarfile.open(by_frame / "data" / shard.file) as tar:
            names += tar.getnames()
    assert sorted(names) == ["a.cls", "a.json", "a.mp4", "b.cls", "b.json", "b.mp4"]
    keys = [dataset.text("key", row) for row in range(len(dataset))]
    assert sorted(keys) == [f"a~f{n:06d}" for n in range(NUM)] + [f"b~f{n:06d}" for n in range(NUM) if n != 5]
    for row, key in enumerate(keys):
        item, number = dataset.item(row), int(key[-6:])
        assert (item.begin, item.end, item.keyframe) == (0, NUM, number)
        corners = table.of(row).corners * np.array([WIDTH, HEIGHT] * 2)
        assert np.rint(corners[-1]).astype(int).tolist() == list(painted_box(number))
    three = table.of(keys.index("a~f000003"))
    assert np.argwhere(three.labels).tolist() == [[0, 0], [1, 1], [1, 2]]
    assert three.persons.tolist() == [2, 1]
    rejects = [(row["path"], row["reason"], row["detail"]) for row in read_quarantine(dataset)]
    assert rejects == [
        ("a.mp4", "keyframe_outside", "frame 30: the video has 30 frames"),
        ("b.mp4", "box_outside", "frame 5: the box 0, 0, 640, 8 in a frame of 128x96"),
    ]
    before = snapshot(by_frame / "data")
    make(by_frame / "videos", by_frame / "boxes.csv", by_frame / "data")
    assert snapshot(by_frame / "data") == before
    assert "CSV of boxes by frame (data.format=boxes): 61 keyframes in 2 videos, 3 classes" in capsys.readouterr().err


def test_the_same_request_gives_the_same_bytes(by_frame: Path, tmp_path: Path) -> None:
    lines = (by_frame / "boxes.csv").read_text().splitlines()
    shuffled = tmp_path / "boxes.csv"
    shuffled.write_text("\n".join([lines[0], *reversed(lines[1:])]))
    make(by_frame / "videos", shuffled, tmp_path / "data")
    content = [
        {name: value[2] for name, value in snapshot(root).items() if not name.startswith(".")}
        for root in (by_frame / "data", tmp_path / "data")
    ]
    assert content[0] == content[1]


def test_datasets_differ_in_boxes(by_frame: Path, tmp_path: Path) -> None:
    """One box is moved, one has another person; a class gets another number because one more is before it."""
    text = (by_frame / "boxes.csv").read_text().replace("a.mp4,4,24,24,56,56", "a.mp4,4,24,24,56,57").replace("2,train", "9,train")
    (tmp_path / "boxes.csv").write_text(text.replace("b.mp4,7,30,27,62,59,run", "b.mp4,7,30,27,62,59,a"))
    make(by_frame / "videos", tmp_path / "boxes.csv", tmp_path / "data")
    found = diff.run(by_frame / "data", tmp_path / "data")
    items = found["items"]
    assert isinstance(items, dict)
    assert {kind: entry["keys"] for kind, entry in items.items() if entry["num"]} == {
        "label": ["b~f000007"], "boxes": ["a~f000003", "a~f000004", "b~f000007"]
    }  # fmt: skip
    assert not found["equal"]
    diff.show(found)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_batch_has_its_boxes_where_its_pixels_are(by_frame: Path, flip: float) -> None:
    """Strong crops: boxes are compared with where the keyframe is white, and with the parameters in plain NumPy."""
    dataset = Dataset.open(by_frame / "data")
    augment = AugmentOptions(size=96, area=(0.2, 1.0), flip=flip, repeats=2, mean=(0, 0, 0), std=(1, 1, 1), flip_labels=(("walk", "wave"),))
    batches, cut, gone = load(dataset, augment, steps=12), 0, 0
    for batch in batches:
        assert batch.boxes is not None
        assert batch.boxes.clips.tolist() == sorted(batch.boxes.clips.tolist())
        for slot, (key, parameters) in enumerate(zip(batch.keys, batch.parameters, strict=True)):
            number = int(key[-6:])
            mine = batch.boxes.clips == slot
            corners, labels = batch.boxes.corners[mine].numpy(), batch.boxes.labels[mine].numpy()
            assert parameters.flip == bool(flip)
            assert parameters.frames.tolist() == [min(max(number + 3 * (i - 2), 0), NUM - 1) for i in range(4)]
            white = batch.clips[slot, 0, 2].numpy() > 0.55  # frame T div 2
            if key == "a~f000003":
                continue  # of whose boxes one is not painted
            y0, x0, y1, x1 = parameters.roi
            box = np.array(painted_box(number), dtype=np.float64)
            expected = np.clip((box - [x0, y0, x0, y0]) / [x1 - x0, y1 - y0, x1 - x0, y1 - y0], 0, 1)
            expected = np.array([1 - expected[2], expected[1], 1 - expected[0], expected[3]]) if flip else expected
            cut += bool(((expected == 0) | (expected == 1)).any())
            if expected[0] >= expected[2] or expected[1] >= expected[3]:
                gone += 1
                assert len(corners) == 0
                assert not white.any()
                continue
            np.testing.assert_allclose(corners, [expected], atol=1e-6)
            classes = {("a", 0.0): [0, 1, 0], ("b", 0.0): [1, 0, 0], ("a", 1.0): [0, 0, 1], ("b", 1.0): [1, 0, 0]}
            assert labels.tolist() == [classes[key[0], flip]]
            if (expected[2:] - expected[:2]).min() * 96 > 6:
                rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
                seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 96
                np.testing.assert_allclose(corners[0], seen, atol=4 / 96)
    assert cut > 4
    assert gone > 0


def test_ava_whole_videos_and_cut_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Frames carry their numbers: the keyframe of a second is the frame that is shown then, whatever was cut off, windows included."""
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "film.mp4").write_bytes(encode(250, first=0, height=96))  # 10 s
    (videos / "other.mp4").write_bytes(encode(50, first=500, height=96))
    lines = ["film,0007,.1,.2,.3,.4,2,0", "film,0009,.1,.2,.3,.4,2,0", "film,0009,.1,.2,.3,.4,5,0", "film,0012,0,0,1,1,2,0"]
    labels, names = tmp_path / "ava_train.csv", tmp_path / "names.pbtxt"
    labels.write_text("\n".join([*lines, "other,0001,0,0,1,1,5,1"]) + "\n")
    names.write_text('item { name: "sit" id: 2 }\nitem { name: "run" id: 5 }\n')
    out = tmp_path / "data"
    make(videos, [labels, names], out, max_member_s=2.0)
    assert "AVA list of boxes, seconds of the whole videos (data.format=ava): 4 keyframes in 2 videos, 2 classes" in capsys.readouterr().err
    dataset = Dataset.open(out)
    keys = {dataset.text("key", row): row for row in range(len(dataset))}
    # 7 s to 12 s are annotated, 2 s to 10 s are there: 200 frames in 5 windows, of which those without a keyframe are not stored.
    film = "film_000002000_000017000"
    assert set(keys) == {f"{film}~0003~t000007000", f"{film}~0004~t000009000", "other_000000000_000006000~t000001000"}
    numbers = {"7": 175, "9": 225, "1": 525}
    for key, row in keys.items():
        (batch,) = load_rows(dataset, [row])
        assert batch.boxes is not None
        picture = (batch.clips[0, :, 2] * 255).permute(1, 2, 0).round().to(torch.uint8).numpy()
        assert read_number(picture) == numbers[key[-4]]
    assert dataset.info.classes == ["sit", "run"]
    assert [(row["reason"], row["detail"]) for row in read_quarantine(dataset)] == [
        (
            "keyframe_outside",
            "second 12: what there is of the video goes from 2.000 to 10.000 s; for videos that were cut at second 900, set "
            "data.format=ava_cut",
        )
    ]
    assert validate.run(out) == []
    cut = tmp_path / "cut.csv"
    cut.write_text("film,0902,0,0,1,1,2,0\nfilm,0908.5,0,0,1,1,2,0\n")
    make(videos, [cut, names], tmp_path / "cut", format="ava_cut", fps=12.5)
    dataset = Dataset.open(tmp_path / "cut")
    found = {dataset.text("key", row): dataset.item(row).keyframe for row in range(len(dataset))}
    assert found == {"film~t000902000": 25, "film~t000908500": 106}


def load_rows(dataset: Dataset, rows: list[int]) -> list[Batch]:
    """Evaluation at the stored size."""
    clip = AugmentOptions(size=96, mean=(0, 0, 0), std=(1, 1, 1))
    chosen = np.array(rows, dtype=np.uint32)
    requests = eval_requests(dataset, chosen, micro_batch=len(rows), rank=0, world_size=1, clip=CLIP, augment=clip)
    with Loader(
        dataset, requests, micro_batch=len(rows), clip=CLIP, augment=clip, options=LoaderOptions(), threads=1, on_damage="report"
    ) as loader:
        return list(loader)


def test_what_looks_at_a_dataset_knows_keyframes(by_frame: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(by_frame / "data", root)
    assert validate.run(root) == []
    card = info.run(root)
    assert {name: card[name] for name in ("items", "keyframes", "boxes", "videos", "hours", "sizes")} == {
        "items": 59, "keyframes": 59, "boxes": 60, "videos": 2, "hours": 0.001, "sizes": {"128x96": 2}
    }  # fmt: skip
    assert "59" in data_card.render(root)
    (same,) = leaks.find(Dataset.open(root)).found  # the two videos, each once
    assert [copy.source for copy in same.copies] == ["b.mp4", "a.mp4"]
    items = Items(root)
    try:
        (row,) = items.page(Filter(text="a~f000003"), 0)[1]
        shown = items.row(row)
        assert (shown.keyframe, shown.shown, shown.damage, shown.label) == (3, 3, "", "run")
        assert shown.boxes == ("0.0, 0.0, 6.2, 8.3 %: run", "17.2, 24.0, 42.2, 57.3 %: walk, wave")
    finally:
        items.close()
    assert amend.exclude(root, ["a~f000003"]).num == 1
    assert info.run(root)["keyframes"] == 58
    with pytest.raises(DatasetError, match="labels are those of their boxes"):
        amend.relabel(root, {"a~f000004": "run"})
    data = bytearray((root / "boxes.arrow").read_bytes())
    data[-400] ^= 1
    (root / "boxes.arrow").write_bytes(data)
    assert [(each.file, each.what) for each in validate.run(root)] == [("boxes.arrow", "SHA-256 (altered, or of another build)")]
    with pytest.raises(DatasetError, match=r"boxes.arrow was altered"):
        run_folder.open_dataset(parse_overrides({"data": {"dir": str(root)}}, []), "train")
    (root / "boxes.arrow").write_bytes(data[:-8])
    with pytest.raises(DatasetError, match=r"boxes.arrow is missing or not \d+ bytes long"):
        Dataset.open(root).boxes()


def test_appending(by_frame: Path, tmp_path: Path) -> None:
    """New videos and a class behind the old ones; the boxes of old and new items stay theirs."""
    root, videos = tmp_path / "data", tmp_path / "videos"
    shutil.copytree(by_frame / "data", root)
    painted(videos / "c.mp4")
    labels = tmp_path / "more.csv"
    labels.write_text("path,frame,x1,y1,x2,y2,label,split\nc.mp4,4,0,0,64,48,climb,train\nc.mp4,9,0,0,128,96,run,train\n")
    old = Dataset.open(root)
    old_boxes = old.boxes()
    assert old_boxes is not None
    done = append.run(videos=videos, labels=labels, out=root)
    assert (done.num_items, done.new_classes, done.info.boxes_file) == (2, ["climb"], "boxes-000001.arrow")
    dataset = Dataset.open(root)
    table = dataset.boxes()
    assert table is not None
    for row in range(len(old)):
        np.testing.assert_array_equal(table.of(row).corners, old_boxes.of(row).corners)
        np.testing.assert_array_equal(table.of(row).labels[:, :3], old_boxes.of(row).labels)
    new = {dataset.text("key", row): table.of(row) for row in range(len(old), len(dataset))}
    assert {key: (boxes.corners.tolist(), boxes.labels.tolist()) for key, boxes in new.items()} == {
        "c~f000004": ([[0.0, 0.0, 0.5, 0.5]], [[False, False, False, True]]),
        "c~f000009": ([[0.0, 0.0, 1.0, 1.0]], [[True, False, False, False]]),
    }
    assert (validate.run(root), dataset.info.num_frames) == ([], 90)
    plain = tmp_path / "plain.csv"
    plain.write_text("path,label,split\nc.mp4,run,train\n")
    with pytest.raises(ManifestError, match="are keyframes with boxes, the new ones videos"):
        append.run(videos=videos, labels=plain, out=root)


def test_what_would_part_boxes_from_pixels_is_refused(by_frame: Path) -> None:
    dataset = Dataset.open(by_frame / "data")
    for clip, augment, key in (
        (CLIP, AugmentOptions(randaugment=RandAugmentOptions()), "augment.randaugment=null"),
        (CLIP, AugmentOptions(mix=MixOptions()), "augment.mix=null"),
        (ClipOptions(sampling="segment"), AugmentOptions(), "clip.sampling=dense"),
    ):
        with pytest.raises(DatasetError, match=key):
            Planner(dataset, clip, augment)
    with pytest.raises(DatasetError, match="cannot be mixed"):
        Planner(Mixture([dataset, dataset]), CLIP, AugmentOptions())
    recipe = parse_overrides({"data": {"dir": str(by_frame / "data")}}, [])
    with pytest.raises(DatasetError, match="boxes of a keyframe have up to 3 classes"):
        run_folder.open_dataset(recipe, "train")


def test_real_clips(test_data: Path, tmp_path: Path) -> None:
    """J-HMDB's list as it is: pixels of 320 x 240, frames from 0, one class per clip."""
    chosen: dict[str, list[list[str]]] = {}
    with (test_data / "jhmdb12" / "boxes.csv").open() as file:
        header, *lines = csv.reader(file)
    for line in lines:
        if len(chosen) < 2 or line[0] in chosen:
            chosen.setdefault(line[0], []).append(line)
    for name in chosen:
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(test_data / "jhmdb12" / name, tmp_path / "videos" / name)
    with (tmp_path / "boxes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *(line for lines in chosen.values() for line in lines)])
    make(tmp_path / "videos", tmp_path / "boxes.csv", tmp_path / "data", short_side=128)
    dataset = Dataset.open(tmp_path / "data")
    table = dataset.boxes()
    assert table is not None
    assert (len(dataset), dataset.info.num_quarantined) == (sum(map(len, chosen.values())), 0)
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["boxes"]["most_classes"] == 1
    for row in range(len(dataset)):
        item = dataset.item(row)
        line = chosen[dataset.text("source", row)][item.keyframe or 0]
        np.testing.assert_allclose(table.of(row).corners[0] * [320, 240, 320, 240], list(map(float, line[2:6])), atol=1e-3)
    whole = in_crop(table.of(0), (0.0, 0.0, float(item.height), float(item.width)), False, width=item.width, height=item.height)
    np.testing.assert_array_equal(whole.corners, table.of(0).corners)
    recipe = parse_overrides({"data": {"dir": str(tmp_path / "data")}}, [])
    assert len(run_folder.open_dataset(recipe, "train")) == len(dataset)
