"""Which sample comes when, as pure functions: permutations without memory, and the blend of several datasets.

Owns: the order of the token stream. It depends on nothing but (seed, sample index) and the sizes and weights of the
datasets, so that a longer run, another data-parallel size, another stage or a restart sees the same stream.
Does not own: what a sample contains (``dataset``).

Nothing here uses a library's random generator: their streams may change with a version, a run's data may not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy
from megatron.core.datasets import helpers

from growth_megatron.errors import DataError

MASK = (1 << 64) - 1
ROUNDS = 8
BLEND_PERIOD = 1 << 20

Integer = TypeVar("Integer", int, numpy.ndarray)


def mix(value: Integer) -> Integer:
    """SplitMix64's output function: a fixed, well mixing permutation of 64-bit integers (or a uint64 array of them).

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def key_of(*parts: int) -> int:
    """One 64-bit key from several integers; the order of the parts matters."""
    key = 0
    for part in parts:
        key = mix(key ^ mix(part & MASK))
    return key


def permute(index: int, size: int, key: int) -> int:
    """Image of ``index`` under the permutation of ``range(size)`` that ``key`` selects.

    A balanced Feistel network over the next even number of bits, walked along its cycle until it is within the range
    (Black, Rogaway: Ciphers with arbitrary finite domains, CT-RSA 2002). Needs no memory, whatever the size.
    """
    if not 0 <= index < size:
        raise IndexError(f"index {index} is outside range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for number in range(ROUNDS):
            left, right = right, left ^ (mix(key ^ (number << 56) ^ right) & low)
        index = left << half | right
        if index < size:
            return index


def split_documents(count: int, validation_fraction: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Document numbers for training and for validation, both ascending int32.

    Held-out documents are spread over the whole dataset and depend on the two arguments alone, so runs with different
    seeds are validated on the same text.
    """
    held_out = max(1, round(count * validation_fraction))
    if held_out >= count:
        raise DataError(
            f"validation_fraction {validation_fraction} of {count} document(s) leaves none to train on; "
            "lower it or name data.validation files"
        )
    ranks = numpy.argsort(mix(numpy.arange(count, dtype=numpy.uint64)), kind="stable").astype(numpy.int32)
    return numpy.sort(ranks[held_out:]), numpy.sort(ranks[:held_out])


class Blend:
    """A weighted blend of datasets: sample ``i`` is draw ``k`` of dataset ``d``.

    Megatron's greedy rule (always the dataset that is furthest behind its share) over a period of ``BLEND_PERIOD``
    samples, which then repeats: any index is found at once, and what comes later never changes what came before.
    Shares are rounded to multiples of 1 / ``BLEND_PERIOD``; in binary the greedy rule is then exact on every machine.

    Raises: DataError where a weight is so small that its dataset would never be drawn.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = numpy.array(weights, dtype=numpy.float64) / sum(weights) * BLEND_PERIOD
        counts = numpy.floor(exact).astype(numpy.int64)
        behind = numpy.argsort(counts - exact, kind="stable")
        counts[behind[: BLEND_PERIOD - int(counts.sum())]] += 1
        self._dataset = numpy.zeros(BLEND_PERIOD, dtype=numpy.int16)
        self._draw = numpy.zeros(BLEND_PERIOD, dtype=numpy.int64)
        helpers.build_blending_indices(
            self._dataset, self._draw, counts / BLEND_PERIOD, len(weights), BLEND_PERIOD, False
        )
        self.draws_per_period = numpy.bincount(self._dataset, minlength=len(weights))
        if not self.draws_per_period.all():
            never = int(numpy.argmin(self.draws_per_period))
            raise DataError(
                f"weight {weights[never]} of dataset {never} is less than a millionth of the blend, so it would "
                "never be drawn; raise it or leave the dataset out"
            )

    def locate(self, index: int) -> tuple[int, int]:
        """(dataset, number of the draw from that dataset) of sample ``index`` of the blend."""
        period, within = divmod(index, BLEND_PERIOD)
        dataset = int(self._dataset[within])
        return dataset, period * int(self.draws_per_period[dataset]) + int(self._draw[within])
