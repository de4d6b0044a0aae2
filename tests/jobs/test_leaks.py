"""data leaks: a video in two splits is found as bytes and as a picture, said by every command, and gone when one side is left out."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import av
import pytest
from click.testing import CliRunner, Result

from jobs import append, info, leaks, validate
from jobs.cli import posmlp
from jobs.synthesize import synthesize
from pipeline.errors import DatasetError
from pipeline.index import Dataset, read_info
from pipeline.media import write_video
from pipeline.options import EncodeOptions


def posmlp_data(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(posmlp, ["data", *map(str, arguments)], input=stdin)


def recode(source: Path, target: Path) -> None:
    """The same to look at, smaller and coarser."""
    with av.open(str(source)) as video:
        frames = [frame.reformat(96, 96, format="rgb24").to_ndarray() for frame in video.decode(video=0)]
    write_video(target, frames, 25.0, EncodeOptions(crf=30, gop=8))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight motion videos; of the first a copy in val, and of the second one that was encoded again; of the third one in the same split."""
    home = tmp_path_factory.mktemp("leaks")
    synthesize(home / "videos", num_clips=18, seed=3)
    with (home / "videos" / "labels.csv").open(newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)][:8]
    rows = [(path, "a", "train") for path in paths]
    shutil.copy(home / "videos" / paths[0], home / "videos" / "copy.mp4")
    recode(home / "videos" / paths[1], home / "videos" / "recoded.mp4")
    shutil.copy(home / "videos" / paths[2], home / "videos" / "twice.mp4")
    rows += [("copy.mp4", "b", "val"), ("recoded.mp4", "a", "val"), ("twice.mp4", "a", "train")]
    with (home / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    done = posmlp_data("build", "--videos", home / "videos", "--labels", home / "labels.csv", "--out", home / "dataset", "encode.gop=8")
    assert done.exit_code == 0, done.output
    assert "2 videos are in more than one split, 1 twice or more in the same one" in done.output
    return home / "dataset"


def test_leaks_are_found_and_said(built: Path) -> None:
    found = {each.copies[-1].key: each for each in leaks.run(built).found} | {each.copies[0].key: each for each in leaks.run(built).found}
    assert found["copy"].kind == "bytes"
    assert found["recoded"].kind == "content"
    assert [found[key].leaks for key in ("copy", "recoded", "twice")] == [["split"], ["split"], []]
    assert {copy.label for copy in found["copy"].copies} == {"a", "b"}
    assert posmlp_data("leaks", built).exit_code == 3
    plain = json.loads(posmlp_data("leaks", built, "--json").output)
    assert (plain["known"], len(plain["found"])) == (11, 3)
    assert info.run(built)["duplicates"] == "2 videos are in more than one split, 1 twice or more in the same one"
    assert posmlp_data("leaks", built, "--keys", "nowhere").exit_code == 1
    assert validate.run(built) == []


def test_leaving_one_side_out_mends_it(built: Path, tmp_path: Path) -> None:
    root = shutil.copytree(built, tmp_path / "dataset")
    keys = posmlp_data("leaks", root, "--keys", "train").output
    assert len(keys.split()) == 2
    assert posmlp_data("exclude", root, "--from", "-", stdin=keys).exit_code == 0
    assert posmlp_data("leaks", root).exit_code == 0
    assert Dataset.open(root).num_kept == 9


def test_datasets_without_digests_open_and_grow(built: Path, tmp_path: Path) -> None:
    root = shutil.copytree(built, tmp_path / "dataset")
    (root / "likeness.arrow").unlink()
    with pytest.raises(DatasetError, match="damaged or missing"):
        leaks.run(root)
    assert [problem.file for problem in validate.run(root)] == ["likeness.arrow"]
    raw = json.loads((root / "dataset.json").read_text())
    del raw["likeness_sha256"]  # as older versions wrote it
    (root / "dataset.json").write_text(json.dumps(raw))
    assert Dataset.open(root).info.fingerprint == read_info(built).fingerprint
    assert "not looked for" in str(info.run(root)["duplicates"])
    with pytest.raises(DatasetError, match="did not look for duplicates"):
        leaks.run(root)

    more = tmp_path / "more"
    more.mkdir()
    for name in ("new1.mp4", "new2.mp4"):
        shutil.copy(built.parent / "videos" / "copy.mp4", more / name)
    (tmp_path / "labels.csv").write_text("path,label,split\nnew1.mp4,a,train\nnew2.mp4,a,val\n")
    append.run(videos=more, labels=tmp_path / "labels.csv", out=root)
    found = leaks.run(root)
    assert found.known == 2
    assert [copy.key for copy in found.leaks[0].copies] == ["new1", "new2"]  # the older copies have no digest
    assert validate.run(root) == []


def test_an_append_is_compared_with_what_is_there(built: Path, tmp_path: Path) -> None:
    root = shutil.copytree(built, tmp_path / "dataset")
    more = tmp_path / "more"
    more.mkdir()
    shutil.copy(built.parent / "videos" / "twice.mp4", more / "again.mp4")
    (tmp_path / "labels.csv").write_text("path,label,split\nagain.mp4,a,val\n")
    append.run(videos=more, labels=tmp_path / "labels.csv", out=root)
    assert len(leaks.run(root).leaks) == 3
    other = replace(read_info(root), likeness_sha256="0" * 64)
    (root / "dataset.json").write_text(other.to_json())
    assert [problem.file for problem in validate.run(root)] == ["likeness-000001.arrow"]
