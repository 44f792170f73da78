"""Learned growth over megatron-core's modules: as autograd through the definition learns, alike at every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

TP2: dict[str, Any] = {"tensor_parallel_size": 2}
PP2: dict[str, Any] = {"pipeline_parallel_size": 2}
TIED = {"tie_embeddings": True}
FAMILY = {"attention_bias": True, "qk_norm": True}
WIDER = {"hidden_size": 60, "head_dim": 12, "ffn_hidden_size": 70}
DEEPER = {"num_layers": 4}

ALONE: list[dict[str, Any]] = [{}, {"model": TIED}, {"model": FAMILY}, {"grown": WIDER}, {"grown": DEEPER}]
ON_TWO: list[tuple[dict[str, Any], int]] = [  # case, index of its reference
    ({"layout": TP2}, 0),
    ({"layout": {**TP2, "sequence_parallel": True}, "model": FAMILY}, 2),
    ({"layout": PP2, "model": TIED}, 1),
    ({"layout": {**PP2, "virtual_pipeline_parallel_size": 2}}, 0),
    ({"layout": {}}, 0),
]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found: dict[str, Any] = run_ranks("tests.growth.learned_workers:alone", 1, {"cases": ALONE})[0]
    return found


def difference(run: dict[str, Any], reference: dict[str, Any]) -> float:
    """Largest difference of a loss or of an entry of a map."""
    pairs = [pair for name in ("losses", "evaluated") for pair in zip(run[name], reference[name], strict=True)]
    pairs += [
        pair for name, values in run["maps"].items() for pair in zip(values, reference["maps"][name], strict=True)
    ]
    return max(abs(a - b) for a, b in pairs)


def gradient_difference(run: dict[str, Any], reference: dict[str, Any]) -> float:
    """Of the gradient of all maps in the first step, relative to its norm."""
    here, there = (
        torch.tensor([value for name in reference["first"] for value in found["first"][name]], dtype=torch.float64)
        for found in (run, reference)
    )
    return ((here - there).norm() / there.norm()).item()


@pytest.mark.parametrize("number", range(len(ALONE)))
def test_maps_are_learned_as_autograd_through_the_definition_learns_them(alone: dict[str, Any], number: int) -> None:
    ours, direct = alone["learned"][number], alone["direct"][number]
    assert ours["losses"][9] < ours["losses"][0], "nothing is learned, so nothing could differ"  # of one batch
    assert gradient_difference(ours, direct) <= 1e-6
    assert difference(ours, direct) <= 1e-5


def test_negative_control_wrong_gradients_are_noticed(alone: dict[str, Any]) -> None:
    for name, broken in alone["broken"].items():
        assert gradient_difference(broken, alone["direct"][0]) > 0.01, name


@pytest.mark.parametrize(("ranks", "cases"), [(2, ON_TWO), (4, [({"layout": {**TP2, **PP2}, "model": TIED}, 1)])])
def test_maps_are_the_same_at_every_layout(
    alone: dict[str, Any], ranks: int, cases: list[tuple[dict[str, Any], int]]
) -> None:
    per_rank = run_ranks("tests.growth.learned_workers:learned", ranks, {"cases": [case for case, _ in cases]})
    for number, (case, reference) in enumerate(cases):
        assert all(found[number] == per_rank[0][number] for found in per_rank), f"{case}: ranks differ"
        assert difference(per_rank[0][number], alone["learned"][reference]) <= 1e-5, case


def test_negative_control_a_copy_that_counts_twice_is_noticed(alone: dict[str, Any]) -> None:
    case = {"case": {"layout": TP2}}
    found = run_ranks("tests.growth.learned_workers:counting_copies", 2, case)[0]
    assert gradient_difference(found, alone["direct"][0]) > 0.01
