"""Growth in depth: each operator's layers, what becomes of new ones, connection rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.errors import GrowthError
from growth_megatron.growth.layers import connection_rate, parse_layers
from growth_megatron.growth.operators import registry
from growth_megatron.growth.operators.gradual import gradual_layers
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.architecture import layer_rows, tensor_shapes
from growth_megatron.model.init import InitSource
from growth_megatron.model.tensors import MOMENT_PREFIXES, whole
from tests.checkpoint.written import model_tensors
from tests.growth.in_memory import (
    FC2,
    PROJ,
    SEED,
    Tensors,
    everything,
    function_difference,
    name_within,
    plan_of,
    small,
    trained_like,
)

DEPTHS = sorted(name for name, operator in registry().items() if operator.depth)

BY_HAND: list[tuple[str, int, int, Sequence[int]]] = [
    ("stack", 2, 4, (0, 1, 0, 1)),
    ("stack", 3, 8, (0, 1, 2, 0, 1, 2, 0, 1)),
    ("direct", 3, 5, (0, 1, 2, 0, 1)),
    ("interpolate", 3, 9, (0, 0, 0, 1, 1, 1, 2, 2, 2)),
    ("interpolate", 2, 5, (0, 0, 0, 1, 1)),
    ("interpolate", 4, 6, (0, 0, 1, 2, 2, 3)),
    ("solar", 4, 6, (0, 1, 2, 1, 2, 3)),
    ("solar", 6, 8, (0, 1, 2, 3, 2, 3, 4, 5)),
    ("solar", 4, 8, (0, 1, 2, 3, 0, 1, 2, 3)),
    ("solar", 32, 48, (*range(24), *range(8, 32))),
    ("midas", 6, 7, (0, 1, 2, 2, 3, 4, 5)),
    ("midas", 6, 8, (0, 1, 2, 3, 2, 3, 4, 5)),
    ("midas", 6, 9, (0, 1, 2, 3, 1, 2, 3, 4, 5)),
    ("midas", 6, 10, (0, 1, 2, 3, 1, 2, 3, 3, 4, 5)),
    ("midas", 6, 12, (0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5)),
    ("midas", 4, 6, (0, 1, 2, 1, 2, 3)),
    ("midas", 1, 3, (0, 0, 0)),
    ("gradual", 3, 4, (0, 1, 2, 2)),
    ("gradual", 4, 6, (0, 1, 2, 3, 2, 3)),
    ("gradual", 3, 6, (0, 1, 2, 0, 1, 2)),
    ("gradual", 4, 10, (0, 1, 2, 3, 0, 1, 2, 3, 2, 3)),
    ("gradual", 2, 9, (0, 1, 0, 1, 0, 1, 0, 1, 1)),
    ("identity", 2, 4, (0, 0, 1, 1)),
    ("identity", 4, 6, (0, 0, 1, 2, 2, 3)),
    ("zero", 2, 4, (0, 1, 0, 1)),
    ("middle", 8, 12, (0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7)),  # two blocks of 4: the halves that meet
    ("middle", 12, 16, (0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 10, 11)),  # three: the middle one again
    ("middle", 4, 8, (0, 1, 2, 3, 0, 1, 2, 3)),
    ("middle", 4, 5, (0, 1, 1, 2, 3)),
    ("middle", 3, 3, (0, 1, 2)),
    ("random", 2, 3, (0, 1, 0)),
]


@pytest.mark.parametrize(("operator", "before", "after", "layers"), BY_HAND)
def test_layers_of_each_operator_by_hand(operator: str, before: int, after: int, layers: Sequence[int]) -> None:
    assert plan_of(small(num_layers=before), {"num_layers": after}, operator=operator).layers == tuple(layers)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.sampled_from(DEPTHS), st.integers(1, 12), st.integers(0, 30))
def test_every_operator_keeps_every_layer_and_begins_and_ends_with_a_stretch_of_the_source(
    operator: str, before: int, more: int
) -> None:
    after = before + more
    if operator == "solar" and (after % 2 or after > 2 * before):
        return
    if operator == "middle" and after > 2 * before:
        return
    depth = registry()[operator].depth
    assert depth is not None
    layers = depth.layers(before, after)
    assert len(layers) == after
    assert set(layers) == set(range(before))
    assert layers[0] == 0
    if operator in ("interpolate", "identity", "midas", "middle", "solar", "gradual"):
        assert layers[-1] == before - 1
    if after == before:
        assert layers == tuple(range(before))


COPYING = [case for case in BY_HAND if case[0] not in ("identity", "zero", "random") and case[2] <= 12]


@pytest.mark.parametrize(("operator", "before", "after", "layers"), COPYING)
def test_copied_layers_are_their_sources_bit_by_bit(
    operator: str, before: int, after: int, layers: Sequence[int]
) -> None:
    plan = plan_of(small(num_layers=before), {"num_layers": after}, operator=operator)
    assert plan.is_selection
    tensors = model_tensors(plan.source_geometry)
    for key, value in everything(GrownSource(Tensors(tensors), plan, "carry")).items():
        start, prefix, rest = key.partition("decoder.layers.")
        number, _, name = rest.partition(".")
        assert torch.equal(value, tensors[f"{start}{prefix}{layers[int(number)]}.{name}" if prefix else key])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.integers(0, 40))
def test_gradual_stacking_in_hops_that_double_is_one_call(before: int, more: int) -> None:
    after = 2 * before + more
    hop, rest = gradual_layers(before, 2 * before), gradual_layers(2 * before, after)
    assert tuple(hop[layer] for layer in rest) == gradual_layers(before, after)


def test_gradual_stacking_in_smaller_hops_is_another_list() -> None:
    hop, rest = gradual_layers(3, 4), gradual_layers(4, 5)
    assert tuple(hop[layer] for layer in rest) == (0, 1, 2, 2, 2)
    assert gradual_layers(3, 5) == (0, 1, 2, 1, 2)


def test_hops_of_gradual_stacking_give_the_model_of_one_call() -> None:
    first, middle, last = (small(num_layers=layers) for layers in (2, 4, 7))
    growth = GrowthConfig(operator="gradual")
    source = Tensors(model_tensors(first))
    hops = GrownSource(
        GrownSource(source, plan_growth(first, middle, growth), "carry"), plan_growth(middle, last, growth), "carry"
    )
    ours, at_once = everything(hops), everything(GrownSource(source, plan_growth(first, last, growth), "carry"))
    assert ours.keys() == at_once.keys()
    assert all(torch.equal(ours[key], at_once[key]) for key in ours)


# New layers.


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("after", "growth"),
    [
        (2, {"operator": "identity"}),
        (3, {"operator": "identity"}),
        (6, {"operator": "identity"}),
        (5, {"operator": "zero"}),
        (5, {"operator": "identity", "layers": "12-1*2-2"}),
        (4, {"operator": "identity", "layers": (0, 1, 1, 1)}),
        (4, {"operator": "zero", "layers": (0, 0, 1, 0)}),
    ],
)
def test_new_layers_of_zero_output_leave_the_logits_as_they_are_bit_by_bit(
    after: int, growth: dict[str, Any], tied: bool
) -> None:
    plan = plan_of(small(tie_embeddings=tied), {"num_layers": after}, **growth)
    assert plan.function_preserving
    for dtype in (torch.float32, torch.float64):
        assert function_difference(plan, dtype) == 0.0


def test_the_same_list_of_copies_is_another_function() -> None:
    plan = plan_of(small(), {"num_layers": 4}, operator="interpolate")
    assert not plan.function_preserving
    assert function_difference(plan) > 1e-2


def test_an_identity_layer_is_its_source_but_for_what_it_writes() -> None:
    plan = plan_of(small(), {"num_layers": 5}, operator="identity", layers=(0, 1, 0, 1, 1))
    tensors = model_tensors(small())
    grown = everything(GrownSource(Tensors(tensors), plan, "carry"))
    assert plan.is_selection
    for number, layer in enumerate((0, 1, 0, 1, 1)):
        for name in (row.name for row in layer_rows(small())):
            value, origin = (f"decoder.layers.{n}.{name}" for n in (number, layer))
            silenced = number >= 2 and name in (PROJ, FC2)
            assert torch.equal(grown[value], torch.zeros_like(tensors[origin]) if silenced else tensors[origin])
            for prefix in MOMENT_PREFIXES:
                expected = tensors[prefix + origin] if number < 2 else torch.zeros(())
                assert torch.equal(grown[prefix + value], expected.expand_as(grown[prefix + value]))


def test_a_list_that_does_not_keep_the_order_of_the_layers_claims_nothing() -> None:
    plan = plan_of(small(), {"num_layers": 3}, operator="identity", layers=(1, 0, 0))
    assert not plan.function_preserving
    assert function_difference(plan) > 1e-2


@pytest.mark.parametrize("operator", ["identity", "zero", "random"])
def test_a_list_that_leaves_out_layers_is_refused_where_new_ones_are_added(operator: str) -> None:
    with pytest.raises(GrowthError, match=r"leaves out \[0, 2\]; name them too"):
        plan_of(small(num_layers=3), {"num_layers": 3}, operator=operator, layers=(1, 1, 1))
    plan = plan_of(small(num_layers=3), {"num_layers": 2}, operator="stack", layers=(2, 0))
    assert plan.layers == (2, 0)


@pytest.mark.parametrize("layers", [None, (0, 0, 1, 1)])
def test_random_layers_are_those_of_a_fresh_model_and_all_else_is_untouched(layers: tuple[int, ...] | None) -> None:
    plan = plan_of(small(), {"num_layers": 4}, operator="random", layers=layers)
    fresh = InitSource(plan.target_geometry, SEED)
    tensors = model_tensors(small())
    grown = everything(GrownSource(Tensors(tensors), plan, "carry"))
    resolved = layers or (0, 1, 0, 1)
    new = {number for number, layer in enumerate(resolved) if layer in resolved[:number]}
    for key, shape in tensor_shapes(plan.target_geometry).items():
        name = name_within(key)
        number = int(key.split(".")[2]) if name != key else None
        states = {prefix: grown[prefix + key] for prefix in ("", "optimizer.state.param.", *MOMENT_PREFIXES)}
        if number in new:
            drawn = fresh.read(key, whole(shape))
            assert torch.equal(states["optimizer.state.param."], drawn)
            assert torch.equal(states[""], drawn.to(torch.bfloat16))
            assert all(states[prefix].count_nonzero() == 0 for prefix in MOMENT_PREFIXES)
        else:
            origin = key if number is None else f"decoder.layers.{resolved[number]}.{name}"
            assert all(torch.equal(value, tensors[prefix + origin]) for prefix, value in states.items())


def test_random_layers_depend_on_the_seed() -> None:
    source, target = small(), small(num_layers=3)
    values = []
    for seed in (1, 2, 1):
        plan = plan_growth(source, target, GrowthConfig(operator="random"), seed)
        values.append(everything(GrownSource(Tensors(trained_like(source)), plan, "reset"))[f"decoder.layers.2.{FC2}"])
    assert torch.equal(values[0], values[2])
    assert not torch.equal(values[0], values[1])


# Connection rates.

# Of the 23 pairs of 24 layers, those not consecutive in the source: the joints between repeats, and one before a tail
# that does not go on where the repeats end.
JOINTS = {
    "123456*4": 3,
    "12-3456*5-56": 4 + 1,
    "12-345*7-6": 6,
    "123-456*7": 6,
    "1234-56*10": 9,
    "12-34*10-56": 9,
    "1-234*7-56": 6,
    "123*7-456": 6,
}


@pytest.mark.parametrize("notation", JOINTS)
def test_connection_rate_of_the_papers_partial_stackings_counted_by_hand(notation: str) -> None:
    plan = plan_of(small(num_layers=6), {"num_layers": 24}, operator="stack", layers=notation)
    assert plan.layers == parse_layers(notation, 6)
    assert len(plan.layers) == 24
    assert connection_rate(plan.layers) == (23 - JOINTS[notation]) / 23


def test_connection_rates_from_8_to_24_layers() -> None:
    for operator, per_cent in (("stack", 91.3), ("interpolate", 30.4), ("gradual", 91.3)):
        layers = plan_of(small(num_layers=8), {"num_layers": 24}, operator=operator).layers
        assert layers is not None
        assert round(100 * connection_rate(layers), 1) == per_cent
