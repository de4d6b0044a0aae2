"""posmlp bench encode: what each choice of data.encode gives and costs, one at a time around the defaults.

Every choice transcodes the same sources as the build does. Speed: clips of them are decoded from random starts, all choices in turn, one
thread. Quality: frame by frame against the same build without loss (x264's CRF 0), so at the same size and rate, by FFmpeg's psnr and ssim.
"""

import io
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import median

import av
import numpy as np
import torch
from av.filter import Graph
from av.video.format import VideoFormat
from av.video.frame import VideoFrame

from jobs.bench_cpu import children_cpu_s
from jobs.bench_footage import footage, write_x264
from jobs.bench_peers import Ours
from jobs.errors import JobError
from pipeline.media_worker import MediaWorker
from pipeline.options import BASE_STEP, EncodeOptions, LimitOptions
from pipeline.quarantine import RejectedError

DEFAULTS, BASE = "the defaults", "form=layered, base starts"
LAYERED = "form=layered"
CHOICES: dict[str, dict[str, object]] = {
    DEFAULTS: {},
    **{f"gop={gop}": {"gop": gop} for gop in (8, 16, 64, 250)},
    "tune=''": {"tune": ""},
    "tune='', gop=250": {"tune": "", "gop": 250},
    LAYERED: {"form": "layered"},
    **{f"preset={preset}": {"preset": preset} for preset in ("ultrafast", "superfast", "fast", "medium")},
    **{f"crf={crf}": {"crf": crf} for crf in (18, 20, 26, 29)},
    **{f"short_side={side}": {"short_side": side} for side in (128, 160, 192)},
    "fps=15": {"fps": 15.0},
}
LONGEST_S = 20.0  # of a source
SOURCE_CRF = "16"  # of synthetic sources: as a good download


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A source in one choice. fps, num_frames, height, width: of its frames."""

    data: bytes
    fps: float
    num_frames: int
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """rates: clips per CPU-second, one a repeat. share: bytes per byte of the sources. psnr: in dB; ssim: 0 to 1; both of all three planes.
    build: CPU-seconds per second of video."""

    choice: str
    rates: list[float]
    kbit_s: float
    share: float
    psnr: float
    ssim: float
    build: float


def run(folder: Path | None, *, num_videos: int = 4, repeats: int = 5, frames: int = 16, stride: int = 4) -> list[Row]:
    """A row for every choice. folder: of videos, None: synthetic scenes of ten seconds. frames, stride: of a clip, in frames of the source.

    With another rate of frames a clip has the stride that comes nearest to the same time. Raises JobError for a folder without a video
    that is long enough.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="posmlp-bench-") as name:
            sources = _sources(folder, Path(name), num_videos, (frames - 1) * stride + 1)
            encoded, build = _build(sources, Path(name))
            rates = _rates(encoded, repeats, frames, stride)
            lossless = _lossless(sources, Path(name))
            quality = {choice: _quality(videos, lossless[choice]) for choice, videos in encoded.items()}
            source_bytes = sum(path.stat().st_size for path in sources)
    finally:
        torch.set_num_threads(before)
    rows = []
    for choice, measured in rates.items():
        form = LAYERED if choice == BASE else choice
        seconds = sum(video.num_frames / video.fps for video in encoded[form])
        size = sum(len(video.data) for video in encoded[form])
        psnr, ssim = quality[form]
        facts = {"kbit_s": size / seconds / 125, "share": size / source_bytes, "psnr": psnr, "ssim": ssim, "build": build[form] / seconds}
        rows.append(Row(choice=choice, rates=measured, **facts))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The figures as a Markdown table."""
    default = median(rows[0].rates)
    lines = [
        "| data.encode | clips per CPU-s | lowest to highest | x defaults | kbit/s | bytes / source | PSNR dB | SSIM | build CPU-s per s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = median(row.rates)
        speed = f"{rate:.1f} | {min(row.rates):.1f} to {max(row.rates):.1f} | {rate / default:.2f}"
        lines.append(f"| {row.choice} | {speed} | {row.kbit_s:.0f} | {row.share:.3f} | {row.psnr:.1f} | {row.ssim:.4f} | {row.build:.3f} |")
    return "\n".join(lines)


def as_dicts(rows: Sequence[Row]) -> list[dict[str, object]]:
    """For JSON."""
    return [{name: getattr(row, name) for name in Row.__slots__} for row in rows]


def _sources(folder: Path | None, work: Path, count: int, min_frames: int) -> list[Path]:
    """The first videos of `folder` by name that can be built and are long enough, or scenes as files."""
    if folder is None:
        paths = []
        for number, shown in enumerate(footage(None, count)):
            paths.append(work / f"scene-{number}.mp4")
            write_x264(paths[-1], shown, {"crf": SOURCE_CRF})
        return paths
    found: list[Path] = []
    with MediaWorker(EncodeOptions(), LimitOptions()) as worker:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            try:
                report = worker.transcode(path, work / "tried.mp4", None, LONGEST_S)
            except RejectedError:
                continue
            if report.num_frames >= min_frames:
                found.append(path)
            if len(found) == count:
                break
    if not found:
        raise JobError(f"{folder} holds no video of {min_frames} frames or more that can be used. Give longer videos, or fewer --frames.")
    return found


def _build(sources: Sequence[Path], work: Path) -> tuple[dict[str, list[Encoded]], dict[str, float]]:
    """Choice -> what the sources become, and CPU-seconds of that without the start of the child that does it."""
    encoded: dict[str, list[Encoded]] = {}
    build: dict[str, float] = {}
    for choice, changes in CHOICES.items():
        options = EncodeOptions(**changes)  # type: ignore[arg-type]
        began = children_cpu_s()
        _transcoded([], options, work)
        started = children_cpu_s()
        encoded[choice] = _transcoded(sources, options, work)
        build[choice] = children_cpu_s() - started - (started - began)
    return encoded, build


def _transcoded(sources: Sequence[Path], options: EncodeOptions, work: Path) -> list[Encoded]:
    videos, out = [], work / "out.mp4"
    with MediaWorker(options, LimitOptions()) as worker:
        for path in sources or [work / "missing"]:  # the child starts with its first question
            try:
                report = worker.transcode(path, out, None, LONGEST_S)
            except RejectedError:
                if sources:
                    raise
                continue
            size = {"num_frames": report.num_frames, "height": report.height, "width": report.width}
            videos.append(Encoded(data=out.read_bytes(), fps=report.fps, **size))
    return videos


def _rates(encoded: Mapping[str, Sequence[Encoded]], repeats: int, frames: int, stride: int) -> dict[str, list[float]]:
    """Choice, and the layered form once more with base starts -> clips per CPU-second; a first repeat is not counted."""
    rng = np.random.default_rng(0)
    cases: dict[str, tuple[str, int]] = {}
    for choice in encoded:
        cases[choice] = (choice, 1)
        if choice == LAYERED and stride % BASE_STEP == 0:
            cases[BASE] = (LAYERED, BASE_STEP)
    decoders = {name: Ours() for name in cases}
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        spent = dict.fromkeys(cases, 0.0)
        places = [(video, rng.random()) for video in range(len(encoded[DEFAULTS])) for _ in range(4)]
        for video, share in places:
            for name, (choice, step) in cases.items():
                one = encoded[choice][video]
                apart = max(1, round(stride * one.fps / encoded[DEFAULTS][video].fps))
                starts = range(0, max(1, one.num_frames - (frames - 1) * apart), step)
                wanted = np.minimum(starts[int(share * len(starts))] + apart * np.arange(frames), one.num_frames - 1).astype(np.int32)
                began = time.process_time()
                decoders[name](one.data, wanted, (one.height, one.width))
                spent[name] += time.process_time() - began
        if repeat:
            for name, seconds in spent.items():
                rates[name].append(len(places) / seconds)
    return rates


def _lossless(sources: Sequence[Path], work: Path) -> dict[str, list[Encoded]]:
    """Choice -> the sources in its size and rate, as they are before x264 loses anything."""
    made: dict[tuple[object, ...], list[Encoded]] = {}
    found = {}
    for choice, changes in CHOICES.items():
        kept = {name: changes[name] for name in ("short_side", "fps") if name in changes}
        key = tuple(kept.items())
        if key not in made:
            made[key] = _transcoded(sources, EncodeOptions(crf=0, preset="ultrafast", tune="", **kept), work)  # type: ignore[arg-type]
        found[choice] = made[key]
    return found


def _quality(videos: Sequence[Encoded], references: Sequence[Encoded]) -> tuple[float, float]:
    """PSNR in dB of the mean squared error of all frames of all videos, and their mean SSIM."""
    pairs = zip(videos, references, strict=True)
    errors, similar = zip(*(each for video, reference in pairs for each in _compared(video, reference)), strict=True)
    return float(10 * np.log10(255**2 / max(np.mean(errors), 1e-9))), float(np.mean(similar))


def _compared(video: Encoded, reference: Encoded) -> Iterator[tuple[float, float]]:
    """Of each frame, the mean squared error and the SSIM of all planes."""
    graph = Graph()
    shown, first, second = (
        graph.add_buffer(width=video.width, height=video.height, format=VideoFormat("yuv420p"), time_base=Fraction(1, 1000))
        for _ in range(3)
    )
    psnr, ssim, out = graph.add("psnr"), graph.add("ssim"), graph.add("buffersink")
    shown.link_to(psnr, 0, 0)
    first.link_to(psnr, 0, 1)
    psnr.link_to(ssim, 0, 0)
    second.link_to(ssim, 0, 1)
    ssim.link_to(out)
    graph.configure()
    for number, (one, other) in enumerate(zip(_frames(video), _frames(reference), strict=True)):
        one.pts = other.pts = number
        shown.push(one)
        first.push(other)
        second.push(other)
        told = out.pull().metadata
        yield float(told["lavfi.psnr.mse_avg"]), float(told["lavfi.ssim.All"])


def _frames(video: Encoded) -> Iterator[VideoFrame]:
    with av.open(io.BytesIO(video.data), "r") as container:
        yield from container.decode(video=0)
