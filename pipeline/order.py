"""Which sample a training position shows: a pure function of (seed, number of samples, position).

Training is one endless stream of positions. Position p belongs to epoch p div N and shows sample bijection(seed, epoch)(p mod N), so
every epoch shows each of the N samples once and no permutation is ever stored. The bijection is an alternating Feistel network
on the smallest power of two that holds N; values that fall outside [0, N) walk along their cycle until they are inside
("cycle walking"; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Less than two walks are expected.

A mixture of datasets is the same, twice: a fixed pattern deals positions to datasets in the proportion of their weights, and each dataset
is walked through by an order of its own. So each of its epochs shows each of its samples once, and the state is still one position.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

ORDER_VERSION = 1  # a run may only resume under the version it started with
ROUNDS = 8
MAX_TURNS = 10_000  # of the weights' sum, in lowest terms: the pattern's length

Words: TypeAlias = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
_MASK = (1 << 64) - 1


def mix(values: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of uint64 whose output bits all depend on all input bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Order:
    """The order of `num_samples` samples (at least 1) under `seed` (0 to 2^64 - 1). Raises ValueError outside these ranges."""

    seed: int
    num_samples: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= _MASK:
            raise ValueError(f"seed: got {self.seed}, expected 0 to 2^64 - 1")
        if not 1 <= self.num_samples < 1 << 62:
            raise ValueError(f"num_samples: got {self.num_samples}, expected 1 to 2^62 - 1 (is the split empty?)")

    def locate(self, positions: npt.NDArray[np.uint64] | npt.NDArray[np.int64]) -> tuple[Words, Words]:
        """Where the stream stands at `positions` (any shape, each at least 0).

        Returns (epochs, samples), uint64 of the same shape; samples are in [0, num_samples). Raises ValueError on a negative position.
        """
        if positions.dtype.kind not in "iu" or (positions.size and positions.min() < 0):
            raise ValueError(f"positions: got negative or {positions.dtype} values, expected integers from 0")
        flat = positions.astype(np.uint64).reshape(-1)
        epochs, places = np.divmod(flat, np.uint64(self.num_samples))
        samples = self._permute(epochs, places)
        return epochs.reshape(positions.shape), samples.reshape(positions.shape)

    def positions(self, sample: int, epochs: npt.NDArray[np.uint64]) -> Words:
        """Where `sample` is shown in each of `epochs` (n,): the inverse of `locate`, without a search. uint64 (n,).

        Raises ValueError when `sample` is not in [0, num_samples).
        """
        if not 0 <= sample < self.num_samples:
            raise ValueError(f"sample: got {sample}, expected 0 to {self.num_samples - 1}")
        places = self._permute(epochs, np.full(len(epochs), sample, dtype=np.uint64), backwards=True)
        return epochs * np.uint64(self.num_samples) + places

    def _permute(self, epochs: Words, places: Words, *, backwards: bool = False) -> Words:
        keys = self._round_keys(epochs)  # (ROUNDS, n)
        values = self._feistel(keys, places, backwards)
        outside = np.flatnonzero(values >= self.num_samples)
        while outside.size:
            values[outside] = self._feistel(keys[:, outside], values[outside], backwards)
            outside = outside[values[outside] >= self.num_samples]
        return values

    def _round_keys(self, epochs: Words) -> Words:
        """One key per round and position; a batch spans few epochs, so each epoch's keys are computed once."""
        distinct, inverse = np.unique(epochs, return_inverse=True)
        seeded = mix(np.full(1, (self.seed + _GOLDEN) & _MASK, dtype=np.uint64))
        rounds = np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        keys = mix(mix(seeded ^ distinct)[None, :] + rounds[:, None])
        return np.asarray(keys[:, inverse.reshape(-1)])

    def _feistel(self, keys: Words, values: Words, backwards: bool) -> Words:
        """Even rounds change the low half by the high half, odd rounds the high by the low: invertible for halves of any widths.

        A round undoes itself, so the same rounds in reverse order are the inverse.
        """
        bits = (self.num_samples - 1).bit_length()
        low_bits, high_bits = np.uint64(bits - bits // 2), np.uint64(bits // 2)
        low_mask, high_mask = (np.uint64(1) << low_bits) - np.uint64(1), (np.uint64(1) << high_bits) - np.uint64(1)
        low, high = values & low_mask, values >> low_bits
        for number in range(ROUNDS)[:: -1 if backwards else 1]:
            key = keys[number]
            if number % 2 == 0:
                low = low ^ (mix(high + key) & low_mask)
            else:
                high = high ^ (mix(low + key) & high_mask)
        return (high << low_bits) | low


class MixedOrder:
    """The order of several datasets of `num_samples` samples each, mixed by whole `weights` (at least 1), under `seed`.

    Dataset d has exactly weights[d] of every sum(weights) positions, and in any window its share to within the number of datasets. The
    first is walked through as it would be alone, the others under seeds of their own. Raises ValueError for what does not fit.
    """

    def __init__(self, seed: int, num_samples: Sequence[int], weights: Sequence[int]) -> None:
        if len(num_samples) != len(weights) or not weights or min(weights) < 1:
            raise ValueError(f"weights: got {list(weights)}, expected {len(num_samples)} whole numbers from 1")
        common = math.gcd(*weights)
        self._weights = np.array([weight // common for weight in weights], dtype=np.uint64)
        self._num_turns = int(self._weights.sum())
        if self._num_turns > MAX_TURNS:
            raise ValueError(f"weights: got {list(weights)}, expected a sum of at most {MAX_TURNS} in lowest terms")
        own = [seed, *mix(np.arange(1, len(weights), dtype=np.uint64) * np.uint64(_GOLDEN) ^ np.uint64(seed)).tolist()]
        self._orders = [Order(seed, num) for seed, num in zip(own, num_samples, strict=True)]
        self._turns = _turns(self._weights.tolist())  # which dataset, by place in the pattern
        self._places = [np.flatnonzero(self._turns == part).astype(np.uint64) for part in range(len(weights))]
        self._before = np.zeros(self._num_turns, dtype=np.uint64)  # how many of the same dataset stand before it in the pattern
        for places in self._places:
            self._before[places] = np.arange(len(places), dtype=np.uint64)

    def locate(self, positions: npt.NDArray[np.uint64] | npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Words, Words]:
        """(datasets, epochs, samples) at `positions` (any shape, each at least 0), each of its shape; epochs are of the dataset itself."""
        if positions.dtype.kind not in "iu" or (positions.size and positions.min() < 0):
            raise ValueError(f"positions: got negative or {positions.dtype} values, expected integers from 0")
        rounds, places = np.divmod(positions.astype(np.uint64), np.uint64(self._num_turns))
        parts = self._turns[places]
        own = rounds * self._weights[parts] + self._before[places]
        epochs, samples = np.empty_like(own), np.empty_like(own)
        for part, order in enumerate(self._orders):
            mine = parts == part
            epochs[mine], samples[mine] = order.locate(own[mine])
        return parts, epochs, samples

    def positions(self, part: int, sample: int, epochs: npt.NDArray[np.uint64]) -> Words:
        """Where `sample` of dataset `part` is shown in each of its `epochs` (n,): the inverse of `locate`. uint64 (n,)."""
        own = self._orders[part].positions(sample, epochs)
        rounds, before = np.divmod(own, self._weights[part])
        return rounds * np.uint64(self._num_turns) + self._places[part][before]


def _turns(weights: Sequence[int]) -> npt.NDArray[np.int64]:
    """The pattern, (sum(weights),): each dataset's turns in the middles of equal parts of it, so that all are spread evenly."""
    middles = [(Fraction(2 * turn + 1, weight), part) for part, weight in enumerate(weights) for turn in range(weight)]
    return np.array([part for _, part in sorted(middles)], dtype=np.int64)
