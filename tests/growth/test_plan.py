"""The plan of a growth in depth, and a source seen through a plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_megatron.errors import GrowthError
from growth_megatron.growth.operators.stack import stack_layers
from growth_megatron.growth.plan import plan_depth
from growth_megatron.growth.rules import AxisRule, GrowthPlan, TensorRule
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.tensors import FIRST_MOMENT_PREFIX, MASTER_PREFIX, SECOND_MOMENT_PREFIX, TensorSpec
from tests.checkpoint.written import geometry, model_tensors
from tests.growth.in_memory import Tensors, everything

layer_lists = st.integers(1, 4).flatmap(
    lambda count: st.tuples(st.just(count), st.lists(st.integers(0, count - 1), min_size=1, max_size=7))
)


@settings(deadline=None)
@given(layer_lists, st.booleans())
def test_every_target_layer_is_its_source_layer_and_the_rest_is_kept(lists: tuple[int, list[int]], tied: bool) -> None:
    count, layers = lists
    source, target = geometry(count, tie_embeddings=tied), geometry(len(layers), tie_embeddings=tied)
    plan = plan_depth(source, target, layers)
    assert {rule.target: rule.shape for rule in plan.rules} == tensor_shapes(target)
    assert plan.is_selection
    tensors = model_tensors(source)
    grown = everything(GrownSource(Tensors(tensors), plan, "carry"))
    assert set(grown) == set(model_tensors(target))
    for key, tensor in grown.items():
        before, prefix, after = key.partition("decoder.layers.")
        number, _, name = after.partition(".")
        origin = f"{before}{prefix}{layers[int(number)]}.{name}" if prefix else key
        assert torch.equal(tensor, tensors[origin])
        assert tensor.dtype == tensors[origin].dtype


def test_reset_makes_the_moments_zero_and_nothing_else() -> None:
    tensors = model_tensors(geometry(2))
    plan = plan_depth(geometry(2), geometry(5), stack_layers(2, 5))
    carried = everything(GrownSource(Tensors(tensors), plan, "carry"))
    for key, tensor in everything(GrownSource(Tensors(tensors), plan, "reset")).items():
        is_moment = key.startswith((FIRST_MOMENT_PREFIX, SECOND_MOMENT_PREFIX))
        expected = torch.zeros_like(carried[key]) if is_moment else carried[key]
        assert torch.equal(tensor, expected)


def test_growths_chain() -> None:
    tensors = model_tensors(geometry(2))
    once = GrownSource(Tensors(tensors), plan_depth(geometry(2), geometry(3), (0, 1, 1)), "carry")
    twice = GrownSource(once, plan_depth(geometry(3), geometry(4), (2, 0, 1, 2)), "carry")
    direct = GrownSource(Tensors(tensors), plan_depth(geometry(2), geometry(4), (1, 0, 1, 1)), "carry")
    ours, theirs = everything(twice), everything(direct)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 16}, "hidden_size: stack changes num_layers alone, so keep 8"),
        ({"num_query_groups": 4}, "num_query_groups: stack changes num_layers alone, so keep 2"),
        ({"ffn_hidden_size": 24}, "ffn_hidden_size: stack changes num_layers alone, so keep 12"),
        ({"vocab_size": 33}, "vocab_size: makes vocab_size 33, the source has 30"),
        ({"tie_embeddings": True}, "tie_embeddings: an untied output cannot be tied"),
        ({"rope_base": 5e5}, "rope_base"),
        ({"norm_epsilon": 1e-6}, "norm_epsilon"),
    ],
)
def test_growth_in_depth_refuses_any_other_change(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(GrowthError, match=says):
        plan_depth(geometry(2), geometry(4, **changes), (0, 1, 0, 1))


def test_a_layer_list_that_does_not_fit_is_refused() -> None:
    with pytest.raises(GrowthError, match="gives 3 layers but the target model has 4"):
        plan_depth(geometry(2), geometry(4), (0, 1, 0))
    with pytest.raises(GrowthError, match="entry 2 is 2; allowed: 0 to 1"):
        plan_depth(geometry(2), geometry(4), (0, 1, 2, 1))


def test_a_source_that_is_not_the_plans_is_refused_by_tensor() -> None:
    plan = plan_depth(geometry(2), geometry(4), (0, 1, 0, 1))
    tensors = model_tensors(geometry(2))
    missing = dict(tensors)
    del missing["decoder.layers.1.mlp.linear_fc2.weight"]
    with pytest.raises(GrowthError, match="decoder.layers.1.mlp.linear_fc2.weight is missing"):
        GrownSource(Tensors(missing), plan, "carry")
    with pytest.raises(GrowthError, match="decoder.layers.2.* is no tensor of such a model"):
        GrownSource(Tensors(model_tensors(geometry(3))), plan, "carry")
    with pytest.raises(GrowthError, match=r"linear_fc1.weight has shape \(48, 8\), expected \(24, 8\)"):
        GrownSource(Tensors(model_tensors(geometry(2, ffn_hidden_size=24))), plan, "carry")
    partial = dict(tensors)
    del partial[FIRST_MOMENT_PREFIX + "output_layer.weight"]
    with pytest.raises(GrowthError, match="covers only some of the weights"):
        GrownSource(Tensors(partial), plan, "carry")
    with pytest.raises(GrowthError, match="optimizer_state is 'keep'; allowed: reset, carry"):
        GrownSource(Tensors(tensors), plan, "keep")
    with pytest.raises(GrowthError, match="has no tensor decoder.layers.9"):
        GrownSource(Tensors(tensors), plan, "carry").spec("decoder.layers.9.mlp.linear_fc2.weight")


def _with_rule(rule: TensorRule) -> GrowthPlan:
    plan = plan_depth(geometry(1), geometry(1), (0,))
    rules = tuple(rule if old.target == rule.target else old for old in plan.rules)
    return GrowthPlan("by hand", plan.source_geometry, plan.target_geometry, rules)


@given(
    st.lists(st.integers(0, 31), min_size=1, max_size=40),
    st.lists(st.integers(0, 7), min_size=1, max_size=12),
    st.data(),
)
@settings(deadline=None)
def test_a_rule_with_indices_and_factors_per_axis_is_applied_to_any_region(
    rows: list[int], columns: list[int], data: st.DataObject
) -> None:
    """What growth in width will say: gather along both axes, weights times a, gradients times g per axis."""
    key = "output_layer.weight"
    halves = tuple(0.5 + (c % 3) for c in columns)
    axes = (
        AxisRule(32, tuple(rows), gradient_scale=tuple(2.0 for _ in rows)),
        AxisRule(8, tuple(columns), scale=halves, gradient_scale=tuple(0.25 for _ in columns)),
    )
    rule = TensorRule(key, axes, key)
    assert not rule.is_selection
    assert rule.shape == (len(rows), len(columns))
    tensors = model_tensors(geometry(1))
    source = GrownSource(Tensors(tensors), _with_rule(rule), "carry")
    r0, c0 = data.draw(st.integers(0, len(rows))), data.draw(st.integers(0, len(columns)))
    region = (
        slice(r0, data.draw(st.integers(r0, len(rows)))),
        slice(c0, data.draw(st.integers(c0, len(columns)))),
    )
    for prefix, factor in (
        ("", torch.tensor(halves)),
        (MASTER_PREFIX, torch.tensor(halves)),
        (FIRST_MOMENT_PREFIX, torch.tensor(0.5)),
        (SECOND_MOMENT_PREFIX, torch.tensor(0.25)),
    ):
        stored = tensors[prefix + key]
        origin = stored if prefix else tensors[MASTER_PREFIX + key]  # a computed weight is its master, cast
        expected = (origin[rows][:, columns].float() * factor).to(stored.dtype)[region]
        got = source.read(prefix + key, region)
        assert got.dtype == stored.dtype
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_a_filled_tensor_is_zero_in_weight_and_moments() -> None:
    rule = TensorRule("decoder.layers.0.mlp.linear_fc2.weight", (AxisRule(8), AxisRule(12)), fill="zeros")
    grown = GrownSource(Tensors(model_tensors(geometry(1))), _with_rule(rule), "carry")
    for key, tensor in everything(grown).items():
        assert (tensor.count_nonzero() == 0) == key.endswith("linear_fc2.weight")
    assert grown.spec(rule.target) == TensorSpec((8, 12), torch.bfloat16)
    assert grown.spec(MASTER_PREFIX + rule.target) == TensorSpec((8, 12), torch.float32)


def test_a_rule_names_a_source_or_a_fill() -> None:
    for source, fill in ((None, None), ("x", "zeros")):
        with pytest.raises(ValueError, match="either a source tensor or a fill"):
            TensorRule("x", (AxisRule(1),), source, fill)  # type: ignore[arg-type]
