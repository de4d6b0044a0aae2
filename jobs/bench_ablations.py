"""posmlp bench ablations: one small recipe, one change at a time, equal budgets; what each change is worth.

Every variant is a training run of its own (`runs/ablations/<variant>-<seed>`), so the same command resumes: what is finished is
skipped. The base recipe is `jhmdb12` on another split than the one it reports, so that no choice is ever made on that one.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cluster.metrics import merge_steps, read_metrics
from jobs import build, evaluate, train
from jobs.recipe import Recipe, load_recipe
from model.presets import count_macs, count_parameters

RECIPE, SPLIT = "jhmdb12", "split2"
LAST = 50  # training steps
SEEDS = 3  # of what is compared closely
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "base: trunc_normal, parallel V1": (),
    "dictionaries start at zero": ("model.dictionary_init=zeros",),
    "temporal, then spatial": ("model.block=temporal_spatial",),
    "spatial, then temporal": ("model.block=spatial_temporal",),
    "joint": ("model.block=joint",),
    "version V2": ("model.version=v2",),
    "version V3": ("model.version=v3",),
    "version V4": ("model.version=v4",),
    "expansion 4": ("model.expansion=4",),
    "one group": ("model.groups=[1,1,1,1]",),
    "2-D stem": ("model.stem=2d",),
    "no decay of dictionaries": ("model.decay_dictionaries=false",),
    "colours instead of differences": ("model.modality=rgb",),
}
SEVERAL_SEEDS = frozenset(list(VARIANTS)[:2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of a variant: millions of parameters, GMACs of a clip; per seed, top-1 on the held-out videos and the mean loss of the last
    LAST training steps, which says how well it fits what it sees."""

    name: str
    parameters: float
    gmacs: float
    top1: list[float]
    loss: list[float]
    num_videos: int


def run(videos: Path, labels: Path, out: Path, steps: int) -> list[Outcome]:
    """Trains and judges what is missing, one variant after the other. Raises what train and evaluate raise."""
    outcomes = []
    for name, overrides in VARIANTS.items():
        results = []
        for seed in range(SEEDS if name in SEVERAL_SEEDS else 1):
            slug = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
            recipe = load_recipe(
                RECIPE, [*_common(videos, labels, out, steps), f"run.dir={out / f'{slug}-{seed}'}", f"run.seed={seed}", *overrides]
            )
            results.append(_result(recipe, f"{name}, seed {seed}"))
        config = recipe.network(len(results[0]["classes"])).resolve()
        outcomes.append(
            Outcome(
                name=name,
                parameters=count_parameters(config) / 1e6,
                gmacs=count_macs(config) / 1e9,
                top1=[result["top1"] for result in results],
                loss=[result["loss"] for result in results],
                num_videos=results[0]["num_videos"],
            )
        )
    return outcomes


def _common(videos: Path, labels: Path, out: Path, steps: int) -> list[str]:
    return [
        *(f"data.videos={videos}", f"data.labels={labels}", f"data.dir={out / 'dataset'}", f"data.split_column={SPLIT}"),
        *(f"train.steps={steps}", f"checkpoint.every={steps}", "launch.launcher=local"),
    ]


def _result(recipe: Recipe, title: str) -> dict[str, Any]:
    click.echo(f"ablation: {title}", err=True)
    path = recipe.run_dir / "eval.json"
    if not path.is_file():
        build.build_dataset(recipe)
        train.run(recipe)
        evaluate.run(recipe.run_dir)
    steps = merge_steps(read_metrics(recipe.run_dir / "metrics.jsonl"))[-LAST:]
    loss = statistics.mean(float(str(event["loss"])) for event in steps)
    return {**json.loads(path.read_text(encoding="utf-8")), "loss": loss}


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a row per variant, and how far apart equal runs are."""
    base = statistics.mean(outcomes[0].top1)
    rows = ["| variant | parameters, M | GMACs | top-1 | against the base | training loss |", "|---|---|---|---|---|---|"]
    for outcome in outcomes:
        top1, loss = _mean(outcome.top1), _mean(outcome.loss)
        change = statistics.mean(outcome.top1) - base
        rows.append(f"| {outcome.name} | {outcome.parameters:.3f} | {outcome.gmacs:.3f} | {top1} | {change:+.3f} | {loss} |")
    several = [outcome for outcome in outcomes if len(outcome.top1) > 1]
    spread, wander = (statistics.mean(map(statistics.stdev, found)) for found in zip(*((o.top1, o.loss) for o in several), strict=True))
    error = (base * (1 - base) / outcomes[0].num_videos) ** 0.5
    rows.append(
        f"\nEqual runs with other seeds differ by {spread:.3f} in top-1 and {wander:.3f} in loss (standard deviations); "
        f"{outcomes[0].num_videos} videos give top-1 an error of {error:.3f}."
    )
    return "\n".join(rows)


def _mean(values: list[float]) -> str:
    each = f" ({', '.join(f'{value:.3f}' for value in values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{each}"
