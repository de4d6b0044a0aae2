"""Requests in, batches out: reads and checks bytes, decodes, augments, and hands over batches in the order they were asked for.

A pool of threads reads and decodes samples (both release the interpreter lock); one more thread keeps the graph running and a few
finished batches ready. How much waits is bounded in bytes of decoded frames. Nothing here decides what is loaded: threads, prefetch
and world size change when a batch is ready, never what is in it.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pipeline import keyed, software_decode
from pipeline.dali import Graph, GraphError
from pipeline.errors import BudgetError, DecodeError, PipelineError, SampleError
from pipeline.index import Dataset, Item
from pipeline.keyed import ClipParameters
from pipeline.options import AugmentOptions, ClipOptions, LoaderOptions
from pipeline.reader import Reader
from pipeline.requests import MicroBatchRequest, Planner

DALI_CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})  # what DALI decodes without a GPU
SUBSTITUTES = 8  # draws before a position is given up
READY = 2  # finished batches that wait for the model
BUDGET_FLOOR = 1000  # samples over which the share of damaged ones is measured at least

Frames: TypeAlias = npt.NDArray[np.uint8]
_FINISHED = object()


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

    clips: float32 (B, 3, T, size, size), normalised, contiguous. labels: int64 (B,). keys: of what is in `clips`, substitutes included.
    positions: int64 (B,), parameters: B, valid: bool (B,), step, micro: as in `MicroBatchRequest`. damaged: of this batch.
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sample:
    """A loaded sample. data: decoded frames (T, H, W, 3), or an encoded file (bytes,); None where it is damaged and not replaced."""

    item: Item
    parameters: ClipParameters
    data: Frames | None
    damage: Damage | None


class _Buffers:
    """Frame buffers to use again: a fresh one costs a page fault for each of its pages."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[Frames]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> Frames:
        with self._lock:
            free = self._free.get(shape)
            if free:
                return free.pop()
        return np.empty(shape, dtype=np.uint8)

    def give(self, buffer: Frames) -> None:
        with self._lock:
            if buffer.shape not in self._free and len(self._free) >= 64:
                self._free.clear()  # a dataset of very many sizes must not keep a buffer of each
            self._free.setdefault(buffer.shape, []).append(buffer)


class Loader:
    """Iterates over the batches of `requests`, in their order. Use it in a `with` statement: it holds threads and open shards.

    micro_batch: B, the most samples of a request. threads: of decoding, at least 1 (options.threads wins unless 0). device: where
    batches are delivered, "cpu" or "cuda:<index>". on_damage: "substitute" (training) replaces a damaged sample by another of the
    request's pool, drawn by (seed, position), and raises BudgetError past the budget; "report" (evaluation) leaves zeros in its place.
    Raises what reading and decoding raise, PipelineError when the device has no decoder that was asked for.
    """

    def __init__(
        self,
        dataset: Dataset,
        requests: Iterable[MicroBatchRequest],
        *,
        micro_batch: int,
        clip: ClipOptions,
        augment: AugmentOptions,
        options: LoaderOptions,
        threads: int,
        device: str = "cpu",
        on_damage: Literal["substitute", "report"],
    ) -> None:
        self._dataset, self._requests = dataset, iter(requests)
        self._clip, self._augment, self._options = clip, augment, options
        self._substitute = on_damage == "substitute"
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda" and options.decode != "cpu"
        if options.decode == "nvdec" and not self._on_gpu:
            raise PipelineError(f"loader.decode=nvdec needs a GPU, but this rank runs on {device}. Set loader.decode=auto or cpu.")
        self._planner = Planner(dataset=dataset, clip=clip, augment=augment)
        self._reader, self._buffers = Reader(dataset.root), _Buffers()
        num_threads = options.threads or threads
        device_id = (self._device.index or 0) if self._device.type == "cuda" else None
        self._graphs = {
            encoded: Graph(batch=micro_batch, augment=augment, decode=encoded, device_id=device_id, threads=num_threads)
            for encoded in (False, True)
        }
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self._ready: queue.Queue[object] = queue.Queue(READY)
        self._stop = threading.Event()
        self._seen = self._damaged = 0
        self._producer: threading.Thread | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._producer is None:
            self._producer = threading.Thread(target=self._produce, name="loader", daemon=True)
            self._producer.start()
        while True:
            ready = self._ready.get()
            if isinstance(ready, BaseException):
                raise ready
            if not isinstance(ready, Batch):
                return
            yield ready

    def _produce(self) -> None:
        """Runs in its own thread: everything that goes wrong here is raised where the batches are taken."""
        try:
            for batch in self._batches():
                if not self._put(batch):
                    return
            self._put(_FINISHED)
        except BaseException as error:
            self._put(error)

    def _put(self, ready: object) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(ready, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _batches(self) -> Iterator[Batch]:
        waiting: deque[tuple[MicroBatchRequest, bool, list[Future[_Sample]]]] = deque()
        limit, held = self._options.prefetch_mib << 20, 0
        costs: deque[int] = deque()
        following = next(self._requests, None)
        while waiting or following is not None:
            while following is not None and (not waiting or held + self._cost(following) <= limit):
                costs.append(self._cost(following))
                held += costs[-1]
                waiting.append(self._submit(following))
                following = next(self._requests, None)
            request, encoded, futures = waiting.popleft()
            yield self._assemble(request, encoded, [future.result() for future in futures])
            held -= costs.popleft()

    def _cost(self, request: MicroBatchRequest) -> int:
        """Bytes of the request's decoded frames."""
        pixels = self._dataset.column("width")[request.rows].astype(np.int64) * self._dataset.column("height")[request.rows]
        return 3 * self._clip.num_frames * int(pixels.sum())

    def _submit(self, request: MicroBatchRequest) -> tuple[MicroBatchRequest, bool, list[Future[_Sample]]]:
        items = [self._dataset.item(row) for row in request.rows.tolist()]
        encoded = self._on_gpu or all(item.codec in DALI_CPU_CODECS for item in items)
        tasks = zip(items, request.positions.tolist(), request.parameters, strict=True)
        return request, encoded, [self._pool.submit(self._load, request, encoded, *task) for task in tasks]

    def _load(self, request: MicroBatchRequest, encoded: bool, item: Item, position: int, parameters: ClipParameters) -> _Sample:
        try:
            return _Sample(item=item, parameters=parameters, data=self._data(item, parameters, encoded), damage=None)
        except SampleError as error:
            return self._replace(request, encoded, item, position, parameters, error)

    def _data(self, item: Item, parameters: ClipParameters, encoded: bool) -> Frames:
        """The item's encoded bytes, or its wanted frames."""
        data = self._reader.read(item)
        if encoded:
            return np.frombuffer(data, dtype=np.uint8)
        frames = self._buffers.take((self._clip.num_frames, item.height, item.width, 3))
        try:
            software_decode.decode(data, parameters.frames + np.int32(item.begin), frames, key=item.key, shard=item.shard_file)
        except BaseException:
            self._buffers.give(frames)
            raise
        return frames

    def _replace(
        self, request: MicroBatchRequest, encoded: bool, item: Item, position: int, parameters: ClipParameters, error: SampleError
    ) -> _Sample:
        """What stands in the place of a damaged sample: another one, the same whenever and wherever it is drawn."""
        if not self._substitute or request.pool is None:
            damage = Damage(position=position, key=item.key, shard=item.shard_file, reason=str(error), substitute_key=None)
            return _Sample(item=item, parameters=parameters, data=None, damage=damage)
        for attempt in range(SUBSTITUTES):
            row = int(request.pool[keyed.substitute(request.seed, position, attempt, len(request.pool))])
            other = self._dataset.item(row)
            chosen = self._planner.parameters(row, seed=request.seed, position=position, training=True)
            if encoded and not self._on_gpu and other.codec not in DALI_CPU_CODECS:
                continue
            try:
                data = self._data(other, chosen, encoded)
            except SampleError:
                continue  # counted through the position that it stands for
            damage = Damage(position=position, key=item.key, shard=item.shard_file, reason=str(error), substitute_key=other.key)
            return _Sample(item=other, parameters=chosen, data=data, damage=damage)
        raise BudgetError(
            f"The sample at position {position} is damaged ({error}), and so are {SUBSTITUTES} others drawn to replace it. "
            f"Run 'posmlp data validate {self._dataset.root}'."
        )

    def _assemble(self, request: MicroBatchRequest, encoded: bool, samples: list[_Sample]) -> Batch:
        if encoded:
            clips, samples = self._decode_on_graph(request, samples)
        else:
            clips = self._augmented(samples, encoded)
        damaged = [sample.damage for sample in samples if sample.damage is not None]
        self._count(len(samples), damaged)
        labels = torch.tensor([sample.item.label for sample in samples], dtype=torch.int64)
        return Batch(
            clips=clips,
            labels=labels.to(self._device),
            keys=[sample.item.key for sample in samples],
            positions=request.positions,
            valid=request.valid,
            step=request.step,
            micro=request.micro,
            parameters=[sample.parameters for sample in samples],
            damaged=damaged,
        )

    def _augmented(self, samples: list[_Sample], encoded: bool) -> torch.Tensor:
        """(B, 3, T, size, size); zeros where a sample has no data."""
        present = [i for i, sample in enumerate(samples) if sample.data is not None]
        videos = [data for sample in samples if (data := sample.data) is not None]
        rois = np.array([samples[i].parameters.roi for i in present], dtype=np.float32).reshape(-1, 4)
        flips = np.array([samples[i].parameters.flip for i in present], dtype=np.bool_)
        frames = np.stack([samples[i].parameters.frames + np.int32(samples[i].item.begin) for i in present]) if encoded and present else None
        clips = self._graphs[encoded].run(videos, rois, flips, frames)
        if not encoded:
            for video in videos:
                self._buffers.give(video)
        if len(present) == len(samples):
            return clips
        size, length = self._augment.size, self._clip.num_frames
        whole = torch.zeros((len(samples), 3, length, size, size), device=self._device)
        if present:
            whole[present] = clips
        return whole

    def _decode_on_graph(self, request: MicroBatchRequest, samples: list[_Sample]) -> tuple[torch.Tensor, list[_Sample]]:
        """DALI decodes. One undecodable sample fails a whole batch, so that after a failure each sample is tried alone."""
        try:
            return self._augmented(samples, True), samples
        except GraphError:
            kept = [self._proven(request, position, sample) for position, sample in zip(request.positions.tolist(), samples, strict=True)]
            return self._augmented(kept, True), kept

    def _proven(self, request: MicroBatchRequest, position: int, sample: _Sample) -> _Sample:
        """The sample if DALI decodes it, else what replaces it."""
        try:
            self._augmented([sample], True)
            return sample
        except GraphError as error:
            reason = DecodeError(f"DALI cannot decode it: {str(error).splitlines()[0]}", key=sample.item.key, shard=sample.item.shard_file)
            return self._replace(request, True, sample.item, position, sample.parameters, reason)

    def _count(self, num_samples: int, damaged: list[Damage]) -> None:
        self._seen += num_samples
        self._damaged += len(damaged)
        allowed = max(1.0, self._options.max_damaged * max(self._seen, BUDGET_FLOOR))
        if self._substitute and self._damaged > allowed:
            raise BudgetError(
                f"{self._damaged} of {self._seen} samples were damaged, more than loader.max_damaged={self._options.max_damaged} allows; "
                f"the last: {damaged[-1].reason}. Run 'posmlp data validate {self._dataset.root}', then build it again."
            )

    def close(self) -> None:
        """Ends all threads; batches that were not taken are dropped."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._producer is not None:
            self._producer.join()
        for graph in self._graphs.values():
            graph.close()
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
