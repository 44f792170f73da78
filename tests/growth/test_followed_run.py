"""The multipliers under which a grown run follows the run it was grown from, measured over 25 steps of AdamW."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from growth_megatron.checkpoint.folder.manifest import Multipliers
from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.plan import inexact_multipliers
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.tensors import MOMENT_PREFIXES
from tests.growth.in_memory import (
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    GAINS,
    OUTPUT,
    PROJ,
    QKV,
    Tensors,
    a_batch,
    everything,
    loss,
    name_within,
    plan_of,
    small,
    trained_like,
    with_moments,
)

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


@functools.cache
def source_run(model: ModelConfig, epsilon: float, fresh: bool) -> tuple[Tensors, list[float]]:
    """Where the run to be grown stands after its first steps, and the losses of the steps that follow."""
    _, warm = train(trained_like(model), model, 0, WARM, epsilon=epsilon)
    if fresh:
        warm = Tensors({key: value for key, value in warm.tensors.items() if not key.startswith(MOMENT_PREFIXES)})
    return warm, train(warm.tensors, model, WARM, STEPS, epsilon=epsilon)[0]


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
    warm, theirs = source_run(plan.source_geometry, epsilon, fresh)
    grown = everything(GrownSource(warm, executed or plan, policy))
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
