"""One shard of a dataset, start to end, as a task that may die at any moment and be done again.

The tar is renamed into place first, its record last: rows of the index, and of the quarantine list, in one Arrow file.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from pipeline import duplicates
from pipeline.durable import committed
from pipeline.errors import DatasetError
from pipeline.index import SPLIT_PREFIX, ShardInfo, index_schema
from pipeline.manifest import WINDOW_MARK, Source
from pipeline.media import MediaReport
from pipeline.media_worker import MediaWorker
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import Reason, RejectedError
from pipeline.segments import cut_evenly
from pipeline.shards import NAME, Member, ShardWriter
from pipeline.tar_source import copy_video

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
                report = _transcode(worker, task, source, video)
            except RejectedError as rejected:
                rejects.append(Reject(source=source, reason=rejected.reason, detail=rejected.detail))
                continue
            for number, piece in enumerate(_pieces(video, source.key, report, task.encode)):
                member = writer.add(piece.key, label, _facts(source, label, report, piece), piece.path)
                rows.append(_row(task, source, label, codes, report, piece, member))
                likenesses.append(_likeness(report) if number == 0 else {"bytes": None, "content": None})  # the first stands for all
    info = ShardInfo(file=NAME.format(task.number), size=writer.size, sha256=writer.sha256, num_items=len(rows))
    rejected_rows = [_reject_row(task.split_columns, reject) for reject in rejects]
    table = pa.Table.from_pylist(rows, schema=index_schema(task.split_columns))
    for field in duplicates.COLUMNS:
        table = table.append_column(field, pa.array([each[field.name] for each in likenesses], field.type))
    metadata = {"shard": json.dumps(asdict(info)), "rejects": json.dumps(rejected_rows)}
    with committed(record_path(task.work, task.number)) as file, pa.ipc.new_file(file, table.schema.with_metadata(metadata)) as stream:
        stream.write_table(table.replace_schema_metadata(metadata))
    return len(rejects)


def transcode(
    worker: MediaWorker, videos: Path, source: Source, destination: Path, limits: LimitOptions, end_s: float | None = None
) -> MediaReport:
    """What the worker makes of a source, at `destination`; of a video in a tar, through a copy beside that, under a name of ours.

    end_s: where to stop, instead of the source's own end. Raises RejectedError.
    """
    wanted = source.start_s, source.end_s if end_s is None else end_s, source.num_frames
    if not source.tar:
        return worker.transcode(videos / source.path, destination, *wanted)
    copy = destination.with_name(f"source{Path(source.path).suffix}")
    try:
        copy_video(videos / source.tar, source.offset, source.size, copy, limits)
        return worker.transcode(copy, destination, *wanted)
    finally:
        copy.unlink(missing_ok=True)


def _transcode(worker: MediaWorker, task: ShardTask, source: Source, video: Path) -> MediaReport:
    """The same, but storage that fails gets some more chances."""
    for delay_s in READ_AGAIN_S:
        try:
            return transcode(worker, task.videos, source, video, task.limits)
        except RejectedError as rejected:
            if rejected.reason != Reason.READ_FAILED:
                raise
        time.sleep(delay_s)
    return transcode(worker, task.videos, source, video, task.limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """What becomes one item: a video, or one of the windows that a long one is cut into. window: where in the video, None for all."""

    key: str
    path: Path
    num_frames: int
    window: dict[str, int] | None = None


def _pieces(video: Path, key: str, report: MediaReport, encode: EncodeOptions) -> Iterator[_Piece]:
    """The canonical video as one piece or, where it is too long for one, as several that hold every frame of it once."""
    longest = encode.max_member_s
    if longest is None or report.num_frames <= longest * report.fps:
        yield _Piece(key=key, path=video, num_frames=report.num_frames)
        return
    begin, path = 0, video.with_name("window.mp4")
    for number, num_frames in enumerate(cut_evenly(video, path, max(1, int(longest * report.fps) // encode.gop))):
        window = {"number": number, "begin": begin, "of_frames": report.num_frames}
        yield _Piece(key=f"{key}{WINDOW_MARK}{number:04d}", path=path, num_frames=num_frames, window=window)
        begin += num_frames
    if begin != report.num_frames:
        raise DatasetError(f"video '{key}' has {report.num_frames} frames, its windows {begin}: a fault of ours, please report it.")


def _likeness(report: MediaReport) -> dict[str, object]:
    return {"bytes": bytes.fromhex(report.source_digest), "content": bytes.fromhex(report.content)}


def _facts(source: Source, label: int, report: MediaReport, piece: _Piece) -> dict[str, object]:
    """The `.json` member: what a reader of the tars alone may want to know."""
    return {
        **({} if piece.window is None else {"window": piece.window}),
        "label": label,
        "class": source.label,
        "path": source.path,
        "group": source.group,
        "start_s": source.start_s,
        "end_s": source.end_s,
        "num_frames": piece.num_frames,
        "fps": report.fps,
        "width": report.width,
        "height": report.height,
        "codec": report.codec,
        "source": asdict(report.source),
    }


def _row(
    task: ShardTask, source: Source, label: int, codes: list[int], report: MediaReport, piece: _Piece, member: Member
) -> dict[str, object]:
    return {
        "key": piece.key,
        "source": source.path,
        "group": source.group,
        "label": label,
        "shard": task.number,
        "offset": member.offset,
        "size": member.size,
        "crc32": member.crc32,
        "begin": 0,
        "end": piece.num_frames,
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
