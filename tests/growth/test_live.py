"""Masked growth in training: as the definition in plain PyTorch trains, at every layout, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.growth.live_workers import MASKED_STEPS, STEPS
from tests.ranks import run_ranks

TP2: dict[str, Any] = {"tensor_parallel_size": 2}
PP2: dict[str, Any] = {"pipeline_parallel_size": 2}
TIED = {"tie_embeddings": True}
FAMILY = {"attention_bias": True, "qk_norm": True}

ALONE: list[dict[str, Any]] = [
    {"layout": {}},
    {"layout": {}, "model": TIED},
    {"layout": {}, "model": FAMILY},
    {"layout": {}, "precision": "bf16"},
]
ON_TWO: list[tuple[dict[str, Any], int, float]] = [  # case, index of its reference, tolerance of the loss in nats
    ({"layout": TP2}, 0, 5e-6),
    ({"layout": {**TP2, "sequence_parallel": True}, "model": FAMILY}, 2, 5e-6),
    ({"layout": PP2, "model": TIED}, 1, 5e-6),
    ({"layout": {**PP2, "virtual_pipeline_parallel_size": 2}}, 0, 5e-6),
    ({"layout": {}}, 0, 5e-6),
    ({"layout": {"overlap_param_gather": True}}, 0, 5e-6),
    ({"layout": TP2, "precision": "bf16"}, 3, 5e-2),
]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found: dict[str, Any] = run_ranks("tests.growth.live_workers:alone", 1, {"cases": ALONE})[0]
    return found


def difference(run: dict[str, list[float]], reference: dict[str, list[float]]) -> float:
    """Largest difference of a loss, in nats, over the steps of ``run``, which may be fewer."""
    pairs = [pair for name in ("losses", "evaluated") for pair in zip(run[name], reference[name], strict=False)]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize(("number", "tolerance"), [(0, 5e-6), (1, 5e-6), (2, 5e-6), (3, 5e-2)])
def test_masked_training_is_the_definition_s_over_all_of_the_ramps(
    alone: dict[str, Any], number: int, tolerance: float
) -> None:
    masked, direct = alone["masked"][number], alone["direct"][number]
    assert len(masked["losses"]) == STEPS
    assert masked["losses"][-1] < masked["losses"][0] - 0.2, "nothing is learned, so nothing could differ"
    assert difference(masked, direct) <= tolerance
    if number < 3:
        assert masked["norms"] == pytest.approx(direct["norms"], rel=1e-4)


@pytest.mark.parametrize("without", ["pull_back", "_set_epsilon"])
def test_negative_control_a_map_without_one_of_its_parts_is_noticed(alone: dict[str, Any], without: str) -> None:
    direct = alone["direct"][0]["losses"]
    assert max(abs(a - b) for a, b in zip(alone[f"without {without}"], direct, strict=False)) > 2e-5


def test_masked_training_is_the_same_at_every_layout(alone: dict[str, Any]) -> None:
    cases = [case for case, _, _ in ON_TWO]
    per_rank = run_ranks("tests.growth.live_workers:masked_runs", 2, {"cases": cases, "steps": MASKED_STEPS})
    for number, (case, reference, tolerance) in enumerate(ON_TWO):
        assert per_rank[0][number] == per_rank[1][number], f"{case}: ranks report different losses"
        assert difference(per_rank[0][number], alone["masked"][reference]) <= tolerance, case


def test_the_plan_says_what_masks_keep_aside_on_each_rank() -> None:
    cases = [case for case, _, _ in ON_TWO]
    for of_rank in run_ranks("tests.growth.live_workers:copies", 2, {"cases": cases}):
        for case, (taken, planned) in zip(cases, of_rank, strict=True):
            assert taken == planned > 0, case


def test_a_map_puts_back_what_it_found_and_changes_no_module(alone: dict[str, Any]) -> None:
    assert alone["restored"]
    assert alone["changed"] == 1 + 4 * 4 + 1  # embedding; o, down and two gains a layer; the final gain
    assert alone["same modules"]
    assert alone["epsilons"] == [1e-5]
