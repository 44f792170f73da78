"""What each tensor of a grown model is made of: a pure plan, and a source seen through it.

Owns: the rule of a target tensor (which source tensor, which index and factor along each axis, or a fill), the rules of
the moments that follow from it, the depth operators, ``GrownSource``.
Does not own: files (``growth.alias``), process groups.

One rule serves the weight, its float32 master and both Adam moments. An operator whose target coordinates are source
coordinates times a factor says so per axis; with the factor ``g`` of the gradient along each axis
(``AxisRule.gradient_scale``), ``exp_avg`` is multiplied by g and ``exp_avg_sq`` by g squared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from growth_megatron.checkpoint.source import (
    FIRST_MOMENT_PREFIX,
    MOMENT_PREFIXES,
    SECOND_MOMENT_PREFIX,
    Region,
    TensorSource,
    TensorSpec,
    check_region,
    split_state_key,
)
from growth_megatron.config.schema import ModelConfig
from growth_megatron.errors import GrowthError
from growth_megatron.model.geometry import LAYER_PREFIX, tensor_shapes

_GRADIENT_POWER = {FIRST_MOMENT_PREFIX: 1, SECOND_MOMENT_PREFIX: 2}

OptimizerState = Literal["reset", "carry"]
"""reset: moments zero and step 0, as in the paper; carry: moments by the rule of their weight, step kept."""


@dataclass(frozen=True)
class AxisRule:
    """Where the coordinates of one axis come from; with no ``index`` it is the source's axis itself."""

    size: int
    index: tuple[int, ...] | None = None
    scale: tuple[float, ...] | None = None
    gradient_scale: tuple[float, ...] | None = None

    @property
    def is_identity(self) -> bool:
        return self.index is None and self.scale is None and self.gradient_scale is None


@dataclass(frozen=True)
class TensorRule:
    """How one target tensor comes about: out of a source tensor along each axis, or filled."""

    target: str
    axes: tuple[AxisRule, ...]
    source: str | None = None
    fill: Literal["zero"] | None = None

    def __post_init__(self) -> None:
        if (self.source is None) == (self.fill is None):
            raise ValueError(f"{self.target}: give either a source tensor or a fill")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis.index) if axis.index is not None else axis.size for axis in self.axes)

    @property
    def source_shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def is_selection(self) -> bool:
        """Whether the target is a whole source tensor, unchanged: then stored data serve as they are."""
        return self.source is not None and all(axis.is_identity for axis in self.axes)


@dataclass(frozen=True)
class GrowthPlan:
    """A growth from one geometry to another: one rule per tensor of the target model."""

    operator: str
    source_geometry: ModelConfig
    target_geometry: ModelConfig
    rules: tuple[TensorRule, ...]
    layers: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_selection(self) -> bool:
        return all(rule.is_selection for rule in self.rules)


def plan_depth(source_geometry: ModelConfig, target_geometry: ModelConfig, layers: Sequence[int]) -> GrowthPlan:
    """Direct growth in depth: target layer j is source layer ``layers[j]``, all else is copied (arXiv 2405.15319).

    G_stack with ``stack_layers``; interpolation, SOLAR and partial stacking with other lists.

    Raises:
        GrowthError: the geometries differ in more than depth, or the list does not fit them.
    """
    _check_depth(source_geometry, target_geometry, layers)
    rules = []
    for key, shape in tensor_shapes(target_geometry).items():
        source = key
        if key.startswith(LAYER_PREFIX):
            layer, _, name = key.removeprefix(LAYER_PREFIX).partition(".")
            source = f"{LAYER_PREFIX}{layers[int(layer)]}.{name}"
        rules.append(TensorRule(key, tuple(AxisRule(size) for size in shape), source))
    return GrowthPlan("stack", source_geometry, target_geometry, tuple(rules), tuple(layers))


def _check_depth(source: ModelConfig, target: ModelConfig, layers: Sequence[int]) -> None:
    differing = [
        f"{name} {before} -> {after}"
        for name, before, after in (
            ("hidden_size", source.hidden_size, target.hidden_size),
            ("num_attention_heads", source.num_attention_heads, target.num_attention_heads),
            ("num_query_groups", source.query_groups, target.query_groups),
            ("head_dim", source.kv_channels, target.kv_channels),
            ("ffn_hidden_size", source.ffn_hidden_size, target.ffn_hidden_size),
            ("padded vocabulary", source.padded_vocab_size, target.padded_vocab_size),
            ("tie_embeddings", source.tie_embeddings, target.tie_embeddings),
            ("rope_base", source.rope_base, target.rope_base),
            ("norm_epsilon", source.norm_epsilon, target.norm_epsilon),
        )
        if before != after
    ]
    if differing:
        raise GrowthError(
            f"growth in depth keeps everything but num_layers, here {', '.join(differing)} would change; "
            "give the target the source's values"
        )
    if len(layers) != target.num_layers:
        raise GrowthError(
            f"the layer list names {len(layers)} layers but the target has num_layers {target.num_layers}; "
            "make them equal"
        )
    outside = sorted({layer for layer in layers if not 0 <= layer < source.num_layers})
    if outside:
        raise GrowthError(
            f"the layer list names layers {outside}; allowed: 0 to {source.num_layers - 1}, "
            f"the source has {source.num_layers} layers"
        )


def check_optimizer_state(policy: str) -> OptimizerState:
    """Raises GrowthError unless ``policy`` is one of the policies for the moments."""
    if policy not in get_args(OptimizerState):
        raise GrowthError(f"optimizer_state is {policy!r}; allowed: {', '.join(get_args(OptimizerState))}")
    return policy  # type: ignore[return-value]


def check_source_tensors(plan: GrowthPlan, source: TensorSource) -> None:
    """Raises GrowthError unless ``source`` holds exactly the tensors of the plan's source geometry, in its shapes."""
    shapes = tensor_shapes(plan.source_geometry)
    keys = source.keys()
    stored = {key: split_state_key(key)[1] for key in keys}
    wrong = [f"{key} is missing" for key in shapes if key not in stored]
    for key, name in stored.items():
        if name not in shapes:
            wrong.append(f"{key} is no tensor of such a model")
        elif source.spec(key).shape != shapes[name]:
            wrong.append(f"{key} has shape {source.spec(key).shape}, expected {shapes[name]}")
    prefixes = {key.removesuffix(name) for key, name in stored.items()}
    if len(stored) != len(prefixes) * len(shapes) and not wrong:
        wrong.append("the optimizer state covers only some of the weights")
    if wrong:
        rest = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise GrowthError(
            f"the source is not the model of {plan.source_geometry.num_layers} layers and hidden size "
            f"{plan.source_geometry.hidden_size} it is said to be: {'; '.join(wrong[:5])}{rest}; "
            "compare with growth-megatron inspect"
        )


class GrownSource:
    """A source seen through a plan: its own source of tensors, so growths chain.

    Weights, masters and moments that the source has are there; every region is computed when it is read.
    """

    def __init__(self, source: TensorSource, plan: GrowthPlan, optimizer_state: str) -> None:
        """Raises GrowthError if the source is not the plan's, or the policy is unknown."""
        self._policy = check_optimizer_state(optimizer_state)
        check_source_tensors(plan, source)
        self._source = source
        keys = source.keys()
        self._dtypes = {split_state_key(key)[0]: source.spec(key).dtype for key in keys}
        self._rules = {prefix + rule.target: (prefix, rule) for prefix in self._dtypes for rule in plan.rules}

    def keys(self) -> list[str]:
        return list(self._rules)

    def spec(self, key: str) -> TensorSpec:
        prefix, rule = self._rule(key)
        dtype = self._dtypes[prefix] if rule.source is None else self._source.spec(prefix + rule.source).dtype
        return TensorSpec(rule.shape, dtype)

    def read(self, key: str, region: Region) -> torch.Tensor:
        prefix, rule = self._rule(key)
        spec = self.spec(key)
        check_region(key, spec.shape, region)
        if rule.source is None or (prefix in MOMENT_PREFIXES and self._policy == "reset"):
            return torch.zeros([part.stop - part.start for part in region], dtype=spec.dtype)
        return apply_rule(rule, prefix, self._source, region)

    def _rule(self, key: str) -> tuple[str, TensorRule]:
        try:
            return self._rules[key]
        except KeyError:
            raise GrowthError(f"the grown model has no tensor {key}") from None


def apply_rule(rule: TensorRule, prefix: str, source: TensorSource, region: Region) -> torch.Tensor:
    """``region`` of a target tensor: gather along each axis, then scale in float32."""
    bounds: list[slice] = []
    picks: list[torch.Tensor | None] = []
    for axis, part in zip(rule.axes, region, strict=True):
        wanted = axis.index[part] if axis.index is not None else None
        if not wanted:
            bounds.append(part if axis.index is None else slice(0, 0))
            picks.append(None)
        else:
            bounds.append(slice(min(wanted), max(wanted) + 1))
            picks.append(torch.tensor(wanted) - min(wanted))
    values = source.read(f"{prefix}{rule.source}", tuple(bounds))
    for number, pick in enumerate(picks):
        if pick is not None:
            values = values.index_select(number, pick)
    factors = [_factor(axis, prefix, part) for axis, part in zip(rule.axes, region, strict=True)]
    if all(factor is None for factor in factors):
        return values
    scaled = values.float()
    for number, factor in enumerate(factors):
        if factor is not None:
            scaled = scaled * factor.view([-1 if axis == number else 1 for axis in range(scaled.dim())])
    return scaled.to(values.dtype)


def _factor(axis: AxisRule, prefix: str, part: slice) -> torch.Tensor | None:
    power = _GRADIENT_POWER.get(prefix, 0)
    factors = axis.gradient_scale if power else axis.scale
    if factors is None:
        return None
    return torch.tensor([math.pow(factor, power or 1) for factor in factors[part]], dtype=torch.float32)
