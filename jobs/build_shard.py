"""One shard of a dataset, start to end, as a task that may die at any moment and be done again.

The tar is renamed into place first, its record last: rows of the index, and of the quarantine list, in one Arrow file. Where the
dataset is at a URL, both are made in a temporary folder and uploaded in this order.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline import duplicates
from pipeline.boxes import Keyframe, keyframes
from pipeline.canonical import Trace
from pipeline.durable import committed
from pipeline.errors import DatasetError
from pipeline.index import SPLIT_PREFIX, ShardInfo, index_schema
from pipeline.location import Location
from pipeline.manifest import WINDOW_MARK, Source
from pipeline.media import MediaReport
from pipeline.media_worker import MediaWorker
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import Reason, RejectedError
from pipeline.remote import RemoteFolder
from pipeline.segments import cut_evenly
from pipeline.shards import NAME, Member, ShardWriter
from pipeline.source_files import SourceFiles

BOXES = "boxes"  # a column of the record: what becomes boxes.arrow
READ_AGAIN_S = (0.2, 1.0, 5.0)  # pauses before a source that could not be read is read again


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """All that a task needs to make shard `number`. labels, codes: per source, its class index and its split code per split column.

    box_labels: where items are keyframes, the class index of each label of the sources' boxes; None where they are videos.
    out: a folder, or a URL. work: the folder in `out` for records and unfinished videos; with a URL the driver's alone, and the task works
    in the system's temporary folder.
    """

    number: int
    videos: Location
    out: Location
    work: Path
    sources: list[Source]
    labels: list[int]
    codes: list[list[int]]
    split_columns: list[str]
    encode: EncodeOptions
    limits: LimitOptions
    box_labels: list[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """A row of the quarantine list."""

    source: Source
    reason: Reason
    detail: str


def record_path(work: Path, number: int) -> Path:
    """Where the record of a finished shard is. It exists when the shard does."""
    return work / f"shard-{number:06d}.arrow"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """A finished shard: its rows of the index, their digests (`duplicates.COLUMNS`), both mapped, and its rows of the quarantine list.

    boxes: of each row, as rows of `boxes.STORED`; none where items are videos.
    """

    shard: ShardInfo
    rows: pa.Table
    likenesses: pa.Table
    rejects: list[dict[str, object]]
    boxes: pa.ChunkedArray | None


def read_record(path: Path) -> Record:
    """The record of a finished shard."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    names = [field.name for field in duplicates.COLUMNS]
    plain = table.replace_schema_metadata(None)
    return Record(
        shard=ShardInfo(**json.loads(table.schema.metadata[b"shard"])),
        rows=plain.drop_columns([*names, *([BOXES] if BOXES in table.column_names else [])]),
        likenesses=plain.select(names),
        rejects=json.loads(table.schema.metadata[b"rejects"]),
        boxes=table.column(BOXES) if BOXES in table.column_names else None,
    )


def build_shard(task: ShardTask) -> int:
    """Makes one shard and, last, its record. Returns how many videos it rejected. Idempotent: doing it twice makes the same bytes."""
    if not isinstance(task.out, str):
        with tempfile.TemporaryDirectory(dir=task.work) as work:
            return _make(task, Path(work), task.out / NAME.format(task.number), record_path(task.work, task.number))[1]
    with tempfile.TemporaryDirectory(prefix="posmlp-shard-") as work:
        tar, record = Path(work) / "shard.tar", record_path(Path(work), task.number)
        num_items, num_rejects = _make(task, Path(work), tar, record)
        remote = RemoteFolder(task.out)
        if num_items:  # a shard of rejects alone is not kept
            remote.upload(tar, NAME.format(task.number))
        remote.upload(record, f"build/{record.name}")
        return num_rejects


def _make(task: ShardTask, work: Path, tar: Path, record: Path) -> tuple[int, int]:
    """Writes the tar and then the record; returns how many items and rejects there are. work: a folder for unfinished videos."""
    rows: list[dict[str, object]] = []
    rejects: list[Reject] = []
    files = SourceFiles(task.videos, task.limits)
    with MediaWorker(task.encode, task.limits) as worker, ShardWriter(tar) as writer:
        video, trace = work / "video.mp4", None if task.box_labels is None else work / "trace.json"
        for source, label, codes in zip(task.sources, task.labels, task.codes, strict=True):
            try:
                report = _transcode(worker, files, source, video, trace)
            except RejectedError as rejected:
                rejects.append(Reject(source=source, reason=rejected.reason, detail=rejected.detail))
                continue
            found, refused = _keyframes(source, task.box_labels, trace)
            rejects.extend(Reject(source=source, reason=reason, detail=detail) for reason, detail in refused)
            digests = _likeness(report)
            for piece in _pieces(video, source.key, report, task.encode):
                items = _items(piece, label, found)
                if not items:
                    continue
                member = writer.add(piece.key, label, _facts(source, label, report, piece), piece.path)
                for item in items:
                    rows.append({**_row(task, source, codes, report, piece, member), **item, **digests})
                    digests = dict.fromkeys(digests)  # the first item of a video stands for all
    info = ShardInfo(file=NAME.format(task.number), size=writer.size, sha256=writer.sha256, num_items=len(rows))
    rejected_rows = [_reject_row(task.split_columns, reject) for reject in rejects]
    boxed = task.box_labels is not None
    fields = [*duplicates.COLUMNS, *([pa.field(BOXES, pa.large_binary(), nullable=False)] if boxed else [])]
    schema = pa.schema([*index_schema(task.split_columns, keyframes=boxed), *fields])
    metadata = {"shard": json.dumps(asdict(info)), "rejects": json.dumps(rejected_rows)}
    with committed(record) as file, pa.ipc.new_file(file, schema.with_metadata(metadata)) as stream:
        stream.write_table(pa.Table.from_pylist(rows, schema=schema.with_metadata(metadata)))
    return len(rows), len(rejects)


def _keyframes(source: Source, labels: Sequence[int] | None, trace: Path | None) -> tuple[list[Keyframe] | None, list[tuple[Reason, str]]]:
    """(the keyframes of a source, None where it is an item itself; why others are not in)."""
    if source.boxes is None or labels is None or trace is None:
        return None, []
    return keyframes(source.boxes.relabelled(np.array(labels, dtype=np.int32)), Trace.read(trace))


def transcode(
    worker: MediaWorker, files: SourceFiles, source: Source, destination: Path, end_s: float | None = None, trace: Path | None = None
) -> MediaReport:
    """What the worker makes of a source, at `destination`. end_s: where to stop, instead of the source's own end. trace: a file for the
    `Trace` of it. Raises RejectedError.
    """
    end_s = source.end_s if end_s is None else end_s
    with files.local(source, destination) as path:
        return worker.transcode(path, destination, source.start_s, end_s, source.num_frames, trace)


def _transcode(worker: MediaWorker, files: SourceFiles, source: Source, video: Path, trace: Path | None) -> MediaReport:
    """The same, but storage that fails gets some more chances."""
    for delay_s in READ_AGAIN_S:
        try:
            return transcode(worker, files, source, video, trace=trace)
        except RejectedError as rejected:
            if rejected.reason != Reason.READ_FAILED:
                raise
        time.sleep(delay_s)
    return transcode(worker, files, source, video, trace=trace)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """What becomes one member of the tar: a video, or one of the windows that a long one is cut into. window: where, None for all."""

    key: str
    path: Path
    num_frames: int
    window: dict[str, int] | None = None

    @property
    def begin(self) -> int:
        """Its first frame in the whole video."""
        return 0 if self.window is None else self.window["begin"]


def _items(piece: _Piece, label: int, found: Sequence[Keyframe] | None) -> list[dict[str, object]]:
    """What is an item's own among the items of a piece: the piece itself or, where keyframes are `found`, those in it."""
    if found is None:
        return [{"key": piece.key, "label": label}]
    return [
        {"key": piece.key + each.name, "label": each.label, "keyframe": each.frame - piece.begin, BOXES: each.rows.tobytes()}
        for each in found
        if piece.begin <= each.frame < piece.begin + piece.num_frames
    ]


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


def _row(task: ShardTask, source: Source, codes: list[int], report: MediaReport, piece: _Piece, member: Member) -> dict[str, object]:
    """What all items of a piece have in common."""
    return {
        "source": source.path,
        "group": source.group,
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
