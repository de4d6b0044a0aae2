"""posmlp data build: videos and labels -> shards, index, quarantine list, dataset.json.

    out/build/plan.json            what was asked, written first
    out/shards/shard-000000.tar    one shard is one task
    out/build/shard-000000.arrow   its rows and rejects; where it exists, the shard is finished
    out/index.arrow, quarantine.parquet
    out/dataset.json               written last; then build/ is removed

Everything is a pure function of the request and the videos, so a build that was killed anywhere and is run again ends with the same
bytes, and leaves finished shards alone. Pixels never pass through this process: tasks write their shards themselves.

Where `out` is a URL, see `build_remote`: the same, in a temporary folder of the driver, and uploaded.

Videos that could not be read say nothing about themselves: when the command is run again they are, and what is read then is appended.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import click

from jobs import leaks
from jobs.append import read_again
from jobs.build_commit import collect, commit, libraries, missing_rows
from jobs.build_folder import PLAN_VERSION, compare, explained, only_builder, read_plan, remove_leftovers, write_plan
from jobs.build_remote import Upload
from jobs.build_shard import transcode
from jobs.build_tasks import build_shards, check_frames, request_of, shard_tasks, splits_of
from jobs.errors import RecipeError
from jobs.recipe import Recipe
from pipeline.errors import DatasetError
from pipeline.index import Dataset, DatasetInfo, read_info
from pipeline.labels import LabelFiles
from pipeline.location import Location
from pipeline.manifest import Manifest, Source, read_manifest
from pipeline.manifest import summary as summary_of_labels
from pipeline.media import check_encoder
from pipeline.media_worker import MediaWorker
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import RejectedError
from pipeline.shards import deal, sample
from pipeline.source_files import SourceFiles

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


def summary(recipe: Recipe, info: DatasetInfo) -> str:
    """What is there now, for people. Raises DatasetError, StorageError."""
    out = recipe.dataset_dir
    found = leaks.find(Dataset.open(out, recipe.loader.remote))
    kind = "videos" if info.boxes is None else "keyframes"
    text = f"{out}: {info.num_items} {kind}, {info.num_quarantined} not in ('posmlp data quarantine {out}')"
    return f"{text}; {leaks.summary(found)} ('posmlp data leaks {out}')" if found.found else text


def run(
    *,
    videos: Location,
    labels: LabelFiles,
    out: Location,
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

    Raises ManifestError (videos and labels), DatasetError (`out` holds another dataset, or a damaged one), StorageError (of a URL) and
    PipelineError (disk full, another build at work, an encoder option that x264 does not know).
    """
    check_encoder(encode)
    manifest = read_manifest(videos, labels, format=format, allow_missing=allow_missing, val_fraction=val_fraction, seed=seed)
    click.echo(summary_of_labels(manifest), err=True)
    check_frames(manifest, encode)
    asked = request_of(manifest, encode=encode, limits=limits, shard_size_mib=shard_size_mib, seed=seed)
    made = partial(_make, videos, manifest, asked, encode, limits, num_cpus)
    with explained(out):
        if isinstance(out, str):
            with Upload.begin(out) as upload:
                info = upload.info()
                return made(upload.folder, upload) if info is None else _finished(out, info, asked, upload.sizes())
        if (out / "dataset.json").is_file():
            info = _finished_folder(out, asked)
            return read_again(out, info, videos, manifest, encode, limits, num_cpus)
        (out / "build").mkdir(parents=True, exist_ok=True)
        with only_builder(out):
            if (out / "dataset.json").is_file():  # another build has just finished it
                return _finished_folder(out, asked)
            return made(out, None)


def _make(
    videos: Location,
    manifest: Manifest,
    asked: dict[str, object],
    encode: EncodeOptions,
    limits: LimitOptions,
    num_cpus: int | None,
    out: Path,
    upload: Upload | None,
) -> DatasetInfo:
    """Builds in the folder `out`, which is the driver's own where there is an upload."""
    work = out / "build"
    ratio = _plan(out, videos, manifest, asked, encode, limits, upload)
    remove_leftovers(out, work)
    shards = deal(manifest.sources, ratio=ratio, shard_bytes=int(str(asked["shard_size_mib"])) << 20, seed=int(str(asked["seed"])))
    classes, splits = manifest.classes, splits_of(manifest)
    place = upload.url if upload else out
    tasks = shard_tasks(
        shards, classes, splits, videos=videos, out=place, work=work, encode=encode, limits=limits, box_classes=manifest.box_classes
    )
    build_shards(tasks, num_cpus)
    remove_leftovers(out, work)  # of tasks that died and were run again
    if upload:
        upload.pull()
    made = collect(out, work, range(len(shards)))
    quarantine = [*made.rejects, *missing_rows(manifest.missing)]
    info = commit(out, made, quarantine, classes=classes, splits=splits, build={**asked, "source_ratio": ratio})
    if upload:
        upload.commit(info)
    shutil.rmtree(work)
    return info


def _finished_folder(out: Path, request: dict[str, object]) -> DatasetInfo:
    info = read_info(out)
    names = [info.index_file, *(shard.file for shard in info.shards)]
    sizes = {name: (out / name).stat().st_size for name in names if (out / name).is_file()}
    _finished(out, info, request, sizes)
    if (out / "build").is_dir():  # killed in its very last step
        shutil.rmtree(out / "build", ignore_errors=True)
    return info


def _finished(out: Location, info: DatasetInfo, request: dict[str, object], sizes: Mapping[str, int]) -> DatasetInfo:
    """A dataset that is there already, if it is the one that was asked for and all its files have their sizes."""
    next_step = "Choose another data.dir; add new videos with 'posmlp data append'; or remove this folder to build it anew."
    compare(out, info.build, request, next_step)
    for name, size in [(info.index_file, info.index_size), *((shard.file, shard.size) for shard in info.shards)]:
        if sizes.get(name) != size:
            raise DatasetError(
                f"{out}/{name} is missing or not {size} bytes long, although dataset.json says the dataset is finished. "
                f"Run 'posmlp data validate {out}'; restore the file, or remove the folder to build it anew."
            )
    return info


def _plan(
    out: Path,
    videos: Location,
    manifest: Manifest,
    request: dict[str, object],
    encode: EncodeOptions,
    limits: LimitOptions,
    upload: Upload | None,
) -> float:
    """Writes down what is going to be built, or reads what an earlier call did. Returns the ratio that shards are sized by."""
    work, place = out / "build", upload.url if upload else out
    asked = {**request, **{f"library {name}": version for name, version in libraries().items()}, "plan_version": PLAN_VERSION}
    plan = read_plan(work)
    if plan is not None:
        built = plan["request"]
        assert isinstance(built, dict)
        compare(place, built, asked, f"Remove {place}/build and {place}/shards, or choose another data.dir.")
        return float(str(plan["ratio"]))
    strangers = sorted(upload.sizes()) if upload else sorted(path.name for path in (out / "shards").glob("*.tar"))
    strangers = [name for name in strangers if name.endswith(".tar")]
    if strangers:
        raise DatasetError(f"{place} holds {len(strangers)} shards of no known build, first {strangers[0]}. Choose another data.dir.")
    (out / "shards").mkdir(exist_ok=True)
    ratio = _measure_ratio(work, videos, sample(manifest.sources, SAMPLED_VIDEOS, int(str(request["seed"]))), encode, limits)
    write_plan(work, {"request": asked, "ratio": ratio})
    if upload:
        upload.plan()
    return ratio


def _measure_ratio(folder: Path, videos: Location, sources: Sequence[Source], encode: EncodeOptions, limits: LimitOptions) -> float:
    """Bytes of the canonical form per byte of source, from the beginnings of some videos; 1 when none of them tells."""
    before = after = 0.0
    files = SourceFiles(videos, limits)
    with MediaWorker(encode, limits) as worker, tempfile.TemporaryDirectory(dir=folder) as work:
        for source in sources:
            begin = source.start_s or 0.0
            end = min(begin + SAMPLED_S, source.end_s if source.end_s is not None else begin + SAMPLED_S)
            try:
                report = transcode(worker, files, source, Path(work) / "sample.mp4", end)
            except RejectedError:
                continue
            num_frames = report.source.duration_s * report.source.fps
            if num_frames > 0:
                after += report.size * max(1.0, num_frames / report.source_frames)
                before += report.source.size
    return float(f"{after / before:.3g}") if before else 1.0
