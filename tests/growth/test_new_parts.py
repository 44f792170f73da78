"""Which parameters are new, by the plan of a growth."""

from __future__ import annotations

from typing import Any

import pytest

from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.growth.new_parts import count_new, new_mask
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.model.tensors import whole
from tests.train.multiplier_workers import BASE, GROWN, stage_at


def _plan(operator: str, target: dict[str, Any], **more: Any) -> GrowthPlan:
    source, grown = (stage_at({}, model).model for model in (BASE, {**BASE, **target}))
    return plan_growth(source, grown, GrowthConfig(operator=operator, **more))


@pytest.mark.parametrize(
    ("operator", "layers", "new"),
    [("stack", 4, {2, 3}), ("interpolate", 4, {1, 3}), ("identity", 3, None), ("random", 4, {2, 3})],
)
def test_the_first_copy_of_each_layer_is_old(operator: str, layers: int, new: set[int] | None) -> None:
    plan = _plan(operator, {"num_layers": layers})
    found = {
        int(rule.target.split(".")[2])
        for rule in plan.rules
        if rule.target.startswith("decoder.layers.") and bool(new_mask(rule, whole(rule.shape)).all())
    }
    assert len(found) == layers - 2
    assert new is None or found == new


@pytest.mark.parametrize("operator", ["split", "zero", "random"])
def test_half_of_each_widened_axis_is_new_and_the_count_is_that_of_the_masks(operator: str) -> None:
    plan = _plan(operator, GROWN)
    for rule in plan.rules:
        mask = new_mask(rule, whole(rule.shape)).expand(rule.shape)
        widened = sum(axis.new is not None for axis in rule.axes)
        assert float(mask.double().mean()) == 1 - 0.5**widened, rule.target
    assert count_new(plan) == sum(int(new_mask(r, whole(r.shape)).expand(r.shape).sum()) for r in plan.rules)


def test_a_region_has_its_part_of_the_mask() -> None:
    (rule,) = (rule for rule in _plan("split", GROWN).rules if rule.target.endswith("layers.1.mlp.linear_fc2.weight"))
    region = slice(3, 70), slice(10, 11)
    expected = new_mask(rule, whole(rule.shape)).expand(rule.shape)[region]
    assert new_mask(rule, region).expand(67, 1).equal(expected)
