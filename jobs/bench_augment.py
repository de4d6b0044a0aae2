"""posmlp bench augment: CPU time per clip of each augmentation, one thread, interleaved; what a recipe's keys cost beside resizing.

The clips are smooth moving noise of 320x240; costs hardly depend on what is in them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from pipeline.augment_clip import augment_levels, erase
from pipeline.augment_frames import apply_operations
from pipeline.augment_mix import mix_clips
from pipeline.augmentation import OPERATIONS, draw_augmentation, draw_mix, operation_argument
from pipeline.dali import Graph
from pipeline.keyed import Augmentation
from pipeline.options import AugmentOptions, EraseOptions, JitterOptions, MixOptions, RandAugmentOptions

BATCH = 8
ROI = (10.0, 40.0, 230.0, 300.0)
DRAWS = 5  # micro-batches of drawn parameters in one measurement
Work = Callable[[], object]


def run(sizes: Sequence[int] = (112, 224), *, num_frames: int = 16, repeats: int = 5) -> list[dict[str, str | float]]:
    """One row per augmentation: {"what": its name, "<size> px": ms of CPU per clip, ..., "spread": largest median over minimum}."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        figures = {size: _measure(size, num_frames, repeats) for size in sizes}
    finally:
        torch.set_num_threads(before)
    rows: list[dict[str, str | float]] = []
    for name in figures[sizes[0]]:
        spread = max(median(figures[size][name]) / min(figures[size][name]) for size in sizes)
        rows.append({"what": name, **{f"{size} px": round(min(figures[size][name]), 2) for size in sizes}, "spread": round(spread, 2)})
    return rows


def table(rows: Sequence[Mapping[str, str | float]]) -> str:
    """The figures as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows)])


def _measure(size: int, num_frames: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of CPU per clip, by name, one for each repeat; all works take turns."""
    video = _video(num_frames)
    with Graph(batch=BATCH, augment=AugmentOptions(size=size), decode=False, device_id=None, threads=1) as graph:
        levels = _resized(graph, video, BATCH, normalise=False)
        works = {**_graph_works(graph, video), **_works(levels, size, num_frames)}
        times: dict[str, list[float]] = {name: [] for name in works}
        for repeat in range(repeats + 1):
            for name, (work, num_clips) in works.items():
                began = time.process_time()
                work()
                if repeat:  # the first builds pipelines and tables
                    times[name].append((time.process_time() - began) / num_clips * 1e3)
    return times


def _graph_works(graph: Graph, video: npt.NDArray[np.uint8]) -> dict[str, tuple[Work, int]]:
    """What is there anyway, and what a second view of a decoded clip adds to it."""
    return {
        "crop, resize, normalise": (lambda: _resized(graph, video, BATCH), BATCH),
        "the same, two views of each decoded clip": (lambda: _resized(graph, video, BATCH, views=2), 2 * BATCH),
    }


def _works(levels: torch.Tensor, size: int, num_frames: int) -> dict[str, tuple[Work, int]]:
    clips, frames = levels.clone(), levels.to(torch.uint8)
    everything = AugmentOptions(size=size, randaugment=RandAugmentOptions(), jitter=JitterOptions(hue=0.1), erase=EraseOptions())
    works: dict[str, tuple[Work, int]] = {
        "all draws of a clip": (partial(_drawn, everything, num_frames), DRAWS * BATCH),
        "normalise, in torch": (partial(_levels, clips, levels, [[Augmentation()] * BATCH]), BATCH),
    }
    for name, augment in {
        "RandAugment m7 n4 std.5": AugmentOptions(size=size, randaugment=RandAugmentOptions()),
        "colour jitter": AugmentOptions(size=size, jitter=JitterOptions(hue=0.1)),
    }.items():
        works[f"normalise, {name}"] = (partial(_levels, clips, levels, _drawn(augment, num_frames)), DRAWS * BATCH)
    fills: tuple[Literal["constant", "pixel"], ...] = ("constant", "pixel")
    for fill in fills:
        boxes = _drawn(AugmentOptions(size=size, erase=EraseOptions(probability=1.0, fill=fill)), num_frames)
        works[f"erasing, {fill}"] = (partial(_erase, clips, boxes), DRAWS * BATCH)
    for name, mixing in (("mixup", MixOptions(cutmix=0)), ("cutmix", MixOptions(mixup=0))):
        works[name] = (partial(mix_clips, clips, draw_mix(mixing, size, np.arange(BATCH), views=1, seed=0)), BATCH)
    for name in OPERATIONS:
        operation = (name, operation_argument(name, 7.0, negative=False, increasing=True))
        works[f"{name} alone"] = (partial(_operate, frames, operation), BATCH)
    return works


def _levels(clips: torch.Tensor, levels: torch.Tensor, drawn: Sequence[Sequence[Augmentation]]) -> None:
    for augmentations in drawn:
        clips.copy_(levels)
        augment_levels(clips, augmentations, AugmentOptions())


def _erase(clips: torch.Tensor, drawn: Sequence[Sequence[Augmentation]]) -> None:
    for augmentations in drawn:
        erase(clips, augmentations)


def _operate(frames: torch.Tensor, operation: tuple[str, float]) -> None:
    for clip in frames:
        apply_operations(clip, [operation])


def _drawn(augment: AugmentOptions, num_frames: int) -> list[list[Augmentation]]:
    """DRAWS micro-batches of them."""
    drawn = [draw_augmentation(augment, num_frames, seed=0, position=position, view=0) for position in range(DRAWS * BATCH)]
    present = [one for one in drawn if one is not None]
    return [present[i : i + BATCH] for i in range(0, len(present), BATCH)]


def _resized(graph: Graph, video: npt.NDArray[np.uint8], num: int, *, views: int = 1, normalise: bool = True) -> torch.Tensor:
    rois = np.array([ROI] * (num * views), dtype=np.float32)
    return graph.run([video] * num, rois, np.zeros(num * views, dtype=np.bool_), normalise=normalise)


def _video(num_frames: int) -> npt.NDArray[np.uint8]:
    """(T, 240, 320, 3)"""
    small = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (num_frames, 3, 30, 40)).astype(np.float32))
    large = torch.nn.functional.interpolate(small, (240, 320), mode="bilinear")
    return large.permute(0, 2, 3, 1).round().to(torch.uint8).contiguous().numpy()
