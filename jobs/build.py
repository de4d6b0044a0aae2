"""posmlp data build: videos and labels -> shards, index, quarantine list, dataset.json.

    out/build/plan.json            what was asked, written first
    out/shards/shard-000000.tar    one shard is one task
    out/build/shard-000000.arrow   its rows and rejects; where it exists, the shard is finished
    out/index.arrow, quarantine.parquet
    out/dataset.json               written last; then build/ is removed

Everything is a pure function of the request and the videos, so a build that was killed anywhere and is run again ends with the same
bytes, and leaves finished shards alone. Pixels never pass through this process: tasks write their shards themselves.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from cluster.tasks import run_tasks
from jobs.build_shard import ShardTask, build_shard, read_record, record_path
from jobs.errors import RecipeError
from jobs.progress import Progress
from jobs.recipe import Recipe
from pipeline.durable import TEMPORARY, committed
from pipeline.errors import DatasetError, PipelineError
from pipeline.index import DatasetInfo, ShardInfo, read_info, write_index
from pipeline.manifest import Manifest, Source, read_manifest
from pipeline.media import check_encoder, library_versions
from pipeline.media_worker import MediaWorker
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import Reason, RejectedError
from pipeline.shards import deal, sample

PLAN_VERSION = 1
LOCK = ".build.lock"
SAMPLED_VIDEOS, SAMPLED_S = 8, 4.0  # how many videos, and how much of each, tell what the canonical form weighs
SHOWN = 5  # rejects named in a message


def build_dataset(recipe: Recipe) -> DatasetInfo:
    """The dataset that the recipe's data section describes, in its dataset folder; see `run`."""
    data = recipe.data
    if data.videos is None:
        raise RecipeError("data.videos is not set: add data.videos=FOLDER, the folder of raw videos.")
    return run(
        videos=data.videos,
        labels=data.labels,
        out=recipe.dataset_dir,
        encode=data.encode,
        limits=data.limits,
        shard_size_mib=data.shard_size_mib,
        seed=data.seed,
        allow_missing=data.allow_missing,
        val_fraction=data.val_fraction,
    )


def run(
    *,
    videos: Path,
    labels: Path | None,
    out: Path,
    encode: EncodeOptions,
    limits: LimitOptions,
    shard_size_mib: int = 128,
    seed: int = 0,
    allow_missing: bool = False,
    val_fraction: float = 0.2,
    num_cpus: int | None = None,
) -> DatasetInfo:
    """Builds, resumes or finds finished the dataset in `out`. num_cpus: of the private Ray that is started when none is joined.

    Raises ManifestError (videos and labels), DatasetError (`out` holds another dataset, or a damaged one) and PipelineError (disk
    full, another build at work, an encoder option that x264 does not know).
    """
    check_encoder(encode)
    manifest = read_manifest(videos, labels, allow_missing=allow_missing, val_fraction=val_fraction, seed=seed)
    request = _request(manifest, encode=encode, limits=limits, shard_size_mib=shard_size_mib, seed=seed)
    with _explained(out):
        if (out / "dataset.json").is_file():
            return _finished(out, request)
        out.mkdir(parents=True, exist_ok=True)
        with _only_builder(out):
            if (out / "dataset.json").is_file():  # another build has just finished it
                return _finished(out, request)
            ratio = _plan(out, videos, manifest, request, encode, limits, seed)
            _remove_leftovers(out)
            shards = deal(manifest.sources, ratio=ratio, shard_bytes=shard_size_mib << 20, seed=seed)
            tasks = _tasks(shards, manifest, videos, out, encode, limits)
            _build_shards(out, tasks, [len(shard) for shard in shards], num_cpus)
            _remove_leftovers(out)  # of tasks that died and were run again
            return _finish(out, len(shards), manifest, {**request, "source_ratio": ratio})


def _request(manifest: Manifest, *, encode: EncodeOptions, limits: LimitOptions, shard_size_mib: int, seed: int) -> dict[str, object]:
    """What decides the dataset, as plain values that a later request is compared with, value by value."""
    digest, columns = hashlib.sha256(), fields(Source)
    for source in manifest.sources:
        digest.update(repr([getattr(source, field.name) for field in columns]).encode())
    digest.update(json.dumps([manifest.missing, manifest.classes, manifest.split_columns]).encode())
    nested = {"encode": asdict(encode), "limits": asdict(limits)}
    return {
        "videos": f"{len(manifest.sources)} items, digest {digest.hexdigest()[:16]}",
        "shard_size_mib": shard_size_mib,
        "seed": seed,
        **{f"{section}.{name}": value for section, values in nested.items() for name, value in values.items()},
    }


def _libraries() -> dict[str, str]:
    return {**library_versions(), "pyarrow": pa.__version__, "python": platform.python_version()}


def _compare(out: Path, built: dict[str, object], asked: dict[str, object], next_step: str) -> None:
    differences = [f"{name}: it has {built.get(name)!r}, asked for {value!r}" for name, value in asked.items() if built.get(name) != value]
    if differences:
        raise DatasetError(f"{out} holds another dataset. " + "; ".join(differences) + f". {next_step}")


def _finished(out: Path, request: dict[str, object]) -> DatasetInfo:
    """A dataset that is there already, if it is the one that was asked for and all its files have their sizes."""
    info = read_info(out)
    _compare(out, info.build, request, "Choose another data.dir, or remove this folder to build it anew.")
    for name, size in [("index.arrow", info.index_size), *((shard.file, shard.size) for shard in info.shards)]:
        file = out / name
        if not file.is_file() or file.stat().st_size != size:
            raise DatasetError(
                f"{file} is missing or not {size} bytes long, although dataset.json says the dataset is finished. "
                f"Run 'posmlp data validate {out}'; restore the file, or remove the folder to build it anew."
            )
    if (out / "build").is_dir():  # killed in its very last step
        shutil.rmtree(out / "build", ignore_errors=True)
    return info


@contextmanager
def _only_builder(out: Path) -> Iterator[None]:
    """The kernel's lock on the folder, which ends with the process that holds it. Raises PipelineError when another holds it."""
    descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace") or "another process"
            raise PipelineError(f"{out} is being built by {holder}. Wait for it, stop it, or choose another data.dir.") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turns what an operating system says of a full or read-only disk into what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PipelineError(
                f"The disk of {out} is full ({error.strerror}). Free some space and run the same command again: finished shards are kept."
            ) from None
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise PipelineError(f"{error.filename or out} cannot be written ({error.strerror}). Choose another data.dir.") from None
        raise


def _plan(
    out: Path, videos: Path, manifest: Manifest, request: dict[str, object], encode: EncodeOptions, limits: LimitOptions, seed: int
) -> float:
    """Writes down what is going to be built, or reads what an earlier call did. Returns the ratio that shards are sized by."""
    path = out / "build" / "plan.json"
    asked = {**request, **{f"library {name}": version for name, version in _libraries().items()}, "plan_version": PLAN_VERSION}
    if path.is_file():
        plan = json.loads(path.read_text(encoding="utf-8"))
        _compare(out, plan["request"], asked, f"Remove {out / 'build'} and {out / 'shards'}, or choose another data.dir.")
        return float(plan["ratio"])
    strangers = sorted((out / "shards").glob("*.tar"))
    if strangers:
        raise DatasetError(f"{out} holds {len(strangers)} shards of no known build, first {strangers[0].name}. Choose another data.dir.")
    path.parent.mkdir(exist_ok=True)
    (out / "shards").mkdir(exist_ok=True)
    ratio = _measure_ratio(path.parent, videos, sample(manifest.sources, SAMPLED_VIDEOS, seed), encode, limits)
    with committed(path) as file:
        file.write(json.dumps({"request": asked, "ratio": ratio}, indent=1, sort_keys=True).encode() + b"\n")
    return ratio


def _measure_ratio(folder: Path, videos: Path, sources: Sequence[Source], encode: EncodeOptions, limits: LimitOptions) -> float:
    """Bytes of the canonical form per byte of source, from the beginnings of some videos; 1 when none of them tells."""
    before = after = 0.0
    with MediaWorker(encode, limits) as worker, tempfile.TemporaryDirectory(dir=folder) as work:
        for source in sources:
            begin = source.start_s or 0.0
            end = min(begin + SAMPLED_S, source.end_s if source.end_s is not None else begin + SAMPLED_S)
            try:
                report = worker.transcode(videos / source.path, Path(work) / "sample.mp4", source.start_s, end)
            except RejectedError:
                continue
            num_frames = report.source.duration_s * report.source.fps
            if num_frames > 0:
                after += report.size * max(1.0, num_frames / report.source_frames)
                before += report.source.size
    return float(f"{after / before:.3g}") if before else 1.0


def _remove_leftovers(out: Path) -> None:
    """What killed attempts left behind; nobody writes here but the holder of the lock and its tasks."""
    for folder in (out, out / "shards", out / "build"):
        for path in folder.glob(TEMPORARY):
            path.unlink(missing_ok=True)
    for path in (out / "build").iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _tasks(
    shards: Sequence[list[Source]], manifest: Manifest, videos: Path, out: Path, encode: EncodeOptions, limits: LimitOptions
) -> Iterator[ShardTask]:
    classes = {name: index for index, name in enumerate(manifest.classes)}
    codes = [{name: index for index, name in enumerate(names)} for names in _splits(manifest).values()]
    for number, sources in enumerate(shards):
        yield ShardTask(
            number=number,
            videos=videos.absolute(),
            out=out.absolute(),
            sources=sources,
            labels=[classes[source.label] for source in sources],
            codes=[[code.get(name, -1) for code, name in zip(codes, source.splits, strict=True)] for source in sources],
            split_columns=manifest.split_columns,
            encode=encode,
            limits=limits,
        )


def _splits(manifest: Manifest) -> dict[str, list[str]]:
    """Split column -> its names, sorted; an empty name means in none."""
    columns = enumerate(manifest.split_columns)
    return {column: sorted({source.splits[place] for source in manifest.sources} - {""}) for place, column in columns}


def _build_shards(out: Path, tasks: Iterable[ShardTask], sizes: Sequence[int], num_cpus: int | None) -> None:
    """Runs the tasks whose shards are not finished yet."""
    done = {number for number in range(len(sizes)) if record_path(out, number).is_file()}
    before = sum(sizes[number] for number in done)
    if len(done) == len(sizes):
        return
    todo = (task for task in tasks if task.number not in done)
    with (
        Progress("building", total=sum(sizes), unit="videos", done=before) as progress,
        closing(run_tasks(build_shard, todo, num_cpus=num_cpus)) as results,
    ):
        rejected = 0
        for task, num_rejects in results:
            rejected += num_rejects
            progress.advance(len(task.sources), f"{rejected} quarantined" if rejected else "")


def _finish(out: Path, num_shards: int, manifest: Manifest, request: dict[str, object]) -> DatasetInfo:
    """Merges the shards' records into the index and writes dataset.json, which makes it a dataset."""
    tables: list[pa.Table] = []
    shards: list[ShardInfo] = []
    rejects: list[dict[str, object]] = []
    for number in range(num_shards):
        shard, table, rejected = read_record(record_path(out, number))
        rejects += rejected
        if table.num_rows == 0:  # every one of its videos was rejected
            (out / shard.file).unlink(missing_ok=True)
            continue
        place = table.schema.get_field_index("shard")  # becomes an index into the shards that there are
        tables.append(table.set_column(place, table.schema.field(place), pa.repeat(pa.scalar(len(shards), pa.int32()), table.num_rows)))
        shards.append(shard)
    _write_quarantine(out / "quarantine.parquet", rejects, manifest)
    if not tables:
        listed = "; ".join(f"{row['path']}: {row['reason']} ({row['detail'] or row['explanation']})" for row in rejects[:SHOWN])
        raise DatasetError(f"None of the {len(rejects)} videos could be used, see {out / 'quarantine.parquet'}: {listed}")
    index_sha256, index_size = write_index(out / "index.arrow", tables)
    info = DatasetInfo(
        classes=manifest.classes,
        splits=_splits(manifest),
        num_items=sum(shard.num_items for shard in shards),
        num_quarantined=len(rejects) + len(manifest.missing),
        num_frames=sum(pc.sum(table.column("end")).as_py() for table in tables),  # of whole videos, which begin at 0
        index_sha256=index_sha256,
        index_size=index_size,
        shards=shards,
        build=request,
        libraries=_libraries(),
    ).with_fingerprint()
    with committed(out / "dataset.json") as file:
        file.write(info.to_json().encode())
    shutil.rmtree(out / "build")
    return info


def _write_quarantine(path: Path, rejects: list[dict[str, object]], manifest: Manifest) -> None:
    text = ["path", "label", *manifest.split_columns, "group", "reason", "explanation", "detail"]
    seconds = ["start_s", "end_s"]
    schema = pa.schema([*(pa.field(name, pa.string()) for name in text), *(pa.field(name, pa.float64()) for name in seconds)])
    missing: list[dict[str, object]] = [
        {"path": name, "reason": Reason.MISSING.value, "explanation": Reason.MISSING.text} for name in manifest.missing
    ]
    rows = sorted([*rejects, *missing], key=lambda row: (str(row["path"]), str(row.get("start_s")), str(row.get("end_s"))))
    with committed(path) as file:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=schema), file)
