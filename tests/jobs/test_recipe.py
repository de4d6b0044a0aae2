"""Recipes are typed: what is wrong is named with its key, its line and the nearest right thing; what is right reads back."""

from pathlib import Path

import pytest

from jobs.errors import RecipeError
from jobs.recipe import load_recipe, parse_overrides, recipe_names


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


WRONG = [  # recipe, what the message must contain
    ("data:\n  encode:\n    gopp: 3\n", ["data.encode.gopp", "line 3", "did you mean 'data.encode.gop'"]),
    ("train:\n  epocs: 3\n", ["train.epocs", "line 2", "train.epochs"]),
    ("model:\n  preset: posmlp_x\n", ["model.preset", "line 2", "posmlp_s"]),
    ("optimizer:\n  lr: -1\n", ["optimizer.lr", "got -1", "positive"]),
    ("launch:\n  workers: many\n", ["launch.workers", "'many'", "line 2"]),
    ("train:\n  global_batch: 32\n  micro_batch: 7\n", ["train.global_batch", "multiple of train.micro_batch (7)"]),
    ("train: 3\n", ["train", "line 1"]),
    ("clips: {}\n", ["clips", "did you mean 'clip'"]),
    ("- a\n- b\n", ["expected sections"]),
    ("a: [1\n", ["not valid YAML", "line"]),
    ("version: 2\n", ["version", "got 2"]),
    ("run:\n  dir: s3://bucket/run\n", ["run.dir", "line 2", "got a URL, expected a path of this machine", "data.dir"]),
    ("data: {labels: s3://bucket/labels.csv}\n", ["data.labels", "got a URL, expected a path of this machine"]),
    ("data: {labels: {train: s3://bucket/labels.csv}}\n", ["data.labels", "got a URL, expected a path of this machine"]),
    ("train: {init_from: s3://bucket/run}\n", ["train.init_from", "got a URL, expected a path of this machine"]),
    ("data: {mix: [{dir: 's3://b/x?a=1'}]}\n", ["data.mix.0.dir", "credentials come from the environment"]),
    ("x: !!python/object/apply:os.system ['true']\n", ["not valid YAML"]),  # nothing in a recipe runs code
]


@pytest.mark.parametrize(("text", "parts"), WRONG, ids=[text.split("\n")[0] for text, _ in WRONG])
def test_wrong_recipes_are_explained(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("key", ["data.dir", "data.videos", "data.labels", "run.dir"])
def test_what_a_url_must_not_hold_is_not_shown(key: str) -> None:
    with pytest.raises(RecipeError, match=r"without user, password.*credentials come from the environment") as caught:
        load_recipe("weizmann", [f"{key}=s3://name:secret@bucket/x"])
    assert "secret" not in str(caught.value)


def test_urls_stay_urls(tmp_path: Path) -> None:
    given = ["data.dir=S3://bucket/d/", "data.videos=file:///videos", "data.mix=[{dir: gs://bucket/more}, {dir: more}]", "run.dir=out"]
    recipe = load_recipe("weizmann", given)
    saved = tmp_path / "resolved.yaml"
    saved.write_text(recipe.to_yaml())
    for each in (recipe, load_recipe(str(saved))):
        assert (each.dataset_dir, each.data.videos) == ("s3://bucket/d", Path("/videos"))
        assert [mixed.dir for mixed in each.data.mix] == ["gs://bucket/more", Path.cwd() / "more"]


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, "train:\n  epocs: 3\noptimizer:\n  lr: -1\n"))
    assert "train.epocs" in str(caught.value)
    assert "optimizer.lr" in str(caught.value)


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train=3", "train.epochs.x=3", "nowhere.at=1"])
def test_wrong_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path, "train: {epochs: 2}"), [override])


def test_overrides_win_and_the_resolved_recipe_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "train: {epochs: 2}"), ["train.epochs=5", "clip.stride_s=0.2", "run.dir=out", "launch.workers=2"])
    assert (recipe.train.epochs, recipe.clip.stride_s, recipe.launch.workers) == (5, 0.2, 2)
    assert recipe.run_dir == Path.cwd() / "out"
    saved = tmp_path / "resolved.yaml"
    saved.write_text(recipe.to_yaml())
    assert load_recipe(str(saved)) == recipe


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="weizmann"):
        load_recipe("weizman")


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_are_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.network(7).resolve().num_classes == 7


def test_the_model_takes_its_shape_from_data(tmp_path: Path) -> None:
    recipe = parse_overrides({}, ["model.num_frames=9", "clip.num_frames=8"])
    with pytest.raises(RecipeError, match=r"model\.num_frames: got 9, but clip\.num_frames says 8"):
        recipe.network(3)


def test_where_things_lie_does_not_change_a_run(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {epochs: 2}")
    here = load_recipe(path, ["run.dir=a", "launch.workers=1", "loader.threads=1", "checkpoint.every=3"])
    there = load_recipe(path, ["run.dir=b", "launch.workers=4", "loader.threads=9", "checkpoint.every=7"])
    other = load_recipe(path, ["optimizer.lr=0.1"])
    assert here.numerics() == there.numerics()
    assert {key for key, value in here.numerics().items() if other.numerics()[key] != value} == {"optimizer.lr"}
