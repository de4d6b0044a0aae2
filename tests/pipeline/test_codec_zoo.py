"""105 files of ten codecs through `posmlp data build`: what decodes is in, frame by frame as it was; what does not is out, with a reason.

The canonical form is lossy, so the zoo is built without loss (crf 0) and compared with a plain decode within BOUND, which a wrong
frame, turn, range or matrix breaks, as the last test shows; at the default crf the loss itself is bounded on the small files.
"""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import ray

from jobs import build, validate
from jobs.recipe import parse_overrides
from pipeline.index import Dataset, Item
from pipeline.media import verify_and_transcode
from pipeline.options import EncodeOptions, LimitOptions
from tests.pipeline import plain_decode
from tests.pipeline.plain_decode import Planes, shown, stored

BOUND = 1.8  # mean absolute difference of a frame in code values (Y, Cb, Cr of 0 to 255), without loss
LOSSY_BOUND = 6.0  # the same at the default crf
EPSILON = 0.03  # by which a frame may be nearer to its neighbour than to itself, where nothing moves
PAIRS = 5  # pairs of neighbouring frames that are compared, spread over the video
SMALL = 320 * 240 * 60  # pixels of a video that is also encoded with loss

UNUSABLE = {  # decodes by the probe, and still cannot be trained on
    "annex-b.mp4": "truncated",  # 6 of its 745 frames are there
    **{f"video_colr_nclx_{name}.mp4": "too_small" for name in ("and_icc", "hdr10", "hdr10_full_range", "hlg", "hlg_full_range", "rgb")},
    "video_colr_nclx_two_colr.mp4": "too_small",  # 2x2 pixels, as the others
}
REASONS = {"no_video_stream": 17, "truncated": 5, "no_frames": 3, "damaged": 2, "encrypted": 1, "not_a_video": 1, "too_small": 8}


@pytest.fixture(scope="module")
def probed(test_data: Path) -> dict[str, int]:
    """Path -> frames that a full decode finds, 0 for none."""
    if not (test_data / "codec_zoo").is_dir():
        pytest.skip(f"{test_data}/codec_zoo is absent: set POSMLP_TEST_DATA to a folder that holds it")
    with (test_data / "codec_zoo" / "probe.csv").open(newline="") as file:
        return {row["path"]: int(row["n"] or 0) if row["ok"] == "1" else 0 for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def zoo(test_data: Path, probed: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("zoo")
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((path, "zoo") for path in probed)])
    paths = {"videos": str(test_data / "codec_zoo"), "labels": str(folder / "labels.csv"), "dir": str(folder / "dataset")}
    build.build_dataset(parse_overrides({"data": paths}, ["data.encode.crf=0", "data.encode.preset=ultrafast"]))
    ray.shutdown()
    return Dataset.open(folder / "dataset")


def test_every_file_is_in_whole_or_out_for_a_reason(zoo: Dataset, probed: dict[str, int]) -> None:
    assert len(probed) == 105
    kept = {zoo.text("source", row): zoo.item(row).num_frames for row in range(len(zoo))}
    quarantine = {row["path"]: row for row in pyarrow.parquet.read_table(zoo.root / "quarantine.parquet").to_pylist()}
    assert kept.keys() | quarantine.keys() == probed.keys()
    assert kept == {path: num_frames for path, num_frames in probed.items() if num_frames and Path(path).name not in UNUSABLE}
    assert {Path(path).name: row["reason"] for path, row in quarantine.items() if probed[path]} == UNUSABLE
    found = [row["reason"] for row in quarantine.values()]
    assert {reason: found.count(reason) for reason in found} == REASONS
    assert all(row["explanation"] for row in quarantine.values())
    assert validate.run(zoo.root) == []


def video_of(dataset: Dataset, item: Item, path: Path) -> Path:
    with (dataset.root / item.shard_file).open("rb") as file:
        file.seek(item.offset)
        path.write_bytes(file.read(item.size))
    return path


def some(num_frames: int) -> list[int]:
    """Numbers of the frames to compare: pairs of neighbours from the first to the last."""
    firsts = np.linspace(0, max(0, num_frames - 2), PAIRS).astype(int).tolist()
    return sorted({number for first in firsts for number in (first, first + 1) if number < num_frames})


def difference(a: Planes, b: Planes) -> float:
    return float(np.abs(a - b).mean())


def test_pixels_are_those_of_a_plain_decode(zoo: Dataset, test_data: Path, tmp_path: Path) -> None:
    for row in range(len(zoo)):
        item, name = zoo.item(row), zoo.text("source", row)
        source, wanted, size = test_data / "codec_zoo" / name, some(zoo.item(row).num_frames), (item.width, item.height)
        expected = list(shown(source, size, wanted))
        got = list(stored(video_of(zoo, item, tmp_path / "video.mp4"), wanted))
        assert len(got) == len(expected) == len(wanted), name
        for place, number in enumerate(wanted):
            own = difference(got[place], expected[place])
            assert own < BOUND, f"{name}, frame {number}"
            if number + 1 in wanted:
                assert own < difference(got[place], expected[place + 1]) + EPSILON, f"{name}, frame {number} is rather its successor"
        if item.num_frames * item.width * item.height <= SMALL:
            verify_and_transcode(source, tmp_path / "lossy.mp4", EncodeOptions(), LimitOptions())
            lossy = map(difference, stored(tmp_path / "lossy.mp4", wanted), expected)
            assert max(lossy) < LOSSY_BOUND, name


@pytest.mark.parametrize("name", ["bt601_full_range.mp4", "testsrc2_odd_height_vp9.mp4", "testsrc2_hdr.mp4"])
def test_the_bound_is_broken_by_a_wrong_decode(test_data: Path, probed: dict[str, int], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source = next(test_data / "codec_zoo" / path for path in probed if path.endswith(f"/{name}"))
    first, second = shown(source, (320, 240), [5, 6])
    assert difference(first, second) > BOUND
    assert difference(first, first[::-1, ::-1]) > BOUND
    assert difference(first, (first - 16) * np.float32(219 / 255) + 16) > BOUND  # full range taken for limited
    for number in (1, 2, 5, 6, 9):
        monkeypatch.setitem(plain_decode.MATRICES, number, plain_decode.BT709)
    monkeypatch.setattr(plain_decode, "BT601", plain_decode.BT709)
    (wrong,) = shown(source, (320, 240), [5])
    assert difference(first, wrong) > BOUND
