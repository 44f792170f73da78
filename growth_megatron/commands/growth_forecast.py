"""What a growth will do and cost, from metadata alone: no tensor is read, no file written.

Owns: the figures and the source -> target map of a plan, as data and as text.
Does not own: the plan (``growth.plan``), the executors.
"""

from __future__ import annotations

import math
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from growth_megatron.checkpoint.describe import compact_layers, describe_options, geometry_changes, model_line
from growth_megatron.checkpoint.interchange import LocatedSource
from growth_megatron.checkpoint.torch_dist.optimizer_groups import describe_multipliers
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.config.units import format_bytes, format_count
from growth_megatron.growth.execute import WRITERS, with_optimizer
from growth_megatron.growth.layers import connection_rate
from growth_megatron.growth.link import Zeros, can_link, grown_metadata, other_files, same_file_system
from growth_megatron.growth.plan import inexact_multipliers
from growth_megatron.growth.rules import RANDOM, ZERO, AxisRule, GrowthPlan, OptimizerState, TensorRule
from growth_megatron.model.architecture import without_layer_number
from growth_megatron.model.cost import parameter_count
from growth_megatron.model.tensors import MASTER_PREFIX, MOMENT_PREFIXES, split_state_key

_BYTES_PER_WRITER = 64 * 2**20  # a chunk of the target in float32, what it is computed from, and noise
_POLICY_WORDS = {
    "reset": "reset (moments zero, optimizer step 0; float32 masters grown)",
    "carry": "carry (moments by the rule of their weight, optimizer step kept)",
    "asymmetric": "asymmetric (moments of the first copies carried, of all others zero; optimizer step kept)",
}


def forecast(
    origin: LocatedSource,
    plan: GrowthPlan,
    policy: OptimizerState,
    target: Path | None,
    *,
    materialize: bool,
    weights_only: bool,
) -> dict[str, Any]:
    """All that is known of a growth beforehand, as JSON-able data; bytes and counts are plain numbers.

    With ``weights_only`` the target is a Hugging Face folder, without any optimizer state.
    """
    before, after = parameter_count(plan.source_geometry), parameter_count(plan.target_geometry)
    links = not weights_only and _links(origin, plan, materialize)
    copies = links and target is not None and not same_file_system(origin.path, existing_parent(target))
    costs = _linked_costs(origin, plan, policy, copies) if links else _written_costs(origin, plan, policy, weights_only)
    free = shutil.disk_usage(existing_parent(target)).free if target is not None else None
    return {
        "source": str(origin.path),
        "target": str(target) if target is not None else None,
        "step": origin.manifest.step if origin.manifest else None,
        "consumed_tokens": origin.manifest.consumed_tokens if origin.manifest else None,
        "operator": plan.operator,
        "options": dict(plan.options),
        "seed": plan.seed,
        "source_geometry": plan.source_geometry.model_dump(),
        "target_geometry": plan.target_geometry.model_dump(),
        "changes": geometry_changes(plan.source_geometry, plan.target_geometry),
        "parameters": {"source": before.total, "target": after.total},
        "layers": list(plan.layers or ()),
        "connection_rate": connection_rate(plan.layers or ()),
        "function_preserving": plan.function_preserving,
        "optimizer_state": None if weights_only else policy,
        "multipliers": {key: value.model_dump() for key, value in plan.multipliers.items()},
        "executor": "copy" if copies else "link" if links else "write",
        **costs,
        "free_bytes": free,
        "enough_space": None if free is None else costs["written_bytes"] <= free,
        "tensors": tensor_map(plan),
        "no_gradient_at_first": list(plan.zero_gradient_at_first),
        "inexact_moments": list(plan.inexact_moments) if policy != "reset" else [],
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
        return "zero" if rule.fill == "zeros" else "initialised anew"
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


def render_forecast(figures: dict[str, Any], plan: GrowthPlan) -> list[str]:
    """The forecast as lines of text."""
    before, after = parameter_count(plan.source_geometry), parameter_count(plan.target_geometry)
    came = "" if figures["step"] is None else f" (step {figures['step']:,}, {figures['consumed_tokens']:,} tokens)"
    options = describe_options(figures["options"], plan.seed)
    lines = [
        f"source           {figures['source']}{came}",
        f"                 {model_line(plan.source_geometry)}",
        f"target           {figures['target'] or '(not named)'}",
        f"                 {model_line(plan.target_geometry)}",
        f"operator         {plan.operator}{options}: {', '.join(figures['changes']) or 'the same geometry'}",
        f"parameters       {format_count(before.total)} -> {format_count(after.total)} "
        f"(x{after.total / before.total:.2f}; without embeddings {format_count(before.without_embeddings)} -> "
        f"{format_count(after.without_embeddings)})",
        f"layers           {compact_layers(plan.layers or ())} (source layers from 0, in the target's order)",
        f"connection rate  {100 * figures['connection_rate']:.1f} % of neighbouring layers were neighbours before",
        f"function         {'kept: the logits stay what they were' if plan.function_preserving else 'changed'}",
        f"optimizer state  {_POLICY_WORDS.get(figures['optimizer_state'], 'none in a Hugging Face folder')}",
    ]
    if plan.multipliers:
        lines.append(f"multipliers      {describe_multipliers(plan.multipliers)}")
    lines += [f"no gradient      {text}" for text in figures["no_gradient_at_first"]]
    lines += [f"moments inexact  {text}" for text in figures["inexact_moments"]]
    lines += [
        f"no multipliers   {text}: its factors differ within the tensor" for text in figures["no_multipliers_for"]
    ]
    return [*lines, *_cost_lines(figures)]


def render_map(figures: dict[str, Any]) -> list[str]:
    """The source -> target map as lines of text."""
    rows = [("count", "target", "shape", "source", "rule")]
    for line in figures["tensors"]:
        shapes = [" x ".join(map(str, shape)) for shape in (line["source_shape"], line["shape"]) if shape is not None]
        shape = shapes[0] if len(set(shapes)) == 1 else " -> ".join(shapes)
        same = "the same" if line["source"] == line["target"] else line["source"] or "-"
        state = "" if line["state"] == "old" else f" ({line['state']} layer)"
        rows.append((str(line["count"]), line["target"], shape, same, line["rule"] + state))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join([row[0].rjust(widths[0]), *(row[c].ljust(widths[c]) for c in (1, 2, 3)), row[4]]).rstrip()
        for row in rows
    ]


def existing_parent(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def _cost_lines(figures: dict[str, Any]) -> Iterator[str]:
    read, written, linked = (figures[key] for key in ("read_bytes", "written_bytes", "linked_bytes"))
    if figures["executor"] == "link":
        yield f"files            {format_bytes(linked)} linked, about {format_bytes(written)} written"
    elif figures["executor"] == "copy":
        yield f"files            {format_bytes(written)} written: two file systems, so data are copied, not linked"
    else:
        memory = f"up to {format_bytes(figures['peak_memory_bytes'])} of memory a rank beside the libraries' own"
        yield f"files            {format_bytes(read)} read, {format_bytes(written)} written; {memory}"
    if figures["free_bytes"] is not None and figures["executor"] != "link":
        enough = "" if figures["enough_space"] else ": NOT ENOUGH, choose a target on another disk"
        yield f"disk             {format_bytes(figures['free_bytes'])} free{enough}"


def _links(origin: LocatedSource, plan: GrowthPlan, materialize: bool) -> bool:
    if materialize or origin.manifest is None or not isinstance(origin.source, DistCheckpoint):
        return False
    return can_link(plan, origin.source.metadata)


def _linked_costs(origin: LocatedSource, plan: GrowthPlan, policy: OptimizerState, copies: bool) -> dict[str, int]:
    assert origin.manifest is not None
    assert isinstance(origin.source, DistCheckpoint)
    held = origin.manifest
    zeros = Zeros(taken=held.files)
    metadata = grown_metadata(origin.source.metadata, plan, policy, zeros)
    pickled = len(pickle.dumps(metadata))
    names = {info.relative_path for info in metadata.storage_data.values()}
    small = sum(held.files[name].size_bytes for name in other_files(held)) + len(held.model_dump_json(indent=1))
    data = sum(entry.size_bytes for name, entry in held.files.items() if name in names)
    written = pickled + len(zeros.content) + small + 4096  # and common.pt
    return {
        "read_bytes": pickled + (data if copies else 0),
        "written_bytes": written + (data if copies else 0),
        "linked_bytes": 0 if copies else data,
        "peak_memory_bytes": 4 * pickled,
    }


def _written_costs(
    origin: LocatedSource, plan: GrowthPlan, policy: OptimizerState, weights_only: bool
) -> dict[str, int]:
    source = with_optimizer(origin)
    dtypes = {split_state_key(key)[0]: source.spec(key).dtype for key in source.keys()}
    if weights_only:
        dtypes = {"": dtypes[""]}
    read = written = 0
    for rule in plan.rules:
        target_numel, source_numel = math.prod(rule.shape), math.prod(rule.source_shape)
        for prefix, dtype in dtypes.items():
            if prefix in MOMENT_PREFIXES and not rule.keeps_moments(policy):
                continue
            if rule.fill != "zeros":
                written += target_numel * dtype.itemsize
            from_master = prefix == "" and MASTER_PREFIX in dtypes and not rule.is_selection
            if rule.source is not None and not from_master:  # a computed weight is its master, cast
                read += source_numel * (dtype if origin.manifest else dtypes[""]).itemsize
    return {
        "read_bytes": read,
        "written_bytes": written,
        "linked_bytes": 0,
        "peak_memory_bytes": WRITERS * _BYTES_PER_WRITER,
    }
