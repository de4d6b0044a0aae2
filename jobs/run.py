"""posmlp run: raw videos -> dataset -> training -> evaluation -> report. Each stage skips what is done and resumes what is not."""

import click

from jobs import build, evaluate, report, train
from jobs.errors import RecipeError
from jobs.recipe import Recipe


def run(recipe: Recipe) -> dict[str, object]:
    """Runs every stage and returns the contents of `eval.json`. Raises PipelineError, ClusterError or JobError."""
    if recipe.data.videos is None and recipe.data.dir is None:
        raise RecipeError("data.videos is not set: add data.videos=FOLDER (raw videos), or data.dir=FOLDER (a built dataset).")
    if recipe.data.videos is not None:
        click.echo(build.summary(recipe.dataset_dir, build.build_dataset(recipe)))
    train.run(recipe)
    result = evaluate.run(recipe.run_dir)
    path = report.write_report(recipe.run_dir)
    click.echo(f"{evaluate.headline(result)}\nreport: {path}")
    return result
