"""One shard of a dataset, start to end, as a task that may die at any moment and be done again.

The tar is renamed into place first, its record last: rows of the index, and of the quarantine list, in one Arrow file.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from pipeline import duplicates
from pipeline.durable import committed
from pipeline.index import SPLIT_PREFIX, ShardInfo, index_schema
from pipeline.manifest import Source
from pipeline.media import MediaReport
from pipeline.media_worker import MediaWorker
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import Reason, RejectedError
from pipeline.shards import NAME, Member, ShardWriter

READ_AGAIN_S = (0.2, 1.0, 5.0)  # pauses before a source that could not be read is read again


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """All that a task needs to make shard `number`. labels, codes: per source, its class index and its split code per split column.

    work: the folder in `out` for records and unfinished videos.
    """

    number: int
    videos: Path
    out: Path
    work: Path
    sources: list[Source]
    labels: list[int]
    codes: list[list[int]]
    split_columns: list[str]
    encode: EncodeOptions
    limits: LimitOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """A row of the quarantine list."""

    source: Source
    reason: Reason
    detail: str


def record_path(work: Path, number: int) -> Path:
    """Where the record of a finished shard is. It exists when the shard does."""
    return work / f"shard-{number:06d}.arrow"


def read_record(path: Path) -> tuple[ShardInfo, pa.Table, pa.Table, list[dict[str, object]]]:
    """A finished shard, its rows and their digests (`duplicates.COLUMNS`), both mapped, and its rows of the quarantine list."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    info = ShardInfo(**json.loads(table.schema.metadata[b"shard"]))
    names = [field.name for field in duplicates.COLUMNS]
    plain = table.replace_schema_metadata(None)
    return info, plain.drop_columns(names), plain.select(names), json.loads(table.schema.metadata[b"rejects"])


def build_shard(task: ShardTask) -> int:
    """Makes one shard and, last, its record. Returns how many videos it rejected. Idempotent: doing it twice makes the same bytes."""
    rows: list[dict[str, object]] = []
    likenesses: list[dict[str, object]] = []
    rejects: list[Reject] = []
    tar = task.out / NAME.format(task.number)
    with (
        MediaWorker(task.encode, task.limits) as worker,
        tempfile.TemporaryDirectory(dir=task.work) as work,
        ShardWriter(tar) as writer,
    ):
        video = Path(work) / "video.mp4"
        for source, label, codes in zip(task.sources, task.labels, task.codes, strict=True):
            try:
                report = _transcode(worker, task.videos / source.path, video, source)
            except RejectedError as rejected:
                rejects.append(Reject(source=source, reason=rejected.reason, detail=rejected.detail))
                continue
            member = writer.add(source.key, label, _facts(source, label, report), video)
            rows.append(_row(task, source, label, codes, report, member))
            likenesses.append({"bytes": bytes.fromhex(report.source_digest), "content": bytes.fromhex(report.content)})
    info = ShardInfo(file=NAME.format(task.number), size=writer.size, sha256=writer.sha256, num_items=len(rows))
    rejected_rows = [_reject_row(task.split_columns, reject) for reject in rejects]
    table = pa.Table.from_pylist(rows, schema=index_schema(task.split_columns))
    for field in duplicates.COLUMNS:
        table = table.append_column(field, pa.array([each[field.name] for each in likenesses], field.type))
    metadata = {"shard": json.dumps(asdict(info)), "rejects": json.dumps(rejected_rows)}
    with committed(record_path(task.work, task.number)) as file, pa.ipc.new_file(file, table.schema.with_metadata(metadata)) as stream:
        stream.write_table(table.replace_schema_metadata(metadata))
    return len(rejects)


def _transcode(worker: MediaWorker, path: Path, video: Path, source: Source) -> MediaReport:
    """As the worker does it, but storage that fails gets some more chances. Raises RejectedError."""
    for delay_s in READ_AGAIN_S:
        try:
            return worker.transcode(path, video, source.start_s, source.end_s)
        except RejectedError as rejected:
            if rejected.reason != Reason.READ_FAILED:
                raise
        time.sleep(delay_s)
    return worker.transcode(path, video, source.start_s, source.end_s)


def _facts(source: Source, label: int, report: MediaReport) -> dict[str, object]:
    """The `.json` member: what a reader of the tars alone may want to know."""
    return {
        "label": label,
        "class": source.label,
        "path": source.path,
        "group": source.group,
        "start_s": source.start_s,
        "end_s": source.end_s,
        "num_frames": report.num_frames,
        "fps": report.fps,
        "width": report.width,
        "height": report.height,
        "codec": report.codec,
        "source": asdict(report.source),
    }


def _row(task: ShardTask, source: Source, label: int, codes: list[int], report: MediaReport, member: Member) -> dict[str, object]:
    return {
        "key": source.key,
        "source": source.path,
        "group": source.group,
        "label": label,
        "shard": task.number,
        "offset": member.offset,
        "size": member.size,
        "crc32": member.crc32,
        "begin": 0,
        "end": report.num_frames,
        "fps": report.fps,
        "width": report.width,
        "height": report.height,
        "codec": report.codec,
        **{SPLIT_PREFIX + name: code for name, code in zip(task.split_columns, codes, strict=True)},
    }


def _reject_row(split_columns: Sequence[str], reject: Reject) -> dict[str, object]:
    source = reject.source
    return {
        "path": source.path,
        "label": source.label,
        **dict(zip(split_columns, source.splits, strict=True)),
        "group": source.group,
        "start_s": source.start_s,
        "end_s": source.end_s,
        "reason": reject.reason.value,
        "explanation": reject.reason.text,
        "detail": reject.detail,
    }
