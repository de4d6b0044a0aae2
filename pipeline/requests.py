"""The stream as a plan: which micro-batches a rank runs, of which samples, with which clip parameters.

Everything comes from the order, the keys and the index's columns, before a byte of video is read; so the stream of a whole run can be
simulated without decoding. World size only decides which rank runs a micro-batch, never what is in it.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.index import Dataset
from pipeline.keyed import ClipParameters, clip_parameters
from pipeline.options import AugmentOptions, ClipOptions
from pipeline.order import Order

Rows: TypeAlias = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatchRequest:
    """The smallest unit of work of a rank, B samples.

    step: the optimizer step (training), or the round of all ranks (evaluation). micro: number of the micro-batch within its global
    batch (training) or within the evaluated rows; -1 for one that only keeps the ranks in step. rows: (B,) rows of the index.
    positions: (B,) in the training stream, or within the evaluated rows. parameters: B of them. valid: (B,), False where a slot
    only fills up. seed, pool: what substitutes are drawn by and from; `pool` is None where nothing may be substituted.
    """

    step: int
    micro: int
    rows: Rows
    positions: npt.NDArray[np.int64]
    parameters: list[ClipParameters]
    valid: npt.NDArray[np.bool_]
    seed: int = 0
    pool: Rows | None = None


class Planner:
    """Clip parameters of a dataset's rows; holds zero-copy views of five columns, no rows of its own."""

    def __init__(self, dataset: Dataset, clip: ClipOptions, augment: AugmentOptions) -> None:
        self._clip, self._augment = clip, augment
        self._columns = [dataset.column(name) for name in ("begin", "end", "fps", "width", "height")]

    def training(self, row: int, *, seed: int, position: int) -> ClipParameters:
        """Of the random clip that `position` of the stream under `seed` takes of `row`."""
        return self._parameters(row, seed, position, training=True)

    def evaluation(self, row: int) -> ClipParameters:
        """Of the one fixed clip of `row`."""
        return self._parameters(row, 0, 0, training=False)

    def _parameters(self, row: int, seed: int, position: int, *, training: bool) -> ClipParameters:
        begin, end, fps, width, height = (column[row].item() for column in self._columns)
        return clip_parameters(
            seed,
            position,
            num_frames=end - begin,
            fps=fps,
            width=width,
            height=height,
            clip=self._clip,
            augment=self._augment,
            training=training,
        )


def train_requests(
    dataset: Dataset,
    rows: Rows,
    *,
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

    Step k is positions [k*B, (k+1)*B) of the endless stream with B = global_batch; its micro-batch m is b = micro_batch of them from
    k*B + m*b, and rank r runs m = r, r + world_size, ... Raises ValueError when B, b and world_size do not divide.
    """
    if global_batch % micro_batch or (global_batch // micro_batch) % world_size:
        raise ValueError(
            f"global_batch {global_batch}, micro_batch {micro_batch}, world size {world_size}: expected a whole number of "
            "micro-batches in the global batch, and the same number for every rank"
        )
    _check_rank(rank, world_size)
    order, planner = Order(seed, len(rows)), Planner(dataset, clip, augment)
    for step in range(start_step, end_step):
        for micro in range(rank, global_batch // micro_batch, world_size):
            first = step * global_batch + micro * micro_batch
            positions = np.arange(first, first + micro_batch, dtype=np.int64)
            chosen = rows[order.locate(positions)[1]]
            pairs = zip(chosen.tolist(), positions.tolist(), strict=True)
            yield MicroBatchRequest(
                step=step,
                micro=micro,
                rows=chosen,
                positions=positions,
                parameters=[planner.training(row, seed=seed, position=place) for row, place in pairs],
                valid=np.ones(micro_batch, dtype=np.bool_),
                seed=seed,
                pool=rows,
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
    skip: Container[int] = (),
) -> Iterator[MicroBatchRequest]:
    """What `rank` evaluates: each of `rows` (n,) once over all ranks, the same number of micro-batches for every rank.

    Micro-batch j holds items [j*b, (j+1)*b) of `rows` with b = micro_batch, whatever the world size. Those in `skip` are done already;
    the others are dealt round robin. The last micro-batch, and ranks that ran out of work, repeat the last item with `valid` False.
    """
    _check_rank(rank, world_size)
    planner, num_items = Planner(dataset, clip, augment), len(rows)
    remaining = [micro for micro in range(-(-num_items // micro_batch)) if micro not in skip]
    for step in range(-(-len(remaining) // world_size)):
        place = step * world_size + rank
        micro = remaining[place] if place < len(remaining) else -1
        first = micro * micro_batch if micro >= 0 else num_items  # a dummy lies wholly beyond the last item
        slots = np.arange(first, first + micro_batch, dtype=np.int64)
        positions = np.minimum(slots, num_items - 1)
        chosen = rows[positions]
        yield MicroBatchRequest(
            step=step,
            micro=micro,
            rows=chosen,
            positions=positions,
            parameters=[planner.evaluation(row) for row in chosen.tolist()],
            valid=slots < num_items,
        )


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank}: expected 0 to {world_size - 1}, below the world size")
