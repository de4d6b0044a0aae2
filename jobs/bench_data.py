"""posmlp bench data: the whole loader against its own parts, against peers, and at a far step against step 0. CPU time, one thread.

The dataset is made of synthetic scenes: ours as the build encodes them, the peers' as files with x264's defaults, which is what
one finds on a disk. All augment by the same graph (crop, flip, resize, normalise), in batches of BATCH.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from jobs.bench_decode import CLIP_FRAMES, clip_at, starts_of
from jobs.bench_footage import HEIGHT, NUM_FRAMES, WIDTH, footage, write_x264
from jobs.bench_peers import LOOP, Decode, Frames, decoders
from jobs.loose_videos import gather
from pipeline import software_decode
from pipeline.dali import Graph
from pipeline.index import Dataset
from pipeline.keyed import crop_parameters
from pipeline.loader import Loader
from pipeline.media import write_video
from pipeline.options import AugmentOptions, ClipOptions, EncodeOptions, LimitOptions, LoaderOptions
from pipeline.reader import Reader
from pipeline.requests import MicroBatchRequest, train_requests

BATCH, STEPS, FAR = 8, 2, 123_456_789
AUGMENT = AugmentOptions()
FORMS = {"plain": (EncodeOptions(), ClipOptions()), "layered": (EncodeOptions(form="layered"), ClipOptions(starts="base"))}
SIZE = (HEIGHT, WIDTH)
# Takes the repeat and prepares, untimed, what is timed: STEPS batches. That may return CPU-seconds which do not belong to them.
Work: TypeAlias = Callable[[int], Callable[[], float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """CPU-ms per clip by name, one a repeat; CPU-ms to the first batch by name; peer -> why it was not measured."""

    clips: dict[str, list[float]]
    first: dict[str, list[float]]
    missing: dict[str, str]


def run(*, num_videos: int = 4, repeats: int = 5) -> Result:
    """All works of a repeat take turns, so that a busy machine slows them alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="posmlp-bench-") as name, ExitStack() as stack:
            stock = _write(Path(name), num_videos)
            works: dict[str, Work] = {}
            for form, (_, clip) in FORMS.items():
                loading = stack.enter_context(closing(_Loading(Path(name) / form, clip)))
                works.update({f"{form}: {part}": work for part, work in loading.works().items()})
            peers, missing = _peers(
                stock, stack.enter_context(Graph(batch=BATCH, augment=AUGMENT, decode=False, device_id=None, threads=1))
            )
            clips = _timed({**works, **peers}, repeats)
            starts = {"first batch, step 0": 0, "first batch, a far step": FAR}
            firsts = {what: partial(_first_of, Path(name) / "plain", step) for what, step in starts.items()}
            return Result(
                clips={what: [ms / (BATCH * STEPS) for ms in times] for what, times in clips.items()},
                first=_timed(firsts, repeats),
                missing=missing,
            )
    finally:
        torch.set_num_threads(before)


def _first_of(root: Path, step: int, repeat: int) -> Callable[[], None]:
    return partial(_load, root, FORMS["plain"][1], step + repeat if step else 0, 1)


def table(result: Result) -> str:
    """The figures as a Markdown table."""
    rows = ["| what | median | lowest to highest |", "|---|---|---|"]
    for name, times in {**result.clips, **result.first}.items():
        rows.append(f"| {name} | {median(times):.1f} | {min(times):.1f} to {max(times):.1f} |")
    rows += [f"| {name} | not measured: {why} | |" for name, why in result.missing.items()]
    return "\n".join([*rows, "", *(f"{name}: {value:.2f}" for name, value in ratios(result).items())])


def ratios(result: Result) -> dict[str, float]:
    """Of medians: what the loader adds to its bare decoding and augmenting, what a far step costs, and peers against ours."""
    middle = {name: median(times) for name, times in {**result.clips, **result.first}.items()}
    found = {}
    for form in FORMS:
        whole, bare = middle[f"{form}: whole loader"], middle[f"{form}: decode"] + middle[f"{form}: augment"]
        found[f"{form}: whole loader / (decode + augment)"] = whole / bare
    found["first batch, a far step / step 0"] = middle["first batch, a far step"] / middle["first batch, step 0"]
    for name, value in middle.items():
        if name.startswith("stock files: "):
            found[f"{name} / plain: whole loader"] = value / middle["plain: whole loader"]
            found[f"{name} / layered: whole loader"] = value / middle["layered: whole loader"]
    return found


def _timed(works: Mapping[str, Work], repeats: int) -> dict[str, list[float]]:
    """CPU-ms of each work in each repeat; the first, which builds graphs and fills caches, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            timed = work(repeat)
            began = time.process_time()
            apart = timed() or 0.0
            if repeat:
                times[name].append(1e3 * (time.process_time() - began - apart))
    return times


def _write(folder: Path, num_videos: int) -> list[Path]:
    """A dataset per form, and the same scenes as files with x264's defaults, which are returned."""
    stock: list[Path] = []
    ours: dict[str, list[Path]] = {form: [] for form in FORMS}
    for number, shown in enumerate(footage(None, num_videos)):
        stock.append(folder / f"stock-{number}.mp4")
        write_x264(stock[-1], shown, {})
        for form, (encode, _) in FORMS.items():
            ours[form].append(folder / f"{form}-{number}.mp4")
            write_video(ours[form][-1], shown.frames, shown.fps, encode)
    for form, (encode, _) in FORMS.items():
        (folder / form).mkdir()
        gather(ours[form], folder / form, classes=["scene"], encode=encode, limits=LimitOptions(), min_frames=1, windows=lambda _: [])
    return stock


def _peers(files: list[Path], graph: Graph) -> tuple[dict[str, Work], dict[str, str]]:
    """Their works, and which are missing and why."""
    found, missing = decoders()
    loaders = {"torch DataLoader": DataLoader}
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        missing["torchdata StatefulDataLoader"] = f"{error} (pip install 'posmlp-video[bench]')"
    else:
        loaders["torchdata StatefulDataLoader"] = StatefulDataLoader
    works = {}
    for name, loader in loaders.items():
        for decoder in found.keys() - {"posmlp", *([LOOP] if loader is not DataLoader else [])}:
            batches = loader(_Files(files, found[decoder]), batch_size=BATCH, shuffle=True, num_workers=0, collate_fn=list)
            works[f"stock files: {name}, {decoder}"] = _peer(iter(batches), graph)
    return works, missing


class _Loading:
    """The loader over one dataset, and each of its parts over what it loads: steps [repeat * STEPS, (repeat + 1) * STEPS)."""

    def __init__(self, root: Path, clip: ClipOptions) -> None:
        self._root, self._clip, self._dataset = root, clip, Dataset.open(root)
        self._graph = Graph(batch=BATCH, augment=AUGMENT, decode=False, device_id=None, threads=1)
        self._buffers = [np.empty((CLIP_FRAMES, *SIZE, 3), dtype=np.uint8) for _ in range(BATCH)]

    def works(self) -> dict[str, Work]:
        return {
            "clip parameters": lambda repeat: partial(self._plan, repeat),
            "read and checksum": lambda repeat: partial(self._reread, list(self._requests(repeat))),
            "decode": lambda repeat: partial(self._decode, requests := list(self._requests(repeat)), self._read(requests)),
            "augment": lambda repeat: partial(self._augment, list(self._requests(repeat))),
            "whole loader": lambda repeat: partial(self._load, repeat * STEPS),
        }

    def close(self) -> None:
        self._graph.close()

    def _plan(self, repeat: int) -> None:
        for _ in self._requests(repeat):
            pass

    def _requests(self, repeat: int) -> Iterator[MicroBatchRequest]:
        return _requests(self._dataset, self._clip, repeat * STEPS, STEPS)

    def _load(self, step: int) -> float:
        """A loader that is started, loads and ends; returns what it takes to start one for a single batch, and that once more."""
        began = time.process_time()
        _load(self._root, self._clip, step, 1)
        single = time.process_time() - began
        _load(self._root, self._clip, step, 1 + STEPS)
        return 2 * single

    def _read(self, requests: list[MicroBatchRequest]) -> list[list[bytes]]:
        with Reader(self._root) as reader:
            return [[reader.read(self._dataset.item(row)) for row in request.rows.tolist()] for request in requests]

    def _reread(self, requests: list[MicroBatchRequest]) -> None:
        self._read(requests)

    def _decode(self, requests: list[MicroBatchRequest], data: list[list[bytes]]) -> None:
        for request, files in zip(requests, data, strict=True):
            for parameters, file, out in zip(request.parameters, files, self._buffers, strict=True):
                software_decode.decode(file, parameters.frames, out, key="video", shard="memory")

    def _augment(self, requests: list[MicroBatchRequest]) -> None:
        for request in requests:
            rois = np.array([one.roi for one in request.parameters], dtype=np.float32)
            self._graph.run(self._buffers, rois, np.array([one.flip for one in request.parameters], dtype=np.bool_))


def _requests(dataset: Dataset, clip: ClipOptions, first: int, count: int) -> Iterator[MicroBatchRequest]:
    return train_requests(
        dataset,
        np.arange(len(dataset), dtype=np.uint32),
        seed=0,
        global_batch=BATCH,
        micro_batch=BATCH,
        rank=0,
        world_size=1,
        start_step=first,
        end_step=first + count,
        clip=clip,
        augment=AUGMENT,
    )


def _loader(dataset: Dataset, requests: Iterable[MicroBatchRequest], clip: ClipOptions) -> Loader:
    options = LoaderOptions(threads=1)
    return Loader(
        dataset, requests, micro_batch=BATCH, clip=clip, augment=AUGMENT, options=options, threads=1, device="cpu", on_damage="report"
    )


def _load(root: Path, clip: ClipOptions, step: int, count: int) -> None:
    """Opens the dataset and loads the batches of steps [step, step + count)."""
    dataset = Dataset.open(root)
    with _loader(dataset, _requests(dataset, clip, step, count), clip) as loader:
        for _ in loader:
            pass


class _Files(TorchDataset[tuple[Frames, tuple[float, ...], bool]]):
    """What a plain PyTorch dataset does: read a file, decode a random clip of it, draw a crop. Item i is of file i mod N."""

    def __init__(self, paths: list[Path], decode: Decode) -> None:
        self._paths, self._decode = paths, decode

    def __len__(self) -> int:
        return 10**5

    def __getitem__(self, index: int) -> tuple[Frames, tuple[float, ...], bool]:
        starts = starts_of(NUM_FRAMES)
        start = starts[int(np.random.default_rng(index).integers(len(starts)))]
        frames = self._decode(self._paths[index % len(self._paths)].read_bytes(), clip_at(start), SIZE)
        return frames, *crop_parameters(*SIZE, AUGMENT, seed=0, position=index)


def _peer(batches: Iterator[list[tuple[Frames, tuple[float, ...], bool]]], graph: Graph) -> Work:
    def load() -> None:
        for _ in range(STEPS):
            frames, rois, flips = zip(*next(batches), strict=True)
            graph.run(list(frames), np.array(rois, dtype=np.float32), np.array(flips, dtype=np.bool_))

    return lambda _: load
