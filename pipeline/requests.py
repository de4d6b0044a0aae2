"""The stream as a plan: which micro-batches a rank runs, of which samples, with which clip parameters.

Everything comes from the order, the keys and the index's columns, before a byte of video is read; so the stream of a whole run can be
simulated without decoding. World size only decides which rank runs a micro-batch, never what is in it.
"""

import itertools
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.augmentation import Mix, draw_augmentation, draw_mix
from pipeline.errors import DatasetError
from pipeline.index import Dataset
from pipeline.keyed import MIDDLE, ClipParameters, View, clip_parameters, view_parameters
from pipeline.mixture import Mixture
from pipeline.options import AugmentOptions, ClipOptions
from pipeline.order import MixedOrder

Rows: TypeAlias = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatchRequest:
    """The smallest unit of work of a rank, B samples.

    step: the optimizer step (training), or the round of all ranks (evaluation). micro: number of the micro-batch within its global
    batch (training) or within all evaluated views; -1 for one that only keeps the ranks in step. rows: (B,) rows of the index.
    positions: (B,) in the training stream, or (evaluation) i * V + v for view v of V of the i-th evaluated row. parameters: B of them.
    valid: (B,), False where a slot only fills up. seed, pools: what substitutes are drawn by and from, by the number of the dataset in
    which the damaged sample lies; `pools` is None where nothing may be substituted, which is evaluation. views: slots come in runs of so
    many that share row, position, frames and validity, and are decoded once. mix: how the micro-batch's clips are mixed when they are
    done; None: not.
    """

    step: int
    micro: int
    rows: Rows
    positions: npt.NDArray[np.int64]
    parameters: list[ClipParameters]
    valid: npt.NDArray[np.bool_]
    seed: int = 0
    pools: Sequence[Rows] | None = None
    views: int = 1
    mix: Mix | None = None


def check_base_layer(dataset: Dataset, clip: ClipOptions) -> None:
    """Raises DatasetError where `clip` starts at base frames and the dataset's videos have none."""
    if clip.starts == "base" and not dataset.info.is_layered:
        raise DatasetError(
            f"{dataset.where}: clip.starts is 'base', but its videos have no base layer. Build it with data.encode.form=layered in another "
            "data.dir, or set clip.starts=any."
        )


def check_keyframes(dataset: Dataset, clip: ClipOptions, augment: AugmentOptions) -> None:
    """Raises DatasetError where items are keyframes and a clip would not be around one, or its boxes not where its pixels are."""
    if dataset.info.boxes is None:
        return
    wanted = {
        "clip.sampling": ("dense", clip.sampling),
        "clip.starts": ("any", clip.starts),
        "augment.randaugment": (None, augment.randaugment),  # it turns, shears and shifts pixels
        "augment.mix": (None, augment.mix),
    }
    for key, (expected, got) in wanted.items():
        if got != expected:
            value = "null" if expected is None else expected
            raise DatasetError(f"{dataset.where} has keyframes with boxes, for which {key} must be {value}. Set {key}={value}.")


class Planner:
    """Clip parameters of a dataset's rows; holds zero-copy views of columns, no rows of its own.

    Raises DatasetError where the clips need a base layer and the dataset's videos have none, or do not go with keyframes.
    """

    def __init__(self, dataset: Dataset | Mixture, clip: ClipOptions, augment: AugmentOptions) -> None:
        for part in dataset.parts:
            check_base_layer(part, clip)
            check_keyframes(part, clip, augment)
        if len(dataset.parts) > 1 and any(part.info.boxes is not None for part in dataset.parts):
            raise DatasetError("Datasets of keyframes cannot be mixed with others. Build one dataset of all their label files.")
        self._clip, self._augment = clip, augment
        self._columns = [dataset.column(name) for name in ("begin", "end", "fps", "width", "height")]
        self._keyframes = None if dataset.info.boxes is None else dataset.column("keyframe")

    def evaluation(self, row: int, view: View = MIDDLE) -> ClipParameters:
        """Of one fixed view of `row`."""
        begin, end, fps, width, height = (column[row].item() for column in self._columns)
        return view_parameters(
            view,
            num_frames=end - begin,
            fps=fps,
            width=width,
            height=height,
            clip=self._clip,
            augment=self._augment,
            begin=begin,
            keyframe=self._keyframe(row, begin),
        )

    def training(self, row: int, *, seed: int, position: int, view: int = 0) -> ClipParameters:
        """Of a view of the random clip that `position` of the stream under `seed` takes of `row`."""
        begin, end, fps, width, height = (column[row].item() for column in self._columns)
        parameters = clip_parameters(
            seed,
            position,
            num_frames=end - begin,
            fps=fps,
            width=width,
            height=height,
            clip=self._clip,
            augment=self._augment,
            training=True,
            view=view,
            begin=begin,
            keyframe=self._keyframe(row, begin),
        )
        augmentation = draw_augmentation(self._augment, self._clip.num_frames, seed=seed, position=position, view=view)
        return parameters if augmentation is None else replace(parameters, augmentation=augmentation)

    def _keyframe(self, row: int, begin: int) -> int | None:
        """Of the item, from its first frame."""
        return None if self._keyframes is None else self._keyframes[row].item() - begin


def train_requests(
    dataset: Dataset | Mixture,
    rows: Rows | Sequence[Rows],
    *,
    weights: Sequence[int] = (1,),
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    start_step: int,
    end_step: int,
    clip: ClipOptions,
    augment: AugmentOptions,
) -> Iterator[MicroBatchRequest]:
    """What `rank` runs in steps [start_step, end_step), in order; `rows` (n,) are the samples of the order, at least one.

    Of a mixture, `rows` are those of each of its datasets, and `weights` their shares.

    Step k is positions [k*B, (k+1)*B) of the endless stream with B = global_batch; its micro-batch m is b = micro_batch of them from
    k*B + m*b, and rank r runs m = r, r + world_size, ... With V = augment.repeats views of each sample, B and b are global_batch and
    micro_batch divided by V. Raises ValueError when global batch, micro-batch, V and world size do not divide.
    """
    views = augment.repeats
    if global_batch % micro_batch or (global_batch // micro_batch) % world_size:
        raise ValueError(
            f"global_batch {global_batch}, micro_batch {micro_batch}, world size {world_size}: expected a whole number of "
            "micro-batches in the global batch, and the same number for every rank"
        )
    if micro_batch % views:
        raise ValueError(f"augment.repeats: got {views}, expected a divisor of the micro-batch ({micro_batch})")
    _check_rank(rank, world_size)
    pools = [rows] if isinstance(rows, np.ndarray) else list(rows)
    order, planner = MixedOrder(seed, [len(pool) for pool in pools], weights), Planner(dataset, clip, augment)
    for step in range(start_step, end_step):
        for micro in range(rank, global_batch // micro_batch, world_size):
            first = (step * global_batch + micro * micro_batch) // views
            positions = np.arange(first, first + micro_batch // views, dtype=np.int64).repeat(views)
            parts, _, samples = order.locate(positions)
            chosen = np.empty(len(positions), dtype=np.uint32)
            for part, pool in enumerate(pools):
                chosen[parts == part] = pool[samples[parts == part]]
            slots = zip(chosen.tolist(), positions.tolist(), itertools.cycle(range(views)), strict=False)
            yield MicroBatchRequest(
                step=step,
                micro=micro,
                rows=chosen,
                positions=positions,
                parameters=[planner.training(row, seed=seed, position=place, view=view) for row, place, view in slots],
                valid=np.ones(micro_batch, dtype=np.bool_),
                seed=seed,
                pools=pools,
                views=views,
                mix=draw_mix(augment.mix, augment.size, positions, views=views, seed=seed) if augment.mix else None,
            )


def eval_requests(
    dataset: Dataset,
    rows: Rows,
    *,
    micro_batch: int,
    rank: int,
    world_size: int,
    clip: ClipOptions,
    augment: AugmentOptions,
    views: Sequence[View] = (MIDDLE,),
    skip: Container[int] = (),
) -> Iterator[MicroBatchRequest]:
    """What `rank` evaluates: each of the V `views` of `rows` (n,) once over all ranks, the same number of micro-batches for every rank.

    Position p is view p mod V of row p div V; micro-batch j holds positions [j*b, (j+1)*b) with b = micro_batch, whatever the world size,
    so the views of a row may lie in two. Micro-batches in `skip` are done already; the others are dealt round robin. The last
    micro-batch, and ranks that ran out of work, repeat the last position with `valid` False.
    """
    _check_rank(rank, world_size)
    planner, num_views = Planner(dataset, clip, augment), len(views)
    num_slots = len(rows) * num_views
    remaining = [micro for micro in range(-(-num_slots // micro_batch)) if micro not in skip]
    for step in range(-(-len(remaining) // world_size)):
        place = step * world_size + rank
        micro = remaining[place] if place < len(remaining) else -1
        first = micro * micro_batch if micro >= 0 else num_slots  # a dummy lies wholly beyond the last view
        slots = np.arange(first, first + micro_batch, dtype=np.int64)
        positions = np.minimum(slots, num_slots - 1)
        chosen = rows[positions // num_views]
        pairs = zip(chosen.tolist(), (positions % num_views).tolist(), strict=True)
        yield MicroBatchRequest(
            step=step,
            micro=micro,
            rows=chosen,
            positions=positions,
            parameters=[planner.evaluation(row, views[view]) for row, view in pairs],
            valid=slots < num_slots,
        )


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank}: expected 0 to {world_size - 1}, below the world size")
