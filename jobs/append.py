"""posmlp data append: new videos become new shards of a dataset that is there; what is in it stays as it is, byte for byte.

    out/append/plan.json            what was asked, and of which state of the dataset
    out/shards/shard-000007.tar     numbered behind the last shard
    out/append/shard-000007.arrow   its rows and rejects; where it exists, the shard is finished
    out/index-000001.arrow, quarantine-000001.parquet
    out/dataset.json                replaced: until then the dataset is the old one, from then on the new one

Classes keep their numbers: new ones come behind them. How videos are encoded comes from the dataset. Its fingerprint changes, so a
run that began on the old dataset does not resume on the new one; a new run starts from it, or from the old run's weights.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from jobs.build_commit import collect, commit, libraries, missing_rows, read_quarantine
from jobs.build_folder import PLAN_VERSION, compare, explained, only_builder, read_plan, remove_leftovers, write_plan
from jobs.build_tasks import build_shards, check_frames, request_of, shard_tasks
from pipeline.errors import DatasetError, ManifestError
from pipeline.index import SPLIT_PREFIX, Dataset, DatasetInfo, read_info
from pipeline.labels import LabelFiles, ordered_classes
from pipeline.location import Location
from pipeline.manifest import WINDOW_MARK, Manifest, Source, read_manifest, summary
from pipeline.media import check_encoder
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import TRIED_AGAIN
from pipeline.shards import deal

AUTOMATIC = ("split", {"train", "val"})  # the split column that a build makes where labels name none
SHOWN = 5  # offenders named in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Appended:
    """The dataset as it is now, and what this call changed: items, rows of the quarantine list, names of new classes."""

    info: DatasetInfo
    num_items: int
    num_quarantined: int
    new_classes: list[str]


def run(
    *,
    videos: Location,
    labels: LabelFiles,
    out: Location,
    format: str = "auto",
    allow_missing: bool = False,
    val_fraction: float = 0.2,
    num_cpus: int | None = None,
) -> Appended:
    """Appends to the dataset in `out`, or resumes that; what an earlier call finished is not done again.

    Raises ManifestError (videos, labels, keys that the dataset has already), DatasetError (no dataset, another append unfinished)
    and PipelineError (disk full, another writer).
    """
    if isinstance(out, str):
        raise DatasetError(f"{out} cannot be appended to at its URL. Append to a copy in a folder and upload that; dataset.json last.")
    with explained(out):
        read_info(out)  # before anything is locked: is there one at all?
        with only_builder(out):
            dataset = Dataset.open(out)
            encode, limits = _options(dataset.info)
            check_encoder(encode)
            seed, size_mib = (int(str(dataset.info.build[name])) for name in ("seed", "shard_size_mib"))
            held = _held_groups(dataset)
            manifest = read_manifest(
                videos, labels, format=format, allow_missing=allow_missing, val_fraction=val_fraction, seed=seed, held_groups=held
            )
            click.echo(summary(manifest), err=True)
            _check_splits(dataset, manifest)
            _check_kind(dataset, manifest)
            check_frames(manifest, encode)
            drawn = [replace(source, splits=()) for source in manifest.sources] if manifest.drawn else manifest.sources
            asked = replace(manifest, sources=drawn)  # which split a video was drawn into depends on the dataset as well
            request = request_of(asked, encode=encode, limits=limits, shard_size_mib=size_mib, seed=seed)
            request["val_fraction"] = val_fraction
            if request["videos"] in _appended(dataset.info):
                shutil.rmtree(out / "append", ignore_errors=True)  # killed in its very last step
                return Appended(info=dataset.info, num_items=0, num_quarantined=0, new_classes=[])
            _refuse_known(dataset, manifest.sources)
            return _extend(dataset, videos, manifest.sources, manifest.missing, manifest.classes, request, encode, limits, num_cpus)


def read_again(
    out: Path,
    info: DatasetInfo,
    videos: Location,
    manifest: Manifest,
    encode: EncodeOptions,
    limits: LimitOptions,
    num_cpus: int | None,
) -> DatasetInfo:
    """Tries those videos of `manifest` again that could not be read when the dataset was built, and appends what can be read now."""
    dataset = Dataset.open(out)
    waiting = {_place(row) for row in read_quarantine(dataset) if row["reason"] in TRIED_AGAIN}
    again = [source for source in manifest.sources if (source.path, source.start_s, source.end_s) in waiting]
    if not any(_opens(videos, source) for source in again):
        return info
    with only_builder(out):
        request: dict[str, object] = {"videos": f"{len(again)} that could not be read before"}
        return _extend(Dataset.open(out), videos, again, [], manifest.classes, request, encode, limits, num_cpus).info


def _opens(videos: Location, source: Source) -> bool:
    if isinstance(videos, str):
        return True  # it is listed at the URL
    try:
        path = videos / source.file
        if path.is_dir():
            return any(path.iterdir())
        with path.open("rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def _options(info: DatasetInfo) -> tuple[EncodeOptions, LimitOptions]:
    """How the dataset's videos were encoded and limited, and how the new ones are going to be."""

    def section(name: str) -> dict[str, object]:
        return {key.removeprefix(f"{name}."): value for key, value in info.build.items() if key.startswith(f"{name}.")}

    try:
        return EncodeOptions(**section("encode")), LimitOptions(**section("limits"))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise DatasetError(f"dataset.json does not say how its videos were encoded ({error}). Build the dataset anew.") from None


def _held_groups(dataset: Dataset) -> dict[str, bool]:
    """Group -> whether the dataset holds it out: a person must not be in both splits, however late some videos come."""
    column, names = AUTOMATIC
    if list(dataset.info.splits) != [column] or not set(dataset.info.splits[column]) <= names:
        return {}
    codes = dataset.column(SPLIT_PREFIX + column).tolist()
    groups = dataset.table.column("group").to_pylist()
    splits = dataset.info.splits[column]
    return {group: splits[code] == "val" for group, code in zip(groups, codes, strict=True) if group and code >= 0}


def _check_splits(dataset: Dataset, manifest: Manifest) -> None:
    has = sorted(dataset.info.splits)
    if manifest.split_columns != has:
        raise ManifestError(
            f"{dataset.where} has the split columns {', '.join(has)}, the new videos {', '.join(manifest.split_columns)}. "
            "Give a label file with the same split columns."
        )


def _check_kind(dataset: Dataset, manifest: Manifest) -> None:
    kinds = ["videos" if has is None else "keyframes with boxes" for has in (dataset.info.boxes, manifest.box_classes)]
    if kinds[0] != kinds[1]:
        raise ManifestError(f"The items of {dataset.where} are {kinds[0]}, the new ones {kinds[1]}. Build another dataset of them.")


def _appended(info: DatasetInfo) -> list[object]:
    entries = info.build.get("appended", [])
    assert isinstance(entries, list)
    return [entry["videos"] for entry in entries]


def _refuse_known(dataset: Dataset, sources: Sequence[Source]) -> None:
    known = {key.partition(WINDOW_MARK)[0] for key in dataset.table.column("key").to_pylist()}
    double = [source for source in sources if source.key in known]
    if double:
        listed = ", ".join(source.path for source in double[:SHOWN])
        raise ManifestError(
            f"{dataset.where} has {len(double)} of these {len(sources)} videos already, by their keys, first {listed}. "
            "Give a label file that names only the new ones; files that differ and are called the same need another name or subfolder."
        )


def _extend(
    dataset: Dataset,
    videos: Location,
    sources: Sequence[Source],
    missing: Sequence[str],
    named: Sequence[str],
    request: Mapping[str, object],
    encode: EncodeOptions,
    limits: LimitOptions,
    num_cpus: int | None,
) -> Appended:
    """named: the classes of `sources`, in the order of the labels of their boxes."""
    out, info = dataset.root, dataset.info
    work = out / "append"
    first = 1 + max(int(number) for shard in info.shards for number in re.findall(r"(\d+)\.tar$", shard.file))
    _plan(dataset, work, request)
    remove_leftovers(out, work)
    size_bytes = int(str(info.build["shard_size_mib"])) << 20
    shards = deal(sources, ratio=float(str(info.build["source_ratio"])), shard_bytes=size_bytes, seed=int(str(info.build["seed"])))
    classes = [*info.classes, *ordered_classes(set(named) - set(info.classes))]
    splits = _grown(info.splits, sources)
    box_classes = named if info.boxes else None
    tasks = shard_tasks(
        shards, classes, splits, videos=videos, out=out, work=work, encode=encode, limits=limits, first=first, box_classes=box_classes
    )
    build_shards(tasks, num_cpus)
    remove_leftovers(out, work)
    made = collect(out, work, range(first, first + len(shards)), first_shard=len(info.shards))
    rejects = [*made.rejects, *missing_rows(missing)]
    before = read_quarantine(dataset)
    changed = made.shards or {(_place(row), row["reason"]) for row in rejects} - {(_place(row), row["reason"]) for row in before}
    if changed:
        touched = {(source.path, source.start_s, source.end_s) for source in sources} | {_place(row) for row in rejects}
        quarantine = [*(row for row in before if _place(row) not in touched), *rejects]
        entry = {"videos": request["videos"], "num_items": sum(shard.num_items for shard in made.shards)}
        history = info.build.get("appended", [])
        assert isinstance(history, list)
        recorded = {**info.build, "appended": [*history, entry]}
        info = commit(out, made, quarantine, classes=classes, splits=splits, build=recorded, base=dataset)
    shutil.rmtree(work)
    return Appended(
        info=info,
        num_items=sum(shard.num_items for shard in made.shards),
        num_quarantined=len(rejects),
        new_classes=info.classes[len(dataset.info.classes) :],
    )


def _plan(dataset: Dataset, work: Path, request: Mapping[str, object]) -> None:
    """Writes down what is going to be appended, or checks that it is what an earlier call began."""
    out, info = dataset.root, dataset.info
    asked = {**request, **{f"library {name}": version for name, version in libraries().items()}, "plan_version": PLAN_VERSION}
    plan = read_plan(work)
    if plan is not None and plan["generation"] != info.generation:  # killed between dataset.json and its very last step
        shutil.rmtree(work)
        plan = None
    listed = {shard.file for shard in info.shards}
    strangers = sorted(path for path in (out / "shards").glob("*.tar") if f"shards/{path.name}" not in listed)
    if plan is not None:
        begun = plan["request"]
        assert isinstance(begun, dict)
        names = ", ".join(path.name for path in strangers) or "nothing"
        compare(
            out, begun, asked, f"Finish that append by its own command; or give it up: remove {work} and of shards/ {names or 'nothing'}."
        )
        return
    if strangers:
        raise DatasetError(
            f"{out} holds {len(strangers)} shards that dataset.json does not list, first {strangers[0].name}. "
            "They are of an append that was given up: remove them."
        )
    work.mkdir(exist_ok=True)
    write_plan(work, {"request": asked, "generation": info.generation})


def _grown(splits: Mapping[str, Sequence[str]], sources: Sequence[Source]) -> dict[str, list[str]]:
    """The splits with names that only the new videos have behind those that there are, so that codes keep their meaning."""
    grown = {}
    for place, (column, names) in enumerate(splits.items()):
        found = {source.splits[place] for source in sources} - {"", *names}
        grown[column] = [*names, *sorted(found)]
    return grown


def _place(row: Mapping[str, object]) -> tuple[object, object, object]:
    """What a row of the quarantine list is about."""
    return row["path"], row.get("start_s"), row.get("end_s")


def show(out: Location, done: Appended) -> None:
    """Says on standard output what was appended."""
    if not done.num_items and not done.num_quarantined:
        click.echo(f"{out}: these videos were appended before; nothing to do")
        return
    ids = {name: number for number, name in enumerate(done.info.classes)}
    new = ", ".join(f"{name} ({ids[name]})" for name in done.new_classes)
    click.echo(
        f"{out}: {done.num_items} videos appended, {done.num_quarantined} quarantined; "
        f"{done.info.num_items} in all, {len(done.info.shards)} shards, fingerprint {Dataset.open(out).info.fingerprint}"
    )
    click.echo(f"classes: {f'new behind the old ones: {new}' if new else 'as they were'}")
