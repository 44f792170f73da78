"""Every parallel layout and every recomputation trains as the single process does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks

TP2: dict[str, Any] = {"tensor_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}
PP2: dict[str, Any] = {"pipeline_parallel_size": 2}
PP2_VPP2 = {**PP2, "virtual_pipeline_parallel_size": 2}
DP2: dict[str, Any] = {}
DP2_OVERLAP = {"overlap_param_gather": True}

TIED = {"tie_embeddings": True, "num_query_groups": 8}  # and MHA
MQA_WIDE_HEADS = {"num_query_groups": 2, "head_dim": 16}

FAMILY: dict[str, Any] = {  # LLaMA 3, Qwen2 and Qwen3 in one
    "rope_scaling": {"type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16},
    "attention_bias": True,
    "qk_norm": True,
}

ALONE: list[dict[str, Any]] = [
    {"layout": {}},
    {"layout": {}, "model": TIED},
    {"layout": {}, "model": MQA_WIDE_HEADS},
    {"layout": {}, "precision": "bf16"},
    {"layout": {}, "recompute": "selective", "recompute_modules": ["mlp"]},
    {"layout": {}, "recompute": "full"},
    {"layout": {}, "model": FAMILY},
    {"layout": {}, "deterministic": True},
]
ON_TWO: list[tuple[dict[str, Any], int, float]] = [  # case, index of its reference, tolerance of the loss in nats
    ({"layout": TP2}, 0, 1e-6),
    ({"layout": TP2_SP}, 0, 1e-6),
    ({"layout": PP2}, 0, 1e-6),
    ({"layout": PP2_VPP2}, 0, 1e-6),
    ({"layout": DP2}, 0, 1e-5),
    ({"layout": DP2_OVERLAP}, 0, 1e-5),
    ({"layout": TP2_SP, "model": TIED}, 1, 1e-6),
    ({"layout": PP2, "model": TIED}, 1, 1e-6),
    ({"layout": PP2_VPP2, "model": TIED}, 1, 1e-6),
    ({"layout": TP2_SP, "model": MQA_WIDE_HEADS}, 2, 1e-6),
    ({"layout": TP2_SP, "precision": "bf16"}, 3, 5e-3),
    ({"layout": TP2_SP, "recompute": "selective"}, 0, 1e-6),
    ({"layout": TP2_SP, "recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}, 0, 1e-6),
    ({"layout": PP2, "recompute": "full"}, 0, 1e-6),
    ({"layout": TP2, "model": FAMILY}, 6, 1e-6),
    ({"layout": TP2_SP, "model": FAMILY}, 6, 1e-6),
    ({"layout": PP2_VPP2, "model": FAMILY}, 6, 1e-6),
]
ON_FOUR: list[tuple[dict[str, Any], int, float]] = [
    ({"layout": {**TP2, **PP2}}, 0, 1e-6),
    ({"layout": {**TP2_SP, **PP2_VPP2}}, 0, 1e-6),
    ({"layout": TP2_SP}, 0, 1e-5),  # x DP2
    ({"layout": {**TP2, **PP2}, "model": TIED}, 1, 1e-6),
]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return run_ranks("tests.workers:losses_of_layouts", 1, {"cases": ALONE})[0]


def _difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    pairs = [*zip(a["losses"], b["losses"], strict=True), (a["evaluated"], b["evaluated"])]
    return max(abs(x - y) for x, y in pairs)


@pytest.mark.parametrize(("ranks", "cases"), [(2, ON_TWO), (4, ON_FOUR)])
def test_every_layout_gives_the_losses_of_the_single_process(
    ranks: int, cases: list[tuple[dict[str, Any], int, float]], alone: list[dict[str, Any]]
) -> None:
    per_rank = run_ranks("tests.workers:losses_of_layouts", ranks, {"cases": [case for case, _, _ in cases]})
    for number, (case, reference, tolerance) in enumerate(cases):
        for result in per_rank:
            assert result[number]["losses"] == per_rank[0][number]["losses"], f"{case}: ranks report different losses"
        assert _difference(per_rank[0][number], alone[reference]) <= tolerance, case
        if case.get("precision") != "bf16":
            assert per_rank[0][number]["norms"] == pytest.approx(alone[reference]["norms"], rel=1e-6), case


def test_neither_recomputation_nor_deterministic_algorithms_change_the_losses(alone: list[dict[str, Any]]) -> None:
    assert alone[7]["losses"] == alone[0]["losses"]
    assert alone[4]["losses"] == alone[0]["losses"]
    assert alone[5]["losses"] == alone[0]["losses"]


def test_the_model_learns_and_variants_differ(alone: list[dict[str, Any]]) -> None:
    """The comparison above could not fail if every case gave the same numbers."""
    assert len({tuple(result["losses"]) for result in (*alone[:4], alone[6])}) == 5
    assert alone[0]["losses"][0] != alone[0]["losses"][-1]


def test_negative_control_unreduced_norm_gains_are_noticed(alone: list[dict[str, Any]]) -> None:
    """Without the mark that has gains reduced under sequence parallelism, the losses leave the tolerance."""
    broken = run_ranks("tests.workers:losses_without_gain_reduction", 2, {"layout": TP2_SP})[0]
    assert _difference(broken, alone[0]) > 1e-6
