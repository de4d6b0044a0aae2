"""posmlp bench build: CPU-seconds of the build against the ffmpeg command line, and of two workers against one.

ffmpeg gets the same filters and the same options of x264, one thread, and a process a video, as a script does it. Ours is the task of a
shard: limited child processes, digests, tar and record included. Whole builds run on a private Ray of one or two CPUs; what they take
beyond a build of the first half of the videos is divided by the other half, so that Ray's start does not count. All other CPU time does,
that of every process below too.
"""

import csv
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from jobs.bench_cpu import children_cpu_s, family_cpu_s
from jobs.bench_footage import footage, write_x264
from jobs.build_shard import build_shard, read_record, record_path
from jobs.build_tasks import shard_tasks
from jobs.errors import JobError
from pipeline.label_file import VIDEO_SUFFIXES
from pipeline.manifest import Source, read_manifest
from pipeline.options import EncodeOptions, LimitOptions

SOURCE_OPTIONS = {"crf": "16"}  # of synthetic sources: as a good download
SHARD_MIB = 1  # of whole builds, so that two workers have work until the end
TASK, FFMPEG = "the task of a shard", "ffmpeg, the same filters and options"
BUILDS = {1: "whole builds, one worker", 2: "whole builds, two workers"}
SWS = "flags=bicubic+accurate_rnd+bitexact"
X264 = "scenecut=0:open-gop=0:threads=1:lookahead-threads=1:sync-lookahead=0:cpu-independent=1"
STARTS = 20  # of an ffmpeg that does nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Videos:
    """What is built. sizes, seconds: width and height, and length, of what becomes of each source."""

    folder: Path
    sources: Sequence[Source]
    sizes: Sequence[tuple[int, int]]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """cpu_ms: of a video, by name, one a repeat. start_ms: CPU of an ffmpeg that does nothing. missing: name -> why it was not measured."""

    num_videos: int
    seconds: float
    cpu_ms: dict[str, list[float]]
    start_ms: float | None
    missing: dict[str, str]

    def ratios(self) -> dict[str, list[float]]:
        """By name, one a repeat: the task over ffmpeg, without and with ffmpeg's start taken off, and two workers over one."""
        found = {}
        if self.start_ms is not None:
            pairs = list(zip(self.cpu_ms[TASK], self.cpu_ms[FFMPEG], strict=True))
            found["task / ffmpeg"] = [ours / theirs for ours, theirs in pairs]
            found["task / ffmpeg without its start"] = [ours / (theirs - self.start_ms) for ours, theirs in pairs]
        one, two = (self.cpu_ms[BUILDS[cpus]] for cpus in (1, 2))
        found["two workers / one"] = [b / a for a, b in zip(one, two, strict=True)]
        return found


def run(folder: Path | None, *, num_videos: int = 100, repeats: int = 3) -> Result:
    """folder: of videos, of which the first `num_videos` by name are built; None: as many synthetic scenes of ten seconds.

    Raises JobError for a folder without two videos that can be built, and where ffmpeg or a build fails.
    """
    with tempfile.TemporaryDirectory(prefix="posmlp-bench-") as name:
        work = Path(name)
        videos = _videos(folder or _scenes(work / "scenes", num_videos), work, num_videos)
        ffmpeg = shutil.which("ffmpeg")
        cpu_ms: dict[str, list[float]] = {each: [] for each in (TASK, *([FFMPEG] if ffmpeg else []), *BUILDS.values())}
        for repeat in range(repeats):
            contest = [TASK, FFMPEG] if repeat % 2 else [FFMPEG, TASK]
            for each in contest if ffmpeg else [TASK]:
                spent = _task(videos, work / f"task-{repeat}") if each == TASK else _ffmpeg(str(ffmpeg), videos, work)
                cpu_ms[each].append(1e3 * spent / len(videos.sources))
            count, half = len(videos.sources), len(videos.sources) // 2
            for cpus, each in BUILDS.items():
                spent = _whole(videos, work, count, cpus) - _whole(videos, work, half, cpus)
                cpu_ms[each].append(1e3 * spent / (count - half))
        start_ms = None if ffmpeg is None else 1e3 * _commands([[ffmpeg, "-version"]] * STARTS) / STARTS
    missing = {} if ffmpeg else {FFMPEG: "ffmpeg is not installed (apt-get install ffmpeg)"}
    return Result(num_videos=len(videos.sources), seconds=videos.seconds, cpu_ms=cpu_ms, start_ms=start_ms, missing=missing)


def table(result: Result) -> str:
    """The figures as a Markdown table, then the ratios."""
    lines = ["| what | CPU-ms per video | lowest to highest | CPU-ms per second of video |", "|---|---|---|---|"]
    for name, times in result.cpu_ms.items():
        each = median(times) * result.num_videos / result.seconds
        lines.append(f"| {name} | {median(times):.1f} | {min(times):.1f} to {max(times):.1f} | {each:.1f} |")
    if result.start_ms is not None:
        lines.append(f"| an ffmpeg that does nothing | {result.start_ms:.1f} | | |")
    lines += [f"| {name} | not measured: {why} | | |" for name, why in result.missing.items()]
    ratios = (f"{name}: {median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for name, each in result.ratios().items())
    return "\n".join([f"{result.num_videos} videos, {result.seconds:.0f} s", "", *lines, "", *ratios])


def _scenes(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number, shown in enumerate(footage(None, count)):
        write_x264(folder / f"scene-{number:03d}.mp4", shown, SOURCE_OPTIONS)
    return folder


def _videos(folder: Path, work: Path, count: int) -> Videos:
    """The first videos of `folder` that can be built, found by building them, which also warms the caches."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)[:count]
    listed = read_manifest(folder, [_labels(work, paths)]).sources if paths else []
    tried = Videos(folder=folder, sources=[replace(source, splits=()) for source in listed], sizes=[], seconds=0.0)
    _task(tried, work / "tried")
    table = read_record(record_path(work / "tried", 0)).rows
    rows = {row["source"]: row for row in table.to_pylist()}
    sources = [source for source in tried.sources if source.path in rows]
    if len(sources) < 2:
        raise JobError(
            f"{folder}: got {len(sources)} videos that can be built, of {len(paths)}, expected two or more. Give another folder."
        )
    found = [rows[source.path] for source in sources]
    seconds = sum((row["end"] - row["begin"]) / row["fps"] for row in found)
    return Videos(folder=folder, sources=sources, sizes=[(row["width"], row["height"]) for row in found], seconds=seconds)


def _labels(work: Path, paths: Sequence[str]) -> Path:
    """A label file of one class, named after how many videos it lists."""
    file = work / f"{len(paths)}.csv"
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([("path", "label"), *((path, "video") for path in paths)])
    return file


def _task(videos: Videos, work: Path) -> float:
    """CPU-seconds to make one shard of all videos in `work`."""
    (work / "shards").mkdir(parents=True)
    [task] = shard_tasks(
        [list(videos.sources)], ["video"], {}, videos=videos.folder, out=work, work=work, encode=EncodeOptions(), limits=LimitOptions()
    )
    began = time.process_time() + children_cpu_s()
    build_shard(task)
    return time.process_time() + children_cpu_s() - began


def _ffmpeg(ffmpeg: str, videos: Videos, work: Path) -> float:
    """CPU-seconds of a process a video."""
    encode = EncodeOptions()
    codec = ["-c:v", "libx264", "-preset", encode.preset, "-tune", encode.tune, "-crf", str(encode.crf), "-g", str(encode.gop)]
    codec += ["-threads", "1", "-x264-params", X264]
    form = ["-fps_mode", "passthrough", "-movflags", "+faststart", "-y", str(work / "ffmpeg.mp4")]
    commands = []
    for source, (width, height) in zip(videos.sources, videos.sizes, strict=True):
        # Through planar RGB from one matrix to the other, as ours: see `pipeline.picture`.
        filters = f"scale={width}:{height}:{SWS},format=gbrp,scale=out_color_matrix=bt709:out_range=tv:{SWS},format=yuv420p"
        given = ["-nostdin", "-v", "error", "-filter_threads", "1", "-threads", "1", "-i", str(videos.folder / source.path)]
        commands.append([ffmpeg, *given, "-map", "0:v:0", "-vf", filters, *codec, *form])
    return _commands(commands)


def _commands(commands: Sequence[Sequence[str]]) -> float:
    """CPU-seconds of all, one after the other."""
    began = children_cpu_s()
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-500:]
            raise JobError(
                f"'{' '.join(command)}' ended with exit code {done.returncode}: {said}. An ffmpeg 5.1 or later with libx264 is needed."
            )
    return children_cpu_s() - began


def _whole(videos: Videos, work: Path, count: int, cpus: int) -> float:
    """CPU-seconds of a build of the first `count` videos in a process of its own, with everything that it starts."""
    labels = _labels(work, [source.path for source in videos.sources[:count]])
    with tempfile.TemporaryDirectory(dir=work) as out, (Path(out) / "stderr").open("w+b") as said:
        told = Path(out) / "cpu_s"
        command = [sys.executable, "-m", "jobs.bench_build", str(videos.folder), str(labels), f"{out}/dataset", str(cpus), str(told)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=said, check=False)  # no pipe: Ray's processes would hold it
        if done.returncode:
            said.seek(0)
            raise JobError(f"A build of {count} videos of {videos.folder} failed: {said.read().decode(errors='replace').strip()[-2000:]}")
        return float(told.read_text())


def _build(folder: str, labels: str, out: str, cpus: str, told: str) -> None:
    from cluster.ray_session import ray
    from jobs import build

    build.run(
        videos=Path(folder),
        labels=[Path(labels)],
        out=Path(out),
        encode=EncodeOptions(),
        limits=LimitOptions(),
        shard_size_mib=SHARD_MIB,
        num_cpus=int(cpus),
    )
    Path(told).write_text(str(family_cpu_s()))  # before Ray's processes end: it does not wait for those that worked
    ray.shutdown()


if __name__ == "__main__":
    _build(*sys.argv[1:])
