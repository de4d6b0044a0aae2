"""The `posmlp` command: parses, calls one verb, and turns what went wrong into one clear message and an exit code.

Verbs are imported when they are called, so that help answers at once. Exit codes: 0 done, 1 a user's error or a failed
check, 2 wrong usage (click), 130 interrupted.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from jobs.recipe import Recipe

OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
LAUNCHER = click.option("--launcher", type=click.Choice(["ray", "local"]), help="Short for launch.launcher=...; local is without Ray.")
FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="posmlp-video")
def posmlp() -> None:
    """Build video datasets, train PosMLP-Video, resume exactly. Every command resumes what an earlier call of it began.

    RECIPE is a YAML file or the name of a recipe that comes with the package (demo, weizmann, jhmdb12);
    KEY=VALUE overrides one of its keys, for example train.epochs=10.
    """


def _load(recipe: str, overrides: tuple[str, ...], launcher: str | None) -> "Recipe":
    from jobs.recipe import load_recipe

    return load_recipe(recipe, [*overrides, *([f"launch.launcher={launcher}"] if launcher else [])])


@posmlp.command()
@click.argument("recipe")
@LAUNCHER
@OVERRIDES
def run(recipe: str, launcher: str | None, overrides: tuple[str, ...]) -> None:
    """Build, train, evaluate and report; what is finished is skipped, what was interrupted resumes."""
    from jobs import run as verb

    verb.run(_load(recipe, overrides, launcher))


@posmlp.group()
def data() -> None:
    """Datasets: build shards from videos, validate them, look at them."""


@data.command("build")
@click.option("--videos", type=FOLDER, required=True, help="Folder of raw videos.")
@click.option("--labels", type=FILE, help="CSV or Parquet with path,label[,split...,group,start_s,end_s]. Without it: class = subfolder.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the dataset, made if missing.")
@OVERRIDES
def data_build(videos: Path, labels: Path | None, out: Path, overrides: tuple[str, ...]) -> None:
    """Verify, transcode and shard a folder of videos. KEY=VALUE sets keys of the recipe's data section: encode.gop=16."""
    from jobs import build
    from jobs.recipe import parse_overrides

    sections = [f"data.{override}" for override in overrides]
    paths = {"videos": str(videos), "labels": None if labels is None else str(labels), "dir": str(out)}
    build.build_dataset(parse_overrides({"data": paths}, sections))


@data.command("validate")
@click.argument("folder", type=FOLDER)
def data_validate(folder: Path) -> None:
    """Check every checksum, every tar, and the index against the bytes. Exit code 1 when anything is wrong."""
    from jobs import validate

    problems = validate.run(folder)
    for problem in problems:
        click.echo(str(problem))
    click.echo(f"{folder}: {len(problems)} problems found" if problems else f"{folder}: everything is as it was built")
    sys.exit(1 if problems else 0)


@data.command("info")
@click.argument("folder", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def data_info(folder: Path, as_json: bool) -> None:
    """Show what a dataset holds: classes, splits, sizes, quarantine."""
    from jobs import info

    card = info.run(folder)
    if as_json:
        click.echo(json.dumps(card, indent=1, ensure_ascii=False))
    else:
        info.show(card)


@posmlp.command()
@click.argument("recipe")
@LAUNCHER
@OVERRIDES
def train(recipe: str, launcher: str | None, overrides: tuple[str, ...]) -> None:
    """Train on a built dataset (data.dir) until the recipe's last step."""
    from jobs import train as verb

    loaded = _load(recipe, overrides, launcher)
    step = verb.run(loaded)
    click.echo(f"{loaded.run_dir}: trained to step {step}")


@posmlp.command("eval")
@click.argument("run_dir", type=FOLDER, metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print eval.json.")
def evaluate(run_dir: Path, as_json: bool) -> None:
    """Evaluate the newest checkpoint of a run folder on its validation split."""
    from jobs import evaluate as verb

    result = verb.run(run_dir)
    click.echo(json.dumps(result, indent=1, ensure_ascii=False) if as_json else verb.headline(result))


@posmlp.command()
@click.option("--out", type=FOLDER, default=Path("runs/demo"), show_default=True, help="Run folder.")
def demo(out: Path) -> None:
    """Make motion videos, build, train with two workers, kill one, resume, evaluate, report. Some minutes on two cores."""
    from jobs import demo as verb

    verb.run(out)


@posmlp.group()
def bench() -> None:
    """Measurements that anyone can repeat; what they gave us is in docs/benchmarks.md."""


@bench.command("scale")
def bench_scale() -> None:
    """Index and order of 10^3 to 10^7 items: time and memory of one rank."""
    from jobs import bench_scale as verb

    click.echo(verb.table(verb.run()))


@bench.command("memory")
@click.option("--videos", "num_videos", default=10_000, show_default=True, help="How many small videos are made, built and loaded.")
def bench_memory(num_videos: int) -> None:
    """Resident memory of a build and of loader passes over many small videos."""
    from jobs import bench_memory as verb

    for name, value in verb.run(num_videos).items():
        click.echo(f"{name}: {value}")


@bench.command("model")
@click.option("--presets", default="posmlp_s", show_default=True, help="Comma-separated.")
@click.option("--repeats", default=3, show_default=True, help="Interleaved repeats of each measurement.")
def bench_model(presets: str, repeats: int) -> None:
    """Clips per CPU-second against the released formulation, forward and backward, float32 and bf16."""
    from jobs import bench_model as verb

    verb.print_table(verb.run(presets.split(","), repeats=repeats))


def main() -> None:
    """Entry point: a user's error is one message on standard error and exit code 1, never a traceback."""
    from jobs.errors import JobError, user_errors
    from jobs.packages import verify_packages

    try:
        verify_packages()
    except JobError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    try:
        posmlp(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted; the same command resumes", err=True)
        sys.exit(130)
    except KeyboardInterrupt:
        click.echo("interrupted; the same command resumes", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except user_errors() as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except OSError as error:  # a full disk, a read-only folder, a path that is not what it should be
        click.echo(f"error: {error.strerror or error}: {error.filename or 'no file named'}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
