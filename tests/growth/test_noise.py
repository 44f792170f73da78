"""Noise and new random weights: the same bits in any region, sums that cancel, deviations as stated."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.errors import GrowthError
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.tensors import MASTER_PREFIX, MOMENT_PREFIXES
from tests.checkpoint.written import model_tensors
from tests.growth.in_memory import (
    EMBEDDING,
    FC1,
    FC2,
    OUTPUT,
    PROJ,
    QKV,
    SEED,
    Tensors,
    changed,
    everything,
    name_within,
    plan_of,
    small,
    trained_like,
)

WIDER: dict[str, Any] = {"hidden_size": 18, "ffn_hidden_size": 15, "head_dim": 8, "num_attention_heads": 10}
PLANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the paper's noise": ({**WIDER, "num_layers": 3}, {"noise": 0.2}),
    "the paper's noise on a stack": ({"num_layers": 3}, {"operator": "stack", "noise": 0.2}),
    "cancelling noise": (WIDER, {"cancelling_noise": 1.0, "shares": "uneven", "order": "tiled"}),
    "random width and depth": ({**WIDER, "num_layers": 4}, {"operator": "random"}),
    "zero width, noise": ({**WIDER, "num_layers": 3}, {"operator": "zero", "noise": 0.1}),
}


def plan_named(name: str) -> GrowthPlan:
    changes, growth = PLANS[name]
    return plan_of(small(), changes, **growth)


SOURCE = model_tensors(small())
WHOLE = {name: everything(GrownSource(Tensors(SOURCE), plan_named(name), "carry")) for name in PLANS}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_split_of_a_tensor_into_regions_gives_the_same_bits(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(PLANS)))
    source = GrownSource(Tensors(SOURCE), plan_named(name), "carry")
    for key in data.draw(st.lists(st.sampled_from(sorted(WHOLE[name])), min_size=1, max_size=6)):
        expected = WHOLE[name][key]
        cuts = [
            sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=3))}) for size in source.spec(key).shape
        ]
        parts = [[slice(a, b) for a, b in pairwise(cut)] for cut in cuts]
        regions: list[tuple[slice, ...]] = [()]
        for axis in parts:
            regions = [(*region, part) for region in regions for part in axis]
        for region in data.draw(st.permutations(regions)):
            assert torch.equal(source.read(key, region), expected[region])


@pytest.mark.parametrize("name", PLANS)
def test_the_seed_alone_decides_the_numbers(name: str) -> None:
    changes, growth = PLANS[name]
    plans = [
        plan_growth(small(), changed(small(), **changes), GrowthConfig(**growth), seed)
        for seed in (SEED, SEED, SEED + 1)
    ]
    runs = [everything(GrownSource(Tensors(SOURCE), plan, "carry")) for plan in plans]
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    changed_by_seed = {name_within(key) for key in runs[0] if not torch.equal(runs[0][key], runs[2][key])}
    assert {FC1, FC2, QKV} <= changed_by_seed


@pytest.mark.parametrize("policy", ["reset", "carry", "asymmetric"])
@pytest.mark.parametrize("name", PLANS)
def test_a_computed_weight_is_its_master_cast(name: str, policy: str) -> None:
    plan = plan_named(name)
    grown = everything(GrownSource(Tensors(SOURCE), plan, policy))
    for rule in plan.rules:
        if not rule.is_selection:
            assert torch.equal(grown[rule.target], grown[MASTER_PREFIX + rule.target].to(torch.bfloat16))


def test_a_weight_is_its_master_cast_in_whatever_order_regions_are_read() -> None:
    source = GrownSource(Tensors(SOURCE), plan_named("cancelling noise"), "carry")
    key = f"decoder.layers.0.{FC1}"
    rows = source.spec(key).shape[0]
    top, bottom = (slice(0, rows // 2), slice(0, 18)), (slice(rows // 2, rows), slice(0, 18))
    for first, second in ((top, bottom), (bottom, top), (top, top)):
        weight, master = source.read(key, first), source.read(MASTER_PREFIX + key, second)
        assert torch.equal(weight, WHOLE["cancelling noise"][key][first])
        assert torch.equal(master, WHOLE["cancelling noise"][MASTER_PREFIX + key][second])


def test_noise_does_not_reach_the_moments() -> None:
    for name in ("the paper's noise", "cancelling noise"):
        changes, growth = PLANS[name]
        still = {key: value for key, value in growth.items() if "noise" not in key}
        without = everything(GrownSource(Tensors(SOURCE), plan_of(small(), changes, **still), "carry"))
        for key, value in WHOLE[name].items():
            assert not key.startswith(MOMENT_PREFIXES) or torch.equal(value, without[key])


# Sizes, on a model whose matrices have thousands of elements.


def large() -> Any:
    return small(hidden_size=48, num_attention_heads=8, head_dim=8, ffn_hidden_size=64, vocab_size=128)


Weights = dict[str, torch.Tensor]


def noise_of(changes: dict[str, Any], **growth: Any) -> tuple[GrowthPlan, Weights, Weights]:
    """A plan, the float64 weights with noise, and those without."""
    plan = plan_of(large(), changes, **growth)
    weights = Tensors(trained_like(plan.source_geometry))
    still = plan_of(large(), changes, **{key: value for key, value in growth.items() if "noise" not in key})
    return plan, everything(GrownSource(weights, plan, "reset")), everything(GrownSource(weights, still, "reset"))


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("order", ["interleaved", "tiled"])
def test_cancelling_noise_sums_to_zero_over_copies_and_has_the_size_asked_for(order: str, factor: int) -> None:
    growth = {"cancelling_noise": 1.5, "order": order, "shares": "uneven"}
    plan, noisy, still = noise_of({"hidden_size": 48 * factor, "ffn_hidden_size": 64 * factor}, **growth)
    deviation = 1.5 * plan.target_geometry.init_std
    for rule in plan.rules:
        difference = noisy[rule.target] - still[rule.target]
        if rule.noise is None:
            assert difference.count_nonzero() == 0
            continue
        index = torch.tensor(rule.axes[1].index)
        sums = torch.zeros(len(difference), rule.axes[1].size, dtype=torch.float64).index_add_(1, index, difference)
        assert sums.abs().max() < 1e-7
        assert difference.std() == pytest.approx(deviation, rel=0.05)
        assert difference.mean().abs() < 0.05 * deviation
        assert (difference[:, 1:] != difference[:, :1]).all()
        assert (difference[1:] != difference[:1]).all()
    noised = {name_within(rule.target) for rule in plan.rules if rule.noise}
    assert noised == {QKV, FC1, FC2, OUTPUT}  # what reads copies


def test_a_coordinate_without_copies_gets_no_cancelling_noise() -> None:
    plan, noisy, still = noise_of({"ffn_hidden_size": 96}, cancelling_noise=1.0)
    key = f"decoder.layers.0.{FC2}"
    index = torch.tensor(plan_of(large(), {"ffn_hidden_size": 96}).rules[6].axes[1].index)
    copied = torch.bincount(index)[index] > 1
    difference = noisy[key] - still[key]
    assert {rule.target for rule in plan.rules if rule.noise} == {f"decoder.layers.{n}.{FC2}" for n in (0, 1)}
    assert (difference[:, copied] != 0).all()
    assert (difference[:, ~copied] == 0).all()
    assert copied.sum() == 64


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_the_papers_noise_has_the_stated_variances(share: float) -> None:
    """W <- (1 - a) W + a eps with var(eps) = 1 / (D L^2) for o and down, 2 / (5 D) for the layers' other matrices."""
    plan, noisy, still = noise_of({"hidden_size": 96, "num_layers": 4}, noise=share)
    for key, shape in tensor_shapes(plan.target_geometry).items():
        rest = (noisy[key] - (1 - share) * still[key]) / share
        name = name_within(key)
        if len(shape) == 1 or key in (EMBEDDING, OUTPUT):
            assert torch.equal(noisy[key], still[key])
            continue
        variance = 1 / (96 * 4**2) if name in (PROJ, FC2) else 2 / (5 * 96)
        assert rest.std() == pytest.approx(math.sqrt(variance), rel=0.05)
        assert rest.mean().abs() < 0.1 * math.sqrt(variance)


def test_copies_differ_after_noise() -> None:
    """Copies of a layer, of rows and of columns, which stay equal for ever without it."""
    grown, layer = {"hidden_size": 96, "num_layers": 4}, "decoder.layers.{}.{}"
    _, noisy, still = noise_of(grown, noise=0.01)
    for name in (QKV, FC1, PROJ, FC2):
        for weights, equal in ((still, True), (noisy, False)):
            assert torch.equal(weights[layer.format(0, name)], weights[layer.format(2, name)]) == equal
            value = weights[layer.format(0, name)]
            copies = (value[0::2], value[1::2]) if name in (PROJ, FC2) else (value[:, 0::2], value[:, 1::2])
            assert bool((copies[0] == copies[1]).all()) == equal
            assert bool((copies[0] == copies[1]).any()) == equal
    _, noisy, still = noise_of({"hidden_size": 96}, cancelling_noise=0.5)
    for key in (layer.format(0, QKV), layer.format(1, FC1), OUTPUT):
        assert (still[key][:, 0::2] == still[key][:, 1::2]).all()
        assert (noisy[key][:, 0::2] != noisy[key][:, 1::2]).all()


@pytest.mark.parametrize(
    ("changes", "growth"),
    [
        ({"num_layers": 4}, {"cancelling_noise": 0.1}),
        ({"num_layers": 4}, {"shares": "uneven"}),
        ({"num_query_groups": 6}, {"cancelling_noise": 0.1}),
    ],
)
def test_what_is_to_part_copies_is_refused_where_none_are_made(changes: dict[str, Any], growth: dict[str, Any]) -> None:
    with pytest.raises(GrowthError, match=f"{next(iter(growth))}: .*remove it"):
        plan_of(small(), changes, **growth)
