"""The plan's bytes against what the model, its gradients and its optimizer really allocate, at several layouts."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks


def _run(world_size: int, *layouts: tuple[int, int, int]) -> list[list[dict[str, Any]]]:
    return run_ranks("tests.train.allocated:allocated", world_size, {"layouts": layouts})


def _check_states(found: dict[str, Any]) -> None:
    for precision in ("bf16", "fp32"):
        for part, (allocated, planned) in found[f"{precision} states"].items():
            # Megatron pads its buffers to multiples of 64 to 128 entries.
            assert planned == pytest.approx(allocated, rel=0.01), part


def test_one_rank_states_and_activations():
    ((found,),) = _run(1, (1, 1, 1))
    _check_states(found)
    for precision in ("bf16", "fp32"):
        for recompute, slack in (("none", 0), ("core attention", 64), ("mlp", 64), ("both", 64), ("full", 16_384)):
            measured, planned = found[f"{precision} {recompute}"]
            # Selective keeps a few counters; full the rotary table and random states once.
            assert 0 <= measured - planned <= slack, (precision, recompute)


@pytest.mark.parametrize(("world_size", "layouts"), [(2, [(1, 1, 1), (1, 2, 2)]), (4, [(2, 2, 1)])])
def test_states_at_layouts(world_size, layouts):
    for of_rank in _run(world_size, *layouts):
        assert len(of_rank) == len(layouts)
        for found in of_rank:
            _check_states(found)
