"""Adam's moments of a grown model, under each policy.

Measured against autograd in float64: with a model's gradient for its exp_avg, and its square for its exp_avg_sq, the
grown model's carried moments are the gradient of the grown model, and its square, within 1e-10 of the largest element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.rules import AxisRule, GrowthPlan, TensorRule
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.tensors import FIRST_MOMENT_PREFIX, MOMENT_PREFIXES, SECOND_MOMENT_PREFIX
from tests.growth.in_memory import (
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
    a_batch,
    everything,
    gradients,
    grid,
    name_within,
    plan_of,
    small,
    trained_like,
    with_moments,
)
from tests.growth.models import Growth, steps

ALLOWED = 1e-10
few = settings(max_examples=25, deadline=None, derandomize=True)


def with_its_gradient(model: ModelConfig) -> Tensors:
    """A model whose moments are its gradient and the square of it."""
    weights = trained_like(model)
    found = gradients(weights, model, a_batch(model))
    return with_moments(weights, found, {key: value.square() for key, value in found.items()})


def along_axes(rule: TensorRule, marked: Callable[[AxisRule], list[bool] | None]) -> torch.Tensor:
    """Where some axis is marked, in the shape of the tensor."""
    result = torch.zeros(rule.shape, dtype=torch.bool)
    for number, axis in enumerate(rule.axes):
        flags = marked(axis)
        if flags is not None:
            result |= torch.tensor(flags).view([-1 if n == number else 1 for n in range(len(rule.axes))])
    return result


def sourceless(rule: TensorRule) -> torch.Tensor:
    if rule.state == "new":
        return torch.ones(rule.shape, dtype=torch.bool)
    return along_axes(rule, lambda axis: None if axis.index is None else [index < 0 for index in axis.index])


def wrong_moments(plan: GrowthPlan) -> dict[str, torch.Tensor]:
    """By tensor, where its carried moments are not the gradient and its square, or not zero without a source."""
    grown = everything(GrownSource(with_its_gradient(plan.source_geometry), plan, "carry"))
    expected = gradients(grown, plan.target_geometry, a_batch(plan.source_geometry))
    wrong = {}
    for rule in plan.rules:
        gradient, new = expected[rule.target], sourceless(rule)
        gradient = gradient.masked_fill(new, 0.0)
        off = torch.zeros_like(new)
        for prefix, value in ((FIRST_MOMENT_PREFIX, gradient), (SECOND_MOMENT_PREFIX, gradient.square())):
            moment = grown[prefix + rule.target]
            off |= (moment - value).abs() > ALLOWED * value.abs().max()
            off |= new & (moment != 0)
        if off.any():
            wrong[rule.target] = off
    return wrong


COPIES: dict[str, dict[str, Any]] = {
    "ffn": {"ffn_hidden_size": 15},
    "hidden x1.5": {"hidden_size": 18},
    "hidden x2": {"hidden_size": 24},
    "head_dim": {"head_dim": 8},
    "heads": {"num_attention_heads": 10},
    "groups": {"num_attention_heads": 9, "num_query_groups": 3},
    "all": {
        "hidden_size": 20, "ffn_hidden_size": 15, "head_dim": 8, "num_attention_heads": 16, "num_query_groups": 4,
    },
    "with depth": {"num_layers": 4, "hidden_size": 18},
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", COPIES)
def test_carried_moments_of_copies_are_the_gradient_of_the_grown_model(name: str, tied: bool) -> None:
    operator = "identity+split" if "num_layers" in COPIES[name] else "split"
    for options in grid(shares=["even", "uneven"], order=["interleaved", "tiled"]):
        plan = plan_of(small(tie_embeddings=tied), COPIES[name], operator=operator, **options)
        assert not plan.inexact_moments
        assert not wrong_moments(plan)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-5 * 12 / 20])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_carried_moments_of_old_coordinates_under_zero_are_the_gradient_of_the_grown_model(
    epsilon: float, tied: bool
) -> None:
    changes = {**COPIES["all"], "hidden_size": 20, "norm_epsilon": epsilon, "num_layers": 3}
    assert not wrong_moments(plan_of(small(tie_embeddings=tied), changes, operator="zero"))


@few
@given(steps)
def test_carried_moments_are_the_gradient_unless_the_plan_says_otherwise(step: Growth) -> None:
    source, (target, growth) = step
    plan = plan_growth(source, target, growth, SEED)
    if not plan.inexact_moments:
        assert not wrong_moments(plan)


def test_moments_without_a_factor_of_the_gradient_are_not_the_gradient() -> None:
    plan = plan_of(small(), COPIES["hidden x1.5"])
    for number, rule in enumerate(plan.rules):
        if all(axis.gradient_scale is None for axis in rule.axes):
            continue
        plain = replace(rule, axes=tuple(replace(axis, gradient_scale=None) for axis in rule.axes))
        broken = replace(plan, rules=(*plan.rules[:number], plain, *plan.rules[number + 1 :]))
        assert set(wrong_moments(broken)) == {rule.target}


@pytest.mark.parametrize("shares", ["even", "uneven"])
def test_shared_out_heads_make_the_moments_of_k_and_v_inexact_and_no_others(shares: str) -> None:
    plan = plan_of(small(), {"num_query_groups": 6, "hidden_size": 24}, shares=shares)
    assert [text.partition(":")[0] for text in plan.inexact_moments] == ["k and v"]
    wrong = wrong_moments(plan)
    assert {name_within(key) for key in wrong} == {QKV}
    for off in wrong.values():
        rows = off.any(dim=1).view(6, 3, 4)  # [group, q k v, channel]
        assert not rows[:, 0].any()
        assert rows[:, 1:].all()


def test_untying_makes_the_moments_of_embedding_and_output_inexact_and_no_others() -> None:
    plan = plan_of(small(tie_embeddings=True), {"tie_embeddings": False, "hidden_size": 18})
    assert [text.partition(":")[0] for text in plan.inexact_moments] == ["embedding and output"]
    assert set(wrong_moments(plan)) == {EMBEDDING, OUTPUT}


def test_cancelling_noise_makes_moments_inexact_and_says_so() -> None:
    for changes, names in (
        ({"ffn_hidden_size": 15}, {FC1}),
        ({"num_attention_heads": 8}, {QKV}),
        ({"hidden_size": 18}, {EMBEDDING, PROJ, FC2, FINAL_NORM, *GAINS}),
    ):
        plan = plan_of(small(), changes, cancelling_noise=1.0)
        assert ["cancelling noise" in text for text in plan.inexact_moments] == [True]
        assert {name_within(key) for key in wrong_moments(plan)} == names


# Policies.


def test_reset_makes_all_moments_zero() -> None:
    for operator in ("split", "zero", "random", "identity+split"):
        deeper = {"num_layers": 3} if "+" in operator else {}
        plan = plan_of(small(), {"hidden_size": 18, "ffn_hidden_size": 13, **deeper}, operator=operator)
        grown = everything(GrownSource(with_its_gradient(small()), plan, "reset"))
        moments = [key for key in grown if key.startswith(MOMENT_PREFIXES)]
        assert len(moments) == 2 * len(plan.rules)
        assert all(grown[key].count_nonzero() == 0 for key in moments)


@pytest.mark.parametrize("order", ["interleaved", "tiled"])
def test_asymmetric_keeps_the_first_copy_by_hand(order: str) -> None:
    plan = plan_of(small(), {"hidden_size": 24}, order=order)
    source = with_its_gradient(small())
    carried, kept = (everything(GrownSource(source, plan, policy)) for policy in ("carry", "asymmetric"))
    first = [place for place in range(24) if (place % 2 == 0 if order == "interleaved" else place < 12)]
    later = [place for place in range(24) if place not in first]
    for prefix in MOMENT_PREFIXES:
        for key, columns in (
            (EMBEDDING, True),
            (OUTPUT, True),
            (f"decoder.layers.0.{FC2}", False),
            (FINAL_NORM, False),
        ):
            ours, theirs = kept[prefix + key], carried[prefix + key]
            if columns:
                ours, theirs = ours.T, theirs.T
            assert torch.equal(ours[first], theirs[first])
            assert theirs[later].count_nonzero() > 0
            assert ours[later].count_nonzero() == 0


@pytest.mark.parametrize(
    ("changes", "growth"),
    [
        (COPIES["all"], {"operator": "split", "shares": "uneven"}),
        ({**COPIES["all"], "num_layers": 5}, {"operator": "stack+split"}),
        ({**COPIES["all"], "num_layers": 5}, {"operator": "zero"}),
        ({"hidden_size": 18, "num_layers": 3}, {"operator": "identity+sparkling"}),
        ({"hidden_size": 18, "num_layers": 3}, {"operator": "random"}),
        ({"num_query_groups": 6}, {"operator": "split"}),
    ],
)
def test_asymmetric_is_carry_for_as_many_elements_as_the_source_has_and_zero_for_all_others(
    changes: dict[str, Any], growth: dict[str, Any]
) -> None:
    plan = plan_of(small(), changes, **growth)
    source = with_its_gradient(small())
    carried, kept = (everything(GrownSource(source, plan, policy)) for policy in ("carry", "asymmetric"))
    seen = set()
    for rule in plan.rules:
        old = ~along_axes(rule, lambda axis: None if axis.new is None else list(axis.new))
        if rule.source in seen or rule.state == "new":
            old &= False
        else:
            seen.add(rule.source)
            assert old.sum() == torch.Size(rule.source_shape).numel()
        for prefix in MOMENT_PREFIXES:
            assert torch.equal(kept[prefix + rule.target], carried[prefix + rule.target] * old)
    for key in tensor_shapes(plan.target_geometry):  # the weights do not depend on the policy
        assert torch.equal(kept[key], carried[key])
