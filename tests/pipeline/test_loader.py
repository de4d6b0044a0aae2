"""Promises 3, 5, 6 and 10 at the loader: what is in a batch depends on its request alone, nothing damaged passes, nothing stays behind."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import keyed
from pipeline.errors import BudgetError, ChecksumError, PipelineError
from pipeline.index import Dataset
from pipeline.loader import Batch, Loader, choose_decoder, over_budget
from pipeline.options import AugmentOptions, ClipOptions, LoaderOptions
from pipeline.prefetch import Buffers, Room
from pipeline.requests import MicroBatchRequest, eval_requests, train_requests
from tests.pipeline.numbered import MJPEG, VP9, Video, encode, flip_byte, write_dataset

CLIP = ClipOptions(num_frames=4, stride=3)
AUGMENT = AugmentOptions(size=32)
B, GLOBAL = 3, 12  # four micro-batches a step
SIZES = [(96, 64), (112, 80), (96, 96)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Ten videos of 5 to 41 frames in three sizes, three shards; one is a window of its file."""
    videos = []
    for row in range(10):
        num, (width, height) = 5 + 4 * row, SIZES[row % 3]
        data = encode(num, first=100 * row, width=width, height=height)
        begin = 2 if row == 9 else 0
        videos.append(Video(data=data, num_frames=num - begin, begin=begin, width=width, height=height))
    return write_dataset(tmp_path_factory.mktemp("loader") / "d", videos)


def copy_of(dataset: Dataset, folder: Path) -> Dataset:
    for path in dataset.root.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(dataset.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return Dataset.open(folder)


def rows_of(dataset: Dataset) -> np.ndarray:
    return dataset.rows("split", "train")


def training(dataset: Dataset, **change: object) -> Iterator[MicroBatchRequest]:
    values: dict = {"seed": 5, "global_batch": GLOBAL, "micro_batch": B, "rank": 0, "world_size": 1, "start_step": 0, "end_step": 3}
    return train_requests(dataset, rows_of(dataset), clip=CLIP, augment=AUGMENT, **{**values, **change})


def evaluation(dataset: Dataset, **change: object) -> Iterator[MicroBatchRequest]:
    values: dict = {"micro_batch": 4, "rank": 0, "world_size": 1}
    return eval_requests(dataset, rows_of(dataset), clip=CLIP, augment=AUGMENT, **{**values, **change})


def load(dataset: Dataset, requests: Iterator[MicroBatchRequest], **change: object) -> list[Batch]:
    with loader_of(dataset, requests, **change) as loader:
        return list(loader)


def loader_of(
    dataset: Dataset, requests: Iterator[MicroBatchRequest], *, prefetch_mib: int = 64, max_damaged: float = 0.5, **change: object
) -> Loader:
    options = LoaderOptions(prefetch_mib=prefetch_mib, max_damaged=max_damaged)
    values: dict = {"micro_batch": 4, "clip": CLIP, "augment": AUGMENT, "options": options, "threads": 2, "on_damage": "substitute"}
    return Loader(dataset, requests, **{**values, **change})


def digest(batch: Batch) -> tuple[object, ...]:
    parameters = json.dumps([one.as_lists() for one in batch.parameters])
    facts = (batch.step, batch.micro, batch.keys, batch.positions.tolist(), batch.labels.tolist(), batch.valid.tolist(), parameters)
    return (*facts, batch.clips.numpy().tobytes())


@pytest.fixture(scope="module")
def stream(dataset: Dataset) -> dict[tuple[int, int], tuple[object, ...]]:
    """The first three steps by one rank, one thread and no prefetch."""
    return {(batch.step, batch.micro): digest(batch) for batch in load(dataset, training(dataset), threads=1, prefetch_mib=1)}


# What a batch is


def test_a_batch(dataset: Dataset) -> None:
    first = load(dataset, training(dataset, end_step=1))[0]
    assert first.clips.shape == (B, 3, 4, 32, 32)
    assert first.clips.dtype == torch.float32
    assert first.clips.is_contiguous()
    rows = [int(key.removeprefix("video-")) for key in first.keys]
    assert first.labels.tolist() == [row % 3 for row in rows]
    assert first.labels.dtype == torch.int64
    assert first.positions.tolist() == [0, 1, 2]
    assert first.damaged == []
    assert first.valid.all()


def test_pixels_are_the_frames_of_the_parameters(dataset: Dataset) -> None:
    """Decoded again one by one, and without the loader, the clips are the same."""
    from pipeline.dali import Graph
    from pipeline.reader import read
    from pipeline.software_decode import decode

    with Graph(batch=1, augment=AUGMENT, decode=False, device_id=None, threads=1) as graph:
        for batch in load(dataset, training(dataset, end_step=2)):
            for slot, key in enumerate(batch.keys):
                item, parameters = dataset.item(int(key.removeprefix("video-"))), batch.parameters[slot]
                frames = np.empty((4, item.height, item.width, 3), dtype=np.uint8)
                decode(read(dataset, item), parameters.frames + np.int32(item.begin), frames, key=key, shard="s")
                clip = graph.run([frames], np.array([parameters.roi], dtype=np.float32), np.array([parameters.flip]))
                assert torch.equal(batch.clips[slot], clip[0])


# Promises 3 and 5: nothing but the position matters


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world_size=st.sampled_from([1, 2, 4]),
    threads=st.integers(1, 4),
    prefetch_mib=st.sampled_from([1, 64]),
    start_step=st.integers(0, 2),
    taken=st.integers(0, 12),
)
def test_tensors_are_bit_equal_for_any_threads_prefetch_world_size_and_start(
    dataset: Dataset, stream: dict, world_size: int, threads: int, prefetch_mib: int, start_step: int, taken: int
) -> None:
    seen = {}
    for rank in range(world_size):
        requests = training(dataset, rank=rank, world_size=world_size, start_step=start_step)
        with loader_of(dataset, requests, threads=threads, prefetch_mib=prefetch_mib) as loader:
            for batch in itertools.islice(loader, taken if rank else None):  # a rank may stop anywhere
                seen[batch.step, batch.micro] = digest(batch)
    assert all(stream[place] == value for place, value in seen.items())
    if world_size == 1:
        assert seen.keys() == {place for place in stream if place[0] >= start_step}


@given(
    num_rows=st.integers(1, 60),
    micro_batch=st.integers(1, 5),
    micro_batches=st.integers(1, 8),
    start=st.integers(0, 10**6),
    seed=st.integers(0, 2**64 - 1),
)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_share_the_stream_without_loss_or_repetition(
    dataset: Dataset, num_rows: int, micro_batch: int, micro_batches: int, start: int, seed: int
) -> None:
    """No decoding: the stream can be simulated. Every epoch shows every row once, for every world size."""
    rows = (np.arange(num_rows) % 10).astype(np.uint32)
    steps = -(-2 * num_rows // (micro_batch * micro_batches)) + 1
    for world_size in (n for n in range(1, micro_batches + 1) if micro_batches % n == 0):
        positions = []
        for rank in range(world_size):
            for request in train_requests(
                dataset,
                rows,
                seed=seed,
                global_batch=micro_batch * micro_batches,
                micro_batch=micro_batch,
                rank=rank,
                world_size=world_size,
                start_step=start,
                end_step=start + steps,
                clip=CLIP,
                augment=AUGMENT,
            ):
                assert request.micro % world_size == rank
                positions.extend(request.positions.tolist())
        first = start * micro_batch * micro_batches
        assert sorted(positions) == list(range(first, first + steps * micro_batch * micro_batches))


@pytest.mark.parametrize("bad", [{"micro_batch": 5}, {"world_size": 3}, {"rank": 1}, {"rank": -1}])
def test_batches_that_do_not_divide(dataset: Dataset, bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        next(training(dataset, **bad))


def test_the_first_batch_far_into_a_run_costs_what_the_first_of_all_costs(dataset: Dataset) -> None:
    """A resumed loader replays nothing: 1.2 times in quiet, twice as much on a loaded machine."""

    def cost(start: int) -> float:
        began = time.process_time()
        with loader_of(dataset, training(dataset, start_step=start, end_step=start + 1)) as loader:
            next(loader)
        return time.process_time() - began

    cost(0)
    early, late = zip(*((cost(0), cost(10**9)) for _ in range(5)), strict=True)
    assert min(late) <= 2 * min(early)


# Evaluation


@given(
    num_items=st.integers(0, 40),
    micro_batch=st.integers(1, 6),
    world_size=st.integers(1, 9),
    skip=st.sets(st.integers(0, 12)),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_item_is_evaluated_once_and_ranks_have_equal_work(
    dataset: Dataset, num_items: int, micro_batch: int, world_size: int, skip: set[int]
) -> None:
    rows = (np.arange(num_items) % 10).astype(np.uint32)
    ranks = [
        list(eval_requests(dataset, rows, micro_batch=micro_batch, rank=rank, world_size=world_size, clip=CLIP, augment=AUGMENT, skip=skip))
        for rank in range(world_size)
    ]
    assert len({len(requests) for requests in ranks}) == 1
    requests = list(itertools.chain.from_iterable(ranks))
    assert all(len(request.rows) == micro_batch for request in requests)
    assert [request.step for request in ranks[0]] == list(range(len(ranks[0])))
    seen = sorted(position for request in requests for position in request.positions[request.valid].tolist())
    assert seen == [position for position in range(num_items) if position // micro_batch not in skip]
    for request in requests:
        if request.micro < 0:
            assert not request.valid.any()
        else:
            assert (request.positions[request.valid] // micro_batch == request.micro).all()
        assert (request.positions[~request.valid] == num_items - 1).all()


def test_what_only_fills_up_is_zero_and_not_loaded(dataset: Dataset, tmp_path: Path) -> None:
    """The last item, which fills up, is damaged: it is reported where it is evaluated, and only there."""
    broken = copy_of(dataset, tmp_path)
    flip_byte(broken, 9)
    batches = [batch for rank in range(2) for batch in load(broken, evaluation(broken, rank=rank, world_size=2), on_damage="report")]
    assert sum(len(batch.damaged) for batch in batches) == 1
    for batch in batches:
        assert batch.clips.shape == (4, 3, 4, 32, 32)
        for slot in range(4):
            shown = bool(batch.valid[slot]) and batch.keys[slot] != "video-9"
            assert bool(batch.clips[slot].abs().sum() > 0) == shown


def test_evaluation_is_the_same_for_any_world_size(dataset: Dataset) -> None:
    whole = {batch.micro: digest(batch)[2:] for batch in load(dataset, evaluation(dataset), on_damage="report")}
    for world_size in (2, 5):
        for rank in range(world_size):
            for batch in load(dataset, evaluation(dataset, rank=rank, world_size=world_size), on_damage="report"):
                assert batch.micro == -1 or digest(batch)[2:] == whole[batch.micro]


# Promise 6: damage


@pytest.mark.parametrize(("threads", "prefetch_mib"), [(1, 1), (4, 64)])
def test_damaged_samples_are_replaced_by_keyed_draws(
    dataset: Dataset, stream: dict, tmp_path: Path, threads: int, prefetch_mib: int
) -> None:
    broken = copy_of(dataset, tmp_path)
    for row in (3, 4):
        flip_byte(broken, row)
    bad = {"video-3", "video-4"}
    replaced = 0
    for batch in load(broken, training(broken), threads=threads, prefetch_mib=prefetch_mib):
        intact = stream[batch.step, batch.micro]
        for slot, position in enumerate(batch.positions.tolist()):
            assert batch.keys[slot] not in bad
            if intact[2][slot] not in bad:  # the others are as they were
                assert batch.keys[slot] == intact[2][slot]
                continue
            replaced += 1
            damages = [damage for damage in batch.damaged if damage.position == position]
            draws = [f"video-{keyed.substitute(5, position, attempt, 10)}" for attempt in range(8)]
            good = next(place for place, key in enumerate(draws) if key not in bad)
            assert [damage.key for damage in damages] == [intact[2][slot], *draws[:good]]
            assert {damage.substitute_key for damage in damages} == {draws[good]} == {batch.keys[slot]}
            assert all("CRC-32" in damage.reason and damage.shard == f"shards/00000{damage.key[-1] == '4':d}.tar" for damage in damages)
            item = broken.item(int(batch.keys[slot].removeprefix("video-")))
            assert batch.labels[slot] == item.label
            own = keyed.clip_parameters(
                5,
                position,
                num_frames=item.num_frames,
                fps=item.fps,
                width=item.width,
                height=item.height,
                clip=CLIP,
                augment=AUGMENT,
                training=True,
            )
            assert batch.parameters[slot].as_lists() == own.as_lists()
            assert batch.clips[slot].abs().sum() > 0
    assert replaced > 0


def training_rows(dataset: Dataset, num: int) -> np.ndarray:
    """Rows of the first `num` positions, at most one epoch of them."""
    return np.concatenate([request.rows for request in training(dataset, global_batch=num, end_step=1)])


def test_too_much_damage_stops_training(dataset: Dataset, tmp_path: Path) -> None:
    broken = copy_of(dataset, tmp_path)
    flip_byte(broken, 3)
    with pytest.raises(BudgetError, match=r"2 of \d+ samples were damaged, more than loader.max_damaged=0.0 .*video-3"):
        load(broken, training(broken), max_damaged=0.0)


def test_a_single_damaged_sample_is_allowed(dataset: Dataset, tmp_path: Path) -> None:
    broken = copy_of(dataset, tmp_path)
    flip_byte(broken, int(training_rows(dataset, 9)[4]))
    batches = load(broken, training(broken, end_step=1, global_batch=9), max_damaged=0.0)
    assert len({damage.position for batch in batches for damage in batch.damaged}) == 1


@pytest.mark.parametrize(
    ("damaged", "seen", "share", "over"),
    [
        (1, 1, 0.0, False),
        (2, 10**6, 0.0, True),
        (1, 5, 0.001, False),
        (2, 999, 0.001, True),
        (10, 10**4, 0.001, False),
        (11, 10**4, 0.001, True),
    ],
)
def test_the_budget(damaged: int, seen: int, share: float, over: bool) -> None:
    assert over_budget(damaged, seen, share) == over


def test_nothing_left_to_substitute(dataset: Dataset, tmp_path: Path) -> None:
    broken = copy_of(dataset, tmp_path)
    for row in range(10):
        flip_byte(broken, row)
    with pytest.raises(BudgetError, match="8 others drawn to replace it"):
        load(broken, training(broken), max_damaged=1.0)


def test_requests_without_substitutes_are_refused_in_training(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="pool"):
        load(dataset, evaluation(dataset))


def test_evaluation_reports_and_replaces_nothing(dataset: Dataset, tmp_path: Path) -> None:
    broken = copy_of(dataset, tmp_path)
    flip_byte(broken, 5)
    before, after = (load(d, evaluation(d), on_damage="report", max_damaged=0.0) for d in (dataset, broken))
    assert [batch.keys for batch in before] == [batch.keys for batch in after]
    (damage,) = [damage for batch in after for damage in batch.damaged]
    assert (damage.position, damage.key, damage.shard, damage.substitute_key) == (5, "video-5", "shards/000001.tar", None)
    assert after[1].clips[1].abs().sum() == 0
    after[1].clips[1] = before[1].clips[1]
    assert all(torch.equal(one.clips, other.clips) for one, other in zip(before, after, strict=True))


# The decoder


@pytest.mark.parametrize("codec", ["vp9", "mjpeg"])
def test_decoding_in_the_graph_is_the_same_stream(codec: str, tmp_path: Path) -> None:
    """DALI's decoder on the CPU, as on a GPU: same keys, frames and boxes as PyAV's, near-equal pixels, and damage found one by one."""
    stream = {"vp9": VP9, "mjpeg": MJPEG}[codec]
    videos = [Video(data=encode(20 + row, stream, first=40 * row), num_frames=20 + row, codec=codec) for row in range(6)]
    # Right checksums and no video: only the decoder can notice.
    videos[2] = replace(videos[2], data=videos[2].data[:40] + bytes(len(videos[2].data) - 40))
    videos[4] = replace(videos[4], num_frames=60)  # the index promises more frames than there are
    dataset = write_dataset(tmp_path / "d", videos)
    by_pyav, by_dali = (load(dataset, training(dataset), decoder=decoder) for decoder in ("pyav", "dali"))
    assert sum(len(batch.damaged) for batch in by_dali) > 0
    for one, other in zip(by_pyav, by_dali, strict=True):
        if {damage.key for damage in one.damaged} <= {"video-2"}:  # a clip of video 4 may lie within what there is
            assert digest(one)[:-1] == digest(other)[:-1]
            assert (one.clips - other.clips).abs().max() * 255 * 0.225 <= 8
        assert "video-2" not in other.keys
    again = load(dataset, training(dataset), decoder="dali", threads=4)
    assert [digest(batch) for batch in again] == [digest(batch) for batch in by_dali]
    reported = load(dataset, evaluation(dataset), decoder="dali", on_damage="report")
    assert {damage.key for batch in reported for damage in batch.damaged} == {"video-2", "video-4"}


def test_a_codec_that_needs_a_gpu(dataset: Dataset) -> None:
    with pytest.raises(PipelineError, match=r"video-.* got codec h264, expected .*vp9"):
        load(dataset, training(dataset), decoder="dali")


@pytest.mark.parametrize(
    ("decode", "device", "expected"),
    [("auto", "cpu", "pyav"), ("cpu", "cuda:1", "pyav"), ("auto", "cuda", "dali"), ("nvdec", "cuda:0", "dali")],
)
def test_choice_of_the_decoder(decode: str, device: str, expected: str) -> None:
    assert choose_decoder(decode, device) == expected  # type: ignore[arg-type]


def test_nvdec_without_a_gpu(dataset: Dataset) -> None:
    with pytest.raises(PipelineError, match=r"loader.decode=nvdec needs a GPU, but this rank runs on cpu. Set loader.decode"):
        Loader(
            dataset,
            [],
            micro_batch=1,
            clip=CLIP,
            augment=AUGMENT,
            options=LoaderOptions(decode="nvdec"),
            threads=1,
            on_damage="report",
        )


# Threads and memory


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "loader"))]


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("prefetch_mib", [1, 64])
def test_closing_in_the_middle_leaves_no_thread(dataset: Dataset, taken: int, prefetch_mib: int) -> None:
    with loader_of(dataset, training(dataset, end_step=1000), prefetch_mib=prefetch_mib) as loader:
        batches = list(itertools.islice(loader, taken))
    assert loader_threads() == []
    assert next(loader, None) is None
    assert all(batch.clips.isfinite().all() for batch in batches)


def test_iteration_ends_and_stays_ended(dataset: Dataset) -> None:
    with loader_of(dataset, training(dataset, end_step=1)) as loader:
        assert len(list(loader)) == 4
        assert list(loader) == []


def test_an_error_of_the_requests_reaches_the_consumer(dataset: Dataset) -> None:
    def failing() -> Iterator[MicroBatchRequest]:
        yield from training(dataset, end_step=1)
        raise ZeroDivisionError("planned")

    with loader_of(dataset, failing()) as loader, pytest.raises(ZeroDivisionError, match="planned"):
        list(loader)
    assert loader_threads() == []


def test_an_unforeseen_error_in_a_thread_names_the_video(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pipeline.software_decode.decode", broken)
    with pytest.raises(ZeroDivisionError) as caught:
        load(dataset, training(dataset))
    assert caught.value.__notes__[0].startswith("while loading video 'video-")
    assert loader_threads() == []


def test_a_missing_shard_is_damage(dataset: Dataset, tmp_path: Path) -> None:
    broken = copy_of(dataset, tmp_path)
    (broken.root / "shards/000002.tar").unlink()
    reasons = [damage.reason for batch in load(broken, evaluation(broken), on_damage="report") for damage in batch.damaged]
    assert len(reasons) == 2
    assert all("No such file" in reason for reason in reasons)


def test_an_interrupt_ends_the_process_at_once(dataset: Dataset) -> None:
    """Ctrl-C in the middle of an endless stream: KeyboardInterrupt, and no thread that keeps the process alive."""
    script = f"""
        from pipeline.index import Dataset
        from pipeline.loader import Loader
        from pipeline.options import AugmentOptions, ClipOptions, LoaderOptions
        from pipeline.requests import train_requests
        dataset, clip, augment = Dataset.open({str(dataset.root)!r}), ClipOptions(num_frames=4), AugmentOptions(size=32)
        requests = train_requests(dataset, dataset.rows("split", "train"), seed=1, global_batch=4, micro_batch=4, rank=0, world_size=1,
                                  start_step=0, end_step=10**9, clip=clip, augment=augment)
        with Loader(dataset, requests, micro_batch=4, clip=clip, augment=augment, options=LoaderOptions(), threads=2,
                    on_damage="substitute") as loader:
            for batch in loader:
                print(batch.step, flush=True)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline()) and int(line) < 5:
            pass
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert "Fatal" not in errors


def test_memory_is_flat_and_bounded(dataset: Dataset) -> None:
    """The long version, 2,000 batches, is measured outside the tests; 300 would show a buffer or a clip that is kept."""
    process, sizes = psutil.Process(), []
    with loader_of(dataset, training(dataset, end_step=75), prefetch_mib=1) as loader:
        for number, _ in enumerate(loader):
            if number % 50 == 49:
                sizes.append(process.memory_info().rss / 2**20)
    assert len(sizes) == 6
    assert sizes[-1] - sizes[1] < 8


def test_room_is_a_bound() -> None:
    room = Room(10)
    assert room.take(25, wait=False)  # alone, anything has room
    assert not room.take(1, wait=False)
    room.give(25)
    assert room.take(6, wait=False)
    assert not room.take(5, wait=False)
    taken: list[bool] = []
    waiting = threading.Thread(target=lambda: taken.append(room.take(5, wait=True)))
    waiting.start()
    room.give(6)
    waiting.join(5)
    assert taken == [True]
    waiting = threading.Thread(target=lambda: taken.append(room.take(9, wait=True)))
    waiting.start()
    room.close()
    waiting.join(5)
    assert taken == [True, False]


def test_buffers_are_used_again() -> None:
    buffers = Buffers()
    large = buffers.take((4, 10, 10, 3))
    address = large.ctypes.data
    buffers.give(large)
    small = buffers.take((4, 5, 5, 3))
    assert small.shape == (4, 5, 5, 3)
    assert small.ctypes.data == address
    assert small.flags.c_contiguous
    buffers.give(small)
    larger = buffers.take((4, 20, 20, 3))  # takes the place of the one that is too small
    buffers.give(larger)
    assert buffers.take((4, 10, 10, 3)).ctypes.data == larger.ctypes.data
    assert buffers.take((1,)).ctypes.data not in (address, larger.ctypes.data)


def test_a_dataset_is_opened_by_map_alone(dataset: Dataset) -> None:
    """Nothing that grows with the dataset is copied by a loader: the planner's columns are views of the mapped file."""
    before = pa.total_allocated_bytes()
    next(training(dataset))
    assert pa.total_allocated_bytes() == before
    with pytest.raises(ValueError, match="read-only"):
        dataset.column("begin")[0] = 1


def test_a_checksum_error_is_what_it_says(dataset: Dataset, tmp_path: Path) -> None:
    assert issubclass(ChecksumError, PipelineError)
    broken = copy_of(dataset, tmp_path)
    flip_byte(broken, 0)
    (damage,) = [damage for batch in load(broken, evaluation(broken), on_damage="report") for damage in batch.damaged]
    assert "CRC-32" in damage.reason
