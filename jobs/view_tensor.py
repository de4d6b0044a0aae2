"""What training makes of an item, for people to look at: when it is shown, and the tensor that the model gets then.

The tensor comes from the same requests, loader and graph as in training. A micro-batch does not depend on ranks, so the viewer is the
rank that runs just the one that is asked for. Levels are shown after normalisation is undone: round(255 * (x * std + mean)).
"""

import hashlib
import struct
import threading
import zlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cluster.topology import num_micro_batches
from jobs.recipe import Recipe
from jobs.run_folder import epoch_length, total_steps
from jobs.train_data import open_data
from jobs.view_items import Cache
from pipeline.index import Dataset
from pipeline.options import AugmentOptions
from pipeline.order import MixedOrder

CACHED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Where the stream shows an item: `slot` is the first of its views in micro-batch `micro` of `step`. beyond: after the last step."""

    epoch: int
    position: int
    step: int
    micro: int
    slot: int
    beyond: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One clip of a micro-batch. parameters: plain values (frames, roi, flip, ...). target: shares of classes, the largest first."""

    key: str
    label: str
    position: int
    parameters: dict[str, object]
    target: list[tuple[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """A micro-batch as the model gets it. levels: uint8 (B, T, size, size, 3). digest: SHA-256 of the float32 tensor, as in a trace.

    damaged: what could not be delivered, and what took its place.
    """

    slots: list[Slot]
    levels: npt.NDArray[np.uint8]
    digest: str
    damaged: list[str]


class Training:
    """The stream of `recipe` over `dataset`, which is data.dir's of a mixture.

    Raises DatasetError when the dataset lacks the recipe's split, or it is empty.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset) -> None:
        self.recipe, self._dataset, self._data = recipe, dataset, open_data(recipe, dataset)
        self.rows = self._data.rows[0]
        self._order = MixedOrder(recipe.run.seed, [len(rows) for rows in self._data.rows], self._data.weights)
        self.num_steps = total_steps(recipe, len(self.rows))
        self.num_micro = num_micro_batches(recipe.train.global_batch, recipe.train.micro_batch)
        self._lock = threading.Lock()  # one graph at a time: each has threads and buffers of its own
        self._seen: Cache[Seen] = Cache(CACHED_BYTES, lambda seen: seen.levels.nbytes)

    def first_epoch(self, step: int) -> int:
        """The epoch in which `step` begins."""
        return step * self.recipe.samples_per_step // epoch_length(self.recipe, len(self.rows))

    def uses(self, row: int, first_epoch: int, num: int) -> list[Use]:
        """Where `row` is shown in epochs [first_epoch, first_epoch + num); nowhere when it is not of the train split."""
        sample = int(np.searchsorted(self.rows, row))
        if sample == len(self.rows) or self.rows[sample] != row:
            return []
        epochs = np.arange(first_epoch, first_epoch + num, dtype=np.uint64)
        return [self._use(int(epoch), int(place)) for epoch, place in zip(epochs, self._order.positions(0, sample, epochs), strict=True)]

    def _use(self, epoch: int, position: int) -> Use:
        views = self.recipe.augment.repeats
        step, within = divmod(position, self.recipe.samples_per_step)
        micro, sample = divmod(within, self.recipe.train.micro_batch // views)
        return Use(epoch=epoch, position=position, step=step, micro=micro, slot=sample * views, beyond=step >= self.num_steps)

    def seen(self, step: int, micro: int) -> Seen:
        """Micro-batch `micro` of `step`, 0 <= micro < num_micro. Raises PipelineError as training would."""
        return self._seen.get((step, micro), lambda: self._load(step, micro))

    def _load(self, step: int, micro: int) -> Seen:
        from pipeline.loader import Loader  # torch and DALI, only where a tensor is looked at
        from pipeline.requests import train_requests

        recipe = self.recipe
        batch_size = recipe.train.micro_batch
        options = replace(recipe.loader, decode="cpu", max_damaged=1.0)  # one micro-batch says nothing about a run's budget
        with self._lock:
            requests = train_requests(
                self._data.source, self._data.rows, weights=self._data.weights, seed=recipe.run.seed,
                global_batch=recipe.train.global_batch, micro_batch=batch_size, rank=micro,
                world_size=self.num_micro, start_step=step, end_step=step + 1, clip=recipe.clip, augment=recipe.augment,
            )  # fmt: skip
            with Loader(
                self._data.source, requests, micro_batch=batch_size, clip=recipe.clip, augment=recipe.augment, options=options, threads=1,
                on_damage="substitute",
            ) as loader:  # fmt: skip
                batch = next(loader)
        clips = batch.clips.numpy()
        classes = self._dataset.info.classes
        targets = [[(classes[label], 1.0)] for label in batch.labels.tolist()]
        if batch.targets is not None:
            targets = [
                sorted(((classes[i], x) for i, x in enumerate(row) if x), key=lambda each: -each[1]) for row in batch.targets.tolist()
            ]
        slots = [
            Slot(key=key, label=classes[label], position=int(position), parameters=chosen.as_lists(), target=target)
            for key, label, position, chosen, target in zip(
                batch.keys, batch.labels.tolist(), batch.positions, batch.parameters, targets, strict=True
            )
        ]
        damaged = [f"{each.reason}; '{each.substitute_key}' takes its place" for each in batch.damaged]
        digest = hashlib.sha256(clips.tobytes()).hexdigest()
        return Seen(slots=slots, levels=levels(clips, recipe.augment), digest=digest, damaged=damaged)


def levels(clips: npt.NDArray[np.float32], augment: AugmentOptions) -> npt.NDArray[np.uint8]:
    """(B, 3, T, H, W) normalised -> (B, T, H, W, 3), 0 to 255; beyond that (erasing's noise) is cut."""
    shape = (1, 3, 1, 1, 1)
    mean, std = (np.array(values, dtype=np.float32).reshape(shape) for values in (augment.mean, augment.std))
    whole = np.clip(np.rint(255 * (clips * std + mean)), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(whole.transpose(0, 2, 3, 4, 1))


def png(picture: npt.NDArray[np.uint8]) -> bytes:
    """(H, W, 3) as a PNG file (ISO/IEC 15948): every row unfiltered, one IDAT chunk."""
    height, width, _ = picture.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # the first byte of a row is its filter: 0, none
    rows[:, 1:] = picture.reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 3)), (b"IEND", b""))
    body = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)
