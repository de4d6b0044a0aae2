"""The `posmlp` command: parses, calls one verb, and turns what went wrong into one clear message and an exit code.

Verbs are imported when they are called, so that help answers at once. Exit codes: 0 done, 1 a user's error or a failed
check, 2 wrong usage (click), 3 an answer that scripts should tell from an error (datasets differ, leaks were found), 75 stopped
early by SIGTERM or train.time_limit with everything saved (the same command goes on), 78 refused by a cluster's preflight (`submit`),
130 interrupted by Ctrl-C, 143 ended by a SIGTERM that was not waited for.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs import cli_cluster

if TYPE_CHECKING:
    from jobs.recipe import Recipe
    from pipeline.location import Location

FOUND = 3  # exit code of an answer that scripts tell from an error
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
LAUNCHER = click.option("--launcher", type=click.Choice(["ray", "local"]), help="Short for launch.launcher=...; local is without Ray.")
FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
ANY_PATH = click.Path(path_type=Path)
LABELS = click.option(
    "--labels",
    multiple=True,
    metavar="[SPLIT=]FILE",
    help="CSV, TSV, JSONL or Parquet with path,label[,split...,group,start_s,end_s]; the official CSV of Kinetics; JSON of "
    "Something-Something; lists of PySlowFast and MMAction2. May be repeated. Without it: class = subfolder.",
)
FORMAT = click.option("--format", "format_", metavar="FORMAT", help="As what labels or folders are read, whatever their content.")


class _Place(click.ParamType[object]):
    """A folder, or the URL of one."""

    name = "directory"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> "Location":
        from pipeline.location import location

        try:
            place = location(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return place if isinstance(place, str) else Path(FOLDER.convert(place, param, ctx))


PLACE = _Place()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="posmlp-video")
def posmlp() -> None:
    """Build video datasets, train PosMLP-Video, resume exactly. Every command resumes what an earlier call of it began.

    RECIPE is a YAML file or the name of a recipe that comes with the package (listed by 'posmlp recipes');
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
@click.option("--videos", type=PLACE, required=True, help="Folder of raw videos, or its URL (s3://, gs://).")
@LABELS
@FORMAT
@click.option("--out", type=PLACE, required=True, help="Folder of the dataset, made if missing, or its URL.")
@click.option("--dry-run", is_flag=True, help="Try some videos and say what the build would take; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: machine-readable.")
@OVERRIDES
def data_build(
    videos: "Location",
    labels: tuple[str, ...],
    format_: str | None,
    out: "Location",
    dry_run: bool,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Verify, transcode and shard a folder of videos. KEY=VALUE sets keys of the recipe's data section: encode.gop=16.

    The same command resumes, and tries videos again that could not be read. With --dry-run exit code 1 means: not enough disk.
    """
    from jobs import build
    from jobs import dry_run as trial
    from jobs.recipe import label_files, parse_overrides

    given = {"videos": str(videos), "labels": label_files(labels), "dir": str(out), **({"format": format_} if format_ else {})}
    recipe = parse_overrides({"data": given}, [f"data.{override}" for override in overrides])
    if not dry_run:
        click.echo(build.summary(recipe, build.build_dataset(recipe)))
        return
    estimate = trial.run(recipe)
    if as_json:
        click.echo(json.dumps(trial.plain(estimate), indent=1, ensure_ascii=False))
    else:
        trial.show(estimate)
    sys.exit(0 if estimate.fits else 1)


@data.command("append")
@click.option("--videos", type=PLACE, required=True, help="Folder of the new videos, or its URL.")
@LABELS
@FORMAT
@click.option("--out", type=PLACE, required=True, help="Folder of the dataset that grows.")
@click.option("--allow-missing", is_flag=True, help="Go on without files that the labels name and the folder lacks.")
@click.option("--val-fraction", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.2, show_default=True)
def data_append(
    videos: "Location", labels: tuple[str, ...], format_: str | None, out: "Location", allow_missing: bool, val_fraction: float
) -> None:
    """Add new videos to a dataset as new shards; what is in it stays byte for byte, classes keep their numbers.

    Labels need the dataset's split columns. Videos are encoded as the dataset's are. --val-fraction is for new videos whose labels
    name no split; a group stays in its split. The fingerprint changes: runs that began on the old dataset do not resume on the new one.
    """
    from jobs import append
    from jobs.recipe import parse_labels

    said = parse_labels(videos, labels, format_)
    done = append.run(
        videos=videos, labels=said.labels, format=said.format, out=out, allow_missing=allow_missing, val_fraction=val_fraction
    )
    append.show(out, done)


@data.command("coverage")
@click.option("--videos", type=PLACE, required=True, help="Folder of the videos that there are, or its URL.")
@LABELS
@FORMAT
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, with the paths of all that are missing.")
def data_coverage(videos: "Location", labels: tuple[str, ...], format_: str | None, as_json: bool) -> None:
    """Count how many of the videos that a label file lists are there, per class and per split: whose Kinetics is this?"""
    from jobs import coverage as verb
    from jobs.recipe import parse_labels

    said = parse_labels(videos, labels, format_)
    found = verb.run(videos, said.labels, said.format)
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        verb.show(found)


@data.command("validate")
@click.argument("folder", type=PLACE)
def data_validate(folder: "Location") -> None:
    """Check every checksum, every tar, and the index against the bytes. Exit code 1 when anything is wrong."""
    from jobs import validate

    problems = validate.run(folder)
    for problem in problems:
        click.echo(str(problem))
    click.echo(f"{folder}: {len(problems)} problems found" if problems else f"{folder}: everything is as it was built")
    sys.exit(1 if problems else 0)


@data.command("info")
@click.argument("folder", type=PLACE)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option("--html", type=FILE, help="Write the card with histograms into this one HTML page.")
def data_info(folder: "Location", as_json: bool, html: Path | None) -> None:
    """Show what a dataset holds: classes, splits, sizes, quarantine."""
    from jobs import info

    if html is not None:
        from jobs import data_card

        click.echo(f"card: {data_card.write_card(folder, html)}")
        return
    card = info.run(folder)
    if as_json:
        click.echo(json.dumps(card, indent=1, ensure_ascii=False))
    else:
        info.show(card)


@data.command("quarantine")
@click.argument("folder", type=PLACE)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def data_quarantine(folder: "Location", as_json: bool) -> None:
    """List the videos that are not in a dataset, by reason, and what to do about each."""
    from jobs import quarantine_list as verb

    if as_json:
        click.echo(json.dumps(verb.run(folder), indent=1, ensure_ascii=False))
    else:
        verb.show(folder)


@data.command("leaks")
@click.argument("folder", type=PLACE)
@click.option("--keys", "split", metavar="SPLIT", help="Print only the keys of SPLIT's items that other splits have too, one a line.")
@click.option("--column", help="Of the splits, where the dataset has several split columns.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: all duplicates, also those within one split.")
def data_leaks(folder: "Location", split: str | None, column: str | None, as_json: bool) -> None:
    """List videos that are in more than one split, as equal bytes or as equal pictures. Exit code 3 when there are any.

    'posmlp data leaks DIR --keys train | posmlp data exclude DIR --from -' leaves them out of one side.
    """
    from dataclasses import asdict

    from jobs import leaks as verb

    found = verb.run(folder)
    if split is not None:
        for key in verb.keys(folder, found, split, column):
            click.echo(key)
        return
    if as_json:
        click.echo(json.dumps({"folder": str(folder), **asdict(found)}, indent=1, ensure_ascii=False))
    else:
        verb.show(folder, found)
    sys.exit(FOUND if found.leaks else 0)


FROM = click.Path(dir_okay=False, path_type=Path, allow_dash=True)
REASON = click.option("--reason", default="", help="Kept with it, for people.")


@data.command("exclude")
@click.argument("folder", type=PLACE)
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option("--from", "source", type=FROM, help="Keys in a file, one a line, or CSV with a column key. - is standard input.")
@REASON
@click.option("--undo", is_flag=True, help="Take the newest exclusion back.")
def data_exclude(folder: "Location", keys: tuple[str, ...], source: Path | None, reason: str, undo: bool) -> None:
    """Leave items out of a dataset, by a small file beside its shards, which stay as they are.

    The fingerprint changes: runs that began with these items do not resume without them.
    """
    from jobs import amend as verb
    from pipeline.overlay import Kind

    if undo:
        _refuse_with_undo(keys, source, reason)
        verb.show(verb.undo(folder, Kind.EXCLUDE), "taken back")
        return
    verb.show(verb.exclude(folder, [*keys, *(verb.read_keys(source) if source else [])], reason), "left out")


@data.command("relabel")
@click.argument("folder", type=PLACE)
@click.argument("labels", nargs=-1, metavar="[KEY=CLASS]...")
@click.option("--from", "source", type=FROM, help="CSV with the columns key and label. - is standard input.")
@REASON
@click.option("--undo", is_flag=True, help="Take the newest relabelling back.")
def data_relabel(folder: "Location", labels: tuple[str, ...], source: Path | None, reason: str, undo: bool) -> None:
    """Give items of a dataset another of its classes, by a small file beside its shards, which stay as they are.

    The fingerprint changes: runs that began with the old labels do not resume with the new ones.
    """
    from jobs import amend as verb
    from pipeline.overlay import Kind

    if undo:
        _refuse_with_undo(labels, source, reason)
        verb.show(verb.undo(folder, Kind.RELABEL), "taken back")
        return
    named = [*map(verb.split_label, labels), *(verb.read_labels(source).items() if source else ())]
    verb.show(verb.relabel(folder, verb.pairs(named), reason), "relabelled")


def _refuse_with_undo(named: tuple[str, ...], source: Path | None, reason: str) -> None:
    if named or source or reason:
        raise click.UsageError("--undo takes the newest back and needs nothing else.")


@data.command("diff")
@click.argument("a", type=PLACE)
@click.argument("b", type=PLACE)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def data_diff(a: "Location", b: "Location", as_json: bool) -> None:
    """Compare datasets A and B: classes, splits, options, items. Exit code 0 when they are equal, 3 when they differ, 1 on an error."""
    from jobs import diff as verb

    found = verb.run(a, b)
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        verb.show(found)
    sys.exit(0 if found["equal"] else FOUND)


@data.command("view")
@click.argument("folder", type=PLACE)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Of 127.0.0.1.  [default: a free one]")
@click.option("--recipe", help="Also show when this recipe's training uses an item, and what its model gets.")
@OVERRIDES
def data_view(folder: "Location", port: int, recipe: str | None, overrides: tuple[str, ...]) -> None:
    """Browse, filter and play a dataset in the browser. Serves this machine alone, to whoever has the printed address.

    KEY=VALUE sets keys of the recipe. Ctrl-C ends it.
    """
    from jobs import view as verb

    if overrides and recipe is None:
        raise click.UsageError("KEY=VALUE sets a key of a recipe: add --recipe RECIPE.")
    verb.run(folder, port=port, recipe=None if recipe is None else _load(recipe, overrides, None))


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
@click.option("--average", type=click.IntRange(min=1), default=1, help="Mean of the weights of this many newest kept checkpoints.")
@click.option("--checkpoint", default="last", show_default=True, metavar="best|last|STEP", help="best: of those that eval.every judged.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@OVERRIDES
def evaluate(run_dir: Path, average: int, checkpoint: str, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Evaluate the newest checkpoint of a run folder on its validation split, into eval.json.

    KEY=VALUE changes a key of the recipe's eval section, for example eval.clips=4 eval.crops=3. Such an evaluation, one
    of averaged checkpoints and one of another than the newest is written beside eval.json under a name that says so:
    eval-clips4-crops3.json.
    """
    from jobs import evaluate as verb

    if checkpoint not in ("best", "last") and not checkpoint.isdecimal():
        raise click.UsageError(f"--checkpoint {checkpoint}: expected best, last or a step.")
    if checkpoint != "last" and average > 1:
        raise click.UsageError("--average takes the newest checkpoints: it does not go with --checkpoint.")
    result = verb.run(run_dir, overrides=overrides, average=average, checkpoint=checkpoint)
    click.echo(json.dumps(result, indent=1, ensure_ascii=False) if as_json else verb.headline(result))


@posmlp.command()
@click.argument("run_dir", type=FOLDER, metavar="RUN")
@click.argument("videos", nargs=-1, required=True, type=ANY_PATH, metavar="VIDEO...")
@click.option("--window", type=float, help="Seconds of one look of the timeline. Without it: what one clip was trained to see.")
@click.option("--hop", type=float, help="Seconds from one look to the next. Without it: half a window.")
@click.option("--timeline", type=FILE, help="Write this HTML page with a chart over time.")
@click.option("--annotate", type=FILE, help="Write this MP4: a copy of the one video with label and score in its frames, without sound.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def predict(
    run_dir: Path,
    videos: tuple[Path, ...],
    window: float | None,
    hop: float | None,
    timeline: Path | None,
    annotate: Path | None,
    as_json: bool,
) -> None:
    """Show the five best classes of any video files, and of long ones what is seen when.

    Each video is judged as evaluation would judge it. One more than four windows long, or any where --window, --hop, --timeline or
    --annotate is given, also gets a timeline of overlapping windows. Exit code 1 when a video cannot be used; the others are predicted.
    """
    from jobs import predict as verb

    result, failed = verb.run(run_dir, videos, window=window, hop=hop, timeline=timeline, annotate=annotate, quiet=as_json)
    if as_json:
        click.echo(json.dumps(result, indent=1, ensure_ascii=False))
    sys.exit(1 if failed else 0)


@posmlp.command()
@click.argument("sources", type=click.Path(path_type=Path), metavar="RUN...", nargs=-1, required=True)
@click.option("--out", type=FILE, help="Where the page is written.  [default: RUN/report.html, or comparison.html for several]")
@click.option("--videos", "num_videos", type=click.IntRange(0, 60), default=12, show_default=True, help="How many play on the page.")
def report(sources: tuple[Path, ...], out: Path | None, num_videos: int) -> None:
    """One HTML page about a run, or one that compares several; complete in itself, opened in any browser.

    Several runs are compared with the first. Where RUN is a file such as runs/mine/eval-clips4.json, that evaluation is taken.
    """
    from jobs import comparison
    from jobs import report as verb

    if len(sources) > 1:
        path = comparison.write_comparison(sources, out or Path("comparison.html"), num_videos=num_videos)
    else:
        path = verb.write_report(sources[0], out=out, num_videos=num_videos)
    click.echo(f"report: {path}")


@posmlp.command()
@click.option("--dir", "folder", type=FOLDER, default=Path("runs"), show_default=True, help="Where runs would go.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def doctor(folder: Path, as_json: bool) -> None:
    """Try what this machine can do, and say what to do about what it cannot. Exit code 1 when something required does not work."""
    from jobs import doctor as verb

    checks = verb.run(folder)
    if as_json:
        click.echo(verb.as_json(checks))
    else:
        verb.show(checks)
    sys.exit(0 if verb.healthy(checks) else 1)


@posmlp.command()
@click.argument("folder", type=FOLDER, default=Path("runs"))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def runs(folder: Path, as_json: bool) -> None:
    """List the runs in FOLDER [default: runs]: finished, running, interrupted, failed or broken; step, top-1, size, last change."""
    from dataclasses import asdict

    from jobs import runs as verb

    found = verb.run(folder)
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found], indent=1, ensure_ascii=False))
    else:
        verb.show(found, folder)


@posmlp.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes that come with the package, or print the one called NAME."""
    from jobs import recipes_list as verb

    if name is not None:
        click.echo(verb.text(name), nl=False)
    elif as_json:
        click.echo(verb.as_json(verb.run()))
    else:
        verb.show(verb.run())


@posmlp.command()
@click.option("--videos", type=FOLDER, help="Folder of your own videos, instead of motion videos made for the demo.")
@click.option("--labels", type=FILE, help="With --videos: CSV or Parquet with path,label. Without it: class = subfolder.")
@click.option("--out", type=FOLDER, help="Run folder.  [default: runs/demo, or runs/demo-FOLDER with --videos]")
@OVERRIDES
def demo(videos: Path | None, labels: Path | None, out: Path | None, overrides: tuple[str, ...]) -> None:
    """Make motion videos, build, train with two workers, kill one, resume, evaluate, report. Some minutes on two cores.

    With --videos the same on your own. KEY=VALUE changes a key of the recipe `demo`, for example data.split_column=split1.
    """
    from jobs import demo as verb

    verb.run(out, videos=videos, labels=labels, overrides=overrides)


@posmlp.group()
def checkpoint() -> None:
    """Checkpoints of a run: list, look into, check every byte, export the weights."""


STEP = click.option("--step", type=int, help="Of the checkpoint; the newest one without.")


@checkpoint.command("list")
@click.argument("place", type=PLACE, metavar="RUN|URL")
def checkpoint_list(place: "Location") -> None:
    """The run's checkpoints, or those of a checkpoint.mirror at a URL, newest first."""
    from jobs import checkpoint_tools as verb

    for found in verb.lines(place):
        click.echo(found)


@checkpoint.command("inspect")
@click.argument("run_dir", type=FOLDER, metavar="RUN")
@STEP
def checkpoint_inspect(run_dir: Path, step: int | None) -> None:
    """Recipe, dataset, classes and tensors of one checkpoint, as JSON."""
    from jobs import checkpoint_tools as verb

    click.echo(json.dumps(verb.inspect(verb.chosen(run_dir, step)), indent=1, ensure_ascii=False))


@checkpoint.command("verify")
@click.argument("run_dir", type=FOLDER, metavar="RUN")
def checkpoint_verify(run_dir: Path) -> None:
    """Compare every byte with its digest. Exit code 1 when a checkpoint is damaged."""
    from jobs import checkpoint_tools as verb

    problems = verb.verify(run_dir)
    for problem in problems:
        click.echo(problem)
    click.echo(f"{run_dir}: {len(problems)} damaged checkpoints" if problems else f"{run_dir}: all checkpoints are whole")
    sys.exit(1 if problems else 0)


@checkpoint.command("export")
@click.argument("run_dir", type=FOLDER, metavar="RUN")
@STEP
@click.option("--out", type=ANY_PATH, required=True, help="The .safetensors file to write, or the folder of a universal checkpoint.")
@click.option("--to", "form", type=click.Choice(["released", "universal"]), default="released", show_default=True, help="See above.")
@click.option("--last", is_flag=True, help="The last weights even where their running average (optimizer.ema) is there.")
def checkpoint_export(run_dir: Path, step: int | None, out: Path, form: str, last: bool) -> None:
    """Weights and buffers as one safetensors file under the released names, or the training state for DeepSpeed.

    --to universal writes DeepSpeed's universal format: weights, moments and Adam's step, for an engine of any world size and ZeRO
    stage 1 to 3 with {"checkpoint": {"load_universal": true}}. It has the last weights, not their running average.
    """
    from jobs import checkpoint_tools as verb

    chosen = verb.chosen(run_dir, step)
    if form == "universal":
        verb.export_universal(chosen, out)
        click.echo(f"{out}: the training state of step {chosen.step} in DeepSpeed's universal format")
        return
    click.echo(f"{out}: {len(verb.export(chosen, out, averaged=not last))} tensors of step {chosen.step}")


@posmlp.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def models(as_json: bool) -> None:
    """List the model presets at 8, 16 and 32 frames: parameters, multiply-accumulates, memory, and where their numbers come from."""
    from jobs import models as verb

    cards = verb.run()
    if as_json:
        click.echo(json.dumps(verb.as_plain(cards), indent=1, ensure_ascii=False))
    else:
        verb.show(cards)


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


@bench.command("labels")
@click.option("--videos", "num_videos", type=click.IntRange(min=400), default=300_000, show_default=True, help="Empty files that are made.")
def bench_labels(num_videos: int) -> None:
    """Seconds and memory to read labels and find their videos, in every format."""
    from jobs import bench_labels as verb

    click.echo(verb.table(verb.run(num_videos)))


@bench.command("augment")
def bench_augment() -> None:
    """CPU time per clip of every augmentation, at 112 and 224 pixels."""
    from jobs import bench_augment as verb

    click.echo(verb.table(verb.run()))


@bench.command("decode")
@click.argument("folder", type=FOLDER, required=False)
@click.option("--videos", "num_videos", default=3, show_default=True, type=click.IntRange(min=1), help="How many are measured.")
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(min=1), help="Interleaved repeats.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def bench_decode(folder: Path | None, num_videos: int, repeats: int, as_json: bool) -> None:
    """Clips per CPU-second, decoding only: streams against decoders, on the videos in FOLDER or on synthetic ones."""
    from jobs import bench_decode as verb

    result = verb.run(folder, num_videos=num_videos, repeats=repeats)
    click.echo(json.dumps(result, indent=1) if as_json else verb.table(result))


@bench.command("encode")
@click.argument("folder", type=FOLDER, required=False)
@click.option("--videos", "num_videos", default=4, show_default=True, type=click.IntRange(min=1), help="How many are measured.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1), help="Interleaved repeats of decoding.")
@click.option("--frames", default=16, show_default=True, type=click.IntRange(min=1, max=1024), help="Frames of a clip.")
@click.option("--stride", default=4, show_default=True, type=click.IntRange(min=1), help="Source frames from one of them to the next.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def bench_encode(folder: Path | None, num_videos: int, repeats: int, frames: int, stride: int, as_json: bool) -> None:
    """What choices of data.encode give and cost: decoding, bytes, PSNR, SSIM, building; on the videos in FOLDER or synthetic ones."""
    from jobs import bench_encode as verb

    rows = verb.run(folder, num_videos=num_videos, repeats=repeats, frames=frames, stride=stride)
    click.echo(json.dumps(verb.as_dicts(rows), indent=1) if as_json else verb.table(rows))


@bench.command("build")
@click.option("--videos", type=FOLDER, help="Folder of videos.  [default: synthetic ones of ten seconds]")
@click.option("--num-videos", type=click.IntRange(min=2), help="How many are built.  [default: 100, or 6 synthetic ones]")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1), help="Interleaved repeats.")
def bench_build(videos: Path | None, num_videos: int | None, repeats: int) -> None:
    """CPU time of the build against the ffmpeg command line with the same filters and options, and of two workers against one."""
    from jobs import bench_build as verb

    click.echo(verb.table(verb.run(videos, num_videos=num_videos or (100 if videos else 6), repeats=repeats)))


@bench.command("data")
@click.option("--videos", "num_videos", default=4, show_default=True, type=click.IntRange(min=1), help="Synthetic scenes in the dataset.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1), help="Interleaved repeats.")
def bench_data(num_videos: int, repeats: int) -> None:
    """CPU time per clip of the whole loader against its parts and against peers on stock files; the first batch at a far step."""
    from jobs import bench_data as verb

    click.echo(verb.table(verb.run(num_videos=num_videos, repeats=repeats)))


@bench.command("duplicates")
@click.option("--videos", type=FOLDER, required=True, help="Videos that are all different.")
def bench_duplicates(videos: Path) -> None:
    """What finding duplicates costs a build, how many copies that were encoded again it finds, and what it takes for a copy by mistake."""
    from jobs import bench_duplicates as verb

    for name, value in verb.run(videos).items():
        click.echo(f"{name}: {value}")


@bench.command("ablations")
@click.option("--videos", type=FOLDER, required=True, help="J-HMDB's videos.")
@click.option("--labels", type=FILE, required=True, help="Their label file, with the official splits.")
@click.option("--out", type=FOLDER, default=Path("runs/ablations"), show_default=True, help="Runs, resumed by the same command.")
@click.option("--steps", type=click.IntRange(min=1), default=400, show_default=True, help="Optimizer steps of each run.")
def bench_ablations(videos: Path, labels: Path, out: Path, steps: int) -> None:
    """What each choice in the model is worth on J-HMDB: zeros against trunc_normal, block types, versions, stems, groups."""
    from jobs import bench_ablations as verb

    click.echo(verb.table(verb.run(videos.absolute(), labels.absolute(), out.absolute(), steps)))


@bench.command("model")
@click.option("--presets", default="posmlp_s", show_default=True, help="Comma-separated.")
@click.option("--repeats", default=5, show_default=True, help="Interleaved repeats of each measurement.")
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--batch", default=1, show_default=True, help="Clips a pass.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def bench_model(presets: str, repeats: int, threads: int, batch: int, as_json: bool) -> None:
    """Clips per CPU-second and peak memory against the released formulation, forward and backward, float32 and bf16."""
    from jobs import bench_model as verb

    result = verb.run(presets.split(","), repeats=repeats, threads=threads, batch=batch)
    click.echo(json.dumps(result, indent=1) if as_json else verb.table(result))


@bench.command("train")
@click.option("--dataset", type=FOLDER, help="A built dataset.  [default: a small synthetic one]")
@click.option("--preset", default="posmlp_s", show_default=True)
@click.option("--size", default=224, show_default=True, help="Pixels.")
@click.option("--global-batch", default=4, show_default=True, help="Clips a step.")
@click.option("--micro-batch", default=2, show_default=True, help="Clips of a micro-batch; two of them at the least make a step.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Interleaved rounds of each contest.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def bench_train(dataset: Path | None, preset: str, size: int, global_batch: int, micro_batch: int, rounds: int, as_json: bool) -> None:
    """What a training step costs beyond the model: our loop, saving, loading, ZeRO 0 to 3 against plain torch."""
    from jobs import bench_train as verb

    path = None if dataset is None else dataset.absolute()
    result = verb.run(path, preset=preset, size=size, global_batch=global_batch, micro_batch=micro_batch, rounds=rounds)
    click.echo(json.dumps(result, indent=1) if as_json else verb.table(result))


@bench.command("restart")
@click.option("--launcher", "launchers", type=click.Choice(["local", "ray"]), multiple=True, default=("local", "ray"), show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Each harm once in a round.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def bench_restart(launchers: tuple[str, ...], rounds: int, as_json: bool) -> None:
    """Seconds from a lost worker, a stopped one, or a killed command to the next optimizer step."""
    from jobs import bench_restart as verb

    rows = verb.run(launchers, rounds)
    click.echo(json.dumps(rows, indent=1) if as_json else verb.table(rows))


cli_cluster.add_to(posmlp)


def main() -> None:
    """Entry point: a user's error is one message on standard error and exit code 1, never a traceback."""
    from jobs.errors import JobError, explained, user_errors
    from jobs.packages import verify_packages

    try:
        verify_packages()
    except JobError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    from cluster.errors import StoppedError
    from cluster.job import STOPPED_EXIT

    # Before torch loads: threads that spin while they wait take the cores from decoding, and on a busy machine from the work itself.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
    except StoppedError as error:
        click.echo(f"stopped: {error}", err=True)
        sys.exit(STOPPED_EXIT)
    except user_errors() as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except OSError as error:  # a full disk, a read-only folder, a path that is not what it should be
        click.echo(f"error: {explained(error)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
