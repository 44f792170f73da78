"""A plan as tables for people.

Owns: layout and units of what ``growth-megatron plan`` prints.
Does not own: the numbers (``train.plan``).
"""

from __future__ import annotations

import io

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from growth_megatron.config.units import format_bytes, format_count, format_flops
from growth_megatron.model.cost import RankMemory
from growth_megatron.train.plan import RunPlan, StagePlan

_PLAIN_WIDTH = 132


def render_plan(plan: RunPlan) -> str:
    """The plan as plain text, the same wherever it goes."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=_PLAIN_WIDTH, no_color=True, highlight=False, force_terminal=False)
    console.print(_tables(plan, box.ASCII2))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def print_plan(plan: RunPlan, console: Console) -> None:
    """Print to ``console``: with lines and colour on a terminal, as plain text elsewhere."""
    if console.is_terminal:
        console.print(_tables(plan, box.ROUNDED))
    else:
        console.file.write(render_plan(plan))


def _tables(plan: RunPlan, style: box.Box) -> RenderableType:
    notes = [
        "FLOPs: matrix multiplications of forward and backward, 6 (matrices + V h) + 12 L s n d per token, "
        "recomputation not counted. 6 N D: N all parameters, embeddings included.",
        "Bubble: (p-1)/(m v) of the useful time, (p-1)/(m v + p-1) of the step. Activations: peak of the 1F1B or "
        "interleaved schedule with fused CUDA kernels.",
    ]
    parts: list[RenderableType] = [_cost_table(plan, style), _layout_table(plan, style), _memory_table(plan, style)]
    for stage in plan.stages:
        grown = f" Grown by {stage.grown_by}." if stage.grown_by else ""
        groups = f" {stage.groups[0].upper()}{stage.groups[1:]}." if stage.groups else ""
        parts.append(Text(_worst_line(stage) + grown + groups + _learning_line(stage), style="bold"))
    return Group(*parts, *(Text(note, style="dim") for note in notes))


def _learning_line(stage: StagePlan) -> str:
    phase = stage.learning
    if phase is None:
        return ""
    return (
        f" Before it, maps are learned for {phase.steps} steps: {format_count(phase.tokens)} tokens, {phase.flops:.3e} "
        f"FLOPs ({phase.map_flops:.3e} of them for the maps), {format_bytes(phase.total_bytes)} per rank without "
        f"optimizer ({format_bytes(phase.extra_bytes)} of them for source and maps)."
    )


def _table(title: str, style: box.Box, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=style, title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _cost_table(plan: RunPlan, style: box.Box) -> Table:
    table = _table(
        "Cost", style, "stage", "layers", "parameters", "without emb.", "FLOPs/token", "tokens/step", "steps", "tokens",
        "FLOPs", "6 N D", "share",
    )  # fmt: skip
    for stage in plan.stages:
        table.add_row(
            stage.name,
            str(stage.model.num_layers),
            format_count(stage.parameters.total),
            format_count(stage.parameters.without_embeddings),
            format_flops(stage.flops_per_token),
            format_count(stage.tokens_per_step),
            f"{stage.steps}",
            format_count(stage.tokens),
            f"{stage.flops:.3e}",
            f"{stage.flops_6nd:.3e}",
            f"{stage.share:.1%}",
        )
    if len(plan.stages) > 1:
        table.add_section()
        table.add_row(
            "whole run", "", "", "", "", "", f"{plan.steps}", format_count(plan.tokens), f"{plan.flops:.3e}",
            f"{plan.flops_6nd:.3e}", "100.0%", style="bold",
        )  # fmt: skip
    return table


def _layout_table(plan: RunPlan, style: box.Box) -> Table:
    table = _table(
        "Layout", style, "stage", "ranks", "TP", "SP", "PP", "VPP", "DP", "micro-batches", "bubble/useful",
        "bubble/step", "checkpoint",
    )  # fmt: skip
    for stage in plan.stages:
        parallel = stage.parallel
        table.add_row(
            stage.name,
            str(stage.world_size),
            str(parallel.tensor_parallel_size),
            "on" if parallel.sequence_parallel else "off",
            str(parallel.pipeline_parallel_size),
            str(parallel.model_chunks),
            str(stage.data_parallel_size),
            str(stage.micro_batches),
            f"{stage.bubble_to_ideal:.1%}",
            f"{stage.bubble_fraction:.1%}",
            format_bytes(stage.checkpoint_bytes),
        )
    return table


def _memory_table(plan: RunPlan, style: box.Box) -> Table:
    has_copies = any(rank.copies_bytes for stage in plan.stages for rank in stage.ranks)
    table = _table(
        "Memory per rank", style, "stage", "pipeline rank", "layers", "parameters", "weights", "gradients", "optimizer",
        "activations", *(["copies"] if has_copies else []), "total",
    )  # fmt: skip
    for stage in plan.stages:
        for rank in stage.ranks:
            table.add_row(
                stage.name,
                _rank_name(rank),
                str(rank.num_layers),
                format_count(rank.parameters),
                format_bytes(rank.weights_bytes),
                format_bytes(rank.gradients_bytes),
                format_bytes(rank.optimizer_bytes),
                format_bytes(rank.activations_bytes),
                *([format_bytes(rank.copies_bytes)] if has_copies else []),
                format_bytes(rank.total_bytes),
                style="bold" if rank is stage.worst and len(stage.ranks) > 1 else None,
            )
    return table


def _rank_name(rank: RankMemory) -> str:
    extras = [name for name, has in (("embedding", rank.has_embedding), ("output", rank.has_output)) if has]
    return " + ".join([str(rank.pipeline_rank), *extras])


def _worst_line(stage: StagePlan) -> str:
    worst = stage.worst
    needs = f"{format_bytes(worst.total_bytes)} per rank"
    if len(stage.ranks) == 1:
        return f"{stage.name}: {needs}."
    return f"{stage.name}: pipeline rank {_rank_name(worst)} needs the most memory, {needs}."
