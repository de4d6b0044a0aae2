"""Promise 3's arithmetic: every micro-batch belongs to exactly one rank, whatever the world size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import TopologyError
from cluster.topology import check_world_size, largest_world_size, micro_batches_of, num_micro_batches, world_sizes


@given(st.integers(1, 600))
def test_every_world_size_covers_each_micro_batch_once(total: int) -> None:
    for size in world_sizes(total):
        shares = [list(micro_batches_of(rank, size, total)) for rank in range(size)]
        assert sorted(micro for share in shares for micro in share) == list(range(total))
        assert {len(share) for share in shares} == {total // size}


@given(st.integers(1, 600), st.integers(1, 700))
def test_the_largest_world_size_divides_and_fits(total: int, available: int) -> None:
    size = largest_world_size(total, available)
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
    with pytest.raises(TopologyError, match=r"launch\.cpus_per_worker"):
        largest_world_size(8, 0)
    with pytest.raises(TopologyError, match="Rank 2"):
        micro_batches_of(2, 2, 8)
