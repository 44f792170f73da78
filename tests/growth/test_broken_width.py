"""Each rule of growth in width broken on purpose: the comparison that the whole rule passes must fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.growth import width
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.rules import RANDOM, ZERO, GrowthPlan
from growth_megatron.growth.width import spread
from tests.growth.in_memory import (
    ALLOWED,
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    GAINS,
    PROJ,
    QKV,
    SEED,
    assert_same_function,
    axis_of,
    changed,
    function_difference,
    plan_of,
    small,
    with_axis,
)


def _wrong_fan_in(plan: GrowthPlan) -> GrowthPlan:
    return with_axis(plan, FC2, 1, scale=None)


def _wrong_reader(plan: GrowthPlan) -> GrowthPlan:
    return with_axis(plan, QKV, 1, scale=None)


def _without_stream_factors(plan: GrowthPlan) -> GrowthPlan:
    for name, number in ((EMBEDDING, 1), (PROJ, 0), (FC2, 0), (GAINS[0], 0), (GAINS[1], 0), (FINAL_NORM, 0)):
        plan = with_axis(plan, name, number, scale=None)
    return plan


def _thirds(plan: GrowthPlan) -> GrowthPlan:
    """q, k and v taken for three blocks one above the other, in source and target."""
    source, target, h = plan.source_geometry, plan.target_geometry, plan.source_geometry.head_dim
    index, first = [], 0
    for before, after in (
        (source.num_attention_heads, target.num_attention_heads),
        (source.num_query_groups, target.num_query_groups),
        (source.num_query_groups, target.num_query_groups),
    ):
        index += [
            first + head * h + channel for head in spread(before, after, "interleaved").index for channel in range(h)
        ]
        first += before * h
    return with_axis(plan, QKV, 0, index=tuple(index))


def _heads_in_another_order(plan: GrowthPlan) -> GrowthPlan:
    tiled = plan_growth(plan.source_geometry, plan.target_geometry, GrowthConfig(order="tiled"), SEED)
    return with_axis(plan, PROJ, 1, index=axis_of(tiled, PROJ, 1).index)


def _groups_in_another_order(plan: GrowthPlan) -> GrowthPlan:
    """Each group's queries stay, its k and v become those of another group."""
    rows = list(axis_of(plan, QKV, 0).index or ())
    a_group = len(rows) // plan.target_geometry.num_query_groups
    k_and_v = 2 * plan.target_geometry.head_dim
    parts = [rows[start : start + a_group] for start in range(0, len(rows), a_group)]
    moved = [[*part[:-k_and_v], *parts[number - 1][-k_and_v:]] for number, part in enumerate(parts)]
    return with_axis(plan, QKV, 0, index=tuple(row for part in moved for row in part))


def _doubled_channels(plan: GrowthPlan) -> GrowthPlan:
    """Every channel beside its copy; q / sqrt(2), so that without rotation the scores would be right."""
    source = plan.source_geometry
    h, m = source.head_dim, source.num_attention_heads // source.num_query_groups
    blocks = source.num_attention_heads + 2 * source.num_query_groups
    index = tuple(block * h + channel // 2 for block in range(blocks) for channel in range(2 * h))
    scale = tuple(
        1 / math.sqrt(2) if block % (m + 2) < m else 1.0 for block in range(blocks) for _ in range(2 * h)
    )  # fmt: skip
    return with_axis(plan, QKV, 0, index=index, scale=scale)


def _padded_channels(plan: GrowthPlan) -> GrowthPlan:
    """Each half of q and k padded with zeros, so that the pairs keep their numbers, not their frequencies."""

    def padded(channels: int, repeats: int) -> list[int]:
        zeros = [ZERO] * (channels // 2 * (repeats - 1))
        return [*range(channels // 2), *zeros, *range(channels // 2, channels), *zeros]

    with mock.patch.object(width, "rotary_channels", padded):
        return plan_growth(plan.source_geometry, plan.target_geometry, GrowthConfig(), SEED)


def _unfolded_gain(plan: GrowthPlan) -> GrowthPlan:
    return with_axis(plan, FINAL_NORM, 0, scale=axis_of(plan, GAINS[0], 0).scale)


def _without_gain_factor(plan: GrowthPlan) -> GrowthPlan:
    for name in (*GAINS, FINAL_NORM):
        plan = with_axis(plan, name, 0, scale=None)
    return plan


def _unchanged_epsilon(plan: GrowthPlan) -> GrowthPlan:
    return replace(plan, target_geometry=changed(plan.target_geometry, norm_epsilon=plan.source_geometry.norm_epsilon))


def _gate_and_up_as_one_axis(plan: GrowthPlan) -> GrowthPlan:
    f, wide = plan.source_geometry.ffn_hidden_size, plan.target_geometry.ffn_hidden_size
    return with_axis(plan, FC1, 0, index=spread(2 * f, 2 * wide, "tiled").index)


def _without_root_of_the_channels(plan: GrowthPlan) -> GrowthPlan:
    return with_axis(plan, QKV, 0, scale=None)


def _spoken_new_groups(plan: GrowthPlan) -> GrowthPlan:
    rows = axis_of(plan, QKV, 0).index or ()
    return with_axis(plan, QKV, 0, index=tuple(RANDOM if row < 0 else row for row in rows))


BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], Callable[[GrowthPlan], GrowthPlan]]] = {
    "fan-in of the down projection": ({}, {"ffn_hidden_size": 20}, {}, _wrong_fan_in),
    "fan-in of the fused projection": ({}, {"hidden_size": 24}, {}, _wrong_reader),
    "plain copies at an uneven ratio": ({}, {"hidden_size": 18}, {}, _without_stream_factors),
    "q, k, v as thirds, GQA": ({}, {"num_attention_heads": 12, "num_query_groups": 4}, {}, _thirds),
    "q, k, v as thirds, MHA": (
        {"num_query_groups": 6}, {"num_attention_heads": 12, "num_query_groups": 12}, {}, _thirds
    ),
    "heads of o in another order": (
        {"num_query_groups": 6}, {"num_attention_heads": 12, "num_query_groups": 12}, {}, _heads_in_another_order
    ),
    "heads of o in another order, inside groups": ({}, {"num_attention_heads": 12}, {}, _heads_in_another_order),
    "k and v of another group": (
        {}, {"num_attention_heads": 12, "num_query_groups": 4}, {}, _groups_in_another_order
    ),
    "doubled channels": ({}, {"head_dim": 8}, {}, _doubled_channels),
    "padded channels": ({}, {"head_dim": 8}, {}, _padded_channels),
    "softmax without its root": ({}, {"head_dim": 8}, {}, _without_root_of_the_channels),
    "tied without the folded gain": ({"tie_embeddings": True}, {"hidden_size": 24}, {}, _unfolded_gain),
    "zero width without sqrt(d/D)": ({}, {"hidden_size": 24}, {"operator": "zero"}, _without_gain_factor),
    "zero width with the old epsilon": (
        {}, {"hidden_size": 24, "norm_epsilon": 5e-6}, {"operator": "zero"}, _unchanged_epsilon
    ),
    "gate and up as one axis": ({}, {"ffn_hidden_size": 15}, {"order": "tiled"}, _gate_and_up_as_one_axis),
    "zero groups with values": (
        {}, {"num_attention_heads": 9, "num_query_groups": 3}, {"operator": "zero"}, _spoken_new_groups
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_does_not_keep_the_function(name: str) -> None:
    source, changes, growth, breaks = BROKEN[name]
    plan = plan_of(small(**source), changes, **growth)
    assert_same_function(plan)
    broken = breaks(plan)
    assert broken != plan
    for dtype, allowed in ALLOWED.items():
        assert function_difference(broken, dtype) > 10 * allowed
    subtle = name in ("zero width with the old epsilon", "zero groups with values")
    assert function_difference(broken) > (1e-5 if subtle else 1e-2)
