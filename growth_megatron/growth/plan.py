"""From two geometries and an operator to a growth plan: one rule per tensor of the target model.

Owns: which layer and which axis rules each tensor gets, noise, the multipliers, what gets no gradient.
Does not own: the maps along the width (``growth.width``), the values (``growth.view``), files (``growth.link``,
``checkpoint.torch_dist.writer``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from growth_megatron.checkpoint.folder.manifest import GrowthRecord, Multipliers
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig
from growth_megatron.errors import GrowthError
from growth_megatron.growth.conditions import check_growth, width_changes
from growth_megatron.growth.layers import resolve_layers
from growth_megatron.growth.rules import AxisRule, GrowthPlan, Noise, TensorRule
from growth_megatron.growth.width import WidthMaps
from growth_megatron.model.architecture import LAYER_PREFIX, tensor_shapes
from growth_megatron.model.tensors import TensorSource, split_state_key

EMBEDDING, FINAL_NORM, OUTPUT = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)
_QKV, _PROJ = "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"
_FC1, _FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
_NEW_LAYERS = ("identity", "zero", "random")  # their repeated list entries are new layers, not copies


def plan_growth(source: ModelConfig, target: ModelConfig, growth: GrowthConfig, seed: int = 0) -> GrowthPlan:
    """The plan by which ``growth`` turns a model of geometry ``source`` into one of ``target``.

    Args:
        seed: of uneven shares, noise and new weights; the same seed gives the same model at every layout.

    Raises:
        GrowthError: the operator cannot do it; the message names the nearest possible values.
    """
    check_growth(source, target, growth)
    operator = growth.depth_operator
    layers = resolve_layers(growth.layers, source.num_layers, target.num_layers, operator or "stack")
    maps = WidthMaps(source, target, growth, seed)
    axes = _axes(maps)
    rules = []
    for key, shape in tensor_shapes(target).items():
        if key.startswith(LAYER_PREFIX):
            number, _, name = key.removeprefix(LAYER_PREFIX).partition(".")
            rules.append(_layer_rule(key, name, int(number), layers, axes[name], operator, shape))
        else:
            origin = EMBEDDING if key == OUTPUT and source.tie_embeddings else key
            rules.append(TensorRule(key, axes[key], origin))
    noisy = tuple(_with_noise(rule, target, growth) for rule in rules)
    if growth.cancelling_noise and not any(rule.noise for rule in noisy):
        raise GrowthError("cancelling_noise: no input is copied, so there is nothing to cancel over; remove it")
    new_layers = operator in _NEW_LAYERS and len(set(layers)) < len(layers)
    wider = bool(width_changes(source, target))
    return GrowthPlan(
        operator=_name(growth, layers != tuple(range(source.num_layers)), wider),
        source_geometry=source,
        target_geometry=target,
        rules=noisy,
        layers=layers,
        options=_options(growth),
        seed=seed,
        function_preserving=_preserves(growth, layers, source.num_layers, wider),
        multipliers=_multipliers(noisy) if growth.multipliers else {},
        silent=(*_silent_layers(operator, new_layers), *(() if growth.noise else _silent_width(maps))),
        inexact_moments=_inexact(maps, noisy),
    )


def plan_depth(source: ModelConfig, target: ModelConfig, layers: Sequence[int]) -> GrowthPlan:
    """Direct growth in depth: target layer j is source layer ``layers[j]``, all else is copied (arXiv 2405.15319)."""
    return plan_growth(source, target, GrowthConfig(operator="stack", layers=tuple(layers)))


def plan_of_record(record: GrowthRecord) -> GrowthPlan:
    """The plan of a growth in a checkpoint's lineage, made anew."""
    fields: dict[str, Any] = {**record.options, "layers": record.layers, "optimizer_state": record.optimizer_state}
    growth = GrowthConfig(operator=record.operator, **fields)
    if growth.depth_operator is None:
        growth = growth.model_copy(update={"layers": None})
    return plan_growth(record.source_geometry, record.target_geometry, growth, record.seed)


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


def _axes(maps: WidthMaps) -> dict[str, tuple[AxisRule, ...]]:
    """Axis rules by the name of a tensor, within a layer or of the whole model."""
    read, write, gains = maps.read(), maps.write(), maps.gains()
    vocabulary = AxisRule(maps.target.padded_vocab_size)
    return {
        "self_attention.linear_qkv.layer_norm_weight": (gains,),
        _QKV: (maps.attention_in(), read),
        _PROJ: (write, maps.attention_out()),
        "mlp.linear_fc1.layer_norm_weight": (gains,),
        _FC1: (maps.ffn_in(), read),
        _FC2: (write, maps.ffn_out()),
        EMBEDDING: (vocabulary, write),
        FINAL_NORM: (maps.tied_gains() if maps.target.tie_embeddings else gains,),
        OUTPUT: (vocabulary, read),
    }


def _layer_rule(
    key: str,
    name: str,
    layer: int,
    layers: Sequence[int],
    axes: tuple[AxisRule, ...],
    operator: str | None,
    shape: tuple[int, ...],
) -> TensorRule:
    source = f"{LAYER_PREFIX}{layers[layer]}.{name}"
    if layers[layer] not in layers[:layer]:
        return TensorRule(key, axes, source)
    if operator == "random":
        return TensorRule(key, tuple(AxisRule(size) for size in shape), fill="init", state="new")
    if operator in _NEW_LAYERS:
        # A block with o = down = 0 passes the stream on unchanged (LLaMA-Pro, arXiv 2401.02415). Its gains stay: with
        # them zero the block could never learn.
        if name in (_PROJ, _FC2):
            return TensorRule(key, tuple(AxisRule(size) for size in shape), fill="zero", state="new")
        return TensorRule(key, axes, source, state="new")
    return TensorRule(key, axes, source, state="copy")


def _with_noise(rule: TensorRule, target: ModelConfig, growth: GrowthConfig) -> TensorRule:
    """The paper's noise on every matrix of the layers, or noise that cancels over the copies of an input."""
    if rule.source is None or len(rule.axes) == 1:
        return rule
    noise = None
    if growth.noise and rule.target.startswith(LAYER_PREFIX):
        d, depth = target.hidden_size, target.num_layers
        into_stream = rule.target.endswith((_PROJ, _FC2))
        variance = 1 / (d * depth**2) if into_stream else 2 / (5 * d)
        noise = Noise(deviation=growth.noise * math.sqrt(variance), mix=growth.noise)
    elif growth.cancelling_noise and rule.target != EMBEDDING and rule.axes[1].index is not None:
        noise = Noise(deviation=growth.cancelling_noise * target.init_std, cancelling=True)
    if noise is None:
        return rule
    return TensorRule(rule.target, rule.axes, rule.source, noise=noise, state=rule.state)


def _name(growth: GrowthConfig, deeper: bool, wider: bool) -> str:
    """What was done, in the names of the operators: direct growth of the depth alone is a stack."""
    depth, width = growth.depth_operator, growth.width_operator
    if depth is None or width is None:
        return growth.operator
    if not wider:
        return depth
    return width if not deeper else growth.operator if depth == width else f"{depth}+{width}"


def _options(growth: GrowthConfig) -> dict[str, Any]:
    """Those that other fields of a record do not hold."""
    elsewhere = {"operator", "layers", "optimizer_state", "schedule"}
    return growth.model_dump(exclude=elsewhere, exclude_defaults=True)


def _preserves(growth: GrowthConfig, layers: Sequence[int], source_layers: int, wider: bool) -> bool:
    """Whether source and target are the same function."""
    originals = tuple(dict.fromkeys(layers))
    same_depth = tuple(layers) == tuple(range(source_layers))
    if not same_depth:
        same_depth = growth.depth_operator in ("identity", "zero") and originals == tuple(range(source_layers))
    return same_depth and not growth.noise and not (wider and growth.width_operator == "random")


def _multipliers(rules: Sequence[TensorRule]) -> dict[str, Multipliers]:
    """lr' = a lr, wd' = wd / a and eps' = g eps of each tensor, where a and g are one number for all of it."""
    result: dict[str, Multipliers] = {}
    for rule in rules:
        key = _pattern(rule.target)
        if rule.source is None or key in result:
            continue
        a, g = _uniform(rule, "scale"), _uniform(rule, "gradient_scale")
        if a is not None:
            result[key] = Multipliers(learning_rate=a, weight_decay=1 / a, epsilon=1.0 if g is None else g)
    return {key: value for key, value in result.items() if value != Multipliers()}


def _uniform(rule: TensorRule, factor: str) -> float | None:
    """Product over the axes of a factor that is the same everywhere on each; None if it is not."""
    product = 1.0
    for axis in rule.axes:
        values = getattr(axis, factor)
        if values is None:
            continue
        if max(values) - min(values) > 1e-9 * max(values):
            return None
        product *= values[0]
    return product


def _pattern(key: str) -> str:
    if not key.startswith(LAYER_PREFIX):
        return key
    return f"{LAYER_PREFIX}*.{key.removeprefix(LAYER_PREFIX).partition('.')[2]}"


def inexact_multipliers(plan: GrowthPlan) -> list[str]:
    """Tensors (layer number ``*``) for which no one learning rate follows the source run."""
    first = {_pattern(rule.target): rule for rule in reversed(plan.rules) if rule.source}
    return sorted(key for key, rule in first.items() if _uniform(rule, "scale") is None)


def _silent_layers(operator: str | None, new_layers: bool) -> list[str]:
    if not new_layers or operator not in ("identity", "zero"):
        return []
    return ["qkv, fc1 and gains of the new layers: their o and down are zero (these get a gradient, the others follow)"]


def _silent_width(maps: WidthMaps) -> list[str]:
    """New parts without a gradient in the first step, with the reason."""
    source, target, operator = maps.source, maps.target, maps.operator
    silent = []
    if maps.copies and target.head_dim > source.head_dim:
        silent.append("new q and k channels: both give zero, so without noise they stay zero")
    if operator != "zero":
        return silent
    if target.hidden_size > source.hidden_size:
        silent.append(
            "columns and gains that read the new hidden channels: these are zero until the embedding has moved"
        )
        if target.tie_embeddings:
            silent.append(
                "rows of the new hidden channels in down of the last layer, and in o and down of new layers at the "
                "end: the tied embedding that reads them is zero there"
            )
    if target.ffn_hidden_size > source.ffn_hidden_size:
        silent.append("new gate rows and down columns: the new up rows are zero (these get a gradient)")
    if target.num_query_groups > source.num_query_groups:
        silent.append("new groups' q and k rows and o columns: their v rows are zero (these get a gradient)")
    old_heads = source.num_attention_heads // source.num_query_groups
    if target.num_attention_heads // target.num_query_groups > old_heads:
        silent.append("q rows of new heads in old groups: their o columns are zero (these get a gradient)")
    if target.head_dim > source.head_dim:
        silent.append(
            "new q channels, until the new k channels have moved; o columns of new v channels, which are zero"
        )
    return silent


def _inexact(maps: WidthMaps, rules: Sequence[TensorRule]) -> tuple[str, ...]:
    inexact = []
    if not maps.heads.exact:
        inexact.append(
            "k and v: each copy of a group serves only some of its heads, whose part of the gradient is not known"
        )
    if maps.source.tie_embeddings and not maps.target.tie_embeddings:
        inexact.append("embedding and output: each carries the moments of both uses of the tied weight")
    if any(rule.noise is not None and rule.noise.cancelling for rule in rules):
        inexact.append("rows and gains of copies before cancelling noise: it changes their parts of the gradient")
    return tuple(inexact)
