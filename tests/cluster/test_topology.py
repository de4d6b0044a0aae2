"""Promise 3's arithmetic: every micro-batch belongs to exactly one rank, whatever the world size."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import LaunchError, TopologyError
from cluster.options import LaunchOptions
from cluster.topology import check_world_size, fit_workers, largest_world_size, micro_batches_of, num_micro_batches, world_sizes


@given(st.integers(1, 600))
def test_every_world_size_covers_each_micro_batch_once(total: int) -> None:
    for size in world_sizes(total):
        shares = [list(micro_batches_of(rank, size, total)) for rank in range(size)]
        assert sorted(micro for share in shares for micro in share) == list(range(total))
        assert {len(share) for share in shares} == {total // size}


@given(st.integers(1, 600), st.integers(1, 700))
def test_the_largest_world_size_divides_and_fits(total: int, available: int) -> None:
    size = largest_world_size(total, LaunchOptions(), available)
    assert total % size == 0
    assert size <= available
    assert not any(total % larger == 0 for larger in range(size + 1, min(available, total) + 1))


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_global_batch_is_whole_micro_batches_or_refused(micro_batch: int, count: int) -> None:
    assert num_micro_batches(micro_batch * count, micro_batch) == count
    if micro_batch > 1:
        with pytest.raises(TopologyError, match=r"train\.micro_batch=\d+"):
            num_micro_batches(micro_batch * count + 1, micro_batch)


def test_refusals_name_the_recipe_key_and_what_would_do() -> None:
    with pytest.raises(TopologyError, match=r"train\.global_batch \(0\)"):
        num_micro_batches(0, 4)
    with pytest.raises(TopologyError, match=r"launch\.workers=5 does not divide the 8 .* Possible: 1, 2, 4, 8\."):
        check_world_size(8, 5)
    with pytest.raises(LaunchError, match=r"launch\.cpus_per_worker"):
        largest_world_size(8, LaunchOptions(), 0)
    with pytest.raises(TopologyError, match=r"launch\.workers=\[3,3\]: .* divides the 8 .* Possible: 1, 2, 4, 8\.|does not divide"):
        largest_world_size(8, LaunchOptions(workers=(3, 3)), 8)
    with pytest.raises(TopologyError, match=r"launch\.workers=\[5,7\]: no number between these divides the 8 "):
        largest_world_size(8, LaunchOptions(workers=(5, 7)), 8)
    with pytest.raises(ValueError, match=r"workers: got \(3, 2\)"):
        LaunchOptions(workers=(3, 2))
    with pytest.raises(TopologyError, match="Rank 2"):
        micro_batches_of(2, 2, 8)


@pytest.mark.parametrize(
    ("options", "nodes", "expected"),
    [
        ({"workers": "auto"}, [(4, 0)], (4, 1.0)),
        ({"workers": "auto", "cpus_per_worker": 2}, [(3, 0), (3, 0)], (2, 2.0)),  # not 3: no node has room for a second one
        ({"workers": "auto"}, [(1, 4), (1, 4)], (8, 0.25)),  # GPUs count, CPUs are shared
        ({"workers": "auto", "cpus_per_worker": 2}, [(4, 8)], (2, 2.0)),
        ({"workers": 4}, [(1, 0), (1, 0)], (4, 0.5)),
        ({"workers": 2}, [(8, 0), (8, 0)], (2, 1.0)),
        ({"workers": (2, 8)}, [(1, 0), (1, 0), (1, 0)], (2, 1.0)),  # 4 would need a fourth CPU
        ({"workers": (2, 8)}, [(1, 0)], (2, 0.5)),  # the fewest share it
        ({"workers": (1, 4)}, [(8, 8), (8, 8)], (4, 1.0)),
    ],
)
def test_workers_fit_node_by_node(options: dict[str, Any], nodes: list[tuple[float, int]], expected: tuple[int, float]) -> None:
    fit = fit_workers(8, LaunchOptions(**options), nodes)
    assert (fit.sizes[0], fit.cpus_each) == expected


def test_smaller_gangs_are_offered_down_to_the_fewest_and_empty_places_are_counted() -> None:
    fit = fit_workers(12, LaunchOptions(workers=(2, 6)), [(1, 0)] * 5)
    assert (fit.sizes, fit.places) == ([4, 3, 2], 5)


def test_workers_that_fit_the_sum_but_no_node_are_refused() -> None:
    with pytest.raises(
        LaunchError, match=r"launch\.workers=2 with 2 CPUs each do not fit the Ray cluster, which has 3 CPUs and 0 GPUs on 3 nodes"
    ):
        fit_workers(8, LaunchOptions(workers=2, cpus_per_worker=2), [(1, 0)] * 3)
    with pytest.raises(LaunchError, match=r"launch\.workers=4 .* 2 GPUs"):
        fit_workers(8, LaunchOptions(workers=4), [(16, 2)])
