"""Requests in, batches out: reads and checks bytes, decodes, augments, and hands over batches in the order they were asked for.

A pool of threads reads and decodes samples (both release the interpreter lock); one more thread keeps micro-batches in flight, runs
the graph and queues what is finished. From an object store another pool reads ahead, so that decoding never waits for an answer. How
much is in flight is bounded in bytes. Nothing here decides what is loaded: threads, prefetch and world size change when a batch is
ready, never what is in it.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pipeline import keyed, software_decode
from pipeline.augment_clip import augment_levels, erase, works_on_levels
from pipeline.augment_mix import mix_clips, mixed_targets
from pipeline.augmentation import swapped_labels
from pipeline.clip_boxes import ClipBoxes, clip_boxes
from pipeline.dali import CPU_CODECS, Graph, GraphError
from pipeline.errors import BudgetError, DecodeError, PipelineError, SampleError
from pipeline.index import Dataset, Item
from pipeline.keyed import ClipParameters
from pipeline.mixture import Mixture
from pipeline.options import AugmentOptions, ClipOptions, LoaderOptions
from pipeline.prefetch import Buffers, Room
from pipeline.reader import open_reader
from pipeline.requests import MicroBatchRequest, Planner
from pipeline.watchdog import Watchdog

SUBSTITUTES = 8  # draws before a position is given up
BUDGET_FLOOR = 1000  # samples over which the share of damaged ones is measured at least

Frames: TypeAlias = npt.NDArray[np.uint8]
Decoder: TypeAlias = Literal["pyav", "dali"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One sample that could not be delivered. substitute_key: of what took its place; None in evaluation, where nothing does."""

    position: int
    key: str
    shard: str
    reason: str
    substitute_key: str | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch of B clips, on the loader's device.

    clips: float32 (B, 3, T, size, size), normalised, contiguous; zero where the slot is not valid or, in evaluation, damaged.
    labels: int64 (B,), of what is in `clips` and how it is turned (`augment.flip_labels`). targets: float32 (B, K), shares of classes,
    where the micro-batch is mixed; else None. keys: of what is in `clips`, substitutes included. positions: int64 (B,), parameters: B (of
    the substitutes where there are any), valid: bool (B,), step, micro: as in `MicroBatchRequest`. damaged: of this batch. boxes: where
    items are keyframes, of what is in `clips`, as it shows them.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    keys: list[str]
    positions: npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_]
    step: int
    micro: int
    parameters: list[ClipParameters]
    damaged: list[Damage]
    targets: torch.Tensor | None = None
    boxes: ClipBoxes | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sample:
    """The slots of a micro-batch that show one sample, its V views. data: decoded frames (T, H, W, 3), or an encoded file (bytes,), or
    None where there is nothing to show.

    parameters: V of them, with equal frames. errors: of the samples that stood here before, the requested one first.
    """

    item: Item
    position: int
    parameters: Sequence[ClipParameters]
    data: Frames | None
    errors: tuple[SampleError, ...] = ()


# A sample that is read from a store is read in a pool of its own, whose result is the future of its decoding.
_Pending: TypeAlias = Future[_Sample] | Future[Future[_Sample]]
_InFlight: TypeAlias = tuple[MicroBatchRequest, Sequence[_Pending], int]


def choose_decoder(decode: Literal["auto", "nvdec", "cpu"], device: str) -> Decoder:
    """What `loader.decode` means on a torch device: PyAV on the CPU, or DALI. Raises PipelineError for nvdec without a GPU."""
    on_gpu = torch.device(device).type == "cuda"
    if decode == "nvdec" and not on_gpu:
        raise PipelineError(f"loader.decode=nvdec needs a GPU, but this rank runs on {device}. Set loader.decode=auto or cpu.")
    return "dali" if on_gpu and decode != "cpu" else "pyav"


def over_budget(damaged: int, seen: int, max_damaged: float) -> bool:
    """Whether `damaged` of `seen` samples exceed the share `max_damaged`; a single one never does."""
    return damaged > max(1.0, max_damaged * max(seen, BUDGET_FLOOR))


class Loader:
    """Iterates once over the batches of `requests`, in their order. Use it in a `with` statement: it holds threads and open shards.

    micro_batch: B, the most samples of a request. threads: of decoding, at least 1 (options.threads wins unless 0). device: where
    batches are delivered, "cpu" or "cuda:<index>". on_damage: "substitute" (training) replaces a damaged sample by another of the
    request's pool, drawn by (seed, position, attempt), and raises BudgetError past the budget; "report" (evaluation) leaves zeros in
    its place. decoder: instead of what `options.decode` says; "dali" without a GPU decodes VP8, VP9 and MJPEG only.
    counted: samples, and damaged ones among them, that count towards the budget from before the first request (a resumed run).
    on_slow_read: hears of reads that take longer than `options.slow_read_s`, while they do: the item and the seconds so far.
    Iterating raises what reading and decoding raise, PipelineError when the device has no decoder that was asked for.
    """

    def __init__(
        self,
        dataset: Dataset | Mixture,
        requests: Iterable[MicroBatchRequest],
        *,
        micro_batch: int,
        clip: ClipOptions,
        augment: AugmentOptions,
        options: LoaderOptions,
        threads: int,
        device: str = "cpu",
        on_damage: Literal["substitute", "report"],
        decoder: Decoder | None = None,
        counted: tuple[int, int] = (0, 0),
        on_slow_read: Callable[[Item, float], None] | None = None,
    ) -> None:
        self._dataset, self._requests = dataset, requests
        self._clip, self._augment, self._options = clip, augment, options
        self._substitute, self._device = on_damage == "substitute", torch.device(device)
        self._encoded = (decoder or choose_decoder(options.decode, device)) == "dali"
        self._planner, self._swapped = Planner(dataset, clip, augment), swapped_labels(dataset.info.classes, augment.flip_labels)
        self._boxes = None if dataset.info.boxes is None else dataset.parts[0].boxes()
        self._readers, self._buffers = [open_reader(part) for part in dataset.parts], Buffers()
        num_threads = options.threads or threads
        self._device_id = (self._device.index or 0) if self._device.type == "cuda" else None
        self._graph = Graph(batch=micro_batch, augment=augment, decode=self._encoded, device_id=self._device_id, threads=num_threads)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._ahead = 2 + 4 * num_threads // micro_batch  # micro-batches that keep all threads busy while one is augmented
        self._fetching: ThreadPoolExecutor | None = None
        if any(part.origin is not None for part in dataset.parts):
            self._fetching = ThreadPoolExecutor(options.remote.requests, thread_name_prefix="fetch")
            self._ahead = max(self._ahead, 2 + options.remote.requests // micro_batch)
        self._watchdog = Watchdog(options.slow_read_s if on_slow_read else 0.0, on_slow_read or (lambda item, seconds: None))
        self._room = Room(options.prefetch_mib << 20)
        self._ready: queue.SimpleQueue[tuple[Batch, int] | BaseException | None] = queue.SimpleQueue()
        self._producer: threading.Thread | None = None
        self._ended = False
        self._seen, self._damaged = counted

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._ended:
            raise StopIteration
        if self._producer is None:
            self._producer = threading.Thread(target=self._produce, name="loader", daemon=True)
            self._producer.start()
        ready = self._ready.get()
        if isinstance(ready, tuple):
            batch, cost = ready
            self._room.give(cost)
            return batch
        self._ended = True
        raise StopIteration if ready is None else ready

    def reads(self) -> list[tuple[Item, float]]:
        """Whose bytes are being read now, and for how many seconds; may be asked in any thread."""
        return self._watchdog.reads()

    def _produce(self) -> None:
        """Runs in its own thread: everything that goes wrong here is raised where the batches are taken."""
        waiting: deque[_InFlight] = deque()
        try:
            for request in self._requests:
                cost = self._cost(request)
                if len(waiting) >= self._ahead:
                    self._finish(*waiting.popleft())
                while not self._room.take(cost, wait=not waiting):  # without room, finish the oldest; without any, wait for the model
                    if self._room.closed:
                        return
                    self._finish(*waiting.popleft())
                waiting.append((request, self._submit(request), cost))
            while waiting and not self._room.closed:
                self._finish(*waiting.popleft())
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def _finish(self, request: MicroBatchRequest, pending: Sequence[_Pending], cost: int) -> None:
        self._ready.put((self._assemble(request, [_result(one) for one in pending]), cost))

    def _cost(self, request: MicroBatchRequest) -> int:
        """Bytes of the request's decoded frames and of the clips made of them."""
        rows = request.rows[:: request.views][request.valid[:: request.views]]
        width, height = (self._dataset.column(name)[rows].astype(np.int64) for name in ("width", "height"))
        return 3 * self._clip.num_frames * (int((width * height).sum()) + 4 * len(request.rows) * self._augment.size**2)

    def _submit(self, request: MicroBatchRequest) -> Sequence[_Pending]:
        if self._substitute and request.pools is None:
            raise ValueError("requests without pools: got on_damage='substitute', expected 'report'")
        views = request.views
        rows, positions, valid = (array[::views].tolist() for array in (request.rows, request.positions, request.valid))
        parameters = (request.parameters[i : i + views] for i in range(0, len(request.parameters), views))
        slots = zip(rows, positions, parameters, valid, strict=True)
        if self._fetching is not None:
            return [self._fetching.submit(self._fetch, request, *slot) for slot in slots]
        return [self._pool.submit(self._load, request, *slot) for slot in slots]

    # In the pools

    def _fetch(
        self, request: MicroBatchRequest, row: int, position: int, parameters: Sequence[ClipParameters], valid: bool
    ) -> Future[_Sample]:
        data: bytes | SampleError | None = None
        try:
            data = self._read(self._dataset.item(row)) if valid else None
        except SampleError as error:
            data = error
        return self._pool.submit(self._load, request, row, position, parameters, valid, data)

    def _read(self, item: Item) -> bytes:
        self._watchdog.begin(item)
        try:
            return self._readers[self._dataset.part(item.row)].read(item)
        finally:
            self._watchdog.end()

    def _load(
        self,
        request: MicroBatchRequest,
        row: int,
        position: int,
        parameters: Sequence[ClipParameters],
        valid: bool,
        data: bytes | SampleError | None = None,
    ) -> _Sample:
        """data: the item's bytes, or why there are none, where they were read already."""
        item = self._dataset.item(row)
        sample = _Sample(item=item, position=position, parameters=parameters, data=None)
        if not valid:  # only fills up: loaded and judged where it is valid
            return sample
        try:
            if isinstance(data, SampleError):
                raise data
            return self._with_data(sample, data)
        except SampleError as error:
            return self._replaced(request, sample, error)
        except BaseException as error:
            error.add_note(f"while loading video '{item.key}' in {item.shard_file}")
            raise

    def _with_data(self, sample: _Sample, data: bytes | None = None) -> _Sample:
        """The same with its encoded bytes, or its wanted frames. data: the bytes, where they were read already."""
        item = sample.item
        if self._encoded and self._device_id is None and item.codec not in CPU_CODECS:
            expected = f"one of {sorted(CPU_CODECS)}, which DALI decodes without a GPU, or decoder='pyav'"
            raise PipelineError(f"video '{item.key}' in {item.shard_file}: got codec {item.codec}, expected {expected}")
        data = self._read(item) if data is None else data
        if self._encoded:
            frames = np.frombuffer(data, dtype=np.uint8)
        else:
            frames = self._buffers.take((self._clip.num_frames, item.height, item.width, 3))
            try:
                wanted = sample.parameters[0].frames + np.int32(item.begin)
                software_decode.decode(data, wanted, frames, key=item.key, shard=item.shard_file)
            except BaseException:
                self._buffers.give(frames)
                raise
        return _Sample(item=item, position=sample.position, parameters=sample.parameters, data=frames, errors=sample.errors)

    def _replaced(self, request: MicroBatchRequest, sample: _Sample, error: SampleError) -> _Sample:
        """What stands in the place of a damaged sample: another one, the same whenever and wherever it is drawn."""
        errors = (*sample.errors, error)
        position, pools = sample.position, request.pools
        if not self._substitute or pools is None:
            return _Sample(item=sample.item, position=position, parameters=sample.parameters, data=None, errors=errors)
        pool = pools[self._dataset.part(sample.item.row)]  # so that a mixture's shares stay what they are
        while len(errors) <= SUBSTITUTES:  # the number of failures is the number of the next draw
            row = int(pool[keyed.substitute(request.seed, position, len(errors) - 1, len(pool))])
            parameters = [self._planner.training(row, seed=request.seed, position=position, view=v) for v in range(request.views)]
            try:
                return self._with_data(
                    _Sample(item=self._dataset.item(row), position=position, parameters=parameters, data=None, errors=errors)
                )
            except SampleError as another:
                errors = (*errors, another)
        raise BudgetError(
            f"The sample at position {position} is damaged ({errors[0]}), and so are {SUBSTITUTES} others drawn to replace it. "
            f"Run 'posmlp data validate {self._dataset.where}'."
        )

    # In the producer

    def _assemble(self, request: MicroBatchRequest, samples: list[_Sample]) -> Batch:
        try:
            clips = self._augmented(samples)
        except GraphError:
            if not self._encoded:
                raise
            # One undecodable sample fails DALI's whole batch: find it by trying each alone.
            samples = [self._proven(request, sample) for sample in samples]
            clips = self._augmented(samples)
        for sample in samples:
            if sample.data is not None and not self._encoded:
                self._buffers.give(sample.data)
        damaged = [_damage(sample, error) for sample in samples for error in sample.errors]
        self._count(int(request.valid[:: request.views].sum()), sum(1 for sample in samples if sample.errors), damaged)
        slots = [(sample.item, parameters) for sample in samples for parameters in sample.parameters]
        swapped = self._swapped if request.pools is not None else {}  # in evaluation the label is the video's, however it is shown
        turned = [swapped.get(item.label, item.label) if parameters.flip else item.label for item, parameters in slots]
        labels = torch.tensor(turned, dtype=torch.int64).to(self._device)
        boxes = None
        if self._boxes is not None:
            there = (sample.data is not None for sample in samples for _ in sample.parameters)
            boxes = clip_boxes(self._boxes, ((*slot, is_there) for slot, is_there in zip(slots, there, strict=True)), swapped, self._device)
        mix = request.mix
        if mix is not None:
            mix_clips(clips, mix)
        return Batch(
            clips=clips,
            labels=labels,
            targets=None if mix is None else mixed_targets(labels, mix, len(self._dataset.info.classes)),
            keys=[item.key for item, _ in slots],
            positions=request.positions,
            valid=request.valid,
            step=request.step,
            micro=request.micro,
            parameters=[parameters for _, parameters in slots],
            damaged=damaged,
            boxes=boxes,
        )

    def _augmented(self, samples: Sequence[_Sample]) -> torch.Tensor:
        """(B, 3, T, size, size), the views of a sample side by side; zeros where it has no data."""
        present = [sample for sample in samples if sample.data is not None]
        size, length = self._augment.size, self._clip.num_frames
        whole = (sum(len(sample.parameters) for sample in samples), 3, length, size, size)
        if not present:
            return torch.zeros(whole, device=self._device)
        videos = [data for sample in present if (data := sample.data) is not None]
        frames = np.stack([one.parameters[0].frames + np.int32(one.item.begin) for one in present]) if self._encoded else None
        clips = self._views(videos, [parameters for sample in present for parameters in sample.parameters], frames)
        if len(present) == len(samples):
            return clips
        padded = torch.zeros(whole, device=self._device)
        padded[[sample.data is not None for sample in samples for _ in sample.parameters]] = clips
        return padded

    def _views(self, videos: list[Frames], parameters: list[ClipParameters], frames: npt.NDArray[np.int32] | None) -> torch.Tensor:
        """Clips of videos that are there, by the parameters of their views."""
        rois = np.array([one.roi for one in parameters], dtype=np.float32)
        flips = np.array([one.flip for one in parameters], dtype=np.bool_)
        drawn = [one.augmentation for one in parameters]
        augmentations = [one for one in drawn if one is not None]
        if works_on_levels(self._augment) and len(augmentations) == len(drawn):  # not in evaluation, which draws none
            clips = self._graph.run(videos, rois, flips, frames, normalise=False)
            augment_levels(clips, augmentations, self._augment)
        else:
            clips = self._graph.run(videos, rois, flips, frames)
        erase(clips, drawn)
        return clips

    def _proven(self, request: MicroBatchRequest, sample: _Sample) -> _Sample:
        """The sample if DALI decodes it, else what replaces it and is decoded."""
        while sample.data is not None:
            try:
                self._augmented([sample])
                break
            except GraphError as error:
                reason = DecodeError(f"DALI cannot decode it: {error}", key=sample.item.key, shard=sample.item.shard_file)
                sample = self._replaced(request, sample, reason)
        return sample

    def _count(self, num_samples: int, num_damaged: int, damaged: list[Damage]) -> None:
        self._seen += num_samples
        self._damaged += num_damaged
        if self._substitute and over_budget(self._damaged, self._seen, self._options.max_damaged):
            raise BudgetError(
                f"{self._damaged} of {self._seen} samples were damaged, more than loader.max_damaged={self._options.max_damaged} allows; "
                f"the last: {damaged[-1].reason}. Run 'posmlp data validate {self._dataset.where}', then build it again."
            )

    def close(self) -> None:
        """Ends all threads; batches that were not taken are dropped, batches taken stay valid."""
        self._ended = True
        self._room.close()
        if self._fetching is not None:
            for reader in self._readers:
                reader.close()  # ends what waits for another attempt
            self._fetching.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._producer is not None:
            self._producer.join()
        self._graph.close()
        for reader in self._readers:
            reader.close()
        self._watchdog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _result(pending: _Pending) -> _Sample:
    result = pending.result()
    return result.result() if isinstance(result, Future) else result


def _damage(sample: _Sample, error: SampleError) -> Damage:
    substitute = sample.item.key if sample.data is not None else None
    return Damage(position=sample.position, key=error.key, shard=error.shard, reason=str(error), substitute_key=substitute)
