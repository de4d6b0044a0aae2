"""posmlp recipes: the recipes that come with the package, and what each is for."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources

from rich.console import Console
from rich.table import Table

from jobs.errors import RecipeError
from jobs.recipe import load_recipe, recipe_names


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedRecipe:
    """name: as `posmlp run` takes it. summary: the first line of its file, a comment. model, data: what it trains, and on what."""

    name: str
    summary: str
    model: str
    data: str


def run() -> list[PackagedRecipe]:
    """All packaged recipes, by name."""
    return [_describe(name) for name in recipe_names()]


def text(name: str) -> str:
    """The YAML of a packaged recipe. Raises RecipeError naming the nearest one."""
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), 1)
        hint = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(recipe_names())}."
        raise RecipeError(f"'{name}' is no packaged recipe. {hint}")
    return (resources.files("jobs.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def _describe(name: str) -> PackagedRecipe:
    recipe = load_recipe(name)
    clip = recipe.clip
    every = f" every {clip.stride}" if clip.sampling == "dense" and clip.stride_s is None else ""
    depths = "-".join(map(str, recipe.network(1).resolve().depths))
    return PackagedRecipe(
        name=name,
        summary=text(name).partition("\n")[0].removeprefix("#").strip(),
        model=f"{recipe.model.preset}, depths {depths}",
        data=f"{clip.num_frames} frames, {clip.sampling}{every}, {recipe.augment.size} px, split column '{recipe.data.split_column}'",
    )


def as_json(recipes: Sequence[PackagedRecipe]) -> str:
    return json.dumps([asdict(recipe) for recipe in recipes], indent=1, ensure_ascii=False)


def show(recipes: Sequence[PackagedRecipe]) -> None:
    """Prints a table for people."""
    table = Table()
    for name in ("recipe", "what", "model", "data"):
        table.add_column(name, overflow="fold")
    for recipe in recipes:
        table.add_row(recipe.name, recipe.summary, recipe.model, recipe.data)
    Console().print(table)
