"""What a growth will do and cost, as figures and as text.

Owns: the figures and the source -> target map of a checked growth, as data and as lines.
Does not own: plan and costs (``growth.plan``, ``growth.checked``), the executors.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from growth_megatron.checkpoint.folder.target import free_bytes
from growth_megatron.checkpoint.torch_dist.optimizer_groups import describe_multipliers
from growth_megatron.config.lines import compact_layers, describe_options, geometry_changes, model_line
from growth_megatron.config.tables import columns
from growth_megatron.config.units import format_bytes, format_count
from growth_megatron.growth.checked import CheckedGrowth
from growth_megatron.growth.layers import connection_rate
from growth_megatron.growth.plan import inexact_multipliers
from growth_megatron.growth.ramps import describe_ramps
from growth_megatron.growth.rules import RANDOM, ZERO, AxisRule, GrowthPlan, TensorRule
from growth_megatron.model.architecture import without_layer_number
from growth_megatron.model.cost import parameter_count

_POLICY_WORDS = {
    "reset": "reset (moments zero, optimizer step 0; float32 masters grown)",
    "carry": "carry (moments by the rule of their weight, optimizer step kept)",
    "asymmetric": "asymmetric (moments of the first copies carried, of all others zero; optimizer step kept)",
}


def forecast(growth: CheckedGrowth) -> dict[str, Any]:
    """All that is known of a growth beforehand, as JSON-able data; bytes and counts are plain numbers."""
    origin, plan = growth.origin, growth.plan
    before, after = parameter_count(plan.source_geometry), parameter_count(plan.target_geometry)
    free = free_bytes(growth.target) if growth.target is not None else None
    return {
        "source": str(origin.path),
        "target": str(growth.target) if growth.target is not None else None,
        "step": origin.manifest.step if origin.is_of_a_run else None,
        "consumed_tokens": origin.manifest.consumed_tokens if origin.is_of_a_run else None,
        "operator": plan.operator,
        "options": dict(plan.options),
        "seed": plan.seed,
        "source_geometry": plan.source_geometry.model_dump(),
        "target_geometry": plan.target_geometry.model_dump(),
        "changes": geometry_changes(plan.source_geometry, plan.target_geometry),
        "parameters": {"source": before.total, "target": after.total},
        "layers": list(plan.layers or ()),
        "connection_rate": connection_rate(plan.layers) if plan.layers else None,
        "function_preserving": plan.function_preserving,
        "optimizer_state": None if growth.weights_only else growth.policy,
        "masks": dict(plan.ramps),
        "multipliers": {key: value.model_dump() for key, value in plan.multipliers.items()},
        "executor": growth.executor,
        **dataclasses.asdict(growth.costs),
        "free_bytes": free,
        "enough_space": None if free is None else growth.costs.written_bytes <= free,
        "tensors": tensor_map(plan),
        "no_gradient_at_first": list(plan.zero_gradient_at_first),
        "inexact_moments": list(plan.inexact_moments) if growth.policy != "reset" else [],
        "no_multipliers_for": inexact_multipliers(plan) if plan.options.get("multipliers") else [],
    }


def tensor_map(plan: GrowthPlan) -> list[dict[str, Any]]:
    """Where every target tensor comes from; those of layers that are alike share a line."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for rule in plan.rules:
        target = without_layer_number(rule.target)
        source = without_layer_number(rule.source) if rule.source else None
        alike = target, source, rule.state, rule.fill
        if alike not in lines:
            lines[alike] = {
                "target": target,
                "source": source,
                "count": 0,
                "state": rule.state,
                "source_shape": list(rule.source_shape) if rule.source else None,
                "shape": list(rule.shape),
                "rule": describe_rule(rule),
            }
        lines[alike]["count"] += 1
    return list(lines.values())


def describe_rule(rule: TensorRule) -> str:
    """One tensor's rule in a few words."""
    if rule.fill is not None:
        return {"zeros": "zero", "initial": "initialised anew"}.get(rule.fill, "learned maps of the source's")
    names = ("rows", "columns") if len(rule.axes) == 2 else ("entries",)
    parts = [f"{name} {text}" for name, axis in zip(names, rule.axes, strict=True) if (text := _describe_axis(axis))]
    if rule.noise is not None:
        kind = "cancelling noise" if rule.noise.cancelling else "noise"
        parts.append(f"{kind} of deviation {rule.noise.deviation:.3g}")
    return "; ".join(parts) or "as it is"


def _describe_axis(axis: AxisRule) -> str:
    parts = []
    if axis.index is not None:
        present = [entry for entry in axis.index if entry >= 0]
        counts = sorted(set(Counter(present).values())) or [0]
        words = [f"each {counts[0]} to {counts[-1]} times" if len(counts) > 1 else f"each {counts[0]} times"]
        if counts == [1]:
            words = [f"{len(present)} kept"]
        marks = ((ZERO, "zero"), (RANDOM, "random"))
        words += [f"{axis.index.count(mark)} {name}" for mark, name in marks if mark in axis.index]
        parts.append(" + ".join(words) if counts != [1] or len(words) > 1 else "in another order")
    if axis.scale is not None:
        low, high = min(axis.scale), max(axis.scale)
        parts.append(f"x {low:.4g}" if math.isclose(low, high) else f"x {low:.4g} to {high:.4g}")
    return " ".join(parts)


def render_forecast(growth: CheckedGrowth, figures: dict[str, Any]) -> list[str]:
    """The forecast as lines of text."""
    plan = growth.plan
    before, after = parameter_count(plan.source_geometry), parameter_count(plan.target_geometry)
    came = "" if figures["step"] is None else f" (step {figures['step']:,}, {figures['consumed_tokens']:,} tokens)"
    options = describe_options(figures["options"], plan.seed)
    rows = [
        ("source", f"{figures['source']}{came}"),
        ("", model_line(plan.source_geometry)),
        ("target", figures["target"] or "(not named)"),
        ("", model_line(plan.target_geometry)),
        ("operator", f"{plan.operator}{options}: {', '.join(figures['changes']) or 'the same geometry'}"),
        (
            "parameters",
            f"{format_count(before.total)} -> {format_count(after.total)} (x{after.total / before.total:.2f}; without "
            f"embeddings {format_count(before.without_embeddings)} -> {format_count(after.without_embeddings)})",
        ),
        ("layers", _layers_line(plan.layers)),
    ]
    if plan.layers and plan.layers != tuple(range(plan.source_geometry.num_layers)):
        kept = f"{100 * figures['connection_rate']:.1f} % of neighbouring layers were neighbours before"
        rows.append(("connection rate", kept))
    rows += [
        ("function", "kept: the logits stay what they were" if plan.function_preserving else "changed"),
        ("optimizer state", _POLICY_WORDS.get(figures["optimizer_state"], "none in a Hugging Face folder")),
    ]
    if plan.ramps:
        rows.append(("masks open", describe_ramps(plan.ramps)))
    if plan.multipliers:
        rows.append(("multipliers", describe_multipliers(plan.multipliers)))
    rows += [("no gradient", text) for text in figures["no_gradient_at_first"]]
    rows += [("moments inexact", text) for text in figures["inexact_moments"]]
    rows += [
        ("no multipliers", f"{text}: its factors differ within the tensor") for text in figures["no_multipliers_for"]
    ]
    return columns([*rows, *_cost_rows(figures)])


def _layers_line(layers: Sequence[int] | None) -> str:
    if not layers:
        return "none in the source"
    return f"{compact_layers(layers)} (source layers from 0, in the target's order)"


def render_map(figures: dict[str, Any]) -> list[str]:
    """The source -> target map as lines of text."""
    rows = [("count", "target", "shape", "source", "rule")]
    for line in figures["tensors"]:
        shapes = [" x ".join(map(str, shape)) for shape in (line["source_shape"], line["shape"]) if shape is not None]
        shape = shapes[0] if len(set(shapes)) == 1 else " -> ".join(shapes)
        same = "the same" if line["source"] == line["target"] else line["source"] or "-"
        state = "" if line["state"] == "old" else f" ({line['state']} layer)"
        rows.append((str(line["count"]), line["target"], shape, same, line["rule"] + state))
    return columns(rows, right=[0])


def _cost_rows(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    read, written, linked = (figures[key] for key in ("read_bytes", "written_bytes", "linked_bytes"))
    if figures["executor"] == "link":
        yield "files", f"{format_bytes(linked)} linked, about {format_bytes(written)} written"
    elif figures["executor"] == "copy":
        yield "files", f"{format_bytes(written)} written: two file systems, so data are copied, not linked"
    else:
        memory = f"up to {format_bytes(figures['peak_memory_bytes'])} of memory a rank beside the libraries' own"
        yield "files", f"{format_bytes(read)} read, {format_bytes(written)} written; {memory}"
    if figures["free_bytes"] is not None and figures["executor"] != "link":
        enough = "" if figures["enough_space"] else ": NOT ENOUGH, choose a target on another disk"
        yield "disk", f"{format_bytes(figures['free_bytes'])} free{enough}"
