"""Adam's moments of a grown model, what gets no gradient, and the multipliers under which it follows its source.

Measured against autograd in float64: with a model's gradient for its exp_avg, and its square for its exp_avg_sq, the
grown model's carried moments are the gradient of the grown model, and its square, within 1e-10 of the largest element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from growth_megatron.checkpoint.manifest import Multipliers
from growth_megatron.checkpoint.source import FIRST_MOMENT_PREFIX, MOMENT_PREFIXES, SECOND_MOMENT_PREFIX
from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.plan import inexact_multipliers, plan_growth
from growth_megatron.growth.rules import AxisRule, GrowthPlan, TensorRule
from growth_megatron.growth.view import GrownSource
from growth_megatron.growth.width import rotary_channels
from growth_megatron.model.geometry import tensor_shapes
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
    everything,
    gradients,
    grid,
    loss,
    name_within,
    plan_of,
    small,
    trained_like,
)
from tests.growth.models import Growth, steps

ALLOWED = 1e-10
few = settings(max_examples=25, deadline=None, derandomize=True)


def a_batch(model: ModelConfig, seed: int = 3) -> torch.Tensor:
    """``[6, 9]``, in which every token comes up as an input."""
    generator = torch.Generator().manual_seed(seed)
    every = torch.randperm(model.vocab_size, generator=generator)
    more = torch.randint(0, model.vocab_size, (48 - len(every),), generator=generator)
    last = torch.randint(0, model.vocab_size, (6, 1), generator=generator)
    return torch.cat([torch.cat([every, more]).view(6, 8), last], dim=1)


def with_moments(
    weights: Mapping[str, torch.Tensor], first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]
) -> Tensors:
    tensors = dict(weights)
    tensors |= {FIRST_MOMENT_PREFIX + key: value for key, value in first.items()}
    tensors |= {SECOND_MOMENT_PREFIX + key: value for key, value in second.items()}
    return Tensors(tensors)


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
    # Without copies along an input there is no noise.
    assert not plan_of(small(), {"num_query_groups": 6}, cancelling_noise=1.0).inexact_moments[1:]
    assert not plan_of(small(), {"num_layers": 4}, operator="identity+split", cancelling_noise=1.0).inexact_moments


# What gets no gradient.


def fused_rows(model: ModelConfig) -> list[tuple[str, int, int, int]]:
    """(q, k or v; group; head in the group; channel) of each row of the fused projection."""
    groups, h = model.query_groups, model.kv_channels
    rows = []
    for group in range(groups):
        a_group = model.num_attention_heads // groups
        blocks = [*(("q", head) for head in range(a_group)), ("k", 0), ("v", 0)]
        rows += [(kind, group, head, channel) for kind, head in blocks for channel in range(h)]
    return rows


def out_columns(model: ModelConfig) -> list[tuple[int, int, int]]:
    """(group, head in the group, channel) of each column of the output projection."""
    return [row[1:] for row in fused_rows(model) if row[0] == "q"]


Mask = tuple[list[bool] | bool, ...]


def _silent_hidden(plan: GrowthPlan) -> dict[str, Mask]:
    new = [column >= plan.source_geometry.hidden_size for column in range(plan.target_geometry.hidden_size)]
    readers: dict[str, Mask] = dict.fromkeys((QKV, FC1, OUTPUT), (False, new))
    return readers | dict.fromkeys((*GAINS, FINAL_NORM), (new,))


def _silent_rows_of_tied(plan: GrowthPlan) -> dict[str, Mask]:
    new = [row >= plan.source_geometry.hidden_size for row in range(plan.target_geometry.hidden_size)]
    masks: dict[str, Mask] = {}
    for number in reversed(range(plan.target_geometry.num_layers)):
        masks[f"decoder.layers.{number}.{FC2}"] = (new, False)
        if number not in _new_layers(plan):
            break
        masks[f"decoder.layers.{number}.{PROJ}"] = (new, False)
    return masks


def _silent_ffn(plan: GrowthPlan) -> dict[str, Mask]:
    wide = plan.target_geometry.ffn_hidden_size
    new = [row >= plan.source_geometry.ffn_hidden_size for row in range(wide)]
    return {FC1: ([*new, *[False] * wide], False), FC2: (False, new)}


def _silent_groups(plan: GrowthPlan) -> dict[str, Mask]:
    old, target = plan.source_geometry.query_groups, plan.target_geometry
    rows = [kind in "qk" and group >= old for kind, group, _, _ in fused_rows(target)]
    return {QKV: (rows, False), PROJ: (False, [group >= old for group, _, _ in out_columns(target)])}


def _silent_heads(plan: GrowthPlan) -> dict[str, Mask]:
    source = plan.source_geometry
    groups, a_group = source.query_groups, source.num_attention_heads // source.query_groups
    rows = [
        kind == "q" and group < groups and head >= a_group for kind, group, head, _ in fused_rows(plan.target_geometry)
    ]
    return {QKV: (rows, False)}


def _new_rotary(plan: GrowthPlan) -> list[bool]:
    h, wide = plan.source_geometry.kv_channels, plan.target_geometry.kv_channels
    return [channel < 0 for channel in rotary_channels(h, wide // h)]


def _silent_channels(plan: GrowthPlan) -> dict[str, Mask]:
    new, h, target = _new_rotary(plan), plan.source_geometry.kv_channels, plan.target_geometry
    rows = [kind == "q" and new[channel] for kind, _, _, channel in fused_rows(target)]
    return {QKV: (rows, False), PROJ: (False, [channel >= h for _, _, channel in out_columns(target)])}


def _silent_copied_channels(plan: GrowthPlan) -> dict[str, Mask]:
    new = _new_rotary(plan)
    return {QKV: ([kind in "qk" and new[channel] for kind, _, _, channel in fused_rows(plan.target_geometry)], False)}


def _new_layers(plan: GrowthPlan) -> list[int]:
    layers = plan.layers or ()
    return [number for number, layer in enumerate(layers) if layer in layers[:number]]


def _silent_layers(plan: GrowthPlan) -> dict[str, Mask]:
    return {
        f"decoder.layers.{number}.{name}": (True,) * (1 if name in GAINS else 2)
        for number in _new_layers(plan)
        for name in (QKV, FC1, *GAINS)
    }


CLAIMS: dict[str, Callable[[GrowthPlan], dict[str, Mask]]] = {
    "columns and gains that read the new hidden channels:": _silent_hidden,
    "new gate rows and down columns:": _silent_ffn,
    "new groups' q and k rows and o columns:": _silent_groups,
    "q rows of new heads in old groups:": _silent_heads,
    "new q channels, until the new k channels have moved; o columns of new v channels": _silent_channels,
    "new q and k channels: both give zero": _silent_copied_channels,
    "rows of the new hidden channels in down of the last layer": _silent_rows_of_tied,
    "qkv, fc1 and gains of the new layers:": _silent_layers,
}


def claimed_silent(plan: GrowthPlan) -> dict[str, torch.Tensor]:
    """By tensor, the elements of which the plan says that they get no gradient."""
    silent = {key: torch.zeros(shape, dtype=torch.bool) for key, shape in tensor_shapes(plan.target_geometry).items()}
    for text in plan.silent:
        (claim,) = [masks for start, masks in CLAIMS.items() if text.startswith(start)]
        masks = claim(plan)
        for key, flags in silent.items():
            for number, mask in enumerate(masks.get(key, masks.get(name_within(key), ()))):
                flags |= torch.tensor(mask).view([-1 if n == number else 1 for n in range(flags.dim())])
    return silent


ADDED = {"num_attention_heads": 12, "num_query_groups": 3}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("changes", "growth"),
    [
        ({"hidden_size": 16}, {"operator": "zero"}),
        ({"hidden_size": 16, "norm_epsilon": 1e-5 * 12 / 16}, {"operator": "zero"}),
        ({"ffn_hidden_size": 13}, {"operator": "zero"}),
        ({"num_attention_heads": 8}, {"operator": "zero"}),
        ({"num_attention_heads": 9, "num_query_groups": 3}, {"operator": "zero"}),
        (ADDED, {"operator": "zero"}),
        ({"head_dim": 8}, {"operator": "zero"}),
        ({"hidden_size": 16, "ffn_hidden_size": 13, "head_dim": 8, **ADDED}, {"operator": "zero"}),
        ({"hidden_size": 16, "ffn_hidden_size": 13, "head_dim": 8, "num_layers": 4, **ADDED}, {"operator": "zero"}),
        ({"num_layers": 5}, {"operator": "identity"}),
        ({"num_layers": 3, "hidden_size": 18}, {"operator": "identity+split"}),
        ({"num_layers": 3, "ffn_hidden_size": 13}, {"operator": "zero+random"}),
        ({"head_dim": 8}, {"operator": "split"}),
        ({"head_dim": 8, "hidden_size": 18}, {"operator": "sparkling"}),
        ({"head_dim": 8, "hidden_size": 18}, {"cancelling_noise": 1.0, "shares": "uneven"}),
        ({"hidden_size": 24, "ffn_hidden_size": 20}, {"operator": "hypercloning"}),
        ({"hidden_size": 16, "ffn_hidden_size": 13, "head_dim": 8, "num_layers": 3, **ADDED}, {"operator": "random"}),
        ({"head_dim": 8}, {"noise": 0.1}),
        ({"ffn_hidden_size": 13, "head_dim": 8, **ADDED}, {"operator": "zero", "noise": 0.1}),
    ],
)
def test_exactly_what_the_plan_says_gets_no_gradient(
    changes: dict[str, Any], growth: dict[str, Any], tied: bool
) -> None:
    assert_silent_as_claimed(plan_of(small(tie_embeddings=tied), changes, **growth))


@few
@given(steps)
def test_exactly_what_any_plan_says_gets_no_gradient(step: Growth) -> None:
    source, (target, growth) = step
    assert_silent_as_claimed(plan_growth(source, target, growth, SEED))


def assert_silent_as_claimed(plan: GrowthPlan) -> None:
    weights = everything(GrownSource(Tensors(trained_like(plan.source_geometry)), plan, "reset"))
    found = gradients(weights, plan.target_geometry, a_batch(plan.source_geometry))
    rounding = 1e-14 if plan.options.get("cancelling_noise") else 0.0  # what cancels leaves some
    for key, silent in claimed_silent(plan).items():
        assert torch.equal(found[key].abs() <= rounding, silent), key


def test_new_layers_get_a_gradient_where_it_starts() -> None:
    plan = plan_of(small(), {"num_layers": 4}, operator="identity")
    weights = everything(GrownSource(Tensors(trained_like(plan.source_geometry)), plan, "reset"))
    found = gradients(weights, plan.target_geometry, a_batch(plan.source_geometry))
    for name in (PROJ, FC2):
        key = f"decoder.layers.1.{name}"
        assert weights[key].count_nonzero() == 0
        assert found[key].abs().min() > 0


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


# Trajectories.

RATE, DECAY, BETAS = 1e-2, 0.1, (0.9, 0.95)
WARM, STEPS, APART = 5, 25, 1e-5
Pattern = Mapping[str, Multipliers]


def pattern(key: str) -> str:
    name = name_within(key)
    return key if name == key else f"decoder.layers.*.{name}"


def train(
    state: Mapping[str, torch.Tensor],
    model: ModelConfig,
    first: int,
    count: int,
    multipliers: Pattern | None = None,
    epsilon: float = 1e-8,
) -> tuple[list[float], Tensors]:
    """``count`` steps of AdamW from step ``first`` on, in float64: the losses, and where it ends with its moments.

    Each tensor has a parameter group of its own; moments that are not in ``state`` are zeros.
    """
    leaves = {key: state[key].detach().clone().requires_grad_() for key in tensor_shapes(model)}
    groups = []
    for key, leaf in leaves.items():
        m = (multipliers or {}).get(pattern(key), Multipliers())
        settings_of = {"lr": RATE * m.learning_rate, "weight_decay": DECAY * m.weight_decay, "eps": epsilon * m.epsilon}
        groups.append({"params": [leaf], **settings_of})
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS)
    for key, leaf in leaves.items():
        moments = (state.get(prefix + key, torch.zeros_like(leaf)).detach().clone() for prefix in MOMENT_PREFIXES)
        optimizer.state[leaf] = dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))
        optimizer.state[leaf]["step"] = torch.tensor(float(first))
    losses = []
    for step in range(first, first + count):
        optimizer.zero_grad()
        value = loss(Tensors(leaves), model, a_batch(model, seed=100 + step))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    weights = {key: leaf.detach() for key, leaf in leaves.items()}
    first_moments, second_moments = (
        {key: optimizer.state[leaf][name] for key, leaf in leaves.items()} for name in ("exp_avg", "exp_avg_sq")
    )
    return losses, with_moments(weights, first_moments, second_moments)


def drift(
    plan: GrowthPlan,
    policy: str = "carry",
    multipliers: Pattern | None = None,
    executed: GrowthPlan | None = None,
    epsilon: float = 1e-8,
    fresh: bool = False,
) -> tuple[float, float]:
    """Largest difference in loss from the run that was not grown: at the first step, and over all.

    ``fresh``: both go on with zero moments.
    """
    _, warm = train(trained_like(plan.source_geometry), plan.source_geometry, 0, WARM, epsilon=epsilon)
    if fresh:
        warm = Tensors({key: value for key, value in warm.tensors.items() if not key.startswith(MOMENT_PREFIXES)})
    grown = everything(GrownSource(warm, executed or plan, policy))
    theirs, _ = train(warm.tensors, plan.source_geometry, WARM, STEPS, epsilon=epsilon)
    chosen = plan.multipliers if multipliers is None else multipliers
    ours, _ = train(grown, plan.target_geometry, WARM, STEPS, chosen, epsilon)
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return differences[0], max(differences)


def following(changes: dict[str, Any], source: ModelConfig | None = None, **growth: Any) -> GrowthPlan:
    return plan_of(source or small(), changes, optimizer_state="carry", multipliers=True, **growth)


DOUBLED = {"hidden_size": 24, "ffn_hidden_size": 20, "num_attention_heads": 12, "num_query_groups": 4}


@pytest.mark.parametrize(
    ("tied", "changes", "growth"),
    [
        (False, {"hidden_size": 24}, {}),
        (False, {"ffn_hidden_size": 20}, {"order": "tiled"}),
        (False, DOUBLED, {}),
        (True, DOUBLED, {}),
        (True, {**DOUBLED, "hidden_size": 36}, {"operator": "hypercloning"}),
    ],
)
def test_a_run_grown_under_carry_and_multipliers_follows_the_source_run(
    tied: bool, changes: dict[str, Any], growth: dict[str, Any]
) -> None:
    """25 steps with a large epsilon, so that it matters; 1e-5 is asked for, in float64 it is nothing but rounding."""
    plan = following(changes, small(tie_embeddings=tied), **growth)
    assert not inexact_multipliers(plan)
    assert drift(plan, epsilon=1e-3)[1] < 1e-10


def test_with_fresh_moments_it_follows_a_source_run_with_fresh_moments() -> None:
    assert drift(following(DOUBLED), fresh=True)[1] < 1e-10
    assert drift(following(DOUBLED), fresh=True, multipliers={})[1] > APART


def test_what_each_multiplier_and_the_moments_factors_are_for() -> None:
    """Without any one of them the run leaves its source, though the first step's loss is the same."""
    plan = following(DOUBLED)

    def without(**fields: float) -> Pattern:
        return {key: value.model_copy(update=fields) for key, value in plan.multipliers.items()}

    plain = replace(
        plan,
        rules=tuple(
            replace(rule, axes=tuple(replace(axis, gradient_scale=None) for axis in rule.axes)) for rule in plan.rules
        ),
    )
    runs = {
        "learning rate": drift(plan, multipliers=without(learning_rate=1.0)),
        "weight decay": drift(plan, multipliers=without(weight_decay=1.0)),
        "epsilon": drift(plan, multipliers=without(epsilon=1.0), epsilon=1e-3),
        "any multiplier": drift(plan, multipliers={}),
        "factors of the moments": drift(plan, executed=plain),
        "moments": drift(plan, policy="reset"),
        "moments of later copies": drift(plan, policy="asymmetric"),
    }
    for at_first, over_all in runs.values():
        assert at_first < 1e-12
        assert over_all > 3 * APART, runs


@pytest.mark.parametrize(
    ("changes", "growth", "names"),
    [
        ({"hidden_size": 18}, {}, {EMBEDDING, FINAL_NORM, OUTPUT, *GAINS, QKV, PROJ, FC1, FC2}),
        ({"hidden_size": 24}, {"shares": "uneven"}, {EMBEDDING, FINAL_NORM, OUTPUT, *GAINS, QKV, PROJ, FC1, FC2}),
        ({"ffn_hidden_size": 15}, {}, {FC2}),
        ({"head_dim": 8}, {}, {QKV}),
        ({"num_attention_heads": 8}, {}, {PROJ}),
    ],
)
def test_tensors_without_one_learning_rate_are_named_and_the_run_leaves_its_source(
    changes: dict[str, Any], growth: dict[str, Any], names: set[str]
) -> None:
    plan = following(changes, **growth)
    expected = {name if name in (EMBEDDING, FINAL_NORM, OUTPUT) else f"decoder.layers.*.{name}" for name in names}
    assert set(inexact_multipliers(plan)) == expected
    assert not expected & set(plan.multipliers)
    assert drift(plan)[1] > APART


def test_multipliers_by_hand() -> None:
    half = Multipliers(learning_rate=0.5, weight_decay=2.0)
    assert following(DOUBLED, small(tie_embeddings=True)).multipliers == {
        EMBEDDING: Multipliers(epsilon=0.5),
        FINAL_NORM: half,  # holds the share of the tied output's columns; its gradient is that of its source
        **dict.fromkeys((f"decoder.layers.*.{name}" for name in GAINS), Multipliers(epsilon=0.5)),
        **dict.fromkeys(
            (f"decoder.layers.*.{name}" for name in (QKV, PROJ, FC1, FC2)),
            Multipliers(learning_rate=0.5, weight_decay=2.0, epsilon=0.5),
        ),
    }
    untied = following({"hidden_size": 24}).multipliers
    assert untied[OUTPUT] == half
    assert following({}).multipliers == {}
