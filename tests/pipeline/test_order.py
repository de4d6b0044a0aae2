"""Promise 1: order is a pure function of (seed, number of samples, position), and every epoch is a permutation."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import ORDER_VERSION, MixedOrder, Order

SEEDS = st.integers(0, 2**64 - 1)


def samples_of(order: Order, epoch: int) -> list[int]:
    first = epoch * order.num_samples
    return order.locate(np.arange(first, first + order.num_samples, dtype=np.int64))[1].tolist()


def test_golden_values() -> None:
    """Resumed runs depend on these numbers: they change only together with ORDER_VERSION."""
    assert ORDER_VERSION == 1
    assert samples_of(Order(0, 10), 0) == [7, 3, 4, 0, 8, 1, 9, 5, 2, 6]
    epochs, samples = Order(7, 300_000).locate(np.array([0, 1, 299_999, 300_000, 2**40], dtype=np.int64))
    assert epochs.tolist() == [0, 0, 0, 1, 2**40 // 300_000]
    assert samples.tolist() == [297015, 27546, 36324, 193626, 236232]


@settings(deadline=None)
@given(seed=SEEDS, num_samples=st.integers(1, 700), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(seed: int, num_samples: int, epoch: int) -> None:
    assert sorted(samples_of(Order(seed, num_samples), epoch)) == list(range(num_samples))


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 7, 8, 9, 2**16 - 1, 2**16, 2**16 + 1])
def test_edges_of_the_powers_of_two(num_samples: int) -> None:
    assert np.array_equal(np.sort(samples_of(Order(3, num_samples), 5)), np.arange(num_samples))


@settings(deadline=None)
@given(seed=SEEDS, num_samples=st.integers(1, 2**61), positions=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20))
def test_a_position_alone_equals_the_position_in_a_batch(seed: int, num_samples: int, positions: list[int]) -> None:
    order = Order(seed, num_samples)
    epochs, samples = order.locate(np.array(positions, dtype=np.uint64))
    assert epochs.tolist() == [position // num_samples for position in positions]
    assert samples.max() < num_samples
    for place, position in enumerate(positions):
        assert order.locate(np.array([position], dtype=np.uint64))[1][0] == samples[place]


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(samples_of(Order(seed, 50), epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


@pytest.mark.parametrize("num_samples", [5, 12, 100])
def test_every_place_shows_every_sample_equally_often(num_samples: int) -> None:
    """Chi-square per place over 4,000 epochs; 6 standard deviations are allowed."""
    epochs = 4000
    shown = np.array([Order(1, num_samples).locate(np.arange(epochs * num_samples, dtype=np.int64))[1]]).reshape(epochs, num_samples)
    for place in range(num_samples):
        counts = np.bincount(shown[:, place].astype(np.int64), minlength=num_samples)
        chi_square = ((counts - epochs / num_samples) ** 2).sum() / (epochs / num_samples)
        assert chi_square < (num_samples - 1) + 6 * np.sqrt(2 * (num_samples - 1))


def test_neighbours_are_scattered() -> None:
    """The correlation of position and sample, and of one sample and the next, is that of a random order."""
    samples = Order(2, 10**5).locate(np.arange(10**5, dtype=np.int64))[1].astype(np.float64)
    assert abs(np.corrcoef(np.arange(10**5), samples)[0, 1]) < 0.02
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 0.02


@pytest.mark.parametrize(("seed", "num_samples"), [(-1, 5), (2**64, 5), (0, 0), (0, -3)])
def test_bad_arguments(seed: int, num_samples: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        Order(seed, num_samples)


@pytest.mark.parametrize("positions", [np.array([-1]), np.array([0.5])])
def test_bad_positions(positions: np.ndarray) -> None:
    with pytest.raises(ValueError, match="positions"):
        Order(0, 5).locate(positions)


@settings(deadline=None, max_examples=3)
@given(num_samples=st.sampled_from([10**3, 10**5, 10**7]))
def test_a_batch_takes_milliseconds_at_any_size(num_samples: int) -> None:
    """Under 5 ms for a global batch of 1,024; no permutation of 10^7 could be made in that time."""
    order, times = Order(1, num_samples), []
    for step in range(10):
        positions = np.arange(step * 1024, (step + 1) * 1024, dtype=np.int64)
        began = time.perf_counter()
        order.locate(positions)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.005


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    data=st.data(),
)
def test_a_mixture_is_exact(seed: int, sizes: list[int], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 12), min_size=len(sizes), max_size=len(sizes)))
    order, common = MixedOrder(seed, sizes, weights), math.gcd(*weights)
    turns, share = sum(weights) // common, [weight // common for weight in weights]
    begin = data.draw(st.integers(0, 3 * turns))
    positions = np.arange(begin + 8 * turns, dtype=np.int64)
    parts, epochs, samples = order.locate(positions)
    # Exact in every whole pattern, wherever it begins; in any window to within the number of datasets.
    assert np.bincount(parts[begin : begin + turns], minlength=len(sizes)).tolist() == share
    end = data.draw(st.integers(begin, len(positions)))
    counts = np.bincount(parts[begin:end], minlength=len(sizes))
    assert np.all(np.abs(counts - (end - begin) * np.array(share) / turns) < max(2, len(sizes)))
    for part, size in enumerate(sizes):
        # Nothing is lost or repeated within an epoch of each dataset, and its epochs follow each other.
        mine = parts == part
        own = np.arange(mine.sum())
        assert epochs[mine].tolist() == (own // size).tolist()
        for epoch in range(len(own) // size):
            assert sorted(samples[mine][epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
        # What is shown where can be asked backwards.
        sample = data.draw(st.integers(0, size - 1))
        places = order.positions(part, sample, np.arange(3, dtype=np.uint64)).astype(np.int64)
        found = order.locate(places)
        assert [(int(a), int(b), int(c)) for a, b, c in zip(*found, strict=True)] == [(part, epoch, sample) for epoch in range(3)]
    # Any cut of the stream is the stream: what a rank or a resumed run asks for does not depend on what was asked before.
    again = order.locate(positions[end:])
    assert all(np.array_equal(a[end:], b) for a, b in zip((parts, epochs, samples), again, strict=True))


def test_a_mixture_of_one_is_the_plain_order() -> None:
    positions = np.arange(1000, dtype=np.int64)
    plain, mixed = Order(7, 123).locate(positions), MixedOrder(7, [123], [5]).locate(positions)
    assert np.array_equal(plain[0], mixed[1])
    assert np.array_equal(plain[1], mixed[2])
    first = MixedOrder(7, [123, 40], [1, 1]).locate(2 * positions)
    assert np.array_equal(first[2], plain[1])  # the first of several is walked through as it would be alone
    assert np.all(first[0] == 0)


def test_the_golden_mixture() -> None:
    """These values are part of ORDER_VERSION: a run resumes only where they are the same."""
    parts, _, samples = MixedOrder(1, [10, 7, 5], [3, 2, 1]).locate(np.arange(12))
    assert parts.tolist() == [0, 1, 0, 2, 1, 0, 0, 1, 0, 2, 1, 0]
    assert samples.tolist() == [2, 1, 0, 4, 6, 8, 5, 0, 4, 2, 4, 1]


@pytest.mark.parametrize(("sizes", "weights"), [([3], []), ([3, 4], [1]), ([3, 4], [1, 0]), ([3, 4], [1, 10_007])])
def test_weights_that_do_not_fit_are_refused(sizes: list[int], weights: list[int]) -> None:
    with pytest.raises(ValueError, match="weights: got"):
        MixedOrder(0, sizes, weights)
