"""data coverage: what it counts as there is what a build would find."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from jobs import coverage
from jobs.errors import RecipeError
from jobs.recipe import Format, label_files, load_recipe, parse_overrides
from pipeline.label_file import FOLDER_FORMATS, FORMATS
from pipeline.manifest import list_videos
from tests.pipeline.test_labels import KINETICS, write
from tests.pipeline.test_manifest import touch


def test_counts_per_class_and_split(tmp_path: Path) -> None:
    clips = [(f"abcdefghij{number}", "run" if number < 6 else "jump", "val" if number % 3 == 0 else "train") for number in range(10)]
    present = [f"{label}/{name}_000001_000011.mp4" for name, label, _ in clips if name[-1] in "0123"] + ["jump/abcdefghij9.mp4"]
    videos = touch(tmp_path / "videos", present)
    lists = {}
    for split in ("train", "val"):
        rows = "".join(f"{label},{name},1,11,{own}\n" for name, label, own in clips if own == split)
        lists[split] = write(tmp_path / f"{split}.csv", KINETICS + rows)
    found = coverage.run(videos, lists)
    assert (found["listed"], found["present"], found["missing"], found["share"]) == (10, 5, 5, 0.5)
    assert found["splits"] == {
        "split": {
            "train": {"listed": 6, "present": 2, "missing": 4, "share": 0.3333},
            "val": {"listed": 4, "present": 3, "missing": 1, "share": 0.75},
        }
    }
    classes = found["classes"]
    assert isinstance(classes, dict)
    assert {name: (counts["listed"], counts["present"]) for name, counts in classes.items()} == {"run": (6, 4), "jump": (4, 1)}
    assert found["missing_paths"] == [source.path for source in list_videos(videos, lists).absent]
    words = ["--videos", str(videos), "--labels", str(lists["train"]), "--labels", str(lists["val"])]
    done = subprocess.run([sys.executable, "-m", "jobs", "data", "coverage", *words, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == found
    coverage.show(found)


def test_nothing_there_is_an_answer_and_no_list_is_not(tmp_path: Path) -> None:
    videos = touch(tmp_path, ["other.mp4"])
    found = coverage.run(videos, write(tmp_path / "list.txt", "a.mp4 1\n"))
    assert (found["present"], found["missing_paths"]) == (0, ["a.mp4"])
    with pytest.raises(RecipeError, match="--labels"):
        coverage.run(videos, None)


def test_label_files_of_the_command_line_and_of_recipes(tmp_path: Path) -> None:
    strange = write(tmp_path / "a=b.csv", "")
    assert label_files([]) is None
    assert label_files(["a.csv"]) == "a.csv"
    assert label_files(["a.csv", "b.csv"]) == ["a.csv", "b.csv"]
    assert label_files(["train=a.csv", "val=b.csv"]) == {"train": "a.csv", "val": "b.csv"}
    assert label_files([str(strange)]) == str(strange)
    for given in (["train=a.csv", "b.csv"], ["train=a.csv", "train=b.csv"]):
        with pytest.raises(RecipeError, match="state the split of every file"):
            label_files(given)
    recipe = write(tmp_path / "r.yaml", "data:\n  labels: {train: a.csv, val: b.csv}\n  format: kinetics\n")
    data = load_recipe(str(recipe)).data
    assert data.labels == {"train": Path.cwd() / "a.csv", "val": Path.cwd() / "b.csv"}
    again = load_recipe(str(write(recipe, load_recipe(str(recipe)).to_yaml()))).data
    assert again == data
    assert parse_overrides({}, ["data.labels=[a.csv, b.csv]"]).data.labels == (Path.cwd() / "a.csv", Path.cwd() / "b.csv")
    assert set(get_args(Format)) == {"auto", *FORMATS, *FOLDER_FORMATS}
    with pytest.raises(RecipeError, match=r"data\.format \(line 10\): got 'kinetic'"):
        load_recipe(str(recipe), ["data.format=kinetic"])
