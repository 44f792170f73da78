"""Permutations, keys, the document split and the blend, without any data."""

from __future__ import annotations

import itertools

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets import helpers

from growth_megatron.data import order
from growth_megatron.data.order import Blend, key_of, mix, permute, split_documents
from growth_megatron.errors import DataError


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permute_reaches_any_size_and_keeps_its_values() -> None:
    # Written down so that no change of code or library can move a run's data without being noticed.
    assert [permute(index, 10, key_of(1234, 0, 0)) for index in range(10)] == [3, 8, 1, 0, 4, 2, 9, 5, 7, 6]
    assert permute(10**12 - 1, 10**12, key_of(1)) < 10**12
    with pytest.raises(IndexError):
        permute(10, 10, 0)


def test_permute_spreads_evenly() -> None:
    """Each position takes each value equally often over many keys (chi-squared, 99 degrees of freedom a position)."""
    size, keys = 100, 4000
    counts = numpy.zeros((size, size))
    for key in range(keys):
        for index in range(0, size, 10):
            counts[index, permute(index, size, key_of(key))] += 1
    expected = keys / size
    statistic = ((counts[::10] - expected) ** 2 / expected).sum(axis=1)
    assert (statistic > 50).all()
    assert (statistic < 170).all()


def test_consecutive_indices_are_not_correlated() -> None:
    image = numpy.array([permute(index, 5000, key_of(7)) for index in range(5000)])
    assert abs(numpy.corrcoef(image[:-1], image[1:])[0, 1]) < 0.06
    assert abs(numpy.corrcoef(image, numpy.arange(5000))[0, 1]) < 0.06


def test_epochs_datasets_and_seeds_have_different_orders() -> None:
    keys = [(seed, dataset, epoch) for seed in range(3) for dataset in range(3) for epoch in range(3)]
    orders = {tuple(permute(index, 50, key_of(*key)) for index in range(50)) for key in keys}
    assert len(orders) == len(keys)


def test_mix_of_an_array_is_mix_of_its_numbers() -> None:
    values = [0, 1, 2**32, 2**63, 2**64 - 1]
    assert mix(numpy.array(values, dtype=numpy.uint64)).tolist() == [mix(value) for value in values]


@given(count=st.integers(2, 400), fraction=st.floats(0.001, 0.5))
def test_split_is_a_partition_with_the_share_asked_for(count: int, fraction: float) -> None:
    train, held_out = split_documents(count, fraction)
    assert sorted([*train, *held_out]) == list(range(count))
    assert len(held_out) == max(1, round(count * fraction))
    assert numpy.all(numpy.diff(train) > 0)


def test_split_that_leaves_nothing() -> None:
    with pytest.raises(DataError, match="leaves none to train on"):
        split_documents(1, 0.1)


def test_blend_is_megatrons_greedy_rule() -> None:
    weights = [5 / 8, 2 / 8, 1 / 8]  # multiples of 1 / BLEND_PERIOD, so shares are not rounded
    size = 5000
    dataset, draw = numpy.zeros(size, dtype=numpy.int16), numpy.zeros(size, dtype=numpy.int64)
    helpers.build_blending_indices(dataset, draw, numpy.array(weights), 3, size, False)
    blend = Blend([5, 2, 1])
    assert [blend.locate(index) for index in range(size)] == list(zip(dataset.tolist(), draw.tolist(), strict=True))


@pytest.mark.parametrize("weights", [(3, 1.5, 0.7), (1, 1, 1), (0.9, 0.05, 0.03, 0.02)])
def test_every_prefix_of_a_blend_follows_the_weights(weights: tuple[float, ...]) -> None:
    blend = Blend(weights)
    shares = numpy.array(weights) / sum(weights)
    counts = numpy.zeros(len(weights))
    for index in range(3000):
        dataset, draw = blend.locate(index)
        assert draw == counts[dataset]
        counts[dataset] += 1
        assert numpy.abs(counts - shares * (index + 1)).max() < 2


def test_draws_go_on_without_gap_from_one_period_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "BLEND_PERIOD", 16)
    blend = Blend([3, 1.5, 0.7])
    counts = [0, 0, 0]
    for index in range(200):
        dataset, draw = blend.locate(index)
        assert draw == counts[dataset]
        counts[dataset] += 1


def test_a_weight_too_small_to_be_drawn() -> None:
    with pytest.raises(DataError, match="dataset 1 is less than a millionth"):
        Blend([1.0, 1e-9])


def test_equal_weights_take_turns() -> None:
    blend = Blend([1, 1])
    datasets = [blend.locate(index)[0] for index in range(100)]
    assert max(len(list(group)) for _, group in itertools.groupby(datasets)) <= 2
