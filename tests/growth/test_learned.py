"""What learned maps make of a source: the definition, its special cases, and the same whoever reads which part."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from growth_megatron.checkpoint.huggingface.safetensors_file import packed
from growth_megatron.errors import CheckpointError, GrowthError
from growth_megatron.growth.learned import MAPS_NAME, initial_maps, with_maps
from growth_megatron.growth.learned_maps import map_shapes
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.tensors import MASTER_PREFIX, WithFreshOptimizer
from tests.growth.in_memory import Tensors, everything, plan_of, small, trained_like
from tests.growth.learned_llama import grown_weights

GROWN = {"num_layers": 5, "hidden_size": 20, "num_attention_heads": 12, "num_query_groups": 3, "ffn_hidden_size": 17}
PARTS: list[dict[str, Any]] = [
    GROWN,
    {"num_layers": 3},
    {"hidden_size": 15},
    {"ffn_hidden_size": 17},
    {"num_attention_heads": 8},
    {"num_attention_heads": 9, "num_query_groups": 3},
    {"num_layers": 2, "hidden_size": 15, "tie_embeddings": False},
]
FAMILIES: list[dict[str, Any]] = [{}, {"tie_embeddings": True}, {"attention_bias": True, "qk_norm": True}]


def learned_plan(family: dict[str, Any], changes: dict[str, Any], **growth: Any) -> GrowthPlan:
    """With maps that have moved away from where they start."""
    plan = plan_of(small(**family), changes, operator="learn", **growth)
    generator = torch.Generator().manual_seed(4)
    maps = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in initial_maps(plan).items()
    }
    return dataclasses.replace(plan, maps=maps)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("changes", PARTS, ids=str)
def test_every_tensor_is_the_definition_s(family: dict[str, Any], changes: dict[str, Any]) -> None:
    plan = learned_plan(family, changes)
    source = trained_like(plan.source_geometry)
    assert plan.maps is not None
    expected = grown_weights(plan, source, {name: value.double() for name, value in plan.maps.items()})
    found = everything(GrownSource(Tensors(source), plan, "reset"))
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_any_region_has_the_values_of_the_whole(family: dict[str, Any]) -> None:
    plan = learned_plan(family, GROWN)
    grown = GrownSource(Tensors(trained_like(plan.source_geometry)), plan, "reset")
    for key, values in everything(grown).items():
        for rows in (slice(0, 1), slice(len(values) // 3, len(values) - 1), slice(len(values) - 1, len(values))):
            region = (rows, *(slice(0, size) for size in values.shape[1:]))
            torch.testing.assert_close(grown.read(key, region), values[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("layers", [4, 5])
def test_depth_alone_starts_as_exactly_stacking(family: dict[str, Any], layers: int) -> None:
    plan, stacked = (plan_of(small(**family), {"num_layers": layers}, operator=name) for name in ("learn", "stack"))
    plan = dataclasses.replace(plan, maps=initial_maps(plan))
    assert plan.layers == stacked.layers == tuple(layer % 2 for layer in range(layers))
    source = Tensors(trained_like(plan.source_geometry, torch.float32))
    expected = everything(GrownSource(source, stacked, "reset"))
    for key, values in everything(GrownSource(source, plan, "reset")).items():
        assert torch.equal(values, expected[key]), key


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_identity_over_zeros_and_the_stack_s_layers_give_stacking_padded_with_zeros(family: dict[str, Any]) -> None:
    plan = plan_of(small(**family), GROWN, operator="learn")
    padding = {name: value.clone() for name, value in initial_maps(plan).items()}
    for name in ("residual", "ffn", "groups", "heads", "values"):
        old = padding[name].shape[1]
        assert padding[name][old:].abs().max() > 0, "nothing would be padded"
        padding[name][old:] = 0
    plan = dataclasses.replace(plan, maps=padding)
    source = Tensors(trained_like(plan.source_geometry, torch.float32))
    # Zero growth puts every old coordinate where it belongs; what it fills in is taken out here.
    zeros = plan_of(small(**family), GROWN, operator="stack+zero")
    for key, values in everything(GrownSource(source, plan, "reset")).items():
        rule = next(rule for rule in zeros.rules if rule.target == key)
        assert rule.source is not None
        expected = source.tensors[rule.source]
        for number, axis in enumerate(rule.axes):
            index = torch.arange(axis.size) if axis.index_tensor is None else axis.index_tensor
            expected = expected.index_select(number, index.clamp(min=0))
            shape = [-1 if other == number else 1 for other in range(expected.dim())]
            expected = expected * (index >= 0).view(shape)
        assert torch.equal(values, expected), key


def test_new_coordinates_start_as_mixtures_of_variance_one_over_the_target_s_size() -> None:
    plan = plan_of(small(hidden_size=400), {"hidden_size": 1000}, operator="learn")
    maps = initial_maps(plan)
    assert set(maps) == {"residual"}
    assert torch.equal(maps["residual"][:400], torch.eye(400))
    assert maps["residual"][400:].var().item() == pytest.approx(1 / 1000, rel=0.01)
    again = initial_maps(dataclasses.replace(plan, seed=plan.seed + 1))
    assert not torch.equal(maps["residual"], again["residual"])


def test_a_given_list_is_where_the_layers_start() -> None:
    plan = plan_of(small(), {"num_layers": 4}, operator="learn", layers=(0, 0, 1, 1))
    for name, value in initial_maps(plan).items():
        assert value.argmax(dim=1).tolist() == [0, 0, 1, 1], name
        assert value.sum().item() == 4


def test_masters_are_mapped_and_moments_are_zero() -> None:
    plan = learned_plan({}, GROWN)
    weights = trained_like(plan.source_geometry, torch.bfloat16)
    masters = {MASTER_PREFIX + key: value for key, value in trained_like(plan.source_geometry, torch.float32).items()}
    grown = everything(GrownSource(Tensors({**weights, **masters}), plan, "reset"))
    alone = everything(GrownSource(Tensors(trained_like(plan.source_geometry, torch.float32)), plan, "reset"))
    for key, values in alone.items():
        assert torch.equal(grown[MASTER_PREFIX + key], values)
        assert torch.equal(grown[key], values.to(torch.bfloat16))
    fresh = everything(GrownSource(WithFreshOptimizer(Tensors(weights)), plan, "reset"))
    assert all(not values.any() for key, values in fresh.items() if "exp_avg" in key)


def test_maps_go_to_a_file_and_back_and_others_are_refused(tmp_path: Any) -> None:
    plan = learned_plan({}, GROWN)
    assert plan.maps is not None
    (tmp_path / MAPS_NAME).write_bytes(packed(plan.maps))
    bare = dataclasses.replace(plan, maps=None)
    for path in (tmp_path, tmp_path / MAPS_NAME):
        read = with_maps(bare, path).maps
        assert read is not None
        assert all(torch.equal(read[name], value) for name, value in plan.maps.items())
        assert read.keys() == plan.maps.keys()
    with pytest.raises(CheckpointError, match="does not have the checksum on record"):
        with_maps(bare, tmp_path, "0" * 64)
    (tmp_path / MAPS_NAME).write_bytes(packed({}))
    wider = plan_of(small(), {"hidden_size": 15}, operator="learn")
    with pytest.raises(GrowthError, match=r"residual is not there, not \(15, 12\)"):
        with_maps(wider, tmp_path)
    (tmp_path / MAPS_NAME).write_bytes(packed({**plan.maps, "ffn": plan.maps["ffn"] * float("nan")}))
    with pytest.raises(GrowthError, match="the map ffn holds values that are not finite"):
        with_maps(bare, tmp_path)


def test_there_is_a_map_for_all_that_grows_and_for_nothing_else() -> None:
    plan = plan_of(small(attention_bias=True), GROWN, operator="learn")
    shapes = map_shapes(plan.source_geometry, plan.target_geometry, plan.layers or ())
    widths = {name: shape for name, shape in shapes.items() if not name.startswith("depth.")}
    assert widths == {"residual": (20, 12), "ffn": (17, 10), "groups": (3, 2), "heads": (4, 3), "values": (12, 8)}
    depths = [name for name in shapes if name.startswith("depth.")]
    assert len(depths) == 3 + 3 + 1 + 2 + 1 + 2  # q k v and their biases, o, gate and up, down, gains
    with pytest.raises(GrowthError, match="learns maps of what grows, and nothing does; raise a size of the model"):
        plan_of(small(), {}, operator="learn")
