"""What a run will cost, before anything is started.

Owns: putting the formulas of ``model.cost`` together per stage and over a growing run.
Does not own: how a plan is shown (``commands.plan_tables``).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from growth_megatron.config.checks import check_world_size
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from growth_megatron.growth.conditions import GEOMETRY_FIELDS
from growth_megatron.growth.new_parts import describe_groups
from growth_megatron.growth.operators import choose
from growth_megatron.growth.ramps import describe_ramps, mask_ramps
from growth_megatron.model.cost import (
    ParameterCount,
    RankMemory,
    bubble_fraction,
    bubble_to_ideal,
    checkpoint_bytes,
    flops_per_token,
    parameter_count,
    rank_memory,
)

__all__ = ["RunPlan", "StagePlan", "flops_per_token", "parameter_count", "plan_run", "plan_to_dict"]

_GROWING = (*GEOMETRY_FIELDS, "norm_epsilon", "tie_embeddings")
"""What a growth may change."""

_SHOWN_OTHERWISE = {"operator", "layers", "optimizer_state", "schedule", "ramp"}


@dataclass(frozen=True)
class StagePlan:
    """One stage at one world size. FLOPs count forward and backward, see ``model.cost.flops_per_token``."""

    name: str
    grown_by: str | None
    """How its model comes out of the stage before, in words; None for the first stage."""
    model: ModelConfig
    parallel: ParallelConfig
    world_size: int
    data_parallel_size: int
    micro_batches: int
    """Micro-batches per step on each data-parallel rank."""
    parameters: ParameterCount
    flops_per_token: int
    tokens_per_step: int
    steps: int
    tokens: int
    flops: int
    ranks: tuple[RankMemory, ...]
    """One entry a pipeline rank."""
    bubble_to_ideal: float
    bubble_fraction: float
    checkpoint_bytes: int
    groups: str
    """What is trained otherwise than the rest, in words; most often nothing."""
    share: float
    """Share of the run's FLOPs."""

    @property
    def flops_6nd(self) -> int:
        """6 N D with N all parameters, embeddings included, and D tokens; the paper's measure of cost."""
        return 6 * self.parameters.total * self.tokens

    @property
    def worst(self) -> RankMemory:
        """The pipeline stage that needs the most memory."""
        return max(self.ranks, key=lambda rank: rank.total_bytes)


@dataclass(frozen=True)
class RunPlan:
    """All stages of a run."""

    stages: tuple[StagePlan, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens of all stages."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> int:
        """FLOPs of all stages, by ``flops_per_token``."""
        return sum(stage.flops for stage in self.stages)

    @property
    def flops_6nd(self) -> int:
        """6 N D summed over the stages."""
        return sum(stage.flops_6nd for stage in self.stages)


def plan_run(config: RunConfig, world_size: int | None = None) -> RunPlan:
    """Plan every stage.

    Args:
        world_size: ranks of all stages. Default: what each stage's data_parallel_size asks for; for stages without
            one, the largest such world size, or else the smallest that fits all their layouts.

    Raises:
        ConfigError: the world size does not fit a stage.
    """
    worlds = [world_size] * len(config.stages) if world_size is not None else _default_worlds(config)
    for index, world in enumerate(worlds):
        check_world_size(config, index, world)
    total = sum(stage.num_steps * stage.tokens_per_step * flops_per_token(stage.model) for stage in config.stages)
    return RunPlan(tuple(_plan_stage(config, index, world, total) for index, world in enumerate(worlds)))


def plan_to_dict(plan: RunPlan) -> dict[str, Any]:
    """The plan as JSON-able data; sizes in bytes."""
    stages = []
    for stage in plan.stages:
        entry = {
            field.name: getattr(stage, field.name)
            for field in dataclasses.fields(stage)
            if field.name not in ("model", "parallel", "parameters", "ranks")
        }
        entry["model"] = stage.model.model_dump(mode="json")
        entry["parallel"] = stage.parallel.model_dump(mode="json")
        entry["parameters"] = stage.parameters.total
        entry["parameters_without_embeddings"] = stage.parameters.without_embeddings
        entry["flops_6nd"] = stage.flops_6nd
        entry["ranks"] = [{**dataclasses.asdict(rank), "total_bytes": rank.total_bytes} for rank in stage.ranks]
        entry["worst_pipeline_rank"] = stage.worst.pipeline_rank
        stages.append(entry)
    return {
        "stages": stages,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "flops": plan.flops,
        "flops_6nd": plan.flops_6nd,
    }


def _default_worlds(config: RunConfig) -> list[int]:
    sizes = [stage.parallel.model_parallel_size for stage in config.stages]
    degrees = [stage.parallel.data_parallel_size for stage in config.stages]
    asked = [size * degree for size, degree in zip(sizes, degrees, strict=True) if degree is not None]
    shared = max(asked) if asked else math.lcm(*sizes)
    return [shared if degree is None else size * degree for size, degree in zip(sizes, degrees, strict=True)]


def _plan_stage(config: RunConfig, index: int, world_size: int, total_flops: int) -> StagePlan:
    stage = config.stages[index]
    parallel = stage.parallel
    data_parallel_size = world_size // parallel.model_parallel_size
    micro_batches = stage.training.global_batch_size // (stage.training.micro_batch_size * data_parallel_size)
    per_token = flops_per_token(stage.model)
    tokens = stage.num_steps * stage.tokens_per_step
    return StagePlan(
        name=stage.name,
        grown_by=_growth(config, index),
        model=stage.model,
        parallel=parallel,
        world_size=world_size,
        data_parallel_size=data_parallel_size,
        micro_batches=micro_batches,
        parameters=parameter_count(stage.model),
        flops_per_token=per_token,
        tokens_per_step=stage.tokens_per_step,
        steps=stage.num_steps,
        tokens=tokens,
        flops=per_token * tokens,
        ranks=tuple(
            rank_memory(stage, rank, data_parallel_size, micro_batches)
            for rank in range(parallel.pipeline_parallel_size)
        ),
        bubble_to_ideal=bubble_to_ideal(parallel, micro_batches),
        bubble_fraction=bubble_fraction(parallel, micro_batches),
        checkpoint_bytes=checkpoint_bytes(stage.model, stage.training),
        groups=_groups(config, index),
        share=per_token * tokens / total_flops,
    )


def _growth(config: RunConfig, index: int) -> str | None:
    if index == 0:
        return None
    source, stage = config.stages[index - 1], config.stages[index]
    growth = stage.growth or GrowthConfig()
    listed = " by an explicit layer list" if growth.layers is not None else ""
    pairs = [(key, getattr(source.model, key), getattr(stage.model, key)) for key in _GROWING]
    changes = [f"{key} {_shown(before)} -> {_shown(after)}" for key, before, after in pairs if before != after]
    options = growth.model_dump(exclude=_SHOWN_OTHERWISE, exclude_defaults=True)
    notes = [
        f"optimizer state {choose(growth).state_policy}",
        *(f"{key} {_shown(value)}" for key, value in options.items()),
    ]
    if ramps := mask_ramps(source.model, stage.model, choose(growth)):
        notes.append(f"masks open: {describe_ramps(ramps)}")
    what = ", ".join(changes) or "the same geometry"
    return f"{growth.operator}{listed} from {source.name}: {what}; {', '.join(notes)}"


def _groups(config: RunConfig, index: int) -> str:
    stage, plan = config.stages[index], None
    if index and stage.optimizer.tells_new_apart:
        from growth_megatron.growth.plan import plan_growth  # needs torch

        growth = stage.growth or GrowthConfig()
        plan = plan_growth(config.stages[index - 1].model, stage.model, growth, config.run.seed)
    return describe_groups(stage.optimizer, plan, stage.model)


def _shown(value: object) -> str:
    """As YAML has it."""
    return str(value).lower()
