"""From two geometries and an operator to a growth plan: one rule per tensor of the target model.

Owns: which layer and which axis rules each tensor gets, noise, the multipliers, what gets no gradient.
Does not own: the maps along the width (``growth.width``), the values (``growth.view``), files (``growth.link``,
``checkpoint.torch_dist.writer``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from growth_megatron.checkpoint.folder.manifest import GrowthRecord, Manifest, Multipliers
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig
from growth_megatron.config.words import listed
from growth_megatron.errors import GrowthError
from growth_megatron.growth.conditions import check_growth, width_changes
from growth_megatron.growth.operators import Choice, choose
from growth_megatron.growth.operators.base import Depth
from growth_megatron.growth.ramps import mask_ramps
from growth_megatron.growth.rules import AxisRule, GrowthPlan, Noise, TensorRule
from growth_megatron.growth.width import WidthMaps
from growth_megatron.model.architecture import (
    EMBEDDING,
    OUTPUT,
    Kind,
    Row,
    layer_key,
    layer_rows,
    model_rows,
    outer_rows,
    row_of,
    split_layer_key,
    tensor_shapes,
    without_layer_number,
)
from growth_megatron.model.tensors import TensorSource, split_state_key


def plan_growth(source: ModelConfig, target: ModelConfig, growth: GrowthConfig, seed: int = 0) -> GrowthPlan:
    """The plan by which ``growth`` turns a model of geometry ``source`` into one of ``target``.

    Args:
        seed: of uneven shares, noise and new weights; the same seed gives the same model at every layout.

    Raises:
        GrowthError: the operator cannot do it; the message names the nearest possible values.
    """
    choice = check_growth(source, target, growth)
    keep_all, layers = range(source.num_layers), choice.layers(source.num_layers, target.num_layers)
    maps = WidthMaps(source, target, choice, seed)
    noisy = tuple(_with_noise(rule, target, growth) for rule in _rules(maps, choice, layers))
    if growth.cancelling_noise and not any(rule.noise for rule in noisy):
        raise GrowthError("cancelling_noise: no input is copied, so there is nothing to cancel over; remove it")
    wider = bool(width_changes(source, target))
    ramps = mask_ramps(source, target, choice)
    silent = ["all that is behind a mask: every mask is closed in the first step"] if ramps else []
    return GrowthPlan(
        operator=_name(choice, target.num_layers != source.num_layers or layers != tuple(keep_all), wider),
        source_geometry=source,
        target_geometry=target,
        rules=noisy,
        layers=layers,
        options=_options(growth),
        seed=seed,
        function_preserving=_preserves(choice, layers, source, target),
        multipliers=_multipliers(noisy) if growth.multipliers else {},
        ramps=ramps,
        zero_gradient_at_first=(
            *silent,
            *_silent_layers(choice.depth, layers),
            *(() if growth.noise else _silent_width(maps)),
        ),
        inexact_moments=_inexact(maps, noisy),
    )


def _rules(maps: WidthMaps, choice: Choice, layers: Sequence[int]) -> Iterator[TensorRule]:
    source, target = maps.source, maps.target
    axes = {row: maps.axes(row) for row in (*outer_rows(target), *layer_rows(target))}
    for key, row in model_rows(target).items():
        if choice.is_learned:
            yield TensorRule(key, tuple(AxisRule(size) for size in row.shape(target)), fill="learned")
        elif (place := split_layer_key(key)) is not None:
            yield _layer_rule(key, row, place[0], layers, axes[row], choice.depth)
        else:
            origin = EMBEDDING.name if row is OUTPUT and source.tie_embeddings else key
            yield TensorRule(key, axes[row], origin)


def plan_depth(source: ModelConfig, target: ModelConfig, layers: Sequence[int]) -> GrowthPlan:
    """Direct growth in depth: target layer j is source layer ``layers[j]``, all else is copied (arXiv 2405.15319)."""
    return plan_growth(source, target, GrowthConfig(operator="stack", layers=tuple(layers)))


def plan_of_record(record: GrowthRecord) -> GrowthPlan:
    """The plan of a growth in a checkpoint's lineage, made anew."""
    fields: dict[str, Any] = {**record.options, "layers": record.layers, "optimizer_state": record.optimizer_state}
    growth = GrowthConfig(operator=record.operator, **fields)
    if choose(growth).depth is None:
        growth = growth.model_copy(update={"layers": None})
    return plan_growth(record.source_geometry, record.target_geometry, growth, record.seed)


def stage_growth(manifest: Manifest | None) -> GrowthPlan | None:
    """The growth that the stage of a checkpoint began with, and that tells old from new; None where there is none."""
    if manifest is None or not manifest.lineage:
        return None
    record = manifest.lineage[-1]
    if record.step != manifest.step - manifest.stage_step or record.maps_sha256 is not None:
        return None  # learned maps mix all that was there into all that is
    return plan_of_record(record)


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
        raise GrowthError(
            f"the source is not the model of {plan.source_geometry.num_layers} layers and hidden size "
            f"{plan.source_geometry.hidden_size} it is said to be: {listed(wrong)}; "
            "compare with growth-megatron inspect"
        )


def _layer_rule(
    key: str, row: Row, layer: int, layers: Sequence[int], axes: tuple[AxisRule, ...], depth: Depth | None
) -> TensorRule:
    as_it_is = tuple(AxisRule(axis.target_size) for axis in axes)
    if not layers:  # the source has none
        return TensorRule(key, as_it_is, fill="initial", state="new")
    source = layer_key(layers[layer], row.name)
    if layers[layer] not in layers[:layer]:
        return TensorRule(key, axes, source)
    if depth is None or depth.repeats == "copy":
        return TensorRule(key, axes, source, state="copy")
    if depth.repeats == "initial":
        return TensorRule(key, as_it_is, fill="initial", state="new")
    if row.is_matrix and writes_stream(row):
        return TensorRule(key, as_it_is, fill="zeros", state="new")
    return TensorRule(key, axes, source, state="new")


def writes_stream(row: Row) -> bool:
    """Whether a tensor writes to the residual stream."""
    return any(axis.kind is Kind.RESIDUAL and axis.use == "out" for axis in row.axes)


def _with_noise(rule: TensorRule, target: ModelConfig, growth: GrowthConfig) -> TensorRule:
    """The paper's noise on every matrix of the layers, or noise that cancels over the copies of an input."""
    if rule.source is None or len(rule.axes) == 1:
        return rule
    noise = None
    if growth.noise and split_layer_key(rule.target) is not None:
        d, depth = target.hidden_size, target.num_layers
        variance = 1 / (d * depth**2) if writes_stream(row_of(rule.target)) else 2 / (5 * d)
        noise = Noise(deviation=growth.noise * math.sqrt(variance), mix=growth.noise)
    elif growth.cancelling_noise and rule.target != EMBEDDING.name and rule.axes[1].index is not None:
        noise = Noise(deviation=growth.cancelling_noise * target.init_std, cancelling=True)
    if noise is None:
        return rule
    return TensorRule(rule.target, rule.axes, rule.source, noise=noise, state=rule.state)


def _name(choice: Choice, deeper: bool, wider: bool) -> str:
    """What was done, in the names of the operators: direct growth of the depth alone is a stack."""
    if choice.depth is None or choice.width is None:
        return choice.growth.operator
    depth, width = choice.depth.name, choice.width.name
    if not wider:
        return depth
    return width if not deeper else choice.growth.operator if depth == width else f"{depth}+{width}"


def _options(growth: GrowthConfig) -> dict[str, Any]:
    """Those that other fields of a record do not hold."""
    elsewhere = {"operator", "layers", "optimizer_state", "schedule"}
    return growth.model_dump(mode="json", exclude=elsewhere, exclude_defaults=True)


def _preserves(choice: Choice, layers: Sequence[int], source: ModelConfig, target: ModelConfig) -> bool:
    """Whether source and target are the same function."""
    in_order = tuple(dict.fromkeys(layers)) == tuple(range(source.num_layers))
    adds_identities = choice.depth is not None and choice.depth.keeps_function
    same_depth = in_order and (target.num_layers == source.num_layers or adds_identities)
    wider = bool(width_changes(source, target))
    same_width = not wider or (choice.width is not None and choice.width.keeps_function)
    return same_depth and same_width and not choice.growth.noise


def _multipliers(rules: Sequence[TensorRule]) -> dict[str, Multipliers]:
    """lr' = a lr, wd' = wd / a and eps' = g eps of each tensor, where a and g are one number for all of it."""
    result: dict[str, Multipliers] = {}
    for rule in rules:
        key = without_layer_number(rule.target)
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


def inexact_multipliers(plan: GrowthPlan) -> list[str]:
    """Tensors (layer number ``*``) for which no one learning rate follows the source run."""
    first = {without_layer_number(rule.target): rule for rule in reversed(plan.rules) if rule.source}
    return sorted(key for key, rule in first.items() if _uniform(rule, "scale") is None)


def _silent_layers(depth: Depth | None, layers: Sequence[int]) -> list[str]:
    if depth is None or depth.repeats != "zero_output" or len(set(layers)) == len(layers):
        return []
    return ["qkv, fc1 and gains of the new layers: their o and down are zero (these get a gradient, the others follow)"]


def _silent_width(maps: WidthMaps) -> list[str]:
    """New parts without a gradient in the first step, with the reason."""
    source, target = maps.source, maps.target
    silent = []
    if maps.width.copies and target.head_dim > source.head_dim:
        silent.append("new q and k channels: both give zero, so without noise they stay zero")
    if not maps.width.closes_with_zeros:
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
