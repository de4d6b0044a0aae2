"""posmlp data build: videos and labels -> shards, index, quarantine list, dataset.json.

    out/build/plan.json            what was asked, written first
    out/shards/shard-000000.tar    one shard is one task
    out/build/shard-000000.arrow   its rows and rejects; where it exists, the shard is finished
    out/index.arrow, quarantine.parquet
    out/dataset.json               written last; then build/ is removed

Everything is a pure function of the request and the videos, so a build that was killed anywhere and is run again ends with the same
bytes, and leaves finished shards alone. Pixels never pass through this process: tasks write their shards themselves.

Videos that could not be read say nothing about themselves: when the command is run again they are, and what is read then is appended.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from jobs import leaks
from jobs.append import read_again
from jobs.build_commit import collect, commit, libraries, missing_rows
from jobs.build_folder import PLAN_VERSION, compare, explained, only_builder, read_plan, remove_leftovers, write_plan
from jobs.build_shard import transcode
from jobs.build_tasks import build_shards, check_frames, request_of, shard_tasks, splits_of
from jobs.errors import RecipeError
from jobs.recipe import Recipe
from pipeline.errors import DatasetError
from pipeline.index import Dataset, DatasetInfo, read_info
from pipeline.labels import LabelFiles
from pipeline.manifest import Manifest, Source, read_manifest
from pipeline.manifest import summary as summary_of_labels
from pipeline.media import check_encoder
from pipeline.media_worker import MediaWorker
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import RejectedError
from pipeline.shards import deal, sample

SAMPLED_VIDEOS, SAMPLED_S = 8, 4.0  # how many videos, and how much of each, tell what the canonical form weighs


def build_dataset(recipe: Recipe) -> DatasetInfo:
    """The dataset that the recipe's data section describes, in its dataset folder; see `run`."""
    data = recipe.data
    if data.videos is None:
        raise RecipeError("data.videos is not set: add data.videos=FOLDER, the folder of raw videos.")
    return run(
        videos=data.videos,
        labels=data.labels,
        format=data.format,
        out=recipe.dataset_dir,
        encode=data.encode,
        limits=data.limits,
        shard_size_mib=data.shard_size_mib,
        seed=data.seed,
        allow_missing=data.allow_missing,
        val_fraction=data.val_fraction,
    )


def summary(out: Path, info: DatasetInfo) -> str:
    """What is there now, for people. Raises DatasetError."""
    found = leaks.find(Dataset.open(out))
    text = f"{out}: {info.num_items} videos, {info.num_quarantined} not in ('posmlp data quarantine {out}')"
    return f"{text}; {leaks.summary(found)} ('posmlp data leaks {out}')" if found.found else text


def run(
    *,
    videos: Path,
    labels: LabelFiles,
    out: Path,
    encode: EncodeOptions,
    limits: LimitOptions,
    shard_size_mib: int = 128,
    seed: int = 0,
    format: str = "auto",
    allow_missing: bool = False,
    val_fraction: float = 0.2,
    num_cpus: int | None = None,
) -> DatasetInfo:
    """Builds, resumes or finds finished the dataset in `out`. num_cpus: of the private Ray that is started when none is joined.

    Raises ManifestError (videos and labels), DatasetError (`out` holds another dataset, or a damaged one) and PipelineError (disk
    full, another build at work, an encoder option that x264 does not know).
    """
    check_encoder(encode)
    manifest = read_manifest(videos, labels, format=format, allow_missing=allow_missing, val_fraction=val_fraction, seed=seed)
    click.echo(summary_of_labels(manifest), err=True)
    check_frames(manifest, encode)
    asked = request_of(manifest, encode=encode, limits=limits, shard_size_mib=shard_size_mib, seed=seed)
    with explained(out):
        if (out / "dataset.json").is_file():
            info = _finished(out, asked)
            return read_again(out, info, videos, manifest.sources, encode, limits, num_cpus)
        (out / "build").mkdir(parents=True, exist_ok=True)
        with only_builder(out):
            if (out / "dataset.json").is_file():  # another build has just finished it
                return _finished(out, asked)
            ratio = _plan(out, videos, manifest, asked, encode, limits, seed)
            remove_leftovers(out, out / "build")
            shards = deal(manifest.sources, ratio=ratio, shard_bytes=shard_size_mib << 20, seed=seed)
            classes, splits = manifest.classes, splits_of(manifest)
            tasks = shard_tasks(shards, classes, splits, videos=videos, out=out, work=out / "build", encode=encode, limits=limits)
            build_shards(tasks, num_cpus)
            remove_leftovers(out, out / "build")  # of tasks that died and were run again
            made = collect(out, out / "build", range(len(shards)))
            quarantine = [*made.rejects, *missing_rows(manifest.missing)]
            info = commit(out, made, quarantine, classes=classes, splits=splits, build={**asked, "source_ratio": ratio})
            shutil.rmtree(out / "build")
            return info


def _finished(out: Path, request: dict[str, object]) -> DatasetInfo:
    """A dataset that is there already, if it is the one that was asked for and all its files have their sizes."""
    info = read_info(out)
    next_step = "Choose another data.dir; add new videos with 'posmlp data append'; or remove this folder to build it anew."
    compare(out, info.build, request, next_step)
    for name, size in [(info.index_file, info.index_size), *((shard.file, shard.size) for shard in info.shards)]:
        file = out / name
        if not file.is_file() or file.stat().st_size != size:
            raise DatasetError(
                f"{file} is missing or not {size} bytes long, although dataset.json says the dataset is finished. "
                f"Run 'posmlp data validate {out}'; restore the file, or remove the folder to build it anew."
            )
    if (out / "build").is_dir():  # killed in its very last step
        shutil.rmtree(out / "build", ignore_errors=True)
    return info


def _plan(
    out: Path, videos: Path, manifest: Manifest, request: dict[str, object], encode: EncodeOptions, limits: LimitOptions, seed: int
) -> float:
    """Writes down what is going to be built, or reads what an earlier call did. Returns the ratio that shards are sized by."""
    work = out / "build"
    asked = {**request, **{f"library {name}": version for name, version in libraries().items()}, "plan_version": PLAN_VERSION}
    plan = read_plan(work)
    if plan is not None:
        built = plan["request"]
        assert isinstance(built, dict)
        compare(out, built, asked, f"Remove {work} and {out / 'shards'}, or choose another data.dir.")
        return float(str(plan["ratio"]))
    strangers = sorted((out / "shards").glob("*.tar"))
    if strangers:
        raise DatasetError(f"{out} holds {len(strangers)} shards of no known build, first {strangers[0].name}. Choose another data.dir.")
    (out / "shards").mkdir(exist_ok=True)
    ratio = _measure_ratio(work, videos, sample(manifest.sources, SAMPLED_VIDEOS, seed), encode, limits)
    write_plan(work, {"request": asked, "ratio": ratio})
    return ratio


def _measure_ratio(folder: Path, videos: Path, sources: Sequence[Source], encode: EncodeOptions, limits: LimitOptions) -> float:
    """Bytes of the canonical form per byte of source, from the beginnings of some videos; 1 when none of them tells."""
    before = after = 0.0
    with MediaWorker(encode, limits) as worker, tempfile.TemporaryDirectory(dir=folder) as work:
        for source in sources:
            begin = source.start_s or 0.0
            end = min(begin + SAMPLED_S, source.end_s if source.end_s is not None else begin + SAMPLED_S)
            try:
                report = transcode(worker, videos, source, Path(work) / "sample.mp4", limits, end)
            except RejectedError:
                continue
            num_frames = report.source.duration_s * report.source.fps
            if num_frames > 0:
                after += report.size * max(1.0, num_frames / report.source_frames)
                before += report.source.size
    return float(f"{after / before:.3g}") if before else 1.0
