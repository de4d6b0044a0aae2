"""posmlp data build --dry-run: what a build would take, from the labels and some videos that are transcoded for a try. Writes nothing.

Sampled videos are drawn by the build's seed, so the same question gets the same sample; they are encoded as the build would, for at
most TRIED_S of each, in a temporary folder. Time is of this machine's processors as they are now.
"""

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.build_shard import transcode
from jobs.build_tasks import check_frames, splits_of
from jobs.errors import RecipeError
from jobs.progress import Progress
from jobs.recipe import Recipe
from pipeline.location import Location
from pipeline.manifest import Manifest, Source, read_manifest
from pipeline.media import MediaReport, check_encoder
from pipeline.media_worker import MediaWorker
from pipeline.options import EncodeOptions, LimitOptions
from pipeline.quarantine import RejectedError
from pipeline.shards import MEMBER_BYTES, sample
from pipeline.source_files import SourceFiles

TRIED = 12  # videos
TRIED_S = 4.0  # seconds of each
BUDGET_S = 30.0  # after which no further video is tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a build would take. labels: as what they were read. hours: of video. bytes_out: of shards. seconds: on `cpus`.

    free_bytes: where the dataset would be, None at a URL.
    missing: paths of the label file without a file. tried, refused: sampled videos, and those of them that would be quarantined, with
    the reason. bytes_out, seconds and hours are None when no sampled video tells.
    """

    labels: str
    videos: int
    classes: dict[str, int]
    splits: dict[str, dict[str, int]]
    bytes_in: int
    missing: list[str]
    tried: int
    refused: dict[str, str]
    hours: float | None
    bytes_out: int | None
    seconds: float | None
    cpus: int
    free_bytes: int | None

    @property
    def fits(self) -> bool:
        """Whether the disk has room for the shards. True when nothing is known of their size."""
        return self.bytes_out is None or self.free_bytes is None or self.bytes_out <= self.free_bytes


def run(recipe: Recipe) -> Estimate:
    """The estimate for the recipe's data section. Labels without files are counted. Raises ManifestError, PipelineError."""
    data = recipe.data
    if data.videos is None:
        raise RecipeError("data.videos is not set: add data.videos=FOLDER, the folder of raw videos.")
    check_encoder(data.encode)
    manifest = read_manifest(
        data.videos, data.labels, format=data.format, allow_missing=True, val_fraction=data.val_fraction, seed=data.seed
    )
    check_frames(manifest, data.encode)
    sources = sample(manifest.sources, TRIED, data.seed)
    found = _try(data.videos, sources, data.encode, data.limits)
    return _estimate(manifest, found, free_bytes=_free_bytes(recipe.dataset_dir))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """One sampled video: what it would weigh and take as a whole, or the reason why it would be quarantined."""

    source: Source
    reason: str = ""
    size: float = 0.0
    seconds: float = 0.0
    duration_s: float = 0.0


def _try(videos: Location, sources: Sequence[Source], encode: EncodeOptions, limits: LimitOptions) -> list[_Trial]:
    trials: list[_Trial] = []
    files = SourceFiles(videos, limits)
    began = time.monotonic()
    with (
        MediaWorker(encode, limits) as worker,
        tempfile.TemporaryDirectory() as folder,
        Progress("trying", total=len(sources), unit="videos") as progress,
    ):
        for source in sources:
            if trials and time.monotonic() - began > BUDGET_S:
                break
            trials.append(_try_one(worker, files, source, Path(folder) / "video.mp4"))
            progress.advance()
    return trials


def _try_one(worker: MediaWorker, files: SourceFiles, source: Source, out: Path) -> _Trial:
    begin = source.start_s or 0.0
    end = min(begin + TRIED_S, source.end_s if source.end_s is not None else begin + TRIED_S)
    began = time.monotonic()
    try:
        report = transcode(worker, files, source, out, end)
    except RejectedError as rejected:
        return _Trial(source=source, reason=f"{rejected.reason}: {rejected.detail or rejected.reason.text}")
    share = _share(report, source)
    seconds = report.source_frames / report.source.fps
    return _Trial(source=source, size=report.size / share, seconds=(time.monotonic() - began) / share, duration_s=seconds / share)


def _share(report: MediaReport, source: Source) -> float:
    """How much of the wanted video was tried, 0 to 1."""
    wanted_s = report.source.duration_s - (source.start_s or 0.0)
    if source.end_s is not None:
        wanted_s = min(wanted_s, source.end_s - (source.start_s or 0.0))
    frames = wanted_s * report.source.fps
    return min(1.0, report.source_frames / frames) if frames > 0 else 1.0


def _estimate(manifest: Manifest, trials: Sequence[_Trial], *, free_bytes: int | None) -> Estimate:
    good = [trial for trial in trials if not trial.reason]
    cpus = len(os.sched_getaffinity(0))
    bytes_in = sum({source.path: source.size for source in manifest.sources}.values())
    weight = sum(trial.source.size for trial in trials)  # of the refused too: the share of them will be refused of all
    scale = sum(source.size for source in manifest.sources) / weight if weight else 0.0
    labels = Counter(source.label for source in manifest.sources)
    splits = {
        column: dict(Counter(source.splits[place] for source in manifest.sources if source.splits[place]))
        for place, column in enumerate(splits_of(manifest))
    }
    members = MEMBER_BYTES * len(manifest.sources)
    return Estimate(
        labels=manifest.format,
        videos=len(manifest.sources),
        classes={name: labels[name] for name in manifest.classes},
        splits=splits,
        bytes_in=bytes_in,
        missing=manifest.missing,
        tried=len(trials),
        refused={trial.source.path: trial.reason for trial in trials if trial.reason},
        hours=scale * sum(trial.duration_s for trial in good) / 3600 if good else None,
        bytes_out=int(scale * sum(trial.size for trial in good)) + members if good else None,
        seconds=scale * sum(trial.seconds for trial in good) / cpus if good else None,
        cpus=cpus,
        free_bytes=free_bytes,
    )


def _free_bytes(place: Location) -> int | None:
    """Of the disk of a folder that may not be there yet; None for a URL."""
    if isinstance(place, str):
        return None
    return shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.is_dir())).free


def plain(estimate: Estimate) -> dict[str, object]:
    """For JSON."""
    return {**asdict(estimate), "fits": estimate.fits}


def show(estimate: Estimate) -> None:
    """Prints the estimate for people."""
    table = Table(show_header=False)
    table.add_row("labels", estimate.labels)
    table.add_row("videos", f"{estimate.videos} in {len(estimate.classes)} classes, {_size(estimate.bytes_in)}")
    for column, counts in estimate.splits.items():
        table.add_row(column, ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    if estimate.missing:
        first = ", ".join(estimate.missing[:3])
        table.add_row(
            "missing", f"{len(estimate.missing)} that the labels name, first {first}: set data.allow_missing=true to build without"
        )
    table.add_row("tried", f"{estimate.tried} videos, {len(estimate.refused)} of them would be quarantined")
    for path, reason in estimate.refused.items():
        table.add_row("", f"{path}: {reason}")
    if estimate.bytes_out is None or estimate.seconds is None or estimate.hours is None:
        table.add_row("estimate", "none: not one of the tried videos can be used")
    else:
        table.add_row("hours of video", f"{estimate.hours:.2g}")
        table.add_row("time", f"about {_time(estimate.seconds)} on this machine's {estimate.cpus} processors")
        room = "enough" if estimate.fits else "NOT ENOUGH: choose another --out or free some space"
        free = "room at the URL is not known" if estimate.free_bytes is None else f"{_size(estimate.free_bytes)} free: {room}"
        table.add_row("disk", f"about {_size(estimate.bytes_out)} needed, {free}")
    Console(soft_wrap=True).print(table)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
