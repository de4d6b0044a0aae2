"""Packaged recipes are listed and printed as they are, and the large ones say what the released settings say, number by number."""

import json
import math
from typing import Any

import pytest
import yaml

from jobs import recipes_list
from jobs.errors import RecipeError
from jobs.recipe import Recipe, load_recipe, recipe_names
from jobs.run_folder import total_steps
from tests.jobs.test_train import posmlp

SOMETHING: dict[str, object] = {  # Something-Something V1, S16, 4 GPUs
    "clip.num_frames": 16,
    "clip.sampling": "segment",
    "optimizer.betas": (0.9, 0.999),
    "optimizer.eps": 1e-8,
    "optimizer.lr": 4e-4,
    "optimizer.weight_decay": 0.05,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_lr": 1e-6,
    "optimizer.min_lr": 1e-6,
    "optimizer.clip_grad": 20,
    "optimizer.label_smoothing": 0.1,
    "optimizer.ema": 0,
    "augment.mix.mixup": 0.8,
    "augment.mix.cutmix": 1.0,
    "augment.mix.switch": 0.5,
    "augment.randaugment.m": 7,
    "augment.randaugment.n": 4,
    "augment.randaugment.std": 0.5,
    "augment.randaugment.increasing": True,
    "augment.area": (0.08, 1.0),
    "augment.flip": 0,
    "augment.flip_labels": (),
    "augment.erase.probability": 0.25,
    "augment.repeats": 2,
    "augment.size": 224,
    "augment.mean": (0.45, 0.45, 0.45),
    "augment.std": (0.225, 0.225, 0.225),
    "train.global_batch": 32 * 2,
    "train.micro_batch": 32 * 2 // 4,
    "train.epochs": 60,
    "eval.clips": 1,
    "eval.crops": 3,
    "eval.flip": False,
    "eval.fusion": "sum_logits",
}
KINETICS: dict[str, object] = {
    **SOMETHING,
    "optimizer.lr": 2e-4,
    "train.global_batch": 64,
    "train.micro_batch": 64 // 8,
    "augment.repeats": 1,
    "augment.flip": 0.5,
    "augment.eval_resize": 256,
    "clip.sampling": "dense",
    "clip.stride": 4,
    "clip.stride_s": None,
    "data.encode.short_side": 256,
    "eval.clips": 4,
    "eval.crops": 1,
}
RELEASED = {"ssv1_s16": (SOMETHING, 5, 174), "ssv2_s16": (SOMETHING, 5, 174), "k400_s16": (KINETICS, 10, 400)}


def value(recipe: Recipe, key: str) -> object:
    found: object = recipe
    for name in key.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("name", RELEASED)
def test_released_settings(name: str) -> None:
    expected, warmup_epochs, num_classes = RELEASED[name]
    recipe = load_recipe(name)
    assert {key: value(recipe, key) for key in expected} == expected
    assert recipe.optimizer.warmup * recipe.train.epochs == pytest.approx(warmup_epochs, rel=1e-12)
    model = recipe.network(num_classes).resolve()
    assert (model.widths, model.depths, model.drop_path) == ((72, 144, 288, 576), (3, 4, 9, 3), 0.1)
    assert model.decay_dictionaries  # only norms and 1-D parameters are spared
    assert recipe.augment.jitter is None  # what is not in the list is off


def test_an_epoch_counts_clips_not_views() -> None:
    assert total_steps(load_recipe("ssv1_s16"), 86_017) == math.ceil(60 * 86_017 / 32)
    assert total_steps(load_recipe("k400_s16"), 240_000) == math.ceil(60 * 240_000 / 64)


def test_every_recipe_is_listed_with_its_first_line() -> None:
    listed = {recipe.name: recipe for recipe in recipes_list.run()}
    assert list(listed) == recipe_names()
    for name, recipe in listed.items():
        first = recipes_list.text(name).splitlines()[0]
        assert first == f"# {recipe.summary}"
        assert len(recipe.summary) > 20
    assert "posmlp_s" in listed["k400_s16"].model
    assert "dense every 4" in listed["k400_s16"].data


def test_the_command_lists_and_prints() -> None:
    done = posmlp("recipes", "--json")
    assert done.returncode == 0, done.stderr
    listed: list[dict[str, Any]] = json.loads(done.stdout)
    assert [entry["name"] for entry in listed] == recipe_names()
    printed = posmlp("recipes", "weizmann")
    assert printed.stdout == recipes_list.text("weizmann")
    assert yaml.safe_load(printed.stdout)["version"] == 1


def test_an_unknown_name_is_explained() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'k400_s16'"):
        recipes_list.text("k400_s")
    with pytest.raises(RecipeError, match="no packaged recipe"):
        recipes_list.text("../../pyproject")
