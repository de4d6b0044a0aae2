"""What a resumed epoch loses and repeats: ours and other loaders, each as its documentation says, over the same seeded kills.

An epoch is killed after a checkpoint and goes on from what that saved, twice in a row, to its end. Counted over all three lives: samples
that were never trained on, samples that were trained on again, and steps of the uninterrupted epoch that became others. Samples are
numbers, or videos that are all alike: which of them come is decided before any is decoded. Checkpoints lie exactly at the kills, so that
nobody has to run a step again. One epoch has a number of samples that divides by every batch and world size, so that nobody has to pad;
the other has a prime one.

Usage: python -m tests.pipeline.soak_peers --trials N --seed S
Of other loaders those are counted that are installed: pip install 'posmlp-video[bench]' mosaicml-streaming.
"""

import argparse
import collections
import importlib.metadata
import importlib.util
import io
import itertools
import multiprocessing
import os
import random
import socket
import sys
import tarfile
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

WORLD_SIZES = (1, 2, 4, 8)
EVEN, PRIME = 384, 389  # samples of an epoch
GLOBAL, SHARD = 16, 8  # samples of a step, of a shard
WORKERS = 2  # loading processes of a rank, where the loader has some
SEED = 11
PLACE = "127.0.0.1"
PEERS = Path(__file__).parents[2] / ".soak" / "peers.md"  # for docs/soak.md, which `make soak` writes

State: TypeAlias = object  # whatever a loader saves
Steps: TypeAlias = list[list[int]]  # samples of each step, of all ranks
Trial: TypeAlias = tuple[list[int], list[int]]  # world sizes of the three lives, steps of the two kills


class Loading(Protocol):
    """A loader over samples 0, 1, ..., `samples` - 1, in an order of its own."""

    samples: int

    def life(self, world_size: int, state: State, steps: int | None) -> tuple[Steps, State]:
        """From `state` (None: the beginning) so many steps (None: to the end of the epoch), and the state after the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Shares of an epoch's samples, and of its steps: other ones than the uninterrupted epoch's. 0 to 1, repeated can be more."""

    lost: float
    repeated: float
    moved: float

    def __str__(self) -> str:
        return " / ".join(f"{100 * share:.1f}" if share else "0" for share in (self.lost, self.repeated, self.moved))


def plan(seed: int, trials: int, samples: int, *, changing: bool) -> list[Trial]:
    draw = random.Random(f"{seed} {changing}")
    sizes = [draw.sample(WORLD_SIZES, 3) if changing else [draw.choice(WORLD_SIZES)] * 3 for _ in range(trials)]
    return [(each, sorted(draw.sample(range(1, samples // GLOBAL), 2))) for each in sizes]


def count(loading: Loading, trials: Sequence[Trial]) -> Counts:
    whole: dict[int, Steps] = {}
    lost = repeated = moved = num_steps = 0
    for sizes, kills in trials:
        if sizes[0] not in whole:
            whole[sizes[0]] = loading.life(sizes[0], None, None)[0]
        state: State = None
        steps: Steps = []
        for size, life in zip(sizes, [kills[0], kills[1] - kills[0], None], strict=True):
            done, state = loading.life(size, state, life)
            steps += done
        seen = collections.Counter(itertools.chain.from_iterable(steps))
        lost += loading.samples - len(seen)
        repeated += seen.total() - len(seen)
        expected = whole[sizes[0]]
        moved += len(expected) - sum(sorted(one) == sorted(other) for one, other in zip(steps, expected, strict=False))
        num_steps += len(expected)
    all_samples = loading.samples * len(trials)
    return Counts(lost=lost / all_samples, repeated=repeated / all_samples, moved=moved / num_steps)


class Ours:
    """Our loader over videos that are all alike. State: the global step."""

    MICRO = 2

    def __init__(self, samples: int, folder: Path) -> None:
        from tests.pipeline.numbered import Video, encode, write_dataset

        self.samples = samples
        self._dataset = write_dataset(folder / "dataset", [Video(data=encode(5), num_frames=5)] * samples)

    def life(self, world_size: int, state: State, steps: int | None) -> tuple[Steps, State]:
        from pipeline.loader import Loader
        from pipeline.options import AugmentOptions, ClipOptions, LoaderOptions
        from pipeline.requests import train_requests

        first = int(str(state or 0))
        last = -(-self.samples // GLOBAL) if steps is None else first + steps
        done: Steps = [[] for _ in range(first, last)]
        form = {"clip": ClipOptions(num_frames=2, stride=1), "augment": AugmentOptions(size=32)}
        rows = np.arange(self.samples, dtype=np.uint32)
        sizes = {"global_batch": GLOBAL, "micro_batch": self.MICRO, "world_size": world_size}
        for rank in range(world_size):
            requests = train_requests(self._dataset, rows, seed=SEED, rank=rank, start_step=first, end_step=last + 5, **sizes, **form)
            kept = {"micro_batch": self.MICRO, "options": LoaderOptions(), "threads": 1, "on_damage": "substitute"}
            with Loader(self._dataset, requests, **kept, **form) as loader:
                for batch in itertools.takewhile(lambda batch: batch.step < last, loader):
                    epoch = zip(batch.keys, batch.positions.tolist(), strict=True)  # its last step goes on into the next
                    done[batch.step - first] += [int(key.removeprefix("video-")) for key, place in epoch if place < self.samples]
        return done, last


class Torchdata:
    """A loader with a distributed sampler per rank. State: each rank's own; a rank that there was not takes that of rank r modulo those."""

    def __init__(self, samples: int, folder: Path) -> None:
        self.samples = samples

    def life(self, world_size: int, state: State, steps: int | None) -> tuple[Steps, State]:
        from torchdata.stateful_dataloader import StatefulDataLoader
        from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

        dataset, size, loaders = range(self.samples), GLOBAL // world_size, []
        for rank in range(world_size):
            sampler = StatefulDistributedSampler(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=SEED)
            loader = StatefulDataLoader(dataset, batch_size=size, sampler=sampler, num_workers=WORKERS, multiprocessing_context="fork")
            if isinstance(state, list):
                loader.load_state_dict(state[rank % len(state)])
            loaders.append(loader)
        together = zip(*map(iter, loaders), strict=False)
        done = [[sample for batch in batches for sample in batch.tolist()] for batches in itertools.islice(together, steps)]
        return done, [loader.state_dict() for loader in loaders]


class Streaming:
    """As many processes as ranks, since they meet at barriers. State: that of rank 0, which all ranks load."""

    def __init__(self, samples: int, folder: Path) -> None:
        self.samples, self._folder, self._base = samples, folder / "mds", _streaming_base()
        with self._base.MDSWriter(out=str(self._folder), columns={"sample": "int"}, size_limit="1kb") as out:
            for sample in range(samples):
                out.write({"sample": sample})

    def life(self, world_size: int, state: State, steps: int | None) -> tuple[Steps, State]:
        self._base.util.clean_stale_shared_memory()
        port, context = _free_port(), multiprocessing.get_context("fork")
        ends, processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=self._rank, args=(there, rank, world_size, port, state, steps))
            process.start()
            there.close()
            ends.append(here)
            processes.append(process)
        answers = [end.recv() for end in ends]
        for process in processes:
            process.join()
        together = itertools.zip_longest(*(batches for batches, _ in answers), fillvalue=[])
        return [[sample for batch in each for sample in batch] for each in together], answers[0][1]

    def _rank(self, end: Connection, rank: int, world_size: int, port: int, state: State, steps: int | None) -> None:
        from torch import distributed

        local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size, "RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in local.items()}, MASTER_ADDR=PLACE)
        if world_size > 1:
            distributed.init_process_group("gloo", rank=rank, world_size=world_size)
        form = {"shuffle": True, "shuffle_seed": SEED, "num_canonical_nodes": max(WORLD_SIZES)}
        dataset = self._base.StreamingDataset(local=str(self._folder), batch_size=GLOBAL // world_size, **form)
        loader = self._base.StreamingDataLoader(dataset, batch_size=GLOBAL // world_size)
        if state is not None:
            loader.load_state_dict(state)
        done = [batch["sample"].tolist() for batch in itertools.islice(loader, steps)]
        end.send((done, loader.state_dict() if rank == 0 else None))
        if world_size > 1:
            distributed.barrier()
            distributed.destroy_process_group()


class WebDataset:
    """It saves nothing. State: the number of the epoch's next step. After a kill `way` is

    restart     the epoch begins again                    skip    the steps that were done are read and thrown away
    resampled   shards are drawn with replacement for as many steps as were left: what its author advises for training on several nodes
    """

    def __init__(self, samples: int, folder: Path, way: str) -> None:
        self.samples, self._way, self._shards = samples, way, write_tars(folder, samples)

    def life(self, world_size: int, state: State, steps: int | None) -> tuple[Steps, State]:
        first, size, whole = int(str(state or 0)), GLOBAL // world_size, -(-self.samples // GLOBAL)
        behind = first if self._way == "skip" else 0
        last = (whole - first if self._way == "resampled" else whole) if steps is None else behind + steps
        ranks = [list(itertools.islice(self._samples(rank, world_size, first), last * size)) for rank in range(world_size)]
        done = [[sample for rank in ranks for sample in rank[step * size : (step + 1) * size]] for step in range(behind, last)]
        return done, first + len(done)

    def _samples(self, rank: int, world_size: int, first: int) -> Iterator[int]:
        import webdataset

        form = {"nodesplitter": webdataset.split_by_node}
        with environment(RANK=str(rank), WORLD_SIZE=str(world_size)):
            if self._way == "resampled":
                drawn = f"{SEED} {rank} {first}"
                dataset = webdataset.WebDataset(self._shards, resampled=True, seed=drawn, **form).shuffle(64, rng=random.Random(drawn))
            else:
                dataset = webdataset.WebDataset(self._shards, shardshuffle=len(self._shards), detshuffle=True, seed=SEED, **form)
                dataset = dataset.shuffle(64, rng=random.Random(SEED))
            for sample in dataset:
                yield int(sample["__key__"])


def write_tars(folder: Path, samples: int) -> list[str]:
    """Shards of SHARD samples: a multiple of the world sizes of them, where `samples` is EVEN."""
    paths = []
    for first in range(0, samples, SHARD):
        paths.append(str(folder / f"{first:06d}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for sample in range(first, min(first + SHARD, samples)):
                member = tarfile.TarInfo(f"{sample:06d}.txt")
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))
    return paths


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _streaming_base() -> types.ModuleType:
    """`streaming.base` without the rest of the package, which imports a torchvision that does not load beside a torch for CPUs."""
    if "streaming" not in sys.modules:
        found = importlib.util.find_spec("streaming")
        assert found is not None
        package = types.ModuleType("streaming")
        package.__path__ = list(found.submodule_search_locations or [])
        sys.modules["streaming"] = package
    return importlib.import_module("streaming.base")


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind((PLACE, 0))
        return int(listening.getsockname()[1])


WAYS = {"resampled": "resampled", "restart": "shards split, epoch begun again", "skip": "shards split, read and skipped"}
LOADERS: dict[str, dict[str, Callable[[int, Path], Loading]]] = {
    "torchdata": {"StatefulDataLoader, distributed sampler": Torchdata},
    "mosaicml-streaming": {"StreamingDataLoader": Streaming},
    "webdataset": {text: partial(WebDataset, way=way) for way, text in WAYS.items()},
    "posmlp-video": {"": Ours},  # last: it has threads, and the others fork
}


def installed() -> tuple[dict[str, Callable[[int, Path], Loading]], dict[str, str]]:
    """Package, version and way -> loader; package -> why it cannot be counted here."""
    found: dict[str, Callable[[int, Path], Loading]] = {}
    missing: dict[str, str] = {}
    for package, ways in LOADERS.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing[package] = "not installed"
        else:
            found.update({" ".join([package, version, way]).strip(): make for way, make in ways.items()})
    return found, missing


def table(trials: int, seed: int) -> Iterator[str]:
    """Lines of Markdown: of each loader, samples lost and repeated and steps that became others, in per cent."""
    cases = [(EVEN, False), (EVEN, True), (PRIME, False), (PRIME, True)]
    columns = [f"{samples} samples, world size {'changed' if change else 'kept'}" for samples, change in cases]
    yield f"| loader | {' | '.join(columns)} |"
    yield f"|---|{'---|' * len(cases)}"
    found, missing = installed()
    with tempfile.TemporaryDirectory(prefix="posmlp-peers-") as name:
        for number, (loader, make) in enumerate(found.items()):
            loadings = {}
            for samples in (EVEN, PRIME):
                folder = Path(name) / f"{number}-{samples}"
                folder.mkdir()
                loadings[samples] = make(samples, folder)
            counts = [count(loadings[samples], plan(seed, trials, samples, changing=change)) for samples, change in cases]
            yield f"| {loader} | {' | '.join(map(str, counts))} |"
    yield from (f"| {package} | {why} | | | |" for package, why in missing.items())


def section(trials: int, rows: Sequence[str]) -> list[str]:
    """Lines of docs/soak.md."""
    return [
        "",
        "## What other loaders lose and repeat",
        "",
        f"Counted by `make soak-peers`: {trials} epochs in each column, each killed at two seeded steps and resumed to its end from what",
        "the loader had saved exactly there; 1, 2, 4 or 8 ranks, kept or others after each kill, 16 samples a step. Per cent of the",
        "epoch's samples that were lost / that came again / per cent of its steps whose samples became others. One number of samples",
        "divides by everything, the other is a prime.",
        "",
        *rows,
        "",
        "`StatefulDataLoader` saves a state per rank and says nothing of other numbers of ranks: rank r took that of r modulo the saved",
        "ones. `StreamingDataLoader` had eight canonical nodes; what it repeats fills up the epoch's last steps, killed or not. webdataset",
        "saves nothing: its author advises to draw shards with replacement; the other two ways are what is left to whoever wants epochs.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20, help="epochs of each column, with two kills each")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for row in table(options.trials, options.seed):
        print(row, flush=True)
        rows.append(row)
    PEERS.parent.mkdir(exist_ok=True)
    PEERS.write_text("\n".join(section(options.trials, rows)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
