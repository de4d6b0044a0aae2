"""From what a user asked for to tasks, one a shard, and running those that are not finished."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import MISSING, asdict, fields
from pathlib import Path

from cluster.tasks import run_tasks
from jobs.build_shard import ShardTask, build_shard, record_path
from jobs.errors import RecipeError
from jobs.progress import Progress
from pipeline.location import Location
from pipeline.manifest import Manifest, Source
from pipeline.options import EncodeOptions, LimitOptions


def request_of(manifest: Manifest, *, encode: EncodeOptions, limits: LimitOptions, shard_size_mib: int, seed: int) -> dict[str, object]:
    """What decides the dataset, as plain values that a later request is compared with, value by value."""
    digest = hashlib.sha256()
    always = [field.name for field in fields(Source) if field.default is MISSING]
    later = [field.name for field in fields(Source) if field.default is not MISSING]  # so that older datasets keep their digest
    for source in manifest.sources:
        values = [getattr(source, name) for name in always]
        more = [(name, value) for name in later if (value := getattr(source, name))]
        digest.update(repr([*values, *more]).encode())
    digest.update(json.dumps([manifest.missing, manifest.classes, manifest.split_columns]).encode())
    nested = {"encode": asdict(encode), "limits": asdict(limits)}
    return {
        "videos": f"{len(manifest.sources)} items, digest {digest.hexdigest()[:16]}",
        "shard_size_mib": shard_size_mib,
        "seed": seed,
        **{f"{section}.{name}": value for section, values in nested.items() for name, value in values.items()},
    }


def check_frames(manifest: Manifest, encode: EncodeOptions) -> None:
    """Raises RecipeError where videos are folders of pictures and their rate is not stated."""
    folders = [source.path for source in manifest.sources if source.num_frames]
    if folders and encode.frames_fps is None:
        raise RecipeError(
            f"{len(folders)} videos are folders of pictures, first {folders[0]}. State the rate of their frames when the dataset is "
            "built: data.encode.frames_fps=25."
        )


def splits_of(manifest: Manifest) -> dict[str, list[str]]:
    """Split column -> its names, sorted; an empty name means in none."""
    columns = enumerate(manifest.split_columns)
    return {column: sorted({source.splits[place] for source in manifest.sources} - {""}) for place, column in columns}


def shard_tasks(
    shards: Sequence[list[Source]],
    classes: Sequence[str],
    splits: Mapping[str, Sequence[str]],
    *,
    videos: Location,
    out: Location,
    work: Path,
    encode: EncodeOptions,
    limits: LimitOptions,
    first: int = 0,
    box_classes: Sequence[str] | None = None,
) -> list[ShardTask]:
    """What each shard is made of. first: the number of the first of `shards`. box_classes: names of the labels of the sources' boxes,
    None where items are videos.
    """
    labels = {name: index for index, name in enumerate(classes)}
    codes = [{name: index for index, name in enumerate(names)} for names in splits.values()]
    return [
        ShardTask(
            number=number,
            videos=_absolute(videos),
            out=_absolute(out),
            work=work.absolute(),
            sources=sources,
            labels=[labels[source.label] for source in sources],
            codes=[[code.get(name, -1) for code, name in zip(codes, source.splits, strict=True)] for source in sources],
            split_columns=list(splits),
            encode=encode,
            limits=limits,
            box_labels=None if box_classes is None else [labels[name] for name in box_classes],
        )
        for number, sources in enumerate(shards, first)
    ]


def _absolute(place: Location) -> Location:
    return place if isinstance(place, str) else place.absolute()


def build_shards(tasks: Sequence[ShardTask], num_cpus: int | None) -> None:
    """Runs the tasks whose shards are not finished yet."""
    todo = [task for task in tasks if not record_path(task.work, task.number).is_file()]
    total = sum(len(task.sources) for task in tasks)
    done = total - sum(len(task.sources) for task in todo)
    if not todo:
        return
    with (
        Progress("building", total=total, unit="videos", done=done) as progress,
        closing(run_tasks(build_shard, todo, num_cpus=num_cpus)) as results,
    ):
        rejected = 0
        for task, num_rejects in results:
            rejected += num_rejects
            progress.advance(len(task.sources), f"{rejected} quarantined" if rejected else "")
