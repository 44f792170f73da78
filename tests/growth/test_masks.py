"""Masks folded into weights: closed they give the source's function, half open the masked model's, open the plain one.

Relative to the largest logit, 2e-6 is allowed in float32 and 1e-12 in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_megatron.config.growth_schema import GrowthConfig, MaskRamps
from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth import masks as masks_module
from growth_megatron.growth.masks import MaskedSource, Masks
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.reference import reference_logits
from growth_megatron.model.tensors import whole
from tests.growth.in_memory import (
    ALLOWED,
    SEED,
    Tensors,
    changed,
    everything,
    function_difference,
    plan_of,
    small,
    some_tokens,
    trained_like,
)
from tests.growth.masked_llama import MaskedLlama
from tests.growth.models import models

STEP, STEPS = 3, 10
"""Of the default ramps of these tests, the masks are at 0.3, 0.15, 0.6 and 0.5 after ``STEP`` steps."""
RAMP = {"depth": [0, STEPS], "ffn": [0, 20], "hidden": [0, 5], "heads": [1, 5]}
ALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 20,
    "num_attention_heads": 12,
    "num_query_groups": 3,
    "ffn_hidden_size": 15,
}


@st.composite
def masked(draw: st.DrawFn) -> GrowthPlan:
    source = draw(models())
    groups = source.num_query_groups + draw(st.integers(0, 2))
    heads_per_group = source.num_attention_heads // source.num_query_groups + draw(st.integers(0, 2))
    target = changed(
        source,
        num_layers=source.num_layers + draw(st.integers(0, 2)),
        hidden_size=draw(st.integers(source.hidden_size, 2 * source.hidden_size)),
        ffn_hidden_size=draw(st.integers(source.ffn_hidden_size, 2 * source.ffn_hidden_size)),
        num_attention_heads=groups * heads_per_group,
        num_query_groups=groups,
        tie_embeddings=source.tie_embeddings and draw(st.booleans()),
    )
    return plan_growth(source, target, GrowthConfig(operator="masked", ramp=RAMP), SEED)


def as_it_acts(plan: GrowthPlan, step: int, dtype: torch.dtype, tokens: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Logits of the grown model behind its masks, and its trainable weights."""
    grown = GrownSource(Tensors(trained_like(plan.source_geometry, dtype)), plan, "reset")
    masks = Masks(plan, step)
    geometry = plan.target_geometry.model_copy(update={"norm_epsilon": masks.norm_epsilon})
    return reference_logits(MaskedSource(grown, masks), geometry, tokens, dtype), everything(grown)


def difference_to_source(plan: GrowthPlan, dtype: torch.dtype, step: int = 0) -> float:
    tokens = some_tokens(plan.source_geometry)
    source = Tensors(trained_like(plan.source_geometry, dtype))
    before = reference_logits(source, plan.source_geometry, tokens, dtype)
    after, _ = as_it_acts(plan, step, dtype, tokens)
    return float((after - before).abs().max() / before.abs().max())


def difference_to_definition(plan: GrowthPlan, gates: Mapping[str, float], step: int) -> float:
    tokens = some_tokens(plan.source_geometry)
    live, weights = as_it_acts(plan, step, torch.float64, tokens)
    model = MaskedLlama(plan.source_geometry, plan.target_geometry, gates, plan.source_geometry.num_layers)
    return float((model.logits(weights, tokens) - live).abs().max() / live.abs().max())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(masked())
def test_closed_masks_give_the_source_half_open_the_definition_and_open_the_plain_model(plan: GrowthPlan) -> None:
    assert plan.function_preserving
    for dtype, allowed in ALLOWED.items():
        assert difference_to_source(plan, dtype) < allowed
    gates = {"depth": 0.3, "ffn": 0.15, "hidden": 0.6, "heads": 0.5}
    assert difference_to_definition(plan, gates, STEP) < 1e-12
    opened = Masks(plan, 20)
    assert opened.norm_epsilon == plan.target_geometry.norm_epsilon
    assert not any(opened.factors(rule.target, whole(rule.shape)) for rule in plan.rules)


@pytest.mark.parametrize("operator", ["identity+masked", "masked+split", "masked"])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qk_norm": True, "attention_bias": True}])
def test_masks_go_with_other_operators_on_the_other_side(operator: str, changes: dict[str, Any]) -> None:
    source = small(**changes)
    plan = plan_growth(source, changed(source, **ALL), GrowthConfig(operator=operator), SEED)
    kinds = {"identity+masked": {"ffn", "hidden", "heads"}, "masked+split": {"depth"}}
    assert set(plan.ramps) == kinds.get(operator, {"depth", "ffn", "hidden", "heads"})
    for dtype, allowed in ALLOWED.items():
        assert difference_to_source(plan, dtype) < allowed


def test_negative_control_without_masks_or_without_one_of_their_factors_the_function_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(small(), ALL, operator="masked", ramp=RAMP)
    assert function_difference(plan) > 0.01
    assert difference_to_source(plan, torch.float64, step=1) > 1e-6
    for kind in plan.ramps:
        others = {other: ramp for other, ramp in plan.ramps.items() if other != kind}
        assert difference_to_source(replace(plan, ramps=others), torch.float64) > 1e-6, kind
    monkeypatch.setattr(Masks, "norm_epsilon", property(lambda _: 1e-5, lambda *_: None), raising=False)
    assert difference_to_source(plan, torch.float64) > 1e-9, "epsilon"
    monkeypatch.setattr(masks_module, "writes_stream", lambda row: False)
    assert difference_to_source(plan, torch.float64) > 1e-6, "new layers"


@pytest.mark.parametrize("step", [0, STEP])
def test_any_region_has_the_bits_of_the_whole(step: int) -> None:
    plan = plan_of(small(), ALL, operator="masked", ramp=RAMP)
    grown = GrownSource(Tensors(trained_like(plan.source_geometry, torch.bfloat16)), plan, "reset")
    source = MaskedSource(grown, Masks(plan, step))
    assert source.keys() == grown.keys()
    for key in source.keys():
        region = tuple(slice(size // 3, size - size // 4) for size in source.spec(key).shape)
        part = source.read(key, region)
        assert part.dtype == torch.bfloat16
        assert torch.equal(part, source.read(key, whole(source.spec(key).shape))[region]), key


def test_masks_by_hand() -> None:
    """Heads 0 to 2 of each of groups 0 and 1 are old; hidden 12 of 20, ffn 10 of 15, layers 0 and 1 of 4."""
    plan = plan_of(small(), ALL, operator="masked", ramp=RAMP)
    ones = Tensors({rule.target: torch.ones(rule.shape, dtype=torch.float64) for rule in plan.rules})
    live = everything(MaskedSource(ones, Masks(plan, STEP)))
    share = (12 + 8 * 0.6) / 20
    assert Masks(plan, STEP).norm_epsilon == pytest.approx(1e-5 * share)
    rows = torch.tensor([1.0] * 12 + [0.6] * 8, dtype=torch.float64)
    heads = torch.tensor([1.0, 1, 1, 0.5, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64).repeat_interleave(4)
    units = torch.tensor([1.0] * 10 + [0.15] * 5, dtype=torch.float64)
    for layer, depth in ((0, 1.0), (1, 1.0), (2, 0.3), (3, 0.3)):
        prefix = f"decoder.layers.{layer}."
        expected = {
            "self_attention.linear_proj.weight": depth * rows[:, None] * heads,
            "mlp.linear_fc2.weight": depth * rows[:, None] * units,
            "mlp.linear_fc1.layer_norm_weight": torch.full((20,), share**0.5),
            "self_attention.linear_qkv.layer_norm_weight": torch.full((20,), share**0.5),
        }
        for name, values in expected.items():
            torch.testing.assert_close(live[prefix + name], values.double(), rtol=1e-7, atol=0)
        for name in ("self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"):
            assert (live[prefix + name] == 1).all()
    assert torch.equal(live["embedding.word_embeddings.weight"], rows.expand(32, 20))
    assert (live["output_layer.weight"] == 1).all()


def test_the_default_ramps_are_in_the_paper_s_order() -> None:
    source = small()
    plan = plan_growth(source, ModelConfig(**{**source.model_dump(), **ALL}), GrowthConfig(operator="masked"), SEED)
    assert plan.ramps == {"depth": (0, 5000), "ffn": (0, 5000), "hidden": (5000, 10000), "heads": (10000, 15000)}
    assert MaskRamps().model_dump() == plan.ramps
