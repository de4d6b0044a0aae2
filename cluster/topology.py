"""Ranks and batch arithmetic. The micro-batch is the unit of numerics: a global batch is A of them, whatever the world size.

A rank of a gang of W runs A/W micro-batches a step by accumulation, rank r those numbered r, r + W, r + 2W, ...; so W must
divide A, and nothing that happens inside one micro-batch (batch-norm statistics, dropout, mixing) can depend on W.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import LaunchError, TopologyError
from cluster.options import LaunchOptions

SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of a CPU that a worker may reserve on Ray when the recipe does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """What one process of a gang knows of its place.

    rank, world_size: in the gang. local_rank, local_world_size: among the gang's workers on this machine.
    device: "cpu" or "cuda:<index>". threads: compute threads of this process. attempt: number of the gang in this run
    folder, the fencing token of whatever it commits (see `lease`).
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: str
    threads: int
    attempt: int


def num_micro_batches(global_batch: int, micro_batch: int) -> int:
    """A: micro-batches in a global batch, both in samples. Raises TopologyError unless one divides the other."""
    if global_batch < 1 or micro_batch < 1:
        raise TopologyError(f"train.global_batch ({global_batch}) and train.micro_batch ({micro_batch}) must be at least 1.")
    if global_batch % micro_batch:
        fitting = [size for size in range(1, global_batch + 1) if global_batch % size == 0]
        nearest = min(fitting, key=lambda size: (abs(size - micro_batch), size))
        raise TopologyError(
            f"train.global_batch ({global_batch}) is not a multiple of train.micro_batch ({micro_batch}). "
            f"Set train.micro_batch={nearest}, or train.global_batch={global_batch - global_batch % micro_batch + micro_batch}."
        )
    return global_batch // micro_batch


def world_sizes(num_micro_batches: int) -> list[int]:
    """The numbers of workers that can share a global batch: the divisors of A, ascending."""
    return [size for size in range(1, num_micro_batches + 1) if num_micro_batches % size == 0]


def largest_world_size(num_micro_batches: int, options: LaunchOptions, available: int) -> int:
    """The largest allowed number of workers for which there are `available` places. Raises LaunchError when not even the fewest fit."""
    sizes = allowed_sizes(num_micro_batches, options)
    fitting = [size for size in sizes if size <= available]
    if not fitting:
        raise LaunchError(
            f"launch.workers: not even {sizes[0]} fit this machine, which has places for {available}. "
            "Lower launch.workers or launch.cpus_per_worker."
        )
    return fitting[-1]


def check_world_size(num_micro_batches: int, world_size: int) -> None:
    """Raises TopologyError, naming the sizes that would do, unless `world_size` divides A."""
    if world_size < 1 or num_micro_batches % world_size:
        raise TopologyError(
            f"launch.workers={world_size} does not divide the {num_micro_batches} micro-batches of a global batch "
            f"(train.global_batch / train.micro_batch). Possible: {', '.join(map(str, world_sizes(num_micro_batches)))}."
        )


def allowed_sizes(num_micro_batches: int, options: LaunchOptions) -> list[int]:
    """The numbers of workers that `launch.workers` allows and that divide A, ascending. Raises TopologyError when there are none."""
    if options.fewest == options.most:
        check_world_size(num_micro_batches, options.fewest)
    sizes = [size for size in world_sizes(num_micro_batches) if options.fewest <= size <= (options.most or size)]
    if not sizes:
        raise TopologyError(
            f"launch.workers=[{options.fewest},{options.most}]: no number between these divides the {num_micro_batches} micro-batches of a "
            f"global batch (train.global_batch / train.micro_batch). Possible: {', '.join(map(str, world_sizes(num_micro_batches)))}."
        )
    return sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Of a gang on a cluster: its sizes that fit, largest first; CPUs that each worker reserves; how many workers there is a place for."""

    sizes: list[int]
    cpus_each: float
    places: int


def fit_workers(num_micro_batches: int, options: LaunchOptions, nodes: Sequence[tuple[float, int]]) -> Fit:
    """How a gang fits nodes with so many (CPUs, GPUs) each; one GPU a worker where there are any.

    Raises TopologyError when no allowed number of workers divides A, LaunchError when not even the fewest fit, node by node.
    """
    allowed = allowed_sizes(num_micro_batches, options)
    total_cpus, total_gpus = sum(cpus for cpus, _ in nodes), sum(gpus for _, gpus in nodes)

    def room(cpus_each: float) -> int:
        return sum(min(int(cpus / cpus_each), gpus if total_gpus else sys.maxsize) for cpus, gpus in nodes)

    wish = float(options.cpus_per_worker)
    # Without a wish for CPUs, GPUs are what counts where there are any, else a CPU a worker; or less, if even the fewest would not fit.
    places = room(wish or (SHARES[-1] if total_gpus else SHARES[0]))
    wanted = max((size for size in allowed if size <= places), default=allowed[0])
    # And little is reserved: each worker uses its share of the machine it lands on, one per machine while there are any.
    cpus_each = wish or next((share for share in SHARES if room(share) >= wanted), SHARES[0])
    sizes = [size for size in reversed(allowed) if size <= min(wanted, room(cpus_each))]
    if not sizes:
        raise LaunchError(
            f"launch.workers={allowed[0]} with {cpus_each:g} CPUs each do not fit the Ray cluster, which has {total_cpus:g} CPUs and "
            f"{total_gpus} GPUs on {len(nodes)} nodes. Lower launch.workers or launch.cpus_per_worker."
        )
    return Fit(sizes=sizes, cpus_each=cpus_each, places=places)


def micro_batches_of(rank: int, world_size: int, num_micro_batches: int) -> range:
    """Numbers, in [0, A), of the micro-batches that `rank` runs in every step, in its order."""
    check_world_size(num_micro_batches, world_size)
    if not 0 <= rank < world_size:
        raise TopologyError(f"Rank {rank} is outside a gang of {world_size}.")
    return range(rank, num_micro_batches, world_size)
