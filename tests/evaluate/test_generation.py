"""Tokens are drawn as asked: greedy, by temperature, out of the nucleus; the same for the same seed and stream."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from growth_megatron.evaluate.generation import Sampling, choose_token

SHARES = torch.tensor([0.1, 0.5, 0.05, 0.35])
DRAWS = 400


def drawn(how: Sampling) -> Counter[int]:
    return Counter(int(choose_token(SHARES.log(), how, position)) for position in range(DRAWS))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert drawn(Sampling(0.0, seed=3)) == {1: DRAWS}


def test_tokens_come_by_their_shares() -> None:
    found = drawn(Sampling(1.0))
    for token, share in enumerate(SHARES.tolist()):
        deviation = (share * (1 - share) / DRAWS) ** 0.5
        assert found[token] / DRAWS == pytest.approx(share, abs=4 * deviation)
    colder = drawn(Sampling(0.5))
    squares = (SHARES**2 / (SHARES**2).sum()).tolist()
    assert colder[1] / DRAWS == pytest.approx(squares[1], abs=0.1)
    assert colder[1] > found[1]


@pytest.mark.parametrize(("top_p", "allowed"), [(0.4, {1}), (0.6, {1, 3}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3})])
def test_the_nucleus_is_the_fewest_that_have_so_much_together(top_p: float, allowed: set[int]) -> None:
    assert set(drawn(Sampling(1.0, top_p))) == allowed


def test_a_seed_and_a_stream_say_what_is_drawn() -> None:
    def line(seed: int, stream: int) -> list[int]:
        how = Sampling(1.0, 1.0, seed, stream)
        return [int(choose_token(SHARES.log(), how, position)) for position in range(40)]

    assert line(1, 0) == line(1, 0)
    assert len({tuple(line(*which)) for which in ((1, 0), (2, 0), (1, 1))}) == 3
