"""Whole models in memory as sources of tensors, and what the tests of growth compare about them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.rules import AxisRule, GrowthPlan
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.architecture import LAYER_PREFIX, row_of, tensor_shapes
from growth_megatron.model.reference import reference_logits
from growth_megatron.model.tensors import FIRST_MOMENT_PREFIX, SECOND_MOMENT_PREFIX, TensorSource, TensorSpec, whole

QKV, PROJ = "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"
FC1, FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
GAINS = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
EMBEDDING, FINAL_NORM, OUTPUT = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)
SEED = 5
ALLOWED = {torch.float32: 2e-6, torch.float64: 1e-12}
"""Of the logits, relative to the largest."""


class Tensors:
    """Tensors in memory as a source."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    def keys(self) -> list[str]:
        return list(self.tensors)

    def spec(self, key: str) -> TensorSpec:
        return TensorSpec(tuple(self.tensors[key].shape), self.tensors[key].dtype)

    def read(self, key: str, region: tuple[slice, ...]) -> torch.Tensor:
        return self.tensors[key][region]


def everything(source: TensorSource) -> dict[str, torch.Tensor]:
    return {key: source.read(key, whole(source.spec(key).shape)) for key in source.keys()}


def small(**changes: Any) -> ModelConfig:
    """Two layers, three heads in each of two groups, hidden size other than heads times head_dim."""
    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 12,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "head_dim": 4,
        "ffn_hidden_size": 10,
        "vocab_size": 32,
        "vocab_multiple": 16,
        "sequence_length": 8,
    }
    return ModelConfig(**(fields | changes))


def changed(model: ModelConfig, **changes: Any) -> ModelConfig:
    return ModelConfig(**(model.model_dump() | changes))


def plan_of(source: ModelConfig, changes: dict[str, Any], **growth: Any) -> GrowthPlan:
    return plan_growth(source, changed(source, **changes), GrowthConfig(**growth), SEED)


def trained_like(model: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 1) -> dict[str, torch.Tensor]:
    """Weights of moderate size: matrices of deviation 0.15, gains 1 +- 0.2; the same numbers in every type."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in tensor_shapes(model).items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        centre, width = (1, 0.2) if row_of(key).initial == "ones" else (0, 0.15)
        tensors[key] = (centre + width * values).to(dtype)
    return tensors


def some_tokens(model: ModelConfig, batch: int = 2, length: int = 8, seed: int = 2) -> torch.Tensor:
    return torch.randint(0, model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def logit_difference(
    source: TensorSource, source_model: ModelConfig, grown: TensorSource, grown_model: ModelConfig, dtype: torch.dtype
) -> float:
    """Largest difference of the logits of two models, relative to the largest logit."""
    tokens = some_tokens(source_model)
    before = reference_logits(source, source_model, tokens, dtype)
    after = reference_logits(grown, grown_model, tokens, dtype)
    return ((before - after).abs().max() / before.abs().max()).item()


def function_difference(plan: GrowthPlan, dtype: torch.dtype = torch.float64) -> float:
    source = Tensors(trained_like(plan.source_geometry, dtype))
    grown = GrownSource(source, plan, "reset")
    return logit_difference(source, plan.source_geometry, grown, plan.target_geometry, dtype)


def assert_same_function(plan: GrowthPlan) -> None:
    assert plan.function_preserving
    assert {rule.target: rule.shape for rule in plan.rules} == tensor_shapes(plan.target_geometry)
    for dtype, allowed in ALLOWED.items():
        assert function_difference(plan, dtype) < allowed


def loss(source: TensorSource, model: ModelConfig, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next tokens, in float64."""
    logits = reference_logits(source, model, batch[:, :-1], torch.float64)
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def gradients(weights: Mapping[str, torch.Tensor], model: ModelConfig, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = {key: weights[key].detach().clone().requires_grad_() for key in tensor_shapes(model)}
    found = torch.autograd.grad(loss(Tensors(leaves), model, batch), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def name_within(key: str) -> str:
    """A tensor's name within its layer, or the key of one outside the layers."""
    return key.removeprefix(LAYER_PREFIX).partition(".")[2] if key.startswith(LAYER_PREFIX) else key


def with_axis(plan: GrowthPlan, name: str, number: int, **fields: Any) -> GrowthPlan:
    """The plan with other fields of one axis rule, in every layer's tensor of that name."""
    rules = []
    for rule in plan.rules:
        if name_within(rule.target) == name and rule.source is not None:
            axes: list[AxisRule] = list(rule.axes)
            axes[number] = replace(axes[number], **fields)
            rules.append(replace(rule, axes=tuple(axes)))
        else:
            rules.append(rule)
    return replace(plan, rules=tuple(rules))


def axis_of(plan: GrowthPlan, name: str, number: int) -> AxisRule:
    """The axis rule of a tensor, of layer 0 if it is a layer's."""
    return next(rule.axes[number] for rule in plan.rules if name_within(rule.target) == name)


def grid(**choices: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


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
