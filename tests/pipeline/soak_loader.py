"""Seeded kills of the loader: whatever dies whenever, and at whatever world size it goes on, the stream is the uninterrupted one.

A stream has three lives, so that every second kill strikes a loader that was resumed already. A life begins from what the one before it
saved, a global step and nothing else, at a world size of its own. Most lives end where their loaders are dropped amid a step, with more
in flight (`soak_dropped`); some are a process that is killed by SIGKILL (`soak_killed`). Each micro-batch that any life handed out, also
one that no checkpoint kept, must be that of the reference: its positions, keys, labels, frames, crops and further draws, what replaces
the one damaged video, and the digest of its tensors. What the lives kept together must be every position once, in order.

A sample runs in the tests, `make soak` runs more. `soak_peers` counts what other loaders lose and repeat.
Usage: python -m tests.pipeline.soak_loader --videos DIR --seeds N --kills K --seed S
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path

import torch

from jobs import build
from jobs.recipe import parse_overrides
from pipeline.durable import committed
from pipeline.index import Dataset
from pipeline.loader import Batch, Loader
from pipeline.options import (
    AugmentOptions,
    ClipOptions,
    EraseOptions,
    JitterOptions,
    LoaderOptions,
    MixOptions,
    RandAugmentOptions,
)
from pipeline.requests import train_requests

WORLD_SIZES = (1, 2, 4, 8)
MICRO, GLOBAL = 4, 32  # slots: two samples of two views each, or four of one
MICROS = GLOBAL // MICRO  # micro-batches in a step
STEPS = 60  # of the stream
LIFE = 4  # steps of a life before its kill, at most
CLIP = ClipOptions(num_frames=4, stride=2)
PLAIN = "crop and flip"
AUGMENTS = {
    PLAIN: AugmentOptions(size=32),
    "all augmentations": AugmentOptions(
        size=32, repeats=2, randaugment=RandAugmentOptions(), jitter=JitterOptions(grey=0.2), erase=EraseOptions(), mix=MixOptions()
    ),
}
AUGMENTED_EVERY = 10  # seeds: all augmentations cost seven times as much as crop and flip
SMALL = ["data.encode.short_side=48", "data.encode.max_member_s=1"]
DEADLINE_S = 120.0

Record = list[object]  # as `recorded` makes it: plain values, equal after a way through JSON
Place = tuple[int, int]  # step, micro-batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """Loaders of `world_size` ranks, each with so many decoding threads and so much room. They die in step `stop`, after every rank got
    `taken` of its micro-batches of that step; a checkpoint is saved at every `every`-th step."""

    world_size: int
    stop: int
    taken: int
    every: int
    threads: int
    prefetch_mib: int

    def saved(self, start: int) -> int:
        """The step of the last checkpoint of a life that began at `start`."""
        return max(start, self.stop // self.every * self.every)


def plan(seed: int, steps: int = STEPS) -> list[tuple[int, list[Life]]]:
    """Four streams, as the step of their beginning and their lives. Each world size is killed once in a first and once in a second life,
    and ends one stream; a third life dies too, which is where the stream is compared."""
    draw = random.Random(seed)
    orders = [WORLD_SIZES, *(draw.sample(WORLD_SIZES, len(WORLD_SIZES)) for _ in range(2))]
    streams = []
    for sizes in zip(*orders, strict=True):
        start = first = draw.randrange(steps - 3 * LIFE - 1)
        lives = []
        for world_size in sizes:
            life = Life(
                world_size=world_size,
                stop=start + draw.randrange(LIFE),
                taken=draw.randint(0, MICROS // world_size),
                every=draw.choice([1, 1, 2, 3]),
                threads=draw.choice([1, 1, 3]),
                prefetch_mib=draw.choice([1, 64]),
            )
            lives.append(life)
            start = life.saved(start)
        streams.append((first, lives))
    return streams


class Stream:
    """A dataset and what training takes of it, with the records of an uninterrupted run by one rank and one thread."""

    def __init__(self, root: Path, augment: str, seed: int = 7, steps: int = STEPS) -> None:
        self.root, self.augment, self.seed, self.steps = root, augment, seed, steps
        self._dataset = Dataset.open(root)
        self.items = len(self._dataset)

    def loader(self, rank: int, world_size: int, start: int, *, threads: int = 1, prefetch_mib: int = 1) -> Loader:
        """What a rank has that starts at global step `start`."""
        dataset, augment = self._dataset, AUGMENTS[self.augment]
        requests = train_requests(
            dataset,
            dataset.rows(*_training(dataset)),
            seed=self.seed,
            global_batch=GLOBAL,
            micro_batch=MICRO,
            rank=rank,
            world_size=world_size,
            start_step=start,
            end_step=self.steps,
            clip=CLIP,
            augment=augment,
        )
        options = LoaderOptions(prefetch_mib=prefetch_mib, max_damaged=1.0)
        sizes = {"micro_batch": MICRO, "threads": threads}
        return Loader(dataset, requests, clip=CLIP, augment=augment, options=options, on_damage="substitute", **sizes)

    @cached_property
    def reference(self) -> dict[Place, Record]:
        with self.loader(0, 1, 0) as loader:
            return {(batch.step, batch.micro): recorded(batch) for batch in loader}


def _training(dataset: Dataset) -> tuple[str, str]:
    """Split column and split to train on."""
    column, names = next(iter(dataset.info.splits.items()))
    return column, names[0] if "train" not in names else "train"


def recorded(batch: Batch) -> Record:
    """All that a micro-batch is."""
    tensors = [batch.clips, *([] if batch.targets is None else [batch.targets])]
    digest = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()
    damaged = [[one.position, one.key, one.reason, one.substitute_key] for one in batch.damaged]
    parameters = [one.as_lists() for one in batch.parameters]
    facts = [batch.positions.tolist(), batch.keys, batch.labels.tolist(), batch.valid.tolist(), parameters, damaged, digest]
    plain = json.loads(json.dumps(facts))
    assert isinstance(plain, list)
    return plain


def soak_dropped(streams: dict[str, Stream], seed: int) -> dict[str, object]:
    """The four streams of a seed, whose loaders are dropped. Raises AssertionError, with the seed, at the first difference."""
    began = time.monotonic()
    augment = list(AUGMENTS)[seed % AUGMENTED_EVERY == 0]
    stream, kills, compared = streams[augment], [], 0
    for first, lives in plan(seed, stream.steps):
        start, kept = first, []
        for life in lives:
            handed_out = [_rank(stream, life, rank, start) for rank in range(life.world_size)]
            compared += sum(_compare(stream, rank, f"seed {seed}") for rank in handed_out)
            saved = life.saved(start)
            kept += [place for rank in handed_out for place, _ in rank if place[0] < saved]
            start = saved
        check_whole(stream, kept, first, start, f"seed {seed}")
        kills += [[one.world_size, other.world_size] for one, other in pairwise(lives)]
    seconds = round(time.monotonic() - began, 1)
    return {
        "kind": "dropped",
        "seed": seed,
        "augment": augment,
        "items": stream.items,
        "kills": kills,
        "compared": compared,
        "seconds": seconds,
    }


def _rank(stream: Stream, life: Life, rank: int, start: int) -> list[tuple[Place, Record]]:
    """What one rank is handed before its loader is dropped: its share of each step, in order."""
    count = (life.stop - start) * MICROS // life.world_size + life.taken
    with stream.loader(rank, life.world_size, start, threads=life.threads, prefetch_mib=life.prefetch_mib) as loader:
        got = [((batch.step, batch.micro), recorded(batch)) for batch in islice(loader, count)]
    expected = [(step, micro) for step in range(start, life.stop + 1) for micro in range(rank, MICROS, life.world_size)][:count]
    _check_order([place for place, _ in got], expected, f"rank {rank} of {life.world_size} from step {start}")
    return got


def _check_order(got: Sequence[Place], expected: Sequence[Place], where: str) -> None:
    assert list(got) == list(expected), f"{where}: got {got}, expected {expected}"


def _compare(stream: Stream, handed_out: Sequence[tuple[Place, Record]], where: str) -> int:
    for place, record in handed_out:
        assert record == stream.reference[place], f"{where}: micro-batch {place[1]} of step {place[0]} differs"
    return len(handed_out)


def check_whole(stream: Stream, kept: Sequence[Place], first: int, end: int, where: str) -> None:
    """`kept` is every position of steps [first, end) once. Raises AssertionError saying what is lost and what is repeated."""
    views = AUGMENTS[stream.augment].repeats
    counts = collections.Counter(position for place in kept for position in _positions(stream, place)[::views])
    expected = range(first * GLOBAL // views, end * GLOBAL // views)
    lost, repeated = [each for each in expected if not counts[each]], sorted(each for each, count in counts.items() if count > 1)
    assert not lost, f"{where}: lost {lost}"
    assert not repeated, f"{where}: repeated {repeated}"
    assert len(counts) == len(expected), f"{where}: {sorted(counts.keys() - set(expected))} are of no kept step"


def _positions(stream: Stream, place: Place) -> list[int]:
    positions = stream.reference[place][0]
    assert isinstance(positions, list)
    return positions


def soak_killed(stream: Stream, seed: int, folder: Path) -> dict[str, object]:
    """One stream whose lives are processes; the first two are killed by SIGKILL, at any moment. Raises AssertionError as above."""
    began = time.monotonic()
    draw = random.Random(f"SIGKILL {seed}")
    sizes = draw.sample(WORLD_SIZES, 3)
    start = first = draw.randrange(stream.steps - 3 * LIFE - 1)
    kills, kept, compared = [], [], 0
    for number, world_size in enumerate(sizes):
        end = None if number < 2 else min(start + 3, stream.steps)
        after = draw.randint(1, LIFE * MICROS)
        saved, handed_out = _process(stream, folder / f"{seed}-{number}", world_size, start, draw, after=after, end=end)
        places = [place for place, _ in handed_out]
        _check_order(places, [(start + i // MICROS, i % MICROS) for i in range(len(places))], f"SIGKILL, seed {seed}")
        assert len(places) >= (saved - start) * MICROS, f"SIGKILL, seed {seed}: step {saved} is saved after {len(places)} micro-batches"
        compared += _compare(stream, handed_out, f"SIGKILL, seed {seed}")
        kept += [place for place, _ in handed_out if start <= place[0] < saved]
        start = saved
        kills += [[world_size, sizes[number + 1]]] if number < 2 else []
    check_whole(stream, kept, first, start, f"SIGKILL, seed {seed}")
    seconds = round(time.monotonic() - began, 1)
    return {
        "kind": "SIGKILL",
        "seed": seed,
        "augment": stream.augment,
        "items": stream.items,
        "kills": kills,
        "compared": compared,
        "seconds": seconds,
    }


def _process(
    stream: Stream, folder: Path, world_size: int, start: int, draw: random.Random, *, after: int, end: int | None
) -> tuple[int, list[tuple[Place, Record]]]:
    """The step that a process saved, and what it was handed. It ends at step `end`, or is killed when it has been handed `after`."""
    folder.mkdir()
    last = stream.steps if end is None else end
    options = {"root": stream.root, "augment": stream.augment, "seed": stream.seed, "steps": stream.steps}
    given = {**options, "world-size": world_size, "start": start, "end": last, "folder": folder}
    command = [sys.executable, "-m", "tests.pipeline.soak_loader", "life", *(f"--{name}={value}" for name, value in given.items())]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    records = folder / "records.jsonl"
    try:
        deadline = time.monotonic() + DEADLINE_S
        while end is None and process.poll() is None and len(_lines(records)) < after:
            assert time.monotonic() < deadline, f"{after} micro-batches never came"
            time.sleep(0.002)
        if end is None:
            time.sleep(draw.uniform(0, 0.02))
            process.kill()
        code = process.wait(DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert code == (0 if end is not None else -signal.SIGKILL), f"a life at world size {world_size} ended with exit code {code}"
    saved = folder / "step"
    step = int(saved.read_text()) if saved.exists() else start
    return step, [((step, micro), record) for step, micro, record in map(json.loads, _lines(records))]


def _lines(path: Path) -> list[str]:
    """Whole lines: a process that is killed may leave half of one."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def live(stream: Stream, world_size: int, start: int, end: int, folder: Path) -> None:
    """All ranks of a life, step by step: each micro-batch is written down as it is handed out, every finished step is saved."""
    torch.set_num_threads(1)
    with ExitStack() as stack, (folder / "records.jsonl").open("w", encoding="utf-8") as records:
        ranks = [stack.enter_context(stream.loader(rank, world_size, start, prefetch_mib=64)) for rank in range(world_size)]
        for step in range(start, end):
            for _ in range(MICROS // world_size):
                for loader in ranks:
                    batch = next(loader)
                    records.write(json.dumps([batch.step, batch.micro, recorded(batch)]) + "\n")
                    records.flush()
            with committed(folder / "step") as file:
                file.write(str(step + 1).encode())


def small_dataset(videos: Path, labels: Path, folder: Path) -> Path:
    """The dataset of the soak, by the real build: pictures of some 64x48 pixels, items of a second, one of them damaged."""
    paths = {"videos": str(videos), "labels": str(labels), "dir": str(folder / "whole")}
    build.build_dataset(parse_overrides({"data": paths}, SMALL))
    return damaged_copy(folder / "whole", folder / "damaged")


def damaged_copy(root: Path, target: Path) -> Path:
    """The dataset with one byte of its second training video changed, which the loader replaces, each time by the same other."""
    shutil.copytree(root, target)
    dataset = Dataset.open(target)
    item = dataset.item(int(dataset.rows(*_training(dataset))[1]))
    with (target / item.shard_file).open("r+b") as file:
        file.seek(item.offset + item.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return target


def section(entries: Sequence[dict[str, object]]) -> list[str]:
    """Lines of docs/soak.md from all entries so far; none without entries."""
    counts: collections.Counter[tuple[int, int]] = collections.Counter()
    dropped = killed = compared = 0
    for entry in entries:
        kills = entry["kills"]
        assert isinstance(kills, list)
        counts.update((int(one), int(other)) for one, other in kills)
        compared += int(str(entry["compared"]))
        dropped, killed = dropped + len(kills) * (entry["kind"] == "dropped"), killed + len(kills) * (entry["kind"] == "SIGKILL")
    if not entries:
        return []
    items = ", ".join(sorted({str(entry["items"]) for entry in entries}))
    rows = []
    for size in WORLD_SIZES:
        cells = [counts[size, other] for other in WORLD_SIZES]
        rows.append(f"| {size} | {' | '.join(map(str, cells))} | {sum(cells)} | 0 | 0 |")
    return [
        "",
        "## The loader alone",
        "",
        "Streams of the loader, resumed twice in a row from a global step and nothing else, at a world size drawn anew each time. Their",
        "loaders are dropped amid a step with more in flight, or their process is killed by SIGKILL. Compared with one uninterrupted rank:",
        "every position of the steps that were kept is there once, each rank's in order; and of every micro-batch that was ever handed out",
        "the keys, labels, frames, crops and further draws, what replaced a damaged video, and a digest of the tensors. A difference would",
        "have stopped it.",
        "",
        f"**{dropped} kills by dropping, {killed} by SIGKILL**, every second one of a loader that had been resumed before;",
        f"{compared} micro-batches of datasets of {items} items compared: 0 differences.",
        "",
        "| ranks killed | went on at 1 | at 2 | at 4 | at 8 | kills | lost | repeated |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def soak(root: Path, folder: Path, *, seeds: range, kills: int) -> Iterator[dict[str, object]]:
    """An entry per seed of dropped loaders, then one per two SIGKILLs, of processes that load the dataset `root`."""
    torch.set_num_threads(1)
    streams = {augment: Stream(root, augment) for augment in AUGMENTS}
    yield from (soak_dropped(streams, seed) for seed in seeds)
    yield from (soak_killed(streams[PLAIN], seeds.start + number, folder) for number in range(-(-kills // 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos, with labels.csv")
    parser.add_argument("--seeds", type=int, default=10, help="eight kills each")
    parser.add_argument("--kills", type=int, default=2, help="of processes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, help="file to which entries are added, a line each")
    options = parser.parse_args()
    entries = []
    with tempfile.TemporaryDirectory(prefix="posmlp-soak-loader-") as name:
        root = small_dataset(options.videos, options.videos / "labels.csv", Path(name))
        for entry in soak(root, Path(name), seeds=range(options.seed, options.seed + options.seeds), kills=options.kills):
            entries.append(entry)
            if options.results is not None:
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
    print("\n".join(section(entries)))


def _life(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("root", Path), ("augment", str), ("seed", int), ("steps", int), ("folder", Path)):
        parser.add_argument(f"--{name}", type=kind)
    for name in ("world-size", "start", "end"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args(arguments)
    stream = Stream(options.root, options.augment, options.seed, options.steps)
    live(stream, options.world_size, options.start, options.end, options.folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["life"]:
        _life(sys.argv[2:])
    else:
        main()
