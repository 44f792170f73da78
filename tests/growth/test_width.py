"""Growth in width: the maps written out by hand, and the function that stays, over geometries and options.

Relative to the largest logit, 2e-6 is allowed in float32 and 1e-12 in float64. ``test_broken_width`` breaks the rules
that this rests on, one after the other, and then the same comparison must fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_megatron.checkpoint.folder.manifest import GrowthRecord
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.operators import choose
from growth_megatron.growth.plan import plan_growth, plan_of_record
from growth_megatron.growth.rules import RANDOM, ZERO
from growth_megatron.growth.view import GrownSource
from growth_megatron.growth.width import WidthMaps, extend, rotary_channels, spread
from tests.growth.in_memory import (
    ALLOWED,
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    GAINS,
    OUTPUT,
    PROJ,
    QKV,
    SEED,
    Tensors,
    assert_same_function,
    axis_of,
    function_difference,
    grid,
    logit_difference,
    plan_of,
    small,
    trained_like,
)
from tests.growth.models import Growth, chains, steps

few = settings(max_examples=25, deadline=None, derandomize=True)


# The maps, by hand. Rows of the fused projection of tiny(): q0 0 1, q1 2 3, k 4 5, v 6 7, then the same from 8 on.


def tiny(**changes: Any) -> ModelConfig:
    return small(num_attention_heads=4, head_dim=2, hidden_size=4, ffn_hidden_size=2, **changes)


GROUP_0, GROUP_1 = list(range(8)), list(range(8, 16))


@pytest.mark.parametrize(
    ("changes", "order", "rows", "columns"),
    [
        (
            {"num_attention_heads": 8},
            "interleaved",
            [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 8, 9, 8, 9, 10, 11, 10, 11, 12, 13, 14, 15],
            [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7],
        ),
        (
            {"num_attention_heads": 8},
            "tiled",
            [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 8, 9, 10, 11, 12, 13, 14, 15],
            [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7],
        ),
        (
            {"num_attention_heads": 6},
            "interleaved",
            [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 9, 10, 11, 12, 13, 14, 15],
            [0, 1, 0, 1, 2, 3, 4, 5, 4, 5, 6, 7],
        ),
        (
            {"num_attention_heads": 8, "num_query_groups": 4},
            "interleaved",
            [*GROUP_0, *GROUP_0, *GROUP_1, *GROUP_1],
            [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7],
        ),
        (
            {"num_attention_heads": 8, "num_query_groups": 4},
            "tiled",
            [*GROUP_0, *GROUP_1, *GROUP_0, *GROUP_1],
            [*range(8), *range(8)],
        ),
        (
            {"num_attention_heads": 6, "num_query_groups": 3},
            "interleaved",
            [*GROUP_0, *GROUP_0, *GROUP_1],
            [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7],
        ),
        (
            {"num_query_groups": 4},
            "interleaved",
            [0, 1, 4, 5, 6, 7, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 10, 11, 12, 13, 14, 15],
            None,
        ),
        (
            {"num_query_groups": 4},
            "tiled",
            [0, 1, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15],
            [0, 1, 4, 5, 2, 3, 6, 7],
        ),
        (
            {"head_dim": 4},
            "interleaved",
            [row for first in range(0, 16, 8) for row in (
                *(first, ZERO, first + 1, ZERO), *(first + 2, ZERO, first + 3, ZERO),
                *(first + 4, ZERO, first + 5, ZERO), *(first + 6, first + 6, first + 7, first + 7),
            )],
            [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7],
        ),
    ],
)  # fmt: skip
def test_rows_of_the_fused_projection_and_columns_of_the_output_projection_by_hand(
    changes: dict[str, Any], order: str, rows: list[int], columns: list[int] | None
) -> None:
    plan = plan_of(tiny(), changes, order=order)
    assert axis_of(plan, QKV, 0).index == tuple(rows)
    assert axis_of(plan, PROJ, 1).index == (None if columns is None else tuple(columns))


def test_factors_of_more_heads_by_hand() -> None:
    plan = plan_of(tiny(), {"num_attention_heads": 6})  # heads 0 0 1 in each group
    shares = (0.5, 0.5, 0.5, 0.5, 1.0, 1.0)  # by channel
    assert axis_of(plan, PROJ, 1).scale == (*shares, *shares)
    rows = axis_of(plan, QKV, 0)
    assert rows.scale is None
    assert rows.gradient_scale == (*shares, *(1.0,) * 4) * 2
    assert rows.new == (False, False, True, True, *(False,) * 6) * 2
    groups = axis_of(plan_of(tiny(), {"num_attention_heads": 6, "num_query_groups": 3}), QKV, 0)  # groups 0 0 1
    assert groups.gradient_scale == (*(0.5,) * 16, *(1.0,) * 8)
    assert groups.new == (*(False,) * 8, *(True,) * 8, *(False,) * 8)


def test_factors_of_wider_heads_by_hand() -> None:
    plan, root = plan_of(tiny(), {"head_dim": 4}), math.sqrt(2)
    rows = axis_of(plan, QKV, 0)
    assert rows.scale == pytest.approx([root, 1, root, 1, root, 1, root, 1, *(1,) * 8] * 2)
    kept = [value for value, index in zip(rows.gradient_scale or (), rows.index or (), strict=True) if index >= 0]
    assert kept == pytest.approx([*(1 / root,) * 4, 1, 1, *(0.5,) * 4] * 2)
    assert axis_of(plan, PROJ, 1).scale == (0.5,) * 16


@pytest.mark.parametrize(
    ("order", "fused", "down", "shares"),
    [
        ("interleaved", (0, 0, 1, 2, 2, 3), (0, 0, 1), (0.5, 0.5, 1.0)),
        ("tiled", (0, 1, 0, 2, 3, 2), (0, 1, 0), (0.5, 1.0, 0.5)),
    ],
)
def test_ffn_of_one_and_a_half_times_the_size_by_hand(
    order: str, fused: tuple[int, ...], down: tuple[int, ...], shares: tuple[float, ...]
) -> None:
    plan = plan_of(tiny(), {"ffn_hidden_size": 3}, order=order)
    gate_and_up, columns = axis_of(plan, FC1, 0), axis_of(plan, FC2, 1)
    assert (gate_and_up.index, gate_and_up.scale, gate_and_up.gradient_scale) == (fused, None, shares * 2)
    assert (columns.index, columns.scale, columns.gradient_scale) == (down, shares, None)


def test_hidden_of_one_and_a_half_times_the_size_by_hand() -> None:
    plan = plan_of(tiny(tie_embeddings=True), {"hidden_size": 6})
    twice, once = math.sqrt(0.75), math.sqrt(1.5)  # s_j = sqrt(D / (d k)) of a coordinate with two copies, with one
    stream = [twice, twice, once, twice, twice, once]
    shares = [0.5, 0.5, 1.0, 0.5, 0.5, 1.0]
    for name in (EMBEDDING, PROJ, FC2):
        axis = axis_of(plan, name, 0 if name != EMBEDDING else 1)
        assert axis.index == (0, 0, 1, 2, 2, 3)
        assert axis.scale == pytest.approx(stream)
        assert axis.gradient_scale == pytest.approx([a / s for a, s in zip(shares, stream, strict=True)])
    for name in GAINS:
        assert axis_of(plan, name, 0).scale == pytest.approx([1 / s for s in stream])
    # The readers' shares go into the last gain, for the tied embedding cannot have them.
    assert axis_of(plan, FINAL_NORM, 0).scale == pytest.approx([a / s**2 for a, s in zip(shares, stream, strict=True)])
    for name in (QKV, FC1):
        assert (axis_of(plan, name, 1).scale, axis_of(plan, name, 1).gradient_scale) == (tuple(shares), None)
    untied = plan_of(tiny(tie_embeddings=True), {"hidden_size": 6, "tie_embeddings": False})
    assert axis_of(untied, OUTPUT, 1).scale == tuple(shares)
    assert axis_of(untied, FINAL_NORM, 0) == axis_of(plan, GAINS[0], 0)


def test_zero_width_by_hand() -> None:
    plan = plan_of(tiny(), {"hidden_size": 6, "ffn_hidden_size": 3}, operator="zero")
    root = math.sqrt(6 / 4)
    assert axis_of(plan, EMBEDDING, 1).index == axis_of(plan, PROJ, 0).index == (0, 1, 2, 3, ZERO, ZERO)
    assert axis_of(plan, EMBEDDING, 1).scale == axis_of(plan, FC2, 0).scale == pytest.approx([*[root] * 4, 1, 1])
    assert axis_of(plan, GAINS[0], 0).scale == pytest.approx([*[1 / root] * 4, 1, 1])
    assert axis_of(plan, QKV, 1).index == axis_of(plan, OUTPUT, 1).index == (0, 1, 2, 3, RANDOM, RANDOM)
    assert axis_of(plan, FC1, 0).index == (0, 1, RANDOM, 2, 3, ZERO)
    scaled = plan_of(tiny(), {"hidden_size": 6, "norm_epsilon": 1e-5 * 4 / 6}, operator="zero")
    assert axis_of(scaled, EMBEDDING, 1).scale is None
    assert axis_of(scaled, FINAL_NORM, 0).scale == pytest.approx([*[1 / root] * 4, 1, 1])


def test_zero_heads_by_hand() -> None:
    """A new head in an old group is silenced by its columns of o, a new group by its values."""
    plan = plan_of(tiny(), {"num_attention_heads": 9, "num_query_groups": 3}, operator="zero")
    r, z = RANDOM, ZERO
    assert axis_of(plan, QKV, 0).index == (
        *(0, 1, 2, 3, r, r, 4, 5, 6, 7),
        *(8, 9, 10, 11, r, r, 12, 13, 14, 15),
        *(r, r, r, r, r, r, z, z, z, z),
    )
    assert axis_of(plan, PROJ, 1).index == (0, 1, 2, 3, z, z, 4, 5, 6, 7, z, z, *(r,) * 6)


def test_rotary_pairs_keep_their_frequency() -> None:
    assert rotary_channels(2, 2) == [0, ZERO, 1, ZERO]
    assert rotary_channels(4, 2) == [0, ZERO, 1, ZERO, 2, ZERO, 3, ZERO]
    assert rotary_channels(4, 3) == [0, ZERO, ZERO, 1, ZERO, ZERO, 2, ZERO, ZERO, 3, ZERO, ZERO]
    for channels, repeats in ((4, 2), (8, 3), (6, 4)):
        wide = rotary_channels(channels, repeats)
        half, wide_half = channels // 2, channels * repeats // 2
        for place, channel in enumerate(wide):
            if channel >= 0:
                assert place // wide_half == channel // half  # the same half
                assert (place % wide_half) / wide_half == (channel % half) / half  # the same exponent of the base
        assert sorted(c for c in wide if c >= 0) == list(range(channels))


def test_copies_interleaved_and_tiled() -> None:
    assert spread(3, 6, "interleaved").index == (0, 0, 1, 1, 2, 2)
    assert spread(3, 6, "tiled").index == (0, 1, 2, 0, 1, 2)
    assert spread(2, 5, "interleaved").index == (0, 0, 0, 1, 1)
    tiled = spread(2, 5, "tiled")
    assert tiled.index == (0, 1, 0, 1, 0)
    assert tiled.share == pytest.approx([1 / 3, 1 / 2, 1 / 3, 1 / 2, 1 / 3])
    assert tiled.new == (False, False, True, True, True)
    assert spread(2, 3, "interleaved", [1.0, 3.0, 7.0]).share == (0.25, 0.75, 1.0)
    assert extend(2, 4, ZERO).index == (0, 1, ZERO, ZERO)
    assert extend(2, 4, ZERO).new == (False, False, True, True)


@few
@given(st.integers(1, 12), st.integers(0, 20), st.sampled_from(["interleaved", "tiled"]), st.booleans())
def test_copies_are_as_equal_in_number_as_can_be_and_their_shares_sum_to_1(
    size: int, more: int, order: str, uneven: bool
) -> None:
    weights = [1.0 + 0.1 * n for n in range(size + more)] if uneven else None
    copies = spread(size, size + more, order, weights)
    counts = [copies.index.count(source) for source in range(size)]
    assert {*counts} <= {(size + more) // size, -(-(size + more) // size)}
    for source in range(size):
        shares = [share for index, share in zip(copies.index, copies.share, strict=True) if index == source]
        assert sum(shares) == pytest.approx(1)
    assert copies.new.count(False) == size


def test_uneven_shares_differ_between_copies_and_with_the_seed() -> None:
    source, target, growth = small(), small(hidden_size=24), GrowthConfig(shares="uneven")
    shares = WidthMaps(source, target, choose(growth), 1).residual.share
    assert all(0.05 < share < 0.95 for share in shares)
    assert all(abs(a - b) > 1e-4 for a, b in zip(shares[::2], shares[1::2], strict=True))
    assert shares == WidthMaps(source, target, choose(growth), 1).residual.share
    assert shares != WidthMaps(source, target, choose(growth), 2).residual.share
    assert shares[: len(shares) // 2] != WidthMaps(source, target, choose(growth), 1).ffn.share[: len(shares) // 2]


# The function stays.

ATTENTION = {"gqa": {}, "mha": {"num_query_groups": 6}, "mqa": {"num_query_groups": 1}}
CHANGES: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "ffn x1.5": lambda m: {"ffn_hidden_size": 15},
    "hidden x1.5": lambda m: {"hidden_size": 18},
    "hidden x2": lambda m: {"hidden_size": 24},
    "hidden x3": lambda m: {"hidden_size": 36},
    "head_dim x2": lambda m: {"head_dim": 8},
    "heads only": lambda m: {"num_attention_heads": 12},
    "groups with their heads": lambda m: {"num_attention_heads": 12, "num_query_groups": 2 * m.num_query_groups},
    "all": lambda m: {
        "hidden_size": 24, "ffn_hidden_size": 15, "head_dim": 8,
        "num_attention_heads": 12, "num_query_groups": 2 * m.num_query_groups,
    },
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("change", CHANGES)
def test_copies_keep_the_function(change: str, attention: str, tied: bool) -> None:
    source = small(**ATTENTION[attention], tie_embeddings=tied)
    for options in grid(shares=["even", "uneven"], order=["interleaved", "tiled"]):
        assert_same_function(plan_of(source, CHANGES[change](source), **options))


GROUPS_ONLY = {
    "GQA to MHA": (2, {"num_query_groups": 6}),
    "MQA to GQA": (1, {"num_query_groups": 2}),
    "MQA to MHA": (1, {"num_query_groups": 6}),
    "2 to 3 groups": (2, {"num_query_groups": 3, "num_attention_heads": 9}),
    "2 to 4 groups of fewer heads": (2, {"num_query_groups": 4, "num_attention_heads": 8}),
}


@pytest.mark.parametrize("name", GROUPS_ONLY)
def test_more_groups_keep_the_function(name: str) -> None:
    groups, changes = GROUPS_ONLY[name]
    for options in grid(shares=["even", "uneven"], order=["interleaved", "tiled"]):
        assert_same_function(plan_of(small(num_query_groups=groups), changes, **options))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("changes", "growth"),
    [
        ({"hidden_size": 24, "num_layers": 5}, {"operator": "identity+split", "shares": "uneven"}),
        ({"hidden_size": 18, "num_layers": 5}, {"operator": "zero+split"}),
        ({"hidden_size": 18, "num_layers": 3}, {"operator": "zero"}),
        ({"hidden_size": 18, "num_layers": 3}, {"operator": "identity+zero"}),
        ({"hidden_size": 18, "head_dim": 8}, {"operator": "sparkling"}),
        ({"hidden_size": 36, "num_attention_heads": 12, "ffn_hidden_size": 20}, {"operator": "hypercloning"}),
        ({"hidden_size": 24, "ffn_hidden_size": 20}, {"operator": "hypercloning", "cancelling_noise": 5.0}),
        ({"hidden_size": 18, "ffn_hidden_size": 15, "head_dim": 8}, {"cancelling_noise": 1.0, "shares": "uneven"}),
        ({"hidden_size": 20}, {"operator": "zero"}),
        ({"hidden_size": 20, "norm_epsilon": 1e-5 * 12 / 20}, {"operator": "zero"}),
        ({"ffn_hidden_size": 13}, {"operator": "zero"}),
        ({"num_attention_heads": 8}, {"operator": "zero"}),
        ({"num_attention_heads": 9, "num_query_groups": 3}, {"operator": "zero"}),
        ({"head_dim": 12}, {"operator": "zero"}),
    ],
)
def test_every_operator_that_says_so_keeps_the_function(
    changes: dict[str, Any], growth: dict[str, Any], tied: bool
) -> None:
    assert_same_function(plan_of(small(tie_embeddings=tied), changes, **growth))


@pytest.mark.parametrize("growth", [{}, {"operator": "zero"}, {"operator": "identity+split"}])
def test_untying_keeps_the_function(growth: dict[str, Any]) -> None:
    for hidden in (12, 18, 24):
        plan = plan_of(small(tie_embeddings=True), {"tie_embeddings": False, "hidden_size": hidden}, **growth)
        assert_same_function(plan)


@pytest.mark.parametrize(
    ("changes", "growth"),
    [
        ({"hidden_size": 24}, {"operator": "random"}),
        ({"num_attention_heads": 8}, {"operator": "random"}),
        ({"hidden_size": 24}, {"noise": 0.2}),
        ({"hidden_size": 24, "num_layers": 4}, {}),
        ({"num_layers": 3}, {"operator": "random"}),
    ],
)
def test_what_changes_the_function_does_not_claim_to_keep_it(changes: dict[str, Any], growth: dict[str, Any]) -> None:
    plan = plan_of(small(), changes, **growth)
    assert not plan.function_preserving
    assert function_difference(plan) > 1e-3


@few
@given(steps)
def test_any_function_preserving_growth_keeps_the_function(
    step: Growth,
) -> None:
    source, (target, growth) = step
    assert_same_function(plan_growth(source, target, growth, SEED))


@few
@given(chains)
def test_two_growths_in_a_row_keep_the_function(chain: Any) -> None:
    (first, (middle, growth)), (last, second_growth) = chain
    plans = plan_growth(first, middle, growth, 1), plan_growth(middle, last, second_growth, 2)
    for dtype, allowed in ALLOWED.items():
        source = Tensors(trained_like(first, dtype))
        grown = GrownSource(GrownSource(source, plans[0], "reset"), plans[1], "reset")
        assert logit_difference(source, first, grown, last, dtype) < allowed


@few
@given(steps)
def test_a_recorded_growth_is_planned_again(step: Growth) -> None:
    source, (target, growth) = step
    plan = plan_growth(source, target, growth, SEED)
    record = GrowthRecord(
        operator=plan.operator,
        options=dict(plan.options),
        layers=plan.layers,
        optimizer_state=choose(growth).state_policy,
        step=1,
        source="base",
        source_manifest_sha256="",
        source_geometry=source,
        target_geometry=target,
        seed=SEED,
        library_version="test",
    )
    assert plan_of_record(GrowthRecord.model_validate_json(record.model_dump_json())) == plan


def test_the_heads_of_a_shared_out_group_give_each_copy_its_part_of_the_gradient() -> None:
    """Three heads to a group become one to each of three copies: with equal heads each copy gets a third of it."""
    maps = WidthMaps(small(), small(num_query_groups=6), choose(GrowthConfig()), 0)
    assert maps.heads.group_gain == pytest.approx((1 / 3,) * 6)
    assert not maps.heads.exact
