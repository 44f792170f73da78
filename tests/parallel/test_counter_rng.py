"""Random rows depend on seed, tensor and row alone."""

from __future__ import annotations

import numpy as np
import pytest

from growth_megatron.parallel.counter_rng import normal_rows


def test_any_split_of_the_rows_gives_the_same_bits() -> None:
    whole = normal_rows(1, "a", range(40), 33)
    parts = [normal_rows(1, "a", range(start, start + 10), 33) for start in (30, 0, 20, 10)]
    assert np.array_equal(whole, np.concatenate([parts[1], parts[3], parts[2], parts[0]]))


def test_seed_tensor_and_row_each_change_the_values() -> None:
    rows = normal_rows(1, "a", range(50), 20)
    assert len({row.tobytes() for row in rows}) == 50
    assert not np.array_equal(rows, normal_rows(2, "a", range(50), 20))
    assert not np.array_equal(rows, normal_rows(1, "b", range(50), 20))


def test_the_values_are_standard_normal_and_uncorrelated() -> None:
    values = normal_rows(3, "weights", range(400), 500)
    assert values.mean() == pytest.approx(0.0, abs=0.01)
    assert values.std() == pytest.approx(1.0, abs=0.01)
    correlations = np.corrcoef(values[:50])[~np.eye(50, dtype=bool)]
    assert abs(correlations).max() < 0.25
