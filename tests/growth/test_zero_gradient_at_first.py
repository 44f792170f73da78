"""What gets no gradient in the first step is exactly what the plan says, by autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.growth.view import GrownSource
from growth_megatron.growth.width import rotary_channels
from growth_megatron.model.architecture import K_NORM, Q_NORM, QKV_BIAS, layer_key, layer_rows, tensor_shapes
from tests.growth.in_memory import (
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
    name_within,
    plan_of,
    small,
    trained_like,
)
from tests.growth.models import Growth, steps


def fused_rows(model: ModelConfig) -> list[tuple[str, int, int, int]]:
    """(q, k or v; group; head in the group; channel) of each row of the fused projection."""
    groups, h = model.num_query_groups, model.head_dim
    rows = []
    for group in range(groups):
        heads_per_group = model.num_attention_heads // groups
        blocks = [*(("q", head) for head in range(heads_per_group)), ("k", 0), ("v", 0)]
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
    old, target = plan.source_geometry.num_query_groups, plan.target_geometry
    rows = [kind in "qk" and group >= old for kind, group, _, _ in fused_rows(target)]
    return {QKV: (rows, False), PROJ: (False, [group >= old for group, _, _ in out_columns(target)])}


def _silent_heads(plan: GrowthPlan) -> dict[str, Mask]:
    source = plan.source_geometry
    groups, heads_per_group = source.num_query_groups, source.num_attention_heads // source.num_query_groups
    rows = [
        kind == "q" and group < groups and head >= heads_per_group
        for kind, group, head, _ in fused_rows(plan.target_geometry)
    ]
    return {QKV: (rows, False)}


def _new_rotary(plan: GrowthPlan) -> list[bool]:
    h, wide = plan.source_geometry.head_dim, plan.target_geometry.head_dim
    return [channel < 0 for channel in rotary_channels(h, wide // h)]


def _silent_channels(plan: GrowthPlan) -> dict[str, Mask]:
    new, h, target = _new_rotary(plan), plan.source_geometry.head_dim, plan.target_geometry
    rows = [kind == "q" and new[channel] for kind, _, _, channel in fused_rows(target)]
    return {QKV: (rows, False), PROJ: (False, [channel >= h for _, _, channel in out_columns(target)])}


def _silent_copied_channels(plan: GrowthPlan) -> dict[str, Mask]:
    new = _new_rotary(plan)
    rows = [kind in "qk" and new[channel] for kind, _, _, channel in fused_rows(plan.target_geometry)]
    return {QKV: (rows, False), Q_NORM.name: (new,), K_NORM.name: (new,)}


def _new_layers(plan: GrowthPlan) -> list[int]:
    layers = plan.layers or ()
    return [number for number, layer in enumerate(layers) if layer in layers[:number]]


def _silent_layers(plan: GrowthPlan) -> dict[str, Mask]:
    return {
        layer_key(number, row.name): (True,) * len(row.axes)
        for number in _new_layers(plan)
        for row in layer_rows(plan.target_geometry)
        if row.name not in (PROJ, FC2)
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
    for text in plan.zero_gradient_at_first:
        (claim,) = [masks for start, masks in CLAIMS.items() if text.startswith(start)]
        masks = claim(plan)
        if QKV in masks:
            masks[QKV_BIAS.name] = masks[QKV][:1]
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


@settings(max_examples=25, deadline=None, derandomize=True)
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
