"""posmlp bench memory: resident memory of a build and of loader passes over many small videos; it must not grow with their number."""

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from jobs import build
from jobs.beside import beside
from jobs.progress import Progress
from jobs.recipe import parse_overrides
from jobs.synthesize import CLASSES, film, make_scene
from pipeline.index import Dataset
from pipeline.loader import Loader
from pipeline.media import write_video
from pipeline.options import AugmentOptions, ClipOptions, EncodeOptions, LoaderOptions
from pipeline.requests import train_requests

NUM_FRAMES = 16
SIDE = 64  # pixels
SAMPLE_S = 0.5
BATCH = 8


def run(num_videos: int = 10_000, passes: int = 2) -> dict[str, object]:
    """Figures in MiB: the building process and its largest task at 10, 50, 100 % of the build; the loader at each tenth of its passes."""
    with tempfile.TemporaryDirectory(prefix="posmlp-memory-") as name:
        folder = Path(name)
        _make_videos(folder / "videos", num_videos)
        recipe = parse_overrides({"data": {"videos": str(folder / "videos"), "dir": str(folder / "dataset"), "shard_size_mib": 1}}, [])
        with _watched() as samples:
            build.build_dataset(recipe)
        points = [round(share * (len(samples) - 1)) for share in (0.1, 0.5, 1.0)]
        figures = {
            "videos": num_videos,
            "build: driver MiB at 10, 50, 100 %": [round(samples[point][0]) for point in points],
            "build: largest other process MiB at 10, 50, 100 %": [round(samples[point][1]) for point in points],
        }
        loader = _loader(Dataset.open(folder / "dataset"), passes)
        return {**figures, f"loader: MiB at each tenth of {passes} passes": loader}


def _make_videos(folder: Path, num_videos: int) -> None:
    """A few dozen real videos, and copies of them under as many names as are asked for."""
    originals = []
    for number in range(4):
        scene = make_scene(0, number)
        for motion in CLASSES:
            path = folder / motion / f"original_{number}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = (np.ascontiguousarray(frame[:SIDE, :SIDE]) for frame in film(scene, motion, NUM_FRAMES))
            write_video(path, frames, 24.0, EncodeOptions())
            originals.append(path)
    for number in range(num_videos - len(originals)):
        source = originals[number % len(originals)]
        shutil.copyfile(source, source.with_name(f"copy_{number:06d}.mp4"))


@contextmanager
def _watched() -> Iterator[list[tuple[float, float]]]:
    """Collects (resident MiB of this process, of its largest descendant) while the block runs."""
    samples: list[tuple[float, float]] = []
    own = psutil.Process()

    def watch(stop: threading.Event) -> None:
        while not stop.is_set():
            others = []
            for child in own.children(recursive=True):
                try:
                    others.append(child.memory_info().rss)
                except psutil.Error:  # it has just ended
                    continue
            samples.append((own.memory_info().rss / 2**20, max(others, default=0) / 2**20))
            stop.wait(SAMPLE_S)

    with beside(watch):
        yield samples


def _loader(dataset: Dataset, passes: int) -> list[int]:
    steps = passes * len(dataset) // BATCH
    clip, augment = ClipOptions(num_frames=4, stride=2), AugmentOptions(size=32)
    requests = train_requests(
        dataset,
        np.arange(len(dataset), dtype=np.uint32),
        seed=0,
        global_batch=BATCH,
        micro_batch=BATCH,
        rank=0,
        world_size=1,
        start_step=0,
        end_step=steps,
        clip=clip,
        augment=augment,
    )
    own, figures = psutil.Process(os.getpid()), []
    with (
        Progress("loading", total=steps, unit="batches") as progress,
        Loader(
            dataset, requests, micro_batch=BATCH, clip=clip, augment=augment, options=LoaderOptions(), threads=2, on_damage="report"
        ) as loader,
    ):
        for number, _ in enumerate(loader, start=1):
            progress.advance()
            if number % max(1, steps // 10) == 0:
                figures.append(round(own.memory_info().rss / 2**20))
    return figures
