"""Videos of no dataset, made into one: verified and transcoded as the build does it, in a folder that is thrown away afterwards.

What cannot be read has a sentence that says why; the others go on. Items are whole videos and, of long ones, windows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import pyarrow as pa

from jobs.errors import JobError
from jobs.progress import Progress
from pipeline.durable import committed
from pipeline.index import SPLIT_PREFIX, DatasetInfo, ShardInfo, index_schema, write_index
from pipeline.media import MediaReport
from pipeline.media_worker import MediaWorker
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import Reason, RejectedError
from pipeline.segments import cut
from pipeline.shards import NAME, Member, ShardWriter

SPLIT_COLUMN, SPLIT = "split", "loose"
SEGMENT_GROUPS = 4  # groups of pictures by which segments begin, at least

_ANOTHER = "Give a video file. If a player shows this one, convert it first: ffmpeg -i FILE -pix_fmt yuv420p NEW.mp4"
_LIMIT = "Cut or shrink it, or raise the limit under data.limits in the run's recipe.yaml."
_NEXT = {
    Reason.UNREADABLE: "Check its permissions.",
    Reason.NO_VIDEO_STREAM: "Give a file that holds pictures.",
    Reason.TOO_SMALL: "Give a larger one.",
    Reason.TRUNCATED: "Copy or download it again.",
    Reason.DAMAGED: "Copy or download it again, or convert it first: ffmpeg -i FILE -pix_fmt yuv420p NEW.mp4",
    **dict.fromkeys([Reason.TOO_MANY_BYTES, Reason.TOO_MANY_PIXELS, Reason.TOO_MANY_FRAMES], _LIMIT),
    **dict.fromkeys([Reason.OUT_OF_MEMORY, Reason.CPU_TIME, Reason.WALL_TIME], _LIMIT),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LooseVideo:
    """One video in its canonical form, and where that lies in the shard. windows: [begin, end) in frames.

    segments: member i holds frames [i * step, (i + 2) * step), so that a window need not be looked for in a whole long video; without
    any, windows are read from `member`.
    """

    report: MediaReport
    member: Member
    windows: list[tuple[int, int]]
    segments: list[Member]
    step: int

    def seconds(self, frame: int) -> float:
        return round(frame / self.report.fps, 3)

    def rows(self, number: int) -> Iterator[dict[str, object]]:
        """Of the index: the whole video, then its windows."""
        report = self.report
        facts = {"fps": report.fps, "width": report.width, "height": report.height, "codec": report.codec}
        unknown = {"source": "", "group": "", "label": 0, SPLIT_PREFIX + SPLIT_COLUMN: 0}
        for item, (begin, end) in enumerate([(0, report.num_frames), *self.windows]):
            member, first = self.member, 0
            if item and self.segments:
                place = min(begin // self.step, len(self.segments) - 1)
                member, first = self.segments[place], place * self.step
            where = {"shard": 0, "offset": member.offset, "size": member.size, "crc32": member.crc32}
            yield {"key": f"{number:06d}/{item:06d}", "begin": begin - first, "end": end - first, **where, **facts, **unknown}


def gather(
    paths: Sequence[Path],
    folder: Path,
    *,
    classes: list[str],
    encode: EncodeOptions,
    limits: LimitOptions,
    min_frames: int,
    windows: Callable[[MediaReport], list[tuple[int, int]]],
) -> list[LooseVideo | str]:
    """Each video, or why it cannot be used; those that can become the dataset `folder`, if there is one.

    Their items, in order: of each video the whole, then its windows [begin, end) in frames. What `windows` raises as JobError is why.
    Raises PipelineError when no child process can be kept alive, OSError when `folder` cannot be written.
    """
    read: list[LooseVideo | str] = []
    shard, video = folder / NAME.format(0), folder / "video.mp4"
    shard.parent.mkdir()
    with (
        Progress("reading videos", total=len(paths), unit="videos") as progress,
        MediaWorker(encode, limits) as worker,
        ShardWriter(shard) as writer,
    ):
        for number, path in enumerate(paths):
            try:
                report = transcode(worker, path, video)
                if report.num_frames < min_frames:
                    raise JobError(
                        f"it has {report.num_frames} frame, the model looks for motion. Give a video of {min_frames} frames or more."
                    )
                read.append(_add(writer, f"{number:06d}", video, report, windows(report), encode.gop))
            except JobError as error:
                read.append(f"{click.format_filename(path)}: {error}")
            progress.advance()
    for leftover in folder.glob("*.mp4"):
        leftover.unlink()
    rows = [row for number, each in enumerate(read) if isinstance(each, LooseVideo) for row in each.rows(number)]
    if rows:
        _write_dataset(
            folder, rows, ShardInfo(file=NAME.format(0), size=writer.size, sha256=writer.sha256, num_items=len(rows)), classes, encode
        )
    return read


def _add(writer: ShardWriter, key: str, video: Path, report: MediaReport, windows: list[tuple[int, int]], gop: int) -> LooseVideo:
    """Puts a canonical video into the shard, and where it is long also its segments."""
    member = writer.add(key, 0, {}, video)
    groups = max(SEGMENT_GROUPS, -(-max((end - begin for begin, end in windows), default=0) // gop))
    segments = []
    if len(windows) > 1 and report.num_frames > 2 * groups * gop:
        for number, path in enumerate(cut(video, video.with_name("segment.mp4"), groups)):
            segments.append(writer.add(f"{key}/{number:06d}", 0, {}, path))
    return LooseVideo(report=report, member=member, windows=windows, segments=segments, step=groups * gop)


def transcode(worker: MediaWorker, path: Path, destination: Path) -> MediaReport:
    """The canonical form of an untrusted video, at `destination`. Raises JobError with the reason and the next step."""
    if not path.exists():
        raise JobError("no such file. Check the path.")
    if path.is_dir():
        raise JobError(f"it is a folder. Name the videos in it, for example {path}/*.mp4")
    if not path.is_file():
        raise JobError("it is a device, a pipe or a socket. Give a video file.")
    try:
        return worker.transcode(path, destination)
    except RejectedError as rejected:
        detail = f" ({rejected.detail})" if rejected.detail else ""
        raise JobError(f"{rejected.reason.text}{detail}. {_NEXT.get(rejected.reason, _ANOTHER)}") from None


def _write_dataset(folder: Path, rows: list[dict[str, object]], shard: ShardInfo, classes: list[str], encode: EncodeOptions) -> None:
    sha256, size = write_index(folder / "index.arrow", [pa.Table.from_pylist(rows, schema=index_schema([SPLIT_COLUMN]))])
    info = DatasetInfo(
        classes=classes,
        splits={SPLIT_COLUMN: [SPLIT]},
        num_items=len(rows),
        num_quarantined=0,
        num_frames=sum(int(str(row["end"])) - int(str(row["begin"])) for row in rows),
        index_sha256=sha256,
        index_size=size,
        shards=[shard],
        build={"encode.form": encode.form},
    ).with_fingerprint()
    with committed(folder / "dataset.json") as file:
        file.write(info.to_json().encode())
